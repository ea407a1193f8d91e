"""`jaxsoup compare`: two experiments, row by row."""

import json
import pathlib
from typing import Annotated

import typer

from jaxsoup.commands import _common


def compare(
    a: Annotated[
        pathlib.Path,
        _common.path_argument(
            help='Workdir of an experiment, also of several seeds, or its '
            'results.json.',
        ),
    ],
    b: Annotated[
        pathlib.Path,
        _common.path_argument(help='That of the other experiment.'),
    ],
    each_shift: Annotated[
        bool,
        typer.Option('--each-shift', help='Also compare each shift by itself.'),
    ] = False,
    as_json: _common.Json = False,
) -> None:
  """Compares two experiments: B - A for each row, with paired intervals."""
  with _common.failures():
    from jaxsoup.experiments import comparing

    compared = comparing.compare(a, b, has_each_shift=each_shift)
  if as_json:
    typer.echo(json.dumps(compared.as_json(), allow_nan=False))
  else:
    _common.echo(compared.as_text())
