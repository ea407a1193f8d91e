"""Uniform soups of checkpoints on disk, against the limit of the machine.

  python tests/benchmarks/uniform.py [--peers PYTHON] [--growth PNG]

Writes eight ViT-B (86.6 M parameters, float32, 346 MB each) as safetensors and
as Orbax checkpoints, and makes their soup, file to file, in every way below.
Each way runs in a process of its own, five times, the files in the page cache.
`--peers` names a Python that has torch and mergekit.

limit         those bytes read once by two threads in reads of 8 MB, and the
              bytes of the result written once
work          seconds between the imports and the end, median of five
process       seconds of the whole process, imports included
memory        peak of private memory (anonymous pages) above that after the
              imports, in models of 346 MB

Measured on two CPU cores, jax 0.10.2, torch 2.13.0, mergekit 0.1.5:

                                      work  x limit  process  K = 4     8    32
limit: read once, write once          1.18     1.00     1.20   0.05  0.05  0.05
jaxsoup, file to file                 0.69     0.58     1.37   0.04  0.05  0.09
jaxsoup, uniform and save             1.60     1.36     2.30   1.04  1.05  1.09
jaxsoup, from Orbax (no compression)  2.01     1.70     2.69   1.35  1.40  1.47
Orbax, whole trees (no compression)   3.81     3.24     4.76   6.31  7.27 10.53
jaxsoup, from Orbax (zstd)            3.80     3.23     4.49   1.36  1.40  1.56
Orbax, whole trees (zstd)             4.95     4.20     5.91   5.36  8.24 10.61
torch, tensor by tensor               0.76     0.64     2.09   1.32  1.09  1.30
torch, whole state dicts              1.22     1.03     2.51   3.25  3.27  3.64
mergekit-pytorch linear               5.21     4.42     6.13   1.91  1.92  1.98

Nothing else was running. The machine is a shared one, and on other days up to
twice as fast: file to file 0.32 to 0.34 against 0.29 to 0.62 of torch, and
Orbax 1.02 to 1.18 against 2.37 to 3.06 (zstd: 2.23 to 2.29 against 3.12 to
3.35), the limit 0.39.

How good is that? The limit of a fresh process, then 0.4 s, is mostly pages that
the virtual machine has not touched yet. Where all are there already (one
process, again and again) reading takes 0.06 s and writing 0.05, and file to
file 0.25: 2.2 times as much. What it does beyond, in seconds of one core, of
which there are two: adding 0.06, checksums 0.06, Python 0.1. A bare loop with
the same checksums takes 0.18, one without 0.13.

Those checksums were sums of 64-bit words. Real hashes (xxh3) took their place:
2.18 against 2.19 and 1.88 against 2.01 s file to file, in turns on a busy
machine (medians of nine and of seven).

Tried: pieces of 1 MB fit the second cache with their sum, but cost more in
Python than they gain; two threads in place of three, or another switching
interval of the interpreter, change nothing. What would help next is fewer
Python calls per piece, which hold the interpreter's lock. From zstd,
decompression limits: both ways spend most of their time there.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

# Run in a child: `setup` is imported, then `work` timed. FOLDER, NUM and OUT
# are given. A new OUT is expected.
LIMIT = (
    'import os, threading',
    """
def read(files):
  buffer = bytearray(8 << 20)
  for file in files:
    with open(file, 'rb', buffering=0) as f:
      while f.readinto(buffer):
        pass

files = SAFETENSORS
threads = [threading.Thread(target=read, args=(files[i::2],)) for i in (0, 1)]
[t.start() for t in threads]
[t.join() for t in threads]
size, buffer = os.path.getsize(files[0]), bytes(8 << 20)
with open(OUT, 'wb', buffering=0) as f:
  while size > 0:
    size -= f.write(buffer[:size])
""",
)
OURS = 'import jax, jaxsoup; from jaxsoup import checkpoints; jax.devices()'
FILE_TO_FILE = (
    OURS,
    """
ingredients = checkpoints.Ingredients(SAFETENSORS)
checkpoints.save_average(OUT + '.safetensors', ingredients)
""",
)
THROUGH_MEMORY = (
    OURS,
    """
soup = jaxsoup.uniform(checkpoints.Ingredients(SAFETENSORS))
checkpoints.save(OUT + '.safetensors', soup)
""",
)
FROM_ORBAX = (
    OURS,
    'soup = jaxsoup.uniform(checkpoints.Ingredients(ORBAX))',
)
FROM_ZSTD = (
    OURS,
    'soup = jaxsoup.uniform(checkpoints.Ingredients(ZSTD))',
)
WHOLE_TREES = """
add = jax.jit(lambda a, b: jax.tree.map(jax.numpy.add, a, b), donate_argnums=0)
checkpointer, total = ocp.PyTreeCheckpointer(), None
for path in {paths}:
  params = checkpointer.restore(path)
  total = params if total is None else add(total, params)
soup = jax.jit(lambda t: jax.tree.map(lambda x: x / NUM, t))(total)
jax.block_until_ready(soup)
"""
ORBAX_IMPORTS = 'import jax, orbax.checkpoint as ocp; jax.devices()'
ORBAX_TREES = (ORBAX_IMPORTS, WHOLE_TREES.format(paths='ORBAX'))
ZSTD_TREES = (ORBAX_IMPORTS, WHOLE_TREES.format(paths='ZSTD'))
TORCH_TENSORS = (
    'import torch; from safetensors import safe_open; '
    'from safetensors.torch import save_file',
    """
files, soup = [safe_open(f, 'pt') for f in SAFETENSORS], {}
for name in files[0].keys():
  total = files[0].get_tensor(name).clone()
  for file in files[1:]:
    total += file.get_tensor(name)
  soup[name] = total / NUM
save_file(soup, OUT)
""",
)
TORCH_STATE_DICTS = (
    'import torch; from safetensors.torch import load_file, save_file',
    """
# After the manner of timm's avg_checkpoints: sums in float64.
total = {}
for file in SAFETENSORS:
  for name, tensor in load_file(file).items():
    if name in total:
      total[name] += tensor.double()
    else:
      total[name] = tensor.double()
save_file({n: (t / NUM).float() for n, t in total.items()}, OUT)
""",
)
MERGEKIT = ('import yaml, mergekit', 'MERGEKIT()')
MERGEKIT_DEFINITION = """
def MERGEKIT():
  from click.testing import CliRunner
  from mergekit.scripts.merge_raw_pytorch import main
  models = [{'model': f, 'parameters': {'weight': 1.0}} for f in SAFETENSORS]
  config = {'merge_method': 'linear', 'models': models, 'dtype': 'float32'}
  with open(OUT + '.yml', 'w') as f:
    yaml.safe_dump(config, f)
  result = CliRunner().invoke(main, [OUT + '.yml', OUT + '.dir'])
  assert result.exit_code == 0, (result.output, result.exception)
"""

WAYS = {
    'limit: read once, write once': LIMIT,
    'jaxsoup, file to file': FILE_TO_FILE,
    'jaxsoup, uniform and save': THROUGH_MEMORY,
    'jaxsoup, from Orbax (no compression)': FROM_ORBAX,
    'Orbax, whole trees (no compression)': ORBAX_TREES,
    'jaxsoup, from Orbax (zstd)': FROM_ZSTD,
    'Orbax, whole trees (zstd)': ZSTD_TREES,
}
PEERS = {
    'torch, tensor by tensor': TORCH_TENSORS,
    'torch, whole state dicts': TORCH_STATE_DICTS,
    'mergekit-pytorch linear': MERGEKIT,
}
CHILD = """
import json, os, sys, threading, time
NUM, FOLDER, OUT = {num}, {folder!r}, {out!r}
SAFETENSORS = [f'{{FOLDER}}/{{k}}.safetensors' for k in range(NUM)]
ORBAX = [f'{{FOLDER}}/orbax{{k % 8}}' for k in range(NUM)]
ZSTD = [f'{{FOLDER}}/zstd{{k % 8}}' for k in range(NUM)]
import warnings
warnings.simplefilter('ignore')
{setup}
{definition}

def private():
  with open('/proc/self/status') as f:
    return next(int(r.split()[1]) for r in f if r.startswith('RssAnon')) * 1024

peak = before = private()
def watch():
  global peak
  while True:
    peak = max(peak, private())
    time.sleep(0.002)

if {is_watched}:
  threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
exec({work!r})
seconds = time.perf_counter() - start
print(json.dumps([seconds, max(peak, private()) - before]))
"""


def shapes_of(width: int, depth: int) -> dict[str, tuple[int, ...]]:
  """The tensors of a ViT with patches of 16 pixels and 1,000 classes."""
  shapes: dict[str, tuple[int, ...]] = {
      'patch.weight': (width, 3, 16, 16),
      'patch.bias': (width,),
      'cls_token': (1, 1, width),
      'position': (1, 197, width),
      'norm.weight': (width,),
      'norm.bias': (width,),
      'head.weight': (1000, width),
      'head.bias': (1000,),
  }
  for i in range(depth):
    matrices = dict.fromkeys(('q', 'k', 'v', 'o'), (width, width))
    matrices |= {'fc1': (4 * width, width), 'fc2': (width, 4 * width)}
    for name, shape in matrices.items():
      shapes[f'block{i}.{name}.weight'] = shape
      shapes[f'block{i}.{name}.bias'] = shape[:1]
    for name in ('norm1', 'norm2'):
      shapes[f'block{i}.{name}.weight'] = (width,)
      shapes[f'block{i}.{name}.bias'] = (width,)
  return shapes


def make_models(folder: pathlib.Path, width: int, depth: int, with_orbax: bool):
  """Eight models near one another, in every format."""
  import numpy as np
  import orbax.checkpoint as ocp
  from safetensors import numpy as safetensors

  shapes = shapes_of(width, depth)
  rng = np.random.default_rng(0)
  base = {n: 0.02 * rng.standard_normal(s, 'f4') for n, s in shapes.items()}
  for k in range(8):
    model = {
        n: x + np.float32(1e-3) * rng.standard_normal(x.shape, 'f4')
        for n, x in base.items()
    }
    safetensors.save_file(model, folder / f'{k}.safetensors')
    # The same eight under more names, up to K = 64.
    for other in range(k + 8, 64, 8):
      os.link(folder / f'{k}.safetensors', folder / f'{other}.safetensors')
    if with_orbax:
      for name, is_compressed in (('orbax', False), ('zstd', True)):
        checkpointer = ocp.PyTreeCheckpointer(use_compression=is_compressed)
        checkpointer.save(folder / f'{name}{k}', model)
  return sum(x.size for x in base.values())


def measure(python, way, folder, num, *, is_watched, definition='') -> list:
  """[seconds of work, private bytes, seconds of the process]."""
  out = folder / 'out'
  shutil.rmtree(out, ignore_errors=True)
  for path in folder.glob('out*'):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  # Or a way would pay for what the one before it left behind: bytes to be
  # written, files dropped from memory, and pages that no one has touched yet.
  os.sync()
  out.write_bytes(bytes(os.path.getsize(folder / '0.safetensors')))
  out.unlink()
  for path in folder.rglob('*'):
    if path.is_file():
      with path.open('rb', buffering=0) as f:
        while f.read(8 << 20):
          pass
  setup, work = way
  code = CHILD.format(
      num=num, folder=str(folder), out=str(out), setup=setup, work=work,
      is_watched=is_watched, definition=definition,
  )  # fmt: skip
  start = time.perf_counter()
  done = subprocess.run([python, '-c', code], capture_output=True, text=True)
  seconds = time.perf_counter() - start
  if done.returncode:
    raise RuntimeError(done.stderr[-2000:])
  return [*json.loads(done.stdout.splitlines()[-1]), seconds]


def compare(folder, peers, num_repeats) -> list[dict]:
  """One row a way, at K = 8; memory also at K = 4 and K = 32."""
  num_bytes = os.path.getsize(folder / '0.safetensors')
  ways = {name: (sys.executable, way, '') for name, way in WAYS.items()}
  if peers:
    for name, way in PEERS.items():
      definition = MERGEKIT_DEFINITION if way is MERGEKIT else ''
      ways[name] = (peers, way, definition)
  times: dict[str, list] = {name: [] for name in ways}
  for _ in range(num_repeats):  # In turns: a busy minute hits all alike.
    for name, (python, way, definition) in ways.items():
      result = measure(
          python, way, folder, 8, is_watched=False, definition=definition
      )
      times[name].append(result)
  rows = []
  for name, (python, way, definition) in ways.items():
    memory = {
        num: measure(
            python, way, folder, num, is_watched=True, definition=definition
        )[1] / num_bytes
        for num in (4, 8, 32)
    }  # fmt: skip
    rows.append(
        {
            'way': name,
            'work': statistics.median(t[0] for t in times[name]),
            'process': statistics.median(t[2] for t in times[name]),
            'memory': memory,
        }
    )
  return rows


def show(rows: list[dict]) -> None:
  limit = rows[0]['work']
  print(f'{"":36}  work  x limit  process  K = 4     8    32')
  for row in rows:
    memory = ''.join(f'{x:6.2f}' for x in row['memory'].values())
    print(
        f'{row["way"]:36}{row["work"]:6.2f}{row["work"] / limit:9.2f}'
        f'{row["process"]:9.2f} {memory}'
    )


def grow(folder, png) -> None:
  """Time and memory over K and over the number of parameters, and a picture."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  results = []
  sizes = {
      '5 M': (192, 12),
      '22 M': (384, 12),
      '86 M': (768, 12),
      '303 M': (1024, 24),
  }
  for label, (width, depth) in sizes.items():
    sub = folder / label.replace(' ', '')
    sub.mkdir()
    num_params = make_models(sub, width, depth, with_orbax=False)
    for num in (2, 4, 8, 16, 32, 64) if label == '86 M' else (8,):
      runs = [
          measure(sys.executable, FILE_TO_FILE, sub, num, is_watched=False)[0]
          for _ in range(3)
      ]
      memory = measure(sys.executable, FILE_TO_FILE, sub, num, is_watched=True)
      results.append((num_params, num, statistics.median(runs), memory[1]))
      print(
          f'{num_params / 1e6:6.1f} M  K = {num:2}  {results[-1][2]:6.2f} s'
          f'  {memory[1] / 1e6:6.0f} MB',
          flush=True,
      )
    shutil.rmtree(sub)
  figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout='constrained')
  series = [
      (
          'ingredients, 86 M parameters each',
          1,
          [r for r in results if 8e7 < r[0] < 9e7],
      ),
      ('parameters (million), K = 8', 0, [r for r in results if r[1] == 8]),
  ]
  for ax, (label, column, rows) in zip(axes, series):
    x = [r[column] / (1e6 if column == 0 else 1) for r in rows]
    ax.loglog(x, [r[2] for r in rows], 'o-', label='seconds')
    ax.loglog(x, [r[3] / 1e9 for r in rows], 's--', label='private memory, GB')
    first, last = x[0], x[-1]
    ax.loglog(
        [first, last],
        [rows[0][2], rows[0][2] * last / first],
        color='grey', linewidth=0.8, label='linear',
    )  # fmt: skip
    ax.set_xlabel(label)
    ax.legend(frameon=False)
  figure.savefig(png, dpi=120)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--peers', help='a Python with torch and mergekit')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--growth', help='measure growth; where the picture goes')
  parser.add_argument('--folder', help='for 15 GB of files; a temporary one')
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
    folder = pathlib.Path(name)
    if arguments.growth:
      grow(folder, arguments.growth)
    else:
      make_models(folder, 768, 12, with_orbax=True)
      show(compare(folder, arguments.peers, arguments.repeats))


if __name__ == '__main__':
  main()
