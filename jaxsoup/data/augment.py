"""Train-time augmentation in JAX, with strengths that may be traced.

```
image = augment.crop(key, image, strength=1.0)
image = augment.rand(key, image, strength=0.5)
image, target = augment.mixup(key, image, target, strength=0.2)
input_ids = augment.token_dropout(
    key, input_ids, 0.1, mask_id=103, special_ids=(0, 101, 102)
)
```

Every strength may be an array, so that a sweep over strengths runs under
`jax.vmap`; at strength 0 an example comes back as it was. Labels are smoothed
by `optax.smooth_labels`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxsoup.data import pixels


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
  return jax.vmap(_turned)(image, draws[:, :2], draws[:, 2], draws[:, 3])


def _turned(
    image: jax.Array, shift: jax.Array, angle: jax.Array, log_scale: jax.Array
) -> jax.Array:
  """`out(p) = image(R(angle) (p - centre - shift) / scale + centre)`."""
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  matrix = jnp.array([[cos, -sin], [sin, cos]]) * jnp.exp(-log_scale)
  return pixels.warp(image, matrix, -(matrix * shift).sum(1))


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


def flip(
    key: jax.Array, image: jax.Array, strength: jax.Array | float
) -> jax.Array:
  """Mirrors images at random, left to right.

  Args:
    key: jax key.
    image: [B, H, W, C].
    strength: the probability; 0.5 is usual.

  Returns:
    [B, H, W, C].
  """
  is_hit = jax.random.uniform(key, (len(image), 1, 1, 1)) < strength
  return jnp.where(is_hit, image[:, :, ::-1], image)


def crop(
    key: jax.Array,
    image: jax.Array,
    strength: jax.Array | float,
    *,
    min_area: float = 0.08,
    max_ratio: float = 4 / 3,
) -> jax.Array:
  """Enlarges a random part of every image to the whole.

  area ~ Uniform(1 - strength (1 - min_area), 1)
  log ratio ~ Uniform(-1, 1) strength log(max_ratio)

  A part that is longer than the image is cut to it, where the original draws
  again: a loop under a traced strength costs as much as its slowest draw.

  Args:
    key: jax key.
    image: [B, H, W, C].
    strength: scalar in 0..1; 1 is the original.
    min_area: the smallest part, as a share of the image.
    max_ratio: the largest ratio of its width to its height, and of its height
      to its width, relative to the image.

  Returns:
    [B, H, W, C].

  Source: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015.
  """
  draws = jax.random.uniform(key, (len(image), 4))
  size = jnp.array(image.shape[1:3])
  area = 1 - strength * (1 - min_area) * draws[:, 0]
  log_ratio = (2 * draws[:, 1] - 1) * strength * jnp.log(max_ratio)
  root = jnp.exp(0.5 * jnp.stack([-log_ratio, log_ratio], 1))
  part = size * jnp.minimum(jnp.sqrt(area)[:, None] * root, 1)
  start = draws[:, 2:] * (size - part)
  return jax.vmap(pixels.crop)(image, start, part)


MOVES = ('rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y')
BLENDS = {
    'color': pixels.grey,
    'contrast': pixels.flat,
    'brightness': pixels.black,
    'sharpness': pixels.smooth,
}
TONES = ('solarize', 'posterize', 'autocontrast', 'equalize')
OPERATIONS = ('identity', *MOVES, *BLENDS, *TONES)


def rand(
    key: jax.Array,
    image: jax.Array,
    strength: jax.Array | float,
    *,
    num_ops: int = 2,
) -> jax.Array:
  """RandAugment: operations drawn from `OPERATIONS`, one after the other.

  Every image draws its own. Rotations reach 30 degrees either way, slants 0.3,
  shifts 0.45 of a side, the four blends a factor of 1 +- 0.9, solarizing
  inverts what lies above 1 - strength, posterizing drops up to 4 bits; the last
  two operations have no strength. Uncovered pixels become grey.

  Args:
    key: jax key.
    image: [B, H, W, C] in 0..1.
    strength: scalar in 0..1: the magnitude M of the paper, of 10.
    num_ops: N of the paper.

  Returns:
    [B, H, W, C].

  Example:
    >>> image = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    >>> rand(jax.random.key(1), image, strength=0.5).shape
    (2, 8, 8, 3)

  Source: Cubuk et al., "RandAugment: Practical automated data augmentation
  with a reduced search space", NeurIPS 2020.
  """
  strength = jnp.asarray(strength, jnp.float32)
  out = jnp.clip(image, 0, 1).astype(jnp.float32)
  op_key, sign_key = jax.random.split(key)
  shape = (num_ops, len(image))
  ops = jax.random.randint(op_key, shape, 0, len(OPERATIONS))
  signs = jax.random.rademacher(sign_key, shape, out.dtype)
  # A scan, so that what comes out of an operation is kept, not computed again.
  out, _ = jax.lax.scan(
      lambda x, drawn: (jax.vmap(operate)(x, *drawn), None),
      out,
      (ops, signs * strength),
  )
  return jnp.where(strength > 0, out.astype(image.dtype), image)


def operate(
    image: jax.Array, op: jax.Array | int, magnitude: jax.Array | float
) -> jax.Array:
  """One operation of RandAugment, of which the number may be traced.

  A switch over traced numbers runs all of its branches. Here the operations
  that move pixels share one warp, and those that blend one blend.

  Args:
    image: [H, W, C] in 0..1.
    op: scalar, an index of `OPERATIONS`.
    magnitude: scalar in -1..1; the sign says left or right, less or more.

  Returns:
    [H, W, C] in 0..1.
  """
  is_op = {name: op == i for i, name in enumerate(OPERATIONS)}
  # Each from the image itself. In a chain XLA would warp again for every pixel
  # that a blend reads, and that was four times slower.
  return jnp.select(
      [_is_any(is_op, MOVES), _is_any(is_op, BLENDS)],
      [_moved(image, is_op, magnitude), _blended(image, is_op, magnitude)],
      _toned(image, is_op, jnp.abs(magnitude)),
  )


def _is_any(is_op, names):
  return jnp.array([is_op[name] for name in names]).any()


def _moved(image, is_op, magnitude):
  angle = jnp.where(is_op['rotate'], jnp.radians(30.0) * magnitude, 0)
  slants = (is_op['shear_y'], is_op['shear_x'])
  shifts = (is_op['translate_y'], is_op['translate_x'])
  slant = jnp.array(slants) * 0.3 * magnitude
  shift = jnp.array(shifts) * 0.45 * magnitude * jnp.array(image.shape[:2])
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  matrix = jnp.array([[cos, slant[0] - sin], [slant[1] + sin, cos]])
  return pixels.warp(image - 0.5, matrix, shift) + 0.5


def _blended(image, is_op, magnitude):
  ends = [end_fn(image) for end_fn in BLENDS.values()]
  end = jnp.select([is_op[name] for name in BLENDS], ends, 0)
  return pixels.blend(end, image, 1 + 0.9 * magnitude)


def _toned(image, is_op, magnitude):
  # At magnitude 0 above every pixel.
  threshold = (1 - magnitude) * pixels.NUM_LEVELS / (pixels.NUM_LEVELS - 1)
  tones = (
      pixels.solarize(image, threshold),
      pixels.posterize(image, 8 - jnp.round(4 * magnitude)),
      pixels.autocontrast(image),
      pixels.equalize(image),
  )
  return jnp.select([is_op[name] for name in TONES], tones, image)


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


def cutmix(
    key: jax.Array,
    image: jax.Array,
    target: jax.Array,
    strength: jax.Array | float,
) -> tuple[jax.Array, jax.Array]:
  """Pastes a box of another image of the batch onto every image.

  The box has the share s_i ~ Uniform(0, strength) of the image's area, its
  shape, and its centre anywhere; what reaches over the edge is lost. The
  target is mixed by the share of pixels that were pasted.

  Args:
    key: jax key.
    image: [B, H, W, C].
    target: [B, num_classes], probabilities.
    strength: scalar in 0..1; 1 is the Beta(1, 1) of the paper.

  Returns:
    The mixed images and targets.

  Source: Yun et al., "CutMix: Regularization Strategy to Train Strong
  Classifiers with Localizable Features", ICCV 2019.
  """
  order_key, share_key, centre_key = jax.random.split(key, 3)
  num, height, width, _ = image.shape
  order = jax.random.permutation(order_key, num)
  share = jax.random.uniform(share_key, (num, 1)) * strength
  centre = jax.random.uniform(centre_key, (num, 2))
  is_pasted = jnp.ones((num, height, width), bool)
  for axis, size in enumerate((height, width)):
    # Pixels are points in 0..1, at the middle of each.
    points = (jnp.arange(size) + 0.5) / size
    is_near = jnp.abs(points - centre[:, axis, None]) < jnp.sqrt(share) / 2
    is_pasted &= jnp.expand_dims(is_near, 2 - axis)
  mixed = jnp.where(is_pasted[..., None], image[order], image)
  pasted = is_pasted.mean((1, 2))[:, None]
  return mixed, (1 - pasted) * target + pasted * target[order]


def token_dropout(
    key: jax.Array,
    input_ids: jax.Array,
    strength: jax.Array | float,
    *,
    mask_id: int,
    special_ids: Sequence[int],
) -> jax.Array:
  """Replaces tokens at random by the one that stands for a hidden token.

  Args:
    key: jax key.
    input_ids: [B, T], integers.
    strength: the probability with which a token is replaced.
    mask_id: what it is replaced by; `text.Tokenizer` knows it.
    special_ids: those that stay: padding, the start and the end of a text.

  Returns:
    [B, T].

  Example:
    >>> input_ids = jnp.array([[101, 2023, 2003, 102, 0]])
    >>> token_dropout(
    ...     jax.random.key(0), input_ids, 1.0, mask_id=103,
    ...     special_ids=(0, 101, 102),
    ... )
    Array([[101, 103, 103, 102,   0]], dtype=int32)
  """
  is_hit = jax.random.uniform(key, input_ids.shape) < strength
  is_hit &= ~jnp.isin(input_ids, jnp.array(special_ids))
  return jnp.where(is_hit, mask_id, input_ids)
