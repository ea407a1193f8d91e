"""What the transformers share: pre-LN blocks, and stacks of any blocks.

```
class Encoder(_transformer.Stack):
  def __init__(self, ..., *, rngs):
    make_block = lambda rngs: _transformer.Block(64, 256, 4, rngs=rngs)
    self.add_blocks(make_block, depth, is_rematerialized=True, rngs=rngs)

  def __call__(self, x):
    return self.through_blocks(x)
```
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxsoup.typing import DType

Activation = Callable[[jax.Array], jax.Array]


def gelu(x: jax.Array) -> jax.Array:
  """`x Phi(x)`, exact: not the approximation by tanh."""
  return nnx.gelu(x, approximate=False)


# Functions of ours, because JAX's own cannot be pickled with a model.
def relu(x: jax.Array) -> jax.Array:
  """`max(x, 0)`."""
  return nnx.relu(x)


def relu6(x: jax.Array) -> jax.Array:
  """`min(max(x, 0), 6)`."""
  return nnx.relu6(x)


def silu(x: jax.Array) -> jax.Array:
  """`x sigmoid(x)`."""
  return nnx.silu(x)


def quick_gelu(x: jax.Array) -> jax.Array:
  """`x sigmoid(1.702 x)`, of the first CLIP."""
  return x * jax.nn.sigmoid(1.702 * x)


def attention(
    width: int, num_heads: int, dtype: DType | None, rngs: nnx.Rngs
) -> nnx.MultiHeadAttention:
  """Attention with as wide an output as its input."""
  return nnx.MultiHeadAttention(
      num_heads=num_heads,
      in_features=width,
      decode=False,
      dtype=dtype,
      rngs=rngs,
  )


class Mlp(nnx.Module):
  """Two dense layers with an activation between them.

  f(x W_in) W_out,  or gated  (f(x W_gate) * x W_in) W_out

  Source: Shazeer 2020, "GLU variants improve transformer".
  """

  def __init__(
      self,
      width: int,
      mlp_width: int,
      *,
      activation: Activation = gelu,
      is_gated: bool = False,
      use_bias: bool = True,
      dtype: DType | None = None,
      rngs: nnx.Rngs,
  ):
    self.activation, self.is_gated = activation, is_gated
    dense = functools.partial(
        nnx.Linear, use_bias=use_bias, dtype=dtype, rngs=rngs
    )
    if is_gated:
      self.dense_gate = dense(width, mlp_width)
    self.dense_in = dense(width, mlp_width)
    self.dense_out = dense(mlp_width, width)

  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = self.dense_in(x)
    if self.is_gated:
      hidden = self.activation(self.dense_gate(x)) * hidden
    else:
      hidden = self.activation(hidden)
    return self.dense_out(hidden)


class Block(nnx.Module):
  """One pre-LN transformer block.

  `y = x + s_1 Attention(LN(x)),  out = y + s_2 MLP(LN(y))`

  The scales s_1 and s_2 are learned vectors (LayerScale), or 1; a gated MLP is
  a SwiGLU.
  """

  def __init__(
      self,
      width: int,
      mlp_width: int,
      num_heads: int,
      *,
      epsilon: float = 1e-6,
      activation: Activation = gelu,
      has_layer_scale: bool = False,
      is_gated: bool = False,
      dtype: DType | None = None,
      rngs: nnx.Rngs,
  ):
    self.has_layer_scale = has_layer_scale
    norm = lambda: nnx.LayerNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)
    self.norm_attention = norm()
    self.attention = attention(width, num_heads, dtype, rngs)
    self.norm_mlp = norm()
    self.mlp = Mlp(
        width,
        mlp_width,
        activation=silu if is_gated else activation,
        is_gated=is_gated,
        dtype=dtype,
        rngs=rngs,
    )
    if has_layer_scale:
      self.scale_attention = nnx.Param(jnp.full(width, 1e-5))
      self.scale_mlp = nnx.Param(jnp.full(width, 1e-5))

  def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Returns tokens, [B, T, width]; mask is [B or 1, 1, T, T], True sees."""
    y = self.attention(self.norm_attention(x), mask=mask)
    if self.has_layer_scale:
      y = y * self.scale_attention[...].astype(y.dtype)
    x = x + y
    y = self.mlp(self.norm_mlp(x))
    if self.has_layer_scale:
      y = y * self.scale_mlp[...].astype(y.dtype)
    return x + y


class Stack(nnx.Module):
  """A module with blocks `block_0`, `block_1`..., or all stacked as `blocks`.

  `ViT` says what the attributes mean.
  """

  def add_blocks(
      self,
      make_block: Callable[[nnx.Rngs], nnx.Module],
      depth: int,
      *,
      is_scanned: bool = False,
      is_rematerialized: bool = False,
      batch_axis: str | None = None,
      rngs: nnx.Rngs,
  ) -> None:
    """Makes the blocks; called once, by the constructor."""
    self.depth, self.batch_axis = depth, batch_axis
    self.is_scanned, self.is_rematerialized = is_scanned, is_rematerialized
    if is_scanned:
      self.blocks = _stacked(make_block, jax.random.split(rngs.params(), depth))
    else:
      # Attributes rather than a list: the keys of the parameters are strings,
      # and a list of modules is spelled differently from release to release.
      for i in range(depth):
        setattr(self, f'block_{i}', make_block(rngs))

  def through_blocks(
      self, x: jax.Array, *others: jax.Array | None
  ) -> jax.Array:
    """`block_i(x, *others)`, one block after another."""
    names = [f'block_{i}' for i in range(self.depth)]
    if self.is_scanned:
      names = ['blocks']
    split = [nnx.split(getattr(self, name)) for name in names]
    graphdef = split[0][0]

    def block_fn(x, state):
      block = self.gathered(graphdef, state)
      return self.on_batch_axis(block(self.on_batch_axis(x), *others)), None

    if self.is_rematerialized:
      # In a scan nothing can be merged with what the forward pass computed.
      block_fn = jax.checkpoint(block_fn, prevent_cse=not self.is_scanned)
    for _, state in split:
      if self.is_scanned:
        x, _ = jax.lax.scan(block_fn, x, state)
      else:
        x, _ = block_fn(x, state)
    return x

  def gathered(self, graphdef, state):
    """A module whose parameters are whole on every device."""
    if self.batch_axis is not None:
      state = jax.lax.with_sharding_constraint(state, PartitionSpec())
    return nnx.merge(graphdef, state)

  def on_batch_axis(self, x: jax.Array) -> jax.Array:
    """Shards the first axis of activations over the devices."""
    if self.batch_axis is None:
      return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(self.batch_axis))


def _stacked(
    make_block: Callable[[nnx.Rngs], nnx.Module], keys: jax.Array
) -> Any:
  """One block with leaves [depth, ...], traced once."""
  split = lambda key: nnx.split(make_block(nnx.Rngs(key)), nnx.Param)
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_block(nnx.Rngs(0))))
  return nnx.merge(graphdef, jax.vmap(lambda key: split(key)[1])(keys))


def over_keys(mask: jax.Array | None) -> jax.Array | None:
  """A mask of tokens [B, T] as one of attention, [B, 1, 1, T]."""
  return None if mask is None else mask[:, None, None, :].astype(bool)


def as_dtype(name: str | None) -> Any:
  """A dtype by its name; None stays None."""
  return None if name is None else jnp.dtype(name)
