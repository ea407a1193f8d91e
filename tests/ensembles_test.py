"""Ensembles of logits against plain NumPy."""

import numpy as np
import pytest

import jaxsoup
from jaxsoup import ensembles
from jaxsoup import evaluation


def problem(seed, num_models=6, num=40, num_classes=4):
  """Logits of models that differ in how good they are, and labels."""
  rng = np.random.default_rng(seed)
  label = rng.integers(0, num_classes, num)
  logits = rng.normal(size=(num_models, num, num_classes))
  signal = rng.uniform(0, 1.5, (num_models, 1, 1))
  logits += signal * np.eye(num_classes)[label]
  return logits.astype(np.float32), label


def accuracy(logits, label):
  return float(np.mean(np.asarray(logits).argmax(-1) == label))


def greedy_by_hand(logits, label):
  """Recipe 1 over mean logits."""
  single = [accuracy(x, label) for x in logits]
  members, best = [], -np.inf
  for k in sorted(range(len(logits)), key=lambda k: -single[k]):
    mean = np.mean(logits[[*members, k]].astype(np.float64), 0)
    if accuracy(mean, label) >= best:
      members, best = [*members, k], accuracy(mean, label)
  return members, best


def test_uniform_is_the_mean():
  logits, _ = problem(0)
  made = ensembles.uniform(logits)
  np.testing.assert_allclose(made.logits, logits.mean(0), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(made.alpha, np.full(6, 1 / 6), rtol=1e-6)


@pytest.mark.parametrize('seed', range(20))
def test_greedy_equals_recipe_1(seed):
  logits, label = problem(seed)
  made = ensembles.greedy(logits, lambda x: accuracy(x, label))
  members, best = greedy_by_hand(logits, label)
  assert list(made.info.accepted) == members
  assert made.info.score == pytest.approx(best)
  expected = np.zeros(6)
  expected[members] = 1 / len(members)
  np.testing.assert_allclose(made.alpha, expected, rtol=1e-6)
  np.testing.assert_allclose(
      made.logits, logits[members].mean(0), rtol=1e-4, atol=1e-5
  )


def test_alpha_carries_over_to_other_data():
  logits, label = problem(1)
  made = ensembles.greedy(logits, lambda x: accuracy(x, label))
  members = list(made.info.accepted)
  test_logits, _ = problem(2)
  np.testing.assert_allclose(
      jaxsoup.mix(test_logits, made.alpha),
      test_logits[members].mean(0),
      rtol=1e-4,
      atol=1e-5,
  )


def test_options_of_greedy_are_passed_on():
  logits, label = problem(3)
  made = ensembles.greedy(
      logits, lambda x: accuracy(x, label), order=[5, 0], max_ingredients=1
  )
  assert made.info.accepted == (5,)


class Counting(list):
  """Ingredients that count how often each is taken."""

  def __init__(self, items):
    super().__init__(items)
    self.taken = []

  def __getitem__(self, k):
    self.taken.append(k)
    return super().__getitem__(k)


def linear(params, batch):
  return batch['x'] @ params['w']


def test_collect_runs_each_model_once_over_each_batch():
  rng = np.random.default_rng(0)
  models = Counting(
      {'w': rng.normal(size=(3, 2)).astype(np.float32)} for _ in range(4)
  )
  x = rng.normal(size=(11, 3)).astype(np.float32)
  walks = []

  class Batches(list):

    def __iter__(self):
      walks.append(1)
      return super().__iter__()

  batches = Batches(evaluation.batched({'x': x}, 4))
  logits = ensembles.collect(models, linear, batches)
  assert len(walks) == 4
  # The template is the first one, which is not run for that.
  assert sorted(set(models.taken)) == [0, 1, 2, 3]
  assert logits.shape == (4, 11, 2)
  expected = np.stack([x @ list.__getitem__(models, k)['w'] for k in range(4)])
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_greedy_takes_each_row_without_running_a_model():
  logits, label = problem(4)
  calls = []

  def score_fn(x):
    calls.append(x.shape)
    return accuracy(x, label)

  ensembles.greedy(logits, score_fn)
  # K single models, and K - 1 candidates of more than one.
  assert calls == [logits.shape[1:]] * (2 * len(logits) - 1)


def test_models_that_do_not_fit_are_named():
  models = [{'w': np.zeros((3, 2))}, {'w': np.zeros((3, 4))}]
  batches = evaluation.batched({'x': np.zeros((2, 3))}, 2)
  with pytest.raises(ValueError, match="ingredient 1 .* leaf 'w' has shape"):
    ensembles.collect(models, linear, batches)
  with pytest.raises(ValueError, match='There are no ingredients'):
    ensembles.collect([], linear, batches)


def test_wrong_shape_is_named():
  with pytest.raises(ValueError, match=r'\(3, 2\): expected \[K, N, C\]'):
    ensembles.uniform(np.zeros((3, 2)))


def test_soup_of_linear_models_is_their_ensemble():
  """f(x; sum alpha theta) = sum alpha f(x; theta), f being linear in theta."""
  rng = np.random.default_rng(5)
  models = [{'w': rng.normal(size=(3, 4)).astype('f')} for _ in range(5)]
  x = rng.normal(size=(20, 3)).astype(np.float32)
  label = rng.integers(0, 4, 20)
  batches = evaluation.batched({'x': x}, 8)
  logits = ensembles.collect(models, linear, batches)
  ensemble = ensembles.greedy(logits, lambda z: accuracy(z, label))
  soup = jaxsoup.greedy(models, lambda p: accuracy(x @ p['w'], label))
  np.testing.assert_array_equal(soup.alpha, ensemble.alpha)
  np.testing.assert_allclose(
      x @ soup.params['w'], ensemble.logits, rtol=1e-4, atol=1e-5
  )
