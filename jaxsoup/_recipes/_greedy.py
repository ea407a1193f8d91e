"""The greedy soup.

```
soup = jaxsoup.greedy(ingredients, eval_fn)
soup.info.accepted, soup.info.score
```
"""

from collections.abc import Callable
from collections.abc import Sequence
from concurrent import futures

import jax
import numpy as np

from jaxsoup._recipes import _search
from jaxsoup._soup import Scores
from jaxsoup._soup import SearchInfo
from jaxsoup._soup import Soup
from jaxsoup._soup import Trial
from jaxsoup.typing import EvalFn
from jaxsoup.typing import Objective
from jaxsoup.typing import Params


def greedy(
    ingredients: Sequence[Params],
    eval_fn: EvalFn,
    *,
    order: Sequence[int] | None = None,
    key: jax.Array | None = None,
    strict: bool = False,
    num_passes: int = 1,
    with_replacement: bool = False,
    max_ingredients: int | None = None,
    objective: Objective | None = None,
    scores: Scores | None = None,
    on_trial: Callable[[Trial], None] | None = None,
    executor: futures.Executor | None = None,
    num_ahead: int | None = None,
) -> Soup[SearchInfo]:
  """Adds ingredients one by one, and keeps each that does not hurt.

  ```
  soup = {}
  for k in order:
    if score(mean(soup + {k})) >= score(mean(soup)): soup = soup + {k}
  ```

  To resume after an interruption, call it again with the same `scores`: known
  trials are not evaluated again, and what they rejected is not read.

  Args:
    ingredients: K pytrees of one structure, or `checkpoints.Ingredients`.
    eval_fn: score of a model on held-out data, any metric, higher is better.
      Data that choose must not be the data that report. Where it can tell early
      that a candidate does not reach the present score, as `evaluation.mean_of`
      can for right and wrong answers, rejections cost less.
    order: indices in the order of trial, of all ingredients or some.
      By default the best single model is tried first (ties: the lower index
      first).
    key: a PRNG key, for a random order of all ingredients.
    strict: whether a tie is a rejection, as in the code of the paper's authors;
      by default a tie is accepted, as in the paper.
    num_passes: how often to go through the ingredients; later passes try those
      that were rejected, and end early when a pass accepts none.
    with_replacement: whether later passes also try those already accepted,
      which then count more than once.
    max_ingredients: stop when the soup has this many ingredients.
    objective: where `eval_fn` returns several scores by name: the name of the
      one that counts, weights `{'a': 0.7, 'b': 0.3}` of a sum, or a function of
      the dict, such as `evaluation.worst`. All of them are remembered, and each
      evaluation runs in full.
    scores: remembered scores, read and written; maps the indices of a candidate
      in ascending order to its score, such as `{(0,): 0.91, (0, 3): 0.92}`. A
      dict, or `checkpoints.ScoreLog`. Of a candidate that was rejected early it
      holds an `AtMost`.
    on_trial: is called after each trial.
    executor: where candidates are evaluated, such as a `ProcessPoolExecutor` of
      spawned processes: the guide "Many workers" says what `eval_fn` and
      ingredients have to be. All decisions are those without one. None: here.
    num_ahead: how many candidates are evaluated at a time, on the guess that
      those before them are rejected: at least as many as there are workers.
      None: twice the number of cores of this machine.

  Returns:
    A `Soup` with alpha `[K]` and a `SearchInfo`. One ingredient alone is its
    own soup. Only ingredients that were read here are checked for duplicates:
    with an executor those of the soup.

  Raises:
    ValueError: no ingredients, ingredients that do not fit, a score that is NaN
      or infinite, an objective that does not fit, an order that is empty or
      names an ingredient that is unknown or named before, or both an order and
      a key.
    TypeError: a score that is neither a number nor a dict of numbers, a
      `jax.Array` as an order, or an `eval_fn` that cannot be pickled.
    ChildProcessError: workers died; a score log keeps what was scored.

  Example:
    >>> models = [np.float32(x) for x in (1.0, 4.0, -2.0)]
    >>> soup = greedy(models, lambda x: -abs(x))
    >>> soup.info.accepted, soup.params
    ((0, 2), Array(-0.5, dtype=float32))

  Source: Wortsman et al. 2022, recipe 1. With replacement: Caruana et al. 2004,
  "Ensemble selection from libraries of models".
  """
  search = _search.Search(
      ingredients,
      eval_fn,
      strict=strict,
      objective=objective,
      log=scores,
      on_trial=on_trial,
      executor=executor,
      num_ahead=num_ahead,
  )
  limits = {'max_ingredients': max_ingredients, 'num_passes': num_passes}
  for name, value in limits.items():
    if value is not None and value < 1:
      raise ValueError(f'{name} is {value}: it must be at least 1.')
  num = len(ingredients)
  given = _given_order(order, key, num)
  if given is None:
    singles = search.scores_of_singles()
    given = sorted(range(num), key=lambda k: (-singles[k], k))
  limit = max_ingredients or num * num_passes
  search.run(given, 1, num_passes, limit, with_replacement)
  return search.soup(given)


def _given_order(
    order: Sequence[int] | None, key: jax.Array | None, num_ingredients: int
) -> list[int] | None:
  if key is not None and order is not None:
    raise ValueError(
        'Both order and key are given: pass the indices in the order of trial, '
        'or a key for a random order.'
    )
  if key is not None:
    # Under jit, because eager sampling transfers constants to the device.
    shuffle = jax.jit(jax.random.permutation, static_argnums=1)
    return jax.device_get(shuffle(key, num_ingredients)).tolist()
  if order is None:
    return None
  if isinstance(order, jax.Array):
    # A key is an array, too.
    raise TypeError(
        f'order is a jax.Array of dtype {order.dtype}: expected a list of '
        'indices. For a random order pass key=.'
    )
  indices = list(order) if np.iterable(order) else []
  is_known = all(
      (type(k) is int or isinstance(k, np.integer)) and 0 <= k < num_ingredients
      for k in indices
  )
  if not indices or not is_known or len(set(indices)) < len(indices):
    raise ValueError(
        f'order is {order!r}: expected indices in 0..{num_ingredients - 1}, '
        'each at most once, at least one.'
    )
  return [int(k) for k in indices]
