"""Runs an experiment: pre-train, fine-tune a sweep, cook every soup, report.

```
python -m jaxsoup.experiments.main --config=configs/digits.py --workdir=DIR
```

Everything goes into the workdir, and finished work is not repeated: a second
call continues where the first one stopped, and ends with the same soups.
Several calls can share the fine-tuning, each with its part of the runs:

```
... --config.sweep.shard=0/4      and 1/4, 2/4, 3/4, on one workdir
```

  ... --seeds=3            in DIR/seed0, DIR/seed1, ..., and their mean
  ... --export             each soup as a directory of Hugging Face, too

One run on all devices of several processes, such as those of a TPU pod, where
`config.is_sharded` is true; all of them need the workdir on a shared disk:

```
... --distributed        where jax detects the processes, else with these set:
JAX_COORDINATOR_ADDRESS=HOST:PORT JAX_NUM_PROCESSES=N JAX_PROCESS_ID=I
```

With --export, `exported/` has each soup with the names, config and tokenizer of
`config.init`, for `from_pretrained` of transformers or timm.
"""

from collections.abc import Sequence
from concurrent import futures
import contextlib
import functools
import importlib.util
import pathlib
import shutil
import sys
from typing import Any

from jaxsoup import _files
from jaxsoup import _processes
from jaxsoup import _workers
from jaxsoup import report
from jaxsoup.experiments import answers
from jaxsoup.experiments import configs
from jaxsoup.experiments import exporting
from jaxsoup.experiments import results
from jaxsoup.experiments import stages
from jaxsoup.experiments import workdirs
from jaxsoup.runtime import buckets
from jaxsoup.runtime import distributed
from jaxsoup.runtime import preemption
from jaxsoup.runtime import progress
from jaxsoup.runtime import user_code
from jaxsoup.train import steps
from jaxsoup.typing import PathLike

# The stages, and about how long each takes.
STAGES = {
    'pre-training': 8,
    'fine-tuning': 12,
    'souping': 20,
    'reporting': 5,
    'landscapes': 10,
}

# Rows by workdir, of one experiment or of its seeds.
Tables = dict[pathlib.Path, list[report.Row]]


def run(
    experiment: configs.Experiment,
    workdir: PathLike,
    progress_fn: progress.ProgressFn = progress.silent,
    stop: preemption.Stop | None = None,
    executor: futures.Executor | None = None,
) -> list[report.Row]:
  """Runs one experiment, or what is left of it.

  Args:
    experiment: of `configs.load`.
    workdir: where everything goes.
    progress_fn: called with a stage and the share of it that is done.
    stop: whether the script is asked to stop, see `preemption.handled`.
    executor: where the runs are fine-tuned, each group of them as a shard of
      its own. Workers need the config, by its path, and the workdir on a shared
      disk. None: here, one after another.

  Returns:
    A row a model: singles, soups, ensembles. None at all with `sweep.shard`,
    which only trains.

  Raises:
    ImportError: a package of an extra is missing.
    UsageError: the workdir was started with another config.
    InUseError: another process uses the workdir.
    Preempted: `stop` was requested; finished work is saved.
    OSError: the disk is full, or a run failed on several workers; finished work
      is saved.
  """
  if importlib.util.find_spec('matplotlib') is None:
    # Now, not after the training.
    raise ImportError(
        'matplotlib is not installed: pip install "jaxsoup[demo]"'
    )
  if executor is not None and experiment.source is None:
    raise configs.UsageError(
        'With an executor, workers load the experiment by its path: pass what '
        'configs.load returned.'
    )
  folder = buckets.path_of(workdir)
  if not _files.is_remote(folder):
    folder = folder.absolute()
  advice = (
      'Finished work is kept: free some space, and run the same command again '
      'to continue.'
  )
  is_part = workdirs.shard_of(experiment.config)[1] > 1
  with _files.room_for(folder, advice), workdirs.locked(experiment, folder):
    rows = [] if is_part else results.finished(experiment, folder)
    if not rows:
      work = workdirs.work_of(experiment, folder, progress_fn, stop)
      theta_0 = stages.theta_0(work)
      if executor is not None and not is_part:
        _finetune_on(executor, work)
      if not stages.finetune_all(work, theta_0) or is_part:
        return []
      rows = results.make(work, theta_0)
    progress_fn(list(STAGES)[-1], 1.0)
    return rows


def _finetune_on(executor: futures.Executor, work: workdirs.Work) -> None:
  """Has workers train the groups of runs that are not there yet."""
  assert work.experiment.source is not None
  size = work.config.sweep.group_size
  groups = steps.grouped(work.experiment.runs, size)
  shards = [
      f'{i}/{len(groups)}'
      for i, group in enumerate(groups)
      if not buckets.are_whole(*(p for k, _, p in work.copies() if k in group))
  ]
  if len(groups) == 1 or not shards:
    return
  train = functools.partial(_train, *work.experiment.source, work.workdir)
  calls = _workers.Calls(
      executor,
      train,
      len(shards),
      lambda: work.stop.check(f'{work.workdir} holds the runs so far'),
  )
  for i, _ in enumerate(calls.values(shards), 1):
    work.progress_fn('fine-tuning', i / len(shards))


def _train(
    path: str, overrides: Sequence[str], workdir: PathLike, shard: str
) -> None:
  """Trains a group of runs, on a worker."""
  part = f'--config.sweep.shard={shard}'
  run(configs.load(path, [*overrides, part]), workdir)


def run_seeds(
    path: str,
    workdir: PathLike,
    overrides: Sequence[str] = (),
    num_seeds: int = 1,
    is_exported: bool = False,
) -> Tables:
  """Runs an experiment with several seeds, a progress bar and SIGTERM handling.

  Several seeds, from that of the config on, are in `seed0/`, `seed1/`... of the
  workdir, and the mean over them in its `table.md`.

  Returns:
    By the workdir of each seed its table, as of `run`.
  """
  parent = buckets.path_of(workdir)
  if num_seeds > 1 and not any(parent.glob('seed*/config.json')):
    configs.require_new(parent, configs.others(parent, 'seed'))
  loaded = configs.load(path, overrides)
  first = loaded.config.seed
  if is_exported:
    exporting.check(loaded, parent)
  tables: Tables = {}
  for seed in range(first, first + num_seeds):
    loaded = configs.load(path, [*overrides, f'--config.seed={seed}'])
    folder = parent if num_seeds == 1 else parent / f'seed{seed}'
    shown: Any = contextlib.nullcontext(progress.silent)
    if _processes.is_main():
      shown = progress.shown(STAGES)
    with preemption.handled() as stop, shown as progress_fn:
      tables[folder] = run(loaded, folder, progress_fn, stop)
    if is_exported and tables[folder]:
      exporting.make(loaded, folder)
  if num_seeds > 1 and all(tables.values()) and _processes.is_main():
    means, deviations = averaged(tables)
    texts = report.markdown(means, deviations), report.gains_by_shift(means)
    (parent / 'table.md').write_text('\n\n'.join(texts).strip() + '\n')
  return tables


def averaged(
    tables: Tables,
) -> tuple[list[report.Row], list[report.Row] | None]:
  """The table of `run_seeds`, and its deviations where there are several."""
  summaries = [report.summary(rows) for rows in tables.values()]
  if len(tables) == 1:
    return summaries[0], None
  return report.mean_rows(summaries, [*map(answers.of_workdir, tables)])


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; returns the exit code."""
  argv = sys.argv[1:] if argv is None else argv
  try:
    asked = configs.parse(argv)
    workdir = asked.workdir
    configs.load(asked.config, asked.overrides)  # Errors before others wait.
    if asked.distributed:
      distributed.start()
    print(distributed.banner(workdir), file=sys.stderr)
    tables = run_seeds(
        asked.config, workdir, asked.overrides, asked.seeds, asked.export
    )
  except Exception as e:
    print(f'Error: {user_code.message(e)}', file=sys.stderr)
    return getattr(e, 'exit_code', 1)
  if not _processes.is_main():
    return 0
  if all(tables.values()):
    show(tables, workdir)
  else:
    print(
        f'The runs of this shard are in {workdir}. When all shards are done, '
        'run the same command without sweep.shard to make the soups.'
    )
  return 0


def show(tables: Tables, workdir: PathLike) -> None:
  """Prints a table, the mean over the seeds, and where the files are."""
  from rich import console

  width = shutil.get_terminal_size().columns
  out = console.Console(width=max(width, 100))
  out.print(report.rich_table(*averaged(tables)))
  out.print(f'[dim]Pictures, table and soups: {workdir}[/dim]')


if __name__ == '__main__':
  sys.exit(main())
