"""Ingredients of the same structure: checked when they are read.

```
checked = Checked(ingredients)
checked[0], checked.duplicates()
```
"""

from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup import _layers
from jaxsoup import _tree
from jaxsoup import _warnings
from jaxsoup.typing import Leaf
from jaxsoup.typing import Members
from jaxsoup.typing import Params
from jaxsoup.typing import Stacks

_LeavesByPath = Mapping[_tree.Path, Leaf]


def mismatches(first: _LeavesByPath, other: _LeavesByPath) -> list[str]:
  """What differs between two trees, without looking at values."""
  differences = []
  for path in first.keys() | other.keys():
    leaf = f'leaf {_tree.name_of(path)!r}'
    if path not in other:
      differences.append(f'{leaf} is missing')
    elif path not in first:
      differences.append(f'{leaf} is unexpected')
    else:
      for what in ('shape', 'dtype'):
        expected, actual = (getattr(x[path], what) for x in (first, other))
        if expected != actual:
          differences.append(f'{leaf} has {what} {actual}, expected {expected}')
  return sorted(differences)


def listed(differences: Sequence[str]) -> str:
  """The first five."""
  num_more = len(differences) - 5
  more = f' (and {num_more} more)' if num_more > 0 else ''
  return f'{"; ".join(differences[:5])}{more}'


def mismatch_error(
    name: str, differences: Sequence[str], is_stored: bool = False
) -> ValueError:
  cast = (
      'Cast one of them: jax.tree.map(lambda x: x.astype(jnp.float32), params)'
  )
  part = 'pass the part that is the same: [p["backbone"] for p in ingredients].'
  if is_stored:
    cast = "Choose one: --dtype float32, or Ingredients(..., dtype='float32')."
    part = (
        'take that of the first (--ignore PATTERN), or only what all have '
        '(--intersect); in Python Ingredients(..., ignore=[PATTERN]).'
    )
  alike = 'Only models of the same architecture can be averaged.'
  is_dtype = 'dtype' in differences[0]
  remedy = cast if is_dtype else f'{alike} If only the heads differ, {part}'
  said = f'{name} does not match the first ingredient: {listed(differences)}.'
  return ValueError(f'{said} {remedy}')


def not_finite_error(name: str, paths: Sequence[_tree.Path]) -> ValueError:
  return ValueError(
      f'{name} has NaN or infinite values in leaf {_tree.name_of(paths[0])!r}'
      + (f' and {len(paths) - 1} more' if len(paths) > 1 else '')
      + '. Its training diverged, or its file is damaged: leave it out.'
  )


def non_float_error(
    name: str,
    path: _tree.Path,
    expected: Leaf,
    actual: Leaf,
    is_stored: bool = False,
) -> ValueError:
  leaf = repr(_tree.name_of(path))
  remedy = 'pass parameters without such a leaf: nnx.state(model, nnx.Param).'
  if is_stored:
    options = f'--ignore {leaf}, or Ingredients(..., ignore=[{leaf}])'
    remedy = f'to take that of the first: {options}.'
  return ValueError(
      f'{name}: leaf {leaf} of dtype {actual.dtype} is {_short(actual)}, but '
      f'{_short(expected)} in the first ingredient. Only floats are averaged: '
      'quantized weights have to be converted to floats first. Of the rest '
      f'only PRNG keys and counters may differ; {remedy}'
  )


def duplicates_of(
    contents: Mapping[int, Hashable], name_fn: Callable[[int], str]
) -> tuple[Members, ...]:
  """Groups of ingredients with the same content; warns of them."""
  groups: dict[Hashable, Members] = {}
  for k, content in sorted(contents.items()):
    groups[content] = (*groups.get(content, ()), k)
  duplicates = tuple(group for group in groups.values() if len(group) > 1)
  for group in duplicates:
    _warnings.warn(
        f'{" and ".join(map(name_fn, group))} have equal parameters: the '
        'same model counts more than once.'
    )
  return duplicates


def require_ingredients(ingredients: Sequence[Params]) -> None:
  """Raises unless this is a sequence with at least one ingredient."""
  if not hasattr(ingredients, '__getitem__') or isinstance(
      ingredients, Mapping
  ):
    raise TypeError(
        'ingredients must be a sequence of pytrees (a list, or '
        'checkpoints.Ingredients), not a '
        f'{type(ingredients).__name__}. For a generator call list(it) first; '
        'for one stacked tree use jaxsoup.mix(stacked, alpha).'
    )
  if not len(ingredients):
    raise ValueError(
        'There are no ingredients: the sequence is empty. A soup needs at '
        'least one model.'
    )


def require_floats(paths: Sequence[_tree.Path]) -> None:
  """Raises unless some leaves are floats."""
  if not paths:
    raise ValueError(
        'The parameters have no floats: no leaf has a float or complex dtype. '
        'Pass the parameters of a model, such as nnx.state(model, nnx.Param).'
    )


@jax.jit
def _summary(leaves: list[jax.Array]) -> tuple[list[jax.Array], ...]:
  """Whether each leaf is finite, and its sum: equal trees have equal sums."""
  finite = [jnp.isfinite(x).all() for x in leaves]
  sums = [jnp.sum(x, dtype=_tree.wide_dtype(x.dtype)) for x in leaves]
  return finite, sums


def _all_equal(leaves: list[jax.Array], others: list[jax.Array]) -> bool:
  """Whether all leaves are equal; models may lie on different devices."""
  others = jax.device_put(others, [x.sharding for x in leaves])
  return all(jax.device_get(_equal(leaves, others)))


@jax.jit
def _equal(leaves: list[jax.Array], others: list[jax.Array]) -> list[jax.Array]:
  """Scalars, which every process has."""
  return [(x == y).all() for x, y in zip(leaves, others)]


class Leaves(Protocol):
  """The float leaves of ingredients, one ingredient at a time."""

  def __len__(self) -> int:
    ...

  def __getitem__(self, k: int, /) -> list[jax.Array]:
    ...

  def prefetch(self, k: int, /) -> None:
    ...


class Checked:
  """Ingredients as flat lists of leaves, each checked when it is first read.

  The first one that is read is the template of `check_compatible`. Those on
  other devices are moved to its devices. Floats are not kept. A leaf that
  `stacks` names is taken as its layers.
  """

  def __init__(
      self, ingredients: Sequence[Params], stacks: Stacks | None = None
  ):
    require_ingredients(ingredients)
    self._source = ingredients
    self.stacks = stacks or {}
    self._is_stored = hasattr(ingredients, 'paths')
    # Of those that were checked.
    self._others: dict[int, list[Leaf]] = {}
    # Of those whose values are known: the first equal one, or themselves.
    self._originals: dict[int, int] = {}
    self._sums: dict[int, bytes] = {}
    self._first: _tree.Flat | None = None
    self._shardings: list[jax.sharding.Sharding | None] = []

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, k: int) -> list[jax.Array]:
    """The leaves of ingredient k that are floats."""
    k = range(len(self))[k]
    if k not in self._others:  # Of checkpoints, what names and files say.
      getattr(self._source, 'require_averageable', lambda _: None)(k)
    flat = _tree.flatten(self._source[k])
    if self._first is None:
      # Only their shapes are needed, so that no model stays in memory.
      shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
      self._first = flat._replace(
          leaves=[shape(x) if _tree.is_float(x) else x for x in flat.leaves]
      )
    if k not in self._others:
      self._check(k, flat)
    # Sorted as the template is: a State may list its leaves in another order.
    leaves = flat.by_path
    floats = [leaves[path] for path in self.template.floats]
    if not self._shardings:
      self._shardings = list(map(_sharding_of, floats))
    return self.layers.split(list(map(_on_devices_of, self._shardings, floats)))

  @property
  def template(self) -> _tree.Flat:
    """The first ingredient that was read, or else ingredient 0."""
    if self._first is None:
      self[0]
    assert self._first is not None
    return self._first

  def prefetch(self, k: int) -> None:
    """Announces that ingredient k will be read next."""
    getattr(self._source, 'prefetch', lambda _: None)(k)

  def name(self, k: int) -> str:
    """How ingredient k is named in a message."""
    paths = getattr(self._source, 'paths', None)
    return f'ingredient {k}' + (f' ({paths[k]})' if paths else '')

  @functools.cached_property
  def layers(self) -> _layers.Layers:
    """The paths and dtypes of the floats."""
    return _layers.Layers(self.template.floats, self.stacks)

  def replace(
      self, floats: Iterable[jax.Array], k: int | None = None
  ) -> Params:
    """A tree of these floats; the rest is ingredient k's, or the template's."""
    others = None if k is None else self._others[k]
    return self.template.combine(self.layers.join(list(floats)), others)

  def duplicates(self) -> tuple[Members, ...]:
    """Groups of equal ingredients among those read so far; warns of them."""
    return duplicates_of(self._originals, self.name)

  def _check(self, k: int, flat: _tree.Flat) -> None:
    if differences := mismatches(self.template.by_path, flat.by_path):
      raise mismatch_error(self.name(k), differences, self._is_stored)
    if not _tree.is_traced(*flat.leaves, *self.template.leaves):
      self._check_values(k, flat)
    others = flat.others
    # What is no state has to be equal: only the template's is kept.
    self._others[k] = [
        others[path] if _tree.is_state(x) else x
        for path, x in self.template.others.items()
    ]

  def _check_values(self, k: int, flat: _tree.Flat) -> None:
    leaves, name = flat.by_path, self.name(k)
    for path, expected in self.template.others.items():
      actual = leaves[path]
      if _tree.is_state(expected) or actual is expected:
        continue
      if not _all_equal([expected], [actual]):
        raise non_float_error(name, path, expected, actual, self._is_stored)
    floats = {path: leaves[path] for path in self.template.floats}
    _require_same_devices(name, floats)
    finite, sums = jax.device_get(_summary(list(floats.values())))
    if bad := [path for path, ok in zip(floats, finite) if not ok]:
      raise not_finite_error(name, bad)
    # Equal sums are a hint; a permuted model has them too. So compare.
    own = b''.join(np.asarray(s).tobytes() for s in sums)
    layers = self.layers.split(list(floats.values()))
    alike = (i for i, other in self._sums.items() if other == own)
    same = (i for i in alike if _all_equal(layers, self[i]))
    self._originals[k] = next(same, k)
    if self._originals[k] == k:
      self._sums[k] = own


def _sharding_of(x: jax.Array) -> jax.sharding.Sharding | None:
  """Where an array is bound to stay; None if it is not, or traced."""
  is_bound = not _tree.is_traced(x) and x.committed
  return x.sharding if is_bound else None


def _on_devices_of(
    sharding: jax.sharding.Sharding | None, x: jax.Array
) -> jax.Array:
  own = _sharding_of(x)
  if sharding is None or own is None or own.device_set == sharding.device_set:
    return x
  return jax.device_put(x, sharding)


def _require_same_devices(name: str, floats: _LeavesByPath) -> None:
  bound = {p: s.device_set for p, x in floats.items() if (s := _sharding_of(x))}
  for path, devices in bound.items():
    first = next(iter(bound))
    if devices != bound[first]:
      both = ' and '.join(
          f'leaf {_tree.name_of(p)!r} is on {sorted(map(str, bound[p]))}'
          for p in (first, path)
      )
      raise ValueError(
          f'{name}: {both}. Put the model on one device or one mesh first, '
          'with jax.device_put.'
      )


def _short(value: Leaf) -> str:
  if isinstance(value, jax.Array) and not value.is_fully_addressable:
    return f'an array of shape {value.shape} on several processes'
  return np.array2string(
      np.asarray(jax.device_get(value)), threshold=4, edgeitems=2
  )


def check_compatible(ingredients: Sequence[Params]) -> tuple[Members, ...]:
  """Raises unless the ingredients can be averaged.

  They must agree in the paths, shapes and dtypes of their leaves, and all
  values must be finite. Leaves that are not floats must be equal, except for
  PRNG keys, steps and counters, which a soup takes from its first ingredient.
  Recipes check each ingredient when they first read it; this does so before.

  Args:
    ingredients: K pytrees.

  Returns:
    Groups of ingredients with equal parameters, which a `UserWarning` names.

  Raises:
    ValueError: names the ingredient, the leaf's path, both values, and what to
      do.

  Example:
    >>> check_compatible([{'w': np.zeros(2)}, {'w': np.zeros(3)}])
    Traceback (most recent call last):
    ...
    ValueError: ingredient 1 does not match the first ingredient: leaf 'w' \
has shape (3,), expected (2,). Only models of the same architecture can be \
averaged. If only the heads differ, pass the part that is the same: \
[p["backbone"] for p in ingredients].
  """
  checked = Checked(ingredients)
  for _ in in_order(checked, range(len(checked))):
    pass
  return checked.duplicates()


def in_order(
    checked: Leaves, order: Sequence[int]
) -> Iterator[tuple[int, list[jax.Array]]]:
  """Pairs (k, leaves) in this order, the next one read ahead."""
  for i, k in enumerate(order):
    leaves = checked[k]
    if i + 1 < len(order):
      checked.prefetch(order[i + 1])
    yield k, leaves


def fitting_leaves(
    checked: Checked, params: Params, name: str = 'theta_0'
) -> list[jax.Array]:
  """The float leaves of another model, which errors call `name`."""
  pair = Checked([checked.replace(checked[0]), params], checked.stacks)
  try:
    pair[0]
    return pair[1]
  except ValueError as e:
    said = str(e).replace('first ingredient', 'ingredients')
    raise ValueError(said.replace('ingredient 1', name)) from None
