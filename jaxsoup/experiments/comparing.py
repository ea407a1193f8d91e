"""Two experiments, row by row: of different commits, or different sweeps.

```
print(comparing.compare('runs/before', 'runs/after').as_text())
```
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import NamedTuple
import zipfile
import zlib

import numpy as np

from jaxsoup import _json
from jaxsoup import report
from jaxsoup import statistics
from jaxsoup.experiments import cook
from jaxsoup.statistics import Comparison
from jaxsoup.typing import Json
from jaxsoup.typing import PathLike

_HELD_OUT, _TEST, _MEAN = 'held-out', 'test', 'mean of shifts'
# Of a damaged file of NumPy, and of one that is not that of the rows.
_UNREADABLE = (
    EOFError,
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)
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


@dataclasses.dataclass(frozen=True)
class _Repeat:
  """One table: of an experiment, a seed or a split."""

  path: pathlib.Path
  rows: list[report.Row]
  content: Json
  # Of a split: examples of the sets that it draws.
  sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def table(self) -> dict[str, report.Row]:
    return {row.name: row for row in report.summary(self.rows)}


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
  tables = [[repeat.table for repeat in pair] for pair in pairs]
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
  differences = [
      _difference(pairs, row, name, shifts) for row in shared for name in names
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
  if len(pairs) == 1:
    splits = list(zip(*map(_splits, pairs[0])))
    # Other seeds draw other splits.
    seeds = {x.content.get('config', {}).get('seed') for x in pairs[0]}
    if len(splits) > 1 and len(seeds) == 1:
      return splits
  return pairs


def _seeds(path: pathlib.Path) -> dict[str, _Repeat]:
  """Experiments by the name of their seed; of one experiment ''."""
  if path.is_file():
    return {'': _read(path)}
  if (path / 'results.json').is_file():
    return {'': _read(path / 'results.json')}
  files = sorted(path.glob('seed*/results.json'))
  if not files:
    raise FileNotFoundError(
        f'{path} has no results.json, and no seed*/results.json: give the '
        'workdir of a finished experiment, or its results.json.'
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
  return _Repeat(path, rows, content)


def _splits(repeat: _Repeat) -> list[_Repeat]:
  sizes = {
      key: repeat.content.get('data', {}).get(key, {}).get('num', 0)
      for key in _KEYS.values()
  }
  return [
      dataclasses.replace(repeat, rows=report.rows_of(rows), sizes=sizes)
      for rows in repeat.content.get('splits', [])
  ]


def _difference(pairs, row: str, data: str, shifts) -> Difference:
  scores = np.array(
      [[_score(x.table[row], data, shifts) for x in pair] for pair in pairs]
  )
  names = shifts if data == _MEAN else [_KEYS.get(data, data)]
  gains, reason = scores[:, 1] - scores[:, 0], ''
  try:
    _require_same_examples(pairs, names)
    if len(pairs) > 1:
      share = max(_share(x, row, names[0]) for pair in pairs for x in pair)
      gain = statistics.over_repeats(gains, share=share)
    else:
      gain = _over_examples(pairs[0], row, names, is_mean=data == _MEAN)
  except _UnknownError as e:
    gain, reason = statistics.over_repeats(gains, share=1), str(e)
  a, b = map(float, scores.mean(0))
  return Difference(row, data, a, b, gain, reason)


def _score(row: report.Row, data: str, shifts: Sequence[str]) -> float:
  if data == _MEAN:
    return float(np.mean([row.shifts[name] for name in shifts]))
  return getattr(row, _KEYS[data]) if data in _KEYS else row.shifts[data]


def _require_same_examples(pairs, names: Sequence[str]) -> None:
  few = 'one seed, and ' if len(pairs) == 1 else ''
  for pair in pairs:
    if pair[0].sizes:  # Splits draw one of these sets from the other.
      names = [*names, *_KEYS.values()]
    for name in names:
      first, second = (x.content.get('data', {}).get(name) for x in pair)
      if first is None or first != second:
        raise _UnknownError(f'{few}A and B have different examples in {name}')


def _share(repeat: _Repeat, row: str, name: str) -> float:
  key = name if name in _KEYS.values() else 'shifts'
  if repeat.sizes:
    shares = {
        k: n / sum(repeat.sizes.values()) for k, n in repeat.sizes.items()
    }
    share = shares.get(key, 1.0)
  else:
    share = repeat.table[row].shares.get(key, 1.0)
  if share == 1:
    raise _UnknownError('all repeats report on the same examples')
  return share


def _over_examples(pair, row: str, names, *, is_mean: bool) -> Comparison:
  """By the answers that both workdirs keep."""
  metric_name = pair[0].table[row].metric
  is_accuracy = metric_name == 'accuracy'
  if row == 'mean of singles' and not is_accuracy:
    raise _UnknownError(
        f'one seed, and {metric_name} is not a mean of examples'
    )
  (a, labels), (b, others) = (_answers(repeat, row, names) for repeat in pair)
  for name in names:
    if not np.array_equal(labels[name], others[name]):
      raise _UnknownError(f'one seed, and A and B have other labels in {name}')
  metric = None
  if not is_accuracy:
    num = max(int(x.max()) for y in (a, b, labels) for x in y.values()) + 1
    a, b = ({k: np.eye(num)[x] for k, x in y.items()} for y in (a, b))
    metric = cook.METRICS[metric_name]
  if is_mean:
    return statistics.compare(b, a, labels, metric=metric)
  (name,) = names
  return statistics.compare(b[name], a[name], labels[name], metric=metric)


def _answers(repeat: _Repeat, row: str, names) -> tuple[Json, Json]:
  """Answers of a row, `[N]`, and labels, by data set."""
  if 'splits' in repeat.content:
    raise _UnknownError('one seed, and A and B do not have the same splits')
  path = repeat.path.parent / 'answers.npz'
  if not path.is_file():
    raise _UnknownError(
        f'one seed, and there is no {path}: delete {repeat.path} and run the '
        'command of the experiment again, which trains nothing again'
    )
  rows = [i for i, x in enumerate(repeat.rows) if x.name == row]
  singles = [i for i, x in enumerate(repeat.rows) if x.kind == 'single']
  rows = rows or singles
  if row == 'best single':
    rows = [i for i in rows if i == report.best_single(repeat.rows)]
  try:
    with np.load(path) as stored:
      answers = {name: stored[f'answers/{name}'][rows] for name in names}
      labels = {name: stored[f'label/{name}'] for name in names}
  except _UNREADABLE as e:
    raise ValueError(
        f'{path} does not belong to {repeat.path.name}: {e}. Delete both, and '
        'run the command of the experiment again, which trains nothing again.'
    ) from e
  mean = lambda x: x[0] if len(x) == 1 else x.mean(0)
  return {name: mean(x) for name, x in answers.items()}, labels


def _number_of(gain: Comparison) -> str:
  if gain.num_repeats > 1:
    return f'{gain.num_repeats} repeats'
  return f'{gain.num:,} examples'
