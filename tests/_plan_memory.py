"""Runs the programs of a plan, and prints what the system saw of their memory.

Alone in its process, whose high-water mark is read: not what jax or XLA count.
"""

import gc
import json
import pathlib
import sys

import jax
import jax.numpy as jnp

from jaxsoup.experiments import configs
from jaxsoup.plan import machines
from jaxsoup.plan import programs


def status(name: str) -> int:
  text = pathlib.Path('/proc/self/status').read_text()
  return 1024 * int(text.partition(f'{name}:')[2].split()[0])


def ones(info, sharding):
  """An argument; what a program does not use has no sharding."""
  if info is None:
    return None
  is_key = jax.dtypes.issubdtype(info.dtype, jax.dtypes.prng_key)
  make_fn = lambda: jnp.ones(info.shape, info.dtype)
  make = jax.jit(
      (lambda: jax.random.key(0)) if is_key else make_fn, out_shardings=sharding
  )
  return jax.block_until_ready(make())


def measured(trace_fn, mesh) -> int:
  """Bytes that the process grows by: arguments, and a run on them.

  The least of three runs: the first also makes what stays, which was up to a
  third of the peak on jax 0.7.
  """
  with jax.set_mesh(mesh):
    lowered = trace_fn().lower()
  return min(_grown_by(lowered, lowered.compile()) for _ in range(3))


def _grown_by(lowered, compiled) -> int:
  is_leaf = lambda x: x is None or hasattr(x, 'shape')
  gc.collect()
  before = status('VmRSS')
  # Made anew for each run, which may take what it was given for its results.
  arguments, _ = jax.tree.map(
      ones, lowered.args_info, compiled.input_shardings, is_leaf=is_leaf
  )
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # Forgets the mark.
  jax.block_until_ready(compiled(*arguments))
  return status('VmHWM') - before


def main(file: str, num_ingredients: int, names: list[str], *overrides: str):
  experiment = configs.load(file, overrides)
  mesh, _ = machines.cpu_mesh(4)
  traced = programs.of(experiment, mesh, num_ingredients)
  peaks = {}
  for name in names:
    planned = programs.compile_program(name, traced[name], mesh)
    peaks[name] = mesh.size * planned.peak, measured(traced[name], mesh)
  print(json.dumps(peaks))


if __name__ == '__main__':
  main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), *sys.argv[4:])
