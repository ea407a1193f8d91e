"""What the scores say about the findings, and what else they show."""

from collections.abc import Iterator
from collections.abc import Sequence

import numpy as np

from jaxsoup import studies
from jaxsoup.diagnosis import _findings
from jaxsoup.diagnosis import _motion
from jaxsoup.diagnosis import _pool
from jaxsoup.diagnosis import _trials

Finding = _findings.Finding

# Share of examples that two models predict differently; below it there is
# little to gain.
_ALIKE = 0.005
# Findings that barriers may confirm.
_CONFIRMED = ('initialization', 'permuted', 'part', 'far', 'unmoved')


def with_data(
    pool: _pool.Pool,
    findings: Sequence[Finding],
    sound: Sequence[int],
    measured: _trials.Measured,
    tolerance: float,
) -> list[Finding]:
  """Findings with what the data say, and those that only data show."""
  findings = [_confirmed(f, sound, measured, tolerance) for f in findings]
  findings = [
      _with_statistics(f, measured, tolerance) if f.code == 'batch_norm' else f
      for f in findings
  ]
  findings += _weak(pool, sound, measured)
  findings += _barriers(pool, sound, measured, tolerance)
  findings += _alike(sound, measured)
  return _with_part(pool, findings, measured, tolerance)


def _confirmed(finding, sound, measured, tolerance) -> Finding:
  """A finding with the scores of those it leaves out."""
  ks = list(finding.leave_out)
  if finding.code not in _CONFIRMED or not ks:
    return finding
  others = [k for k in sound if k not in ks] or ks
  drops = measured.drops[np.ix_(ks, others)]
  if not np.isfinite(drops).any():
    return finding
  drop = np.nanmax(drops)
  bar = np.median(measured.scores[others]) - _trials.WEAK * tolerance
  seen = f'{finding.seen} On the data: {_scores_text(measured, ks)}, '
  if drop > tolerance:
    seen += (
        f'and half-way to another ingredient the score is up to {drop:.3g} '
        'below the mean of the two.'
    )
    return finding._replace(seen=seen, severity='error')
  if np.nanmax(measured.scores[ks]) < bar:
    # Half-way between a good model and one at chance, the chord is low.
    return finding._replace(seen=f'{seen}much worse than the others.')
  return finding._replace(seen=f'{seen}and no barrier to the others.')


def _scores_text(measured, ks: Sequence[int]) -> str:
  scores = measured.scores[list(ks)]
  known = scores[np.isfinite(scores)]
  low, high = known.min(), known.max()
  text = f'{low:.3g}' if low == high else f'{low:.3g} to {high:.3g}'
  return f'score {text} (median of all {np.nanmedian(measured.scores):.3g})'


def _with_statistics(finding, measured, tolerance) -> Finding:
  scores = measured.statistics
  if not scores:
    return finding
  shown = ', '.join(f'{name} {x:.3g}' for name, x in scores.items())
  seen = f'{finding.seen} Score of the soup by its statistics: {shown}.'
  best = max(scores, key=lambda name: scores[name])
  if scores[best] - scores['averaged'] > tolerance:
    return finding._replace(
        severity='warning',
        seen=seen,
        remedy=f'Use the {best} statistics. {finding.remedy}',
    )
  return finding._replace(seen=seen)


def _weak(pool, sound, measured) -> Iterator[Finding]:
  if not measured.weak:
    return
  ks = tuple(measured.weak)
  rates = _motion.rates_text(pool, ks, [k for k in sound if k not in ks])
  yield Finding(
      severity='warning',
      code='weak',
      title='Much worse than the others',
      seen=f'{pool.listed(ks)}: {_scores_text(measured, ks)}.{rates}',
      meaning='A uniform soup averages all, and these lower its score.',
      remedy=f'Leave out {pool.listed(ks)}, or let a greedy soup choose.',
      ingredients=ks,
      leave_out=ks,
  )


def _barriers(pool, sound, measured, tolerance) -> Iterator[Finding]:
  """Barriers between ingredients without another problem."""
  rest = [k for k in sound if k not in measured.weak]
  out = tuple(k for k in rest if k not in measured.subset)
  fall = np.nan
  if len(measured.subset) > 1:
    fall = measured.scores[measured.subset].mean() - measured.soup
  if not out and not fall > tolerance:
    return
  drops = measured.drops[np.ix_(rest, rest)]
  pairs = np.argwhere(np.triu(drops > tolerance, 1))
  known = int(
      np.isfinite(np.triu(drops, 1)[np.triu_indices(len(rest), 1)]).sum()
  )
  if len(pairs):
    i, j = np.unravel_index(np.nanargmax(drops), drops.shape)
    seen = (
        f'Half-way between two, the score is more than {tolerance:.3g} below '
        f'their mean in {len(pairs)} of {known} pairs. The largest drop, '
        f'{drops[i, j]:.3g}, is between {pool.names[rest[i]]} and '
        f'{pool.names[rest[j]]}.'
    )
  elif out:
    seen = (
        f'Half-way from {pool.listed(out)} to the mean of the others, the '
        f'score drops by up to {measured.to_mean[list(out)].max():.3g}.'
    )
  else:
    seen = (
        f'The soup scores {measured.soup:.3g}, {fall:.3g} below the mean of '
        'its ingredients, although no pair has a barrier.'
    )
  worst = np.nanmax([*drops.flat, *measured.to_mean, fall])
  is_high = worst > _trials.WEAK * tolerance
  if not is_high:
    seen += ' This is small: with few examples it may be noise.'
  yield Finding(
      severity='error' if is_high else 'warning',
      code='barrier',
      title='There are barriers between ingredients',
      seen=seen + _rates(pool, rest, out, measured),
      meaning='They lie in different basins: models between them, such as '
      'their average, are bad.',
      remedy=(
          f'Leave out {pool.listed(out)}. '
          if out
          else 'Let a greedy soup choose some of them. '
      )
      + 'For the next sweep: smaller learning rates, fewer epochs, or a '
      'better initialization.',
      ingredients=out,
      leave_out=out,
  )


def _rates(pool, rest, out, measured) -> str:
  text = _motion.rates_text(pool, out, [k for k in rest if k not in out])
  correlation = rate_correlation(pool, measured.drops)
  if text and np.isfinite(correlation):
    text += (
        ' Rank correlation of the learning rate with the mean barrier: '
        f'{correlation:.2f}.'
    )
  return text


def rate_correlation(pool: _pool.Pool, drops: np.ndarray) -> float:
  """Spearman's correlation of learning rates and mean drops, or NaN."""
  rates = [config.get('learning_rate', np.nan) for config in pool.configs]
  known = [
      k
      for k, rate in enumerate(rates)
      if np.isfinite(rate) and np.isfinite(drops[k]).any()
  ]
  if len(known) < 4:
    return np.nan
  means = [np.nanmean(drops[k]) for k in known]
  return studies.rank_correlation([rates[k] for k in known], means)[0]


def _alike(sound, measured) -> Iterator[Finding]:
  apart = measured.disagreement[np.ix_(sound, sound)]
  apart = apart[~np.eye(len(sound), dtype=bool)]
  if not np.isfinite(apart).any() or not np.nanmax(apart) < _ALIKE:
    return
  yield Finding(
      severity='note',
      code='alike',
      title='All ingredients predict almost the same',
      seen=f'No two differ on more than {100 * np.nanmax(apart):.2g} % of '
      'the examples.',
      meaning='Nothing is wrong, but there is little to gain: soups need '
      'models that make different errors.',
      remedy='Vary more between runs: learning rate, augmentation, seed.',
  )


def _with_part(pool, findings, measured, tolerance) -> list[Finding]:
  """Says in the finding on the worst pair which part of it is to blame."""
  if measured.without is None or measured.pair is None:
    return findings
  part, left = measured.without
  if left > tolerance:
    return findings
  i, j = measured.pair
  text = (
      f' Of {pool.names[i]} and {pool.names[j]}, all but {part} can be '
      f'averaged (the drop is then {max(left, 0):.2g} instead of '
      f'{measured.drops[i, j]:.2g}); averaging {part} alone costs '
      f'{measured.parts[part]:.2g}.'
  )
  findings = list(findings)
  order = {f: n for n, f in enumerate((*_CONFIRMED, 'barrier'))}
  known = [
      n
      for n, f in enumerate(findings)
      if f.code in order and (not f.ingredients or {i, j} & set(f.ingredients))
  ]
  if known:
    n = known[0]
    findings[n] = findings[n]._replace(seen=findings[n].seen + text)
  return findings
