"""How time and memory grow with K and with parameters, of `mix` and `learned`.

python tests/benchmarks/growth.py --picture growth.png

Seconds of one mix or step, and the peak of the resident set beyond the start,
in float32, on two CPU cores. Ingredients are read from the page cache.

mode      K  parameters, M   seconds  peak, GB  peak, models
mix       2              5     0.004      0.22          10.9
resident  2              5     0.014      0.27          13.5
streamed  2              5     0.036      0.33          16.3
mix       4              5     0.004      0.28          13.8
resident  4              5     0.019      0.34          17.0
streamed  4              5     0.073      0.32          15.8
mix       8              5     0.008      0.38          19.1
resident  8              5     0.025      0.39          19.7
streamed  8              5     0.126      0.32          16.1
mix      16              5     0.013      0.51          25.7
resident 16              5     0.033      0.56          28.0
streamed 16              5     0.253      0.31          15.6
mix      32              5     0.028      0.84          41.9
resident 32              5     0.067      0.91          45.7
streamed 32              5     0.529      0.32          16.1
mix      64              5     0.048      1.49          74.7
resident 64              5     0.101      1.53          76.5
streamed 64              5     0.987      0.31          15.5
mix       2             20     0.032      0.76           9.5
resident  2             20     0.062      0.57           7.1
streamed  2             20     0.170      0.87          10.9
mix       2             80     0.156      1.75           5.5
resident  2             80     0.268      1.79           5.6
streamed  2             80     1.209      1.65           5.1
mix       2            300     0.664      6.30           5.3
resident  2            300     1.098      6.30           5.3
streamed  2            300     5.776      5.63           4.7

Memory of a streamed step is the same for K = 2 and 64; resident memory grows
linearly in K and in parameters, as times do as far as the noise shows. At 5 M
parameters the programs themselves, 0.3 GB, are most of a peak. Reading limits a
streamed step here: forward and backward are of eight examples.
"""

import argparse
import functools
import json
import tempfile

import _steps
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import jaxsoup

BY_NUM = [(num, 5e6) for num in (2, 4, 8, 16, 32, 64)]
BY_SIZE = [(2, size) for size in (5e6, 20e6, 80e6, 300e6)]
MODES = 'mix', 'resident', 'streamed'


def loss_fn(params, batch, beta):
  """A narrow batch through square layers: little beside the mixing."""
  for w in params.values():
    batch = jnp.tanh(beta * batch @ w)
  return jnp.mean(batch**2)


def abstract_of(size):
  """Five square layers of so many parameters in all."""
  width = int((size / 5) ** 0.5)
  layer = jax.ShapeDtypeStruct((width, width), 'float32')
  return {f'layer_{i}': layer for i in range(5)}


def case_of(mode, num, size, path):
  abstract = abstract_of(size)
  if mode == 'write':
    _steps.write(path, abstract)
    return {}
  ingredients = _steps.Files(path, abstract, num)
  start = _steps.peak_bytes()
  if mode == 'mix':
    stacked = jaxsoup.stack(ingredients)
    alpha = jnp.full(num, 1 / num)
    figures = {'step': _steps.of_call(lambda: jaxsoup.mix(stacked, alpha))}
  else:
    batch = np.ones((8, abstract['layer_0'].shape[0]), np.float32)
    figures = _steps.of_learned(ingredients, loss_fn, batch, num=5, memory=mode)
  return figures | {'peak': _steps.peak_bytes() - start}


def draw(rows, path) -> None:
  """Seconds above, peak memory below; against K left, against size right."""
  matplotlib.use('Agg')
  from matplotlib import pyplot as plt
  from matplotlib import ticker

  figure, axes = plt.subplots(2, 2, figsize=(8, 6), layout='constrained')
  columns = ((BY_NUM, 0, 'K'), (BY_SIZE, 1, 'M parameters'))
  for column, (cases, x, name) in enumerate(columns):
    for mode in MODES:
      points = [rows[mode, case] for case in cases]
      for ax, y in zip(axes[:, column], ('step', 'peak')):
        values = [p[y] / (1 if y == 'step' else 1e9) for p in points]
        ax.loglog([c[x] for c in cases], values, 'o-', label=mode)
        ax.grid(alpha=0.3)
        ticks = [c[x] for c in cases]
        ax.set_xticks(ticks, [f'{t / (1e6 if x else 1):g}' for t in ticks])
        ax.xaxis.set_minor_locator(ticker.NullLocator())
    axes[1, column].set_xlabel(name)
  axes[0, 0].set_ylabel('seconds a step')
  axes[1, 0].set_ylabel('peak memory, GB')
  axes[0, 0].set_title('5 M parameters')
  axes[0, 1].set_title('K = 2')
  axes[0, 0].legend()
  figure.savefig(path, dpi=150)


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--picture')
  parser.add_argument('--case', type=json.loads)
  args = parser.parse_args()
  if args.case:
    print(json.dumps(case_of(**args.case)))
    return
  run = functools.partial(_steps.in_a_process, __file__)
  rows = {}
  print('mode      K  parameters, M   seconds  peak, GB  peak, models')
  for num, size in dict.fromkeys(BY_NUM + BY_SIZE):
    with tempfile.NamedTemporaryFile() as file:
      case = {'num': num, 'size': size, 'path': file.name}
      run(mode='write', **case)
      for mode in MODES:
        figures = rows[mode, (num, size)] = run(mode=mode, **case)
        peak = figures['peak']
        print(
            f'{mode:8} {num:2} {size / 1e6:14.0f} {figures["step"]:9.3f} '
            f'{peak / 1e9:9.2f} {peak / size / 4:13.1f}',
            flush=True,
        )
  if args.picture:
    draw(rows, args.picture)


if __name__ == '__main__':
  main()
