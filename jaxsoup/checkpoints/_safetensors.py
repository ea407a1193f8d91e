"""Reads and writes safetensors: one file, or several with an index."""

from collections.abc import Callable
from collections.abc import Mapping
import json
import math
import pathlib
import struct

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup import _files
from jaxsoup import _json
from jaxsoup import _processes
from jaxsoup import _tree
from jaxsoup.checkpoints import _checksum
from jaxsoup.checkpoints import _raw
from jaxsoup.checkpoints import _resumable
from jaxsoup.checkpoints import _sharded
from jaxsoup.checkpoints import _source
from jaxsoup.runtime import buckets
from jaxsoup.typing import Config
from jaxsoup.typing import DType
from jaxsoup.typing import Json
from jaxsoup.typing import PathLike
from jaxsoup.typing import ShapeDtype

_DTYPES = {
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16,
    'BF16': jnp.bfloat16, 'F8_E4M3': jnp.float8_e4m3fn,
    'F8_E5M2': jnp.float8_e5m2,
    'I64': np.int64, 'I32': np.int32,
    'I16': np.int16, 'I8': np.int8, 'U64': np.uint64, 'U32': np.uint32,
    'U16': np.uint16, 'U8': np.uint8, 'BOOL': np.bool_, 'C64': np.complex64,
    'F8_E8M0': jnp.float8_e8m0fnu, 'F8_E4M3FNUZ': jnp.float8_e4m3fnuz,
    'F8_E5M2FNUZ': jnp.float8_e5m2fnuz,
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_INDEX = '.safetensors' + _sharded.ENDING
ENDINGS = ('.safetensors', _INDEX)
_MOST_HEADER_BYTES = 100_000_000  # The limit of the format.


def find(path: pathlib.Path) -> pathlib.Path | None:
  """The file to open: the index or the only `.safetensors` in a directory."""
  if path.is_file():
    return path if path.name.endswith(ENDINGS) else None
  # A pipe or a device of that name would be read for ever.
  files_like = lambda x: sorted(p for p in path.glob(x) if p.is_file())
  indices = files_like('*' + _INDEX)
  if len(indices) == 1:
    return indices[0]
  files = [path / 'model.safetensors', *files_like('*.safetensors')]
  if files[0].is_file() or len(files) == 2:
    return files[0] if files[0].is_file() else files[1]
  if len(files) > 2:
    raise ValueError(
        f'{path} holds {len(files) - 1} .safetensors files but no index '
        f'(model{_INDEX}). Give the path of one.'
    )
  return None


def open_source(path: pathlib.Path) -> _source.Source:
  """Opens a file, or an index and its files; reads only headers."""
  if path.name.endswith(_INDEX):
    return _sharded.open_source(path, _open_file)
  return _open_file(path)


def _open_file(path: pathlib.Path) -> _source.Source:
  file = _raw.File(path)
  arrays, texts, own = _header(path, file)
  stored = own.get('checksums') or {}
  # A name that was changed by damage has no checksum.
  if odd := [n for n in arrays if stored and n not in stored]:
    raise _source.damaged(path, f'{odd[0]!r} is not among its checksums')
  by_path = dict(zip(_source.paths_of(arrays, '.'), arrays.values()))
  metadata = _source.Metadata(
      path=str(path),
      leaves={
          p: jax.ShapeDtypeStruct(t.shape, t.dtype) for p, t in by_path.items()
      },
      custom={**texts, **({'jaxsoup': own} if own else {})},
      checksums={
          _tree.name_of(p): stored[n]
          for p, n in zip(by_path, arrays)
          if n in stored
      },
      identity=own.get('content_hash') or _source.state_of(path),
  )
  return _source.Source(
      metadata,
      reader_fn=lambda p: _raw.reader(by_path[p], file.read),
      separator='.',
  )


def _header(
    path: pathlib.Path, file: _raw.File
) -> tuple[dict[str, _raw.Array], dict[str, str], Json]:
  """The tensors of one file, checked against its size; metadata of others,
  and our own.
  """
  length = num_bytes = buckets.stat(path)[0]
  if num_bytes >= 8:
    length = struct.unpack('<Q', file.bytes(0, 8))[0]
  if length > min(num_bytes - 8, _MOST_HEADER_BYTES):
    raise _source.damaged(path, f'its header declares {length:,} bytes')
  header = file.bytes(8, length)
  try:
    rows = _json.parsed(header, object_pairs_hook=_without_repeats)
    metadata = dict(rows.pop('__metadata__', None) or {})
    if not all(isinstance(text, str) for text in metadata.values()):
      raise TypeError('its metadata are not all strings')
    stored = _json.parsed(metadata.pop('jaxsoup', '{}'))
    own = _source.own_of(stored)
    sums = own.get('checksums') or {}
    if sums and own == stored:  # Of an older version, with other names.
      own['checksums'] = {n.replace('/', '.'): s for n, s in sums.items()}
    dtypes = {str(row['dtype']): n for n, row in rows.items()}
    unknown = sorted(dtypes.keys() - _DTYPES)
    tensors = {
        n: _tensor(str(path), 8 + length, row)
        for n, row in rows.items()
        if row['dtype'] not in unknown
    }
    offsets = [row['data_offsets'] for row in rows.values()]
    _check_offsets(offsets, num_bytes - 8 - length)
  except (
      AttributeError, KeyError, RecursionError, TypeError, ValueError
  ) as e:  # fmt: skip
    raise _source.damaged(path, f'its header is wrong: {e}') from e
  if unknown:  # Of less than a byte, or later than this reader.
    raise ValueError(
        f'{path} cannot be read: {dtypes[unknown[0]]!r} has dtype '
        f'{unknown[0]!r}, which is not supported. Convert it to one of '
        f'{", ".join(_DTYPES)}.'
    )
  if not tensors:
    raise _source.damaged(path, 'it holds no arrays')
  return tensors, metadata, own


def _without_repeats(pairs: list[tuple[str, object]]) -> Json:
  if len(dict(pairs)) < len(pairs):
    raise ValueError('two of its entries have the same name')
  return dict(pairs)


def _tensor(file: str, start: int, row: Config) -> _raw.Array:
  dtype = np.dtype(_DTYPES[row['dtype']])
  if not isinstance(row['shape'], list):
    raise TypeError(f'the shape {row["shape"]!r} is not a list')
  shape, (begin, end) = map(_integers, (row['shape'], row['data_offsets']))
  if min((*shape, 0)) < 0 or math.prod(shape) * dtype.itemsize != end - begin:
    raise ValueError(
        f'a tensor of shape {list(shape)} and dtype {dtype} has {end - begin} '
        'bytes'
    )
  return _raw.Array(file, start + begin, shape, dtype)


def _integers(values: list[object]) -> tuple[int, ...]:
  if not all(type(n) is int for n in values):
    raise TypeError(f'{values!r} are not integers')
  return tuple(values)  # type: ignore[arg-type]


def _check_offsets(offsets: list[list[int]], num_bytes: int) -> None:
  """Tensors follow one another without gaps, to the end of the file."""
  end = 0
  for begin, next_end in sorted(offsets):
    if begin != end:
      raise ValueError(f'a tensor begins at {begin}, expected {end}')
    end = next_end
  if end != num_bytes:
    raise ValueError(f'the tensors end at {end:,}, the file at {num_bytes:,}')


class _File:
  """A new file: `start` is the byte at which its arrays begin."""

  def __init__(self, leaves, own, num_more):
    self._leaves, self._rows, self._end = leaves, {}, 0
    for p, x in leaves.items():
      begin, self._end = self._end, self._end + _tree.num_bytes(x)
      self._rows['.'.join(p)] = {
          'dtype': _dtype_name(x.dtype, p),
          'shape': list(x.shape),
          'data_offsets': [begin, self._end],
      }
    if len(self._rows) < len(leaves):
      raise ValueError(
          'Two leaves would have the same name: keys contain dots, such as '
          "'a.b' and {'a': {'b'}}. Rename the keys."
      )
    # The checksums come last, and are as long as their placeholders.
    header = _header_bytes(self._rows, leaves, own, {}, num_more)
    self.start = 8 + len(header)

  def array(self, file: PathLike, p: _tree.Path) -> _resumable.Array:
    begin, _ = self._rows['.'.join(p)]['data_offsets']
    size = self.start + self._end
    return _resumable.Array(
        self._leaves[p], lambda _: file, size, self.start + begin
    )

  def complete(self, file: PathLike, own, digests) -> None:
    header = _header_bytes(self._rows, self._leaves, own, digests)
    # Spaces at the end of a header belong to the format.
    length = self.start - 8
    start = memoryview(struct.pack('<Q', length) + header.ljust(length))
    _resumable.write_at(file, start, 0, self.start + self._end)


def write(
    path: pathlib.Path,
    leaves: Mapping[_tree.Path, ShapeDtype],
    own_fn: Callable[[], Config],
    fill_fn: _resumable.FillFn,
    num_more: int = 0,
    end_fn: Callable[[pathlib.Path], None] | None = None,
    key: str | None = None,
) -> None:
  """Writes files piece by piece; they get their name when all is complete.

  Args:
    path: a file, or with `end_fn` a directory, that does not exist yet.
    leaves: shape and dtype of each leaf, by its file and its path in there.
    own_fn: what is stored with the arrays, in JSON; called before and after
      they are written, between which it may grow by `num_more` bytes.
    fill_fn: as of `_resumable.fill`.
    end_fn: adds other files to the directory, in the main process.
    key: as of `_resumable.shared`.
  """
  if _files.is_remote(path):
    raise ValueError(
        f'{path} is in a bucket, where no .safetensors file can be written '
        'piece by piece. Save it here and copy it, or save an Orbax checkpoint.'
    )
  by_file: dict[str, dict[_tree.Path, ShapeDtype]] = {}
  for (name, *place), leaf in leaves.items():
    by_file.setdefault(name, {})[tuple(place)] = leaf
  own = own_fn()
  files = {name: _File(x, own, num_more) for name, x in by_file.items()}
  starts = _processes.json_of_main([x.start for x in files.values()])
  for file, start in zip(files.values(), starts):
    file.start = start
  key = key and f'{key}{sum(starts):x}'
  with _resumable.shared(path, key, is_file=end_fn is None) as folder:
    arrays = {p: files[p[0]].array(folder / p[0], p[1:]) for p in leaves}
    digests = _resumable.fill(folder, arrays, fill_fn, key is not None)
    with _processes.together():
      if _processes.is_main():
        own = own_fn()
        for name, file in files.items():
          of_file = {p[1:]: x for p, x in digests.items() if p[0] == name}
          file.complete(folder / name, own, of_file)
        if end_fn is not None:
          end_fn(pathlib.Path(folder))


def _dtype_name(dtype: DType, path: _tree.Path) -> str:
  if dtype not in _NAMES:
    raise TypeError(
        f'Leaf {_tree.name_of(path)!r} has dtype {dtype}, which safetensors '
        'files cannot hold. Convert it (x.astype), or save an Orbax checkpoint:'
        ' a path without .safetensors.'
    )
  return _NAMES[dtype]


def _header_bytes(rows, leaves, own, digests, num_more=0) -> bytes:
  unknown = _checksum.Checksum(0).digest()  # As long as any other.
  checksums = {p: digests.get(p, unknown) for p in leaves}
  by_name = lambda values: {_tree.name_of(p): x for p, x in values.items()}
  own = {
      **own,
      'checksums': {'.'.join(p): digest for p, digest in checksums.items()},
      # The same in all formats.
      'content_hash': _checksum.content_hash(
          by_name(leaves), by_name(checksums)
      ),
  }
  metadata = {'format': 'pt', 'jaxsoup': json.dumps(_json.sealed(own))}
  header = json.dumps({'__metadata__': metadata, **rows}).encode()
  return header + b' ' * (num_more + -(len(header) + num_more) % 8)
