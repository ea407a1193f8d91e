"""`jaxsoup diagnose`: why a soup of these runs fails, or whether it would."""

import json
import pathlib
from typing import Annotated

import typer

from jaxsoup.commands import _common
from jaxsoup.commands import _options
from jaxsoup.runtime import user_code

_FUNCTION = 'PACKAGE.MODULE:FUNCTION'


def diagnose(
    runs: _common.Runs,
    init: Annotated[
        pathlib.Path | None,
        typer.Option(
            parser=_common.local_path,
            help='Checkpoint that all runs were fine-tuned from.',
        ),
    ] = None,
    eval_name: Annotated[
        str | None,
        typer.Option(
            '--eval',
            metavar=_FUNCTION,
            help='Compare the soup with the best run: FUNCTION(params) returns '
            'the score on held-out data, higher is better. params are nested '
            'dicts.',
        ),
    ] = None,
    logits_name: Annotated[
        str | None,
        typer.Option(
            '--logits',
            metavar=_FUNCTION,
            help='With --eval: find classes in another order. '
            'FUNCTION(params) returns the logits on held-out data.',
        ),
    ] = None,
    recalibrate_name: Annotated[
        str | None,
        typer.Option(
            '--recalibrate',
            metavar=_FUNCTION,
            help='With --eval: FUNCTION(params) returns params with '
            're-estimated BatchNorm statistics.',
        ),
    ] = None,
    num_examples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help='With --eval: number of held-out examples, for the intervals. '
            'Not needed if FUNCTION is evaluation.mean_of(...).',
        ),
    ] = None,
    is_thorough: Annotated[
        bool,
        typer.Option(
            '--thorough',
            help='With --eval: score all pairs, not at most 2 K + 4 models.',
        ),
    ] = False,
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            help='With --eval: processes of this machine that evaluate at a '
            'time, with the same result.',
        ),
    ] = 1,
    report_file: Annotated[
        pathlib.Path | None,
        typer.Option(
            '--report',
            parser=_common.local_path,
            metavar='FILE.html',
            help='Also write an HTML page; with --thorough and up to 12 runs '
            'it has a map of the barriers.',
        ),
    ] = None,
    item: _common.Item = None,
    as_json: _common.Json = False,
) -> None:
  """Explains why a soup of the runs fails, and which of them to average."""
  if len(runs) < 2:
    raise typer.BadParameter('give two or more runs.', param_hint='RUNS')
  for name, hint in (
      (logits_name, '--logits'), (recalibrate_name, '--recalibrate'),
      (num_examples, '--num-examples'), (is_thorough or None, '--thorough'),
      (None if workers == 1 else workers, '--workers'),
  ):  # fmt: skip
    if name is not None and eval_name is None:
      raise typer.BadParameter('needs --eval as well.', param_hint=hint)
  with _common.failures():
    from jaxsoup import checkpoints
    from jaxsoup import diagnosis
    from jaxsoup.runtime import progress

    if report_file is not None:  # Before the minutes that a diagnosis takes.
      from jaxsoup import report

      report.check_out(report_file)

    functions = {
        'eval_fn': _load(eval_name, '--eval'),
        'logits_fn': _load(logits_name, '--logits'),
        'recalibrate_fn': _load(recalibrate_name, '--recalibrate'),
    }
    stages = dict(diagnosis.STAGES)
    if eval_name is None:
      stages = {'weights': stages['weights']}
    with (
        _options.on_workers(workers) as on_workers,
        progress.shown(stages) as progress_fn,
    ):
      diagnosed = diagnosis.diagnose(
          checkpoints.Ingredients(runs, item=item),
          theta_0=init and checkpoints.Ingredients([init], item=item)[0],
          num_examples=num_examples,
          is_thorough=is_thorough,
          names=list(map(str, runs)),
          progress_fn=progress_fn,
          **functions,
          **on_workers,
      )
    if report_file is not None:
      sections = report.diagnosis_sections(diagnosed.as_json())
      title = f'Diagnosis of {len(runs)} runs'
      report.write_page(report_file, title, sections)
  text = diagnosed.as_text()
  if as_json:
    text = json.dumps(diagnosed.as_json(), allow_nan=False)
  _common.echo(text)
  if any(f.severity == 'error' for f in diagnosed.findings):
    raise typer.Exit(1)


def _load(name: str | None, option: str):
  return None if name is None else user_code.load(name, option)
