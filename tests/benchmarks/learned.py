"""Time and memory of a step of the learned soup, resident and streamed.

python tests/benchmarks/learned.py [--num 8 32 72] [--dtype float32]

A ViT of 3.2 M parameters in float32, 64 images of 32 x 32 in patches of 4; two
cores. Ratios are to a forward and backward of one model in the same process,
half of it measured before and half after; memory is the peak of the resident
set beyond the start, in models of 12.8 MB. Ingredients are read from the page
cache; "cached" keeps 16-bit copies of them.

mode       K   step / gradient  gradient s  compile s  peak, models
gradient    1              1.00        0.66        0.0          64.6
resident    8              1.04        0.66        3.1          82.6
resident   32              1.12        0.67        3.4         106.3
resident   72              1.06        0.65        3.1         144.7
streamed    8              1.27        0.66        3.7          73.2
streamed   32              2.14        0.65        3.7          77.7
streamed   72              3.20        0.65        4.0          74.9
cached      8              1.16        0.66        3.8          82.1
cached     32              1.76        0.64        4.3          93.7
cached     72              2.74        0.65        5.6         119.9

On another day resident at K = 72 took 1.31. Resident memory is that of one
gradient, K + 4 models; streamed it is the same for any K. Compile time is that
of one model. "Compile" is what the first step takes beyond the median: of a
streamed one also that each ingredient is checked when it is first read. What
limits: resident, two readings of the stack; streamed, reading 2 K - 2
ingredients.

Tried, on K leaves of 2048 x 2048 bfloat16 on a CPU: `mix` by tensordot and by a
scan over rows makes a float32 copy of the stack (570 MB and 0.17 s at K = 33),
also with a barrier around each row; rows taken as integers from a stack behind
a barrier make none (17 MB and 0.010 s at K = 32). Multiply-and-sum took 19 s at
K = 8 in jax 0.10.2.
"""

import argparse
import functools
import json
import tempfile

import _steps
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsoup
from jaxsoup.models import vit


def model_of(rngs):
  return vit.ViT(
      (32, 32, 3), 100, patch_size=4, width=256, depth=4, num_heads=4, rngs=rngs
  )


def case_of(mode, num, dtype, batch_size, path):
  """One mode in this process: seconds, and the peak beyond the start."""
  graphdef, abstract = nnx.split(nnx.eval_shape(lambda: model_of(nnx.Rngs(0))))
  abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, dtype), nnx.to_pure_dict(abstract)
  )
  if mode == 'write':
    _steps.write(path, abstract)
    return {'size': sum(x.size for x in jax.tree.leaves(abstract))}

  def loss_fn(params, batch, beta):
    model = nnx.merge(graphdef, nnx.State(params))
    logits = beta * model(batch['image'].astype(dtype)).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, batch['label']
    ).mean()

  rng = np.random.default_rng(0)
  batch = {
      'image': rng.normal(size=(batch_size, 32, 32, 3)).astype(np.float32),
      'label': rng.integers(0, 100, batch_size).astype(np.int32),
  }
  ingredients = _steps.Files(path, abstract, num)
  start = _steps.peak_bytes()
  measured = {'gradient': _steps.of_gradient(ingredients[0], loss_fn, batch)}
  measured['gradient_peak'] = _steps.peak_bytes() - start
  before = measured['gradient']
  if mode != 'gradient':
    measured |= _steps.of_learned(
        ingredients, loss_fn, batch, num=5, memory=mode
    )
  # Again, because other programs may have come or gone.
  after = _steps.of_gradient(ingredients[0], loss_fn, batch)
  measured['gradient'] = (before + after) / 2
  measured['peak'] = _steps.peak_bytes() - start
  return measured


def show_bandwidth() -> None:
  """How fast `mix` reads its stack, against a copy on the same device."""
  stacked = {'w': jnp.ones((32, 4096, 4096))}
  alpha = jnp.full(32, 1 / 32)
  num_bytes = stacked['w'].nbytes
  copied = jax.jit(lambda x: jax.tree.map(jnp.negative, x))
  mixed = _steps.of_call(lambda: jaxsoup.mix(stacked, alpha), 10)
  copy = _steps.of_call(lambda: copied(stacked), 10)
  print(
      f'mix reads {num_bytes / mixed / 1e9:.0f} GB/s; a copy reads and writes '
      f'{2 * num_bytes / copy / 1e9:.0f} GB/s'
  )


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--num', type=int, nargs='+', default=[8, 32, 72])
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--batch_size', type=int, default=64)
  parser.add_argument('--case', type=json.loads)
  args = parser.parse_args()
  if args.case:
    print(json.dumps(case_of(**args.case)))
    return
  with tempfile.NamedTemporaryFile() as file:
    run = functools.partial(
        _steps.in_a_process,
        __file__,
        dtype=args.dtype,
        batch_size=args.batch_size,
        path=file.name,
    )
    size = run(mode='write', num=1)['size']
    num_bytes = size * jnp.dtype(args.dtype).itemsize
    print(f'{size / 1e6:.1f} M parameters, {args.dtype}, {jax.devices()[0]}')
    print('mode       K   step / gradient  gradient s  compile s  peak, models')
    one = run(mode='gradient', num=1)
    row = '{:9} {:3} {:17.2f} {:11.2f} {:10.1f} {:13.1f}'
    peak = one['peak'] / num_bytes
    print(row.format('gradient', 1, 1, one['gradient'], 0, peak))
    for mode in ('resident', 'streamed', 'cached'):
      for num in args.num:
        x = run(mode=mode, num=num)
        ratio, peak = x['step'] / x['gradient'], x['peak'] / num_bytes
        cells = mode, num, ratio, x['gradient'], x['compile'], peak
        print(row.format(*cells), flush=True)
  if jax.default_backend() != 'cpu':
    show_bandwidth()


if __name__ == '__main__':
  main()
