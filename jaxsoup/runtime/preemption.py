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

from collections.abc import Iterator
import contextlib
import signal
import sys
import threading

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
