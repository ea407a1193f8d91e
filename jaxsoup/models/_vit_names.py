"""Names of the weights of vision transformers in the files of others.

```
table = TABLES['timm'](**arguments('timm', arrays.shapes, config))
```
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
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


_HF_BLOCK = {
    'norm_attention': 'layernorm_before',
    'norm_mlp': 'layernorm_after',
    'mlp/dense_in': 'intermediate.dense',
    'mlp/dense_out': 'output.dense',
}
_DINOV2_BLOCK = {
    'norm_attention': 'norm1',
    'norm_mlp': 'norm2',
    'scale_attention': 'layer_scale1.lambda1',
    'scale_mlp': 'layer_scale2.lambda1',
}
_HF_ATTENTION = {
    'attention/query': 'attention.attention.query',
    'attention/key': 'attention.attention.key',
    'attention/value': 'attention.attention.value',
    'attention/out': 'attention.output.dense',
}
_MLP = {'mlp/dense_in': 'mlp.fc1', 'mlp/dense_out': 'mlp.fc2'}
_GATED_MLP = {'mlp/dense_gate_in': 'mlp.fc1', 'mlp/dense_out': 'mlp.fc2'}


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
  block = _HF_ATTENTION | (
      _DINOV2_BLOCK | _MLP if has_layer_scale else _HF_BLOCK
  )
  if has_layer_scale and is_gated:
    del block['mlp/dense_in']
    block['mlp/dense_gate_in'] = 'mlp.weights_in'
    block['mlp/dense_out'] = 'mlp.weights_out'
  embeddings = f'{prefix}embeddings.'
  rules = [
      *_stem(f'{embeddings}patch_embeddings.projection', patch_size),
      _names.Rule('cls_token', f'{embeddings}cls_token', _names.batched),
      _names.Rule(
          'position', f'{embeddings}position_embeddings', _names.batched
      ),
      *_torch.layers('', prefix, {'norm': 'layernorm'}),
  ]
  for i in range(depth):
    theirs = f'{prefix}encoder.layer.{i}.'
    rules += _torch.layers(f'block_{i}/', theirs, block)
  if num_classes:
    rules += _torch.layers('', '', {'head': 'classifier'})
  parts = r'embeddings\.|encoder\.|layernorm\.|pooler\.'
  return _names.Table(
      rules,
      ignored=(
          rf'({re.escape(family)})?pooler\..*',
          r'.*embeddings\.mask_token',
      ),
      aliases=((rf'^({re.escape(family)})?(?={parts})', prefix),),
  )


def _stem(theirs: str, patch_size: int) -> list[_names.Rule]:
  layout = _names.patches(patch_size)
  return _torch.layers('', '', {'embed': theirs}, dense=layout)


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
  ends = {'norm': 'fc_norm' if is_pooled_first else 'norm'}
  rules = [
      *_stem('patch_embed.proj', patch_size),
      _names.Rule('position', 'pos_embed', _names.batched),
  ]
  if has_cls_token:
    rules.append(_names.Rule('cls_token', 'cls_token', _names.batched))
  block = {
      'norm_attention': 'norm1',
      'norm_mlp': 'norm2',
      'attention/qkv': 'attn.qkv',
      'attention/out': 'attn.proj',
      **(_GATED_MLP if is_gated else _MLP),
  }
  if has_layer_scale:
    block |= {'scale_attention': 'ls1.gamma', 'scale_mlp': 'ls2.gamma'}
  for i in range(depth):
    rules += _torch.layers(f'block_{i}/', f'blocks.{i}.', block)
  if pool == 'map':
    map_head = {
        'attention/query': 'q',
        'attention/kv': 'kv',
        'attention/out': 'proj',
        'norm': 'norm',
    }
    rules.append(
        _names.Rule('map_head/probe', 'attn_pool.latent', _names.batched)
    )
    rules += _torch.layers('map_head/', 'attn_pool.', map_head | _MLP)
  if num_classes:
    ends['head'] = 'head'
  return _names.Table([*rules, *_torch.layers('', '', ends)])


def _flax(
    naming: str,
    *,
    patch_size: int,
    depth: int = 4,
    num_classes: int,
    has_cls_token: bool = False,
    pool: str | None = None,
    **_: object,
) -> _names.Table:
  """The npz files of AugReg and of big_vision, with blocks apart or stacked."""
  prefix, position = 'params/', ''
  attention, mlp, second = (
      'MultiHeadDotProductAttention_0',
      'MlpBlock_0',
      'LayerNorm_1',
  )
  if naming == 'augreg':
    prefix, position = '', 'Transformer/posembed_input/'
    attention, mlp, second = (
        'MultiHeadDotProductAttention_1',
        'MlpBlock_3',
        'LayerNorm_2',
    )
  inside = {f'attention/{n}': f'{attention}/{n}' for n in (*_torch.QKV, 'out')}
  inside |= {
      'mlp/dense_in': f'{mlp}/Dense_0',
      'mlp/dense_out': f'{mlp}/Dense_1',
  }
  layers = {'embed': 'embedding', 'norm': 'Transformer/encoder_norm'}
  arrays = {'position': f'{position}pos_embedding'}
  ignored = ['opt/.*', 'chrono/.*']
  if has_cls_token:
    arrays['cls_token'] = 'cls'
  if num_classes:
    layers['head'] = 'head'
  else:  # A head on top of a layer that we lack says nothing without it.
    ignored += [f'{prefix}pre_logits/.*', f'{prefix}head/.*']
  if pool == 'map' and naming != 'augreg':
    arrays['map_head/probe'] = 'MAPHead_0/probe'
    layers |= {f'map_head/{x}': f'MAPHead_0/{y}' for x, y in inside.items()}
    layers['map_head/norm'] = 'MAPHead_0/LayerNorm_0'
  rules = [
      _names.Rule(x, prefix + y, _names.batched) for x, y in arrays.items()
  ]
  conv = _names.Layout(
      lambda x, shape: x.reshape(shape),
      lambda x: x.reshape(patch_size, patch_size, -1, x.shape[-1]),
  )
  for x, y, leaf in _flax_leaves(layers):
    layout = conv if (x, leaf) == ('embed', 'kernel') else _names.same
    rules.append(_names.Rule(f'{x}/{leaf}', f'{prefix}{y}/{leaf}', layout))
  block = inside | {'norm_attention': 'LayerNorm_0', 'norm_mlp': second}
  for x, y, leaf in _flax_leaves(block):
    ours = tuple(f'block_{i}/{x}/{leaf}' for i in range(depth))
    theirs = f'{prefix}Transformer/encoderblock'
    if naming == 'big_vision_scanned':
      rules.append(_names.Rule(ours, f'{theirs}/{y}/{leaf}', _names.batched))
    else:
      rules += [
          _names.Rule(path, f'{theirs}_{i}/{y}/{leaf}')
          for i, path in enumerate(ours)
      ]
  return _names.Table(rules, ignored)


def _flax_leaves(layers: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
  """Our and their name of each layer with those of its two leaves."""
  for x, y in layers.items():
    is_norm = x.rpartition('/')[2].startswith('norm')
    yield x, y, 'scale' if is_norm else 'kernel'
    yield x, y, 'bias'


TABLES: dict[str, Callable[..., _names.Table]] = {
    'hf': _hf,
    'timm': _timm,
    **{
        naming: functools.partial(_flax, naming)
        for naming in ('augreg', 'big_vision', 'big_vision_scanned')
    },
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
      depth=_names.depth_of(shapes, rf'{re.escape(prefix)}encoder\.layer\.'),
      num_heads=config.get('num_attention_heads') or num_heads_of(width),
      mlp_width=shape_of(shapes, f'{layer}{mlp}.weight')[1],
      has_cls_token=True,
      pool='cls+mean' if has_layer_scale and num_classes else 'cls',
      has_layer_scale=has_layer_scale,
      is_gated=is_gated,
      activation=activation_of(config.get('hidden_act', 'gelu')),
      epsilon=config.get('layer_norm_eps', 1e-6 if has_layer_scale else 1e-12),
  )


# What neither shapes nor settings tell, by the beginnings of timm's names.
_HAVE_16_HEADS = ('vit_base_patch16_gap_224', 'vit_giantopt_patch16_')
_HAVE_GELU_TANH = (
    'vit_base_patch32_siglip_',
    'vit_giantopt_patch16_siglip_',
    'vit_large_patch16_siglip_512',
    'vit_large_patch16_siglip_gap_512',
    'vit_so400m_patch16_siglip_',
)


def _timm_arguments(shapes, config) -> Json:
  name = config.get('architecture', '')
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
      depth=_names.depth_of(shapes, r'blocks\.'),
      num_heads=16 if name.startswith(_HAVE_16_HEADS) else num_heads_of(width),
      mlp_width=mlp_width,
      activation='gelu_tanh' if name.startswith(_HAVE_GELU_TANH) else 'gelu',
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
    depth = _names.depth_of(shapes, f'{prefix}Transformer/encoderblock_')
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

  `rows` is the number of positions, and `size`, if the config has it, one or
  two numbers.
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
      f'image{f", nor size {size}" if size else ""}: pass image_shape= to '
      'models.load, save or convert.'
  )
