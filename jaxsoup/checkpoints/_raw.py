"""Arrays that are stored in a file as in memory, read row by row."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import math
import os
import pathlib
from typing import Any
from typing import NamedTuple

import numpy as np

from jaxsoup import _files
from jaxsoup.checkpoints import _source
from jaxsoup.runtime import buckets
from jaxsoup.typing import PathLike


class Array(NamedTuple):
  """The place of an array: in C order, from byte `start` on."""

  file: str
  start: int
  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


class File:
  """A file, opened when it is first read and closed with its owner; or one in
  a bucket.
  """

  def __init__(self, path: PathLike):
    self._path = str(path)
    self._number: int | None = None
    self._bucket: tuple[Any, str] | None = None
    if _files.is_remote(path):
      self._bucket = buckets.ranges_of(path)

  def bytes(self, start: int, size: int) -> bytes:
    array = np.empty(size, np.uint8)
    self.read(array, start)
    return array.tobytes()

  def read(self, array: np.ndarray, start: int) -> None:
    """Fills an array with the bytes of the file from `start` on."""
    buffer = array.reshape(-1).view(np.uint8).data
    while buffer:
      num_read = self._read_some(buffer, start)
      if not num_read:
        raise _source.damaged(self._path, 'it ends too early')
      buffer, start = buffer[num_read:], start + num_read

  def _read_some(self, buffer: memoryview, start: int) -> int:
    if self._bucket is not None:
      system, path = self._bucket
      part = system.cat_file(path, start, start + len(buffer))
      buffer[: len(part)] = part
      return len(part)
    if self._number is None:
      try:
        self._number = os.open(self._path, os.O_RDONLY)
      except FileNotFoundError as e:
        raise _source.damaged(self._path, 'it is gone') from e
    return os.preadv(self._number, [buffer], start)

  def __del__(self, close: Any = os.close):  # At exit modules go before us.
    if self._number is not None:
      close(self._number)


def reader(
    array: Array, fill_fn: Callable[[np.ndarray, int], None]
) -> _source.ReadFn:
  """Reads a part of an array: rows, as `File.read` does, then their columns."""
  columns, dtype = array.shape[1:], array.dtype
  row_bytes = math.prod(columns) * dtype.itemsize

  def read(index):
    if not index:
      shape, start = (), array.start
    else:
      first, end = index[0].start, index[0].stop
      shape, start = (end - first, *columns), array.start + first * row_bytes
    rows = _source.scratch('read', shape, dtype)
    if rows.size:
      fill_fn(rows, start)
    rows = rows[(slice(None), *index[1:])] if len(index) > 1 else rows
    return rows.astype(dtype.newbyteorder('='), copy=False)

  return read


def chunked_reader(chunks: Sequence[Array]) -> _source.ReadFn:
  """Reads rows of an array whose equal parts are files, one after another."""
  num_rows, *columns = chunks[0].shape
  dtype = chunks[0].dtype
  row_bytes = math.prod(columns) * dtype.itemsize

  def read(index):
    first, end = index[0].start, index[0].stop
    rows = _source.scratch('read', (end - first, *columns), dtype)
    while first < end and rows.size:
      chunk, row = divmod(first, num_rows)
      last = min(end, (chunk + 1) * num_rows)
      place = slice(first - index[0].start, last - index[0].start)
      File(chunks[chunk].file).read(rows[place], row * row_bytes)
      first = last
    return rows[(slice(None), *index[1:])] if len(index) > 1 else rows

  return read


def patcher(
    parts: Mapping[tuple[str, ...], Sequence[tuple[int, int]]],
    end_fn: Callable[[pathlib.Path], None] = lambda path: None,
) -> _source.PatchFn:
  """Puts other values into a copy of a file.

  Args:
    parts: of each array, where its bytes are: places and sizes.
    end_fn: called with the copy when all is put.
  """

  @contextlib.contextmanager
  def patch(path: pathlib.Path) -> Iterator[_source.PutFn]:
    number = os.open(path, os.O_WRONLY)

    def put(name, start, piece):
      data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
      begin = 0
      for place, size in parts[name]:
        first, last = max(start, begin), min(start + len(data), begin + size)
        if first < last:
          part = data[first - start : last - start]
          _files.write_at(number, part, place + first - begin)
        begin += size

    try:
      yield put
    finally:
      os.close(number)
    end_fn(path)

  return patch


def source(
    path: pathlib.Path,
    arrays: Mapping[tuple[str, ...], Array],
    end_fn: Callable[[pathlib.Path], None] = lambda path: None,
) -> _source.Source:
  """A checkpoint with nothing but these arrays of one file."""
  for name, array in arrays.items():
    if array.start + array.num_bytes > (size := path.stat().st_size):
      raise _source.damaged(path, f'{name} ends after its {size:,} bytes')
  file = File(path)
  return _source.Source(
      _source.plain_metadata(path, arrays),
      reader_fn=lambda p: reader(arrays[p], file.read),
      patch_fn=patcher(
          {p: [(a.start, a.num_bytes)] for p, a in arrays.items()}, end_fn
      ),
  )
