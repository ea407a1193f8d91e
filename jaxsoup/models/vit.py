"""A vision transformer in Flax nnx.

model = vit.ViT((8, 8, 1), num_classes=10, patch_size=2, rngs=nnx.Rngs(0))
logits = model(image)  # [B, 8, 8, 1] -> [B, 10]
"""

from flax import nnx
import jax
import jax.numpy as jnp

from jaxsoup.models import _transformer


class ViT(_transformer.Stack):
  """A vision transformer for classification.

  patches -> linear embedding + position -> blocks -> LN -> pool -> linear head

  Args:
    image_shape: (H, W, C) of one image; `patch_size` divides H and W.
    num_classes: number of logits.
    patch_size: side of a square patch, in pixels.
    width: size of a token.
    depth: number of blocks.
    num_heads: number of attention heads; divides `width`.
    mlp_width: size of the hidden layers, `4 * width` if not given.
    has_cls_token: pools by a class token if true, else by the mean over
      tokens (GAP).
    dtype: name of the dtype of the computation, such as 'bfloat16'; None takes
      that of the parameters, which are float32. Logits are float32.
    is_scanned: stores all blocks as one, `blocks`, with leaves [depth, ...],
      and scans over them: compiles in the time of one block.
    is_rematerialized: keeps of each block only its input, and computes the rest
      again in the backward pass.
    batch_axis: name of the axis of the mesh set by `jax.set_mesh` over which
      batches lie. Parameters that are sharded over it too (`sharding.fsdp`) are
      then gathered block by block. Left to itself the compiler keeps them
      apart, and reduces activations of the whole batch over all devices.
    rngs: source of the initial parameters.

  Example:
    >>> model = ViT((8, 8, 1), num_classes=10, patch_size=4, rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 8, 8, 1))).shape
    (2, 10)

  Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021.
  """

  def __init__(
      self,
      image_shape: tuple[int, int, int],
      num_classes: int,
      *,
      patch_size: int,
      width: int = 64,
      depth: int = 4,
      num_heads: int = 4,
      mlp_width: int | None = None,
      has_cls_token: bool = False,
      dtype: str | None = None,
      is_scanned: bool = False,
      is_rematerialized: bool = False,
      batch_axis: str | None = None,
      rngs: nnx.Rngs,
  ):
    height, image_width, channels = image_shape
    if height % patch_size or image_width % patch_size:
      raise ValueError(
          f'patch_size {patch_size} does not divide the image, '
          f'{height} x {image_width}: choose a divisor of both sides.'
      )
    num_tokens = (height // patch_size) * (image_width // patch_size)
    self.patch_size, self.has_cls_token = patch_size, has_cls_token
    dtype_ = _transformer.as_dtype(dtype)
    self.embed = nnx.Linear(
        patch_size**2 * channels, width, dtype=dtype_, rngs=rngs
    )
    normal = nnx.initializers.normal(0.02)
    self.position = nnx.Param(normal(rngs.params(), (num_tokens, width)))
    if has_cls_token:
      self.cls_token = nnx.Param(jnp.zeros((1, width)))
    self.add_blocks(
        lambda rngs: _transformer.Block(
            width, mlp_width or 4 * width, num_heads, dtype=dtype_, rngs=rngs
        ),
        depth,
        is_scanned=is_scanned,
        is_rematerialized=is_rematerialized,
        batch_axis=batch_axis,
        rngs=rngs,
    )
    self.norm = nnx.LayerNorm(width, epsilon=1e-6, dtype=dtype_, rngs=rngs)
    self.head = nnx.Linear(width, num_classes, rngs=rngs)

  def features(self, image: jax.Array) -> jax.Array:
    """Returns what the head sees, [B, width], for images [B, H, W, C]."""
    embed = self.gathered(*nnx.split(self.embed))
    x = self.on_batch_axis(embed(patchify(image, self.patch_size)))
    x = x + self.position[...].astype(x.dtype)
    if self.has_cls_token:
      cls_token = jnp.broadcast_to(
          self.cls_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1])
      )
      x = jnp.concatenate([cls_token, x], axis=1)
    x = self.norm(self.through_blocks(x))
    return x[:, 0] if self.has_cls_token else x.mean(axis=1)

  def __call__(self, image: jax.Array) -> jax.Array:
    """Returns logits, [B, num_classes], for images [B, H, W, C]."""
    head = self.gathered(*nnx.split(self.head))
    return self.on_batch_axis(head(self.features(image)))


def patchify(image: jax.Array, patch_size: int) -> jax.Array:
  """Cuts images into flattened patches, row by row.

  Args:
    image: [B, H, W, C].
    patch_size: P, which divides H and W.

  Returns:
    [B, (H / P) * (W / P), P * P * C].

  Example:
    >>> patchify(jnp.zeros((2, 8, 8, 3)), 4).shape
    (2, 4, 48)
  """
  batch, height, width, channels = image.shape
  rows, columns = height // patch_size, width // patch_size
  x = image.reshape(batch, rows, patch_size, columns, patch_size, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, rows * columns, patch_size**2 * channels)
