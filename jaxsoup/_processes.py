"""Several processes with one task: who writes, who waits, what is agreed on."""

from collections.abc import Hashable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import json
from typing import Any
from typing import TypeVar

import jax
from jax.experimental import multihost_utils
import numpy as np

from jaxsoup.typing import Leaf

_T = TypeVar('_T', bound=Hashable)


def is_main() -> bool:
  """Whether this process writes what is written once."""
  return jax.process_index() == 0


def wait_for_all(name: str) -> None:
  """Returns when every process has come here."""
  multihost_utils.sync_global_devices(name)


def from_main(content: bytes) -> bytes:
  """What the main process passed, on every process."""
  size = multihost_utils.broadcast_one_to_all(np.int32(len(content)))
  padded = np.zeros(int(size), np.uint8)
  if is_main():
    padded[:] = np.frombuffer(content, np.uint8)
  return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()


def json_of_main(value: Any) -> Any:
  """What the main process passed, as JSON, on every process."""
  return json.loads(from_main(json.dumps(value).encode()))


def agreed(answer: bool) -> bool:
  """The main process's answer, on every process: disks are not seen alike."""
  return json_of_main(bool(answer))


def is_any(answer: bool) -> bool:
  """Whether one of the processes says so."""
  return bool(np.any(multihost_utils.process_allgather(np.asarray(answer))))


def agreed_min(value: int, array: jax.Array) -> int:
  """The least value of the processes that hold an array, and all call this.

  What a process sees alone, such as free memory, must not decide whether it
  takes part in a collective.
  """
  if array.is_fully_addressable:
    return value
  values = merged({str(jax.process_index()): str(value)}).values()
  return min(map(int, values))


def summed(array: np.ndarray) -> np.ndarray:
  """The sum over the processes of arrays of one shape and dtype."""
  # A broadcast adds what all sources pass.
  return np.asarray(multihost_utils.broadcast_one_to_all(array, is_source=True))


def is_spread(leaf: Any) -> bool:
  """Whether no process has the whole of an array."""
  return isinstance(leaf, jax.Array) and not (
      leaf.is_fully_addressable or leaf.is_fully_replicated
  )


def gathered(leaf: Leaf) -> np.ndarray:
  """A whole array on the host of every process."""
  if is_spread(leaf):
    leaf = multihost_utils.process_allgather(leaf, tiled=True)
  return np.asarray(jax.device_get(leaf))


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Work that fails on all processes if it fails on one: none waits."""
  try:
    yield
  except BaseException:
    is_any(True)
    raise
  if is_any(False):
    raise RuntimeError('Another process failed: see what it says.')


def merged(entries: dict[str, Any]) -> dict[str, Any]:
  """The entries of all processes in one dict, of what JSON can hold."""
  if jax.process_count() == 1:
    return entries
  own = json.dumps(entries).encode()
  lengths = multihost_utils.process_allgather(np.int32(len(own)))
  padded = np.frombuffer(own.ljust(int(np.max(lengths))), np.uint8)
  rows = np.asarray(multihost_utils.process_allgather(padded))
  return {k: v for row in rows for k, v in json.loads(row.tobytes()).items()}


def share_of(
    sizes: Mapping[_T, int], number: int, num_processes: int
) -> list[_T]:
  """The parts of one process: the largest first, to that with the least."""
  loads, owners = [0] * num_processes, {}
  for part in sorted(sizes, key=sizes.__getitem__, reverse=True):
    owners[part] = loads.index(min(loads))
    loads[owners[part]] += sizes[part]
  return [part for part in sizes if owners[part] == number]
