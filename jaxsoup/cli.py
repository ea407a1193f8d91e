"""The `jaxsoup` command. Imports jax only when a command needs it."""

import typer

from jaxsoup.commands import convert
from jaxsoup.commands import demo
from jaxsoup.commands import diagnose
from jaxsoup.commands import doctor
from jaxsoup.commands import inspect
from jaxsoup.commands import plan
from jaxsoup.commands import report
from jaxsoup.commands import soup

app = typer.Typer(
    name='jaxsoup',
    help='Model soups: average fine-tuned models, get a better one.',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={'help_option_names': ['-h', '--help']},
)

# The order of the help.
for command in (
    demo.demo,
    soup.soup,
    inspect.inspect,
    diagnose.diagnose,
    plan.plan,
    convert.convert,
    report.report,
    doctor.doctor,
):
  app.command()(command)


def main() -> None:
  """The entry point: 0 is success, 1 a failure, 2 wrong usage."""
  app()
