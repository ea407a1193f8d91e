"""What held-out data tell: scores with intervals, barriers, which soup is best.

```
trials = Trials(case, scorer, recalibrate_fn=None, logits_fn=None).run()
trials.chosen, trials.gain                  # members, Interval over best single
```
"""

from collections.abc import Sequence
import itertools
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from jaxsoup import _tree
from jaxsoup import statistics
from jaxsoup import studies
from jaxsoup._recipes import _average
from jaxsoup._recipes import _search
from jaxsoup.diagnosis import _checks
from jaxsoup.typing import EvalFn
from jaxsoup.typing import OutputsFn
from jaxsoup.typing import Params
from jaxsoup.typing import ParamsFn
from jaxsoup.typing import ProgressFn

# What a diagnosis does, one after another, and about how long each takes; all
# but the first need data.
STAGES = {'weights': 1.0, 'single models': 2.0, 'averages': 2.0}
# All comparisons of one kind together are wrong this often.
_ERROR = 0.05
_MOST_PARTS = 24
# The number of examples is read off scores with denominators up to this one.
_MOST_EXAMPLES = 5000


class Answer(NamedTuple):
  """A score, and which examples were right, [N], if that is known."""

  score: float
  right: np.ndarray | None = None


class Interval(NamedTuple):
  """A difference of scores; the ends are NaN if nothing tells its error."""

  value: float
  low: float = np.nan
  high: float = np.nan

  def __str__(self) -> str:
    if not np.isfinite(self.low):
      return f'{self.value:+.3g}'
    return f'{self.value:+.3g} [{self.low:+.3g}, {self.high:+.3g}]'

  @property
  def is_above(self) -> bool:
    """Whether it is above 0 by more than chance."""
    return self.low > 0 if np.isfinite(self.low) else self.value > 0

  @property
  def is_below(self) -> bool:
    return Interval(-self.value, -self.high, -self.low).is_above


class Scorer:
  """Scores models, and compares scores; counts evaluations."""

  def __init__(self, eval_fn: EvalFn, num_examples: int | None):
    self._eval_fn = eval_fn
    self.num_examples = num_examples
    self.num_calls = 0

  def __call__(self, params: Params) -> Answer:
    self.num_calls += 1
    answers = getattr(self._eval_fn, 'answers', None)
    score, right = answers(params) if answers else (self._eval_fn(params), None)
    score = _search.number(score, 'eval_fn returned', 'a model')
    return Answer(score, right)

  def look(self, answers: Sequence[Answer]) -> None:
    """How many examples there are: scores are quotients with one denominator.

    A divisor of it fits too if all scores have it: intervals are then wider.
    """
    scores = np.array([a.score for a in answers])
    if answers[0].right is not None:
      self.num_examples = len(answers[0].right)
    if self.num_examples or ((scores < 0) | (scores > 1)).any():
      return
    numbers = np.arange(1, _MOST_EXAMPLES + 1)[:, None]
    off = np.abs(scores * numbers - np.round(scores * numbers))
    fits = np.flatnonzero((off < 1e-6 * numbers).all(1))
    self.num_examples = int(fits[0]) + 1 if len(fits) else None

  def difference(self, a: Answer, b: Answer, num: int = 1) -> Interval:
    """`a - b`, one of `num` comparisons."""
    level = 1 - _ERROR / num
    if a.right is not None and b.right is not None:
      return Interval(*statistics.mcnemar(a.right, b.right, level=level)[:3])
    return self._normal([(a, 1.0), (b, -1.0)], level)

  def drop(self, a: Answer, b: Answer, half: Answer, num: int) -> Interval:
    """How far the average of two lies below the mean of their scores."""
    return self._normal([(a, 0.5), (b, 0.5), (half, -1.0)], 1 - _ERROR / num)

  def fall(self, answers: Sequence[Answer], soup: Answer) -> Interval:
    """How far a soup lies below the mean of its ingredients."""
    terms = [(a, 1 / len(answers)) for a in answers]
    return self._normal([*terms, (soup, -1.0)], 1 - _ERROR)

  def _normal(self, terms, level) -> Interval:
    from scipy import special

    value = sum(w * a.score for a, w in terms)
    scores = np.array([a.score for a, _ in terms])
    z = special.ndtri((1 + level) / 2)
    if all(a.right is not None for a, _ in terms):
      each = sum(w * a.right for a, w in terms)
      error = each.std() / np.sqrt(len(each))
    elif self.num_examples and ((scores >= 0) & (scores <= 1)).all():
      # As if the examples were others each time, which is cautious.
      weights = np.array([w for _, w in terms])
      variance = (weights**2 * scores * (1 - scores)).sum()
      error = np.sqrt(variance / self.num_examples)
    else:
      return Interval(float(value))
    return Interval(
        float(value), *map(float, (value - z * error, value + z * error))
    )


class Trials:
  """Evaluates ingredients and averages of them.

  Attributes:
    answers: of usable ingredients.
    best: the best single one.
    drops: by ingredient, how far its average with `base` lies below the mean of
      their scores.
    base: the best of those that no fact leaves out.
    soups: answers by members.
    chosen: members of the best soup; the best single model if there is none.
    gain: of that soup over the best single model.
    full: the same of the soup of all that no fact leaves out.
    fall: how far that soup lies below the mean of its ingredients.
    bad: ingredients with a barrier to `base`.
    weak: the one that is much worse than all others.
    uneven: others that are worse than the best, where the soup is too.
    labels: by ingredient, how many predictions agree as they are, and in
      another order of classes.
    statistics: re-estimated minus averaged statistics; None without.
    barriers: [K, K], NaN where not measured.
    parts: by part, how much the score of the better of the worst pair falls if
      this part alone is averaged; only if thorough.
    disagreement: [K, K], only if thorough.
  """

  def __init__(
      self,
      case: _checks.Case,
      scorer: Scorer,
      *,
      recalibrate_fn: ParamsFn | None = None,
      logits_fn: OutputsFn | None = None,
      is_thorough: bool = False,
      progress_fn: ProgressFn | None = None,
  ):
    self._case, self._pool, self._score = case, case.pool, scorer
    self._recalibrate_fn, self._logits_fn = recalibrate_fn, logits_fn
    self._is_thorough = is_thorough
    self._tell = progress_fn or (lambda stage, share: None)
    num = len(self._pool)
    self._most = 2 * num + 4
    self.barriers = np.full((num, num), np.nan)
    self.disagreement = np.full((num, num), np.nan)
    self.drops: dict[int, Interval] = {}
    self.labels: dict[int, tuple[float, float]] = {}
    self.soups: dict[tuple[int, ...], Answer] = {}
    self.parts: dict[str, float] = {}
    self.statistics: Interval | None = None
    self._classes: dict[int, np.ndarray] = {}

  @property
  def scores(self) -> np.ndarray:
    scores = np.full(len(self._pool), np.nan)
    for k, answer in self.answers.items():
      scores[k] = answer.score
    return scores

  @property
  def num_examples(self) -> int | None:
    return self._score.num_examples

  @property
  def num_calls(self) -> int:
    return self._score.num_calls

  @property
  def num_predicted(self) -> int:
    return len(next(iter(self._classes.values()), ()))

  def run(self, suspects: Sequence[int]) -> 'Trials':
    """Measures as much as it takes to choose a soup."""
    case, usable = self._case, self._case.usable
    self.answers = {}
    for i, k in enumerate(usable):
      self._tell('single models', i / len(usable))
      self.answers[k] = self._score(self._pool.ingredients[k])
    self._score.look(list(self.answers.values()))
    score = lambda k: self.answers[k].score
    self.best = max(usable, key=score)
    sound = [k for k in case.members if k in usable]
    self.base = max(sound, key=score, default=self.best)
    self.full, self.fall = Interval(np.nan), Interval(np.nan)
    if len(sound) > 1:
      self._soup(sound)
      self.full = self._gain(sound)
      self.fall = self._score.fall(
          [self.answers[k] for k in sound], self.soups[tuple(sound)]
      )
    is_low = self.full.is_below
    num = max(len(usable) - 1, 1)
    others = [k for k in usable if k != self.base]
    below = {
        k: self._score.difference(self.answers[self.base], self.answers[k], num)
        for k in others
    }
    if self._logits_fn is not None:
      self._predicted(self.base)
    for k in sorted(sound, key=score)[:2]:
      if k != self.base and below[k].is_above:
        self._compare_labels(k)
    wanted = [k for k in others if k not in self.labels] if is_low else suspects
    for i, k in enumerate(wanted):
      self._tell('averages', i / len(wanted))
      if k != self.base and self._score.num_calls < self._most:
        self._pair(k, self.base, num)
    out = {k for k, (same, other) in self.labels.items() if other > same}
    self.bad = [k for k in sound if k in self.drops and self.drops[k].is_above]
    left = [k for k in sound if k not in out and k not in self.bad]
    self.weak = self._outlier(left)
    self.uneven = []
    if is_low:
      self.uneven = [
          k
          for k in left
          if k in below and below[k].is_above and k not in self.weak
      ]
    rest = [
        k for k in sound if k not in (*self.bad, *self.weak, *self.uneven, *out)
    ]
    self._try(rest)
    if len(self.bad) > len(sound) / 2:
      # Perhaps the best one is that which does not fit.
      self._try([k for k in sound if k != self.base])
    self._choose(rest)
    self._of_statistics()
    if self._is_thorough:
      self._all()
    return self

  def _outlier(self, members: Sequence[int]) -> list[int]:
    """The worst, if it is far below the next of at least four others.

    By twice what those span, and with twice the errors of the next: once as
    much was seen in pools without a fault (`tests/benchmarks/diagnosis.py`).
    """
    if len(members) < 5:
      return []
    last, *above = sorted(members, key=lambda k: self.answers[k].score)
    scores = [self.answers[k].score for k in above]
    gap = self._score.difference(self.answers[above[0]], self.answers[last])
    is_double = gap.value > 1 - scores[0] or scores[0] > 1
    is_out = gap.is_above and gap.value > 2 * (scores[-1] - scores[0])
    return [last] if is_out and is_double else []

  def _try(self, members: Sequence[int]) -> None:
    is_new = len(members) > 1 and tuple(members) not in self.soups
    if is_new and (self._score.num_calls < self._most or self._is_thorough):
      self._soup(members)

  def _choose(self, rest) -> None:
    # Among equals that without what has a barrier.
    key = lambda s: (self.soups[s].score, s == tuple(rest), len(s))
    self.chosen: tuple[int, ...] = (self.best,)
    self.gain = Interval(0.0)
    if not self.soups:
      return
    self.chosen = max(self.soups, key=key)
    self.gain = self._gain(self.chosen)

  def _gain(self, members: Sequence[int]) -> Interval:
    answer = self.soups[tuple(members)]
    return self._score.difference(answer, self.answers[self.best])

  def optimism(self) -> float:
    """How much too high the best score is, as the same examples chose it.

    The mean of `s*(best*) - s(best*)` over resamples *, with their own best.
    """
    rights = [a.right for a in self.answers.values()]
    if any(right is None for right in rights):
      return 0.0
    right = np.array(rights, float)
    num = right.shape[1]
    rng = np.random.default_rng(0)
    draws = rng.multinomial(num, np.full(num, 1 / num), 500)
    scores = right @ draws.T / num
    best = scores.argmax(0)
    return float((scores.max(0) - right.mean(1)[best]).mean())

  def _soup(self, members: Sequence[int]) -> None:
    self._tell('averages', 0.0)
    average = self._average(members)
    self.soups[tuple(members)] = self._of_average(average)

  def _average(self, members: Sequence[int]) -> Params:
    alpha = np.zeros(len(self._pool), np.float32)
    alpha[list(members)] = 1 / len(members)
    # Ingredients with alpha 0 are not read, so they need not be compatible.
    return _average.average(self._pool.ingredients, alpha).params

  def _of_average(self, params: Params) -> Answer:
    if self._recalibrate_fn is not None:
      params = _recalibrated(params, self._recalibrate_fn(params))
    return self._score(params)

  def _of_statistics(self) -> None:
    """What new statistics of BatchNorm change, for the chosen soup."""
    paths = list(self._pool.leaves[self.best])
    if self._recalibrate_fn and self.soups and _tree.statistics_of(paths).any():
      old = self._score(self._average(self.chosen))
      new = self.soups[tuple(self.chosen)]
      self.statistics = self._score.difference(new, old)

  def _pair(self, k: int, other: int, num: int) -> None:
    pair = sorted((k, other), key=lambda x: -self.answers[x].score)
    half = between(*[self._pool.ingredients[x] for x in pair])
    a, b = (self.answers[x] for x in pair)
    drop = self._score.drop(a, b, self._of_average(half), num)
    self.barriers[k, other] = self.barriers[other, k] = drop.value
    if other == self.base:
      self.drops[k] = drop

  def _predicted(self, k: int) -> np.ndarray:
    if k not in self._classes:
      self._score.num_calls += 1
      logits = self._logits_fn(self._pool.ingredients[k])  # type: ignore[misc]
      self._classes[k] = _classes(logits)
    first = next(iter(self._classes.values()))
    if len(first) != len(self._classes[k]):
      raise ValueError(
          f'logits_fn returned logits of {len(first)} examples for one model '
          f'and of {len(self._classes[k])} for another: use the same examples '
          'for all.'
      )
    return self._classes[k]

  def _compare_labels(self, k: int) -> None:
    """Whether another order of classes makes two models agree.

    The confusion of their predictions, and the order that puts most on its
    diagonal: by chance, of C classes that is some 1 / C more than before.
    """
    from scipy import optimize

    if self._logits_fn is None:
      return
    mine, theirs = self._predicted(self.base), self._predicted(k)
    num = max(mine.max(), theirs.max()) + 1
    counts = np.zeros((num, num))
    np.add.at(counts, (theirs, mine), 1)
    order = optimize.linear_sum_assignment(counts, maximize=True)[1]
    same, turned = mine == theirs, mine == order[theirs]
    gain = statistics.mcnemar(turned, same)
    if gain.low > 0 and turned.mean() > 0.5:
      self.labels[k] = float(same.mean()), float(turned.mean())

  def _all(self) -> None:
    """All pairs, what differs in predictions, and the part to blame."""
    usable = self._case.usable
    pairs = studies.connected_pairs(self.scores, usable)
    for i, (j, k) in enumerate(pairs):
      self._tell('averages', i / len(pairs))
      if np.isnan(self.barriers[j, k]):
        self._pair(j, k, len(pairs))
    if self._logits_fn is not None:
      for j, k in itertools.product(usable, repeat=2):
        apart = self._predicted(j) != self._predicted(k)
        self.disagreement[j, k] = apart.mean()
    if not np.nanmax(self.barriers, initial=0) > 0:
      return
    ends = np.unravel_index(np.nanargmax(self.barriers), self.barriers.shape)
    better, other = sorted(map(int, ends), key=lambda k: -self.answers[k].score)
    first, second = (self._pool.ingredients[k] for k in (better, other))
    for name, paths in parts_of(self._case.all_geometry.paths).items():
      answer = self._of_average(between(first, second, paths))
      self.parts[name] = self.answers[better].score - answer.score


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
    theta_1: Params, theta_2: Params, paths: set[_tree.Path] | None = None
) -> Params:
  """`(theta_1 + theta_2) / 2` in some leaves (None: all), else theta_1."""
  first, others = _tree.flatten(theta_1), _tree.flatten(theta_2).by_path
  floats = first.floats
  rows = [p for p in floats if paths is None or p in paths]
  mixed = _middles([floats[p] for p in rows], [others[p] for p in rows])
  new = dict(zip(rows, mixed))
  return first.replace(new.get(p, x) for p, x in first.by_path.items())


@jax.jit
def _middles(first, second):
  def middle(x, y):
    wide = _tree.wide_dtype(x.dtype)
    return ((x.astype(wide) + y.astype(wide)) / 2).astype(x.dtype)

  return list(map(middle, first, second))


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
