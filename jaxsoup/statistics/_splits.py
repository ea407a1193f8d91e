"""One comparison out of several that share examples."""

from collections.abc import Sequence
import math
import statistics

import numpy as np

from jaxsoup.statistics._comparisons import Comparison


def over_splits(gains: Sequence[Comparison]) -> Comparison:
  """The mean of a gain over several splits of the same examples.

  `error^2 = mean_i error_i^2 + var_i gain_i`

  The splits overlap, so they are not independent repeats, and more of them do
  not make the interval narrower. It is the interval of the gain of one more
  split, which varies with the examples that report and with those that choose.

  Args:
    gains: of the same two ways to make a model, one a split; with `low` and
      `high` about as far from the gain.

  Returns:
    A `Comparison`, with a normal distribution of the gain.

  Raises:
    ValueError: gains is empty.

  Example:
    >>> a = Comparison(0.02, 0.01, 0.03, p_value=0.01, num=9)
    >>> b = Comparison(0.04, 0.03, 0.05, p_value=0.01, num=9)
    >>> mean = over_splits([a, b])
    >>> round(mean.gain, 3), round(mean.low, 3), round(mean.high, 3)
    (0.03, 0.0, 0.06)
  """
  if not gains:
    raise ValueError('gains is empty: pass one Comparison per split.')
  normal = statistics.NormalDist()
  quantile = normal.inv_cdf((1 + gains[0].level) / 2)
  within = [(g.high - g.low) / (2 * quantile) for g in gains]
  values = [g.gain for g in gains]
  between = np.var(values, ddof=1) if len(gains) > 1 else 0.0
  gain = float(np.mean(values))
  error = math.sqrt(np.mean(np.square(within)) + between)
  # Models with the same answers: no error, and no gain.
  p_value = 2 * normal.cdf(-abs(gain) / error) if error else float(gain == 0)
  return gains[0]._replace(
      gain=gain,
      low=gain - quantile * error,
      high=gain + quantile * error,
      p_value=p_value,
      num_repeats=1,
      method=f'{len(gains)} splits of the same examples',
  )
