"""`jaxsoup report`: an HTML file for an experiment, or for scores."""

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
        _common.path_argument(
            help='Workdir of an experiment, file of scores with one row per '
            'model (.jsonl, .json or .csv), or file of --scores of a search.',
        ),
    ],
    out: Annotated[
        pathlib.Path | None,
        _common.path_option(
            help='HTML file; figures and numbers go into the directory of the '
            'same name without .html. Default: WORKDIR/report.html, or the '
            'file of scores with the ending .html.',
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            metavar='COLUMN',
            help='File of scores: column of held-out scores. '
            'Default: held_out.',
        ),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(
            metavar='COLUMN',
            help='File of scores: column of test scores. Default: test.',
        ),
    ] = None,
    shifts: Annotated[
        str | None,
        typer.Option(
            metavar='COLUMN,...',
            help='File of scores: columns of scores on shifted test data. '
            'Default: those that begin with shifts.',
        ),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            metavar='NAME',
            help='File of --scores: a score that is compared. Repeatable. '
            'Default: all.',
        ),
    ] = None,
    as_json: _common.Json = False,
) -> None:
  """Writes an HTML report: tables, figures, and how they were made."""
  columns: dict[str, Any] = {
      'held_out': held_out,
      'test': test,
      'shifts': shifts and [name.strip() for name in shifts.split(',')],
      'metrics': metrics or None,
  }
  given = {name: value for name, value in columns.items() if value is not None}
  if given and source.is_dir():
    raise typer.BadParameter(
        f'{source} is a workdir; columns can be given only for a file of '
        'scores.',
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
    _common.echo(f'Report: {files[0]}')
    _common.echo(
        f'Figures and numbers: {pathlib.Path(files[0]).with_suffix("")}'
    )
