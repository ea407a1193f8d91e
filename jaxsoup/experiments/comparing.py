"""Two experiments, row by row: of different commits, or different sweeps.

```
print(comparing.compare('runs/before', 'runs/after').as_text())
```
"""

from collections.abc import Sequence
import pathlib
from typing import NamedTuple

import numpy as np

from jaxsoup import _json
from jaxsoup import report
from jaxsoup import statistics
from jaxsoup.experiments import answers
from jaxsoup.statistics import Comparison
from jaxsoup.typing import Json
from jaxsoup.typing import PathLike

_HELD_OUT, _TEST, _MEAN = 'held-out', 'test', 'mean of shifts'
_KEYS = {_HELD_OUT: 'held_out', _TEST: 'test'}


class Difference(NamedTuple):
  """One row of two experiments, on one data set.

  Attributes:
    row: such as 'best single' or 'greedy'.
    data: 'held-out', 'test', 'mean of shifts', or the name of a shift.
    a: score in the first experiment, in 0..1.
    b: score in the second.
    gain: b - a; interval and p-value are NaN where they are unknown.
    reason: why they are; else empty.
  """

  row: str
  data: str
  a: float
  b: float
  gain: Comparison
  reason: str = ''


class Differences(NamedTuple):
  """All that two experiments have in common, and what they have not.

  Attributes:
    metric: what the scores are.
    shared: rows that both have.
    only_a: names of rows and shifts that only the first has.
    only_b: names of those that only the second has.
  """

  metric: str
  shared: list[Difference]
  only_a: list[str]
  only_b: list[str]

  def as_json(self) -> Json:
    shared = [{**x._asdict(), 'gain': _json.plain(x.gain)} for x in self.shared]
    return self._asdict() | {'shared': shared}

  def as_text(self) -> str:
    """A table, how sure the differences are, and what only one has."""
    lines: list[tuple[str, ...]]
    lines = [(f'{self.metric} (%)', '', 'A', 'B', 'B - A')]
    for i, x in enumerate(self.shared):
      name = x.row if not i or self.shared[i - 1].row != x.row else ''
      mark = ' *' if x.gain.is_significant else ''
      scores = (f'{100 * score:.1f}' for score in (x.a, x.b))
      lines.append((name, x.data, *scores, report.with_interval(x.gain) + mark))
    w = [max(map(len, column)) for column in zip(*lines)]
    texts = ('  '.join(map(format, x, (f'<{n}' for n in w))) for x in lines)
    text = [line.rstrip() for line in texts]
    legend: dict[str, list[str]] = {}
    for x in self.shared:
      how = f'interval by {x.gain.method} over {_number_of(x.gain)}'
      how = f'cannot tell: {x.reason}' if x.reason else how
      legend.setdefault(how, []).append(x.data)
    text += ['', '* p < 0.05, each row tested separately.']
    for how, names in legend.items():
      text.append(f'{", ".join(dict.fromkeys(names))}: {how}.')
    for label, names in (('A', self.only_a), ('B', self.only_b)):
      text += [f'Only {label} has: {", ".join(names)}.'] if names else []
    return '\n'.join(text)


class _UnknownError(Exception):
  """Why there is no interval."""


class _Repeat(NamedTuple):
  """One table: of an experiment, a seed or a split."""

  rows: list[report.Row]
  # Of each split of an experiment, and its answers.
  splits: list[tuple[list[report.Row], pathlib.Path]]

  def answers(self) -> list[report.Answers]:
    try:
      return [answers.read(folder, rows) for rows, folder in self.splits]
    except FileNotFoundError as e:
      raise _UnknownError(str(e)) from e


def compare(
    a: PathLike, b: PathLike, *, has_each_shift: bool = False
) -> Differences:
  """The differences of two experiments, with paired intervals where possible.

  Over seeds where both have several, else over splits, else over examples.
  Those are paired if both experiments have the same.

  Args:
    a: `results.json` or its workdir, also one of several seeds.
    b: the same of the other experiment.
    has_each_shift: whether each shift is compared by itself, too.

  Returns:
    The `Differences`, b - a.

  Raises:
    FileNotFoundError: no `results.json`.
    ValueError: an unreadable file, different metrics, or no seed, row or name
      in common.
  """
  pairs = _paired(pathlib.Path(a), pathlib.Path(b))
  tables = [
      [{row.name: row for row in report.summary(x.rows)} for x in pair]
      for pair in pairs
  ]
  first, second = tables[0]
  shared = [
      name
      for name in first
      if all(name in table for pair in tables for table in pair)
  ]
  if not shared:
    raise ValueError(
        f'{a} has rows {", ".join(first)}, and {b} {", ".join(second)}: no row '
        'is in both. Compare results of experiments with a recipe in common.'
    )
  metrics = [first[shared[0]].metric, second[shared[0]].metric]
  if metrics[0] != metrics[1]:
    raise ValueError(
        f'The scores of {a} are {metrics[0]}, those of {b} {metrics[1]}: '
        'compare results of one metric (config.metric).'
    )
  sets = [[x[shared[0]].shifts for x in pair] for pair in tables]
  shifts = [
      name for name in sets[0][0] if all(name in y for x in sets for y in x)
  ]
  names = [_HELD_OUT, _TEST, *([_MEAN] if shifts else [])]
  names += shifts if has_each_shift else []
  only = [
      [*(x for x in mine if x not in shared),
       *(x for x in mine[shared[0]].shifts if x not in shifts)]
      for mine in (first, second)
  ]  # fmt: skip
  given: list[list[list[report.Answers]]] | _UnknownError
  try:
    given = [[repeat.answers() for repeat in pair] for pair in pairs]
  except _UnknownError as e:
    given = e
  differences = [
      _difference(tables, given, row, name, shifts)
      for row in shared
      for name in names
  ]
  return Differences(metrics[0], differences, *only)


def _paired(a: pathlib.Path, b: pathlib.Path) -> list[tuple[_Repeat, _Repeat]]:
  first, second = _seeds(a), _seeds(b)
  shared = [name for name in first if name in second]
  if not shared:
    names = [', '.join(x) or 'one experiment' for x in (first, second)]
    raise ValueError(
        f'{a} has {names[0]}, and {b} {names[1]}: no seed is in both. Compare '
        'one experiment with one, such as DIR/seed0, or two directories with '
        'the same seeds.'
    )
  pairs = [(first[name], second[name]) for name in shared]
  numbers = [len(x.splits) for x in pairs[0]]
  if len(pairs) == 1 and numbers[0] == numbers[1] > 1:
    return [*zip(*([_Repeat(x[0], [x]) for x in y.splits] for y in pairs[0]))]
  return pairs


def _seeds(path: pathlib.Path) -> dict[str, _Repeat]:
  """Experiments by the name of their seed; of one experiment ''."""
  for file in (path, path / 'results.json'):
    if file.is_file():
      return {'': _read(file)}
  files = sorted(path.glob('seed*/results.json'))
  if not files:
    wrong = 'does not exist'
    if path.exists():
      wrong = 'has no results.json, and no seed*/results.json'
    raise FileNotFoundError(
        f'{path} {wrong}: give the workdir of a finished experiment, or its '
        'results.json.'
    )
  return {file.parent.name: _read(file) for file in files}


def _read(path: pathlib.Path) -> _Repeat:
  content = _json.read(path)
  try:
    content = content if isinstance(content, dict) else {'rows': content}
    rows = report.rows_of(content['rows'])
    names = [row.name for row in rows]
    if not rows or len(set(names)) < len(names):
      raise ValueError(f'it has no rows, or two of one name: {names}')
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise ValueError(
        f'{path} is not the results.json of an experiment: {e!r}. Give one, or '
        'run the command of the experiment again, which writes a new one.'
    ) from e
  return _Repeat(rows, answers.tables_of(content, path.parent))


def _difference(tables, given, row: str, data: str, shifts) -> Difference:
  a, b = np.array(
      [[_score(x[row], data, shifts) for x in pair] for pair in tables]
  ).T
  gain, reason = statistics.over_repeats(b - a, share=1), ''
  try:
    gain = _paired_gain(given, row, shifts if data == _MEAN else [data])
  except _UnknownError as e:
    few = 'one seed, and ' if len(tables) == 1 else ''
    reason = f'{few}{e}'
  return Difference(row, data, float(a.mean()), float(b.mean()), gain, reason)


def _paired_gain(given, row: str, names: Sequence[str]) -> Comparison:
  """Over repeats, or of one repeat over examples, by the answers of both."""
  if isinstance(given, _UnknownError):
    raise given
  keys = [_KEYS.get(name, name) for name in names]
  part = lambda i, fn: [report.by_set(pair[i], fn, keys) for pair in given]
  ids, label = (
      [part(i, fn) for i in (0, 1)]
      for fn in (lambda x: x.ids, lambda x: x.label)
  )
  for what, (of_a, of_b) in (('examples', ids), ('labels', label)):
    for first, second in zip(of_a, of_b):
      _require_equal(what, first, second)
  metric = given[0][0][0].metric
  try:
    a, b = (part(i, lambda x: x.rows[row]) for i in (0, 1))
  except KeyError as e:
    raise _UnknownError(f'{row} has no answers of its own') from e
  if len(given) > 1:
    return statistics.crossed(metric, b, a, ids[0], label=label[0])
  if len(a[0]) > 1:
    return statistics.compare(b[0], a[0], label[0][0], metric=metric)
  return statistics.compare(
      *(next(iter(x.values())) for x in (b[0], a[0], label[0][0])),
      metric=metric,
  )


def _require_equal(what: str, first, second) -> None:
  for name in {**first, **second}:
    if not np.array_equal(first.get(name, ()), second.get(name, ())):
      key = name.partition('/')[2]
      name = next((x for x in _KEYS if _KEYS[x] == key), key)
      raise _UnknownError(f'A and B have different {what} in {name}')


def _score(row: report.Row, data: str, shifts: Sequence[str]) -> float:
  if data == _MEAN:
    return float(np.mean([row.shifts[name] for name in shifts]))
  return getattr(row, _KEYS[data]) if data in _KEYS else row.shifts[data]


def _number_of(gain: Comparison) -> str:
  if gain.num_repeats > 1:
    return f'{gain.num_repeats} repeats'
  return f'{gain.num:,} examples'
