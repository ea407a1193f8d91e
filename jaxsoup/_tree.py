"""Pytrees taken apart: the paths of leaves, and prefix trees of alpha.

```
flat = flatten(params)
alphas = alphas_of({'body': [0.5, 0.5], 'head': [1, 0]}, flat.paths)
```

Trees are compared by the *paths* of their leaves and not by their treedefs:
two `nnx.State` with different metadata are the same model, and so are an
`nnx.Module` and another one that was built from another seed.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup._soup import Params

Path = tuple[str, ...]


def path_of(key_path: Sequence[Any]) -> Path:
  """Keys of a leaf as strings; the `.value` of an nnx.Variable is left out."""
  if key_path and key_path[-1] == jax.tree_util.GetAttrKey('value'):
    key_path = key_path[:-1]
  return tuple(
      jax.tree_util.keystr((key,), simple=True, separator='/')
      for key in key_path
  )


def name_of(path: Path) -> str:
  return '/'.join(path) or '(the tree itself)'


def is_float(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jnp.inexact)


def wide_dtype(dtype: Any) -> Any:
  """The dtype of a sum: float32, or wider where the leaves are wider."""
  return jnp.float32 if dtype.itemsize < 4 else dtype


class Flat(NamedTuple):
  """A pytree taken apart; `leaves` and `paths` are in the same order."""

  leaves: list[Any]
  paths: list[Path]
  treedef: Any

  def replace(self, leaves: Iterable[Any]) -> Params:
    return jax.tree.unflatten(self.treedef, list(leaves))


def flatten(tree: Params) -> Flat:
  """Takes a pytree apart, with its leaves on a device."""
  flat = flatten_in_place(tree)
  return flat._replace(leaves=list(map(on_device, flat.leaves, flat.paths)))


def flatten_in_place(tree: Params) -> Flat:
  """Takes a pytree apart, without moving its leaves."""
  with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
  paths = [path_of(key_path) for key_path, _ in with_paths]
  return Flat([leaf for _, leaf in with_paths], paths, treedef)


def on_device(leaf: Any, path: Path = ()) -> Any:
  # Explicit, because `jax_transfer_guard='disallow'` forbids NumPy arrays and
  # Python scalars as arguments of a jitted function.
  if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
    return leaf
  array = np.asarray(leaf)
  if array.dtype.kind in 'OSUMm':
    raise TypeError(
        f'Leaf {name_of(path)!r} is a {type(leaf).__name__}, not an array. '
        'Pass parameters only: nnx.state(model, nnx.Param), '
        "variables['params']; or convert the leaves with jax.tree.map."
    )
  return jax.device_put(array)


def whole_beside(x: jax.Array) -> jax.sharding.Sharding | None:
  """Where to put what is used together with an array: on all its devices.

  A jitted function takes no arrays that are committed to different devices.
  """
  if not x.committed:
    return None
  if isinstance(x.sharding, jax.sharding.NamedSharding):
    whole = jax.sharding.PartitionSpec()
    return jax.sharding.NamedSharding(x.sharding.mesh, whole)
  return x.sharding


def numbers(values: Any, dtype: Any = np.float32) -> jax.Array:
  """Numbers on the device, explicitly (see `on_device`)."""
  return jax.device_put(np.asarray(values, dtype))


def group_of(path: Path, depth: float | None) -> Path:
  """The group of a leaf: the first `depth` keys of its path."""
  if depth is None:
    return ()
  return path if depth >= len(path) else path[: int(depth)]


# Keys of running statistics, next to each other in the tree.
_STATISTICS = ({'mean', 'var'}, {'running_mean', 'running_var'})


def statistics_of(paths: Sequence[Path]) -> np.ndarray:
  """Which leaves are running statistics of BatchNorm, [L] bool."""
  siblings: dict[Path, set[str]] = {}
  for path in paths:
    for parent, key in _places(path):
      siblings.setdefault(parent, set()).add(key)

  def is_statistic(path):
    return any(
        key in names and names <= siblings[parent]
        for parent, key in _places(path)
        for names in _STATISTICS
    )

  return np.array([is_statistic(path) for path in paths], bool)


def _places(path: Path) -> list[tuple[Path, str]]:
  """Parent and key of a leaf; also for a key with dots, as in torch."""
  if not path:
    return []
  stem, _, last = path[-1].rpartition('.')
  return [((*path[:-1], stem), last)]


def nest(groups: Mapping[Path, Any]) -> Any:
  """Nested dicts from paths; the value itself where the only path is empty."""
  if () in groups:
    return groups[()]
  tree: dict[str, Any] = {}
  for path, value in groups.items():
    functools.reduce(lambda d, key: d.setdefault(key, {}), path[:-1], tree)[
        path[-1]
    ] = value
  return tree


def alphas_of(alpha: Any, paths: Sequence[Path]) -> list[jax.Array]:
  """The coefficients of every leaf: the entry of alpha above its path."""
  entries = entries_of(alpha)
  alphas = []
  used = set()
  for path in paths:
    above = [path[:n] for n in range(len(path) + 1) if path[:n] in entries]
    if not above:
      raise ValueError(
          f'alpha has no entry for leaf {name_of(path)!r}; its entries are '
          f'{sorted(map(name_of, entries))}.'
      )
    used.add(above[0])
    alphas.append(entries[above[0]])
  unused = entries.keys() - used
  if unused and paths:
    raise ValueError(
        f'alpha has entries {sorted(map(name_of, unused))} that match no leaf; '
        f'the leaves are {[name_of(p) for p in paths[:8]]}...'
    )
  return alphas


def checked_alpha(alpha: Any, num: int) -> Any:
  """Coefficients as NumPy arrays `[num]`; raises if they are more or fewer."""
  alpha = nest(
      {
          path: np.asarray(jax.device_get(x), np.float32)
          for path, x in entries_of(alpha).items()
      }
  )
  lengths = {np.shape(x) for x in jax.tree.leaves(alpha)}
  if lengths != {(num,)}:
    raise ValueError(
        f'alpha has shape {" and ".join(map(str, sorted(lengths)))}, but there '
        f'are {num} ingredients: expected ({num},).'
    )
  return alpha


def entries_of(alpha: Any) -> dict[Path, jax.Array]:
  """The groups of a prefix tree, with their coefficients on a device."""
  # A list of numbers is one [K], not a tree of K scalars.
  is_vector = lambda x: isinstance(x, (list, tuple))
  with_paths, _ = jax.tree_util.tree_flatten_with_path(alpha, is_leaf=is_vector)
  return {path_of(key_path): _vector(x) for key_path, x in with_paths}


def _vector(x: Any) -> jax.Array:
  if isinstance(x, jax.Array):
    return x
  if isinstance(x, (list, tuple)) and any(isinstance(a, jax.Array) for a in x):
    return jnp.stack(x)  # Perhaps traced ones, such as [1 - t, t].
  return jax.device_put(np.asarray(x, np.float32))
