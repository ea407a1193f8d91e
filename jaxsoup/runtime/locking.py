"""A lock on a path, which the system releases when its holder dies."""

from collections.abc import Iterator
import contextlib
import datetime
import errno
import json
import os
import pathlib
import socket

from jaxsoup import _files
from jaxsoup import _warnings
from jaxsoup.typing import PathLike

try:
  import fcntl
except ImportError:  # Windows.
  fcntl = None  # type: ignore[assignment]

# What file systems without such locks answer.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class InUseError(OSError):
  """Another process uses the path; the message names it."""


@contextlib.contextmanager
def locked(path: PathLike, what: object) -> Iterator[None]:
  """Holds a lock, or fails immediately.

  Args:
    path: the lock's file: made with its directory, and deleted at the end. One
      that a killed process left behind does no harm.
    what: the path that is protected, for messages.

  Raises:
    InUseError: another process holds it.
  """
  if _files.is_remote(path):
    yield  # There are no locks in a bucket.
    return
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  file = _acquired(path, what)
  try:
    yield
  finally:
    if file is not None:
      path.unlink(missing_ok=True)  # Before others can get the lock.
      os.close(file)


def _acquired(path: pathlib.Path, what: object) -> int | None:
  while True:
    try:
      flags = os.O_RDWR | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0)
      file = os.open(path, flags, 0o644)
    except OSError as e:
      if not path.is_symlink():
        raise
      raise FileExistsError(
          f'{path} is a symbolic link, not a lock: what it leads to is left as '
          'it is. Remove the link.'
      ) from e
    with contextlib.ExitStack() as stack:
      stack.callback(os.close, file)
      try:
        if fcntl is None:
          raise OSError(errno.ENOSYS, 'no flock')
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as e:
        raise InUseError(
            f'{what} is in use by {_holder(file)}. Wait until it ends, stop '
            'it, or use another path.'
        ) from e
      except OSError as e:
        if e.errno not in _NO_LOCKS:
          raise
        _warnings.warn(
            f'The file system of {path} does not support locks: make sure that '
            f'no other process uses {what}.'
        )
        return None
      # Its last holder may have deleted it between the two calls.
      if not (path.exists() and os.path.samestat(os.fstat(file), path.stat())):
        continue
      if not _is_lock(os.pread(file, 1000, 0)):
        raise FileExistsError(
            f'{path} would be the lock of {what}, but holds something else, '
            'and is left as it is. Move it elsewhere.'
        )
      now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
      held = {'host': socket.gethostname(), 'pid': os.getpid(), 'since': now}
      os.ftruncate(file, 0)
      os.write(file, json.dumps(held).encode())
      stack.pop_all()
      return file


def _is_lock(content: bytes) -> bool:
  """Whether it is new, or one of ours whose holder died."""
  try:
    return not content or {'host', 'pid'} <= set(json.loads(content))
  except (TypeError, ValueError):
    # One that was cut off as it was written.
    return b'{"host": '.startswith(content[:9])


def _holder(file: int) -> str:
  try:
    by = json.loads(os.pread(file, 1000, 0))
    return f'process {by["pid"]} on {by["host"]} since {by["since"]}'
  except (KeyError, TypeError, ValueError):  # It has not written that yet.
    return 'another process'
