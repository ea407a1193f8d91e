"""Types of what users pass in, and of what the library passes on.

```
from jaxsoup.typing import Params

def loss_fn(params: Params, batch: dict, beta: jax.Array) -> jax.Array:
  ...
```

A function may call its arguments what it likes: they are positional.
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

#: `eval_fn(params)` returns the score of a model on held-out data, one finite
#: number, higher is better. It may have a method `at_least`, which gives up
#: early: see `jaxsoup.AtMost`.
EvalFn = Callable[[Params], Scalar]
#: `objective_fn(params)` returns a loss or a score, as landscapes show it.
ObjectiveFn = Callable[[Params], Scalar]
#: `loss_fn(params, batch, beta)` returns the mean loss of a batch, for
#: `learned`; differentiable. The batch is a pytree of arrays, one of the
#: `batches`; the scalar beta, an inverse temperature, multiplies the logits.
LossFn = Callable[[Params, Tree, jax.Array], jax.Array]
#: `logits_fn(params, batch)` returns the outputs of a model on arrays by name,
#: on the device: `[B, C]`; where it is allowed, a pytree of `[B, ...]`. Can be
#: compiled.
LogitsFn = Callable[[Params, dict[str, Any]], Tree]
#: `fn(params)` returns the outputs of a model on a whole data set, `[N, ...]`
#: or a pytree of those: see `evaluation.logits_of`.
OutputsFn = Callable[[Params], Tree]
#: `metric_fn(params, batch)` returns a number for each example of a batch,
#: `[B]`, higher is better, for `evaluation.mean_of`. Of bool, right or wrong,
#: it makes rejections cheap.
ExampleMetricFn = Callable[[Params, dict[str, Any]], jax.Array]
#: `metric(logits, labels)` returns one number for a whole data set, `[N, C]`
#: and `[N]` of jax or of NumPy, as those of `jaxsoup.metrics` do; or one of
#: each example, `[N]`, as `metrics.correct` does.
MetricFn = Callable[[Any, Any], Scalar]
#: `params_fn(params)` returns the parameters to use in place of these, such as
#: those with new statistics of BatchNorm.
ParamsFn = Callable[[Params], Params]
#: `alpha_fn(w)` returns mixing coefficients `[K]` from variables `[K]` without
#: constraints, for `learned`.
AlphaFn = Callable[[jax.Array], jax.Array]
#: `group_fn(path)` returns the group of a leaf, the first keys of its path:
#: `path[:1]` for one group a module, `path` for one a tensor.
GroupFn = Callable[[Path], Path]
#: `score_fn(members)` returns the score of a set of ingredients, higher is
#: better.
ScoreFn = Callable[[Members], Scalar]
#: `progress_fn(stage, share)` is told what is being done, and how much of that
#: is done, from 0 to 1.
ProgressFn = Callable[[str, float], None]
#: `count_fn(num_done, num)` is told how many parts are done, and of how many.
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
