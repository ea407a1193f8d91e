"""Plans an experiment before it runs: memory, work, communication.

```
mesh, device_bytes = machines.topology_mesh('v5e:8x8')   # no TPU is needed
made = plan.make(
    experiment, mesh, device_bytes, num_ingredients=58, machine='v5e:8x8'
)
print(plan_text.as_text(made))
```

Lowers what the library runs, at full size, from shapes alone, and compiles it
with the compiler of the device: that of TPUs is in the package libtpu, and
works on any machine.
"""

from collections.abc import Callable
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
import ml_collections

from jaxsoup import _mixing
from jaxsoup import _tree
from jaxsoup import evaluation
from jaxsoup import metrics
from jaxsoup import sharding
from jaxsoup._recipes import _learned
from jaxsoup._recipes import _streamed
from jaxsoup.experiments import configs
from jaxsoup.experiments import cook
from jaxsoup.experiments import hlo
from jaxsoup.experiments import machines
from jaxsoup.experiments import modeling
from jaxsoup.experiments import steps


class Program(NamedTuple):
  """What the compiler says of one program; bytes and FLOPs are of one device.

  Attributes:
    name: what it computes.
    peak: bytes while it runs: the sum of the next three.
    arguments: bytes of its arguments.
    temporaries: bytes it needs meanwhile.
    output: bytes of its results, without those that reuse an argument.
    flops: of products and convolutions, loops counted as often as they run.
    collectives: by name, how many and the bytes of their results.
    seconds: time to compile.
    problem: empty, or what the compiler says of a program that does not fit, of
      which just the peak is known (0, if not even that).
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


class Recipe(NamedTuple):
  """What a recipe needs; all bytes, those of a device at its peak.

  Attributes:
    name: of the recipe, and how it reads.
    device: bytes on one device.
    host: bytes in the memory of one host.
    reads: bytes read by all hosts together.
    writes: bytes of the soup.
    evaluations: walks through the held-out set, at most.
    steps: of gradient descent, at most.
    fits: whether `device` fits, and all hosts can take part.
    note: if not, why, and what would.
  """

  name: str
  device: int
  host: int
  reads: int
  writes: int
  evaluations: int
  steps: int
  fits: bool
  note: str = ''


class Plan(NamedTuple):
  """A plan: the machine, its programs and the recipes on it.

  Attributes:
    machine: its name.
    num_devices: of all hosts.
    num_hosts: one process runs on each.
    device_bytes: memory of one device.
    num_ingredients: K.
    num_parameters: of one ingredient.
    model_bytes: of one ingredient.
    read_bytes: what all hosts together read of one ingredient.
    batch_sizes: by program, rounded up to what the devices divide.
    held_out_bytes: of all held-out examples on one device.
    num_runs: of the sweep.
    sweep_flops: of all steps of all runs, on all devices together.
    programs: what the compiler says of each.
    recipes: what each needs.
  """

  machine: str
  num_devices: int
  num_hosts: int
  device_bytes: int
  num_ingredients: int
  num_parameters: int
  model_bytes: int
  read_bytes: int
  batch_sizes: Mapping[str, int]
  held_out_bytes: int
  num_runs: int
  sweep_flops: float
  programs: tuple[Program, ...]
  recipes: tuple[Recipe, ...]


def make(
    experiment: configs.Experiment,
    mesh: jax.sharding.Mesh,
    device_bytes: int,
    *,
    num_ingredients: int,
    machine: str,
    on_program: Callable[[Program], None] | None = None,
) -> Plan:
  """Compiles the programs of an experiment, and adds up what recipes need.

  Args:
    experiment: of `configs.load`; its data are not asked for.
    mesh: with the axis `fsdp`, over which models and batches are sharded.
    device_bytes: memory of one device.
    num_ingredients: K.
    machine: a name for it.
    on_program: called after each program.

  Returns:
    A `Plan`.

  Raises:
    UsageError: the config lacks something: names it.
  """
  config = experiment.config
  _check_complete(config)
  model = modeling.of(experiment)
  lowerings = programs(experiment, mesh, num_ingredients)
  compiled = []
  for name, lower_fn in lowerings.items():
    compiled.append(compile_program(name, lower_fn, mesh))
    if on_program is not None:
      on_program(compiled[-1])
  leaves = jax.tree.leaves(abstract_params(model, mesh))
  held_out = _batch(model, mesh, config.data.sizes.held_out)
  return Plan(
      machine=machine,
      num_devices=mesh.size,
      num_hosts=_num_hosts(mesh),
      device_bytes=device_bytes,
      num_ingredients=num_ingredients,
      num_parameters=sum(math.prod(x.shape) for x in leaves),
      model_bytes=sum(map(_total_bytes, leaves)),
      read_bytes=_boxes(leaves)[1],
      batch_sizes={
          name: _divided(size, mesh)
          for name, size in _batch_sizes(config).items()
      },
      held_out_bytes=sum(map(_shard_bytes, held_out.values())),
      num_runs=len(experiment.runs),
      sweep_flops=sweep_flops(experiment, mesh, compiled),
      programs=tuple(compiled),
      recipes=recipes(
          experiment, mesh, device_bytes, num_ingredients, tuple(compiled)
      ),
  )


# What is read of a config, beside what its model and its sweep take.
FIELDS = (
    'batch_size',
    'data.sizes.held_out',
    'data.sizes.train',
    'finetune.batch_size',
    'finetune.final',
    'finetune.num_epochs',
    'finetune.warmup',
    'sweep.group_size',
)
# And of one with learned soups.
LEARNED_FIELDS = (
    'learned.batch_size',
    'learned.num_epochs',
    'learned.val_fraction',
)


def _check_complete(config: ml_collections.ConfigDict) -> None:
  def is_missing(name):
    node = config
    for part in name.split('.'):
      if not isinstance(node, ml_collections.ConfigDict) or part not in node:
        return True
      node = node[part]
    return False

  fields = FIELDS + (LEARNED_FIELDS if 'learned' in config else ())
  missing = [name for name in fields if is_missing(name)]
  if missing:
    raise configs.UsageError(
        f'The config lacks {", ".join(missing)}: see configs/digits.py.'
    )


def _batch_sizes(config: ml_collections.ConfigDict) -> dict[str, int]:
  sizes = {'evaluation': config.batch_size}
  if 'learned' in config:
    sizes['learned'] = config.learned.batch_size
  return {**sizes, 'fine-tuning': config.finetune.batch_size}


def _num_hosts(mesh: jax.sharding.Mesh) -> int:
  return len({d.process_index for d in mesh.devices.flat})


def abstract_params(model: modeling.Model, mesh: jax.sharding.Mesh) -> Any:
  """Shapes and shardings of one ingredient."""
  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(lambda: model.init_fn(jax.random.key(0)))
  return sharding.fsdp(shapes, mesh)


def programs(
    experiment: configs.Experiment,
    mesh: jax.sharding.Mesh,
    num_ingredients: int,
) -> dict[str, functools.partial]:
  """The programs that the recipes and the training run, ready to be lowered.

  Returns:
    Functions by name that return a `jax.stages.Traced`.
  """
  config, model = experiment.config, modeling.of(experiment)
  params = abstract_params(model, mesh)
  flat = _tree.flatten(params)
  replicated = NamedSharding(mesh, PartitionSpec())
  scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
  alpha = jax.ShapeDtypeStruct(
      (num_ingredients,), jnp.float32, sharding=replicated
  )
  stacked = [_stacked(x, num_ingredients) for x in flat.leaves]
  each = [scalar] * len(flat.leaves)
  wide = [
      jax.ShapeDtypeStruct(
          x.shape, _tree.wide_dtype(x.dtype), sharding=x.sharding
      )
      for x in flat.leaves
  ]

  def loss_at(floats, scale, batch):
    return cook.loss_fn_of(model.logits_fn)(flat.replace(floats), batch, scale)

  groups = [_tree.group_of(path, None) for path in flat.paths]
  alphas = lambda w: {g: jax.nn.softmax(w[g]) for g in w}
  w = {groups[0]: alpha}
  resident = _learned.Resident(None, groups, alphas, loss_at)
  streamed = _streamed.Streamed(
      range(num_ingredients),
      groups,
      alphas,
      loss_at,
      tuple(x.dtype for x in flat.leaves),
      [x.sharding for x in flat.leaves],
  )
  batch = lambda size, **more: _batch(model, mesh, size, **more)
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
      'add to a sum': (_mixing.add, wide, flat.leaves, each),
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


def _batch(model, mesh, size, **more):
  """Shapes of a batch, of a size that the mesh divides."""
  size = _divided(size, mesh)
  split = NamedSharding(mesh, PartitionSpec('fsdp'))
  shape = lambda *x: jax.ShapeDtypeStruct(x[1:], x[0], sharding=split)
  return {
      **{n: shape(x.dtype, size, *x.shape) for n, x in model.inputs.items()},
      'label': shape(jnp.int32, size),
      **{name: shape(dtype, size) for name, dtype in more.items()},
  }


def _divided(size: int, mesh: jax.sharding.Mesh) -> int:
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
      _batch(model, mesh, config.finetune.batch_size),
  )


def sweep_flops(
    experiment: configs.Experiment,
    mesh: jax.sharding.Mesh,
    compiled: Sequence[Program],
) -> float:
  """FLOPs of all examples that the runs see, each as in the fine-tuning step.

  Args:
    experiment: as in `make`.
    mesh: as in `make`.
    compiled: the programs.

  Returns:
    Those of all devices together.
  """
  step = next(p for p in compiled if p.name == 'fine-tuning step')
  config, num = experiment.config, experiment.config.data.sizes.train
  num_alike = len(experiment.runs[: config.sweep.group_size])
  in_step = num_alike * _divided(config.finetune.batch_size, mesh)
  settings = [
      steps.settings_of(config.finetune, [run], num) for run in experiment.runs
  ]
  seen = sum(s.num_epochs * (num - num % s.batch_size) for s in settings)
  return step.flops * mesh.size * seen / in_step


def compile_program(
    name: str, trace_fn: functools.partial, mesh: jax.sharding.Mesh
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
    arguments = sum(map(_shard_bytes, jax.tree.leaves(trace_fn.args)))
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
  """Bytes of a program and its arguments, as the compiler of TPUs says them."""
  found = re.search(r'(?:required[^(]*\(|Used )([\d.]+)([KMGT])', message)
  if found is None:
    return 0
  needed = int(float(found[1]) * 1024 ** (1 + 'KMGT'.index(found[2])))
  # That of jax 0.7 then speaks of the program alone.
  is_alone = re.search(r'arguments +0B', message)
  return needed + (argument_bytes if is_alone else 0)


def recipes(
    experiment: configs.Experiment,
    mesh: jax.sharding.Mesh,
    device_bytes: int,
    num_ingredients: int,
    compiled: tuple[Program, ...],
) -> tuple[Recipe, ...]:
  """Adds up what each recipe reads, holds and evaluates.

  Args:
    experiment: as in `make`.
    mesh: as in `make`.
    device_bytes: memory of one device.
    num_ingredients: K.
    compiled: the programs.

  Returns:
    One `Recipe` each; those that search are counted as if they took all.
  """
  by_name = {p.name: p for p in compiled}
  config, model = experiment.config, modeling.of(experiment)
  leaves = jax.tree.leaves(abstract_params(model, mesh))
  host_reads, all_read = _boxes(leaves)
  device = _on_device(by_name, num_ingredients)
  num_logits = config.data.sizes.held_out * model.num_classes
  host = _on_host(num_logits, mesh, leaves, num_ingredients)
  made = []
  for name, (reads, evaluations, num_steps) in _counts(
      config, num_ingredients
  ).items():
    is_fitting = device[name] <= device_bytes and not any(
        by_name[program].problem for program in RUNS.get(name, ())
    )
    made.append(
        Recipe(
            name=name,
            device=device[name],
            host=host_reads + host.get(name, 0),
            reads=reads * all_read,
            writes=0 if name == 'ensembles' else sum(map(_total_bytes, leaves)),
            evaluations=evaluations,
            steps=num_steps,
            fits=is_fitting,
        )
    )
  return _with_notes(made, mesh, device_bytes, num_ingredients, by_name)


# The largest programs that a recipe runs.
RUNS = {
    'greedy': ['evaluation step'],
    'pruned, one pass': ['evaluation step'],
    'learned, resident': ['learned step, resident'],
    'learned, streamed': ['learned step, streamed'],
    'learned, cached': ['learned step, streamed'],
    'ensembles': ['evaluation step'],
}


def _on_device(
    by_name: Mapping[str, Program], num_ingredients: int
) -> dict[str, int]:
  """Bytes by recipe: what it keeps, beside its largest program.

  `one` is the model that a recipe works on, `ahead` the one read ahead.
  """
  # As the compiler lays them out: tiles are padded.
  inner = by_name['inner products, streamed']
  one = ahead = inner.arguments // 2
  total = by_name['add to a sum'].arguments - one
  evaluated = by_name['evaluation step'].peak
  device = {
      'uniform': one,
      'greedy': evaluated + total + one + ahead,
      'pruned, one pass': evaluated + total + one + ahead,
      # The sums of theta_k and of unit vectors, theta_0, and the soup.
      'Model Stock': 2 * total + 3 * one + ahead,
      'ensembles': evaluated + ahead,
  }
  if 'learned step, resident' not in by_name:
    return device
  # The ingredient that was read last is kept.
  forward = by_name['learned step, streamed'].peak + one
  mixing = total + one
  return {
      **device,
      # Or when the last one is put on the stack.
      'learned, resident': max(
          by_name['learned step, resident'].peak,
          num_ingredients * one + one + ahead,
      ),
      'learned, streamed': max(forward, mixing, inner.peak) + ahead,
      # Nothing is read ahead; a copy is widened on the device.
      'learned, cached': max(forward, mixing + one, inner.peak + one),
  }


def _on_host(num_logits, mesh, leaves, num_ingredients) -> dict[str, int]:
  """Bytes by recipe that one host keeps, beside the model that it reads."""
  narrow = lambda x: math.prod(x.shape) * min(2, x.dtype.itemsize)
  copies = num_ingredients * sum(map(narrow, leaves)) // _num_hosts(mesh)
  # Logits are collected one by one, then stacked.
  return {
      'learned, cached': copies,
      'ensembles': 2 * num_ingredients * num_logits * 4,
  }


def _counts(config, num_ingredients) -> dict[str, tuple[int, int, int]]:
  """By recipe, at most: models read, walks through the data, steps."""
  k = num_ingredients
  learned = {}
  if 'learned' in config:
    held_out, epochs = config.data.sizes.held_out, config.learned.num_epochs
    num_learning = held_out - int(held_out * config.learned.val_fraction)
    steps = epochs * (num_learning // config.learned.batch_size)
    # Two walks through the ingredients a step (the mix, and its gradient), one
    # a walk through the second split, one for the soup. Each begins with the
    # ingredient that is there.
    streamed = (2 * steps + epochs + 2) * (k - 1) + 1
    learned = {
        'learned, resident': (k, epochs + 1, steps),
        'learned, streamed': (streamed, epochs + 1, steps),
        'learned, cached': (2 * k, epochs + 1, steps),
    }
  return {
      'uniform': (k, 0, 0),
      'greedy': (2 * k, 2 * k - 1, 0),
      'pruned, one pass': (3 * k + 1, 2 * k + 1, 0),
      **learned,
      'Model Stock': (k + 2, 0, 0),
      'ensembles': (k + 1, k, 0),
  }


def _with_notes(made, mesh, device_bytes, num_ingredients, by_name):
  """Says of each recipe why it does not fit, and what would."""
  num_hosts = _num_hosts(mesh)
  fits = {r.name: r.fits for r in made}
  one = by_name['inner products, streamed'].arguments // 2
  # What `jaxsoup.learned` chooses: it knows nothing of the activations.
  _, is_kept = _streamed.fits(num_ingredients, one, device_bytes)

  def noted(recipe):
    is_resident = recipe.name == 'learned, resident'
    note = ''
    if not recipe.fits:
      needed = f'{amount(recipe.device)} of {amount(device_bytes)}'
      note = f'does not fit: needs {needed}; '
      if is_resident and fits['learned, streamed']:
        note += 'streamed fits: ' + (
            'pass stream=True' if is_kept else 'stream=None takes that'
        )
      else:
        note += _what_would_fit(recipe.device, mesh)
    elif recipe.name in ('learned, cached', 'ensembles') and num_hosts > 1:
      recipe = recipe._replace(fits=False)
      note = f'does not run: in one process only, not on {num_hosts} hosts'
      if recipe.name == 'learned, cached':
        note += '; stream without cache_dtype'
    elif is_resident and not is_kept:
      note = (
          'fits with stream=False; stream=None streams, as K + 3 models take '
          'over two thirds'
      )
    return recipe._replace(note=note)

  return tuple(map(noted, made))


def _what_would_fit(num_bytes: int, mesh: jax.sharding.Mesh) -> str:
  if mesh.devices.flat[0].platform == 'cpu':
    return 'try more memory, or smaller batches'
  kinds = [
      k for k, c in machines.CHIPS.items() if c.hbm_gib * 2**30 >= num_bytes
  ]
  others = f'{mesh.size} of {" or ".join(kinds)}, ' if kinds else ''
  return f'try {others}more devices, or smaller batches'


def _boxes(leaves) -> tuple[int, int]:
  """Bytes that one host reads of a model, at most, and that all read.

  A host reads of a leaf the smallest box with all that its devices hold, see
  `checkpoints`: more than they hold where these are no neighbours in the mesh.
  """
  by_host: dict[int, int] = {}
  for x in leaves:
    boxes: dict[int, list[Any]] = {}
    for device, index in x.sharding.devices_indices_map(x.shape).items():
      boxes.setdefault(device.process_index, []).append(index)
    for host, indices in boxes.items():
      sides = [
          [i.indices(n)[:2] for i in of_axis]
          for of_axis, n in zip(zip(*indices), x.shape)
      ]
      size = math.prod(
          max(end for _, end in side) - min(start for start, _ in side)
          for side in sides
      )
      by_host[host] = by_host.get(host, 0) + size * x.dtype.itemsize
  return max(by_host.values()), sum(by_host.values())


def _total_bytes(x) -> int:
  return math.prod(x.shape) * x.dtype.itemsize


def _shard_bytes(x) -> int:
  return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def as_json(plan: Plan) -> dict[str, Any]:
  """The plan as nested dicts, bytes and FLOPs as numbers."""
  return {
      **plan._asdict(),
      'programs': [
          {
              **p._asdict(),
              'collectives': {k: t._asdict() for k, t in p.collectives.items()},
          }
          for p in plan.programs
      ],
      'recipes': [r._asdict() for r in plan.recipes],
  }


def amount(number: float, unit: str = 'B') -> str:
  """A number in three digits, and a prefix of its unit.

  Example:
    >>> amount(17_179_869_184), amount(58_520, ''), amount(4.51e13, 'FLOP')
    ('17.2 GB', '58.5 k', '45.1 TFLOP')
  """
  for prefix, size in zip('ZEPTGMk', (1e21, 1e18, 1e15, 1e12, 1e9, 1e6, 1e3)):
    if number >= 0.9995 * size:
      return f'{number / size:.3g} {prefix}{unit}'
  return f'{number:.0f} {unit}'.rstrip()
