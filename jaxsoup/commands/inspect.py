"""`jaxsoup inspect`: what checkpoints contain, and mismatches."""

import json
from typing import Annotated

import typer

from jaxsoup.commands import _common


def inspect(
    runs: _common.Runs,
    deep: Annotated[
        bool,
        typer.Option(
            '--deep',
            help='Also read the arrays: check for NaN, duplicates and damage, '
            'show norms.',
        ),
    ] = False,
    item: _common.Item = None,
    as_json: _common.Json = False,
) -> None:
  """Shows what checkpoints contain, and what does not match."""
  with _common.failures():
    from jaxsoup.checkpoints import inspection

    inspected = inspection.inspect(runs, item=item, deep=deep)
    if as_json:
      typer.echo(json.dumps(inspected.as_json()))
    else:
      _common.echo(inspected.as_text())
  if inspected.problems:
    raise typer.Exit(1)
