"""What each recipe reads, holds and evaluates, from its programs.

```
made = recipes.of(experiment, mesh, device_bytes, 58, compiled, rates)
[r.name for r in made if r.fits]
```
"""

import collections
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
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
  compute_seconds: float | None = None
  read_seconds: float | None = None
  fits: bool = True
  note: str = ''


class _Row(NamedTuple):
  """What a recipe needs besides what all do, at most."""

  device: int
  reads: int  # Models.
  evaluations: int = 0
  steps: int = 0
  calls: Mapping[str, int] = {}
  host: int = 0


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
  batches = programs.batches(config, mesh)
  evaluated = batches['evaluation']
  batch = programs.batch_of(model, evaluated).values()
  example_bytes = sum(map(total_bytes, batch)) // evaluated.size
  is_kept = cook.are_kept(
      config.data.sizes.held_out * example_bytes, device_bytes
  )
  # Examples in a batch, of programs that read such.
  sizes = {'evaluation step': evaluated.size}
  if 'learned' in batches:
    sizes |= dict.fromkeys(_LEARNED, batches['learned'].size)
    sizes['early stopping'] = batches['early stopping'].size
  most = {'evaluation step': len(evaluated)} if is_kept else {}
  one, total = _sizes(by_name['add to a sum'], leaves)
  masked = programs.batch_of(model, evaluated, mask=bool).values()
  # Batches on a device that an evaluation does not use now: in flight, or all
  # in the order given, and once more the hardest first.
  num_waiting = 2 * (len(evaluated) if is_kept else 1)
  rows = _rows(
      config,
      num_ingredients,
      by_name,
      batches,
      one=one,
      total=total,
      waiting=num_waiting * sum(map(programs.shard_bytes, masked)),
      logits=4 * config.data.sizes.held_out * model.num_classes,
      copy=_copy_bytes(leaves),
  )
  made = [_fine_tuning(experiment, model, mesh, by_name, model_bytes)]
  made += [
      Recipe(
          name=name,
          device=row.device,
          host=host_reads + row.host,
          reads=row.reads * all_read,
          examples=example_bytes
          * sum(
              min(num, most.get(called, num)) * sizes.get(called, 0)
              # What stays on the devices each host reads as a whole.
              // (1 if called in most else programs.num_hosts(mesh))
              for called, num in row.calls.items()
          ),
          writes=0 if name == 'ensembles' else model_bytes,
          evaluations=row.evaluations,
          steps=row.steps,
          calls=row.calls,
      )
      for name, row in rows.items()
  ]

  def finished(recipe):
    times = [(num, by_name[name]) for name, num in recipe.calls.items()]
    return recipe._replace(
        compute_seconds=rates.compute_seconds(
            sum(num * p.flops for num, p in times),
            sum(num * p.wide_flops for num, p in times),
        ),
        read_seconds=rates.read_seconds(
            recipe.reads // all_read * host_reads + recipe.examples
        ),
        fits=recipe.device <= device_bytes
        and not any(p.problem for _, p in times),
    )

  return _with_notes(
      list(map(finished, made)), mesh, device_bytes, num_ingredients, one
  )


def _fine_tuning(experiment, model, mesh, by_name, model_bytes) -> Recipe:
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
  names = loop.names_of(config.finetune)
  wanted = config.get('ingredients', names) or names
  copies = len(experiment.runs) * len({*names} & {*wanted})
  return Recipe(
      name='fine-tuning',
      device=step.peak
      + (waiting if config.get('is_sharded', False) else data_bytes),
      host=3 * batch_bytes // num_hosts,
      reads=0,
      examples=swept.examples * example_bytes // num_hosts,
      writes=copies * model_bytes,
      evaluations=copies,
      steps=swept.steps,
      calls={step.name: swept.times},
  )


def _sizes(add: programs.Program, leaves) -> tuple[int, int]:
  """Bytes of a model and of a sum of them, as the compiler pads their tiles."""
  wide = lambda x: _tree.wide_dtype(x.dtype).itemsize / x.dtype.itemsize
  share = sum(map(programs.shard_bytes, leaves))
  wider = sum(programs.shard_bytes(x) * wide(x) for x in leaves)
  one = int(add.arguments * share / (share + wider))
  return one, add.arguments - one


_LEARNED = ('learned step, resident', 'learned step, streamed')


def _rows(
    config, k, by_name, batches, *, one, total, waiting, logits, copy
) -> dict[str, _Row]:
  """By recipe: on a device what it keeps, and its largest program.

  Args:
    config: of the experiment.
    k: number of ingredients.
    by_name: programs.
    batches: of `programs.batches`.
    one: bytes of a model on a device: that which is worked on, or read ahead.
    total: of a sum of models.
    waiting: of batches for later.
    logits: of one model, on the host.
    copy: of a model in bfloat16, on the host.
  """
  add, mix, ahead = 'add to a sum', 'mix', one
  peak = lambda name: by_name[name].peak
  evaluated = peak('evaluation step') + waiting
  search = evaluated + total + one + ahead
  walks = lambda n: {'evaluation step': n * len(batches['evaluation'])}
  learned = {}
  if 'learned' in batches:
    epochs = config.learned.num_epochs
    steps = epochs * len(batches['learned'])
    # One at the start, one an epoch; each mixes once, and so does the end.
    stopping = {'early stopping': (epochs + 1) * len(batches['early stopping'])}
    resident, streamed = _LEARNED
    inner = 'inner products, streamed'
    # Two walks through the ingredients a step, for the mix and its gradient.
    mixes, products = steps + epochs + 2, steps
    walked = {
        streamed: steps, inner: products * k, add: mixes * k, **stopping
    }  # fmt: skip
    # The ingredient that was read last is kept.
    forward, mixing = peak(streamed) + one, total + one
    counts = (epochs + 1, steps)
    learned = {
        'learned, resident': _Row(
            # Or when the last one is put on the stack.
            max(peak(resident), k * one + one + ahead),
            k,
            *counts,
            {resident: steps, mix: epochs + 2, **stopping},
        ),
        'learned, streamed': _Row(
            max(forward, mixing, peak(inner)) + ahead,
            # Each walk begins with the ingredient that is there.
            (mixes + products) * (k - 1) + 1,
            *counts,
            walked,
        ),
        'learned, cached': _Row(
            # Nothing is read ahead; a copy is widened on the device.
            max(forward, mixing + one, peak(inner) + one),
            2 * k,
            *counts,
            walked,
            host=k * copy,
        ),
    }
  return {
      'uniform': _Row(one, k),  # Checkpoints are summed on the hosts.
      'greedy': _Row(
          search, 2 * k, 2 * k - 1, calls={add: k, **walks(2 * k - 1)}
      ),
      'pruned, one pass': _Row(
          search,
          3 * k + 1,
          2 * k + 1,
          calls={add: 2 * k, **walks(2 * k + 1)},
      ),
      **learned,
      # The sums of theta_k and of unit vectors, theta_0, and the soup.
      'Model Stock': _Row(2 * total + 3 * one + ahead, k + 2),
      'ensembles': _Row(
          # Or greedy on them: their sum, a candidate, a model and the one
          # ahead.
          max(evaluated + ahead, 4 * logits),
          k,
          k,
          # The logits of a batch are the work of an evaluation step.
          calls=walks(k),
          # And those of the model that is run, in parts and as a whole.
          host=(k + 2) * logits,
      ),
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


def _by_host(
    leaves: Sequence[jax.ShapeDtypeStruct],
    size_fn: Callable[[jax.ShapeDtypeStruct, list[Any]], int],
) -> list[int]:
  """Sums, by host, the sizes of what its devices hold of each leaf."""
  sizes: collections.Counter[int] = collections.Counter()
  for x in leaves:
    held: dict[int, list[Any]] = {}
    for device, index in x.sharding.devices_indices_map(x.shape).items():
      held.setdefault(device.process_index, []).append(index)
    for host, indices in held.items():
      sizes[host] += size_fn(x, indices)
  return list(sizes.values())


def _copy_bytes(leaves) -> int:
  """Bytes of a model in bfloat16, of what one host has of it, at most."""

  def size_fn(x, indices):
    size = math.prod(x.sharding.shard_shape(x.shape)) * min(2, x.dtype.itemsize)
    return len(set(map(str, indices))) * size

  return max(_by_host(leaves, size_fn))


def read_bytes(leaves: Sequence[jax.ShapeDtypeStruct]) -> tuple[int, int]:
  """Bytes that one host reads of a model, at most, and that all read.

  A host reads of a leaf the smallest box with all that its devices hold, see
  `checkpoints`: more than they hold where these are no neighbours in the mesh.
  """

  def size_fn(x, indices):
    sides = [
        [i.indices(n)[:2] for i in of_axis]
        for of_axis, n in zip(zip(*indices), x.shape)
    ]
    lengths = [
        max(end for _, end in side) - min(start for start, _ in side)
        for side in sides
    ]
    return math.prod(lengths) * x.dtype.itemsize

  by_host = _by_host(leaves, size_fn)
  return max(by_host), sum(by_host)


def total_bytes(x: jax.ShapeDtypeStruct) -> int:
  """Bytes of an array on all devices together."""
  return math.prod(x.shape) * x.dtype.itemsize
