"""One checkpoint: the paths of the wanted leaves, and their checksums."""

import collections
from collections.abc import Container
from collections.abc import Mapping
from collections.abc import Sequence
import copy
import math
import pathlib
import re
from typing import Any

import jax
import numpy as np

from jaxsoup import _processes
from jaxsoup import _tree
from jaxsoup import _warnings
from jaxsoup.checkpoints import _checksum
from jaxsoup.checkpoints import _orbax
from jaxsoup.checkpoints import _pieces
from jaxsoup.checkpoints import _source
from jaxsoup.typing import Params
from jaxsoup.typing import ShapeDtype

# Where trainings have their parameters.
_MODELS = ('params', 'model', 'trainable_variables')
# Checksums of the leaves that are being read.
Sums = dict[_tree.Path, _checksum.Checksum]


class Checkpoint:
  """The wanted leaves of an open checkpoint, verified as they are read.

  Attributes:
    source: the checkpoint.
    flat: what is wanted: names, shapes, dtypes and shardings of the leaves.
    stored: shape and dtype in the file, by name.
    places: paths in the file, by name.
    targets: the same for a soup, in which a selected copy of the parameters,
      such as their moving average, takes their place.
    orders: of rows, in leaves that are read in another order.
  """

  def __init__(
      self,
      source: _source.Source,
      abstract: _tree.Flat | None,
      item: str | None = None,
      is_whole: bool = False,
  ):
    self.source = source
    places = _places(source.metadata, abstract, item, is_whole)
    leaves = source.metadata.leaves
    self.stored = {name: leaves[path] for name, path in places.items()}
    self.flat = abstract or _tree.flatten_in_place(_tree.nest(self.stored))
    self.places = places
    self.targets = self._targets(item)
    self.orders: dict[_tree.Path, np.ndarray] = {}
    self._digests: dict[str, str] = {}
    self._stored_digests = {
        name: digest
        for name, digest in source.metadata.checksums.items()
        if _checksum.is_current(digest)
    }

  def is_state(self, name: _tree.Path) -> bool:
    """Whether it is a PRNG key, a step or a counter, which may differ."""
    layout = self.source.layout
    return _tree.is_state(self.stored[name]) or (
        layout is not None and layout.is_key(self.places[name])
    )

  def _targets(self, item: str | None) -> dict[_tree.Path, _tree.Path]:
    metadata = self.source.metadata
    if item is None:
      return self.places
    usual = _places(metadata, None, None)
    if {n: metadata.leaves[p].shape for n, p in usual.items()} == {
        n: x.shape for n, x in self.stored.items()
    }:
      return usual
    return self.places

  def moving_averages(self) -> dict[_tree.Path, list[_tree.Path]]:
    """Where the file has moving averages of each leaf, by its name.

    A soup replaces them too, because some owners load them by preference.
    """
    leaves = self.source.metadata.leaves
    return {
        name: [
            p
            for p, leaf in leaves.items()
            if p[1:] == target[1:]
            and p[:1] != target[:1]
            and re.search('(^|_)ema(_|$)', p[0])
            and leaf.shape == leaves[target].shape
        ]
        for name, target in self.targets.items()
    }

  def left_out(self) -> dict[str, int]:
    """Numbers of leaves that a soup does not have, by their first key."""
    kept = set(self.targets.values())
    stored = self.source.metadata.leaves
    firsts = (_tree.name_of(p[:1]) for p in stored if p not in kept)
    return dict(collections.Counter(firsts))

  def part(self, names: Sequence[_tree.Path]) -> 'Checkpoint':
    """The same with these leaves only, in nested dicts."""
    part, leaves = copy.copy(self), self.flat.by_path
    part.stored = {n: self.stored[n] for n in names}
    part.places = {n: self.places[n] for n in names}
    part.targets = {n: self.targets[n] for n in names}
    part.flat = _tree.flatten_in_place(
        _tree.nest({n: leaves[n] for n in names})
    )
    return part

  def read(self) -> Params:
    """All wanted leaves, in their dtypes and shardings."""
    self._warn_of_rounding()
    sums, names = Sums(), self.flat.paths
    readers = [self.reader(name, sums) for name in names]
    return _pieces.load(
        self.flat,
        [self.plan(name) for name in names],
        lambda i, index: readers[i](index),
        lambda name: self.verify(name, sums),
    )

  def _warn_of_rounding(self) -> None:
    """64-bit floats become 32-bit ones in jax, without a word."""
    for name, leaf in zip(self.flat.paths, self.flat.leaves):
      target = jax.dtypes.canonicalize_dtype(leaf.dtype)
      if _tree.is_float(leaf) and target != leaf.dtype:
        _warnings.warn(
            f'{self.source.metadata.path} holds {leaf.dtype} '
            f'({_tree.name_of(name)!r}), which becomes {target}: jax has '
            "64-bit floats only with jax.config.update('jax_enable_x64', True)."
        )
        return

  def plan(self, name: _tree.Path) -> list[tuple[_source.Index, int]]:
    """The pieces in which a leaf is read, with their bytes."""
    abstract = self.flat.leaves[self.flat.paths.index(name)]
    dtype = self.stored[name].dtype
    num_rows = self.source.rows_fn(self.places[name])
    pieces = _pieces.plan(abstract, dtype, num_rows)
    return [(index, _pieces.num_bytes(index, dtype)) for index in pieces]

  def reader(self, name: _tree.Path, sums: Sums) -> _source.ReadFn:
    """Reads a part of a leaf, and adds it to its checksum."""
    if name in self.orders:  # Of which `verify` takes the checksum.
      return self.unverified(name)
    return self._adder(name, sums)

  def stored_reader(self, name: _tree.Path) -> _source.ReadFn:
    """Reads a part of a leaf as it is stored."""
    return self.source.reader_fn(self.places[name])

  def _adder(self, name: _tree.Path, sums: Sums) -> _source.ReadFn:
    read = self.stored_reader(name)
    columns = self.stored[name].shape[1:]
    row_bytes = self.stored[name].dtype.itemsize * math.prod(columns)

    def read_and_add(index):
      piece = read(index)
      if piece.shape[1:] == columns:  # Whole rows, one after another.
        checksum = sums.setdefault(name, self._new_checksum(name))
        checksum.add(piece, index[0].start * row_bytes if index else 0)
      return piece

    return read_and_add

  def unverified(self, name: _tree.Path) -> _source.ReadFn:
    """The same, without verifying its checksum."""
    read, order = self.stored_reader(name), self.orders
    return _source.reordered(read, order[name]) if name in order else read

  def verify(self, name: _tree.Path, sums: Sums) -> None:
    """Compares the checksum of a leaf that has been read with the stored one.

    Does nothing where this process read only a part of the leaf.
    """
    if name in self.orders:  # Single rows would be kept for their checksum.
      read, leaf = self._adder(name, sums), self.stored[name]
      for index in _pieces.plan(leaf, leaf.dtype, 1):
        read(index)
    checksum = sums.pop(name, self._new_checksum(name))
    if not checksum.is_complete:
      return
    digest = checksum.digest()
    first = self._digests.setdefault(_tree.name_of(name), digest)
    stored = self._stored_digests.get(_tree.name_of(self.places[name]), digest)
    if digest != stored:
      raise _source.DamagedError(
          f'Leaf {_tree.name_of(name)!r} of {self.source.metadata.path} is '
          f'damaged: its checksum is {digest}, but {stored} was stored with it.'
          ' Restore the checkpoint from a copy, or leave it out.'
      )
    if digest != first:
      raise _source.DamagedError(
          f'Leaf {_tree.name_of(name)!r} of {self.source.metadata.path} '
          f'changed while it was in use: its checksum was {first} and is '
          f'{digest}. Scores of it no longer hold: see what writes to it, and '
          'start again.'
      )

  def digest_of(self, name: _tree.Path) -> str | None:
    """The checksum of a leaf, if this process has read it."""
    return self._digests.get(_tree.name_of(name))

  def exchange(self, read: Mapping[_tree.Path, str]) -> None:
    """Adds what is known of other leaves, and what other processes know."""
    known = {_tree.name_of(name): digest for name, digest in read.items()}
    self._digests = _processes.merged(known | self._digests)

  def _new_checksum(self, name: _tree.Path) -> _checksum.Checksum:
    return _checksum.Checksum(_tree.num_bytes(self.stored[name]))

  def content_hash(self) -> str | None:
    """A hash of the wanted leaves, if their checksums are known."""
    stored = self._stored_digests
    checksums = {
        _tree.name_of(name): stored[_tree.name_of(path)]
        for name, path in self.places.items()
        if _tree.name_of(path) in stored
    } | self._digests
    if len(checksums) < len(self.places):
      return None
    leaves = {_tree.name_of(name): x for name, x in self.stored.items()}
    return _checksum.content_hash(leaves, checksums)


def below(
    source: _source.Metadata, item: str | None
) -> dict[_tree.Path, _tree.Path]:
  """The paths of the leaves below an item, by what follows its own keys.

  The item is the keys of a subtree, joined by `/`, of which the first may be
  the directory of the checkpoint. None: all leaves.
  """
  keys = tuple(item.split('/')) if item else ()
  stored = list(source.leaves)
  inside = lambda: {p[len(keys) :]: p for p in stored if p[: len(keys)] == keys}
  if not inside() and keys[0] in pathlib.PurePath(source.path).parts:
    keys = keys[1:]
  if not inside():
    raise ValueError(
        f'{source.path} holds no item {item!r}; it holds '
        f'{", ".join(sorted({p[0] for p in stored})[:8])}. Give one of these, '
        'or no item.'
    )
  return inside()


def _places(
    source: _source.Metadata,
    abstract: _tree.Flat | None,
    item: str | None,
    is_whole: bool = False,
) -> dict[_tree.Path, _tree.Path]:
  """The path in the checkpoint of each wanted leaf."""
  stored = below(source, item)
  if abstract is None:
    model = stored if is_whole else _model_of(stored, source.leaves)
    named = _orbax.without_value_keys(list(model))
    return {name: model[p] for name, p in named.items()}
  wanted = abstract.by_path
  matches = _matches(stored, wanted)
  fitting = {
      prefix: places
      for prefix, places in matches.items()
      if len(places) == len(wanted)
      and all(
          source.leaves[places[n]].shape == x.shape for n, x in wanted.items()
      )
  }
  chosen = _chosen(list(fitting))
  if len(chosen) > 1:
    names = [_tree.name_of(prefix) for prefix in chosen]
    raise ValueError(
        f'{source.path} holds the parameters in several places: '
        f'{" and ".join(names[:6])}. Pass item=NAME (--item NAME), such as '
        f'item={names[0]!r}.'
    )
  if chosen:
    return fitting[chosen[0]]
  best = max(matches.values(), key=len, default={})
  _check_fits(source, wanted, best)
  return best


def _model_of(
    stored: Mapping[_tree.Path, _tree.Path],
    leaves: Mapping[_tree.Path, ShapeDtype],
) -> dict[_tree.Path, _tree.Path]:
  """The leaves of the model, if this is the state of a training.

  Without its optimizer, its counters and keys, and copies of the parameters;
  below `params` or `model`, if all of them are there.
  """
  trees: dict[str, dict[_tree.Path, Any]] = {}
  for path, place in stored.items():
    trees.setdefault('/'.join(path[:1]), {})[path[1:]] = leaves[place].shape
  main = next((key for key in _MODELS if key in trees), None)
  if main is None or main == 'model' and not any(map(_is_optimizer, trees)):
    return dict(stored)
  of_model = {
      key
      for key, tree in trees.items()
      if key == main
      or not _is_optimizer(key)
      and tree.keys() != {()}
      and tree != trees[main]
  }
  num_keys = 1 if of_model == {main} else 0
  return {p[num_keys:]: q for p, q in stored.items() if p[0] in of_model}


def _is_optimizer(key: str) -> bool:
  return bool(re.fullmatch(r'opt(im)?|opt_.*|optimizer.*', key))


def _matches(
    stored: Mapping[_tree.Path, _tree.Path], wanted: Container[_tree.Path]
) -> dict[_tree.Path, dict[_tree.Path, _tree.Path]]:
  """The wanted leaves that are below each prefix, the shallow ones first."""
  matches: dict[_tree.Path, dict[_tree.Path, _tree.Path]] = {}
  for path, place in stored.items():
    # `nnx.State` is stored with a last key that is not a part of the name.
    name = path[:-1] if path[-1:] == ('value',) else path
    for full in {path, name}:
      for n in range(len(full) + 1):
        if full[n:] in wanted:
          matches.setdefault(full[:n], {})[full[n:]] = place
  return dict(sorted(matches.items(), key=lambda item: len(item[0])))


def _chosen(prefixes: Sequence[_tree.Path]) -> Sequence[_tree.Path]:
  """The places that are meant: one, or several if nothing tells which."""
  # Moments of an optimizer have the shapes of the parameters.
  is_moment = lambda p: any(map(_is_optimizer, p))
  outside = [p for p in prefixes if not is_moment(p)]
  params = [p for p in outside if 'params' in p]
  if () in prefixes:
    return [()]
  return params or outside or prefixes


def _check_fits(source, wanted, places) -> None:
  if missing := [_tree.name_of(p) for p in wanted if p not in places]:
    stored = [_tree.name_of(p) for p in source.leaves]
    raise ValueError(
        f'{source.path} lacks leaf {missing[0]!r}'
        + (f' and {len(missing) - 1} more' if len(missing) > 1 else '')
        + f'; it holds {", ".join(stored[:6])}'
        + (f' and {len(stored) - 6} more' if len(stored) > 6 else '')
        + '. Is it another architecture, or does it use other names? Compare '
        'with `jaxsoup inspect`.'
    )
  for name, leaf in wanted.items():
    shape = source.leaves[places[name]].shape
    if tuple(shape) != tuple(leaf.shape):
      raise ValueError(
          f'{source.path}: leaf {_tree.name_of(name)!r} has shape '
          f'{tuple(shape)}, expected {tuple(leaf.shape)}. Is it another model '
          'size, or another head?'
      )
