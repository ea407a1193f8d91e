"""Residual networks in Flax nnx: ResNet-v1.5, and the ResNet-v2 of BiT.

```
model = resnet.ResNet(1000, **resnet.size(50), rngs=nnx.Rngs(0))
logits = model(image)  # [B, 224, 224, 3] -> [B, 1000]
params = nnx.to_pure_dict(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
```
"""

from collections.abc import Mapping
from collections.abc import Sequence
import functools
import itertools
from typing import Any
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from jaxsoup.models import _convolution
from jaxsoup.models import _names
from jaxsoup.models import _transformer
from jaxsoup.typing import Config
from jaxsoup.typing import Json
from jaxsoup.typing import ShapeDtype

_SIZES = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}


def size(num_layers: int) -> Json:
  """The arguments of a ResNet with a number of layers.

  Args:
    num_layers: 18, 34, 50, 101 or 152.

  Returns:
    `depths` and `is_bottleneck`.

  Raises:
    ValueError: there is no such ResNet.

  Example:
    >>> size(50)
    {'depths': (3, 4, 6, 3), 'is_bottleneck': True}

  Source: He et al., "Deep residual learning for image recognition", CVPR 2016,
  table 1.
  """
  if num_layers not in _SIZES:
    raise ValueError(
        f'Unknown ResNet with {num_layers} layers: choose one of '
        f'{list(_SIZES)}, or pass depths and is_bottleneck.'
    )
  depths, is_bottleneck = _SIZES[num_layers]
  return {'depths': depths, 'is_bottleneck': is_bottleneck}


class ResNet(nnx.Module):
  """A residual network for classification.

  `stem -> 4 stages of blocks, each of half the size -> mean -> linear head`

  Args:
    num_classes: number of logits.
    depths: number of blocks in each stage.
    is_bottleneck: blocks of 1x1, 3x3 and 1x1 convolutions with four times the
      width outside, stride at the 3x3 ("v1.5"); else of two 3x3.
    width: channels of the stem, and inside the blocks of the first stage; each
      further stage has twice as many.
    num_channels: channels of an image.
    has_small_stem: a 3x3 convolution without pooling, for images as small as
      those of CIFAR; else 7x7 with stride 2, and a max pool.
    is_bit: the ResNet-v2 of BiT: normalization and ReLU before convolutions,
      GroupNorm, standardized kernels. `width=64 * 3` is R50x3.
    num_groups: of the GroupNorms.
    epsilon: of the normalization.
    momentum: of BatchNorm's running statistics, 0.9 where torch says 0.1.
    dtype: name of the dtype of the computation, such as 'bfloat16'; None takes
      that of the parameters, which are float32. Logits are float32.
    is_rematerialized: keeps of each block only its input, and computes the rest
      again in the backward pass.
    rngs: source of the initial parameters.

  Running statistics are used, and left alone, but between `model.train()` and
  `model.eval()`.

  Example:
    >>> model = ResNet(10, depths=(1, 1), width=8, rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 32, 32, 3))).shape
    (2, 10)

  Source: He et al., "Deep residual learning for image recognition", CVPR 2016;
  Kolesnikov et al., "Big Transfer (BiT)", ECCV 2020, section 3.
  """

  def __init__(
      self,
      num_classes: int,
      *,
      depths: Sequence[int] = (3, 4, 6, 3),
      is_bottleneck: bool = True,
      width: int = 64,
      num_channels: int = 3,
      has_small_stem: bool = False,
      is_bit: bool = False,
      num_groups: int = 32,
      epsilon: float = 1e-5,
      momentum: float = 0.9,
      dtype: str | None = None,
      is_rematerialized: bool = False,
      rngs: nnx.Rngs,
  ):
    self.num_stages, self.is_bit = len(depths), is_bit
    self.is_rematerialized = is_rematerialized
    self.has_small_stem = has_small_stem
    dtype_ = _transformer.as_dtype(dtype)
    make = _Maker(is_bit, num_groups, epsilon, momentum, dtype_, rngs)
    stem = (3, 1) if has_small_stem else (7, 2)
    self.conv_stem = make.conv(num_channels, width, *stem)
    if not is_bit:
      self.norm_stem = make.norm(width)
    num_in = width
    for i, depth in enumerate(depths):
      stage = Stage(num_in, width * 2**i, depth, i > 0, is_bottleneck, make)
      setattr(self, f'stage_{i}', stage)
      num_in = width * 2**i * (4 if is_bottleneck else 1)
    if is_bit:
      self.norm = make.norm(num_in)
    self.head = nnx.Linear(num_in, num_classes, rngs=rngs)

  def features(self, image: jax.Array) -> jax.Array:
    """Returns what the head sees, [B, C], for images [B, H, W, C']."""
    x = self.conv_stem(image)
    if not self.is_bit:
      x = nnx.relu(self.norm_stem(x))
    if not self.has_small_stem:
      x = _max_pool(x, 0.0 if self.is_bit else -jnp.inf)
    for i in range(self.num_stages):
      x = getattr(self, f'stage_{i}')(x, self.is_rematerialized)
    if self.is_bit:
      x = nnx.relu(self.norm(x))
    return x.mean(axis=(1, 2))

  def __call__(self, image: jax.Array) -> jax.Array:
    """Returns logits, [B, num_classes], for images [B, H, W, C']."""
    return self.head(self.features(image))


def _max_pool(x: jax.Array, padding: float) -> jax.Array:
  """The largest of 3 x 3, stride 2; BiT, not yet rectified, pads with 0."""
  sides = ((0, 0), (1, 1), (1, 1), (0, 0))
  x = jnp.pad(x, sides, constant_values=padding)
  return nnx.max_pool(x, (3, 3), (2, 2), 'VALID')


class _Maker:
  """Makes the layers of one network."""

  def __init__(self, is_bit, num_groups, epsilon, momentum, dtype, rngs):
    self.is_bit, self.num_groups = is_bit, num_groups
    self.momentum = momentum
    self.options = {'dtype': dtype, 'rngs': rngs}
    self.norm_options = {'epsilon': epsilon, **self.options}

  def conv(self, num_in: int, num_out: int, size: int, stride: int = 1):
    return _convolution.conv(
        num_in,
        num_out,
        size,
        stride,
        is_standardized=self.is_bit,
        **self.options,
    )

  def norm(self, width: int):
    if not self.is_bit:
      return _convolution.batch_norm(
          width, momentum=self.momentum, **self.norm_options
      )
    # Variances as differences of squares lose digits, and there is no running
    # statistic that would hide it.
    return nnx.GroupNorm(
        width, self.num_groups, use_fast_variance=False, **self.norm_options
    )


class Stage(nnx.Module):
  """Blocks `block_0`, `block_1`... of one width; the first may have a stride.

  Args:
    num_in: channels of the input.
    width: channels inside the blocks.
    depth: number of blocks.
    is_strided: whether the first block halves height and width.
    is_bottleneck: as in `ResNet`.
    make: makes the layers.
  """

  def __init__(
      self,
      num_in: int,
      width: int,
      depth: int,
      is_strided: bool,
      is_bottleneck: bool,
      make: _Maker,
  ):
    self.depth = depth
    for j in range(depth):
      stride = 2 if is_strided and j == 0 else 1
      block = Block(num_in, width, stride, j == 0, is_bottleneck, make)
      setattr(self, f'block_{j}', block)
      num_in = width * 4 if is_bottleneck else width

  def __call__(self, x: jax.Array, is_rematerialized: bool) -> jax.Array:
    for j in range(self.depth):
      block = getattr(self, f'block_{j}')
      x = _convolution.through(block, x, is_rematerialized)
    return x


class Block(nnx.Module):
  """One residual block.

  ```
  out = relu(branch(x) + shortcut(x)),  branch = norm . conv . relu . norm ...
  BiT: y = relu(norm(x)),  out = branch(y) + shortcut(y or x)
  ```

  Args:
    num_in: channels of the input.
    width: channels inside.
    stride: of the whole.
    is_first: whether it is the first of its stage.
    is_bottleneck: as in `ResNet`.
    make: makes the layers.
  """

  def __init__(
      self,
      num_in: int,
      width: int,
      stride: int,
      is_first: bool,
      is_bottleneck: bool,
      make: _Maker,
  ):
    if is_bottleneck:
      convs = [
          (num_in, width, 1, 1),
          (width, width, 3, stride),
          (width, 4 * width, 1, 1),
      ]
    else:
      convs = [(num_in, width, 3, stride), (width, width, 3, 1)]
    self.num_convs, self.is_bit = len(convs), make.is_bit
    for i, (inside, outside, kernel_size, step) in enumerate(convs):
      conv = make.conv(inside, outside, kernel_size, step)
      setattr(self, f'conv_{i}', conv)
      setattr(self, f'norm_{i}', make.norm(inside if make.is_bit else outside))
    num_out = convs[-1][1]
    is_reshaping = stride != 1 or num_in != num_out
    self.has_shortcut = is_first if make.is_bit else is_reshaping
    if self.has_shortcut:
      self.conv_shortcut = make.conv(num_in, num_out, 1, stride)
      if not make.is_bit:
        self.norm_shortcut = make.norm(num_out)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self._preactivated(x) if self.is_bit else self._activated(x)

  def _activated(self, x):
    y = x
    for i in range(self.num_convs):
      y = nnx.relu(y) if i else y
      y = getattr(self, f'norm_{i}')(getattr(self, f'conv_{i}')(y))
    if self.has_shortcut:
      x = self.norm_shortcut(self.conv_shortcut(x))
    return nnx.relu(x + y)

  def _preactivated(self, x):
    y = x
    for i in range(self.num_convs):
      y = nnx.relu(getattr(self, f'norm_{i}')(y))
      if i == 0 and self.has_shortcut:
        x = self.conv_shortcut(y)
      y = getattr(self, f'conv_{i}')(y)
    return x + y


class _Naming(NamedTuple):
  """Where the layers of a ResNet are in a file.

  Of stages i, blocks j and layers k, counted from 0; i1 and k1 count from 1.
  BiT has no norm_stem and norm_shortcut, v1 has no norm before the head.
  """

  conv_stem: str
  norm_stem: str
  block: str
  conv: str
  norm: str
  conv_shortcut: str
  norm_shortcut: str
  last_norm: str
  head: str

  def in_block(self, layer: str, i: int, j: int, k: int = 0) -> str:
    name = f'{self.block}.{layer}'
    return name.format(i=i, j=j, k=k, i1=i + 1, k1=k + 1)


_V1 = {
    'hf': _Naming(
        conv_stem='resnet.embedder.embedder.convolution',
        norm_stem='resnet.embedder.embedder.normalization',
        block='resnet.encoder.stages.{i}.layers.{j}',
        conv='layer.{k}.convolution',
        norm='layer.{k}.normalization',
        conv_shortcut='shortcut.convolution',
        norm_shortcut='shortcut.normalization',
        last_norm='',
        head='classifier.1',
    ),
    'timm': _Naming(
        conv_stem='conv1',
        norm_stem='bn1',
        block='layer{i1}.{j}',
        conv='conv{k1}',
        norm='bn{k1}',
        conv_shortcut='downsample.0',
        norm_shortcut='downsample.1',
        last_norm='',
        head='fc',
    ),
}
_BIT = {
    'hf': _Naming(
        conv_stem='bit.embedder.convolution',
        norm_stem='',
        block='bit.encoder.stages.{i}.layers.{j}',
        conv='conv{k1}',
        norm='norm{k1}',
        conv_shortcut='downsample.conv',
        norm_shortcut='',
        last_norm='bit.norm',
        head='classifier.1',
    ),
    'timm': _Naming(
        conv_stem='stem.conv',
        norm_stem='',
        block='stages.{i}.blocks.{j}',
        conv='conv{k1}',
        norm='norm{k1}',
        conv_shortcut='downsample.conv',
        norm_shortcut='',
        last_norm='norm',
        head='head.fc',
    ),
}


def _table(
    naming: str,
    num_classes: int,
    *,
    depths: Sequence[int] = (3, 4, 6, 3),
    is_bottleneck: bool = True,
    is_bit: bool = False,
    **others: Any,
) -> _names.Table:
  """All arrays of a file; the other arguments change only their shapes."""
  del num_classes, others
  names = (_BIT if is_bit else _V1)[naming]
  norm_rules = _convolution.batch_norm_rules
  if is_bit:
    norm_rules = _convolution.affine_rules
  rules = [_convolution.conv_rule('conv_stem', names.conv_stem)]
  if not is_bit:
    rules += norm_rules('norm_stem', names.norm_stem)
  for i, depth in enumerate(depths):
    for j in range(depth):
      ours = f'stage_{i}/block_{j}'
      for k in range(3 if is_bottleneck else 2):
        conv, norm = (names.in_block(x, i, j, k) for x in names[3:5])
        rules += [_convolution.conv_rule(f'{ours}/conv_{k}', conv)]
        rules += norm_rules(f'{ours}/norm_{k}', norm)
      if j == 0 and (i > 0 or is_bottleneck or is_bit):
        conv, norm = (names.in_block(x, i, j) for x in names[5:7])
        rules += [_convolution.conv_rule(f'{ours}/conv_shortcut', conv)]
        rules += [] if is_bit else norm_rules(f'{ours}/norm_shortcut', norm)
  if is_bit:
    rules += norm_rules('norm', names.last_norm)
  # The head of BiT is a convolution in timm.
  is_conv = is_bit and naming == 'timm'
  layout = _convolution.pointwise if is_conv else _names.dense()
  rules += _convolution.dense_rules('head', names.head, layout)
  return _names.Table(rules, _convolution.IGNORED)


TABLES = {naming: functools.partial(_table, naming) for naming in _V1}

# What is built here, of what a config.json of Hugging Face may ask for.
_ONLY = {
    'hidden_act': 'relu',
    'downsample_in_first_stage': False,
    'downsample_in_bottleneck': False,
    'global_padding': None,
    'embedding_dynamic_padding': False,
    'output_stride': 32,
}


def arguments(
    naming: str, shapes: Mapping[str, ShapeDtype], config: Config
) -> Json:
  """The constructor's arguments for a file.

  Args:
    naming: a key of `TABLES`.
    shapes: from the names of the file's arrays to what has their `.shape`.
    config: the parsed config.json of Hugging Face, or empty.

  Returns:
    Keyword arguments of `ResNet`, without `rngs`.

  Raises:
    ValueError: the file is not such a ResNet, or the config asks for a variant
      that is not supported.
  """
  for name, only in _ONLY.items():
    if config.get(name, only) != only:
      raise ValueError(
          f'config.json has {name} = {config[name]!r}, but this ResNet '
          f'supports only {only!r}: choose another checkpoint.'
      )
  is_bit = f'{_BIT[naming].conv_stem}.weight' in shapes
  names = (_BIT if is_bit else _V1)[naming]
  if not {f'{names.conv_stem}.weight', f'{names.head}.weight'} <= set(shapes):
    raise ValueError(
        f'No ResNet with names {naming!r}: {names.conv_stem}.weight or '
        f'{names.head}.weight is missing. Are the names of another library '
        f'(supported: {list(TABLES)}), or is the head missing?'
    )

  def has(i, j, k=0):
    return f'{names.in_block(names.conv, i, j, k)}.weight' in shapes

  def depth(i):
    return next(j for j in itertools.count() if not has(i, j))

  width, num_channels, size, _ = shapes[f'{names.conv_stem}.weight'].shape
  return {
      'num_classes': shapes[f'{names.head}.weight'].shape[0],
      'depths': tuple(itertools.takewhile(bool, map(depth, itertools.count()))),
      'is_bottleneck': has(0, 0, 2),
      'width': width,
      'num_channels': num_channels,
      'has_small_stem': size == 3,
      'is_bit': is_bit,
      'num_groups': config.get('num_groups', 32),
  }
