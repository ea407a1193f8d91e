"""Metrics against scikit-learn and plain NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sk

from jaxsoup import evaluation
from jaxsoup import metrics

ALL = (
    metrics.accuracy,
    metrics.top_k_accuracy,
    metrics.negative_log_likelihood,
    metrics.brier,
    metrics.expected_calibration_error,
    metrics.f1,
    metrics.matthews,
)
names = lambda fn: fn.__name__


def problem(seed, num=57, num_classes=6):
  """Logits that are right more often than not, and labels."""
  rng = np.random.default_rng(seed)
  label = rng.integers(0, num_classes, num).astype(np.int32)
  logits = rng.normal(size=(num, num_classes)) * 2
  logits[np.arange(num), label] += 1.5
  return logits.astype(np.float32), label


def softmax(logits):
  e = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def ece_by_loop(logits, label, num_bins):
  p = softmax(logits)
  order = sorted(range(len(label)), key=lambda j: p[j].max())
  gap = 0.0
  for members in np.array_split(order, min(num_bins, len(label))):
    right = np.mean([p[j].argmax() == label[j] for j in members])
    gap += len(members) * abs(right - np.mean([p[j].max() for j in members]))
  return gap / len(label)


REFERENCES = {
    metrics.accuracy: lambda x, y: sk.accuracy_score(y, x.argmax(-1)),
    metrics.top_k_accuracy: lambda x, y: sk.top_k_accuracy_score(
        y, x, k=5, labels=range(x.shape[1])
    ),
    metrics.negative_log_likelihood: lambda x, y: sk.log_loss(
        y, softmax(x), labels=range(x.shape[1])
    ),
    metrics.brier: lambda x, y: np.mean(
        np.sum((softmax(x) - np.eye(x.shape[1])[y]) ** 2, -1)
    ),
    metrics.expected_calibration_error: lambda x, y: ece_by_loop(x, y, 15),
    metrics.f1: lambda x, y: sk.f1_score(
        y, x.argmax(-1), average='macro', zero_division=0
    ),
    metrics.matthews: lambda x, y: sk.matthews_corrcoef(y, x.argmax(-1)),
}


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('fn', ALL, ids=names)
def test_equals_reference(fn, seed):
  logits, label = problem(seed)
  np.testing.assert_allclose(
      fn(logits, label), REFERENCES[fn](logits, label), rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize('seed', range(5))
def test_two_classes_equal_scikit_learn(seed):
  logits, label = problem(seed, num_classes=2)
  predicted = logits.argmax(-1)
  np.testing.assert_allclose(
      metrics.f1(logits, label), sk.f1_score(label, predicted), rtol=1e-6
  )
  np.testing.assert_allclose(
      metrics.matthews(logits, label),
      sk.matthews_corrcoef(label, predicted),
      rtol=1e-5,
      atol=1e-6,
  )
  np.testing.assert_allclose(
      metrics.brier(logits, label),
      2 * sk.brier_score_loss(label, softmax(logits)[:, 1]),
      rtol=1e-5,
  )


@pytest.mark.parametrize('k', (1, 2, 3, 6, 9))
def test_top_k(k):
  logits, label = problem(1)
  expected = np.mean(
      [
          y in np.argsort(-row, kind='stable')[:k]
          for row, y in zip(logits, label)
      ]
  )
  got = metrics.top_k_accuracy(logits, label, k=k)
  np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize('num_bins', (1, 2, 7, 57, 100))
def test_ece_by_number_of_bins(num_bins):
  logits, label = problem(2)
  got = metrics.expected_calibration_error(logits, label, num_bins=num_bins)
  np.testing.assert_allclose(got, ece_by_loop(logits, label, num_bins), 1e-5)


def test_ece_of_a_calibrated_and_a_boastful_model():
  half = np.zeros((4, 2), np.float32)
  label = np.array([0, 1, 0, 1])
  sure = np.array([[50.0, 0.0]] * 4, np.float32)
  one_bin = dict(num_bins=1)
  assert metrics.expected_calibration_error(half, label, **one_bin) < 1e-6
  got = metrics.expected_calibration_error(sure, label, **one_bin)
  np.testing.assert_allclose(got, 0.5)


@pytest.mark.parametrize('dtype', (jnp.float32, jnp.bfloat16, jnp.float16))
@pytest.mark.parametrize('fn', ALL, ids=names)
def test_dtypes(fn, dtype):
  logits, label = problem(3)
  rounded = jnp.asarray(logits, dtype)
  got = fn(rounded, label)
  assert got.dtype == jnp.float32 and got.shape == ()
  # Nothing is computed in the dtype of the logits.
  exact = fn(rounded.astype(jnp.float32), label)
  np.testing.assert_allclose(got, exact, rtol=1e-6)


@pytest.mark.parametrize('dtype', (np.int8, np.int32, np.int64, np.uint8))
@pytest.mark.parametrize('fn', ALL, ids=names)
def test_dtypes_of_labels(fn, dtype):
  # 57 x 20 cells of a confusion matrix do not fit into eight bits.
  logits, label = problem(4, num_classes=20)
  np.testing.assert_allclose(
      fn(logits, label.astype(dtype)), fn(logits, label), rtol=1e-6
  )


@pytest.mark.parametrize('fn', ALL, ids=names)
def test_one_example(fn):
  logits = np.array([[0.0, 3.0, 1.0]], np.float32)
  label = np.array([1])
  p = softmax(logits)[0]
  expected = {
      metrics.negative_log_likelihood: -np.log(p[1]),
      metrics.brier: p[0] ** 2 + (1 - p[1]) ** 2 + p[2] ** 2,
      metrics.expected_calibration_error: 1 - p[1],
      metrics.matthews: 0.0,
  }
  np.testing.assert_allclose(
      fn(logits, label), expected.get(fn, 1.0), rtol=1e-6
  )


def test_matthews_is_zero_where_one_class_only_occurs():
  logits, label = problem(5)
  constant = np.zeros_like(logits) + np.eye(6, dtype=np.float32)[2]
  assert metrics.matthews(constant, label) == 0
  assert metrics.matthews(logits, np.full_like(label, 3)) == 0


def test_f1_skips_classes_that_do_not_occur():
  logits = np.eye(5, dtype=np.float32)[[0, 1, 1]]
  label = np.array([0, 1, 0])
  expected = sk.f1_score(label, logits.argmax(-1), average='macro')
  np.testing.assert_allclose(metrics.f1(logits, label), expected, rtol=1e-6)
  never = np.array([[5.0, 0.0]] * 3, np.float32)
  assert metrics.f1(never, np.array([0, 0, 0])) == 0


def test_ties_go_to_the_first_class():
  logits = np.zeros((3, 4), np.float32)
  label = np.array([0, 1, 0])
  np.testing.assert_allclose(metrics.accuracy(logits, label), 2 / 3, rtol=1e-6)
  top = metrics.top_k_accuracy(logits, label, k=1)
  np.testing.assert_allclose(top, 2 / 3, rtol=1e-6)


def test_huge_logits_stay_finite():
  logits = np.array([[3e4, -3e4], [3e4, -3e4]], np.float32)
  label = np.array([0, 1])
  np.testing.assert_allclose(
      metrics.negative_log_likelihood(logits, label), 3e4
  )
  np.testing.assert_allclose(metrics.brier(logits, label), 1.0)


@pytest.mark.parametrize('fn', ALL, ids=names)
def test_wrong_arguments_are_named(fn):
  logits, label = problem(0)
  for bad_logits, bad_label in (
      (logits[0], label[:1]),
      (logits, label[:-1]),
      (logits[:0], label[:0]),
  ):
    with pytest.raises(ValueError, match=rf'{fn.__name__}: .*\[N, C\]'):
      fn(bad_logits, bad_label)
  with pytest.raises(TypeError, match='float32: expected integers'):
    fn(logits, label.astype(np.float32))


def test_correct_is_one_number_an_example():
  logits, label = problem(0)
  got = metrics.correct(jnp.asarray(logits), jnp.asarray(label))
  assert got.dtype == bool  # What mean_of can bound.
  np.testing.assert_array_equal(got, logits.argmax(-1) == label)


def test_one_of_several_right_labels_is_enough():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(50, 7)).astype(np.float32)
  labels = rng.random((50, 7)) < 0.3
  expected = [labels[i, logits[i].argmax()] for i in range(50)]
  np.testing.assert_array_equal(metrics.correct(logits, labels), expected)
  assert metrics.accuracy(logits, labels) == pytest.approx(np.mean(expected))
  # One label each: the same as integers.
  label = rng.integers(0, 7, 50)
  one_hot = np.eye(7, dtype=bool)[label]
  assert metrics.accuracy(logits, one_hot) == metrics.accuracy(logits, label)
  with pytest.raises(ValueError, match='labels \\(50, 7\\)'):
    metrics.f1(logits, labels)


@pytest.mark.parametrize('seed', range(3))
def test_log_likelihood_of_each_example(seed):
  logits, label = problem(seed)
  got = metrics.log_likelihood(logits, label)
  expected = np.log(softmax(logits)[np.arange(len(label)), label])
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_log_likelihood_is_a_score_of_models():
  logits, label = problem(6)
  batches = evaluation.batched({'logits': logits, 'label': label}, 25)
  eval_fn = evaluation.mean_of(
      lambda beta, batch: metrics.log_likelihood(
          beta * batch['logits'], batch['label']
      ),
      batches,
  )
  for beta in (0.5, 2.0):
    expected = -sk.log_loss(label, softmax(beta * logits), labels=range(6))
    np.testing.assert_allclose(eval_fn(beta), expected, rtol=1e-5)


def test_shapes_that_do_not_fit_are_no_answers():
  logits, label = problem(0)
  for bad in (label[:, None], label[:-1], label[None], label[0]):
    with pytest.raises(ValueError, match=r'correct: .*\[N, C\] and \[N\]'):
      metrics.correct(jnp.asarray(logits), jnp.asarray(bad))
  with pytest.raises(ValueError, match=r'labels \(57, 6, 1\)'):
    metrics.correct(logits, np.ones((57, 6, 1), bool))
  with pytest.raises(TypeError, match='correct: .* expected integers'):
    metrics.correct(logits, label.astype(np.float32))
  batches = evaluation.batched({'x': logits, 'label': label[:, None]}, 20)
  score = evaluation.mean_of(
      lambda params, batch: metrics.correct(batch['x'], batch['label']), batches
  )
  with pytest.raises(ValueError, match=r'labels \(20, 1\)'):
    score(())


@pytest.mark.parametrize('num_classes', (2, 6))
@pytest.mark.parametrize('part', (slice(None, 1), slice(None)))
def test_a_row_with_nan_is_wrong(num_classes, part):
  logits, label = problem(7, num_classes=num_classes)
  rows = np.arange(0, 57, 3)
  logits[rows, part] = np.nan
  label[rows] = 0  # The class that argmax says of NaN.
  # To scikit-learn a prediction that is no class.
  predicted = np.where(np.isnan(logits).any(-1), num_classes, logits.argmax(-1))
  right = predicted == label
  assert 0 < right.sum() < len(label) - len(rows) + 1
  for x in logits, jnp.asarray(logits):
    np.testing.assert_array_equal(metrics.correct(x, label), right)
  assert metrics.accuracy(logits, label) == pytest.approx(right.mean())
  sets = np.eye(num_classes, dtype=bool)[label]
  assert metrics.accuracy(logits, sets) == pytest.approx(right.mean())
  top = metrics.top_k_accuracy(logits, label, k=num_classes)
  assert top == pytest.approx(1 - len(rows) / 57)
  classes = [1] if num_classes == 2 else range(num_classes)
  expected = sk.f1_score(label, predicted, average='macro', labels=classes)
  assert metrics.f1(logits, label) == pytest.approx(expected)
  expected = sk.matthews_corrcoef(label, predicted)
  assert metrics.matthews(logits, label) == pytest.approx(expected, abs=1e-6)


def test_without_any_prediction_scores_are_the_worst():
  nothing, label = np.full((4, 3), np.nan, 'f'), np.array([0, 1, 2, 0])
  for fn in (metrics.accuracy, metrics.f1, metrics.matthews):
    assert fn(nothing, label) == 0


def matthews_by_hand(counts):
  """In Python's integers and its 64-bit floats."""
  counts = [[int(x) for x in row] for row in counts]
  s = sum(map(sum, counts))
  true, predicted = [sum(row) for row in counts], [*map(sum, zip(*counts))]
  right = sum(row[k] for k, row in enumerate(counts))
  covariance = right * s - sum(p * t for p, t in zip(predicted, true))
  variances = [s * s - sum(n * n for n in m) for m in (predicted, true)]
  return covariance / (variances[0] * variances[1]) ** 0.5


@pytest.mark.parametrize(
    'counts',
    [
        [[2_999_999, 0], [0, 1]],
        [[2_999_990, 9], [0, 1]],
        [[2_900_000, 99_999], [0, 1]],
        [[1_500_000, 1_499_999], [0, 1]],
        [[2_000_001, 1], [0, 0]],
        [[1_999_998, 2, 0], [1, 0, 0], [0, 0, 3]],
    ],
)
def test_matthews_of_rare_classes(counts):
  counts = np.array(counts)
  num_classes = len(counts)
  label, predicted = np.repeat(
      np.indices(counts.shape).reshape(2, -1), counts.ravel(), axis=1
  )
  logits = np.eye(num_classes, dtype=np.float32)[predicted]
  got = metrics.matthews(logits, label.astype(np.int8))
  if (counts.sum(0) > 0).sum() == 1 or (counts.sum(1) > 0).sum() == 1:
    assert got == 0
  else:
    assert got == pytest.approx(matthews_by_hand(counts), rel=2e-6)


@pytest.mark.parametrize('num_bins', (1, 4, 7, 30))
def test_calibration_does_not_depend_on_the_order_of_ties(num_bins):
  rng = np.random.default_rng(0)
  p = rng.choice([0.6, 0.8, 1.0], 60)  # Three confidences.
  label = (rng.random(60) > p).astype(int)
  logits = np.log(np.stack([p, 1 - p + 1e-30], -1)).astype(np.float32)
  orders = [rng.permutation(60) for _ in range(5)]
  orders += [np.lexsort((label, p)), np.lexsort((-label, p))]
  fn = metrics.expected_calibration_error
  got = [fn(logits[o], label[o], num_bins=num_bins) for o in orders]
  assert len({float(x) for x in got}) == 1
  # The expectation over random orders: of ties each has their mean.
  share = {x: np.mean(label[p == x] == 0) for x in set(p)}
  bins = np.array_split(np.sort(p), num_bins)
  gaps = [abs(np.mean([share[x] - x for x in b])) * len(b) for b in bins]
  assert got[0] == pytest.approx(np.sum(gaps) / 60, rel=1e-4, abs=1e-6)
