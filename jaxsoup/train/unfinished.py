"""The saved state of an unfinished training, written while it goes on.

```
saved = unfinished.Saved(folder, stop, minutes=10)
num_done, state = saved.restore(state)
...
saved.after(num_done + 1, state)
```
"""

import time
from typing import Any

from etils import epath
import jax
import orbax.checkpoint as ocp

from jaxsoup import _files
from jaxsoup import _processes
from jaxsoup.runtime import buckets
from jaxsoup.runtime import preemption
from jaxsoup.typing import PathLike
from jaxsoup.typing import Tree


class _Manager(ocp.CheckpointManager):

  def reached_preemption(self, step: int) -> bool:
    # Each question to the preemption service has a number, and `Stop` asks.
    return False


class Saved:
  """Keeps the latest state of one training in a folder.

  A state is written at intervals of some minutes, in the background, and when
  the script is asked to stop.
  """

  def __init__(
      self, folder: PathLike, stop: preemption.Stop, *, minutes: float = 10.0
  ):
    """Reads and writes nothing yet.

    Args:
      folder: for the states, each in a directory named by the steps done.
      stop: whether the script is to stop.
      minutes: the least time between two states.
    """
    self._folder = epath.Path(buckets.path_of(folder))
    if not _files.is_remote(folder):  # Orbax wants it absolute.
      self._folder = self._folder.absolute()
    self._stop = stop
    self._seconds = 60 * minutes
    self._last = self._began = time.monotonic()
    self._num_restored = 0
    self._next_look: int | None = None
    self._manager: _Manager | None = None

  def restore(self, state: Tree) -> tuple[int, Tree]:
    """How many steps are done, and the state after them, or at the start.

    Raises:
      ValueError: the saved state is damaged.
    """
    if not _processes.agreed(self._folder.exists()):
      return 0, state
    step = self._opened().latest_step()
    if step is None:
      return 0, state
    target = _numbered(jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
    try:
      arrays = self._opened().restore(
          step, args=ocp.args.StandardRestore(target)
      )
    except Exception as e:  # Whatever Orbax and tensorstore raise.
      raise ValueError(
          f'{self._folder / str(step)}, the saved state of an unfinished '
          f'training, cannot be read: {str(e).splitlines()[0]:.300}. Delete '
          'it to restart that training from scratch.'
      ) from e
    self._num_restored = step
    structure = jax.tree.structure(state)
    return step, jax.tree.unflatten(structure, [arrays[n] for n in target])

  def after(self, num_done: int, state: Tree) -> None:
    """Saves the state, a pytree of arrays, where it is due.

    Raises:
      Preempted: the script is to stop; the state is saved.
    """
    is_asked = self._stop.agreed()
    if is_asked or self._is_due(num_done):
      args = ocp.args.StandardSave(_numbered(state))
      self._opened().save(num_done, args=args, force=True)
      self._last = time.monotonic()
    if is_asked:
      self.wait()
      raise preemption.Preempted(
          f'{self._folder / str(num_done)} holds the training state'
      )

  def wait(self) -> None:
    """Returns when all that was saved is on the disk."""
    if self._manager is not None:
      self._manager.wait_until_finished()

  def delete(self) -> None:
    """Deletes it all: the training has ended, and its result is saved."""
    if self._manager is not None:
      self._manager.close()
      self._manager = None
    if _processes.is_main():
      buckets.remove(self._folder)

  def _is_due(self, num_done: int) -> bool:
    """Whether the time has come, by the clock of the main process.

    Processes agree on it now and then: the next time when about as many steps
    will be done as fit into what is left.
    """
    if self._next_look is not None and num_done < self._next_look:
      return False
    now = time.monotonic()
    left = self._seconds - (now - self._last)
    speed = (num_done - self._num_restored) / max(now - self._began, 1e-9)
    num = round(speed * (left if left > 0 else self._seconds))
    is_due, num_more = _processes.json_of_main([left <= 0, max(1, num)])
    self._next_look = num_done + num_more
    return is_due

  def _opened(self) -> _Manager:
    if self._manager is None:
      options = ocp.CheckpointManagerOptions(
          max_to_keep=1, cleanup_tmp_directories=True
      )
      self._manager = _Manager(self._folder, options=options)
    return self._manager


def _numbered(state: Tree) -> dict[str, Any]:
  """Its leaves by their numbers: Orbax need not know the containers."""
  return {str(i): x for i, x in enumerate(jax.tree.leaves(state))}
