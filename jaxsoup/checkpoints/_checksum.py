"""Hashes of arrays that are read in pieces, in any order, by any thread.

```
checksum = _checksum.Checksum(array.nbytes)
for start, piece in pieces:
  checksum.add(piece, start)
checksum.digest()             # 'xxh3:99aa06d3014798d86001c324468d497f'
```

`sum_b XXH3_128(block_b; seed b) mod 2^128`, over blocks of 128 KiB of an
array's bytes. Blocks that change places change their seeds, and so the sum. It
runs at the speed of the memory: 20 GB/s per core.
"""

from collections.abc import Mapping
import hashlib
import json
import math
import threading
from typing import Any

import jax
import numpy as np
import xxhash

from jaxsoup import _processes
from jaxsoup.typing import Array
from jaxsoup.typing import ShapeDtype

# Above 100 kB xxhash lets other threads of Python run meanwhile.
_BLOCK_BYTES = 1 << 17
_PREFIX = 'xxh3:'
# Rows that processes exchange at a time.
_SLAB_BYTES = 64 << 20


class Checksum:
  """The hash of one array, complete when every byte has been added once."""

  def __init__(self, num_bytes: int):
    self._num_bytes = num_bytes
    self._num_hashed = 0
    self._sum = 0
    # Blocks that lie in several pieces: their bytes, and how many are there.
    self._parts: dict[int, tuple[bytearray, int]] = {}
    self._lock = threading.Lock()

  def add(self, piece: np.ndarray, start: int = 0) -> None:
    """Adds a contiguous part of the array, whose first byte is `start`."""
    data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
    start = int(start)  # Older versions of xxhash take no integer of NumPy.
    while data:
      block = start // _BLOCK_BYTES
      part = data[: (block + 1) * _BLOCK_BYTES - start]
      data, start = data[len(part) :], start + len(part)
      whole = self._whole(block, part, start)
      if whole is not None:
        value = xxhash.xxh3_128_intdigest(whole, seed=block)
        with self._lock:
          self._sum += value
          self._num_hashed += len(whole)

  def _whole(self, block: int, part: memoryview, end: int) -> Any:
    """The bytes of a block, if this part, up to byte `end`, completes it."""
    first = block * _BLOCK_BYTES
    size = min(_BLOCK_BYTES, self._num_bytes - first)
    if len(part) == size:
      return part
    with self._lock:
      whole, count = self._parts.pop(block, (bytearray(size), 0))
      whole[end - len(part) - first : end - first] = part
      if count + len(part) == size:
        return whole
      self._parts[block] = whole, count + len(part)
    return None

  @property
  def is_complete(self) -> bool:
    return self._num_hashed == self._num_bytes

  def digest(self) -> str:
    """One short text for the array, if it is complete."""
    return f'{_PREFIX}{self._sum % 2**128:032x}'


def of(array: Array) -> str:
  """The digest of an array; if it is sharded over processes, all call this."""
  checksum = Checksum(array.nbytes)
  if isinstance(array, np.ndarray):
    checksum.add(array)
    return checksum.digest()
  row_bytes = array.dtype.itemsize * math.prod(array.shape[1:])
  num_rows = max(1, _SLAB_BYTES // max(1, row_bytes))
  for start in range(0, array.shape[0], num_rows):
    rows = _own_rows(array, start, min(start + num_rows, array.shape[0]))
    rows = _processes.summed(rows.reshape(-1).view(np.uint8))
    checksum.add(rows, start * row_bytes)
  return checksum.digest()


def _own_rows(array: jax.Array, start: int, stop: int) -> np.ndarray:
  """Some rows, with zeros in place of what other processes hold."""
  rows = np.zeros((stop - start, *array.shape[1:]), array.dtype)
  for shard in array.addressable_shards:
    if shard.replica_id:
      continue
    index: Any = [
        slice(*i.indices(n)) for i, n in zip(shard.index, array.shape)
    ]
    first = index[0].start
    low, high = max(first, start), min(index[0].stop, stop)
    if low < high:
      place = (slice(low - start, high - start), *index[1:])
      rows[place] = np.asarray(shard.data)[low - first : high - first]
  return rows


def is_current(digest: str) -> bool:
  """Whether a stored digest is one of these: others are not compared."""
  return digest.startswith(_PREFIX)


def content_hash(
    leaves: Mapping[str, ShapeDtype], checksums: Mapping[str, str]
) -> str:
  """One hash of a tree: of its names, dtypes, shapes and checksums."""
  rows = [
      [name, str(x.dtype), list(x.shape), checksums[name]]
      for name, x in sorted(leaves.items())
  ]
  return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
