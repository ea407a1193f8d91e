"""One comparison out of several that share examples."""

from collections.abc import Sequence

import numpy as np

from jaxsoup.statistics._comparisons import Comparison


def over_splits(gains: Sequence[Comparison]) -> Comparison:
  """The mean of a gain over several splits of the same examples.

  p = min(1, 2 mean_i p_i)

  The splits overlap, so their gains are no independent repeats: the spread over
  splits says nothing of other examples. Twice the mean of p-values is a p-value
  however they hang together. The ends of the interval are means of the ends,
  which is that of one split: more splits do not make it narrower.

  Args:
    gains: of the same two models, one a split.

  Returns:
    A `Comparison`.

  Raises:
    ValueError: there is none.

  Example:
    >>> a = Comparison(0.02, 0.01, 0.03, p_value=0.01, num=9)
    >>> b = Comparison(0.04, 0.01, 0.07, p_value=0.03, num=9)
    >>> found = over_splits([a, b])
    >>> round(found.gain, 3), round(found.p_value, 3)
    (0.03, 0.04)

  Source: Vovk and Wang 2020, "Combining p-values via averaging", proposition 3.
  """
  if not gains:
    raise ValueError('There is no gain: pass one a split.')
  mean = lambda name: float(np.mean([getattr(g, name) for g in gains]))
  return gains[0]._replace(
      gain=mean('gain'),
      low=mean('low'),
      high=mean('high'),
      p_value=min(1.0, 2 * mean('p_value')),
      num_repeats=1,
      method=f'{gains[0].method}, mean of {len(gains)} splits',
  )
