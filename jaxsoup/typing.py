"""Types of what users pass in, and of what the library passes on.

```
from jaxsoup.typing import Params

def loss_fn(params: Params, batch: dict, beta: jax.Array) -> jax.Array:
  ...
```

Functions get their arguments by position, whatever they call them.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import os
from typing import Any
from typing import Protocol

import jax
import jax.typing
import numpy as np

#: A pytree of arrays.
Tree = Any
#: Parameters of a model, a pytree of arrays: dicts as of linen, an `nnx.State`,
#: an `nnx.Module`...
Params = Any
#: What stands at a leaf of a pytree: an array, a number, a description of one.
Leaf = Any
#: The keys that lead to a leaf of a pytree.
Path = tuple[str, ...]
#: Ingredients of one candidate, ascending; repeated if one counts twice.
Members = tuple[int, ...]

#: `jax.Array` or `np.ndarray`.
Array = jax.Array | np.ndarray
#: One number, of Python, NumPy or JAX.
Scalar = float | np.generic | Array
#: An array, a number, or nested sequences of numbers.
ArrayLike = Array | np.generic | float | Sequence[Any]
#: What `jnp.dtype` takes: `jnp.bfloat16`, `'float32'`...
DType = jax.typing.DTypeLike
#: `str`, `pathlib.Path`, `etils.epath.Path`...
PathLike = str | os.PathLike[str]

#: Mixing coefficients as they are passed in: `[K]`, or nested dicts of `[K]`
#: whose paths lead to groups of leaves.
Alpha = Array | Sequence[float | jax.Array] | Mapping[str, 'Alpha']
#: Modules whose leaves are stacks of layers, and the axis of the layers in each
#: of those leaves: `{'decoder/layers': 0}`.
Stacks = Mapping[str, int]
#: One value of the whole model, or nested dicts of values, one for each group
#: of leaves. (A union would have to be narrowed wherever a value is used.)
Nested = Any

#: Arrays `[B, ...]` of B examples by name, or pytrees of those; perhaps a
#: `mask` `[B]`.
Batch = Mapping[str, Tree]
#: Batches, as a rule read several times: a list, or a loader that starts again.
Batches = Iterable[Batch]
#: Hyper-parameters of a run, or another object of a JSON file.
Config = Mapping[str, Any]
#: An object that goes into a JSON file.
Json = dict[str, Any]
#: The score of a model on held-out data, one finite number, higher is better:
#: `eval_fn(params)`. It may have a method `at_least`, which gives up early: see
#: `jaxsoup.AtMost`.
EvalFn = Callable[[Params], Scalar]
#: A loss or a score of a model, as landscapes show it: `loss_fn(params)`.
ObjectiveFn = Callable[[Params], Scalar]
#: The mean loss of a batch, for `learned`, a differentiable scalar:
#: `loss_fn(params, batch, beta)`, with one of the `batches`, a pytree of
#: arrays, and the inverse temperature, a scalar that multiplies the logits.
LossFn = Callable[[Params, Tree, jax.Array], jax.Array]
#: The outputs of a model on a batch of arrays by name, on the device:
#: `logits_fn(params, batch)`, `[B, C]`; where it is allowed, a pytree of
#: `[B, ...]`. It can be compiled.
LogitsFn = Callable[[Params, dict[str, Any]], Tree]
#: The outputs of a model on a whole data set, `[N, ...]`, or a pytree of those:
#: what `evaluation.logits_of` returns.
OutputsFn = Callable[[Params], Tree]
#: A metric of each example of a batch, for `evaluation.mean_of`, `[B]`, higher
#: is better: `metric_fn(params, batch)`, as of `LogitsFn`. Of bool, right or
#: wrong, it makes rejections cheap.
ExampleMetricFn = Callable[[Params, dict[str, Any]], jax.Array]
#: A metric of a whole data set, such as those of `jaxsoup.metrics`:
#: `metric(logits, labels)` of `[N, C]` and `[N]`, of jax or of NumPy. One
#: number; or one of each example, `[N]`, as `metrics.correct` returns.
MetricFn = Callable[[Any, Any], Scalar]
#: A model from a model, such as one with new statistics of BatchNorm.
ParamsFn = Callable[[Params], Params]
#: Mixing coefficients `[K]` from `[K]` variables without constraints, for
#: `learned`.
AlphaFn = Callable[[jax.Array], jax.Array]
#: The group of a leaf, the first keys of its path: `path[:1]` for one group a
#: module, `path` for one a tensor.
GroupFn = Callable[[Path], Path]
#: The score of a set of ingredients, one number, higher is better.
ScoreFn = Callable[[Members], Scalar]
#: Is told how far a computation has come: `progress_fn(stage, share)`, what is
#: being done, and how much of that is done, from 0 to 1.
ProgressFn = Callable[[str, float], None]
#: Is told how many parts of a computation are done: `fn(num_done, num)`.
CountFn = Callable[[int, int], None]


class ShapeDtype(Protocol):
  """An array, or a `jax.ShapeDtypeStruct`, which describes one."""

  @property
  def shape(self) -> tuple[int, ...]:
    ...

  @property
  def dtype(self) -> Any:
    ...


class Rows(Protocol):
  """A data set: an array, a mapping of arrays, a `data.Source`, a list."""

  def __len__(self) -> int:
    ...

  def __getitem__(self, rows: Any, /) -> Any:
    ...
