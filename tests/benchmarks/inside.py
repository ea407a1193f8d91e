"""What averages inside a training step cost, beside the bytes they move.

python tests/benchmarks/inside.py [--width 2048] [--examples 32] [--repeats 40]

A stack of dense layers in bfloat16, trained with SGD; the state is donated. An
average reads its sum and the parameters and writes the sum: 10 bytes for each
parameter. "Copy" is a float32 copy on the same device that moves as many bytes.

336 MB an average, 0.0093 s to copy (two cores, 60 repeats)
averages          step s  more s  more / copy
none               0.340  0.0000         0.00
one EMA            0.352  0.0128         1.38
two EMAs, SWA      0.364  0.0258         2.79
SWA, every 100     0.348  0.0089         0.96

With --examples 256 --repeats 10, 0.0085 s to copy
none               0.583  0.0000         0.00
one EMA            0.604  0.0186         2.17
two EMAs, SWA      0.609  0.0266         3.12
SWA, every 100     0.581  0.0090         1.06

So one EMA takes 1 to 2 % of a step in addition to what its bytes take, and
three take what their bytes take. An average that skips the step costs about a
copy (2.6 and 1.5 % of these steps), although it moves nothing: new parameters
in bfloat16 are written before they are looked at, so that what is added is what
is stored. By itself an update takes 0.0049 s (a copy 0.0065 s), and one that
skips 0.00005 s. Tried: rounding as a part of the sum in place of a barrier
takes 2.1 times as long.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsoup
from jaxsoup import trajectory

DEPTH = 8
AVERAGES = {
    'none': {},
    'one EMA': {'ema': jaxsoup.running_average(0.999)},
    'two EMAs, SWA': {
        'short': jaxsoup.running_average(0.99),
        'long': jaxsoup.running_average(0.9999),
        'swa': jaxsoup.running_average(),
    },
    'SWA, every 100': {'swa': jaxsoup.running_average(start=10, every=100)},
}


def main():
  """Prints a table: medians of steps that alternate, and of differences."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--width', type=int, default=2048)
  parser.add_argument('--examples', type=int, default=32)
  parser.add_argument('--repeats', type=int, default=40)
  args = parser.parse_args()
  shape = (DEPTH, args.width, args.width)
  x = jax.random.normal(jax.random.key(0), (args.examples, args.width))

  def loss_fn(params):
    layer = lambda x, w: (jnp.tanh(x @ w), None)
    return jax.lax.scan(layer, x.astype(jnp.bfloat16), params)[0].mean()

  def case(averages):
    tx = optax.chain(optax.sgd(0.1), trajectory.keep(averages))

    def step(params, state):
      updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
      return optax.apply_updates(params, updates), state

    params = jnp.full(shape, 0.01, jnp.bfloat16)
    return jax.jit(step, donate_argnums=(0, 1)), params, tx.init(params)

  cases = {name: case(averages) for name, averages in AVERAGES.items()}
  num_bytes = 10 * DEPTH * args.width**2
  copied = jnp.zeros(num_bytes // 8)  # Read and written.
  copy = jax.jit(lambda x: x + 1, donate_argnums=0)
  seconds = {name: [] for name in [*cases, 'copy']}
  for _ in range(args.repeats + 1):
    for name, (step, params, state) in cases.items():
      start = time.perf_counter()
      params, state = jax.block_until_ready(step(params, state))
      seconds[name].append(time.perf_counter() - start)
      cases[name] = step, params, state
    start = time.perf_counter()
    copied = jax.block_until_ready(copy(copied))
    seconds['copy'].append(time.perf_counter() - start)
  # The first one of each compiles.
  rows = {name: np.array(x[1:]) for name, x in seconds.items()}
  copying = np.median(rows['copy'])
  print(f'{num_bytes / 1e6:.0f} MB an average, {copying:.4f} s to copy')
  print(f'{"averages":<16}{"step s":>8}{"more s":>8}{"more / copy":>13}')
  for name in cases:
    # Of steps that follow one another: the machine drifts.
    more = np.median(rows[name] - rows['none'])
    step = np.median(rows[name])
    print(f'{name:<16}{step:8.3f}{more:8.4f}{more / copying:13.2f}')


if __name__ == '__main__':
  main()
