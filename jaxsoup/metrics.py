"""Metrics of classifiers: pure functions of logits and labels.

```
metrics.accuracy(logits, labels)
metrics.expected_calibration_error(logits, labels, num_bins=15)
```

All take logits `[N, C]` and labels `[N]` (integers in 0..C-1) and return a
float32 scalar; `correct` and `log_likelihood` return one number per example,
`[N]`, and `reliability` one per bin. Higher is better for those, `accuracy`,
`top_k_accuracy`, `f1` and `matthews`; lower for the others: negate them to
select on them.

A row of logits with a NaN predicts no class: it is wrong.
"""

from collections.abc import Callable
import functools
from typing import Concatenate
from typing import NamedTuple
from typing import ParamSpec
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup import _tree
from jaxsoup.typing import Array
from jaxsoup.typing import ArrayLike

_P = ParamSpec('_P')
_T = TypeVar('_T')


def _metric(
    fn: Callable[Concatenate[jax.Array, jax.Array, _P], _T],
) -> Callable[Concatenate[ArrayLike, ArrayLike, _P], _T]:
  """Compiles a metric; brings NumPy input to the device explicitly."""
  compiled = jax.jit(fn, static_argnames=tuple(fn.__kwdefaults__ or ()))

  @functools.wraps(fn)
  def wrapper(
      logits: ArrayLike, labels: ArrayLike, *args: _P.args, **options: _P.kwargs
  ) -> _T:
    on_device = list(map(_tree.on_device, (logits, labels)))
    _require_fit(fn.__name__, *on_device)
    return compiled(*on_device, *args, **options)

  return wrapper


def _require_fit(name: str, logits: Array, labels: Array) -> None:
  is_sets = name in ('accuracy', 'correct') and labels.dtype == bool
  expected = logits.shape if is_sets else logits.shape[:1]
  if logits.ndim != 2 or labels.shape != expected or not labels.size:
    raise ValueError(
        f'{name}: logits have shape {logits.shape} and labels '
        f'{labels.shape}: expected [N, C] and [N], with N at least 1.'
    )
  if not is_sets and not jnp.issubdtype(labels.dtype, jnp.integer):
    raise TypeError(
        f'{name}: labels have dtype {labels.dtype}: expected '
        'integers, not one-hot rows or probabilities.'
    )


def _is_prediction(logits: Array) -> jax.Array:
  """Which rows have no NaN, `[N]`; of NumPy arrays in NumPy."""
  return (logits == logits).all(-1)


def correct(logits: Array, labels: Array) -> jax.Array:
  """Whether each prediction is right, `[N]` bool: for `evaluation.mean_of`.

  Where several labels are right they are bool, `[N, C]`: the class of the
  largest logit has to be among them. Where a logit is NaN the answer is wrong.

  Raises:
    ValueError: shapes that are not these.
    TypeError: labels that are neither integers nor bool.
  """
  _require_fit('correct', logits, labels)
  predicted = logits.argmax(-1)
  if labels.ndim == 1:
    is_right = predicted == labels
  else:
    is_right = jnp.take_along_axis(labels, predicted[:, None], axis=1)[:, 0]
  return is_right & _is_prediction(logits)


@_metric
def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """The share of examples whose largest logit is that of the label.

  Of several right labels, bool `[N, C]`, it may be any: see `correct`.

  Example:
    >>> accuracy(np.array([[2.0, 1.0], [0.0, 1.0]]), np.array([0, 0]))
    Array(0.5, dtype=float32)
  """
  return correct(logits, labels).mean(dtype=jnp.float32)


@_metric
def top_k_accuracy(
    logits: jax.Array, labels: jax.Array, *, k: int = 5
) -> jax.Array:
  """The share of examples whose label is among the k largest logits."""
  _, top = jax.lax.top_k(logits, min(k, logits.shape[-1]))
  is_right = (top == labels[:, None]).any(-1) & _is_prediction(logits)
  return is_right.mean(dtype=jnp.float32)


@_metric
def log_likelihood(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """`log softmax(logits_j)[label_j]`, `[N]` in nats: for `evaluation.mean_of`.

  Where the held-out set is small it selects better than `correct`: see
  `jaxsoup.statistics`.
  """
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
  return jnp.take_along_axis(log_p, labels[:, None], -1)[:, 0]


@_metric
def negative_log_likelihood(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """`-1/N sum_j log softmax(logits_j)[label_j]`, in nats."""
  return -log_likelihood(logits, labels).mean()


@_metric
def brier(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """`1/N sum_j |softmax(logits_j) - onehot(label_j)|^2`, from 0 to 2.

  Source: Brier 1950, "Verification of forecasts expressed in terms of
  probability".
  """
  p = jax.nn.softmax(logits.astype(jnp.float32))
  return jnp.square(p - jax.nn.one_hot(labels, p.shape[-1])).sum(-1).mean()


class Reliability(NamedTuple):
  """Confidence and accuracy in bins of equal mass, of rising confidence.

  Attributes:
    confidence: mean probability of the predicted class, `[B]`.
    accuracy: share of right predictions, `[B]`. Examples of one confidence
      share it, so that their order does not matter.
    num: examples, `[B]` int32.
  """

  confidence: jax.Array
  accuracy: jax.Array
  num: jax.Array


@_metric
def reliability(
    logits: jax.Array, labels: jax.Array, *, num_bins: int = 15
) -> Reliability:
  """How often a model is right, by how confident it is.

  Args:
    logits: `[N, C]`.
    labels: `[N]`.
    num_bins: bins hold the examples in order of their confidence, as equally
      as N allows; at most N are used.

  Returns:
    A `Reliability`, `[B]` each.

  Example:
    >>> logits = np.log(np.array([[0.6, 0.4], [0.4, 0.6], [0.9, 0.1]]))
    >>> bins = reliability(logits, np.array([0, 0, 0]), num_bins=2)
    >>> [x.tolist() for x in bins]
    [[0.6, 0.9], [0.5, 1.0], [2, 1]]

  Source: Nguyen and O'Connor 2015 (adaptive bins); Guo et al. 2017.
  """
  num = labels.shape[0]
  num_bins = min(num_bins, num)
  confidence = jax.nn.softmax(logits.astype(jnp.float32)).max(-1)
  order = jnp.argsort(confidence, stable=True)
  # The same cut points as np.array_split: the first bins are one longer.
  parts = np.array_split(range(num), num_bins)
  count = np.array(list(map(len, parts)), np.int32)
  bins = np.repeat(np.arange(num_bins), count)
  mean = lambda x: jax.ops.segment_sum(x, bins, num_bins) / count
  right = correct(logits, labels).astype(jnp.float32)[order]
  confidence = confidence[order]
  is_new = confidence[1:] != confidence[:-1]
  ties = jnp.cumsum(jnp.pad(is_new, (1, 0)))  # Which of the confidences.
  of_tie = lambda x: jax.ops.segment_sum(x, ties, num)[ties]
  shared = of_tie(right) / of_tie(jnp.ones_like(right))
  return Reliability(mean(confidence), mean(shared), jnp.asarray(count))


@_metric
def expected_calibration_error(
    logits: jax.Array, labels: jax.Array, *, num_bins: int = 15
) -> jax.Array:
  """The mean gap between confidence and accuracy, in bins of equal mass.

  `sum_b |b|/N |acc(b) - conf(b)|`, with the bins of `reliability`.

  Args:
    logits: `[N, C]`.
    labels: `[N]`.
    num_bins: number of bins; at most N are used.

  Returns:
    A scalar in [0, 1], 0 is best.

  Source: Nguyen and O'Connor 2015 (adaptive bins); Guo et al. 2017.
  """
  bins = reliability(logits, labels, num_bins=num_bins)
  gap = jnp.abs(bins.accuracy - bins.confidence)
  return (gap * bins.num).sum() / labels.shape[0]


def _confusion(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Counts `[C, C + 1]`: rows are labels, columns predictions or none."""
  num_classes = logits.shape[-1]
  predicted = jnp.where(_is_prediction(logits), logits.argmax(-1), num_classes)
  flat = labels.astype(jnp.int32) * (num_classes + 1) + predicted
  counts = jnp.bincount(flat, length=num_classes * (num_classes + 1))
  return counts.reshape(num_classes, num_classes + 1)


@_metric
def f1(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """The harmonic mean of precision and recall.

  `F1_c = 2 TP_c / (2 TP_c + FP_c + FN_c)`: of class 1 where there are two
  classes (as GLUE asks), else the mean over the classes that occur among labels
  or predictions (macro). A row of logits with a NaN is an FN of its label.
  """
  counts = _confusion(logits, labels)
  total = counts.sum(0)[:-1] + counts.sum(1)
  twice = 2 * jnp.diagonal(counts).astype(jnp.float32)
  scores = twice / jnp.where(total > 0, total, 1).astype(jnp.float32)
  if logits.shape[-1] == 2:
    return scores[1]
  return scores.sum() / (total > 0).sum()


@_metric
def matthews(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Matthews' correlation of labels and predictions, for any number of classes.

  `(c s - sum_k p_k t_k) / sqrt((s^2 - sum_k p_k^2) (s^2 - sum_k t_k^2))` with c
  the number of right predictions among s, and p_k, t_k how often class k was
  predicted and true. Zero where one class only was predicted or true. Rows of
  logits with a NaN are a class of their own, which is never true.

  Source: Gorodkin 2004, "Comparing two K-category assignments by a K-category
  correlation coefficient".
  """
  counts = _confusion(logits, labels)
  s, predicted, true = counts.sum(), counts.sum(0), counts.sum(1)
  # The same as sums over classes, without differences of large squares:
  # TP TN - FP FN, and n_k (s - n_k). Counts are exact integers.
  tp = jnp.diagonal(counts)
  fp, fn = predicted[:-1] - tp, true - tp
  product = lambda a, b: a.astype(jnp.float32) * b.astype(jnp.float32)
  covariance = product(tp, s - tp - fp - fn) - product(fp, fn)
  variance = lambda n: product(n, s - n).sum()
  deviations = jnp.sqrt(variance(predicted) * variance(true))
  is_defined = deviations > 0
  correlation = covariance.sum() / jnp.where(is_defined, deviations, 1)
  return jnp.where(is_defined, correlation, 0.0)
