"""Writes Orbax checkpoints, piece by piece, in the layout of their source.

A chunk of a zarr array without compression is a file with its bytes. So any
process can write any piece of any leaf, and none has to hold more than that.

```
_orbax_files.write(path, leaves, own_fn, fill_fn, layout)
```
"""

import base64
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import json
import math
import time
from typing import Any

from etils import epath
import jax
import numpy as np

from jaxsoup import _json
from jaxsoup import _processes
from jaxsoup import _tree
from jaxsoup.checkpoints import _checksum
from jaxsoup.checkpoints import _orbax_layout
from jaxsoup.checkpoints import _resumable
from jaxsoup.typing import Config
from jaxsoup.typing import Json
from jaxsoup.typing import PathLike
from jaxsoup.typing import ShapeDtype

_SHARDING = '_sharding'
_STRINGS = '_strings.json'
_HANDLER = (
    'orbax.checkpoint._src.handlers.pytree_checkpoint_handler.'
    'PyTreeCheckpointHandler'
)
_MOST_AXES = 32  # Of tensorstore.
# Whoever reads a part of a chunk reads all of it.
_CHUNK_BYTES = 64 << 20
# Files in a step that describe it, such as JSON items, are copied.
_MOST_COPIED = 10 << 20


def write(
    path: PathLike,
    leaves: Mapping[_tree.Path, ShapeDtype],
    own_fn: Callable[[], Config],
    fill_fn: _resumable.FillFn,
    layout: _orbax_layout.Layout = _orbax_layout.BARE,
    key: str | None = None,
) -> None:
  """Writes a checkpoint; it gets its name when it is complete.

  Several processes write into one file system: all call this, and each puts
  what it has.

  Args:
    path: a directory that does not exist yet.
    leaves: shape and dtype of each leaf, by its path in the checkpoint.
    own_fn: what is stored with the arrays, in JSON; called when all is written.
    fill_fn: as of `_resumable.fill`; a piece may be a whole array that is
      sharded over processes, all of which put it.
    layout: of the source, which the checkpoint gets as well.
    key: as of `_resumable.shared`.
  """
  with _resumable.shared(path, key) as folder:
    root = folder / layout.step
    folders = {
        p: root / part.item / _file_name(inside)
        for part, inner in layout.trees({p: p for p in leaves})
        for inside, p in inner.items()
    }
    arrays = {p: _Array(folders[p], x, p) for p, x in leaves.items()}
    if len({array.folder for array in arrays.values()}) < len(leaves):
      raise ValueError(
          'Orbax would confuse leaves of this tree: its keys contain dots that '
          "make two paths equal (such as 'a.b' and {'a': {'b'}}). Rename them."
      )
    with _processes.together():
      if _processes.is_main():
        root.mkdir(parents=True, exist_ok=True)
        _write_root_file(root, layout, {})
    digests = _resumable.fill(folder, arrays, fill_fn, key is not None)
    with _processes.together():
      if _processes.is_main():
        for part, inner in layout.trees(arrays):
          _describe(root / part.item, inner, part)
        checksums = {_tree.name_of(p): x for p, x in digests.items()}
        by_name = {_tree.name_of(p): x for p, x in leaves.items()}
        own = {
            **own_fn(),
            'checksums': checksums,
            'content_hash': _checksum.content_hash(by_name, checksums),
            'items': list(layout.parts),
        }
        _write_root_file(root, layout, own)
        _copy_others(root, layout)
        (root / _orbax_layout.COMMITTED).write_text(
            'The checkpoint is complete.\n'
        )


def _file_name(path: _tree.Path) -> str:
  """The directory of a leaf, which Orbax makes of its keys."""
  name = '.'.join(path)
  parts = name.split('/')
  if '\0' in name or any(p in ('', '.', '..') or len(p) > 255 for p in parts):
    raise ValueError(
        f'Leaf {_tree.name_of(path)!r} cannot be the name of a directory, as '
        'Orbax needs it. Rename it, wrap a bare array in a dict, or save a '
        '.safetensors file.'
    )
  return name


class _Array(_resumable.Array):
  """The files of one array, and the checksum of what is written to them."""

  def __init__(self, folder: epath.Path, leaf: ShapeDtype, path: _tree.Path):
    if len(leaf.shape) > _MOST_AXES:
      raise ValueError(
          f'Leaf {_tree.name_of(path)!r} has {len(leaf.shape)} axes, and Orbax '
          f'stores at most {_MOST_AXES}. Save a .safetensors file.'
      )
    self.folder = folder
    self._leaf, self._dtype = leaf, np.dtype(leaf.dtype)
    self.chunks = self._chunk_shape()
    chunk_bytes = math.prod(self.chunks) * self._dtype.itemsize
    super().__init__(leaf, self._file_of, chunk_bytes)
    self._spread: jax.Array | None = None

  def _chunk_shape(self) -> list[int]:
    leaf: Any = self._leaf
    shape = leaf.shape
    if _processes.is_spread(leaf):  # Each process writes its own.
      return list(leaf.sharding.shard_shape(shape))
    row_bytes = math.prod(shape[1:]) * self._dtype.itemsize
    num_rows = max(1, _CHUNK_BYTES // max(1, row_bytes))
    return [
        max(1, n) for n in (*(min(n, num_rows) for n in shape[:1]), *shape[1:])
    ]

  def create(self) -> None:
    """Writes what says how the files are to be read."""
    is_own = self._dtype.type.__module__ == 'numpy'  # Not of ml_dtypes.
    content = {
        'zarr_format': 2,
        'shape': list(self._leaf.shape),
        'chunks': self.chunks,
        'dtype': self._dtype.str if is_own else self._dtype.name,
        'compressor': None,
        'dimension_separator': '.',
        'fill_value': None,
        'filters': None,
        'order': 'C',
    }
    self.folder.mkdir(parents=True, exist_ok=True)
    (self.folder / '.zarray').write_text(json.dumps(content))

  def _file_of(self, *chunk: int) -> epath.Path:
    """The file of a chunk, of which the last numbers are 0 if not given."""
    numbers = [*chunk, *[0] * (len(self.chunks) - len(chunk))]
    return self.folder / '.'.join(map(str, numbers))

  def put(self, start: int, piece: Any) -> None:
    """Writes a piece, or the part that this process has of a whole array."""
    if not _processes.is_spread(piece):
      super().put(start, piece)
      return
    self._spread = piece
    for shard in piece.addressable_shards:
      if not shard.replica_id:
        starts = [s.indices(n)[0] for s, n in zip(shard.index, piece.shape)]
        chunk = [start // n for start, n in zip(starts, self.chunks)]
        data = _resumable.bytes_of(jax.device_get(shard.data))
        file = self._file_of(*chunk)
        _resumable.write_at(file, data, 0, self._file_bytes)

  def digest(self) -> str | None:
    """The checksum, if the processes, or this one alone, wrote all of it."""
    if self._spread is not None:
      return _checksum.of(self._spread)
    return super().digest()


def _describe(
    tree: epath.Path,
    arrays: Mapping[_tree.Path, _Array],
    layout: _orbax_layout.Layout,
) -> None:
  """What Orbax reads of a tree: its keys, and for a source its shardings."""
  stored = layout.rows.items()
  left_out = {
      p[:1]
      for p, x in stored
      if p not in arrays and not _orbax_layout.is_empty(x)
  }
  rows = {
      p: row
      for p, row in stored
      if p in arrays or _orbax_layout.is_empty(row) and p[:1] not in left_out
  }
  rows |= {p: _new_row(p) for p in arrays if p not in rows}
  content = {
      'tree_metadata': {str(p): row for p, row in rows.items()},
      'use_ocdbt': False,
      'use_zarr3': False,
      'store_array_data_equal_to_fill_value': True,
      'custom_metadata': layout.custom,
  }
  (tree / _orbax_layout.TREE_FILE).write_text(json.dumps(content))
  names = {'.'.join(p): array.chunks for p, array in arrays.items()}
  if described := layout.arrays():
    kept = [
        {**row, 'write_shape': names[name], 'chunk_shape': names[name]}
        for name, row in described.items()
        if name in names
    ]
    (tree / _orbax_layout.ARRAYS).mkdir(exist_ok=True)
    content = {'array_metadatas': [{'array_metadata': row} for row in kept]}
    (tree / _orbax_layout.ARRAYS / 'process_0').write_text(json.dumps(content))
  file = layout.root and layout.root / layout.item / _SHARDING
  if file and file.exists():
    known = _json.parsed(file.read_bytes())
    encoded = {base64.b64encode(name.encode()).decode() for name in names}
    shardings = {name: x for name, x in known.items() if name in encoded}
    (tree / _SHARDING).write_text(json.dumps(shardings))
  file = layout.root and layout.root / layout.item / _STRINGS
  if file and file.exists():
    file.copy(tree / _STRINGS)


def _new_row(path: _tree.Path) -> Json:
  return {
      'key_metadata': [{'key': key, 'key_type': 2} for key in path],
      'value_metadata': {
          'value_type': 'np.ndarray', 'skip_deserialize': False
      },  # fmt: skip
  }


def _write_root_file(
    root: epath.Path, layout: _orbax_layout.Layout, own: Json
) -> None:
  """`_CHECKPOINT_METADATA`, with what is stored with the arrays."""
  described: Json = {'item_handlers': _HANDLER, 'custom_metadata': {}}
  file = layout.root and layout.root / _orbax_layout.ROOT_FILE
  if file and file.exists():
    described = _json.parsed(file.read_bytes())
  handlers = described.get('item_handlers')
  if isinstance(handlers, dict):
    others = (p.name for p in layout.items() if not _orbax_layout.is_tree(p))
    kept = {layout.item, *layout.parts, *others}
    handlers = {name: x for name, x in handlers.items() if name in kept}
  custom = dict(described.get('custom_metadata') or {})
  custom.pop('jaxsoup', None)
  now = time.time_ns()
  content = {
      'item_handlers': handlers,
      'metrics': {},
      'performance_metrics': {},
      'init_timestamp_nsecs': now,
      'commit_timestamp_nsecs': now,
      'custom_metadata': {
          **custom,
          **({'jaxsoup': _json.sealed(own)} if own else {}),
      },
  }
  (root / _orbax_layout.ROOT_FILE).write_text(json.dumps(content))


def _copy_others(root: epath.Path, layout: _orbax_layout.Layout) -> None:
  """Copies what describes the step of the source: small files, JSON items."""
  if layout.root is None or not (layout.item or layout.parts):
    return
  files = [p for p in layout.root.iterdir() if p.is_file()]
  for item in layout.items():
    files += [] if _orbax_layout.is_tree(item) else _files_below(item)
  for file in files:
    new = root / file.relative_to(layout.root)
    if not new.exists() and file.stat().length <= _MOST_COPIED:
      new.parent.mkdir(parents=True, exist_ok=True)
      file.copy(new)


def _files_below(folder: epath.Path) -> Iterator[epath.Path]:
  for path in sorted(folder.iterdir()):
    yield from _files_below(path) if path.is_dir() else [path]
