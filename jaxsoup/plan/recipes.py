"""What each recipe reads, holds and evaluates, from its programs.

```
made = plan.make(experiment, mesh, device_bytes, ...)
[r.name for r in made.recipes if r.fits]
```
"""

import collections
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import math
from typing import Any
from typing import NamedTuple

import jax

from jaxsoup import _memory
from jaxsoup import _tree
from jaxsoup._recipes import _streamed
from jaxsoup.experiments import architectures
from jaxsoup.experiments import configs
from jaxsoup.experiments import cook
from jaxsoup.plan import machines
from jaxsoup.plan import programs
from jaxsoup.train import loop


class Recipe(NamedTuple):
  """What a recipe needs; all bytes, those of a device at its peak.

  Attributes:
    name: of the recipe, and how it reads.
    device: bytes on one device.
    host: bytes in the memory of one host.
    reads: bytes of models, read by all hosts together.
    examples: bytes of examples, read by each host, as the model takes them; an
      evaluation and a learned soup read all of them on each.
    writes: bytes of the soup.
    evaluations: walks through the held-out set, at most.
    steps: of gradient descent, at most.
    calls: of each program, at most.
    compute_seconds: predicted, for the products of these calls; None unless the
      peak of a device is known.
    read_seconds: predicted; None unless a rate is known.
    fits: whether `device` fits.
    note: if not, why, and what would.
  """

  name: str
  device: int
  host: int = 0
  reads: int = 0
  examples: int = 0
  writes: int = 0
  evaluations: int = 0
  steps: int = 0
  calls: Mapping[str, float] = {}
  compute_seconds: float | None = None
  read_seconds: float | None = None
  fits: bool = True
  note: str = ''


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
  recipes: tuple[Recipe, ...]


def make(
    experiment: configs.Experiment,
    mesh: jax.sharding.Mesh,
    device_bytes: int,
    *,
    num_ingredients: int,
    machine: str,
    rates: machines.Rates,
    on_program: Callable[[programs.Program], None] = lambda program: None,
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
  num_devices, mesh = mesh.size, programs.used(config, mesh)
  compiled = []
  for name, fn in programs.of(experiment, mesh, num_ingredients).items():
    compiled.append(programs.compile_program(name, fn, mesh))
    on_program(compiled[-1])
  made = of(experiment, mesh, device_bytes, num_ingredients, compiled, rates)
  return made._replace(machine=machine, num_devices=num_devices)


def of(
    experiment: configs.Experiment,
    mesh: jax.sharding.Mesh,
    device_bytes: int,
    num_ingredients: int,
    compiled: Sequence[programs.Program],
    rates: machines.Rates,
) -> Plan:
  """Adds up what the fine-tuning and each recipe reads, holds and evaluates.

  Args as in `make`; the mesh is that of `programs.used`, and the programs those
  of `programs.of`. Searches are counted as if they took all.
  """
  by_name = {p.name: p for p in compiled}
  config, model = experiment.config, architectures.of(experiment)
  num_hosts = programs.num_hosts(mesh)
  leaves = jax.tree.leaves(programs.abstract_params(model, mesh))
  narrow_bytes, host_reads, all_read = bytes_of_hosts(leaves)
  model_bytes = sum(map(_tree.num_bytes, leaves))
  batches = programs.batches(config, mesh)
  evaluated = batches['evaluation']
  batch = programs.batch_of(model, evaluated).values()
  example_bytes = sum(map(_tree.num_bytes, batch)) // evaluated.size
  held_out = config.data.sizes.held_out
  is_kept = cook.are_kept(held_out * example_bytes, device_bytes)
  masked = programs.batch_of(model, evaluated, mask=bool).values()
  # Batches on a device that an evaluation does not use now: in flight, or all
  # in the order given, and once more the hardest first.
  num_waiting = 2 * (len(evaluated) if is_kept else 1)
  one, total = _sizes(by_name['add to a sum'], leaves)
  rows = _rows(
      config,
      num_ingredients,
      by_name,
      batches,
      one=one,
      total=total,
      waiting=num_waiting * sum(map(programs.shard_bytes, masked)),
      logits=4 * held_out * model.num_classes,
      narrow=narrow_bytes,
  )

  def examples(call):
    name, num = call
    if name == 'evaluation step' and is_kept:
      # On the devices; each host reads it as a whole.
      return min(num, len(evaluated)) * evaluated.size
    read = batches.get(_READ_BY.get(name, ''))
    return 0 if read is None else num * read.size // num_hosts

  swept, step = programs.sweep(experiment), by_name['fine-tuning step']
  made = [
      _fine_tuning(experiment, mesh, step, swept, model_bytes, example_bytes)
  ]
  made += [
      row._replace(
          host=host_reads + row.host,
          reads=row.reads * all_read,
          examples=example_bytes * sum(map(examples, row.calls.items())),
          writes=0 if row.name == 'ensembles' else model_bytes,
      )
      for row in rows
  ]
  by_host = lambda r: r.reads // all_read * host_reads + r.examples
  made = [_finished(r, by_name, rates, by_host(r), device_bytes) for r in made]
  streams = any(r.name == 'learned, streamed' and r.fits for r in made)
  # What `jaxsoup.learned` chooses: it does not count activations.
  _, is_stacked = _streamed.fits(num_ingredients, one, device_bytes)
  note = functools.partial(_note, mesh, device_bytes, streams, is_stacked)
  return Plan(
      machine='',
      num_devices=mesh.size,
      num_used=mesh.size,
      num_hosts=num_hosts,
      device_bytes=device_bytes,
      num_ingredients=num_ingredients,
      num_parameters=sum(x.size for x in leaves),
      model_bytes=model_bytes,
      read_bytes=all_read,
      batch_sizes={name: x.size for name, x in batches.items()},
      num_runs=len(experiment.runs),
      sweep_flops=step.flops * mesh.size * swept.times,
      rates=rates,
      programs=tuple(compiled),
      recipes=tuple(r._replace(note=note(r)) for r in made),
  )


def _sizes(add: programs.Program, leaves) -> tuple[int, int]:
  """Bytes of a model and of a sum of them on a device, with padded tiles."""
  share = sum(map(programs.shard_bytes, leaves))
  wide = lambda x: _tree.wide_dtype(x.dtype).itemsize / x.dtype.itemsize
  wider = sum(programs.shard_bytes(x) * wide(x) for x in leaves)
  one = int(add.arguments * share / (share + wider))
  return one, add.arguments - one


def _finished(recipe, by_name, rates, read_bytes, device_bytes) -> Recipe:
  """A recipe with its seconds, and whether it fits."""
  times = [(num, by_name[name]) for name, num in recipe.calls.items()]
  return recipe._replace(
      compute_seconds=rates.compute_seconds(
          sum(num * p.flops for num, p in times),
          sum(num * p.wide_flops for num, p in times),
      ),
      read_seconds=rates.read_seconds(read_bytes),
      fits=recipe.device <= device_bytes
      and not any(p.problem for _, p in times),
  )


def _fine_tuning(
    experiment, mesh, step, swept, model_bytes, example_bytes
) -> Recipe:
  """All runs of the sweep; examples are read as the model takes them."""
  config, num_hosts = experiment.config, programs.num_hosts(mesh)
  batch_bytes = config.finetune.batch_size * example_bytes
  # Of three batches in flight one is an argument; three more are read ahead.
  # What is not sharded has all of its data on the device, if in memory.
  waiting = 2 * batch_bytes // mesh.size
  data_bytes = config.data.sizes.train * example_bytes
  names = loop.names_of(config.finetune)
  wanted = config.get('ingredients', names) or names
  copies = len(experiment.runs) * len({*names} & {*wanted})
  return Recipe(
      'fine-tuning',
      step.peak + (waiting if config.get('is_sharded', False) else data_bytes),
      host=3 * batch_bytes // num_hosts,
      examples=swept.examples * example_bytes // num_hosts,
      writes=copies * model_bytes,
      evaluations=copies,
      steps=swept.steps,
      calls={step.name: swept.times},
  )


# The batches of examples that a program takes.
_READ_BY = {
    'evaluation step': 'evaluation',
    'learned step, resident': 'learned',
    'learned step, streamed': 'learned',
    'early stopping': 'early stopping',
}


def _rows(
    config, k, by_name, batches, *, one, total, waiting, logits, narrow
) -> Iterator[Recipe]:
  """Each recipe with what only it needs; `reads` counts models.

  On a device are what it keeps and its largest program: `one` is a model there,
  worked on or read ahead, `total` a sum of models, `waiting` are batches for
  later. On a host are `logits` of a model, or all of it in bfloat16, `narrow`.
  """
  add, mix, ahead = 'add to a sum', 'mix', one
  peak = lambda name: by_name[name].peak
  evaluated = peak('evaluation step') + waiting
  search = evaluated + total + one + ahead
  walks = lambda n: {'evaluation step': n * len(batches['evaluation'])}

  def searched(name, reads, num, adds):
    calls = {add: adds, **walks(num)}
    return Recipe(name, search, reads=reads, evaluations=num, calls=calls)

  # Checkpoints are summed on the hosts.
  yield Recipe('uniform', one, reads=k)
  yield searched('greedy', 2 * k, 2 * k - 1, k)
  yield searched('pruned, one pass', 3 * k + 1, 2 * k + 1, 2 * k)
  if 'learned' in batches:
    epochs = config.learned.num_epochs
    steps = epochs * len(batches['learned'])
    # One at the start, one an epoch; each mixes once, and so does the end.
    stopping = {'early stopping': (epochs + 1) * len(batches['early stopping'])}
    resident, streamed = 'learned step, resident', 'learned step, streamed'
    inner = 'inner products, streamed'
    # Two walks through the ingredients a step, for the mix and its gradient.
    mixes, products = steps + epochs + 2, steps
    walked = {
        streamed: steps, inner: products * k, add: mixes * k, **stopping
    }  # fmt: skip
    # The ingredient that was read last is kept.
    forward, mixing = peak(streamed) + one, total + one
    learned = functools.partial(Recipe, evaluations=epochs + 1, steps=steps)
    yield learned(
        'learned, resident',
        # Or when the last one is put on the stack.
        max(peak(resident), k * one + one + ahead),
        reads=k,
        calls={resident: steps, mix: epochs + 2, **stopping},
    )
    yield learned(
        'learned, streamed',
        max(forward, mixing, peak(inner)) + ahead,
        # Each walk begins with the ingredient that is there.
        reads=(mixes + products) * (k - 1) + 1,
        calls=walked,
    )
    yield learned(
        'learned, cached',
        # Nothing is read ahead; a copy is widened on the device.
        max(forward, mixing + one, peak(inner) + one),
        host=k * narrow,
        reads=2 * k,
        calls=walked,
    )
  # The sums of theta_k and of unit vectors, theta_0, and the soup.
  yield Recipe('Model Stock', 2 * total + 3 * one + ahead, reads=k + 2)
  yield Recipe(
      'ensembles',
      # Or greedy on them: their sum, a candidate, a model and the one ahead.
      max(evaluated + ahead, 4 * logits),
      # And those of the model that is run, in parts and as a whole.
      host=(k + 2) * logits,
      reads=k,
      evaluations=k,
      # The logits of a batch are the work of an evaluation step.
      calls=walks(k),
  )


def _note(mesh, device_bytes, streams, is_stacked, recipe) -> str:
  """Why a recipe does not fit, and what would."""
  is_resident = recipe.name == 'learned, resident'
  if recipe.fits:
    return (
        "fits with memory='resident'; memory='auto' streams, as K + 3 models "
        'take over two thirds of the memory'
        if is_resident and not is_stacked
        else ''
    )
  if is_resident and streams:
    advice = 'streamed fits: ' + (
        "pass memory='streamed'" if is_stacked else "memory='auto' does that"
    )
  elif mesh.devices.flat[0].platform == 'cpu':
    advice = 'try more memory, or smaller batches'
  else:
    kinds = ' or '.join(
        kind
        for kind, chip in machines.TPUS.items()
        if chip.hbm_gib * 2**30 >= recipe.device
    )
    others = f'{mesh.size} of {kinds}, ' if kinds else ''
    advice = f'try {others}more devices, or smaller batches'
  needed = _memory.amount(recipe.device)
  return (
      f'does not fit: needs {needed} of {_memory.amount(device_bytes)}; '
      f'{advice}'
  )


def bytes_of_hosts(
    leaves: Sequence[jax.ShapeDtypeStruct],
) -> tuple[int, int, int]:
  """Bytes of a model: what a host has in bfloat16, and reads; what all read.

  The first two at most. A host reads of a leaf the smallest box with all that
  its devices hold, see `checkpoints`: more than they hold where these are no
  neighbours in the mesh.
  """
  narrow: collections.Counter[int] = collections.Counter()
  boxes: collections.Counter[int] = collections.Counter()
  for x in leaves:
    held: dict[int, set[Any]] = {}
    for device, index in x.sharding.devices_indices_map(x.shape).items():
      part = tuple(i.indices(n)[:2] for i, n in zip(index, x.shape))
      held.setdefault(device.process_index, set()).add(part)
    size = math.prod(x.sharding.shard_shape(x.shape)) * min(2, x.dtype.itemsize)
    for host, parts in held.items():
      edges = (zip(*side) for side in zip(*parts))
      lengths = [max(ends) - min(starts) for starts, ends in edges]
      narrow[host] += len(parts) * size
      boxes[host] += math.prod(lengths) * x.dtype.itemsize
  return max(narrow.values()), max(boxes.values()), sum(boxes.values())


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
