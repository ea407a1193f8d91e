"""Metrics of a training: JSON lines in a file, and what else is asked for.

```
log = metric_log.MetricLog(workdir / 'metrics.jsonl')
log.write({'run': 3, 'step': 100, 'loss': 0.7})
```
"""

import atexit
from collections.abc import Callable
from collections.abc import Mapping
import contextlib
import functools
import json
import pathlib
import time
from typing import Any

from jaxsoup import _processes
from jaxsoup.runtime import buckets
from jaxsoup.typing import PathLike

# Between two copies to a bucket.
_SECONDS = 60

WriteFn = Callable[[dict[str, Any]], object]


class MetricLog:
  """Appends a line a report; process 0 alone writes."""

  def __init__(
      self,
      path: PathLike,
      *,
      tensorboard: PathLike | None = None,
      write_fn: WriteFn | None = None,
  ):
    """Opens nothing yet.

    Args:
      path: of the file.
      tensorboard: a folder for TensorBoard's files; None: none are written.
      write_fn: is called with each report, too: a dict of numbers and names,
        such as `wandb.log` and `trackio.log` take.

    Raises:
      ImportError: tensorboardX is not installed.
    """
    self._path, self._sent = buckets.path_of(path), 0.0
    self._file: pathlib.Path | None = None  # A copy, if that is in a bucket.
    self._end = contextlib.ExitStack()
    atexit.register(self._end.close)
    self._writer_fn, self._write_fn = None, write_fn
    if tensorboard is not None:
      try:
        import tensorboardX
      except ImportError as e:
        raise ImportError(
            'tensorboardX is not installed: pip install "jaxsoup[tensorboard]"'
        ) from e

      # One a curve: the files of two in one second would have one name.
      @functools.cache
      def writer_fn(name):
        writer = tensorboardX.SummaryWriter(
            f'{tensorboard}/{name}', max_queue=1, flush_secs=10
        )
        atexit.register(writer.close)
        return writer

      self._writer_fn = writer_fn

  def write(self, values: Mapping[str, Any]) -> None:
    """Writes one report.

    Args:
      values: what JSON can hold; `run` and `step` name the curve and the place
        on it.
    """
    if not _processes.is_main():
      return
    line = json.dumps({'time': round(time.time(), 1), **values})
    if self._file is None:
      self._file = self._end.enter_context(buckets.local_copy(self._path))
      self._file.parent.mkdir(parents=True, exist_ok=True)
    # One write per line, so that lines of other processes stay whole.
    with self._file.open('a') as file:
      file.write(line + '\n')
    if self._file != self._path and time.monotonic() > self._sent + _SECONDS:
      self._path.write_bytes(self._file.read_bytes())
      self._sent = time.monotonic()
    if self._writer_fn is not None:
      writer = self._writer_fn(str(values.get('run', 'all')))
      for name, value in values.items():
        if name not in ('run', 'step') and isinstance(value, (int, float)):
          writer.add_scalar(name, value, values.get('step', 0))
    if self._write_fn is not None:
      self._write_fn(dict(values))
