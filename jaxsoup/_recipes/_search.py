"""What the searches over subsets share: a running sum, remembered scores."""

from collections.abc import Callable
from collections.abc import Sequence
import functools

import jax
import numpy as np

from jaxsoup import _checked
from jaxsoup import _mixing
from jaxsoup import _tree
from jaxsoup._soup import AtMost
from jaxsoup._soup import Scores
from jaxsoup._soup import SearchInfo
from jaxsoup._soup import Soup
from jaxsoup._soup import Trial
from jaxsoup.typing import EvalFn
from jaxsoup.typing import Members
from jaxsoup.typing import Params
from jaxsoup.typing import Scalar


def alpha_of(members: Members, num_ingredients: int) -> np.ndarray:
  """`[K]` float32; members that are given more than once count more."""
  counts = np.bincount(members, minlength=num_ingredients)
  return (counts / len(members)).astype(np.float32)


def number(score: Scalar, said: str, who: str) -> float:
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
      log: Scores | None,
      on_trial: Callable[[Trial], None] | None,
  ):
    self.accepted: tuple[int, ...] = ()
    self.score = -np.inf
    self._checked = _checked.Checked(ingredients)
    self._eval_fn = eval_fn
    self._strict = strict
    self._log: Scores = {} if log is None else log
    self._on_trial = on_trial or (lambda trial: None)
    self._total: list[jax.Array] | None = None
    self._scores: dict[Members, float] = {}
    self._trials: list[Trial] = []

  def scores_of_singles(self) -> list[float]:
    """The score of every ingredient alone."""
    singles = range(len(self._checked))
    unknown = [k for k in singles if self._is_open(self._log.get((k,)))]
    for k, leaves in _checked.in_order(self._checked, unknown):
      self._score((k,), functools.partial(list, leaves))
    for k in singles:
      self._score((k,), list)
    return [self._scores[k,] for k in singles]

  def start_from(self, members: Members) -> None:
    """Makes the mean of these the current soup."""
    self.accepted = members
    self._total = _mixing.weighted_sum(self._checked, members)
    self._score(members, self._mean)
    self.score = self._scores[members]

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
        scores=dict(sorted(self._scores.items())),
        order=tuple(order),
        strict=self._strict,
        duplicates=self._checked.duplicates(),
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
    if not isinstance(score, AtMost) and self._reaches(score, self.score):
      self._total = _mixing.add(self._total, leaves(), numbers[0])
      self.accepted, self.score, is_kept = accepted, score, True
    self._trials.append(Trial(k, members, score, is_kept))
    self._on_trial(self._trials[-1])

  def _reaches(self, score: float, bar: float) -> bool:
    return score > bar if self._strict else score >= bar

  def _score(
      self,
      members: Members,
      floats_fn: Callable[[], list[jax.Array]],
      bar: float = -np.inf,
  ) -> float | AtMost:
    """A candidate's score; its leaves are made only if the log lacks it.

    Exact if it reaches the bar, else maybe an `AtMost`.
    """
    if self._is_open(self._log.get(members), bar):
      params = self._params(floats_fn(), members)
      at_least = getattr(self._eval_fn, 'at_least', None)
      if bar == -np.inf or at_least is None:
        returned: Scalar | AtMost = self._eval_fn(params)
      else:
        returned = at_least(params, bar, strict=self._strict)
      score = self._valid(returned, members, 'eval_fn returned')
      if self._is_open(score, bar):
        raise ValueError(
            f'eval_fn returned {score!r}, not an exact score, and the bar is '
            f'{bar}: a bound is allowed only if it does not reach the bar.'
        )
      self._log[members] = score
    score = self._valid(self._log[members], members, 'the score log holds')
    if not isinstance(score, AtMost):
      self._scores[members] = score
    return score

  def _is_open(
      self, score: Scalar | AtMost | None, bar: float = -np.inf
  ) -> bool:
    """Whether a score does not tell if the candidate reaches the bar."""
    if isinstance(score, AtMost):
      return self._reaches(score.bound, bar)
    return score is None

  def _valid(
      self, score: Scalar | AtMost, members: Members, said: str
  ) -> float | AtMost:
    """The same as a float, or as an `AtMost` of a float."""
    who = ' + '.join(map(self._checked.name, members))
    if isinstance(score, AtMost):
      return AtMost(number(score.bound, said, who))
    return number(score, said, who)

  def _params(self, floats: list[jax.Array], members: Members) -> Params:
    # Keys and counters must not depend on what was read: a log spares reads.
    return self._checked.replace(floats, min(members))

  def _mean(self) -> list[jax.Array]:
    count = _tree.numbers(len(self.accepted))
    return _mixing.rounded(self._total, count, self._checked.layers.dtypes)
