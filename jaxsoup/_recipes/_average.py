"""Averages whose coefficients are given: uniform, and along a trajectory.

```
soup = jaxsoup.uniform(ingredients)
soup = jaxsoup.average(checkpoints_of_one_run, jaxsoup.swa(20, start=10))
```
"""

from collections.abc import Sequence

import jax
import numpy as np

from jaxsoup import _checked
from jaxsoup import _mixing
from jaxsoup import _tree
from jaxsoup._soup import AverageInfo
from jaxsoup._soup import Soup
from jaxsoup.typing import Alpha
from jaxsoup.typing import ArrayLike
from jaxsoup.typing import Members
from jaxsoup.typing import Params


def uniform(ingredients: Sequence[Params]) -> Soup[AverageInfo]:
  """Averages all ingredients: the uniform soup.

  `theta = 1/K sum_k theta_k`, as one running sum in float32 (or wider), divided
  and rounded once. One ingredient is read at a time.

  Args:
    ingredients: K pytrees of one structure, or `checkpoints.Ingredients`.
      Floats are averaged, running statistics too; jax makes float64 float32
      unless `jax_enable_x64` is on. PRNG keys, steps and counters are those of
      the first ingredient; other leaves must be equal.

  Returns:
    A `Soup` with alpha `[K]`, 1/K each, and an `AverageInfo`.

  Raises:
    ValueError: no ingredients, or they do not fit (see `check_compatible`).

  Example:
    >>> uniform([{'w': np.float32(1)}, {'w': np.float32(2)}]).params
    {'w': Array(1.5, dtype=float32)}

  Source: Wortsman et al. 2022, section 2.
  """
  _checked.require_ingredients(ingredients)
  num = len(ingredients)
  params, duplicates = _mean(ingredients, None, range(num), num)
  alpha = np.full(num, 1 / num, np.float32)
  return Soup(params, alpha, AverageInfo(duplicates))


def average(ingredients: Sequence[Params], alpha: Alpha) -> Soup[AverageInfo]:
  """Averages with given coefficients, one ingredient at a time.

  `theta = sum_k alpha_k theta_k`: what `mix` does, for models that do not fit
  into memory together. An ingredient whose coefficients are all zero is not
  read.

  Args:
    ingredients: K pytrees of one structure, or `checkpoints.Ingredients`.
    alpha: mixing coefficients `[K]`, such as those of `swa`, `ema` and `lawa`;
      or a prefix tree of those (see `mix`).

  Returns:
    A `Soup` with this alpha and an `AverageInfo`.

  Raises:
    ValueError: the ingredients do not fit, or alpha has another length.

  Example:
    >>> average([np.float32(1), np.float32(2)], [0.25, 0.75]).params
    Array(1.75, dtype=float32)
  """
  _checked.require_ingredients(ingredients)
  num = len(ingredients)
  alpha = _tree.checked_alpha(alpha, num)
  order = list(range(num))
  if not _tree.is_traced(*jax.tree.leaves(alpha)):
    used = np.any([x != 0 for x in jax.tree.leaves(alpha)], axis=0)
    # Where all are zero, one is read: the template of the zeros.
    order = np.flatnonzero(used).tolist() or [0]
  params, duplicates = _mean(ingredients, alpha, order, 1)
  return Soup(params, alpha, AverageInfo(duplicates))


def swa(num: int, *, start: int = 0, every: int = 1) -> np.ndarray:
  """Coefficients of stochastic weight averaging: late iterates, equally.

  Args:
    num: number of checkpoints along the trajectory, K.
    start: the first one that counts.
    every: take every n-th one, counted from `start`.

  Returns:
    alpha, `[K]` float32, sums to one.

  Raises:
    ValueError: nothing would be averaged.

  Example:
    >>> swa(4, start=2)
    array([0. , 0. , 0.5, 0.5], dtype=float32)

  Source: Izmailov et al. 2018, algorithm 1. Networks with BatchNorm need
  their statistics re-estimated afterwards.
  """
  if not 0 <= start < num or every < 1:
    raise ValueError(
        f'swa(num={num}, start={start}, every={every}) averages nothing: '
        'expected 0 <= start < num and every >= 1.'
    )
  alpha = np.zeros(num, np.float32)
  alpha[start::every] = 1
  return alpha / alpha.sum()


def ema(num: int, *, decay: float) -> np.ndarray:
  """Coefficients of an exponential moving average over checkpoints.

  `theta_bar_k = decay theta_bar_{k-1} + (1 - decay) theta_k`, starting at
  the first: `alpha_k = (1 - decay) decay^(K-1-k)`, and `alpha_0 = decay^(K-1)`.

  Args:
    num: number of checkpoints along the trajectory, K.
    decay: in [0, 1); per checkpoint, not per training step.

  Returns:
    alpha, `[K]` float32, sums to one.

  Raises:
    ValueError: a decay outside [0, 1), or no checkpoints.

  Example:
    >>> ema(3, decay=0.5)
    array([0.25, 0.25, 0.5 ], dtype=float32)
  """
  if num < 1 or not 0 <= decay < 1:
    raise ValueError(
        f'ema(num={num}, decay={decay}): num must be at least 1 and decay in '
        '[0, 1).'
    )
  alpha = (1 - decay) * decay ** np.arange(num - 1, -1, -1.0)
  alpha[0] = decay ** (num - 1)
  return alpha.astype(np.float32)


def lawa(num: int, *, last: int) -> np.ndarray:
  """Coefficients of latest weight averaging: the last few, equally.

  Args:
    num: number of checkpoints along the trajectory, K.
    last: how many of them count.

  Returns:
    alpha, `[K]` float32, sums to one.

  Raises:
    ValueError: `last` is not in 1..num.

  Example:
    >>> lawa(3, last=2)
    array([0. , 0.5, 0.5], dtype=float32)

  Source: Kaddour 2022, "Stop wasting my time! Saving days of ImageNet and BERT
  training with latest weight averaging".
  """
  if not 1 <= last <= num:
    raise ValueError(f'lawa(num={num}, last={last}): last must be in 1..{num}.')
  return swa(num, start=num - last)


def _mean(
    ingredients: Sequence[Params],
    alpha: Alpha | None,
    order: Sequence[int],
    count: int,
) -> tuple[Params, tuple[Members, ...]]:
  """`sum_k alpha_k theta_k / count`, and groups of equal ingredients."""
  streamed_fn = getattr(ingredients, 'average', None)
  if streamed_fn is not None:  # Checkpoints, which are read in parallel.
    return streamed_fn(order, alpha, count)
  checked = _checked.Checked(ingredients)

  def weights_of(k: int) -> ArrayLike:
    if alpha is None:
      return 1.0
    paths, others = checked.layers.paths, checked.template.others
    return [row[k] for row in _tree.alphas_of(alpha, paths, others)]

  total = _mixing.weighted_sum(checked, order, weights_of)
  floats = _mixing.rounded(total, _tree.numbers(count), checked.layers.dtypes)
  return checked.replace(floats), checked.duplicates()
