"""The checkpoints of one run: their step numbers, and metrics stored for them.

```
steps = checkpoints.steps('runs/base')              # {1000: path, 2000: path}
ingredients = checkpoints.Ingredients(steps.values())
scores = checkpoints.metric('runs/base', 'accuracy')     # {1000: 0.71, ...}
```
"""

from collections.abc import Iterable
import csv
import re
from typing import Any

from etils import epath

from jaxsoup import _json
from jaxsoup.checkpoints import _orbax
from jaxsoup.checkpoints import _orbax_layout
from jaxsoup.typing import PathLike

_STEP = re.compile(r'(.*[_-])?(\d+)')
_OF_A_STEP = (_orbax_layout.TREE_FILE, _orbax_layout.ROOT_FILE)
# Where a CheckpointManager keeps the metrics of a step.
_METRICS = f'{_orbax_layout.METRICS}/metrics'
_OF_TRAINER = 'trainer_state.json'


def steps(run: PathLike) -> dict[int, str]:
  """The checkpoints of a run by their step numbers, the earliest first.

  Args:
    run: the directory of an Orbax `CheckpointManager`, of flax or of a Trainer
      of transformers, whose steps are `500`, `checkpoint_500`,
      `checkpoint-500` or the like; or one that holds a single such directory.

  Returns:
    Absolute paths, as `Ingredients` takes them. A soup has the form of its
    first ingredient: to go on training from it, pass the latest step first.

  Raises:
    FileNotFoundError: the directory is not there, or holds no steps.
    ValueError: it holds several runs, steps of several kinds, or one twice.

  Example:
    >>> import os, tempfile
    >>> run = tempfile.mkdtemp()
    >>> for step in (200, 1000):
    ...   os.mkdir(f'{run}/checkpoint-{step}')
    >>> list(steps(run))
    [200, 1000]
  """
  root = _orbax.absolute(run)
  if not root.is_dir():
    raise FileNotFoundError(f'{root} is not a directory. Give that of a run.')
  if any((root / file).exists() for file in _OF_A_STEP):
    raise FileNotFoundError(
        f'{root} is one checkpoint. Give the directory of its run.'
    )
  numbered = _steps_in(root)
  if not numbered:
    below = {p: s for p in root.iterdir() if p.is_dir() and (s := _steps_in(p))}
    if len(below) > 1:
      raise ValueError(
          f'{root} holds several runs: {sorted(p.name for p in below)}. Give '
          'the path of one.'
      )
    numbered = next(iter(below.values()), {})
  if not numbered:
    raise FileNotFoundError(
        f'{root} holds no steps of a run, such as 500, checkpoint_500 or '
        'checkpoint-500. Give the directory that has them.'
    )
  return {step: str(numbered[step]) for step in sorted(numbered)}


def _steps_in(directory: epath.Path) -> dict[int, epath.Path]:
  """Those with one name but for the number; others are alone, as `theta_0`."""
  kinds: dict[str, list[tuple[int, epath.Path]]] = {}
  for path in directory.iterdir():
    match = _STEP.fullmatch(path.name)
    if match is None or _orbax.UNFINISHED in path.name:
      continue
    if path.is_dir() or path.name.startswith('checkpoint_'):  # A file of flax.
      kinds.setdefault(match[1] or '', []).append((int(match[2]), path))
  several = [rows for rows in kinds.values() if len(rows) > 1]
  if len(several) > 1:
    raise ValueError(
        f'{directory} has steps of several kinds: '
        f'{sorted(rows[0][1].name for rows in several)}. Give a directory with '
        'the steps of one run.'
    )
  rows = (several or [*kinds.values(), []])[0]
  numbered = dict(rows)
  if len(numbered) < len(rows):
    raise ValueError(
        f'{directory} has one step twice: {sorted(p.name for _, p in rows)}. '
        'Give the checkpoints themselves.'
    )
  return _orbax_layout.finished(numbered)


def metric(source: PathLike, name: str) -> dict[int, float]:
  r"""A metric that was stored for the steps of a run.

  Args:
    source: the run, see `steps`, whose `CheckpointManager` or Trainer has
      stored metrics; or a file with a `step` in each row: JSON lines, CSV, or
      the `trainer_state.json` of a Trainer.
    name: of the metric.

  Returns:
    Its value by step, of the steps that have one.

  Raises:
    FileNotFoundError: there is no such file or run.
    ValueError: no step has it, or the file is not of that kind.

  Example:
    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp(), 'log.csv')
    >>> _ = file.write_text('step,accuracy\n100,0.5\n200,0.7\n')
    >>> metric(file, 'accuracy')
    {100: 0.5, 200: 0.7}
  """
  path = _orbax.absolute(source)
  try:
    rows = list(_rows_of_run(path) if path.is_dir() else _rows_of_file(path))
    values = {
        int(row['step']): float(row[name])
        for row in rows
        if row.get(name) not in (None, '')
    }
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise ValueError(
        f'{path}: {e}. Expected a step and metrics in each row, of JSON lines '
        'or CSV, or a run of a CheckpointManager.'
    ) from e
  if not values:
    known = sorted({key for row in rows for key in row} - {'step'})
    none = 'none (a CheckpointManager stores them if its options have best_fn)'
    raise ValueError(
        f'{path} has no metric {name!r} for any step. It has '
        f'{", ".join(known) or none}.'
    )
  return values


def _rows_of_run(run: epath.Path) -> Iterable[dict[str, Any]]:
  for step, path in steps(run).items():
    file = epath.Path(path) / _METRICS
    if file.exists():
      yield {**_json.parsed(file.read_bytes()), 'step': step}
    if (state := epath.Path(path) / _OF_TRAINER).exists():
      yield from _rows_of_file(state)


def _rows_of_file(file: epath.Path) -> Iterable[dict[str, Any]]:
  text = file.read_text()
  if file.suffix == '.csv':
    return csv.DictReader(text.splitlines())
  if file.suffix == '.json':
    return _json.parsed(text)['log_history']
  return map(_json.parsed, filter(None, text.splitlines()))
