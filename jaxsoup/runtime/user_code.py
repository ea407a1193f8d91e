"""Functions of the user, named on a command line; their errors say where.

```
function = user_code.load('package.module:function')
```
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import errno
import functools
import hashlib
import importlib
import os
import pathlib
import sys
import traceback
from typing import Any

# The variable that stands for --traceback.
TRACEBACK = 'JAXSOUP_TRACEBACK'
# What to do, by what the system says of a path.
_ADVICE = {
    errno.ENAMETOOLONG: 'Give a shorter name.',
    errno.EACCES: 'Change its permissions, or give another path.',
    errno.EPERM: 'Change its permissions, or give another path.',
    errno.EROFS: 'Give a path that can be written to.',
    errno.EEXIST: 'Give another path.',
    errno.EISDIR: 'Give the path of a file.',
    errno.ENOTDIR: 'A part of this path is a file: give another path.',
}


class UserCodeError(Exception):
  """An error in the user's function, with file and line."""


def load(name: str, option: str = '--eval') -> Callable[..., Any]:
  """Imports the function that an option names.

  Args:
    name: package.module:function.
    option: the option that names it, for messages.

  Returns:
    The function, which raises `UserCodeError`. Pickled, it is its name.

  Raises:
    ValueError: there is no such function.
    UserCodeError: its module raised when it was imported.
  """
  module_name, _, function_name = name.partition(':')
  if not all(map(str.isidentifier, [*module_name.split('.'), function_name])):
    raise ValueError(f'{option} {name}: write package.module:function.')
  sys.path.insert(0, '')
  importlib.invalidate_caches()  # The file may be new.
  try:
    module = importlib.import_module(module_name)
  except ImportError as e:
    raise ValueError(
        f'{option} {name}: cannot import {module_name}: {e}. Modules are '
        'imported from the current directory and from installed packages.'
    ) from e
  except KeyboardInterrupt:
    raise
  except BaseException as e:  # `sys.exit(0)` must not look like success.
    raise UserCodeError(
        f'{option} {name}: importing {module_name} raised {described(e)}'
    ) from e
  function = getattr(module, function_name, None)
  file = getattr(module, '__file__', None)
  if not callable(function):
    there = [
        name
        for name, value in vars(module).items()
        if callable(value)
        and getattr(value, '__module__', None) == module.__name__
    ]
    raise ValueError(
        f'{option} {name}: {module_name} has no such function. {file} has: '
        f'{", ".join(there[:8]) or "none"}.'
    )
  return _Loaded(function, file, name, option)


class _Loaded:
  """A function that another process loads by its name."""

  def __init__(
      self, function: Any, file: str | None, name: str, option: str
  ) -> None:
    self._given = name, option
    self._called = guarded(function, file, name)
    for method in ('answers', 'at_least'):
      if hasattr(function, method):
        setattr(self, method, guarded(getattr(function, method), file, name))

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return self._called(*args, **kwargs)

  def __reduce__(self) -> Any:
    return load, self._given


def file_of(name: str) -> str | None:
  """The file of the module of a loaded function; None if it has none."""
  module = sys.modules.get(name.partition(':')[0])
  return getattr(module, '__file__', None)


def identity(name: str) -> str:
  """The name of a loaded function, with a hash of the file of its module."""
  file = file_of(name)
  if file is None:  # Part of Python itself.
    return name
  source = pathlib.Path(file).read_bytes()
  return f'{name} (sha256 {hashlib.sha256(source).hexdigest()[:16]})'


def guarded(
    function: Any,
    file: str | None,
    name: str,
    passing: tuple[type[BaseException], ...] = (),
) -> Any:
  """A function of the user, whose errors say where they were raised.

  It cannot end the program in silence, nor change its working directory.

  Args:
    function: of the user.
    file: where it is written; None if that is not known.
    name: of the function, for messages.
    passing: errors that are raised as they are: their messages say what to do.

  Returns:
    A function with the same arguments, which raises `UserCodeError`.
  """
  passing = (KeyboardInterrupt, UserCodeError, *passing)

  @functools.wraps(function)
  def call(*args, **kwargs):
    here = os.getcwd()
    try:
      return function(*args, **kwargs)
    except passing:
      raise
    except BaseException as e:
      raise UserCodeError(f'{name} raised {described(e, file)}') from e
    finally:
      os.chdir(here)

  return call


class Guarded:
  """Batches of the user, whose errors say where they were raised."""

  def __init__(self, batches: Any, name: str):
    if not isinstance(batches, Iterable):
      raise ValueError(
          f'{name} returned batches that are {batches!r:.80}: expected a list '
          'of batches.'
      )
    self._batches, self._name = batches, name

  def __iter__(self) -> Iterator[Any]:
    name = f'the batches of {self._name}'
    file = file_of(self._name)
    iterator = guarded(iter, file, name)(self._batches)
    end = object()
    following = guarded(lambda: next(iterator, end), file, name)
    while (batch := following()) is not end:  # `==` would compare arrays.
      yield batch


def message(error: Exception) -> str:
  """What is wrong, where, and what to do; prints the traceback if asked for."""
  if os.environ.get(TRACEBACK):
    traceback.print_exception(error)
  if isinstance(error, OSError) and str(error).startswith('[Errno '):
    return _of_system(error)
  known = ImportError, MemoryError, OSError, TypeError, ValueError
  if isinstance(error, (*known, UserCodeError)) and str(error):
    return str(error)
  return (
      f'{described(error)}. This should not happen: a file may be damaged in a '
      'way that is not recognized. jaxsoup --traceback COMMAND... shows more.'
  )


def _of_system(error: OSError) -> str:
  """What the system says of a path, and what to do about it."""
  if error.filename is None or error.errno is None:
    return described(error)
  said = error.strerror or str(error)
  if said != os.strerror(error.errno):  # Ours, which says what to do.
    return str(error)
  path = os.fsdecode(error.filename2 or error.filename)
  advice = _ADVICE.get(error.errno, 'Check that path, or give another one.')
  return f'{path}: {said[:1].lower()}{said[1:]}. {advice}'


def described(error: BaseException, file: str | None = None) -> str:
  """An error in one line, with the line of a file that raised it."""
  frames = traceback.extract_tb(error.__traceback__)
  theirs = [f for f in frames if f.filename == file]
  try:
    text = f'{type(error).__name__}: {error}'.splitlines()[0]
  except Exception:  # Its __str__ raises as well.
    text = type(error).__name__
  if isinstance(error, SyntaxError):  # It names the place itself.
    return text
  last = (theirs or frames)[-1]
  if last.filename == __file__:  # It could not be called as it is called here.
    return f'{text}. Write it with the arguments that --help shows.'
  return f'{text} ({last.filename}, line {last.lineno})'
