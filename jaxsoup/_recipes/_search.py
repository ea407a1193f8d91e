"""What the searches over subsets share: a running sum, remembered scores."""

from collections.abc import Callable
from collections.abc import Generator
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent import futures
import contextlib
import copy
import dataclasses
from typing import Any

import jax
import numpy as np

from jaxsoup import _checked
from jaxsoup import _mixing
from jaxsoup import _tree
from jaxsoup import _workers
from jaxsoup._soup import AtMost
from jaxsoup._soup import Score
from jaxsoup._soup import Scores
from jaxsoup._soup import SearchInfo
from jaxsoup._soup import Soup
from jaxsoup._soup import Trial
from jaxsoup.typing import Candidate
from jaxsoup.typing import EvalFn
from jaxsoup.typing import Members
from jaxsoup.typing import Objective
from jaxsoup.typing import Params


def alpha_of(members: Members, num_ingredients: int) -> np.ndarray:
  """`[K]` float32; members that are given more than once count more."""
  counts = np.bincount(members, minlength=num_ingredients)
  return (counts / len(members)).astype(np.float32)


def number(score: Any, said: str, who: str) -> float:
  """A score as a float; raises unless it is one finite number."""
  if isinstance(score, jax.core.Tracer):
    raise TypeError(
        f'{said} a traced value for {who}: a search decides by its scores, and '
        'so cannot run under jax.jit, jax.vmap or jax.grad.'
    )
  value = np.asarray(jax.device_get(score))
  # Small floats such as bfloat16 are of kind V.
  if value.ndim or value.dtype.kind not in 'fiubV':
    shown = f'{score!r:.80}'
    if value.ndim and value.dtype.kind in 'fiubcV':
      shown = f'{value.dtype}{list(value.shape)}'
    raise TypeError(
        f'{said} {shown} for {who}; a score is one number, higher is better. '
        'Return a float.'
    )
  if not np.isfinite(float(value)):
    raise ValueError(
        f'{said} {float(value)} for {who}; scores must be finite. Leave that '
        "ingredient out, or return the metric's worst value instead."
    )
  return float(value)


def value_of(
    metrics: Mapping[str, float], objective: Objective | None, who: str
) -> float:
  """What an objective makes of several metrics."""
  if objective is None and len(metrics) == 1:
    return next(iter(metrics.values()))
  if callable(objective):
    return number(objective(metrics), 'the objective returned', who)
  weights: Mapping[str, float] = (
      {objective: 1.0} if isinstance(objective, str) else objective or {}
  )
  if not weights or weights.keys() - metrics.keys():
    wanted = ', '.join(map(repr, weights)) or 'not given'
    raise ValueError(
        f'{who} has the scores {", ".join(map(repr, metrics))}, and the '
        f'objective is {wanted}. Pass objective= (--objective): one of these '
        'names, a weight for each of several, or a function of all.'
    )
  total = sum(w * metrics[name] for name, w in weights.items())
  return number(total, 'the objective returned', who)


@dataclasses.dataclass(frozen=True)
class _Evaluation:
  """Makes a candidate and scores it, here or on a worker."""

  params_fn: Callable[[Any], Params]
  eval_fn: EvalFn
  strict: bool
  # Whether it may end early: a bound on which of several metrics?
  is_bounded: bool

  def __call__(self, recipe: Any, who: str, bar: float) -> Score:
    params = self.params_fn(recipe)
    at_least = getattr(self.eval_fn, 'at_least', None)
    if bar == -np.inf or at_least is None or not self.is_bounded:
      returned = self.eval_fn(params)
    else:
      returned = at_least(params, bar, strict=self.strict)
    score = _valid(returned, 'eval_fn returned', who)
    if self.is_open(score, bar):
      raise ValueError(
          f'eval_fn returned {score!r}, not an exact score, and the bar is '
          f'{bar}: a bound is allowed only if it does not reach the bar.'
      )
    return score

  def __copy__(self) -> '_Evaluation':
    fns = copy.copy(self.params_fn), copy.copy(self.eval_fn)
    return _Evaluation(*fns, self.strict, self.is_bounded)

  def is_open(self, score: Score | None, bar: float = -np.inf) -> bool:
    """Whether a score does not tell if the candidate reaches the bar."""
    if isinstance(score, AtMost):
      return not self.is_bounded or self.reaches(score.bound, bar)
    return score is None

  def reaches(self, score: float, bar: float) -> bool:
    return score > bar if self.strict else score >= bar


class Evaluations:
  """Scores of candidates: of each one that the log lacks, `eval_fn` is asked.

  Every evaluation of a search is one call of `score`. With an executor those
  that were announced are on their way.

  Attributes:
    scores: of every candidate that was asked for, and is exact.
    metrics: the same, where `eval_fn` returns several numbers.
    calls: of `eval_fn`, here or on workers.
  """

  def __init__(
      self,
      params_fn: Callable[[Any], Params],
      eval_fn: EvalFn,
      *,
      objective: Objective | None,
      log: Scores | None,
      strict: bool = False,
      executor: futures.Executor | None = None,
      num_ahead: int | None = None,
      on_wait: Callable[[], None] = lambda: None,
  ):
    self.scores: dict[Any, float] = {}
    self.metrics: dict[Any, dict[str, float]] = {}
    self._evaluation = _Evaluation(
        params_fn, eval_fn, strict, objective is None
    )
    self._objective = objective
    self._log: Scores = {} if log is None else log
    self.calls = _workers.Calls(executor, self._evaluation, num_ahead, on_wait)

  def score(
      self, candidate: Candidate, recipe: Any, who: str, bar: float = -np.inf
  ) -> float | AtMost:
    """A candidate's score; it is made only if the log does not tell.

    Exact if it reaches the bar, else maybe an `AtMost`. `candidate` is its name
    in the log, `who` that in messages; `params_fn` makes it from the recipe.
    """
    if self.is_open(candidate, bar):
      self._log[candidate] = self.calls.value(candidate, recipe, who, bar)
    score = _valid(self._log[candidate], 'the score log holds', who)
    if isinstance(score, Mapping):
      self.metrics[candidate] = dict(score)
      score = value_of(score, self._objective, who)
    elif self._objective is not None and not isinstance(score, AtMost):
      raise TypeError(
          f'the score of {who} is {score}, and an objective is given: eval_fn '
          'has to return a dict of scores by name.'
      )
    if not isinstance(score, AtMost):
      self.scores[candidate] = score
    self._remember_late()
    return score

  def announce(
      self, candidate: Candidate, recipe: Any, who: str, bar: float = -np.inf
  ) -> None:
    """Has a worker evaluate what is likely to be asked for next."""
    if self.is_open(candidate, bar):
      self.calls.begin(candidate, recipe, who, bar)

  def drop(self) -> None:
    """Takes all announcements back."""
    self.calls.drop()
    self._remember_late()

  def is_open(self, candidate: Candidate, bar: float = -np.inf) -> bool:
    """Whether it is unknown if it reaches the bar: of -inf, its score."""
    return self._evaluation.is_open(self._log.get(candidate), bar)

  def reaches(self, score: float, bar: float) -> bool:
    return self._evaluation.reaches(score, bar)

  def _remember_late(self) -> None:
    for candidate, score in self.calls.late():
      if self._log.get(candidate) is None:
        self._log[candidate] = score


def _valid(score: Any, said: str, who: str) -> Score:
  """The same as a float, as an `AtMost` of a float, or as several floats."""
  if isinstance(score, AtMost):
    return AtMost(number(score.bound, said, who))
  if isinstance(score, Mapping):
    if not score or not all(isinstance(name, str) for name in score):
      raise TypeError(
          f'{said} {score!r:.80} for {who}: expected scores by name, such as '
          "{'accuracy': 0.9}."
      )
    return {k: number(x, f'{said} {k!r}:', who) for k, x in score.items()}
  return number(score, said, who)


# What is done to a sum: an ingredient, and 1 to add it or -1 to take it out.
Steps = tuple[tuple[int, int], ...]


def members_of(steps: Steps) -> Members:
  """What is in a sum, in the order in which it came."""
  members: list[int] = []
  for k, sign in steps:
    members.append(k) if sign > 0 else members.remove(k)
  return tuple(members)


class Means:
  """Means of ingredients, by a running sum: each step reads one.

  The steps decide all bits of a mean: a worker makes it as the search does.

  Attributes:
    checked: the ingredients.
    then: the one that is likely to be read next.
  """

  def __init__(self, ingredients: Sequence[Params]):
    self.checked = _checked.Checked(ingredients)
    self.then: int | None = None
    self._ingredients = ingredients
    self._total: list[jax.Array] | None = None
    self._steps: Steps = ()
    # Of the last mean: how it was made, and what was read for it.
    self._last: tuple[Steps, list[jax.Array]] | None = None

  def __reduce__(self) -> Any:
    return Means, (self._ingredients,)

  def __copy__(self) -> 'Means':
    return Means(copy.copy(self._ingredients))

  def __call__(self, steps: Steps) -> Params:
    """The mean after these steps; the sum is that before the last one."""
    *before, (k, sign) = steps
    self._go_to(tuple(before))
    leaves = floats = self.checked[k]
    if self.then is not None:
      self.checked.prefetch(self.then)
    if before:
      numbers = _tree.numbers(sign), _tree.numbers(len(members_of(steps)))
      floats = _mixing.rounded_with(self._total, leaves, *numbers)
    self._last = steps, leaves
    return self._params(floats, steps)

  def of_all(self, steps: Steps) -> Params:
    """The same; the sum is that after the last one."""
    self._go_to(steps)
    count = _tree.numbers(len(members_of(steps)))
    dtypes = self.checked.layers.dtypes
    return self._params(_mixing.rounded(self._total, count, dtypes), steps)

  def _go_to(self, steps: Steps) -> None:
    """Adds up what the steps say."""
    if self._last and self._last[0] == steps != self._steps:
      self._add(self._last[1], steps[-1][1])
      self._steps = steps
    self._last = None
    if steps[: len(self._steps)] != self._steps:  # Those of another soup.
      self._total, self._steps = None, ()
    rest = steps[len(self._steps) :]
    order = _checked.in_order(self.checked, [k for k, _ in rest])
    for (_, leaves), (_, sign) in zip(order, rest):
      self._add(leaves, sign)
    self._steps = steps

  def _add(self, leaves: list[jax.Array], sign: int) -> None:
    self._total = _mixing.add(self._total, leaves, _tree.numbers(sign))
    # Otherwise reading could run ahead of adding, and fill the memory.
    jax.block_until_ready(self._total)

  def _params(self, floats: list[jax.Array], steps: Steps) -> Params:
    # Keys and counters must not depend on what was read: a log spares reads.
    return self.checked.replace(floats, min(members_of(steps)))


class Search:
  """A soup that changes by one ingredient at a time.

  Attributes:
    score: its score.
  """

  def __init__(
      self,
      ingredients: Sequence[Params],
      eval_fn: EvalFn,
      *,
      strict: bool,
      on_trial: Callable[[Trial], None] | None,
      **options: Any,
  ):
    """As `Evaluations`, which gets the other options."""
    self.score = -np.inf
    self._steps: Steps = ()
    self._means = Means(ingredients)
    self._checked = self._means.checked
    self._strict = strict
    self._evaluations = Evaluations(
        self._means,
        eval_fn,
        strict=strict,
        on_wait=getattr(ingredients, 'look_for_stop', lambda: None),
        **options,
    )
    self._on_trial = on_trial or (lambda trial: None)
    self._trials: list[Trial] = []

  @property
  def accepted(self) -> Members:
    """Ingredients of the current soup, in the order they were taken."""
    return members_of(self._steps)

  def scores_of_singles(self) -> list[float]:
    """The score of every ingredient alone."""
    singles = range(len(self._checked))
    unknown = [k for k in singles if self._evaluations.is_open((k,))]
    with contextlib.closing(self._in_turn(unknown, 1)) as turns:
      for k in turns:
        self._score(((k, 1),))
    for k in singles:
      self._score(((k, 1),))
    return [self._evaluations.scores[k,] for k in singles]

  def start_from(self, members: Members) -> None:
    """Makes the mean of these the current soup."""
    self._steps, self.score = tuple((k, 1) for k in members), -np.inf
    self._score(self._steps)
    self.score = self._evaluations.scores[members]

  def run(
      self,
      order: Sequence[int],
      sign: int,
      num_passes: int,
      limit: int,
      with_replacement: bool = False,
  ) -> None:
    """Tries to add ingredients (sign 1), or to take them out (-1).

    Pass after pass, until one changes nothing, or so many are accepted.
    """
    for _ in range(num_passes):
      before = self.accepted
      if len(before) == limit:
        return
      to_try = [
          k for k in order if with_replacement or (k in before) == (sign < 0)
      ]
      with contextlib.closing(self._in_turn(to_try, sign)) as turns:
        for k in turns:
          self._try(k, sign)
          if len(self.accepted) == limit:
            break
      if self.accepted == before:
        return

  def soup(self, order: Sequence[int]) -> Soup[SearchInfo]:
    """The current soup, and all trials."""
    params = self._means.of_all(self._steps)
    info = SearchInfo(
        trials=tuple(self._trials),
        accepted=self.accepted,
        score=self.score,
        # A resumed search computes them in another order.
        scores=dict(sorted(self._evaluations.scores.items())),
        order=tuple(order),
        strict=self._strict,
        duplicates=self._checked.duplicates(),
        metrics=dict(sorted(self._evaluations.metrics.items())),
        stale=self._evaluations.calls.num_stale,
    )
    return Soup(params, alpha_of(self.accepted, len(self._checked)), info)

  def _in_turn(self, to_try: Sequence[int], sign: int) -> Generator[int]:
    """Each of these; workers have begun with those that follow."""
    try:
      for i, k in enumerate(to_try):
        self._means.then = next(iter(to_try[i + 1 :]), None)
        for ahead in to_try[i : i + self._evaluations.calls.num_ahead]:
          self._evaluations.announce(
              *self._named((*self._steps, (ahead, sign))), self.score
          )
        yield k
    finally:
      self._means.then = None
      self._evaluations.drop()

  def _try(self, k: int, sign: int) -> None:
    """Changes the soup by ingredient k, if that is better."""
    steps = (*self._steps, (k, sign))
    score, is_kept = self._score(steps), False
    if not isinstance(score, AtMost) and self._evaluations.reaches(
        score, self.score
    ):
      self._steps, self.score, is_kept = steps, score, True
      self._evaluations.drop()  # They are changes of another soup.
    members = tuple(sorted(members_of(steps)))
    self._trials.append(Trial(k, members, score, is_kept))
    self._on_trial(self._trials[-1])

  def _score(self, steps: Steps) -> float | AtMost:
    return self._evaluations.score(*self._named(steps), self.score)

  def _named(self, steps: Steps) -> tuple[Members, Steps, str]:
    members = tuple(sorted(members_of(steps)))
    return members, steps, ' + '.join(map(self._checked.name, members))
