"""What the convolutional networks share."""

import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from jaxsoup.typing import DType


def _standardized(x, kernel, *args, **kwargs):
  """A convolution by a kernel that is standardized for each output.

  w_hat = (w - mean(w)) / sqrt(var(w) + 1e-8), over height, width and inputs

  Source: Qiao et al. 2019, "Micro-batch training with batch-channel
  normalization and weight standardization", equation 5.
  """
  w = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
  w = w - w.mean((0, 1, 2))
  w = w * jax.lax.rsqrt(jnp.square(w).mean((0, 1, 2)) + 1e-8)
  w = w.astype(kernel.dtype)
  return jax.lax.conv_general_dilated(x, w, *args, **kwargs)


def _depthwise(x, kernel, strides, padding, **kwargs):
  """A convolution of each channel alone; on a CPU a sum of shifted images.

  XLA:CPU's own takes 10 to 30 times as long, forward and backward.
  """

  def shifted(x, kernel):
    rows, columns = kernel.shape[:2]
    pads = padding
    if isinstance(padding, str):
      shape = x.shape[1:3]
      pads = jax.lax.padtype_to_pads(shape, (rows, columns), strides, padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    ends = (x.shape[1] - rows + 1, x.shape[2] - columns + 1)
    # Sums in float32, as a convolution has them.
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    shifts = [
        x[:, i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]]
        * kernel[i, j].astype(dtype)
        for i in range(rows)
        for j in range(columns)
    ]
    return sum(shifts[1:], shifts[0]).astype(x.dtype)

  general = functools.partial(
      jax.lax.conv_general_dilated,
      window_strides=strides,
      padding=padding,
      **kwargs,
  )
  return jax.lax.platform_dependent(x, kernel, cpu=shifted, default=general)


def conv(
    num_in: int,
    num_out: int,
    size: int,
    stride: int = 1,
    *,
    num_groups: int = 1,
    is_same_padded: bool = False,
    is_standardized: bool = False,
    dtype: DType | None = None,
    rngs: nnx.Rngs,
) -> nnx.Conv:
  """A convolution without bias, its kernel as of He et al. 2015.

  Args:
    num_in: channels of the input.
    num_out: channels of the output.
    size: of the kernel, odd.
    stride: in both directions.
    num_groups: groups of channels that do not mix; `num_in` is depthwise.
    is_same_padded: pads to `ceil(H / stride)` rows as TensorFlow does: of an
      odd number of zeros one more below and on the right. Else `size // 2`
      zeros on each side, as in torch.
    is_standardized: whether kernels have mean 0 and variance 1 for each output.
    dtype: of the computation; None takes that of the parameters.
    rngs: source of the initial parameters.
  """
  side = (size // 2, size // 2)
  general: Any = jax.lax.conv_general_dilated
  if num_in == num_out == num_groups:
    general = _depthwise
  elif is_standardized:
    general = _standardized
  return nnx.Conv(
      num_in,
      num_out,
      (size, size),
      strides=(stride, stride),
      padding='SAME' if is_same_padded else (side, side),
      feature_group_count=num_groups,
      use_bias=False,
      conv_general_dilated=general,
      kernel_init=nnx.initializers.variance_scaling(
          2.0 * num_groups, 'fan_out', 'normal'
      ),
      dtype=dtype,
      rngs=rngs,
  )


# By its running statistics, until `model.train()`.
batch_norm = functools.partial(nnx.BatchNorm, use_running_average=True)


def through(block: Any, x: jax.Array, is_rematerialized: bool) -> jax.Array:
  """`block(x)`; of its activations only x is kept, if asked for."""
  if is_rematerialized:
    return nnx.remat(lambda block, x: block(x))(block, x)
  return block(x)
