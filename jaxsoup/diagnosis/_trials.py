"""What held-out data tell: scores with intervals, barriers, which soup is best.

```
trials = Trials(case, scorer).run()
trials.chosen, trials.gain                  # members, Interval over best single
```
"""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent import futures
import copy
import dataclasses
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from jaxsoup import _workers
from jaxsoup import statistics
from jaxsoup import studies
from jaxsoup._recipes import _average
from jaxsoup._recipes import _search
from jaxsoup.diagnosis import _case
from jaxsoup.typing import EvalFn
from jaxsoup.typing import Members
from jaxsoup.typing import OutputsFn
from jaxsoup.typing import Params
from jaxsoup.typing import ParamsFn
from jaxsoup.typing import ProgressFn

# What a diagnosis does, one after another, and about how long each takes; all
# but the first need data.
STAGES = {'weights': 1.0, 'single models': 2.0, 'averages': 2.0}
# All comparisons of one kind together are wrong this often.
_ERROR = 0.05
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
  def unsigned(self) -> str:
    """For what is said to be below, or above."""
    return str(self).replace('+', '')

  @property
  def is_above(self) -> bool:
    """Whether it is above 0 by more than chance."""
    return self.low > 0 if np.isfinite(self.low) else self.value > 0

  @property
  def is_below(self) -> bool:
    return Interval(-self.value, -self.high, -self.low).is_above


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Scores the average of some ingredients, here or on a worker.

  Attributes:
    recalibrate_fn: gives averages new statistics of BatchNorm, or None.
  """

  ingredients: Sequence[Params]
  eval_fn: EvalFn
  recalibrate_fn: ParamsFn | None = None

  def __call__(self, members: Members) -> Answer:
    params = self._average(members)
    if hasattr(self.eval_fn, 'answers'):
      score, right = self.eval_fn.answers(params)
    else:
      score, right = self.eval_fn(params), None
    return Answer(_search.number(score, 'eval_fn returned', 'a model'), right)

  def _average(self, members: Members) -> Params:
    if len(members) == 1:
      return self.ingredients[members[0]]
    # Ingredients with alpha 0 are not read, so they need not be compatible.
    alpha = _search.alpha_of(members, len(self.ingredients))
    params = _average.average(self.ingredients, alpha).params
    if self.recalibrate_fn is None:
      return params
    return _recalibrated(params, self.recalibrate_fn(params))

  def __copy__(self) -> 'Evaluation':
    fns = copy.copy(self.ingredients), copy.copy(self.eval_fn)
    return Evaluation(*fns, self.recalibrate_fn)


def _recalibrated(params: Params, returned: Any) -> Params:
  """What recalibrate_fn returned, if it has all parameters."""
  theirs = jax.tree.map(np.shape, returned, is_leaf=lambda x: x is None)
  if theirs != jax.tree.map(np.shape, params):
    raise ValueError(
        f'recalibrate_fn returned {returned!r:.80}: expected all parameters '
        'that it was given, in their shapes, with new statistics.'
    )
  return returned


class Scorer:
  """Scores averages of ingredients, and compares scores.

  Attributes:
    num_examples: how many examples a score is a mean over.
    is_guess: whether that is the smallest number that fits the scores.
    num_calls: how many models were evaluated.
    recalibrates: whether averages get new statistics of BatchNorm.
  """

  def __init__(
      self,
      evaluation: Evaluation,
      num_examples: int | None = None,
      executor: futures.Executor | None = None,
      num_ahead: int | None = None,
  ):
    self.num_examples = num_examples
    self.is_guess = False
    self.num_calls = 0
    self.recalibrates = evaluation.recalibrate_fn is not None
    self._evaluation = evaluation
    on_wait = getattr(evaluation.ingredients, 'look_for_stop', lambda: None)
    self._calls = _workers.Calls(executor, evaluation, num_ahead, on_wait)

  def answers(self, averages: Iterable[Members]) -> Iterator[Answer]:
    """Of the averages of these members, one after another."""
    for answer in self._calls.values(averages):
      self.num_calls += 1
      yield answer

  def answer(self, members: Members, has_own_statistics: bool = True) -> Answer:
    """The same of one, perhaps with averaged statistics."""
    self.num_calls += 1
    if has_own_statistics:
      return self._evaluation(members)
    return dataclasses.replace(self._evaluation, recalibrate_fn=None)(members)

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
    self.is_guess = True

  def difference(self, a: Answer, b: Answer, num: int = 1) -> Interval:
    """`a - b`, one of `num` comparisons."""
    if a.right is None or b.right is None:
      return self.fall([a], b, num)
    level = 1 - _ERROR / num
    return Interval(*statistics.mcnemar(a.right, b.right, level=level)[:3])

  def fall(
      self, singles: Sequence[Answer], average: Answer, num: int = 1
  ) -> Interval:
    """How far an average lies below the mean of its ingredients."""
    from scipy import special

    answers = [*singles, average]
    weights = np.array([*[1 / len(singles)] * len(singles), -1])
    scores = np.array([a.score for a in answers])
    value = float(weights @ scores)
    rights = [a.right for a in answers if a.right is not None]
    if len(rights) == len(answers):
      each = weights @ np.array(rights)
      error = each.std() / np.sqrt(len(each))
    elif self.num_examples and ((scores >= 0) & (scores <= 1)).all():
      # As if the examples were others each time, which is cautious.
      variance = (weights**2 * scores * (1 - scores)).sum()
      error = np.sqrt(variance / self.num_examples)
    else:
      return Interval(value)
    half = float(special.ndtri(1 - _ERROR / num / 2) * error)
    return Interval(value, value - half, value + half)


class Trials:
  """Evaluates ingredients and averages of them, at most 2 K + 4 models.

  Attributes:
    score: the scorer.
    answers: of usable ingredients.
    best: the best single one.
    base: the best of those that no fact leaves out.
    soups: answers by members.
    chosen: members of the best soup; the best single model if there is none.
    gain: of that soup over the best single model.
    full: the same of the soup of all that no fact leaves out.
    fall: how far that soup lies below the mean of its ingredients.
    drops: by ingredient, how far its average with `base` lies below the mean of
      their scores.
    bad: ingredients with a barrier to `base`.
    weak: the one that is much worse than all others.
    uneven: others that are worse than the best, where the soup is too.
    labels: by ingredient, how many predictions agree as they are, and in
      another order of classes.
    statistics: re-estimated minus averaged statistics; None without.
    are_stale: whether averaged ones bring the soup below its ingredients.
    barriers: [K, K], NaN where not measured.
    disagreement: [K, K], only if thorough.
  """

  def __init__(
      self,
      case: _case.Case,
      scorer: Scorer,
      logits_fn: OutputsFn | None = None,
      is_thorough: bool = False,
      progress_fn: ProgressFn | None = None,
  ):
    self.score = scorer
    self._case, self._logits_fn = case, logits_fn
    self._is_thorough = is_thorough
    self._tell = progress_fn or (lambda stage, share: None)
    num = len(case.pool.names)
    self._most = 2 * num + 4
    self.barriers = np.full((num, num), np.nan)
    self.disagreement = np.full((num, num), np.nan)
    self.drops: dict[int, Interval] = {}
    self.labels: dict[int, tuple[float, float]] = {}
    self.soups: dict[Members, Answer] = {}
    self.full, self.fall = Interval(np.nan), Interval(np.nan)
    self.statistics: Interval | None = None
    self.are_stale = False
    self._classes: dict[int, np.ndarray] = {}

  @property
  def scores(self) -> np.ndarray:
    """Of single models, [K]; NaN of those that were not scored."""
    scores = np.full(len(self._case.pool.names), np.nan)
    for k, answer in self.answers.items():
      scores[k] = answer.score
    return scores

  @property
  def num_predicted(self) -> int:
    return len(next(iter(self._classes.values()), ()))

  def run(self, usable: Sequence[int], suspects: Sequence[int]) -> 'Trials':
    """Measures as much as it takes to choose a soup.

    Args:
      usable: ingredients that have a score.
      suspects: those of which data tell what they cost.
    """
    self.answers = {}
    singles = self.score.answers((k,) for k in usable)
    for k, answer in zip(usable, singles):
      self.answers[k] = answer
      self._tell('single models', len(self.answers) / len(usable))
    self.score.look(list(self.answers.values()))
    sound = [k for k in self._case.members if k in usable]
    by_score = lambda k: self.answers[k].score
    self.best = max(usable, key=by_score)
    self.base = max(sound, key=by_score, default=self.best)
    if len(sound) > 1:
      self._soup(sound)
      self.full = self._gain(sound)
      of_all = [self.answers[k] for k in sound]
      self.fall = self.score.fall(of_all, self.soups[tuple(sound)])
    below = self._below(usable)
    self._compare_labels(
        [k for k in sorted(sound, key=by_score)[:2] if k in below]
    )
    self._compare_halves(usable, suspects)
    self._sort(sound, below)
    out = {*self.bad, *self.weak, *self.uneven, *self.labels}
    rest = [k for k in sound if k not in out]
    self._try(rest)
    if len(self.bad) > len(sound) / 2:
      # Perhaps the best one is that which does not fit.
      self._try([k for k in sound if k != self.base])
    self._choose(rest)
    if self._is_thorough:
      self._compare_all(usable)
    return self

  def _tell_average(self) -> None:
    """Of the models that may be evaluated after the single ones."""
    done = self.score.num_calls - len(self.answers)
    num = self._most - len(self.answers)
    if self._is_thorough:
      num += len(studies.connected_pairs(self.scores, list(self.answers)))
    self._tell('averages', min(done / num, 1))

  def _below(self, usable: Sequence[int]) -> set[int]:
    """Those that are worse than the base by more than chance."""
    base, num = self.answers[self.base], max(len(usable) - 1, 1)
    gap = lambda k: self.score.difference(base, self.answers[k], num)
    return {k for k in usable if k != self.base and gap(k).is_above}

  def _compare_halves(
      self, usable: Sequence[int], suspects: Sequence[int]
  ) -> None:
    """The average of each with the base: of all if the soup is worse."""
    wanted = [
        k
        for k in (usable if self.full.is_below else suspects)
        if k != self.base and k not in self.labels
    ]
    room = max(self._most - self.score.num_calls, 0)
    self._pairs([(k, self.base) for k in wanted[:room]], len(usable) - 1)

  def _pairs(self, pairs: Sequence[tuple[int, int]], num: int) -> None:
    halves = self.score.answers([tuple(sorted(pair)) for pair in pairs])
    for pair, half in zip(pairs, halves):
      both = [self.answers[k] for k in pair]
      drop = self.score.fall(both, half, max(num, 1))
      self.barriers[pair] = self.barriers[pair[::-1]] = drop.value
      if pair[1] == self.base:
        self.drops[pair[0]] = drop
      self._tell_average()

  def _sort(self, sound: Sequence[int], below: set[int]) -> None:
    """Tells members with a barrier, one that is weak, and uneven ones."""
    self.bad = [k for k in sound if k in self.drops and self.drops[k].is_above]
    left = [k for k in sound if k not in (*self.labels, *self.bad)]
    self.weak = self._outlier(left)
    is_uneven = lambda k: k in below and k not in self.weak
    self.uneven = list(filter(is_uneven, left)) if self.full.is_below else []

  def _outlier(self, members: Sequence[int]) -> list[int]:
    """The worst, if it is far below the next of at least four others.

    By twice what those span, and with twice the errors of the next: once as
    much was seen in pools without a fault (`tests/benchmarks/diagnosis.py`).
    """
    if len(members) < 5:
      return []
    last, *above = sorted(members, key=lambda k: self.answers[k].score)
    scores = [self.answers[k].score for k in above]
    gap = self.score.difference(self.answers[above[0]], self.answers[last])
    is_double = gap.value > 1 - scores[0] or scores[0] > 1
    is_out = gap.is_above and gap.value > 2 * (scores[-1] - scores[0])
    return [last] if is_out and is_double else []

  def _try(self, members: Sequence[int]) -> None:
    is_new = len(members) > 1 and tuple(members) not in self.soups
    if is_new and (self.score.num_calls < self._most or self._is_thorough):
      self._soup(members)

  def _soup(self, members: Sequence[int]) -> None:
    self.soups[tuple(members)] = self.score.answer(tuple(members))
    self._tell_average()

  def _gain(self, members: Sequence[int]) -> Interval:
    answer = self.soups[tuple(members)]
    return self.score.difference(answer, self.answers[self.best])

  def _choose(self, rest: Sequence[int]) -> None:
    """The best soup; what new statistics of BatchNorm change in it."""
    self.chosen: Members = (self.best,)
    self.gain = Interval(0.0)
    if not self.soups:
      return
    # Among equals that without what has a barrier.
    key = lambda s: (self.soups[s].score, s == tuple(rest), len(s))
    self.chosen = max(self.soups, key=key)
    self.gain = self._gain(self.chosen)
    if self.score.recalibrates and self._case.has_statistics:
      old = self.score.answer(self.chosen, has_own_statistics=False)
      new = self.soups[self.chosen]
      self.statistics = self.score.difference(new, old)
      fall = self.score.fall([self.answers[k] for k in self.chosen], old)
      self.are_stale = self.statistics.is_above and fall.is_above

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

  def _predicted(self, k: int) -> np.ndarray:
    if k not in self._classes:
      self.score.num_calls += 1
      logits = self._logits_fn(self._case.pool.ingredients[k])  # type: ignore[misc]
      self._classes[k] = _classes(logits)
    num = len(self._classes[k])
    if num != self.num_predicted:
      raise ValueError(
          f'logits_fn returned logits of {self.num_predicted} examples for one '
          f'model and of {num} for another: use the same examples for all.'
      )
    return self._classes[k]

  def _compare_labels(self, members: Sequence[int]) -> None:
    """Whether another order of classes makes two models agree.

    The confusion of their predictions, and the order that puts most on its
    diagonal: by chance, of C classes that is some 1 / C more than before.
    """
    from scipy import optimize

    for k in members if self._logits_fn else ():
      mine, theirs = self._predicted(self.base), self._predicted(k)
      num = max(mine.max(), theirs.max()) + 1
      counts = np.zeros((num, num))
      np.add.at(counts, (theirs, mine), 1)
      order = optimize.linear_sum_assignment(counts, maximize=True)[1]
      same, turned = mine == theirs, mine == order[theirs]
      gain = statistics.mcnemar(turned, same)
      if gain.low > 0 and turned.mean() > 0.5:
        self.labels[k] = float(same.mean()), float(turned.mean())

  def _compare_all(self, usable: Sequence[int]) -> None:
    """All pairs, and what differs in predictions."""
    pairs = studies.connected_pairs(self.scores, usable)
    new = [pair for pair in pairs if np.isnan(self.barriers[pair])]
    self._pairs(new, len(pairs))
    for j in usable if self._logits_fn else ():
      for k in usable:
        apart = self._predicted(j) != self._predicted(k)
        self.disagreement[j, k] = apart.mean()


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
