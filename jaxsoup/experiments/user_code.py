"""Functions of the user, named on a command line; their errors say where.

```
function = user_code.load('package.module:function')
```
"""

from collections.abc import Callable
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
# A user's code may raise anything; `sys.exit(0)` in it must not look like
# success. Only Ctrl-C is left alone.
_ANYTHING = (Exception, SystemExit)


class UserCodeError(Exception):
  """An error in the user's function, with file and line."""


def load(name: str, option: str = '--eval') -> Callable[..., Any]:
  """Imports the function that an option names.

  Args:
    name: package.module:function.
    option: the option that names it, for messages.

  Returns:
    The function, which raises `UserCodeError`.

  Raises:
    ValueError: there is no such function.
    UserCodeError: its module raised when it was imported.
  """
  module_name, _, function_name = name.partition(':')
  if not function_name:
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
  except _ANYTHING as e:
    raise UserCodeError(
        f'{option} {name}: importing {module_name} raised {described(e)}'
    ) from e
  function = getattr(module, function_name, None)
  if not callable(function):
    raise ValueError(f'{option} {name}: {module_name} has no such function.')

  file = getattr(module, '__file__', None)
  called = guarded(function, file, name)
  if hasattr(function, 'at_least'):
    called.at_least = guarded(function.at_least, file, name)
  return called


def identity(name: str) -> str:
  """The name of a loaded function, with a hash of the file of its module."""
  file = getattr(sys.modules[name.partition(':')[0]], '__file__', None)
  if file is None:  # Part of Python itself.
    return name
  source = pathlib.Path(file).read_bytes()
  return f'{name} (sha256 {hashlib.sha256(source).hexdigest()[:16]})'


def guarded(function: Any, file: str | None, name: str) -> Any:
  """A function of the user, whose errors say where they were raised.

  It cannot end the program in silence, nor change its working directory.
  """

  @functools.wraps(function)
  def call(*args, **kwargs):
    here = os.getcwd()
    try:
      return function(*args, **kwargs)
    except UserCodeError:
      raise
    except _ANYTHING as e:
      raise UserCodeError(f'{name} raised {described(e, file)}') from e
    finally:
      os.chdir(here)

  return call


def message(error: Exception) -> str:
  """An error for a person: what is wrong, where, and what to do.

  Also prints the traceback, if that was asked for.

  Args:
    error: of a command.

  Returns:
    The text.
  """
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
  return f'{path}: {said[:1].lower()}{said[1:]}. {_advice(error.errno)}'


def _advice(number: int) -> str:
  if number == errno.ENAMETOOLONG:
    return 'Give a shorter name.'
  if number in (errno.EACCES, errno.EPERM, errno.EROFS):
    return 'Change its permissions, or give another path.'
  if number in (errno.EEXIST, errno.EISDIR, errno.ENOTDIR):
    return (
        'It is a file, and not a directory, or the reverse: give another path.'
    )
  return 'Check that path, or give another one.'


def described(error: BaseException, file: str | None = None) -> str:
  """An error in one line, with the line of a file that raised it."""
  frames = traceback.extract_tb(error.__traceback__)
  theirs = [f for f in frames if f.filename == file]
  text = f'{type(error).__name__}: {error}'.splitlines()[0]
  if isinstance(error, SyntaxError):  # It names the place itself.
    return text
  last = (theirs or frames)[-1]
  return f'{text} ({last.filename}, line {last.lineno})'
