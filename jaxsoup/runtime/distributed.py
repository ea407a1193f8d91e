"""Connects the processes of a distributed run.

```
distributed.start(timeout=300)
distributed.banner(workdir)
```
"""

import os
import sys
import threading
from typing import Any

import jax


def start(*, timeout: int = 300) -> None:
  """Waits for all processes of a run; exits with an error if one is missing.

  Call it before any device is touched. jax detects the others (Cloud TPU,
  Slurm, Open MPI, Kubernetes), or the environment of each process says where
  they are: JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES,
  and JAX_PROCESS_ID, from 0.

  Args:
    timeout: seconds to wait.

  Raises:
    ValueError: jax cannot detect them, the address is malformed, or a variable
      is not a number.
  """
  coordinator = os.environ.get('JAX_COORDINATOR_ADDRESS')
  # These two jax does not read.
  num_processes = _number_in('JAX_NUM_PROCESSES')
  process = _number_in('JAX_PROCESS_ID')

  # jax itself aborts with a stack trace that names no process.
  def abort():
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

  watch = threading.Timer(timeout, abort)
  watch.daemon = True
  watch.start()
  try:
    jax.distributed.initialize(
        coordinator, num_processes, process, initialization_timeout=timeout + 60
    )
  except (IndexError, OverflowError, RuntimeError, ValueError) as e:
    raise ValueError(
        f'jax cannot join the other processes: {str(e).splitlines()[0]} Set '
        'JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES=N and '
        'JAX_PROCESS_ID=I in the environment of each.'
    ) from e
  finally:
    watch.cancel()


def _number_in(variable: str) -> int | None:
  text = os.environ.get(variable)
  if text is not None and not text.isdecimal():
    raise ValueError(f'{variable}={text!r} is not a number, such as 2.')
  return None if text is None else int(text)


def banner(place: Any) -> str:
  """One line: which process this is, what it has, and where it writes."""
  local, total = jax.local_device_count(), jax.device_count()
  kind = jax.devices()[0].device_kind
  return (
      f'process {jax.process_index()} of {jax.process_count()}, {local} of '
      f'{total} devices ({kind}), {place}'
  )
