"""`jaxsoup doctor`: versions, devices, pairs that clash."""

import json

import typer

from jaxsoup.commands import _common


def doctor(as_json: _common.Json = False) -> None:
  """Shows versions, devices, and pairs of versions that are known to clash."""
  with _common.failures():
    from jaxsoup import doctor as doctor_lib

    found = doctor_lib.examine()
    if as_json:
      typer.echo(json.dumps(found))
    else:
      typer.echo(doctor_lib.as_text(found))
  if found['problems']:
    raise typer.Exit(1)
