"""What searches have seen: every candidate in a score log, and which are best.

```
report.not_dominated([[0.9, 0.5], [0.8, 0.6], [0.8, 0.4]])
files = report.write_report('scores.jsonl')
```
"""

from collections.abc import Mapping
from collections.abc import Sequence
import functools
import itertools
import pathlib
from typing import TYPE_CHECKING

import numpy as np

from jaxsoup import _json
from jaxsoup import checkpoints
from jaxsoup._soup import AtMost
from jaxsoup.report import _plots
from jaxsoup.report._page import Part
from jaxsoup.report._page import Picture
from jaxsoup.report._page import Section
from jaxsoup.report._page import Strong
from jaxsoup.report._page import Table
from jaxsoup.typing import ArrayLike
from jaxsoup.typing import Candidate

if TYPE_CHECKING:
  from matplotlib.axes import Axes

# All that a line of a score log may have.
_KEYS = {
    'members', 'alpha', 'score', 'at_most', 'ingredients', 'evaluation',
    'checksum',
}  # fmt: skip
_MOST_METRICS = 4  # In pictures, of each pair.
_MOST_SHARES = 6


def not_dominated(scores: ArrayLike) -> np.ndarray:
  """Which candidates are in the Pareto front, `[N]` bool.

  A candidate is dominated if another one is as good in all scores, and better
  in one.

  Args:
    scores: higher is better, `[N, M]`.

  Returns:
    `[N]` bool.

  Example:
    >>> not_dominated([[0.9, 0.5], [0.8, 0.6], [0.8, 0.4]])
    array([ True,  True, False])
  """
  scores = np.asarray(scores)
  is_kept = [
      not ((scores >= own).all(1) & (scores > own).any(1)).any()
      for own in scores
  ]
  return np.array(is_kept, bool)


def pareto(ax: 'Axes', scores: Mapping[str, Sequence[float]]) -> None:
  """Two scores of every candidate, and those that are not dominated in them.

  Args:
    ax: a matplotlib Axes.
    scores: two names, of x and y, with a number of each candidate, `[N]`.
  """
  points = np.stack([np.asarray(x, float) for x in scores.values()], 1)
  front = not_dominated(points)
  x, y = points.T
  ax.scatter(
      x[~front], y[~front], s=22, color=_plots.GREY, linewidths=0, alpha=0.75,
      label='dominated',
  )  # fmt: skip
  order = np.flatnonzero(front)[np.argsort(x[front])]
  colour = _plots.COLOURS[0]
  ax.step(x[order], y[order], where='pre', color=colour, linewidth=1)
  ax.scatter(
      x[front], y[front], s=36, color=colour, zorder=3, label='not dominated'
  )
  _plots.tidy(ax, *scores)
  _plots.legend(ax)


def is_score_log(path: pathlib.Path) -> bool:
  """Whether a file is a `ScoreLog`, and no table of scores."""
  if path.suffix != '.jsonl' or not path.is_file():
    return False
  with path.open('rb') as file:
    try:
      row = _json.parsed(file.readline())
    except ValueError:
      return False
  return isinstance(row, dict) and bool(row) and row.keys() <= _KEYS


def log_sections(
    path: pathlib.Path, metrics: Sequence[str] | None = None
) -> list[Section]:
  """All candidates of a score log; those that are not dominated first."""
  log = checkpoints.ScoreLog(path)
  exact = {k: x for k, x in log.items() if not isinstance(x, AtMost)}
  rows = {
      candidate: x if isinstance(x, Mapping) else {'score': x}
      for candidate, x in exact.items()
  }
  known = list(dict.fromkeys(name for row in rows.values() for name in row))
  names = known if metrics is None else list(metrics)
  if unknown := [name for name in names if name not in known]:
    raise ValueError(
        f'{path} has no scores {unknown[0]!r}, it has: {", ".join(known)}.'
    )
  rows = {k: x for k, x in rows.items() if x.keys() >= set(names)}
  table = np.array([[row[n] for n in names] for row in rows.values()])
  if not table.size:
    raise ValueError(f'{path} holds no exact scores yet.')
  # What is the same for all, such as a number of examples, is no choice.
  used = [i for i in range(len(names)) if np.ptp(table[:, i])] or [0]
  front = not_dominated(table[:, used])
  num_bounds = len(log) - len(exact)
  text = (
      f'{len(rows)} candidates, of which {front.sum()} are not dominated: no '
      'other is as good in all scores, and better in one.'
  )
  if num_bounds:
    text += f' {num_bounds} more were rejected early, and have no exact score.'
  best = table.max(0)
  cell = lambda x, best: (Strong if x == best else str)(f'{x:.5g}')
  lines = [[_name(k), *map(cell, row, best)] for k, row in zip(rows, table)]
  header = ['candidate', *names]
  parts: list[Part] = [
      text,
      *_pictures([names[i] for i in used], table[:, used]),
      Table(header, [x for x, f in zip(lines, front) if f], 'Not dominated'),
      Table(header, lines, 'All', is_folded=True, has_models=True),
  ]
  records = [
      {'candidate': _name(k), 'not_dominated': bool(f), **dict(zip(names, row))}
      for k, f, row in zip(rows, front, table.tolist())
  ]
  return [Section('Candidates', parts, {'candidates': records})]


def _pictures(names: Sequence[str], table: np.ndarray) -> list[Part]:
  """Each pair of scores; of one score, in the order of the log."""
  columns = dict(zip(names, table.T))
  if len(names) == 1:
    columns = {'number in the log': np.arange(len(table)) + 1, **columns}
    names = list(columns)
  parts: list[Part] = []
  for i, (x, y) in enumerate(itertools.combinations(names[:_MOST_METRICS], 2)):
    pair = {x: columns[x].tolist(), y: columns[y].tolist()}
    points = [(k, *xy) for k, xy in enumerate(zip(*pair.values()))]
    alt = f'{y} against {x} of {len(table)} candidates.'
    draw = functools.partial(pareto, scores=pair)
    if x == 'number in the log':
      draw = functools.partial(_in_order, scores=pair[y], label=y)
    parts.append(Picture(f'pareto_{i}', draw, alt, alt, points=points))
  return parts


def _in_order(ax: 'Axes', scores: Sequence[float], label: str) -> None:
  numbers = np.arange(len(scores)) + 1
  ax.scatter(numbers, scores, s=22, color=_plots.GREY, linewidths=0)
  ax.step(numbers, np.maximum.accumulate(scores), where='post')
  _plots.tidy(ax, 'number in the log', label)


def _name(candidate: Candidate) -> str:
  """Its members, or its largest coefficients: `0: 0.71, 3: 0.29`."""
  if not isinstance(candidate[0], tuple):
    return ' + '.join(map(str, candidate))
  rows = [row for _, row in candidate]
  alpha = np.mean(rows, axis=0)
  order = [k for k in np.argsort(-np.abs(alpha)) if alpha[k]]
  shown = ', '.join(f'{k}: {alpha[k]:.3f}' for k in order[:_MOST_SHARES])
  groups = f' (mean of {len(rows)} groups)' if len(rows) > 1 else ''
  return f'{shown}{", …" if len(order) > _MOST_SHARES else ""}{groups}'
