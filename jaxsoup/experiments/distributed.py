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
    coordinator: HOST:PORT of process 0. Default: JAX_COORDINATOR_ADDRESS, or
      what jax detects (Cloud TPU, Slurm, Open MPI, Kubernetes).
    num_processes: how many there are. Default: JAX_NUM_PROCESSES, or as above.
    process: which one this is, from 0. Default: JAX_PROCESS_ID, or as above.
    timeout: seconds to wait.

  Raises:
    ValueError: jax cannot detect it, the address is malformed, or a variable
      of the environment is not a number.
  """
  # Of these, jax itself reads only the first.
  coordinator = coordinator or os.environ.get('JAX_COORDINATOR_ADDRESS')
  if num_processes is None:
    num_processes = _number_in('JAX_NUM_PROCESSES')
  if process is None:
    process = _number_in('JAX_PROCESS_ID')
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
        f'jax cannot join the other processes: {str(e).splitlines()[0]} Set '
        'JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES=N and '
        'JAX_PROCESS_ID=I in the environment of each.'
    ) from e
  finally:
    done.set()


def _number_in(variable: str) -> int | None:
  text = os.environ.get(variable)
  if text is None or text.isdecimal():
    return None if text is None else int(text)
  raise ValueError(f'{variable}={text!r} is not a number, such as 2.')


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
