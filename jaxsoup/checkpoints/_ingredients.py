"""Ingredients: a lazy sequence over checkpoints."""

from collections.abc import Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np

from jaxsoup import _tree
from jaxsoup._soup import Params
from jaxsoup.checkpoints import _orbax


class Ingredients(Sequence):
  """Parameters in Orbax checkpoints, read when they are indexed.

  Pass it to any recipe in place of a list. While a recipe works on one
  ingredient the next one is read in the background.

  Example:
    >>> import tempfile
    >>> from jaxsoup import checkpoints
    >>> run = tempfile.mkdtemp() + '/run'
    >>> _ = checkpoints.save(run, {'w': np.ones(2, np.float32)})
    >>> abstract_params = {'w': jax.ShapeDtypeStruct((2,), 'float32')}
    >>> Ingredients([run], abstract_params)[0]
    {'w': Array([1., 1.], dtype=float32)}

  Attributes:
    paths: the directories that hold the pytrees, as strings.
  """

  def __init__(
      self,
      paths: Sequence[Any],
      abstract_params: Params | None = None,
      *,
      item: str | None = None,
  ):
    """Finds the checkpoints; reads no arrays.

    Args:
      paths: one for each ingredient: a checkpoint (of Orbax v0 or v1); a run
        directory, whose latest finished step is taken; or a directory of a
        `CheckpointManager`, or of one of its steps.
      abstract_params: parameters as `jax.ShapeDtypeStruct` (from
        `jax.eval_shape`, see also `sharding.fsdp`): what to read, in which
        container, dtypes and shardings. They may lie inside a larger train
        state. None reads what lies below `params`, or all, as nested dicts.
      item: which item of a step that holds several; 'params', 'state' or
        'default' is found by itself.

    Raises:
      FileNotFoundError: a path without a finished checkpoint.
      ValueError: several checkpoints under one path.
      TypeError: one path in place of a list.
    """
    if isinstance(paths, (str, bytes)) or not hasattr(paths, '__len__'):
      raise TypeError(f'paths must be a list of paths, not {paths!r}.')
    self._resolved = [_orbax.resolve(path, item) for path in paths]
    self.paths = tuple(str(path) for path in self._resolved)
    self._abstract = (
        None if abstract_params is None else _tree.flatten(abstract_params)
    )
    self._metadata: dict[int, _orbax.Metadata] = {}
    self._hashes: dict[int, str] = {}
    self._pending: tuple[int, futures.Future] | None = None
    # One thread: it also keeps the reads out of the caller's mesh context,
    # which has broken restores.
    self._reader = futures.ThreadPoolExecutor(1, 'jaxsoup-reader')

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, k):
    if isinstance(k, slice):
      return [self[i] for i in range(len(self))[k]]
    k = range(len(self))[k]
    if self._pending is not None and self._pending[0] == k:
      future = self._pending[1]
    else:
      future = self._reader.submit(self._read, k)
    self._pending = None
    return future.result()

  def __iter__(self):
    for k in range(len(self)):
      params = self[k]
      if k + 1 < len(self):
        self.prefetch(k + 1)
      yield params

  def prefetch(self, k: int) -> None:
    """Begins to read ingredient k, which `self[k]` will return."""
    if self._pending is None or self._pending[0] != k:
      self._pending = k, self._reader.submit(self._read, k)

  def metadata(self, k: int) -> _orbax.Metadata:
    """Shapes, dtypes and stored metadata of ingredient k; reads no array."""
    if k not in self._metadata:
      self._metadata[k] = _orbax.metadata(self._resolved[k])
    return self._metadata[k]

  def content_hash(self, k: int) -> str:
    """A hash of the parameters of ingredient k, which are read if need be."""
    if k not in self._hashes:
      self[k]
    return self._hashes[k]

  def identity(self, k: int) -> str:
    """A text that changes when ingredient k is written anew; reads no array."""
    return self.metadata(k).identity

  def _read(self, k: int) -> Params:
    source = self.metadata(k)
    stored = self._stored_paths(source)
    arrays = _orbax.read(source, list(stored.values()))
    by_name = {name: arrays[path] for name, path in stored.items()}
    self._hashes[k] = _orbax.content_hash(by_name)
    if self._abstract is None:
      return _tree.nest(jax.device_put(by_name))
    return self._abstract.replace(
        _placed(by_name[path], leaf)
        for path, leaf in zip(self._abstract.paths, self._abstract.leaves)
    )

  def _stored_paths(
      self, source: _orbax.Metadata
  ) -> dict[_tree.Path, _tree.Path]:
    """Where in the checkpoint each leaf of the parameters lies."""
    if self._abstract is None:
      paths = list(source.leaves)
      inside = [path for path in paths if path[0] == 'params']
      named = _orbax.without_value_keys(inside or paths)
      return {n[1:] if inside else n: p for n, p in named.items()}
    wanted = dict(zip(self._abstract.paths, self._abstract.leaves))
    best: dict[_tree.Path, _tree.Path] = {}
    for prefix in _prefixes(source.leaves):
      below = [p for p in source.leaves if p[: len(prefix)] == prefix]
      named = _orbax.without_value_keys(below)
      named = {name[len(prefix) :]: path for name, path in named.items()}
      found = {name: named[name] for name in wanted if name in named}
      if len(found) > len(best):
        best = found
      if len(best) == len(wanted):
        break
    _check_fits(source, wanted, best)
    return best


def _prefixes(paths) -> list[_tree.Path]:
  """Every subtree, the shallow ones and those named params first."""
  prefixes = {p[:n] for p in paths for n in range(len(p) + 1)}
  return sorted(prefixes, key=lambda p: (len(p), 'params' not in p, p))


def _check_fits(source, wanted, found) -> None:
  missing = [_tree.name_of(p) for p in wanted if p not in found]
  if missing:
    stored = [_tree.name_of(p) for p in source.leaves]
    raise ValueError(
        f'{source.path} lacks leaf {missing[0]!r}'
        + (f' and {len(missing) - 1} more' if len(missing) > 1 else '')
        + f'; it holds {", ".join(stored[:6])}'
        + (f' and {len(stored) - 6} more' if len(stored) > 6 else '')
        + '. Compare with `jaxsoup inspect`: another architecture, or other '
        'names?'
    )
  for name, leaf in wanted.items():
    shape = source.leaves[found[name]].shape
    if tuple(shape) != tuple(leaf.shape):
      raise ValueError(
          f'{source.path}: leaf {_tree.name_of(name)!r} has shape '
          f'{tuple(shape)}, expected {tuple(leaf.shape)}. Is it of another '
          'size, or with another head?'
      )


def _placed(array: np.ndarray, abstract: Any) -> jax.Array:
  """An array in the dtype and sharding that were asked for."""
  sharding = getattr(abstract, 'sharding', None)
  return jax.device_put(array.astype(abstract.dtype, copy=False), sharding)
