"""Calls of one function on the workers of an executor, some made ahead.

```
calls = Calls(executor, function)
for key in keys:
  calls.begin(key, argument_of(key))
values = [calls.value(key, argument_of(key)) for key in keys]
```
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from concurrent import futures
import contextlib
import copy
import functools
import os
import pickle
import threading
import time
import traceback
from typing import Any
import uuid

import cloudpickle
import jax

# How often a call is made whose worker dies.
_NUM_TRIES = 3
_POLL = 0.2  # Seconds.


class Calls:
  """Calls by key; their values are asked for in the order of this process.

  What the function raises is raised where its value is asked for. A call whose
  worker dies is made again.

  Attributes:
    num_ahead: how many may be begun before their values are asked for.
    num_stale: how many calls were dropped after a worker had begun them.
  """

  def __init__(
      self,
      executor: futures.Executor | None,
      function: Callable[..., Any],
      num_ahead: int | None = None,
      on_wait: Callable[[], None] = lambda: None,
  ):
    """Calls nothing yet.

    Args:
      executor: where calls are made. None: here, when they are asked for.
      function: each worker unpickles it once, or has a copy if it is a thread.
      num_ahead: how many calls may wait or run at a time.
      on_wait: called now and then while a value is awaited; may raise.
    """
    self.num_stale = self.num_ahead = 0
    self._executor = executor
    self._shared = _Shared(function)
    self._on_wait = on_wait
    self._begun: dict[Any, futures.Future[Any]] = {}
    self._late: dict[Any, futures.Future[Any]] = {}
    if executor is None:
      return
    if not hasattr(executor, 'submit'):
      raise TypeError(
          f'executor is {executor!r:.80}: expected a concurrent.futures.'
          'Executor, such as a ProcessPoolExecutor.'
      )
    if jax.process_count() > 1:
      raise ValueError(
          f'An executor is given, and jax runs in {jax.process_count()} '
          'processes, which score each candidate together. Choose one: no '
          'executor (--workers), or no jax.distributed (--distributed).'
      )
    if num_ahead is not None and num_ahead < 1:
      raise ValueError(f'num_ahead is {num_ahead}: it must be at least 1.')
    self.num_ahead = num_ahead or 2 * (os.cpu_count() or 1)

  def begin(self, key: Any, *args: Any) -> None:
    """Makes a call, unless that has begun or too many are under way."""
    if key not in self._begun and len(self._begun) < self.num_ahead:
      self._begin(key, args)

  def _begin(self, key: Any, args: Any) -> None:
    assert self._executor is not None
    try:
      future = self._executor.submit(_called, self._shared, args)
    except Exception as e:  # It matters only if the value is asked for.
      future = futures.Future()
      future.set_exception(e)
    self._begun[key] = future

  def value(self, key: Any, *args: Any) -> Any:
    """What the function returns."""
    if self._executor is None:
      return self._shared.function(*args)
    for _ in range(_NUM_TRIES):
      if key not in self._begun:
        self._begin(key, args)
      self._wait_for(self._begun[key])
      try:
        value, error = self._begun.pop(key).result()
      except Exception as e:
        if self._shared.error is not None:
          raise self._shared.error from None
        died = e
        if isinstance(e, futures.BrokenExecutor):
          break
      else:
        if error is not None:
          raise error
        return value
    raise _died_error(died, key) from died

  def values(self, args: Iterable[Any]) -> Iterator[Any]:
    """The values of all these, in order."""
    args = list(args)
    try:
      for i, arg in enumerate(args):
        for j in range(i, min(i + self.num_ahead, len(args))):
          self.begin(j, args[j])
        yield self.value(i, arg)
    finally:
      self.drop()

  def drop(self) -> None:
    """Gives up all that was begun, and cancels it where no worker has it."""
    for key, future in self._begun.items():
      if not future.cancel():
        self.num_stale += 1
        self._late[key] = future
    self._begun.clear()

  def late(self) -> Iterator[tuple[Any, Any]]:
    """Keys and values of what was given up, and has ended since."""
    for key in [k for k, future in self._late.items() if future.done()]:
      with contextlib.suppress(Exception):
        value, error = self._late.pop(key).result()
        if error is None:
          yield key, value

  def _wait_for(self, future: futures.Future[Any]) -> None:
    while not future.done():
      self._on_wait()
      if isinstance(future, futures.Future):
        futures.wait([future], _POLL)
      else:  # Of submitit.
        time.sleep(_POLL)


def _died_error(died: Exception, key: Any) -> ChildProcessError:
  said = f'{type(died).__name__}: {died}'.strip(': ')
  if isinstance(died, futures.BrokenExecutor):
    return ChildProcessError(
        f'A worker died, and with it the executor ({said}). Its memory may '
        'have run out: use fewer workers. A new executor, or the same command, '
        'goes on from the scores that were kept (scores=, --scores).'
    )
  return ChildProcessError(
      f'{_NUM_TRIES} workers died at the same call, {key}, or could not make '
      f'it: {said}. What they print says why. A score log (scores=, --scores) '
      'keeps what was scored.'
  )


class _Shared:
  """A function, which is pickled once however often it is sent."""

  def __init__(self, function: Callable[..., Any]):
    self.error: TypeError | None = None
    self.function = function
    self._token = uuid.uuid4().hex

  def __call__(self) -> Callable[..., Any]:
    # A copy, because workers may be threads, and keep what they have read.
    return _kept(self._token, copy.copy, self.function)

  @functools.cached_property
  def _content(self) -> bytes:
    try:  # As dask, loky, ray and submitit send functions of notebooks.
      return cloudpickle.dumps(self.function)
    except Exception as e:
      self.error = TypeError(
          f'eval_fn, or what it works on, cannot be sent to workers: {e}. Use '
          'a function at the top level of a module, which makes its data when '
          'it is first called, or jaxsoup.runtime.user_code.load('
          "'MODULE:FUNCTION')."
      )
      raise self.error from e

  def __reduce__(self) -> Any:
    # Unpickled where it is called, so that its errors are errors of the call.
    given = self._token, pickle.loads, self._content
    return functools.partial, (_kept, *given)


# The last function of each worker, with what it keeps.
_HERE = threading.local()


def _kept(token: str, make_fn: Callable[[Any], Any], given: Any) -> Any:
  if getattr(_HERE, 'token', None) != token:
    _HERE.token = _HERE.function = None  # Two would not fit.
    _HERE.function = make_fn(given)
    _HERE.token = token
  return _HERE.function


def _called(
    shared: Callable[[], Any], args: Any
) -> tuple[Any, Exception | None]:
  """Runs on a worker: what the function returns, or what it raises."""
  try:
    return shared()(*args), None
  except Exception as e:
    said = ''.join(traceback.format_exception(e))
    try:
      error = pickle.loads(pickle.dumps(e))
    except Exception:
      error = RuntimeError(f'{type(e).__name__}: {e}')
    error.add_note(f'On a worker:\n{said}')
    return None, error
