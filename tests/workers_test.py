"""Searches on workers decide as those without; engines, and what fails how."""

from concurrent import futures
import copy
import multiprocessing
import pickle
import threading
import time

import _evals
from flax import nnx
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

import jaxsoup
from jaxsoup import black_box
from jaxsoup import checkpoints
from jaxsoup import diagnosis
from jaxsoup import ensembles
from jaxsoup import evaluation
from jaxsoup import landscape
from jaxsoup import scoring
from jaxsoup import sharding
from jaxsoup.report import _sections

NUM_MOST = 7


class Unreliable(futures.ThreadPoolExecutor):
  """Threads that take their time, and die now and then."""

  def __init__(self, num_workers, seed, risk=0.3, delay=1e-3):
    super().__init__(num_workers)
    self._rng = np.random.default_rng(seed)
    self._risk, self._delay = risk, delay
    self._num_deaths = {}
    self._lock = threading.Lock()

  def submit(self, fn, /, *args):
    return super().submit(self._run, fn, args)

  def _run(self, fn, args):
    with self._lock:
      key = repr(args[1:])
      num = self._num_deaths.get(key, 0)
      dies = self._rng.random() < self._risk and num < 2
      self._num_deaths[key] = num + dies
      seconds = self._rng.exponential(self._delay)
      is_late = self._rng.random() < 0.5
    time.sleep(seconds)
    if dies and not is_late:
      raise ConnectionError('gone')
    value = fn(*args)
    if dies:  # Its work was for nothing.
      raise ConnectionError('gone')
    return value


def table_score(seed, num):
  """A function of the set of members, in few values, so that ties occur."""
  table = np.random.default_rng(seed).integers(0, 6, 2**num)

  def score(params):
    members = np.asarray(params) > 0
    return float(table[members @ (1 << np.arange(num))])

  return score


class WithBounds:
  """An `eval_fn` that gives up early, and counts what it gave up."""

  def __init__(self, score):
    self.score, self.num_bounds = score, 0

  def __call__(self, params):
    return self.score(params)

  def at_least(self, params, bar, strict=False):
    score = self.score(params)
    if score > bar or (score == bar and not strict):
      return score
    self.num_bounds += 1
    return jaxsoup.AtMost(np.nextafter(bar, -np.inf) if strict else bar - 1e-9)


def assert_same_search(actual, expected):
  np.testing.assert_array_equal(actual.params, expected.params)
  np.testing.assert_array_equal(actual.alpha, expected.alpha)
  assert actual.info._replace(stale=0) == expected.info


def problem(seed):
  """Models, a score, options of a search."""
  rng = np.random.default_rng(seed)
  num = int(rng.integers(1, NUM_MOST + 1))
  models = [np.eye(num, dtype=np.float32)[k] for k in range(num)]
  score = table_score(seed, num)
  options = {'strict': bool(rng.integers(2))}
  if rng.integers(2):
    score = WithBounds(score)
  options['num_passes'] = int(rng.integers(1, 4))
  return rng, models, score, options


@pytest.mark.parametrize('recipe', [jaxsoup.greedy, jaxsoup.pruned])
def test_decisions_are_those_of_the_serial_search(recipe):
  num_stale = num_bounds = num_rejected = 0
  for seed in range(150):
    rng, models, score, options = problem(seed)
    if recipe is jaxsoup.greedy:
      options['with_replacement'] = bool(rng.integers(2))
      if rng.integers(2):
        options['order'] = rng.permutation(len(models)).tolist()
      if rng.integers(2):
        options['max_ingredients'] = int(rng.integers(1, 4))
    trials, on_workers, log = [], [], {}
    expected = recipe(models, score, **options, on_trial=trials.append)
    with Unreliable(int(rng.integers(1, 5)), seed) as executor:
      soup = recipe(
          models,
          score,
          **options,
          scores=log,
          executor=executor,
          num_ahead=int(rng.integers(1, 7)),
          on_trial=on_workers.append,
      )
    assert_same_search(soup, expected)
    assert on_workers == trials
    num_stale += soup.info.stale
    num_rejected += sum(not t.accepted for t in trials)
    num_bounds += sum(isinstance(t.score, jaxsoup.AtMost) for t in trials)
    # What the log holds of stale candidates is true as well.
    for members, value in log.items():
      true = expected.info.scores.get(members)
      if true is None:
        exact = getattr(score, 'score', score)
        true = exact(np.bincount(members, minlength=len(models)) > 0)
      if isinstance(value, jaxsoup.AtMost):
        assert true <= value.bound + 1e-6, members
      else:
        assert value == true, members
  assert num_stale > 20
  assert num_rejected > 100
  assert num_bounds > 20


@pytest.mark.parametrize('log_is_known', [False, True])
@pytest.mark.parametrize('seed', range(8))
def test_search_over_alpha(seed, log_is_known):
  rng = np.random.default_rng(seed)
  models = list(rng.normal(size=(4, 3)).astype(np.float32))
  score = lambda x: -float(np.sum((np.asarray(x) - 0.3) ** 2))
  run = lambda **kwargs: jaxsoup.search(
      models,
      score,
      num_evaluations=23,
      method=black_box.cma_es if seed % 2 else black_box.random_search,
      key=jax.random.key(seed),
      **kwargs,
  )
  log = {}
  expected = run(scores=log)
  known = dict(list(log.items())[:9]) if log_is_known else {}
  with Unreliable(3, seed) as executor:
    soup = run(executor=executor, num_ahead=4, scores=known)
  np.testing.assert_array_equal(soup.params, expected.params)
  for a, b in zip(soup.info.trials, expected.info.trials, strict=True):
    np.testing.assert_array_equal(a.alpha, b.alpha)
    assert a.score == b.score
  assert soup.info.chosen == expected.info.chosen
  assert len(known) == 23  # The budget counts what is begun.


def test_scores_of_several_metrics():
  models = [np.eye(3, dtype=np.float32)[k] for k in range(3)]
  eval_fn = lambda x: {'a': float(x[0]), 'b': float(x[1] - x[2])}
  kwargs = {'objective': {'a': 0.5, 'b': 1.0}}
  expected = jaxsoup.greedy(models, eval_fn, **kwargs)
  with Unreliable(3, 0) as executor:
    soup = jaxsoup.greedy(models, eval_fn, executor=executor, **kwargs)
  assert_same_search(soup, expected)
  assert soup.info.metrics


def test_the_report_counts_what_was_stale():
  info = jaxsoup.greedy([np.float32(1)], float).info
  of = (
      lambda num: _sections.trial_sections(
          {'greedy': info._replace(stale=num)}, label='accuracy'
      )[0]
      .parts[0]
      .caption
  )
  assert 'Workers had begun 3 more' in of(3)
  assert 'Workers' not in of(0)


class Fails(futures.ThreadPoolExecutor):
  """Threads on which calls with this key fail, so many times."""

  def __init__(self, steps, num, error):
    super().__init__(2)
    self.steps, self.num, self.error = steps, num, error

  def submit(self, fn, /, *args):
    if args[1][0] == self.steps and self.num:
      self.num -= 1
      future = futures.Future()
      future.set_exception(self.error)
      return future
    return super().submit(fn, *args)


MODELS = [np.float32(x) for x in (1.0, 4.0, -2.0)]
SCORE = lambda x: -abs(float(x))
STEPS = ((0, 1), (2, 1), (1, 1))


@pytest.mark.parametrize('num', [0, 2])
def test_a_call_whose_worker_dies_is_made_again(num):
  with Fails(STEPS, num, ConnectionError('lost')) as executor:
    soup = jaxsoup.greedy(MODELS, SCORE, executor=executor, num_ahead=1)
  assert_same_search(soup, jaxsoup.greedy(MODELS, SCORE))


def test_three_deaths_are_an_error():
  log, lost = {}, ConnectionError('lost')
  said = r'3 workers died at .*\(0, 1, 2\).*lost'
  with (
      Fails(STEPS, 3, lost) as executor,
      pytest.raises(ChildProcessError, match=said) as caught,
  ):
    jaxsoup.greedy(MODELS, SCORE, executor=executor, scores=log)
  assert caught.value.__cause__ is lost
  assert {(0,), (1,), (2,), (0, 2)} <= log.keys()


def test_a_broken_executor_is_an_error_at_once():
  said = 'with it the executor .*gone'
  with Fails(STEPS, 1, futures.BrokenExecutor('gone')) as executor:
    with pytest.raises(ChildProcessError, match=said):
      jaxsoup.greedy(MODELS, SCORE, executor=executor)
    soup = jaxsoup.greedy(MODELS, SCORE, executor=executor)
  assert_same_search(soup, jaxsoup.greedy(MODELS, SCORE))


def test_errors_of_eval_fn_are_those_of_the_serial_search():
  """And of stale candidates they do not matter."""

  def eval_fn(x):
    if float(x) == 2.5:  # The mean of the first two.
      raise KeyError('label')
    return SCORE(x)

  with Unreliable(2, 0) as executor:
    with pytest.raises(KeyError, match='label') as caught:
      jaxsoup.greedy(MODELS, eval_fn, order=[0, 1, 2], executor=executor)
    assert 'in eval_fn' in caught.value.__notes__[0]
    # With 2 accepted before it is due, it never is.
    order = [0, 2, 1]
    soup = jaxsoup.greedy(MODELS, eval_fn, order=order, executor=executor)
  assert_same_search(soup, jaxsoup.greedy(MODELS, eval_fn, order=order))


def test_mistakes(monkeypatch):
  with pytest.raises(TypeError, match='executor is 2: expected a concurrent'):
    jaxsoup.greedy(MODELS, SCORE, executor=2)
  with Unreliable(2, 0) as executor:
    with pytest.raises(ValueError, match='num_ahead is 0'):
      jaxsoup.greedy(MODELS, SCORE, executor=executor, num_ahead=0)
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    with pytest.raises(ValueError, match='2 processes.*Choose one'):
      jaxsoup.pruned(MODELS, SCORE, executor=executor)


class Stopped(list):
  """Ingredients, until a script is to stop."""

  def look_for_stop(self):
    raise InterruptedError('stopped')


def test_waiting_looks_for_a_stop():
  is_over = threading.Event()
  eval_fn = lambda x: float(is_over.wait(30))
  with futures.ThreadPoolExecutor(1) as executor:
    with pytest.raises(InterruptedError):
      jaxsoup.greedy(Stopped(MODELS), eval_fn, executor=executor)
    is_over.set()


@pytest.fixture
def runs(tmp_path):
  rng = np.random.default_rng(0)
  start = rng.normal(size=4)
  for k in range(4):
    w = (start + 0.4 * rng.normal(size=4)).astype(np.float32)
    checkpoints.save(tmp_path / f'run{k}', {'w': w})
  return [tmp_path / f'run{k}' for k in range(4)]


@pytest.mark.parametrize('is_sharded', [False, True])
def test_ingredients_travel_as_paths(runs, is_sharded):
  mesh = jax.make_mesh((1,), ('x',))
  shapes = {'w': jax.ShapeDtypeStruct((4,), 'float32')}
  if is_sharded:
    shapes = sharding.fsdp(shapes, mesh, axis='x', min_size=1)
  ingredients = checkpoints.Ingredients(runs, shapes)
  expected = ingredients[1]['w']
  ingredients.prefetch(2)
  content = pickle.dumps(ingredients)
  assert len(content) < 2000
  arrived = pickle.loads(content)
  np.testing.assert_array_equal(arrived[1]['w'], expected)
  assert arrived.abstract_params['w'].sharding is None
  # Another thread of this process has the same devices.
  copied = copy.copy(ingredients)
  assert copied[1]['w'].sharding == expected.sharding
  np.testing.assert_array_equal(copied[1]['w'], expected)


def test_states_of_nnx_travel(tmp_path):
  state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
  checkpoints.save(tmp_path / 'run', state)
  shapes = jax.eval_shape(lambda: state)
  ingredients = checkpoints.Ingredients([tmp_path / 'run'], shapes)
  arrived = pickle.loads(pickle.dumps(ingredients))
  assert jax.tree.structure(arrived[0]) == jax.tree.structure(state)


@pytest.fixture(scope='module')
def pool():
  context = multiprocessing.get_context('spawn')
  with futures.ProcessPoolExecutor(2, context) as executor:
    yield executor


@pytest.mark.parametrize('recipe', [jaxsoup.greedy, jaxsoup.pruned])
@pytest.mark.parametrize('eval_fn', [_evals.distance, _evals.right])
def test_processes(runs, pool, recipe, eval_fn, tmp_path):
  shapes = {'w': jax.ShapeDtypeStruct((4,), 'float32')}
  ingredients = checkpoints.Ingredients(runs, shapes)
  expected = recipe(ingredients, eval_fn)
  log = checkpoints.ScoreLog(tmp_path / 'log.jsonl', ingredients, 'x')
  soup = recipe(ingredients, eval_fn, executor=pool, scores=log, num_ahead=3)
  assert soup.info._replace(stale=0) == expected.info
  np.testing.assert_array_equal(soup.params['w'], expected.params['w'])
  again = checkpoints.ScoreLog(tmp_path / 'log.jsonl', ingredients, 'x')
  assert dict(again) == dict(log)


def test_ensembles_of_processes(runs, pool):
  ingredients = checkpoints.Ingredients(runs)
  x = np.random.default_rng(1).normal(size=(10, 4)).astype(np.float32)
  batches = evaluation.batched({'x': x}, 4)
  args = ingredients, _evals.logits, batches
  expected = ensembles.collect(*args)
  actual = ensembles.collect(*args, executor=pool)
  np.testing.assert_array_equal(actual, expected)
  with pytest.raises(ValueError, match='not those of the first call'):
    ensembles.collect(*args[:2], _evals.Shuffled(x), executor=pool)


@pytest.mark.parametrize('chunk_size', [1, 4])
def test_landscapes_of_processes(pool, chunk_size):
  corners = [np.float32(x) for x in ([0, 0], [2, 0], [1, 3])]
  seen = []
  kwargs = {'num': 5, 'chunk_size': chunk_size}
  expected = landscape.plane(_evals.quartic, *corners, **kwargs)
  actual = landscape.plane(
      _evals.quartic,
      *corners,
      **kwargs,
      executor=pool,
      num_ahead=3,
      on_points=lambda *nums: seen.append(nums),
  )
  np.testing.assert_array_equal(actual.loss, expected.loss)
  num = 9 if chunk_size == 1 else 12
  assert seen == [(num, 25), (2 * num, 25), (25, 25)]
  pair = landscape.lines(_evals.quartic, corners, [(0, 2)], executor=pool)
  serial = landscape.lines(_evals.quartic, corners, [(0, 2)])
  np.testing.assert_array_equal(pair[0, 2].loss, serial[0, 2].loss)
  mesh = NamedSharding(jax.make_mesh((1,), ('x',)), PartitionSpec('x'))
  with pytest.raises(ValueError, match='choose one'):
    landscape.line(_evals.quartic, *corners[:2], executor=pool, sharding=mesh)


@pytest.mark.parametrize('eval_fn', [_evals.distance, _evals.right])
def test_diagnoses_of_processes(runs, pool, eval_fn):
  ingredients = checkpoints.Ingredients(runs)
  options = dict(eval_fn=eval_fn, is_thorough=True)
  expected = diagnosis.diagnose(ingredients, **options)
  report = diagnosis.diagnose(ingredients, **options, executor=pool)
  assert report.as_json() == expected.as_json()


def test_what_cannot_be_sent(runs, pool):
  ingredients = checkpoints.Ingredients(runs)
  lock = threading.Lock()
  eval_fn = lambda params: float(lock.locked())
  with pytest.raises(TypeError, match='cannot be sent to workers.*top level'):
    jaxsoup.greedy(ingredients, eval_fn, executor=pool)


def test_an_error_in_a_process(runs, pool):
  with pytest.raises(KeyError, match='no such thing') as caught:
    jaxsoup.greedy(checkpoints.Ingredients(runs), _evals.raises, executor=pool)
  assert '_evals.py' in caught.value.__notes__[0]


def test_a_process_that_dies(runs):
  context = multiprocessing.get_context('spawn')
  ingredients, log = checkpoints.Ingredients(runs), {}
  expected = jaxsoup.greedy(ingredients, _evals.distance, scores=log)
  known = {(k,): log[k,] for k in range(4)}
  with (
      futures.ProcessPoolExecutor(2, context) as executor,
      pytest.raises(ChildProcessError, match='use fewer workers'),
  ):
    jaxsoup.greedy(ingredients, _evals.dies, executor=executor, scores=known)
  assert known.keys() == {(k,) for k in range(4)}
  soup = jaxsoup.greedy(ingredients, _evals.distance, scores=known)
  assert soup.info == expected.info


def test_commands_on_threads(runs, tmp_path):
  """The outputs of each run are kept, and none is written twice."""
  ingredients = checkpoints.Ingredients(runs)
  outputs = tmp_path / 'outputs'
  command = "echo '{path}' 0.5 | cut -d' ' -f2"
  eval_fn = scoring.from_command(command, ingredients, outputs=outputs)
  with futures.ThreadPoolExecutor(3) as executor:
    soup = jaxsoup.greedy(ingredients, eval_fn, executor=executor)
  assert soup.info.accepted == (0, 1, 2, 3)
  names = sorted(path.name for path in outputs.glob('*.out'))
  num = 7 + soup.info.stale
  assert names == [f'{i:04}.out' for i in range(1, num + 1)]
