"""Searches of alpha, and several scores of one model."""

import functools
import itertools
import json
import types

import cma
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import jaxsoup
from jaxsoup import black_box
from jaxsoup import checkpoints
from jaxsoup import evaluation

METHODS = (
    black_box.cma_es,
    black_box.random_search,
    black_box.coordinate_search,
)
NUM = 4


def models(num=NUM, size=6, seed=0):
  rng = np.random.default_rng(seed)
  return [
      {
          'body': {'w': rng.normal(size=size).astype(np.float32)},
          'head': rng.normal(size=size).astype(np.float32),
      }
      for _ in range(num)
  ]


def flat(params):
  return np.concatenate([params['body']['w'], params['head']], dtype=float)


class Counted:
  """Distance to a mix of the models, and how often it was asked for."""

  def __init__(self, alpha, ingredients):
    matrix = np.stack(list(map(flat, ingredients)))
    self.target = np.asarray(alpha) @ matrix
    self.num = 0

  def __call__(self, params):
    self.num += 1
    return -float(np.sum((flat(params) - self.target) ** 2))


# The optimizers.


@pytest.mark.parametrize(
    'alpha, alpha_fn',
    [
        ([0.1, 0.2, 0.3, 0.4], jaxsoup.simplex),
        ([0, 0.5, 0.5, 0], jaxsoup.simplex),
        ([0, 0, 1, 0], jaxsoup.simplex),
        ([1.5, -0.7, 0.1, 0.1], jaxsoup.hyperplane),
    ],
)
@pytest.mark.parametrize('method', [METHODS[0], METHODS[2]])
def test_the_optimum_is_found(alpha, alpha_fn, method):
  ingredients = models()
  if method is black_box.coordinate_search:
    method = functools.partial(method, min_step=1e-4)
  soup = jaxsoup.search(
      ingredients,
      Counted(alpha, ingredients),
      num_evaluations=900,
      method=method,
      alpha_fn=alpha_fn,
  )
  np.testing.assert_allclose(soup.alpha, alpha, atol=0.02)
  np.testing.assert_allclose(soup.alpha.sum(), 1, atol=1e-5)
  assert soup.info.score == soup.info.trials[soup.info.chosen].score
  expected = jaxsoup.mix(jaxsoup.stack(ingredients), soup.alpha)
  np.testing.assert_array_equal(flat(soup.params), flat(expected))


def test_cma_is_that_of_its_package():
  """On the hyperplane: the same samples as `cma.fmin2` draws."""
  optimum = np.array([1.2, -0.4, 0.3, -0.1])
  score_of = lambda alpha: -float(np.square(alpha - optimum) @ [1, 4, 9, 16])
  start = np.full((1, 4), 0.25)
  seeded = lambda: np.random.default_rng(3)
  ours = black_box.cma_es(start, 0.0, rng=seeded(), step=0.5)
  basis = np.linalg.svd(np.eye(4) - 0.25)[0][:, :3]
  rng = seeded()
  options = {
      'randn': lambda *shape: rng.standard_normal(shape),
      'seed': np.nan,
      'verbose': -9,
      'maxfevals': 700,
  }
  best, _ = cma.fmin2(
      lambda z: -score_of(start[0] + basis @ z),
      np.zeros(3),
      0.5 / np.sqrt(3),
      options,
  )
  best = start[0] + basis @ best
  scores = []
  while len(alphas := ours.ask()):
    scores += [(score_of(alpha[0]), alpha[0]) for alpha in alphas]
    ours.tell(alphas, [score for score, _ in scores[-len(alphas) :]])
  _, actual = max(scores[:700], key=lambda row: row[0])
  np.testing.assert_allclose(actual, best, atol=1e-6)
  np.testing.assert_allclose(actual, optimum, atol=1e-3)


def test_plateaus_do_not_end_it():
  """A round of equal scores says little where scores are in few values."""
  ingredients = models()
  exact = Counted([0.5, 0.5, 0, 0], ingredients)
  eval_fn = lambda params: float(np.ceil(exact(params)))
  soup = jaxsoup.search(ingredients, eval_fn, num_evaluations=300)
  assert len(soup.info.trials) == 300
  assert soup.info.trials[0].score < soup.info.score == 0


def test_global_randomness_is_left_alone():
  np.random.seed(5)
  expected = np.random.rand()
  np.random.seed(5)
  ingredients = models()
  eval_fn = Counted([1, 0, 0, 0], ingredients)
  jaxsoup.search(ingredients, eval_fn, num_evaluations=30)
  assert np.random.rand() == expected


@hypothesis.given(
    st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=6).map(np.array)
)
def test_simplex_is_the_nearest_point(w):
  """Against a solver of the quadratic program."""
  actual = np.asarray(jaxsoup.simplex(np.float32(w)))
  assert (actual >= 0).all() and abs(actual.sum() - 1) < 1e-5
  result = optimize.minimize(
      lambda x: np.sum((x - w) ** 2),
      np.full(w.size, 1 / w.size),
      jac=lambda x: 2 * (x - w),
      bounds=[(0, 1)] * w.size,
      constraints={'type': 'eq', 'fun': lambda x: x.sum() - 1},
      options={'ftol': 1e-12},
  )
  np.testing.assert_allclose(actual, result.x, atol=1e-3)
  # As `alpha_fn` has to be, of its own values.
  again = np.asarray(jaxsoup.simplex(actual))
  np.testing.assert_allclose(again, actual, atol=1e-6)


def test_simplex_of_large_numbers():
  assert jaxsoup.simplex(np.float32([1e8, 0])).tolist() == [1, 0]
  alpha = jaxsoup.simplex(np.float32([3e6, 3e6 + 0.25, 2]))
  assert alpha.tolist() == [0.375, 0.625, 0]


# The search.


@pytest.mark.parametrize('method', METHODS)
def test_it_never_falls_behind_its_start(method):
  ingredients = models()
  start = np.float32([0, 0.5, 0.5, 0])
  eval_fn = Counted(start, ingredients)
  run = functools.partial(
      jaxsoup.search, ingredients, eval_fn, method=method, start=start
  )
  soup = run(num_evaluations=20)
  np.testing.assert_allclose(soup.alpha, start, atol=1e-6)
  assert soup.info.chosen == 0
  np.testing.assert_array_equal(soup.info.trials[0].alpha, soup.alpha)
  assert len(run(num_evaluations=1).info.trials) == 1


def test_one_number_a_group():
  """Each group has an optimum of its own, which one alpha cannot reach."""
  ingredients = models()
  targets = ([0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7])
  parts = [
      np.asarray(target) @ np.stack([part(m) for m in ingredients])
      for target, part in zip(
          targets, (lambda m: m['body']['w'], lambda m: m['head'])
      )
  ]
  eval_fn = lambda p: -float(np.sum((flat(p) - np.concatenate(parts)) ** 2))
  run = functools.partial(
      jaxsoup.search, ingredients, eval_fn, num_evaluations=900
  )
  soup = run(group_fn=lambda path: path[:1])
  assert set(soup.alpha) == {'body', 'head'}
  for name, target in zip(('body', 'head'), targets):
    np.testing.assert_allclose(soup.alpha[name], target, atol=0.05)
  assert soup.info.score > run().info.score + 0.1
  # Which may be where another search goes on.
  again = run(group_fn=lambda path: path[:1], start=soup.alpha)
  assert again.info.trials[0].score == soup.info.score
  with pytest.raises(ValueError, match='pass a group_fn of finer groups'):
    run(start=soup.alpha)


def test_streamed_is_resident(monkeypatch):
  """What does not fit is read for each candidate; the same candidates."""
  ingredients = models()
  run = lambda: jaxsoup.search(
      ingredients,
      Counted([0.6, 0.4, 0, 0], ingredients),
      num_evaluations=40,
      group_fn=lambda path: path[:1],
  )
  resident = run()
  monkeypatch.setattr('jaxsoup._memory.free_bytes', lambda device: 100)
  streamed = run()
  for name in ('body', 'head'):
    np.testing.assert_allclose(
        streamed.alpha[name], resident.alpha[name], atol=1e-4
    )
  assert streamed.info.score == pytest.approx(resident.info.score, abs=1e-5)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('stop', [1, 5, 17])
def test_resumes(tmp_path, method, stop):
  """Killed after any evaluation: the same trials, and none evaluated twice."""
  ingredients = models()
  paths = [str(tmp_path / str(k)) for k in range(NUM)]
  for path, params in zip(paths, ingredients):
    checkpoints.save(path, params)
  runs = checkpoints.Ingredients(paths)
  eval_fn = Counted([0.5, 0.3, 0.2, 0], ingredients)
  run = functools.partial(
      jaxsoup.search, runs, num_evaluations=30, method=method
  )
  expected = run(eval_fn, key=jax.random.key(4))
  num_all, eval_fn.num = eval_fn.num, 0
  file = tmp_path / 'scores.jsonl'

  def dies(params):
    if eval_fn.num == stop:
      raise KeyboardInterrupt
    return eval_fn(params)

  key = jax.random.key(4)
  with pytest.raises(KeyboardInterrupt):
    run(dies, key=key, scores=checkpoints.ScoreLog(file, runs))
  content = file.read_bytes()
  file.write_bytes(content[: len(content) - 5])  # In the middle of a line.
  resumed = run(eval_fn, key=key, scores=checkpoints.ScoreLog(file, runs))
  assert eval_fn.num == num_all + 1
  for got, want in itertools.zip_longest(
      resumed.info.trials, expected.info.trials
  ):
    np.testing.assert_array_equal(got.alpha, want.alpha)
    assert got.score == want.score
  np.testing.assert_array_equal(resumed.alpha, expected.alpha)
  np.testing.assert_array_equal(flat(resumed.params), flat(expected.params))
  # Another key is another search.
  other = run(eval_fn, key=jax.random.key(5))
  assert not np.array_equal(
      other.info.trials[-1].alpha, expected.info.trials[-1].alpha
  )


def test_one_log_serves_all_recipes(tmp_path):
  """Members and alpha are different keys, also where numbers are equal."""
  ingredients = models(2)
  eval_fn = Counted([0, 1], ingredients)
  log = checkpoints.ScoreLog(tmp_path / 'scores.jsonl')
  greedy = jaxsoup.greedy(ingredients, eval_fn, scores=log)
  start = np.float32([0, 1])
  soup = jaxsoup.search(
      ingredients, eval_fn, num_evaluations=1, start=start, scores=log
  )
  again = dict(checkpoints.ScoreLog(tmp_path / 'scores.jsonl'))
  assert again == dict(log)
  assert again[('', (0.0, 1.0)),] == soup.info.score
  assert again[(0,)] == greedy.info.scores[0,] != soup.info.score


def test_the_second_split_decides():
  """The held-out optimum is not that of the second split."""
  ingredients = models()
  first = Counted([1, 0, 0, 0], ingredients)
  second = Counted([0.4, 0.2, 0.2, 0.2], ingredients)
  eval_fn = lambda params: {'a': first(params), 'b': second(params)}
  run = functools.partial(
      jaxsoup.search,
      ingredients,
      eval_fn,
      num_evaluations=200,
      objective='a',
      val_objective='b',
  )
  soup = run()
  trials, vals = soup.info.trials, soup.info.val_scores
  # By hand: the best so far, after the start and after each round.
  size = 4 + int(3 * np.log(NUM - 1))
  rounds = [0, *range(size, len(trials), size)]
  best = [max(trials[: end + 1], key=lambda t: t.score) for end in rounds]
  np.testing.assert_allclose(
      vals[: len(best)], [t.metrics['b'] for t in best], rtol=1e-6
  )
  assert trials[soup.info.chosen].metrics['b'] == pytest.approx(max(vals))
  assert soup.info.score < max(t.score for t in trials)
  patient = run(patience=2).info
  assert len(patient.val_scores) == int(np.argmax(vals)) + 3
  assert patient.chosen == soup.info.chosen


def test_minutes(monkeypatch):
  now = itertools.count(0, 20)
  clock = types.SimpleNamespace(monotonic=lambda: next(now))
  monkeypatch.setattr('jaxsoup._recipes._black_box.time', clock)
  ingredients = models()
  eval_fn = Counted([1, 0, 0, 0], ingredients)
  soup = jaxsoup.search(ingredients, eval_fn, minutes=1)
  assert len(soup.info.trials) == eval_fn.num == 2


def test_one_model():
  (params,) = models(1)
  soup = jaxsoup.search([params], lambda p: 1.0, num_evaluations=9)
  np.testing.assert_array_equal(flat(soup.params), flat(params))
  assert soup.alpha == [1] and len(soup.info.trials) == 1


def test_mistakes():
  ingredients = models()
  run = functools.partial(jaxsoup.search, ingredients, lambda p: 1.0)
  with pytest.raises(ValueError, match='no budget'):
    run()
  with pytest.raises(ValueError, match='patience needs val_objective'):
    run(num_evaluations=1, patience=1)
  with pytest.raises(ValueError, match=r'there are 4 ingredients'):
    run(num_evaluations=1, start=[0.5, 0.5])
  with pytest.raises(ValueError, match=r'nan for alpha \[\[0.25 0.25'):
    jaxsoup.search(ingredients, lambda p: np.nan, num_evaluations=1)
  with pytest.raises(TypeError, match='an objective is given'):
    run(num_evaluations=1, objective='a')
  for alpha_fn in (lambda w: w * jnp.nan, lambda w: w[:2]):
    with pytest.raises(
        ValueError, match='(?s)alpha_fn returned .* as many numb'
    ):
      run(num_evaluations=1, alpha_fn=alpha_fn)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('num', [2, 4])
def test_few_candidates_a_round(num):
  method = functools.partial(black_box.cma_es, population=4)
  score = lambda params: -abs(float(params) - 1.7)
  soup = jaxsoup.search(
      [np.float32(k) for k in range(1, 1 + num)],
      score,
      num_evaluations=60,
      method=method if num > 2 else black_box.cma_es,
  )
  assert soup.info.score > -1e-2


def test_meshes():
  mesh = jax.make_mesh((4,), ('fsdp',))
  spec = jax.sharding.PartitionSpec('fsdp')
  sharding = jax.sharding.NamedSharding(mesh, spec)
  ingredients = models(size=8)
  eval_fn = Counted([0.5, 0.5, 0, 0], ingredients)
  run = lambda given: jaxsoup.search(
      given, lambda p: eval_fn(jax.device_get(p)), num_evaluations=20
  )
  soup = run(jax.device_put(ingredients, sharding))
  assert soup.params['head'].sharding == sharding
  with jax.transfer_guard('disallow'):
    expected = run(ingredients)
  np.testing.assert_allclose(soup.alpha, expected.alpha, atol=1e-5)


# Several scores.


def several(params):
  x = float(np.sum(params))
  return {'high': x, 'low': -x, 'near': -abs(x - 2)}


NUMBERS = [np.float32(x) for x in (1, 4, -2, 3)]


@pytest.mark.parametrize(
    'objective, function',
    [
        ('near', lambda s: s['near']),
        (
            {'high': 0.7, 'near': 0.3},
            lambda s: 0.7 * s['high'] + 0.3 * s['near'],
        ),
        (evaluation.worst, lambda s: min(s.values())),
        (lambda s: s['low'] * 2, lambda s: s['low'] * 2),
    ],
)
@pytest.mark.parametrize('recipe', [jaxsoup.greedy, jaxsoup.pruned])
def test_objectives(recipe, objective, function):
  """The same decisions as with the one number that the objective makes."""
  expected = recipe(NUMBERS, lambda params: function(several(params)))
  log = {}
  soup = recipe(NUMBERS, several, objective=objective, scores=log)
  assert soup.info._replace(metrics={}) == expected.info
  assert soup.info.metrics == log
  for members, scores in log.items():
    mean = np.mean([NUMBERS[k] for k in members])
    assert scores == pytest.approx(several(mean))
  # The same scores serve other objectives.
  never = lambda params: 1 / 0
  again = recipe(NUMBERS, never, objective=objective, scores=log)
  assert again.info == soup.info


def test_scores_by_name_are_stored(tmp_path):
  path = tmp_path / 'scores.jsonl'
  log = checkpoints.ScoreLog(path)
  several_of = lambda params: several(params['x'])
  numbers = [{'x': x} for x in NUMBERS]
  soup = jaxsoup.greedy(numbers, several_of, objective='near', scores=log)
  assert dict(checkpoints.ScoreLog(path)) == dict(log)
  row = json.loads(path.read_text().splitlines()[0])
  assert row['score'] == {'high': 1.0, 'low': -1.0, 'near': -1.0}
  out = checkpoints.save(tmp_path / 'soup', soup)
  assert checkpoints.load(out).info == soup.info
  found = jaxsoup.search(
      numbers, several_of, objective='near', num_evaluations=5, scores=log
  )
  out = checkpoints.save(tmp_path / 'found', found)
  loaded = checkpoints.load(out).info
  assert loaded.score == found.info.score
  assert loaded.trials[3].metrics == found.info.trials[3].metrics


def test_one_score_by_name_needs_no_objective():
  expected = jaxsoup.greedy(NUMBERS, lambda params: -abs(params))
  soup = jaxsoup.greedy(NUMBERS, lambda params: {'x': -abs(params)})
  assert soup.info._replace(metrics={}) == expected.info


def test_objectives_that_do_not_fit():
  run = functools.partial(jaxsoup.greedy, NUMBERS)
  with pytest.raises(ValueError, match="'near', and the objective is not giv"):
    run(several)
  with pytest.raises(ValueError, match="the objective is 'far'"):
    run(several, objective='far')
  with pytest.raises(ValueError, match="the objective is 'near', 'far'"):
    run(several, objective={'near': 1, 'far': 1})
  with pytest.raises(TypeError, match='an objective is given'):
    run(lambda params: 1.0, objective='near')
  with pytest.raises(ValueError, match="returned 'a': nan for ingredient 0"):
    run(lambda params: {'a': np.nan, 'b': 1}, objective='b')
  with pytest.raises(TypeError, match='returned {} for ingredient 0'):
    run(lambda params: {}, objective='b')
  for objective in (lambda scores: np.inf, {'near': np.inf}):
    with pytest.raises(ValueError, match='the objective returned -?inf'):
      run(several, objective=objective)


def test_bounds_of_one_score_are_not_those_of_several():
  """A log with early rejections is used again, with an objective."""
  x = np.arange(12.0).reshape(12, 1)
  held_out = evaluation.batched({'x': x, 'label': x[:, 0] > 5}, 3)
  eval_fn = evaluation.mean_of(
      lambda p, batch: ((batch['x'][:, 0] * p) > 4.5) == batch['label'],
      held_out,
  )
  thetas = [np.float32(t) for t in (0.8, 0.1, 3, 0.9, 0.2)]
  log = {}
  early = jaxsoup.greedy(thetas, eval_fn, scores=log)
  bounds = [k for k, s in log.items() if isinstance(s, jaxsoup.AtMost)]
  assert bounds
  named = lambda params: {'accuracy': eval_fn(params)}
  named.at_least = lambda *args, **kwargs: 1 / 0  # Of what, is not known.
  both = {k: log[k] for k in bounds}
  soup = jaxsoup.greedy(thetas, named, objective='accuracy', scores=both)
  assert soup.info.accepted == early.info.accepted
  for members in bounds:
    assert both[members]['accuracy'] <= log[members].bound


# Categories.


def test_category_experts():
  """Two families of categories: each has its expert."""
  rng = np.random.default_rng(0)
  skill = rng.normal(size=(2, 6))
  scores = {
      (k,): {
          'algebra': skill[0, k] + 0.1 * rng.normal(),
          'geometry': 5 * skill[0, k] + 0.1 * rng.normal(),
          'poems': skill[1, k] + 0.1 * rng.normal(),
      }
      for k in range(6)
  }
  scores[(0, 1)] = {'algebra': 9.0}
  alpha = black_box.category_experts(scores, 6)
  expected = np.zeros(6)
  expected[skill.argmax(1)] += 0.5
  np.testing.assert_array_equal(alpha, expected)
  # All of one kind: the best model.
  alpha = black_box.category_experts(scores, 6, correlation=-1)
  assert alpha.max() == 1
  # What all do alike has no expert.
  scores = {(0,): {'a': 0.1, 'b': 0.5}, (1,): {'a': 0.9, 'b': 0.5}}
  assert black_box.category_experts(scores, 2).tolist() == [0, 1]
  alike = dict.fromkeys(scores, {'a': 0.1, 'b': 0.5})
  assert black_box.category_experts(alike, 2).tolist() == [0.5, 0.5]
  with pytest.raises(ValueError, match='0 of 2 have one'):
    black_box.category_experts({(0,): 0.5, (1,): 0.7}, 2)


def test_a_search_from_category_experts():
  ingredients = models()
  targets = np.eye(NUM)[:2]
  scored = [Counted(target, ingredients) for target in targets]
  eval_fn = lambda p: {str(i): f(p) for i, f in enumerate(scored)}
  log = {}
  jaxsoup.greedy(
      ingredients, eval_fn, objective='0', max_ingredients=1, scores=log
  )
  assert set(log) == {(k,) for k in range(NUM)}
  start = black_box.category_experts(log, NUM)
  soup = jaxsoup.search(
      ingredients,
      eval_fn,
      objective=evaluation.worst,
      start=start,
      num_evaluations=60,
  )
  np.testing.assert_allclose(start, [0.5, 0.5, 0, 0])
  assert soup.info.score >= soup.info.trials[0].score
