"""The checks of the weights: each a function, and a row of a table.

A function yields what it saw of a `Case`; its row in `CHECKS` says how bad that
is, what it means, and what to do. Ingredients that a row leaves out are not
looked at by the rows after it, so that each has the first reason that applies.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import functools
import itertools
import json
import pathlib
from typing import Any
from typing import NamedTuple

import numpy as np

from jaxsoup import _checked
from jaxsoup import _tree
from jaxsoup.diagnosis import _findings
from jaxsoup.diagnosis import _matches
from jaxsoup.diagnosis import _pool
from jaxsoup.typing import ProgressFn

# Of a common start two matrices share all, `<x, y> / min(|x|, |y|)^2 = 1`, and
# of two starts nothing: the middle.
_RELATED = 0.5
# Standard errors from it: 99.9 % of one comparison.
_ERRORS = 3
# What two task vectors have in common beyond what the others span, as a
# correlation. In the pools of `tests/benchmarks/diagnosis.py` (perceptron and
# transformer, seed 0) it was 0.96 to 1.00 for copies of one run, at most 0.79
# for runs that were fine-tuned from each other, at most 0.62 for two seeds.
_COPIES = 0.9
# Lengths, as multiples of the median. Next to four runs of usual rates (three
# networks, two seeds), 2 of 156 runs of less than 4 times their length had a
# barrier to the best of them, and 33 of 36 of 12 times and more; none lay
# between.
_FAR = 4.0
# Runs at a tenth of the usual rate moved 0.2 times as far there: this is a
# choice, well below.
_NEAR = 0.02
# Median deviations of outliers: Iglewicz and Hoaglin 1993, "How to detect and
# handle outliers".
_LARGEST_DEVIATION = 3.5
# Rounding then adds a tenth to the square of a task vector.
_ROUNDING = 0.3


class Seen(NamedTuple):
  """What a check saw.

  Attributes:
    members: which ingredients it is about; empty is all.
    text: with the figures.
    leaves: which leaves; empty is all.
    keep: members that are not left out.
  """

  members: Sequence[int]
  text: str
  leaves: Sequence[str] = ()
  keep: Sequence[int] = ()


class Check(NamedTuple):
  """A row of the table; fields as in `Finding`.

  `needs` is 'start', 'data' or '' (only the weights). `leaves_out` says whether
  its members should not go into a soup. `is_fact` says that data cannot
  contradict it; other findings are dropped where there is no barrier.
  """

  code: str
  measure: Callable[['Case'], Iterator[Seen]]
  severity: str
  title: str
  meaning: str
  remedy: str
  needs: str = ''
  leaves_out: bool = True
  is_fact: bool = True


class Case:
  """The ingredients that are still open, and what is known of them."""

  def __init__(self, pool: _pool.Pool, progress_fn: ProgressFn | None):
    self.pool = pool
    self.progress_fn = progress_fn
    self.members = list(range(len(pool)))
    # Of the geometry, before duplicates and others are left out.
    self.usable: list[int] = []

  def leave_out(self, members: Sequence[int]) -> None:
    self.members = [k for k in self.members if k not in members]

  @functools.cached_property
  def _measured(self):
    _match_start(self.pool, self.members)
    return _pool.measure(self.pool, self.members, self.progress_fn)

  def finite(self) -> dict[int, list[str]]:
    """Leaves with NaN by member; only what has some."""
    geometry, finite = self._measured
    floats = [
        p for p, x in self.pool.leaves[geometry.members[0]].items()
        if _tree.is_float(x)
    ]  # fmt: skip
    return {
        k: [_tree.name_of(p) for p, ok in zip(floats, row) if not ok]
        for k, row in zip(geometry.members, finite)
        if not row.all()
    }

  @property
  def geometry(self) -> _pool.Geometry:
    whole = self._measured[0]
    rows = [i for i, k in enumerate(whole.members) if k in self.members]
    return whole.take(rows)

  @functools.cached_property
  def lost(self) -> np.ndarray:
    """Matrices of pairs that are not from one start, [n + 1, n + 1, L].

    False where it cannot be told: vectors, and matrices that are small, zero at
    the start, or much larger in one of the two.
    """
    g = self.all_geometry
    norms = g.norms()
    small = np.minimum(norms[:, None], norms[None])
    large = np.maximum(norms[:, None], norms[None])
    with np.errstate(divide='ignore', invalid='ignore'):
      share = g.products / small**2
      error = large / small / np.sqrt(g.sizes)
      of_start = g.products[-1] / norms[-1] / np.minimum(norms, norms[-1])
      error_of_start = norms / norms[-1] / np.sqrt(g.sizes)
    # What went much further than the other may have lost where it began.
    is_lost = (share < _RELATED - _ERRORS * error) & (large < _FAR * small)
    # A run that went far still contains where it began, and nothing else does.
    began = of_start >= _RELATED - _ERRORS * error_of_start
    either, both = began[:, None] | began[None], began[:, None] & began[None]
    near = began | (norms < _FAR * norms[-1])
    knows = g.has_start & near[:, None] & near[None]
    is_lost = np.where(knows, ~both & (either | is_lost), is_lost)
    return is_lost & g.matrices & (norms[-1] > 0)

  @functools.cached_property
  def all_geometry(self) -> _pool.Geometry:
    """Of all that were open when families were first asked for."""
    return self.geometry

  @functools.cached_property
  def families(self) -> list[list[int]]:
    """Ingredients by start, the largest family first."""
    g = self.all_geometry
    sizes = g.sizes * g.matrices
    apart = (self.lost * sizes).sum(-1)[:-1, :-1]
    groups = _groups(apart <= sizes.sum() / 2)
    return [[g.members[i] for i in group] for group in groups]

  @functools.cached_property
  def usual(self) -> np.ndarray:
    """The usual distance in each leaf, in the largest family, [L]."""
    g = self.all_geometry
    rows = [g.members.index(k) for k in self.families[0]]
    if len(rows) < 2:
      return np.zeros(len(g.paths))
    pairs = np.triu_indices(len(rows), 1)
    of_pairs = lambda x: x[np.ix_(rows, rows)][pairs]
    squares, lost = of_pairs(g.squares()), of_pairs(self.lost[:-1, :-1])
    squares = np.where(lost & ~lost.all(0), np.nan, squares)
    return np.sqrt(np.nanmedian(squares, axis=0))

  @functools.cached_property
  def reference(self) -> int:
    """The member of the largest family that is nearest to the others."""
    g = self.all_geometry
    rows = [g.members.index(k) for k in self.families[0]]
    distances = np.median(g.distances()[np.ix_(rows, rows)], axis=1)
    return self.families[0][int(distances.argmin())]

  def off(self, k: int) -> list[str]:
    """Leaves in which a member is unusually far, if that is not all of them."""
    g, reference = self.all_geometry, self.reference
    if k not in g.members or k == reference:
      return []
    distances = np.sqrt(
        g.squares()[g.members.index(k), g.members.index(reference)]
    )
    with np.errstate(divide='ignore', invalid='ignore'):
      share = np.where(self.usual > 0, distances / self.usual, 0)
    off = share > _FAR * max(np.median(share[share > 0]), 1)
    return [_tree.name_of(p) for p, x in zip(g.paths, off) if x]

  def read(self, k: int) -> dict[_tree.Path, np.ndarray]:
    return {p: self.pool.leaf(k, p) for p in self.all_geometry.paths}

  @functools.cached_property
  def matches(self) -> dict[int, _matches.Match]:
    """For members with lost leaves, where those leaves went."""
    g, reference = self.all_geometry, self.reference
    row = g.members.index(reference)
    usual = dict(zip(g.paths, self.usual))
    found = {}
    # A part that all lost is no accident of one.
    common = self.lost[:-1, row].mean(0) > 0.5
    for i, k in enumerate(g.members):
      lost = self.lost[i, row] & ~common
      if k == reference or not lost.any() or k in self.moments:
        continue
      paths = [p for p, x in zip(g.paths, lost) if x]
      match = _matches.correspondence(
          self.read(k), self.read(reference), paths, usual
      )
      if match:
        found[k] = match
    return found

  @functools.cached_property
  def moments(self) -> dict[int, str]:
    """Members that look like moments of an optimizer."""
    g, reference = self.all_geometry, self.reference
    row, rows = g.members.index(reference), g.matrices
    norms = g.norms()
    found = {}
    for i, k in enumerate(g.members):
      if not rows.any() or k == reference:
        continue
      if (g.low[i, rows] >= 0).all() and (g.low[row, rows] < 0).all():
        found[k] = 'has no negative number in any matrix'
      # Gradients are orders of magnitude smaller than parameters.
      elif (norms[i, rows] < 0.1 * norms[row, rows]).all():
        ratio = np.median(norms[i, rows] / norms[row, rows])
        found[k] = (
            f'is {ratio:.1g} times as large as the others in its matrices'
        )
    return found


def _groups(related: np.ndarray) -> list[list[int]]:
  """Connected components, the largest first, then by their first member."""
  from scipy.sparse import csgraph

  num, labels = csgraph.connected_components(related, directed=False)
  groups = [np.flatnonzero(labels == i).tolist() for i in range(num)]
  return sorted(groups, key=lambda g: (-len(g), g))


# --- before numbers are read --------------------------------------------------


def _commonest(keys: dict[int, Any]) -> tuple[list[int], list[int]]:
  """Members with the commonest key, and the others."""
  groups: dict[Any, list[int]] = {}
  for k, key in keys.items():
    groups.setdefault(key, []).append(k)
  most = max(groups.values(), key=len)
  return most, [k for k in keys if k not in most]


def _structure(case: Case) -> Iterator[Seen]:
  leaves = case.pool.leaves
  members, others = _commonest(
      {k: frozenset((p, tuple(x.shape)) for p, x in leaves[k].items())
       for k in case.members}
  )  # fmt: skip
  if not others:
    return
  differences = [
      text
      for text in _checked.mismatches(leaves[members[0]], leaves[others[0]])
      if ' dtype ' not in text
  ]
  names = case.pool.names
  yield Seen(
      others,
      f'Compared with {names[members[0]]}, in {names[others[0]]} '
      f'{_checked.listed(differences)}. {len(members)} of {len(case.pool)} are '
      'alike.',
  )


def _dtype(case: Case) -> Iterator[Seen]:
  leaves = case.pool.leaves
  of = lambda k: tuple(sorted((p, str(x.dtype)) for p, x in leaves[k].items()))
  members, others = _commonest({k: of(k) for k in case.members})
  if others:
    path, theirs = next(x for x in of(others[0]) if x not in of(members[0]))
    yield Seen(
        others,
        f'{_tree.name_of(path)} is {theirs} in {case.pool.listed(others)}, and '
        f'{dict(of(members[0]))[path]} in the others.',
    )


def _integers(case: Case) -> Iterator[Seen]:
  leaves = case.pool.leaves[case.members[0]]
  paths = [
      p for p, x in leaves.items()
      if not _tree.is_float(x) and not _tree.is_state(x)
  ]  # fmt: skip
  of = lambda k: tuple(
      np.asarray(case.pool.read(k)[p]).tobytes() for p in paths
  )
  if not paths:
    return
  contents = {k: of(k) for k in case.members}
  members, others = _commonest(contents)
  if others:
    names = [
        _tree.name_of(p)
        for p, *values in zip(paths, *contents.values())
        if len(set(values)) > 1
    ]
    listed = _findings.listed(names, range(len(names)))
    yield Seen(others, f'{listed} differ in {case.pool.listed(others)}.', names)


def _files_of(case: Case, name: str) -> dict[int, Any]:
  """A JSON file next to the weights, by member; None without one."""
  paths = getattr(case.pool.ingredients, 'paths', None)
  if paths is None:
    return {}
  found = {}
  for k in case.members:
    path = pathlib.Path(paths[k])
    file = (path if path.is_dir() else path.parent) / name
    try:
      found[k] = json.loads(file.read_text()) if file.is_file() else None
    except ValueError:
      found[k] = None
  return found


def _file(*names: str, keys: Sequence[str] = ()):
  """A check that files next to the weights are the same."""

  def check(case: Case) -> Iterator[Seen]:
    for name in names:
      contents = {
          k: {key: x[key] for key in keys or x if key in x}
          for k, x in _files_of(case, name).items()
          if isinstance(x, dict)
      }
      texts = {k: json.dumps(x, sort_keys=True) for k, x in contents.items()}
      members, others = _commonest(texts) if len(texts) > 1 else ([], [])
      if others:
        mine, theirs = contents[members[0]], contents[others[0]]
        key = next(x for x in (*mine, *theirs) if mine.get(x) != theirs.get(x))
        yield Seen(
            others,
            f'{key!r} in {name} is {str(theirs.get(key))[:60]} in '
            f'{case.pool.listed(others)}, and {str(mine.get(key))[:60]} in the '
            'others.',
        )
        return

  return check


def _averageable(case: Case) -> Iterator[Seen]:
  """What the reader refuses: other tokens, LoRA factors, quantized weights."""
  require = getattr(
      case.pool.ingredients, 'require_averageable', lambda k: None
  )
  for k in case.members:
    try:
      require(k)
    except ValueError as e:
      yield Seen([k], str(e))


# --- one read of all ----------------------------------------------------------


def _damaged(case: Case) -> Iterator[Seen]:
  case.finite()  # Reads them.
  if case.pool.damaged:
    bad = sorted(case.pool.damaged)
    yield Seen(bad, case.pool.damaged[bad[0]])


def _not_finite(case: Case) -> Iterator[Seen]:
  bad = {k: names for k, names in case.finite().items() if k in case.members}
  if bad:
    names = sorted(set(itertools.chain(*bad.values())))
    shown = _findings.listed(names, range(len(names)), 3)
    yield Seen(
        list(bad),
        f'{case.pool.listed(list(bad))}: NaN or infinity in {shown}.',
        names,
    )  # fmt: skip


def _duplicate(case: Case) -> Iterator[Seen]:
  g = case.geometry
  groups = _groups((g.squares() == 0).all(-1))
  many = [[g.members[i] for i in group] for group in groups if len(group) > 1]
  if many:
    yield Seen(
        [k for group in many for k in group],
        '; '.join(map(case.pool.listed, many)) + ' have equal weights.',
        keep=[group[0] for group in many],
    )


def _is_start(case: Case) -> Iterator[Seen]:
  g = case.geometry
  own = np.einsum('iil->il', g.tasks)[:, g.has_start]
  still = [
      k for k, row in zip(g.members, own) if g.has_start.any() and not row.any()
  ]
  if still:
    yield Seen(still, f'{case.pool.listed(still)} and theta_0 are equal.')


def _hardly(case: Case) -> Iterator[Seen]:
  g = case.geometry
  if len(g.members) < 3:
    return
  share = g.lengths() / np.median(g.lengths())
  rows = np.flatnonzero(share < _NEAR)
  if len(rows):
    ks = [g.members[i] for i in rows]
    yield Seen(
        ks,
        f'The task vector of {case.pool.listed(ks)} has at most '
        f'{100 * share[rows].max():.1g} % of the median length.',
    )


def _start(case: Case) -> Iterator[Seen]:
  if not case.pool.start or len(case.members) < 2:
    return
  g = case.all_geometry
  sizes = g.sizes * g.matrices
  known = (sizes * g.has_start).sum()
  apart = (case.lost[-1, :-1] * sizes * g.has_start).sum(-1)
  if known and (apart <= known / 2).any():
    return
  case.pool.start = {}
  for name in ('_measured', 'all_geometry', 'lost', 'families', 'usual'):
    vars(case).pop(name, None)
  yield Seen(
      (),
      'The matrices of theta_0 are unrelated to those of all ingredients, or '
      'have other shapes.',
  )


def _match_start(pool: _pool.Pool, members: Sequence[int]) -> None:
  """Finds the leaves of a theta_0 in another nesting by shape and values."""
  from scipy import optimize

  start, shapes = pool.start, pool.leaves[members[0]]
  if not start or any(p in start for p in shapes):
    return
  ours = {
      p: pool.leaf(members[0], p)
      for p, x in shapes.items()
      if _tree.is_float(x)
  }
  found = {}
  for shape in {x.shape for x in ours.values()}:
    mine = [p for p, x in ours.items() if x.shape == shape]
    theirs = [p for p, x in start.items() if np.shape(x) == shape]
    costs = np.array(
        [
            [
                np.linalg.norm(ours[p] - np.asarray(start[q], float))
                for q in theirs
            ]
            for p in mine
        ]
    ).reshape(len(mine), len(theirs))
    for i, j in zip(*optimize.linear_sum_assignment(costs)):
      found[mine[i]] = start[theirs[j]]
  pool.start = found


# --- families, parts, correspondences -----------------------------------------


def _moments(case: Case) -> Iterator[Seen]:
  for k, text in case.moments.items():
    if k in case.members:
      yield Seen([k], f'{case.pool.names[k]} {text}.')


def _match(code: str):
  def check(case: Case) -> Iterator[Seen]:
    ks = [
        k
        for k, m in case.matches.items()
        if m.code == code and k in case.members
    ]
    if ks:
      match = case.matches[ks[0]]
      names = [_tree.name_of(p) for p in match.paths]
      shown = _findings.listed(names, range(len(names)), 4)
      yield Seen(
          ks,
          f'In {case.pool.listed(ks)}, {names[0]} {match.text}. Leaves: '
          f'{shown}.',
          names,
      )

  return check


def _initialization(case: Case) -> Iterator[Seen]:
  families = [[k for k in f if k in case.members] for f in case.families]
  main, *others = filter(None, families)
  ks = [k for family in others for k in family]
  if ks:
    g = case.all_geometry
    row = lambda k: g.members.index(k)
    total = g.products.sum(-1)
    norms = np.sqrt(np.diag(total))
    cosine = (
        total[row(main[0]), row(ks[0])]
        / norms[row(main[0])]
        / norms[row(ks[0])]
    )
    shown = '; '.join(map(case.pool.listed, [main, *others][:4]))
    yield Seen(
        ks,
        f'{1 + len(others)} groups with unrelated matrices (cosine of the '
        f'weights {cosine:.2f} between groups): {shown}.',
    )


def _part(case: Case) -> Iterator[Seen]:
  g = case.all_geometry
  rows = [i for i, k in enumerate(g.members) if k in case.members]
  apart: dict[tuple[int, ...], list[int]] = {}
  for leaf in np.flatnonzero(case.lost.any((0, 1))):
    groups = [
        [rows[i] for i in group]
        for group in _groups(~case.lost[np.ix_(rows, rows)][..., leaf])
    ]
    if g.has_start[leaf]:  # The family of theta_0 is the right one.
      began = ~case.lost[-1, :, leaf]
      groups = sorted(groups, key=lambda x: not began[x[0]])
    outside = tuple(i for group in groups[1:] for i in group)
    if outside:
      apart.setdefault(outside, []).append(int(leaf))
  for outside, leaves in apart.items():
    ks = [g.members[i] for i in outside]
    names = [_tree.name_of(g.paths[x]) for x in leaves]
    shown = _findings.listed(names, range(len(names)), 3)
    share = 100 * g.sizes[leaves].sum() / g.sizes.sum()
    whose = (
        'every ingredient' if len(ks) > len(rows) - 2 else case.pool.listed(ks)
    )
    yield Seen(
        ks,
        f'In {whose}, the values of {shown} ({share:.2g} % of the '
        'parameters) are unrelated to those of the others, although the rest '
        'comes from one initialization.',
        names,
    )  # fmt: skip


def _rescaled(case: Case) -> Iterator[Seen]:
  g = case.geometry
  if len(g.members) < 3 or case.reference not in g.members:
    return
  row = g.members.index(case.reference)
  distances = np.sqrt(g.squares()[:, row])
  norms = g.norms()[:-1].clip(1e-9)
  ratios = np.abs(np.log(norms / norms[row]))
  for i, k in enumerate(g.members):
    off = (distances[i] > 3 * case.usual) | (ratios[i] > np.log(2))
    if i == row or not off.any() or off.all():
      continue
    paths = [p for p, x in zip(g.paths, off) if x][:24]
    found = _matches.rescaled(case.read(k), case.read(case.reference), paths)
    if found:
      p, q = map(_tree.name_of, found[:2])
      yield Seen(
          [k],
          f'In {case.pool.names[k]} units of {p} are larger or smaller by a '
          f'factor of {found[2]:.1f} or so, and {q}, which reads them, by its '
          'inverse.',
          [p, q],
      )


def _untied(case: Case) -> Iterator[Seen]:
  g = case.geometry
  norms = g.norms()[:-1]
  for a, b in itertools.combinations(range(len(g.paths)), 2):
    if g.sizes[a] != g.sizes[b] or not g.matrices[a] or not g.matrices[b]:
      continue
    is_tied = np.isclose(norms[:, a], norms[:, b], rtol=1e-6) & (
        norms[:, a] > 0
    )
    out = [k for k, tied in zip(g.members, is_tied) if not tied]
    if not out or len(out) > len(g.members) / 2:
      continue
    k = next(k for k, tied in zip(g.members, is_tied) if tied)
    x, y = (case.pool.leaf(k, g.paths[i]) for i in (a, b))
    if not any(x.shape == z.shape and (x == z).all() for z in (y, y.T)):
      continue
    names = [_tree.name_of(g.paths[i]) for i in (a, b)]
    yield Seen(
        out,
        f'{names[0]} and {names[1]} are equal in the others, and differ in '
        f'{case.pool.listed(out)}.',
        names,
    )


def _soup_of_others(case: Case) -> Iterator[Seen]:
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
    others = [j for j in range(num) if j != i]
    alpha, rest = optimize.nnls(rows[others].T, rows[i])
    noise = _pool.NOISE**0.5 * scale + rounding[i]
    nearest = distances[i, others].min()
    used = [g.members[j] for j, a in zip(others, alpha) if a > 0.01]
    if len(used) > 1 and rest < noise < nearest / 4:
      shown = ', '.join(f'{a:.2f}' for a in alpha if a > 0.01)
      yield Seen(
          [k],
          f'{case.pool.names[k]} is an average of {case.pool.listed(used)}, '
          f'with coefficients {shown}.',
      )


def _copies(case: Case) -> Iterator[Seen]:
  said = {
      k: case.pool.copies[k]
      for k in case.members
      if case.pool.copies[k] is not None
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
    return
  g = case.geometry
  # Linear probes are near to each other.
  own = np.einsum('iil->il', g.tasks) == 0
  probes = (own & ~own.all(0)).any(1)
  g = g.take(np.flatnonzero(~probes).tolist())
  if not g.has_start.any() or len(g.members) < 3:
    return
  total, cosines, norms = (
      g.tasks[..., g.has_start].sum(-1),
      g.cosines(),
      g.lengths(),
  )
  shared = _shared(total)
  # Only next to others that went about as far: runs that went less far have
  # more in common.
  alike = np.abs(np.log(norms[:, None] / norms)) < np.log(2)
  is_copy = (shared > _COPIES) & (cosines > _COPIES) & (alike.sum(1) > 3)
  if not is_copy.any():
    return
  i, j = np.unravel_index(np.where(is_copy, shared, -1).argmax(), shared.shape)
  pair = sorted((g.members[i], g.members[j]))
  num = int(np.triu(is_copy | is_copy.T, 1).sum())
  out = min((i, j), key=lambda x: norms[x])
  yield Seen(
      pair,
      f'{case.pool.listed(pair)} moved in the same direction (cosine of the '
      f'task vectors {cosines[i, j]:.2f}), also in what the others do not '
      f'share (correlation {shared[i, j]:.2f})'
      + (f', and {num - 1} more pairs.' if num > 1 else '.'),
      keep=[g.members[x] for x in (i, j) if x != out],
  )


def _shared(total: np.ndarray) -> np.ndarray:
  """Partial correlations: of what the others' task vectors do not span."""
  num, norms = len(total), np.sqrt(np.diag(total))
  shared, total = np.full((num, num), -1.0), total / norms / norms[:, None]
  for i, j in itertools.combinations(range(num), 2):
    rest = [k for k in range(num) if k not in (i, j)]
    pair = [i, j]
    across = total[np.ix_(pair, rest)]
    inverse = np.linalg.pinv(total[np.ix_(rest, rest)], rcond=_pool.NOISE)
    left = total[np.ix_(pair, pair)] - across @ inverse @ across.T
    if min(left[0, 0], left[1, 1]) > 0:
      shared[i, j] = left[0, 1] / np.sqrt(left[0, 0] * left[1, 1])
      shared[j, i] = shared[i, j]
  return shared


# --- lengths ------------------------------------------------------------------


def _far(case: Case) -> Iterator[Seen]:
  g = case.geometry
  lengths = g.lengths() if len(g.members) > 2 else np.zeros(1)
  if not np.median(lengths) > 0:
    return
  share = lengths / np.median(lengths)
  with np.errstate(divide='ignore'):
    away = np.log(share)
  # Sweeps span decades: the median deviation, on a log scale.
  spread = 1.4826 * np.median(np.abs(away))
  rows = np.flatnonzero((share > _FAR) & (away > _LARGEST_DEVIATION * spread))
  if len(rows):
    ks = [g.members[i] for i in rows]
    rates = rates_text(case.pool, ks, [k for k in g.members if k not in ks])
    yield Seen(
        ks,
        f'The task vector of {case.pool.listed(ks)} is {share[rows].min():.0f} '
        f'times as long as the median one.{rates}',
    )


def rates_text(
    pool: _pool.Pool, ks: Sequence[int], others: Sequence[int]
) -> str:
  """The learning rates of some and of others, where runs carry them."""
  texts = []
  for group in (ks, others):
    rates = [pool.configs[k].get('learning_rate', np.nan) for k in group]
    if not rates or not np.isfinite(rates).all():
      return ''
    low, high = f'{min(rates):.2g}', f'{max(rates):.2g}'
    texts.append(low if low == high else f'{low} to {high}')
  return f' Learning rate: {texts[0]}; of the others: {texts[1]}.'


def _rounding(case: Case) -> Iterator[Seen]:
  g = case.geometry
  if len(g.members) < 2:
    return
  with np.errstate(divide='ignore', invalid='ignore'):
    share = g.rounding() / g.lengths()
  ks = [k for k, x in zip(g.members, share) if not x < _ROUNDING]
  if len(ks) > len(g.members) / 2:
    bits = {2.0**-7: 'bfloat16', 2.0**-10: 'float16'}
    held = bits.get(float(np.median(g.eps)), 'their dtype')
    yield Seen(
        ks,
        f'Stored in {held}, the rounding error is '
        f'{100 * np.median(share):.0f} % of the task vector (median).',
    )


def _frozen(case: Case) -> Iterator[Seen]:
  g = case.geometry
  still = (g.squares() == 0).all((0, 1))
  own = np.einsum('iil->il', g.tasks)
  still &= ~g.has_start | (own == 0).all(0)
  if still.any() and len(g.members) > 1:
    yield _still(g, (), still, 'are equal in all ingredients')


def _partly_frozen(case: Case) -> Iterator[Seen]:
  g = case.geometry
  groups: dict[tuple[int, ...], list[int]] = {}
  own, squares = np.einsum('iil->il', g.tasks), g.squares()
  for leaf in range(len(g.paths)):
    same = squares[..., leaf] == 0
    common = same[same.sum(1).argmax()]
    is_shared = common.sum() > 1
    if g.has_start[leaf] and not own[:, leaf].all():
      common, is_shared = own[:, leaf] == 0, True
    if is_shared and 0 < common.sum() < len(common):
      ks = tuple(k for k, x in zip(g.members, common) if x)
      groups.setdefault(ks, []).append(leaf)
  if groups:
    ks, leaves = max(groups.items(), key=lambda x: g.sizes[x[1]].sum())
    is_still = np.isin(range(len(g.paths)), leaves)
    yield _still(
        g, ks, is_still,
        f'did not change in {case.pool.listed(ks)}, but in the others',
    )  # fmt: skip


def _still(g, ks, is_still, text) -> Seen:
  names = [_tree.name_of(p) for p, x in zip(g.paths, is_still) if x]
  share = 100 * g.sizes[is_still].sum() / g.sizes.sum()
  shown = _findings.listed(names, range(len(names)), 3)
  return Seen(
      ks,
      f'{len(names)} of {len(g.paths)} leaves ({share:.2g} % of the '
      f'parameters) {text}: {shown}.',
      names,
  )


_BASINS = 'Their units do not correspond, and the average is noise.'
_OUT = 'Leave out {them}.'
_CONVERT = (
    'Find the conversion that did it, and convert again; or leave out {them}.'
)

CHECKS = (
    Check(
        'structure', _structure, 'error', 'Not all have the same architecture',
        'Only leaves of one shape can be averaged.',
        'If only the heads differ, soup the subtrees that agree, such as '
        "[p['backbone'] for p in ingredients]. Otherwise leave out {them}.",
    ),
    Check(
        'dtype', _dtype, 'warning',
        'Ingredients are stored in different dtypes',
        'Recipes do not mix dtypes: it is not clear which one the soup should '
        'have.',
        'Cast all to the wider dtype: --dtype float32, or jax.tree.map(lambda '
        'x: x.astype(jnp.float32), params); or leave out {them}.',
    ),
    Check(
        'integers', _integers, 'error', 'Integers or booleans differ',
        'Only floats are averaged, so a recipe refuses these models. Integers '
        'that differ may be quantized weights, or masks.',
        'Convert quantized weights to floats, or pass parameters without these '
        'leaves.',
    ),
    Check(
        'labels', _file('config.json', keys=('id2label', 'label2id')), 'error',
        'Another order of labels',
        'The outputs of the heads mean different classes.',
        'Put the rows of the head in the order of the others; or leave out '
        '{them}.',
    ),
    Check(
        'tokenizer',
        _file('tokenizer.json', 'vocab.json', 'tokenizer_config.json'), 'error',
        'Another tokenizer',
        'A row of the embeddings belongs to different tokens.',
        'If the tokens are the same in another order: --align-tokens. '
        'Otherwise leave out {them}.',
    ),
    Check(
        'preprocessing',
        _file('preprocessor_config.json', 'processor_config.json'), 'warning',
        'Inputs were preprocessed differently',
        'Each model expects the inputs that it was trained on; a soup gets one '
        'kind.',
        'Train with one preprocessing; or leave out {them}.',
    ),
    Check(
        'refused', _averageable, 'error', 'Recipes refuse this checkpoint',
        'Its leaves are not the weights of a whole model, or mean other '
        'things.',
        _OUT,
    ),
    Check(
        'damaged', _damaged, 'error', 'Files are damaged',
        'The values are not those that were saved, and would go into the soup.',
        'Restore the files from a copy, or leave out {them}.',
    ),
    Check(
        'not_finite', _not_finite, 'error', 'Weights that are NaN or infinite',
        'One NaN makes the soup NaN. The training diverged, or the file is '
        'damaged.',
        'Leave out {them}; check the loss of that training.',
    ),
    Check(
        'duplicate', _duplicate, 'warning', 'The same model more than once',
        'It would count several times. Perhaps a run was not saved where you '
        'expect it.',
        _OUT,
    ),
    Check(
        'unmoved', _is_start, 'warning', 'Not fine-tuned',
        'It is the initialization, and pulls the soup back to it.',
        'Leave out {them}: perhaps the initial checkpoint is among the runs. '
        'To average theta_0 and a soup, use WiSE-FT: jaxsoup.interpolate.',
        'start',
    ),
    Check(
        'start', _start, 'warning',
        'theta_0 is not what they were fine-tuned from',
        'Task vectors, and recipes that need theta_0 (Model Stock, WiSE-FT), '
        'would be wrong. The other findings do not use it.',
        'Pass the checkpoint that fine-tuning started from.', 'start', False,
    ),
    Check(
        'moments', _moments, 'error', 'Moments of an optimizer, not parameters',
        'These are not the weights of a model.',
        'Read the parameters: --item params, or the right subtree of the '
        'training state; or leave out {them}.',
    ),
    Check(
        'transposed', _match('transposed'), 'error', 'A matrix is transposed',
        _BASINS, _CONVERT,
    ),
    Check(
        'swapped', _match('swapped'), 'error',
        'Layers or matrices have changed places', _BASINS, _CONVERT,
    ),
    Check(
        'permuted', _match('permuted'), 'error',
        'The hidden units are in a different order',
        'The same function with its units (or attention heads) in a different '
        'order: an average adds units that do not correspond.',
        'Put the units in the order of the others: params = '
        'jaxsoup.diagnosis.aligned(params, like=another), and score it; or '
        'leave out {them}.',
    ),
    Check(
        'labels', _match('labels'), 'error', 'Another order of labels',
        'The outputs of the heads mean different classes.',
        'Put the outputs in the order of the others: '
        'jaxsoup.diagnosis.aligned(params, like=another); or leave out {them}.',
    ),
    Check(
        'rotated', _match('rotated'), 'error',
        'Matrices are rotated, their product is not',
        'The same attention in other coordinates. ' + _BASINS, _CONVERT,
    ),
    Check(
        'initialization', _initialization, 'error',
        'Not fine-tuned from the same initialization',
        'Models from different initializations lie in different basins. '
        + _BASINS,
        'Soup only models from one initialization. In a sweep, fix the seed of '
        'the initialization (and of a new head) and vary the other '
        'hyper-parameters. Otherwise use an ensemble.',
    ),
    Check(
        'part', _part, 'error',
        'A part, perhaps the head, was initialized separately',
        'Heads that each run initialized at random (or that were never '
        'trained) do not correspond: in an average they cancel.',
        'Initialize the head once, or train it first (linear probe), and start '
        'all runs from it. For these runs: leave out {them}, or soup the rest '
        'and train one head on it.',
    ),
    Check(
        'rescaled', _rescaled, 'error',
        'The same function with layers of other scales',
        'Units that are larger dominate the average, and what reads them has '
        'the wrong scale.',
        _CONVERT,
    ),
    Check(
        'untied', _untied, 'warning', 'A tied copy has drifted',
        'Loaded as a tied model, one of the two is thrown away.',
        'Save the leaf that is used in both places; or leave out {them}.',
    ),
    Check(
        'soup_of_others', _soup_of_others, 'warning',
        'An average of other ingredients is among them',
        'Its ingredients count twice.', _OUT,
    ),
    Check(
        'copies', _copies, 'warning', 'Several copies of one run',
        'A moving average, or an earlier checkpoint, and its run are nearly '
        'the same model, which then counts twice.',
        'Use one copy of each run, of the same kind for all: only the moving '
        'averages, or only the last checkpoints.',
    ),
    Check(
        'unmoved', _hardly, 'warning', 'Hardly fine-tuned',
        'It is almost the initialization, and pulls the soup back to it.',
        'Leave out {them}; the learning rate may be far too small.', 'start',
    ),
    Check(
        'far', _far, 'warning', 'Moved much further than the others',
        'Its large weights dominate the average.',
        'Leave out {them}, or let a greedy soup choose. Lower the learning '
        'rate.',
        is_fact=False,
    ),
    Check(
        'rounding', _rounding, 'warning',
        'Rounding is as large as the task vectors',
        'The difference between ingredients is mostly rounding, and a soup in '
        'their dtype is rounded again.',
        'Save runs in float32 (the master weights of the optimizer). For these '
        'runs: --dtype float32, and keep the soup in float32.',
        leaves_out=False,
    ),
    Check(
        'frozen', _frozen, 'note', 'Parts that no run changed',
        'They were frozen, or got no gradient. Averages leave them as they '
        'are.',
        'Nothing, if this is intended. Otherwise check the mask of the '
        'optimizer, and look for parts that the loss does not use.',
        leaves_out=False,
    ),
    Check(
        'partly_frozen', _partly_frozen, 'note',
        'Parts that only some runs trained',
        'Runs that train only a part (such as a linear probe) are mixed with '
        'runs that train everything.',
        'This can work. Compare with a soup of each kind alone.',
        leaves_out=False,
    ),
)  # fmt: skip
