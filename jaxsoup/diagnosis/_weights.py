"""Checks of the weights, by inner products of all pairs, leaf by leaf."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import itertools

import numpy as np

from jaxsoup import _tree
from jaxsoup.diagnosis import _case
from jaxsoup.diagnosis import _findings
from jaxsoup.diagnosis import _matches
from jaxsoup.diagnosis import _pool
from jaxsoup.diagnosis._case import Case
from jaxsoup.diagnosis._case import Seen

# What two task vectors have in common beyond what the others span, as a
# correlation. In the pools of `tests/benchmarks/diagnosis.py` (perceptron and
# transformer, seed 0) it was 0.96 to 1.00 for copies of one run, at most 0.79
# for runs that were fine-tuned from each other, at most 0.62 for two seeds.
_COPIES = 0.9
# Runs at a tenth of the usual rate moved 0.2 times as far there: this is a
# choice, well below.
_NEAR = 0.02
# Median deviations of outliers: Iglewicz and Hoaglin 1993, "How to detect and
# handle outliers".
_LARGEST_DEVIATION = 3.5
# Rounding then adds a tenth to the square of a task vector.
_ROUNDING = 0.3


def duplicate(case: Case) -> Iterator[Seen]:
  g = case.geometry
  groups = _case.groups_of((g.squares() == 0).all(-1))
  many = [[g.members[i] for i in group] for group in groups if len(group) > 1]
  if many:
    yield Seen(
        [k for group in many for k in group],
        '; '.join(map(case.pool.listed, many)) + ' have equal weights.',
        keep=[group[0] for group in many],
    )


def is_start(case: Case) -> Iterator[Seen]:
  g = case.geometry
  still = g.where((g.own()[:, g.has_start] == 0).all(1) & g.has_start.any())
  if still:
    yield Seen(still, f'{case.pool.listed(still)} and theta_0 are equal.')


def hardly(case: Case) -> Iterator[Seen]:
  g = case.geometry
  if len(g.members) < 3:
    return
  share = g.lengths() / np.median(g.lengths())
  is_near = share < _NEAR
  if is_near.any():
    ks = g.where(is_near)
    yield Seen(
        ks,
        f'The task vector of {case.pool.listed(ks)} has at most '
        f'{100 * share[is_near].max():.1g} % of the median length.',
    )


def start(case: Case) -> Iterator[Seen]:
  if not case.pool.start or len(case.members) < 2:
    return
  g = case.all_geometry
  sizes = g.sizes * g.matrices * g.has_start
  apart = (case.lost[-1, :-1] * sizes).sum(-1)
  if not sizes.any() or (apart > sizes.sum() / 2).all():
    case.forget_start()
    yield Seen(
        (),
        'The matrices of theta_0 are unrelated to those of all ingredients, or '
        'have other shapes.',
    )


def moments(case: Case) -> Iterator[Seen]:
  for k, text in case.moments.items():
    if k in case.members:
      yield Seen([k], f'{case.pool.names[k]} {text}.')


def match(code: str) -> Callable[[Case], Iterator[Seen]]:
  """A check that leaves are not those of the others, changed in this way."""

  def check(case: Case) -> Iterator[Seen]:
    matches = {
        k: m
        for k, m in case.matches.items()
        if m.code == code and k in case.members
    }
    if matches:
      first = next(iter(matches.values()))
      names = list(map(_tree.name_of, first.paths))
      yield Seen(
          list(matches),
          f'In {case.pool.listed(matches)}, {names[0]} {first.text}. Leaves: '
          f'{_findings.listed(names, 4)}.',
          names,
      )

  return check


def initialization(case: Case) -> Iterator[Seen]:
  families = [[k for k in f if k in case.members] for f in case.families]
  main, *others = filter(None, families)
  ks = [k for family in others for k in family]
  if ks:
    total = case.all_geometry.products.sum(-1)
    i, j = case.row(main[0]), case.row(ks[0])
    cosine = total[i, j] / np.sqrt(total[i, i] * total[j, j])
    shown = '; '.join(map(case.pool.listed, [main, *others][:4]))
    yield Seen(
        ks,
        f'{1 + len(others)} groups with unrelated matrices (cosine of the '
        f'weights {cosine:.2f} between groups): {shown}.',
    )


def part(case: Case) -> Iterator[Seen]:
  g = case.all_geometry
  rows = np.array([case.row(k) for k in case.members])
  apart: dict[tuple[int, ...], list[int]] = {}
  for leaf in np.flatnonzero(case.lost.any((0, 1))):
    groups = _case.groups_of(~case.lost[np.ix_(rows, rows)][..., leaf])
    if g.has_start[leaf]:  # The family of theta_0 is the right one.
      groups.sort(key=lambda group: case.lost[-1, rows[group[0]], leaf])
    outside = tuple(case.members[i] for group in groups[1:] for i in group)
    if outside:
      apart.setdefault(outside, []).append(int(leaf))
  for outside, leaves in apart.items():
    is_apart = np.isin(range(len(g.paths)), leaves)
    names, whose = g.leaf_names(is_apart), case.pool.listed(outside)
    if len(outside) > len(rows) - 2:
      whose = 'every ingredient'
    yield Seen(
        outside,
        f'In {whose}, the values of {_findings.listed(names, 3)} '
        f'({g.share(is_apart)} of the parameters) are unrelated to those of '
        'the others, although the rest comes from one initialization.',
        names,
    )


def rescaled(case: Case) -> Iterator[Seen]:
  g = case.geometry
  if len(g.members) < 3 or case.reference not in g.members:
    return
  row = g.members.index(case.reference)
  norms = g.norms()[:-1].clip(1e-9)
  is_off = (np.sqrt(g.squares()[:, row]) > 3 * case.usual) | (
      np.abs(np.log(norms / norms[row])) > np.log(2)
  )
  for k, off in zip(g.members, is_off):
    if k == case.reference or not off.any() or off.all():
      continue
    paths = [p for p, x in zip(g.paths, off) if x][:24]
    pair = _matches.rescaled(case.read(k), case.read(case.reference), paths)
    if pair:
      p, q = map(_tree.name_of, pair[:2])
      yield Seen(
          [k],
          f'In {case.pool.names[k]} units of {p} are larger or smaller by a '
          f'factor of {pair[2]:.1f} or so, and {q}, which reads them, by its '
          'inverse.',
          [p, q],
      )


def untied(case: Case) -> Iterator[Seen]:
  g = case.geometry
  norms = g.norms()[:-1]
  for a, b in itertools.combinations(np.flatnonzero(g.matrices), 2):
    if g.sizes[a] != g.sizes[b]:
      continue
    is_tied = np.isclose(norms[:, a], norms[:, b], rtol=1e-6)
    is_tied &= norms[:, a] > 0
    out = g.where(~is_tied)
    if not out or len(out) > len(g.members) / 2:
      continue
    x, y = (case.pool.leaf(g.where(is_tied)[0], g.paths[i]) for i in (a, b))
    if any(x.shape == z.shape and (x == z).all() for z in (y, y.T)):
      names = [_tree.name_of(g.paths[i]) for i in (a, b)]
      yield Seen(
          out,
          f'{names[0]} and {names[1]} are equal in the others, and differ in '
          f'{case.pool.listed(out)}.',
          names,
      )


def soup_of_others(case: Case) -> Iterator[Seen]:
  """`theta_k = sum_j a_j theta_j`, by least squares with a >= 0, sum a = 1."""
  from scipy import optimize

  g = case.geometry
  num, total = len(g.members), g.tasks.sum(-1)
  if num < 3:
    return
  values, vectors = np.linalg.eigh(total)
  rows = vectors * np.sqrt(values.clip(0))
  scale = np.sqrt(np.diag(total).max())
  rows = np.concatenate([rows, np.full((num, 1), 10 * scale)], 1)
  rounding, distances = g.rounding(), g.distances()
  for i, k in enumerate(g.members):
    others = np.delete(np.arange(num), i)
    alpha, rest = optimize.nnls(rows[others].T, rows[i])
    noise = _pool.NOISE**0.5 * scale + rounding[i]
    used = [g.members[j] for j, a in zip(others, alpha) if a > 0.01]
    if len(used) > 1 and rest < noise < distances[i, others].min() / 4:
      shown = ', '.join(f'{a:.2f}' for a in alpha if a > 0.01)
      yield Seen(
          [k],
          f'{case.pool.names[k]} is an average of {case.pool.listed(used)}, '
          f'with coefficients {shown}.',
      )


def copies(case: Case) -> Iterator[Seen]:
  said = {
      k: name
      for k, name in enumerate(case.pool.copies)
      if k in case.members and name is not None
  }
  raw = [k for k, name in said.items() if not name]
  kept = [k for k, name in said.items() if name]
  if raw and kept:
    names = ', '.join(sorted({str(said[k]) for k in kept}))
    yield Seen(
        kept,
        f'By their metadata, copies of a run are {case.pool.listed(kept)} '
        f'({names}); runs themselves are {case.pool.listed(raw)}.',
    )
  else:
    yield from _same_direction(case)


def _same_direction(case: Case) -> Iterator[Seen]:
  g = case.geometry
  # Linear probes are near to each other.
  still = g.own() == 0
  probes = (still & ~still.all(0)).any(1)
  g = g.take(np.flatnonzero(~probes))
  if not g.has_start.any() or len(g.members) < 3:
    return
  cosines, lengths = g.cosines(), g.lengths()
  shared = _shared(cosines)
  # Only next to others that went about as far: runs that went less far have
  # more in common.
  alike = np.abs(np.log(lengths[:, None] / lengths)) < np.log(2)
  is_copy = (shared > _COPIES) & (cosines > _COPIES) & (alike.sum(1) > 3)
  if not is_copy.any():
    return
  i, j = np.unravel_index(np.where(is_copy, shared, -1).argmax(), shared.shape)
  longer = i if lengths[i] > lengths[j] else j
  pair = sorted((g.members[i], g.members[j]))
  num = int(np.triu(is_copy | is_copy.T, 1).sum())
  yield Seen(
      pair,
      f'{case.pool.listed(pair)} moved in the same direction (cosine of the '
      f'task vectors {cosines[i, j]:.2f}), also in what the others do not '
      f'share (correlation {shared[i, j]:.2f})'
      + (f', and {num - 1} more pairs.' if num > 1 else '.'),
      keep=[g.members[longer]],
  )


def _shared(cosines: np.ndarray) -> np.ndarray:
  """Partial correlations: of what the others' task vectors do not span."""
  num = len(cosines)
  shared = np.full((num, num), -1.0)
  for i, j in itertools.combinations(range(num), 2):
    rest = np.delete(np.arange(num), [i, j])
    across = cosines[[i, j]][:, rest]
    inverse = np.linalg.pinv(cosines[np.ix_(rest, rest)], rcond=_pool.NOISE)
    left = cosines[[i, j]][:, [i, j]] - across @ inverse @ across.T
    if min(left[0, 0], left[1, 1]) > 0:
      value = left[0, 1] / np.sqrt(left[0, 0] * left[1, 1])
      shared[i, j] = shared[j, i] = value
  return shared


def far(case: Case) -> Iterator[Seen]:
  g = case.geometry
  lengths = g.lengths()
  if len(lengths) < 3 or not np.median(lengths) > 0:
    return
  share = lengths / np.median(lengths)
  with np.errstate(divide='ignore'):
    away = np.log(share)
  # Sweeps span decades: the median deviation, on a log scale.
  spread = 1.4826 * np.median(np.abs(away))
  is_far = (share > _case.FAR) & (away > _LARGEST_DEVIATION * spread)
  if is_far.any():
    ks = g.where(is_far)
    yield Seen(
        ks,
        f'The task vector of {case.pool.listed(ks)} is '
        f'{share[is_far].min():.0f} times as long as the median one.'
        f'{case.rates(ks)}',
    )


def rounding(case: Case) -> Iterator[Seen]:
  g = case.geometry
  if len(g.members) < 2:
    return
  with np.errstate(divide='ignore', invalid='ignore'):
    share = g.rounding() / g.lengths()
  ks = g.where(~(share < _ROUNDING))
  if len(ks) > len(g.members) / 2:
    bits = {2.0**-7: 'bfloat16', 2.0**-10: 'float16'}
    held = bits.get(float(np.median(g.eps)), 'their dtype')
    yield Seen(
        ks,
        f'Stored in {held}, the rounding error is '
        f'{100 * np.median(share):.0f} % of the task vector (median).',
    )


def frozen(case: Case) -> Iterator[Seen]:
  g = case.geometry
  still = (g.squares() == 0).all((0, 1))
  still &= ~g.has_start | (g.own() == 0).all(0)
  if still.any() and len(g.members) > 1:
    yield _still(g, (), still, 'are equal in all ingredients')


def partly_frozen(case: Case) -> Iterator[Seen]:
  g = case.geometry
  groups: dict[tuple[int, ...], list[int]] = {}
  own, squares = g.own(), g.squares()
  for leaf in range(len(g.paths)):
    same = squares[..., leaf] == 0
    common = same[same.sum(1).argmax()]
    is_shared = common.sum() > 1
    if g.has_start[leaf] and not own[:, leaf].all():
      common, is_shared = own[:, leaf] == 0, True
    if is_shared and 0 < common.sum() < len(common):
      groups.setdefault(tuple(g.where(common)), []).append(leaf)
  if groups:
    ks, leaves = max(groups.items(), key=lambda x: g.sizes[x[1]].sum())
    is_still = np.isin(range(len(g.paths)), leaves)
    text = f'did not change in {case.pool.listed(ks)}, but in the others'
    yield _still(g, ks, is_still, text)


def _still(
    g: _pool.Geometry, ks: Sequence[int], is_still: np.ndarray, text: str
) -> Seen:
  names = g.leaf_names(is_still)
  return Seen(
      ks,
      f'{len(names)} of {len(g.paths)} leaves ({g.share(is_still)} of the '
      f'parameters) {text}: {_findings.listed(names, 3)}.',
      names,
  )
