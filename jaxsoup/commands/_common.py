"""What commands share: arguments, and errors in one line."""

from collections.abc import Iterator
import contextlib
import functools
import os
import pathlib
import re
from typing import Annotated
from typing import Any
import warnings

import typer

from jaxsoup import _files
from jaxsoup.runtime import user_code

Json = Annotated[bool, typer.Option('--json', help='Print the result as JSON.')]
Item = Annotated[
    str | None,
    typer.Option(
        '--item',
        '--select',
        help='Item to read from checkpoints that hold several, such as params, '
        'or the subtree that holds the parameters, such as ema_params.',
    ),
]


def local_path(text: str | pathlib.Path) -> pathlib.Path:
  """A path of this machine: `gs://...` would become a folder of that name."""
  if '://' in str(text):
    raise typer.BadParameter(
        f'{text} is an address: give a local path. Only RUN, and --init of '
        'jaxsoup soup, may be in a bucket (gs://, s3://, az://).'
    )
  try:
    str(text).encode()
  except ValueError as e:
    raise typer.BadParameter(
        f'{str(text)!r} has characters that no path can have ({e}). Rename it, '
        'or give another path.'
    ) from e
  return pathlib.Path(text)


path_argument = functools.partial(typer.Argument, parser=local_path)
path_option = functools.partial(typer.Option, parser=local_path)


def checkpoint(text: str | pathlib.Path) -> Any:
  """A path of this machine, or of a bucket, from which it is read."""
  if not str(text).startswith(_files.BUCKETS):
    return local_path(text)
  from jaxsoup.runtime import buckets

  with failures():
    return buckets.path_of(text)


# Paths of this machine or of a bucket, which typer would make local ones.
Runs = Annotated[
    list[Any],
    typer.Argument(
        metavar='RUN',
        parser=checkpoint,
        help='Checkpoints or run directories, also in buckets (gs://); or '
        'models on the Hugging Face hub (ORG/NAME, ORG/NAME@REVISION).',
    ),
]


@contextlib.contextmanager
def failures() -> Iterator[None]:
  """Turns errors that a user can fix into one line and an exit code."""
  try:
    with warnings.catch_warnings():
      show: Any = lambda said, *_, **__: echo(f'Warning: {said}', err=True)
      warnings.showwarning = show
      yield
  except typer.Exit:
    raise
  except Exception as e:
    echo(f'Error: {user_code.message(e)}', err=True)
    raise typer.Exit(getattr(e, 'exit_code', 1)) from e


@contextlib.contextmanager
def held(out: pathlib.Path) -> Iterator[None]:
  """Nobody else writes `out` meanwhile, and nobody has."""
  from jaxsoup.runtime import locking

  # Next to it, because it exists only when it is complete.
  lock = out.absolute().parent / f'.{out.name}.lock'
  with locking.locked(lock, out):
    _files.clear_leftovers(out.absolute().parent, out.name)
    if os.path.lexists(out):  # Since the options were parsed.
      raise FileExistsError(f'{out} exists. Give another path.')
    yield


def echo(text: object, err: bool = False) -> None:
  """Prints text; names in it may hold control sequences of terminals."""
  shown = lambda m: m[0].encode('unicode_escape').decode()
  typer.echo(
      re.sub(r'[^\n\t\x20-\x7e\xa0-\U0010ffff]', shown, str(text)), err=err
  )
