"""Layers that are stored as one array, `[L, ...]`, taken one by one.

```
layers = Layers(floats, {'decoder/layers': 0})
layers.paths                   # ('decoder', 'layers', '0', 'mlp', 'kernel')...
leaves = layers.split(leaves)
leaves = layers.join(leaves)
```
"""

from collections.abc import Mapping
from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup import _tree
from jaxsoup.typing import ShapeDtype
from jaxsoup.typing import Stacks

# Number of layers and their axis; None is an array of its own.
_Parts = tuple[tuple[int, int] | None, ...]


class Layers:
  """Which leaves are stacks of layers.

  Attributes:
    paths: of the leaves where each layer is one: its number follows the name of
      the stack.
    dtypes: of the same.
  """

  def __init__(self, leaves: Mapping[_tree.Path, ShapeDtype], stacks: Stacks):
    self.paths: list[_tree.Path] = []
    dtypes: list[np.dtype[Any]] = []
    parts: list[tuple[int, int] | None] = []
    below = {tuple(name.split('/')): axis for name, axis in stacks.items()}
    for path, leaf in leaves.items():
      name = next((p for p in below if path[: len(p)] == p), None)
      part, layers = None, [path]
      if name is not None:
        axis, rest = below[name], path[len(name) :]
        if not -len(leaf.shape) <= axis < len(leaf.shape):
          raise ValueError(
              f'Leaf {_tree.name_of(path)!r} of shape {tuple(leaf.shape)} has '
              f'no axis {axis} of layers, as stacks={dict(stacks)} says.'
          )
        part = leaf.shape[axis], axis
        layers = [(*name, str(i), *rest) for i in range(part[0])]
      parts.append(part)
      self.paths += layers
      dtypes += [leaf.dtype] * len(layers)
    for name in below:
      if not any(path[: len(name)] == name for path in leaves):
        first = _tree.name_of(next(iter(leaves), ()))
        raise ValueError(
            f'stacks names {"/".join(name)!r}, but no leaf is below it; the '
            f'first leaf is {first!r}.'
        )
    self.dtypes = tuple(dtypes)
    self._parts = tuple(parts) if stacks else None

  def split(self, leaves: list[jax.Array]) -> list[jax.Array]:
    """From a leaf for each stack to a leaf for each layer."""
    return leaves if self._parts is None else _split(leaves, self._parts)

  def join(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """From a leaf for each layer to a leaf for each stack."""
    leaves = list(leaves)
    return leaves if self._parts is None else _join(leaves, self._parts)


@functools.partial(jax.jit, static_argnums=1)
def _split(leaves: list[jax.Array], parts: _Parts) -> list[jax.Array]:
  layers: list[jax.Array] = []
  for x, part in zip(leaves, parts):
    layers += [x] if part is None else list(jnp.moveaxis(x, part[1], 0))
  return layers


@functools.partial(jax.jit, static_argnums=1)
def _join(layers: list[jax.Array], parts: _Parts) -> list[jax.Array]:
  rest = iter(layers)
  return [
      next(rest)
      if part is None
      else jnp.stack([next(rest) for _ in range(part[0])], part[1])
      for part in parts
  ]
