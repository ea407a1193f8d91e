"""Files in buckets, by `etils.epath`, where others are files of this machine.

```
folder = buckets.path_of('gs://bucket/work')
with buckets.local_copy(folder / 'log.jsonl') as file:
  file.open('a').write(line)
```
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
import tempfile
from typing import Any

from etils import epath
import fsspec

from jaxsoup import _files
from jaxsoup import _processes
from jaxsoup.typing import PathLike


def path_of(path: PathLike) -> Any:
  """A path of this machine, or of a bucket, by `etils.epath`.

  Raises:
    ValueError: an address of another kind.
    ImportError: the package that opens it is missing.
  """
  if not _files.is_remote(path):
    return pathlib.Path(path)
  address = str(path)
  if not address.startswith(_files.BUCKETS):
    raise ValueError(
        f'{address} is not the address of a bucket: expected gs://, s3:// or '
        'az://, or a path of this machine.'
    )
  place = epath.Path(address)
  place.exists()  # It names the package that is missing.
  return place


def ranges_of(path: PathLike) -> tuple[Any, str]:
  """A file system whose `cat_file` reads ranges of a file, and its path there.

  Threads may read at the same time.
  """
  # What others wrote since a folder was listed has to be seen.
  return fsspec.url_to_fs(str(path), use_listings_cache=False)


def stat(file: PathLike) -> tuple[int, object]:
  """Size of a file, here or in a bucket, and what changes with its content."""
  if not _files.is_remote(file):
    state = os.stat(file)
    return state.st_size, state.st_mtime_ns
  system, path = ranges_of(file)
  info = system.info(path)
  return info['size'], info.get('etag') or info.get('ETag')


def remove(folder: Any) -> None:
  """Deletes a folder with all that is in it, if it is there."""
  if not _files.is_remote(folder):
    shutil.rmtree(folder, ignore_errors=True)
  elif folder.exists():
    folder.rmtree()


@contextlib.contextmanager
def local_copy(path: Any) -> Iterator[pathlib.Path]:
  """The file itself; of one in a bucket a copy that is sent there at the end.

  Those cannot be appended to.
  """
  if not _files.is_remote(path):
    yield path
    return
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder, path.name)
    if path.exists():
      copy.write_bytes(path.read_bytes())
    try:
      yield copy
    finally:
      if copy.exists() and _processes.is_main():
        path.write_bytes(copy.read_bytes())


def is_whole(path: Any) -> bool:
  """Whether it is there; in a bucket Orbax writes a file when it is done."""
  if not _files.is_remote(path) or not path.is_dir():
    return path.exists()
  return (path / 'commit_success.txt').exists()


def are_whole(*paths: Any) -> bool:
  """Whether all are there, as the main process sees it."""
  return _processes.agreed(all(map(is_whole, paths)))
