"""The arithmetic of soups on pytrees: check, stack, mix.

```
stacked = jaxsoup.stack(ingredients)           # leaves [K, ...]
params = jaxsoup.mix(stacked, alpha)           # sum_k alpha_k theta_k
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
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from jaxsoup._soup import Members
from jaxsoup._soup import Params

Path = tuple[str, ...]


def path_of(key_path: Sequence[Any]) -> Path:
  """Keys of a leaf as strings; the `.value` of an nnx.Variable is no key."""
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
  with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
  paths = [path_of(key_path) for key_path, _ in with_paths]
  leaves = [on_device(leaf, path) for (_, leaf), path in zip(with_paths, paths)]
  return Flat(leaves, paths, treedef)


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
        "variables['params'], or jax.tree.map over what you have."
    )
  return jax.device_put(array)


# --- Checks -------------------------------------------------------------------


def misfits(first: Flat, other: Flat) -> list[str]:
  """What differs between two trees, without looking at values."""
  first_leaves = dict(zip(first.paths, first.leaves))
  other_leaves = dict(zip(other.paths, other.leaves))
  found = []
  for path in first_leaves.keys() - other_leaves.keys():
    found.append(f'leaf {name_of(path)!r} is missing')
  for path in other_leaves.keys() - first_leaves.keys():
    found.append(f'leaf {name_of(path)!r} is not in the first one')
  for path in first_leaves.keys() & other_leaves.keys():
    for what in ('shape', 'dtype'):
      expected = getattr(first_leaves[path], what)
      actual = getattr(other_leaves[path], what)
      if expected != actual:
        found.append(
            f'leaf {name_of(path)!r} has {what} {actual}, expected {expected}'
        )
  return sorted(found)


def _remedy(misfits: str) -> str:
  if 'dtype' in misfits:
    return (
        'Cast one of them: '
        'jax.tree.map(lambda x: x.astype(jnp.float32), params)'
    )
  return (
      'Only models of one architecture can be averaged. Where just the heads '
      'differ, pass the subtrees that agree, such as [p["backbone"] for p in '
      'ingredients].'
  )


def _host_value(leaf: Any) -> np.ndarray:
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.asarray(jax.device_get(leaf))


@jax.jit
def _summary(leaves: list[jax.Array]) -> tuple[list[jax.Array], ...]:
  """Whether each leaf is finite, and its sum: equal trees have equal sums."""
  finite = [jnp.isfinite(x).all() for x in leaves]
  sums = [jnp.sum(x, dtype=wide_dtype(x.dtype)) for x in leaves]
  return finite, sums


class Checked(Sequence):
  """Ingredients as flat lists of leaves, each checked when it is first read.

  The first one that is read is the template: the others must have its paths,
  shapes and dtypes, finite values, and equal leaves where those are not floats.
  """

  def __init__(
      self, ingredients: Sequence[Params], non_float_from: int | None = None
  ):
    if not hasattr(ingredients, '__getitem__') or isinstance(
        ingredients, Mapping
    ):
      raise TypeError(
          'ingredients must be a sequence of pytrees (a list, or '
          'checkpoints.Ingredients), not a '
          f'{type(ingredients).__name__}. A generator: list(it) first. One '
          'stacked tree: use jaxsoup.mix(stacked, alpha).'
      )
    if not len(ingredients):
      raise ValueError(
          'There are no ingredients: the sequence is empty. A soup needs at '
          'least one model.'
      )
    self._source = ingredients
    self._equal_non_floats = non_float_from is None
    self._sums: dict[int, bytes] = {}
    self._duplicates: dict[int, int] = {}
    self._first: Flat | None = None
    if non_float_from is not None:
      self[non_float_from]  # The template: whose non-float leaves are taken.

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, k):
    """The leaves of ingredient k that are floats."""
    k = range(len(self))[k]
    flat = flatten(self._source[k])
    if self._first is None:
      self._first = flat
    if k not in self._sums:
      self._check(k, flat)
    # Sorted as the template is: a State may list its leaves in another order.
    leaves = dict(zip(flat.paths, flat.leaves))
    return [leaves[path] for path in self.float_paths]

  @property
  def template(self) -> Flat:
    """The first ingredient that was read, or else ingredient 0."""
    if self._first is None:
      self[0]
    assert self._first is not None
    return self._first

  def prefetch(self, k: int) -> None:
    """Says that ingredient k will be asked for next."""
    getattr(self._source, 'prefetch', lambda _: None)(k)

  def name(self, k: int) -> str:
    """How ingredient k is named in a message."""
    paths = getattr(self._source, 'paths', None)
    return f'ingredient {k}' + (f' ({paths[k]})' if paths else '')

  @functools.cached_property
  def float_paths(self) -> list[Path]:
    flat = self.template
    return [p for p, x in zip(flat.paths, flat.leaves) if is_float(x)]

  @functools.cached_property
  def float_dtypes(self) -> tuple[Any, ...]:
    return tuple(x.dtype for x in self.template.leaves if is_float(x))

  def replace(self, floats: Iterable[jax.Array]) -> Params:
    """The template's container with these leaves as its floats."""
    flat = self.template
    floats = iter(floats)
    return flat.replace(next(floats) if is_float(x) else x for x in flat.leaves)

  def duplicates(self) -> tuple[Members, ...]:
    """Groups of equal ingredients among those read so far; warns of them."""
    groups: dict[int, list[int]] = {}
    for k, twin in sorted(self._duplicates.items()):
      groups.setdefault(twin, [twin]).append(k)
    for group in groups.values():
      warnings.warn(
          f'{" and ".join(map(self.name, group))} have equal parameters: one '
          'model counts several times.',
          stacklevel=4,
      )
    return tuple(tuple(group) for group in groups.values())

  def _check(self, k: int, flat: Flat) -> None:
    found = misfits(self.template, flat)
    if found:
      more = f' (and {len(found) - 5} more)' if len(found) > 5 else ''
      raise ValueError(
          f'{self.name(k)} does not fit the first one: '
          f'{"; ".join(found[:5])}{more}. {_remedy(found[0])}'
      )
    self._check_non_floats(k, flat)
    leaves = dict(zip(flat.paths, flat.leaves))
    floats = [leaves[path] for path in self.float_paths]
    finite, sums = jax.device_get(_summary(floats))
    bad = [name_of(p) for p, ok in zip(self.float_paths, finite) if not ok]
    if bad:
      raise ValueError(
          f'{self.name(k)} has NaN or infinite values in leaf {bad[0]!r}'
          + (f' and {len(bad) - 1} more' if len(bad) > 1 else '')
          + '. Its training diverged, or its file is damaged: leave it out.'
      )
    self._find_twin(k, floats, b''.join(np.asarray(s).tobytes() for s in sums))

  def _check_non_floats(self, k: int, flat: Flat) -> None:
    if not self._equal_non_floats:
      return
    leaves = dict(zip(flat.paths, flat.leaves))
    for path, expected in zip(self.template.paths, self.template.leaves):
      if is_float(expected) or leaves[path] is expected:
        continue
      expected, actual = _host_value(expected), _host_value(leaves[path])
      if not np.array_equal(expected, actual):
        raise ValueError(
            f'{self.name(k)}: leaf {name_of(path)!r} of dtype {actual.dtype} is'
            f' {_short(actual)}, but {_short(expected)} in the first one. Only'
            ' floats are averaged. Pass non_float_from=k to take such leaves'
            ' from ingredient k, or pass parameters only: nnx.state(model,'
            ' nnx.Param).'
        )

  def _find_twin(self, k: int, floats: list[jax.Array], sums: bytes) -> None:
    # Equal sums are a hint; a permuted model has them too. So compare.
    for twin, other_sums in self._sums.items():
      if other_sums == sums and twin not in self._duplicates:
        others = self[twin]
        if all(
            np.array_equal(_host_value(x), _host_value(y))
            for x, y in zip(floats, others)
        ):
          self._duplicates[k] = twin
          break
    self._sums[k] = sums


def _short(value: np.ndarray) -> str:
  return np.array2string(value, threshold=4, edgeitems=2)


def check_compatible(
    ingredients: Sequence[Params], *, non_float_from: int | None = None
) -> tuple[Members, ...]:
  """Raises unless the ingredients can be averaged.

  They must agree in the paths, shapes and dtypes of their leaves, all values
  must be finite, and leaves that are not floats (steps, counters, PRNG keys)
  must be equal. Every recipe checks this by itself, on each ingredient when it
  first reads it; call it to know before you start.

  Args:
    ingredients: K pytrees.
    non_float_from: the ingredient whose non-float leaves a recipe would take,
      which need then not be equal.

  Returns:
    Groups of ingredients with equal parameters, which a `UserWarning` names.

  Raises:
    ValueError: names the ingredient, the leaf's path, both values, and what to
      do.

  Example:
    >>> check_compatible([{'w': np.zeros(2)}, {'w': np.zeros(3)}])
    Traceback (most recent call last):
    ...
    ValueError: ingredient 1 does not fit the first one: leaf 'w' has shape \
(3,), expected (2,). Only models of one architecture can be averaged. Where \
just the heads differ, pass the subtrees that agree, such as [p["backbone"] \
for p in ingredients].
  """
  checked = Checked(ingredients, non_float_from)
  for k in range(len(checked)):
    if k + 1 < len(checked):
      checked.prefetch(k + 1)
    checked[k]
  return checked.duplicates()


# --- Mixing -------------------------------------------------------------------


@jax.custom_vjp
def _mix_leaf(alpha: jax.Array, stacked: jax.Array) -> jax.Array:
  wide = stacked.astype(wide_dtype(stacked.dtype))
  # HIGHEST: TPUs and recent GPUs would round the factors of a product.
  mixed = jnp.tensordot(
      alpha.astype(wide.dtype), wide, 1, precision=jax.lax.Precision.HIGHEST
  )
  return mixed.astype(stacked.dtype)


def _mix_leaf_fwd(alpha, stacked):
  return _mix_leaf(alpha, stacked), (alpha, stacked)


def _mix_leaf_bwd(residuals, gradient):
  """`dL/dalpha_k = <theta_k, dL/dtheta>`: K inner products, no temporaries."""
  alpha, stacked = residuals
  wide = stacked.astype(wide_dtype(stacked.dtype))
  gradient = gradient.astype(wide.dtype)
  axes = tuple(range(1, stacked.ndim))
  if _has_explicit_axes(gradient):
    # A product that contracts a sharded axis raises on Explicit axes.
    inner = jnp.sum(wide * gradient, axis=axes)
  else:
    inner = jnp.tensordot(
        wide,
        gradient,
        axes=(axes, tuple(range(gradient.ndim))),
        precision=jax.lax.Precision.HIGHEST,
    )
  outer = jnp.expand_dims(alpha.astype(wide.dtype), axes) * gradient
  return jnp.real(inner).astype(alpha.dtype), outer.astype(stacked.dtype)


_mix_leaf.defvjp(_mix_leaf_fwd, _mix_leaf_bwd)


def _has_explicit_axes(x: jax.Array) -> bool:
  spec = getattr(getattr(jax.typeof(x), 'sharding', None), 'spec', ())
  return any(axis is not None for axis in spec)


@jax.jit
def mix_leaves(
    alphas: list[jax.Array], stacked: list[jax.Array]
) -> list[jax.Array]:
  """`sum_k alpha_k theta_k` of every leaf; the first row of a non-float."""
  return [
      _mix_leaf(alpha, leaf) if is_float(leaf) else leaf[0]
      for alpha, leaf in zip(alphas, stacked)
  ]


def mix(stacked: Params, alpha: Any) -> Params:
  """Mixes K stacked models into one.

  `theta = sum_k alpha_k theta_k`, summed in float32 (or wider), rounded once.
  Differentiable in both arguments in reverse mode; the gradient in alpha costs
  K inner products. Runs under `jax.jit` and on any mesh: ingredients that are
  sharded alike mix without communication.

  Args:
    stacked: pytree with leaves `[K, ...]`, from `stack` or a vmapped training.
      Of a leaf that is not a float the first row is taken.
    alpha: mixing coefficients, `[K]`; or a prefix tree: nested dicts whose
      paths lead to groups of leaves, such as `{'body': [K], 'head': [K]}`. They
      need not sum to one.

  Returns:
    A pytree like one ingredient, in its dtypes.

  Raises:
    ValueError: alpha does not fit: names the leaf or the entry of alpha.

  Example:
    >>> stacked = {'w': jnp.array([[0.0, 2.0], [1.0, 4.0]])}
    >>> mix(stacked, [0.5, 0.5])
    {'w': Array([0.5, 3. ], dtype=float32)}

  Source: Wortsman et al. 2022, section 2.
  """
  flat = flatten(stacked)
  alphas = alphas_of(alpha, flat.paths)
  for path, coefficients, leaf in zip(flat.paths, alphas, flat.leaves):
    if leaf.ndim < 1 or coefficients.shape != leaf.shape[:1]:
      raise ValueError(
          f'alpha has shape {coefficients.shape} and leaf {name_of(path)!r} has'
          f' shape {leaf.shape}: expected [K] and [K, ...]. Stack the'
          ' ingredients with jaxsoup.stack.'
      )
  return flat.replace(mix_leaves(alphas, flat.leaves))


def stack(
    ingredients: Sequence[Params], *, non_float_from: int | None = None
) -> Params:
  """Stacks K models along a new first axis.

  At most one ingredient is held beside the stack, so K checkpoints need K + 1
  times the memory of one.

  Args:
    ingredients: K pytrees of one structure, or `checkpoints.Ingredients`.
    non_float_from: the ingredient whose non-float leaves are taken; without it
      they must be equal.

  Returns:
    A pytree with leaves `[K, ...]`, in the container of the first ingredient.

  Raises:
    ValueError: see `check_compatible`.

  Example:
    >>> stack([{'w': np.float32(1)}, {'w': np.float32(3)}])
    {'w': Array([1., 3.], dtype=float32)}
  """
  checked = Checked(ingredients, non_float_from)
  floats = iter(stack_leaves(checked))
  flat = checked.template
  return flat.replace(
      next(floats) if is_float(x) else repeat([x], len(checked))[0]
      for x in flat.leaves
  )


def stack_leaves(checked: Checked) -> list[jax.Array]:
  """The float leaves `[K, ...]` of all ingredients, read one after another."""
  num_ingredients = len(checked)
  stacked: list[jax.Array] = []
  for k, leaves in in_order(checked, range(num_ingredients)):
    if not stacked:
      stacked = repeat(leaves, num_ingredients)
    else:
      rows = [_beside(x, s) for x, s in zip(leaves, stacked)]
      stacked = _set_row(stacked, rows, numbers(k, np.int32))
  return stacked


def _beside(x: jax.Array, stacked: jax.Array) -> jax.Array:
  # jax 0.7 puts the stack of unsharded leaves on an Explicit mesh that is set.
  sharding = stacked.sharding
  if isinstance(sharding, NamedSharding) and not isinstance(
      x.sharding, NamedSharding
  ):
    spec = PartitionSpec(*sharding.spec[1:])
    return jax.device_put(x, NamedSharding(sharding.mesh, spec))
  return x


def in_order(checked: Checked, order: Sequence[int]):
  """Pairs (k, leaves) in this order, the next one read ahead."""
  for i, k in enumerate(order):
    leaves = checked[k]
    if i + 1 < len(order):
      checked.prefetch(order[i + 1])
    yield k, leaves


@functools.partial(jax.jit, static_argnums=1)
def repeat(leaves: list[jax.Array], num: int) -> list[jax.Array]:
  return [jnp.broadcast_to(x, (num, *x.shape)) for x in leaves]


@functools.partial(jax.jit, donate_argnums=0)
def _set_row(
    stacked: list[jax.Array], leaves: list[jax.Array], k: jax.Array
) -> list[jax.Array]:
  return [
      jax.lax.dynamic_update_index_in_dim(s, x, k, 0)
      for s, x in zip(stacked, leaves)
  ]


# --- Running sums: sum and count, in float32, never a running mean ------------


def numbers(values: Any, dtype: Any = np.float32) -> jax.Array:
  """Numbers on the device, explicitly (see `on_device`)."""
  return jax.device_put(np.asarray(values, dtype))


@jax.jit
def scaled(leaves: list[jax.Array], weights: jax.Array) -> list[jax.Array]:
  """`weight * theta`, in float32 or wider: how a running sum begins."""
  return [w * x.astype(wide_dtype(x.dtype)) for x, w in zip(leaves, weights)]


@functools.partial(jax.jit, donate_argnums=0)
def add(
    total: list[jax.Array], leaves: list[jax.Array], weights: jax.Array
) -> list[jax.Array]:
  """`total + weight * theta`, in place."""
  return [t + w * x.astype(t.dtype) for t, x, w in zip(total, leaves, weights)]


@jax.jit
def rounded_with(
    total: list[jax.Array],
    leaves: list[jax.Array],
    weights: jax.Array,
    count: jax.Array,
) -> list[jax.Array]:
  """`(total + weight * theta) / count`: a candidate, the sum left as it is."""
  return [
      ((t + w * x.astype(t.dtype)) / count).astype(x.dtype)
      for t, x, w in zip(total, leaves, weights)
  ]


@functools.partial(jax.jit, static_argnums=2)
def rounded(total: list[jax.Array], count: jax.Array, dtypes: tuple[Any, ...]):
  """`total / count`, rounded once to the dtypes of the ingredients."""
  return [(t / count).astype(d) for t, d in zip(total, dtypes)]


def weighted_sum(
    checked: Checked, alpha: Any = None, order: Sequence[int] | None = None
) -> list[jax.Array]:
  """`sum_k alpha_k theta_k` of the float leaves, one ingredient at a time.

  Without alpha every weight is one. Ingredients that are not in `order` are not
  read; an empty order reads the first, whose leaves tell what zeros look like.
  """
  order = range(len(checked)) if order is None else order or [0]
  total: list[jax.Array] = []
  for k, leaves in in_order(checked, order):
    if alpha is None:
      weights = numbers(np.ones(len(leaves)))
    else:
      rows = jax.device_get(alphas_of(alpha, checked.float_paths))
      weights = numbers([row[k] for row in rows])
    total = add(total, leaves, weights) if total else scaled(leaves, weights)
  return total


# --- Prefix trees of mixing coefficients --------------------------------------


def group_of(path: Path, depth: float | None) -> Path:
  """The group of a leaf: the first `depth` keys of its path."""
  if depth is None:
    return ()
  return path if depth >= len(path) else path[: int(depth)]


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
  found = []
  used = set()
  for path in paths:
    above = [path[:n] for n in range(len(path) + 1) if path[:n] in entries]
    if not above:
      raise ValueError(
          f'alpha has no entry for leaf {name_of(path)!r}; its entries are '
          f'{sorted(map(name_of, entries))}.'
      )
    used.add(above[0])
    found.append(entries[above[0]])
  unused = entries.keys() - used
  if unused and paths:
    raise ValueError(
        f'alpha has entries {sorted(map(name_of, unused))} with no leaf below '
        f'them; the leaves are {[name_of(p) for p in paths[:8]]}...'
    )
  return found


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
