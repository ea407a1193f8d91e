"""Runs Python commands in processes that have imported what takes long.

```
python tests/_fork_server.py jax numpy
```

The arguments are modules to import. The input is a socket (see `_forked.py`).
Each message is a JSON object with the `arguments` of a `python` command, its
`environment` and its directory, and comes with three file descriptors: of its
output, of its errors, and of a pipe, for the id of its process and, when it has
ended, its status.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import socket
import sys
import threading
import traceback
import warnings


def _request() -> dict:
  """Forks at each request, and returns in the processes that have to run it."""
  requests = socket.socket(fileno=0)
  while True:
    message, descriptors, *_ = socket.recv_fds(requests, 2**20, 3)
    with contextlib.suppress(ChildProcessError):
      while os.waitpid(-1, os.WNOHANG)[0]:
        pass
    if not message:
      sys.exit()
    if not os.fork():
      break
    for descriptor in descriptors:
      os.close(descriptor)
  requests.close()
  out, errors, told = descriptors
  for source, target in (
      (os.open(os.devnull, os.O_RDONLY), 0),
      (out, 1),
      (errors, 2),
  ):
    if source != target:
      os.dup2(source, target)
      os.close(source)
  pid = os.fork()
  if pid:
    os.write(told, b'%d\n' % pid)
    os.write(told, b'%d\n' % os.waitpid(pid, 0)[1])
    os._exit(0)
  os.close(told)
  return json.loads(message)


def _run(first: str, *others: str) -> None:
  """As the interpreter does with its arguments."""
  is_script = first not in ('-c', '-m')
  sys.path[0] = os.path.dirname(first) if is_script else os.getcwd()
  if first == '-c':
    code, *sys.argv[1:] = others
    sys.argv[0] = first
    exec(compile(code, '<string>', 'exec'), {'__name__': '__main__'})
  elif first == '-m':
    sys.argv[:] = others
    runpy.run_module(others[0], run_name='__main__', alter_sys=True)
  else:
    sys.argv[:] = first, *others
    runpy.run_path(first, run_name='__main__')


def _status(*arguments: str) -> int:
  """Runs, and says how it ended."""
  try:
    _run(*arguments)
  except SystemExit as e:
    if e.code is None or isinstance(e.code, int):
      return e.code or 0
    print(e.code, file=sys.stderr)
    return 1
  except BaseException:
    traceback.print_exc()
    return 1
  return 0


def _exit(status: int) -> None:
  """As the interpreter does, but for half a second in which it forgets."""
  threading._shutdown()
  atexit._run_exitfuncs()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


if __name__ == '__main__':
  # jax says that it has threads, which it starts with its devices only.
  warnings.filterwarnings('ignore', 'os.fork')
  for name in sys.argv[1:]:
    # What cannot be imported is missed by those that need it.
    with contextlib.suppress(Exception):
      importlib.import_module(name)
  gc.freeze()  # Or each process copies the pages of all objects.
  request = _request()
  os.chdir(request['directory'])
  os.environ.clear()
  os.environ.update(request['environment'])
  _exit(_status(*request['arguments']))
