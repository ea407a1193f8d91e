"""The searched soup: mixing coefficients from scores alone.

```
soup = jaxsoup.search(ingredients, eval_fn, num_evaluations=100)
```
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent import futures
import copy
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup import _checked
from jaxsoup import _mixing
from jaxsoup import _processes
from jaxsoup import _tree
from jaxsoup import black_box
from jaxsoup._recipes import _search
from jaxsoup._recipes import _streamed
from jaxsoup._soup import AlphaInfo
from jaxsoup._soup import AlphaTrial
from jaxsoup._soup import AtMost
from jaxsoup._soup import Scores
from jaxsoup._soup import Soup
from jaxsoup.typing import Alpha
from jaxsoup.typing import AlphaFn
from jaxsoup.typing import Coefficients
from jaxsoup.typing import EvalFn
from jaxsoup.typing import GroupFn
from jaxsoup.typing import Nested
from jaxsoup.typing import Objective
from jaxsoup.typing import Params
from jaxsoup.typing import Stacks


def simplex(w: jax.Array) -> jax.Array:
  """Coefficients that sum to one and are not negative.

  `alpha = max(w - t, 0)`, with t such that they sum to one: the projection of w
  onto the simplex.

  Args:
    w: unconstrained, `[K]`.

  Returns:
    alpha, `[K]`.

  Example:
    >>> simplex(np.array([0.9, 0.5, -3.0])).tolist()
    [0.7, 0.3, 0.0]

  Source: Duchi et al. 2008, "Efficient projections onto the l1-ball".
  """
  w = jnp.asarray(w)
  w = w - w.max()  # The same point, without cancellation.
  high = jnp.sort(w)[::-1]
  ts = (jnp.cumsum(high) - 1) / jnp.arange(1, w.size + 1)
  return jnp.maximum(w - ts[(high > ts).sum() - 1], 0)


def search(
    ingredients: Sequence[Params],
    eval_fn: EvalFn,
    *,
    num_evaluations: int | None = None,
    minutes: float | None = None,
    method: black_box.Method = black_box.cma_es,
    start: Alpha | None = None,
    alpha_fn: AlphaFn = simplex,
    group_fn: GroupFn = _tree.whole,
    stacks: Stacks | None = None,
    key: jax.Array | None = None,
    objective: Objective | None = None,
    val_objective: Objective | None = None,
    patience: int | None = None,
    scores: Scores | None = None,
    on_trial: Callable[[AlphaTrial], None] | None = None,
    executor: futures.Executor | None = None,
    num_ahead: int | None = None,
) -> Soup[AlphaInfo]:
  """Searches the mixing coefficients that score best, without a gradient.

  `max over w of score(sum_k alpha_k theta_k)` with `alpha = alpha_fn(w)`. The
  start is scored first, and a better candidate replaces it: on the held-out
  data the soup is never worse than the start.

  To resume after an interruption, call it again with the same `scores`: the
  same candidates come in the same order, and known ones are not evaluated.

  Args:
    ingredients: K pytrees of one structure, or `checkpoints.Ingredients`. Their
      stack stays in memory if it fits, else they are read for each candidate.
    eval_fn: score of a model on held-out data, higher is better; as in
      `greedy`, but each evaluation runs in full.
    num_evaluations: how many candidates are scored, remembered ones included.
    minutes: no candidate is begun later than this after the call. A search that
      is resumed has as many again.
    method: the optimizer: `black_box.cma_es`, `black_box.random_search`,
      `black_box.coordinate_search`, or your own.
    start: alpha to start from, `[K]` or a prefix tree: that of another soup, or
      `black_box.category_experts`. None is the uniform soup.
    alpha_fn: alpha `[K]` from w `[K]`, and from alpha itself: `simplex`, or
      `hyperplane`, where coefficients may be negative.
    group_fn: which leaves share one alpha, as in `learned`.
    stacks: modules whose leaves are stacks of layers, as in `learned`.
    key: a PRNG key; None is `jax.random.key(0)`.
    objective: of several scores, as in `greedy`.
    val_objective: the same for a second split of held-out data, whose scores
      `eval_fn` returns as well. After each round of the optimizer the best
      candidate so far is looked at there, and the best of those is returned.
    patience: stop after this many rounds in a row that are no better in
      `val_objective`. None never stops early.
    scores: remembered scores, as in `greedy`; one log may serve all.
    on_trial: is called after each trial.
    executor: where the candidates of a round are evaluated, as in `greedy`. If
      the stack fits in memory here, each worker has one.
    num_ahead: as in `greedy`.

  Returns:
    A `Soup` with alpha `[K]` or, with groups, nested dicts of `[K]`; and an
    `AlphaInfo`.

  Raises:
    ValueError: no or mismatched ingredients, no floats, no budget, a start that
      does not fit, a score that is NaN or infinite, or patience without
      `val_objective`.
    TypeError: a score that is neither a number nor a dict of numbers.
    ImportError: `black_box.cma_es` needs the package `cma`.
    ChildProcessError: workers died; a score log keeps what was scored.

  Example:
    >>> models = [np.float32(x) for x in (1.0, 4.0, -2.0)]
    >>> soup = search(models, lambda x: -abs(x - 3.1), num_evaluations=60)
    >>> soup.params.round(2)
    Array(3.1, dtype=float32)

  Source: as the method. Hyperplane: MEHL-Soup, 2024.
  """
  if num_evaluations is None and minutes is None:
    raise ValueError(
        'There is no budget: pass num_evaluations (--evaluations), minutes '
        '(--minutes) or both.'
    )
  if patience is not None and val_objective is None:
    raise ValueError(
        'patience needs val_objective: of which score of a second split?'
    )
  if patience is not None and patience < 0:
    raise ValueError(f'patience is {patience}: it must be at least 0.')
  space = _Space(ingredients, stacks, group_fn, alpha_fn)
  evaluations = _search.Evaluations(
      space.mixes,
      eval_fn,
      objective=objective,
      log=scores,
      executor=executor,
      num_ahead=num_ahead,
      on_wait=getattr(ingredients, 'look_for_stop', lambda: None),
  )
  trials = _Trials(space, evaluations, num_evaluations, minutes, on_trial)
  # Those of jax.random.key(0).
  seed = [0, 0] if key is None else jax.device_get(jax.random.key_data(key))
  make_fn = functools.partial(method, rng=np.random.default_rng(seed))
  chosen, val_scores = 0, list[float]()
  for _ in _rounds(space, trials, space.start(start), make_fn):
    if val_objective is None:
      chosen = trials.best
      continue
    metrics = trials.made[trials.best].metrics
    who = 'the best candidate so far'
    val_scores.append(_search.value_of(metrics, val_objective, who))
    num_worse = len(val_scores) - 1 - int(np.argmax(val_scores))
    if not num_worse:
      chosen = trials.best
    elif patience is not None and num_worse >= patience:
      break
  info = AlphaInfo(
      trials=tuple(trials.made),
      chosen=chosen,
      score=trials.made[chosen].score,
      val_scores=np.array(val_scores, np.float32),
      duplicates=space.checked.duplicates(),
  )
  params = space.mixes(trials.alphas[chosen])
  return Soup(params, info.trials[chosen].alpha, info)


def _rounds(
    space: '_Space',
    trials: '_Trials',
    start: np.ndarray,
    make_fn: Callable[[np.ndarray, float], black_box.Optimizer],
) -> Iterator[None]:
  """Yields when the start is scored, and after each round of the optimizer."""
  alphas = space.alphas(start[None])
  (score,) = trials.scored(alphas)
  yield
  if len(space.checked) == 1:
    return
  optimizer = make_fn(alphas[0], score)
  while trials.has_budget() and len(points := optimizer.ask()):
    alphas = space.alphas(points)
    scores = trials.scored(alphas)
    if len(scores) == len(alphas):
      optimizer.tell(alphas, scores)
    yield


class _Trials:
  """What was scored, in order, and whether more may be."""

  def __init__(
      self,
      space: '_Space',
      evaluations: _search.Evaluations,
      num_evaluations: int | None,
      minutes: float | None,
      on_trial: Callable[[AlphaTrial], None] | None,
  ):
    self.made: list[AlphaTrial] = []
    self.alphas: list[np.ndarray] = []
    self.best = 0
    self._space = space
    self._evaluations = evaluations
    self._num_most = np.inf if num_evaluations is None else num_evaluations
    self._end = None if minutes is None else time.monotonic() + 60 * minutes
    self._on_trial = on_trial or (lambda trial: None)

  def has_budget(self) -> bool:
    if len(self._evaluations.scores) >= self._num_most:
      return False
    # Clocks differ.
    return self._end is None or _processes.agreed(time.monotonic() < self._end)

  def scored(self, alphas: np.ndarray) -> list[float]:
    """The scores of a round; of fewer, if the budget ends, but at least one."""
    scores: list[float] = []
    try:
      for i, alpha in enumerate(alphas):
        if self.made and not self.has_budget():
          break
        left = self._num_most - len(self._evaluations.scores)
        num_ahead = int(min(self._evaluations.calls.num_ahead, left))
        for ahead in alphas[i : i + num_ahead]:
          self._evaluations.announce(*self._space.named(ahead))
        candidate, _, who = self._space.named(alpha)
        score = self._evaluations.score(candidate, alpha, who)
        assert not isinstance(score, AtMost)  # Without a bar.
        metrics = self._evaluations.metrics.get(candidate, {})
        scores.append(score)
        self.made.append(AlphaTrial(self._space.nested(alpha), score, metrics))
        self.alphas.append(alpha)
        if score > self.made[self.best].score:
          self.best = len(self.made) - 1
        self._on_trial(self.made[-1])
    finally:
      self._evaluations.drop()
    return scores


class _Space:
  """Mixing coefficients of G groups of leaves as an array, `[G, K]`."""

  def __init__(
      self,
      ingredients: Sequence[Params],
      stacks: Stacks | None,
      group_fn: GroupFn,
      alpha_fn: AlphaFn,
  ):
    self.checked = checked = _checked.Checked(ingredients, stacks)
    first = checked[0]
    _checked.require_floats(checked.layers.paths)
    groups = _tree.groups_of(checked.layers.paths, group_fn)
    self._names = list(dict.fromkeys(groups))
    # Of each leaf.
    self._rows = [self._names.index(group) for group in groups]
    self._alpha_fn = jax.jit(jax.vmap(jax.vmap(alpha_fn)))
    memory = _streamed.plan(first, len(checked), 'auto').memory
    self.mixes = _Mixes(
        ingredients, stacks, self._rows, memory == 'resident', checked
    )

  def start(self, alpha: Alpha | None) -> np.ndarray:
    num = len(self.checked)
    if alpha is None:
      return np.full((len(self._names), num), 1 / num)
    alpha = _tree.checked_alpha(alpha, num)
    rows = _tree.alphas_of(alpha, self.checked.layers.paths)
    start = np.stack(
        [rows[self._rows.index(g)] for g in range(len(self._names))]
    )
    for path, row, group in zip(self.checked.layers.paths, rows, self._rows):
      if not np.array_equal(row, start[group]):
        raise ValueError(
            f'start has {row} for leaf {_tree.name_of(path)!r}, and '
            f'{start[group]} for another one of its group '
            f'{_tree.name_of(self._names[group])!r}: pass a group_fn of finer '
            'groups.'
        )
    return start

  def alphas(self, points: np.ndarray) -> np.ndarray:
    """What `alpha_fn` makes of points, `[n, G, K]` float32."""
    alphas = jax.device_get(self._alpha_fn(_tree.numbers(points)))
    if alphas.shape != points.shape or not np.isfinite(alphas).all():
      raise ValueError(
          f'alpha_fn returned {alphas} for {points}: expected as many numbers, '
          'all finite.'
      )
    # The last bits may differ between machines.
    content = _processes.from_main(np.asarray(alphas, np.float32).tobytes())
    return np.frombuffer(content, np.float32).reshape(points.shape)

  def nested(self, alpha: np.ndarray) -> Nested:
    return _tree.nest(dict(zip(self._names, alpha)))

  def named(self, alpha: np.ndarray) -> tuple[Coefficients, np.ndarray, str]:
    """Its name in a log, alpha, and its name in messages."""
    names = map('/'.join, self._names)
    shown = np.array2string(alpha, precision=3, threshold=9)
    candidate = tuple(zip(names, map(tuple, alpha.tolist())))
    return candidate, alpha, f'alpha {shown}'


class _Mixes:
  """Mixes of ingredients, here or on a worker."""

  def __init__(
      self,
      ingredients: Sequence[Params],
      stacks: Stacks | None,
      rows: Sequence[int],
      is_resident: bool,
      checked: _checked.Checked | None = None,
  ):
    self._given = ingredients, stacks, rows, is_resident
    self._checked = checked or _checked.Checked(ingredients, stacks)
    self._rows, self._is_resident = np.asarray(rows), is_resident

  def __reduce__(self) -> Any:
    return _Mixes, self._given

  def __copy__(self) -> '_Mixes':
    return _Mixes(copy.copy(self._given[0]), *self._given[1:])

  def __call__(self, alpha: np.ndarray) -> Params:
    """The mix with alpha `[G, K]`."""
    if self._is_resident:
      placed = list(map(_tree.numbers, alpha))
      by_leaf = [placed[row] for row in self._rows]
      return self._checked.replace(_mixing.mix_leaves(by_leaf, self._stacked))
    used = np.flatnonzero(alpha.any(0)).tolist() or [0]
    weights_fn = lambda k: alpha[self._rows, k]
    dtypes = self._checked.layers.dtypes  # Ingredient 0 is read first.
    total = _mixing.weighted_sum(self._checked, used, weights_fn)
    floats = _mixing.rounded(total, _tree.numbers(1.0), dtypes)
    return self._checked.replace(floats)

  @functools.cached_property
  def _stacked(self) -> list[jax.Array]:
    return _mixing.stack_leaves(self._checked)
