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


SHARD_BYTES = 5 * 10**9


def num_bytes(text: str | int) -> int:
  """The value of an option such as 5GB, or its default."""
  match = re.fullmatch(r'(\d+)\s*([KMGT]?)B?', str(text).strip().upper())
  if match is None or not int(match[1]):
    raise typer.BadParameter(f'{text!r} is not a size: write 5GB or 500MB.')
  return int(match[1]) * 1000 ** ' KMGT'.index(match[2] or ' ')


def floats(text: str) -> list[float]:
  """The value of an option such as 0.5,0.3,0.2."""
  try:
    return [float(x) for x in text.split(',')]
  except ValueError as e:
    raise typer.BadParameter(
        f'{text!r} is not a list of numbers: write 0.5,0.3,0.2.'
    ) from e


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


def _show_warning(message, *_, **__) -> None:
  typer.echo(f'Warning: {message}', err=True)


def _fail(message: str, code: int) -> NoReturn:
  typer.echo(f'Error: {message}', err=True)
  raise typer.Exit(code)
