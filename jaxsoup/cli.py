"""The `jaxsoup` command. Imports jax only when a command needs it."""

import os
from typing import Annotated
from typing import Any

import typer
from typer import core

from jaxsoup.commands import compare
from jaxsoup.commands import convert
from jaxsoup.commands import demo
from jaxsoup.commands import diagnose
from jaxsoup.commands import doctor
from jaxsoup.commands import inspect
from jaxsoup.commands import plan
from jaxsoup.commands import report
from jaxsoup.commands import soup
from jaxsoup.runtime import user_code


class _Commands(core.TyperGroup):
  """Shows what makes soups first, then the rest in the order below."""

  def list_commands(self, ctx: Any) -> list[str]:
    return sorted(self.commands, key=lambda name: name not in ('demo', 'soup'))


app = typer.Typer(
    name='jaxsoup',
    cls=_Commands,
    help='Model soups: average fine-tuned models, get a better one.',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={'help_option_names': ['-h', '--help']},
)


@app.callback()
def options(
    traceback: Annotated[
        bool,
        typer.Option(
            '--traceback',
            envvar=user_code.TRACEBACK,
            help='Where a command fails, also print the traceback.',
        ),
    ] = False,
) -> None:
  if traceback:
    os.environ[user_code.TRACEBACK] = '1'


app.add_typer(soup.app)
for command in (
    demo.demo,
    inspect.inspect,
    diagnose.diagnose,
    plan.plan,
    convert.convert,
    report.report,
    compare.compare,
    doctor.doctor,
):
  app.command()(command)


def main() -> None:
  """The entry point: 0 is success, 1 a failure, 2 wrong usage."""
  app()
