"""The saved state of an unfinished training.

```
saved = train_state.Saved(folder, stop, minutes=10)
num_done, state = saved.restore(state)
...
saved.after(num_done + 1, state)
```
"""

import pathlib
import shutil
import time

import jax
from jax.sharding import NamedSharding

from jaxsoup import _processes
from jaxsoup import checkpoints
from jaxsoup.runtime import preemption
from jaxsoup.typing import Leaf
from jaxsoup.typing import PathLike
from jaxsoup.typing import Tree


class Saved:
  """Keeps the latest state of one training in a folder.

  Its name is how much of the training is done: epochs, where an epoch is one
  call of a compiled program, else steps.

  A state is written at intervals of some minutes, and when the script is asked
  to stop. The older one is deleted only when the newer one is complete.
  """

  def __init__(
      self, folder: PathLike, stop: preemption.Stop, *, minutes: float = 10.0
  ):
    """Deletes what a killed process left unfinished.

    Args:
      folder: for the states, each in a directory named by what is done.
      stop: whether the script is to stop.
      minutes: the least time between two states.
    """
    self._folder = pathlib.Path(folder)
    self._stop = stop
    self._seconds = 60 * minutes
    self._last = time.monotonic()
    for path in self._folder.glob('*'):
      if not path.name.isdecimal() and _processes.is_main():
        shutil.rmtree(path)
    _processes.wait_for_all('unfinished states are deleted')

  def restore(self, state: Tree) -> tuple[int, Tree]:
    """How much is done, and the state after it.

    Args:
      state: the state at the start, returned where none is saved.

    Raises:
      ValueError: the saved state is damaged.
    """
    numbers = self._numbers()
    if not numbers:
      return 0, state
    path = self._path(numbers[-1])
    abstract = jax.tree.map(_abstract, state)
    try:
      return numbers[-1], checkpoints.Ingredients([path], abstract)[0]
    except ValueError as e:
      raise ValueError(
          f'{e} It is the saved state of an unfinished training: delete {path} '
          'to restart that training from scratch.'
      ) from e

  def after(self, num_done: int, state: Tree) -> None:
    """Saves the state where it is due.

    Args:
      num_done: epochs, or steps.
      state: a pytree of arrays.

    Raises:
      Preempted: the script is to stop; the state is saved.
    """
    is_due = time.monotonic() - self._last >= self._seconds
    # One process is told to stop, and all of them save.
    is_asked = _processes.is_any(self._stop.requested)
    if is_asked or _processes.is_any(is_due):
      older = self._numbers()
      checkpoints.save(self._path(num_done), state)
      if _processes.is_main():
        for done in older:
          shutil.rmtree(self._path(done))
      self._last = time.monotonic()
    if is_asked:
      raise preemption.Preempted(
          f'{self._path(num_done)} holds the training state'
      )

  def delete(self) -> None:
    """Deletes it all: the training has ended, and its result is saved."""
    if _processes.is_main():
      shutil.rmtree(self._folder, ignore_errors=True)

  def _numbers(self) -> list[int]:
    names = (path.name for path in self._folder.glob('*'))
    return sorted(int(name) for name in names if name.isdecimal())

  def _path(self, num_done: int) -> pathlib.Path:
    return self._folder / str(num_done)


def _abstract(x: Leaf) -> jax.ShapeDtypeStruct:
  """Shape and dtype, and the sharding of an array on a mesh."""
  sharding = getattr(x, 'sharding', None)
  is_spread = isinstance(sharding, NamedSharding)
  return jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding if is_spread else None
  )
