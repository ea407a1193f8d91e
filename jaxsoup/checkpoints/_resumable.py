"""Checkpoints that all processes write, and a killed program goes on with.

```
with _resumable.shared(path, key) as folder:
  arrays = {name: _resumable.Array(leaf, file_fn, file_bytes), ...}
  digests = _resumable.fill(folder, arrays, fill_fn, key is not None)
```
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import errno
import json
import os
import pathlib
import secrets
from typing import Any

from etils import epath
import jax
import numpy as np

from jaxsoup import _files
from jaxsoup import _json
from jaxsoup import _processes
from jaxsoup import _tree
from jaxsoup.checkpoints import _checksum
from jaxsoup.checkpoints import _pieces
from jaxsoup.typing import Array as AnyArray
from jaxsoup.typing import Json
from jaxsoup.typing import PathLike
from jaxsoup.typing import ShapeDtype

_RESUMABLE = '.resumable-'
_WRITTEN = 'written-{}.jsonl'
# What is read at a time of what was written.
_STEP_BYTES = 8 << 20

PutFn = Callable[[_tree.Path, int, AnyArray], None]


@contextlib.contextmanager
def shared(
    path: PathLike, key: str | None = None, is_file: bool = False
) -> Iterator[epath.Path]:
  """A folder that gets this name when it is complete, else is deleted; or the
  file of this name in it does. All processes call this.

  A key stands for what is written: if the program is killed, the folder is kept
  for the next one with this key. Only under a lock.
  """
  final = folder = epath.Path(path)
  if key is not None:
    folder = final.with_name(f'{final.name}{_RESUMABLE}{key}')
  elif not _files.is_remote(final):  # A bucket has no renames: clear_leftovers.
    folder = epath.Path(_files.unfinished_name(pathlib.Path(final)))
  folder = epath.Path(_processes.json_of_main(str(folder)))
  _processes.wait_for_all('every process has seen that the path is free')
  try:
    with _processes.together():
      if _processes.is_main():
        if key is not None:
          for other in final.parent.iterdir():
            is_ours = other.name.startswith(f'{final.name}{_RESUMABLE}')
            if is_ours and other != folder:
              other.rmtree()  # Of other ingredients.
        folder.mkdir(parents=True, exist_ok=True)
    yield folder
    with _processes.together():
      if _processes.is_main():
        for file in folder.glob(_WRITTEN.format('*')):
          file.unlink()
        if is_file:
          _link(folder / final.name, final)
          folder.rmtree()
        elif folder != final:
          _files.require_new(final)  # An empty directory would be replaced.
          folder.rename(final)
  except BaseException as e:
    is_kept = key is not None and not isinstance(e, (OSError, ValueError))
    if _processes.is_main() and folder.exists() and not is_kept:
      folder.rmtree()
    raise


def _link(file: epath.Path, final: epath.Path) -> None:
  """Gives a file its name; never overwrites, where there are hard links."""
  try:
    os.link(file, final)
  except OSError as e:
    if e.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
      raise
    _files.require_new(final)
    file.rename(final)


class Array:
  """The place of an array in files, and the checksum of what is written."""

  def __init__(
      self,
      leaf: ShapeDtype,
      file_fn: Callable[[int], PathLike],
      file_bytes: int,
      start: int = 0,
  ):
    """From byte `start` on, in files 0, 1... that all have this size."""
    self._num_bytes = _tree.num_bytes(leaf)
    self._file_fn, self._file_bytes, self._start = file_fn, file_bytes, start
    self._checksum = _checksum.Checksum(self._num_bytes)

  def create(self) -> None:
    """Makes what has to be there before a piece is put."""
    file = epath.Path(self._file_fn(0))
    file.parent.mkdir(parents=True, exist_ok=True)

  def put(self, start: int, piece: Any) -> None:
    """Writes a piece, whose first byte in the array is `start`."""
    piece = np.ascontiguousarray(piece)
    self._checksum.add(piece, start)
    data, start = bytes_of(piece), self._start + start
    while data:
      number, offset = divmod(start, self._file_bytes)
      part = data[: self._file_bytes - offset]
      write_at(self._file_fn(number), part, offset, self._file_bytes)
      data, start = data[len(part) :], start + len(part)

  def is_written(self, digest: str | None) -> bool:
    """Whether its files hold what has this checksum."""
    self._checksum = _checksum.Checksum(self._num_bytes)
    start, end = self._start, self._start + self._num_bytes
    while start < end:
      number, offset = divmod(start, self._file_bytes)
      size = min(end - start, self._file_bytes - offset, _STEP_BYTES)
      try:
        data = np.fromfile(self._file_fn(number), np.uint8, size, offset=offset)
      except FileNotFoundError:
        break
      self._checksum.add(data, start - self._start)
      start += size
    is_same = self.digest() == digest
    if not is_same:
      self._checksum = _checksum.Checksum(self._num_bytes)
    return is_same

  def digest(self) -> str | None:
    """The checksum, if this process wrote or verified all of it."""
    return self._checksum.digest() if self._checksum.is_complete else None


def bytes_of(array: np.ndarray) -> memoryview:
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def write_at(
    file: PathLike, data: memoryview, place: int, file_bytes: int
) -> None:
  """Writes a part of a file of this size, which is made if it is not there."""
  if _files.is_remote(file):
    epath.Path(file).write_bytes(bytes(data).ljust(file_bytes, b'\0'))
    return
  number = os.open(file, os.O_WRONLY | os.O_CREAT, 0o666)
  try:
    os.truncate(number, file_bytes)
    _files.write_at(number, data, place)
  finally:
    os.close(number)


class Written:
  """The arrays that are written and verified, with a note to each.

  Of an earlier start only those count whose files still have their checksum.

  Attributes:
    notes: of an earlier start, by the path of the array.
    num_writers: how many processes see the folder: all, or the first one only.
  """

  def __init__(
      self,
      folder: epath.Path,
      arrays: Mapping[_tree.Path, Array],
      is_kept: bool,
  ):
    self._folder, self._arrays, self._is_kept = folder, arrays, is_kept
    # A folder of this name could be there, on another disk.
    name = _processes.json_of_main(secrets.token_hex(6))
    mark = folder / _WRITTEN.format(name)
    with _processes.together():
      if _processes.is_main():
        mark.touch()
        for array in arrays.values():
          array.create()
    is_shared = not _processes.is_any(not mark.exists())
    self.num_writers = jax.process_count() if is_shared else 1
    rows = {}
    for file in sorted(folder.glob(_WRITTEN.format('*'))) if is_kept else ():
      for line in file.read_text().splitlines():
        with contextlib.suppress(ValueError):  # Cut off by the kill.
          row = _json.unsealed(_json.parsed(line))
          rows[json.dumps(row['path'])] = row
    paths = {json.dumps(p): p for p in arrays}
    own = [*rows.keys() & paths.keys()]
    own = sorted(own)[jax.process_index() :: jax.process_count()]
    with _processes.together():
      notes = {
          name: rows[name]['note']
          for name in own
          if arrays[paths[name]].is_written(rows[name]['digest'])
      }
    notes = _processes.merged(notes)
    self.notes: dict[_tree.Path, Json] = {paths[n]: notes[n] for n in notes}

  def add(self, path: _tree.Path, note: Json) -> None:
    """Remembers that an array is complete."""
    if self._is_kept:
      digest = self._arrays[path].digest()
      row = {'path': path, 'digest': digest, 'note': note}
      file = self._folder / _WRITTEN.format(jax.process_index())
      with file.open('a') as lines:
        lines.write(json.dumps(_json.sealed(row)) + '\n')

  def read_back(self) -> None:
    """Raises if what this process has written does not have its checksum."""
    arrays = {p: x for p, x in self._arrays.items() if p not in self.notes}
    own = [(p, x, digest) for p, x in arrays.items() if (digest := x.digest())]

    def piece_fn(i, _):
      path, array, digest = own[i]
      if not array.is_written(digest):
        raise ValueError(
            f'{self._folder}: what was written of {_tree.name_of(path)!r} is '
            'damaged, as it reads back with other values. Check the disk, and '
            'write it again.'
        )

    for _ in _pieces.run([[((), _STEP_BYTES)]] * len(own), piece_fn):
      pass


FillFn = Callable[[PutFn, Written], None]


def fill(
    folder: epath.Path,
    arrays: Mapping[_tree.Path, Array],
    fill_fn: FillFn,
    is_kept: bool,
) -> dict[_tree.Path, str]:
  """Writes arrays, and returns their checksums; all processes call this.

  Args:
    folder: of `shared`.
    arrays: all of them, by path.
    fill_fn: is given `put_fn(path, start, piece)`, to be called in one of the
      processes for every piece of every array that is not in `Written`, in any
      order and from any thread, with the byte at which the piece begins.
    is_kept: whether there is a next start, for which `Written` is noted.
  """
  written = Written(folder, arrays, is_kept)
  with _processes.together():
    fill_fn(lambda p, start, piece: arrays[p].put(start, piece), written)
  own = {json.dumps(p): array.digest() for p, array in arrays.items()}
  known = _processes.merged({p: x for p, x in own.items() if x})
  return {p: known[json.dumps(p)] for p in arrays}
