"""Models of experiments as pure functions of parameters and a batch.

```
model = modeling.of_module(make_fn, inputs={'image': (8, 8, 1)}, num_classes=10)
logits = model.logits_fn(params, {'image': image})
```

A config file that needs another model has a function `model(config)`, which
returns `modeling.of_module(make_fn, inputs=..., num_classes=...)`.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from jaxsoup import models
from jaxsoup.data import preparation
from jaxsoup.models import batch_norm

Params = dict[str, Any]
Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A model as pure functions; itself a static argument of jitted ones.

  Attributes:
    init_fn: key -> params, a plain nested dict with string keys; traceable.
    start_fn: key -> params that training starts from: those of a file with a
      new head drawn by the key, or those of `init_fn`.
    logits_fn: (params, batch) -> logits [B, num_classes]; jitted.
    train_fn: (params, batch) -> (logits, statistics): BatchNorm normalizes by
      the batch; the running statistics that follow, by their paths in params.
    features_fn: (params, batch) -> what the head sees [B, D]; None if no linear
      probe is possible.
    inputs: shape and dtype of each input of one example, by its name.
    num_classes: C.
    image: what images the model expects, which it makes of those it is given.
    statistics: paths of the running statistics: averaged in a soup, not
      trained. Empty without BatchNorm.
    recalibrate_fn: (params, batches) -> params with running statistics of
      those batches; None without BatchNorm.
  """

  init_fn: Callable[[jax.Array], Params]
  start_fn: Callable[[jax.Array], Params]
  logits_fn: Callable[[Params, Batch], jax.Array]
  train_fn: Callable[[Params, Batch], tuple[jax.Array, Params]]
  features_fn: Callable[[Params, Batch], jax.Array] | None
  inputs: Mapping[str, jax.ShapeDtypeStruct]
  num_classes: int
  image: preparation.ImageSpec | None = None
  statistics: frozenset[tuple[str, ...]] = frozenset()
  recalibrate_fn: Callable[[Params, Iterable[Batch]], Params] | None = None


def frozen(model: Model, part: str, params: Params) -> Model:
  """The model with a part that training leaves as it is, such as its head.

  Args:
    model: any.
    part: a key of its parameters.
    params: of the model, for their structure.

  Returns:
    A model whose parameters below `part` count as `statistics`, which are
    averaged and not trained.

  Raises:
    ValueError: there is no such part.
  """
  if part not in params:
    raise ValueError(f'No part {part!r} to freeze: choose from {list(params)}.')
  statistics = model.statistics | _paths(params[part], (part,))
  return dataclasses.replace(model, statistics=statistics)


def of_module(
    make_fn: Callable[[jax.Array], nnx.Module],
    *,
    inputs: Mapping[str, tuple[int, ...]],
    num_classes: int,
    load_fn: Callable[[jax.Array], nnx.Module] | None = None,
    call: Callable[..., jax.Array] | None = None,
    image: preparation.ImageSpec | None = None,
) -> Model:
  """A `Model` of an nnx module.

  Args:
    make_fn: key -> the module with initial parameters; traceable.
    inputs: what the module is called with, in this order: the shape of each of
      one example, as the data deliver it. An 'image' is of `image.dtype`,
      float32 without it, a 'feature' float32; all others are int32.
    num_classes: of its logits.
    load_fn: key -> the module with pre-trained weights, and a new head.
    call: `(module, *inputs) -> logits`; by default the module is called.
    image: what 'image' becomes before the module is called, after augmentation;
      None takes it as it is, in 0..1 if it is uint8.

  Returns:
    A `Model`. It has `features_fn` if the module has a method `features` and a
    linear `head`.
  """
  call = call or (lambda module, *xs: module(*xs))
  prepare_fn = image.prepare if image else preparation.in_unit_range
  dtypes = {'image': image.dtype if image else jnp.float32}
  dtypes['feature'] = jnp.float32
  abstract = nnx.eval_shape(lambda: make_fn(jax.random.key(0)))
  graphdef = nnx.graphdef(abstract)
  stats = nnx.to_pure_dict(nnx.state(abstract, nnx.BatchStat))
  merged = functools.partial(nnx.merge, graphdef)

  def arguments(batch):
    values = {name: batch[name] for name in inputs}
    if 'image' in values:
      values['image'] = prepare_fn(values['image'])
    return values.values()

  init_fn = lambda key: models.params_of(make_fn(key))
  call_fn = lambda module, batch: call(module, *arguments(batch))
  features_fn = lambda params, batch: merged(params).features(*arguments(batch))

  def train_fn(params, batch):
    module = merged(params)
    module.set_attributes(
        nnx.BatchNorm, use_running_average=False, raise_if_not_found=False
    )
    logits = call_fn(module, batch)
    return logits, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

  recalibrate_fn = functools.partial(
      batch_norm.recalibrated, graphdef, call=call_fn
  )
  start_fn: Any = jax.jit(init_fn)
  if load_fn is not None:
    start_fn = lambda key: models.params_of(load_fn(key))
  has_head = hasattr(abstract, 'features') and hasattr(abstract, 'head')
  return Model(
      init_fn=init_fn,
      start_fn=start_fn,
      logits_fn=jax.jit(lambda params, batch: call_fn(merged(params), batch)),
      train_fn=train_fn,
      features_fn=features_fn if has_head else None,
      inputs={
          name: jax.ShapeDtypeStruct(tuple(shape), dtypes.get(name, jnp.int32))
          for name, shape in inputs.items()
      },
      num_classes=num_classes,
      image=image,
      statistics=_paths(stats),
      recalibrate_fn=recalibrate_fn if stats else None,
  )


def _paths(tree: Any, prefix: tuple[str, ...] = ()) -> frozenset[Any]:
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  return frozenset((*prefix, *(k.key for k in path)) for path in paths)


@functools.cache
def linear(num_features: int, num_classes: int) -> Model:
  """The model of a linear probe: `logits = feature kernel + bias`, from zero.

  Its batches have `feature` [B, num_features].
  """
  linear_fn = functools.partial(
      nnx.Linear, num_features, num_classes, kernel_init=nnx.initializers.zeros
  )
  return of_module(
      lambda key: linear_fn(rngs=nnx.Rngs(key)),
      inputs={'feature': (num_features,)},
      num_classes=num_classes,
  )
