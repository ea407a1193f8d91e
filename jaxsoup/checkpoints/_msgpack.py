"""Reads the files of `flax.serialization`: `to_bytes(params)`, `checkpoint_N`.

Arrays are read from their places in the file; what is between them is all that
is parsed when a file is opened.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import itertools
import pathlib
from typing import Any
from typing import BinaryIO

import msgpack
import numpy as np

from jaxsoup import _tree
from jaxsoup.checkpoints import _raw
from jaxsoup.checkpoints import _source

# The first byte of a value: maps, arrays, and extensions with the bytes that
# their headers have.
_MAPS = (*range(0x80, 0x90), 0xDE, 0xDF)
_STRINGS = (*range(0xA0, 0xC0), 0xD9, 0xDA, 0xDB)
_LISTS = (*range(0x90, 0xA0), 0xDC, 0xDD)
_FIXED = dict(zip(range(0xD4, 0xD9), (1, 2, 4, 8, 16)))
_LENGTHS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_ARRAY_TYPES = (1, 3)  # Of flax: arrays, and NumPy's scalars.
_CHUNKED = '__msgpack_chunked_array__'
# What flax writes in place of an array that is in a directory NAME_gda.
_ELSEWHERE = '//GDAPlaceholder:'
_MOST_LEVELS = 100
_HEAD = 4096  # Bytes that are read at once.


def is_dict(path: pathlib.Path) -> bool:
  """Whether a file begins like a dict in msgpack, whatever its name."""
  with path.open('rb') as f:
    start = f.read(6).ljust(6, b'\0')
  key = {0xDE: 3, 0xDF: 5}.get(start[0], 1)
  return start[0] in _MAPS and start[key] in _STRINGS


def open_source(path: pathlib.Path) -> _source.Source:
  """Opens a file; reads only names and shapes."""
  with _source.parsing(path), path.open('rb') as f:
    content, end = _value(f, 0)
    if end > (size := path.stat().st_size):
      raise ValueError(f'it should have {end:,} bytes, but it has {size:,}')
    arrays = dict(_arrays(content, ()))
  if not arrays:
    raise ValueError(
        f'{path} is msgpack, but holds no arrays of flax. Save the parameters: '
        'flax.serialization.to_bytes(params).'
    )
  file = _raw.File(path)
  return _source.Source(
      _source.plain_metadata(path, {p: a for p, (a, _) in arrays.items()}),
      reader_fn=lambda p: _raw.reader(
          arrays[p][0], _filler(file, arrays[p][1])
      ),
      patch_fn=_raw.patcher({p: parts for p, (_, parts) in arrays.items()}),
  )


def _value(f: BinaryIO, at: int, depth: int = 0) -> tuple[Any, int]:
  """The value at a byte of a file, and where it ends.

  Dicts of values; arrays as their place and its parts; numbers.
  """
  if depth > _MOST_LEVELS:
    raise ValueError('it is nested too deeply')
  f.seek(at)
  code = f.read(1)[0]
  if code in _MAPS or code in _LISTS:
    return _container(f, at, depth, code in _MAPS)
  if code in _FIXED or code in _LENGTHS:
    return _extension(f, at, code)
  return _unpacked(f, at)


def _unpacked(f, at, method='unpack') -> tuple[Any, int]:
  f.seek(at)
  unpacker = msgpack.Unpacker(f, read_size=_HEAD)
  return getattr(unpacker, method)(), at + unpacker.tell()


def _container(f, at, depth, is_map) -> tuple[Any, int]:
  kind = 'map' if is_map else 'array'
  length, at = _unpacked(f, at, f'read_{kind}_header')
  content: dict[str, Any] = {}
  for i in range(length):
    key, at = _unpacked(f, at) if is_map else (i, at)
    if str(key) in content:
      raise ValueError('two of its entries have the same name')
    content[str(key)], at = _value(f, at, depth + 1)
  return _unchunked(content) if _CHUNKED in content else content, at


def _extension(f, at, code) -> tuple[Any, int]:
  head = 2 + _LENGTHS.get(code, 0)
  length = int.from_bytes(f.read(head - 2), 'big')
  end = at + head + _FIXED.get(code, length)
  if f.read(1)[0] not in _ARRAY_TYPES:
    return None, end
  _, at = _unpacked(f, at + head, 'read_array_header')
  shape, at = _unpacked(f, at)
  name, at = _unpacked(f, at)
  dtype = _source.checked_dtype(np.dtype(name))
  array = _raw.Array(f.name, 0, _source.checked_shape(shape), dtype)
  # The values come last, after their length.
  begin = end - array.num_bytes
  if not 2 <= begin - at <= 5:
    raise ValueError(
        f'an array of shape {shape} and dtype {dtype} has {end - at:,} bytes'
    )
  return (array, [(begin, array.num_bytes)]), end


def _unchunked(content):
  """Arrays of more than a gigabyte are flat pieces, one after another."""
  in_order = lambda x: [x[str(i)] for i in range(len(x))]
  shape = _source.checked_shape(in_order(content['shape']))
  arrays, chunks = zip(*in_order(content['chunks']))
  array = arrays[0]._replace(shape=shape)
  sizes = [a.num_bytes for a in arrays]
  if len({a.dtype for a in arrays}) > 1 or sum(sizes) != array.num_bytes:
    raise ValueError(f'the chunks of an array have {sum(sizes):,} bytes')
  return array, list(itertools.chain(*chunks))


def _arrays(content: Any, keys: _tree.Path) -> Iterator[tuple[_tree.Path, Any]]:
  if isinstance(content, dict):
    for key, value in content.items():
      yield from _arrays(value, (*keys, key))
  elif isinstance(content, tuple):
    yield keys, content
  elif isinstance(content, str) and content.startswith(_ELSEWHERE):
    raise ValueError(
        f'{"/".join(keys)!r} is in a directory next to it, which is not read'
    )


def _filler(file: _raw.File, parts: Sequence[tuple[int, int]]):
  """Reads parts of a file as if they followed one another."""

  def fill(array, start):
    buffer = array.reshape(-1).view(np.uint8)
    end, begin = start + buffer.size, 0
    for place, size in parts:
      first, last = max(start, begin), min(end, begin + size)
      if first < last:
        piece = buffer[first - start : last - start]
        file.read(piece, place + first - begin)
      begin += size

  return fill
