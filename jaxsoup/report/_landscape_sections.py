"""Sections on landscapes, barriers and the diagnosis of an experiment.

```
parts = read_landscape('runs/digits')       # what `experiments.landscapes` made
sections = plane_sections(parts.get('plane', {}), names)
```
"""

from collections.abc import Mapping
from collections.abc import Sequence
import functools
import json
import pathlib

import numpy as np

from jaxsoup import diagnosis
from jaxsoup import landscape
from jaxsoup import studies
from jaxsoup.report import _landscapes
from jaxsoup.report._page import Code
from jaxsoup.report._page import Labelled
from jaxsoup.report._page import Part
from jaxsoup.report._page import Picture
from jaxsoup.report._page import Section
from jaxsoup.report._page import Table
from jaxsoup.typing import Config
from jaxsoup.typing import Json
from jaxsoup.typing import PathLike

# On the plane a loss is a number, an error a share.
_SCALES = {'training loss': 1}
_RATE = 'learning_rate'


def read_landscape(workdir: PathLike) -> Json:
  """The parts of `WORKDIR/landscape` by name; empty if there are none."""
  parts = {}
  for path in sorted((pathlib.Path(workdir) / 'landscape').glob('*.json')):
    try:
      parts[path.stem] = json.loads(path.read_text())
    except ValueError as e:
      raise ValueError(
          f'{path} is unreadable: {e}. Delete it, and run the command of the '
          'experiment again, which makes a new one.'
      ) from e
  return parts


def plane_sections(
    measured: Config, names: Sequence[str], models: Sequence[int] = ()
) -> list[Section]:
  """Loss and error around the start and two models; empty without a plane.

  Args:
    measured: corners, names of the soups, and the fields of a
      `jaxsoup.landscape.Plane`, whose `loss` is one array for each surface.
    names: of the single models.
    models: their rows in the table of all models, if the page has one.
  """
  if 'loss' not in measured:
    return []
  first, second = (names[k] for k in measured['corners'])
  soups = measured['soups']
  num_others = len(measured['points']) - 3 - len(soups)
  labels = ['start', first, second, *[''] * num_others, *soups]
  x, y, points, off = (
      np.array(measured[name]) for name in ('x', 'y', 'points', 'off')
  )
  pictures = []
  for name, loss in measured['loss'].items():
    scale = _SCALES.get(name, 100)
    plane = landscape.Plane(x, y, np.array(loss, float), points, off)
    if not np.isfinite(plane.loss).any():
      continue
    lowest = np.unravel_index(np.nanargmin(plane.loss), plane.loss.shape)
    text = (
        f'{_sentence(name)}: lowest {_number(plane.loss[lowest], scale)}, at '
        f'({plane.x[lowest[1]]:.2f}, {plane.y[lowest[0]]:.2f}). At the nearest '
        f'grid points: {_corner_values(plane, labels, scale)}.'
    )
    pictures.append(
        Picture(
            f'plane_{name.replace(" ", "_")}',
            functools.partial(
                _landscapes.plane,
                surface=plane,
                names=labels,
                label=name + ('' if scale == 1 else ' (%)'),
                scale=scale,
            ),
            f'Coloured map with the start, the models and the soups. {text}',
            text,
            (5.4, 4.6),
            [(i, *xy) for i, xy in zip(models, points[3:].tolist())],
        )
    )
  legend = (
      f'The plane through the start and the models {first} and {second}, the '
      'best two on held-out data that are not close together. Coordinates are '
      'distances in parameter space. Dots are the other models, projected. '
      'Grey ones are far from the plane: the colour below is not their loss.'
  )
  records = [
      {'surface': name, 'x': x, 'y': y, 'value': row[j]}
      for name, loss in measured['loss'].items()
      for y, row in zip(measured['y'], loss)
      for j, x in enumerate(measured['x'])
  ]
  return [Section('Landscape', [legend, *pictures], {'plane': records})]


def _corner_values(plane: landscape.Plane, labels, scale) -> str:
  """The start and the two models, as the grid has them."""
  shown = []
  for name, (x, y) in list(zip(labels, plane.points))[:3]:
    i, j = np.abs(plane.y - y).argmin(), np.abs(plane.x - x).argmin()
    shown.append(f'{name} {_number(plane.loss[i, j], scale)}')
  return ', '.join(shown)


def _number(value: float, scale: float) -> str:
  return f'{value:.3g}' if scale == 1 else f'{scale * value:.1f} %'


def barrier_sections(
    measured: Config,
    names: Sequence[str],
    settings: Sequence[Config],
) -> list[Section]:
  """The error on lines between two models; empty without lines."""
  if not measured.get('members'):
    return []
  pairs = [tuple(pair) for pair in measured['members']]
  t = np.array(measured['t'])
  paths = {
      pair: landscape.Path(t, np.array(error))
      for pair, error in zip(pairs, measured['error'])
  }
  # In points: at most, and in the middle, at the soup of the two.
  barriers = {k: 100 * landscape.barrier(path) for k, path in paths.items()}
  middle = {
      pair: 100 * float(np.interp(0.5, t, path.above_chord))
      for pair, path in paths.items()
  }
  order = sorted(pairs, key=lambda pair: -barriers[pair])
  worst = order[0]
  text = (
      f'On the lines between {len(pairs)} pairs of models the test error rises '
      f'by at most {barriers[worst]:.1f} points above the chord (between '
      f'{_pair(worst, names)}; median {_median(barriers):.1f}). In the middle, '
      f'at the soup of the two, it is {-_median(middle):.1f} points below the '
      'chord (median).'
  )
  values = pair_rates(pairs, settings)
  picture = Picture(
      'barriers',
      lambda ax: _landscapes.lines(
          ax,
          paths,
          values=None if values is None else dict(zip(pairs, values)),
          label='test error (points)',
          values_label='mean learning rate',
          scale=100,
          is_named=len(pairs) <= 6,
      ),
      f'Lines: the error between two models minus the chord. {text}',
      'Below zero, an average of two models is better than the two on average. '
      'A hump is a barrier: those models lie in different basins.',
  )
  rows = [
      [_pair(pair, names), f'{barriers[pair]:.1f}', f'{middle[pair]:+.1f}']
      for pair in order
  ]
  header = ['pair', 'barrier', 'middle, above the chord']
  table = Table(header, rows, 'All pairs, in points', is_folded=True)
  records = [
      {'first': names[i], 'second': names[j], 't': x, 'error': error}
      for (i, j), path in paths.items()
      for x, error in zip(path.t.tolist(), path.loss.tolist())
  ]
  return [Section('Barriers', [text, picture, table], {'barriers': records})]


def _median(values: Mapping[tuple[int, ...], float]) -> float:
  return float(np.median(list(values.values())))


def _pair(pair: Sequence[int], names: Sequence[str]) -> str:
  return f'{names[pair[0]]} and {names[pair[1]]}'


def pair_rates(
    pairs: Sequence[Sequence[int]], settings: Sequence[Config]
) -> list[float] | None:
  """The mean learning rate of each pair; None where it is not known."""
  if not all(_RATE in setting for setting in settings):
    return None
  return [
      float(np.sqrt(settings[i][_RATE] * settings[j][_RATE])) for i, j in pairs
  ]


def angle_sections(
    measured: Config,
    pairs: Config,
    names: Sequence[str],
    settings: Sequence[Config],
    *,
    metric: str,
) -> list[Section]:
  """Angles at the start, and gains of pairs; empty without angles."""
  if 'angles' not in measured:
    return []
  angles = np.array(measured['angles'], float)  # None becomes NaN.
  apart = angles[np.triu_indices(len(angles), 1)]
  text = (
      f'The task vectors of two models are {np.nanmin(apart):.0f} to '
      f'{np.nanmax(apart):.0f} degrees apart (median '
      f'{np.nanmedian(apart):.0f}); unrelated ones are at 90.'
  )
  parts: list[Part] = [text]
  pictures = [
      Picture(
          'angles',
          lambda ax: _landscapes.matrix(
              ax, angles, names, label='angle (degrees)'
          ),
          f'Heat map of the angles between all pairs. {text}',
          'Angles between all pairs.',
          (4.8, 4.2),
      )
  ]
  records = []
  for where, rows in pairs.items():
    if where == 'settings' or not rows:
      continue
    of_where = list(map(_pair_of, rows))
    parts.append(text := _pairs_text(where, of_where))
    pictures += _pair_pictures(where, of_where, settings, metric, text)
    records += [
        {
            'data': where,
            'first': names[pair.members[0]],
            'second': names[pair.members[1]],
            **{k: v for k, v in pair._asdict().items() if k != 'members'},
            'gain': pair.gain,
        }
        for pair in of_where
    ]
  data = {'pairs': records} if records else {}
  return [Section('Angles and pairs', [*parts, *pictures], data)]


def _pair_of(row: Config) -> landscape.Pair:
  """JSON has no NaN, such as the angle of a model that did not move."""
  known: Json = {k: np.nan if x is None else x for k, x in row.items()}
  return landscape.Pair(**known)


def _pairs_text(where: str, pairs: Sequence[landscape.Pair]) -> str:
  gains = [pair.gain for pair in pairs]
  less = [pair.soup - pair.ensemble for pair in pairs]
  text = (
      f'On {_where(where)} the soup of two models gains {_points(gains)} '
      f'points over their mean (mean ± deviation over {len(pairs)} pairs), and '
      f'{_points(less)} over their ensemble.'
  )
  apart = [(p.angle, p.gain) for p in pairs if np.isfinite(p.angle)]
  if len(apart) > 4 and np.ptp(apart, axis=0).all():
    correlation, p_value = studies.rank_correlation(*zip(*apart))
    text += (
        " Spearman's correlation of the gain with the angle is "
        f'{correlation:.2f} (p = {p_value:.2g}).'
    )
  return text


def _where(name: str) -> str:
  return 'the shifts' if name == 'mean of shifts' else f'{name} data'


def _points(values: Sequence[float]) -> str:
  deviation = np.std(values, ddof=1) if len(values) > 1 else 0
  return f'{100 * np.mean(values):+.1f} ± {100 * deviation:.1f}'


def _pair_pictures(where, pairs, settings, metric, text) -> list[Picture]:
  values = pair_rates([pair.members for pair in pairs], settings)
  stem = where.replace(' ', '_')
  return [
      Picture(
          f'angles_and_gains_{stem}',
          lambda ax: _landscapes.angles_and_gains(
              ax, pairs, values=values, label=f'{metric} (points)'
          ),
          f'Scatter of gain against angle. {text}',
          f'Gain of the soup of two on {_where(where)}, against their angle.',
      ),
      Picture(
          f'against_ensembles_{stem}',
          lambda ax: _landscapes.against_ensembles(
              ax, pairs, values=values, label=f'{metric} (%)'
          ),
          f'Scatter of soups against ensembles. {text}',
          f'On {_where(where)}: above the dotted line the soup is better than '
          'the ensemble.',
      ),
  ]


def diagnosis_sections(report: Config) -> list[Section]:
  """What is wrong, and what to do; empty without a diagnosis.

  Args:
    report: of `jaxsoup.diagnosis.Diagnosis.as_json`.
  """
  if 'verdict' not in report:
    return []
  verdict = report['verdict']
  parts: list[Part] = [
      Labelled(f'{_sentence(verdict["action"])}:', verdict['reason'])
  ]
  if len(verdict['names']) < len(report['names']):
    parts.append(Labelled('Models:', ', '.join(verdict['names'])))
  for finding in report['findings']:
    mark = diagnosis.MARKS[finding['severity']].capitalize()
    parts.append(Labelled(f'{mark}:', finding['title']))
    for label, key in (
        ('Seen', 'seen'),
        ('Meaning', 'meaning'),
        ('Do', 'remedy'),
    ):
      parts.append(Labelled(f'{label}:', finding[key], is_indented=True))
  if not report['findings']:
    parts.append('No problems found.')
  parts += [Labelled('Not tested:', text) for text in report['untested']]
  if verdict['command']:
    parts.append(Code(verdict['command']))
  barriers = np.array(report['measured'].get('barriers', []), float)
  if barriers.size and np.isfinite(barriers).all(where=_off_diagonal(barriers)):
    parts.append(_barrier_map(barriers, report['names']))
  records = [
      {k: finding[k] for k in ('severity', 'code', 'title', 'seen')}
      | {'models': ' '.join(finding['names'])}
      for finding in report['findings']
  ]
  data = {'findings': records} if records else {}
  return [Section('Diagnosis', parts, data)]


def _off_diagonal(matrix: np.ndarray) -> np.ndarray:
  return ~np.eye(len(matrix), dtype=bool)


def _barrier_map(barriers: np.ndarray, names: Sequence[str]) -> Picture:
  names = [pathlib.PurePath(name).name for name in names]
  largest = 100 * barriers[_off_diagonal(barriers)].max()
  text = (
      'How far the held-out score of the average of two models is below the '
      f'mean of their scores, in points; the largest is {largest:.1f}.'
  )
  return Picture(
      'barrier_map',
      lambda ax: _landscapes.matrix(
          ax, 100 * barriers, names, label='drop (points)', fmt='.1f'
      ),
      f'Heat map. {text}',
      text,
      (4.8, 4.2),
  )


def _sentence(text: str) -> str:
  return text[:1].upper() + text[1:]
