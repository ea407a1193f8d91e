"""Two models on the same examples: which is better, and how sure that is."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import math
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from jaxsoup import metrics
from jaxsoup.typing import ArrayLike
from jaxsoup.typing import MetricFn

_NUM_AT_ONCE = 100


class Comparison(NamedTuple):
  """A difference, and how sure it is.

  Interval and p-value are of one method, so that 0 is outside of the interval
  where p < 1 - level, and only there.

  Attributes:
    gain: score of the first minus that of the second; scores are in 0..1.
    low: lower end of its confidence interval.
    high: upper end.
    p_value: two-sided, of no difference.
    num: examples that were compared, over all data sets.
    method: of the interval and the p-value.
    level: of the interval.
    num_repeats: splits or seeds that it is a mean over.
  """

  gain: float
  low: float
  high: float
  p_value: float
  num: int = 0
  method: str = 'paired bootstrap'
  level: float = 0.95
  num_repeats: int = 1

  @property
  def is_significant(self) -> bool:
    """Whether 0 is outside of the interval, which means p < 1 - level."""
    return self.low > 0 or self.high < 0


def mcnemar(
    correct_a: ArrayLike, correct_b: ArrayLike, *, level: float = 0.95
) -> Comparison:
  """Whether two models are right equally often, by the same examples.

  `p = min(1, 2 P(X <= min(n_a, n_b)))`, `X ~ Binomial(n_a + n_b, 1/2)`, where
  only the first model is right n_a times, and only the second n_b times. The
  interval of `(n_a - n_b) / N` is the one that is compatible with this test.

  Args:
    correct_a, correct_b: whether each of the two is right, `[N]` bool.
    level: of the interval.

  Returns:
    A `Comparison`.

  Raises:
    ValueError: not bool, of different lengths, or empty.

  Example:
    >>> mcnemar(np.array([1, 1, 1, 1, 0]) > 0, np.zeros(5) > 0).p_value
    0.125

  Source: McNemar 1947, "Note on the sampling error of the difference between
  correlated proportions or percentages". The interval: Fay and Lumbard 2021,
  "Confidence intervals for difference in proportions for matched pairs
  compatible with exact McNemar's or sign tests".
  """
  from scipy import special

  a, b = (np.asarray(jax.device_get(x)) for x in (correct_a, correct_b))
  is_bool = a.dtype == b.dtype == bool
  if a.shape != b.shape or a.ndim != 1 or not is_bool or not a.size:
    raise ValueError(
        f'Answers are {a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}: '
        'expected bool [N] for both, as metrics.correct returns them, and N '
        'at least 1.'
    )
  num, only_a, only_b = a.size, int((a & ~b).sum()), int((b & ~a).sum())
  tail = special.bdtr(min(only_a, only_b), only_a + only_b, 0.5)
  return Comparison(
      (only_a - only_b) / num,
      _lower_end(only_a, only_b, num, (1 - level) / 2),
      -_lower_end(only_b, only_a, num, (1 - level) / 2),
      p_value=min(1.0, 2 * float(tail)),
      num=num,
      method='exact McNemar',
      level=level,
  )


def _lower_end(num_a: int, num_b: int, num: int, tail: float) -> float:
  """The lower end of an interval of P(only a is right) - P(only b is right).

  The difference is `T (2 B - 1)`: how often one model alone is right, and how
  often that is a. Below are Clopper and Pearson's lower distribution of B, and
  of T the lower one where the difference is positive, else the upper one. At a
  difference of 0 the integral is the p-value of the exact one-sided test.
  """
  from scipy import optimize
  from scipy import special

  either = num_a + num_b
  if not num_a:  # B is 0.
    if either == num:
      return -1.0
    return -float(special.betaincinv(either + 1, num - either, 1 - tail))
  quantiles = (np.arange(256) + 0.5) / 256
  lower = special.betaincinv(either, num - either + 1, quantiles)
  upper = np.ones(1)
  if either < num:
    upper = special.betaincinv(either + 1, num - either, quantiles)

  def excess(difference):
    t = lower if difference >= 0 else upper
    b = np.clip((1 + difference / t) / 2, 0, 1)
    return special.betainc(num_a, num_b + 1, b).mean() - tail

  ends = (-1, 0) if excess(0) >= 0 else (0, 1)
  return float(optimize.brentq(excess, *ends))


def paired_bootstrap(
    metric: MetricFn | None,
    a: ArrayLike | Mapping[str, ArrayLike],
    b: ArrayLike | Mapping[str, ArrayLike],
    *,
    label: ArrayLike | Mapping[str, ArrayLike] | None = None,
    num_resamples: int = 5000,
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
  """The interval of `metric(a) - metric(b)` where examples are resampled.

  Both models answer the same resampled examples. Of R differences in order, the
  ends of the interval are the k-th smallest and the k-th largest, and `p = 2 (1
  + min(number <= 0, number >= 0)) / (R + 1)`, where k is the largest number
  with `2 k / (R + 1) < 1 - level`. Of a mean over several data sets each
  set is resampled by itself. Sets with equal labels, such as corruptions of one
  test set, hold the same examples: those are resampled together, because their
  errors do not average out.

  Args:
    metric: `metric(logits [N, C], label [N])`. Where it returns one number an
      example, as `metrics.correct` does, their mean is compared, which takes no
      time; where it returns a scalar, as `metrics.matthews` does, it is called
      twice a resample, compiled if jax can. None: a and b are such numbers.
    a: logits `[N, C]` of the first model, or numbers `[N]`; or a mapping of
      those by data set, whose metrics are averaged.
    b: the same of the second.
    label: `[N]`, or a mapping of those. Without it data sets of one length are
      resampled together.
    num_resamples: how many.
    seed: of the resamples.
    level: of the interval.

  Returns:
    A `Comparison`.

  Raises:
    ValueError: nothing to compare, lengths or names that do not agree, too few
      resamples for the level, or a metric that is not finite.

  Example:
    >>> right = np.array([True] * 30 + [False] * 10)
    >>> paired_bootstrap(None, right, ~right).gain
    0.5

  Source: Efron and Tibshirani 1993, "An introduction to the bootstrap",
  sections 13.3 and 16.4; quantiles by R + 1: Davison and Hinkley 1997,
  "Bootstrap methods and their application", section 5.2.
  """
  # Rounded: 1 - 0.95 is a little more than 0.05.
  rank = math.ceil(round((1 - level) * (num_resamples + 1) / 2, 9)) - 1
  if not 0 < level < 1 or rank < 1:
    raise ValueError(
        f'num_resamples is {num_resamples} and level {level}: expected a level '
        'between 0 and 1, and more than 2 / (1 - level) - 1 resamples.'
    )
  sets = sets_of(metric, a, b, label)
  rng = np.random.default_rng(seed)
  gain = np.mean([s.differences.mean() for s in sets])
  draws = np.zeros(num_resamples)
  for group in _of_same_examples(sets):
    draws += _resampled(metric, group, num_resamples, rng) / len(sets)
  if not np.isfinite(gain) or not np.isfinite(draws).all():
    raise ValueError(
        f'The metric is not finite: {gain} on all examples, and not finite on '
        f'{int((~np.isfinite(draws)).sum())} of {num_resamples} resamples. '
        'Return its worst value where it is undefined.'
    )
  # What is zero but for rounding is neither above nor below.
  draws = np.sort(draws.round(12))
  rarest = min((draws <= 0).sum(), (draws >= 0).sum())
  return Comparison(
      float(gain),
      float(draws[rank - 1]),
      float(draws[-rank]),
      p_value=min(1.0, 2 * float(rarest + 1) / (num_resamples + 1)),
      num=sum(len(s.a) for s in sets),
      level=level,
  )


def compare(
    a: ArrayLike | Mapping[str, ArrayLike],
    b: ArrayLike | Mapping[str, ArrayLike],
    label: ArrayLike | Mapping[str, ArrayLike] | None = None,
    *,
    metric: MetricFn | None = metrics.correct,
    num_resamples: int = 5000,
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
  """How much better the first model is, and how sure that is.

  By `mcnemar` where the answers to one data set are right or wrong, else by
  `paired_bootstrap`.

  Args:
    a, b, label, metric, num_resamples, seed, level: as in `paired_bootstrap`.

  Returns:
    A `Comparison`.

  Raises:
    ValueError: as in `paired_bootstrap`.

  Example:
    >>> right = np.array([True] * 30 + [False] * 10)
    >>> comparison = compare(right, ~right, metric=None)
    >>> comparison.method, round(comparison.p_value, 4)
    ('exact McNemar', 0.0022)
  """
  if not isinstance(a, Mapping):
    scores = _set('the data', metric, a, b, label).scores
    if all(x.dtype == bool for x in scores):
      return mcnemar(*scores, level=level)
  return paired_bootstrap(
      metric,
      a,
      b,
      label=label,
      num_resamples=num_resamples,
      seed=seed,
      level=level,
  )


def optimism(held_out_gain: Comparison, report_gain: Comparison) -> Comparison:
  """Selection optimism: held-out gain minus report gain.

  A search takes the luckiest of its candidates on the held-out data, so that
  the gain there is larger than on data that chose nothing. The optimism is
  negative where that of the best single model, the luckiest of K, is larger.

  Args:
    held_out_gain: gain over the best single model on the data that chose.
    report_gain: gain of the same model on data that only report.

  Returns:
    A `Comparison`. The data are disjoint, hence independent: each end of the
    interval is as far from the difference as the root of the sum of squares of
    what the two intervals allow on that side. It tells the chance in drawing
    examples; of gains by repeat take `over_repeats` of their differences.

  Raises:
    ValueError: levels that differ.

  Example:
    >>> a = Comparison(0.03, 0.01, 0.05, p_value=0.01)
    >>> b = Comparison(0.01, 0.0, 0.02, p_value=0.05)
    >>> round(optimism(a, b).gain, 4)
    0.02

  Source: Efron 1983, "Estimating the error rate of a prediction rule". The
  interval: Zou and Donner 2008, "Construction of confidence limits about effect
  measures: a general approach".
  """
  from scipy import special

  a, b = held_out_gain, report_gain
  if a.level != b.level:
    raise ValueError(
        f'The gains have intervals of levels {a.level} and {b.level}: expected '
        'one level.'
    )
  gain = a.gain - b.gain
  low = gain - float(np.hypot(a.gain - a.low, b.high - b.gain))
  high = gain + float(np.hypot(a.high - a.gain, b.gain - b.low))
  # The side on which 0 lies, so that the p-value agrees with the interval.
  to_zero = gain - low if gain > 0 else high - gain
  return Comparison(
      gain,
      low,
      high,
      two_sided(gain, to_zero / special.ndtri((1 + a.level) / 2), special.ndtr),
      num=a.num + b.num,
      method='two intervals',
      level=a.level,
  )


def two_sided(
    mean: float, error: float, cdf: Callable[[float], np.floating[Any]]
) -> float:
  """The p-value of a mean with a standard error; of no error 0 or 1."""
  if error == 0:
    return float(mean == 0)
  return min(2 * float(cdf(-abs(mean) / error)), 1.0)  # In order: NaN stays.


class Set(NamedTuple):
  """Answers of two models to one data set."""

  name: str
  a: np.ndarray
  b: np.ndarray
  label: np.ndarray | None
  scores: list[np.ndarray]  # Of a and b: [N] where the metric is a mean.

  @property
  def differences(self) -> np.ndarray:
    return self.scores[0].astype(float) - self.scores[1].astype(float)


def sets_of(metric, a, b, label) -> list[Set]:
  """Answers by data set, checked."""
  if not isinstance(a, Mapping):
    return [_set('the data', metric, a, b, label)]
  label = dict.fromkeys(a) if label is None else label
  if not a or a.keys() != b.keys() or not a.keys() <= label.keys():
    raise ValueError(
        f'The first has data sets {list(a)}, the second {list(b)}, and label '
        f'{list(label)}: expected the same names, and at least one.'
    )
  return [_set(name, metric, a[name], b[name], label[name]) for name in a]


def _set(name, metric, a, b, label) -> Set:
  a, b, label = (
      None if x is None else np.asarray(jax.device_get(x))
      for x in (a, b, label)
  )
  lengths = [len(x) if np.ndim(x) else 0 for x in (a, b)]
  lengths += [] if label is None else [len(label)]
  if len(set(lengths)) > 1 or not lengths[0]:
    raise ValueError(
        f'{name}: the models answer {lengths[0]} and {lengths[1]} examples'
        + ('' if label is None else f', and there are {len(label)} labels')
        + ': expected equal numbers, at least 1.'
    )
  scores = [_answers(metric, x, label) for x in (a, b)]
  shapes = [list(x.shape) for x in scores]
  if shapes[0] != shapes[1] or shapes[0] not in ([], [len(a)]):
    raise ValueError(
        f'{name}: the metric returned shapes {shapes[0]} and {shapes[1]} for '
        f'{len(a)} examples: expected a scalar, or one number per example. '
        'Logits need a metric, such as metrics.correct.'
    )
  return Set(name, a, b, label, scores)


def _answers(metric, x, label) -> np.ndarray:
  return np.asarray(jax.device_get(x if metric is None else metric(x, label)))


def _of_same_examples(sets: Sequence[Set]) -> list[list[Set]]:
  groups: dict[tuple[int, bytes | None], list[Set]] = {}
  for s in sets:
    key = len(s.a), None if s.label is None else s.label.tobytes()
    groups.setdefault(key, []).append(s)
  return list(groups.values())


def _resampled(metric, group, num_resamples, rng) -> np.ndarray:
  """Sums of the gains over data sets of the same examples, by resample."""
  num = len(group[0].a)
  if group[0].differences.ndim:
    return (
        _resampled_sums(sum(s.differences for s in group), num_resamples, rng)
        / num
    )
  gain_fns = [gain_fn(metric, s) for s in group]
  draws = []
  for _ in range(0, num_resamples, _NUM_AT_ONCE):
    rows = rng.integers(num, size=(_NUM_AT_ONCE, num), dtype=np.int32)
    draws.append(sum(fn(rows) for fn in gain_fns))
  return np.concatenate(draws)[:num_resamples]


def gain_fn(metric, s: Set) -> Callable[[np.ndarray], np.ndarray]:
  """The gain on rows `[R, N]` of a data set, `[R]`; compiled if it can be."""
  compiled = functools.partial(
      _gains(metric), *jax.device_put((s.a, s.b, s.label))
  )
  try:
    jax.eval_shape(compiled, np.zeros((1, len(s.a)), np.int32))
  except Exception:  # It is not one of jax: it just worked on these arrays.
    score = lambda x, r: float(_answers(metric, *_taken(x, s.label, r)))
    return lambda rows: np.array([score(s.a, r) - score(s.b, r) for r in rows])
  return lambda rows: np.asarray(
      jax.device_get(compiled(jax.device_put(rows))), float
  )


@functools.lru_cache(maxsize=8)
def _gains(metric):
  """A compiled function, the same for all data sets of one size."""

  def gains(a, b, label, rows):
    score = lambda x, r: metric(*_taken(x, label, r))
    return jax.lax.map(lambda r: score(a, r) - score(b, r), rows)

  return jax.jit(gains)


def _taken(x, label, rows):
  return x[rows], None if label is None else label[rows]


def _resampled_sums(values: np.ndarray, num_resamples, rng) -> np.ndarray:
  """Sums over N of N values drawn with replacement, `[num_resamples]`."""
  unique, counts = np.unique(values, return_counts=True)
  num = len(values)
  if len(unique) <= num // 8:
    # How often each value is drawn, whichever examples have it.
    return rng.multinomial(num, counts / num, num_resamples) @ unique
  return np.array(
      [values[rng.integers(num, size=num)].sum() for _ in range(num_resamples)]
  )
