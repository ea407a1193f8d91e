"""Averages along one run: coefficients from step numbers, and sliding windows.

```
alpha = trajectory.decay(steps, '1-sqrt', where=steps >= 10_000)
soup = jaxsoup.average(checkpoints_of_one_run, alpha)
```

Averages inside a run: `keep`, or `jaxsoup.running_average` itself.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsoup import _checked
from jaxsoup import _tree
from jaxsoup._recipes import _running
from jaxsoup._soup import AverageInfo
from jaxsoup._soup import Soup
from jaxsoup.typing import ArrayLike
from jaxsoup.typing import Params

Curve = Callable[[Any], Any]


def _cosine(x: Any) -> Any:
  return 0.5 * (1 + (jnp if isinstance(x, jax.Array) else np).cos(np.pi * x))


# What is left of the learning rate after a share of its decay, from 1 to 0; the
# exponential one ends at a hundredth.
CURVES: dict[str, Curve] = {
    '1-sqrt': lambda x: 1 - x**0.5,
    'linear': lambda x: 1 - x,
    'cosine': _cosine,
    'exponential': lambda x: 0.01**x,
}


def window(
    steps: ArrayLike,
    *,
    last: int | None = None,
    start: int | None = None,
    stop: int | None = None,
    every: int | None = None,
) -> np.ndarray:
  """Which checkpoints of a run lie in a window.

  Args:
    steps: step number of each checkpoint, `[K]`, in any order.
    last: how many of the latest ones, of those that the others allow.
    start: the first step.
    stop: the last step.
    every: distance in steps, counted from `start` or else from 0.

  Returns:
    Bool, `[K]`: the `where` of `swa`, `decay` and `ema`.

  Raises:
    ValueError: nothing lies in it, there are not as many as `last`, or every is
      not positive.

  Example:
    >>> window([0, 100, 200, 300], start=100, every=200)
    array([False,  True, False,  True])
  """
  steps = _checked_steps(steps)
  if every is not None and every < 1:
    raise ValueError(f'every is {every}: expected at least 1.')
  where = np.ones(len(steps), bool)
  if start is not None:
    where &= steps >= start
  if stop is not None:
    where &= steps <= stop
  if every is not None:
    where &= (steps - (start or 0)) % every == 0
  wanted = 1 if last is None else last
  if not 1 <= wanted <= where.sum():
    given = dict(start=start, stop=stop, every=every)
    said = [f'{name} {x}' for name, x in given.items() if x is not None]
    raise ValueError(
        f'The window ({", ".join(said) or "all steps"}) has {where.sum()} of '
        f'the {len(steps)} checkpoints, whose steps are {steps.min()} to '
        f'{steps.max()}. It needs at least {max(wanted, 1)}: choose another.'
    )
  if last is not None:
    where &= steps >= np.sort(steps[where])[-last]
  return where


def swa(steps: ArrayLike, *, where: ArrayLike | None = None) -> np.ndarray:
  """Coefficients of the mean over a window: SWA, LAWA, PMA, Polyak's tail.

  `alpha_k = 1/n` for the n checkpoints in the window. Over equal distances that
  is nearly what `decay` gives for a linear decay of the learning rate.

  Args:
    steps: step number of each checkpoint, `[K]`.
    where: which of them count, bool `[K]`, see `window`. Default: all.

  Returns:
    alpha, `[K]` float32, sums to one.

  Raises:
    ValueError: no checkpoints, or two with one step number.

  Example:
    >>> steps = np.arange(4)
    >>> swa(steps, where=steps >= 2)
    array([0. , 0. , 0.5, 0.5], dtype=float32)

  Source: Izmailov et al. 2018, algorithm 1 (SWA); Kaddour 2022 (LAWA, the last
  ones); Li et al. 2025, "Model merging in pre-training of large language
  models" (PMA). Networks with BatchNorm need their statistics re-estimated.
  """
  alpha, _, chosen = _in_window(steps, where)
  alpha[chosen] = 1 / len(chosen)
  return alpha


def decay(
    steps: ArrayLike,
    curve: str | Curve = '1-sqrt',
    *,
    where: ArrayLike | None = None,
) -> np.ndarray:
  """Coefficients that replace a decay of the learning rate.

  Checkpoints `theta_0 .. theta_n` of a run with a constant rate lie in the
  window. If w_i is the mean of the curve over the steps from checkpoint i - 1
  to i, then `c_j = w_j - w_(j+1)`, with w_0 = 1 and w_(n+1) = 0, gives

    sum_j c_j theta_j = theta_0 + sum_i w_i (theta_i - theta_(i-1)):

  each update since theta_0 counts as if its learning rate had been w_i times as
  high. For given updates that is exact; a run with that decay would compute its
  gradients elsewhere, which the average does not know. A curve that rises has
  negative coefficients.

  Args:
    steps: step number of each checkpoint, `[K]`.
    curve: what is left of the learning rate: '1-sqrt', 'linear', 'cosine' or
      'exponential' (to 1/100) from the first to the last step of the window; or
      a function of the steps since the first, such as an optax schedule.
    where: which checkpoints count, bool `[K]`, see `window`. Default: all.

  Returns:
    alpha, `[K]` float32, sums to one.

  Raises:
    ValueError: no checkpoints, two with one step number, or an unknown curve.

  Example:
    >>> decay([0, 10, 20, 30], 'linear').round(2)
    array([0.15, 0.33, 0.33, 0.18], dtype=float32)

  Source: Tian et al. 2025, "WSM: decay-free learning rate schedule via
  checkpoint merging for LLM pre-training", section 3.
  """
  if not callable(curve) and curve not in CURVES:
    raise ValueError(
        f'curve is {curve!r}: choose from {", ".join(CURVES)}, or pass a '
        'function of the steps since the start of the window.'
    )
  alpha, sorted_steps, chosen = _in_window(steps, where)
  counts = np.arange(sorted_steps[-1] - sorted_steps[0])
  rates = (
      curve(counts)
      if callable(curve)
      else CURVES[curve](counts / max(len(counts), 1))
  )
  starts = sorted_steps[:-1] - sorted_steps[0]
  # A schedule may return one rate for all steps.
  rates = np.broadcast_to(np.asarray(rates, np.float64), counts.shape)
  sums = np.add.reduceat(rates, starts)
  kept = [1.0, *(sums / np.diff(sorted_steps)), 0.0]
  alpha[chosen] = np.subtract(kept[:-1], kept[1:])
  return alpha


def ema(
    steps: ArrayLike,
    *,
    decay: float,
    where: ArrayLike | None = None,
) -> np.ndarray:
  """Coefficients of an exponential moving average over checkpoints.

  `theta_bar_k = d_k theta_bar_(k-1) + (1 - d_k) theta_k`, from the first one
  on, where d_k is the decay to the power of the steps since checkpoint k - 1.

  Args:
    steps: step number of each checkpoint, `[K]`.
    decay: per step, in [0, 1).
    where: which of them count, bool `[K]`, see `window`. Default: all.

  Returns:
    alpha, `[K]` float32, sums to one.

  Raises:
    ValueError: a decay outside [0, 1), no checkpoints, or two with one step
      number.

  Example:
    >>> ema([0, 1, 2], decay=0.5)
    array([0.25, 0.25, 0.5 ], dtype=float32)
  """
  if not 0 <= decay < 1:
    raise ValueError(f'decay is {decay}: expected a number in [0, 1).')
  alpha, sorted_steps, chosen = _in_window(steps, where)
  # How much of what was there before a checkpoint is in the last average.
  left = decay ** (sorted_steps[-1] - sorted_steps).astype(float)
  alpha[chosen] = np.diff(left, prepend=0.0)
  return alpha


def power_decay(length: float) -> Callable[[ArrayLike], jax.Array]:
  """The decay of a power-function EMA, for `running_average`.

  `theta_bar_n = sum_i (i^(g+1) - (i-1)^(g+1)) theta_i / n^(g+1)`: older models
  count less, by their age relative to the length of the run so far.

  Args:
    length: standard deviation of the weights, as a share of the run, below
      0.2886, that of the mean; called sigma_rel in the source, which stores
      0.05 and 0.10.

  Returns:
    `decay(n)` for the n-th model that is added, from 1.

  Raises:
    ValueError: a length outside (0, 0.2886).

  Example:
    >>> decay_fn = power_decay(0.1)
    >>> [round(float(decay_fn(n)), 2) for n in (1, 10, 1000)]
    [0.0, 0.46, 0.99]

  Source: Karras et al. 2024, "Analyzing and improving the training dynamics of
  diffusion models", section 3.1.
  """
  power = _power_of(length) + 1

  def decay_fn(num: ArrayLike) -> jax.Array:
    num = jnp.asarray(num, jnp.float32)
    # What the n-th model counts is n^p (1 - (1 - 1/n)^p); of two such, the
    # ratio, without powers that overflow or differences that cancel.
    before = jnp.log1p(-1 / num)
    added = jnp.expm1(power * before)
    added_before = jnp.expm1(power * jnp.log1p(-1 / jnp.maximum(num - 1, 1)))
    return jnp.where(num > 1, jnp.exp(power * before) * added_before / added, 0)

  return decay_fn


def post_hoc_ema(
    steps: ArrayLike,
    lengths: ArrayLike,
    *,
    step: int,
    length: float,
) -> np.ndarray:
  """Coefficients of stored averages for an EMA of any other length.

  Least squares: the power-function EMA of this length at this step, as a
  function of the training step, is approximated by a weighted sum of those that
  were stored. Some coefficients are negative.

  Args:
    steps: when each average was stored, `[K]`.
    lengths: of each average, `[K]`, see `power_decay`.
    step: when the average that is wanted ends.
    length: of the average that is wanted.

  Returns:
    alpha, `[K]` float32, sums to one.

  Raises:
    ValueError: lengths outside (0, 0.2886), or not as many as steps.

  Example:
    >>> post_hoc_ema([50, 100, 50, 100], [0.05, 0.05, 0.1, 0.1],
    ...              step=100, length=0.07).round(2)
    array([ 0.01,  0.47, -0.02,  0.54], dtype=float32)

  Source: Karras et al. 2024, section 3.2 and appendix C.
  """
  times = np.append(np.asarray(steps, float), step)
  powers = np.array([_power_of(x) for x in np.append(lengths, length)])
  if len(times) != len(powers) or len(times) < 2 or times.min() <= 0:
    raise ValueError(
        f'{len(times) - 1} steps and {len(powers) - 1} lengths: expected one '
        'of each for every stored average, and steps above 0.'
    )
  # <p_i, p_j> of p_i(t) = (g_i + 1) t^g_i / t_i^(g_i + 1) on [0, t_i].
  latest = np.maximum.outer(times, times)
  ratio = np.minimum.outer(times, times) / latest
  of_later = np.where(times[:, None] <= times, powers, powers[:, None])
  both = np.add.outer(powers, powers) + 1
  products = np.multiply.outer(powers + 1, powers + 1) * ratio**of_later
  products /= both * latest
  # The minimum among coefficients that sum to one, by a Lagrange multiplier.
  products *= times.max()
  matrix = np.pad(products[:-1, :-1], (0, 1), constant_values=1.0)
  matrix[-1, -1] = 0
  target = np.append(products[:-1, -1], 1.0)
  return np.linalg.lstsq(matrix, target, rcond=None)[0][:-1].astype(np.float32)


def best(scores: ArrayLike, num: int) -> np.ndarray:
  """Which checkpoints have the best scores, for the `where` of `swa`.

  Args:
    scores: of each checkpoint, `[K]`, higher is better; NaN if it has none.
    num: how many; of checkpoints with equal scores, the later ones.

  Returns:
    Bool, `[K]`.

  Raises:
    ValueError: fewer checkpoints have a score.

  Example:
    >>> best([0.5, 0.9, 0.7], 2)
    array([False,  True,  True])
  """
  scores = np.asarray(scores, float)
  num_known = np.count_nonzero(~np.isnan(scores))
  if not 1 <= num <= num_known:
    raise ValueError(
        f'{num_known} of {len(scores)} checkpoints have a score: instead of '
        f'the best {num} choose a number from 1 to {num_known}.'
    )
  # Stable, and NaN last: of the reverse, later ones come first.
  order = len(scores) - 1 - np.argsort(-scores[::-1], kind='stable')
  return np.isin(np.arange(len(scores)), order[:num])


def sliding(
    ingredients: Sequence[Params], size: int, *, every: int = 1
) -> Iterator[Soup[AverageInfo]]:
  """The uniform soups of all windows along a run, one after another.

  From one window to the next, what enters is added to a sum in float32 or
  wider, and what leaves is subtracted: with `every` 1, two reads of an
  ingredient for each soup, at the memory of a sum, a soup and an ingredient.
  After `size` subtractions the sum is made anew, so that its rounding errors do
  not grow with the length of the run.

  Args:
    ingredients: K pytrees of one structure in the order of the run, or
      `checkpoints.Ingredients`.
    size: how many ingredients each soup averages.
    every: how many ingredients the window moves.

  Yields:
    A `Soup` with alpha `[K]` for each window, the earliest first.

  Raises:
    ValueError: the ingredients do not fit, or are fewer than `size`.

  Example:
    >>> run = [np.float32(x) for x in (1, 3, 5, 9)]
    >>> [float(soup.params) for soup in sliding(run, 2)]
    [2.0, 4.0, 7.0]
  """
  _checked.require_ingredients(ingredients)
  num = len(ingredients)
  if not 1 <= size <= num or every < 1:
    raise ValueError(
        f'sliding(size={size}, every={every}) of {num} ingredients: '
        f'expected a size from 1 to {num}, and every at least 1.'
    )
  return _windows(_checked.Checked(ingredients), size, every)


def _windows(
    checked: _checked.Checked, size: int, every: int
) -> Iterator[Soup[AverageInfo]]:
  average = _running.running_average()
  add = jax.jit(average.update, donate_argnums=0)
  # With a decay of zero nothing is left of the sum.
  restart = jax.jit(_running.running_average(0.0).update, donate_argnums=0)
  state = average.init(checked[0])
  members, num_subtracted = range(0), 0
  for end in range(size, len(checked) + 1, every):
    before, members = members, range(end - size, end)
    entering, leaving = (sorted({*members} - {*before}), {*before} - {*members})
    num_subtracted += len(leaving)
    if num_subtracted > size or len(entering) + len(leaving) >= size:
      entering, leaving, num_subtracted = list(members), set(), 0
    for k in entering:
      is_anew = k == members.start
      state = (restart if is_anew else add)(state, checked[k])
    for k in sorted(leaving):
      state = add(state, checked[k], -1.0)
    alpha = np.zeros(len(checked), np.float32)
    alpha[members.start : members.stop] = 1 / size
    params = checked.replace(average.value(state))
    yield Soup(params, alpha, AverageInfo(checked.duplicates()))


class Kept(NamedTuple):
  """The state of `keep`: that of each average by its name."""

  averages: dict[str, _running.AverageState]


def keep(
    averages: Mapping[str, _running.RunningAverage],
) -> optax.GradientTransformationExtraArgs:
  """Carries averages of the parameters in the state of an optimizer.

  They are of the parameters after each update, as `optax.apply_updates` makes
  them, so this has to be the last part of a chain. (`optax.ema` averages the
  updates.) Updates pass unchanged. The sums are in float32 or wider, sharded
  like the parameters, and are saved and restored with the optimizer.

  Args:
    averages: several lengths and windows at once, by name.

  Returns:
    An optax transform, for a `TrainState` as well as for an `nnx.Optimizer`.

  Raises:
    ValueError: in `update`, without params.

  Example:
    >>> from jaxsoup import running_average
    >>> tx = optax.chain(optax.sgd(0.5), keep({'swa': running_average()}))
    >>> params = jnp.float32(4.0)
    >>> state = tx.init(params)
    >>> for _ in range(2):   # The gradient is 1: 3.5, 3.0.
    ...   updates, state = tx.update(jnp.float32(1.0), state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> kept(state)['swa']
    Array(3.25, dtype=float32)
  """

  def init(params: Params) -> Kept:
    return Kept({name: x.init(params) for name, x in averages.items()})

  def update(
      updates: Any, state: Kept, params: Params | None = None, **extra: Any
  ) -> tuple[Any, Kept]:
    del extra
    if params is None:
      raise ValueError(
          'trajectory.keep averages the parameters: call '
          'tx.update(grads, state, params).'
      )
    params = optax.apply_updates(params, updates)
    added = {
        name: average.update(state.averages[name], params)
        for name, average in averages.items()
    }
    return updates, Kept(added)

  return optax.GradientTransformationExtraArgs(init, update)


def kept(opt_state: Any) -> dict[str, Params]:
  """The averages in the state of an optimizer with `keep`, by name.

  Traceable, so that an evaluation on a mesh needs no second copy of them; where
  it is not traced, those to which nothing was added yet are left out. As
  items of their own in an Orbax checkpoint::

    items = {n: ocp.args.StandardSave(x) for n, x in kept(opt_state).items()}
    manager.save(step, args=ocp.args.Composite(state=..., **items))

  Args:
    opt_state: a state that contains that of `keep`; of an `nnx.Optimizer`, its
      `opt_state`.

  Returns:
    By name, parameters in their dtypes; `nnx.update(model, ...)` takes them.

  Raises:
    ValueError: no such state, or nothing has been added to any average.
  """
  is_kept = lambda x: isinstance(x, Kept)
  states = filter(is_kept, jax.tree.leaves(opt_state, is_leaf=is_kept))
  averages = {n: x for state in states for n, x in state.averages.items()}
  if not averages:
    raise ValueError(
        'This optimizer state has no averages: chain(..., trajectory.keep(...))'
        ' puts them there.'
    )
  averages = {n: _tree.pure(average) for n, average in averages.items()}
  weights = [average.weight for average in averages.values()]
  if not _tree.is_traced(*weights):
    is_there = [bool(weight) for weight in jax.device_get(weights)]
    averages = {n: x for (n, x), y in zip(averages.items(), is_there) if y}
  if not averages:
    raise ValueError('Nothing has been added to any of these averages yet.')
  value = _running.running_average().value
  return {name: value(average) for name, average in averages.items()}


def _checked_steps(steps: ArrayLike) -> np.ndarray:
  # Also the keys of what `checkpoints.steps` returns.
  numbers = np.asarray(list(steps) if isinstance(steps, Mapping) else steps)
  if numbers.ndim != 1 or not len(numbers) or numbers.dtype.kind not in 'iu':
    raise ValueError(
        f'steps are {steps!r:.80}: expected the step number of each '
        'checkpoint, such as np.arange(len(ingredients)).'
    )
  if len(np.unique(numbers)) < len(numbers):
    raise ValueError(f'Two checkpoints have one step number: {steps!r:.200}.')
  return numbers


def _in_window(
    steps: ArrayLike, where: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Zeros for alpha; of those that count, in order, steps and places in it."""
  numbers = _checked_steps(steps)
  where = np.ones(len(numbers), bool) if where is None else np.asarray(where)
  if where.shape != numbers.shape or where.dtype != bool or not where.any():
    raise ValueError(
        f'where is {where!r:.80}: expected a bool for each of the '
        f'{len(numbers)} checkpoints, and at least one True.'
    )
  order = np.argsort(numbers)
  chosen = order[where[order]]
  return np.zeros(len(numbers), np.float32), numbers[chosen], chosen


def _power_of(length: float) -> float:
  """The power g whose weights t^g on [0, 1] have this standard deviation."""
  if not 0 < length < 0.2886:
    raise ValueError(
        f'The length of a power-function EMA is {length}: expected a share of '
        'the run, above 0 and below 0.2886, which is that of the mean.'
    )
  # (g + 1) / ((g + 2)^2 (g + 3)) = length^2.
  coefficients = [1, 7, 16 - length**-2, 12 - length**-2]
  return float(np.roots(coefficients).real.max())
