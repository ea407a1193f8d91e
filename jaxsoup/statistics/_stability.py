"""How stable the choice of a search is."""

from collections.abc import Callable
from collections.abc import MutableMapping
from typing import Any
from typing import NamedTuple
from typing import cast

import jax
import numpy as np

from jaxsoup._recipes import _greedy
from jaxsoup._soup import Score
from jaxsoup._soup import SearchInfo
from jaxsoup._soup import Soup
from jaxsoup.typing import ArrayLike
from jaxsoup.typing import Candidate
from jaxsoup.typing import Members
from jaxsoup.typing import Params


class Stability(NamedTuple):
  """How far the choice of a search depends on the examples it saw.

  Attributes:
    chosen: ingredients that it takes on all examples, ascending.
    frequency: share of resamples that take each ingredient, `[K]`.
    overlap: mean of `|A & B| / |A | B|` (Jaccard) of the resampled choice and
      `chosen`; 1 where the choice never changes.
    sizes: how many ingredients each resample takes, `[num_resamples]`.
    num_evaluated: candidates that had to be evaluated.
  """

  chosen: Members
  frequency: np.ndarray
  overlap: float
  sizes: np.ndarray
  num_evaluated: int


def stability(
    values_fn: Callable[[Members], ArrayLike],
    num_models: int,
    *,
    recipe: Callable[..., Soup[SearchInfo]] = _greedy.greedy,
    num_resamples: int = 100,
    seed: int = 0,
    answers: MutableMapping[Members, np.ndarray] | None = None,
) -> Stability:
  """Repeats a search on resampled held-out examples.

  The search itself is that of the recipe. Answers are remembered, so that a
  candidate is evaluated once, however many resamples try it: for an ensemble
  of cached logits it costs nothing; for soups one evaluation for each candidate
  that the search on all examples did not try, `num_evaluated` in all.

  Args:
    values_fn: per-example scores of the mean of some ingredients, `[N]`, higher
      is better. Of soups: `lambda members: metrics.correct(run(jaxsoup.uniform(
      [ingredients[k] for k in members]).params), label)`, with `run` an
      `evaluation.logits_of`. Of an ensemble: see the example.
    num_models: K.
    recipe: `jaxsoup.greedy` or `jaxsoup.pruned`, or one of them with options
      (`functools.partial`).
    num_resamples: how many.
    seed: of the resamples.
    answers: remembered values, read and written, by members.

  Returns:
    A `Stability`.

  Raises:
    ValueError: values that are no vector, or of different lengths; what the
      recipe raises.

  Example:
    >>> import functools
    >>> label = np.arange(40) % 2
    >>> right, wrong = np.eye(2)[label], np.eye(2)[1 - label]
    >>> logits = np.stack([2 * right, wrong, wrong])
    >>> stable = stability(
    ...     lambda members: logits[list(members)].mean(0).argmax(-1) == label,
    ...     num_models=3,
    ...     recipe=functools.partial(_greedy.greedy, strict=True),
    ... )
    >>> stable.chosen, stable.frequency.tolist(), stable.overlap
    ((0,), [1.0, 0.0, 0.0], 1.0)

  Source: Meinshausen and Buehlmann 2010, "Stability selection".
  """
  answers = {} if answers is None else answers
  num_evaluated = 0

  def values_of(members: Members) -> np.ndarray:
    nonlocal num_evaluated
    if members not in answers:
      values = np.asarray(jax.device_get(values_fn(members)))
      if values.ndim != 1 or not values.size:
        raise ValueError(
            f'values_fn returned shape {list(values.shape)} for {members}: '
            'expected [N], one number per example.'
        )
      answers[members] = values
      num_evaluated += 1
    return answers[members]

  # Nothing is read but the numbers that stand for the ingredients.
  ingredients = list(np.arange(num_models, dtype=np.float32))

  def choice(counts: np.ndarray) -> set[int]:
    scores = _Scores(values_of, counts)
    return set(recipe(ingredients, _never, scores=scores).info.accepted)

  num = len(values_of((0,)))
  rng = np.random.default_rng(seed)
  chosen = choice(np.ones(num, np.int64))
  choices = [
      choice(rng.multinomial(num, [1 / num] * num))
      for _ in range(num_resamples)
  ]
  taken = np.array([[k in c for k in range(num_models)] for c in choices])
  return Stability(
      chosen=tuple(sorted(chosen)),
      frequency=taken.mean(0),
      overlap=float(
          np.mean([len(c & chosen) / len(c | chosen) for c in choices])
      ),
      sizes=taken.sum(1),
      num_evaluated=num_evaluated,
  )


def _never(params: Params) -> float:
  raise AssertionError('Every score is known.')


class _Scores(dict[Candidate, Score]):
  """A score log that knows every candidate: the mean of resampled answers."""

  def __init__(
      self, values_of: Callable[[Members], np.ndarray], counts: np.ndarray
  ):
    super().__init__()
    self._values_of, self._counts = values_of, counts

  def get(self, members: Candidate, default: Any = None) -> Any:
    return self[members]

  def __missing__(self, candidate: Candidate) -> float:
    members = cast(Members, candidate)
    values = self._values_of(members)
    if values.shape != self._counts.shape:
      raise ValueError(
          f'values_fn returned {len(values)} numbers for {members}, and '
          f'{len(self._counts)} for ingredient 0: expected one per example.'
      )
    # Sums of right answers are exact, so that ties stay ties.
    return float(self._counts @ values.astype(float) / self._counts.sum())
