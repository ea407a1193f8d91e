"""Types of what users pass in, and of what the library passes on.

```
from jaxsoup.typing import Params

def loss_fn(params: Params, batch: dict, beta: jax.Array) -> jax.Array:
  ...
```

Functions are protocols: any function that takes these positional arguments is
one, whatever it calls them.
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
#: Mixing coefficients of one candidate: pairs of a group and its `[K]`.
Coefficients = tuple[tuple[str, tuple[float, ...]], ...]
#: What a score belongs to.
Candidate = Members | Coefficients
#: What counts of several scores: one of them by its name, a weighted sum, or a
#: function of all.
Objective = (
    str | Mapping[str, float] | Callable[[Mapping[str, float]], 'Scalar']
)

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


class EvalFn(Protocol):
  """The score of a model on held-out data, higher is better.

  It may have a method `at_least`, which gives up early: see `jaxsoup.AtMost`.

  Args:
    params: of the model.

  Returns:
    One finite number; or several by name, of which the `objective` of a search
    makes one.
  """

  def __call__(self, params: Params, /) -> Scalar | Mapping[str, Scalar]:
    ...


class ObjectiveFn(Protocol):
  """A loss or a score of a model, as landscapes show it.

  Args:
    params: of the model.

  Returns:
    A scalar.
  """

  def __call__(self, params: Params, /) -> Scalar:
    ...


class LossFn(Protocol):
  """The mean loss of a batch, for `learned`; differentiable.

  Args:
    params: of a model.
    batch: a pytree of arrays, one of the `batches`.
    beta: the inverse temperature, a scalar that multiplies the logits.

  Returns:
    A scalar.
  """

  def __call__(
      self, params: Params, batch: Tree, beta: jax.Array, /
  ) -> jax.Array:
    ...


class LogitsFn(Protocol):
  """The outputs of a model on a batch; can be compiled.

  Args:
    params: of a model.
    batch: arrays by name, on the device.

  Returns:
    `[B, C]`; where it is allowed, a pytree of `[B, ...]`.
  """

  def __call__(self, params: Params, batch: dict[str, Any], /) -> Tree:
    ...


class OutputsFn(Protocol):
  """The outputs of a model on a whole data set: see `evaluation.logits_of`.

  Args:
    params: of a model.

  Returns:
    `[N, ...]`, or a pytree of those.
  """

  def __call__(self, params: Params, /) -> Tree:
    ...


class ExampleMetricFn(Protocol):
  """A metric of each example of a batch, for `evaluation.mean_of`.

  Args:
    params: of a model.
    batch: arrays by name, on the device.

  Returns:
    `[B]`, higher is better. Of bool, right or wrong, it makes rejections cheap.
  """

  def __call__(self, params: Params, batch: dict[str, Any], /) -> jax.Array:
    ...


class MetricFn(Protocol):
  """A metric of a whole data set, such as those of `jaxsoup.metrics`.

  Args:
    logits: `[N, C]`.
    labels: `[N]`.

  Returns:
    One number; or one of each example, `[N]`, as `metrics.correct` does.
  """

  # Of jax or of NumPy: a metric may want either.
  def __call__(self, logits: Any, labels: Any, /) -> Scalar:
    ...


class ParamsFn(Protocol):
  """A model from a model, such as one with new statistics of BatchNorm.

  Args:
    params: of the model.

  Returns:
    Those to use in its place.
  """

  def __call__(self, params: Params, /) -> Params:
    ...


class AlphaFn(Protocol):
  """Mixing coefficients from variables without constraints, for `learned`.

  Args:
    w: `[K]`.

  Returns:
    alpha, `[K]`.
  """

  def __call__(self, w: jax.Array, /) -> jax.Array:
    ...


class GroupFn(Protocol):
  """The group of a leaf.

  Args:
    path: of the leaf.

  Returns:
    The first keys of that path: `path[:1]` for one group a module, `path` for
    one a tensor.
  """

  def __call__(self, path: Path, /) -> Path:
    ...


class ScoreFn(Protocol):
  """The score of a set of ingredients, higher is better.

  Args:
    members: the set.

  Returns:
    One number.
  """

  def __call__(self, members: Members, /) -> Scalar:
    ...


class ProgressFn(Protocol):
  """Is told how far a computation has come.

  Args:
    stage: what is being done.
    share: how much of that is done, from 0 to 1.
  """

  def __call__(self, stage: str, share: float, /) -> None:
    ...


class CountFn(Protocol):
  """Is told how much of a computation is done.

  Args:
    num_done: how many parts are done.
    num: of how many.
  """

  def __call__(self, num_done: int, num: int, /) -> None:
    ...
