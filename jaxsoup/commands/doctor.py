"""`jaxsoup doctor`: versions, devices, versions that clash."""

import json

import typer

from jaxsoup.commands import _common


def doctor(as_json: _common.Json = False) -> None:
  """Shows versions and devices, and versions that do not work together."""
  with _common.failures():
    from jaxsoup import doctor as doctor_lib

    summary = doctor_lib.examine()
    if as_json:
      typer.echo(json.dumps(summary))
    else:
      _common.echo(doctor_lib.as_text(summary))
  if summary['problems']:
    raise typer.Exit(1)
