"""Checkpoints and batches that look for a request to stop before each read."""

from collections.abc import Iterable
import dataclasses
from typing import Any

from jaxsoup import checkpoints
from jaxsoup.runtime import preemption
from jaxsoup.typing import Tree


class Ingredients(checkpoints.Ingredients):
  """Ingredients that look for a request to stop before each one is read."""

  def __init__(
      self, *args: Any, stop: preemption.Stop, saved: str, **kwargs: Any
  ):
    super().__init__(*args, **kwargs)
    self._stop, self._saved = stop, saved

  def __getitem__(self, k):
    self.look_for_stop()
    return super().__getitem__(k)

  def look_for_stop(self) -> None:
    self._stop.check(self._saved)

  def stopping(self, batches: Iterable[Tree]) -> 'Stoppable':
    """Batches that look for a request to stop before each one."""
    return Stoppable(batches, self._stop, self._saved)


@dataclasses.dataclass(frozen=True)
class Stoppable:
  """Batches that look for a request to stop before each one.

  Unlike a generator, they can be read in every epoch.
  """

  batches: Iterable[Tree]
  stop: preemption.Stop
  saved: str

  def __iter__(self):
    for batch in self.batches:
      self.stop.check(self.saved)
      yield batch
