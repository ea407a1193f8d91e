"""SIGTERM asks a script to stop: it saves what it has, and exits with 143.

```
with preemption.handled() as stop:
  for step in steps:
    ...
    if stop.requested:
      save()
    stop.check('step 3 is saved')
```
"""

from collections.abc import Iterable
from collections.abc import Iterator
import contextlib
import signal
import sys
import threading
from typing import Any

from jaxsoup import checkpoints
from jaxsoup.typing import Params
from jaxsoup.typing import Tree

EXIT_CODE = 128 + signal.SIGTERM


class Preempted(Exception):
  """The script stops here; the message says what is saved."""


class Stop:
  """Whether the script was asked to stop.

  Attributes:
    requested: becomes true when a SIGTERM comes.
  """

  def __init__(self):
    self.requested = False

  def check(self, saved: str) -> None:
    """Stops the script if it was asked to.

    Args:
      saved: what is saved by now, for the last line that the script prints.

    Raises:
      Preempted: `requested` is true.
    """
    if self.requested:
      raise Preempted(saved)


@contextlib.contextmanager
def handled() -> Iterator[Stop]:
  """Turns the first SIGTERM into a request to stop; a second one kills.

  For scripts. Handlers belong to the main thread: in another one nothing is
  changed, and a SIGTERM does what it did before.

  Yields:
    A `Stop`, to look at between two steps.

  Raises:
    SystemExit: with 143, after one line on standard error, when a `Stop.check`
      stopped the script.
  """
  stop = Stop()
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return

  def on_term(*_):
    stop.requested = True
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

  before = signal.signal(signal.SIGTERM, on_term)
  try:
    yield stop
  except Preempted as e:
    print(
        f'Stopped by SIGTERM: {e}. Run the same command again to continue.',
        file=sys.stderr,
    )
    raise SystemExit(EXIT_CODE) from None
  finally:
    # None: the handler was not set from Python, which cannot set it again.
    signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


class Ingredients(checkpoints.Ingredients):
  """Ingredients that look for a request to stop before each one is read."""

  def __init__(self, *args: Any, stop: Stop, saved: str, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self._stop = stop
    self._saved = saved

  def __getitem__(self, k):
    self._stop.check(self._saved)
    return super().__getitem__(k)

  def onto(self, abstract_params: Params) -> 'Ingredients':
    """The same checkpoints, read with other shardings."""
    return Ingredients(
        self.paths,
        abstract_params,
        item=self.item,
        stop=self._stop,
        saved=self._saved,
    )

  def stopping(self, batches: Iterable[Tree]) -> '_Batches':
    """Batches that look for a request to stop before each one."""
    return _Batches(batches, self._stop, self._saved)


class _Batches:
  """Unlike a generator, they can be read in every epoch."""

  def __init__(self, batches: Iterable[Tree], stop: Stop, saved: str):
    self._batches = batches
    self._stop = stop
    self._saved = saved

  def __iter__(self):
    for batch in self._batches:
      self._stop.check(self._saved)
      yield batch
