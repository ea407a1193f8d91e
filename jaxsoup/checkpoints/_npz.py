"""Reads the `.npz` files of NumPy: AugReg, big_vision, `np.savez`.

Uncompressed members are read row by row, compressed ones as a whole. Objects
are pickles, which can run code: they are refused.
"""

from collections.abc import Iterator
import pathlib
import struct
from typing import NamedTuple
import zipfile
import zlib

import numpy as np

from jaxsoup.checkpoints import _raw
from jaxsoup.checkpoints import _source

_MOST_DEFLATED = 1032  # What a byte of deflate can stand for, at most.
_ENCRYPTED = 1


class _Member(NamedTuple):
  """An array of the archive, and its place.

  Attributes:
    array: its place, in the file if it is stored, else in the member.
    is_stored: not compressed, in C order.
    name: of the member.
  """

  array: _raw.Array
  is_stored: bool
  name: str


def open_source(path: pathlib.Path) -> _source.Source:
  """Opens an archive; reads only the headers of its members."""
  members = _members(path)
  by_path = dict(zip(_source.paths_of(members, '/'), members.values()))
  file = _raw.File(path)
  return _source.Source(
      _source.plain_metadata(path, {p: m.array for p, m in by_path.items()}),
      reader_fn=lambda p: _reader(by_path[p], file),
      rows_fn=lambda p: _rows_at_once(by_path[p]),
      patch_fn=_raw.patcher(
          {p: [(m.array.start, m.array.num_bytes)] for p, m in by_path.items()},
          renew_checksums,
      )
      if all(m.is_stored for m in by_path.values())
      else None,
  )


def renew_checksums(path: pathlib.Path) -> None:
  """Those of the stored members of an archive whose bytes were changed."""
  with zipfile.ZipFile(path) as archive, path.open('r+b') as f:
    after = archive.start_dir
    for info in archive.infolist():
      # Of three parts of an entry the sizes are told in it.
      this = after
      f.seek(this + 28)
      after += 46 + sum(struct.unpack('<3H', f.read(6)))
      if info.compress_type != zipfile.ZIP_STORED:
        continue
      f.seek(data_start(f, info))
      checksum, rest = 0, info.file_size
      while rest:
        block = f.read(min(rest, 1 << 20))
        checksum, rest = zlib.crc32(block, checksum), rest - len(block)
      for place in (info.header_offset + 14, this + 16):
        f.seek(place)
        f.write(struct.pack('<I', checksum))


def _rows_at_once(member: _Member) -> int:
  return 1 if member.is_stored else max(1, *member.array.shape[:1])


def _reader(member: _Member, file: _raw.File) -> _source.ReadFn:
  if member.is_stored:
    return _raw.reader(member.array, file.read)
  native = member.array.dtype.newbyteorder('=')
  return lambda index: _whole(member)[index].astype(native, copy=False)


def _whole(member: _Member) -> np.ndarray:
  """An array that cannot be read in parts."""
  path = member.array.file
  with (
      _source.parsing(path),
      zipfile.ZipFile(path) as archive,
      archive.open(member.name) as f,
  ):
    array = np.lib.format.read_array(f, allow_pickle=False)
    f.read(1)  # At the end its CRC-32 is compared.
  return array.view(member.array.dtype)


def _members(path: pathlib.Path) -> dict[str, _Member]:
  """The arrays of an archive by name, checked against its size."""
  with (
      _source.parsing(path),
      zipfile.ZipFile(path) as archive,
      path.open('rb') as f,
  ):
    _source.check_archive(archive)
    infos = [i for i in archive.infolist() if i.filename.endswith('.npy')]
    members = dict(_each_member(path, archive, infos, f))
    if len(members) < len(infos):
      raise ValueError('two of its arrays have the same name')
    if not members:
      raise ValueError('it holds no arrays')
  return members


def _each_member(path, archive, infos, f) -> Iterator[tuple[str, _Member]]:
  num_bytes = path.stat().st_size
  for info in infos:
    name = info.filename.removesuffix('.npy')
    _check_size(info, num_bytes)
    with archive.open(info) as member:
      shape, dtype, is_fortran, start = header(name, member)
    is_stored = info.compress_type == zipfile.ZIP_STORED and not is_fortran
    data = data_start(f, info) if is_stored else 0
    array = _raw.Array(str(path), data + start, shape, dtype)
    if start + array.num_bytes != info.file_size:
      raise ValueError(
          f'{name!r} of shape {list(shape)} and dtype {dtype} has '
          f'{info.file_size - start} bytes'
      )
    yield name, _Member(array, is_stored, info.filename)


def _check_size(info: zipfile.ZipInfo, num_bytes: int) -> None:
  """Refuses what declares more than the file can hold."""
  is_stored = info.compress_type == zipfile.ZIP_STORED
  most = info.compress_size * (1 if is_stored else _MOST_DEFLATED)
  end = info.header_offset + info.compress_size
  if info.flag_bits & _ENCRYPTED:
    raise ValueError(f'{info.filename!r} is encrypted')
  if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    raise ValueError(f'{info.filename!r} has an unknown compression')
  if end > num_bytes or info.file_size > most:
    raise ValueError(
        f'{info.filename!r} declares {info.file_size:,} bytes, but the file '
        f'has {num_bytes:,}'
    )


def data_start(f, info: zipfile.ZipInfo) -> int:
  """Where the bytes of a stored member begin: behind its local header."""
  f.seek(info.header_offset)
  name, extra = struct.unpack('<26x2H', f.read(30))
  return info.header_offset + 30 + name + extra


def header(name: str, f) -> tuple[tuple[int, ...], np.dtype, bool, int]:
  """Shape, dtype, order and size of the header of an array."""
  start = f.tell()
  try:
    is_first = np.lib.format.read_magic(f) == (1, 0)
    read_fn = getattr(np.lib.format, f'read_array_header_{2 - is_first}_0')
    shape, is_fortran, dtype = read_fn(f)
    if dtype.hasobject:
      raise ValueError('pickled objects are not read, as that can run code')
    shape, dtype = _source.checked_shape(shape), _source.checked_dtype(dtype)
  except ValueError as e:
    raise ValueError(f'array {name!r}: {e}') from e
  return shape, dtype, is_fortran, f.tell() - start
