"""The experiments of the paper on one small problem, by one command.

  python -m jaxsoup.paper.run --config=configs/digits.py --workdir=DIR
  ... --seeds=3 --only=4,13

`DIR/experiments.md` then has the results of each of them, `DIR/experiments/`
and `DIR/seedN/experiments/` the pictures; `docs/experiments.md` says whether
the paper has the same results. Finished work is not repeated. `jaxsoup report
DIR/seed0/sweep` shows the sweep itself.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import functools
import itertools
import json
import pathlib
import sys

import ml_collections
import numpy as np

from jaxsoup import _files
from jaxsoup import _json
from jaxsoup import report
from jaxsoup import statistics
from jaxsoup.experiments import configs
from jaxsoup.paper import criteria
from jaxsoup.paper import pools
from jaxsoup.paper import sweeps
from jaxsoup.paper import trainings
from jaxsoup.runtime import distributed
from jaxsoup.runtime import preemption
from jaxsoup.runtime import progress
from jaxsoup.typing import PathLike

EXPERIMENTS = dict(sorted((sweeps.EXPERIMENTS | trainings.EXPERIMENTS).items()))


def run(
    path: str,
    workdir: PathLike,
    overrides: Sequence[str] = (),
    *,
    num_seeds: int = 1,
    only: Sequence[int] = (),
) -> dict[int, dict[str, dict[str, list[float]]]]:
  """Runs the experiments, or what is left of them, and shows its progress.

  Args:
    path: of a config like `configs/digits.py`.
    workdir: where everything goes.
    overrides: of the config: '--config.seed=3' is the first seed.
    num_seeds: seeds of split, pre-training and sweep.
    only: numbers of experiments; by default all, or those that train nothing
      but the sweep if the config does not pre-train.

  Returns:
    By number of the experiment, row and column: a figure for each seed.

  Raises:
    UsageError: a wrong config, another one than the workdir was started with,
      or a number that it does not have.
  """
  config = configs.load(path, overrides).config
  known = [number for number in EXPERIMENTS if not _lacks(config, number)]
  for number in only:
    if number not in known:
      wrong = f'There is no experiment {number}'
      if number in EXPERIMENTS:
        lacks = ', '.join(_lacks(config, number))
        wrong = f'Experiment {number} needs {lacks}, which {path} does not set'
      raise configs.UsageError(
          f'{wrong}: choose from {", ".join(map(str, known))}.'
      )
  # Of large models, by default those that train nothing but the sweep.
  chosen = list(only) or list(
      known if 'pretrain' in config else sweeps.EXPERIMENTS
  )
  workdir = pathlib.Path(workdir).absolute()
  first = config.seed
  figures: dict[int, list[sweeps.Figures]] = {n: [] for n in chosen}
  ids: list[dict[str, np.ndarray]] = []
  shown = progress.shown({'experiments': 1})
  with preemption.handled() as stop, shown as progress_fn:
    for i, seed in enumerate(range(first, first + num_seeds)):
      loaded = configs.load(path, [*overrides, f'--config.seed={seed}'])
      with pools.Bench(loaded, workdir / f'seed{seed}', stop) as bench:
        configs.check_unchanged(bench.config, bench.workdir / 'config.json')
        for j, number in enumerate(chosen):
          progress_fn('experiments', (i + j / len(chosen)) / num_seeds)
          stop.check(f'{workdir} holds the results so far')
          figures[number].append(_once(bench, number))
        ids.append(bench.ids())
    progress_fn('experiments', 1.0)
  _write(workdir, figures, shares_of(ids))
  return {n: _stacked(of_seeds) for n, of_seeds in figures.items()}


def _lacks(config: ml_collections.ConfigDict, number: int) -> list[str]:
  """What an experiment needs, and the config does not set."""
  fields = [f'{name}.' for name in configs.flat(config)]
  has = lambda need: any(x.startswith(f'{need}.') for x in fields)
  return [need for need in EXPERIMENTS[number].needs if not has(need)]


def shares_of(ids: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
  """What two seeds have in common on average of the examples that report."""
  shared: dict[str, list[float]] = {name: [] for name in ids[0]}
  for a, b in itertools.combinations(ids, 2):
    for name, x in shared.items():
      x.append(np.isin(np.unique(a[name]), b[name]).mean())
  return {name: float(np.mean(x or [0.0])) for name, x in shared.items()}


def _once(bench: pools.Bench, number: int) -> sweeps.Figures:
  """The figures of an experiment, from the disk if they are there."""
  experiment = EXPERIMENTS[number]
  path = bench.workdir / 'experiments' / f'{number:02d}.json'
  if path.exists():
    return json.loads(path.read_text())
  figures, draw = experiment.study(bench)
  if draw is not None:
    report.save(draw, path.with_suffix('.png'), size=(6.4, 4.4))
  _json.write(path, _json.plain(figures))
  return json.loads(path.read_text())


def _stacked(
    of_seeds: Sequence[sweeps.Figures],
) -> dict[str, dict[str, list[float]]]:
  """By row and column, one value for each seed."""
  stacked: dict[str, dict[str, list[float]]] = {}
  for figures in of_seeds:
    for row, columns in figures.items():
      for column, value in columns.items():
        stacked.setdefault(row, {}).setdefault(column, []).append(value)
  return stacked


# By number of the experiment, the figures of each seed.
_OfSeeds = Mapping[int, Sequence[sweeps.Figures]]


def _write(
    workdir: pathlib.Path, figures: _OfSeeds, shares: Mapping[str, float]
) -> None:
  """The figures as a Markdown file, and those that are drawn, of all seeds.

  Seeds have `shares` of the examples that report in common, by set.
  """
  lines = ['# The experiments of the paper: results', '']
  lines += [*_verdicts(figures, shares), '']
  for number, of_seeds in figures.items():
    experiment, rows = EXPERIMENTS[number], _stacked(of_seeds)
    lines += [f'## {number}. {experiment.title}', '', *_table(rows, shares), '']
    if experiment.has_dots:
      scores = {
          row: per_cent
          for row, columns in rows.items()
          if (per_cent := {k: x for k, x in columns.items() if '%' in k})
      }
      draw = functools.partial(report.compared, scores=scores)
      path = workdir / 'experiments' / f'{number:02d}.png'
      report.save(draw, path, size=(6.4, 1.6 + 0.3 * len(rows)))
  with _files.replaced(workdir / 'experiments.md', lines[0]) as unfinished:
    unfinished.write_text('\n'.join(lines))


def _verdicts(figures: _OfSeeds, shares: Mapping[str, float]) -> list[str]:
  """Whether each finding held, by the criteria that were stated before."""
  share, among = max(shares.values()), 'other seeds and other examples'
  if share == 1:
    share, among = 0.0, 'other seeds on the same examples'
  lines = [f'Intervals tell of {among}.', '']
  lines += ['| | finding | number | |', '|---:|---|---:|---|']
  for number, of_seeds in figures.items():
    for finding, value_fn in criteria.CRITERIA.get(number, {}).items():
      try:
        values = [value_fn(x) for x in of_seeds]
      except LookupError:
        continue  # Of pools that this config does not have.
      except TypeError:  # None, such as the correlation of equal numbers.
        text, told = 'undefined in a seed', 'cannot tell'
      else:
        gain = statistics.over_repeats(values, share=share)
        text, told = _with_interval(gain), criteria.verdict(gain)
      ours = ', our criterion' if number in criteria.OURS else ''
      lines.append(f'| {number} | {finding} | {text} | {told}{ours} |')
  return lines


def _with_interval(gain: statistics.Comparison) -> str:
  text = f'{gain.gain:+.2f}'
  is_known = np.isfinite(gain.low)
  return text + (f' [{gain.low:.2f}, {gain.high:.2f}]' if is_known else '')


def _table(
    rows: Mapping[str, Mapping[str, Sequence[float]]],
    shares: Mapping[str, float],
) -> list[str]:
  """Means over the seeds; of scores their deviations, of gains intervals."""

  def cell(column, values):
    where = next((x for x in ('shifts', 'test') if x in column), None)
    if where is None or not column.endswith('points') or None in values:
      return _cell(values)
    return _with_interval(statistics.over_repeats(values, share=shares[where]))

  columns = list(dict.fromkeys(k for row in rows.values() for k in row))
  lines = [f'| | {" | ".join(columns)} |', f'|---|{"---:|" * len(columns)}']
  for name, row in rows.items():
    cells = [cell(k, row[k]) if k in row else '' for k in columns]
    lines.append(f'| {name} | {" | ".join(cells)} |')
  return lines


def _cell(values: Sequence[float | None]) -> str:
  """`96.1 ± 0.8`; small numbers have three digits."""
  known = np.array(values, float)  # None is NaN.
  mean = known.mean()
  digits = 1 if abs(mean) >= 2 else 2
  if len(known) < 2:
    return f'{mean:.{digits}f}'
  return f'{mean:.{digits}f} ± {known.std(ddof=1):.{digits}f}'


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; returns the exit code."""
  try:
    asked = configs.parse(sys.argv[1:] if argv is None else argv, has_only=True)
    workdir = asked.workdir
    print(distributed.banner(workdir), file=sys.stderr)
    run(
        asked.config,
        workdir,
        asked.overrides,
        num_seeds=asked.seeds,
        only=asked.only,
    )
  except (ImportError, OSError, TypeError, ValueError) as e:
    print(f'Error: {e}', file=sys.stderr)
    return getattr(e, 'exit_code', 1)
  print(f'Results: {workdir}/experiments.md')
  return 0


if __name__ == '__main__':
  sys.exit(main())
