"""Pictures that take an Axes."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import pathlib
from typing import TYPE_CHECKING
from typing import Any

import numpy as np

from jaxsoup._soup import AtMost
from jaxsoup._soup import SearchInfo
from jaxsoup._soup import Trial
from jaxsoup.report._tables import Row
from jaxsoup.typing import PathLike

if TYPE_CHECKING:
  from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
_GREY = '#9a9a9a'
MARKERS = ('*', 'P', 'X', 'D', '^', 'v')
_TRIALS = {'accepted': 'o', 'rejected': 'o', 'rejected early, at most': 'v'}
AREAS = (190, 90, 90, 60, 80, 80)


def scatter(
    ax: 'Axes', rows: Sequence[Row], *, label: str | None = None
) -> None:
  """Test against shifted score of every model and soup.

  Args:
    ax: a matplotlib Axes.
    rows: all models, singles included.
    label: what the scores are; by default the metric of the rows.

  Source: figure 1 of Wortsman et al. 2022.
  """
  label = f'{rows[0].metric} (%)' if label is None else label
  singles = [row for row in rows if row.kind == 'single']
  best = max(singles, key=lambda row: row.held_out, default=None)
  ax.scatter(
      [row.test * 100 for row in singles],
      [row.mean_shift * 100 for row in singles],
      s=22,
      color=_GREY,
      linewidths=0,
      alpha=0.75,
      label='fine-tuned models',
      zorder=2,
  )
  if best is not None:
    ax.scatter(
        best.test * 100,
        best.mean_shift * 100,
        s=64,
        facecolors='none',
        edgecolors='black',
        linewidths=1.3,
        label='best on held-out',
        zorder=4,
    )
  for kind, filled in (('soup', True), ('ensemble', False)):
    for i, row in enumerate(row for row in rows if row.kind == kind):
      # Other colours in each round of the markers: no two look alike.
      colour = COLOURS[(i + i // len(MARKERS)) % len(COLOURS)]
      ax.scatter(
          row.test * 100,
          row.mean_shift * 100,
          s=AREAS[i % len(AREAS)] if filled else 48,
          marker=MARKERS[i % len(MARKERS)] if filled else 's',
          facecolors=colour if filled else 'white',
          edgecolors='white' if filled else colour,
          linewidths=0.7 if filled else 1.6,
          label=row.name + ('' if filled else f' (x{row.cost:.0f})'),
          # Where two coincide, the one that the legend names first is on top.
          zorder=3 - 0.05 * i,
      )
  ax.set_xlabel(f'test {label}')
  ax.set_ylabel(f'mean of shifts, {label}')
  tidy(ax)
  ax.legend(
      frameon=False, fontsize=8, loc='upper left', bbox_to_anchor=(1.01, 1)
  )


def trials(
    ax: 'Axes',
    infos: Mapping[str, SearchInfo],
    *,
    label: str = 'held-out accuracy (%)',
    scale: float = 100,
) -> None:
  """Held-out score against trial: what a search accepted and rejected.

  An arrow down is a candidate that was rejected early: its score lies there or
  below.

  Args:
    ax: a matplotlib Axes.
    infos: the `info` of soups from `greedy` or `pruned`, by name.
    label: what the scores are.
    scale: multiplies the scores.
  """
  for i, (name, info) in enumerate(infos.items()):
    colour = COLOURS[i % len(COLOURS)]
    numbers = range(1, len(info.trials) + 1)
    # `greedy` accepts the first; `pruned` starts from all.
    bars, bar = [], info.scores.get(tuple(range(len(info.order))), np.nan)
    for trial in info.trials:
      if trial.accepted:
        bar = info.scores[trial.members]
      bars.append(bar * scale)
    ax.step(numbers, bars, where='post', color=colour, label=f'{name} soup')
    for outcome, marker in _TRIALS.items():
      chosen = [
          (n, _height(trial.score) * scale)
          for n, trial in zip(numbers, info.trials)
          if _outcome(trial) == outcome
      ]
      face = colour if outcome == 'accepted' else 'white'
      mark(ax, chosen, marker, edgecolors=colour, facecolors=face)
  outcomes = {_outcome(t) for info in infos.values() for t in info.trials}
  for outcome, marker in _TRIALS.items():
    if outcome in outcomes or marker == 'o':
      face = 'black' if outcome == 'accepted' else 'white'
      mark(ax, [], marker, edgecolors='black', facecolors=face, label=outcome)
  ax.set_xlabel('trial')
  ax.set_ylabel(label)
  ax.locator_params(axis='x', integer=True)
  tidy(ax)
  ax.legend(frameon=False, fontsize=8)


def mark(ax: 'Axes', points: Sequence[Any], marker: str, **kwargs) -> None:
  x, y = zip(*points) if points else ((), ())
  ax.scatter(x, y, s=30, marker=marker, linewidths=1.1, zorder=3, **kwargs)


def _height(score: float | AtMost) -> float:
  return score.bound if isinstance(score, AtMost) else score


def _outcome(trial: Trial) -> str:
  if trial.accepted:
    return 'accepted'
  is_bound = isinstance(trial.score, AtMost)
  return 'rejected early, at most' if is_bound else 'rejected'


def save(
    draw: Callable[['Axes'], None],
    path: PathLike,
    *,
    size: tuple[float, float] = (6.4, 4),
) -> None:
  """Draws into a new figure and writes it, without a display.

  Args:
    draw: is called with an Axes.
    path: a file; its ending says the format.
    size: width and height in inches, at 160 dots each.
  """
  # Not pyplot: it keeps state, and may ask for a display.
  from matplotlib import figure

  fig = figure.Figure(figsize=size, layout='constrained')
  draw(fig.add_subplot())
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  fig.savefig(path, dpi=160)


def tidy(ax: 'Axes') -> None:
  ax.spines[['top', 'right']].set_visible(False)
  ax.grid(color='#e6e6e6', linewidth=0.6, zorder=0)
  ax.set_axisbelow(True)


def legend_below(ax: 'Axes', ncols: int) -> None:
  """A legend outside of the axes, so that it hides nothing."""
  ax.legend(
      frameon=False,
      fontsize=8,
      ncols=ncols,
      loc='upper center',
      bbox_to_anchor=(0.5, -0.17),
  )
