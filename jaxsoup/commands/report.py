"""`jaxsoup report`: one HTML file of an experiment or of a table of scores."""

import importlib.util
import json
import pathlib
from typing import Annotated
from typing import Any

import typer

from jaxsoup.commands import _common


def report(
    source: Annotated[
        pathlib.Path,
        typer.Argument(
            help='The workdir of an experiment; or a file of scores, one row a'
            ' model: .jsonl (JSON lines), .json or .csv.',
            show_default=False,
        ),
    ],
    out: Annotated[
        pathlib.Path | None,
        typer.Option(
            help='The HTML file; pictures and numbers go into the directory of'
            ' that name without its ending. Else WORKDIR/report.html, or as'
            ' the file of scores.',
            show_default=False,
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            metavar='COLUMN',
            help='Scores: that of the data that chose; else held_out.',
        ),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(
            metavar='COLUMN', help='Scores: that of the test data; else test.'
        ),
    ] = None,
    shifts: Annotated[
        str | None,
        typer.Option(
            metavar='COLUMN,...',
            help='Scores: those of shifted test data; else those that begin'
            ' with shifts.',
        ),
    ] = None,
    as_json: _common.Json = False,
) -> None:
  """Writes one HTML file: tables, pictures, and how all was made."""
  columns: dict[str, Any] = {
      'held_out': held_out,
      'test': test,
      'shifts': shifts and [name.strip() for name in shifts.split(',')],
  }
  given = {name: value for name, value in columns.items() if value is not None}
  if given and source.is_dir():
    raise typer.BadParameter(
        f'{source} is a workdir, whose data sets are known; columns are those '
        'of a file of scores.',
        param_hint=f'--{next(iter(given)).replace("_", "-")}',
    )
  with _common.failures():
    if importlib.util.find_spec('matplotlib') is None:
      raise ImportError(
          'matplotlib is not installed: pip install "jaxsoup[demo]"'
      )
    from jaxsoup import report as report_lib

    files = [str(x) for x in report_lib.write_report(source, out, **given)]
  if as_json:
    typer.echo(json.dumps({'out': files[0], 'files': files[1:]}))
  else:
    typer.echo(f'Report: {files[0]}')
    typer.echo(f'Behind it: {pathlib.Path(files[0]).with_suffix("")}')
