"""Reads and writes Orbax checkpoints: layouts, metadata, checksums."""

from collections.abc import Iterator
import contextlib
import errno
import itertools
import os
import pathlib
import re
from typing import Any

from absl import logging
from etils import epath
import jax
import numpy as np
import tensorstore

from jaxsoup import _files
from jaxsoup import _json
from jaxsoup import _processes
from jaxsoup import _tree
from jaxsoup import _warnings
from jaxsoup.checkpoints import _checksum
from jaxsoup.checkpoints import _source
from jaxsoup.typing import Array
from jaxsoup.typing import Json
from jaxsoup.typing import Leaf
from jaxsoup.typing import Params
from jaxsoup.typing import PathLike

# A directory with this file holds one pytree, written by Orbax v0, by v1
# (below `state/`) or a CheckpointManager (below `STEP/ITEM/`).
_PYTREE_FILE = '_METADATA'
_UNFINISHED = '.orbax-checkpoint-tmp'
_COMMITTED = 'commit_success.txt'
# What is looked at before a directory is too large to be a run's.
_MOST_DIRECTORIES = 10_000
_DEEPEST = 8
_MOST_AXES = 32  # Of tensorstore.


class OnDisk(np.memmap):
  """An array that stays in its file while it is saved.

  Orbax would first copy the whole model on the host, in case its arrays change
  while it writes.
  """

  def __deepcopy__(self, memo: object) -> 'OnDisk':
    return self


def resolve(path: PathLike, item: str | None = None) -> epath.Path:
  """The directory of the pytree of a checkpoint, step, run or manager."""
  root = absolute(path)
  if not root.exists():
    raise FileNotFoundError(
        f'{root} does not exist.{_siblings(root)} Give a checkpoint or a run '
        'directory.'
    )
  resolved = _resolve(root, item, itertools.count())
  if resolved is None:
    if _UNFINISHED in root.name or any(
        _UNFINISHED in p.name for p in _directories(root)
    ):
      raise FileNotFoundError(
          f'{root} holds only an unfinished checkpoint (its writer was '
          'stopped). Delete it, and save that run again.'
      )
    raise FileNotFoundError(
        f'{root} holds no Orbax checkpoint: neither it nor a directory below it'
        f' has a file {_PYTREE_FILE}. Give a checkpoint or a run directory.'
    )
  return resolved


def absolute(path: PathLike) -> epath.Path:
  """The path from the root, or in its bucket."""
  given = epath.Path(path)
  # `absolute` would turn `gs://` paths into local ones.
  return given if '://' in str(given) else given.absolute()


def _resolve(
    path: epath.Path, item: str | None, counter: Iterator[int], depth: int = 0
) -> epath.Path | None:
  """The checkpoint at or below a directory; raises where it is too large."""
  if _UNFINISHED in path.name:
    return None
  if next(counter) > _MOST_DIRECTORIES:
    raise ValueError(
        f'There is no checkpoint in the first {_MOST_DIRECTORIES:,} '
        f'directories that were searched, the last one {path.name}. Give the '
        'path of a checkpoint or of a run.'
    )
  if (path / _PYTREE_FILE).exists():
    return path
  directories = _directories(path) if depth < _DEEPEST else []
  children = {
      child.name: resolved
      for child in directories
      if (resolved := _resolve(child, item, counter, depth + 1)) is not None
  }
  unfinished = [p.name for p in directories if _UNFINISHED in p.name]
  if children and unfinished:
    _warnings.warn(
        f'{path}: {", ".join(unfinished)} is unfinished (its writer was '
        'stopped) and is skipped. Delete it, or save that step again.'
    )
  if item and item.partition('/')[0] in children:
    return children[item.partition('/')[0]]
  steps = {
      int(match[1]): resolved
      for name, resolved in children.items()
      if (match := re.fullmatch(r'(?:.*[_-])?(\d+)', name))
  }
  if steps and len(steps) == len(children):
    # Where a step has the file that Orbax writes last in a bucket, steps that
    # lack it are not finished, for Orbax neither.
    marked = {n for n in steps if (path / str(n) / _COMMITTED).exists()}
    return steps[max(marked or steps)]
  for usual in ('params', 'state', 'default'):
    if usual in children and item is None:
      return children[usual]
  if len(children) > 1:
    raise ValueError(
        f'{path} holds several checkpoints: {sorted(children)}. Give the path '
        'of one, or item=NAME (--item NAME).'
    )
  return next(iter(children.values()), None)


def _directories(path: epath.Path) -> list[epath.Path]:
  if '://' in str(path):
    return sorted(p for p in path.iterdir() if p.is_dir())
  try:
    with os.scandir(path) as entries:  # Tells without asking for each.
      return sorted(epath.Path(e.path) for e in entries if e.is_dir())
  except OSError as e:
    if e.errno in (errno.EACCES, errno.ELOOP, errno.ENOENT, errno.EPERM):
      return []
    raise


def _siblings(path: epath.Path) -> str:
  if not path.parent.exists():
    return f' Nor does {path.parent}.'
  names = [p.name for p in _directories(path.parent)]
  return f' Its parent holds {", ".join(names[:8])}.' if names else ''


def open_source(path: epath.Path) -> _source.Source:
  """Opens the directory of a pytree, leaf by leaf, through tensorstore.

  Much faster than restoring the whole tree, with the memory of one leaf.
  """
  try:
    layout = _json.parsed((path / _PYTREE_FILE).read_bytes())
    rows = list(layout['tree_metadata'].values())
    stored = {
        tuple(str(key['key']) for key in row['key_metadata'])
        for row in rows
        if not row['value_metadata'].get('skip_deserialize')
    }
    described = _describe(path)
    custom = dict(described.get('custom_metadata') or {})
    own = _source.own_of(custom.get('jaxsoup', {}))
    arrays = _open_arrays(path, layout, sorted(stored))
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise _source.damaged(path, e) from e
  if not arrays:
    raise _source.damaged(path, 'it lists no leaves')
  metadata = _source.Metadata(
      path=str(path),
      leaves={
          p: jax.ShapeDtypeStruct(x.shape, x.dtype.numpy_dtype)
          for p, x in arrays.items()
      },
      custom={**custom, **({'jaxsoup': own} if own else {})},
      checksums=own.get('checksums') or {},
      identity=own.get('content_hash')
      or str(described.get('init_timestamp_nsecs')),
  )

  def reader_of(leaf_path):
    array = arrays[leaf_path]

    def read(index):
      try:
        return np.asarray(array[index].read().result())
      except ValueError as e:
        raise _source.damaged(path, e) from e

    return read

  def rows_of(leaf_path):
    # A chunk is decoded as a whole.
    chunk = arrays[leaf_path].chunk_layout.read_chunk.shape or (1,)
    return max(chunk[0], 1)

  return _source.Source(metadata, reader_of, rows_of)


def _open_arrays(path, layout, leaf_paths) -> dict[_tree.Path, Any]:
  """The stored arrays, opened in parallel."""
  context = tensorstore.Context()
  is_ocdbt = layout.get('use_ocdbt', True)
  opened = {}
  for leaf_path in leaf_paths:
    name = '.'.join(leaf_path)
    spec: Json = {
        'driver': 'zarr3' if layout.get('use_zarr3') else 'zarr',
        'kvstore': (
            {'driver': 'ocdbt', 'base': _kvstore(path), 'path': f'{name}/'}
            if is_ocdbt
            else _kvstore(path / name)
        ),
    }
    if layout.get('store_array_data_equal_to_fill_value'):
      spec['fill_missing_data_reads'] = False  # Or a lost chunk reads as zeros.
    opened[leaf_path] = tensorstore.open(spec, context=context, read=True)
  return {p: future.result() for p, future in opened.items()}


def _kvstore(path: epath.Path) -> str | dict[str, str]:
  """A directory for tensorstore: of a bucket by its URL."""
  if '://' in str(path):
    return f'{path}/'
  return {'driver': 'file', 'path': f'{path}/'}


def _describe(path: epath.Path) -> Json:
  """`_CHECKPOINT_METADATA`, which a manager writes one level up."""
  for directory in (path, path.parent):
    file = directory / '_CHECKPOINT_METADATA'
    if file.exists():
      return _json.parsed(file.read_bytes())
  return {}


def without_value_keys(paths: list[_tree.Path]) -> dict[_tree.Path, _tree.Path]:
  """Stored paths by the name of the leaf: `nnx.State` is stored with a last
  key `value`, which is not a part of the name.
  """
  if paths and all(path[-1:] == ('value',) for path in paths):
    return {path[:-1]: path for path in paths}
  return {path: path for path in paths}


def write(path: PathLike, params: Params, custom: Json) -> epath.Path:
  """Writes a tree as nested dicts, with a checksum for each leaf.

  It gets its name only when it is complete.
  """
  root = absolute(path)
  if root.exists():
    raise FileExistsError(
        f'{root} exists and is not overwritten. Delete it, or give another '
        'path.'
    )
  import orbax.checkpoint as ocp  # Slow to import, not needed for reading.

  arrays = savable(params)
  dotted = {'.'.join(p) for p in arrays}
  if len(dotted) < len(arrays) or () in arrays:
    raise ValueError(
        'Orbax would confuse leaves of this tree: its keys contain dots that '
        "make two paths equal (such as 'a.b' and {'a': {'b'}}), or it is a "
        'bare array. Rename the keys, or wrap it in a dict.'
    )
  by_name = {_tree.name_of(p): x for p, x in arrays.items()}
  if odd := [n for n, x in by_name.items() if x.ndim > _MOST_AXES]:
    raise ValueError(
        f'Leaf {odd[0]!r} has {by_name[odd[0]].ndim} axes, and Orbax stores at '
        f'most {_MOST_AXES}. Save a .safetensors file.'
    )
  checksums = {name: _checksum.of(x) for name, x in by_name.items()}
  own = {
      'checksums': checksums,
      'content_hash': _checksum.content_hash(by_name, checksums),
      **custom.pop('jaxsoup', {}),
  }
  _processes.wait_for_all('every process has seen that the path is free')
  with _quiet(), _cleared(root):
    # Compression saves 7 % of the bytes and takes most of the time.
    ocp.PyTreeCheckpointer(use_compression=False).save(
        root,
        _tree.nest(arrays),
        custom_metadata={'jaxsoup': _json.sealed(own), **custom},
    )
  return root


def savable(params: Params) -> dict[_tree.Path, Array]:
  """The leaves of a tree as they can be saved, by path."""
  leaves = _tree.flatten_in_place(params).by_path
  return {path: _savable(leaf, path) for path, leaf in leaves.items()}


def _savable(leaf: Leaf, path: _tree.Path) -> Array:
  """On the host, unless it is sharded over processes, which all write."""
  if isinstance(leaf, OnDisk):
    return leaf
  if isinstance(leaf, np.ndarray):  # As it is: a device may have no float64.
    return _tree.as_numbers(leaf, path)
  leaf = _tree.on_device(leaf, path)
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    raise TypeError(
        f'Leaf {_tree.name_of(path)!r} is a PRNG key, not a parameter. '
        'Save parameters only: nnx.state(model, nnx.Param).'
    )
  if leaf.is_fully_addressable or leaf.is_fully_replicated:
    return np.asarray(jax.device_get(leaf))
  return leaf


@contextlib.contextmanager
def _cleared(root: epath.Path) -> Iterator[None]:
  """Leaves nothing of a save that failed; of a bucket Orbax does it later."""
  try:
    yield
  except Exception:
    if '://' not in str(root) and _processes.is_main():
      _files.clear_leftovers(pathlib.Path(root).parent, root.name)
    raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences Orbax, which logs every step, and its errors before it raises."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.FATAL)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)
