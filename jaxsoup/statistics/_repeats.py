"""Two models in several seeds or splits: which is better, how sure that is."""

from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np

from jaxsoup.statistics import _comparisons
from jaxsoup.statistics._comparisons import Comparison
from jaxsoup.typing import ArrayLike
from jaxsoup.typing import MetricFn


def over_repeats(
    gains: ArrayLike, *, share: float = 0.0, level: float = 0.95
) -> Comparison:
  """The mean gain over repeats, such as seeds or splits, and its interval.

  `mean +- t sd sqrt(1 / n + share / (1 - share))`, t of Student's distribution
  with n - 1 degrees of freedom. Each gain is a difference within one repeat,
  hence paired.

  Repeats that draw their examples from one pool depend on each other: on
  average two of them have `share` of the examples that report in common, which
  is taken for the correlation of their gains. This is the corrected resampled t
  test; where the parts of a repeat use up the pool, `share / (1 - share)` is
  its `n_test / n_train`, with all that does not report in n_train.

  Args:
    gains: one a repeat, `[n]`.
    share: the examples that report in one repeat, as a share of the pool that
      each repeat draws them from, in 0..1. 0: repeats have no examples in
      common, which leaves the paired t test. 1: all have the same, which tells
      nothing about others: use `compare` on these.
    level: of the interval.

  Returns:
    A `Comparison`; interval and p-value are NaN of a single repeat, and of a
    share of 1.

  Raises:
    ValueError: no gains, or a share that is not in 0..1.

  Example:
    >>> mean = over_repeats([0.01, 0.02, 0.03])
    >>> mean.gain, round(mean.low, 4), round(mean.high, 4)
    (0.02, -0.0048, 0.0448)
    >>> mean = over_repeats([0.01, 0.02, 0.03], share=600 / 1000)
    >>> mean.gain, round(mean.low, 4), round(mean.high, 4)
    (0.02, -0.0383, 0.0783)

  Source: Student 1908, "The probable error of a mean"; Nadeau and Bengio 2003,
  "Inference for the generalization error", Machine Learning 52.
  """
  gains = np.asarray(gains, float)
  num = gains.size
  if gains.ndim != 1 or not num or not 0 <= share <= 1:
    raise ValueError(
        f'gains have shape {list(gains.shape)}, and share is {share}: expected '
        '[n], one number per repeat and at least one, and a share in 0..1.'
    )
  error = float('nan')
  if num > 1 and share < 1:
    factor = np.sqrt(1 / num + share / (1 - share))
    error = float(gains.std(ddof=1) * factor)
  method = 'corrected resampled t' if share else 'paired t'
  return _by_t(gains, error, max(num - 1, 1), method, level)


def crossed(
    metric: MetricFn | None,
    a: Sequence[ArrayLike | Mapping[str, ArrayLike]],
    b: Sequence[ArrayLike | Mapping[str, ArrayLike]],
    ids: Sequence[ArrayLike | Mapping[str, ArrayLike]],
    *,
    label: Sequence[ArrayLike | Mapping[str, ArrayLike]] | None = None,
    level: float = 0.95,
) -> Comparison:
  """The mean gain over repeats that have examples in common, by the examples.

  `mean +- t sqrt(sd^2 / n + c)`. What repeats have in common makes their gains
  depend on each other; c is their covariance, a mean over pairs of repeats:

  `c = 2 / (n (n - 1)) sum_(r < s) sum_(e in r and s) u_re u_se`,

  where u_re is what example e contributes to the gain of repeat r, `(d_re -
  mean d_r) / N_r` of a mean over examples. Where repeats agree by chance, the
  root is that of `sum_e (sum_r u_re)^2 / n^2`, as if examples were all that
  differs. By Satterthwaite's approximation t has `(n - 1) (v n / sd^2)^2`
  degrees of freedom, v the number under the root. `over_repeats` has no answers
  and assumes the covariance.

  Other repeats and other examples are what the interval tells of. That repeats
  train on examples in common is not in it: where they share many, take
  `over_repeats`.

  Args:
    metric: as in `paired_bootstrap`; one that is not a mean of the examples is
      called once an example, without it.
    a: one entry a repeat, each as in `paired_bootstrap`.
    b: the same of the second model.
    ids: which examples these are, `[N]`, or a mapping of those by data set.
      Equal ones are one example, in other data sets and repeats, too.
    label: one entry a repeat, as in `paired_bootstrap`.
    level: of the interval.

  Returns:
    A `Comparison`; interval and p-value are NaN of a single repeat.

  Raises:
    ValueError: no repeats, or as in `paired_bootstrap`.

  Example:
    >>> a, b = np.array([[1, 1, 0, 1], [0, 1, 1, 1]]), np.zeros((2, 4))
    >>> mean = crossed(None, a, b, ids=[range(4), range(1, 5)])
    >>> mean.gain, mean.num, mean.method
    (0.75, 5, 'crossed t')

  Source: Cameron, Gelbach and Miller 2011, "Robust inference with multiway
  clustering", Journal of Business and Economic Statistics 29; Satterthwaite
  1946, "An approximate distribution of estimates of variance components".
  """
  num = len(a)
  labels = [None] * num if label is None else label
  if not num or not num == len(b) == len(ids) == len(labels):
    raise ValueError(
        f'There are {num} and {len(b)} repeats, {len(ids)} entries of ids and '
        f'{len(labels)} of label: expected one number of them, at least 1.'
    )
  gains, values, names = np.zeros(num), [], []
  for repeat, (*answers, own_ids) in enumerate(zip(a, b, labels, ids)):
    sets = _comparisons.sets_of(metric, *answers)
    gains[repeat] = np.mean([s.differences.mean() for s in sets])
    values.append([_influence(metric, s) / len(sets) for s in sets])
    names.append([_ids_of(own_ids, s) for s in sets])
  u = _by_example(values, names)
  error = free = float('nan')
  if num > 1:
    own = gains.var(ddof=1) / num
    of_example, squares = u.sum(0) ** 2, (u**2).sum()
    # The square of a sum has each pair twice, and the squares.
    shared = max((of_example.sum() - squares) / (num * (num - 1)), 0)
    variance = max(own + shared, of_example.sum() / num**2)
    error = float(np.sqrt(variance))
    free = (num - 1) * (variance / own) ** 2 if own else np.inf
  made = _by_t(gains, error, free, 'crossed t', level)
  return made._replace(num=u.shape[1])


def _by_example(values, names) -> np.ndarray:
  """Sums of the values by repeat and example, `[n, E]`."""
  flat = [np.concatenate(x) for x in names]
  unique, columns = np.unique(np.concatenate(flat), return_inverse=True)
  u = np.zeros((len(values), len(unique)))
  rows = np.repeat(np.arange(len(values)), [len(x) for x in flat])
  np.add.at(u, (rows, columns), np.concatenate([*map(np.concatenate, values)]))
  return u


def _influence(metric: MetricFn | None, s: _comparisons.Set) -> np.ndarray:
  """What each example contributes to the gain, `[N]`: its sum is about 0.

  Of a metric that is no mean by leaving one example out, as the jackknife does.
  """
  gain, num = s.differences, len(s.a)
  if gain.ndim:
    return (gain - gain.mean()) / num
  gains_on = _comparisons.gain_fn(metric, s)
  others = np.arange(num - 1, dtype=np.int32)
  parts = np.array_split(np.arange(num), -(-num // 100))
  # For each row all others.
  without = np.concatenate(
      [gains_on(others + (others >= rows[:, None])) for rows in parts]
  )
  return (without.mean() - without) * (num - 1) / num


def _ids_of(ids, s: _comparisons.Set) -> np.ndarray:
  own = np.asarray(ids[s.name] if isinstance(ids, Mapping) else ids)
  if own.shape != (len(s.a),):
    raise ValueError(
        f'{s.name}: there are {len(s.a)} examples, and ids of shape '
        f'{list(own.shape)}: expected one a example, [N].'
    )
  return own


def _by_t(
    gains: np.ndarray, error: float, free: float, method: str, level: float
) -> Comparison:
  """The mean and its interval, by t with `free` degrees of freedom."""
  from scipy import stats

  mean = float(gains.mean())
  t = stats.t(free)
  margin = float(t.ppf((1 + level) / 2)) * error
  return Comparison(
      mean,
      mean - margin,
      mean + margin,
      _comparisons.two_sided(mean, error, t.cdf),
      method=method,
      level=level,
      num_repeats=len(gains),
  )
