"""Averages of large checkpoints from file to file, against the disk itself.

python tests/benchmarks/average.py FOLDER [--gigabytes 20] [--ingredients 8]
  [--directories]

Writes bfloat16 checkpoints with the leaves of a scanned Transformer, or with
--directories those of Hugging Face, where each layer has its own, and runs
`jaxsoup soup uniform` on them in one and in two processes, with the files out
of the page cache (cold) and in it as far as they fit (warm). The limit is the
disk: what it reads and writes in large blocks, measured in the same run. Two
processes share the cores and the disk here; on several hosts each has its own.

Two cores, 24 GB of memory, 20 GB in 8 checkpoints:

disk: reads 0.79 GiB/s cold, writes 1.34 GiB/s
              seconds   GiB/s of ingredients   x the disk, read and write
1 process   cold    31.4           0.59                     0.81
1 process   warm    17.7           1.05                     1.44
2 processes cold    25.6           0.73                     0.99
2 processes warm    12.8           1.46                     1.99

With --directories, on another day: the disk reads 0.89 GiB/s in one stream.

1 process   cold    16.2           1.15                     1.42
1 process   warm     7.8           2.38                     2.93
2 processes cold    22.7           0.82                     1.01
2 processes warm    13.5           1.38                     1.70

There one process keeps both cores busy, and two only start later.
"""

import argparse
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np

from jaxsoup import checkpoints

_BLOCK = 8 << 20


def params_of(num_bytes: int, seed: int) -> dict:
  """Leaves `[L, ...]` of a scanned decoder, and its embedding."""
  width, num_layers = 1024, 8
  per_layer = num_bytes // 2 // num_layers // width
  sizes = {'mlp/wi': 0.4, 'mlp/wo': 0.2, 'attention/kernel': 0.3}
  shapes = {
      name: (num_layers, width, int(per_layer * share))
      for name, share in sizes.items()
  }
  shapes['embedding'] = (int(num_bytes // 2 * 0.1) // width, width)
  rng = np.random.default_rng(seed)
  block = rng.normal(size=1 << 20).astype(jnp.bfloat16)
  return {n: np.resize(block, shape) for n, shape in shapes.items()}


def save(run: pathlib.Path, params: dict, is_directory: bool) -> None:
  if not is_directory:
    checkpoints.save(run, params)
    return
  embedding = params.pop('embedding')
  layers = {
      f'{i}/{name}': layer
      for name, stack in params.items()
      for i, layer in enumerate(stack)
  }
  checkpoints.save(
      run / 'model.safetensors', {**layers, 'embedding': embedding}
  )
  (run / 'config.json').write_text('{}')


def forget(folder: pathlib.Path) -> None:
  """Takes the files out of the page cache."""
  os.sync()
  for file in folder.rglob('*'):
    if file.is_file():
      number = os.open(file, os.O_RDONLY)
      os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
      os.close(number)


def read_all(folder: pathlib.Path) -> float:
  """Seconds to read the files in large blocks."""
  buffer = bytearray(_BLOCK)
  start = time.perf_counter()
  for file in folder.rglob('*'):
    if file.is_file():
      with file.open('rb', buffering=0) as opened:
        while opened.readinto(buffer):
          pass
  return time.perf_counter() - start


def write_all(file: pathlib.Path, num_bytes: int) -> float:
  """Seconds until a file is on the disk."""
  block = np.random.default_rng(0).bytes(_BLOCK)
  start = time.perf_counter()
  with file.open('wb', buffering=0) as opened:
    for _ in range(num_bytes // _BLOCK):
      opened.write(block)
    os.fsync(opened.fileno())
  seconds = time.perf_counter() - start
  file.unlink()
  return seconds


def peak_of(process: subprocess.Popen) -> int:
  """Kilobytes that a process has held at most, until now."""
  try:
    status = pathlib.Path(f'/proc/{process.pid}/status').read_text()
    return int(re.findall(r'VmHWM:\s*(\d+)', status)[0])
  except (IndexError, OSError):
    return 0


def average(
    folder: pathlib.Path, runs: list[str], num: int
) -> tuple[float, int]:
  """Seconds of the command in `num` processes, until all is on the disk.

  And the kilobytes of the largest process.
  """
  command = [sys.executable, '-c', 'from jaxsoup import cli; cli.main()']
  command += ['soup', 'uniform', *runs, '--out', str(folder / 'soup')]
  environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
  if num > 1:
    command += ['--distributed']
    with socket.socket() as s:
      s.bind(('localhost', 0))
      port = s.getsockname()[1]
    environment |= {
        'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
        'JAX_NUM_PROCESSES': str(num),
    }
  start = time.perf_counter()
  processes = [
      subprocess.Popen(
          command,
          env=environment | ({'JAX_PROCESS_ID': str(i)} if num > 1 else {}),
          stdout=subprocess.DEVNULL,
          stderr=subprocess.PIPE,
      )
      for i in range(num)
  ]
  peak = 0
  while any(process.poll() is None for process in processes):
    peak = max(peak, *map(peak_of, processes))
    time.sleep(0.05)
  for process in processes:
    _, said = process.communicate()
    if process.returncode:
      raise RuntimeError(said.decode())
  os.sync()
  seconds = time.perf_counter() - start
  shutil.rmtree(folder / 'soup')
  return seconds, peak


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('--gigabytes', type=float, default=20)
  parser.add_argument('--ingredients', type=int, default=8)
  parser.add_argument('--directories', action='store_true')
  arguments = parser.parse_args()
  folder = arguments.folder.absolute() / 'average'
  folder.mkdir()
  one = int(arguments.gigabytes * 1e9 / arguments.ingredients)
  try:
    runs = [str(folder / f'run{k}') for k in range(arguments.ingredients)]
    for k, run in enumerate(runs):
      save(pathlib.Path(run), params_of(one, k), arguments.directories)
    forget(folder)
    read = read_all(folder)
    write = write_all(folder / 'file', one)
    total = one * len(runs)
    print(
        f'disk: reads {total / read / 2**30:.2f} GiB/s cold, writes '
        f'{one / write / 2**30:.2f} GiB/s'
    )
    print(f'{"":14}seconds   GiB/s of ingredients   x the disk, read and write')
    peaks = []
    for num in (1, 2):
      for kind in ('cold', 'warm'):
        (forget if kind == 'cold' else read_all)(folder)
        seconds, peak = average(folder, runs, num)
        peaks.append(peak)
        rate = total / seconds / 2**30
        limit = (read + write) / seconds
        print(
            f'{num} {"processes" if num > 1 else "process  "} {kind}'
            f'{seconds:8.1f}{rate:15.2f}{limit:25.2f}',
            flush=True,
        )
    print(f'largest process: {max(peaks) / 2**20:.2f} GiB')
  finally:
    shutil.rmtree(folder)


if __name__ == '__main__':
  main()
