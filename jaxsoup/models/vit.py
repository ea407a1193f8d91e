"""A vision transformer in Flax nnx, and the names of its weights elsewhere.

```
model = vit.ViT((8, 8, 1), num_classes=10, patch_size=2, rngs=nnx.Rngs(0))
logits = model(image)  # [B, 8, 8, 1] -> [B, 10]
```
"""

from collections.abc import Sequence
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup.models import _transformer
from jaxsoup.models._vit_names import SIZES
from jaxsoup.models._vit_names import TABLES as TABLES
from jaxsoup.models._vit_names import arguments as arguments
from jaxsoup.typing import Config
from jaxsoup.typing import DType

_ACTIVATIONS = {
    'gelu': _transformer.gelu,
    # That of Flax and of models trained in it: by tanh.
    'gelu_tanh': nnx.gelu,
    'quick_gelu': _transformer.quick_gelu,
}
_POOLS = 'cls', 'mean', 'map', 'cls+mean'


def activation_fn(name: str) -> _transformer.Activation:
  """An activation by its name: 'gelu', 'gelu_tanh' or 'quick_gelu'."""
  if name not in _ACTIVATIONS:
    raise ValueError(
        f'Unknown activation {name!r}: choose from {list(_ACTIVATIONS)}.'
    )
  return _ACTIVATIONS[name]


def size(name: str) -> dict[str, int]:
  """Arguments of `ViT` by the name of a size.

  Args:
    name: 'Ti', 'S', 'B', 'L', 'So400m', 'H', 'g' or 'G'.

  Returns:
    `width`, `depth`, `num_heads` and `mlp_width`.

  Raises:
    ValueError: there is no such size.

  Example:
    >>> size('B')
    {'width': 768, 'depth': 12, 'num_heads': 12, 'mlp_width': 3072}

  Source: Zhai et al., "Scaling vision transformers", CVPR 2022, Table 2; So400m
  is of Alabdulmohsin et al., "Getting ViT in shape", NeurIPS 2023.
  """
  if name not in SIZES:
    raise ValueError(f'Unknown size {name!r}: choose from {list(SIZES)}.')
  return dict(zip(('width', 'depth', 'num_heads', 'mlp_width'), SIZES[name]))


class _MapHead(nnx.Module):
  """Pools by attention of a learned probe.

  `y = Attention(probe, x, x),  out = y + MLP(LN(y))`

  Source: Zhai et al., "Scaling vision transformers", CVPR 2022, Section 3.2;
  Lee et al., "Set transformer", ICML 2019.
  """

  def __init__(
      self,
      width: int,
      mlp_width: int,
      num_heads: int,
      *,
      epsilon: float,
      activation: _transformer.Activation,
      dtype: DType | None,
      rngs: nnx.Rngs,
  ):
    normal = nnx.initializers.normal(width**-0.5)
    self.probe = nnx.Param(normal(rngs.params(), (1, width)))
    self.attention = _transformer.attention(width, num_heads, dtype, rngs)
    self.norm = nnx.LayerNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)
    self.mlp = _transformer.Mlp(
        width, mlp_width, activation=activation, dtype=dtype, rngs=rngs
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns one token, [B, width], for tokens [B, T, width]."""
    y = self.attention(repeated(self.probe[...], x), x)
    return (y + self.mlp(self.norm(y)))[:, 0]


class ViT(_transformer.Stack):
  """A vision transformer for classification.

  ```
  patches -> linear embedding + position -> blocks -> LN -> pool -> linear head
  ```

  Args:
    image_shape: (H, W, C) of one image; `patch_size` divides H and W.
    num_classes: number of logits; 0 for features in their place.
    patch_size: side of a square patch, in pixels.
    width: size of a token.
    depth: number of blocks.
    num_heads: number of attention heads; divides `width`.
    mlp_width: size of the hidden layers, `4 * width` if not given.
    has_cls_token: whether a class token precedes the patches.
    has_cls_position: whether the class token has a position too.
    pool: 'cls', the class token; 'mean' over the patches (GAP); 'map', by
      attention of a learned probe; 'cls+mean', both side by side, [B, 2 width].
      If not given, 'cls' where there is a class token, else 'mean'.
    is_pooled_first: whether the last LayerNorm comes after the pool.
    has_layer_scale: whether learned vectors scale the branches of the blocks.
    is_gated: whether the MLPs of the blocks are SwiGLUs.
    activation: of the other MLPs: 'gelu', 'gelu_tanh' or 'quick_gelu'.
    epsilon: of the LayerNorms.
    dtype: name of the dtype of the computation, such as 'bfloat16'; None takes
      that of the parameters, which are float32. Logits are float32.
    is_scanned: stores all blocks as one, `blocks`, with leaves [depth, ...],
      and scans over them: compiles in the time of one block.
    is_rematerialized: keeps of each block only its input, and computes the rest
      again in the backward pass.
    batch_axis: name of the axis of the mesh set by `jax.set_mesh` over which
      batches are sharded. Parameters that are sharded over it too
      (`sharding.fsdp`) are then gathered block by block. Without it the
      compiler keeps them sharded, and reduces activations of the whole batch
      over all devices.
    rngs: source of the initial parameters.

  Raises:
    ValueError: `patch_size` does not divide the image; `activation` or `pool`
      is unknown; or `pool` needs a class token that is not there.

  Example:
    >>> model = ViT((8, 8, 1), num_classes=10, patch_size=4, rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 8, 8, 1))).shape
    (2, 10)

  Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021;
  LayerScale and SwiGLU as in Oquab et al., "DINOv2", TMLR 2024.
  """

  def __init__(
      self,
      image_shape: Sequence[int],
      num_classes: int,
      *,
      patch_size: int,
      width: int = 64,
      depth: int = 4,
      num_heads: int = 4,
      mlp_width: int | None = None,
      has_cls_token: bool = False,
      has_cls_position: bool = True,
      pool: str | None = None,
      is_pooled_first: bool = False,
      has_layer_scale: bool = False,
      is_gated: bool = False,
      activation: str = 'gelu',
      epsilon: float = 1e-6,
      dtype: str | None = None,
      is_scanned: bool = False,
      is_rematerialized: bool = False,
      batch_axis: str | None = None,
      rngs: nnx.Rngs,
  ):
    num_tokens = math.prod(grid(image_shape, patch_size))
    self.patch_size, self.has_cls_token = patch_size, has_cls_token
    self.pool = _pool(pool, has_cls_token)
    self.is_pooled_first = is_pooled_first
    self.has_cls_position = has_cls_token and has_cls_position
    mlp_width = mlp_width or 4 * width
    shared = dict(dtype=_transformer.as_dtype(dtype), epsilon=epsilon)
    mlp = dict(shared, activation=activation_fn(activation))
    self.embed = nnx.Linear(
        patch_size**2 * image_shape[2],
        width,
        dtype=_transformer.as_dtype(dtype),
        rngs=rngs,
    )
    normal = nnx.initializers.normal(0.02)
    num_rows = num_tokens + self.has_cls_position
    self.position = nnx.Param(normal(rngs.params(), (num_rows, width)))
    if has_cls_token:
      self.cls_token = nnx.Param(jnp.zeros((1, width)))
    self.add_blocks(
        lambda rngs: _transformer.Block(
            width,
            mlp_width,
            num_heads,
            has_layer_scale=has_layer_scale,
            is_gated=is_gated,
            rngs=rngs,
            **mlp,
        ),
        depth,
        is_scanned=is_scanned,
        is_rematerialized=is_rematerialized,
        batch_axis=batch_axis,
        rngs=rngs,
    )
    self.norm = nnx.LayerNorm(width, rngs=rngs, **shared)
    if self.pool == 'map':
      self.map_head = _MapHead(width, mlp_width, num_heads, rngs=rngs, **mlp)
    self.num_classes = num_classes
    if num_classes:
      num_features = 2 * width if self.pool == 'cls+mean' else width
      self.head = nnx.Linear(num_features, num_classes, rngs=rngs)

  def features(self, image: jax.Array) -> jax.Array:
    """Returns what the head sees, [B, width], for images [B, H, W, C]."""
    if self.is_pooled_first:
      return self.norm(self.pooled(self.tokens(image)))
    return self.pooled(self.norm(self.tokens(image)))

  def tokens(self, image: jax.Array) -> jax.Array:
    """Returns what the blocks give, [B, T, width], for images [B, H, W, C]."""
    embed = self.gathered(*nnx.split(self.embed))
    x = self.on_batch_axis(embed(patchify(image, self.patch_size)))
    position = self.position[...].astype(x.dtype)
    if not self.has_cls_position:
      x = x + position
    if self.has_cls_token:
      x = jnp.concatenate([repeated(self.cls_token[...], x), x], axis=1)
    if self.has_cls_position:
      x = x + position
    return self.through_blocks(x)

  def pooled(self, x: jax.Array) -> jax.Array:
    """Returns one vector for each image, [B, width], for tokens."""
    patches = x[:, 1:] if self.has_cls_token else x
    if self.pool == 'cls':
      return x[:, 0]
    if self.pool == 'mean':
      return patches.mean(axis=1)
    if self.pool == 'map':
      return self.gathered(*nnx.split(self.map_head))(patches)
    return jnp.concatenate([x[:, 0], patches.mean(axis=1)], axis=-1)

  def __call__(self, image: jax.Array) -> jax.Array:
    """Returns logits, [B, num_classes], for images [B, H, W, C]."""
    features = self.features(image)
    if not self.num_classes:
      return features
    head = self.gathered(*nnx.split(self.head))
    return self.on_batch_axis(head(features))


def _pool(pool: str | None, has_cls_token: bool) -> str:
  pool = pool or ('cls' if has_cls_token else 'mean')
  if pool not in _POOLS:
    raise ValueError(f'Unknown pool {pool!r}: choose from {_POOLS}.')
  if 'cls' in pool and not has_cls_token:
    raise ValueError(f'pool={pool!r} needs has_cls_token=True.')
  return pool


def repeated(token: jax.Array, x: jax.Array) -> jax.Array:
  """One token [1, width] for each image of x, [B, 1, width]."""
  return jnp.broadcast_to(token.astype(x.dtype), (len(x), 1, x.shape[-1]))


def grid(image_shape: Sequence[int], patch_size: int) -> tuple[int, int]:
  """Rows and columns of patches of an image, (H, W) or (H, W, C).

  Example:
    >>> grid((32, 48, 3), 16)
    (2, 3)
  """
  height, width = image_shape[:2]
  if height % patch_size or width % patch_size:
    raise ValueError(
        f'patch_size {patch_size} does not divide the image, '
        f'{height} x {width}: choose a divisor of both sides.'
    )
  return height // patch_size, width // patch_size


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


# --- Other resolutions --------------------------------------------------------


def interpolate_position(
    position: np.ndarray,
    shape: tuple[int, int],
    new_shape: tuple[int, int],
    num_prefix: int = 0,
) -> np.ndarray:
  """Position embeddings of another grid of patches, by bicubic interpolation.

  Corners are not aligned, edges are repeated, and nothing is smoothed when the
  grid shrinks: as PyTorch does by default, and DINOv2 with it.

  Args:
    position: [num_prefix + rows * columns, width].
    shape: rows and columns of patches.
    new_shape: those wanted.
    num_prefix: how many rows come first that belong to no patch, and stay.

  Returns:
    [num_prefix + new rows * new columns, width], in the dtype of `position`.

  Raises:
    ValueError: `position` has not that many rows.

  Example:
    >>> interpolate_position(np.ones((1 + 4, 8)), (2, 2), (3, 4), 1).shape
    (13, 8)

  Source: Keys, "Cubic convolution interpolation", 1981, with a = -0.75;
  Dosovitskiy et al., ICLR 2021, Section 3.2.
  """
  if len(position) != num_prefix + math.prod(shape):
    raise ValueError(
        f'position has {len(position)} rows, expected {num_prefix} + '
        f'{shape[0]} * {shape[1]}: give the grid of its patches.'
    )
  position = np.asarray(position)
  prefix, patches = position[:num_prefix], position[num_prefix:]
  patches = np.einsum(
      'ir,jc,rcd->ijd',
      _bicubic(shape[0], new_shape[0]),
      _bicubic(shape[1], new_shape[1]),
      patches.reshape(*shape, -1).astype(np.float64),
  ).reshape(math.prod(new_shape), -1)
  return np.concatenate([prefix, patches.astype(position.dtype)])


def _bicubic(num: int, new_num: int) -> np.ndarray:
  """Each new point as a mean of old ones, [new_num, num]."""
  a = -0.75
  weights = np.zeros((new_num, num))
  point = (np.arange(new_num) + 0.5) * num / new_num - 0.5
  for tap in range(-1, 3):
    neighbor = np.floor(point).astype(int) + tap
    d = np.abs(point - neighbor)
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    rows, columns = np.arange(new_num), neighbor.clip(0, num - 1)
    weights[rows, columns] += np.where(d <= 1, near, far)
  return weights


def at_resolution(
    position: Any, arguments: Config, image_shape: Sequence[int]
) -> np.ndarray:
  """The positions of a model for images of another size.

  Args:
    position: [N, width], perhaps with a row of the class token.
    arguments: of the model's constructor.
    image_shape: (H, W, C) wanted.

  Returns:
    [N', width].

  Example:
    >>> arguments = dict(image_shape=(8, 8, 3), patch_size=4, num_classes=0)
    >>> at_resolution(np.zeros((4, 16)), arguments, (8, 12, 3)).shape
    (6, 16)
  """
  patch_size = arguments['patch_size']
  has_row = arguments.get('has_cls_token', False)
  return interpolate_position(
      np.asarray(position),
      grid(arguments['image_shape'], patch_size),
      grid(image_shape, patch_size),
      int(has_row and arguments.get('has_cls_position', True)),
  )
