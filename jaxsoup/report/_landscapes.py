"""Pictures of landscapes and studies, each into an Axes."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

import numpy as np

from jaxsoup.landscape import Pair
from jaxsoup.landscape import Path
from jaxsoup.landscape import Plane
from jaxsoup.landscape import SoupMinusEnsemble
from jaxsoup.report import _plots
from jaxsoup.studies import Contribution
from jaxsoup.studies import Curve
from jaxsoup.studies import Growth
from jaxsoup.studies import Varied
from jaxsoup.typing import ArrayLike
from jaxsoup.typing import Json

if TYPE_CHECKING:
  from matplotlib.axes import Axes

# From dark to light it is read without its hues, too.
_MAP = 'viridis'
# On a map, whose colours stay, these do not follow the colours of a page.
_BLACK, _WHITE, _GREY = '#010101', '#fefefe', '#9a9a9a'
_MAX_NUMBERS = 12  # A heat map of more models has no room for its numbers.


def plane(
    ax: 'Axes',
    surface: Plane,
    names: Sequence[str],
    *,
    label: str = 'loss',
    scale: float = 1,
) -> None:
  """The loss on a plane, and where models and soups lie on it.

  A grey mark is a model off the plane, further from it than half of its
  distance from theta_0: the colour below it is not its loss.

  Args:
    ax: a matplotlib Axes.
    surface: from `landscape.plane`.
    names: of its points, `[M]`; the first three are the corners. A point
      without a name is a dot, others are in the legend.
    label: what the loss is.
    scale: multiplies the loss.

  Source: figure 2 of Wortsman et al. 2022.
  """
  from matplotlib import colors

  loss = surface.loss * scale
  levels = _levels(loss)
  norm = colors.BoundaryNorm(levels, 256)
  filled = ax.contourf(
      surface.x, surface.y, loss, levels, cmap=f'{_MAP}_r', norm=norm
  )
  lines: Json = dict(colors=_WHITE, linewidths=0.4, alpha=0.6)
  ax.contour(surface.x, surface.y, loss, levels, **lines)
  bar = ax.figure.colorbar(filled, ax=ax, label=label, format='%.3g')
  bar.ax.tick_params(labelsize=8)
  from_origin = np.hypot(*surface.points.T)
  is_off = surface.off > 0.5 * np.hypot(from_origin, surface.off)
  soups = [i for i, name in enumerate(names) if name and i > 2]
  for i, (name, point) in enumerate(zip(names, surface.points)):
    look: Json = {'s': 40 if i < 3 else 14, 'marker': 'o'}
    if i in soups:
      _, marker, area = _plots.look(soups.index(i))
      look = {'s': 0.6 * area, 'marker': marker, 'label': name}
    ax.scatter(
        *point,
        facecolors=_GREY if is_off[i] else _WHITE,
        edgecolors=_BLACK,
        linewidths=0.8 if i < 3 or i in soups else 0.5,
        zorder=4 if i < 3 or i in soups else 3,
        **look,
    )
    if i < 3:
      _name_point(ax, point, name, is_below=not i)
  if soups:
    _plots.legend(ax, 'below', 3)
  ax.set(
      xlabel=f'from {names[0]} towards {names[1]}',
      ylabel='orthogonal to it',
      aspect='equal',
  )


def _name_point(ax, point, name: str, *, is_below: bool) -> None:
  ax.annotate(
      name,
      point,
      (-7, -6) if is_below else (7, 6),
      textcoords='offset points',
      ha='right' if is_below else 'left',
      va='top' if is_below else 'bottom',
      fontsize=8,
      color=_BLACK,
      zorder=5,
      bbox=dict(boxstyle='round,pad=0.15', fc=_WHITE, ec='none', alpha=0.7),
  )


def _levels(loss: np.ndarray, num: int = 16) -> np.ndarray:
  """Of equal mass: a cliff in a corner takes no colours from the basin."""
  levels = np.unique(
      np.quantile(loss[np.isfinite(loss)], np.linspace(0, 1, num))
  )
  return levels if len(levels) > 1 else levels[0] + np.array([0, 1])


def lines(
    ax: 'Axes',
    paths: Mapping[Any, Path],
    *,
    values: Mapping[Any, float] | None = None,
    label: str = 'loss',
    values_label: str = 'learning rate',
    scale: float = 1,
    is_named: bool = True,
) -> None:
  """The loss along lines between models minus the chord: the barriers.

  Args:
    ax: a matplotlib Axes.
    paths: by name, from `landscape.line` or `landscape.lines`.
    values: a number for each, such as the pair's learning rate, which colours
      it; without it every line has its name.
    label: what the loss is.
    values_label: what the values are.
    scale: multiplies the loss.
    is_named: whether lines without values have their names in a legend.
  """
  colours: dict[Any, Any] = {}
  if values is not None:
    from matplotlib import cm

    mappable = cm.ScalarMappable(norm := _norm(values.values()), _MAP)
    ax.figure.colorbar(mappable, ax=ax, label=values_label)
    colours = {name: mappable.cmap(norm(x)) for name, x in values.items()}
  for i, (name, path) in enumerate(paths.items()):
    ax.plot(
        path.t,
        path.above_chord * scale,
        color=colours.get(name, _plots.look(i)[0]),
        linewidth=1.4,
        label=None if colours else str(name),
    )
  ax.axhline(0, color='black', linewidth=0.8, linestyle=':')
  _plots.tidy(
      ax, 'from one model (0) to the other (1)', f'{label} above the chord'
  )
  if not colours and is_named:
    _plots.legend(ax)


def angles_and_gains(
    ax: 'Axes',
    pairs: Sequence[Pair],
    *,
    values: Sequence[float] | None = None,
    label: str = 'accuracy (points)',
) -> None:
  """What each pair gains against its angle at the initialization.

  Args:
    ax: a matplotlib Axes.
    pairs: from `landscape.pairs`.
    values: the mean learning rate of each pair, which colours it.
    label: what the scores are.

  Source: figure 3 of Wortsman et al. 2022.
  """
  _scatter(ax, [p.angle for p in pairs], [p.gain * 100 for p in pairs], values)
  ax.axhline(0, color='black', linewidth=0.8, linestyle=':')
  x = 'angle at the initialization (degrees)'
  _plots.tidy(ax, x, f'soup minus mean of the two, {label}')


def against_ensembles(
    ax: 'Axes',
    pairs: Sequence[Pair],
    *,
    values: Sequence[float] | None = None,
    label: str = 'accuracy (%)',
) -> None:
  """The soup of each pair against its ensemble.

  Args:
    ax: a matplotlib Axes.
    pairs: from `landscape.pairs`.
    values: the mean learning rate of each pair, which colours it.
    label: what the scores are.

  Source: figure 4 of Wortsman et al. 2022.
  """
  x, y = [p.ensemble * 100 for p in pairs], [p.soup * 100 for p in pairs]
  _scatter(ax, x, y, values, has_diagonal=True)
  _plots.tidy(ax, f'ensemble, {label}', f'soup, {label}')


def theory(
    ax: 'Axes',
    terms: Sequence[SoupMinusEnsemble],
    *,
    values: Sequence[float] | None = None,
) -> None:
  """The approximation of soup minus ensemble against the true difference.

  Args:
    ax: a matplotlib Axes.
    terms: from `landscape.soup_minus_ensemble`, one for each pair.
    values: the mean learning rate of each pair, which colours it.

  Source: figure in section 4 of Wortsman et al. 2022.
  """
  x = [pair.soup - pair.ensemble for pair in terms]
  y = [pair.approximation for pair in terms]
  _scatter(ax, x, y, values, has_diagonal=True)
  _plots.tidy(ax, 'loss of soup minus loss of ensemble', 'approximation')


def growth(
    ax: 'Axes',
    grown: Growth,
    *,
    label: str = 'accuracy (%)',
    scale: float = 100,
) -> None:
  """Scores against the number of models: mean over orders, and its error.

  Args:
    ax: a matplotlib Axes.
    grown: from `studies.growth`.
    label: what the scores are.
    scale: multiplies the scores.

  Source: Wortsman et al. 2022, appendix B.
  """
  for i, (name, rows) in enumerate(grown.scores.items()):
    colour, marker, _ = _plots.look(i)
    error = rows.std(0, ddof=int(len(rows) > 1)) / np.sqrt(len(rows))
    mean, error = rows.mean(0) * scale, error * scale
    look: Json = dict(color=colour, marker=marker, markersize=5)
    ax.plot(grown.nums, mean, label=name, **look)
    ax.fill_between(
        grown.nums, mean - error, mean + error, color=colour, alpha=0.15, lw=0
    )
  ax.locator_params(axis='x', integer=True)
  _plots.tidy(ax, 'number of models', label)
  _plots.legend(ax)


def by_step(
    ax: 'Axes',
    scores: Mapping[str, tuple[ArrayLike, Sequence[float]]],
    *,
    label: str = 'held-out score (%)',
) -> None:
  """Scores along a run, of the run itself and of averages along it.

  Args:
    ax: a matplotlib Axes.
    scores: by name, steps `[n]` and scores `[n]`.
    label: what the scores are.
  """
  for i, (name, (steps, values)) in enumerate(scores.items()):
    colour, marker, _ = _plots.look(i)
    ax.plot(
        steps, values, label=name, color=colour, marker=marker, markersize=4
    )
  _plots.tidy(ax, 'step', label)
  _plots.legend(ax)


def varied(
    ax: 'Axes',
    groups: Sequence[Varied],
    *,
    label: str = 'accuracy (%)',
    scale: float = 100,
) -> None:
  """Soups of runs that differ in one hyper-parameter only.

  Args:
    ax: a matplotlib Axes.
    groups: from `studies.one_varied`: a row each, the first on top.
    label: what the scores are.
    scale: multiplies the scores.

  Source: Wortsman et al. 2022, appendix on varying one hyper-parameter.
  """
  rows = np.arange(len(groups))[::-1]
  kinds = {'soup': 'soup', 'best': 'best run', 'mean': 'mean of runs'}
  for i, (field, name) in enumerate(kinds.items()):
    values = [getattr(group, field) * scale for group in groups]
    _dots(ax, values, rows, i, name)
  ax.set_yticks(rows, [group.name.replace('_', ' ') for group in groups])
  _finish_rows(ax, label)


def compared(
    ax: 'Axes',
    scores: Mapping[str, Mapping[str, Sequence[float]]],
) -> None:
  """Scores side by side: a row each, repeats as small dots around their mean.

  Args:
    ax: a matplotlib Axes.
    scores: by row, the first on top, and by data set: one for each repeat.
  """
  names = list(dict.fromkeys(name for row in scores.values() for name in row))
  rows = dict(zip(scores, range(len(scores) - 1, -1, -1)))
  for i, name in enumerate(names):
    there = [(rows[row], x[name]) for row, x in scores.items() if name in x]
    means = [float(np.mean(values)) for _, values in there]
    _dots(ax, means, [row for row, _ in there], i, name)
    for row, values in there:
      if len(values) > 1:
        look: Json = dict(s=8, color=_plots.look(i)[0], alpha=0.6, linewidths=0)
        ax.scatter(values, [row] * len(values), **look)
  ax.set_yticks(list(rows.values()), list(rows))
  _finish_rows(ax)


def _dots(ax, values, rows, i: int, name: str) -> None:
  colour, marker, area = _plots.look(i)
  look: Json = dict(s=0.5 * area, marker=marker, color=colour, linewidths=0)
  ax.scatter(values, rows, label=name, zorder=3, **look)


def _finish_rows(ax, label: str = '') -> None:
  ax.margins(y=0.1)
  ax.tick_params(axis='y', length=0)
  _plots.tidy(ax, label, '')
  _plots.legend(ax, 'below', 3)


def contributions(ax: 'Axes', effects: Sequence[Contribution]) -> None:
  """Spearman's correlation of every hyper-parameter with scores and choices.

  Args:
    ax: a matplotlib Axes.
    effects: from `studies.contributions`, the strongest on top.
  """
  rows = np.arange(len(effects))[::-1]
  is_sure = np.array([c.p_value < 0.05 for c in effects], bool)
  correlations = np.array([c.correlation for c in effects])
  for chosen, colour, name in (
      (is_sure, _plots.COLOURS[0], 'score, p < 0.05'),
      (~is_sure, _plots.COLOURS[5], 'score, not significant'),
  ):
    if chosen.any():
      look: Json = dict(height=0.55, color=colour, label=name)
      ax.barh(rows[chosen], correlations[chosen], **look)
  inclusion = [(c.inclusion, row) for c, row in zip(effects, rows)]
  inclusion = [pair for pair in inclusion if np.isfinite(pair[0])]
  if inclusion:
    look = dict(facecolors='white', edgecolors='black')
    _plots.mark(ax, inclusion, 'D', label='chosen by greedy', **look)
  ax.axvline(0, color='black', linewidth=0.8)
  ax.set_yticks(rows, [c.name.replace('_', ' ') for c in effects])
  ax.set_xlim(-1, 1)
  ax.set_xticks([-1, -0.5, 0, 0.5, 1])
  _plots.tidy(ax, "Spearman's correlation", '')
  _plots.legend(ax, 'right')


def wise_ft(ax: 'Axes', curves: Mapping[str, Curve]) -> None:
  """The mean of all shifted accuracies against that on test, along each line.

  Args:
    ax: a matplotlib Axes.
    curves: from `studies.wise_ft`.

  Source: figure 1 of Wortsman et al. 2022, "Robust fine-tuning".
  """
  for i, (name, curve) in enumerate(curves.items()):
    shifts = [v for k, v in curve.scores.items() if k != 'test']
    across, up = curve.scores['test'] * 100, np.mean(shifts, axis=0) * 100
    if not i:
      start: Json = dict(s=40, color='black', label='initialization', zorder=3)
      ax.scatter(across[0], up[0], **start)
    colour, marker, area = _plots.look(i)
    ax.plot(across, up, color=colour, marker='o', markersize=3, linewidth=1.2)
    look: Json = dict(s=area, marker=marker, color=colour, edgecolors='white')
    ax.scatter(across[-1], up[-1], linewidths=0.7, label=name, zorder=3, **look)
  _plots.tidy(ax, 'test accuracy (%)', 'mean of shifts, accuracy (%)')
  _plots.legend(ax)


def matrix(
    ax: 'Axes',
    values: ArrayLike,
    names: Sequence[str],
    *,
    label: str,
    fmt: str = '.0f',
) -> None:
  """A number for each pair of models: angles, distances, alignments.

  Args:
    ax: a matplotlib Axes.
    values: `[K, K]`.
    names: of the models, `[K]`.
    label: what the numbers are.
    fmt: how they are written; up to twelve models have room for that.
  """
  values = np.asarray(values, float)
  # What a model has with itself takes no colours from the others.
  others = values[~np.eye(len(names), dtype=bool)] if len(names) > 1 else values
  low, high = np.nanmin(others), np.nanmax(others)
  image = ax.imshow(values, cmap=_MAP, vmin=low, vmax=high)
  ax.figure.colorbar(image, ax=ax, label=label)
  if len(names) <= _MAX_NUMBERS:
    for (i, j), value in np.ndenumerate(values):
      if not np.isfinite(value):  # Not measured.
        continue
      text = format(value, fmt)
      text = text if float(text) else text.lstrip('-')
      colour = _BLACK if value > (low + high) / 2 else _WHITE
      ax.text(j, i, text, ha='center', va='center', fontsize=8, color=colour)
  # Names that would overlap are left out.
  ticks = range(0, len(names), -(-len(names) // _MAX_NUMBERS))
  for set_ticks in (ax.set_xticks, ax.set_yticks):
    set_ticks(ticks, [names[k] for k in ticks], fontsize=8)


def _norm(values: Iterable[float]) -> Any:
  """Logarithmic over a decade or so, as learning rates are."""
  from matplotlib import colors

  values = np.array(list(values), float)
  low, high = values.min(), values.max()
  if low > 0 and high / low > 5:
    return colors.LogNorm(low, high)
  return colors.Normalize(low, high)


def _scatter(ax: 'Axes', x, y, values, *, has_diagonal: bool = False) -> None:
  """A dot for each pair of models, coloured by its mean learning rate."""
  if values is None:
    ax.scatter(x, y, s=26, color=_plots.COLOURS[0], linewidths=0, alpha=0.8)
  else:
    colours: Json = dict(c=values, cmap=_MAP, norm=_norm(values))
    dots = ax.scatter(x, y, s=30, linewidths=0, **colours)
    ax.figure.colorbar(dots, ax=ax, label='mean learning rate')
  ax.locator_params(axis='x', nbins=5)  # Small numbers have long labels.
  if has_diagonal:
    ends = [min(*x, *y), max(*x, *y)]
    ax.plot(ends, ends, color='black', linewidth=0.8, linestyle=':', zorder=1)
