"""What a recipe returns.

```
soup = jaxsoup.greedy(ingredients, eval_fn)
soup.params, soup.alpha, soup.info.trials
```
"""

from collections.abc import Mapping
from collections.abc import MutableMapping
import dataclasses
from typing import Any
from typing import Generic
from typing import NamedTuple
from typing import TypeVar

import jax
import numpy as np

from jaxsoup.typing import Candidate
from jaxsoup.typing import Members
from jaxsoup.typing import Nested
from jaxsoup.typing import Params


@dataclasses.dataclass(frozen=True)
class AtMost:
  """An upper bound, short of the bar, on a score that was not computed.

  An `eval_fn` may have a method `at_least(params, bar, strict=False)`. It
  returns the exact score, a float, or gives up on a model that cannot reach the
  bar (`strict`: exceed it) and returns an `AtMost` whose bound does not reach
  it either. `jaxsoup.evaluation.mean_of` has one.

  A bound is not a number, and cannot be compared or added.

  Attributes:
    bound: the score is this or less.

  Example:
    >>> AtMost(0.75).bound < 0.8
    True
    >>> AtMost(0.75) < 0.8
    Traceback (most recent call last):
    ...
    TypeError: '<' not supported between instances of 'AtMost' and 'float'
  """

  bound: float


#: A number, several by name, or a bound on a number that was not computed.
Score = float | Mapping[str, float] | AtMost
#: Remembered scores.
Scores = MutableMapping[Candidate, Score]


class Trial(NamedTuple):
  """One candidate of a search over subsets.

  Attributes:
    ingredient: the one that was added, or taken out.
    members: the candidate's ingredients, ascending, repeated if taken twice.
    score: the candidate's score, higher is better; an `AtMost` if it was
      rejected before all examples were seen.
    accepted: whether the candidate became the soup.
  """

  ingredient: int
  members: Members
  score: float | AtMost
  accepted: bool


class AverageInfo(NamedTuple):
  """Of `uniform`, `average` and `interpolate`.

  Attributes:
    duplicates: groups of ingredients with equal parameters.
  """

  duplicates: tuple[Members, ...]


class SearchInfo(NamedTuple):
  """Of `greedy` and `pruned`.

  Attributes:
    trials: every candidate, in the order of trial.
    accepted: the soup's ingredients, in the order in which they were taken
      (`greedy`) or ascending (`pruned`).
    score: the soup's score.
    scores: every exact score that the search used, by members: `scores[(3,)]`
      is that of ingredient 3 alone. Bounds are in `trials` only.
    order: the order in which the ingredients were tried.
    strict: whether a tie was a rejection.
    duplicates: groups of ingredients with equal parameters.
    metrics: as `scores`, all numbers by name; empty if `eval_fn` returns one.
    stale: evaluations that workers of an executor had begun for a soup that had
      changed when they were due. It depends on who is how fast.
  """

  trials: tuple[Trial, ...]
  accepted: Members
  score: float
  scores: dict[Members, float]
  order: tuple[int, ...]
  strict: bool
  duplicates: tuple[Members, ...]
  metrics: dict[Members, dict[str, float]] = {}
  stale: int = 0


class AlphaTrial(NamedTuple):
  """One candidate of a search over alpha.

  Attributes:
    alpha: mixing coefficients, `[K]`, or nested dicts of those.
    score: its score, higher is better.
    metrics: all numbers by name; empty if `eval_fn` returns one.
  """

  alpha: Nested
  score: float
  metrics: dict[str, float]


class AlphaInfo(NamedTuple):
  """Of `search`.

  Attributes:
    trials: every candidate, in the order of trial; the first is the start.
    chosen: which of them the soup is.
    score: the soup's score.
    val_scores: of the second split, of the best candidate so far: of the start,
      then after each round; empty without `val_objective`.
    duplicates: groups of ingredients with equal parameters.
  """

  trials: tuple[AlphaTrial, ...]
  chosen: int
  score: float
  val_scores: np.ndarray
  duplicates: tuple[Members, ...]


class LearnedPlan(NamedTuple):
  """Where `learned` will keep the ingredients, decided before it reads them.

  Attributes:
    memory: 'resident', 'streamed' or 'cached'.
    reason: why, as text.
    resident_bytes: bytes of the stack, one more model, the mixed model and its
      gradient, on each device (on a CPU: in all).
    free_bytes: what is free there.
    reads_per_step: ingredients that a step reads from their source.
  """

  memory: str
  reason: str
  resident_bytes: int
  free_bytes: int
  reads_per_step: int


class LearnedInfo(NamedTuple):
  """Of `learned`.

  Attributes:
    beta: the temperature, which multiplies the logits.
    losses: loss of every step, `[num_steps]`.
    val_losses: loss on the second split before the first epoch and after each,
      `[num_epochs + 1]`; empty without a second split.
    best_epoch: the epoch after which alpha was taken; 0 is the start.
    duplicates: groups of ingredients with equal parameters.
    plan: where the ingredients were kept, and why.
  """

  beta: float
  losses: np.ndarray
  val_losses: np.ndarray
  best_epoch: int
  duplicates: tuple[Members, ...]
  plan: LearnedPlan | None = None  # None in soups stored by older versions.


class StockInfo(NamedTuple):
  """Of `model_stock`.

  Attributes:
    cosine: mean cosine between two task vectors, a nested dict of scalars.
    ratio: position of the soup between the initialization (0) and the mean of
      the ingredients (1), a nested dict of scalars.
    duplicates: groups of ingredients with equal parameters.
  """

  cosine: Nested
  ratio: Nested
  duplicates: tuple[Members, ...]


class AdapterInfo(NamedTuple):
  """Of `lora.average`.

  Attributes:
    residuals: of each layer `||dW - dW_r|| / ||dW||`, what the rank leaves out.
  """

  residuals: dict[str, float]


#: What a recipe saw and did.
Info = (
    AverageInfo | SearchInfo | AlphaInfo | LearnedInfo | StockInfo | AdapterInfo
)
InfoT = TypeVar('InfoT', bound=Info, covariant=True)


@dataclasses.dataclass(eq=False)
class _Static:
  """Values that are part of a pytree's structure, compared one by one."""

  structure: jax.tree_util.PyTreeDef
  values: list[Any]

  def __eq__(self, other: object) -> bool:
    return (
        isinstance(other, _Static)
        and self.structure == other.structure
        and all(map(np.array_equal, self.values, other.values))
    )

  def __hash__(self) -> int:
    return hash(self.structure)

  def __repr__(self) -> str:
    # What jax shows where two soups are mapped together.
    return f'alpha and info {self.values}'


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Soup(Generic[InfoT]):
  """An average of K models, and how it was made.

  A pytree whose leaves are those of `params`, and the `jax.Array`s that alpha
  and info hold where a recipe was traced.

  Attributes:
    params: `sum_k alpha_k theta_k`, in the container and dtypes of the
      ingredients.
    alpha: mixing coefficients, `[K]` float32; or nested dicts of those, one for
      each group of leaves. `alpha[k]` belongs to the k-th ingredient as given.
    info: what the recipe saw and did: one of the NamedTuples above.
  """

  params: Params
  alpha: Nested
  info: InfoT

  def tree_flatten_with_keys(self) -> tuple[tuple[Any, ...], _Static]:
    values, structure = jax.tree.flatten((self.alpha, self.info))
    arrays = [x if isinstance(x, jax.Array) else None for x in values]
    static = [x if a is None else None for x, a in zip(values, arrays)]
    keys = map(jax.tree_util.GetAttrKey, ('params', 'alpha_and_info'))
    children = tuple(zip(keys, (self.params, arrays)))
    return children, _Static(structure, static)

  @classmethod
  def tree_unflatten(cls, aux: _Static, children: Any) -> 'Soup[Any]':
    params, arrays = children
    values = [s if a is None else a for s, a in zip(aux.values, arrays)]
    return cls(params, *jax.tree.unflatten(aux.structure, values))
