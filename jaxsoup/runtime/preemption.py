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
import itertools
import signal
import sys
import threading

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
  """The script stops here; the message says what is saved."""


class Stop:
  """Whether the script was asked to stop.

  Attributes:
    requested: becomes true when a SIGTERM comes; in a run of several processes
      when they have `agreed`.
  """

  def __init__(self):
    self.requested = False

  def agreed(self) -> bool:
    """Whether to stop here, alike in all processes of a run.

    Each of them has to ask as often, at the same places. They do not wait for
    each other: jax tells all of them of a SIGTERM, and of the next question
    that none of them has asked yet.
    """
    if jax.process_count() > 1:
      number = next(_QUESTIONS)
      self.requested |= multihost_utils.reached_preemption_sync_point(number)
    return self.requested

  def check(self, saved: str) -> None:
    """Raises `Preempted`, which says what is saved, if it is `agreed`."""
    if self.agreed():
      raise Preempted(saved)


_QUESTIONS = itertools.count(1)


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

  def on_term(*_):
    stop.requested = True
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

  is_main = threading.current_thread() is threading.main_thread()
  with contextlib.ExitStack() as stack:
    if is_main and jax.process_count() == 1:  # Else jax handles it.
      before = signal.signal(signal.SIGTERM, on_term)
      # None: the handler was not set from Python, which cannot set it again.
      after = signal.SIG_DFL if before is None else before
      stack.callback(signal.signal, signal.SIGTERM, after)
    try:
      yield stop
    except Preempted as e:
      print(
          f'Stopped by SIGTERM: {e}. Run the same command again to continue.',
          file=sys.stderr,
      )
      raise SystemExit(128 + signal.SIGTERM) from None
