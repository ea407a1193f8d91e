"""The programs of an experiment, and what the compiler says about each.

```
lowerings = programs.of(experiment, mesh, num_ingredients=58)
step = programs.compile_program('mix', lowerings['mix'], mesh)
step.peak
```
"""

from collections.abc import Mapping
from collections.abc import Sequence
import functools
import math
import re
import time
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from jaxsoup import _mixing
from jaxsoup import _tree
from jaxsoup import evaluation
from jaxsoup import metrics
from jaxsoup import sharding
from jaxsoup._recipes import _learned
from jaxsoup._recipes import _streamed
from jaxsoup.experiments import architectures
from jaxsoup.experiments import configs
from jaxsoup.experiments import cook
from jaxsoup.plan import hlo
from jaxsoup.train import modeling
from jaxsoup.train import steps
from jaxsoup.typing import Params


class Program(NamedTuple):
  """What the compiler says about one program, for one device.

  Attributes:
    name: what it computes.
    peak: bytes while it runs: the sum of the next three.
    arguments: bytes of its arguments.
    temporaries: bytes of temporary buffers.
    output: bytes of its results, without those that reuse an argument.
    flops: of products and convolutions, loops counted as often as they run.
    collectives: by name, how many and the bytes of their results.
    seconds: time to compile.
    problem: empty, or the compiler's message for a program that does not fit,
      of which only the peak is known (0, if not even that).
  """

  name: str
  peak: int
  arguments: int = 0
  temporaries: int = 0
  output: int = 0
  flops: float = 0
  collectives: Mapping[str, hlo.Traffic] = {}
  seconds: float = 0
  problem: str = ''


def of(
    experiment: configs.Experiment,
    mesh: jax.sharding.Mesh,
    num_ingredients: int,
) -> dict[str, functools.partial[Any]]:
  """The programs that the recipes and the training run, ready to be lowered.

  Args:
    experiment: as in `plan.make`.
    mesh: as in `plan.make`.
    num_ingredients: K.

  Returns:
    Functions by name that return a `jax.stages.Traced`.
  """
  config, model = experiment.config, architectures.of(experiment)
  params = abstract_params(model, mesh)
  flat = _tree.flatten(params)
  replicated = NamedSharding(mesh, PartitionSpec())
  scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
  alpha = jax.ShapeDtypeStruct(
      (num_ingredients,), jnp.float32, sharding=replicated
  )
  stacked = [_stacked(x, num_ingredients) for x in flat.leaves]
  wide = [
      jax.ShapeDtypeStruct(
          x.shape, _tree.wide_dtype(x.dtype), sharding=x.sharding
      )
      for x in flat.leaves
  ]

  def loss_at(floats, scale, batch):
    return cook.loss_fn_of(model.logits_fn)(flat.replace(floats), batch, scale)

  groups = _tree.groups_of(flat.paths, _tree.whole)
  alphas = lambda w: {g: jax.nn.softmax(w[g]) for g in w}
  w = {groups[0]: alpha}
  resident = _learned.Resident([], groups, alphas, loss_at)
  source: Any = range(num_ingredients)  # Counted; nothing is read.
  streamed = _streamed.Streamed(
      source,
      groups,
      alphas,
      loss_at,
      tuple(x.dtype for x in flat.leaves),
      [x.sharding for x in flat.leaves],
  )
  batch = lambda size, **more: batch_of(model, mesh, size, **more)
  gradient = jax.jit(
      lambda alpha, stacked, cotangent: jax.vjp(
          lambda a: _mixing.mix_leaves([a] * len(stacked), stacked), alpha
      )[1](cotangent)
  )
  evaluate = evaluation.mean_of(
      lambda params, batch: metrics.correct(
          model.logits_fn(params, batch), batch['label']
      ),
      batches=(),
  )
  calls = {
      'add to a sum': (_mixing.add, wide, flat.leaves, scalar),
      'mix': (_mixing.mix_leaves, [alpha] * len(stacked), stacked),
      'gradient in alpha': (gradient, alpha, stacked, flat.leaves),
      'evaluation step': (
          evaluate.step,
          params,
          batch(config.batch_size, mask=bool),
      ),
      'inner products, streamed': (streamed.inner, flat.leaves, flat.leaves),
      'fine-tuning step': _fine_tuning(experiment, model, mesh, params),
  }
  if 'learned' in config:
    learning = batch(config.learned.batch_size)
    calls |= {
        'learned step, resident': (
            resident.step,
            (w, scalar),
            stacked,
            learning,
        ),
        'learned step, streamed': (
            streamed.step,
            flat.leaves,
            scalar,
            learning,
        ),
    }
  return {
      name: functools.partial(fn.trace, *arguments)
      for name, (fn, *arguments) in calls.items()
  }


def _stacked(x, num_ingredients):
  spec = PartitionSpec(None, *x.sharding.spec)
  return jax.ShapeDtypeStruct(
      (num_ingredients, *x.shape),
      x.dtype,
      sharding=NamedSharding(x.sharding.mesh, spec),
  )


def batch_of(
    model: modeling.Model, mesh: jax.sharding.Mesh, size: int, **more: Any
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a batch, of a size that the mesh divides.

  Args:
    model: with the shapes of its inputs.
    mesh: as in `plan.make`.
    size: examples; rounded up.
    **more: dtypes of further vectors, by name.

  Returns:
    Shapes and shardings by name.
  """
  size = divided(size, mesh)
  split = NamedSharding(mesh, PartitionSpec('fsdp'))
  shape = lambda *x: jax.ShapeDtypeStruct(x[1:], x[0], sharding=split)
  return {
      **{n: shape(x.dtype, size, *x.shape) for n, x in model.inputs.items()},
      'label': shape(jnp.int32, size),
      **{name: shape(dtype, size) for name, dtype in more.items()},
  }


def divided(size: int, mesh: jax.sharding.Mesh) -> int:
  """A size, rounded up to a multiple of the number of devices."""
  return -(-size // mesh.size) * mesh.size


def _fine_tuning(experiment, model, mesh, params):
  """One step of all runs of a group, as `finetune.train` runs it."""
  config = experiment.config
  runs = experiment.runs[: config.sweep.group_size]
  settings = steps.settings_of(config.finetune, runs, config.data.sizes.train)
  replicated = NamedSharding(mesh, PartitionSpec())
  scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=replicated)
  hyper = {
      name: scalar(jnp.uint32 if name.endswith('seed') else jnp.float32)
      for name in sorted(set().union(steps.DEFAULTS, *runs))
  }
  init_fn = functools.partial(steps.initial_state, settings)
  state = sharding.fsdp(jax.eval_shape(init_fn, params, hyper), mesh)
  stacked = lambda tree: jax.tree.map(lambda x: _stacked(x, len(runs)), tree)

  def step_fn(state, hyper, batch):
    def run_fn(state, hyper):
      key = jax.random.key(hyper['seed'])
      return steps.train_step(model, settings, state, hyper, batch, key)

    return jax.vmap(run_fn)(state, hyper)

  return (
      jax.jit(step_fn, donate_argnums=0),
      stacked(state),
      stacked(hyper),
      batch_of(model, mesh, config.finetune.batch_size),
  )


def abstract_params(model: modeling.Model, mesh: jax.sharding.Mesh) -> Params:
  """Shapes and shardings of one ingredient."""
  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(lambda: model.init_fn(jax.random.key(0)))
  return sharding.fsdp(shapes, mesh)


def sweep_flops(
    experiment: configs.Experiment,
    mesh: jax.sharding.Mesh,
    compiled: Sequence[Program],
) -> float:
  """FLOPs of all examples that the runs see, each as in the fine-tuning step.

  Args:
    experiment: as in `plan.make`.
    mesh: as in `plan.make`.
    compiled: the programs.

  Returns:
    Those of all devices together.
  """
  step = next(p for p in compiled if p.name == 'fine-tuning step')
  config, num = experiment.config, experiment.config.data.sizes.train
  num_alike = len(experiment.runs[: config.sweep.group_size])
  in_step = num_alike * divided(config.finetune.batch_size, mesh)
  settings = [
      steps.settings_of(config.finetune, [run], num) for run in experiment.runs
  ]
  seen = sum(s.num_epochs * (num - num % s.batch_size) for s in settings)
  return step.flops * mesh.size * seen / in_step


def compile_program(
    name: str, trace_fn: functools.partial[Any], mesh: jax.sharding.Mesh
) -> Program:
  """Compiles for the devices of the mesh, and reads what the compiler says."""
  start = time.monotonic()
  with jax.set_mesh(mesh):
    traced = trace_fn()
    flops = hlo.flops_of(traced.jaxpr.jaxpr) / mesh.size
    lowered = traced.lower()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    problem = str(e).splitlines()[0].removeprefix('RESOURCE_EXHAUSTED: ')
    seconds = time.monotonic() - start
    arguments = sum(map(shard_bytes, jax.tree.leaves(trace_fn.args)))
    needed = _needed(str(e), arguments)
    return Program(name, needed, flops=flops, seconds=seconds, problem=problem)
  memory = compiled.memory_analysis()
  arguments = memory.argument_size_in_bytes
  temporaries = memory.temp_size_in_bytes
  output = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return Program(
      name=name,
      peak=arguments + temporaries + output,
      arguments=arguments,
      temporaries=temporaries,
      output=output,
      flops=flops,
      collectives=hlo.collectives_of(compiled.as_text()),
      seconds=time.monotonic() - start,
  )


def _needed(message: str, argument_bytes: int) -> int:
  """Bytes of a program and its arguments, from the TPU compiler's message."""
  match = re.search(r'(?:required[^(]*\(|Used )([\d.]+)([KMGT])', message)
  if match is None:
    return 0
  needed = int(float(match[1]) * 1024 ** (1 + 'KMGT'.index(match[2])))
  # That of jax 0.7 then speaks of the program alone.
  is_alone = re.search(r'arguments +0B', message)
  return needed + (argument_bytes if is_alone else 0)


def shard_bytes(x: jax.ShapeDtypeStruct) -> int:
  """Bytes of an array on one device."""
  return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def num_hosts(mesh: jax.sharding.Mesh) -> int:
  """Processes that the devices of a mesh belong to."""
  return len({d.process_index for d in mesh.devices.flat})
