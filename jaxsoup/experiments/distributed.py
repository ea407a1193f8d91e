"""Connects the processes of a distributed run.

```
distributed.start('host0:1234', num_processes=2, process=0, timeout=300)
distributed.banner(workdir)
```
"""

import os
import sys
import threading
from typing import Any

import jax


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process: int | None = None,
    *,
    timeout: int = 300,
) -> None:
  """Waits for all processes of a run; exits with an error if one is missing.

  Call it before any device is touched.

  Args:
    coordinator: HOST:PORT of process 0; None where jax detects it
      (Cloud TPU, Slurm, Open MPI, Kubernetes).
    num_processes: how many there are; None as above.
    process: which one this is, from 0; None as above.
    timeout: seconds to wait.

  Raises:
    ValueError: jax cannot detect it, or the address is malformed.
  """
  done = threading.Event()

  # jax itself aborts with a stack trace that names no process.
  def watch():
    if not done.wait(timeout):
      who = 'This process' if process is None else f'Process {process}'
      print(
          f'Error: {who} waited {timeout} s for the other processes'
          + (f' at {coordinator}' if coordinator else '')
          + ', but not all connected. Start'
          + (f' all {num_processes}' if num_processes else ' all of them')
          + ' with the same coordinator, each with its own number, and check '
          'the output of the others.',
          file=sys.stderr,
          flush=True,
      )
      os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
  try:
    jax.distributed.initialize(
        coordinator, num_processes, process, initialization_timeout=timeout + 60
    )
  except (RuntimeError, ValueError) as e:
    raise ValueError(
        f'jax cannot join the other processes: {str(e).splitlines()[0]} Pass '
        '--coordinator HOST:PORT --num-processes N --process I.'
    ) from e
  finally:
    done.set()


def banner(place: Any) -> str:
  """Which process this is, what it has, and where it writes.

  Args:
    place: the directory or file that the run makes.

  Returns:
    One line.
  """
  local, total = jax.local_device_count(), jax.device_count()
  kind = jax.devices()[0].device_kind
  return (
      f'process {jax.process_index()} of {jax.process_count()}, {local} of '
      f'{total} devices ({kind}), {place}'
  )
