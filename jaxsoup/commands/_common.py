"""What commands share: arguments, and errors in one line."""

from collections.abc import Iterator
import contextlib
import pathlib
import re
from typing import Annotated
from typing import NoReturn
import warnings

import typer

from jaxsoup.experiments import user_code

Json = Annotated[bool, typer.Option('--json', help='Print the result as JSON.')]
Item = Annotated[
    str | None,
    typer.Option(
        help='Item to read from checkpoints that hold several, such as params, '
        'or the subtree that holds the parameters, such as ema_params.'
    ),
]
Runs = Annotated[
    list[pathlib.Path],
    typer.Argument(
        metavar='RUN',
        help='Checkpoints or run directories.',
        show_default=False,
    ),
]


@contextlib.contextmanager
def failures() -> Iterator[None]:
  """Turns errors that a user can fix into one line and an exit code."""
  try:
    with warnings.catch_warnings():
      warnings.showwarning = _show_warning
      yield
  except (
      ImportError, MemoryError, OSError, TypeError, ValueError,
      user_code.UserCodeError,
  ) as e:  # fmt: skip
    _fail(str(e), code=getattr(e, 'exit_code', 1))


def echo(text: object, err: bool = False) -> None:
  """Prints text; names in it may hold control sequences of terminals."""
  shown = lambda m: m[0].encode('unicode_escape').decode()
  typer.echo(
      re.sub(r'[^\n\t\x20-\x7e\xa0-\U0010ffff]', shown, str(text)), err=err
  )


def _show_warning(message, *_, **__) -> None:
  echo(f'Warning: {message}', err=True)


def _fail(message: str, code: int) -> NoReturn:
  echo(f'Error: {message}', err=True)
  raise typer.Exit(code)
