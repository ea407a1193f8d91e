"""What the scripts of all owners share: toy values, dumps, the command line.

Each script holds a table `LAYOUTS`, and runs in its owner's environment with
jobs as its arguments, such as

  python maxtext_layouts.py save:state:RUN:0 restore:state:RUN:OUT.npz

The last line that it prints is a JSON list: for each job null, or what its
owner says against it.
"""

from collections.abc import Callable
import json
import pathlib
import sys
import traceback
from typing import Any
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
  """How an owner saves and restores.

  Attributes:
    save: `(run, seed) -> None`: writes a run into a new directory.
    restore: `run -> tree`: what somebody does who wants to use the parameters.
    resume: the same for the whole state of a training, if that differs.
  """

  save: Callable[[pathlib.Path, int], None]
  restore: Callable[[pathlib.Path], Any]
  resume: Callable[[pathlib.Path], Any] | None = None


def numbers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  """Multiples of 1/16, whose means are exact in bfloat16 too."""
  return (rng.integers(-64, 65, shape) / 16).astype(np.float32)


def fill(tree: Any, seed: int) -> Any:
  """A tree like this one with toy numbers as its floats, on the device."""
  import jax

  rng = np.random.default_rng(seed)

  def filled(x):
    dtype = getattr(x, 'dtype', None)
    if dtype is None or not jax.numpy.issubdtype(dtype, jax.numpy.floating):
      return x
    return jax.numpy.asarray(numbers(rng, x.shape), dtype)

  return jax.tree.map(filled, tree)


def dump(tree: Any, file: pathlib.Path) -> None:
  """Writes the leaves by path as .npz, and their types as JSON in `types`.

  NumPy has no bfloat16: such leaves are written as float32.
  """
  arrays, types = {}, {}
  for path, leaf in _leaves(tree):
    dtype = str(getattr(leaf, 'dtype', ''))
    types[path] = f'{type(leaf).__module__}.{type(leaf).__name__} {dtype}'
    if dtype.startswith('key<'):
      import jax

      leaf = jax.random.key_data(leaf)
    if hasattr(leaf, 'detach'):
      leaf = leaf.detach().float() if leaf.is_floating_point() else leaf
    if isinstance(leaf, str | bytes | type(None)) or callable(leaf):
      continue
    is_bfloat16 = 'bfloat16' in dtype
    arrays[path] = np.asarray(leaf, np.float32 if is_bfloat16 else None)
  np.savez(file, types=np.array(json.dumps(types)), **arrays)


def _leaves(tree: Any) -> list[tuple[str, Any]]:
  if 'jax' not in sys.modules:  # A state dict of torch.
    return list(tree.items())
  import jax

  name = lambda key: str(
      getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key)))
  )
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [('/'.join(map(name, path)), leaf) for path, leaf in leaves]


def main(layouts: dict[str, Layout]) -> None:
  """Does the jobs of the command line, one after the other."""
  results = []
  for job in sys.argv[1:]:
    action, name, run, argument = job.split(':')
    layout, path = layouts[name], pathlib.Path(run).absolute()
    try:
      if action == 'save':
        layout.save(path, int(argument))
      elif restore_fn := getattr(layout, action):
        dump(restore_fn(path), pathlib.Path(argument))
      results.append(None)
    except Exception as e:  # Whatever an owner raises is the result.
      traceback.print_exc()
      results.append(f'{type(e).__name__}: {e}')
  print('\n' + json.dumps(results), flush=True)
