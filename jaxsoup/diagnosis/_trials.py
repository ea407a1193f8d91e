"""What held-out data tell: scores, barriers, parts, disagreement.

```
measured = Trials(pool, examined.paths, eval_fn, tolerance=0.02).run(
    examined.usable, examined.sound
)
measured.drops                                  # [K, K], fall below the chord
```
"""

from collections.abc import Collection
from collections.abc import Sequence
import dataclasses
import itertools
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from jaxsoup import _tree
from jaxsoup import studies
from jaxsoup._recipes import _average
from jaxsoup._recipes import _search
from jaxsoup.diagnosis import _pool
from jaxsoup.typing import EvalFn
from jaxsoup.typing import OutputsFn
from jaxsoup.typing import Params
from jaxsoup.typing import ParamsFn
from jaxsoup.typing import ProgressFn

# What a diagnosis does, one after another, and about how long each takes; all
# but the first need data.
STAGES = {
    'weights': 1.0,
    'single models': 1.0,
    'pairs': 3.0,
    'each against the mean': 3.0,
    'parts': 1.0,
}
# Tolerances below the median that make an ingredient weak.
WEAK = 5
# Parts that are averaged one by one.
_MOST_PARTS = 24


class Measured(NamedTuple):
  """Scores of single models and of averages; NaN where not measured.

  Attributes:
    scores: of each ingredient, [K].
    drops: how far the average of two lies below the mean of their scores,
      [K, K]: the barrier, of scores. Negative where it gains.
    weak: sound ingredients that score far below the median.
    subset: the other sound ones, without a barrier between each other.
    to_mean: the same as `drops`, between each of the subset and the mean of the
      others, [K].
    soup: score of the uniform soup of the subset.
    statistics: scores of that soup with the running statistics of its first
      ingredient, averaged ones, and estimated ones; {} without BatchNorm.
    pair: the pair with the largest drop of all.
    parts: by part, how much the score of the better one of that pair falls if
      this part alone is averaged with the other's.
    without: the part with the largest fall, and the drop of the average of all
      else; None if there are no parts.
    disagreement: share of examples that two predict differently, [K, K].
  """

  scores: np.ndarray
  drops: np.ndarray
  weak: list[int]
  subset: list[int]
  to_mean: np.ndarray
  soup: float
  statistics: dict[str, float]
  pair: tuple[int, int] | None
  parts: dict[str, float]
  without: tuple[str, float] | None
  disagreement: np.ndarray


@dataclasses.dataclass
class Trials:
  """Evaluates ingredients and their averages.

  At most two models and one average of them are in memory.
  """

  pool: _pool.Pool
  paths: Sequence[_tree.Path]
  eval_fn: EvalFn
  tolerance: float
  recalibrate_fn: ParamsFn | None = None
  logits_fn: OutputsFn | None = None
  progress_fn: ProgressFn | None = None

  def __post_init__(self):
    num = len(self.pool)
    self.scores = np.full(num, np.nan)
    self.drops = np.full((num, num), np.nan)

  def _tell(self, stage: str, share: float) -> None:
    if self.progress_fn is not None:
      self.progress_fn(stage, share)

  def run(self, usable: Sequence[int], sound: Sequence[int]) -> Measured:
    """Measures those that can be averaged, and the soup of the sound ones."""
    disagreement = self._singles(usable)
    self._pairs(usable)
    bar = np.median(self.scores[list(sound)] if sound else [np.nan])
    weak = [k for k in sound if self.scores[k] < bar - WEAK * self.tolerance]
    subset = self._without_barriers([k for k in sound if k not in weak])
    subset, to_mean = self._against_mean(subset)
    soup, statistics = np.nan, {}
    if len(subset) > 1:
      mean = self._mean(subset)
      statistics = self._statistics(mean, subset[0])
      soup = self._of_soup(mean)
    pair, parts, without = self._parts_of_worst()
    return Measured(
        self.scores, self.drops, weak, subset, to_mean, soup, statistics,
        pair, parts, without, disagreement,
    )  # fmt: skip

  def _score(self, params: Params) -> float:
    return _search.number(self.eval_fn(params), 'eval_fn returned', 'a model')

  def _of_soup(self, params: Params) -> float:
    """The score of an average, with re-estimated running statistics."""
    if self.recalibrate_fn is not None:
      params = _recalibrated(params, self.recalibrate_fn(params))
    return self._score(params)

  def _mean(self, members: Sequence[int]) -> Params:
    alpha = np.zeros(len(self.pool), np.float32)
    alpha[list(members)] = 1 / len(members)
    # Ingredients with alpha 0 are not read, so they need not be compatible.
    return _average.average(self.pool.ingredients, alpha).params

  def _singles(self, usable) -> np.ndarray:
    num = len(self.pool)
    classes = {}
    for i, k in enumerate(usable):
      self._tell('single models', i / len(usable))
      params = self.pool.ingredients[k]
      self.scores[k] = self._score(params)
      if self.logits_fn is not None:
        classes[k] = _classes(self.logits_fn(params))
    sizes = sorted({len(x) for x in classes.values()})
    if len(sizes) > 1:
      raise ValueError(
          f'logits_fn returned logits of {sizes[0]} examples for one model and '
          f'of {sizes[-1]} for another: use the same examples for all.'
      )
    disagreement = np.full((num, num), np.nan)
    for i, j in itertools.product(classes, repeat=2):
      disagreement[i, j] = np.mean(classes[i] != classes[j])
    return disagreement

  def _pairs(self, usable: Sequence[int]) -> None:
    pairs = sorted(studies.connected_pairs(self.scores, usable))
    held: tuple[int, Params] | None = None
    for n, (i, j) in enumerate(pairs):
      self._tell('pairs', n / len(pairs))
      if held is None or held[0] != i:
        held = i, self.pool.ingredients[i]
      other = self.pool.ingredients[j]
      half = self._of_soup(between(held[1], other))
      chord = (self.scores[i] + self.scores[j]) / 2
      self.drops[i, j] = self.drops[j, i] = chord - half

  def _without_barriers(self, sound: Sequence[int]) -> list[int]:
    """Removes the one with the most barriers until there are none."""
    subset = list(sound)
    while len(subset) > 1:
      block = self.drops[np.ix_(subset, subset)]
      num = (block > self.tolerance).sum(1)
      if not num.any():
        break
      # Of equals the one with the lowest score.
      subset.remove(
          min(subset, key=lambda k: (-num[subset.index(k)], self.scores[k]))
      )
    return subset

  def _against_mean(self, subset: list[int]) -> tuple[list[int], np.ndarray]:
    """Each against the mean of the others; takes out the worst one by one."""
    drops = np.full(len(self.pool), np.nan)
    while len(subset) > 2:
      for n, k in enumerate(subset):
        self._tell('each against the mean', n / len(subset))
        mean = self._mean([j for j in subset if j != k])
        chord = (self.scores[k] + self._of_soup(mean)) / 2
        half = between(mean, self.pool.ingredients[k])
        drops[k] = chord - self._of_soup(half)
      worst = max(subset, key=lambda k: drops[k])
      if not drops[worst] > self.tolerance:
        break
      subset = [k for k in subset if k != worst]
    return subset, drops

  def _statistics(self, mean: Params, first: int) -> dict[str, float]:
    paths = self.paths
    is_statistic = _tree.statistics_of(paths)
    if not is_statistic.any():
      return {}
    some = {p for p, x in zip(paths, is_statistic) if x}
    own = between(mean, self.pool.ingredients[first], some, t=1.0)
    scores = {'first': self._score(own), 'averaged': self._score(mean)}
    if self.recalibrate_fn is not None:
      scores['re-estimated'] = self._of_soup(mean)
    return scores

  def _parts_of_worst(self):
    """Averages part by part the pair with the largest barrier, if any has."""
    if not np.nanmax(self.drops, initial=0) > self.tolerance:
      return None, {}, None
    ends = np.unravel_index(np.nanargmax(self.drops), self.drops.shape)
    i, j = sorted(map(int, ends), key=lambda k: -self.scores[k])
    better, other = (self.pool.ingredients[k] for k in (i, j))
    parts = parts_of(self.paths)
    falls = {}
    for n, (name, paths) in enumerate(parts.items()):
      self._tell('parts', n / len(parts))
      mixed = between(better, other, paths)
      falls[name] = self.scores[i] - self._of_soup(mixed)
    if not falls:
      return (i, j), {}, None
    worst = max(falls, key=lambda name: falls[name])
    rest = set(self.paths) - parts[worst]
    left = self._of_soup(between(better, other, rest))
    chord = (self.scores[i] + self.scores[j]) / 2
    return (i, j), falls, (worst, chord - left)


def parts_of(paths: Sequence[_tree.Path]) -> dict[str, set[_tree.Path]]:
  """Subtrees that are averaged one by one: blocks, the head; and all norms.

  The tree is cut where it has the most groups, but not too many.
  """
  flat = [tuple('/'.join(p).replace('.', '/').split('/')) for p in paths]
  best: dict[str, set[_tree.Path]] = {}
  for depth in range(1, max(map(len, flat), default=0) + 1):
    groups: dict[str, set[_tree.Path]] = {}
    for path, keys in zip(paths, flat):
      groups.setdefault('/'.join(keys[:depth]), set()).add(path)
    if len(groups) > _MOST_PARTS:
      break
    if len(groups) > len(best):
      best = groups
    if len(best) > 3:
      break
  return best if len(best) > 1 else {}


def between(
    theta_1: Params,
    theta_2: Params,
    paths: Collection[_tree.Path] | None = None,
    t: float = 0.5,
) -> Params:
  """`(1 - t) theta_1 + t theta_2` in some leaves (None: all), else theta_1."""
  first, second = _tree.flatten(theta_1), _tree.flatten(theta_2)
  others = second.by_path
  rows = [
      i
      for i, (path, x) in enumerate(zip(first.paths, first.leaves))
      if _tree.is_float(x) and (paths is None or path in paths)
  ]
  mixed = _between(
      [first.leaves[i] for i in rows],
      [others[first.paths[i]] for i in rows],
      _tree.numbers(t),
  )
  leaves = list(first.leaves)
  for i, x in zip(rows, mixed):
    leaves[i] = x
  return first.replace(leaves)


@jax.jit
def _between(first, second, t):
  def mix(x, y):
    x_wide, y_wide = (z.astype(_tree.wide_dtype(z.dtype)) for z in (x, y))
    share = t.astype(x_wide.dtype)
    return ((1 - share) * x_wide + share * y_wide).astype(x.dtype)

  return [mix(x, y) for x, y in zip(first, second)]


def _classes(logits: Any) -> np.ndarray:
  """The predicted class of each example, `[N]`."""
  array = np.asarray(jax.device_get(logits))
  # Small floats such as bfloat16 are of kind V.
  is_matrix = array.ndim == 2 and array.size and array.dtype.kind in 'fiuV'
  if not is_matrix or (array != array).any():
    raise ValueError(
        f'logits_fn returned {array.dtype}{list(array.shape)}: expected logits '
        '[N, C] of N held-out examples, without NaN.'
    )
  return array.argmax(-1)


def _recalibrated(params: Params, returned: Any) -> Params:
  """What recalibrate_fn returned, if it has all parameters."""
  theirs = jax.tree.map(np.shape, returned, is_leaf=lambda x: x is None)
  ours = jax.tree.map(np.shape, params)
  if theirs != ours:
    raise ValueError(
        f'recalibrate_fn returned {returned!r:.80}: expected all parameters '
        'that it was given, in their shapes, with new statistics.'
    )
  return returned
