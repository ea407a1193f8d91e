"""`jaxsoup convert`: the same weights under the names of another library."""

import json
import pathlib
from typing import Annotated

import typer

from jaxsoup.commands import _common


def convert(
    source: Annotated[
        pathlib.Path,
        typer.Argument(
            help='A Hugging Face directory, a .safetensors, .npz or torch file,'
            ' an Orbax checkpoint.',
            show_default=False,
        ),
    ],
    out: Annotated[
        pathlib.Path, typer.Argument(help='What is made.', show_default=False)
    ],
    to: Annotated[
        str | None,
        typer.Option(
            metavar='orbax|safetensors',
            help='The format; else safetensors for a file NAME.safetensors and'
            ' for names of other libraries, orbax otherwise.',
        ),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(
            metavar='flax|hf|timm|open_clip|...',
            help='Whose names the arrays get; flax are ours. Else as '
            '--like, or flax.',
        ),
    ] = None,
    like: Annotated[
        pathlib.Path | None,
        typer.Option(
            help='A file or directory of the same model, with the names that '
            'are wanted; SOURCE then has ours, as soups do.'
        ),
    ] = None,
    family: Annotated[
        str | None, typer.Option(help='vit, clip, bert, ...; else it is found.')
    ] = None,
    from_names: Annotated[
        str | None,
        typer.Option(help='Whose names SOURCE has; else it is found.'),
    ] = None,
    as_json: _common.Json = False,
) -> None:
  """Writes a model's weights under other names, for another library."""
  if to not in (None, 'orbax', 'safetensors'):
    raise typer.BadParameter(
        f'{to!r} is no format: orbax or safetensors.', param_hint='--to'
    )
  if to == 'orbax' and out.suffix == '.safetensors':
    raise typer.BadParameter(
        'an Orbax checkpoint is a directory: another name.', param_hint='OUT'
    )
  with _common.failures():
    from jaxsoup import models

    made = models.convert(
        source,
        out,
        names=names or (None if like else 'flax'),
        is_orbax=None if to is None else to == 'orbax',
        like=like,
        family=family,
        from_names=from_names,
    )
  typer.echo(json.dumps({'path': made}) if as_json else made)
