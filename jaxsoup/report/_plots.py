"""Pictures that take an Axes."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import pathlib
import re
from typing import TYPE_CHECKING
from typing import Any

import numpy as np

from jaxsoup._soup import AtMost
from jaxsoup._soup import SearchInfo
from jaxsoup._soup import Trial
from jaxsoup.report._rows import Row
from jaxsoup.report._rows import best_single
from jaxsoup.report._rows import singles
from jaxsoup.typing import Config
from jaxsoup.typing import Json
from jaxsoup.typing import PathLike

if TYPE_CHECKING:
  from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
GREY = '#9a9a9a'
_DASHED: Json = dict(color='#8c8c8c', linewidth=1, linestyle='--')
_MAX_LABELS = 24  # More would overlap.
_MAX_KINDS = 60
MARKERS = ('*', 'P', 'X', 'D', '^', 'v')
_TRIALS = {'accepted': 'o', 'rejected': 'o', 'rejected early, at most': 'v'}
AREAS = (190, 90, 90, 60, 80, 80)


def scatter(ax: 'Axes', rows: Sequence[Row]) -> None:
  """Test against shifted score of every model and soup.

  Args:
    ax: a matplotlib Axes.
    rows: all models, singles included.

  Source: figure 1 of Wortsman et al. 2022.
  """
  label = f'{rows[0].metric} (%)'

  def dots(shown: Sequence[Row], **look: Any) -> None:
    x = [100 * row.test for row in shown]
    ax.scatter(x, [100 * row.mean_shift for row in shown], **look)

  dots(
      singles(rows), s=22, color=GREY, linewidths=0, alpha=0.75, zorder=2,
      label='fine-tuned models',
  )  # fmt: skip
  if (best := best_single(rows)) is not None:
    dots(
        [rows[best]], s=64, facecolors='none', edgecolors='black', zorder=4,
        linewidths=1.3, label='best on held-out',
    )  # fmt: skip
  for kind, filled in (('soup', True), ('ensemble', False)):
    for i, row in enumerate(row for row in rows if row.kind == kind):
      # Other colours in each round of the markers: no two look alike.
      (colour, *_), (_, marker, area) = look(i + i // 6), look(i)
      dots(
          [row],
          s=area if filled else 48,
          marker=marker if filled else 's',
          facecolors=colour if filled else 'white',
          edgecolors='white' if filled else colour,
          linewidths=0.7 if filled else 1.6,
          label=row.name + ('' if filled else f' (x{row.cost:.0f})'),
          # Where two coincide, the one that the legend names first is on top.
          zorder=3 - 0.05 * i,
      )
  tidy(ax, f'test {label}', f'mean of shifts, {label}')
  legend(ax, 'right')


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
    colour, _, _ = look(i)
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
          (n, height(trial.score) * scale)
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
  ax.locator_params(axis='x', integer=True)
  tidy(ax, 'trial', label)
  legend(ax)


def look(i: int) -> tuple[str, str, int]:
  """Colour, marker and area of the i-th kind of mark."""
  return COLOURS[i % 6], MARKERS[i % 6], AREAS[i % 6]


def mark(ax: 'Axes', points: Sequence[Any], marker: str, **kwargs) -> None:
  x, y = zip(*points) if points else ((), ())
  ax.scatter(x, y, s=30, marker=marker, linewidths=1.1, zorder=3, **kwargs)


def height(score: float | AtMost) -> float:
  return score.bound if isinstance(score, AtMost) else score


def _outcome(trial: Trial) -> str:
  if trial.accepted:
    return 'accepted'
  is_bound = isinstance(trial.score, AtMost)
  return 'rejected early, at most' if is_bound else 'rejected'


def line_fit(rows: Sequence[Row]) -> tuple[float, float, float] | None:
  """Mean of shifts against test, over the single models, by least squares.

  Returns:
    (slope, intercept, R²); None where there is no line: for fewer than three
    models, or equal scores.

  Source: Miller et al. 2021, "Accuracy on the line"; figure 1 of Wortsman et
  al. 2022.
  """
  x = np.array([row.test for row in singles(rows)])
  y = np.array([row.mean_shift for row in singles(rows)])
  if len(x) < 3 or not np.isfinite(y).all() or not np.ptp(x) * np.ptp(y):
    return None
  slope, intercept = np.polyfit(x, y, 1).tolist()
  return slope, intercept, float(np.corrcoef(x, y)[0, 1] ** 2)


def figure_1(ax: 'Axes', rows: Sequence[Row]) -> None:
  """The scatter of `scatter`, its line, and the legend below."""
  scatter(ax, rows)
  if (fit := line_fit(rows)) is not None:
    slope, intercept, r_squared = fit
    tests = [row.test for row in singles(rows)]
    x = np.array([min(tests), max(tests)])
    label = f'fit to single models, R² = {r_squared:.2f}'
    y = slope * x + intercept
    ax.plot(100 * x, 100 * y, label=label, zorder=1, **_DASHED)
  legend(ax, 'below', 2)


def alphas(ax: 'Axes', alpha: Mapping[str, np.ndarray]) -> None:
  """A row of bars for each soup: how much it takes of every model, `[K]`.

  Each row has its own scale; its largest coefficient is written next to it.
  """
  names = list(alpha)[::-1]
  num = max(map(len, alpha.values()), default=0)
  for i, name in enumerate(names):
    values = np.asarray(alpha[name], float)
    top = np.abs(values).max() or 1.0
    x, y = np.arange(len(values)), 0.8 * values / top
    ax.bar(x, y, bottom=i, color=COLOURS[0])
    ax.axhline(i, color='black', linewidth=0.6)
    ax.text(num - 0.3, i, f' max {values.max():.2g}', fontsize=8, va='bottom')
  ax.set_yticks(range(len(names)), names)
  ax.tick_params(axis='y', length=0)
  ax.set_ylim(-0.2, len(names))
  ax.set_xlim(-0.7, num - 0.3)
  ax.set_xlabel('model')
  ax.locator_params(axis='x', integer=True)
  ax.spines[['top', 'right', 'left']].set_visible(False)


def alpha_map(ax: 'Axes', paths: Sequence[str], alpha: np.ndarray) -> None:
  """Mixing coefficients of each tensor (rows) and model (columns), `[L, K]`."""
  # By the numbers in the paths: block_2 is above block_10.
  parts = [re.split(r'(\d+)', path) for path in paths]
  key = lambda i: [(len(x) * x.isdigit(), x) for x in parts[i]]
  order = sorted(range(len(paths)), key=key)
  shown = ax.imshow(
      alpha[order], cmap='cividis', aspect='auto', interpolation='nearest'
  )
  ax.figure.colorbar(shown, ax=ax, label='alpha')
  labels = [paths[i] for i in order]
  if len(paths) > _MAX_LABELS:  # The first tensor of each block.
    labels = [label.partition('/')[0] for label in labels]
  ticks: list[int] = []
  for i, label in enumerate(labels):
    is_first = i == 0 or label != labels[i - 1]
    if is_first and (not ticks or i - ticks[-1] >= len(paths) / _MAX_LABELS):
      ticks.append(i)
  ax.set_yticks(ticks, [labels[i] for i in ticks], fontsize=8)
  ax.set_xlabel('model')
  ax.locator_params(axis='x', integer=True)


def reliability(ax: 'Axes', curves: Mapping[str, Config]) -> None:
  """Accuracy against confidence; curves are `metrics.Reliability` by model."""
  low = 100.0
  for i, (name, curve) in enumerate(curves.items()):
    x, y = (100 * np.asarray(curve[k]) for k in ('confidence', 'accuracy'))
    low = min(low, x.min(), y.min())
    colour, marker, _ = look(i - 1) if i else ('black', 'o', 0)
    style: Json = dict(
        linestyle='-' if i < 7 else ':', linewidth=1.1, markersize=4
    )
    ax.plot(x, y, color=colour, marker=marker, label=name, **style)
  ax.plot([low, 100], [low, 100], **_DASHED)
  tidy(ax, 'confidence (%)', 'accuracy (%)')
  legend(ax, 'below', 2)


def frequencies(
    ax: 'Axes', frequency: Sequence[float], chosen: Sequence[int]
) -> None:
  """How often resamples of the held-out set choose each model."""
  values = 100 * np.asarray(frequency)
  for is_chosen, label in ((True, 'chosen'), (False, 'not chosen')):
    models = [k for k in range(len(values)) if (k in chosen) == is_chosen]
    colour = COLOURS[0] if is_chosen else 'white'
    look: Json = dict(color=colour, edgecolor=COLOURS[0], label=label)
    ax.bar(models, values[models], **look)
  ax.set_ylim(0, 100)
  ax.locator_params(axis='x', integer=True)
  tidy(ax, 'model', 'resamples that choose it (%)')
  legend(ax, 'below', 2)


def against(
    ax: 'Axes',
    name: str,
    values: Sequence[Any],
    scores: Sequence[float],
    chosen: Sequence[int] = (),
    *,
    label: str = 'held-out accuracy (%)',
) -> None:
  """Scores of single models against one hyper-parameter; chosen are filled."""
  y = 100 * np.asarray(scores, float)
  axes = name, label
  if is_numeric(values):
    x = np.array(values, float)
    if x.min() > 0 and x.max() / x.min() > 20:
      ax.set_xscale('log')
    else:  # 2, 4, 6 and 1e-5 at the end of the axis: long numbers overlap.
      ax.ticklabel_format(axis='x', scilimits=(-3, 4))
      ax.locator_params(axis='x', nbins=6)
  else:  # A row each, since their names would overlap below the axis.
    kinds = sorted(set(map(str, values)))
    x, y = y, np.array([kinds.index(str(value)) for value in values], float)
    axes = label, name
    step = -(-len(kinds) // _MAX_KINDS)
    names = [kind if len(kind) < 30 else f'{kind[:28]}…' for kind in kinds]
    ax.set_yticks(range(0, len(kinds), step), names[::step])
    ax.set_ylim(len(kinds) - 0.5, -0.5)
  is_chosen = np.isin(np.arange(len(x)), list(chosen))
  colour = COLOURS[0]
  for mask, face in ((~is_chosen, 'none'), (is_chosen, colour)):
    ax.scatter(
        x[mask], y[mask], s=26, facecolors=face, edgecolors=colour, zorder=3
    )
  tidy(ax, *axes)


def is_numeric(values: Sequence[Any]) -> bool:
  """Whether all values are numbers, and not just true or false."""
  return all(
      isinstance(value, (int, float)) and not isinstance(value, bool)
      for value in values
  )


@contextlib.contextmanager
def drawn(
    draw: Callable[['Axes'], None],
    size: tuple[float, float],
    salt: str | None = None,
) -> Iterator[Any]:
  """A figure, without a display; in texts a $ is one, and not mathematics."""
  # Not pyplot: it keeps state, and may ask for a display.
  import matplotlib
  from matplotlib import figure
  from matplotlib import ticker

  with matplotlib.rc_context({'text.parse_math': False, 'svg.hashsalt': salt}):
    fig = figure.Figure(figsize=size, layout='constrained')
    draw(fig.add_subplot())
    for axis in (axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)):
      if isinstance(axis.get_major_formatter(), ticker.LogFormatterMathtext):
        axis.set_major_formatter(ticker.LogFormatter())
        axis.set_minor_formatter(ticker.LogFormatter())
    yield fig


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
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  with drawn(draw, size) as fig:
    fig.savefig(path, dpi=160)


def tidy(ax: 'Axes', x: str, y: str) -> None:
  """Names the axes, and leaves out what says nothing."""
  ax.set(xlabel=x, ylabel=y)
  ax.spines[['top', 'right']].set_visible(False)
  ax.grid(color='#e6e6e6', linewidth=0.6, zorder=0)
  ax.set_axisbelow(True)


def legend(ax: 'Axes', where: str = 'best', ncols: int = 1) -> None:
  """A legend: 'right' and 'below' are outside of the axes, and hide nothing."""
  places: Json = {
      'right': dict(loc='upper left', bbox_to_anchor=(1.01, 1)),
      'below': dict(loc='upper center', bbox_to_anchor=(0.5, -0.17)),
  }
  place = places.get(where, {'loc': where})
  ax.legend(frameon=False, fontsize=8, ncols=ncols, **place)
