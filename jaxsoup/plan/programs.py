"""The programs of an experiment, and what the compiler says about each.

```
lowerings = programs.of(experiment, mesh, num_ingredients=58)
step = programs.compile_program('mix', lowerings['mix'], mesh)
step.peak
```
"""

from collections.abc import Mapping
import functools
import math
import re
import time
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from jaxsoup import _mixing
from jaxsoup import _tree
from jaxsoup import sharding
from jaxsoup._recipes import _learned
from jaxsoup._recipes import _streamed
from jaxsoup.experiments import architectures
from jaxsoup.experiments import configs
from jaxsoup.experiments import cook
from jaxsoup.plan import hlo
from jaxsoup.train import loop
from jaxsoup.train import modeling
from jaxsoup.train import steps
from jaxsoup.typing import Params

_replicated = functools.partial(sharding.by_rules, rules=())


class Program(NamedTuple):
  """What the compiler says about one program, for one device.

  Attributes:
    name: what it computes.
    peak: bytes while it runs: the sum of the next three.
    arguments: bytes of its arguments.
    temporaries: bytes of temporary buffers.
    output: bytes of its results, without those that reuse an argument.
    flops: of products and convolutions, loops counted as often as they run.
    wide_flops: those of them whose operands are float32.
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
  wide_flops: float = 0
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
    mesh: of `used`.
    num_ingredients: K.

  Returns:
    Functions by name that return a `jax.stages.Traced`.
  """
  config, model = experiment.config, architectures.of(experiment)
  params = abstract_params(model, mesh)
  flat = _tree.flatten(params)
  number = lambda *shape: _replicated(
      jax.ShapeDtypeStruct(shape, jnp.float32), mesh
  )
  wide = [x.update(dtype=_tree.wide_dtype(x.dtype)) for x in flat.leaves]

  def loss_at(floats, scale, batch):
    return cook.loss_fn_of(model.logits_fn)(flat.replace(floats), batch, scale)

  groups = _tree.groups_of(flat.paths, _tree.whole)
  alphas = lambda w: {g: jax.nn.softmax(w[g]) for g in w}
  w = {groups[0]: number(num_ingredients)}
  read = batches(config, mesh)
  evaluation = batch_of(model, read['evaluation'], mask=bool)
  score = cook.score_fn(config, model.logits_fn, batches=())
  calls = {
      'add to a sum': (_mixing.add, wide, flat.leaves, number()),
      'evaluation step': (score.step, params, evaluation),
      'fine-tuning step': _fine_tuning(experiment, model, mesh, params),
  }
  if 'learned' in config:
    # Of ingredients that are counted; nothing is read.
    same = groups, alphas, loss_at
    resident = _learned.Resident([], *same)
    streamed = _streamed.Streamed(
        range(num_ingredients),  # type: ignore[arg-type]
        *same,
        tuple(x.dtype for x in flat.leaves),
        [x.sharding for x in flat.leaves],
    )
    stacked = [loop.stacked(x, num_ingredients) for x in flat.leaves]
    batch = batch_of(model, read['learned'])
    other = batch_of(model, read['early stopping'])
    calls |= {
        'mix': (resident.mix, w, stacked),
        'learned step, resident': (
            resident.step, (w, number()), stacked, batch
        ),
        'learned step, streamed': (
            streamed.step, flat.leaves, number(), batch
        ),
        'inner products, streamed': (streamed.inner, flat.leaves, flat.leaves),
        'early stopping': (resident.loss, flat.leaves, number(), other),
    }  # fmt: skip
  return {
      name: functools.partial(fn.trace, *arguments)
      for name, (fn, *arguments) in calls.items()
  }


def used(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> jax.sharding.Mesh:
  """The devices that an experiment uses: all if it is sharded, else one."""
  if config.get('is_sharded', False):
    return mesh
  return loop.all_devices(list(mesh.devices.flat[:1]))


def batches(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> dict[str, cook.Batches]:
  """The batches that an experiment reads: their number, size and sharding.

  Returns:
    By what they are for: 'fine-tuning', and of held-out examples 'evaluation',
    'learned' and 'early stopping'.

  Raises:
    ValueError: the devices do not divide the size of those of fine-tuning.
  """
  sizes, on = config.data.sizes, loop.split(mesh)
  held_out: Any = range(sizes.held_out)  # Counted, not read.
  size = config.finetune.batch_size
  loop.check_divided(size, mesh)
  made = {
      'fine-tuning': cook.Batches(range(sizes.train), size, on),
      'evaluation': cook.Batches(held_out, config.batch_size, on),
  }
  if 'learned' in config:
    parts = cook.learning_batches(config, held_out, on)
    made |= zip(('learned', 'early stopping'), parts)
  return made


def batch_of(
    model: modeling.Model, batches: cook.Batches, **more: Any
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and shardings of a batch by name; `more` are dtypes of vectors."""
  shape = lambda dtype, *x: jax.ShapeDtypeStruct(
      (batches.size, *x), dtype, sharding=batches.sharding
  )
  return {
      **{name: shape(x.dtype, *x.shape) for name, x in model.inputs.items()},
      **{name: shape(x) for name, x in {'label': jnp.int32, **more}.items()},
  }


def _fine_tuning(experiment, model, mesh, params):
  """One step of the largest group of runs, as `loop.train` calls it."""
  settings, runs = sweep(experiment).largest
  loop.check_divided(settings.batch_size, mesh)
  batches = cook.Batches(range(1), settings.batch_size, loop.split(mesh))
  inputs = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
          (len(runs), 1, *x.shape), x.dtype, sharding=loop.stacked_split(mesh)
      ),
      batch_of(model, batches),
  )
  hyper = _replicated(steps.stack_runs(runs), mesh)
  state = loop.abstract_state(settings, mesh, params, hyper)
  place = [_replicated(jax.ShapeDtypeStruct((), jnp.int32), mesh)] * 2
  return loop.advance, model, settings, state, hyper, None, *place, inputs


def abstract_params(model: modeling.Model, mesh: jax.sharding.Mesh) -> Params:
  """Shapes and shardings of one ingredient."""
  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(lambda: model.init_fn(jax.random.key(0)))
  return sharding.fsdp(shapes, mesh)


class Sweep(NamedTuple):
  """The training of all runs.

  Attributes:
    steps: of groups of runs that train together.
    examples: that all runs together see.
    times: the work, in fine-tuning steps of the largest group.
    largest: the group with the most examples in a step: settings and runs.
  """

  steps: int
  examples: int
  times: float
  largest: tuple[steps.Settings, list[configs.Run]]


def sweep(experiment: configs.Experiment) -> Sweep:
  """Counts the steps and examples of all runs, each of its own length."""
  config, num_train = experiment.config, experiment.config.data.sizes.train
  groups = []
  num_steps = examples = 0
  for rows in steps.grouped(experiment.runs, config.sweep.group_size):
    runs = [experiment.runs[i] for i in rows]
    settings = steps.settings_of(config.finetune, runs, num_train)
    in_group = settings.num_epochs * (num_train // settings.batch_size)
    num_steps += in_group
    examples += in_group * len(runs) * settings.batch_size
    groups.append((settings, runs))
  in_step = lambda group: len(group[1]) * group[0].batch_size
  largest = max(groups, key=in_step)
  return Sweep(num_steps, examples, examples / in_step(largest), largest)


def compile_program(
    name: str, trace_fn: functools.partial[Any], mesh: jax.sharding.Mesh
) -> Program:
  """Compiles for the devices of the mesh, and reads what the compiler says."""
  start = time.monotonic()
  with jax.set_mesh(mesh):
    traced = trace_fn()
    jaxpr = traced.jaxpr.jaxpr
    program = Program(
        name,
        peak=0,
        flops=hlo.flops_of(jaxpr) / mesh.size,
        wide_flops=hlo.flops_of(jaxpr, jnp.float32) / mesh.size,
    )
    lowered = traced.lower()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    leaves = jax.tree.leaves(trace_fn.args)
    shapes = [x for x in leaves if isinstance(x, jax.ShapeDtypeStruct)]
    return program._replace(
        peak=_needed(str(e), sum(map(shard_bytes, shapes))),
        seconds=time.monotonic() - start,
        problem=str(e).splitlines()[0].removeprefix('RESOURCE_EXHAUSTED: '),
    )
  memory = compiled.memory_analysis()
  parts = {
      'arguments': memory.argument_size_in_bytes,
      'temporaries': memory.temp_size_in_bytes,
      'output': memory.output_size_in_bytes - memory.alias_size_in_bytes,
  }
  return program._replace(
      **parts,
      peak=sum(parts.values()),
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
