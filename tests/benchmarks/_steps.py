"""Steps of the learned soup, timed one by one, with the peak of memory."""

from collections.abc import Sequence
import json
import pathlib
import resource
import subprocess
import sys
import time

import jax
import numpy as np
import optax

import jaxsoup


class Files(Sequence):
  """K models, each read anew from a file of float32 and shifted by k."""

  def __init__(self, path, abstract_params, num):
    self._path = path
    self._abstract = abstract_params
    self._num = num

  def __len__(self):
    return self._num

  def __getitem__(self, k):
    flat = np.fromfile(self._path, np.float32)
    flat += np.float32(1e-4 * k)
    leaves, treedef = jax.tree.flatten(self._abstract)
    ends = np.cumsum([x.size for x in leaves])
    parts = np.split(flat, ends[:-1])
    arrays = [
        jax.device_put(p.reshape(x.shape).astype(x.dtype))
        for p, x in zip(parts, leaves)
    ]
    return jax.tree.unflatten(treedef, arrays)


def write(path, abstract_params) -> None:
  """Random parameters; in pieces, because memory is measured."""
  num = sum(x.size for x in jax.tree.leaves(abstract_params))
  rng = np.random.default_rng(0)
  with pathlib.Path(path).open('wb') as f:
    for start in range(0, num, 1 << 20):
      size = min(1 << 20, num - start)
      f.write((0.02 * rng.standard_normal(size, np.float32)).tobytes())


class Clock:
  """One batch an epoch; notes when each epoch, which awaits a step, begins."""

  def __init__(self, batch):
    self._batch = batch
    self.times = []

  def __iter__(self):
    self.times.append(time.perf_counter())
    yield self._batch


def peak_bytes() -> int:
  """The operating system's count; kilobytes on Linux, bytes on macOS."""
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def of_learned(ingredients, loss_fn, batch, num=6, **options) -> dict:
  """Median seconds of a step, and what the first takes beyond it."""
  clock = Clock(jax.device_put(batch))
  start = time.perf_counter()
  jaxsoup.learned(
      ingredients,
      loss_fn,
      clock,
      tx=optax.adamw(0.05, weight_decay=0.0),
      num_epochs=num + 1,
      **options,
  )
  steps = np.diff(clock.times)
  median = float(np.median(steps[1:]))
  return {
      'step': median,
      'compile': float(steps[0]) - median,
      'stack': clock.times[0] - start,
  }


def of_gradient(params, loss_fn, batch, num=5) -> float:
  """Median seconds of one forward and backward of one model."""
  batch = jax.device_put(batch)
  one = jax.device_put(np.float32(1))
  run = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 2)))
  return of_call(lambda: run(params, batch, one), num)


def of_call(function, num=5) -> float:
  jax.block_until_ready(function())
  seconds = []
  for _ in range(num):
    start = time.perf_counter()
    jax.block_until_ready(function())
    seconds.append(time.perf_counter() - start)
  return float(np.median(seconds))


def in_a_process(script, **case) -> dict:
  """Runs one case in a process of its own, whose peak is its own."""
  result = subprocess.run(
      [sys.executable, script, '--case', json.dumps(case)],
      stdout=subprocess.PIPE,
      text=True,
      check=True,
  )
  return json.loads(result.stdout.splitlines()[-1])
