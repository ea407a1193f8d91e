"""Sections of a page, from numbers that are already computed.

```
sections = [
    table_section(rows),
    models_section(rows, settings),
    *scatter_sections(rows),
    *setting_sections(rows, settings),
]
```
"""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import functools

import numpy as np

from jaxsoup._soup import AtMost
from jaxsoup._soup import SearchInfo
from jaxsoup.report import _plots
from jaxsoup.report import _rows
from jaxsoup.report import _tables
from jaxsoup.report._page import Part
from jaxsoup.report._page import Picture
from jaxsoup.report._page import Section
from jaxsoup.report._page import Strong
from jaxsoup.report._page import Table
from jaxsoup.report._rows import Row
from jaxsoup.typing import Config
from jaxsoup.typing import Nested

Settings = Sequence[Config]


def table_section(
    rows: Sequence[Row],
    *,
    settings: Settings = (),
    summary: Sequence[Sequence[Row]] = (),
    sets: Mapping[str, Mapping[str, int]] | None = None,
) -> Section:
  """The table of the paper, and what is significant in it.

  `settings` are the hyper-parameters of each row, for the file of all models;
  `summary` the means and deviations of `mean_rows` over the splits, where the
  held-out set was drawn several times.
  """
  shown, deviations = summary or (_rows.summary(rows), None)
  header, body = _tables.cells(shown, deviations, bold=Strong)
  legend = _tables.legend(shown, sets, bold='bold')
  if not any(row.gains for row in shown):
    legend.insert(0, f'Scores: {rows[0].metric}, in per cent.')
  if deviations:
    legend.insert(0, 'Means ± deviations over splits.')
  settings = settings or [{}] * len(rows)
  return Section(
      'Scores',
      [*_findings(shown), *_twice(rows), Table(header, body), *legend],
      {
          'summary': [_record(row) for row in shown],
          'models': [_record(row, x) for row, x in zip(rows, settings)],
      },
  )


def _findings(shown: Sequence[Row]) -> list[str]:
  """Who is significantly better than the best single model, in words."""
  sentences = []
  for key, where in (('test', 'On test data'), ('shifts', 'On the shifts')):
    gains = [(row.name, row.gains[key]) for row in shown if key in row.gains]
    sure = [(name, x.gain) for name, x in gains if x.is_significant]
    better = [name for name, gain in sure if gain > 0]
    worse = [name for name, gain in sure if gain < 0]
    if gains:
      text = f'{where}, significantly better than the best single model: '
      text += f'{_listed(better)}.'
      sentences.append(text + (f' Worse: {_listed(worse)}.' if worse else ''))
  return sentences


def _twice(rows: Sequence[Row]) -> list[str]:
  """Single models that are perhaps one, given more than once."""
  names: dict[tuple[float, ...], list[str]] = {}
  for row in _rows.singles(rows):
    key = (row.held_out, row.test, *row.shifts.values())
    names.setdefault(key, []).append(row.name)
  return [
      f'Equal scores on all {len(key)} data sets: {_listed(x)}. If that is one '
      f'model, it counts {len(x)} times.'
      for key, x in names.items()
      if len(x) > 1
  ]


def models_section(rows: Sequence[Row], settings: Settings) -> Section:
  """All scores and hyper-parameters of every model; `Picture.points`."""
  header, body = _tables.cells(
      [row._replace(gains={}) for row in rows], None, bold=str
  )
  shifts = list(dict.fromkeys(name for row in rows for name in row.shifts))
  _, names = singles_with(settings, rows)
  text = lambda x: f'{x:.4g}' if isinstance(x, float) else str(x)
  percent = lambda x: '' if x is None or np.isnan(x) else f'{100 * x:.1f}'
  lines = [
      [
          *cells[:1], row.kind, *(x.replace('nan', '') for x in cells[1:]),
          *(percent(row.shifts.get(name)) for name in shifts),
          *(text(setting.get(name, '')) for name in names),
      ]
      for row, setting, cells in zip(rows, settings, body)
  ]  # fmt: skip
  header = ['model', 'kind', *header[1:], *shifts, *names]
  legend = f'Scores: {rows[0].metric}, in per cent.'
  return Section('All models', [legend, Table(header, lines, has_models=True)])


def models_of(rows: Sequence[Row]) -> list[int]:
  """The row of each single model: of ingredient k the k-th."""
  return [i for i, row in enumerate(rows) if row.kind == 'single']


def _listed(names: Sequence[str]) -> str:
  return ', '.join(names) if names else 'none'


def _record(row: Row, setting: Config | None = None):
  """A row as `read_scores` reads it."""
  record = row._asdict()
  gains, shifts = record.pop('gains'), record.pop('shifts')
  record |= {f'shifts.{name}': score for name, score in shifts.items()}
  record |= {f'config.{name}': x for name, x in (setting or {}).items()}
  for key, gain in gains.items():
    parts = ('gain', 'low', 'high', 'p_value')
    record |= {f'gains.{key}.{part}': getattr(gain, part) for part in parts}
  return record


def scatter_sections(rows: Sequence[Row]) -> list[Section]:
  """Test against shifts; empty without shifted data."""
  if not np.isfinite([row.mean_shift for row in rows]).any():
    return []
  fit = _plots.line_fit(rows)
  singles = _rows.singles(rows)
  others = [row for row in rows if row.kind != 'single']
  alt = f'Scatter of the mean of shifts against test {rows[0].metric}. ' + (
      f'{len(singles)} single models: test {_range(r.test for r in singles)}, '
      f'shifts {_range(r.mean_shift for r in singles)}. '
      if singles
      else ''
  )
  alt += ' '.join(
      f'{row.name}: {_percent(row.test)}, {_percent(row.mean_shift)}.'
      for row in others
  )
  caption = 'Each point is a model; right and up is better.'
  if fit is not None:
    slope, _, r_squared = fit
    caption += (
        ' The line is fitted to the single models: '
        f'R² = {r_squared:.2f}, slope {slope:.2f}.'
    )
  picture = Picture(
      'test_against_shifts',
      lambda ax: _plots.figure_1(ax, rows),
      alt,
      caption,
      (4.8, 4.6),
      [(i, 100 * r.test, 100 * r.mean_shift) for i, r in enumerate(rows)],
  )
  return [Section('Test and shifted data', [picture])]


def trial_sections(
    infos: Mapping[str, SearchInfo],
    *,
    label: str,
    scale: float = 100,
    models: Sequence[int] = (),
) -> list[Section]:
  """What the searches tried; empty without searches; `models_of` the rows."""
  if not infos:
    return []
  pictures, records = [], []
  for name, info in infos.items():
    num = len(info.accepted)
    text = (
        f'{name}: {len(info.trials)} trials, '
        f'{sum(trial.accepted for trial in info.trials)} accepted; the soup '
        f'has {num} model{"s" * (num != 1)} and a held-out score of '
        f'{info.score * scale:.4g}.'
    )
    accepted = [info.scores[t.members] for t in info.trials if t.accepted]
    reached = max(accepted, default=-np.inf)
    if info.score > reached:
      text += ' It is the best single model: no trial scored as high.'
    if info.stale:
      text += (
          f' Workers had begun {info.stale} more, which a change of the soup '
          'made useless.'
      )
    pictures.append(
        Picture(
            f'trials_{_file(name)}',
            functools.partial(
                _plots.trials, infos={name: info}, label=label, scale=scale
            ),
            f'Held-out score against trial. {text}',
            text,
            points=[
                (models[t.ingredient], i, scale * _plots.height(t.score))
                for i, t in enumerate(info.trials, 1)
                if t.ingredient < len(models)
            ],
        )
    )
    records += [
        {
            'soup': name,
            'trial': i,
            'ingredient': trial.ingredient,
            # A score and a bound stand in different columns.
            'score': None if isinstance(trial.score, AtMost) else trial.score,
            'at_most': getattr(trial.score, 'bound', None),
            'accepted': trial.accepted,
        }
        for i, trial in enumerate(info.trials, 1)
    ]
  return [Section('Trials of the searches', pictures, {'trials': records})]


def alpha_sections(
    alphas: Mapping[str, Nested], models: Sequence[int] = ()
) -> list[Section]:
  """The mixing coefficients of each soup; empty without soups."""
  if not alphas:
    return []
  by_path = {name: _paths(alpha) for name, alpha in alphas.items()}
  means = {
      name: np.mean(list(tensors.values()), axis=0)
      for name, tensors in by_path.items()
  }
  header = ['soup', 'models', 'effective number', 'sum']
  body = []
  for name, alpha in means.items():
    effective = alpha.sum() ** 2 / np.square(alpha).sum()
    numbers = np.count_nonzero(alpha), f'{effective:.1f}', f'{alpha.sum():.3f}'
    body.append([name, *map(str, numbers)])
  pictures = [
      Picture(
          'alpha',
          lambda ax: _plots.alphas(ax, means),
          'Bars of the mixing coefficients. '
          + ' '.join(f'{n}: {_largest(a)}.' for n, a in means.items()),
          'Mixing coefficients of each model; each row has its own scale. '
          'Where every tensor has its own coefficients, their mean.',
          (4.8, 0.9 + 0.5 * len(means)),
          [
              (model, k, i + 0.1)
              for i in range(len(means))
              for k, model in enumerate(models)
          ],
      )
  ]
  for name, tensors in by_path.items():
    values = np.array(list(tensors.values()))
    # Where all models have the same coefficients there is nothing to show.
    if len(tensors) > 1 and np.ptp(values, axis=1).max() > 1e-6:
      pictures.append(_alpha_map(name, list(tensors), values))
  records = [
      {'soup': name, 'tensor': path, 'model': k, 'alpha': float(x)}
      for name, tensors in by_path.items()
      for path, alpha in tensors.items()
      for k, x in enumerate(alpha)
  ]
  legend = (
      'Effective number: (Σα)² / Σα², the number of equally weighted models '
      'with that concentration. Where the sum is below one, the rest is the '
      'initialization.'
  )
  parts: list[Part] = [Table(header, body), legend, *pictures]
  return [Section('Mixing coefficients', parts, {'alpha': records})]


def _alpha_map(name: str, paths: list[str], values: np.ndarray) -> Picture:
  spread = np.ptp(values, axis=1)
  most = int(spread.argmax())
  text = (
      f'{name}: {len(paths)} tensors (rows) and {values.shape[1]} models '
      f'(columns); alpha from {values.min():.2g} to {values.max():.2g}. It '
      f'differs most between models in {paths[most]}.'
  )
  return Picture(
      f'alpha_{_file(name)}',
      lambda ax: _plots.alpha_map(ax, paths, values),
      f'Heat map of mixing coefficients. {text}',
      text,
      (4.8, 4.2),
  )


def _paths(tree: Nested, prefix: str = '') -> dict[str, np.ndarray]:
  if not isinstance(tree, Mapping):
    return {prefix.rstrip('/'): np.asarray(tree, float)}
  return {
      path: alpha
      for key, child in tree.items()
      for path, alpha in _paths(child, f'{prefix}{key}/').items()
  }


def _largest(alpha: np.ndarray, num: int = 3) -> str:
  order = np.argsort(-alpha, kind='stable')[:num]
  return 'most of ' + ', '.join(f'{k} ({alpha[k]:.2g})' for k in order)


def calibration_sections(curves: Mapping[str, Config]) -> list[Section]:
  """Whether models are calibrated; empty without `metrics.Reliability`."""
  if not curves:
    return []
  body = []
  for name, curve in curves.items():
    confidence, accuracy = np.array(curve['confidence']), curve['accuracy']
    gap = np.abs(confidence - accuracy)
    means = np.average([confidence, accuracy, gap], 1, curve['num'])
    body.append([name, *(f'{100 * x:.1f}' for x in means)])
  alt = 'Reliability diagram. Mean confidence and accuracy: ' + (
      '; '.join(f'{line[0]} {line[1]} %, {line[2]} %' for line in body)
  )
  num_bins = len(next(iter(curves.values()))['num'])
  parts: list[Part] = [
      Table(['', 'confidence', 'accuracy', 'ECE'], body),
      'In per cent, on test data.',
      Picture(
          'calibration',
          lambda ax: _plots.reliability(ax, curves),
          f'{alt}.',
          f'{num_bins} bins with equal numbers of examples. Below the dashed '
          'line a model is overconfident, above it underconfident.',
          (4.8, 4.6),
      ),
  ]
  records = [
      {'model': name, 'bin': b, **{k: v[b] for k, v in curve.items()}}
      for name, curve in curves.items()
      for b in range(len(curve['num']))
  ]
  return [Section('Calibration', parts, {'calibration': records})]


def setting_sections(
    rows: Sequence[Row],
    settings: Settings,
    *,
    chosen: Sequence[int] = (),
) -> list[Section]:
  """Hyper-parameters against scores; empty if none of them varies.

  `chosen` are places among the singles of those that the greedy soup took.
  """
  pairs, names = singles_with(settings, rows)
  pictures: list[Picture] = []
  for name in names:
    known = [
        (setting[name], row, model, k in chosen)
        for k, ((row, setting), model) in enumerate(zip(pairs, models_of(rows)))
        if name in setting
    ]
    # A seed is a name, not a quantity.
    if name != 'seed' and len({str(value) for value, *_ in known}) > 1:
      picture = _setting(name, *zip(*known))
      if picture.name in [x.name for x in pictures]:  # Of `lr` and `LR`.
        picture = picture._replace(name=f'{picture.name}_{len(pictures)}')
      pictures.append(picture)
  if not pictures:
    return []
  text = 'Each circle is a model.'
  if chosen:
    text += ' Filled circles are in the greedy soup.'
  return [Section('Hyper-parameters', [text, *pictures])]


def singles_with(
    settings: Settings, rows: Sequence[Row]
) -> tuple[list[tuple[Row, Config]], list[str]]:
  """Single models with their hyper-parameters, and the names of all those."""
  pairs = [pair for pair in zip(rows, settings) if pair[0].kind == 'single']
  return pairs, list(dict.fromkeys(name for _, x in pairs for name in x))


def _setting(name, values, rows, models, is_chosen) -> Picture:
  chosen = np.flatnonzero(is_chosen).tolist()
  scores = [row.held_out for row in rows]
  best = int(np.argmax(scores))
  percents, height = [100 * score for score in scores], 3.2
  if _plots.is_numeric(values):
    span = f'from {min(values):.3g} to {max(values):.3g}'
    points = list(zip(models, values, percents))
  else:
    kinds = sorted(set(map(str, values)))
    span = _listed(kinds)
    height = 1.2 + 0.2 * min(len(kinds), 60)
    rows_of = [kinds.index(str(value)) for value in values]
    points = list(zip(models, percents, rows_of))
  shown = values[best]
  shown = f'{shown:.3g}' if _plots.is_numeric([shown]) else str(shown)
  label = f'held-out {rows[0].metric} (%)'
  return Picture(
      f'setting_{_file(name)}',
      lambda ax: _plots.against(ax, name, values, scores, chosen, label=label),
      f'Held-out {rows[0].metric} against {name}, {span}. The best of '
      f'{len(rows)} models, at {shown}, scores {_percent(scores[best])}.',
      size=(4.8, height),
      points=points,
  )


def stability_sections(searches: Mapping[str, Config]) -> list[Section]:
  """How stable the choice of each search is; empty without resamples."""
  return [_stability_section(*search) for search in searches.items()]


def _stability_section(name: str, stable: Config) -> Section:
  frequency, chosen = stable['frequency'], stable['chosen']
  sizes = np.asarray(stable['sizes'])
  text = (
      f'The {name} chooses models {", ".join(map(str, chosen))}. On '
      f'{len(sizes)} resamples of the held-out set it chooses {sizes.min()} to '
      f'{sizes.max()} models (mean {sizes.mean():.1f}); the overlap with that '
      f'choice is {stable["overlap"]:.2f} (mean Jaccard index: 1 if the choice '
      'never changes).'
  )
  often = [str(k) for k, x in enumerate(frequency) if x >= 0.5]
  file = f'stability_{_file(name)}'
  picture = Picture(
      file,
      lambda ax: _plots.frequencies(ax, frequency, chosen),
      'Bars: how many resamples choose each model. At least half choose '
      f'{_listed(often)}.',
  )
  records = [
      {'model': k, 'frequency': x, 'chosen': k in chosen}
      for k, x in enumerate(frequency)
  ]
  return Section(f'Stability: {name}', [text, picture], {file: records})


def _file(name: str) -> str:
  return ''.join(c if c.isalnum() else '_' for c in name.lower())


def _percent(value: float) -> str:
  return f'{100 * value:.1f} %'


def _range(values: Iterable[float]) -> str:
  values = list(values)
  return f'{100 * min(values):.1f} to {100 * max(values):.1f} %'
