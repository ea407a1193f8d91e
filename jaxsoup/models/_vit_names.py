"""Names of the weights of vision transformers in the files of others.

```
table = TABLES['timm'](**arguments('timm', arrays.shapes, config))
```
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import math
import re
from typing import Any

from jaxsoup.models import _names
from jaxsoup.models import _torch
from jaxsoup.typing import Config
from jaxsoup.typing import Json
from jaxsoup.typing import ShapeDtype

# Width, depth, number of heads, width of the MLP.
SIZES = {
    'Ti': (192, 12, 3, 768),
    'S': (384, 12, 6, 1536),
    'B': (768, 12, 12, 3072),
    'L': (1024, 24, 16, 4096),
    'So400m': (1152, 27, 16, 4304),
    'H': (1280, 32, 16, 5120),
    'g': (1408, 40, 16, 6144),
    'G': (1664, 48, 16, 8192),
}

# As Hugging Face spells them, and we.
ACTIVATION_NAMES = {
    'gelu': 'gelu',
    'gelu_new': 'gelu_tanh',
    'gelu_pytorch_tanh': 'gelu_tanh',
    'quick_gelu': 'quick_gelu',
}


def _hf(
    *,
    patch_size: int,
    depth: int = 4,
    num_classes: int,
    has_layer_scale: bool = False,
    is_gated: bool = False,
    **_: object,
) -> _names.Table:
  """Hugging Face's ViT; with LayerScale its DINOv2.

  Files are read with the prefix `vit.` or `dinov2.` and without it: a backbone
  is bare, and gets a head. Written are those of a classifier, or bare ones.
  """
  family = 'dinov2.' if has_layer_scale else 'vit.'
  prefix = family if num_classes else ''
  embeddings = f'{prefix}embeddings.'
  projection = f'{embeddings}patch_embeddings.projection'
  rules = [
      *_stem(projection, patch_size),
      _names.Rule('cls_token', f'{embeddings}cls_token', _names.batched),
      _names.Rule(
          'position', f'{embeddings}position_embeddings', _names.batched
      ),
      *_torch.norm('norm', f'{prefix}layernorm'),
  ]
  block_fn = _dinov2_block if has_layer_scale else _hf_block
  for i in range(depth):
    layer = f'{prefix}encoder.layer.{i}.'
    rules += block_fn(f'block_{i}', layer, is_gated)
    for name in _torch.QKV:
      rules += _torch.dense(
          f'block_{i}/attention/{name}', f'{layer}attention.attention.{name}'
      )
    rules += _torch.dense(
        f'block_{i}/attention/out', f'{layer}attention.output.dense', 2
    )
  if num_classes:
    rules += _torch.dense('head', 'classifier')
  parts = r'embeddings\.|encoder\.|layernorm\.|pooler\.'
  return _names.Table(
      rules,
      ignored=(
          rf'({re.escape(family)})?pooler\..*',
          r'.*embeddings\.mask_token',
      ),
      aliases=((rf'^({re.escape(family)})?(?={parts})', prefix),),
  )


def _hf_block(block: str, layer: str, is_gated: bool) -> list[_names.Rule]:
  del is_gated  # There is no such ViT.
  return [
      *_torch.norm(f'{block}/norm_attention', f'{layer}layernorm_before'),
      *_torch.norm(f'{block}/norm_mlp', f'{layer}layernorm_after'),
      *_torch.dense(f'{block}/mlp/dense_in', f'{layer}intermediate.dense'),
      *_torch.dense(f'{block}/mlp/dense_out', f'{layer}output.dense'),
  ]


def _dinov2_block(block: str, layer: str, is_gated: bool) -> list[_names.Rule]:
  names = ('weights_in', 'weights_out') if is_gated else ('fc1', 'fc2')
  return [
      *_torch.norm(f'{block}/norm_attention', f'{layer}norm1'),
      *_torch.norm(f'{block}/norm_mlp', f'{layer}norm2'),
      _names.Rule(f'{block}/scale_attention', f'{layer}layer_scale1.lambda1'),
      _names.Rule(f'{block}/scale_mlp', f'{layer}layer_scale2.lambda1'),
      *_mlp(f'{block}/mlp', f'{layer}mlp', is_gated, *names),
  ]


def _stem(theirs: str, patch_size: int) -> list[_names.Rule]:
  return [
      _names.Rule(
          'embed/kernel', f'{theirs}.weight', _names.patches(patch_size)
      ),
      _names.Rule('embed/bias', f'{theirs}.bias'),
  ]


def _mlp(
    ours: str,
    theirs: str,
    is_gated: bool = False,
    name_in: str = 'fc1',
    name_out: str = 'fc2',
) -> list[_names.Rule]:
  """Two dense layers, the first one with the gate before it."""
  dense_in: Any = f'{ours}/dense_in'
  if is_gated:
    dense_in = f'{ours}/dense_gate', dense_in
  return [
      *_torch.dense(dense_in, f'{theirs}.{name_in}'),
      *_torch.dense(f'{ours}/dense_out', f'{theirs}.{name_out}'),
  ]


def _timm(
    *,
    patch_size: int,
    depth: int = 4,
    num_classes: int,
    has_cls_token: bool = False,
    has_layer_scale: bool = False,
    is_gated: bool = False,
    is_pooled_first: bool = False,
    pool: str | None = None,
    **_: object,
) -> _names.Table:
  """VisionTransformer of timm."""
  rules = [
      *_stem('patch_embed.proj', patch_size),
      _names.Rule('position', 'pos_embed', _names.batched),
      *_torch.norm('norm', 'fc_norm' if is_pooled_first else 'norm'),
  ]
  if has_cls_token:
    rules.append(_names.Rule('cls_token', 'cls_token', _names.batched))
  for i in range(depth):
    ours, theirs = f'block_{i}', f'blocks.{i}'
    rules += [
        *_torch.norm(f'{ours}/norm_attention', f'{theirs}.norm1'),
        *_torch.norm(f'{ours}/norm_mlp', f'{theirs}.norm2'),
        *_torch.dense(_torch.qkv(f'{ours}/attention'), f'{theirs}.attn.qkv'),
        *_torch.dense(f'{ours}/attention/out', f'{theirs}.attn.proj', 2),
        *_mlp(f'{ours}/mlp', f'{theirs}.mlp', is_gated),
    ]
    if has_layer_scale:
      rules += [
          _names.Rule(f'{ours}/scale_attention', f'{theirs}.ls1.gamma'),
          _names.Rule(f'{ours}/scale_mlp', f'{theirs}.ls2.gamma'),
      ]
  if pool == 'map':
    attention = 'map_head/attention'
    rules += [
        _names.Rule('map_head/probe', 'attn_pool.latent', _names.batched),
        *_torch.dense(f'{attention}/query', 'attn_pool.q'),
        *_torch.dense(_torch.qkv(attention)[1:], 'attn_pool.kv'),
        *_torch.dense(f'{attention}/out', 'attn_pool.proj', 2),
        *_torch.norm('map_head/norm', 'attn_pool.norm'),
        *_mlp('map_head/mlp', 'attn_pool.mlp'),
    ]
  if num_classes:
    rules += _torch.dense('head', 'head')
  return _names.Table(rules)


def _augreg(
    *,
    patch_size: int,
    depth: int = 4,
    num_classes: int,
    has_cls_token: bool = False,
    **_: object,
) -> _names.Table:
  """The npz files of the ViT and AugReg papers."""
  position = 'Transformer/posembed_input/pos_embedding'
  rules = _flax_ends('', patch_size, position, has_cls_token, num_classes)
  names = _flax_block(
      'MultiHeadDotProductAttention_1',
      ('LayerNorm_0', 'LayerNorm_2'),
      'MlpBlock_3',
  )
  for i in range(depth):
    theirs = f'Transformer/encoderblock_{i}'
    rules += [_names.Rule(f'block_{i}/{x}', f'{theirs}/{y}') for x, y in names]
  return _names.Table(rules, _without_head('', num_classes))


def _big_vision(
    is_scanned_there: bool,
    *,
    patch_size: int,
    depth: int = 4,
    num_classes: int,
    has_cls_token: bool = False,
    pool: str | None = None,
    **_: object,
) -> _names.Table:
  """The npz files of big_vision, with blocks apart or stacked."""
  rules = _flax_ends(
      'params/', patch_size, 'params/pos_embedding', has_cls_token, num_classes
  )
  attention, mlp = 'MultiHeadDotProductAttention_0', 'MlpBlock_0'
  names = _flax_block(attention, ('LayerNorm_0', 'LayerNorm_1'), mlp)
  block = 'params/Transformer/encoderblock'
  for x, y in names:
    if is_scanned_there:
      ours = tuple(f'block_{i}/{x}' for i in range(depth))
      rules.append(_names.Rule(ours, f'{block}/{y}', _names.batched))
    else:
      rules += [
          _names.Rule(f'block_{i}/{x}', f'{block}_{i}/{y}')
          for i in range(depth)
      ]
  if pool == 'map':
    head = 'params/MAPHead_0'
    rules.append(_names.Rule('map_head/probe', f'{head}/probe', _names.batched))
    rules += [
        _names.Rule(f'map_head/{x}', f'{head}/{y}')
        for x, y in _flax_block(attention, ('LayerNorm_0',), mlp)
    ]
  ignored = ['opt/.*', 'chrono/.*', *_without_head('params/', num_classes)]
  return _names.Table(rules, ignored)


def _without_head(prefix: str, num_classes: int) -> list[str]:
  # A head on top of a layer that we lack says nothing without it.
  return [] if num_classes else [f'{prefix}pre_logits/.*', f'{prefix}head/.*']


def _flax_ends(
    prefix: str,
    patch_size: int,
    position: str,
    has_cls_token: bool,
    num_classes: int,
) -> list[_names.Rule]:
  """What lies before and after the blocks, in files of Flax."""
  norm = f'{prefix}Transformer/encoder_norm'
  conv = _names.Layout(
      lambda x, shape: x.reshape(shape),
      lambda x: x.reshape(patch_size, patch_size, -1, x.shape[-1]),
  )
  rules = [
      _names.Rule('embed/kernel', f'{prefix}embedding/kernel', conv),
      _names.Rule('embed/bias', f'{prefix}embedding/bias'),
      _names.Rule('position', position, _names.batched),
      _names.Rule('norm/scale', f'{norm}/scale'),
      _names.Rule('norm/bias', f'{norm}/bias'),
  ]
  if has_cls_token:
    rules.append(_names.Rule('cls_token', f'{prefix}cls', _names.batched))
  if num_classes:
    rules += [
        _names.Rule(f'head/{leaf}', f'{prefix}head/{leaf}')
        for leaf in ('kernel', 'bias')
    ]
  return rules


def _flax_block(
    attention: str, norms: Sequence[str], mlp: str
) -> list[tuple[str, str]]:
  """Our and their paths within a block; with one norm, within a MAP head."""
  our_norms = ('norm_attention', 'norm_mlp') if len(norms) == 2 else ('norm',)
  modules = [
      *((f'attention/{n}', f'{attention}/{n}') for n in (*_torch.QKV, 'out')),
      ('mlp/dense_in', f'{mlp}/Dense_0'),
      ('mlp/dense_out', f'{mlp}/Dense_1'),
  ]
  pairs = [
      (f'{x}/{leaf}', f'{y}/{leaf}')
      for x, y in modules
      for leaf in ('kernel', 'bias')
  ]
  return pairs + [
      (f'{x}/{leaf}', f'{y}/{leaf}')
      for x, y in zip(our_norms, norms)
      for leaf in ('scale', 'bias')
  ]


TABLES: dict[str, Callable[..., _names.Table]] = {
    'hf': _hf,
    'timm': _timm,
    'augreg': _augreg,
    'big_vision': functools.partial(_big_vision, False),
    'big_vision_scanned': functools.partial(_big_vision, True),
}


def arguments(
    naming: str, shapes: Mapping[str, ShapeDtype], config: Config
) -> Json:
  """The arguments of `ViT` for a file.

  Where a file does not say how many heads there are (`hf` without a config,
  `timm`) they are those of the named sizes, else of 64 features each. Images
  are square unless the config says otherwise.

  Args:
    naming: a key of `TABLES`.
    shapes: by name in the file, objects with `.shape`.
    config: the parsed `config.json` of the file; {} if there is none.

  Returns:
    JSON values, without `rngs`.

  Raises:
    ValueError: an array is missing that tells the sizes, or the number of
      positions fits no image.

  Example:
    >>> table = TABLES['timm'](patch_size=2, depth=1, num_classes=0)
    >>> [rule.theirs for rule in table.rules][:2]
    ['patch_embed.proj.weight', 'patch_embed.proj.bias']
  """
  if naming == 'hf':
    return _hf_arguments(shapes, config)
  if naming == 'timm':
    return _timm_arguments(shapes, config)
  return _flax_arguments(naming, shapes)


def _hf_arguments(shapes, config) -> Json:
  prefixes = ('dinov2.', 'vit.', '')
  prefix = next(p for p in prefixes if any(n.startswith(p) for n in shapes))
  layer = f'{prefix}encoder.layer.0.'
  has_layer_scale = f'{layer}layer_scale1.lambda1' in shapes
  is_gated = f'{layer}mlp.weights_in.weight' in shapes
  num_classes = _num_classes(shapes, 'classifier.weight', 0)
  mlp = 'output.dense'
  if has_layer_scale:
    mlp = 'mlp.weights_out' if is_gated else 'mlp.fc2'
  embeddings = f'{prefix}embeddings.'
  width, channels, patch_size, _ = shape_of(
      shapes, f'{embeddings}patch_embeddings.projection.weight'
  )
  rows = shape_of(shapes, f'{embeddings}position_embeddings')[1]
  size = config.get('image_size')
  return dict(
      image_shape=image_shape_of(rows, patch_size, channels, size, True)[0],
      num_classes=num_classes,
      patch_size=patch_size,
      width=width,
      depth=depth_of(shapes, rf'{re.escape(prefix)}encoder\.layer\.(\d+)\..*'),
      num_heads=config.get('num_attention_heads') or num_heads_of(width),
      mlp_width=shape_of(shapes, f'{layer}{mlp}.weight')[1],
      has_cls_token=True,
      pool='cls+mean' if has_layer_scale and num_classes else 'cls',
      has_layer_scale=has_layer_scale,
      is_gated=is_gated,
      activation=activation_of(config.get('hidden_act', 'gelu')),
      epsilon=config.get('layer_norm_eps', 1e-6 if has_layer_scale else 1e-12),
  )


def _timm_arguments(shapes, config) -> Json:
  width, channels, patch_size, _ = shape_of(shapes, 'patch_embed.proj.weight')
  has_cls_token = 'cls_token' in shapes
  size = config.get('pretrained_cfg', {}).get('input_size', [None])[1:]
  image_shape, has_cls_position = image_shape_of(
      shape_of(shapes, 'pos_embed')[1],
      patch_size,
      channels,
      config.get('model_args', {}).get('img_size') or size,
      has_cls_token,
  )
  mlp_width = shape_of(shapes, 'blocks.0.mlp.fc2.weight')[1]
  is_pooled_first = 'fc_norm.weight' in shapes
  pool = 'cls' if has_cls_token and not is_pooled_first else 'mean'
  return dict(
      image_shape=image_shape,
      num_classes=_num_classes(shapes, 'head.weight', 0),
      patch_size=patch_size,
      width=width,
      depth=depth_of(shapes, r'blocks\.(\d+)\..*'),
      num_heads=num_heads_of(width),
      mlp_width=mlp_width,
      has_cls_token=has_cls_token,
      has_cls_position=has_cls_position,
      pool='map' if 'attn_pool.latent' in shapes else pool,
      is_pooled_first=is_pooled_first,
      has_layer_scale='blocks.0.ls1.gamma' in shapes,
      is_gated=shape_of(shapes, 'blocks.0.mlp.fc1.weight')[0] == 2 * mlp_width,
  )


def _flax_arguments(naming, shapes) -> Json:
  is_augreg, is_scanned = naming == 'augreg', naming == 'big_vision_scanned'
  prefix = '' if is_augreg else 'params/'
  position = 'Transformer/posembed_input/' if is_augreg else ''
  block = f'{prefix}Transformer/encoderblock{"" if is_scanned else "_0"}/'
  attention = f'MultiHeadDotProductAttention_{int(is_augreg)}'
  query = shape_of(shapes, f'{block}{attention}/query/kernel')
  mlp = 'MlpBlock_3' if is_augreg else 'MlpBlock_0'
  kernel = shape_of(shapes, f'{prefix}embedding/kernel')
  rows = shape_of(shapes, f'{prefix}{position}pos_embedding')[1]
  has_cls_token = f'{prefix}cls' in shapes
  pool = 'cls' if has_cls_token else 'mean'
  depth = query[0]
  if not is_scanned:
    depth = depth_of(shapes, rf'{prefix}Transformer/encoderblock_(\d+)/.*')
  num_classes = _num_classes(shapes, f'{prefix}head/kernel', 1)
  if f'{prefix}pre_logits/kernel' in shapes:
    num_classes = 0  # The head needs pre_logits, which our model lacks.
  return dict(
      image_shape=image_shape_of(
          rows, kernel[0], kernel[2], None, is_augreg and has_cls_token
      )[0],
      num_classes=num_classes,
      patch_size=kernel[0],
      width=kernel[3],
      depth=depth,
      num_heads=query[-2],
      mlp_width=shape_of(shapes, f'{block}{mlp}/Dense_0/kernel')[-1],
      has_cls_token=has_cls_token,
      has_cls_position=is_augreg,
      pool='map' if f'{prefix}MAPHead_0/probe' in shapes else pool,
      activation='gelu_tanh',
  )


def shape_of(shapes: Mapping[str, ShapeDtype], name: str) -> tuple[int, ...]:
  if name not in shapes:
    raise ValueError(
        f'This is not a vision transformer: {name!r} is missing among '
        f'{len(shapes)} arrays, such as {sorted(shapes)[:3]}.'
    )
  return tuple(shapes[name].shape)


def activation_of(name: str) -> str:
  """Our name of an activation, from its Hugging Face name."""
  if name not in ACTIVATION_NAMES:
    raise ValueError(
        f'Unknown activation {name!r}: expected one of '
        f'{list(ACTIVATION_NAMES)}.'
    )
  return ACTIVATION_NAMES[name]


def depth_of(shapes: Mapping[str, ShapeDtype], pattern: str) -> int:
  matches = [re.fullmatch(pattern, name) for name in shapes]
  return 1 + max(int(m[1]) for m in matches if m)


def _num_classes(shapes: Mapping[str, ShapeDtype], name: str, axis: int) -> int:
  return shapes[name].shape[axis] if name in shapes else 0


def num_heads_of(width: int) -> int:
  known = {width: num_heads for width, _, num_heads, _ in SIZES.values()}
  return known.get(width, max(1, width // 64))


def image_shape_of(
    rows: int,
    patch_size: int,
    channels: int,
    size: Any,
    has_cls_token: bool,
) -> tuple[list[int], bool]:
  """(H, W, C), and whether the first of the positions is of the class token.

  Args:
    rows: number of positions.
    patch_size: of the patches.
    channels: of the images.
    size: of the images, one or two numbers, if the config has it.
    has_cls_token: whether a class token may have a position.
  """
  for num_prefix in (1, 0) if has_cls_token else (0,):
    side = math.isqrt(rows - num_prefix) * patch_size
    sizes = [[side, side]]
    if size:
      sizes.insert(0, [size, size] if isinstance(size, int) else [*size])
    for height, width in sizes:
      # A convolution does not see incomplete patches either.
      height, width = (x // patch_size * patch_size for x in (height, width))
      if height * width == (rows - num_prefix) * patch_size**2:
        return [height, width, channels], bool(num_prefix)
  raise ValueError(
      f'{rows} positions of patches of {patch_size} pixels match no square '
      f'image{f", nor size {size}" if size else ""}: give image_shape.'
  )
