"""Tables of rows, as they are printed."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import itertools
import shutil
from typing import Any
from typing import NamedTuple

import numpy as np

from jaxsoup.report._rows import Row
from jaxsoup.statistics import Comparison


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
