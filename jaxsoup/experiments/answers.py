"""What every model of an experiment answers, on the disk.

```
answers.write(folder, answers.Given(right, labels, ids))
report.mean_rows([report.summary(rows)], [[answers.read(folder, rows)]])
```
"""

from collections.abc import Mapping
from collections.abc import Sequence
import pathlib
from typing import NamedTuple
import zipfile
import zlib

import numpy as np

from jaxsoup import _json
from jaxsoup import report
from jaxsoup.experiments import cook
from jaxsoup.runtime import buckets
from jaxsoup.typing import Json

FILE = 'answers.npz'
# Of a damaged file of NumPy, and of one that is not that of the rows.
_UNREADABLE = (
    EOFError, LookupError, NotImplementedError, OSError, ValueError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


class Given(NamedTuple):
  """Answers of all rows of a table.

  Attributes:
    answers: by data set `[rows, N]`: whether each example is right; for metrics
      that are not a mean of examples the class, int32.
    label: `[N]` by data set.
    ids: the same of `statistics.ids_of`.
  """

  answers: Mapping[str, np.ndarray]
  label: Mapping[str, np.ndarray]
  ids: Mapping[str, np.ndarray]

  def of(self, rows: Sequence[report.Row]) -> report.Answers:
    """By the names of the rows, and of the first two of their summary."""
    given, metric = self.answers, None
    if (name := rows[0].metric) != 'accuracy':
      metric = cook.METRICS[name]
      known = (*given.values(), *self.label.values())
      classes = np.eye(1 + max(int(x.max()) for x in known), dtype=np.float32)
      given = {name: classes[x] for name, x in given.items()}
    at = lambda i: {name: x[i] for name, x in given.items()}
    of_rows = {row.name: at(i) for i, row in enumerate(rows)}
    singles = [i for i, row in enumerate(rows) if row.kind == 'single']
    if singles:
      of_rows['best single'] = at(report.best_single(rows))
    if singles and metric is None:
      mean = {name: x[singles].mean(0) for name, x in given.items()}
      of_rows['mean of singles'] = mean
    return report.Answers(of_rows, self.label, self.ids, metric)


def write(folder: pathlib.Path, given: Given) -> None:
  """Writes the answers of a split to its folder."""
  arrays = {
      f'{part}/{name}': x
      for part, by_set in given._asdict().items()
      for name, x in by_set.items()
  }
  with buckets.local_copy(folder / FILE) as file:
    np.savez_compressed(file, **arrays)


def read(folder: pathlib.Path, rows: Sequence[report.Row]) -> report.Answers:
  """The answers of the rows of a table, and of the first two of its summary.

  Args:
    folder: of the split.
    rows: its table.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, or not that of these rows.
  """
  path = folder / FILE
  advice = 'run the command of the experiment again, which trains nothing again'
  if not path.is_file():
    raise FileNotFoundError(f'{path} is missing: {advice}.')
  by_set: Json = {part: {} for part in Given._fields}
  try:
    with path.open('rb') as file, np.load(file) as stored:
      for key in stored:
        part, _, name = key.partition('/')
        by_set[part][name] = stored[key]
    given = Given(**by_set)
    lengths = {len(x) for x in given.answers.values()}
    if lengths != {len(rows)} or given.answers.keys() != given.ids.keys():
      raise ValueError(f'it has {lengths} rows, the table {len(rows)}')
    return given.of(rows)
  except _UNREADABLE as e:
    raise ValueError(
        f'{path} does not belong to the table next to it: {e}. Delete it, and '
        f'{advice}.'
    ) from e


def of_workdir(workdir: pathlib.Path) -> list[report.Answers]:
  """The answers of an experiment: one entry a split."""
  content = _json.read(workdir / 'results.json')
  return [read(folder, rows) for rows, folder in tables_of(content, workdir)]


def tables_of(
    content: Json, workdir: pathlib.Path
) -> list[tuple[list[report.Row], pathlib.Path]]:
  """Of each split in `results.json` its table, and where its answers are."""
  if 'splits' not in content:
    return [(report.rows_of(content['rows']), workdir)]
  return [
      (report.rows_of(rows), workdir / 'splits' / str(i))
      for i, rows in enumerate(content['splits'])
  ]
