"""Rows of scores, and tables of them."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import itertools
import shutil
from typing import Any
from typing import NamedTuple

import numpy as np

from jaxsoup import _json
from jaxsoup import metrics
from jaxsoup import statistics
from jaxsoup.runtime import buckets
from jaxsoup.statistics import Comparison
from jaxsoup.typing import Array
from jaxsoup.typing import ArrayLike
from jaxsoup.typing import Config
from jaxsoup.typing import MetricFn
from jaxsoup.typing import PathLike

# The name that `summary` gives to the best single model on held-out data.
_BEST = 'best single'


class Row(NamedTuple):
  """The scores of one model, or of one way to combine models.

  Attributes:
    name: what the table calls it.
    kind: 'single', 'soup' or 'ensemble'.
    held_out: score on the data that chose, in 0..1.
    test: score on test data, in 0..1.
    shifts: score on each shifted test set, in 0..1, by name.
    nll: negative log-likelihood on test data, in nats.
    ece: expected calibration error on test data, in 0..1.
    cost: forward passes for one prediction.
    gains: over the best single model, see `with_gains`: of 'held_out', 'test',
      the mean of the 'shifts', 'optimism'; of `mean_rows` also of each shift.
    metric: what the scores are.
  """

  name: str
  kind: str
  held_out: float
  test: float
  shifts: Mapping[str, float]
  nll: float
  ece: float
  cost: float
  gains: Mapping[str, Comparison] = {}
  metric: str = 'accuracy'

  @property
  def mean_shift(self) -> float:
    """The mean over the shifted test sets; NaN where there are none."""
    return float(np.mean(list(self.shifts.values()) or [np.nan]))


class Answers(NamedTuple):
  """What the models of a table answer, example by example.

  Attributes:
    rows: by the names that rows have in `summary`, then by data set
      ('held_out', 'test' and the shifts): whether each example is right, `[N]`,
      or what `metric` takes.
    label: `[N]` by data set.
    ids: which examples these are, `[N]` by data set, see `statistics.ids_of`.
    metric: as in `statistics.crossed`.
  """

  rows: Mapping[str, Mapping[str, ArrayLike]]
  label: Mapping[str, ArrayLike]
  ids: Mapping[str, ArrayLike]
  metric: MetricFn | None = None


class _Column(NamedTuple):
  header: str
  value: Callable[[Row], float]
  scale: float
  digits: int
  gain: str = ''  # The key in `Row.gains`, where a table shows them.


_COLUMNS = (
    _Column('held-out', lambda row: row.held_out, 100, 1),
    _Column('test', lambda row: row.test, 100, 1, 'test'),
    _Column('mean of shifts', lambda row: row.mean_shift, 100, 1, 'shifts'),
    _Column('NLL', lambda row: row.nll, 1, 3),
    _Column('ECE', lambda row: row.ece, 100, 1),
    _Column('cost at inference', lambda row: row.cost, 1, 0),
)
_SCORES = {
    'held_out': _COLUMNS[0].value,
    'test': _COLUMNS[1].value,
    'shifts': _COLUMNS[2].value,
}


def read_rows(path: PathLike) -> list[Row]:
  """Reads the rows of `results.json`, or of any JSON list of such rows."""
  content = _json.read(buckets.path_of(path))
  return rows_of(content['rows'] if isinstance(content, dict) else content)


def rows_of(rows: Sequence[Config]) -> list[Row]:
  """Rows from what JSON keeps of them."""
  return [
      Row(**row)._replace(
          gains={k: Comparison(*x) for k, x in row.get('gains', {}).items()}
      )
      for row in rows
  ]


def with_gains(
    rows: Sequence[Row],
    logits: Sequence[Mapping[str, Array]],
    label: Mapping[str, Array],
    *,
    metric: MetricFn | None = metrics.correct,
    num_resamples: int = 5000,
) -> list[Row]:
  """Rows with their gains over the best single model, and intervals of those.

  Args:
    rows: a row a model; the best single is that of `summary`.
    logits: of each row, `[N, C]` by data set: 'held_out', 'test' and the
      shifts. Those that are missing are not compared.
    label: `[N]` by data set.
    metric: that of the rows, as in `statistics.compare`. None: `logits` are a
      score for each example, `[N]`, as `metrics.correct` returns, which needs
      less memory.
    num_resamples: as in `statistics.compare`.

  Returns:
    The rows; those of soups and ensembles with `gains`.

  Raises:
    ValueError: rows and logits of different lengths; held-out data that also
      report; as `statistics.compare`.
  """
  if len(rows) != len(logits):
    raise ValueError(
        f'There are {len(rows)} rows, and logits of {len(logits)}: expected a '
        'mapping of logits for each row, in the same order.'
    )
  best = best_single(rows)
  if best is None:
    return list(rows)
  refuse_twice(logits[best])

  def gains_of(first: Mapping[str, Array]) -> dict[str, Comparison]:
    second = logits[best]
    compare = lambda a, b, y: statistics.compare(
        a, b, y, metric=metric, num_resamples=num_resamples
    )
    gains = {
        name: compare(first[name], second[name], label[name])
        for name in ('held_out', 'test')
        if name in first
    }
    part = lambda x: {n: x[n] for n in first if n not in ('held_out', 'test')}
    if part(first):
      gains['shifts'] = compare(part(first), part(second), part(label))
    if 'held_out' in gains and 'test' in gains:
      gains['optimism'] = statistics.optimism(gains['held_out'], gains['test'])
    return gains

  return [
      row if row.kind == 'single' else row._replace(gains=gains_of(x))
      for row, x in zip(rows, logits)
  ]


def refuse_twice(logits: Mapping[str, Array]) -> None:
  """Raises if a model has the same logits on held-out and on other data.

  Args:
    logits: `[N, C]` by data set, of which two at a time are asked for.

  Raises:
    ValueError: the held-out set also reports; names the other set.
  """
  held_out = logits.get('held_out', ())
  for name, x in logits.items():
    # Answers that are right or wrong may agree by chance; logits do not.
    if name != 'held_out' and np.ndim(x) > 1 and np.array_equal(x, held_out):
      raise ValueError(
          f'held_out and {name} are the same data set: a model has the same '
          'logits on both. Data that choose a model cannot also report its '
          'score: see statistics.split.'
      )


def singles(rows: Sequence[Row]) -> list[Row]:
  return [row for row in rows if row.kind == 'single']


def best_single(rows: Sequence[Row]) -> int | None:
  """The index of the best single model on held-out data, if there is one."""
  single = [i for i, row in enumerate(rows) if row.kind == 'single']
  return max(single, key=lambda i: rows[i].held_out, default=None)


def summary(rows: Sequence[Row]) -> list[Row]:
  """The table of the paper: best single, mean of singles, soups, ensembles.

  Args:
    rows: a row a model; the best single is that with the highest held-out
      score, which is the one that a user without soups would keep.

  Returns:
    Rows, with those of the single models replaced by the first two.
  """
  others = [row for row in rows if row.kind != 'single']
  best = best_single(rows)
  if best is None:
    return others
  mean = mean_rows([[single] for single in singles(rows)])[0][0]
  return [
      rows[best]._replace(name=_BEST),
      mean._replace(name='mean of singles'),
      *others,
  ]


def mean_rows(
    tables: Sequence[Sequence[Row]],
    answers: Sequence[Sequence[Answers]] = (),
) -> tuple[list[Row], list[Row]]:
  """Means and standard deviations over tables of equal rows.

  Args:
    tables: one table a repetition, such as those of `summary`; names are those
      of the first.
    answers: of each table, those of each of its splits; one, where the held-out
      set was drawn once. Without them the tables are taken to have no examples
      in common.

  Returns:
    (means, deviations): tables of the same rows; the deviation is that of a
    sample (n - 1), and NaN of a single table. The gains of the means are those
    of `statistics.crossed`, without answers of `statistics.over_repeats`, over
    the best single model of each repetition.
  """
  names = [row.name for row in tables[0]] if tables else []
  bests = [rows[names.index(_BEST)] for rows in tables if _BEST in names]
  means, deviations = [], []
  for rows in zip(*tables):
    columns = {
        field: np.array([getattr(row, field) for row in rows])
        for field in ('held_out', 'test', 'nll', 'ece', 'cost')
    }
    shifts = {
        name: np.array([row.shifts[name] for row in rows])
        for name in rows[0].shifts
    }
    # The deviation of the mean of the shifts is what the column shows.
    per_table = np.array([row.mean_shift for row in rows])
    mean = _aggregate(rows[0], columns, shifts, np.mean)
    if len(rows) > 1 and rows[0].kind != 'single':
      gains = _crossed(rows[0].name, answers) or _over_tables(rows, bests)
      mean = mean._replace(gains=_with_sizes(gains, rows[0]))
    means.append(mean)
    deviations.append(
        _aggregate(rows[0], columns, {'mean': per_table}, _deviation)
    )
  return means, deviations


def by_set(
    splits: Sequence[Answers],
    read_fn: Callable[[Answers], Mapping[str, ArrayLike]],
    sets: Sequence[str],
) -> dict[str, ArrayLike]:
  """What a function reads of the sets, each of which counts in each split."""
  return {
      f'{i}/{name}': read_fn(x)[name]
      for i, x in enumerate(splits)
      for name in sets
  }


def _crossed(
    name: str, answers: Sequence[Sequence[Answers]]
) -> dict[str, Comparison]:
  """Gains of a row over the best single model, by their answers."""
  if not answers:
    return {}
  sets = [name for name in answers[0][0].ids if name not in _SCORES]
  roles = {'held_out': ['held_out'], 'test': ['test'], 'shifts': sets}
  roles |= {name: [name] for name in sets}

  def gain(a, b, sets):
    part = lambda fn: [by_set(splits, fn, sets) for splits in answers]
    ids, label = part(lambda x: x.ids), part(lambda x: x.label)
    metric = answers[0][0].metric
    return statistics.crossed(metric, part(a), part(b), ids, label=label)

  mine = lambda x: x.rows[name]
  best = lambda x: x.rows[_BEST]
  gains = {key: gain(mine, best, x) for key, x in roles.items() if x}
  # Half of the held-out gain minus the test gain: on test data models change
  # places.
  swapped = lambda one, other: lambda x: {
      'held_out': one(x)['held_out'], 'test': other(x)['test']
  }  # fmt: skip
  half = gain(swapped(mine, best), swapped(best, mine), ['held_out', 'test'])
  doubled = {key: 2 * getattr(half, key) for key in ('gain', 'low', 'high')}
  return gains | {'optimism': half._replace(**doubled)}


def _over_tables(
    rows: Sequence[Row], bests: Sequence[Row]
) -> dict[str, Comparison]:
  """Gains over repetitions, each over its own best single model."""
  if not bests:
    return {}
  by_table = {
      key: [score(row) - score(best) for row, best in zip(rows, bests)]
      for key, score in _SCORES.items()
      if key != 'shifts' or rows[0].shifts
  }
  optimism = np.subtract(by_table['held_out'], by_table['test'])
  return {
      key: statistics.over_repeats(x)
      for key, x in {**by_table, 'optimism': optimism.tolist()}.items()
  }


def _with_sizes(gains, row: Row) -> dict[str, Comparison]:
  """The gains with the examples of one repetition."""
  num = {key: gain.num for key, gain in row.gains.items()}
  return {key: x._replace(num=num.get(key, 0)) for key, x in gains.items()}


def _aggregate(row, columns, shifts, fn):
  return row._replace(
      **{field: float(fn(x)) for field, x in columns.items()},
      shifts={name: float(fn(x)) for name, x in shifts.items()},
  )


def _deviation(x: np.ndarray) -> float:
  return float(np.std(x, ddof=1)) if len(x) > 1 else float('nan')


def markdown(
    rows: Sequence[Row],
    deviations: Sequence[Row] | None = None,
    *,
    sets: Mapping[str, Mapping[str, int]] | None = None,
) -> str:
  """A table in Markdown; significant gains are bold, and a legend says so.

  Args:
    rows: such as those of `summary`. Where they have `gains`, these are shown
      behind the scores that they are about.
    deviations: rows of standard deviations, printed behind a plus-minus sign.
    sets: how many examples each role used, such as `{'selected':
      {'held-out': 400}, 'tuned': {'held-out': 400}, 'reported': {'test':
      897}}`; by default what the gains know.

  Returns:
    Lines, without a final newline.
  """
  headers, body = cells(rows, deviations, bold='**{}**'.format)
  lines = [
      '| ' + ' | '.join(headers) + ' |',
      '|---|' + '---:|' * (len(headers) - 1),
  ]
  lines += [f'| {" | ".join(line)} |' for line in body]
  return '\n'.join(
      [*lines, *(f'\n{x}' for x in legend(rows, sets, bold='**bold**'))]
  )


def gains_by_shift(rows: Sequence[Row]) -> str:
  """A table in Markdown of the gains on each shift, of `mean_rows`.

  Args:
    rows: means over repetitions with answers.

  Returns:
    Lines, without a final newline; none, if no gains on shifts are known.
  """
  shown = [row for row in rows if row.gains.keys() & row.shifts.keys()]
  if not shown:
    return ''
  names = list(shown[0].shifts)
  lines = [('gain on', *names), ('---', *['---:'] * len(names))]
  for row in shown:
    gains = [row.gains[name] for name in names]
    texts = (
        f'**{with_interval(x)}**' if _is_bold(x) else with_interval(x)
        for x in gains
    )
    lines.append((row.name, *texts))
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def cells(
    rows: Sequence[Row],
    deviations: Sequence[Row] | None,
    *,
    bold: Callable[[str], str],
) -> tuple[list[str], list[list[str]]]:
  """Headers and cells of a table; `bold` gets the significant gains."""
  columns = _shown(rows)
  headers = ['']
  for column in columns:
    headers += [column.header, 'gain'] if column.gain else [column.header]
  body = []
  for row, deviation in _with(rows, deviations):
    line = [row.name]
    for column in columns:
      line.append(_score(column, row, deviation))
      if column.gain:
        gain = row.gains.get(column.gain)
        text = with_interval(gain)
        line.append(bold(text) if gain and _is_bold(gain) else text)
    body.append(line)
  return headers, body


def rich_table(
    rows: Sequence[Row],
    deviations: Sequence[Row] | None = None,
    *,
    sets: Mapping[str, Mapping[str, int]] | None = None,
    width: int | None = None,
) -> Any:
  """A table for the terminal: what `markdown` says, gains below the scores.

  Args:
    rows: such as those of `summary`.
    deviations: as in `markdown`.
    sets: as in `markdown`.
    width: columns to stay within, by default those of the terminal. 80 are
      enough: where there are fewer than a line needs, cells have more lines.

  Returns:
    A `rich.table.Table`.
  """
  from rich import console

  width = shutil.get_terminal_size().columns if width is None else width
  caption = '\n'.join(legend(rows, sets, bold='[bold]bold[/bold]'))
  pairs = list(_with(rows, deviations))
  for breaks in ((' ', ' '), ('\n', ' '), ('\n', '\n')):
    table = _rich_table(pairs, _shown(rows), caption, breaks)
    if console.Console(width=10_000).measure(table).maximum <= width:
      break
  return table


def _rich_table(pairs, columns, caption, breaks) -> Any:
  from rich import box
  from rich import table as rich_table_lib
  from rich import text

  table = rich_table_lib.Table(
      box=box.SIMPLE_HEAD,
      show_edge=False,
      pad_edge=False,
      collapse_padding=True,
      caption=text.Text.from_markup(caption),
      caption_justify='left',
  )
  table.add_column('', no_wrap=True)
  for column in columns:
    header = column.header.removesuffix(' at inference')
    table.add_column(
        header.replace(' of ', ' of\n'), justify='right', no_wrap=True
    )
  for row, deviation in pairs:
    cells = (_rich_cell(column, row, deviation, *breaks) for column in columns)
    table.add_row(text.Text(row.name), *cells)
  return table


def _rich_cell(column, row, deviation, before_deviation, before_interval):
  from rich import text

  score = _score(column, row, deviation).replace(' ± ', f'{before_deviation}±')
  cell = text.Text(score)
  if column.gain in row.gains:
    gain = row.gains[column.gain]
    shown = with_interval(gain).replace(' ', before_interval)
    cell.append('\n').append(shown, 'bold' if _is_bold(gain) else '')
  return cell


def _with(
    rows: Sequence[Row], deviations: Sequence[Row] | None
) -> Iterator[tuple[Row, Row | None]]:
  return zip(rows, itertools.repeat(None) if deviations is None else deviations)


def _shown(rows: Sequence[Row]) -> list[_Column]:
  """The columns that have values, and their gains."""
  known = {key for row in rows for key in row.gains}
  return [
      column if column.gain in known else column._replace(gain='')
      for column in _COLUMNS
      if not np.isnan([column.value(row) for row in rows]).all()
  ]


def _score(column: _Column, row: Row, deviation: Row | None) -> str:
  text = _text(column, column.value(row))
  if column.header == 'cost at inference':
    return f'x{text}'
  if deviation is None:
    return text
  return f'{text} ± {_text(column, column.value(deviation))}'


def _text(column: _Column, value: float) -> str:
  return f'{value * column.scale:.{column.digits}f}'


def _is_bold(gain: Comparison) -> bool:
  return gain.is_significant and gain.gain > 0


def with_interval(gain: Comparison | None) -> str:
  """A gain and its interval, in per cent."""
  if gain is None:
    return ''
  text = f'{_points(gain.gain):+.1f}'
  if np.isfinite(gain.low):
    text += f' [{_points(gain.low):.1f},{_points(gain.high):.1f}]'
  return text


def _points(value: float) -> float:
  return round(value * 100, 1) + 0.0  # No minus before a zero.


def legend(
    rows: Sequence[Row],
    sets: Mapping[str, Mapping[str, int]] | None,
    *,
    bold: str,
) -> list[str]:
  """What the numbers are, their examples, and the selection optimism."""
  compared = [row for row in rows if row.gains]
  lines = [_what(compared[0], bold)] if compared else []
  sets = _sets_of(compared[0]) if sets is None and compared else sets or {}
  if sets:
    lines.append(_on_what(sets))
  optimism = [
      f'{row.name} {with_interval(row.gains["optimism"])}'
      for row in compared
      if 'optimism' in row.gains
  ]
  if optimism:
    what = 'Selection optimism (held-out gain minus test gain)'
    lines.append(f'{what}: {", ".join(optimism)}.')
  return lines


def _what(row: Row, bold: str) -> str:
  names: dict[str, list[str]] = {}
  for name, key in (('test', 'test'), ('mean of shifts', 'shifts')):
    if key in row.gains:
      names.setdefault(_method(row.gains[key]), []).append(name)
  tests = '; '.join(f'{", ".join(x)}: {method}' for method, x in names.items())
  level = next(iter(row.gains.values())).level
  return (
      f'Scores: {row.metric}, in per cent. Gain: over the best single model,'
      f' with its {level:.0%} interval; {bold}: significantly better,'
      f' p < {1 - level:.2g} ({tests}), each row tested separately.'
  )


def _method(gain: Comparison) -> str:
  if gain.num_repeats == 1:
    return gain.method
  if np.isnan(gain.low):
    return f'no test, the same examples in all {gain.num_repeats} repeats'
  return f'{gain.method} over {gain.num_repeats} repeats'


def _sets_of(row: Row) -> dict[str, dict[str, int]]:
  """The data sets of each role, as far as the gains of a row know."""
  sizes = {key: gain.num for key, gain in row.gains.items() if gain.num}
  names = list(row.shifts)
  shifts = ', '.join(names) if len(names) <= 6 else f'{len(names)} shifts'
  sets: dict[str, dict[str, int]] = {}
  for role, name, key in (
      ('selected', 'held-out', 'held_out'),
      ('reported', 'test', 'test'),
      ('reported', shifts, 'shifts'),
  ):
    if key in sizes:
      sets.setdefault(role, {})[name] = sizes[key]
  return sets


def _on_what(sets: Mapping[str, Mapping[str, int]]) -> str:
  roles = []
  for role, used in sets.items():
    names = (f'{name} ({num:,})' for name, num in used.items())
    roles.append(f'{role} on {", ".join(names)}')
  return f'Examples: {"; ".join(roles)}.'
