"""Early rejections decide as the full evaluation does."""

import dataclasses
import functools
import json

import _pairwise
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import jaxsoup
from jaxsoup import _soup
from jaxsoup import checkpoints
from jaxsoup import evaluation
from jaxsoup import report
from jaxsoup import studies
from jaxsoup.report import _sections

AtMost = jaxsoup.AtMost


def right(params, batch):
  """Whether a linear classifier of two classes is right."""
  return ((batch['x'] * params).sum(-1) > 0) == batch['label']


def held_out(num, seed=0, noise=0.2):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(num, 4)).astype(np.float32)
  flipped = rng.random(num) < noise
  return {'x': x, 'label': (x.sum(-1) > 0) ^ flipped}


def models(seed, num=None):
  """Classifiers around the best one, some good and some bad."""
  rng = np.random.default_rng(seed)
  num = num or rng.integers(2, 9)
  spread = rng.choice([0.3, 1.0, 3.0], (num, 1))
  return list((1 + spread * rng.normal(size=(num, 4))).astype(np.float32))


def options_of(recipe, seed):
  """Any arguments of a search."""
  rng = np.random.default_rng(seed)
  options = dict(strict=bool(rng.integers(2)))
  if recipe is jaxsoup.greedy:
    options |= dict(
        num_passes=int(rng.integers(1, 4)),
        with_replacement=bool(rng.integers(2)),
        key=[None, jax.random.key(seed)][rng.integers(2)],
    )
  return options


def same_decisions(actual, expected):
  np.testing.assert_array_equal(actual.params, expected.params)
  np.testing.assert_array_equal(actual.alpha, expected.alpha)
  assert actual.info.accepted == expected.info.accepted
  assert actual.info.score == expected.info.score
  assert actual.info.order == expected.info.order
  for got, full in zip(actual.info.trials, expected.info.trials, strict=True):
    assert got[:2] == full[:2] and got.accepted == full.accepted
    if got.accepted:
      assert type(got.score) is float and got.score == full.score
    elif isinstance(got.score, AtMost):
      assert full.score <= got.score.bound


@pytest.mark.slow_variants
@pytest.mark.parametrize(
    'recipe, num_and_size, placement',
    _pairwise.product(
        [jaxsoup.greedy, jaxsoup.pruned],
        [(57, 8), (40, 4), (30, 64), (97, 12)],
        ['one', 'auto', 'explicit'],
    ),
    indirect=['placement'],
)
def test_same_decisions_as_in_full(recipe, num_and_size, placement):
  num, size = num_and_size
  mesh = placement.mesh
  sharding = None if mesh is None else NamedSharding(mesh, P('fsdp'))
  batches = evaluation.batched(held_out(num), size, sharding=sharding)
  # The order that one search has learnt serves the next: it may not matter.
  eval_fn = evaluation.mean_of(right, batches)
  full = evaluation.mean_of(right, list(batches))  # As they are.
  place = jnp.asarray
  if placement.mesh is not None:
    place = functools.partial(
        jax.device_put, device=NamedSharding(placement.mesh, P())
    )
  num_bounds = num_ties = 0
  for seed in range(25):
    thetas = [place(x) for x in models(seed)]
    options = options_of(recipe, seed)
    soup = recipe(thetas, eval_fn, **options)
    expected = recipe(thetas, lambda params: full(params), **options)
    same_decisions(soup, expected)
    scores = [t.score for t in soup.info.trials if not t.accepted]
    num_bounds += sum(isinstance(x, AtMost) for x in scores)
    bars = set(t.score for t in expected.info.trials if t.accepted)
    num_ties += any(t.score in bars for t in expected.info.trials[1:])
  assert num_bounds > 20 and num_ties > 3


@pytest.mark.slow
def test_every_bar_and_every_number_of_right_answers():
  num = 49  # 1/49 * 49 is not 1 in floats.
  answers = lambda params, batch: batch['index'] < params
  batches = evaluation.batched({'index': np.arange(num)}, 5)
  eval_fn = evaluation.mean_of(answers, batches)
  scores = [eval_fn(np.int32(n)) for n in range(num + 1)]
  assert scores == [n / num for n in range(num + 1)]
  bars = [
      b for s in scores for b in (np.nextafter(s, -9), s, np.nextafter(s, 9))
  ]
  for n in range(0, num + 1, 6):
    for bar in map(float, bars):
      for strict in (False, True):
        got = eval_fn.at_least(np.int32(n), bar, strict=strict)
        if scores[n] > bar or (scores[n] == bar and not strict):
          assert type(got) is float and got == scores[n]
        else:
          below = [s for s in scores if s < bar or (strict and s == bar)]
          assert got == AtMost(max(below))


def test_hard_examples_come_first():
  num, hard = 1000, np.random.default_rng(0).permutation(1000)[:100]
  is_hard = np.zeros(num, bool)
  is_hard[hard] = True
  data = {'hard': is_hard, 'u': np.random.default_rng(1).random(num)}
  answers = lambda params, b: ~b['hard'] | (b['u'] < params)
  batches = evaluation.batched(
      {k: np.float32(v) if k == 'u' else v for k, v in data.items()}, 16
  )
  eval_fn = evaluation.mean_of(answers, batches)
  eval_fn(np.float32(0.0))  # A model that gets all of the hard ones wrong.
  bar = eval_fn(np.float32(0.3))
  assert eval_fn.num_seen == num
  assert isinstance(eval_fn.at_least(np.float32(0.25), bar), AtMost)
  # What is too many, about 71 of the 100 hard ones, is among the first 112.
  assert eval_fn.num_seen <= 112
  assert eval_fn.at_least(np.float32(0.35), bar) > bar
  assert eval_fn.num_seen == num
  in_order = evaluation.mean_of(answers, iter_again(batches))
  assert in_order(np.float32(0.3)) == bar
  assert isinstance(in_order.at_least(np.float32(0.25), bar), AtMost)
  assert 500 < in_order.num_seen <= num


class iter_again:
  """Batches that are no list: nothing can be moved between them."""

  def __init__(self, batches):
    self.batches = batches

  def __iter__(self):
    return iter(self.batches)


def unequal(data):
  return [data, {k: x[:9] for k, x in data.items()}]


@pytest.mark.parametrize(
    'cut',
    [
        unequal,
        lambda data: iter_again(evaluation.batched(data, 7)),
        lambda data: [{k: list(x) for k, x in data.items()}],
        lambda data: [
            {k: x[i : i + 6] for k, x in data.items()} for i in (0, 6)
        ],
    ],
)
def test_any_batches(cut):
  batches = cut(held_out(30))
  full = evaluation.mean_of(right, batches)
  for seed in range(5):
    eval_fn = evaluation.mean_of(right, batches)
    soup = jaxsoup.greedy(models(seed), eval_fn)
    expected = jaxsoup.greedy(models(seed), lambda params: full(params))
    same_decisions(soup, expected)


def test_compiled_once():
  traces = []

  def metric_fn(params, batch):
    traces.append(1)
    return right(params, batch)

  batches = evaluation.batched(held_out(50), 8)
  eval_fn = evaluation.mean_of(metric_fn, batches)
  soup = jaxsoup.greedy(models(3), eval_fn)
  assert any(isinstance(t.score, AtMost) for t in soup.info.trials)
  assert len(traces) == 1


def test_a_metric_without_a_bound_runs_in_full():
  margin = lambda params, b: (b['x'] * params).sum(-1) * (2 * b['label'] - 1)
  eval_fn = evaluation.mean_of(margin, evaluation.batched(held_out(50), 8))
  assert 'no model scored yet' in repr(eval_fn)
  full = evaluation.mean_of(margin, evaluation.batched(held_out(50), 8))
  soup = jaxsoup.greedy(models(3), eval_fn)
  expected = jaxsoup.greedy(models(3), lambda params: full(params))
  assert soup.info == expected.info
  assert not any(isinstance(t.score, AtMost) for t in soup.info.trials)
  assert eval_fn.at_least(models(3)[0], 1e9) < 1e9 and eval_fn.num_seen == 50
  assert 'runs in full' in repr(eval_fn)


def test_an_iterator_that_is_used_up():
  eval_fn = evaluation.mean_of(right, iter(evaluation.batched(held_out(9), 4)))
  score = eval_fn(np.ones(4, np.float32))
  with pytest.raises(ValueError, match='hold 0 examples, but held 9 before'):
    eval_fn.at_least(np.ones(4, np.float32), score)


@pytest.mark.parametrize(
    'use',
    [
        float,
        json.dumps,
        lambda bound: bound + 0,
        lambda bound: bound < 0.8,
        lambda bound: max(bound, 0.8),
        lambda bound: np.array(bound, float),
        '{:.4f}'.format,
    ],
)
def test_a_bound_is_no_number(use):
  with pytest.raises(TypeError):
    use(AtMost(0.75))
  assert AtMost(0.75) == AtMost(0.75) != 0.75


@pytest.mark.parametrize('recipe', [jaxsoup.greedy, jaxsoup.pruned])
def test_all_scores_of_a_search_are_exact(recipe):
  batches = evaluation.batched(held_out(60), 8)
  log = {}
  thetas = models(5, num=6)
  info = recipe(thetas, evaluation.mean_of(right, batches), scores=log).info
  num_bounds = 0
  # On another object, which has not learnt which examples are hard.
  score_fn = studies.soup_scores(thetas, evaluation.mean_of(right, batches))
  for trial in info.trials:
    is_bound = isinstance(trial.score, AtMost)
    num_bounds += is_bound
    assert is_bound == (trial.members not in info.scores)
    assert isinstance(log[trial.members], AtMost) == is_bound
  assert num_bounds
  for members, score in info.scores.items():
    assert type(score) is float and score == score_fn(members)


def test_a_bound_in_a_log_is_evaluated_where_a_score_is_needed():
  thetas = [np.float32(3), np.float32(1)]
  bounds = {(0,): AtMost(9.0), (1,): AtMost(9.0), (0, 1): AtMost(9.0)}
  log = dict(bounds)
  score_fn = studies.soup_scores(thetas, float, log)
  assert score_fn((0, 1)) == log[(0, 1)] == 2.0
  for recipe in (jaxsoup.greedy, jaxsoup.pruned):
    log = dict(bounds)
    soup = recipe(thetas, float, scores=log)
    assert soup.info.accepted == (0,) and soup.info.score == 3.0
    assert log == soup.info.scores == {(0,): 3.0, (1,): 1.0, (0, 1): 2.0}


class Stopping:
  """An eval_fn that is interrupted at one call."""

  def __init__(self, eval_fn, at):
    self.eval_fn, self.at, self.num_calls = eval_fn, at, 0

  def _count(self):
    if self.num_calls == self.at:
      raise KeyboardInterrupt
    self.num_calls += 1

  def __call__(self, params):
    self._count()
    return self.eval_fn(params)

  def at_least(self, params, bar, *, strict):
    self._count()
    return self.eval_fn.at_least(params, bar, strict=strict)


@pytest.mark.parametrize('recipe', [jaxsoup.greedy, jaxsoup.pruned])
def test_resumes_with_the_same_info(recipe, tmp_path):
  batches = evaluation.batched(held_out(60), 8)
  make = lambda: evaluation.mean_of(right, batches)
  whole = Stopping(make(), at=None)
  thetas = models(5, num=6)
  expected = recipe(thetas, whole)
  assert any(isinstance(t.score, AtMost) for t in expected.info.trials)
  for at in range(whole.num_calls):
    path = tmp_path / f'{at}.jsonl'
    with pytest.raises(KeyboardInterrupt):
      recipe(thetas, Stopping(make(), at), scores=checkpoints.ScoreLog(path))
    # A new process knows nothing of which examples are hard.
    rest = Stopping(make(), None)
    soup = recipe(thetas, rest, scores=checkpoints.ScoreLog(path))
    np.testing.assert_array_equal(soup.params, expected.params)
    assert soup.info == expected.info
    assert rest.num_calls == whole.num_calls - at


def test_a_known_bound_is_used_where_it_decides():
  class Counting:

    def __init__(self):
      self.bars = []

    def __call__(self, params):
      return float(params)

    def at_least(self, params, bar, *, strict):
      self.bars.append(bar)
      return float(params)

  thetas = [np.float32(3), np.float32(1)]
  singles = {(0,): 3.0, (1,): 1.0}
  eval_fn = Counting()
  log = {**singles, (0, 1): AtMost(2.9)}
  soup = jaxsoup.greedy(thetas, eval_fn, scores=log)
  assert soup.info.accepted == (0,) and not eval_fn.bars
  assert soup.info.trials[1].score == AtMost(2.9)
  assert soup.info.scores == singles
  # A tie is enough, unless strict: then 3.0 says it all.
  log = {**singles, (0, 1): AtMost(3.0)}
  jaxsoup.greedy(thetas, eval_fn, scores=log, strict=True)
  assert not eval_fn.bars and type(log[(0, 1)]) is AtMost
  soup = jaxsoup.greedy(thetas, eval_fn, scores=log)
  assert eval_fn.bars == [3.0] and type(log[(0, 1)]) is float
  # Where pruned starts, the score must be exact.
  log = {**singles, (0, 1): AtMost(2.9)}
  pruned = jaxsoup.pruned(thetas, eval_fn, scores=log)
  assert log[(0, 1)] == 2.0 and pruned.info.accepted == (0,)


def test_a_bound_that_decides_nothing_is_an_error():
  def eval_fn(params):
    return float(params)

  eval_fn.at_least = lambda params, bar, *, strict: AtMost(bar)
  with pytest.raises(ValueError, match=r'AtMost\(bound=1.0\).* bar is 1.0'):
    jaxsoup.greedy([np.float32(1), np.float32(0)], eval_fn)
  with pytest.raises(ValueError, match='not an exact score'):
    jaxsoup.greedy([np.float32(1)], lambda params: AtMost(params))


def test_bounds_are_stored(tmp_path):
  path = tmp_path / 'scores.jsonl'
  log = checkpoints.ScoreLog(path)
  log[(0,)], log[(0, 1)] = 0.75, AtMost(0.1 + 0.2)
  first, second = path.read_text().splitlines()
  assert first.startswith('{"members": [0], "score": 0.75, ')
  bound = 0.1 + 0.2
  assert second.startswith(f'{{"members": [0, 1], "at_most": {bound}, ')
  assert dict(checkpoints.ScoreLog(path)) == dict(log)
  eval_fn = evaluation.mean_of(right, evaluation.batched(held_out(60), 8))
  soup = jaxsoup.greedy(models(5, num=6), eval_fn)
  assert any(isinstance(t.score, AtMost) for t in soup.info.trials)
  checkpoints.save(
      tmp_path / 'soup', dataclasses.replace(soup, params={'w': soup.params})
  )
  assert checkpoints.load(tmp_path / 'soup').info == soup.info


def test_bounds_in_the_table_of_trials():
  trials = (
      jaxsoup.Trial(0, (1,), AtMost(0.5), False),
      jaxsoup.Trial(1, (0,), 0.625, False),
  )
  info = _soup.SearchInfo(trials, (0, 1), 0.75, {}, (0, 1), False, ())
  (section,) = _sections.trial_sections({'pruned': info}, label='accuracy')
  rows = [(r['score'], r['at_most']) for r in section.data['trials']]
  assert rows == [(None, 0.5), (0.625, None)]


def test_the_bar_of_a_search_that_starts_from_all():
  from matplotlib import figure

  # Removals: the first is rejected early, so its bound is not the bar.
  trials = (
      jaxsoup.Trial(0, (1,), AtMost(0.5), False),
      jaxsoup.Trial(1, (0,), 0.875, True),
  )
  scores = {(0, 1): 0.75, (0,): 0.875}
  info = _soup.SearchInfo(trials, (0,), 0.875, scores, (0, 1), False, ())
  ax = figure.Figure().add_subplot()
  report.trials(ax, {'pruned': info}, scale=1)
  assert list(ax.lines[0].get_ydata()) == [0.75, 0.875]


def test_bounds_in_the_picture():
  from matplotlib import figure

  eval_fn = evaluation.mean_of(right, evaluation.batched(held_out(60), 8))
  info = jaxsoup.greedy(models(5, num=6), eval_fn).info
  ax = figure.Figure().add_subplot()
  report.trials(ax, {'greedy': info}, scale=1)
  points = ax.collections[2].get_offsets()
  expected = [
      (n, t.score.bound)
      for n, t in enumerate(info.trials, 1)
      if isinstance(t.score, AtMost)
  ]
  assert expected
  np.testing.assert_allclose(points, expected)
  texts = [text.get_text() for text in ax.get_legend().get_texts()]
  assert texts[-1] == 'rejected early, at most'
