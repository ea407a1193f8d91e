"""What the searches over subsets share: a running sum, remembered scores."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
from typing import Any

import jax
import numpy as np

from jaxsoup import _checked
from jaxsoup import _mixing
from jaxsoup import _tree
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
  return float(sum(w * metrics[name] for name, w in weights.items()))


class Evaluations:
  """Scores of candidates: of each one that the log lacks, `eval_fn` is asked.

  Every evaluation of a search is one call of `score`.

  Attributes:
    scores: of every candidate that was asked for, and is exact.
    metrics: the same, where `eval_fn` returns several numbers.
  """

  def __init__(
      self,
      eval_fn: EvalFn,
      *,
      objective: Objective | None,
      log: Scores | None,
      strict: bool = False,
  ):
    self.scores: dict[Any, float] = {}
    self.metrics: dict[Any, dict[str, float]] = {}
    self._eval_fn = eval_fn
    self._objective = objective
    self._log: Scores = {} if log is None else log
    self._strict = strict

  def score(
      self,
      candidate: Candidate,
      params_fn: Callable[[], Params],
      who: str,
      bar: float = -np.inf,
  ) -> float | AtMost:
    """A candidate's score; it is made only if the log does not tell.

    Exact if it reaches the bar, else maybe an `AtMost`.
    """
    if self._is_open(self._log.get(candidate), bar):
      self._log[candidate] = self._evaluated(params_fn(), who, bar)
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
    return score

  def is_open(self, candidate: Candidate) -> bool:
    """Whether the exact score is unknown."""
    return self._is_open(self._log.get(candidate))

  def reaches(self, score: float, bar: float) -> bool:
    return score > bar if self._strict else score >= bar

  def _evaluated(self, params: Params, who: str, bar: float) -> Score:
    at_least = getattr(self._eval_fn, 'at_least', None)
    # A bound on which of several metrics? Those are all computed.
    if bar == -np.inf or at_least is None or self._objective is not None:
      returned = self._eval_fn(params)
    else:
      returned = at_least(params, bar, strict=self._strict)
    score = _valid(returned, 'eval_fn returned', who)
    if self._is_open(score, bar):
      raise ValueError(
          f'eval_fn returned {score!r}, not an exact score, and the bar is '
          f'{bar}: a bound is allowed only if it does not reach the bar.'
      )
    return score

  def _is_open(self, score: Score | None, bar: float = -np.inf) -> bool:
    """Whether a score does not tell if the candidate reaches the bar."""
    if isinstance(score, AtMost):
      is_of_others = self._objective is not None
      return is_of_others or self.reaches(score.bound, bar)
    return score is None


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


class Search:
  """A soup that changes by one ingredient at a time.

  Attributes:
    accepted: ingredients of the current soup, in the order they were taken.
    score: its score.
  """

  def __init__(
      self,
      ingredients: Sequence[Params],
      eval_fn: EvalFn,
      *,
      strict: bool,
      objective: Objective | None,
      log: Scores | None,
      on_trial: Callable[[Trial], None] | None,
  ):
    self.accepted: tuple[int, ...] = ()
    self.score = -np.inf
    self._checked = _checked.Checked(ingredients)
    self._strict = strict
    self._evaluations = Evaluations(
        eval_fn, objective=objective, log=log, strict=strict
    )
    self._on_trial = on_trial or (lambda trial: None)
    self._total: list[jax.Array] | None = None
    self._trials: list[Trial] = []

  def scores_of_singles(self) -> list[float]:
    """The score of every ingredient alone."""
    singles = range(len(self._checked))
    unknown = [k for k in singles if self._evaluations.is_open((k,))]
    for k, leaves in _checked.in_order(self._checked, unknown):
      self._score((k,), functools.partial(list, leaves))
    for k in singles:
      self._score((k,), list)
    return [self._evaluations.scores[k,] for k in singles]

  def start_from(self, members: Members) -> None:
    """Makes the mean of these the current soup."""
    self.accepted = members
    self._total = _mixing.weighted_sum(self._checked, members)
    self._score(members, self._mean)
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
      to_try = [
          k for k in order if with_replacement or (k in before) == (sign < 0)
      ]
      for k, then in zip(to_try, [*to_try[1:], None]):
        if len(self.accepted) != limit:
          self._try(k, sign, then)
      if self.accepted == before:
        return

  def soup(self, order: Sequence[int]) -> Soup[SearchInfo]:
    """The current soup, and all trials."""
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
    )
    alpha = alpha_of(self.accepted, len(self._checked))
    return Soup(self._params(self._mean(), self.accepted), alpha, info)

  def _try(self, k: int, sign: int, then: int | None) -> None:
    """Changes the soup by ingredient k; `then` is likely to be tried next."""
    accepted = (*self.accepted, k)
    if sign < 0:
      accepted = tuple(m for m in self.accepted if m != k)
    members = tuple(sorted(accepted))
    numbers = _tree.numbers(sign), _tree.numbers(len(members))

    @functools.cache
    def leaves() -> list[jax.Array]:
      read = self._checked[k]
      if then is not None:
        self._checked.prefetch(then)
      return read

    def candidate() -> list[jax.Array]:
      if self._total is None:  # It is the ingredient itself.
        return leaves()
      return _mixing.rounded_with(self._total, leaves(), *numbers)

    score = self._score(members, candidate, bar=self.score)
    is_kept = False
    if not isinstance(score, AtMost) and self._evaluations.reaches(
        score, self.score
    ):
      self._total = _mixing.add(self._total, leaves(), numbers[0])
      self.accepted, self.score, is_kept = accepted, score, True
    self._trials.append(Trial(k, members, score, is_kept))
    self._on_trial(self._trials[-1])

  def _score(
      self,
      members: Members,
      floats_fn: Callable[[], list[jax.Array]],
      bar: float = -np.inf,
  ) -> float | AtMost:
    who = ' + '.join(map(self._checked.name, members))
    params_fn = lambda: self._params(floats_fn(), members)
    return self._evaluations.score(members, params_fn, who, bar)

  def _params(self, floats: list[jax.Array], members: Members) -> Params:
    # Keys and counters must not depend on what was read: a log spares reads.
    return self._checked.replace(floats, min(members))

  def _mean(self) -> list[jax.Array]:
    count = _tree.numbers(len(self.accepted))
    return _mixing.rounded(self._total, count, self._checked.layers.dtypes)
