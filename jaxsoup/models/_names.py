"""Weights under other names: tables, and the layouts of their arrays.

```
table = vit.table('hf', depth=12, patch_size=16)
params = _names.read(checkpoints.Arrays('vit-base/'), abstract_params, table)
for name, array in _names.write(params, table): ...
```

A table lists a rule for each array of a file, and is used in both directions:
`Rule('block_0/mlp/dense_in/kernel', 'blocks.0.mlp.fc1.weight', dense())`.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import difflib
import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup import _tree
from jaxsoup import checkpoints
from jaxsoup.typing import Array
from jaxsoup.typing import Config
from jaxsoup.typing import Leaf
from jaxsoup.typing import Params
from jaxsoup.typing import ShapeDtype

Shape = tuple[int, ...]


class Layout(NamedTuple):
  """The layout of an array in a file and in our models.

  Attributes:
    read: `(stored, shape) -> leaf`.
    write: `leaf -> stored`; by methods alone, so that it can be traced.
  """

  read: Callable[[np.ndarray, Shape], np.ndarray]
  write: Callable[[Array], Array]


same = Layout(lambda x, shape: x, lambda x: x)
# A vector in the file, such as the bias of all heads, [H D].
flat = Layout(lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1))
# With a first axis of size one in the file: position embeddings.
batched = Layout(lambda x, shape: x.reshape(shape), lambda x: x[None])
# Convolutions of torch, [out, in, H, W], are [H, W, in, out] here.
conv = Layout(
    lambda x, shape: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
)


def dense(num_in: int = 1) -> Layout:
  """A matrix `[out, in]` in the file, as in torch; `num_in` axes are inputs.

  1 for the kernel `[in, H, D]` of queries, 2 for that of the output.
  """
  return Layout(
      lambda x, shape: x.T.reshape(shape),
      lambda x: x.reshape(math.prod(x.shape[:num_in]), -1).T,
  )


def patches(patch_size: int) -> Layout:
  """A convolution of patches in the file, a matrix `[P P C, width]` here."""

  def write(x):
    x = x.reshape(patch_size, patch_size, -1, x.shape[-1])
    return x.transpose(3, 2, 0, 1)

  return Layout(lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape), write)


def row(i: int, num_rows: int) -> Layout:
  """Row i of what the file holds stacked: blocks; to be read only."""
  return Layout(
      lambda x, shape: x[i],
      lambda x: jnp.broadcast_to(x, (num_rows, *x.shape)),
  )


class Rule(NamedTuple):
  """One array of a file.

  Attributes:
    ours: path of our leaf, with slashes; or the paths of several that are
      concatenated along the first axis in the file, such as q, k and v.
    theirs: name in the file.
    layout: the layout of each of them in the file.
  """

  ours: str | tuple[str, ...]
  theirs: str
  layout: Layout = same

  @property
  def paths(self) -> tuple[str, ...]:
    return (self.ours,) if isinstance(self.ours, str) else self.ours


class Table(NamedTuple):
  """The names of a family in one kind of file.

  Attributes:
    rules: one for each array.
    ignored: regular expressions, matched against whole names, of arrays that
      hold nothing learned: counters, position ids, copies of tied weights.
    aliases: regular expressions with what replaces them (as for `re.sub`),
      which turn names of older or of partial files into those of the rules.
  """

  rules: Sequence[Rule]
  ignored: Sequence[str] = ()
  aliases: Sequence[tuple[str, str]] = ()

  def alias(self, name: str) -> str:
    """A name in a file as the rules spell it."""
    for pattern, replacement in self.aliases:
      name = re.sub(pattern, replacement, name)
    return name


class _Aliased:
  """Arrays of a file by the names of the rules."""

  def __init__(self, stored: checkpoints.Arrays, table: Table):
    self.path, self._stored = stored.path, stored
    self._names = {table.alias(name): name for name in stored.shapes}
    self.shapes = {n: stored.shapes[name] for n, name in self._names.items()}

  def __getitem__(self, name: str) -> np.ndarray:
    return self._stored[self._names[name]]


class _Leaves:
  """Leaves of a tree by path; of stacked blocks (`blocks/...`) the rows."""

  def __init__(self, tree: Params):
    self._leaves = leaves_of(tree)

  def place(self, path: str) -> tuple[str, int | None]:
    """The leaf's path in this tree, and its row where blocks are stacked."""
    if path not in self._leaves:
      stacked, num = re.subn(r'\bblock_\d+/', 'blocks/', path)
      number = re.search(r'\bblock_(\d+)/', path)
      if number and num == 1 and stacked in self._leaves:
        return stacked, int(number[1])
    return path, None

  def __contains__(self, path: str) -> bool:
    return self.place(path)[0] in self._leaves

  def __getitem__(self, path: str) -> Leaf:
    place, row = self.place(path)
    leaf = self._leaves[place]
    if row is None:
      return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return leaf[row]

  def __iter__(self) -> Iterator[str]:
    return iter(self._leaves)


def leaves_of(tree: Params) -> dict[str, Leaf]:
  """Leaves of nested dicts by their paths, such as 'head/kernel'."""
  flat_tree = _tree.flatten_in_place(tree)
  return dict(zip(map(_tree.name_of, flat_tree.paths), flat_tree.leaves))


def stored_shape(rule: Rule, leaves: _Leaves) -> Shape:
  """The shape that a rule's array has in a file."""

  def write(*parts):
    first, *others = map(rule.layout.write, parts)
    return jnp.concatenate([first, *others]) if others else first

  like = [jax.ShapeDtypeStruct(leaves[p].shape, np.float32) for p in rule.paths]
  return jax.eval_shape(write, *like).shape


LeafFn = Callable[[str], np.ndarray]


def reader(
    stored: checkpoints.Arrays,
    wanted: Params,
    table: Table,
    *,
    initial: Sequence[str] = (),
    advice: str = '',
) -> LeafFn:
  """Leaves of a model from a file with other names, read when asked for.

  Args:
    stored: the open file.
    wanted: the parameters as nested dicts, of arrays or of
      `jax.ShapeDtypeStruct`; blocks may be stacked (`blocks/...`).
    table: what is where.
    initial: beginnings of paths that are not to be read.
    advice: what ends an error.

  Returns:
    `path -> leaf`, in the dtype of the file; of stacked blocks by the paths of
    single ones.

  Raises:
    ValueError: lists all that is missing, unexpected or of another shape.
  """
  leaves, arrays = _Leaves(wanted), _Aliased(stored, table)
  rules = [
      rule
      for rule in table.rules
      if not all(is_below(path, initial) for path in rule.paths)
  ]
  _check(arrays, leaves, rules, table, initial, advice)
  places = {p: (rule, i) for rule in rules for i, p in enumerate(rule.paths)}
  # Of q, k and v in one array, or of single blocks in three that are stacked.
  array_of = functools.lru_cache(3)(arrays.__getitem__)

  def read_leaf(path):
    rule, i = places[path]
    array = array_of(rule.theirs)
    if len(rule.paths) > 1:
      array = np.split(array, len(rule.paths))[i]
    return rule.layout.read(array, leaves[path].shape)

  return read_leaf


def read(
    stored: checkpoints.Arrays,
    wanted: Params,
    table: Table,
    *,
    initial: Sequence[str] = (),
) -> Params:
  """Reads a model from a file with other names; takes what `reader` takes.

  Returns nested dicts like `wanted`, of NumPy arrays in its dtypes. What is
  below `initial` keeps its value in `wanted`: a head for other classes.
  """
  advice = "\nTo leave out a part, such as the head: without=['head']."
  advice = '' if 'head' in initial else advice
  read_leaf = reader(stored, wanted, table, initial=initial, advice=advice)
  leaves, flat_tree = _Leaves(wanted), _tree.flatten_in_place(wanted)
  boxes = dict(zip(leaves, flat_tree.leaves))
  for path in (p for rule in table.rules for p in rule.paths):
    place, row = leaves.place(path)
    if is_below(path, initial):
      if row is not None:
        raise ValueError(
            f'{path} is to be new, but its values lie in one array with those '
            'of other blocks: pass is_scanned=False.'
        )
      continue
    if row is None:
      dtype = leaves[path].dtype
      boxes[place] = np.asarray(read_leaf(path), dtype, order='C')
    else:
      if not isinstance(boxes[place], np.ndarray):
        boxes[place] = np.empty(boxes[place].shape, boxes[place].dtype)
      boxes[place][row] = read_leaf(path)
  return flat_tree.replace(boxes.values())


def is_below(path: str, beginnings: Sequence[str]) -> bool:
  """Whether a path is one of these, or is below one."""
  return any(path == b or path.startswith(f'{b}/') for b in beginnings)


def written(leaf_fn: LeafFn, table: Table) -> Iterator[tuple[str, np.ndarray]]:
  """Names and contiguous arrays of a file, one after another."""
  for rule in table.rules:
    parts = [rule.layout.write(np.asarray(leaf_fn(p))) for p in rule.paths]
    array = parts[0] if len(parts) == 1 else np.concatenate(parts)
    # safetensors writes the memory of an array as it is, whatever its strides.
    yield rule.theirs, np.asarray(array, order='C')


def write(params: Params, table: Table) -> Iterator[tuple[str, np.ndarray]]:
  """The same, of a model in memory; its blocks may be stacked.

  Raises:
    ValueError: the tree lacks leaves of the table, or has others.
  """
  leaves = _Leaves(params)
  _check_ours(leaves, table.rules)
  return written(leaves.__getitem__, table)


def shapes(params: Params, table: Table) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and dtypes of what `write` yields, by name; reads no array."""
  leaves = _Leaves(params)
  _check_ours(leaves, table.rules)
  return {
      rule.theirs: jax.ShapeDtypeStruct(
          stored_shape(rule, leaves), leaves[rule.paths[0]].dtype
      )
      for rule in table.rules
  }


def with_dtypes_of(
    stored: checkpoints.Arrays, wanted: Params, table: Table
) -> Params:
  """Abstract parameters in the dtypes that a file has."""
  shapes = _Aliased(stored, table).shapes
  dtypes = {
      p: shapes[rule.theirs].dtype
      for rule in table.rules
      if rule.theirs in shapes
      for p in rule.paths
  }
  flat_tree = _tree.flatten_in_place(wanted)
  return flat_tree.replace(
      jax.ShapeDtypeStruct(x.shape, dtypes.get(_tree.name_of(p), x.dtype))
      for p, x in zip(flat_tree.paths, flat_tree.leaves)
  )


def _check_ours(leaves: _Leaves, rules: Sequence[Rule]) -> None:
  known = {p for rule in rules for p in rule.paths}
  missing = sorted(p for p in known if p not in leaves)
  places = {leaves.place(p)[0] for p in known}
  unknown = sorted(p for p in leaves if p not in places)
  if missing or unknown:
    lines = [f'{p!r} is missing' for p in missing]
    lines += [f'{p!r} is unexpected' for p in unknown]
    raise ValueError(
        _listed('These parameters are not those of the model', lines)
    )


def _check(stored, leaves, rules, table, initial, advice) -> None:
  """Raises with all names that are missing, unexpected or of another shape."""
  known = {rule.theirs for rule in table.rules}
  unexpected = [
      name
      for name in stored.shapes
      if name not in known and not _is_ignored(name, table)
  ]
  missing = [rule for rule in rules if rule.theirs not in stored.shapes]
  # A misspelled name is both missing and unexpected: name the nearest.
  lines = [
      f'{rule.theirs!r} is missing, for {rule.paths[0]!r}'
      f'{_nearest(rule.theirs, unexpected)}'
      for rule in missing
  ]
  lines += [
      f'{name!r} is unexpected{_nearest(name, [r.theirs for r in missing])}'
      for name in unexpected
  ]
  places = set()
  for rule in rules:
    places |= {leaves.place(p)[0] for p in rule.paths}
    absent = [p for p in rule.paths if p not in leaves]
    if absent:
      lines.append(f'the model lacks {absent[0]!r}, for {rule.theirs!r}')
    elif rule.theirs in stored.shapes:
      actual = tuple(stored.shapes[rule.theirs].shape)
      expected = stored_shape(rule, leaves)
      if actual != expected:
        lines.append(
            f'{rule.theirs!r} has shape {actual}, expected {expected} for '
            f'{rule.paths[0]!r}'
        )
  lines += [
      f'the file has no array for {name!r}'
      for name in leaves
      if name not in places and not is_below(name, initial)
  ]
  if lines:
    text = _listed(f'{stored.path} does not match the model', lines)
    raise ValueError(text + advice)


def _is_ignored(name: str, table: Table) -> bool:
  return any(re.fullmatch(pattern, name) for pattern in table.ignored)


def _nearest(name: str, names: Iterable[str]) -> str:
  nearest = difflib.get_close_matches(name, list(names), 1)
  return f' (nearest: {nearest[0]!r})' if nearest else ''


def _listed(title: str, lines: Sequence[str], most: int = 20) -> str:
  more = [f'and {len(lines) - most} more'] if len(lines) > most else []
  return '\n  '.join([f'{title}:', *lines[:most], *more])


def check_config(config: Config, only: Config, model: str) -> None:
  """Raises where a config.json asks for what a model is not."""
  for name, expected in only.items():
    if config.get(name, expected) != expected:
      raise ValueError(
          f'config.json has {name} = {config[name]!r}, but {model} only '
          f'{expected!r}: choose another checkpoint.'
      )


def depth_of(names: Iterable[str], blocks: str) -> int:
  """The number of blocks, by the numbers that follow a pattern in names."""
  numbers = [re.match(rf'{blocks}(\d+)\b', name) for name in names]
  return 1 + max(int(number[1]) for number in numbers if number)


def matches(stored: Mapping[str, ShapeDtype], table: Table) -> float:
  """The share of a table's names that a file has: which table is it?"""
  names = {table.alias(name) for name in stored}
  return np.mean([rule.theirs in names for rule in table.rules]).item()
