"""`subprocess` for Python commands, without the seconds that imports take.

```
done = _forked.run([sys.executable, '-m', 'jaxsoup.experiments.main', *more])
done.returncode, done.stdout, done.stderr
```

Commands run in processes of their own, forked from one that has imported what
they use and done nothing with it: see `_fork_server.py`.
"""

import atexit
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import functools
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import tempfile
from typing import IO
from typing import Any

_SERVER = pathlib.Path(__file__).parent / '_fork_server.py'
# What experiments import, at once or later. Not the modules that are run.
MODULES = (
    'jaxsoup.cli',
    'jaxsoup.checkpoints',
    'jaxsoup.runtime.distributed',
    'jaxsoup.experiments.landscapes',
    'jaxsoup.experiments.results',
    'jaxsoup.experiments.stages',
    'jaxsoup.report',
    'matplotlib.pyplot',
    'optax',
    'orbax.checkpoint',
    'scipy.stats',
    'sklearn.datasets',
)


class Process:
  """One command, with those parts of `subprocess.Popen` that tests use.

  Attributes:
    pid: of the process.
    returncode: None while it runs.
    stdout, stderr: what it printed, once it has ended.
  """

  def __init__(
      self,
      command: Sequence[object],
      *,
      env: Mapping[str, str] | None = None,
      cwd: str | pathlib.Path | None = None,
      modules: tuple[str, ...] = MODULES,
  ):
    self.args = [str(x) for x in command]
    self.returncode: int | None = None
    self.stdout = self.stderr = ''
    self._files = [tempfile.TemporaryFile('w+') for _ in range(2)]  # noqa: SIM115
    told, told_here = os.pipe()
    self._told = os.fdopen(told)
    request = {
        'arguments': self.args[1:],
        'environment': dict(os.environ if env is None else env),
        'directory': str(cwd or os.getcwd()),
    }
    descriptors = [*(file.fileno() for file in self._files), told_here]
    server = _server(self.args[0], modules)
    socket.send_fds(server, [json.dumps(request).encode()], descriptors)
    os.close(told_here)
    self.pid = int(self._told.readline())

  def poll(self) -> int | None:
    if self.returncode is None and select.select([self._told], [], [], 0)[0]:
      self.wait()
    return self.returncode

  def wait(self, timeout: float | None = None) -> int:
    if self.returncode is None:
      if not select.select([self._told], [], [], timeout)[0]:
        raise subprocess.TimeoutExpired(self.args, timeout)
      with self._told:
        status = int(self._told.readline())
      self.returncode = os.waitstatus_to_exitcode(status)
      self.stdout, self.stderr = map(_text, self._files)
    return self.returncode

  def communicate(self, timeout: float | None = None) -> tuple[str, str]:
    self.wait(timeout)
    return self.stdout, self.stderr

  def send_signal(self, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # It has ended.
      os.kill(self.pid, number)

  def kill(self) -> None:
    self.send_signal(signal.SIGKILL)


def _text(file: IO[str]) -> str:
  with file:
    file.seek(0)
    return file.read()


def run(command: Sequence[object], **options: Any) -> Process:
  """A command that has ended."""
  process = Process(command, **options)
  process.wait()
  return process


@functools.cache
def _server(python: str, modules: tuple[str, ...]) -> socket.socket:
  here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
  server = subprocess.Popen(
      [python, _SERVER, *modules],
      stdin=there,
      # What it imports is that of this checkout.
      env=os.environ | {'PYTHONPATH': str(_SERVER.parent.parent)},
  )
  there.close()

  def stop():
    here.close()
    server.wait()

  atexit.register(stop)
  return here
