"""Recognizes the errors of a full disk."""

import errno

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Orbax and tensorstore write in their own threads, and raise ValueError.
_SAID = ('No space left', 'File too large', 'quota exceeded')


def is_full(error: BaseException) -> bool:
  """Whether there was no room left: on the disk, in a quota, in a file."""
  if isinstance(error, OSError) and error.errno in _FULL:
    return True
  return any(words in str(error) for words in _SAID)
