"""Temporary."""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple
from typing import Protocol

import numpy as np


class Source(Protocol):

  def __len__(self) -> int:
    ...

  def __getitem__(self, rows):
    ...


class Arrays:

  def __init__(self, arrays):
    self.arrays = dict(arrays)

  def __len__(self):
    return len(next(iter(self.arrays.values())))

  def __getitem__(self, rows):
    return {k: v[rows] for k, v in self.arrays.items()}


class Splits(NamedTuple):
  train: Any
  held_out: Any
  test: Any
  shifts: Mapping[str, Any] = {}
  pretrain: Any = None
  views: Mapping[str, Callable] = {}


def batches(
    source,
    batch_size,
    *,
    seed=None,
    epoch=0,
    start=0,
    process_index=0,
    process_count=1,
):
  n = len(source)
  if seed is None:
    for i in range(0, n, batch_size):
      rows = np.arange(i, i + batch_size)
      b = source[rows.clip(max=n - 1)]
      yield {**b, 'mask': rows < n}
  else:
    order = np.random.default_rng([seed, epoch]).permutation(n)
    for i in range(0, n - batch_size + 1, batch_size):
      yield source[order[i : i + batch_size]]
