"""Rows of scores: their gains, their summary, their means over repetitions."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
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
# What gains are of, and the score of it.
_SCORES = {'held_out': 'held_out', 'test': 'test', 'shifts': 'mean_shift'}


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
  for first, *others in zip(*tables):
    rows = [first, *others]
    shifts = {name: [row.shifts[name] for row in rows] for name in first.shifts}
    mean = _aggregate(rows, shifts, np.mean)
    if others and first.kind != 'single':
      gains = _crossed(first.name, answers) or _over_tables(rows, bests)
      # With the examples of one repetition.
      num = {key: gain.num for key, gain in first.gains.items()}
      gains = {k: x._replace(num=num.get(k, 0)) for k, x in gains.items()}
      mean = mean._replace(gains=gains)
    means.append(mean)
    # The deviation of the mean of the shifts is what the column shows.
    shifts = {'mean': [row.mean_shift for row in rows]}
    deviations.append(_aggregate(rows, shifts, _deviation))
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
  of = lambda rows, field: np.array([getattr(row, field) for row in rows])
  gains = {
      key: of(rows, field) - of(bests, field)
      for key, field in _SCORES.items()
      if key != 'shifts' or rows[0].shifts
  }
  gains['optimism'] = gains['held_out'] - gains['test']
  return {key: statistics.over_repeats(x) for key, x in gains.items()}


def _aggregate(rows, shifts, fn) -> Row:
  """What a function makes of each column, and of `shifts` by name."""
  columns = {
      field: [getattr(row, field) for row in rows]
      for field in ('held_out', 'test', 'nll', 'ece', 'cost')
  }
  return rows[0]._replace(
      **{field: float(fn(x)) for field, x in columns.items()},
      shifts={name: float(fn(x)) for name, x in shifts.items()},
  )


def _deviation(x: Sequence[float]) -> float:
  return float(np.std(x, ddof=1)) if len(x) > 1 else float('nan')
