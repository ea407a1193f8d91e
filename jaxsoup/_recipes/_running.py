"""An average of models that come one after another, as in a training loop.

```
average = jaxsoup.running_average()
state = average.init(params)
state = average.update(state, params)      # As often as there are models.
soup = average.value(state)
```
"""

from collections.abc import Callable
from collections.abc import Iterable
import dataclasses
import functools
from typing import Any
from typing import NamedTuple

import jax
from jax import memory
import jax.numpy as jnp
import numpy as np

from jaxsoup import _checked
from jaxsoup import _mixing
from jaxsoup import _tree
from jaxsoup.typing import ArrayLike
from jaxsoup.typing import Params

_static: Any = functools.partial(dataclasses.field, metadata={'static': True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AverageState:
  """What has been added up so far: a pytree, which may be saved and donated.

  Attributes:
    total: `sum_k w_k theta_k` in the container of the parameters, sharded as
      they are; leaves that are not floats as they were at first.
    weight: `sum_k w_k`, a scalar.
    count: of calls of `update`, an int32 scalar.
    dtypes: of the parameters' floats.
    is_on_host: whether the floats are in the memory of the host.
  """

  total: Params
  weight: jax.Array
  count: jax.Array
  dtypes: tuple[np.dtype[Any], ...] = _static()
  is_on_host: bool = _static()


class RunningAverage(NamedTuple):
  """Three pure functions: see `running_average`.

  Attributes:
    init: `init(params) -> state`, with nothing added yet.
    update: `update(state, params, weight=1.0) -> state`.
    value: `value(state) -> params`, in the dtypes of the parameters.
  """

  init: Callable[[Params], AverageState]
  update: Callable[..., AverageState]
  value: Callable[[AverageState], Params]


def running_average(
    decay: float | Callable[[jax.Array], ArrayLike] = 1.0,
    *,
    start: int = 0,
    every: int = 1,
    is_on_host: bool = False,
) -> RunningAverage:
  """Averages models that come one after another, with the memory of one sum.

  `S_k = d S_(k-1) + w_k theta_k`, `W_k = d W_(k-1) + w_k`, value `S_k / W_k`:
  sum and weight, in float32 or wider, and one rounding in `value`. So

  - d = 1: the mean. Once per model: the uniform soup. With `start` and `every`
    in a training loop: SWA. A negative weight takes a model out again, for a
    window over the last ones.
  - d < 1: an exponential moving average without the bias of its start. For one
    that starts from theta_0, add that with weight 1 and others with 1 - d.
  - d(n) for the n-th model that is added, from 1: a power-function EMA with
    `trajectory.power_decay`; means of 1,000 models each with
    `lambda n: n % 1000 != 1`, as 0 starts the sum anew.

  In the form of an `optax.GradientTransformation`. Run `update` under `jax.jit`
  with `donate_argnums=0` to add in place.

  Args:
    decay: d, from 0 to 1, or a function that JAX can trace.
    start: how many models are not added at first.
    every: after them, add one model of so many, the first one included.
    is_on_host: whether the sum lies in the (pinned) memory of the host. Every
      update then moves it to the device and back, whatever `every` is: rather
      call `update` now and then than in each step.

  Returns:
    A `RunningAverage`. Its functions raise a ValueError where parameters do not
    match those of `init`, and `value` where the weights add up to zero.

  Raises:
    ValueError: decay is not in [0, 1], start or every are out of range.

  Example:
    >>> average = running_average()
    >>> state = average.init(np.float32(0))
    >>> for theta in (1.0, 2.0, 6.0):
    ...   state = average.update(state, np.float32(theta))
    >>> average.value(state)
    Array(3., dtype=float32)

  Source: Izmailov et al. 2018, "Averaging weights leads to wider optima and
  better generalization"; Polyak and Juditsky 1992.
  """
  if not callable(decay) and not 0 <= decay <= 1:
    raise ValueError(f'decay is {decay}: expected a number from 0 to 1.')
  if start < 0 or every < 1:
    raise ValueError(
        f'start is {start} and every is {every}: expected start >= 0 and '
        'every >= 1.'
    )

  def update(
      state: AverageState, params: Params, weight: ArrayLike = 1.0
  ) -> AverageState:
    given, total = _tree.flatten(params).by_path, _tree.flatten(state.total)
    expected = total.by_path | {
        path: jax.ShapeDtypeStruct(x.shape, dtype)
        for (path, x), dtype in zip(total.floats.items(), state.dtypes)
    }
    if differences := _checked.mismatches(expected, given):
      raise ValueError(
          'The parameters given to update differ from those given to init: '
          f'{_checked.listed(differences)}.'
      )
    floats = [_as_stored(given[path]) for path in total.floats]
    sums = _moved(state, total.floats.values(), memory.Space.Device)
    if start == 0 and every == 1:
      sums, added_up = added(sums, state.weight, floats, weight, state.count)
    else:
      done = state.count - start
      sums, added_up = jax.lax.cond(
          (done >= 0) & (done % every == 0),
          lambda: added(sums, state.weight, floats, weight, done // every),
          lambda: (sums, state.weight),
      )
    sums = _moved(state, sums, memory.Space.Host)
    return dataclasses.replace(
        state,
        total=total.combine(sums),
        weight=added_up,
        count=state.count + 1,
    )

  def added(
      sums: list[jax.Array],
      total: jax.Array,
      floats: list[jax.Array],
      weight: ArrayLike,
      num_before: jax.Array,
  ) -> tuple[list[jax.Array], jax.Array]:
    weight, kept = _tree.numbers(weight), None
    if callable(decay):
      kept = jnp.asarray(decay(num_before + 1))
    elif decay != 1:
      kept = _tree.numbers(decay)
    sums = _mixing.added(sums, floats, weight, kept)
    return sums, (total if kept is None else kept * total) + weight

  return RunningAverage(
      functools.partial(_init, is_on_host=is_on_host), update, _value
  )


def _as_stored(x: jax.Array) -> jax.Array:
  """Rounded to its dtype: XLA would add what a step computes before that."""
  is_narrow = jnp.finfo(x.dtype).bits < 32
  return jax.lax.optimization_barrier(x) if is_narrow else x


def _moved(
    state: AverageState, sums: Iterable[jax.Array], space: Any
) -> list[jax.Array]:
  """The floats of a state that is on the host, in this memory."""
  sums = list(sums)
  return jax.device_put(sums, space) if state.is_on_host else sums


def _init(params: Params, is_on_host: bool) -> AverageState:
  flat = _tree.flatten(params)
  floats = flat.floats.values()
  dtypes = tuple(np.dtype(x.dtype) for x in floats)
  state = AverageState(
      params,
      _tree.numbers(0.0),
      _tree.numbers(0, np.int32),
      dtypes,
      is_on_host,
  )
  zeros = _moved(
      state,
      (jnp.zeros_like(x, _tree.wide_dtype(x.dtype)) for x in floats),
      memory.Space.Host,
  )
  # Copies: to donate the state must not delete the parameters.
  total = flat.combine(zeros, map(jnp.copy, flat.others.values()))
  return dataclasses.replace(state, total=total)


def _value(state: AverageState) -> Params:
  if not _tree.is_traced(state.weight) and not jax.device_get(state.weight):
    raise ValueError(
        'The weights of this running average add up to 0: call update before '
        'value.'
    )
  flat = _tree.flatten(state.total)
  sums = _moved(state, flat.floats.values(), memory.Space.Device)
  return flat.combine(_mixing.rounded(sums, state.weight, state.dtypes))
