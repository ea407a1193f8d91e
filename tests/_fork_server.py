"""Runs commands in processes that have imported jax already.

Each line of the input is a JSON list of arguments, of the `jaxsoup` command or,
after `experiment`, of an experiment. Prints the id of its process, and when it
has ended its status.
"""

import json
import os
import sys
import traceback
import warnings

import optax  # noqa: F401
import orbax.checkpoint  # noqa: F401
import scipy.stats  # noqa: F401

from jaxsoup import checkpoints  # noqa: F401
from jaxsoup import cli
from jaxsoup.experiments import main

# jax says that it has threads, which it starts with its devices only.
warnings.filterwarnings('ignore', 'os.fork')


def _run(arguments: list[str]) -> int:
  log = os.open(os.devnull, os.O_WRONLY)
  os.dup2(log, 1)
  if arguments[0] == 'experiment':
    return main.main(arguments[1:])
  try:
    cli.app(arguments)
  except SystemExit as e:
    return int(e.code or 0)
  return 0


for line in sys.stdin:
  pid = os.fork()
  if not pid:
    code = 70
    try:
      code = _run(json.loads(line))
    except BaseException:
      traceback.print_exc()
    finally:
      os._exit(code)
  print(pid, flush=True)
  print(os.waitpid(pid, 0)[1], flush=True)
