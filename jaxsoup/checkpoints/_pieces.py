"""Arrays in pieces: threads read them, and memory stays bounded.

```
for i in _pieces.run(plans, piece_fn):       # leaf i is complete
  leaf = _pieces.placed(arrays[i], abstract[i])
```
"""

import collections
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent import futures
import math
import os
import threading

import jax
import numpy as np

from jaxsoup.checkpoints._source import Index
from jaxsoup.typing import DType
from jaxsoup.typing import ShapeDtype

# Small enough for the caches of a core, large enough that Python costs little.
_PIECE_BYTES = 1 << 21
# What may be in flight: bounds the memory of all readers together.
_BUDGET_BYTES = 128 << 20


def box_of(abstract: ShapeDtype) -> Index:
  """The smallest box with all that this process needs of an array."""
  sharding = getattr(abstract, 'sharding', None)
  if sharding is None:
    return tuple(slice(0, n) for n in abstract.shape)
  needed = sharding.addressable_devices_indices_map(tuple(abstract.shape))
  box = []
  for axis, size in enumerate(abstract.shape):
    ranges = [index[axis].indices(size) for index in needed.values()]
    box.append(slice(min(r[0] for r in ranges), max(r[1] for r in ranges)))
  return tuple(box)


def plan(abstract: ShapeDtype, dtype: DType, num_rows: int) -> list[Index]:
  """Cuts the box of an array into pieces along its first axis.

  Args:
    abstract: shape, and perhaps sharding.
    dtype: as stored.
    num_rows: how many rows are the least that can be read.

  Returns:
    The index of each piece; () of a scalar.
  """
  box = box_of(abstract)
  if not box:
    return [()]
  row_bytes = np.dtype(dtype).itemsize * math.prod(_sizes(box)[1:])
  step = max(1, _PIECE_BYTES // max(1, row_bytes * num_rows)) * num_rows
  starts = range(box[0].start, box[0].stop, step)
  return [(slice(s, min(s + step, box[0].stop)), *box[1:]) for s in starts]


def _sizes(index: Index) -> list[int]:
  return [s.stop - s.start for s in index]


def num_bytes(index: Index, dtype: DType) -> int:
  """Bytes of a piece."""
  return np.dtype(dtype).itemsize * math.prod(_sizes(index))


def empty_box(abstract: ShapeDtype) -> np.ndarray:
  """Memory for the box of an array, aligned so that no device copies it."""
  shape = _sizes(box_of(abstract))
  size = np.dtype(abstract.dtype).itemsize * math.prod(shape)
  memory = np.empty(size + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + size].view(abstract.dtype).reshape(shape)


def put(
    array: np.ndarray, abstract: ShapeDtype, index: Index, piece: np.ndarray
) -> None:
  """Writes a piece into the memory of its box."""
  box = box_of(abstract)
  array[_relative(index, box)] = piece


def _relative(index: Index, box: Index) -> Index:
  return tuple(
      slice(i.start - b.start, i.stop - b.start) for i, b in zip(index, box)
  )


def placed(array: np.ndarray, abstract: ShapeDtype) -> jax.Array:
  """The box on the devices, in the sharding that was asked for."""
  sharding = getattr(abstract, 'sharding', None)
  if sharding is None:
    return jax.device_put(array)
  shape, box = tuple(abstract.shape), box_of(abstract)
  parts = []
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    full = tuple(slice(*i.indices(n)[:2]) for i, n in zip(index, shape))
    parts.append(jax.device_put(array[_relative(full, box)], device))
  return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def run(
    plans: Sequence[Sequence[tuple[Index, int]]],
    piece_fn: Callable[[int, Index], None],
    num_threads: int | None = None,
) -> Iterator[int]:
  """Runs a function on every piece of every array, in several threads.

  Args:
    plans: of each array the pieces, with the bytes that are held meanwhile.
    piece_fn: is called with the number of the array and the index of the piece.
    num_threads: by default the number of cores, and one.

  Yields:
    The number of each array when all of its pieces are done, in order.
  """
  budget = _Budget()
  running: collections.deque[tuple[int, list[futures.Future[None]]]] = (
      collections.deque()
  )
  pool = futures.ThreadPoolExecutor(num_threads or (os.cpu_count() or 1) + 1)

  def work(i, index, size):
    try:
      piece_fn(i, index)
    finally:
      budget.give_back(size)

  try:
    for i, pieces in enumerate(plans):
      running.append((i, []))
      for index, size in pieces:
        budget.take(size)
        running[-1][1].append(pool.submit(work, i, index, size))
      while running and all(f.done() for f in running[0][1]):
        yield _result(running.popleft())
    while running:
      yield _result(running.popleft())
  finally:
    pool.shutdown(cancel_futures=True)


def _result(entry: tuple[int, list[futures.Future[None]]]) -> int:
  for future in entry[1]:
    future.result()
  return entry[0]


class _Budget:
  """Bytes that may be in flight; one piece always may."""

  def __init__(self):
    self._in_use = 0
    self._changed = threading.Condition()

  def take(self, size: int) -> None:
    with self._changed:
      self._changed.wait_for(
          lambda: not self._in_use or self._in_use + size <= _BUDGET_BYTES
      )
      self._in_use += size

  def give_back(self, size: int) -> None:
    with self._changed:
      self._in_use -= size
      self._changed.notify()
