"""Rows of scores, and tables of them."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import json
import pathlib
from typing import Any
from typing import NamedTuple

import numpy as np


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
  """

  name: str
  kind: str
  held_out: float
  test: float
  shifts: Mapping[str, float]
  nll: float
  ece: float
  cost: float

  @property
  def mean_shift(self) -> float:
    """The mean over the shifted test sets."""
    return float(np.mean(list(self.shifts.values())))


class _Column(NamedTuple):
  header: str
  value: Callable[[Row], float]
  scale: float
  digits: int
  best: Callable | None


_COLUMNS = (
    _Column('held-out', lambda row: row.held_out, 100, 1, max),
    _Column('test', lambda row: row.test, 100, 1, max),
    _Column('mean of shifts', lambda row: row.mean_shift, 100, 1, max),
    _Column('NLL', lambda row: row.nll, 1, 3, min),
    _Column('ECE', lambda row: row.ece, 100, 1, min),
    _Column('cost at inference', lambda row: row.cost, 1, 0, None),
)


def read_rows(path: Any) -> list[Row]:
  """Reads the rows of `results.json`, or of any JSON list of such rows."""
  content = json.loads(pathlib.Path(path).read_text())
  rows = content['rows'] if isinstance(content, dict) else content
  return [Row(**row) for row in rows]


def summary(rows: Sequence[Row]) -> list[Row]:
  """The table of the paper: best single, mean of singles, soups, ensembles.

  Args:
    rows: a row a model; the best single is that with the highest held-out
      score, which is the one that a user without soups would keep.

  Returns:
    Rows, with those of the single models replaced by the first two.
  """
  singles = [row for row in rows if row.kind == 'single']
  others = [row for row in rows if row.kind != 'single']
  if not singles:
    return others
  best = max(singles, key=lambda row: row.held_out)
  mean = mean_rows([[single] for single in singles])[0][0]
  return [
      best._replace(name='best single'),
      mean._replace(name='mean of singles'),
      *others,
  ]


def mean_rows(tables: Sequence[Sequence[Row]]) -> tuple[list[Row], list[Row]]:
  """Means and standard deviations over tables of equal rows.

  Args:
    tables: one table a repetition; names are those of the first.

  Returns:
    (means, deviations): tables of the same rows; the deviation is that of a
    sample (n - 1), and NaN of a single table.
  """
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
    means.append(_aggregate(rows[0], columns, shifts, np.mean))
    deviations.append(
        _aggregate(rows[0], columns, {'mean': per_table}, _deviation)
    )
  return means, deviations


def _aggregate(row, columns, shifts, fn):
  return row._replace(
      **{field: float(fn(x)) for field, x in columns.items()},
      shifts={name: float(fn(x)) for name, x in shifts.items()},
  )


def _deviation(x: np.ndarray) -> float:
  return float(np.std(x, ddof=1)) if len(x) > 1 else float('nan')


def markdown(
    rows: Sequence[Row], deviations: Sequence[Row] | None = None
) -> str:
  """A table in Markdown, the best of each column in bold.

  Args:
    rows: such as those of `summary`.
    deviations: rows of standard deviations, printed behind a plus-minus sign.

  Returns:
    Lines, without a final newline.
  """
  lines = [
      '| | ' + ' | '.join(column.header for column in _COLUMNS) + ' |',
      '|---|' + '---:|' * len(_COLUMNS),
  ]
  for name, cells in _cells(rows, deviations, bold='**{}**'):
    lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def rich_table(
    rows: Sequence[Row], deviations: Sequence[Row] | None = None
) -> Any:
  """A table for the terminal, the best of each column in bold.

  Args:
    rows: such as those of `summary`.
    deviations: as in `markdown`.

  Returns:
    A `rich.table.Table`.
  """
  from rich import box
  from rich import table as rich_table_lib

  table = rich_table_lib.Table(box=box.SIMPLE_HEAD, pad_edge=False)
  table.add_column('', no_wrap=True)
  for column in _COLUMNS:
    header = ' of\n'.join(column.header.split(' of '))
    header = ' at\n'.join(header.split(' at '))
    table.add_column(header, justify='right', no_wrap=True)
  for name, cells in _cells(rows, deviations, bold='[bold]{}[/bold]'):
    table.add_row(name, *cells)
  return table


def _cells(rows, deviations, bold):
  best = [
      column.best(map(column.value, rows)) if column.best else None
      for column in _COLUMNS
  ]
  for i, row in enumerate(rows):
    cells = []
    for column, top in zip(_COLUMNS, best):
      value = column.value(row)
      text = _text(column, value)
      if top is not None and text == _text(column, top):
        text = bold.format(text)
      if deviations is not None and column.best:
        text += f' ± {_text(column, column.value(deviations[i]))}'
      cells.append('x' + text if column.best is None else text)
    yield row.name, cells


def _text(column: _Column, value: float) -> str:
  return f'{value * column.scale:.{column.digits}f}'
