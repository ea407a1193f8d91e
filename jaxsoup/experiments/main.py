"""Runs an experiment: pre-train, fine-tune a sweep, soup, evaluate, report.

```
python -m jaxsoup.experiments.main --config=configs/digits.py --workdir=DIR \
    [--config.sweep.num_runs=16 ...]
```

Goes on from its workdir after a kill at any point, with the same result. On
SIGTERM it saves the state of its training and exits with 143. The workdir holds
`theta_0/` and `runs/NN/` (Orbax checkpoints, with config and held-out score),
`scores.jsonl`, `soups/NAME/`, `results.json`, and pictures; while it works also
`unfinished/`, states of training, and `.lock`.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import functools
import importlib.util
import json
import operator
import pathlib
import shutil
import sys
from typing import Any

import jax
import ml_collections
import numpy as np

from jaxsoup import checkpoints
from jaxsoup import metrics
from jaxsoup import report
from jaxsoup.checkpoints import _disk
from jaxsoup.data import digits
from jaxsoup.data import shifts
from jaxsoup.experiments import configs
from jaxsoup.experiments import cook
from jaxsoup.experiments import distributed
from jaxsoup.experiments import finetune
from jaxsoup.experiments import locking
from jaxsoup.experiments import preemption
from jaxsoup.experiments import progress
from jaxsoup.experiments import train_state

# The stages, and about how long each takes.
STAGES = {'pre-training': 8, 'fine-tuning': 12, 'souping': 20, 'reporting': 5}


def run(
    config: ml_collections.ConfigDict,
    runs: Sequence[Mapping[str, float]],
    workdir: Any,
    progress_fn: progress.ProgressFn = progress.silent,
    stop: preemption.Stop | None = None,
) -> list[report.Row]:
  """Runs one experiment, or what is left of it.

  Args:
    config: as `configs/digits.py` makes it.
    runs: the hyper-parameters of each run.
    workdir: where everything goes.
    progress_fn: called with a stage and the share of it that is done.
    stop: whether the script is asked to stop, see `preemption.handled`.

  Returns:
    A row a model: singles, soups, ensembles.

  Raises:
    ImportError: a package of the extra `demo` is missing.
    UsageError: the workdir was begun with another config.
    InUseError: another process works on the workdir.
    Preempted: `stop` was requested; what was done is saved.
    OSError: the disk is full; what was done is saved.
  """
  for package in ('matplotlib', 'sklearn'):  # Now, not after the training.
    if importlib.util.find_spec(package) is None:
      raise ImportError(
          f'{package} is not installed: pip install "jaxsoup[demo]"'
      )
  workdir = pathlib.Path(workdir).absolute()
  try:
    with locking.locked(workdir / '.lock', workdir):
      return _run(config, runs, workdir, progress_fn, stop or preemption.Stop())
  except OSError as e:
    if not _disk.is_full(e):
      raise
    raise OSError(
        f'{workdir}: {e} What was done is kept: free some space, and the same '
        'command goes on from there.'
    ) from e


def _run(config, runs, workdir, progress_fn, stop) -> list[report.Row]:
  configs.check_unchanged(config, workdir / 'config.json')
  progress_fn('pre-training', 0.0)
  splits = digits.load(config.seed, config.data.sizes)
  data = _evaluation_data(config, splits)
  logits_fn = finetune.make_model(config).logits_fn
  theta_0 = _theta_0(config, splits, workdir, progress_fn, stop)
  ingredients = _ingredients(
      config, runs, theta_0, splits, workdir, progress_fn, stop
  )
  logits = cook.all_logits(config, ingredients, logits_fn, data)
  soups = _soups(
      config,
      ingredients,
      theta_0,
      logits_fn,
      data,
      logits,
      workdir,
      progress_fn,
      stop,
  )
  progress_fn('reporting', 0.0)
  soup_logits = cook.all_logits(
      config, [s.params for s in soups.values()], logits_fn, data
  )
  rows = _rows(ingredients, soups, logits, soup_logits, data)
  _write_report(workdir, config, runs, rows, soups)
  progress_fn('reporting', 1.0)
  return rows


def _evaluation_data(config, splits) -> dict[str, Any]:
  """What scores the models: held-out chooses, test and its shifts report."""
  test = splits['test']
  return {
      'held_out': splits['held_out'],
      'test': test,
      **{
          name: shifts.apply(test, name, severity=severity, seed=config.seed)
          for name, severity in config.shifts.items()
          if severity > 0
      },
  }


def _saved(config, workdir, name, stop) -> train_state.Saved:
  folder = workdir / 'unfinished' / name
  return train_state.Saved(folder, stop, minutes=config.save_every_minutes)


def _theta_0(config, splits, workdir, progress_fn, stop):
  path = workdir / 'theta_0'
  saved = _saved(config, workdir, 'theta_0', stop)
  if not path.exists():
    theta_0 = finetune.pretrain(
        config,
        splits['pretrain'],
        progress_fn=lambda n, num, _: progress_fn('pre-training', n / num),
        saved=saved,
    )
    checkpoints.save(path, theta_0, metadata={'seed': config.seed})
  saved.delete()
  # Always from the disk, so that a second start sees the same parameters.
  return checkpoints.Ingredients([path])[0]


def _ingredients(config, runs, theta_0, splits, workdir, progress_fn, stop):
  """Fine-tunes the runs that are not there yet, one group after another."""
  paths = [workdir / 'runs' / f'{i:02d}' for i in range(len(runs))]
  size = config.sweep.group_size
  for start in range(0, len(runs), size):
    group = list(zip(paths, runs))[start : start + size]
    _finetune_group(
        config,
        theta_0,
        group,
        splits,
        functools.partial(_part, progress_fn, start, len(group), len(runs)),
        _saved(config, workdir, f'runs_{start:02d}', stop),
    )
  shutil.rmtree(workdir / 'unfinished', ignore_errors=True)
  return preemption.Ingredients(
      paths,
      jax.eval_shape(lambda: theta_0),
      stop=stop,
      saved=f'{workdir} holds all runs, and the scores and soups so far',
  )


def _part(progress_fn, start, num_runs, num_all, epoch, num_epochs, _) -> None:
  done = (start + num_runs * epoch / num_epochs) / num_all
  progress_fn('fine-tuning', done)


def _finetune_group(config, theta_0, group, splits, progress_fn, saved) -> None:
  """Trains all runs of a group if one is missing, and saves those.

  All of them, so that what a run becomes does not depend on what was there.
  """
  if all(path.exists() for path, _ in group):
    saved.delete()
    return
  runs = [run for _, run in group]
  stacked = finetune.finetune(
      config,
      theta_0,
      runs,
      splits['train'],
      progress_fn=progress_fn,
      saved=saved,
  )
  stacked = jax.device_get(stacked)
  logits_fn = finetune.make_model(config).logits_fn
  eval_fn = cook.accuracy_of(config, logits_fn, splits['held_out'])
  for i, (path, run) in enumerate(group):
    if not path.exists():
      params = jax.tree.map(operator.itemgetter(i), stacked)
      metadata = {'config': dict(run), 'held_out': float(eval_fn(params))}
      checkpoints.save(path, params, metadata=metadata)
  saved.delete()


def _soups(
    config,
    ingredients,
    theta_0,
    logits_fn,
    data,
    logits,
    workdir,
    progress_fn,
    stop,
):
  scores = checkpoints.ScoreLog(workdir / 'scores.jsonl', ingredients)
  for k, single in enumerate(logits['held_out']):
    if (k,) not in scores:
      label = data['held_out']['label']
      scores[(k,)] = float(metrics.accuracy(single, label))
  recipes = cook.recipes(
      config, ingredients, theta_0, logits_fn, data['held_out'], scores
  )
  soups = {}
  for i, (name, recipe) in enumerate(recipes.items()):
    progress_fn('souping', i / len(recipes))
    stop.check(f'{workdir} holds all runs, and {i} of {len(recipes)} soups')
    path = workdir / 'soups' / name.replace(' ', '_').lower()
    if not path.exists():
      checkpoints.save(
          path,
          recipe(),
          ingredients=ingredients,
          metadata={'recipe': name, 'seed': config.seed},
      )
    soups[name] = checkpoints.load(path, jax.eval_shape(lambda: theta_0))
  return soups


def _rows(ingredients, soups, logits, soup_logits, data) -> list[report.Row]:
  singles = [
      cook.row(
          pathlib.Path(path).name,
          'single',
          {name: x[k] for name, x in logits.items()},
          data,
      )
      for k, path in enumerate(ingredients.paths)
  ]
  of_soups = [
      cook.row(
          name,
          'soup',
          {d: x[i] for d, x in soup_logits.items()},
          data,
          beta=getattr(soup.info, 'beta', 1.0),
      )
      for i, (name, soup) in enumerate(soups.items())
  ]
  return [*singles, *of_soups, *cook.ensemble_rows(logits, data)]


def _write_report(workdir, config, runs, rows, soups) -> None:
  searches = {name: soups[name].info for name in ('greedy', 'pruned')}
  report.save(
      lambda ax: report.scatter(ax, rows),
      workdir / 'test_against_shifts.png',
      size=(7.2, 4.2),
  )
  report.save(
      lambda ax: report.trials(ax, searches),
      workdir / 'trials.png',
  )
  (workdir / 'table.md').write_text(
      report.markdown(report.summary(rows)) + '\n'
  )
  results = {
      'config': json.loads((workdir / 'config.json').read_text()),
      'runs': list(runs),
      'rows': [row._asdict() for row in rows],
      'alpha': {
          name: soup.alpha.tolist()
          for name, soup in soups.items()
          if isinstance(soup.alpha, np.ndarray)
      },
  }
  unfinished = workdir / 'results.tmp'
  unfinished.write_text(json.dumps(results, indent=1))
  unfinished.replace(workdir / 'results.json')


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; returns the exit code."""
  argv = sys.argv[1:] if argv is None else argv
  try:
    path, workdir, overrides = configs.parse(argv)
    config, runs = configs.load(path, overrides)
    print(distributed.banner(workdir), file=sys.stderr)
    with preemption.handled() as stop, progress.shown(STAGES) as progress_fn:
      rows = run(config, runs, workdir, progress_fn, stop)
  except (ImportError, OSError, TypeError, ValueError) as e:
    print(f'Error: {e}', file=sys.stderr)
    return getattr(e, 'exit_code', 1)
  show(report.summary(rows), workdir)
  return 0


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
