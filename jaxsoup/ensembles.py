"""Ensembles of logits: the baseline, at K times the cost of inference.

```
logits = ensembles.collect(ingredients, logits_fn, batches)       # [K, N, C]
ensembles.uniform(logits).logits
ensembles.greedy(logits, lambda x: metrics.accuracy(x, labels)).logits
```

An ensemble averages outputs where a soup averages parameters, so the recipes
are the same functions, applied to logits: no ingredient is run twice.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent import futures
import copy
from typing import Any
from typing import Generic
from typing import NamedTuple

import jax
import numpy as np

from jaxsoup import _checked
from jaxsoup import _workers
from jaxsoup import evaluation
from jaxsoup._recipes import _average
from jaxsoup._recipes import _greedy
from jaxsoup._soup import AverageInfo
from jaxsoup._soup import InfoT
from jaxsoup._soup import SearchInfo
from jaxsoup._soup import Soup
from jaxsoup.typing import Array
from jaxsoup.typing import Batches
from jaxsoup.typing import LogitsFn
from jaxsoup.typing import Params
from jaxsoup.typing import Scalar
from jaxsoup.typing import Tree


class Ensemble(NamedTuple, Generic[InfoT]):
  """Averaged logits.

  Attributes:
    logits: `sum_k alpha_k logits_k`, `[N, C]`.
    alpha: `[K]`; the members are those that are not zero.
    info: that of the soup with the same recipe.
  """

  logits: jax.Array
  alpha: np.ndarray
  info: InfoT


def collect(
    ingredients: Sequence[Params],
    logits_fn: LogitsFn,
    batches: Batches,
    *,
    executor: futures.Executor | None = None,
    num_ahead: int | None = None,
) -> Tree:
  """Runs every ingredient once over the data.

  Args:
    ingredients: K pytrees, or `checkpoints.Ingredients`.
    logits_fn: `logits_fn(params, batch) -> [B, C]`, or a pytree of `[B, ...]`.
    batches: as in `evaluation.logits_of`: every walk reads the same examples in
      the same order.
    executor: where the models are run, as in `jaxsoup.greedy`; batches and
      `logits_fn` are sent to the workers, and logits come back. None: here.
    num_ahead: how many at a time, as in `jaxsoup.greedy`.

  Returns:
    Logits `[K, N, C]`, or a pytree of `[K, N, ...]`; examples that are masked
    or have weight 0 are dropped.

  Raises:
    ValueError: no ingredients, they do not fit (see `check_compatible`), a mask
      is invalid, or the order of the examples differs between walks.
  """
  run = _Run(ingredients, logits_fn, batches)
  num = len(run.checked)
  on_wait = getattr(ingredients, 'look_for_stop', lambda: None)
  made: Iterator[tuple[Tree, np.ndarray]]
  if executor is None:
    read = _checked.in_order(run.checked, range(num))
    made = (run.of(k, leaves) for k, leaves in read)
  else:
    made = _workers.Calls(executor, run, num_ahead, on_wait).values(range(num))
  stacked: Tree = None
  for k, (rows, hashes) in enumerate(made):
    if stacked is None:
      first = hashes
      # Filled one by one: a stack of rows that are there takes twice as much.
      empty = lambda x: np.empty((num, *x.shape), x.dtype)
      stacked = jax.tree.map(empty, rows)
    evaluation.require_same_examples(first, hashes)
    for of_all, row in zip(*map(jax.tree.leaves, (stacked, rows))):
      of_all[k] = row
  return stacked


class _Run:
  """The outputs of ingredients, and a hash of each example."""

  def __init__(
      self, ingredients: Sequence[Params], logits_fn: LogitsFn, batches: Batches
  ):
    self.checked = _checked.Checked(ingredients)
    self._given = ingredients, logits_fn, batches
    self._step = jax.jit(logits_fn)

  def __reduce__(self) -> Any:
    return _Run, self._given

  def __copy__(self) -> '_Run':
    return _Run(copy.copy(self._given[0]), *self._given[1:])

  def __call__(self, k: int) -> tuple[Tree, np.ndarray]:
    return self.of(k, self.checked[k])

  def of(self, k: int, leaves: list[jax.Array]) -> tuple[Tree, np.ndarray]:
    params = self.checked.replace(leaves, k)
    return evaluation.outputs_of(self._step, self._given[2], params)


def uniform(logits: Array) -> Ensemble[AverageInfo]:
  """The mean of the logits of all models.

  Args:
    logits: `[K, N, C]`.

  Returns:
    An `Ensemble` with alpha 1/K each.

  Example:
    >>> uniform(np.array([[[0.0, 1.0]], [[2.0, 1.0]]])).logits
    Array([[1., 1.]], dtype=float32)
  """
  return _ensemble(_average.uniform, logits)


def greedy(
    logits: Array,
    score_fn: Callable[[jax.Array], Scalar],
    *,
    order: Sequence[int] | None = None,
    strict: bool = False,
    num_passes: int = 1,
    with_replacement: bool = False,
    max_ingredients: int | None = None,
) -> Ensemble[SearchInfo]:
  """The greedy rule of recipe 1 over mean logits.

  Args:
    logits: held-out logits `[K, N, C]`.
    score_fn: `score_fn(logits [N, C]) -> scalar`, higher is better.
    order: as in `jaxsoup.greedy`, and so are the other options.
    strict: whether a tie is a rejection.
    num_passes: how often to go through the models.
    with_replacement: whether a model may count more than once.
    max_ingredients: stop at this many.

  Returns:
    An `Ensemble`. For its test logits mix those of the test data:
    `jaxsoup.mix(test_logits, ensemble.alpha)`.

  Source: Wortsman et al. 2022, appendix H; Caruana et al. 2004.
  """
  return _ensemble(
      _greedy.greedy,
      logits,
      score_fn,
      order=order,
      strict=strict,
      num_passes=num_passes,
      with_replacement=with_replacement,
      max_ingredients=max_ingredients,
  )


def _ensemble(
    recipe: Callable[..., Soup[InfoT]],
    logits: Array,
    *args: Any,
    **options: Any,
) -> Ensemble[InfoT]:
  if np.ndim(logits) != 3:
    raise ValueError(
        f'logits have shape {np.shape(logits)}: expected [K, N, C] for K '
        'models, as ensembles.collect returns them.'
    )
  soup = recipe(list(logits), *args, **options)
  return Ensemble(soup.params, soup.alpha, soup.info)
