"""Tables of rows, as they are printed."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import shutil
from typing import Any
from typing import NamedTuple

import numpy as np

from jaxsoup.report._rows import Row
from jaxsoup.statistics import Comparison


class _Column(NamedTuple):
  header: str
  field: str  # Of `Row`.
  scale: float
  digits: int
  gain: str = ''  # The key in `Row.gains`, where a table shows them.


_COLUMNS = (
    _Column('held-out', 'held_out', 100, 1),
    _Column('test', 'test', 100, 1, 'test'),
    _Column('mean of shifts', 'mean_shift', 100, 1, 'shifts'),
    _Column('NLL', 'nll', 1, 3),
    _Column('ECE', 'ece', 100, 1),
    _Column('cost at inference', 'cost', 1, 0),
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
    gains = (_gain(row.gains[name], '**{}**'.format) for name in names)
    lines.append((row.name, *gains))
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def cells(
    rows: Sequence[Row],
    deviations: Sequence[Row] | None,
    *,
    bold: Callable[[str], str],
) -> tuple[list[str], list[list[str]]]:
  """Headers and cells of a table; `bold` gets the significant gains."""
  columns, lines = _grid(rows, deviations)
  headers, body = [''], []
  for column in columns:
    headers += [column.header, 'gain'] if column.gain else [column.header]
  for row, line in zip(rows, lines):
    body.append([row.name])
    for column, (score, gain) in zip(columns, line):
      body[-1] += [score, _gain(gain, bold)] if column.gain else [score]
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
  from rich import box
  from rich import console
  from rich import table as rich_table_lib
  from rich import text

  width = shutil.get_terminal_size().columns if width is None else width
  caption = '\n'.join(legend(rows, sets, bold='[bold]bold[/bold]'))
  columns, lines = _grid(rows, deviations)
  for before_deviation, before_interval in (
      (' ', ' '),
      ('\n', ' '),
      ('\n', '\n'),
  ):
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
      header = header.replace(' of ', ' of\n')
      table.add_column(header, justify='right', no_wrap=True)
    for row, line in zip(rows, lines):
      cells = [text.Text(row.name)]
      for score, gain in line:
        cells.append(text.Text(score.replace(' ± ', f'{before_deviation}±')))
        if gain:
          shown = with_interval(gain).replace(' ', before_interval)
          style = 'bold' if _is_bold(gain) else ''
          cells[-1].append('\n').append(shown, style)
      table.add_row(*cells)
    if console.Console(width=10_000).measure(table).maximum <= width:
      break
  return table


def _grid(rows: Sequence[Row], deviations):
  """The columns that have values, and by row the score and the gain of each."""
  known = {key for row in rows for key in row.gains}
  columns = [
      column if column.gain in known else column._replace(gain='')
      for column in _COLUMNS
      if not np.isnan([getattr(row, column.field) for row in rows]).all()
  ]
  lines = [
      [(_score(x, row, deviation), row.gains.get(x.gain)) for x in columns]
      for row, deviation in zip(rows, deviations or [None] * len(rows))
  ]
  return columns, lines


def _score(column: _Column, row: Row, deviation: Row | None) -> str:
  value = lambda row: getattr(row, column.field) * column.scale
  text = f'{value(row):.{column.digits}f}'
  if column.field == 'cost':
    return f'x{text}'
  if deviation is None:
    return text
  return f'{text} ± {value(deviation):.{column.digits}f}'


def _is_bold(gain: Comparison) -> bool:
  return gain.is_significant and gain.gain > 0


def _gain(gain: Comparison | None, bold: Callable[[str], str]) -> str:
  text = with_interval(gain)
  return bold(text) if gain and _is_bold(gain) else text


def with_interval(gain: Comparison | None) -> str:
  """A gain and its interval, in per cent."""
  if gain is None:
    return ''
  # No minus before a zero.
  points, low, high = (round(100 * x, 1) + 0.0 for x in gain[:3])
  interval = f' [{low:.1f},{high:.1f}]' if np.isfinite(low) else ''
  return f'{points:+.1f}{interval}'


def legend(
    rows: Sequence[Row],
    sets: Mapping[str, Mapping[str, int]] | None,
    *,
    bold: str,
) -> list[str]:
  """What the numbers are, their examples, and the selection optimism."""
  compared = [row for row in rows if row.gains]
  lines = [_what(compared[0], bold)] if compared else []
  if sets is None:
    sets = _sets_of(compared[0]) if compared else {}
  roles = []
  for role, used in sets.items():
    names = (f'{name} ({num:,})' for name, num in used.items())
    roles.append(f'{role} on {", ".join(names)}')
  if roles:
    lines.append(f'Examples: {"; ".join(roles)}.')
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
  roles = {
      'selected': {'held-out': 'held_out'},
      'reported': {'test': 'test', shifts: 'shifts'},
  }
  sets = {
      role: {name: sizes[key] for name, key in used.items() if key in sizes}
      for role, used in roles.items()
  }
  return {role: used for role, used in sets.items() if used}
