"""Residual networks in Flax nnx: ResNet-v1.5, and the ResNet-v2 of BiT.

```
model = resnet.ResNet(1000, **resnet.size(50), rngs=nnx.Rngs(0))
logits = model(image)  # [B, 224, 224, 3] -> [B, 1000]
params = nnx.to_pure_dict(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
```
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import itertools
import re
from typing import Any
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from jaxsoup.models import _convolution
from jaxsoup.models import _names
from jaxsoup.models import _torch
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
    num_classes: number of logits; 0 for features in their place.
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
    dtype: see `ViT`, as the next two.
    is_rematerialized: keeps of each block only its input.
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
    self.depths, self.is_bit = tuple(depths), is_bit
    self.is_rematerialized = is_rematerialized
    self.has_small_stem = has_small_stem
    options: Any = dict(dtype=_transformer.as_dtype(dtype), rngs=rngs)
    conv: Callable[..., nnx.Conv] = functools.partial(
        _convolution.conv, is_standardized=is_bit, **options
    )
    norm: Callable[[int], nnx.Module] = functools.partial(
        _convolution.batch_norm, epsilon=epsilon, momentum=momentum, **options
    )
    if is_bit:
      norm = functools.partial(
          nnx.GroupNorm,
          num_groups=num_groups,
          epsilon=epsilon,
          # Variances as differences of squares lose digits, and there is no
          # running statistic that would hide it.
          use_fast_variance=False,
          **options,
      )
    stem = (3, 1) if has_small_stem else (7, 2)
    self.conv_stem = conv(num_channels, width, *stem)
    if not is_bit:
      self.norm_stem = norm(width)
    make, num_in = _Maker(is_bit, conv, norm), width
    for i, depth in enumerate(depths):
      stage = _Stage()
      for j in range(depth):
        stride = 2 if i > 0 and j == 0 else 1
        inside = width * 2**i
        block = _Block(num_in, inside, stride, j == 0, is_bottleneck, make)
        setattr(stage, f'block_{j}', block)
        num_in = inside * (4 if is_bottleneck else 1)
      setattr(self, f'stage_{i}', stage)
    if is_bit:
      self.norm = norm(num_in)
    self.num_classes = num_classes
    if num_classes:
      self.head = nnx.Linear(num_in, num_classes, rngs=rngs)

  def features(self, image: jax.Array) -> jax.Array:
    """Returns what the head sees, [B, C], for images [B, H, W, C']."""
    x = self.conv_stem(image)
    if not self.is_bit:
      x = nnx.relu(self.norm_stem(x))
    if not self.has_small_stem:
      x = _max_pool(x, 0.0 if self.is_bit else -jnp.inf)
    for i, depth in enumerate(self.depths):
      stage = getattr(self, f'stage_{i}')
      for j in range(depth):
        block = getattr(stage, f'block_{j}')
        x = _convolution.through(block, x, self.is_rematerialized)
    if self.is_bit:
      x = nnx.relu(self.norm(x))
    return x.mean(axis=(1, 2))

  def __call__(self, image: jax.Array) -> jax.Array:
    """Returns logits, [B, num_classes], for images [B, H, W, C']."""
    features = self.features(image)
    return self.head(features) if self.num_classes else features


def _max_pool(x: jax.Array, padding: float) -> jax.Array:
  """The largest of 3 x 3, stride 2; BiT, not yet rectified, pads with 0."""
  sides = ((0, 0), (1, 1), (1, 1), (0, 0))
  x = jnp.pad(x, sides, constant_values=padding)
  return nnx.max_pool(x, (3, 3), (2, 2), 'VALID')


class _Maker(NamedTuple):
  """What makes the layers of one network: channels in and out, size, stride."""

  is_bit: bool
  conv: Callable[..., nnx.Conv]
  norm: Callable[[int], nnx.Module]


class _Stage(nnx.Module):
  """Blocks of one width, `block_0`, `block_1`..."""


class _Block(nnx.Module):
  """One residual block, of a whole stride; `width` channels are inside.

  ```
  out = relu(branch(x) + shortcut(x)),  branch = norm . conv . relu . norm ...
  BiT: y = relu(norm(x)),  out = branch(y) + shortcut(y or x)
  ```
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
    y = x
    if self.is_bit:
      for i in range(self.num_convs):
        y = nnx.relu(getattr(self, f'norm_{i}')(y))
        if i == 0 and self.has_shortcut:
          x = self.conv_shortcut(y)
        y = getattr(self, f'conv_{i}')(y)
      return x + y
    for i in range(self.num_convs):
      y = nnx.relu(y) if i else y
      y = getattr(self, f'norm_{i}')(getattr(self, f'conv_{i}')(y))
    if self.has_shortcut:
      x = self.norm_shortcut(self.conv_shortcut(x))
    return nnx.relu(x + y)


# Where the layers are in a file: of stages i, blocks j and layers k, counted
# from 0; i1 and k1 count from 1.
_V1 = {
    'hf': {
        'conv_stem': 'embedder.embedder.convolution',
        'norm_stem': 'embedder.embedder.normalization',
        'block': 'encoder.stages.{i}.layers.{j}.',
        'conv': 'layer.{k}.convolution',
        'norm': 'layer.{k}.normalization',
        'conv_shortcut': 'shortcut.convolution',
        'norm_shortcut': 'shortcut.normalization',
        'head': 'classifier.1',
    },
    'timm': {
        'conv_stem': 'conv1',
        'norm_stem': 'bn1',
        'block': 'layer{i1}.{j}.',
        'conv': 'conv{k1}',
        'norm': 'bn{k1}',
        'conv_shortcut': 'downsample.0',
        'norm_shortcut': 'downsample.1',
        'head': 'fc',
    },
}
_BIT_BLOCK = {
    'conv': 'conv{k1}',
    'norm': 'norm{k1}',
    'conv_shortcut': 'downsample.conv',
}
_BIT = {
    'hf': {
        'conv_stem': 'embedder.convolution',
        'block': 'encoder.stages.{i}.layers.{j}.',
        **_BIT_BLOCK,
        'last_norm': 'norm',
        'head': 'classifier.1',
    },
    'timm': {
        'conv_stem': 'stem.conv',
        'block': 'stages.{i}.blocks.{j}.',
        **_BIT_BLOCK,
        'last_norm': 'norm',
        'head': 'head.fc',
    },
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
  del others
  names = (_BIT if is_bit else _V1)[naming]
  prefix = 'bit.' if is_bit else 'resnet.'
  prefix = prefix if naming == 'hf' and num_classes else ''
  layers = functools.partial(_torch.layers, has_statistics=not is_bit)
  is_conv = is_bit and naming == 'timm'  # Of the head.
  dense = _torch.pointwise if is_conv else None
  rules = []
  if num_classes:
    rules += layers('', '', {'head': names['head']}, dense=dense)
  ends = {x: y for x, y in names.items() if x.endswith('_stem')}
  if is_bit:
    ends['norm'] = names['last_norm']
  rules += layers('', prefix, ends)
  for i, depth in enumerate(depths):
    for j in range(depth):
      block = {
          f'{x}_{k}': _formatted(names[x], i, j, k)
          for k in range(3 if is_bottleneck else 2)
          for x in ('conv', 'norm')
      }
      if j == 0 and (i > 0 or is_bottleneck or is_bit):
        block |= {x: y for x, y in names.items() if x.endswith('_shortcut')}
      theirs = prefix + _formatted(names['block'], i, j)
      rules += layers(f'stage_{i}/block_{j}/', theirs, block)
  alias = r'^((resnet|bit)\.)?(?=embedder\.|encoder\.|norm\.)', prefix
  return _names.Table(rules, _torch.IGNORED, [alias])


def _formatted(name: str, i: int, j: int, k: int = 0) -> str:
  return name.format(i=i, j=j, k=k, i1=i + 1, k1=k + 1)


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

  See `vit.arguments` for what it takes and returns.

  Raises:
    ValueError: the file is not such a ResNet, or the config asks for a variant
      that is not supported.
  """
  _names.check_config(config, _ONLY, 'this ResNet supports')
  if naming == 'hf':
    shapes = {re.sub(r'^(resnet|bit)\.', '', n): x for n, x in shapes.items()}
  is_bit = f'{_BIT[naming]["conv_stem"]}.weight' in shapes
  names = (_BIT if is_bit else _V1)[naming]
  stem, head = f'{names["conv_stem"]}.weight', f'{names["head"]}.weight'
  if stem not in shapes:
    raise ValueError(
        f'No ResNet with names {naming!r}: {stem} is missing. Are the names of '
        f'another library (supported: {list(TABLES)})?'
    )

  def has(i, j, k=0):
    conv = _formatted(f'{names["block"]}{names["conv"]}.weight', i, j, k)
    return conv in shapes

  def depth(i):
    return next(j for j in itertools.count() if not has(i, j))

  width, num_channels, size, _ = shapes[stem].shape
  return {
      'num_classes': shapes[head].shape[0] if head in shapes else 0,
      'depths': tuple(itertools.takewhile(bool, map(depth, itertools.count()))),
      'is_bottleneck': has(0, 0, 2),
      'width': width,
      'num_channels': num_channels,
      'has_small_stem': size == 3,
      'is_bit': is_bit,
      'num_groups': config.get('num_groups', 32),
  }
