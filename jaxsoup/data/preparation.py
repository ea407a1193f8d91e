"""Images as a pre-trained model expects them: size, channels and units.

```
spec = preparation.ImageSpec(42, preparation.HALF, preparation.HALF)
image = spec.prepare(image)  # [N, 28, 28, 1], uint8 or in 0..1
```

Files are resized and cropped on the host, and stay uint8 until they are on the
device; see `imagenet.evaluated`. What is left the model does, after
augmentation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Of the pixels of ImageNet in 0..1: red, green, blue.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# What AugReg, BiT and EfficientNet-Lite take instead: pixels in -1..1.
HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageSpec(NamedTuple):
  """The images that a model expects.

  Attributes:
    size: height, width and channels; or one number for `(size, size, 3)`. A
      model of patches wants sides that its patch divides: for 14, 28 pixels
      become 42, 56 or 70.
    mean: of each channel, in 0..1, of what the model was trained on.
    std: of each channel.
    crop: share of the shorter side that an evaluation sees of a file.
    interpolation: 'bicubic' or 'bilinear', of PIL and of `jax.image.resize`.
    dtype: of the images as the data deliver them: 'uint8', or 'float32' for
      those in 0..1.
  """

  size: int | tuple[int, int, int] = 224
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD
  crop: float = 0.875
  interpolation: str = 'bicubic'
  dtype: str = 'uint8'

  @property
  def shape(self) -> tuple[int, int, int]:
    """Height, width and channels."""
    if isinstance(self.size, int):
      return self.size, self.size, 3
    height, width, num_channels = self.size
    return height, width, num_channels

  def prepare(self, image: jax.Array) -> jax.Array:
    """Resizes images, gives them channels, and standardizes them.

    `out = (clip(resize(image), 0, 1) - mean) / std`

    Smaller images are antialiased, as by PIL; the sides are scaled each by its
    own factor. A grey image is the same in each channel.

    Args:
      image: [N, H, W, C], uint8, or floats in 0..1.

    Returns:
      float32 `[N, *shape]`.

    Raises:
      ValueError: the images have neither one channel nor those of the model.

    Example:
      >>> ImageSpec(42).prepare(jnp.ones((2, 28, 28, 1))).shape
      (2, 42, 42, 3)
    """
    height, width, num_channels = self.shape
    if image.shape[-1] not in (1, num_channels):
      raise ValueError(
          f'Images have {image.shape[-1]} channels, but the model takes '
          f'{num_channels}: expected {num_channels} or 1.'
      )
    lengths = len(self.mean), len(self.std)
    if not {*lengths} <= {1, num_channels}:
      raise ValueError(
          f'mean and std have {lengths[0]} and {lengths[1]} numbers, but the '
          f'model takes {num_channels} channels: expected a number for each.'
      )
    shape = (len(image), height, width, image.shape[-1])
    image = jnp.asarray(in_unit_range(image), jnp.float32)
    if image.shape != shape:
      # Bicubic weights are negative, too: they reach beyond black and white.
      image = jax.image.resize(image, shape, self.interpolation).clip(0, 1)
    image = (image - jnp.asarray(self.mean)) / jnp.asarray(self.std)
    return jnp.broadcast_to(image, (*shape[:3], num_channels))


def in_unit_range(image: jax.Array) -> jax.Array:
  """uint8 images as float32 in 0..1; others as they are.

  Example:
    >>> in_unit_range(jnp.array([0, 51, 255], jnp.uint8))
    Array([0. , 0.2, 1. ], dtype=float32)
  """
  if image.dtype != jnp.uint8:
    return image
  return jnp.asarray(image, jnp.float32) / 255
