"""Files that appear when they are complete, and never in place of a user's.

```
with _files.replaced(path, marker='<meta name="generator"') as unfinished:
  unfinished.write_text(text)
```
"""

from collections.abc import Iterator
import contextlib
import errno
import os
import pathlib
import re
import secrets
import shutil
import tempfile
from typing import Any

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Orbax and tensorstore write in their own threads, and raise ValueError.
_SAID = ('No space left', 'File too large', 'quota exceeded')
BUCKETS = ('gs://', 's3://', 'az://')
_LEFTOVER = re.compile(
    r'(.+)\.(?:unfinished-[0-9a-f]+|orbax-checkpoint-tmp.*)', re.DOTALL
)


class FullDiskError(OSError):
  """There was no room left: on the disk, in a quota, in a file."""


@contextlib.contextmanager
def room_for(
    path: object,
    advice: str = 'Nothing was saved: free some space, and save again.',
) -> Iterator[None]:
  """Where the disk is full, one line says which file, and what to do."""
  try:
    yield
  except (OSError, RuntimeError, ValueError) as e:
    is_full = isinstance(e, OSError) and e.errno in _FULL
    if not is_full and not any(words in str(e) for words in _SAID):
      raise
    reason = e.__cause__ if isinstance(e, FullDiskError) else e
    raise FullDiskError(
        f'{path} could not be written because the disk is full: '
        f'{str(reason).splitlines()[0][:200]}. {advice}'
    ) from reason


def is_remote(path: object) -> bool:
  """Whether it is the address of a bucket, such as `gs://bucket/runs`."""
  return '://' in str(path)


def unfinished_name(path: pathlib.Path) -> pathlib.Path:
  """A name that no other process has: process ids repeat in containers."""
  return path.with_name(f'{path.name}.unfinished-{secrets.token_hex(6)}')


def clear_leftovers(folder: Any, name: str = '') -> None:
  """Deletes what killed processes left of a file of this name; '' is any.

  Only under a lock, or it may belong to a process that writes now.
  """
  for path in folder.iterdir() if folder.is_dir() else ():
    if is_remote(folder):
      # Only Orbax writes there in place, and these files first and last.
      begun, ended = path / '_CHECKPOINT_METADATA', path / 'commit_success.txt'
      if begun.exists() and not ended.exists():
        path.rmtree()
      continue
    match = _LEFTOVER.fullmatch(path.name)
    if match is None or name not in ('', match[1]):
      continue
    if path.is_dir() and not path.is_symlink():
      shutil.rmtree(path)
    else:
      path.unlink()


def require_new(path: Any) -> None:
  """Raises if something is there, be it a broken link."""
  if path.exists() or os.path.lexists(path):
    raise FileExistsError(
        f'{path} exists and is not overwritten. Delete it, or give another '
        'path.'
    )


def require_ours(path: pathlib.Path, marker: str) -> None:
  """Raises if something is there that does not begin with what we write."""
  if path.is_file():
    with path.open('rb') as file:
      if marker.encode() in file.read(1024):
        return
  if path.exists() or path.is_symlink():
    raise FileExistsError(
        f'{path} exists, and this command did not write it: it is left as it '
        'is. Give another path.'
    )


@contextlib.contextmanager
def replaced(
    path: pathlib.Path, marker: str | None = None
) -> Iterator[pathlib.Path]:
  """The path of a new file, which gets its name when it is complete.

  A file that is there is replaced; with a marker only if it is one of ours,
  which begin with it, else it is a FileExistsError.
  """
  if is_remote(path):
    with tempfile.TemporaryDirectory() as temporary:
      unfinished = pathlib.Path(temporary, path.name)
      yield unfinished
      path.write_bytes(unfinished.read_bytes())
    return
  if marker is not None:
    require_ours(path, marker)
  unfinished = unfinished_name(path)
  try:
    with room_for(path):
      yield unfinished
    unfinished.replace(path)
  finally:
    unfinished.unlink(missing_ok=True)


def write_at(number: int, data: memoryview, place: int) -> None:
  """Writes all bytes to an open file, from byte `place` on."""
  while data:
    num_written = os.pwrite(number, data, place)
    data, place = data[num_written:], place + num_written
