"""Plans an experiment before it runs: memory, work, communication.

```
mesh = plan.topology_mesh('v5e:8x8')              # no TPU is needed
programs = plan.programs(config, mesh, num_ingredients=58)
print(plan.as_text(plan.make(config, mesh, num_ingredients=58)))
```

Lowers what the library runs, at full size, from shapes alone, and compiles it
with the compiler of the device: that of TPUs is in the package libtpu, and
works on any machine.
"""

from collections.abc import Callable
from collections.abc import Mapping
import importlib.util
import math
import os
import re
import time
from typing import Any
from typing import NamedTuple

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import ml_collections
import optax

from jaxsoup import _memory
from jaxsoup import _mixing
from jaxsoup import _tree
from jaxsoup import evaluation
from jaxsoup import metrics
from jaxsoup import sharding
from jaxsoup._recipes import _learned
from jaxsoup._recipes import _streamed
from jaxsoup.experiments import configs
from jaxsoup.experiments import cook
from jaxsoup.experiments import finetune
from jaxsoup.experiments import hlo

# Memory of a chip in GiB: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e,
# section "System architecture".
HBM = {'v4': 32, 'v5e': 16, 'v5p': 95, 'v6e': 32}


class Program(NamedTuple):
  """What the compiler says of one program; bytes and FLOPs are of one device.

  Attributes:
    name: what it computes.
    arguments: bytes of its arguments.
    temporaries: bytes it needs meanwhile.
    output: bytes of its results, without those that reuse an argument.
    flops: of products of matrices, loops counted as often as they run.
    collectives: by name, how many and the bytes of their results.
    seconds: time to compile.
    problem: empty, or why it does not compile: often the memory it would need.
  """

  name: str
  arguments: int = 0
  temporaries: int = 0
  output: int = 0
  flops: float = 0
  collectives: Mapping[str, hlo.Traffic] = {}
  seconds: float = 0
  problem: str = ''

  @property
  def peak(self) -> int:
    """Bytes while it runs."""
    return self.arguments + self.temporaries + self.output


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
    fits: whether `device` fits.
    note: why not, and what would.
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
  """A plan: the machine, its programs and the recipes on it."""

  machine: str
  num_devices: int
  num_hosts: int
  device_bytes: int
  num_ingredients: int
  num_parameters: int
  model_bytes: int
  programs: tuple[Program, ...]
  recipes: tuple[Recipe, ...]


def topology_mesh(name: str) -> tuple[jax.sharding.Mesh, int]:
  """A mesh of TPUs that are not there, and the bytes of memory of each.

  Args:
    name: generation and shape: 'v5e:8x8', 'v5p:4x4x4'.

  Returns:
    (mesh with the axis `fsdp`, bytes a device).

  Raises:
    ImportError: libtpu is missing.
    UsageError: there is no such generation or shape.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise ImportError(
        'The compiler of TPUs, libtpu, is not installed: pip install '
        '"jaxsoup[tpu-plan]". Without it: --devices N, on virtual CPU devices.'
    )
  kind, _, shape = name.partition(':')
  if kind not in HBM or not re.fullmatch(r'\d+(x\d+)+', shape):
    raise configs.UsageError(
        f'There is no topology {name!r}: write one of {", ".join(HBM)}, and '
        'its shape: v5e:8x8, v6e:16x16, v5p:4x4x4, v4:2x2x2.'
    )
  _prepare_compiler()
  try:
    devices = topologies.get_topology_desc(
        platform='tpu', topology_name=name
    ).devices
  except Exception as e:  # libtpu raises several types.
    raise configs.UsageError(
        f'{name!r} is no valid topology: {str(e).splitlines()[0]}. Sides are '
        'multiples of 2; v5e and v6e have two, v4 and v5p three.'
    ) from e
  num_chips = math.prod(map(int, shape.split('x')))
  mesh = _mesh_of(devices)
  return mesh, HBM[kind] * 2**30 * num_chips // len(devices)


def _prepare_compiler() -> None:
  """Must come before libtpu is loaded."""
  defaults = {
      'TPU_SKIP_MDS_QUERY': '1',  # Or it looks for the machine it is not on.
      'TPU_WORKER_HOSTNAMES': 'localhost',
      'TPU_MIN_LOG_LEVEL': '3',
      'TPU_STDERR_LOG_LEVEL': '3',
      # It takes a lock, which a second process would fail to get.
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  }
  for name, value in defaults.items():
    os.environ.setdefault(name, value)
  # The compiler overflows its stack on scanned blocks of this size, and dies.
  flag = '--fibers_default_thread_stack_size'
  given = os.environ.get('LIBTPU_INIT_ARGS', '')
  if flag not in given:
    os.environ['LIBTPU_INIT_ARGS'] = f'{given} {flag}=4194304'.strip()


def cpu_mesh(num_devices: int) -> tuple[jax.sharding.Mesh, int]:
  """A mesh of virtual CPU devices, and the bytes that each can have.

  Raises:
    UsageError: jax has begun with fewer.
  """
  devices = jax.devices('cpu')
  if len(devices) < num_devices:
    raise configs.UsageError(
        f'jax has {len(devices)} CPU devices, not {num_devices}: set XLA_FLAGS='
        f'--xla_force_host_platform_device_count={num_devices}.'
    )
  free = _memory.host_free_bytes()
  return _mesh_of(devices[:num_devices]), free // num_devices


def _mesh_of(devices) -> jax.sharding.Mesh:
  return jax.make_mesh(
      (len(devices),), ('fsdp',), axis_types=(AxisType.Auto,), devices=devices
  )


def make(
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    device_bytes: int,
    *,
    num_ingredients: int,
    machine: str,
    on_program: Callable[[Program], None] | None = None,
) -> Plan:
  """Compiles the programs of an experiment, and adds up what recipes need.

  Args:
    config: the experiment.
    mesh: with the axis `fsdp`, over which models and batches are sharded.
    device_bytes: memory of one device.
    num_ingredients: K.
    machine: a name for it.
    on_program: called after each program.

  Returns:
    A `Plan`.
  """
  lowerings = programs(config, mesh, num_ingredients)
  compiled = []
  for name, lower_fn in lowerings.items():
    compiled.append(compile_program(name, lower_fn, mesh))
    if on_program is not None:
      on_program(compiled[-1])
  leaves = jax.tree.leaves(abstract_params(config, mesh))
  num_hosts = len({d.process_index for d in mesh.devices.flat})
  return Plan(
      machine=machine,
      num_devices=mesh.size,
      num_hosts=num_hosts,
      device_bytes=device_bytes,
      num_ingredients=num_ingredients,
      num_parameters=sum(math.prod(x.shape) for x in leaves),
      model_bytes=sum(map(_total_bytes, leaves)),
      programs=tuple(compiled),
      recipes=recipes(
          config, mesh, device_bytes, num_ingredients, tuple(compiled)
      ),
  )


def abstract_params(config, mesh) -> Any:
  """Shapes and shardings of one ingredient."""
  init_fn = finetune.make_model(config).init_fn
  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(lambda: init_fn(jax.random.key(0)))
  return sharding.fsdp(shapes, mesh)


def programs(
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    num_ingredients: int,
) -> dict[str, Callable[[], Any]]:
  """The programs that the recipes and the training run, ready to be lowered.

  Returns:
    Functions by name that return a `jax.stages.Traced`.
  """
  params = abstract_params(config, mesh)
  flat = _tree.flatten(params)
  logits_fn = finetune.make_model(config).logits_fn
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
    return cook.loss_fn_of(logits_fn)(flat.replace(floats), batch, scale)

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
  batch = lambda size, **more: _batch(config, mesh, size, **more)
  learning = batch(config.learned.batch_size)
  gradient = jax.jit(
      lambda alpha, stacked, cotangent: jax.vjp(
          lambda a: _mixing.mix_leaves([a] * len(stacked), stacked), alpha
      )[1](cotangent)
  )
  correct = evaluation.sum_and_count_of(
      lambda params, batch: metrics.correct(
          logits_fn(params, batch['image']), batch['label']
      )
  )
  calls = {
      'add to a sum': (_mixing.add, wide, flat.leaves, each),
      'mix': (_mixing.mix_leaves, [alpha] * len(stacked), stacked),
      'gradient in alpha': (gradient, alpha, stacked, flat.leaves),
      'evaluation step': (correct, params, batch(config.batch_size, mask=bool)),
      'learned step, resident': (resident.step, (w, scalar), stacked, learning),
      'learned step, streamed': (streamed.step, flat.leaves, scalar, learning),
      'inner products, streamed': (streamed.inner, flat.leaves, flat.leaves),
      'fine-tuning step': _fine_tuning(config, mesh, params),
  }

  def traced_fn(fn, *arguments):
    return lambda: fn.trace(*arguments)

  return {name: traced_fn(*call) for name, call in calls.items()}


def _stacked(x, num_ingredients):
  spec = PartitionSpec(None, *x.sharding.spec)
  return jax.ShapeDtypeStruct(
      (num_ingredients, *x.shape),
      x.dtype,
      sharding=NamedSharding(x.sharding.mesh, spec),
  )


def _batch(config, mesh, size, **more):
  """Shapes of a batch, of a size that the mesh divides."""
  size = -(-size // mesh.size) * mesh.size
  split = NamedSharding(mesh, PartitionSpec('fsdp'))
  shape = lambda *x: jax.ShapeDtypeStruct(x[1:], x[0], sharding=split)
  return {
      'image': shape(jnp.float32, size, *config.model.image_shape),
      'label': shape(jnp.int32, size),
      **{name: shape(dtype, size) for name, dtype in more.items()},
  }


def _fine_tuning(config, mesh, params):
  """One step of all runs of a group, as `finetune.finetune` runs it."""
  num_runs = config.sweep.group_size
  settings = finetune.settings_of(config, config.finetune)
  logits_fn = finetune.make_model(config).logits_fn
  replicated = NamedSharding(mesh, PartitionSpec())
  placed = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  params = jax.tree.map(lambda x: _stacked(x, num_runs), params)
  moments = jax.eval_shape(jax.vmap(optax.scale_by_adam().init), params)
  moments = moments._replace(
      count=placed(moments.count, replicated),
      mu=jax.tree.map(lambda x, p: placed(x, p.sharding), moments.mu, params),
      nu=jax.tree.map(lambda x, p: placed(x, p.sharding), moments.nu, params),
  )
  row = lambda dtype: jax.ShapeDtypeStruct(
      (num_runs,), dtype, sharding=replicated
  )
  hyper = {
      name: row(jnp.uint32 if name == 'seed' else jnp.float32)
      for name in finetune.DEFAULTS
  }

  def step_fn(params, moments, hyper, batch, epoch):
    def run_fn(params, moments, hyper):
      key = jax.random.key(hyper['seed'])
      return finetune.train_step(
          logits_fn, settings, (params, moments), hyper, batch, key, epoch
      )

    return jax.vmap(run_fn)(params, moments, hyper)

  return (
      jax.jit(step_fn, donate_argnums=(0, 1)),
      params,
      moments,
      hyper,
      _batch(config, mesh, config.finetune.batch_size),
      jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated),
  )


def compile_program(
    name: str, trace_fn: Callable[[], Any], mesh: jax.sharding.Mesh
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
    return Program(name, flops=flops, seconds=seconds, problem=problem)
  memory = compiled.memory_analysis()
  return Program(
      name=name,
      arguments=memory.argument_size_in_bytes,
      temporaries=memory.temp_size_in_bytes,
      output=memory.output_size_in_bytes - memory.alias_size_in_bytes,
      flops=flops,
      collectives=hlo.collectives_of(compiled.as_text()),
      seconds=time.monotonic() - start,
  )


def recipes(
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    device_bytes: int,
    num_ingredients: int,
    compiled: tuple[Program, ...],
) -> tuple[Recipe, ...]:
  """Adds up what each recipe reads, holds and evaluates.

  Bytes on a device are sums of what a recipe keeps, and what its largest
  program needs beside its arguments; bytes on a host are those of the copies
  that it keeps and of the model that it reads.
  """
  leaves = jax.tree.leaves(abstract_params(config, mesh))
  num_hosts = len({d.process_index for d in mesh.devices.flat})
  model = sum(map(_total_bytes, leaves))
  one = sum(map(_shard_bytes, leaves))  # On one device.
  total = sum(4 * _shard_bytes(x) // min(4, x.dtype.itemsize) for x in leaves)
  by_name = {p.name: p for p in compiled}
  beside = lambda name: (by_name[name].temporaries + by_name[name].output)
  k = num_ingredients
  step = by_name['learned step, resident']
  held_out = config.data.sizes.held_out
  num_val = int(held_out * config.learned.val_fraction)
  epochs = config.learned.num_epochs
  steps = epochs * ((held_out - num_val) // config.learned.batch_size)
  # Forward and backward, with the ingredient that was read last.
  forward = (
      one
      + by_name['learned step, streamed'].arguments
      + beside('learned step, streamed')
  )
  # Two mixes a step, one a walk through the second split, one at the end.
  walks = 2 * steps + epochs + 2
  evaluated = 3 * one + total + beside('evaluation step')
  reading, read = _boxes(leaves)
  logits = 4 * k * held_out * config.model.num_classes
  is_alone = num_hosts == 1
  copies = -(-k * sum(_narrow_bytes(x) for x in leaves) // num_hosts)
  rows = [
      ('uniform', one, reading, k, 0, 0),
      ('greedy', evaluated, reading, 2 * k, 2 * k - 1, 0),
      ('pruned, one pass', evaluated, reading, 3 * k, 2 * k + 1, 0),
      (
          'learned, resident',
          step.peak or (k + 3) * one,
          reading,
          k,
          epochs + 1,
          steps,
      ),
      (
          'learned, streamed',
          max(total + 2 * one, forward, 3 * one),
          reading,
          walks * (k - 1) + 1,
          epochs + 1,
          steps,
      ),
      (
          'learned, cached',
          max(total + 2 * one, forward, 3 * one),
          copies + reading,
          2 * k,
          epochs + 1,
          steps,
      ),
      ('Model Stock', 2 * total + 4 * one, reading, k + 3, 0, 0),
      ('ensembles', 2 * one + beside('evaluation step'), reading + logits, k, k,
       0),
  ]  # fmt: skip
  failed = {
      'learned, resident': step.problem,
      'learned, streamed': by_name['learned step, streamed'].problem,
      'learned, cached': by_name['learned step, streamed'].problem,
      **dict.fromkeys(
          ('greedy', 'pruned, one pass', 'ensembles'),
          by_name['evaluation step'].problem,
      ),
  }
  made = []
  for name, device, host, reads, evaluations, num_steps in rows:
    fits = device <= device_bytes and not failed.get(name)
    note = ''
    if not fits and name == 'learned, resident':
      note = 'does not fit: stream=True'
    elif not fits:
      note = 'does not fit: more devices, or smaller batches'
    elif name == 'learned, resident':
      needed, is_chosen = _streamed.fits(k, one, device_bytes)
      if not is_chosen:
        note = 'fits, but stream=None streams: it leaves a third free'
    elif name == 'learned, cached' and not is_alone:
      fits, note = False, 'copies are of one process: stream without cache'
    writes = 0 if name == 'ensembles' else model
    made.append(
        Recipe(
            name,
            device,
            host,
            reads * read,
            writes,
            evaluations,
            num_steps,
            fits,
            note,
        )
    )
  return tuple(made)


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


def _narrow_bytes(x) -> int:
  return math.prod(x.shape) * min(2, x.dtype.itemsize)


def as_text(plan: Plan) -> str:
  """The plan as two tables."""
  rows = [
      ['program', 'arguments', 'temporaries', 'output', 'TFLOP', 'compiled',
       'collectives'],
  ]  # fmt: skip
  for p in plan.programs:
    numbers = [p.arguments, p.temporaries, p.output]
    found = ', '.join(
        f'{t.times} {name} {gigabytes(t.num_bytes)}'
        for name, t in p.collectives.items()
    )
    rows.append(
        [
            p.name,
            *('-' if p.problem else gigabytes(n) for n in numbers),
            f'{p.flops / 1e12:.3g}',
            f'{p.seconds:.1f} s',
            f'does not fit: {p.problem}' if p.problem else found or 'none',
        ]
    )
  recipe_rows = [
      ['recipe', 'device', 'host', 'reads', 'writes', 'evaluations', 'steps',
       ''],
  ]  # fmt: skip
  for r in plan.recipes:
    recipe_rows.append(
        [
            r.name,
            *map(gigabytes, (r.device, r.host, r.reads, r.writes)),
            str(r.evaluations),
            str(r.steps),
            r.note or 'fits',
        ]
    )
  return '\n'.join(
      [
          f'{plan.machine}: {plan.num_devices} devices of '
          f'{gigabytes(plan.device_bytes)} each, {plan.num_hosts} '
          f'host{"s" if plan.num_hosts > 1 else ""}. '
          f'{plan.num_ingredients} ingredients of '
          f'{plan.num_parameters / 1e9:.3g} G parameters, '
          f'{gigabytes(plan.model_bytes)} each.',
          '',
          'Each program, on one device:',
          _table(rows),
          '',
          'Each recipe: peaks on one device and one host, the rest in all:',
          _table(recipe_rows),
      ]
  )


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


def gigabytes(num_bytes: float) -> str:
  """Bytes in a unit that a reader can take in."""
  for unit, size in [('TB', 1e12), ('GB', 1e9), ('MB', 1e6), ('kB', 1e3)]:
    if num_bytes >= size:
      return f'{num_bytes / size:.3g} {unit}'
  return f'{num_bytes:.0f} B'


def _table(rows: list[list[str]]) -> str:
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = []
  for first, *numbers, last in rows:
    cells = [first.ljust(widths[0])]
    cells += [x.rjust(n) for x, n in zip(numbers, widths[1:-1])]
    lines.append('  '.join([*cells, last]).rstrip())
  return '\n'.join(lines)
