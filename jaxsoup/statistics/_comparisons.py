"""Two models on the same examples: which is better, and how sure that is."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from jaxsoup import metrics

# Maps logits `[N, C]` and labels `[N]` to one number, or to one an example.
Metric = Callable[[Any, Any], Any]
_NUM_AT_ONCE = 100


class McNemar(NamedTuple):
  """What `mcnemar` returns.

  Attributes:
    p_value: two-sided and exact.
    num_only_a: examples that only the first got right.
    num_only_b: examples that only the second got right.
  """

  p_value: float
  num_only_a: int
  num_only_b: int


class Comparison(NamedTuple):
  """A difference, and how sure it is.

  Attributes:
    gain: score of the first minus that of the second; scores are in 0..1.
    low: lower end of its confidence interval.
    high: upper end.
    p_value: two-sided, of no difference.
    num: examples that were compared, over all data sets.
    method: where the p-value is from.
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
    """Whether the difference is significant: p < 1 - level."""
    return self.p_value < 1 - self.level


def mcnemar(correct_a: Any, correct_b: Any) -> McNemar:
  """Whether two models are right equally often, by the same examples.

  `p = min(1, 2 P(X <= min(n_a, n_b)))`, `X ~ Binomial(n_a + n_b, 1/2)`, where
  only the first model is right n_a times, and only the second n_b times.

  Args:
    correct_a: whether the first is right, `[N]` bool.
    correct_b: the same of the second.

  Returns:
    A `McNemar`.

  Raises:
    ValueError: not bool, or of different lengths.

  Example:
    >>> mcnemar(np.array([1, 1, 1, 1, 0]) > 0, np.array([0, 0, 0, 0, 0]) > 0)
    McNemar(p_value=0.125, num_only_a=4, num_only_b=0)

  Source: McNemar 1947, "Note on the sampling error of the difference between
  correlated proportions or percentages".
  """
  from scipy import special

  a, b = (np.asarray(jax.device_get(x)) for x in (correct_a, correct_b))
  if a.shape != b.shape or a.ndim != 1 or a.dtype != bool or b.dtype != bool:
    raise ValueError(
        f'Answers are {a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}: '
        'expected bool [N] for both, as metrics.correct returns them.'
    )
  only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
  tail = special.bdtr(min(only_a, only_b), only_a + only_b, 0.5)
  return McNemar(min(1.0, 2 * float(tail)), only_a, only_b)


def paired_bootstrap(
    metric: Metric | None,
    a: Any,
    b: Any,
    *,
    label: Any = None,
    num_resamples: int = 5000,
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
  """The interval of `metric(a) - metric(b)` where examples are resampled.

  Both models answer the same resampled examples; the interval is that between
  quantiles of the resampled differences. Of a mean over several data sets each
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
    ValueError: nothing to compare, lengths or names that do not agree, or a
      metric that is not finite.

  Example:
    >>> right = np.array([True] * 30 + [False] * 10)
    >>> paired_bootstrap(None, right, ~right).gain
    0.5

  Source: Efron and Tibshirani 1993, "An introduction to the bootstrap",
  sections 13.3 and 16.4.
  """
  if num_resamples < 1 or not 0 < level < 1:
    raise ValueError(
        f'num_resamples is {num_resamples} and level {level}: expected at '
        'least 1, and between 0 and 1.'
    )
  sets = _sets(metric, a, b, label)
  rng = np.random.default_rng(seed)
  gain = np.mean([s.gain for s in sets])
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
  draws = draws.round(12)
  rarest = min((draws <= 0).sum(), (draws >= 0).sum())
  low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
  return Comparison(
      float(gain),
      float(low),
      float(high),
      p_value=min(1.0, 2 * float(rarest + 1) / (num_resamples + 1)),
      num=sum(len(s.a) for s in sets),
      level=level,
  )


def compare(
    a: Any,
    b: Any,
    label: Any = None,
    *,
    metric: Metric | None = metrics.correct,
    **options: Any,
) -> Comparison:
  """How much better the first model is, and how sure that is.

  The interval is that of `paired_bootstrap`. So is the p-value, except where
  the answers to one data set are right or wrong: there it is that of `mcnemar`.

  Args:
    a: as in `paired_bootstrap`.
    b: as in `paired_bootstrap`.
    label: as in `paired_bootstrap`.
    metric: as in `paired_bootstrap`.
    **options: the others of `paired_bootstrap`.

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
  comparison = paired_bootstrap(metric, a, b, label=label, **options)
  if isinstance(a, Mapping):
    return comparison
  answers = [_answers(metric, x, label) for x in (a, b)]
  if any(x.dtype != bool for x in answers):
    return comparison
  return comparison._replace(
      p_value=mcnemar(*answers).p_value, method='exact McNemar'
  )


def over_repeats(gains: Any, *, level: float = 0.95) -> Comparison:
  """The mean gain over seeds or splits, and its interval.

  `mean +- t sd / sqrt(n)`, t of Student's distribution with n - 1 degrees of
  freedom. Each gain is a difference within one repeat, hence paired.

  Args:
    gains: one a repeat, `[n]`. Repeats should share no examples: those that
      split one pool again depend on each other, and the interval is too short.
    level: of the interval.

  Returns:
    A `Comparison`; interval and p-value are NaN of a single repeat.

  Raises:
    ValueError: no gains.

  Example:
    >>> mean = over_repeats([0.01, 0.02, 0.03])
    >>> mean.gain, round(mean.low, 4), round(mean.high, 4)
    (0.02, -0.0048, 0.0448)

  Source: Student 1908. On splits of one pool: Nadeau and Bengio 2003,
  "Inference for the generalization error".
  """
  from scipy import special

  gains = np.asarray(gains, float)
  num = gains.size
  if gains.ndim != 1 or not num:
    raise ValueError(
        f'gains have shape {list(gains.shape)}: expected [n], one number per '
        'repeat, and at least one.'
    )
  mean, error = float(gains.mean()), float('nan')
  if num > 1:
    error = float(gains.std(ddof=1) / np.sqrt(num))
  margin = float(special.stdtrit(max(num - 1, 1), (1 + level) / 2)) * error
  p_value = _two_sided(mean, error, lambda t: special.stdtr(max(num - 1, 1), t))
  return Comparison(
      mean,
      mean - margin,
      mean + margin,
      p_value,
      method='paired t',
      level=level,
      num_repeats=num,
  )


def optimism(held_out_gain: Any, report_gain: Any) -> Comparison:
  """Selection optimism: held-out gain minus report gain.

  A search takes the luckiest of its candidates on the held-out data, so that
  the gain there is larger than on data that chose nothing. The optimism is
  negative where that of the best single model, the luckiest of K, is larger.

  Args:
    held_out_gain: gain over the best single model on the data that chose: a
      `Comparison`, or gains `[n]`, one a repeat.
    report_gain: gain of the same model on data that only report.

  Returns:
    A `Comparison`. Of two intervals, whose data are disjoint, hence
    independent, each end is as far from the difference as the root of the sum
    of squares of what they allow on that side; the interval tells the chance in
    drawing examples. Of gains by repeat it is that of `over_repeats`, paired.

  Raises:
    ValueError: arguments of two kinds, or levels or lengths that differ.

  Example:
    >>> round(optimism([0.03, 0.02, 0.04], [0.01, 0.01, 0.02]).gain, 4)
    0.0167

  Source: Efron 1983, "Estimating the error rate of a prediction rule". The
  interval: Zou and Donner 2008, "Construction of confidence limits about effect
  measures: a general approach".
  """
  if not isinstance(held_out_gain, Comparison) and not isinstance(
      report_gain, Comparison
  ):
    chosen, reported = (
        np.asarray(x, float) for x in (held_out_gain, report_gain)
    )
    if chosen.shape != reported.shape:
      raise ValueError(
          f'Gains have shapes {list(chosen.shape)} and '
          f'{list(reported.shape)}: expected one of each per repeat.'
      )
    return over_repeats(chosen - reported)
  if (
      type(held_out_gain) is not type(report_gain)
      or held_out_gain.level != report_gain.level
  ):
    raise ValueError(
        f'The gains are {held_out_gain} and {report_gain}: expected two '
        'Comparisons of the same level, or two lists of gains by repeat.'
    )
  return _difference(held_out_gain, report_gain)


def _difference(a: Comparison, b: Comparison) -> Comparison:
  from scipy import special

  gain = a.gain - b.gain
  low = gain - np.hypot(a.gain - a.low, b.high - b.gain)
  high = gain + np.hypot(a.high - a.gain, b.gain - b.low)
  error = (high - low) / 2 / special.ndtri((1 + a.level) / 2)
  return Comparison(
      gain,
      float(low),
      float(high),
      _two_sided(gain, float(error), special.ndtr),
      num=a.num + b.num,
      method='two intervals',
      level=a.level,
  )


def _two_sided(mean: float, error: float, cdf: Callable[[float], Any]) -> float:
  """The p-value of a mean with a standard error; of no error 0 or 1."""
  if error == 0:
    return float(mean == 0)
  return min(1.0, 2 * float(cdf(-abs(mean) / error)))


class _Set(NamedTuple):
  """Answers of two models to one data set."""

  name: str
  a: np.ndarray
  b: np.ndarray
  label: np.ndarray | None
  gain: float
  differences: np.ndarray | None  # [N], where the metric is a mean.


def _sets(metric, a, b, label) -> list[_Set]:
  if not isinstance(a, Mapping):
    return [_set('the data', metric, a, b, label)]
  label = dict.fromkeys(a) if label is None else label
  if not a or a.keys() != b.keys() or not a.keys() <= label.keys():
    raise ValueError(
        f'The first has data sets {list(a)}, the second {list(b)}, and label '
        f'{list(label)}: expected the same names, and at least one.'
    )
  return [_set(name, metric, a[name], b[name], label[name]) for name in a]


def _set(name, metric, a, b, label) -> _Set:
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
  differences = scores[0].astype(float) - scores[1].astype(float)
  return _Set(
      name,
      a,
      b,
      label,
      float(differences.mean()),
      differences if differences.ndim else None,
  )


def _answers(metric, x, label) -> np.ndarray:
  return np.asarray(jax.device_get(x if metric is None else metric(x, label)))


def _of_same_examples(sets: Sequence[_Set]) -> list[list[_Set]]:
  groups: dict[Any, list[_Set]] = {}
  for s in sets:
    key = len(s.a), None if s.label is None else s.label.tobytes()
    groups.setdefault(key, []).append(s)
  return list(groups.values())


def _resampled(metric, group, num_resamples, rng) -> np.ndarray:
  """Sums of the gains over data sets of the same examples, by resample."""
  num = len(group[0].a)
  if group[0].differences is not None:
    return (
        _resampled_sums(sum(s.differences for s in group), num_resamples, rng)
        / num
    )
  gain_fns = [_gain_fn(metric, s) for s in group]
  draws = []
  for _ in range(0, num_resamples, _NUM_AT_ONCE):
    rows = rng.integers(num, size=(_NUM_AT_ONCE, num), dtype=np.int32)
    draws.append(sum(gain_fn(rows) for gain_fn in gain_fns))
  return np.concatenate(draws)[:num_resamples]


def _gain_fn(metric, s: _Set) -> Callable[[np.ndarray], np.ndarray]:
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
