"""Studies of a sweep against what NumPy finds by hand."""

import functools

import numpy as np
import pytest
from scipy import stats

import jaxsoup
from jaxsoup import metrics
from jaxsoup import studies

# Models of one number, whose scores are known: 1 is best, on both data sets.
MODELS = [{'w': np.float32(x)} for x in (3.0, 0.5, -1.5, 2.0, 1.25)]
VALUES = [float(m['w']) for m in MODELS]


class Counted:
  """A score that tells what it was asked for."""

  def __init__(self, best):
    self.best, self.asked = best, []

  def __call__(self, params):
    self.asked.append(float(params['w']))
    return -abs(float(params['w']) - self.best)


def mean(members):
  return float(np.mean([VALUES[k] for k in members]))


def test_soup_scores_are_remembered():
  eval_fn, log = Counted(1.0), {}
  score_fn = studies.soup_scores(MODELS, eval_fn, log)
  assert score_fn((2, 0)) == score_fn((0, 2)) == pytest.approx(-0.25)
  assert log == {(0, 2): score_fn((0, 2))}
  assert len(eval_fn.asked) == 1
  assert studies.soup_scores(MODELS, Counted(9.0), log)((0, 2)) == log[(0, 2)]


def test_soup_scores_of_members_that_count_twice():
  info = jaxsoup.greedy(
      MODELS, Counted(1.1), num_passes=3, with_replacement=True
  ).info
  assert len(set(info.accepted)) < len(info.accepted)
  score_fn = studies.soup_scores(MODELS, Counted(1.1))
  assert score_fn(info.accepted) == pytest.approx(info.score)


def greedy_by_hand(members, score):
  order = sorted(members, key=lambda k: (-score((k,)), k))
  chosen = order[:1]
  for k in order[1:]:
    if score((*chosen, k)) >= score(chosen):
      chosen.append(k)
  return chosen


def test_growth_of_recipes():
  """Held-out data say that 1 is best and choose; 1.2 is best on the others."""
  held_out, report = Counted(1.0), Counted(1.2)
  log = {}
  curves = studies.recipes(
      MODELS, held_out, studies.soup_scores(MODELS, report), scores=log
  )
  steps = []
  grown = studies.growth(
      curves, 5, num_orders=4, seed=3, on_step=lambda *x: steps.append(x)
  )
  assert steps == [(n, 20) for n in range(1, 21)]
  assert grown.nums.tolist() == [1, 2, 3, 4, 5]
  by_held_out = lambda members: -abs(mean(members) - 1.0)
  reported = lambda members: -abs(mean(members) - 1.2)
  rng = np.random.default_rng(3)
  for row in range(4):
    order = rng.permutation(5).tolist()
    for column, num in enumerate(grown.nums):
      members = order[:num]
      best = max(members, key=lambda k: by_held_out((k,)))
      expected = {
          'best single': reported((best,)),
          'uniform': reported(members),
          'greedy': reported(greedy_by_hand(members, by_held_out)),
      }
      actual = {k: x[row, column] for k, x in grown.scores.items()}
      assert actual == pytest.approx(expected, abs=1e-6)
  # No candidate is scored twice, in whatever order it comes up.
  assert len(held_out.asked) == len(log)
  # All orders end with all models.
  assert np.ptp(grown.scores['greedy'][:, -1]) == 0


def test_growth_of_calibration():
  """The same orders for soup and ensemble; equal-mass ECE of mean logits."""
  rng = np.random.default_rng(0)
  label = rng.integers(4, size=200)
  logits = 3 * np.eye(4)[label] + 3 * rng.normal(size=(6, 200, 4))
  logits = logits.astype(np.float32)
  ece = functools.partial(metrics.expected_calibration_error, labels=label)
  curves = {'ensemble': lambda m: ece(logits[list(m)].mean(0))}
  grown = studies.growth(curves, 6, nums=[1, 6], num_orders=3)
  assert grown.scores['ensemble'].shape == (3, 2)
  expected = float(ece(logits.mean(0)))
  np.testing.assert_allclose(grown.scores['ensemble'][:, 1], expected)


def test_growth_refuses_numbers_of_models_that_are_not_there():
  for nums in ([], [0], [4]):
    with pytest.raises(ValueError, match='of 3 models: expected'):
      studies.growth({}, 3, nums=nums)


def test_random_orders():
  eval_fn, log = Counted(1.0), {}
  infos = studies.random_orders(
      MODELS, eval_fn, num_orders=6, seed=1, scores=log
  )
  assert len({info.order for info in infos}) > 1
  for info in infos:
    again = jaxsoup.greedy(MODELS, Counted(1.0), order=info.order)
    assert again.info.accepted == info.accepted
    # The first one tried is always taken.
    assert info.accepted[0] == info.order[0]
  assert len(eval_fn.asked) == len(log)


CONFIGS = [
    dict(seed=1, lr=1e-3, mixup=0.0, aug='none'),
    dict(seed=2, lr=1e-3, mixup=0.0, aug='none'),
    dict(seed=3, lr=1e-2, mixup=0.0, aug='none'),
    dict(seed=3, lr=1e-2, mixup=0.5, aug='none'),
    dict(seed=3, lr=1e-2, mixup=0.5, aug='strong'),
]


def test_groups_that_vary_one_hyper_parameter():
  assert studies.groups(CONFIGS) == {
      'aug': [(3, 4)],
      'lr': [(0, 1, 2)],
      'mixup': [(2, 3)],
      'seed': [(0, 1)],
  }
  assert studies.groups(CONFIGS, ignore=()) == {
      'aug': [(3, 4)],
      'mixup': [(2, 3)],
      'seed': [(0, 1)],
  }


def test_one_varied():
  score_fn = studies.soup_scores(MODELS, Counted(1.0))
  varied = {x.name: x for x in studies.one_varied(CONFIGS, score_fn)}
  singles = [-abs(x - 1) for x in VALUES]
  assert varied['mixup'] == (
      'mixup',
      (2, 3),
      (0.0, 0.5),
      max(singles[2:4]),
      np.mean(singles[2:4]),
      -0.75,
  )
  assert varied['aug'].values == ('none', 'strong')


def ranks(x):
  """Ranks in NumPy, equal values sharing the mean of theirs."""
  x = np.asarray(x, float)
  less, equal = (x[None] < x[:, None]).sum(1), (x[None] == x[:, None]).sum(1)
  return less + (equal + 1) / 2


def test_contributions():
  rng = np.random.default_rng(0)
  configs = [
      dict(lr=float(x), on=bool(b), decay=float(d), name='x', fixed=1, seed=k)
      for k, x, b, d in zip(
          range(30),
          10 ** rng.uniform(-5, -3, 30),
          rng.random(30) < 0.5,
          rng.random(30),
      )
  ]
  noise = rng.normal(size=30)
  scores = [0.3 * np.log10(c['lr']) + 0.05 * n for c, n in zip(configs, noise)]
  frequency = [c['decay'] for c in configs]
  rows = studies.contributions(configs, scores, frequency)
  assert [c.name for c in rows][0] == 'lr' and rows[-1].name == 'fixed'
  assert {c.name for c in rows} == {'lr', 'on', 'decay', 'fixed'}
  for c in rows[:-1]:
    values = [config[c.name] for config in configs]
    expected = np.corrcoef(ranks(values), ranks(scores))[0, 1]
    assert c.correlation == pytest.approx(expected)
    expected = np.corrcoef(ranks(values), ranks(frequency))[0, 1]
    assert c.inclusion == pytest.approx(expected)
    # Of Student's distribution, with n - 2 degrees of freedom.
    r = c.correlation
    t = abs(r) * np.sqrt(28 / (1 - r**2))
    assert c.p_value == pytest.approx(2 * stats.t.sf(t, 28))
  assert np.isnan(rows[-1].correlation)
  again = studies.contributions(configs, scores, ignore=())
  assert {c.name for c in again} == {'lr', 'on', 'decay', 'fixed', 'seed'}
  assert all(np.isnan(c.inclusion) for c in again)


def test_contributions_of_other_runs_are_refused():
  with pytest.raises(ValueError, match="'configs': 5, 'scores': 2"):
    studies.contributions(CONFIGS, [0.1, 0.2])


def test_wise_ft():
  score_fns = {
      'test': lambda params: -((params['w'] - 1) ** 2),
      'shift': lambda params: -((params['w'] + 1) ** 2),
  }
  models = {'single': MODELS[0], 'soup': jaxsoup.uniform(MODELS).params}
  curves = studies.wise_ft({'w': np.float32(-1)}, models, score_fns, num=5)
  for name, params in models.items():
    t = curves[name].t
    w = (1 - t) * -1 + t * float(params['w'])
    np.testing.assert_allclose(
        curves[name].scores['test'], -((w - 1) ** 2), 1e-5
    )
    np.testing.assert_allclose(
        curves[name].scores['shift'], -((w + 1) ** 2), 1e-5, atol=1e-6
    )
