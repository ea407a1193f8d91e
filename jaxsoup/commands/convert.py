"""`jaxsoup convert`: the same weights under the names of another library."""

import json
import pathlib
from typing import Annotated

import typer

from jaxsoup.commands import _common


def convert(
    source: Annotated[
        pathlib.Path,
        _common.path_argument(
            help='Hugging Face directory, .safetensors, .npz or torch file, or '
            'Orbax checkpoint.',
        ),
    ],
    out: Annotated[
        pathlib.Path,
        _common.path_argument(help='New file or directory.'),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            metavar='orbax|safetensors',
            help='Format of OUT. Default: safetensors for a file '
            'NAME.safetensors and for the names of other libraries, otherwise '
            'orbax.',
        ),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(
            metavar='flax|hf|timm|open_clip|...',
            help='Library whose names the arrays get; flax means the names of '
            'jaxsoup. Default: those of --like, otherwise flax.',
        ),
    ] = None,
    like: Annotated[
        pathlib.Path | None,
        _common.path_option(
            help='File or directory of the same model with the wanted names; '
            'SOURCE then has the names of jaxsoup, as soups do, and may have '
            'another head.',
        ),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(
            help='Model family: vit, clip, bert, ... Default: detected.'
        ),
    ] = None,
    from_names: Annotated[
        str | None,
        typer.Option(help='Library whose names SOURCE has. Default: detected.'),
    ] = None,
    labels: Annotated[
        pathlib.Path | None,
        _common.path_option(
            help='Text file with the name of each class of the head, one a '
            'line, for config.json. Default: those of --like.',
        ),
    ] = None,
    as_json: _common.Json = False,
) -> None:
  """Writes a model's weights under other names, for another library."""
  if to not in (None, 'orbax', 'safetensors'):
    raise typer.BadParameter(
        f'{to!r} is not a format: choose orbax or safetensors.',
        param_hint='--to',
    )
  if to == 'orbax' and out.suffix == '.safetensors':
    raise typer.BadParameter(
        'an Orbax checkpoint is a directory: give a name without .safetensors.',
        param_hint='OUT',
    )
  with _common.failures(), _common.held(out):
    from jaxsoup import models

    made = models.convert(
        source,
        out,
        names=names or (None if like else 'flax'),
        is_orbax=None if to is None else to == 'orbax',
        like=like,
        family=family,
        from_names=from_names,
        labels=None if labels is None else labels.read_text().splitlines(),
    )
  typer.echo(json.dumps({'path': made}) if as_json else made)
