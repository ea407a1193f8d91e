"""Pictures of one experiment, each into an Axes."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any
from typing import NamedTuple

import numpy as np

from jaxsoup.report import _plots
from jaxsoup.report._tables import Row
from jaxsoup.typing import Config

if TYPE_CHECKING:
  from matplotlib.axes import Axes

_GREY = '#8c8c8c'
_MAX_LABELS = 24  # More would overlap.


class LineFit(NamedTuple):
  """`y = slope x + intercept` by least squares.

  Attributes:
    slope: of the line.
    intercept: of the line.
    r_squared: the share of the variance of y that it explains.
  """

  slope: float
  intercept: float
  r_squared: float


def line_fit(rows: Sequence[Row]) -> LineFit | None:
  """Mean of shifts against test, over the single models.

  Args:
    rows: a row a model; only singles count.

  Returns:
    A `LineFit`; None where there is no line: for fewer than three models, or
    equal scores.

  Source: Miller et al. 2021, "Accuracy on the line"; figure 1 of Wortsman et
  al. 2022.
  """
  singles = [row for row in rows if row.kind == 'single']
  x = np.array([row.test for row in singles])
  y = np.array([row.mean_shift for row in singles])
  if len(x) < 3 or not np.isfinite(y).all() or not np.ptp(x) * np.ptp(y):
    return None
  slope, intercept = np.polyfit(x, y, 1)
  r_squared = np.corrcoef(x, y)[0, 1] ** 2
  return LineFit(float(slope), float(intercept), float(r_squared))


def figure_1(ax: 'Axes', rows: Sequence[Row]) -> None:
  """The scatter of `_plots.scatter`, its line, and the legend below."""
  _plots.scatter(ax, rows)
  fit = line_fit(rows)
  if fit is not None:
    singles = [row.test for row in rows if row.kind == 'single']
    x = np.array([min(singles), max(singles)])
    ax.plot(
        100 * x,
        100 * (fit.slope * x + fit.intercept),
        color=_GREY,
        linewidth=1,
        linestyle='--',
        label=f'fit to single models, R² = {fit.r_squared:.2f}',
        zorder=1,
    )
  _plots.legend_below(ax, 2)


def alphas(ax: 'Axes', alpha: Mapping[str, np.ndarray]) -> None:
  """A row of bars for each soup: how much it takes of every model.

  Each row has its own scale; its largest coefficient is written next to it.

  Args:
    ax: a matplotlib Axes.
    alpha: `[K]` by soup.
  """
  names = list(alpha)[::-1]
  num = max(map(len, alpha.values()), default=0)
  for i, name in enumerate(names):
    values = np.asarray(alpha[name], float)
    top = np.abs(values).max() or 1.0
    ax.bar(
        np.arange(len(values)),
        0.8 * values / top,
        bottom=i,
        color=_plots.COLOURS[0],
    )
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
  """Mixing coefficients of each tensor (rows) and model (columns).

  Args:
    ax: a matplotlib Axes.
    paths: of the tensors, `[L]`: 'block_0/mlp/kernel'.
    alpha: `[L, K]`.
  """
  shown = ax.imshow(
      alpha, cmap='cividis', aspect='auto', interpolation='nearest'
  )
  ax.figure.colorbar(shown, ax=ax, label='alpha')
  labels = list(paths)
  if len(paths) > _MAX_LABELS:
    # The first tensor of each block, as far as there is room.
    blocks = [path.partition('/')[0] for path in paths]
    labels = [
        block if i == 0 or block != blocks[i - 1] else ''
        for i, block in enumerate(blocks)
    ]
  ticks = [i for i, label in enumerate(labels) if label]
  ticks = ticks[:: -(-len(ticks) // _MAX_LABELS)]
  ax.set_yticks(ticks, [labels[i] for i in ticks], fontsize=8)
  ax.set_xlabel('model')
  ax.locator_params(axis='x', integer=True)


def reliability(ax: 'Axes', curves: Mapping[str, Config]) -> None:
  """Accuracy against confidence: a reliability diagram.

  Args:
    ax: a matplotlib Axes.
    curves: by model: fields of `jaxsoup.metrics.Reliability`, `[B]` each.
  """
  low = 100.0
  for i, (name, curve) in enumerate(curves.items()):
    x, y = (100 * np.asarray(curve[k]) for k in ('confidence', 'accuracy'))
    low = min(low, x.min(), y.min())
    ax.plot(
        x,
        y,
        color='black' if not i else _plots.COLOURS[(i - 1) % 6],
        marker='o' if not i else _plots.MARKERS[(i - 1) % 6],
        linestyle='-' if i < 7 else ':',
        linewidth=1.1,
        markersize=4,
        label=name,
    )
  ax.plot([low, 100], [low, 100], color=_GREY, linewidth=1, linestyle='--')
  ax.set_xlabel('confidence (%)')
  ax.set_ylabel('accuracy (%)')
  _plots.tidy(ax)
  _plots.legend_below(ax, 2)


def frequencies(
    ax: 'Axes', frequency: Sequence[float], chosen: Sequence[int]
) -> None:
  """How often resamples of the held-out set choose each model.

  Args:
    ax: a matplotlib Axes.
    frequency: `[K]`, in 0..1.
    chosen: the models that all examples choose.
  """
  values = 100 * np.asarray(frequency)
  for is_chosen, label in ((True, 'chosen'), (False, 'not chosen')):
    models = [k for k in range(len(values)) if (k in chosen) == is_chosen]
    ax.bar(
        models,
        values[models],
        color=_plots.COLOURS[0] if is_chosen else 'white',
        edgecolor=_plots.COLOURS[0],
        label=label,
    )
  ax.set_xlabel('model')
  ax.set_ylabel('resamples that choose it (%)')
  ax.set_ylim(0, 100)
  ax.locator_params(axis='x', integer=True)
  _plots.tidy(ax)
  _plots.legend_below(ax, 2)


def against(
    ax: 'Axes',
    name: str,
    values: Sequence[Any],
    scores: Sequence[float],
    chosen: Sequence[int] = (),
    *,
    label: str = 'held-out accuracy (%)',
) -> None:
  """Scores of single models against one hyper-parameter.

  Args:
    ax: a matplotlib Axes.
    name: of the hyper-parameter.
    values: its value in each run, `[K]`: numbers, or anything with a `str`.
    scores: `[K]`, in 0..1.
    chosen: models that a soup took: these are filled.
    label: what the scores are.
  """
  x = np.arange(len(values), dtype=float)
  if is_numeric(values):
    x = np.array(values, float)
    if x.min() > 0 and x.max() / x.min() > 20:
      ax.set_xscale('log')
    else:  # 2, 4, 6 and 1e-5 at the end of the axis: long numbers overlap.
      ax.ticklabel_format(axis='x', scilimits=(-3, 4))
      ax.locator_params(axis='x', nbins=6)
  else:
    kinds = sorted(set(map(str, values)))
    x = np.array([kinds.index(str(value)) for value in values], float)
    ax.set_xticks(range(len(kinds)), kinds)
    ax.set_xlim(-0.5, len(kinds) - 0.5)
  y = 100 * np.asarray(scores, float)
  is_chosen = np.isin(np.arange(len(x)), list(chosen))
  colour = _plots.COLOURS[0]
  for mask, face in ((~is_chosen, 'none'), (is_chosen, colour)):
    ax.scatter(
        x[mask], y[mask], s=26, facecolors=face, edgecolors=colour, zorder=3
    )
  ax.set_xlabel(name)
  ax.set_ylabel(label)
  _plots.tidy(ax)


def is_numeric(values: Sequence[Any]) -> bool:
  """Whether all values are numbers, and not just true or false."""
  return all(
      isinstance(value, (int, float)) and not isinstance(value, bool)
      for value in values
  )
