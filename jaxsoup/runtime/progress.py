"""Progress of a script: a bar with the time left, or plain lines."""

from collections.abc import Callable
from collections.abc import Mapping
import contextlib
import sys
import time
from typing import Any

# A callback: which stage, and how much of it is done, in 0..1.
ProgressFn = Callable[[str, float], None]

_SECONDS_BETWEEN_LINES = 10.0


def silent(stage: str, done: float) -> None:
  """Shows nothing."""


@contextlib.contextmanager
def shown(shares: Mapping[str, float], *, file: Any = None):
  """Shows progress on a terminal as a bar, elsewhere as lines.

  Args:
    shares: the stages in their order, and how long each takes, in any unit.
    file: where to; standard error by default.

  Yields:
    A `ProgressFn`.
  """
  file = file or sys.stderr
  if not file.isatty():
    yield _lines(shares, file)
    return
  from rich import console
  from rich import progress

  columns = (
      progress.TextColumn('{task.description:<24}'),
      progress.BarColumn(),
      progress.TaskProgressColumn(),
      progress.TimeRemainingColumn(elapsed_when_finished=True),
  )
  with progress.Progress(*columns, console=console.Console(file=file)) as bar:
    task = bar.add_task(next(iter(shares)), total=1.0)
    yield lambda stage, done: bar.update(
        task, description=stage, completed=total_done(shares, stage, done)
    )
    bar.update(task, description='done', completed=1.0)


def total_done(shares: Mapping[str, float], stage: str, done: float) -> float:
  """How much of all stages is done, in 0..1.

  Example:
    >>> total_done({'first': 1, 'second': 3}, 'second', 0.5)
    0.625
  """
  names = list(shares)
  before = sum(shares[name] for name in names[: names.index(stage)])
  return (before + done * shares[stage]) / sum(shares.values())


def _lines(shares, file) -> ProgressFn:
  """One line when a stage begins, and every ten seconds."""
  start = time.monotonic()
  last_stage, last_time = '', start

  def progress_fn(stage, done):
    nonlocal last_stage, last_time
    now = time.monotonic()
    if stage == last_stage and now - last_time < _SECONDS_BETWEEN_LINES:
      return
    last_stage, last_time = stage, now
    total, elapsed = total_done(shares, stage, done), now - start
    left = f', {elapsed / total - elapsed:.0f} s left' if total > 0.05 else ''
    text = f'{stage}: {total:.0%} of all, {elapsed:.0f} s{left}'
    print(text, file=file, flush=True)

  return progress_fn
