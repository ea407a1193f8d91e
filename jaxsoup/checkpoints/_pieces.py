"""Arrays in pieces: threads read them, and memory stays bounded.

```
params = _pieces.load(flat, plans, read_fn, verify_fn)
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
from typing import Any

import jax
import numpy as np

from jaxsoup import _tree
from jaxsoup.checkpoints._source import Index
from jaxsoup.typing import DType
from jaxsoup.typing import Params
from jaxsoup.typing import ShapeDtype

# Small enough for the caches of a core, large enough that Python costs little.
_PIECE_BYTES = 1 << 21
# What may be in flight: bounds the memory of all readers together.
_BUDGET_BYTES = 128 << 20

# Of each array its pieces, with the bytes that are held meanwhile.
Plans = Sequence[Sequence[tuple[Index, int]]]
ReadFn = Callable[[int, Index], np.ndarray]


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
  """Cuts the box of an array, () if a scalar, along its first axis.

  The dtype is that of the file, of which at least `num_rows` are read at once.
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


def held_bytes(sizes: Sequence[int]) -> int:
  """What all readers hold at most, of pieces of these sizes."""
  return max(min(_BUDGET_BYTES, sum(sizes)), max(sizes, default=0))


def _empty_box(abstract: ShapeDtype) -> np.ndarray:
  """Memory for the box of an array, aligned so that no device copies it."""
  shape = _sizes(box_of(abstract))
  size = np.dtype(abstract.dtype).itemsize * math.prod(shape)
  memory = np.empty(size + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + size].view(abstract.dtype).reshape(shape)


def _relative(index: Index, box: Index) -> Index:
  return tuple(
      slice(i.start - b.start, i.stop - b.start) for i, b in zip(index, box)
  )


def _placed(array: np.ndarray, abstract: ShapeDtype) -> jax.Array:
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


def load(
    flat: _tree.Flat,
    plans: Plans,
    read_fn: ReadFn,
    verify_fn: Callable[[_tree.Path], None],
) -> Params:
  """A tree whose pieces are read; each leaf is verified when it is complete."""
  boxes: list[Any] = list(map(_empty_box, flat.leaves))

  def piece_fn(i, index):
    piece, leaf = read_fn(i, index), flat.leaves[i]
    _tree.require_integers_fit(piece, leaf.dtype, flat.paths[i])
    place = _relative(index, box_of(leaf))
    boxes[i][place] = piece.astype(leaf.dtype, copy=False)

  for i in run(plans, piece_fn):
    verify_fn(flat.paths[i])
    boxes[i] = _placed(boxes[i], flat.leaves[i])
  return flat.replace(boxes)


def run(
    plans: Plans, piece_fn: Callable[[int, Index], object]
) -> Iterator[int]:
  """Runs a function on every piece of every array, in several threads.

  Yields the number of each array when all of its pieces are done, in order.
  """
  budget = _Budget()
  running: collections.deque[tuple[int, list[futures.Future[None]]]] = (
      collections.deque()
  )
  pool = futures.ThreadPoolExecutor((os.cpu_count() or 1) + 1)

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
