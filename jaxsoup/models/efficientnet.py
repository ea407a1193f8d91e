"""EfficientNet in Flax nnx: B0 to B7, L2, and the lite ones.

```
width_factor, depth_factor, resolution, is_lite = efficientnet.size('b0')
model = efficientnet.EfficientNet(
    1000, width_factor=width_factor, depth_factor=depth_factor, rngs=nnx.Rngs(0)
)
logits = model(image)  # [B, 224, 224, 3] -> [B, 1000]
```
"""

from collections.abc import Mapping
import functools
import math
from typing import Any
from typing import NamedTuple

from flax import nnx
import jax

from jaxsoup.models import _convolution
from jaxsoup.models import _names
from jaxsoup.models import _torch
from jaxsoup.models import _transformer
from jaxsoup.typing import Config
from jaxsoup.typing import Json
from jaxsoup.typing import ShapeDtype


class Size(NamedTuple):
  """One of the EfficientNets.

  Attributes:
    width_factor: of the channels.
    depth_factor: of the numbers of blocks.
    resolution: side of the images, in pixels.
    is_lite: whether it is one of the lite ones.
  """

  width_factor: float
  depth_factor: float
  resolution: int
  is_lite: bool = False


_SIZES = {
    'b0': Size(1.0, 1.0, 224),
    'b1': Size(1.0, 1.1, 240),
    'b2': Size(1.1, 1.2, 260),
    'b3': Size(1.2, 1.4, 300),
    'b4': Size(1.4, 1.8, 380),
    'b5': Size(1.6, 2.2, 456),
    'b6': Size(1.8, 2.6, 528),
    'b7': Size(2.0, 3.1, 600),
    'l2': Size(4.3, 5.3, 800),
    'lite0': Size(1.0, 1.0, 224, True),
    'lite1': Size(1.0, 1.1, 240, True),
    'lite2': Size(1.1, 1.2, 260, True),
    'lite3': Size(1.2, 1.4, 280, True),
    'lite4': Size(1.4, 1.8, 300, True),
}


def size(name: str) -> Size:
  """The compound scaling of a model by its name.

  Args:
    name: 'b0' to 'b7', 'l2', or 'lite0' to 'lite4'.

  Returns:
    Its factors and resolution.

  Raises:
    ValueError: there is no such model.

  Example:
    >>> size('b3')
    Size(width_factor=1.2, depth_factor=1.4, resolution=300, is_lite=False)

  Source: Tan and Le, "EfficientNet: rethinking model scaling for convolutional
  neural networks", ICML 2019; L2: Xie et al., "Self-training with noisy
  student", CVPR 2020.
  """
  if name not in _SIZES:
    raise ValueError(
        f'Unknown EfficientNet {name!r}: choose one of {list(_SIZES)}.'
    )
  return _SIZES[name]


def round_filters(num_channels: int, width_factor: float) -> int:
  """The nearest multiple of 8 that loses at most a tenth of the channels.

  Args:
    num_channels: of EfficientNet-B0.
    width_factor: that they are multiplied by.

  Returns:
    A number of channels.

  Example:
    >>> round_filters(32, 1.1), round_filters(40, 0.25)
    (32, 16)
  """
  wanted = num_channels * width_factor
  rounded = max(8, int(wanted + 4) // 8 * 8)
  return rounded + 8 if rounded < 0.9 * wanted else rounded


class _Place(NamedTuple):
  """One block: where it is, and its shape."""

  stage: int
  block: int  # In its stage.
  num_in: int
  num_out: int
  kernel_size: int
  stride: int
  expansion: int


# The stages of B0: blocks, kernel, stride, expansion, channels.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def _ends(width_factor: float, is_lite: bool) -> tuple[int, int]:
  """Channels of the stem and of the head, which the lite ones do not scale."""
  factor = 1.0 if is_lite else width_factor
  return round_filters(32, factor), round_filters(1280, factor)


def _places(
    width_factor: float, depth_factor: float, is_lite: bool
) -> list[_Place]:
  places = []
  num_in, _ = _ends(width_factor, is_lite)
  for i, (depth, kernel_size, stride, expansion, width) in enumerate(_STAGES):
    is_end = i in (0, len(_STAGES) - 1)
    num = depth if is_lite and is_end else math.ceil(depth * depth_factor)
    num_out = round_filters(width, width_factor)
    for j in range(num):
      step = stride if j == 0 else 1
      places.append(_Place(i, j, num_in, num_out, kernel_size, step, expansion))
      num_in = num_out
  return places


class EfficientNet(nnx.Module):
  """An EfficientNet for classification.

  `stem -> blocks -> 1x1 convolution -> mean -> linear head`

  Args:
    num_classes: number of logits; 0 for features in their place.
    width_factor: of the channels, which are rounded by `round_filters`.
    depth_factor: of the numbers of blocks, which are rounded up.
    is_lite: without squeeze and excitation, with relu6 in place of swish, and
      with a stem and a head that are not scaled.
    num_channels: channels of an image.
    is_same_padded: pads as TensorFlow does, for weights that come from there:
      with a stride more below and on the right. Else alike on all sides, for
      weights trained in torch.
    epsilon: of BatchNorm.
    momentum: of BatchNorm's running statistics, 0.9 where torch says 0.1.
    dtype: see `ViT`, as the next two.
    is_rematerialized: keeps of each block only its input.
    rngs: source of the initial parameters.

  Running statistics are used, and left alone, but between `model.train()` and
  `model.eval()`. There is no stochastic depth.

  Example:
    >>> def logits_fn(image):
    ...   size = dict(width_factor=0.25, depth_factor=0.1)
    ...   return EfficientNet(10, **size, rngs=nnx.Rngs(0))(image)
    >>> jax.eval_shape(logits_fn, jax.numpy.zeros((2, 32, 32, 3))).shape
    (2, 10)

  Source: Tan and Le, "EfficientNet: rethinking model scaling for convolutional
  neural networks", ICML 2019.
  """

  def __init__(
      self,
      num_classes: int,
      *,
      width_factor: float = 1.0,
      depth_factor: float = 1.0,
      is_lite: bool = False,
      num_channels: int = 3,
      is_same_padded: bool = True,
      epsilon: float = 1e-3,
      momentum: float = 0.99,
      dtype: str | None = None,
      is_rematerialized: bool = False,
      rngs: nnx.Rngs,
  ):
    self.is_rematerialized = is_rematerialized
    dtype_ = _transformer.as_dtype(dtype)
    conv = functools.partial(
        _convolution.conv,
        is_same_padded=is_same_padded,
        dtype=dtype_,
        rngs=rngs,
    )
    norm = functools.partial(
        _convolution.batch_norm,
        epsilon=epsilon,
        momentum=momentum,
        dtype=dtype_,
        rngs=rngs,
    )
    dense = functools.partial(nnx.Linear, dtype=dtype_, rngs=rngs)
    self.activation = _transformer.relu6 if is_lite else _transformer.silu
    places = _places(width_factor, depth_factor, is_lite)
    self.depth = len(places)
    stem_width, head_width = _ends(width_factor, is_lite)
    self.conv_stem = conv(num_channels, stem_width, 3, 2)
    self.norm_stem = norm(stem_width)
    for i, place in enumerate(places):
      block = _Block(place, self.activation, not is_lite, conv, norm, dense)
      setattr(self, f'block_{i}', block)
    self.conv_head = conv(places[-1].num_out, head_width, 1)
    self.norm_head = norm(head_width)
    self.num_classes = num_classes
    if num_classes:
      self.head = nnx.Linear(head_width, num_classes, rngs=rngs)

  def features(self, image: jax.Array) -> jax.Array:
    """Returns what the head sees, [B, C], for images [B, H, W, C']."""
    x = self.activation(self.norm_stem(self.conv_stem(image)))
    for i in range(self.depth):
      block = getattr(self, f'block_{i}')
      x = _convolution.through(block, x, self.is_rematerialized)
    x = self.activation(self.norm_head(self.conv_head(x)))
    return x.mean(axis=(1, 2))

  def __call__(self, image: jax.Array) -> jax.Array:
    """Returns logits, [B, num_classes], for images [B, H, W, C']."""
    features = self.features(image)
    return self.head(features) if self.num_classes else features


class _Block(nnx.Module):
  """An inverted residual block, MBConv.

  `expand (1x1) -> depthwise -> squeeze and excite -> project (1x1) [+ input]`

  The input is added in all blocks of a stage but the first.

  Source: Sandler et al., "MobileNetV2", CVPR 2018; Hu et al., "Squeeze-and-
  excitation networks", CVPR 2018.
  """

  def __init__(self, place, activation, has_excitation, conv, norm, dense):
    self.activation, self.has_excitation = activation, has_excitation
    self.is_residual = place.block > 0
    self.is_expanding = place.expansion > 1
    width = place.num_in * place.expansion
    if self.is_expanding:
      self.conv_expand = conv(place.num_in, width, 1)
      self.norm_expand = norm(width)
    self.conv_depthwise = conv(
        width, width, place.kernel_size, place.stride, num_groups=width
    )
    self.norm_depthwise = norm(width)
    if has_excitation:
      # A quarter of the channels before they are expanded.
      self.squeeze = dense(width, place.num_in // 4)
      self.excite = dense(place.num_in // 4, width)
    self.conv_project = conv(width, place.num_out, 1)
    self.norm_project = norm(place.num_out)

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x
    if self.is_expanding:
      y = self.activation(self.norm_expand(self.conv_expand(y)))
    y = self.activation(self.norm_depthwise(self.conv_depthwise(y)))
    if self.has_excitation:
      gate = self.activation(self.squeeze(y.mean(axis=(1, 2), keepdims=True)))
      y = y * jax.nn.sigmoid(self.excite(gate))
    y = self.norm_project(self.conv_project(y))
    return x + y if self.is_residual else y


# Where the layers are in a file: of blocks i; of stages s and blocks j in them.
_ENDS = {
    'hf': {
        'conv_stem': 'embeddings.convolution',
        'norm_stem': 'embeddings.batchnorm',
        'conv_head': 'encoder.top_conv',
        'norm_head': 'encoder.top_bn',
        'head': 'classifier',
    },
    'timm': {
        'conv_stem': 'conv_stem',
        'norm_stem': 'bn1',
        'conv_head': 'conv_head',
        'norm_head': 'bn2',
        'head': 'classifier',
    },
    'torch': {
        'conv_stem': '_conv_stem',
        'norm_stem': '_bn0',
        'conv_head': '_conv_head',
        'norm_head': '_bn1',
        'head': '_fc',
    },
}
_BLOCKS = {
    'hf': 'encoder.blocks.{i}.',
    'timm': 'blocks.{s}.{j}.',
    'torch': '_blocks.{i}.',
}
_INSIDE = {
    'hf': {
        'conv_expand': 'expansion.expand_conv',
        'norm_expand': 'expansion.expand_bn',
        'conv_depthwise': 'depthwise_conv.depthwise_conv',
        'norm_depthwise': 'depthwise_conv.depthwise_norm',
        'squeeze': 'squeeze_excite.reduce',
        'excite': 'squeeze_excite.expand',
        'conv_project': 'projection.project_conv',
        'norm_project': 'projection.project_bn',
    },
    'timm': {
        'conv_expand': 'conv_pw',
        'norm_expand': 'bn1',
        'conv_depthwise': 'conv_dw',
        'norm_depthwise': 'bn2',
        'squeeze': 'se.conv_reduce',
        'excite': 'se.conv_expand',
        'conv_project': 'conv_pwl',
        'norm_project': 'bn3',
    },
    'torch': {
        'conv_expand': '_expand_conv',
        'norm_expand': '_bn0',
        'conv_depthwise': '_depthwise_conv',
        'norm_depthwise': '_bn1',
        'squeeze': '_se_reduce',
        'excite': '_se_expand',
        'conv_project': '_project_conv',
        'norm_project': '_bn2',
    },
}
# Blocks that do not expand are another class in timm, with its own numbers.
_TIMM_SEPARABLE = {
    'norm_depthwise': 'bn1',
    'conv_project': 'conv_pw',
    'norm_project': 'bn2',
}


def _table(
    naming: str,
    num_classes: int,
    *,
    width_factor: float = 1.0,
    depth_factor: float = 1.0,
    is_lite: bool = False,
    **others: Any,
) -> _names.Table:
  """All arrays of a file; the other arguments change only their shapes."""
  del others
  prefix = 'efficientnet.' if naming == 'hf' and num_classes else ''
  ends = dict(_ENDS[naming])
  head = {'head': ends.pop('head')}
  rules = _torch.layers('', '', head) if num_classes else []
  rules += _torch.layers('', prefix, ends, has_statistics=True)
  for i, place in enumerate(_places(width_factor, depth_factor, is_lite)):
    layers = dict(_INSIDE[naming])
    if place.expansion == 1:
      del layers['conv_expand'], layers['norm_expand']
      layers |= _TIMM_SEPARABLE if naming == 'timm' else {}
    if is_lite:
      del layers['squeeze'], layers['excite']
    rules += _torch.layers(
        f'block_{i}/',
        prefix + _BLOCKS[naming].format(i=i, s=place.stage, j=place.block),
        layers,
        dense=_torch.pointwise,
        has_statistics=True,
    )
  alias = r'^(efficientnet\.)?(?=embeddings\.|encoder\.)', prefix
  return _names.Table(rules, _torch.IGNORED, [alias])


TABLES = {naming: functools.partial(_table, naming) for naming in _ENDS}

# What is built here, of what a config.json of Hugging Face may ask for. Its
# `depthwise_padding` lists the blocks where sides are odd at the resolution of
# the model, and 'SAME' is then symmetric: here that follows from the sides.
_ONLY = {
    'hidden_act': 'swish',
    'pooling_type': 'mean',
    'depth_divisor': 8,
    'squeeze_expansion_ratio': 0.25,
    'in_channels': [32, 16, 24, 40, 80, 112, 192],
    'num_block_repeats': [stage[0] for stage in _STAGES],
    'kernel_sizes': [stage[1] for stage in _STAGES],
    'strides': [stage[2] for stage in _STAGES],
    'expand_ratios': [stage[3] for stage in _STAGES],
    'out_channels': [stage[4] for stage in _STAGES],
}


def arguments(
    naming: str, shapes: Mapping[str, ShapeDtype], config: Config
) -> Json:
  """The constructor's arguments for a file.

  Padding and epsilon cannot be seen in a file. Files of timm have weights
  trained in torch, unless `config` has an `architecture` that begins with
  `tf_` (`models.load` asks for one); all others come from TensorFlow.

  See `vit.arguments` for what it takes and returns.

  Raises:
    ValueError: the file is not such an EfficientNet, or the config asks for a
      variant that is not supported.
  """
  if naming == 'hf':
    _names.check_config(config, _ONLY, 'this EfficientNet supports')
    shapes = {n.removeprefix('efficientnet.'): x for n, x in shapes.items()}
  if 'width_coefficient' in config:
    width_factor, is_lite = config['width_coefficient'], False
    depth_factor = config['depth_coefficient']
  else:
    width_factor, depth_factor, _, is_lite = _size_of(naming, shapes)
  ends = _ENDS[naming]
  head = f'{ends["head"]}.weight'
  is_from_torch = naming == 'timm' and not str(
      config.get('architecture')
  ).startswith('tf_')
  return {
      'num_classes': shapes[head].shape[0] if head in shapes else 0,
      'width_factor': width_factor,
      'depth_factor': depth_factor,
      'is_lite': is_lite,
      'num_channels': shapes[f'{ends["conv_stem"]}.weight'].shape[1],
      'is_same_padded': not is_from_torch,
      'epsilon': 1e-5 if is_from_torch else config.get('batch_norm_eps', 1e-3),
  }


def _size_of(naming: str, shapes: Mapping[str, ShapeDtype]) -> Size:
  """The size whose convolutions a file has, each with its channels."""
  held = {
      x
      for x in shapes
      if not x.endswith('num_batches_tracked')
      and not x.startswith(_ENDS[naming]['head'])
  }
  for size in _SIZES.values():
    factors: Json = size._asdict()
    del factors['resolution']
    rules = _table(naming, 0, **factors).rules
    theirs = {rule.paths[0]: rule.theirs for rule in rules}
    widths = {
        f'block_{i}/norm_project/scale': place.num_out
        for i, place in enumerate(_places(**factors))
    }
    _, widths['norm_head/scale'] = _ends(size.width_factor, size.is_lite)
    if set(theirs.values()) == held and all(
        shapes[theirs[ours]].shape == (width,) for ours, width in widths.items()
    ):
      return size
  raise ValueError(
      f'No EfficientNet with names {naming!r}: the {len(shapes)} arrays match '
      f'none of {list(_SIZES)}. Are the names of another library (supported: '
      f'{list(TABLES)}), or the widths changed?'
  )
