"""An average of models that come one after another, as in a training loop.

```
average = jaxsoup.running_average()
state = average.init(params)
state = average.update(state, params)      # As often as there are models.
soup = average.value(state)
```
"""

from collections.abc import Callable
import dataclasses
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup import _checked
from jaxsoup import _mixing
from jaxsoup import _tree
from jaxsoup.typing import ArrayLike
from jaxsoup.typing import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AverageState:
  """What has been added up so far: a pytree, which may be saved and donated.

  Attributes:
    total: `sum_k w_k theta_k` in the container of the parameters, sharded as
      they are; leaves that are not floats as they were at first.
    weight: `sum_k w_k`, a scalar.
    dtypes: of the parameters' floats.
  """

  total: Params
  weight: jax.Array
  dtypes: tuple[np.dtype[Any], ...] = dataclasses.field(
      metadata={'static': True}
  )


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


def running_average(decay: float = 1.0) -> RunningAverage:
  """Averages models that come one after another, with the memory of one sum.

  `S_k = d S_(k-1) + w_k theta_k`, `W_k = d W_(k-1) + w_k`, value `S_k / W_k`:
  sum and weight, in float32 or wider, and one rounding in `value`. So

  - d = 1: the mean. Once per model: the uniform soup. Every few steps: SWA.
    A negative weight takes a model out again, for a window over the last ones.
  - d < 1: an exponential moving average without the bias of its start. For one
    that starts from theta_0, add that with weight 1 and others with 1 - d.

  In the form of an `optax.GradientTransformation`. Run `update` under `jax.jit`
  with `donate_argnums=0` to add in place.

  Args:
    decay: d, from 0 to 1.

  Returns:
    A `RunningAverage`. Its functions raise a ValueError where parameters do not
    match those of `init`, and `value` where the weights add up to zero.

  Raises:
    ValueError: decay is not in [0, 1].

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
  if not 0 <= decay <= 1:
    raise ValueError(f'decay is {decay}: expected a number from 0 to 1.')

  def update(
      state: AverageState, params: Params, weight: ArrayLike = 1.0
  ) -> AverageState:
    given, total = _tree.flatten(params).by_path, _tree.flatten(state.total)
    totals = total.floats
    expected = total.by_path | {
        path: jax.ShapeDtypeStruct(x.shape, dtype)
        for (path, x), dtype in zip(totals.items(), state.dtypes)
    }
    if differences := _checked.mismatches(expected, given):
      raise ValueError(
          'The parameters given to update differ from those given to init: '
          f'{_checked.listed(differences)}.'
      )
    weight = _tree.numbers(weight)
    leaves = [given[path] for path in totals]
    sums = _mixing.added(list(totals.values()), leaves, weight, decay)
    added = state.weight if decay == 1 else decay * state.weight
    return AverageState(total.combine(sums), added + weight, state.dtypes)

  return RunningAverage(_init, update, _value)


def _init(params: Params) -> AverageState:
  flat = _tree.flatten(params)
  floats = flat.floats.values()
  # Copies: to donate the state must not delete the parameters.
  zeros = [jnp.zeros_like(x, _tree.wide_dtype(x.dtype)) for x in floats]
  params = flat.combine(zeros, map(jnp.copy, flat.others.values()))
  dtypes = tuple(np.dtype(x.dtype) for x in floats)
  return AverageState(params, _tree.numbers(0.0), dtypes)


def _value(state: AverageState) -> Params:
  if not _tree.is_traced(state.weight) and not jax.device_get(state.weight):
    raise ValueError(
        'The weights of this running average add up to 0: call update before '
        'value.'
    )
  flat = _tree.flatten(state.total)
  sums = list(flat.floats.values())
  return flat.combine(_mixing.rounded(sums, state.weight, state.dtypes))
