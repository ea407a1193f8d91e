"""Scores that a user has in a file: one row a model.

```
rows, settings = report.read_scores('scores.csv')
```
"""

from collections.abc import Iterator
from collections.abc import Sequence
import csv
import difflib
import io
import math
import pathlib
import sys
from typing import Any

from jaxsoup import _json
from jaxsoup.report._rows import Row
from jaxsoup.typing import Config
from jaxsoup.typing import Json
from jaxsoup.typing import PathLike

_Pair = tuple[str, Any]
_MOST_LEVELS = 20
KINDS = ('single', 'soup', 'ensemble')
_NAMES = ('name', 'model_name', 'model')
_NOT_SETTINGS = {*_NAMES, 'kind', 'metric', 'nll', 'ece', 'cost'}


def read_scores(
    path: PathLike,
    *,
    held_out: str = 'held_out',
    test: str = 'test',
    shifts: Sequence[str] | None = None,
) -> tuple[list[Row], list[Json]]:
  """Reads a table of scores: JSON lines, a JSON list, or CSV.

  A row is a model. Its columns are data sets, with scores in 0..1, and
  hyper-parameters; `name`, `kind` ('single', the default, 'soup' or
  'ensemble'), `metric`, `nll`, `ece` and `cost` are those of a `Row`.
  Objects in JSON may be nested: `{"shifts": {"blur": 0.7}}` is the column
  'shifts.blur', which CSV may have, too.

  Args:
    path: of the file.
    held_out: the column of the data that chose.
    test: the column of the test data.
    shifts: columns of shifted test sets; by default those that begin with
      'shifts.'.

  Returns:
    (rows, settings): the hyper-parameters of each row by name, empty where it
    has none; a prefix 'config.' is taken off.

  Raises:
    FileNotFoundError: no such file.
    ValueError: an unreadable file, no such column, a score that is not a
      number in 0..1, or one column for data that choose and data that report.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(
        f'{path} does not exist. A report needs the workdir of an experiment, '
        'or a file of scores: .jsonl, .json or .csv.'
    )
  records = list(_records(path))
  if not records:
    raise ValueError(f'{path} has no rows: expected one for each model.')
  columns = list(dict.fromkeys(name for record in records for name in record))
  if shifts is None:
    shifts = [name for name in columns if name.startswith('shifts.')]
  used = [held_out, test, *shifts]
  for name in used:
    if name not in columns:
      near = difflib.get_close_matches(name, columns, 3, 0.4)
      guess = f' Did you mean {" or ".join(near)}?' if near else ''
      if name in ('held_out', 'test'):  # Those that are not given.
        guess += f' Name it with {name}= (--{name.replace("_", "-")}).'
      raise ValueError(
          f'{path} has no column {name!r}, it has: {", ".join(columns)}.{guess}'
      )
  if twice := sorted({name for name in used if used.count(name) > 1}):
    raise ValueError(
        f'{path}: column {twice[0]!r} is used for more than one of held-out, '
        'test and shifts. Data that choose a model cannot also report its '
        'score: give each its own column.'
    )
  rows = [
      _row(f'{path}, row {i}', record, i, held_out, test, shifts)
      for i, record in enumerate(records, 1)
  ]
  settings = [
      {
          name.removeprefix('config.'): value
          for name, value in record.items()
          if name not in (*used, *_NOT_SETTINGS)
          and not name.startswith('gains')
          and _is_there(record, name)
      }
      for record in records
  ]
  return rows, settings


def _row(where, record, number, held_out, test, shifts) -> Row:
  kind = record.get('kind') or 'single'
  if kind not in KINDS:
    raise ValueError(
        f'{where}: kind is {kind!r}: choose from {", ".join(KINDS)}.'
    )
  name = next((record[n] for n in _NAMES if _is_there(record, n)), None)
  scores = {k: _score(where, record, k) for k in (held_out, test, *shifts)}
  known = lambda k, default: (
      _number(where, record, k) if _is_there(record, k) else default
  )
  return Row(
      name=f'row {number}' if name is None else str(name),
      kind=kind,
      held_out=scores[held_out],
      test=scores[test],
      shifts={k.removeprefix('shifts.'): scores[k] for k in shifts},
      metric=record.get('metric') or 'accuracy',
      nll=known('nll', math.nan),
      ece=known('ece', math.nan),
      cost=known('cost', 1.0),
  )


def _is_there(record: Config, column: str) -> bool:
  value = record.get(column)
  return value not in ('', None) and value == value  # NaN is unlike itself.


def _score(where: str, record: Config, column: str) -> float:
  value = _number(where, record, column)
  if abs(value) > 1:
    raise ValueError(
        f'{where}: {column} is {value:g}, and scores are in 0..1: divide '
        'percentages by 100.'
    )
  return value


def _number(where: str, record: Config, column: str) -> float:
  value = record.get(column, '')
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if is_number and not math.isnan(value):
    return float(value)
  raise ValueError(
      f'{where}: {column} is {value!r}: expected a number. Leave out models '
      'that were not evaluated on all data sets.'
  )


def _records(path: pathlib.Path) -> Iterator[Json]:
  """Flat records: what is nested has a dotted name."""
  if path.suffix not in ('.csv', '.json', '.jsonl'):
    raise ValueError(
        f'{path}: expected a name that ends with .jsonl (JSON lines), .json '
        'or .csv.'
    )
  try:
    text = path.read_text(encoding='utf-8-sig')
  except UnicodeDecodeError as e:
    raise ValueError(f'{path} is not text in UTF-8: save it as that.') from e
  if path.suffix == '.csv':
    for record in _csv_records(path, text):
      if None in record or None in record.values():
        raise ValueError(
            f'{path}: a row has more or fewer cells than the header: {record}. '
            'Give each row one for each column, with commas between them.'
        )
      # A run that is called 00 is no zero.
      is_text = (*_NAMES, 'kind')
      yield {k: v if k in is_text else _value(v) for k, v in record.items()}
    return
  for where, record in _objects(path, text):
    if not isinstance(record, dict):
      raise ValueError(
          f'{where}: expected an object such as {{"name": "00", "held_out": '
          f'0.9, "test": 0.8}}, and got {str(record)[:60]!r}.'
      )
    pairs = list(_flat(where, record))
    _require_different(where, [name for name, _ in pairs])
    yield dict(pairs)


def _require_different(where: object, names: Sequence[str]) -> None:
  """The last of two columns with one name would win, without a word."""
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise ValueError(f'{where} has column {twice[0]!r} twice: rename one.')


def _csv_records(path: pathlib.Path, text: str) -> Iterator[Any]:
  try:
    reader = csv.DictReader(io.StringIO(text, newline=''))
    _require_different(path, reader.fieldnames or [])
    yield from reader
  except csv.Error as e:
    raise ValueError(f'{path} is not valid CSV: {e}.') from e


def _objects(path: pathlib.Path, text: str) -> Iterator[tuple[str, Any]]:
  if path.suffix == '.json':
    content = _parsed(str(path), text)
    rows = content.get('rows') if isinstance(content, dict) else content
    if not isinstance(rows, list):
      raise ValueError(
          f'{path}: expected a list of rows, or an object with "rows".'
      )
    yield from ((f'{path}, row {i}', row) for i, row in enumerate(rows, 1))
    return
  for number, line in enumerate(text.splitlines(), 1):
    if line.strip():
      yield f'{path}:{number}', _parsed(f'{path}:{number}', line)


def _parsed(where: str, text: str) -> Any:
  try:
    return _json.parsed(text, object_pairs_hook=_object)
  except ValueError as e:
    raise ValueError(f'{where} is not valid JSON: {e}.') from e


def _object(pairs: list[tuple[str, Any]]) -> Json:
  _require_different('it', [name for name, _ in pairs])
  return dict(pairs)


def _flat(where: str, record: Config, level: int = 1) -> Iterator[_Pair]:
  for key, value in record.items():
    if isinstance(value, dict):
      if level == _MOST_LEVELS:
        raise ValueError(f'{where} is nested too deeply: leave out {key!r}.')
      inside = _flat(where, value, level + 1)
      yield from ((f'{key}.{name}', x) for name, x in inside)
    elif isinstance(value, (int, float)) and abs(value) > sys.float_info.max:
      raise ValueError(f'{where}: {key} is too large: write it as text.')
    else:
      yield key, value


def _value(text: str) -> Any:
  """What a cell of CSV is: a number where it looks like one."""
  for kind in (int, float):
    try:
      if not math.isinf(number := kind(text)):
        return number
    except (OverflowError, ValueError):  # Of an integer that no float holds.
      pass
  return text.strip()
