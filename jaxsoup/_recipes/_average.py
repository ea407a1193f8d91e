"""Averages whose coefficients are given.

```
soup = jaxsoup.uniform(ingredients)
soup = jaxsoup.average(ingredients, [0.5, 0.3, 0.2])
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
    alpha: mixing coefficients `[K]`, such as those of
      `jaxsoup.trajectory`; or a prefix tree of those (see `mix`).

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
