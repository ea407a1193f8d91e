"""How far each ingredient went, and where to: task vectors of one family."""

from collections.abc import Iterator
from collections.abc import Sequence
import itertools

import numpy as np

from jaxsoup import _tree
from jaxsoup.diagnosis import _findings
from jaxsoup.diagnosis import _geometry
from jaxsoup.diagnosis import _pool
from jaxsoup.typing import Json

Finding = _findings.Finding

# Lengths of task vectors, as multiples of the median.
_FAR, _NEAR = 4.0, 0.02
# Deviations from the median length, on a log scale: sweeps span decades.
_LARGEST_DEVIATION = 3.5
# Distance of two copies of one run, as a share of that to any other.
_COPIES = 0.35
# Rounding errors, as a share of the task vector.
_ROUNDING = 0.3


def examine(
    pool: _pool.Pool, geometry: _geometry.Geometry, members: Sequence[int]
) -> list[Finding]:
  """Findings on ingredients that come from one start, not ranked."""
  if len(members) < 2:
    return []
  tasks, distances, cosines = _lengths(geometry)
  rounding = list(_rounded(pool, geometry, members, tasks))
  findings = _outliers(pool, geometry, members, tasks)
  frozen = _frozen(pool, geometry, members)
  # Linear probes are near to each other.
  probes = [set(f.ingredients) for f in frozen if f.code == 'partly_frozen']
  rows = [i for i, k in enumerate(members) if not any(k in p for p in probes)]
  findings += _copies(
      pool,
      [members[i] for i in rows],
      distances[np.ix_(rows, rows)],
      cosines[np.ix_(rows, rows)],
  )
  return findings + (rounding or frozen)


def fill(
    measured: Json,
    geometry: _geometry.Geometry,
    members: Sequence[int],
) -> None:
  """Writes lengths, distances and cosines where they belong."""
  tasks, distances, cosines = _lengths(geometry)
  measured['norms'][list(members)] = tasks
  block = np.ix_(members, members)
  measured['distances'][block] = distances
  measured['cosines'][block] = cosines


def _lengths(geometry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Of task vectors the lengths and cosines, and distances of their ends.

  Without theta_0 lengths are estimates, and cosines NaN.
  """
  squares = geometry.squares()[geometry.trained]
  distances = np.sqrt(squares[:, :-1, :-1].sum(0))
  known = geometry.has_start[geometry.trained]
  if not known.any():
    tasks = _geometry.lengths(distances)
    return tasks, distances, np.full_like(distances, np.nan)
  squares = squares[known].sum(0)
  tasks = np.sqrt(squares[:-1, -1])
  # The law of cosines.
  inner = (tasks[:, None] ** 2 + tasks**2 - squares[:-1, :-1]) / 2
  with np.errstate(divide='ignore', invalid='ignore'):
    return tasks, distances, np.clip(inner / tasks[:, None] / tasks, -1, 1)


def unmoved(pool: _pool.Pool, ks: tuple[int, ...], seen: str) -> Finding:
  """Ingredients that are still the initialization."""
  return Finding(
      severity='warning',
      code='unmoved',
      title='Not fine-tuned',
      seen=seen,
      meaning='They are (almost) the initialization, and pull the soup back '
      'to it.',
      remedy=f'Leave out {pool.listed(ks)}. Perhaps the initial checkpoint is '
      'among the runs, or the learning rate was far too small. To average '
      'theta_0 and a soup, use WiSE-FT: jaxsoup.interpolate.',
      ingredients=ks,
      leave_out=ks,
  )


def _outliers(pool, geometry, members, tasks) -> list[Finding]:
  """Those that went much further than the others, or hardly at all."""
  if len(members) < 3 or not np.median(tasks) > 0:
    return []
  findings = []
  share = tasks / np.median(tasks)
  hardly = tuple(members[i] for i in np.flatnonzero(share < _NEAR))
  if hardly and geometry.has_start.any():
    findings.append(
        unmoved(
            pool,
            hardly,
            f'The task vector of {pool.listed(hardly)} has at most '
            f'{100 * share[share < _NEAR].max():.1g} % of the median length.',
        )
    )
  far = [i for i in np.flatnonzero(share > _FAR) if _deviation(tasks)[i]]
  if far:
    findings.append(_far(pool, geometry, members, share, far))
  return findings


def _deviation(tasks: np.ndarray) -> np.ndarray:
  """Which lengths lie outside of what the pool spans, [K] bool."""
  with np.errstate(divide='ignore'):
    logs = np.log(tasks)
  away = logs - np.median(logs)
  spread = max(1.4826 * np.median(np.abs(away)), 0.15)
  return away > _LARGEST_DEVIATION * spread


def _far(pool, geometry, members, share, far) -> Finding:
  ks = tuple(members[i] for i in far)
  rates = rates_text(pool, ks, [k for k in members if k not in ks])
  return Finding(
      severity='warning',
      code='far',
      title='Moved much further than the others',
      seen=f'The task vector of {pool.listed(ks)} is '
      f'{share[far].min():.0f} times as long as the median one.{rates}',
      meaning='Such a run has left the basin of the others, and its large '
      'weights dominate the average.',
      remedy=f'Leave out {pool.listed(ks)}, or let a greedy soup choose. Lower '
      'the learning rate.',
      ingredients=ks,
      leave_out=ks,
  )


def rates_text(
    pool: _pool.Pool, ks: Sequence[int], others: Sequence[int]
) -> str:
  """The learning rates of some and of others, where runs carry them."""
  configs = [[pool.configs[k] for k in group] for group in (ks, others)]
  if not all(
      group and all(c.get('learning_rate') is not None for c in group)
      for group in configs
  ):
    return ''
  mine, theirs = ([c['learning_rate'] for c in group] for group in configs)
  return f' Learning rate: {_range(mine)}; of the others: {_range(theirs)}.'


def _range(values: Sequence[float]) -> str:
  low, high = min(values), max(values)
  return f'{low:.2g}' if low == high else f'{low:.2g} to {high:.2g}'


def _copies(pool, members, distances, cosines) -> list[Finding]:
  """Moving averages among runs, or several checkpoints of one run."""
  said = {k: pool.copies[k] for k in members if pool.copies[k] is not None}
  raw = tuple(k for k, name in said.items() if not name)
  kept = tuple(k for k, name in said.items() if name)
  if raw and kept:
    return [
        _mixed(
            pool,
            kept,
            f'By their metadata, copies of a run are {pool.listed(kept)} '
            f'({", ".join(sorted({str(said[k]) for k in kept}))}); runs '
            f'themselves are {pool.listed(raw)}.',
        )
    ]
  is_known = np.isfinite(cosines).all()
  pairs = (
      _close_by_angle(cosines) if is_known else _close_by_distance(distances)
  )
  if not pairs:
    return []
  i, j = pairs[0]
  if is_known:
    how = (
        'moved in almost the same direction (cosine of the task vectors '
        f'{cosines[i, j]:.2f}, median of all pairs {_median(cosines):.2f})'
    )
  else:
    others = [k for k in range(len(members)) if k not in (i, j)]
    how = (
        f'are {distances[i, j]:.2g} apart, and at least '
        f'{distances[[i, j]][:, others].min():.2g} from all others'
    )
  more = f', and {len(pairs) - 1} more pairs' if len(pairs) > 1 else ''
  return [
      _mixed(
          pool,
          tuple(sorted({members[x] for pair in pairs for x in pair})),
          f'{pool.names[members[i]]} and {pool.names[members[j]]} {how}{more}.',
      )
  ]


def _mixed(pool, ks, seen) -> Finding:
  return Finding(
      severity='warning',
      code='copies',
      title='Several copies of one run, or averaged and raw weights mixed',
      seen=seen,
      meaning='A moving average and its run are nearly the same model, which '
      'then counts twice; and averaged weights are closer to the start than '
      'raw ones.',
      remedy='Use one copy of each run, of the same kind for all: only the '
      'moving averages, or only the last checkpoints.',
      ingredients=ks,
  )


def _close_by_angle(cosines: np.ndarray) -> list[tuple[int, int]]:
  """Pairs that are much nearer to each other than pairs are."""
  if len(cosines) < 3:
    return []
  limit = 1 - 0.2 * (1 - _median(cosines))
  upper = np.triu(cosines, 1)
  rows = np.argwhere(upper > max(limit, 0.85))
  return sorted(
      ((int(i), int(j)) for i, j in rows), key=lambda pair: -upper[pair]
  )


def _close_by_distance(distances: np.ndarray) -> list[tuple[int, int]]:
  """The same without theta_0: pairs far nearer to each other than to the rest.

  Angles at an estimated start would not do: runs that went less far than others
  seem to have gone one way.
  """
  num = len(distances)
  if num < 3:
    return []
  pairs = []
  for i, j in itertools.combinations(range(num), 2):
    others = [k for k in range(num) if k not in (i, j)]
    if distances[i, j] < _COPIES * distances[[i, j]][:, others].min():
      pairs.append((i, j))
  return sorted(pairs, key=lambda pair: distances[pair])


def _median(cosines: np.ndarray) -> float:
  return float(np.median(cosines[np.triu_indices(len(cosines), 1)]))


def _rounded(pool, geometry, members, tasks) -> Iterator[Finding]:
  """Rounding errors that are as large as what fine-tuning moved."""
  errors = np.sqrt((geometry.rounding()[geometry.trained] ** 2).sum(0))
  with np.errstate(divide='ignore', invalid='ignore'):
    share = np.where(tasks > 0, errors / tasks, np.inf)
  if np.median(share) < _ROUNDING:
    return
  still = geometry.same[geometry.trained]
  num_still = int((still == still[:, :1]).all(1).sum())
  bits = {2.0**-7: 'bfloat16', 2.0**-10: 'float16'}
  held = bits.get(float(np.median(geometry.eps)), 'their dtype')
  ks = tuple(k for k, x in zip(members, share) if x >= _ROUNDING)
  yield Finding(
      severity='warning',
      code='rounding',
      title=f'Rounding to {held} is as large as the task vectors',
      seen=f'The rounding error is {100 * np.median(share):.0f} % of the '
      'task vector (median)'
      + (
          f'; {num_still} of {len(still)} leaves are equal in all.'
          if num_still
          else '.'
      ),
      meaning='The difference between ingredients is mostly rounding, and '
      f'a soup that is stored in {held} is rounded again.',
      remedy='Save runs in float32 (the master weights of the optimizer). '
      'For these runs: cast the ingredients to float32 before souping, and '
      'keep the soup in float32 as long as possible.',
      ingredients=ks,
  )


def _frozen(pool, geometry, members) -> list[Finding]:
  """Leaves that no ingredient moved, or only some did."""
  same = geometry.same
  all_still = (same == same[:, :1]).all(1) & geometry.trained
  known = geometry.has_start
  all_still &= ~known | geometry.is_start.all(1)
  findings = []
  if all_still.any():
    findings.append(
        _still(
            geometry,
            np.flatnonzero(all_still),
            (),
            'are equal in all ingredients',
            'They were frozen, or got no gradient. Averages leave them as '
            'they are.',
            'Nothing, if this is intended. Otherwise check the mask of the '
            'optimizer, and look for parts that the loss does not use.',
        )
    )
  groups = _parts_still(geometry)
  if groups:
    ks, leaves = max(groups.items(), key=lambda x: geometry.sizes[x[1]].sum())
    ks = tuple(members[i] for i in ks)
    findings.append(
        _still(
            geometry,
            leaves,
            ks,
            f'did not change in {pool.listed(ks)}, but in the others',
            'Runs that train only a part (such as a linear probe) are mixed '
            'with runs that train everything.',
            'This can work. Compare with a soup of each kind alone.',
        )
    )
  return findings


def _parts_still(geometry) -> dict[tuple[int, ...], list[int]]:
  """Leaves that several ingredients, but not all, have in common."""
  groups: dict[tuple[int, ...], list[int]] = {}
  for leaf in np.flatnonzero(geometry.trained).tolist():
    labels, counts = np.unique(geometry.same[leaf], return_counts=True)
    common = geometry.same[leaf] == labels[counts.argmax()]
    if geometry.has_start[leaf] and geometry.is_start[leaf].any():
      common = geometry.is_start[leaf]
    elif counts.max() < 2:
      continue
    if not common.all():
      groups.setdefault(tuple(np.flatnonzero(common)), []).append(leaf)
  return groups


def _still(geometry, leaves, ks, seen, meaning, remedy) -> Finding:
  names = [_tree.name_of(geometry.paths[i]) for i in leaves]
  share = 100 * geometry.sizes[leaves].sum() / geometry.sizes.sum()
  shown = _findings.listed(names, range(len(names)), 3)
  return Finding(
      severity='note',
      code='partly_frozen' if ks else 'frozen',
      title='Parts that only some runs trained'
      if ks
      else 'Parts that no run changed',
      seen=f'{len(names)} of {len(geometry.paths)} leaves ({share:.2g} % of '
      f'the parameters) {seen}: {shown}.',
      meaning=meaning,
      remedy=remedy,
      ingredients=ks,
      leaves=tuple(names),
  )
