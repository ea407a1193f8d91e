"""`jaxsoup demo`: a sweep on real images, and all its soups."""

import json
import pathlib
from typing import Annotated

import typer

from jaxsoup.commands import _common


def demo(
    workdir: Annotated[
        pathlib.Path,
        _common.path_option(help='Directory for runs, soups and tables.'),
    ] = pathlib.Path('runs/demo'),
    seeds: Annotated[
        int, typer.Option(min=1, help='Number of seeds, one sweep each.')
    ] = 1,
    short: Annotated[
        bool, typer.Option('--short', help='Use fewer runs and epochs.')
    ] = False,
    as_json: _common.Json = False,
) -> None:
  """Fine-tunes a sweep on real images, makes every soup, shows the table."""
  with _common.failures():
    from jaxsoup.experiments import main as experiment
    from jaxsoup.runtime import distributed

    file = f'{_config_file("digits.py")}{":runlocal" if short else ""}'
    typer.echo(distributed.banner(workdir), err=True)
    tables = experiment.run_seeds(file, workdir, num_seeds=seeds)
    if as_json:
      rows = [[row._asdict() for row in table] for table in tables.values()]
      typer.echo(json.dumps({'workdir': str(workdir), 'tables': rows}))
    else:
      experiment.show(tables, workdir)


def _config_file(name: str) -> pathlib.Path:
  """A config of the repository, or its copy inside an installed wheel."""
  here = pathlib.Path(__file__).parents[1]
  for folder in (here.parent / 'configs', here / 'configs'):
    if (folder / name).is_file():
      return folder / name
  raise FileNotFoundError(f'configs/{name} is missing: reinstall jaxsoup.')
