"""Where to augment: in the workers that decode, or in the step on the device.

python tests/benchmarks/augment.py [--size 224] [--batch-size 32] [--repeats 5]

A crop decides which pixels are decoded to which size, so it belongs with the
decoder, and a flip costs a copy there. RandAugment and mixup could be in
either place. PIL does the same two operations an image as `augment.rand`; the
device's side is measured as processor time here, and as multiplications and
bytes of the compiled program, which do not depend on the machine, against those
of a training step of ViT-B/32. Milliseconds of a core an image, the least of
the repeats, on a CPU:

                            ms of a core   MFLOP an image   MB an image
PIL: decode, resize                 2.44
PIL: rand                           1.12
device: rand                       11.25             16.6          20.1
device: mixup                       0.04              0.8           0.8
device: ViT-B/32, a step          327.12          25870.8         473.9

So they are on the device: `rand` adds half to the work of the hosts, which are
what an accelerator waits for, or 4 % to the bytes of a small step (every image
computes all operations and keeps one, hence ten times PIL's time on a CPU).
"""

import argparse
import io
import time

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from PIL import ImageEnhance
from PIL import ImageOps

from jaxsoup.data import augment
from jaxsoup.models import vit


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
  kind, filter_ = Image.Transform.AFFINE, Image.Resampling.BILINEAR
  return image.transform(image.size, kind, matrix, filter_)


OPERATIONS = (
    lambda x, s: x.rotate(30 * s, Image.Resampling.BILINEAR),
    lambda x, s: _affine(x, 1, 0.3 * s, 0, 0, 1, 0),
    lambda x, s: _affine(x, 1, 0, 0, 0.3 * s, 1, 0),
    lambda x, s: _affine(x, 1, 0, 100 * s, 0, 1, 0),
    lambda x, s: _affine(x, 1, 0, 0, 0, 1, 100 * s),
    lambda x, s: ImageEnhance.Color(x).enhance(1 + 0.9 * s),
    lambda x, s: ImageEnhance.Contrast(x).enhance(1 + 0.9 * s),
    lambda x, s: ImageEnhance.Brightness(x).enhance(1 + 0.9 * s),
    lambda x, s: ImageEnhance.Sharpness(x).enhance(1 + 0.9 * s),
    lambda x, s: ImageOps.solarize(x, int(255 * abs(s))),
    lambda x, s: ImageOps.posterize(x, 4),
    lambda x, s: ImageOps.autocontrast(x),
    lambda x, s: ImageOps.equalize(x),
)


def with_pil(image: Image.Image, rng: np.random.Generator) -> Image.Image:
  """Two operations of RandAugment, each of a kind and a strength at random."""
  for _ in range(2):
    operation = OPERATIONS[rng.integers(len(OPERATIONS))]
    image = operation(image, rng.uniform(-1, 1))
  return image


def least(fn, repeats: int, num_images: int) -> float:
  """Milliseconds of processor time an image."""
  times = []
  for _ in range(repeats + 1):  # The first one compiles.
    start = time.process_time()
    fn()
    times.append(time.process_time() - start)
  return 1e3 * min(times[1:]) / num_images


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--size', type=int, default=224)
  parser.add_argument('--batch-size', type=int, default=32)
  parser.add_argument('--repeats', type=int, default=5)
  arguments = parser.parse_args()
  size, num = arguments.size, arguments.batch_size
  rng = np.random.default_rng(0)
  coarse = rng.integers(0, 256, (num, 12, 16, 3), np.uint8)
  images = [Image.fromarray(x).resize((500, 375)) for x in coarse]
  buffers = [io.BytesIO() for _ in images]
  for image, buffer in zip(images, buffers):
    image.save(buffer, 'JPEG', quality=90)
  small = [image.resize((size, size)) for image in images]
  batch = jnp.asarray(np.stack(small))
  label = jax.nn.one_hot(jnp.arange(num), 1000)

  def decode():
    for buffer in buffers:
      Image.open(buffer).convert('RGB').resize((size, size))

  def in_workers():
    for image in small:
      with_pil(image, rng)

  def rand(key, x):
    return augment.rand(key, x / 255, 0.9)

  def mixup(key, x):
    return augment.mixup(key, x / 255, label, 0.2)

  sizes = {'width': 768, 'depth': 12, 'num_heads': 12, 'patch_size': 32}
  model = vit.ViT((size, size, 3), 1000, rngs=nnx.Rngs(0), **sizes)
  graph, params = nnx.split(model)

  def step(key, x):
    logits_of = lambda p: nnx.merge(graph, p)(x / 255)
    return jax.grad(lambda p: jnp.mean((logits_of(p) - label) ** 2))(params)

  print(f'{"":28}ms of a core   MFLOP an image   MB an image')
  for name, fn in (('PIL: decode, resize', decode), ('PIL: rand', in_workers)):
    print(f'{name:28}{least(fn, arguments.repeats, num):12.2f}')
  for name, fn in (('device: rand', rand), ('device: mixup', mixup)):
    show(name, fn, batch, arguments.repeats)
  show('device: ViT-B/32, a step', step, batch, 1)


def show(name: str, fn, batch: jax.Array, repeats: int) -> None:
  key = jax.random.key(0)
  compiled = jax.jit(fn).lower(key, batch).compile()
  run = lambda: jax.block_until_ready(compiled(key, batch))
  cost = compiled.cost_analysis()
  num = len(batch)
  print(
      f'{name:28}{least(run, repeats, num):12.2f}'
      f'{cost["flops"] / num / 1e6:17.1f}'
      f'{cost["bytes accessed"] / num / 1e6:14.1f}'
  )


if __name__ == '__main__':
  main()
