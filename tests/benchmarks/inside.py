"""What averages inside a training step cost, beside the bytes they move.

python tests/benchmarks/inside.py [--width 2048] [--repeats 9]

A stack of dense layers in bfloat16, trained with SGD; the state is donated. An
average reads its sum and the parameters and writes the sum: 10 bytes for each
parameter. "Copy" is a float32 copy on the same device that moves as many bytes.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import optax

import jaxsoup
from jaxsoup import trajectory

DEPTH, NUM_EXAMPLES = 8, 32
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
  """Prints a table: the fastest of steps that alternate, and ratios of them."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--width', type=int, default=2048)
  parser.add_argument('--repeats', type=int, default=9)
  args = parser.parse_args()
  shape = (DEPTH, args.width, args.width)
  x = jax.random.normal(jax.random.key(0), (NUM_EXAMPLES, args.width))

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
  fastest = {name: min(x[1:]) for name, x in seconds.items()}
  print(f'{num_bytes / 1e6:.0f} MB an average, {fastest["copy"]:.4f} s to copy')
  print(f'{"averages":<16}{"step s":>8}{"/ none":>8}{"more / copy":>13}')
  for name in cases:
    more = fastest[name] - fastest['none']
    print(
        f'{name:<16}{fastest[name]:8.3f}{fastest[name] / fastest["none"]:8.3f}'
        f'{more / fastest["copy"]:13.2f}'
    )


if __name__ == '__main__':
  main()
