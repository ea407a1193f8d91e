"""`jaxsoup inspect`: what is in checkpoints, and what does not fit."""

import json
from typing import Annotated

import typer

from jaxsoup.commands import _common


def inspect(
    runs: _common.Runs,
    deep: Annotated[
        bool,
        typer.Option(
            '--deep', help='Also read: NaN, duplicates, norms, checksums.'
        ),
    ] = False,
    item: _common.Item = None,
    as_json: _common.Json = False,
) -> None:
  """Shows what is in checkpoints, and what does not fit together."""
  with _common.failures():
    from jaxsoup.checkpoints import inspection

    found = inspection.inspect(runs, item=item, deep=deep)
    if as_json:
      typer.echo(json.dumps(found.as_json()))
    else:
      from rich import console

      console.Console().print(found.as_text(), highlight=False, soft_wrap=True)
  if found.problems:
    raise typer.Exit(1)
