"""Names of the weights of CLIP in the files of others.

```
table = TABLES['open_clip'](**arguments('open_clip', arrays.shapes, config))
```
"""

from collections.abc import Callable
from collections.abc import Mapping
import functools
import re
from typing import Any

from jaxsoup.models import _names
from jaxsoup.models import _torch
from jaxsoup.models import _vit_names
from jaxsoup.typing import Config
from jaxsoup.typing import Json
from jaxsoup.typing import ShapeDtype

# By our names theirs; blocks are followed by their numbers.
_NAMES = {
    'hf': {
        'image/embed': 'vision_model.embeddings.patch_embedding',
        'image/cls_token': 'vision_model.embeddings.class_embedding',
        'image/position': 'vision_model.embeddings.position_embedding.weight',
        'image/norm_embed': 'vision_model.pre_layrnorm',
        'image/block': 'vision_model.encoder.layers',
        'image/norm': 'vision_model.post_layernorm',
        'image/projection/kernel': 'visual_projection.weight',
        'text/embed/embedding': 'text_model.embeddings.token_embedding.weight',
        'text/position': 'text_model.embeddings.position_embedding.weight',
        'text/block': 'text_model.encoder.layers',
        'text/norm': 'text_model.final_layer_norm',
        'text/projection/kernel': 'text_projection.weight',
    },
    # OpenAI's own, which open_clip keeps.
    'open_clip': {
        'image/embed': 'visual.conv1',
        'image/cls_token': 'visual.class_embedding',
        'image/position': 'visual.positional_embedding',
        'image/norm_embed': 'visual.ln_pre',
        'image/block': 'visual.transformer.resblocks',
        'image/norm': 'visual.ln_post',
        'image/projection/kernel': 'visual.proj',
        'text/embed/embedding': 'token_embedding.weight',
        'text/position': 'positional_embedding',
        'text/block': 'transformer.resblocks',
        'text/norm': 'ln_final',
        'text/projection/kernel': 'text_projection',
    },
}
_BLOCKS = {
    'hf': {
        'norm_attention': 'layer_norm1',
        'norm_mlp': 'layer_norm2',
        'mlp/dense_in': 'mlp.fc1',
        'mlp/dense_out': 'mlp.fc2',
        'attention/query': 'self_attn.q_proj',
        'attention/key': 'self_attn.k_proj',
        'attention/value': 'self_attn.v_proj',
        'attention/out': 'self_attn.out_proj',
    },
    'open_clip': {
        'norm_attention': 'ln_1',
        'norm_mlp': 'ln_2',
        'attention/qkv': 'attn.in_proj_',
        'attention/out': 'attn.out_proj',
        'mlp/dense_in': 'mlp.c_fc',
        'mlp/dense_out': 'mlp.c_proj',
    },
}


def _table(
    naming: str,
    *,
    image: Config,
    text: Config | None = None,
    embed_width: int | None = 0,
    num_classes: int = 0,
    has_bias: bool = False,
    **_: object,
) -> _names.Table:
  """Both towers, or that of images alone, perhaps with a head.

  A head on the joint space is in no class of transformers: it has our name.
  """
  # A vector in the file is a row [1, width] here.
  row = _names.Layout(lambda x, shape: x.reshape(shape), lambda x: x[0])
  layouts = {'image/cls_token': row}
  if naming == 'hf':
    for tower in ('image', 'text'):
      layouts[f'{tower}/projection/kernel'] = _names.dense()
  rules = []
  for ours, theirs in _NAMES[naming].items():
    tower, layer = ours.split('/', 1)
    size = image if tower == 'image' else text
    if size is None or embed_width is None and layer.startswith('projection'):
      continue
    if layer == 'block':
      for i in range(size['depth']):
        names = _BLOCKS[naming]
        rules += _torch.layers(f'{ours}_{i}/', f'{theirs}.{i}.', names)
    elif layer == 'embed':
      patches = _names.patches(size['patch_size'])
      rules += _torch.layers(
          '', '', {ours: theirs}, dense=patches, has_bias=False
      )
    elif layer.startswith('norm'):
      rules += _torch.layers('', '', {ours: theirs})
    else:
      rules.append(_names.Rule(ours, theirs, layouts.get(ours, _names.same)))
  if text is not None:
    rules.append(_names.Rule('logit_scale', 'logit_scale'))
  if num_classes:
    head = 'classifier' if embed_width is None else 'head'
    rules += _torch.layers('', '', {'head': head}, has_bias=has_bias)
  ignored = [r'.*\.position_ids']
  if naming == 'open_clip':
    # The last three are numbers in OpenAI's own archives.
    ignored = ['attn_mask', 'input_resolution', 'context_length', 'vocab_size']
  return _names.Table(rules, ignored)


TABLES: dict[str, Callable[..., _names.Table]] = {
    naming: functools.partial(_table, naming) for naming in _NAMES
}


def arguments(
    naming: str, shapes: Mapping[str, ShapeDtype], config: Config
) -> Json:
  """The arguments of `CLIP` for a file.

  Without a config the heads are those of the named sizes of `vit.size`, else of
  64 features each; the activation is GELU under the naming `open_clip`, unless
  the file is an archive of OpenAI's, and QuickGELU under `hf`.

  See `vit.arguments` for what it takes and returns.

  Raises:
    ValueError: an array is missing that tells the sizes, or the number of
      positions fits no image.
  """
  if naming == 'hf':
    return _hf_arguments(shapes, config)
  return _open_clip_arguments(shapes, config.get('model_cfg', config))


def _hf_arguments(shapes, config) -> Json:
  # What a config leaves out is the default of its class.
  heads = {'vision': 12, 'text': 8} if config else {}
  vision = config.get('vision_config', config)
  text_config = config.get('text_config', {})
  towers = _towers(
      'hf',
      shapes,
      vision.get('image_size'),
      vision.get('num_attention_heads', heads.get('vision')),
      text_config.get('num_attention_heads', heads.get('text')),
  )
  if towers.get('text'):
    # Configs with the 2 are older than the attention to it: it means nothing.
    end_id = text_config.get('eos_token_id', 49407 if config else None)
    towers['text']['end_id'] = None if end_id == 2 else end_id
  return dict(
      towers,
      activation=_vit_names.activation_of(
          vision.get('hidden_act', 'quick_gelu')
      ),
      epsilon=vision.get('layer_norm_eps', 1e-5),
  )


def _open_clip_arguments(shapes, config) -> Json:
  vision, text = config.get('vision_cfg', {}), config.get('text_cfg', {})
  head_width = vision.get('head_width', 64 if vision else None)
  text_heads = text.get('heads', 8 if text else None)
  size = vision.get('image_size')
  towers = _towers('open_clip', shapes, size, None, text_heads)
  if head_width:
    towers['image']['num_heads'] = towers['image']['width'] // head_width
  is_quick = config.get('quick_gelu', 'input_resolution' in shapes)
  return dict(towers, activation='quick_gelu' if is_quick else 'gelu')


def _towers(
    naming: str,
    shapes: Mapping[str, ShapeDtype],
    size: Any,
    image_heads: int | None,
    text_heads: int | None,
) -> Json:
  """What shapes tell: `embed_width`, and arguments of the two towers."""
  names, block = _NAMES[naming], _BLOCKS[naming]
  shape_of = lambda name: _vit_names.shape_of(shapes, name)

  def transformer(tower, width, num_heads):
    blocks = names[f'{tower}/block']
    mlp = f'{blocks}.0.{block["mlp/dense_in"]}.weight'
    return dict(
        width=width,
        depth=_names.depth_of(shapes, rf'{re.escape(blocks)}\.'),
        num_heads=num_heads or _vit_names.num_heads_of(width),
        mlp_width=shape_of(mlp)[0],
    )

  width, channels, patch_size, _ = shape_of(f'{names["image/embed"]}.weight')
  rows = shape_of(names['image/position'])[0]
  image_shape, _ = _vit_names.image_shape_of(
      rows, patch_size, channels, size, has_cls_token=True
  )
  image = dict(
      transformer('image', width, image_heads),
      image_shape=image_shape,
      patch_size=patch_size,
  )
  head = 'classifier' if 'classifier.weight' in shapes else 'head'
  embed_width = None
  if head == 'head':
    projection = shape_of(names['image/projection/kernel'])
    embed_width = projection[0 if naming == 'hf' else 1]
  if f'{head}.weight' in shapes:
    return dict(
        num_classes=shape_of(f'{head}.weight')[0],
        has_bias=f'{head}.bias' in shapes,
        embed_width=embed_width,
        image=image,
    )
  text = None
  if names['text/projection/kernel'] in shapes:
    vocab_size, width = shape_of(names['text/embed/embedding'])
    text = dict(
        transformer('text', width, text_heads),
        vocab_size=vocab_size,
        max_length=shape_of(names['text/position'])[0],
        end_id=None,
    )
  return dict(embed_width=embed_width, image=image, text=text)
