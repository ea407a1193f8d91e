"""Model Stock: how far to go from the initialization, without data.

```
soup = jaxsoup.model_stock(ingredients, theta_0)
```
"""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup import _checked
from jaxsoup import _mixing
from jaxsoup import _tree
from jaxsoup._soup import Soup
from jaxsoup._soup import StockInfo
from jaxsoup.typing import Params
from jaxsoup.typing import Stacks

_Leaves = list[jax.Array]


def model_stock(
    ingredients: Sequence[Params],
    theta_0: Params,
    *,
    stacks: Stacks | None = None,
) -> Soup[StockInfo]:
  """Moves from the initialization towards the mean, tensor by tensor.

  `theta = t mean_k theta_k + (1 - t) theta_0`, with
  `t = K cos / (1 + (K - 1) cos)` for each tensor, where cos is the mean cosine
  between two task vectors `theta_k - theta_0`, 0 where one of them is zero. One
  pass over the ingredients keeps two sums, of theta_k and of the unit task
  vectors (`|sum_k u_k|^2 = M + K (K - 1) cos`, where M moved).

  Args:
    ingredients: K pytrees of one structure, or `checkpoints.Ingredients`.
    theta_0: the parameters they were all fine-tuned from.
    stacks: as in `learned`: each layer of a scanned stack has a t of its own.

  Returns:
    A `Soup` with alpha a nested dict of `[K]`, t/K each: the rest, 1 - t, is
    theta_0's. Its `StockInfo` holds cos and t. Tensors that no ingredient moved
    stay (t = 1), and negative cosines count as 0. One ingredient alone is its
    own soup (t = 1).

  Raises:
    ValueError: no ingredients, or they or theta_0 do not fit.

  Example:
    >>> models = [{'w': np.float32([2, 0])}, {'w': np.float32([2, 2])}]
    >>> soup = model_stock(models, {'w': np.float32([0, 0])})
    >>> soup.info.ratio['w'].item(), soup.params['w'].tolist()
    (0.828, [1.657, 0.828])

  Source: Jang et al. 2024, "Model Stock: All we need is just a few fine-tuned
  models", equations 3 and 5.
  """
  checked = _checked.Checked(ingredients, stacks)
  start = _checked.fitting_leaves(checked, theta_0)
  num = len(checked)
  sums: _Leaves | None = None
  for _, leaves in _checked.in_order(checked, range(num)):
    sums = _add(sums, leaves, start)
  floats, cosine, ratio = _towards_mean(sums, start, num)
  if not _tree.is_traced(*ratio):
    cosine, ratio = jax.device_get((cosine, ratio))
  full = jnp.full if _tree.is_traced(*ratio) else np.full
  by_path = lambda values: _tree.nest(dict(zip(checked.layers.paths, values)))
  alpha = by_path([full(num, t / num, np.float32) for t in ratio])
  info = StockInfo(by_path(cosine), by_path(ratio), checked.duplicates())
  return Soup(checked.replace(floats), alpha, info)


@functools.partial(jax.jit, donate_argnums=0)
def _add(sums: _Leaves | None, leaves: _Leaves, start: _Leaves) -> _Leaves:
  """Adds theta_k, its unit task vectors, and whether each tensor moved."""
  wide = lambda x: x.astype(_tree.wide_dtype(x.dtype))
  task = [wide(x) - wide(x_0) for x, x_0 in zip(leaves, start)]
  squares = [jnp.sum(jnp.abs(v) ** 2) for v in task]
  # Of a root at zero the gradient would be NaN.
  norms = [jnp.sqrt(jnp.where(s > 0, s, 1)) for s in squares]
  units = [v / n for v, n in zip(task, norms)]
  moved = [(s > 0).astype(s.dtype) for s in squares]
  return _mixing.added(sums, [*leaves, *units, *moved], jnp.float32(1))


@functools.partial(jax.jit, static_argnums=2)
def _towards_mean(
    sums: _Leaves, start: _Leaves, num: int
) -> tuple[_Leaves, _Leaves, _Leaves]:
  size = len(start)
  total, units, moved = (sums[i * size : (i + 1) * size] for i in range(3))
  squares = [jnp.sum(jnp.abs(u) ** 2) for u in units]
  pairs = max(num * (num - 1), 1)
  cosines = [(s - m) / pairs for s, m in zip(squares, moved)]
  ratios = [_ratio(cos, m, num) for cos, m in zip(cosines, moved)]
  floats = [
      (t * s / num + (1 - t) * x_0.astype(s.dtype)).astype(x_0.dtype)
      for t, s, x_0 in zip(ratios, total, start)
  ]
  return floats, cosines, ratios


def _ratio(cos: jax.Array, moved: jax.Array, num: int) -> jax.Array:
  cos = jnp.clip(cos, 0, 1)
  ratio = num * cos / (1 + (num - 1) * cos)
  # Not `square > 0`: the units of opposite task vectors sum to zero too.
  return jnp.where((moved > 0) & (num > 1), ratio, 1.0)
