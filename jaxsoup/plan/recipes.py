"""What each recipe reads, holds and evaluates, from its programs.

```
recipes = recipes.of(experiment, mesh, device_bytes, 58, compiled)
[r.name for r in recipes if r.fits]
```
"""

from collections.abc import Mapping
from collections.abc import Sequence
import math
from typing import Any
from typing import NamedTuple

import jax

from jaxsoup import _memory
from jaxsoup._recipes import _streamed
from jaxsoup.experiments import architectures
from jaxsoup.experiments import configs
from jaxsoup.plan import machines
from jaxsoup.plan import programs


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


def of(
    experiment: configs.Experiment,
    mesh: jax.sharding.Mesh,
    device_bytes: int,
    num_ingredients: int,
    compiled: Sequence[programs.Program],
) -> tuple[Recipe, ...]:
  """Adds up what each recipe reads, holds and evaluates.

  Args:
    experiment: as in `plan.make`.
    mesh: as in `plan.make`.
    device_bytes: memory of one device.
    num_ingredients: K.
    compiled: those of `programs.of`.

  Returns:
    One `Recipe` each; those that search are counted as if they took all.
  """
  by_name = {p.name: p for p in compiled}
  config, model = experiment.config, architectures.of(experiment)
  leaves = jax.tree.leaves(programs.abstract_params(model, mesh))
  host_reads, all_read = read_bytes(leaves)
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
            writes=0 if name == 'ensembles' else sum(map(total_bytes, leaves)),
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
    by_name: Mapping[str, programs.Program], num_ingredients: int
) -> dict[str, int]:
  """Bytes by recipe: what it keeps, and its largest program.

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
  """Bytes by recipe that one host keeps, without the model that it reads."""
  narrow = lambda x: math.prod(x.shape) * min(2, x.dtype.itemsize)
  copies = (
      num_ingredients * sum(map(narrow, leaves)) // programs.num_hosts(mesh)
  )
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
      'ensembles': (k, k, 0),
  }


def _with_notes(made, mesh, device_bytes, num_ingredients, by_name):
  """Adds to each recipe why it does not fit, and what would."""
  num_hosts = programs.num_hosts(mesh)
  fits = {r.name: r.fits for r in made}
  one = by_name['inner products, streamed'].arguments // 2
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
    elif recipe.name in ('learned, cached', 'ensembles') and num_hosts > 1:
      recipe = recipe._replace(fits=False)
      note = f'does not run: needs one process, not {num_hosts} hosts'
      if recipe.name == 'learned, cached':
        note += "; pass memory='streamed'"
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
      k for k, c in machines.CHIPS.items() if c.hbm_gib * 2**30 >= num_bytes
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
