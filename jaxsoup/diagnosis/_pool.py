"""Ingredients seen leaf by leaf, side by side, at the memory of some pieces."""

from collections.abc import Iterator
from collections.abc import Sequence
import math
import os

import jax
import numpy as np

from jaxsoup import _checked
from jaxsoup import _tree
from jaxsoup.diagnosis import _findings
from jaxsoup.typing import Json
from jaxsoup.typing import Leaf
from jaxsoup.typing import Params

# Numbers of each ingredient that are compared at a time.
_CHUNK = 1 << 17


class Pool:
  """K ingredients, and perhaps what they were fine-tuned from.

  Checkpoints are read piece by piece, each number once in a walk over all
  leaves. Of a sequence that is neither a list nor of checkpoints, as many
  leaves are held at a time as one ingredient has bytes.

  Attributes:
    names: of the ingredients.
    leaves: shape and dtype of each leaf by its path, of each ingredient.
    start: leaves of theta_0 by path; empty without one.
    configs: hyper-parameters from the metadata of runs; {} if missing.
    copies: which copy of its run an ingredient says that it is ('ema_0.99');
      '' is the run itself, None that it says nothing.
    damaged: what was wrong with a file, by ingredient; known after a walk.
  """

  def __init__(
      self,
      ingredients: Sequence[Params],
      theta_0: Params | None = None,
      names: Sequence[str] | None = None,
  ):
    _checked.require_ingredients(ingredients)
    self.ingredients = ingredients
    self.names = _names_of(ingredients, names)
    self.damaged: dict[int, str] = {}
    self._is_streamed = hasattr(ingredients, 'pieces')
    self.leaves = [self._abstract(k) for k in range(len(ingredients))]
    self.start = {}
    if theta_0 is not None:
      self.start = _tree.flatten_in_place(theta_0).by_path
    customs = [self._custom(k) for k in range(len(ingredients))]
    self.configs = [dict(c.get('config') or {}) for c in customs]
    self.copies = [
        c.get('copy', '') if 'config' in c else None for c in customs
    ]

  def __len__(self) -> int:
    return len(self.ingredients)

  def listed(self, members: Sequence[int]) -> str:
    """Names in a sentence."""
    return _findings.listed(self.names, members)

  def chunks(
      self, paths: Sequence[_tree.Path], members: Sequence[int]
  ) -> Iterator[tuple[_tree.Path, list[np.ndarray]]]:
    """Walks over leaves that all members have in one shape.

    Yields the path, and a part `[N]` of the leaf of each member as stored, and
    of theta_0 after those, if it has such a leaf.
    """
    for path, parts in self._parts(paths, members):
      start = _like(self.start.get(path), self.leaves[members[0]][path].shape)
      done = 0
      for rows in parts:
        if start is not None:
          rows = [*rows, start[done : done + rows[0].size]]
        for i in range(0, rows[0].size, _CHUNK):
          yield path, [row[i : i + _CHUNK] for row in rows]
        done += rows[0].size

  def leaf(self, k: int, path: _tree.Path) -> np.ndarray:
    """One leaf of one ingredient."""
    if not self._is_streamed:
      by_path = _tree.flatten_in_place(self.ingredients[k]).by_path
      return np.asarray(by_path[path])
    pieces = self.ingredients.pieces(k, path, like=k)  # type: ignore[attr-defined]
    parts = [piece.copy() for piece in pieces]
    return np.concatenate(parts) if parts[0].ndim else parts[0]

  def _abstract(self, k: int) -> dict[_tree.Path, Leaf]:
    if self._is_streamed:
      return self.ingredients.stored(k)  # type: ignore[attr-defined]
    flat = _tree.flatten_in_place(self.ingredients[k])
    return dict(zip(flat.paths, map(_shape_of, flat.leaves, flat.paths)))

  def _custom(self, k: int) -> Json:
    if not hasattr(self.ingredients, 'metadata'):
      return {}
    custom = self.ingredients.metadata(k).custom or {}
    own = custom.get('jaxsoup', {}).get('metadata') or custom
    # Other programs store other things under these names.
    return own if isinstance(own.get('config', {}), dict) else {}

  def _parts(self, paths, members):
    if self._is_streamed:
      for path in paths:
        yield path, self._streamed(path, members)
      return
    for group in self._groups(paths, members[0]):
      rows: dict[_tree.Path, list[np.ndarray]] = {path: [] for path in group}
      for k in members:
        leaves = _tree.flatten_in_place(self.ingredients[k]).by_path
        for path in group:
          rows[path].append(np.asarray(leaves[path]).reshape(-1))
      for path in group:
        yield path, [rows.pop(path)]

  def _groups(self, paths, k) -> list[list[_tree.Path]]:
    """Groups of leaves, of which K copies take no more than one ingredient."""
    if isinstance(self.ingredients, (list, tuple)):
      return [list(paths)]
    sizes = {path: _num_bytes(self.leaves[k][path]) for path in paths}
    groups: list[list[_tree.Path]] = [[]]
    for path in paths:
      held = sum(sizes[p] for p in groups[-1])
      if groups[-1] and len(self) * (held + sizes[path]) > sum(sizes.values()):
        groups.append([])
      groups[-1].append(path)
    return groups

  def _streamed(self, path, members) -> Iterator[list[np.ndarray]]:
    readers = [
        self.ingredients.pieces(k, path, like=members[0])  # type: ignore[attr-defined]
        for k in members
    ]
    shape = self.leaves[members[0]][path].shape
    num_left = math.prod(shape)
    while num_left > 0:
      rows = [self._next(k, r) for k, r in zip(members, readers)]
      size = next((row.size for row in rows if row is not None), 0)
      if not size:
        return
      yield [np.full(size, np.nan) if row is None else row for row in rows]
      num_left -= size
    for k, reader in zip(members, readers):
      self._next(k, reader)  # Its checksum.

  def _next(self, k: int, reader: Iterator[np.ndarray]) -> np.ndarray | None:
    """The next piece, flat; None at the end, or if its file is damaged."""
    try:
      piece = next(reader, None)
    except ValueError as e:
      self.damaged[k] = str(e)
      return None
    return None if piece is None else np.array(piece).reshape(-1)


def _shape_of(leaf: Leaf, path: _tree.Path) -> jax.ShapeDtypeStruct:
  if not isinstance(leaf, (np.ndarray, jax.Array)):
    leaf = _tree.on_device(leaf, path)
  # As recipes see it: float64 is float32 without x64.
  dtype = jax.dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True)
  return jax.ShapeDtypeStruct(leaf.shape, dtype)


def _num_bytes(leaf: Leaf) -> int:
  return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def _like(leaf: Leaf, shape: tuple[int, ...]) -> np.ndarray | None:
  """A leaf of theta_0, flat, if it has this shape."""
  if leaf is None or np.shape(leaf) != tuple(shape):
    return None
  return np.asarray(leaf).reshape(-1)


def _names_of(ingredients, names) -> tuple[str, ...]:
  num = len(ingredients)
  if names is not None:
    if len(names) != num:
      raise ValueError(
          f'There are {len(names)} names and {num} ingredients: pass one name '
          'for each.'
      )
    return tuple(map(str, names))
  paths = getattr(ingredients, 'paths', None)
  if paths is None:
    return tuple(f'ingredient {k}' for k in range(num))
  if num < 2:
    return tuple(paths)
  common = os.path.commonpath(paths)
  return tuple(os.path.relpath(path, common) for path in paths)
