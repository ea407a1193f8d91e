"""Functions of the user, named on a command line; their errors say where.

```
function = user_code.load('package.module:function')
```
"""

from collections.abc import Callable
import hashlib
import importlib
import pathlib
import sys
import traceback
from typing import Any


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
  try:
    module = importlib.import_module(module_name)
  except ImportError as e:
    raise ValueError(
        f'{option} {name}: cannot import {module_name}: {e}. Modules are '
        'imported from the current directory and from installed packages.'
    ) from e
  except Exception as e:
    # A module runs when it is imported, and may raise anything.
    raise UserCodeError(
        f'{option} {name}: importing {module_name} raised '
        f'{type(e).__name__}: {e}'
    ) from e
  function = getattr(module, function_name, None)
  if not callable(function):
    raise ValueError(f'{option} {name}: {module_name} has no such function.')

  called = _guarded(function, module, name)
  if hasattr(function, 'at_least'):
    called.at_least = _guarded(function.at_least, module, name)
  return called


def identity(name: str) -> str:
  """The name of a loaded function, with a hash of the file of its module."""
  module = sys.modules[name.partition(':')[0]]
  source = pathlib.Path(str(module.__file__)).read_bytes()
  return f'{name} (sha256 {hashlib.sha256(source).hexdigest()[:16]})'


def _guarded(function, module, name: str) -> Any:
  """A function of the user, whose errors say where they were raised."""

  def call(*args, **kwargs):
    try:
      return function(*args, **kwargs)
    except Exception as e:
      frames = traceback.extract_tb(e.__traceback__)
      theirs = [f for f in frames if f.filename == module.__file__]
      last = (theirs or frames)[-1]
      raise UserCodeError(
          f'{name} raised {type(e).__name__}: {e} ({last.filename}, line '
          f'{last.lineno})'
      ) from e

  return call
