"""What `mask` in a batch means: which of its examples count, and how much.

```
for batch in _masks.checked(batches):     # On the device.
  weights = _masks.weights_of(batch, len(values))
  total += _masks.weighted_sum(values, weights)
```

A mask is `[B]`: bool (keep or drop), or floats, which are weights: finite and
not negative. Means are weighted by them. Where rows are returned, or BatchNorm
reads them, those of weight 0 are dropped and all others count alike.
"""

from collections.abc import Iterator
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup import _processes
from jaxsoup import _tree
from jaxsoup.typing import Array
from jaxsoup.typing import ArrayLike
from jaxsoup.typing import Batch
from jaxsoup.typing import Batches
from jaxsoup.typing import Tree


def checked(batches: Batches) -> Iterator[dict[str, jax.Array]]:
  """Yields the batches on the device; raises where a mask is invalid."""
  put = lambda name: lambda x: _tree.on_device(x, (name,))
  # A list of numbers is one array; a dict is a part of the batch.
  is_leaf = lambda x: not isinstance(x, Mapping)
  for i, batch in enumerate(batches):
    if not isinstance(batch, Mapping):
      raise TypeError(
          f'batch {i} is a {type(batch).__name__}: expected a dict of arrays, '
          "such as {'image': x, 'label': y}."
      )
    if 'mask' in batch:
      _require_mask(batch['mask'], f'batch {i}')
    yield {
        k: jax.tree.map(put(k), x, is_leaf=is_leaf) for k, x in batch.items()
    }


def weights_of(batch: Batch, num: int) -> Array:
  """The weights of the `num` examples of a batch: `[B]`, bool or float32."""
  mask = batch.get('mask', np.ones(num, bool))
  if mask.shape != (num,):
    raise ValueError(
        f'The mask has shape {mask.shape}, and its batch {num} examples: '
        f'expected ({num},), one entry per example. Rename the entry if it is '
        'an input of the model.'
    )
  return mask if mask.dtype == bool else mask.astype(jnp.float32)


def weighted_sum(values: jax.Array, weights: Array) -> jax.Array:
  """`sum_j w_j x_j` over the last axis; what does not count may be NaN."""
  values = jnp.where(weights > 0, values.astype(jnp.float32), 0)
  return (values if weights.dtype == bool else values * weights).sum(-1)


def kept_rows(batch: Batch, num: int) -> np.ndarray:
  """Which of the `num` examples of a batch are not dropped, `[B]` bool."""
  return _processes.gathered(weights_of(batch, num)) > 0


def kept(batch: Tree, where: str) -> Tree:
  """A batch, on the device, without the examples that its mask drops."""
  placed = jax.tree.map(_tree.on_device, batch)
  if not isinstance(batch, Mapping) or 'mask' not in batch:
    return placed
  _require_mask(batch['mask'], where)
  others = jax.tree.leaves({k: x for k, x in placed.items() if k != 'mask'})
  rows = kept_rows(placed, len(others[0] if others else placed['mask']))
  if rows.all():
    return placed
  # Whole: no sharding need divide the rows that are left.
  return jax.tree.map(
      lambda x: jax.device_put(
          _processes.gathered(x)[rows], _tree.replicated_like(x)
      ),
      placed,
  )


def _require_mask(mask: ArrayLike, where: str) -> None:
  if not isinstance(mask, jax.Array):
    mask = np.asarray(mask)
  is_float = jnp.issubdtype(mask.dtype, jnp.floating)
  if mask.ndim != 1 or not (is_float or mask.dtype == bool):
    raise ValueError(
        f'The mask of {where} is {mask.dtype}{list(mask.shape)}: expected bool '
        '[B], which examples count, or floats [B], their weights. Convert it '
        'with mask.astype(bool) if it holds 0 and 1; rename the entry if it is '
        'an input of the model.'
    )
  if not is_float:
    return
  weights = np.asarray(_processes.gathered(mask), np.float32)
  is_bad = ~(np.isfinite(weights) & (weights >= 0))
  if is_bad.any():
    row = int(is_bad.argmax())
    raise ValueError(
        f'The mask of {where} has weight {weights[row]} at row {row}: expected '
        'finite weights, 0 or more. Use 0 for examples that do not count.'
    )
