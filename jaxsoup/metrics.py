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
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def _metric(fn):
  """Compiles a metric; brings NumPy input to the device explicitly."""
  compiled = jax.jit(fn, static_argnames=tuple(fn.__kwdefaults__ or ()))

  @functools.wraps(fn)
  def wrapper(logits, labels, **kwargs):
    logits, labels = (
        x if isinstance(x, jax.Array) else jax.device_put(np.asarray(x))
        for x in (logits, labels)
    )
    is_sets = fn.__name__ == 'accuracy' and labels.dtype == bool
    expected = logits.shape if is_sets else logits.shape[:1]
    if logits.ndim != 2 or labels.shape != expected or not labels.size:
      raise ValueError(
          f'{fn.__name__}: logits have shape {logits.shape} and labels '
          f'{labels.shape}: expected [N, C] and [N], with N at least 1.'
      )
    if not is_sets and not jnp.issubdtype(labels.dtype, jnp.integer):
      raise TypeError(
          f'{fn.__name__}: labels have dtype {labels.dtype}: expected '
          'integers, not one-hot rows or probabilities.'
      )
    return compiled(logits, labels, **kwargs)

  return wrapper


def correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Whether each prediction is right, `[N]` bool: for `evaluation.mean_of`.

  Where several labels are right they are bool, `[N, C]`: the class of the
  largest logit has to be among them.
  """
  predicted = logits.argmax(-1)
  if labels.ndim == 1:
    return predicted == labels
  return jnp.take_along_axis(labels, predicted[:, None], axis=1)[:, 0]


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
  return (top == labels[:, None]).any(-1).mean(dtype=jnp.float32)


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
    accuracy: share of right predictions, `[B]`.
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
  count = np.array(
      [len(b) for b in np.array_split(range(num), num_bins)], np.int32
  )
  bins = np.repeat(np.arange(num_bins), count)
  mean = lambda x: jax.ops.segment_sum(x[order], bins, num_bins) / count
  right = correct(logits, labels).astype(jnp.float32)
  return Reliability(mean(confidence), mean(right), jnp.asarray(count))


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
  """Counts `[C, C]`: rows are labels, columns predictions."""
  num_classes = logits.shape[-1]
  predicted = logits.argmax(-1)
  flat = labels.astype(jnp.int32) * num_classes + predicted
  counts = jnp.bincount(flat, length=num_classes**2)
  return counts.reshape(num_classes, num_classes).astype(jnp.float32)


@_metric
def f1(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """The harmonic mean of precision and recall.

  `F1_c = 2 TP_c / (2 TP_c + FP_c + FN_c)`: of class 1 where there are two
  classes (as GLUE asks), else the mean over the classes that occur among labels
  or predictions (macro).
  """
  counts = _confusion(logits, labels)
  total = counts.sum(0) + counts.sum(1)
  scores = 2 * jnp.diagonal(counts) / jnp.where(total > 0, total, 1)
  if logits.shape[-1] == 2:
    return scores[1]
  return scores.sum() / (total > 0).sum()


@_metric
def matthews(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Matthews' correlation of labels and predictions, for any number of classes.

  `(c s - sum_k p_k t_k) / sqrt((s^2 - sum_k p_k^2) (s^2 - sum_k t_k^2))` with c
  the number of right predictions among s, and p_k, t_k how often class k was
  predicted and true. Zero where one class only was predicted or true.

  Source: Gorodkin 2004, "Comparing two K-category assignments by a K-category
  correlation coefficient".
  """
  shares = _confusion(logits, labels) / labels.shape[0]
  right, predicted, true = jnp.trace(shares), shares.sum(0), shares.sum(1)
  variances = (1 - (predicted**2).sum()) * (1 - (true**2).sum())
  covariance = right - (predicted * true).sum()
  # One class only: the variance is zero up to rounding.
  safe = variances > 1e-12
  return jnp.where(
      safe, covariance / jnp.sqrt(jnp.where(safe, variances, 1)), 0.0
  )
