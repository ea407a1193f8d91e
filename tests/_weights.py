"""What the tests of weights under other names share."""

import functools
import json
import pathlib

from flax import nnx
import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from jaxsoup import checkpoints
from jaxsoup import sharding
from jaxsoup.models import _names


class Dict(dict):
  """Arrays by name that look like a file."""

  path = 'a dict'

  @property
  def shapes(self):
    return self


def load(make, module, naming, stored, config=None, **changes):
  """Reads a file as a loader does: the model, its arguments and its table."""
  config = config or {}
  if isinstance(stored, pathlib.Path):
    if stored.is_dir():
      config = json.loads((stored / 'config.json').read_text())
      stored = stored / 'model.safetensors'
    stored = checkpoints.Arrays(stored)
  arguments = module.arguments(naming, stored.shapes, config)
  json.dumps(arguments)
  table = module.TABLES[naming](**arguments)
  abstract = nnx.eval_shape(
      lambda: make(**arguments, **changes, rngs=nnx.Rngs(0))
  )
  graphdef, state = nnx.split(abstract, nnx.Param)
  params = _names.read(stored, nnx.to_pure_dict(state), table)
  return nnx.merge(graphdef, params), params, arguments, table


def random(make, *, seed=0, **arguments):
  """A model with random weights, none at its initial value, and these."""
  abstract = nnx.eval_shape(lambda: make(**arguments, rngs=nnx.Rngs(0)))
  graphdef, state = nnx.split(abstract, nnx.Param)
  params = randomized(nnx.to_pure_dict(state), seed)
  return nnx.merge(graphdef, params), params


def randomized(params, seed=0):
  """Random leaves of these shapes; scales around one."""
  rng = np.random.default_rng(seed)

  def draw(path, x):
    # By the size of a layer's input, or wide models blow rounding errors up.
    size = np.prod(x.shape[:-1]) if len(x.shape) > 1 else 100
    noise = rng.normal(size=x.shape) / np.sqrt(max(size, 4))
    return np.float32(noise + ('scale' in path[-1].key))

  return jax.tree_util.tree_map_with_path(draw, params)


def run(model, *inputs, method='__call__'):
  """The model's outputs, compiled as a whole: faster than op by op."""
  graphdef, state = nnx.split(model)
  return _call(graphdef, method, nnx.to_pure_dict(state), *inputs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(graphdef, method, params, *inputs):
  return getattr(nnx.merge(graphdef, params), method)(*inputs)


def check_scan(graphdef, scanned, params, stack, loss_fn, atol=1e-4):
  """A scan over the blocks has the loss and the gradient of the loop."""
  value_and_grad = lambda graphdef: jax.jit(
      jax.value_and_grad(lambda p: loss_fn(nnx.merge(graphdef, p)))
  )
  expected, gradient = value_and_grad(graphdef)(params)
  actual, stacked_gradient = value_and_grad(scanned)(stack(params))
  np.testing.assert_allclose(actual, expected, rtol=1e-5)
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol),
      stacked_gradient,
      stack(gradient),
  )


def check_sharded(graphdef, params, on_mesh, stacked, inputs):
  """A scan on four devices gives the logits of the loop on one."""
  mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(AxisType.Auto,))
  inputs = [np.concatenate([x, x[:1]]) for x in inputs]

  def model_fn(graphdef, params, *inputs):
    return nnx.merge(graphdef, params)(*inputs)

  expected = jax.jit(model_fn, static_argnums=0)(graphdef, params, *inputs)
  shardings = jax.tree.map(
      lambda x: x.sharding,
      sharding.fsdp(jax.eval_shape(lambda: stacked), mesh, min_size=0),
  )
  with jax.set_mesh(mesh):
    params = jax.device_put(stacked, shardings)
    inputs = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec('fsdp')))
    logits = jax.jit(model_fn, static_argnums=0)(on_mesh, params, *inputs)
  assert logits.sharding.spec[0] == 'fsdp'
  np.testing.assert_allclose(logits, expected, atol=1e-5)


def write(params, table):
  return dict(_names.write(params, table))


def assert_same_arrays(given, stored):
  """What was written is what had been read, bit by bit."""
  for name, array in given.items():
    np.testing.assert_array_equal(array, stored[name], err_msg=name)


def randomize_torch(model, seed=0):
  """Moves all parameters and buffers of a torch model, in place."""
  import torch

  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for x in model.state_dict().values():
      if x.is_floating_point():
        noise = torch.randn(x.shape, generator=generator)
        scale = 0.1 if x.ndim < 2 else max(x[0].numel(), 16) ** -0.5
        x.copy_(x * (x.ndim < 2) + scale * noise)
  return model.eval()


def nhwc(image):
  return np.ascontiguousarray(np.asarray(image).transpose(0, 2, 3, 1))
