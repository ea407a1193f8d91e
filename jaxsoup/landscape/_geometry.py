"""Angles and distances between models: where fine-tuning went."""

from collections.abc import Callable
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup import _checked
from jaxsoup import _tree
from jaxsoup._recipes import _streamed
from jaxsoup.typing import GroupFn
from jaxsoup.typing import Nested
from jaxsoup.typing import Params

_Leaves = list[jax.Array]


def angle(theta_0: Params, theta_1: Params, theta_2: Params) -> float:
  """The angle at the initialization between two fine-tuned models.

  `phi = arccos <d_1, d_2> / (|d_1| |d_2|)`, `d_k = theta_k - theta_0`. The
  wider it is, the more different the two are; soups of models at a right angle
  gain most in the paper. Unrelated models of many parameters are at 90 degrees.

  Args:
    theta_0: parameters that both were fine-tuned from.
    theta_1: parameters of the first.
    theta_2: parameters of the second.

  Returns:
    Degrees, from 0 to 180; NaN where one of the two never moved.

  Raises:
    ValueError: they do not fit (see `check_compatible`), or have no floats.

  Example:
    >>> angle(np.zeros(2), np.array([2.0, 0]), np.array([1.0, 1]))
    45.0

  Source: Wortsman et al. 2022, section 4 and figure 3.
  """
  return float(angles([theta_1, theta_2], theta_0)[0, 1])


def angles(
    ingredients: Sequence[Params],
    theta_0: Params,
    *,
    group_fn: GroupFn = _tree.whole,
) -> Nested:
  """The angles at the initialization between all pairs of ingredients.

  Inner products are summed in float32 (or wider) within a leaf and in float64
  over leaves, so that angles below a tenth of a degree are not resolved.

  Args:
    ingredients: K pytrees of one structure, or `checkpoints.Ingredients`, which
      are read once if they fit into memory together, else block by block.
    theta_0: parameters that they were fine-tuned from.
    group_fn: the groups of leaves that are compared apart, as in
      `jaxsoup.learned`. By default whole models are compared.

  Returns:
    Degrees `[K, K]`, 0 on the diagonal and NaN for what never moved; or nested
    dicts of those, one for each group. Running statistics do not count.

  Raises:
    ValueError: no ingredients, or they or theta_0 do not fit, or have no
      floats.

  Example:
    >>> models = [np.array([2.0, 0]), np.array([1.0, 1]), np.array([0, -1.0])]
    >>> angles(models, np.zeros(2)).tolist()
    [[0.0, 45.0, 90.0], [45.0, 0.0, 135.0], [90.0, 135.0, 0.0]]
  """
  checked = _checked.Checked(ingredients)
  _checked.require_floats(checked.layers.paths)
  start, paths = _checked.fitting_leaves(checked, theta_0), checked.layers.paths
  products = of_pairs(checked, paths, lambda x, y: inner_products(x, y, start))
  grouped = _grouped(products, paths, group_fn)
  return jax.tree.map(_degrees, grouped)


def distances(
    ingredients: Sequence[Params], *, group_fn: GroupFn = _tree.whole
) -> Nested:
  """The Euclidean distances between all pairs of ingredients.

  `|theta_i - theta_j|`: an ingredient that is far from all others comes from
  another initialization, or from too high a learning rate.

  Args:
    ingredients: as in `angles`.
    group_fn: as in `angles`.

  Returns:
    `[K, K]`, or nested dicts of those, one for each group. Running statistics
    do not count.

  Raises:
    ValueError: no ingredients, or they do not fit, or have no floats.

  Example:
    >>> models = [np.array([0.0, 0]), np.array([3.0, 4])]
    >>> distances(models).tolist()
    [[0.0, 5.0], [5.0, 0.0]]
  """
  checked = _checked.Checked(ingredients)
  _checked.require_floats(checked.layers.paths)
  paths = checked.layers.paths
  squares = of_pairs(checked, paths, lambda x, y: inner_products(x, x, y))
  grouped = _grouped(squares, paths, group_fn)
  return jax.tree.map(np.sqrt, grouped)


@jax.jit
def inner_products(x: _Leaves, y: _Leaves, origin: _Leaves) -> jax.Array:
  """`<x - origin, y - origin>` of each leaf, `[L]`."""

  def product(a: jax.Array, b: jax.Array, o: jax.Array) -> jax.Array:
    wide = _tree.wide_dtype(a.dtype)
    a, b, o = (v.astype(wide) for v in (a, b, o))
    return jnp.real(jnp.sum((a - o) * jnp.conj(b - o)))

  return jnp.stack(list(map(product, x, y, origin)))


def of_pairs(
    checked: _checked.Leaves,
    paths: Sequence[_tree.Path],
    product_fn: Callable[[_Leaves, _Leaves], jax.Array],
) -> np.ndarray:
  """`product(theta_i, theta_j)` of L leaves, `[K, K, L]`, in few reads.

  Zero of running statistics, which follow the data and are not trained.

  A block of ingredients stays in memory while those from its start on come by:
  one read of each if all fit, and (K / block + 1) / 2 if they do not.
  """
  num = len(checked)
  size = _block_size(checked[0])
  products = np.zeros((num, num, len(paths)))
  for start in range(0, num, size):
    held: dict[int, _Leaves] = {}
    for j, leaves in _checked.in_order(checked, range(start, num)):
      if j < start + size:
        held[j] = leaves
      row = jax.device_get([product_fn(x, leaves) for x in held.values()])
      products[list(held), j] = products[j, list(held)] = row
  products[..., _tree.statistics_of(paths)] = 0
  return products


def _block_size(leaves: _Leaves) -> int:
  """How many models may stay: half of what is free, for one more is read."""
  _, model_bytes, free = _streamed.memory_of(leaves)
  return max(1, int(free / 2 / max(model_bytes, 1)))


def _grouped(
    products: np.ndarray, paths: Sequence[_tree.Path], group_fn: GroupFn
) -> Nested:
  """Sums over the leaves of each group: nested dicts of `[K, K]`."""
  groups: dict[_tree.Path, np.ndarray] = {}
  for i, group in enumerate(_tree.groups_of(paths, group_fn)):
    groups[group] = groups.get(group, 0) + products[..., i]
  return _tree.nest(groups)


def _degrees(products: np.ndarray) -> np.ndarray:
  squares = np.diagonal(products)
  squares = np.where(squares > 0, squares, np.nan)
  # The root of an exact square: a model is at exactly 0 degrees to itself.
  cosines = products / np.sqrt(np.outer(squares, squares))
  return np.degrees(np.arccos(np.clip(cosines, -1, 1)))
