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
import math
import sys
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup.typing import Alpha
from jaxsoup.typing import Array
from jaxsoup.typing import ArrayLike
from jaxsoup.typing import DType
from jaxsoup.typing import GroupFn
from jaxsoup.typing import Leaf
from jaxsoup.typing import Nested
from jaxsoup.typing import Params
from jaxsoup.typing import Path
from jaxsoup.typing import ShapeDtype


def path_of(key_path: Sequence[Any]) -> Path:
  """Keys of a leaf as strings."""
  return tuple(
      jax.tree_util.keystr((key,), simple=True, separator='/')
      for key in key_path
  )


def paths_of(
    tree: Params, key_paths: Sequence[jax.tree_util.KeyPath[Any]]
) -> list[Path]:
  """The path of each leaf; the `.value` of an nnx.Variable is left out."""
  nnx = sys.modules.get('flax.nnx')  # Without it there are no Variables.
  value = jax.tree_util.GetAttrKey('value')
  if nnx is None or not any(value in key_path for key_path in key_paths):
    return list(map(path_of, key_paths))
  is_variable = lambda x: isinstance(x, nnx.Variable)
  paths = []
  for above, x in jax.tree_util.tree_leaves_with_path(
      tree, is_leaf=is_variable
  ):
    for below, _ in jax.tree_util.tree_leaves_with_path(x):
      paths.append(path_of((*above, *below[is_variable(x) :])))
  return paths


def pure(tree: Params) -> Any:
  """The same tree with arrays in place of nnx.Variables."""
  nnx = sys.modules.get('flax.nnx')
  if nnx is None:
    return tree
  is_variable = lambda x: isinstance(x, nnx.Variable)
  value_of = lambda x: jax.tree.leaves(x)[0] if is_variable(x) else x
  return jax.tree.map(value_of, tree, is_leaf=is_variable)


def num_bytes(leaf: ShapeDtype) -> int:
  return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def name_of(path: Path) -> str:
  return '/'.join(path) or '(the tree itself)'


def is_float(leaf: ShapeDtype) -> bool:
  return jnp.issubdtype(leaf.dtype, jnp.inexact)


def is_state(leaf: ShapeDtype) -> bool:
  """Whether it is a PRNG key, a step or a counter: each model has its own."""
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return True
  # A key in the old style, or the counters of a scanned layer.
  is_vector_of_rngs = len(leaf.shape) == 1 and leaf.dtype == np.uint32
  is_integer = jnp.issubdtype(leaf.dtype, jnp.integer)
  return is_integer and (not leaf.shape or is_vector_of_rngs)


def wide_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
  """The dtype of a sum: float32, or wider where the leaves are wider."""
  return np.dtype(np.float32) if dtype.itemsize < 4 else dtype


def is_traced(*arrays: Leaf) -> bool:
  """Whether some values are unknown, as under `jax.jit` or `jax.grad`."""
  return any(isinstance(x, jax.core.Tracer) for x in arrays)


class Flat(NamedTuple):
  """A pytree taken apart; `leaves` and `paths` are in the same order."""

  leaves: list[Leaf]
  paths: list[Path]
  treedef: jax.tree_util.PyTreeDef

  @property
  def by_path(self) -> dict[Path, Leaf]:
    return dict(zip(self.paths, self.leaves))

  @property
  def floats(self) -> dict[Path, Leaf]:
    """The leaves that are averaged."""
    return {p: x for p, x in self.by_path.items() if is_float(x)}

  @property
  def others(self) -> dict[Path, Leaf]:
    """The leaves that are not."""
    return {p: x for p, x in self.by_path.items() if not is_float(x)}

  def replace(self, leaves: Iterable[Leaf]) -> Params:
    return jax.tree.unflatten(self.treedef, list(leaves))

  def combine(
      self, floats: Iterable[Leaf], others: Iterable[Leaf] | None = None
  ) -> Params:
    """The tree with these leaves, each kind in the order of `paths`."""
    floats = iter(floats)
    others = iter(self.others.values() if others is None else others)
    return self.replace(
        next(floats if is_float(x) else others) for x in self.leaves
    )


def flatten(tree: Params) -> Flat:
  """Takes a pytree apart, with its leaves on a device."""
  flat = flatten_in_place(tree)
  return flat._replace(leaves=list(map(on_device, flat.leaves, flat.paths)))


def flatten_in_place(tree: Params) -> Flat:
  """Takes a pytree apart, without moving its leaves."""
  with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
  paths = paths_of(tree, [key_path for key_path, _ in with_paths])
  return Flat([leaf for _, leaf in with_paths], paths, treedef)


def on_device(leaf: Leaf, path: Path = ()) -> Leaf:
  # Explicit, because `jax_transfer_guard='disallow'` forbids NumPy arrays and
  # Python scalars as arguments of a jitted function.
  if isinstance(leaf, jax.Array) and not is_traced(leaf) and leaf.is_deleted():
    raise ValueError(
        f'Leaf {name_of(path)!r} was deleted: it was donated to a jitted '
        'function (donate_argnums), or its delete() was called. Pass a copy '
        'there: jax.tree.map(jnp.copy, params).'
    )
  if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
    return leaf
  array = as_numbers(leaf, path)
  require_integers_fit(array, array.dtype, path)
  return jax.device_put(array)


def as_numbers(leaf: Leaf, path: Path) -> np.ndarray:
  """A leaf as a NumPy array; raises if that would not hold numbers."""
  array = np.asarray(leaf)
  if array.dtype.kind in 'OSUMm':
    raise TypeError(
        f'Leaf {name_of(path)!r} is a {type(leaf).__name__}, not an array. '
        'Pass parameters only: nnx.state(model, nnx.Param), '
        "variables['params']; or convert the leaves with jax.tree.map."
    )
  return array


def require_integers_fit(array: np.ndarray, dtype: DType, path: Path) -> None:
  """Raises if integers lose their upper half on a device, in silence."""
  target = jax.dtypes.canonicalize_dtype(dtype)
  is_longer = array.dtype.itemsize > target.itemsize
  if array.dtype.kind not in 'iu' or target.kind not in 'iu' or not is_longer:
    return
  info = np.iinfo(target)
  for value in (array.min(), array.max()) if array.size else ():
    if not info.min <= value <= info.max:
      raise ValueError(
          f'Leaf {name_of(path)!r} of dtype {array.dtype} holds {value}, which '
          f'{target} cannot hold. jax has 64-bit integers only with '
          "jax.config.update('jax_enable_x64', True); an average from file to "
          'file (checkpoints.save_average, jaxsoup soup uniform) keeps them.'
      )


def replicated_like(x: jax.Array) -> jax.sharding.Sharding | None:
  """A sharding that copies an array to all devices of another one.

  A jitted function takes no arrays that are committed to different devices.
  """
  if not x.committed:
    return None
  if isinstance(x.sharding, jax.sharding.NamedSharding):
    whole = jax.sharding.PartitionSpec()
    return jax.sharding.NamedSharding(x.sharding.mesh, whole)
  return x.sharding


def numbers(values: ArrayLike, dtype: DType | None = None) -> jax.Array:
  """Numbers on the device, explicitly (see `on_device`); floats by default."""
  if is_traced(*(values if isinstance(values, list) else [values])):
    return jnp.asarray(values)
  return jax.device_put(np.asarray(values, dtype or widest_float()))


def on_host(x: ArrayLike) -> Array:
  """Numbers as a NumPy array, unless they are traced."""
  if is_traced(*(x if isinstance(x, (list, tuple)) else [x])):
    return jnp.asarray(x)  # Perhaps [1 - t, t].
  dtype = x.dtype if isinstance(x, jax.Array) else widest_float()
  return np.asarray(jax.device_get(x), dtype)


def widest_float() -> np.dtype[Any]:
  """float64 where jax has it, else float32."""
  return jax.dtypes.canonicalize_dtype(np.float64)


def whole(path: Path) -> Path:
  """One group of all leaves."""
  return path[:0]


def groups_of(paths: Sequence[Path], group_fn: GroupFn) -> list[Path]:
  """The group of each leaf; raises if it is not how its path begins."""
  groups = [tuple(group_fn(path)) for path in paths]
  for path, group in zip(paths, groups):
    if path[: len(group)] != group:
      raise ValueError(
          f'group_fn({path}) is {group}: expected the first keys of the path, '
          'such as path[:1] (by top-level module) or path (by tensor).'
      )
  return groups


# Keys of running statistics, next to each other in the tree.
_PARTNERS = {'mean': 'var', 'running_mean': 'running_var'}
_PARTNERS |= {var: mean for mean, var in _PARTNERS.items()}


def statistics_of(paths: Sequence[Path]) -> np.ndarray:
  """Which leaves are running statistics of BatchNorm, [L] bool."""
  # The last key may have dots, as in torch.
  places = [p and (*p[:-1], *p[-1].rpartition('.')) for p in paths]
  known = set(places)
  is_one = lambda p: p[-1] in _PARTNERS and (*p[:-1], _PARTNERS[p[-1]]) in known
  return np.array([bool(p) and is_one(p) for p in places], bool)


def nest(groups: Mapping[Path, Any]) -> Nested:
  """Nested dicts from paths; the value itself where the only path is empty."""
  if () in groups:
    return groups[()]
  tree: dict[str, Any] = {}
  for path, value in groups.items():
    parent = functools.reduce(lambda d, k: d.setdefault(k, {}), path[:-1], tree)
    parent[path[-1]] = value
  return tree


def alphas_of(
    alpha: Alpha, paths: Sequence[Path], others: Iterable[Path] = ()
) -> list[Array]:
  """The coefficients of every leaf: the entry of alpha above its path.

  Leaves that are not averaged, `others`, may have an entry too.
  """
  entries = entries_of(alpha)

  def above(path: Path) -> Path | None:
    starts = (path[:n] for n in range(len(path) + 1))
    return next((start for start in starts if start in entries), None)

  places = {path: above(path) for path in paths}
  for path, place in places.items():
    if place is None:
      raise ValueError(
          f'alpha has no entry for leaf {name_of(path)!r}; its entries are '
          f'{sorted(map(name_of, entries))}.'
      )
  unused = entries.keys() - places.values() - set(map(above, others))
  if unused and paths:
    raise ValueError(
        f'alpha has entries {sorted(map(name_of, unused))} that match no leaf; '
        f'the leaves are {[name_of(p) for p in paths[:8]]}...'
    )
  return [entries[place] for place in places.values() if place is not None]


def checked_alpha(alpha: Alpha, num: int) -> Nested:
  """Coefficients as NumPy arrays, unless traced; raises if not all `[num]`."""
  alpha = nest(entries_of(alpha))
  lengths = {np.shape(x) for x in jax.tree.leaves(alpha)}
  if lengths != {(num,)}:
    raise ValueError(
        f'alpha has shape {" and ".join(map(str, sorted(lengths)))}, but there '
        f'are {num} ingredients: expected ({num},).'
    )
  return alpha


def entries_of(alpha: Alpha) -> dict[Path, Array]:
  """The groups of a prefix tree, with their coefficients `on_host`."""
  # A list of numbers is one [K], not a tree of K scalars.
  is_vector = lambda x: isinstance(x, (list, tuple))
  with_paths, _ = jax.tree_util.tree_flatten_with_path(alpha, is_leaf=is_vector)
  entries = {path_of(key_path): on_host(x) for key_path, x in with_paths}
  for path, values in entries.items():
    if not is_traced(values) and not np.isfinite(values).all():
      where = f' of {name_of(path)!r}' if path else ''
      raise ValueError(f'alpha{where} is {values}: expected finite numbers.')
  return entries
