"""What each recipe reads, holds and evaluates, from its programs.

```
made = recipes.of(experiment, mesh, device_bytes, 58, compiled, rates)
[r.name for r in made if r.fits]
```
"""

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
  host: int
  reads: int
  examples: int
  writes: int
  evaluations: int
  steps: int
  calls: Mapping[str, float]
  compute_seconds: float | None
  read_seconds: float | None
  fits: bool
  note: str = ''


class _Counts(NamedTuple):
  reads: int  # Models.
  evaluations: int
  steps: int
  calls: Mapping[str, float]


def of(
    experiment: configs.Experiment,
    mesh: jax.sharding.Mesh,
    device_bytes: int,
    num_ingredients: int,
    compiled: Sequence[programs.Program],
    rates: machines.Rates,
) -> tuple[Recipe, ...]:
  """Adds up what the fine-tuning and each recipe reads, holds and evaluates.

  Args:
    experiment: as in `plan.make`.
    mesh: of `programs.used`.
    device_bytes: memory of one device.
    num_ingredients: K.
    compiled: those of `programs.of`.
    rates: what predicts seconds.

  Returns:
    One `Recipe` each, the first for the fine-tuning; those that search are
    counted as if they took all.
  """
  by_name = {p.name: p for p in compiled}
  config, model = experiment.config, architectures.of(experiment)
  leaves = jax.tree.leaves(programs.abstract_params(model, mesh))
  host_reads, all_read = read_bytes(leaves)
  model_bytes = sum(map(total_bytes, leaves))
  one, total = _sizes(by_name['add to a sum'], leaves)
  num_logits = config.data.sizes.held_out * model.num_classes
  device = _on_device(
      by_name,
      num_ingredients,
      one,
      total,
      _waiting_bytes(config, model, mesh, device_bytes),
      4 * num_logits,
  )
  example_bytes = _example_bytes(model, programs.evaluated(config, mesh))
  num_seen = functools.partial(_num_read, config, mesh, example_bytes)
  host = {
      'learned, cached': num_ingredients * _copy_bytes(leaves),
      # And the logits of the model that is run, in parts and as a whole.
      'ensembles': (num_ingredients + 2) * num_logits * 4,
  }
  made = [_fine_tuning(experiment, model, mesh, by_name, model_bytes, rates)]
  for name, counts in _counts(config, mesh, num_ingredients).items():
    examples = example_bytes * num_seen(counts.calls, device_bytes)
    made.append(
        Recipe(
            name=name,
            device=device[name],
            host=host_reads + host.get(name, 0),
            reads=counts.reads * all_read,
            examples=examples,
            writes=0 if name == 'ensembles' else model_bytes,
            evaluations=counts.evaluations,
            steps=counts.steps,
            calls=counts.calls,
            compute_seconds=_compute_seconds(counts.calls, by_name, rates),
            read_seconds=rates.read_seconds(
                counts.reads * host_reads + examples
            ),
            fits=True,
        )
    )
  made = [
      recipe._replace(
          fits=recipe.device <= device_bytes
          and not any(by_name[name].problem for name in recipe.calls)
      )
      for recipe in made
  ]
  return _with_notes(made, mesh, device_bytes, num_ingredients, one)


def _compute_seconds(calls, by_name, rates) -> float | None:
  times = [(n, by_name[name]) for name, n in calls.items()]
  return rates.compute_seconds(
      sum(n * p.flops for n, p in times),
      sum(n * p.wide_flops for n, p in times),
  )


def _fine_tuning(experiment, model, mesh, by_name, model_bytes, rates):
  """All runs of the sweep; examples are read as the model takes them."""
  config, step = experiment.config, by_name['fine-tuning step']
  swept = programs.sweep(experiment)
  num_hosts = programs.num_hosts(mesh)
  batch = programs.batch_of(
      model, programs.fine_tuned(config, mesh, config.finetune.batch_size)
  ).values()
  # Of three batches in flight one is an argument; three more are read ahead.
  # What is not sharded has all of its data on the device, if in memory.
  waiting = 2 * sum(map(programs.shard_bytes, batch))
  batch_bytes = sum(map(total_bytes, batch))
  example_bytes = batch_bytes // config.finetune.batch_size
  data_bytes = config.data.sizes.train * example_bytes
  is_sharded = config.get('is_sharded', False)
  reads = swept.examples * example_bytes // num_hosts
  names = loop.names_of(config.finetune)
  wanted = config.get('ingredients', names) or names
  copies = len(experiment.runs) * len({*names} & {*wanted})
  return Recipe(
      name='fine-tuning',
      device=step.peak + (waiting if is_sharded else data_bytes),
      host=3 * batch_bytes // num_hosts,
      reads=0,
      examples=reads,
      writes=copies * model_bytes,
      evaluations=copies,
      steps=swept.steps,
      calls={step.name: swept.times},
      compute_seconds=_compute_seconds(
          {step.name: swept.times}, by_name, rates
      ),
      read_seconds=rates.read_seconds(reads),
      fits=True,
  )


def _sizes(add: programs.Program, leaves) -> tuple[int, int]:
  """Bytes of a model and of a sum of them, as the compiler pads their tiles."""
  wide = lambda x: _tree.wide_dtype(x.dtype).itemsize / x.dtype.itemsize
  share = sum(map(programs.shard_bytes, leaves))
  wider = sum(programs.shard_bytes(x) * wide(x) for x in leaves)
  one = int(add.arguments * share / (share + wider))
  return one, add.arguments - one


def _waiting_bytes(config, model, mesh, device_bytes) -> int:
  """Bytes on a device of batches that an evaluation does not use now."""
  batches = programs.evaluated(config, mesh)
  batch = programs.batch_of(model, batches, mask=bool).values()
  batch_bytes = sum(map(programs.shard_bytes, batch))
  if _are_kept(config, _example_bytes(model, batches), device_bytes):
    # In the order given, and once more the hardest first.
    return 2 * len(batches) * batch_bytes
  return 2 * batch_bytes  # In flight.


def _example_bytes(model, batches) -> int:
  """Bytes of an example, as the model takes it."""
  batch = programs.batch_of(model, batches).values()
  return sum(map(total_bytes, batch)) // batches.size


def _are_kept(config, example_bytes, device_bytes) -> bool:
  all_bytes = config.data.sizes.held_out * example_bytes
  return cook.are_kept(all_bytes, device_bytes)


def _num_read(config, mesh, example_bytes, calls, device_bytes) -> int:
  """Examples that each host reads for these calls of programs."""
  batches = programs.evaluated(config, mesh)
  num_evaluated = calls.get('evaluation step', 0)
  if _are_kept(config, example_bytes, device_bytes):
    num_evaluated = min(num_evaluated, len(batches))
  num = num_evaluated * batches.size
  if 'learned' in config:
    learning, stopping = programs.learned(config, mesh)
    num_steps = sum(n for name, n in calls.items() if name in _LEARNED)
    num += num_steps * learning.size
    num += calls.get('early stopping', 0) * stopping.size
  return num


_LEARNED = ('learned step, resident', 'learned step, streamed')


def _copy_bytes(leaves) -> int:
  """Bytes of a model in bfloat16, of what one host has of it, at most."""
  by_host: dict[int, int] = {}
  for x in leaves:
    parts = {
        (device.process_index, str(index))
        for device, index in x.sharding.devices_indices_map(x.shape).items()
    }
    size = math.prod(x.sharding.shard_shape(x.shape)) * min(2, x.dtype.itemsize)
    for host, _ in parts:
      by_host[host] = by_host.get(host, 0) + size
  return max(by_host.values())


def _on_device(
    by_name: Mapping[str, programs.Program],
    num_ingredients: int,
    one: int,
    total: int,
    waiting: int,
    logits: int,
) -> dict[str, int]:
  """Bytes by recipe: what it keeps, and its largest program.

  `one` is the model that a recipe works on, `ahead` the one read ahead.
  """
  ahead = one
  evaluated = by_name['evaluation step'].peak + waiting
  device = {
      'uniform': one,  # Checkpoints are summed on the hosts.
      'greedy': evaluated + total + one + ahead,
      'pruned, one pass': evaluated + total + one + ahead,
      # The sums of theta_k and of unit vectors, theta_0, and the soup.
      'Model Stock': 2 * total + 3 * one + ahead,
      # Or greedy on them: their sum, a candidate, a model and the one ahead.
      'ensembles': max(evaluated + ahead, 4 * logits),
  }
  if 'learned step, resident' not in by_name:
    return device
  inner = by_name['inner products, streamed'].peak
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
      'learned, streamed': max(forward, mixing, inner) + ahead,
      # Nothing is read ahead; a copy is widened on the device.
      'learned, cached': max(forward, mixing + one, inner + one),
  }


def _counts(config, mesh, num_ingredients) -> dict[str, _Counts]:
  """By recipe, at most: what it reads and calls."""
  k = num_ingredients
  add, mix = 'add to a sum', 'mix'
  walks = lambda n: {
      'evaluation step': n * len(programs.evaluated(config, mesh))
  }
  learned = {}
  if 'learned' in config:
    batches, val_batches = programs.learned(config, mesh)
    epochs = config.learned.num_epochs
    steps = epochs * len(batches)
    # One at the start, one an epoch; each mixes once, and so does the end.
    stopping = {'early stopping': (epochs + 1) * len(val_batches)}
    resident, streamed = _LEARNED
    # Two walks through the ingredients a step, for the mix and its gradient.
    mixes, products = steps + epochs + 2, steps
    walked = {
        streamed: steps,
        'inner products, streamed': products * k,
        add: mixes * k,
        **stopping,
    }
    learned = {
        'learned, resident': _Counts(
            k, epochs + 1, steps, {resident: steps, mix: epochs + 2, **stopping}
        ),
        # Each walk begins with the ingredient that is there.
        'learned, streamed': _Counts(
            (mixes + products) * (k - 1) + 1, epochs + 1, steps, walked
        ),
        'learned, cached': _Counts(2 * k, epochs + 1, steps, walked),
    }
  return {
      'uniform': _Counts(k, 0, 0, {}),
      'greedy': _Counts(2 * k, 2 * k - 1, 0, {add: k, **walks(2 * k - 1)}),
      'pruned, one pass': _Counts(
          3 * k + 1, 2 * k + 1, 0, {add: 2 * k, **walks(2 * k + 1)}
      ),
      **learned,
      'Model Stock': _Counts(k + 2, 0, 0, {}),
      # The logits of a batch are the work of an evaluation step.
      'ensembles': _Counts(k, k, 0, walks(k)),
  }


def _with_notes(made, mesh, device_bytes, num_ingredients, one):
  """Adds to each recipe why it does not fit, and what would."""
  fits = {r.name: r.fits for r in made}
  # What `jaxsoup.learned` chooses: it does not count activations.
  _, is_kept = _streamed.fits(num_ingredients, one, device_bytes)

  def noted(recipe):
    is_resident = recipe.name == 'learned, resident'
    note = ''
    if not recipe.fits:
      needed = (
          f'{_memory.amount(recipe.device)} of {_memory.amount(device_bytes)}'
      )
      note = f'does not fit: needs {needed}; '
      if is_resident and fits['learned, streamed']:
        note += 'streamed fits: ' + (
            "pass memory='streamed'" if is_kept else "memory='auto' does that"
        )
      else:
        note += _what_would_fit(recipe.device, mesh)
    elif is_resident and not is_kept:
      note = (
          "fits with memory='resident'; memory='auto' streams, as K + 3 models "
          'take over two thirds of the memory'
      )
    return recipe._replace(note=note)

  return tuple(map(noted, made))


def _what_would_fit(num_bytes: int, mesh: jax.sharding.Mesh) -> str:
  if mesh.devices.flat[0].platform == 'cpu':
    return 'try more memory, or smaller batches'
  kinds = [
      k for k, c in machines.TPUS.items() if c.hbm_gib * 2**30 >= num_bytes
  ]
  others = f'{mesh.size} of {" or ".join(kinds)}, ' if kinds else ''
  return f'try {others}more devices, or smaller batches'


def read_bytes(leaves: Sequence[jax.ShapeDtypeStruct]) -> tuple[int, int]:
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


def total_bytes(x: jax.ShapeDtypeStruct) -> int:
  """Bytes of an array on all devices together."""
  return math.prod(x.shape) * x.dtype.itemsize
