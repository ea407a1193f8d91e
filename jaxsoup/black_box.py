"""Optimizers of alpha that need scores only, for `jaxsoup.search`.

```
soup = jaxsoup.search(ingredients, eval_fn, num_evaluations=100, key=key)
soup = jaxsoup.search(..., method=black_box.coordinate_search)
soup = jaxsoup.search(..., method=functools.partial(black_box.cma_es, step=0.1))
```

A method is a function that returns an object with `ask` and `tell`: see
`Method`, to bring another one.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import itertools
from typing import Any
from typing import NamedTuple
from typing import Protocol

import numpy as np


class Optimizer(Protocol):
  """What a method returns; it is asked and told in turns."""

  def ask(self) -> np.ndarray:
    """The candidates of the next round, `[n, G, K]`; with n = 0 it ends.

    They need not be mixing coefficients: `alpha_fn` of `search` makes them.
    """
    ...

  def tell(self, alphas: np.ndarray, scores: Sequence[float]) -> None:
    """Is told the candidates as they were scored, `[n, G, K]`, and scores."""
    ...


class Method(Protocol):
  """An optimizer, ready to start.

  Args:
    start: mixing coefficients of G groups, `[G, K]`.
    score: of the start; higher is better.
    rng: the only source of randomness.

  Returns:
    An `Optimizer`.
  """

  def __call__(
      self, start: np.ndarray, score: float, *, rng: np.random.Generator
  ) -> Optimizer:
    ...


def cma_es(
    start: np.ndarray,
    score: float,
    *,
    rng: np.random.Generator,
    step: float = 0.3,
    population: int | None = None,
) -> Optimizer:
  """CMA-ES on the hyperplane of coefficients that sum to one.

  It samples a Gaussian, and moves its mean and covariance to the better half of
  the samples. Uses the package `cma`, the reference implementation by the
  authors of the method, which needs NumPy only.

  Args:
    start: `[G, K]`, the first mean.
    score: not used.
    rng: the source of randomness; NumPy's global one is left alone.
    step: expected distance of the first samples from the start, in each group.
    population: candidates in a round; None is `4 + 3 ln(G (K - 1))`.

  Returns:
    An `Optimizer`.

  Raises:
    ImportError: `cma` is not installed.

  Source: Hansen and Ostermeier 2001. For soups: Akiba et al. 2024,
  "Evolutionary optimization of model merging recipes".
  """
  del score
  try:
    import cma
  except ImportError as e:
    raise ImportError(
        'cma is not installed: pip install "jaxsoup[search]", or choose '
        'another method (--method).'
    ) from e
  num = start.shape[-1]
  options: dict[str, Any] = {
      'randn': lambda *shape: rng.standard_normal(shape),
      'seed': np.nan,  # NumPy's global generator is not touched.
      'verbose': -9,
      # Scores such as accuracy have plateaus; the budget ends the search.
      'tolflatfitness': np.inf,
      'tolfun': 0,
      'tolfunhist': 0,
      # Of few candidates it would look for its own points in what it is told.
      'CMA_mirrors': 0,
  }
  if population is not None:
    options['popsize'] = population
  sigma = step / np.sqrt(num - 1)
  zeros = np.zeros(start[..., 1:].size)
  state = cma.CMAEvolutionStrategy(zeros, sigma, options)
  # The columns are orthonormal, and orthogonal to the ones.
  basis = np.linalg.svd(np.eye(num) - 1 / num)[0][:, : num - 1]
  return _CmaEs(state, start, basis)


class _CmaEs(NamedTuple):
  state: Any
  start: np.ndarray
  basis: np.ndarray

  def ask(self) -> np.ndarray:
    if self.state.stop():
      return np.empty((0, *self.start.shape))
    points = np.reshape(self.state.ask(), (-1, *self.start[..., 1:].shape))
    return self.start + points @ self.basis.T

  def tell(self, alphas: np.ndarray, scores: Sequence[float]) -> None:
    points = ((alphas - self.start) @ self.basis).reshape(len(alphas), -1)
    self.state.tell(list(points), [-score for score in scores])


def random_search(
    start: np.ndarray,
    score: float,
    *,
    rng: np.random.Generator,
    population: int = 8,
) -> Optimizer:
  """Uniform samples of the simplex, in each group: the baseline.

  Args:
    start: `[G, K]`, of which only the shape counts.
    score: not used.
    rng: the source of randomness.
    population: candidates in a round.

  Returns:
    An `Optimizer`.
  """
  del score
  return _RandomSearch(start.shape, rng, population)


class _RandomSearch(NamedTuple):
  shape: tuple[int, ...]
  rng: np.random.Generator
  population: int

  def ask(self) -> np.ndarray:
    num_groups, num = self.shape
    return self.rng.dirichlet(np.ones(num), (self.population, num_groups))

  def tell(self, alphas: np.ndarray, scores: Sequence[float]) -> None:
    pass


def coordinate_search(
    start: np.ndarray,
    score: float,
    *,
    rng: np.random.Generator,
    step: float = 0.5,
    min_step: float = 0.01,
) -> Optimizer:
  """More, and less, of one ingredient at a time.

  A round scores `alpha + t (e_k - alpha)` with t of plus and minus the step,
  and moves to the better one if that is better than alpha. The step is halved
  when no ingredient of any group helps. Ingredients are tried in random order.

  Args:
    start: `[G, K]`.
    score: of the start.
    rng: the source of randomness.
    step: how far towards one ingredient, as a share.
    min_step: it ends with a shorter step.

  Returns:
    An `Optimizer`.
  """
  places = itertools.cycle(rng.permutation(start.size))
  return _CoordinateSearch(start, score, places, step, min_step)


@dataclasses.dataclass
class _CoordinateSearch:
  alpha: np.ndarray
  score: float
  places: Iterator[int]
  step: float
  min_step: float
  num_failed: int = 0

  def ask(self) -> np.ndarray:
    if self.num_failed == self.alpha.size:
      self.step, self.num_failed = self.step / 2, 0
    if self.step < self.min_step:
      return np.empty((0, *self.alpha.shape))
    group, k = np.unravel_index(next(self.places), self.alpha.shape)
    candidates = np.stack([self.alpha, self.alpha])
    towards = np.eye(self.alpha.shape[1])[k] - self.alpha[group]
    candidates[:, group] += np.outer([self.step, -self.step], towards)
    return candidates

  def tell(self, alphas: np.ndarray, scores: Sequence[float]) -> None:
    best = int(np.argmax(scores))
    self.num_failed += 1
    if scores[best] > self.score:
      self.alpha, self.score = alphas[best], scores[best]
      self.num_failed = 0


def category_experts(
    scores: Mapping[Any, Any],
    num_ingredients: int,
    *,
    correlation: float = 0.5,
) -> np.ndarray:
  """A start: one expert for each group of categories that go together.

  Categories whose scores are correlated over the models (Pearson, this or more)
  form a group, as do those linked by a third. The expert of a group is the
  model with the best mean of its standardized scores there; alpha is the mean
  over the groups.

  Args:
    scores: by members, such as a score log or `soup.info.metrics`, of which
      those of all single models are used: dicts of numbers by category.
    num_ingredients: K.
    correlation: from where on two categories go together.

  Returns:
    alpha, `[K]`.

  Raises:
    ValueError: no such scores of a model.

  Example:
    >>> scores = {(0,): {'code': 0.9, 'math': 0.8, 'poems': 0.2},
    ...           (1,): {'code': 0.2, 'math': 0.3, 'poems': 0.9},
    ...           (2,): {'code': 0.5, 'math': 0.5, 'poems': 0.3}}
    >>> category_experts(scores, 3)
    array([0.5, 0.5, 0. ], dtype=float32)

  Source: Maiti et al. 2025, "Souper-Model" (arXiv 2511.13254), which goes on
  with a grid of weights for the experts.
  """
  from scipy.sparse import csgraph

  rows = [scores.get((k,)) for k in range(num_ingredients)]
  known = [row for row in rows if isinstance(row, Mapping)]
  names = list(known[0]) if known else []
  if len(known) < num_ingredients or any(
      row.keys() != set(names) for row in known
  ):
    raise ValueError(
        'Category experts need a dict of scores of every single model, with '
        f'the same names: {len(known)} of {num_ingredients} have one. Have '
        'eval_fn return {category: score}.'
    )
  table = np.array([[row[name] for name in names] for row in known])
  table = table[:, np.ptp(table, axis=0) > 0]  # A tie speaks for none.
  if not table.size:
    return np.full(num_ingredients, 1 / num_ingredients, np.float32)
  table = (table - table.mean(0)) / table.std(0)
  is_near = table.T @ table / num_ingredients >= correlation
  num_groups, group_of = csgraph.connected_components(is_near)
  groups = [table[:, group_of == i] for i in range(num_groups)]
  experts = [group.mean(1).argmax() for group in groups]
  counts = np.bincount(experts, minlength=num_ingredients)
  return (counts / len(experts)).astype(np.float32)
