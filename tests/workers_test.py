"""Searches on workers decide as those without; engines, and what fails how."""

from concurrent import futures
import contextlib
import multiprocessing
import threading
import time

import _evals
import jax
import numpy as np
import pytest

import jaxsoup
from jaxsoup import _workers
from jaxsoup import black_box
from jaxsoup import checkpoints
from jaxsoup import evaluation

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
def test_search_over_alpha(log_is_known):
  for seed in range(12):
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


@contextlib.contextmanager
def processes(num=2):
  context = multiprocessing.get_context('spawn')
  with futures.ProcessPoolExecutor(num, context) as executor:
    yield executor
