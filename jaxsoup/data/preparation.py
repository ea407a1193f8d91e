"""Images as a pre-trained model expects them: size, channels and units.

```
image = preparation.prepare(image, (56, 56, 3))  # [N, 28, 28, 1] in 0..1
```

It may be part of a model, after augmentation and on the device, or run once
over the data.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Of the pixels of ImageNet in 0..1: red, green, blue.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# What AugReg, BiT and EfficientNet-Lite take instead: pixels in -1..1.
HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def prepare(
    image: jax.Array,
    image_shape: Sequence[int],
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    method: str = 'bicubic',
) -> jax.Array:
  """Resizes images, gives them channels, and standardizes them.

  `out = (clip(resize(image), 0, 1) - mean) / std`

  Smaller images are antialiased, as by PIL; the sides are scaled each by its
  own factor. A grey image is the same in each channel. A model of patches wants
  sides that its patch divides: for 14, 28 pixels become 42, 56 or 70.

  Args:
    image: [N, H, W, C] in 0..1.
    image_shape: height, width and channels of what comes back.
    mean: of the channels of what the model was trained on; or one number.
    std: of them, as well.
    method: of `jax.image.resize`.

  Returns:
    float32 `[N, *image_shape]`.

  Raises:
    ValueError: the images have neither one channel nor those of image_shape.

  Example:
    >>> prepare(jnp.ones((2, 28, 28, 1)), (42, 42, 3)).shape
    (2, 42, 42, 3)
  """
  height, width, num_channels = image_shape
  if image.shape[-1] not in (1, num_channels):
    raise ValueError(
        f'Images have {image.shape[-1]} channels, but image_shape asks for '
        f'{num_channels}: expected {num_channels} or 1.'
    )
  shape = (len(image), height, width, image.shape[-1])
  image = jnp.asarray(image, jnp.float32)
  if image.shape != shape:
    # Bicubic weights are negative, too: they reach beyond black and white.
    image = jnp.clip(jax.image.resize(image, shape, method), 0, 1)
  image = (image - jnp.asarray(mean)) / jnp.asarray(std)
  return jnp.broadcast_to(image, (len(image), *image_shape))
