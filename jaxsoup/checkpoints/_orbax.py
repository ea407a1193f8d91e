"""Reads Orbax checkpoints: which one is meant, its metadata, its arrays."""

from collections.abc import Iterator
import errno
import itertools
import math
import os
import re
from typing import Any

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
from jaxsoup.checkpoints import _orbax_layout
from jaxsoup.checkpoints import _raw
from jaxsoup.checkpoints import _source
from jaxsoup.typing import Array
from jaxsoup.typing import Json
from jaxsoup.typing import Leaf
from jaxsoup.typing import Params
from jaxsoup.typing import PathLike

# A directory with this file holds one pytree, written by Orbax v0, by v1
# (below `state/`) or a CheckpointManager (below `STEP/ITEM/`).
_PYTREE_FILE = _orbax_layout.TREE_FILE
UNFINISHED = '.orbax-checkpoint-tmp'
# What is looked at before a directory is too large to be a run's.
_MOST_DIRECTORIES = 10_000
_DEEPEST = 8


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
    if UNFINISHED in root.name or any(
        UNFINISHED in p.name for p in _directories(root)
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
  if UNFINISHED in path.name:
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
  unfinished = [p.name for p in directories if UNFINISHED in p.name]
  if children and unfinished:
    _warnings.warn(
        f'{path}: {", ".join(unfinished)} is unfinished (its writer was '
        'stopped) and is skipped. Delete it, or save that step again.'
    )
  if len(children) > 1:
    children = {
        name: resolved
        for name, resolved in children.items()
        if resolved.parent != path or _orbax_layout.is_tree(resolved)
    }
  if item and item.partition('/')[0] in children:
    return children[item.partition('/')[0]]
  steps = {
      int(match[1]): path / name
      for name in children
      if (match := re.fullmatch(r'(?:.*[_-])?(\d+)', name))
  }
  if steps and len(steps) == len(children):
    whole = _orbax_layout.finished(steps)
    return children[whole[max(whole)].name]
  for usual in ('params', 'model_params', 'state', 'default', 'pytree'):
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


def open_whole(path: epath.Path) -> _source.Source:
  """Opens all trees of a step as one, their names before their paths."""
  source = open_source(path)
  others = filter(_orbax_layout.is_tree, source.layout.items())
  sources = {p.name: open_source(p) for p in (path, *others)}
  if len(sources) == 1:
    return source
  of_all = lambda fn: {k: x for n, s in sources.items() for k, x in fn(n, s)}
  metadata = source.metadata._replace(
      leaves=of_all(
          lambda n, s: (((n, *p), x) for p, x in s.metadata.leaves.items())
      ),
      checksums=of_all(
          lambda n, s: (
              (f'{n}/{name}', x) for name, x in s.metadata.checksums.items()
          )
      ),
  )
  parts = {name: s.layout for name, s in sources.items()}
  layout = source.layout._replace(item='', rows={}, parts=parts)
  return _source.Source(
      metadata,
      reader_fn=lambda p: sources[p[0]].reader_fn(p[1:]),
      rows_fn=lambda p: sources[p[0]].rows_fn(p[1:]),
      layout=layout,
  )


def open_source(path: epath.Path) -> _source.Source:
  """Opens the directory of a pytree, leaf by leaf, through tensorstore.

  Much faster than restoring the whole tree, with the memory of one leaf.
  """
  try:
    layout = _json.parsed((path / _PYTREE_FILE).read_bytes())
    rows = list(layout['tree_metadata'].values())
    stored = {
        _orbax_layout.path_of(row)
        for row in rows
        if not _orbax_layout.is_empty(row)
    }
    described = _describe(path)
    custom = dict(described.get('custom_metadata') or {})
    own = _of_item(path.name, _source.own_of(custom.get('jaxsoup', {})))
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
      or own.get('identity')
      or str(described.get('init_timestamp_nsecs')),
  )

  raw = {p: _raw_files(path / '.'.join(p), a) for p, a in arrays.items()}

  def reader_of(leaf_path):
    array = arrays[leaf_path]
    if files := raw[leaf_path]:
      return _raw.chunked_reader(files)

    def read(index):
      try:
        return np.asarray(array[index].read().result())
      except ValueError as e:
        raise _source.damaged(path, e) from e

    return read

  def rows_of(leaf_path):
    # A chunk is decoded as a whole.
    if raw[leaf_path]:
      return 1
    chunk = arrays[leaf_path].chunk_layout.read_chunk.shape or (1,)
    return max(chunk[0], 1)

  _check_described(metadata)
  place = _orbax_layout.Layout.of(path, layout)
  return _source.Source(metadata, reader_of, rows_of, layout=place)


def _of_item(name: str, own: Json) -> Json:
  """What we stored with the arrays of one of several items."""
  if name not in own.get('items', ()):
    return own
  sums = own.pop('checksums').items()
  inside = {
      n.removeprefix(f'{name}/'): x for n, x in sums if n.startswith(f'{name}/')
  }
  identity = f'{own.pop("content_hash")}/{name}'
  return {**own, 'checksums': inside, 'identity': identity}


def _check_described(metadata: _source.Metadata) -> None:
  """Raises if names, shapes or dtypes are not those that we stored."""
  own, sums = metadata.custom.get('jaxsoup', {}), metadata.checksums
  by_name = {_tree.name_of(p): x for p, x in metadata.leaves.items()}
  if 'content_hash' not in own or not all(
      map(_checksum.is_current, sums.values())
  ):
    return
  if sums.keys() != by_name.keys() or own['content_hash'] != (
      _checksum.content_hash(by_name, sums)
  ):
    raise _source.damaged(
        metadata.path, 'its leaves are not those that were stored'
    )


def _raw_files(folder: epath.Path, array: Any) -> list[_raw.Array]:
  """Files that hold nothing but rows of an array, as ours do; or none."""
  if _files.is_remote(folder) or not (folder / '.zarray').exists():
    return []
  spec = array.spec().to_json()['metadata']
  shape, columns = array.shape, array.shape[1:]
  num_rows, *others = spec['chunks'] or [0]
  is_coded = spec['compressor'] or spec['filters'] or spec['order'] != 'C'
  is_raw = not (is_coded or spec['dtype'].startswith('>'))
  if not (is_raw and shape and tuple(others) == columns):
    return []
  rest = ''.join('.0' for _ in columns)
  dtype = array.dtype.numpy_dtype
  files = [
      _raw.Array(f'{folder}/{i}{rest}', 0, (num_rows, *columns), dtype)
      for i in range(math.ceil(shape[0] / num_rows))
  ]
  for file in files if array.size else ():
    size = os.stat(file.file).st_size if os.path.exists(file.file) else 0
    if size != file.num_bytes:
      raise _source.damaged(
          file.file, f'it has {size:,} bytes, expected {file.num_bytes:,}'
      )
  return files


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
    file = directory / _orbax_layout.ROOT_FILE
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


def savable(params: Params) -> dict[_tree.Path, Array]:
  """The leaves of a tree as they can be saved, by path."""
  leaves = _tree.flatten_in_place(params).by_path
  return {path: _savable(leaf, path) for path, leaf in leaves.items()}


def _savable(leaf: Leaf, path: _tree.Path) -> Array:
  """On the host, unless it is sharded over processes, which all write."""
  if isinstance(leaf, np.ndarray):  # As it is: a device may have no float64.
    return _tree.as_numbers(leaf, path)
  leaf = _tree.on_device(leaf, path)
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    raise TypeError(
        f'Leaf {_tree.name_of(path)!r} is a PRNG key, not a parameter. '
        'Save parameters only: nnx.state(model, nnx.Param).'
    )
  is_spread = _processes.is_spread(leaf)
  return leaf if is_spread else np.asarray(jax.device_get(leaf))
