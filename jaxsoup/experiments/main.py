"""Runs an experiment: pre-train, fine-tune a sweep, cook every soup, report.

  python -m jaxsoup.experiments.main --config=configs/digits.py --workdir=DIR

Everything goes into the workdir, and what is there is not made again: a second
call goes on where the first one stopped, and ends with the same soups. Several
calls share the fine-tuning where each has its part of the runs:

  ... --config.sweep.shard=0/4      and 1/4, 2/4, 3/4, on one workdir

One run on all devices of several processes, such as those of a TPU pod, where
`config.is_sharded` is true; the workdir is on a disk that all of them see:

  ... --distributed        where jax finds out who takes part, else
  ... --coordinator=HOST:PORT --num-processes=N --process=I

theta_0/    the pre-trained parameters
runs/NN/    parameters of each run, with its hyper-parameters and score
logits/     what each run says on every data set
soups/      each soup, with alpha, provenance and versions; where the held-out
            set is drawn several times, in splits/N/soups/
*.png, table.md, results.json, metrics.jsonl
"""

from collections.abc import Sequence
import contextlib
import importlib.util
import pathlib
import shutil
import sys
from typing import Any

import jax

from jaxsoup import _processes
from jaxsoup import report
from jaxsoup.checkpoints import _disk
from jaxsoup.experiments import configs
from jaxsoup.experiments import distributed
from jaxsoup.experiments import locking
from jaxsoup.experiments import metric_log
from jaxsoup.experiments import modeling
from jaxsoup.experiments import preemption
from jaxsoup.experiments import progress
from jaxsoup.experiments import results
from jaxsoup.experiments import stages

# The stages, and about how long each takes.
STAGES = {'pre-training': 8, 'fine-tuning': 12, 'souping': 20, 'reporting': 5}


def run(
    experiment: configs.Experiment,
    workdir: Any,
    progress_fn: progress.ProgressFn = progress.silent,
    stop: preemption.Stop | None = None,
) -> list[report.Row]:
  """Runs one experiment, or what is left of it.

  Args:
    experiment: of `configs.load`.
    workdir: where everything goes.
    progress_fn: called with a stage and the share of it that is done.
    stop: whether the script is asked to stop, see `preemption.handled`.

  Returns:
    A row a model: singles, soups, ensembles. None at all with `sweep.shard`,
    which only trains.

  Raises:
    ImportError: a package of an extra is missing.
    UsageError: the workdir was begun with another config.
    InUseError: another process works on the workdir.
    Preempted: `stop` was requested; what was done is saved.
    OSError: the disk is full; what was done is saved.
  """
  if importlib.util.find_spec('matplotlib') is None:
    # Now, not after the training.
    raise ImportError(
        'matplotlib is not installed: pip install "jaxsoup[demo]"'
    )
  if experiment.data_fn is None:
    raise configs.UsageError(
        'The config file has no function data(config), which returns '
        'jaxsoup.data.sources.Splits: see configs/digits.py.'
    )
  workdir = pathlib.Path(workdir).absolute()
  try:
    return _run(experiment, workdir, progress_fn, stop or preemption.Stop())
  except OSError as e:
    if not _disk.is_full(e):
      raise
    raise OSError(
        f'{workdir}: {e} What was done is kept: free some space, and the same '
        'command goes on from there.'
    ) from e


def _run(experiment, workdir, progress_fn, stop) -> list[report.Row]:
  config = experiment.config
  shard, num_shards = stages.shard_of(config)
  name = '.lock' if num_shards == 1 else f'.lock_{shard}_{num_shards}'
  if jax.process_count() > 1 and not config.get('is_sharded', False):
    raise configs.UsageError(
        f'{jax.process_count()} processes train one run together where '
        'config.is_sharded is True, and this config is not. Set it; or start '
        'each process by itself, with --config.sweep.shard=i/n.'
    )
  held = (
      locking.locked(workdir / name, workdir)
      if _processes.is_main()
      else contextlib.nullcontext()
  )
  with held, stages.mesh_of(config):
    configs.check_unchanged(config, workdir / 'config.json')
    progress_fn('pre-training', 0.0)
    has_board = config.get('tensorboard', False)
    work = stages.Work(
        experiment=experiment,
        model=modeling.of(experiment),
        splits=experiment.data_fn(config),
        workdir=workdir,
        progress_fn=progress_fn,
        stop=stop,
        log=metric_log.MetricLog(
            workdir / 'metrics.jsonl',
            tensorboard=workdir / 'tensorboard' if has_board else None,
        ),
    )
    stages.check_roles(work)
    theta_0 = stages.theta_0(work)
    if not stages.finetune_all(work, theta_0) or num_shards > 1:
      return []
    rows = results.make(work, theta_0)
    progress_fn('reporting', 1.0)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; returns the exit code."""
  argv = sys.argv[1:] if argv is None else argv
  try:
    arguments = configs.parse(argv)
    experiment = configs.load(arguments.config, arguments.overrides)
    if arguments.is_distributed:
      distributed.start(**arguments.join)
    workdir = arguments.workdir
    print(distributed.banner(workdir), file=sys.stderr)
    with preemption.handled() as stop, _shown() as progress_fn:
      rows = run(experiment, workdir, progress_fn, stop)
  except (ImportError, OSError, TypeError, ValueError) as e:
    print(f'Error: {e}', file=sys.stderr)
    return getattr(e, 'exit_code', 1)
  if not _processes.is_main():
    return 0
  if not rows:
    print(
        f'This part of the runs is in {workdir}. When all parts are there, the '
        'same command without sweep.shard makes the soups.'
    )
  else:
    show(report.summary(rows), workdir)
  return 0


def _shown() -> contextlib.AbstractContextManager[progress.ProgressFn]:
  if _processes.is_main():
    return progress.shown(STAGES)
  return contextlib.nullcontext(progress.silent)


def show(
    rows: Sequence[report.Row],
    workdir: Any,
    deviations: Sequence[report.Row] | None = None,
) -> None:
  """Prints a table of rows, and where everything lies."""
  from rich import console

  width = shutil.get_terminal_size().columns
  table = report.rich_table(rows, deviations)
  out = console.Console(width=max(width, 100))
  out.print(table)
  out.print(f'[dim]Pictures, table and soups: {workdir}[/dim]')


if __name__ == '__main__':
  sys.exit(main())
