"""What checks look at: the ingredients that are still open, and their families.

```
case = Case(pool)
case.families                              # members by start, the largest first
```
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import functools
import math
from typing import TYPE_CHECKING
from typing import NamedTuple

import numpy as np

from jaxsoup import _tree
from jaxsoup.diagnosis import _findings
from jaxsoup.diagnosis import _matches
from jaxsoup.diagnosis import _pool
from jaxsoup.typing import ProgressFn

if TYPE_CHECKING:
  from jaxsoup.diagnosis import _trials

# Of a common start two matrices share all, `<x, y> / min(|x|, |y|)^2 = 1`, and
# of two starts nothing: the middle.
_RELATED = 0.5
# Standard errors from it: 99.9 % of one comparison.
_ERRORS = 3
# Lengths, as multiples of the median. Next to four runs of usual rates (three
# networks, two seeds), 2 of 156 runs of less than 4 times their length had a
# barrier to the best of them, and 33 of 36 of 12 times and more; none lay
# between.
FAR = 4.0


class Seen(NamedTuple):
  """What a check saw.

  Attributes:
    members: which ingredients it is about; empty is all.
    text: with the figures.
    leaves: which leaves; empty is all.
    keep: members that are not left out.
    cost: how far it lowers a score, if that was measured.
  """

  members: Sequence[int]
  text: str
  leaves: Sequence[str] = ()
  keep: Sequence[int] = ()
  cost: float = math.nan


class Check(NamedTuple):
  """A row of the table; fields as in `Finding`.

  Attributes:
    measure: yields what it sees.
    needs_start: whether it needs theta_0.
    leaves_out: whether its members should not go into a soup.
    is_fact: whether data cannot contradict it; other findings are dropped where
      there is no barrier.
  """

  code: str
  measure: Callable[['Case'], Iterator[Seen]]
  severity: str
  title: str
  meaning: str
  remedy: str
  needs_start: bool = False
  leaves_out: bool = True
  is_fact: bool = True

  def finding(self, case: 'Case', seen: Seen) -> _findings.Finding:
    members = tuple(sorted(seen.members))
    out = tuple(k for k in members if k not in seen.keep and self.leaves_out)
    them = case.pool.listed(out or members) or 'some'
    return _findings.Finding(
        severity=self.severity,
        code=self.code,
        title=self.title,
        seen=seen.text,
        meaning=self.meaning,
        remedy=self.remedy.replace('{them}', them),
        ingredients=members,
        leaves=tuple(seen.leaves),
        leave_out=out,
        cost=seen.cost,
    )


class Case:
  """The ingredients that are still open, and what is known of them.

  Attributes:
    pool: all of them.
    has_start: whether theta_0 was given.
    has_statistics: whether there are running statistics of BatchNorm.
    members: those that are open.
    trials: scores, once there are some.
    explained: members whose faults have a finding.
  """

  trials: '_trials.Trials'

  def __init__(self, pool: _pool.Pool, progress_fn: ProgressFn | None = None):
    self.pool = pool
    self.has_start = bool(pool.start)
    self.has_statistics = _tree.statistics_of(list(pool.leaves[0])).any()
    self.members = list(range(len(pool.names)))
    self.explained: set[int] = set()
    self._progress_fn = progress_fn

  def leave_out(self, members: Sequence[int]) -> None:
    self.members = [k for k in self.members if k not in members]

  @functools.cached_property
  def measured(self) -> tuple[_pool.Geometry, np.ndarray]:
    """The geometry of what was open at first; which leaves are finite."""
    _match_start(self.pool, self.members[0])
    return _pool.measure(self.pool, self.members, self._progress_fn)

  @property
  def geometry(self) -> _pool.Geometry:
    """Of the members that are open now."""
    whole = self.measured[0]
    rows = [i for i, k in enumerate(whole.members) if k in self.members]
    return whole.take(rows)

  @functools.cached_property
  def all_geometry(self) -> _pool.Geometry:
    """Of all that were open when families were first asked for."""
    return self.geometry

  def forget_start(self) -> None:
    """Goes on as if theta_0 had not been given."""
    self.pool.start = {}
    for name in ('measured', 'all_geometry', 'lost', 'families', 'usual'):
      vars(self).pop(name, None)

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
    is_lost = (share < _RELATED - _ERRORS * error) & (large < FAR * small)
    # A run that went far still contains where it began, and nothing else does.
    began = of_start >= _RELATED - _ERRORS * error_of_start
    either, both = began[:, None] | began[None], began[:, None] & began[None]
    near = began | (norms < FAR * norms[-1])
    knows = g.has_start & near[:, None] & near[None]
    is_lost = np.where(knows, ~both & (either | is_lost), is_lost)
    return is_lost & g.matrices & (norms[-1] > 0)

  @functools.cached_property
  def families(self) -> list[list[int]]:
    """Ingredients by start, the largest family first."""
    g = self.all_geometry
    sizes = g.sizes * g.matrices
    apart = (self.lost * sizes).sum(-1)[:-1, :-1]
    groups = groups_of(apart <= sizes.sum() / 2)
    return [[g.members[i] for i in group] for group in groups]

  @property
  def _family(self) -> list[int]:
    """Rows of the largest family."""
    return [self.row(k) for k in self.families[0]]

  def row(self, k: int) -> int:
    return self.all_geometry.members.index(k)

  @functools.cached_property
  def usual(self) -> np.ndarray:
    """The usual distance in each leaf, in the largest family, [L]."""
    g, rows = self.all_geometry, self._family
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
    rows = self._family
    distances = self.all_geometry.distances()[np.ix_(rows, rows)]
    return self.families[0][int(np.median(distances, axis=1).argmin())]

  def off(self, k: int) -> list[str]:
    """Leaves in which a member is unusually far, if that is not all of them."""
    g = self.all_geometry
    if k not in g.members or k == self.reference:
      return []
    distances = np.sqrt(g.squares()[self.row(k), self.row(self.reference)])
    with np.errstate(divide='ignore', invalid='ignore'):
      share = np.where(self.usual > 0, distances / self.usual, 0)
    return g.leaf_names(share > FAR * max(np.median(share[share > 0]), 1))

  def read(self, k: int) -> dict[_tree.Path, np.ndarray]:
    return {p: self.pool.leaf(k, p) for p in self.all_geometry.paths}

  @functools.cached_property
  def matches(self) -> dict[int, _matches.Match]:
    """For members with lost leaves, where those leaves went."""
    g, row = self.all_geometry, self.row(self.reference)
    usual = dict(zip(g.paths, self.usual))
    # A part that all lost is no accident of one.
    lost = self.lost[:-1, row] & (self.lost[:-1, row].mean(0) <= 0.5)
    matches = {}
    for k, leaves in zip(g.members, lost):
      if k == self.reference or not leaves.any() or k in self.moments:
        continue
      paths = [p for p, x in zip(g.paths, leaves) if x]
      ours, theirs = self.read(self.reference), self.read(k)
      match = _matches.correspondence(theirs, ours, paths, usual)
      if match:
        matches[k] = match
    return matches

  @functools.cached_property
  def moments(self) -> dict[int, str]:
    """Members that look like moments of an optimizer."""
    g, row = self.all_geometry, self.row(self.reference)
    norms, low = g.norms()[:-1, g.matrices], g.low[:, g.matrices]
    texts = {}
    for i, k in enumerate(g.members if g.matrices.any() else ()):
      if (low[i] >= 0).all() and (low[row] < 0).all():
        texts[k] = 'has no negative number in any matrix'
      # Gradients are orders of magnitude smaller than parameters.
      elif (norms[i] < 0.1 * norms[row]).all():
        ratio = np.median(norms[i] / norms[row])
        texts[k] = (
            f'is {ratio:.1g} times as large as the others in its matrices'
        )
    return texts

  def rates(self, ks: Sequence[int]) -> str:
    """The learning rates of some and of the others, where runs carry them."""
    texts = []
    for group in (ks, [k for k in self.members if k not in ks]):
      configs = [self.pool.configs[k] for k in group]
      rates = [config.get('learning_rate', np.nan) for config in configs]
      if not rates or not np.isfinite(rates).all():
        return ''
      low, high = f'{min(rates):.2g}', f'{max(rates):.2g}'
      texts.append(low if low == high else f'{low} to {high}')
    return f' Learning rate: {texts[0]}; of the others: {texts[1]}.'


def groups_of(related: np.ndarray) -> list[list[int]]:
  """Connected components, the largest first, then by their first member."""
  from scipy.sparse import csgraph

  num, labels = csgraph.connected_components(related, directed=False)
  groups = [np.flatnonzero(labels == i).tolist() for i in range(num)]
  return sorted(groups, key=lambda g: (-len(g), g))


def _match_start(pool: _pool.Pool, k: int) -> None:
  """Takes the leaves of a theta_0 in another nesting by shape and values."""
  from scipy import optimize

  start = pool.start
  if not start or any(p in start for p in pool.leaves[k]):
    return
  ours = {p: pool.leaf(k, p) for p in pool.floats(k)}
  pool.start = {}
  for shape in {x.shape for x in ours.values()}:
    mine = [p for p, x in ours.items() if x.shape == shape]
    theirs = [p for p, x in start.items() if np.shape(x) == shape]
    costs = [
        [np.linalg.norm(ours[p] - np.asarray(start[q], float)) for q in theirs]
        for p in mine
    ]
    shaped = np.reshape(costs, (len(mine), len(theirs)))
    for i, j in zip(*optimize.linear_sum_assignment(shaped)):
      pool.start[mine[i]] = start[theirs[j]]
