"""Train-time augmentation in JAX, with strengths that may be traced.

  image = augment.affine(key, image, strength=0.5)
  image, target = augment.mixup(key, image, target, strength=0.2)

Every strength may be an array, so that a sweep over strengths runs under
`jax.vmap`; at strength 0 an image comes back as it was.
"""

import jax
import jax.numpy as jnp
from jax.scipy import ndimage


def affine(
    key: jax.Array,
    image: jax.Array,
    strength: jax.Array | float,
    *,
    max_shift: float = 2.0,
    max_angle: float = 0.5,
    max_log_scale: float = 0.3,
) -> jax.Array:
  """Shifts, rotates and scales every image at random, each by its own draw.

  Args:
    key: jax key.
    image: [B, H, W, C].
    strength: scalar; multiplies the three limits.
    max_shift: largest shift along either axis, in pixels.
    max_angle: largest rotation either way, in radians.
    max_log_scale: largest log of the magnification either way.

  Returns:
    [B, H, W, C]; zero where the image did not reach.

  Example:
    >>> image = jnp.ones((2, 8, 8, 1))
    >>> affine(jax.random.key(0), image, strength=1.0).shape
    (2, 8, 8, 1)
  """
  draws = jax.random.uniform(key, (len(image), 4), minval=-1.0, maxval=1.0)
  limits = jnp.array([max_shift, max_shift, max_angle, max_log_scale])
  draws = draws * limits * strength
  return jax.vmap(warp)(image, draws[:, :2], draws[:, 2], draws[:, 3])


def warp(
    image: jax.Array,
    shift: jax.Array,
    angle: jax.Array | float,
    log_scale: jax.Array | float,
) -> jax.Array:
  """Shifts, rotates and scales one image about its centre, bilinearly.

  out(p) = image(R(angle) (p - centre - shift) / scale + centre)

  Args:
    image: [H, W, C].
    shift: [2], rows and columns, in pixels.
    angle: radians.
    log_scale: log of the magnification.

  Returns:
    [H, W, C]; zero where the image did not reach.

  Example:
    >>> image = jnp.eye(4)[..., None]
    >>> moved = warp(image, jnp.array([0.0, 1.0]), 0.0, 0.0)
    >>> bool(jnp.allclose(moved[:, 1:], image[:, :-1]))
    True
  """
  height, width, _ = image.shape
  centre = jnp.array([height - 1, width - 1])[:, None] / 2
  grid = jnp.indices((height, width)).reshape(2, -1)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  rotation = jnp.array([[cos, -sin], [sin, cos]]) * jnp.exp(-log_scale)
  source = rotation @ (grid - centre - shift[:, None]) + centre

  def channel_fn(channel):
    return ndimage.map_coordinates(channel, list(source), order=1)

  out = jax.vmap(channel_fn, in_axes=-1, out_axes=-1)(image)
  return out.reshape(image.shape)


def noise(
    key: jax.Array, image: jax.Array, strength: jax.Array | float
) -> jax.Array:
  """Adds Gaussian noise of standard deviation `strength`.

  Args:
    key: jax key.
    image: [B, H, W, C].
    strength: scalar, in units of the pixels.

  Returns:
    [B, H, W, C].
  """
  return image + strength * jax.random.normal(key, image.shape)


def mixup(
    key: jax.Array,
    image: jax.Array,
    target: jax.Array,
    strength: jax.Array | float,
) -> tuple[jax.Array, jax.Array]:
  """Mixes every example with another one of the batch.

  x_i <- (1 - s_i) x_i + s_i x_j,  s_i ~ Uniform(0, strength / 2)

  The share is uniform rather than from a Beta distribution, which has no
  sampler of fixed length: a traced strength would cost a loop in every step.

  Args:
    key: jax key.
    image: [B, H, W, C].
    target: [B, num_classes], probabilities.
    strength: scalar in 0..1.

  Returns:
    The mixed images and targets.

  Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.
  """
  order_key, share_key = jax.random.split(key)
  order = jax.random.permutation(order_key, len(image))
  share = jax.random.uniform(share_key, (len(image),)) * strength / 2

  def mix_fn(x):
    s = share.reshape((-1,) + (1,) * (x.ndim - 1))
    return (1 - s) * x + s * x[order]

  return mix_fn(image), mix_fn(target)
