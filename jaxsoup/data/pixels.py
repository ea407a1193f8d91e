"""Operations on one image, as the Python Imaging Library has them.

```
bright = pixels.blend(jnp.zeros_like(image), image, 1.5)
flat = pixels.equalize(image)
```

An image is [H, W, C] with pixels in 0..1, 255 steps of which are the grey
levels that some of them count. Every argument but the image may be traced.
"""

import jax
import jax.numpy as jnp
from jax.scipy import ndimage

NUM_LEVELS = 256
# Of red, green and blue in luma: ITU-R 601-2.
LUMA = (0.299, 0.587, 0.114)


def warp(image: jax.Array, matrix: jax.Array, offset: jax.Array) -> jax.Array:
  """Moves pixels by an affine map about the centre, bilinearly.

  `out(p) = image(matrix (p - centre) + offset + centre)`

  Args:
    image: [H, W, C].
    matrix: [2, 2], of rows and columns.
    offset: [2], rows and columns, in pixels.

  Returns:
    [H, W, C]; zero where the image did not reach.

  Example:
    >>> image = jnp.eye(3)[..., None]
    >>> moved = warp(image, jnp.eye(2), jnp.array([1.0, 0.0]))
    >>> bool((moved[:2] == image[1:]).all())
    True
  """
  height, width, _ = image.shape
  rows = jnp.arange(height)[:, None] - (height - 1) / 2
  columns = jnp.arange(width) - (width - 1) / 2
  # No matrix product: on accelerators that would round coordinates to bfloat16.
  source = [
      m[0] * rows + m[1] * columns + o + (size - 1) / 2
      for m, o, size in zip(matrix, offset, (height, width))
  ]
  channel_fn = lambda x: ndimage.map_coordinates(x, source, order=1)
  return jax.vmap(channel_fn, in_axes=-1, out_axes=-1)(image)


def crop(image: jax.Array, start: jax.Array, size: jax.Array) -> jax.Array:
  """Enlarges a part of an image to the whole, bilinearly.

  Args:
    image: [H, W, C].
    start: [2], the upper and the left edge of the part, in pixels.
    size: [2], its height and width.
  """
  scale = jnp.array(image.shape[:2]) / size
  return jax.image.scale_and_translate(
      image,
      image.shape,
      (0, 1),
      scale,
      -start * scale,
      method='linear',
      precision=jax.lax.Precision.HIGHEST,
  )


def blend(
    first: jax.Array, second: jax.Array, factor: jax.Array | float
) -> jax.Array:
  """The line through two images: 0 is the first, 1 the second, 2 beyond it."""
  return jnp.clip(first + factor * (second - first), 0, 1)


def grey(image: jax.Array) -> jax.Array:
  """An image without its colours; one of a single channel as it is."""
  if image.shape[-1] != len(LUMA):
    return jnp.broadcast_to(image.mean(-1, keepdims=True), image.shape)
  # Not a sum over the last axis, which is ten times slower on a CPU.
  red, green, blue = (share * image[..., c] for c, share in enumerate(LUMA))
  luma = red + green + blue
  return jnp.broadcast_to(luma[..., None], image.shape)


def flat(image: jax.Array) -> jax.Array:
  """An image that is everywhere as bright as this one is on average."""
  return jnp.broadcast_to(grey(image).mean(), image.shape)


def smooth(image: jax.Array) -> jax.Array:
  """Means over 3 x 3 pixels, the middle one five times; not at the edge."""
  height, width, _ = image.shape
  padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)))
  total = sum(
      padded[i : i + height, j : j + width] for i in range(3) for j in range(3)
  )
  rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
  is_edge = (rows == 0) | (rows == height - 1)
  is_edge |= (columns == 0) | (columns == width - 1)
  return jnp.where(is_edge[..., None], image, (total + 4 * image) / 13)


def solarize(image: jax.Array, threshold: jax.Array | float) -> jax.Array:
  """Inverts the pixels of at least `threshold`."""
  return jnp.where(image < threshold, image, 1 - image)


def posterize(image: jax.Array, num_bits: jax.Array | int) -> jax.Array:
  """Keeps the first bits of every level; 8 of them are all."""
  step = 2 ** (8 - jnp.asarray(num_bits, jnp.int32))
  return (_levels(image) // step * step) / (NUM_LEVELS - 1)


def autocontrast(image: jax.Array) -> jax.Array:
  """Stretches every channel to 0..1; one that is constant stays."""
  low = image.min((0, 1), keepdims=True)
  span = image.max((0, 1), keepdims=True) - low
  is_flat = span < 1 / NUM_LEVELS
  return jnp.where(is_flat, image, (image - low) / jnp.where(is_flat, 1, span))


def equalize(image: jax.Array) -> jax.Array:
  """Spreads the levels of every channel so that all are as frequent.

  level <- (step // 2 + number of pixels below it) // step

  where step is a 255th of the number of pixels below the highest level. A
  channel of one level, or of too few pixels, stays.
  """
  num_channels, top = image.shape[-1], NUM_LEVELS - 1
  level = _levels(image).reshape(-1, num_channels)
  count = jnp.zeros((NUM_LEVELS, num_channels), jnp.int32)
  count = count.at[level, jnp.arange(num_channels)].add(1)
  below = jnp.cumsum(count, 0) - count
  step = jnp.take_along_axis(below, level.max(0)[None], 0) // top
  table = (step // 2 + below) // jnp.maximum(step, 1)
  table = (jnp.minimum(table, top) / top).astype(image.dtype)
  spread = jnp.take_along_axis(table, level, 0).reshape(image.shape)
  return jnp.where(step == 0, image, spread)


def _levels(image):
  levels = jnp.round(image * (NUM_LEVELS - 1)).astype(jnp.int32)
  return jnp.clip(levels, 0, NUM_LEVELS - 1)
