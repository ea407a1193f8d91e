"""Compiles the programs of an experiment, and adds up what recipes need."""

from collections.abc import Callable
from collections.abc import Mapping
import math
from typing import NamedTuple

import jax

from jaxsoup.experiments import architectures
from jaxsoup.experiments import configs
from jaxsoup.plan import machines
from jaxsoup.plan import programs
from jaxsoup.plan import recipes
from jaxsoup.typing import Json


class Plan(NamedTuple):
  """A plan: the machine, its programs and the recipes on it.

  Attributes:
    machine: its name.
    num_devices: of all hosts.
    num_used: 1 if the experiment is not sharded, else all.
    num_hosts: one process runs on each.
    device_bytes: memory of one device.
    num_ingredients: K.
    num_parameters: of one ingredient.
    model_bytes: of one ingredient.
    read_bytes: what all hosts together read of one ingredient.
    batch_sizes: by program, as they are run.
    num_runs: of the sweep.
    sweep_flops: of all steps of all runs, on all devices together.
    rates: what predicts the seconds.
    programs: what the compiler says about each.
    recipes: what each needs, and the fine-tuning.
  """

  machine: str
  num_devices: int
  num_used: int
  num_hosts: int
  device_bytes: int
  num_ingredients: int
  num_parameters: int
  model_bytes: int
  read_bytes: int
  batch_sizes: Mapping[str, int]
  num_runs: int
  sweep_flops: float
  rates: machines.Rates
  programs: tuple[programs.Program, ...]
  recipes: tuple[recipes.Recipe, ...]


def make(
    experiment: configs.Experiment,
    mesh: jax.sharding.Mesh,
    device_bytes: int,
    *,
    num_ingredients: int,
    machine: str,
    rates: machines.Rates,
    on_program: Callable[[programs.Program], None] | None = None,
) -> Plan:
  """Compiles the programs of an experiment, and adds up what the recipes need.

  Args:
    experiment: of `configs.load`; its data are not read.
    mesh: with the axis `fsdp`, over which models and batches are sharded; only
      its first device is used if `config.is_sharded` is not set.
    device_bytes: memory of one device.
    num_ingredients: K.
    machine: a name for it.
    rates: what predicts seconds.
    on_program: called after each program.

  Returns:
    A `Plan`.

  Raises:
    UsageError: the config lacks a field; the message names it.
    ValueError: the run would not start: a batch of the fine-tuning that the
      devices do not divide, or held-out examples that are too few to learn.
  """
  config = experiment.config
  known = configs.flat(config)
  if missing := [
      name
      for name in _FIELDS
      if name not in known
      and ('learned' in config or not name.startswith('learned.'))
  ]:
    raise configs.UsageError(
        f'The config lacks {", ".join(missing)}: see configs/digits.py.'
    )
  model = architectures.of(experiment)
  num_devices, mesh = mesh.size, programs.used(config, mesh)
  lowerings = programs.of(experiment, mesh, num_ingredients)
  compiled = []
  for name, lower_fn in lowerings.items():
    compiled.append(programs.compile_program(name, lower_fn, mesh))
    if on_program is not None:
      on_program(compiled[-1])
  leaves = jax.tree.leaves(programs.abstract_params(model, mesh))
  step = next(p for p in compiled if p.name == 'fine-tuning step')
  return Plan(
      machine=machine,
      num_devices=num_devices,
      num_used=mesh.size,
      num_hosts=programs.num_hosts(mesh),
      device_bytes=device_bytes,
      num_ingredients=num_ingredients,
      num_parameters=sum(math.prod(x.shape) for x in leaves),
      model_bytes=sum(map(recipes.total_bytes, leaves)),
      read_bytes=recipes.bytes_of_hosts(leaves)[2],
      batch_sizes={
          name: x.size for name, x in programs.batches(config, mesh).items()
      },
      num_runs=len(experiment.runs),
      sweep_flops=step.flops * mesh.size * programs.sweep(experiment).times,
      rates=rates,
      programs=tuple(compiled),
      recipes=recipes.of(
          experiment, mesh, device_bytes, num_ingredients, compiled, rates
      ),
  )


# Fields that a plan reads, besides those of the model and the sweep.
_FIELDS = (
    'batch_size',
    'data.sizes.held_out',
    'data.sizes.train',
    'finetune.batch_size',
    'finetune.final',
    'finetune.num_epochs',
    'finetune.warmup',
    'sweep.group_size',
    'learned.batch_size',
    'learned.num_epochs',
    'learned.val_fraction',
)


def as_json(plan: Plan) -> Json:
  """The plan as nested dicts, bytes and FLOPs as numbers."""

  def nested(x):
    if hasattr(x, '_asdict'):
      x = x._asdict()
    if isinstance(x, Mapping):
      return {name: nested(value) for name, value in x.items()}
    return list(map(nested, x)) if isinstance(x, tuple) else x

  return nested(plan)
