"""The pruned soup.

```
soup = jaxsoup.pruned(ingredients, eval_fn)
```
"""

from collections.abc import Callable
from collections.abc import Sequence
from concurrent import futures

from jaxsoup._recipes import _search
from jaxsoup._soup import Scores
from jaxsoup._soup import SearchInfo
from jaxsoup._soup import Soup
from jaxsoup._soup import Trial
from jaxsoup.typing import EvalFn
from jaxsoup.typing import Objective
from jaxsoup.typing import Params


def pruned(
    ingredients: Sequence[Params],
    eval_fn: EvalFn,
    *,
    strict: bool = False,
    num_passes: int | None = None,
    objective: Objective | None = None,
    scores: Scores | None = None,
    on_trial: Callable[[Trial], None] | None = None,
    executor: futures.Executor | None = None,
    num_ahead: int | None = None,
) -> Soup[SearchInfo]:
  """Starts from the mean of all, and removes each that does not help.

  ```
  soup = all ingredients
  for k in order, worst single model first, pass after pass:
    if score(mean(soup - {k})) >= score(mean(soup)): soup = soup - {k}
  ```

  On the held-out data it is never worse than the uniform soup, where it starts,
  nor than the best single model, which it returns if that is better than the
  pruned soup.

  Args:
    ingredients: K pytrees of one structure, or `checkpoints.Ingredients`.
    eval_fn: score of a model on held-out data, any metric, higher is better.
      Rejections may end early, as in `greedy`.
    strict: whether a tie keeps the ingredient; by default a tie removes it.
    num_passes: the maximal number of passes; None goes on until a pass removes
      none.
    objective: of several scores, as in `greedy`.
    scores: remembered scores, as in `greedy`; one log may serve both.
    on_trial: is called after each trial.
    executor: where candidates are evaluated, as in `greedy`.
    num_ahead: as in `greedy`.

  Returns:
    A `Soup` with alpha `[K]` and a `SearchInfo`, whose trials are removals.

  Raises:
    ValueError: no ingredients, ingredients that do not fit, or a score that is
      NaN or infinite.
    TypeError: a score that is neither a number nor a dict of numbers.

  Example:
    >>> import numpy as np
    >>> models = [np.float32(x) for x in (1.0, 4.0, -2.0)]
    >>> soup = pruned(models, lambda x: -abs(x))
    >>> soup.info.accepted, soup.params
    ((0, 2), Array(-0.5, dtype=float32))

  Source: Dansereau et al. 2023, section 3.
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
  singles = search.scores_of_singles()
  num = len(singles)
  order = sorted(range(num), key=lambda k: (singles[k], k))
  search.start_from(tuple(range(num)))
  # Each pass but the last takes at least one out.
  search.run(order, -1, num if num_passes is None else num_passes, 1)
  best = max(range(num), key=lambda k: (singles[k], -k))
  if singles[best] > search.score:
    search.start_from((best,))
  return search.soup(order)
