"""Names of the weights of CLIP in the files of others.

```
table = TABLES['open_clip'](**arguments('open_clip', arrays.shapes, config))
```
"""

from collections.abc import Callable
from collections.abc import Mapping

from jaxsoup.models import _names
from jaxsoup.models import _torch
from jaxsoup.models import _vit_names
from jaxsoup.typing import Config
from jaxsoup.typing import Json
from jaxsoup.typing import ShapeDtype

_HF_ATTENTION = {
    'query': 'q_proj',
    'key': 'k_proj',
    'value': 'v_proj',
    'out': 'out_proj',
}
# A vector in the file, a row [1, width] here.
_row = _names.Layout(lambda x, shape: x.reshape(shape), lambda x: x[0])


def _hf(
    *,
    image: Config,
    text: Config | None = None,
    **_: object,
) -> _names.Table:
  """CLIPModel of Hugging Face; CLIPVisionModelWithProjection without text."""
  vision = 'vision_model.'
  rules = [
      _embed(f'{vision}embeddings.patch_embedding', image),
      _names.Rule(
          'image/cls_token', f'{vision}embeddings.class_embedding', _row
      ),
      _names.Rule(
          'image/position', f'{vision}embeddings.position_embedding.weight'
      ),
      *_torch.norm('image/norm_embed', f'{vision}pre_layrnorm'),
      *_hf_blocks('image', vision, image['depth']),
      *_torch.norm('image/norm', f'{vision}post_layernorm'),
      _projection('image', 'visual_projection'),
  ]
  if text is not None:
    embeddings = 'text_model.embeddings.'
    rules += [
        _names.Rule(
            'text/embed/embedding', f'{embeddings}token_embedding.weight'
        ),
        _names.Rule('text/position', f'{embeddings}position_embedding.weight'),
        *_hf_blocks('text', 'text_model.', text['depth']),
        *_torch.norm('text/norm', 'text_model.final_layer_norm'),
        _projection('text', 'text_projection'),
        _names.Rule('logit_scale', 'logit_scale'),
    ]
  return _names.Table(rules, [r'.*\.position_ids'])


def _hf_blocks(tower: str, prefix: str, depth: int) -> list[_names.Rule]:
  rules = []
  for i in range(depth):
    ours, theirs = f'{tower}/block_{i}', f'{prefix}encoder.layers.{i}.'
    rules += [
        *_torch.norm(f'{ours}/norm_attention', f'{theirs}layer_norm1'),
        *_torch.norm(f'{ours}/norm_mlp', f'{theirs}layer_norm2'),
        *_torch.dense(f'{ours}/mlp/dense_in', f'{theirs}mlp.fc1'),
        *_torch.dense(f'{ours}/mlp/dense_out', f'{theirs}mlp.fc2'),
    ]
    for name, their_name in _HF_ATTENTION.items():
      rules += _torch.dense(
          f'{ours}/attention/{name}',
          f'{theirs}self_attn.{their_name}',
          2 if name == 'out' else 1,
      )
  return rules


def _open_clip(
    *,
    image: Config,
    text: Config | None = None,
    **_: object,
) -> _names.Table:
  """OpenAI's own names, which open_clip keeps."""
  rules = [
      _embed('visual.conv1', image),
      _names.Rule('image/cls_token', 'visual.class_embedding', _row),
      _names.Rule('image/position', 'visual.positional_embedding'),
      *_torch.norm('image/norm_embed', 'visual.ln_pre'),
      *_open_clip_blocks('image', 'visual.', image['depth']),
      *_torch.norm('image/norm', 'visual.ln_post'),
      _names.Rule('image/projection/kernel', 'visual.proj'),
  ]
  if text is not None:
    rules += [
        _names.Rule('text/embed/embedding', 'token_embedding.weight'),
        _names.Rule('text/position', 'positional_embedding'),
        *_open_clip_blocks('text', '', text['depth']),
        *_torch.norm('text/norm', 'ln_final'),
        _names.Rule('text/projection/kernel', 'text_projection'),
        _names.Rule('logit_scale', 'logit_scale'),
    ]
  # The last three are numbers in OpenAI's own archives.
  ignored = ['attn_mask', 'input_resolution', 'context_length', 'vocab_size']
  return _names.Table(rules, ignored)


def _open_clip_blocks(tower: str, prefix: str, depth: int) -> list[_names.Rule]:
  rules = []
  for i in range(depth):
    ours, theirs = f'{tower}/block_{i}', f'{prefix}transformer.resblocks.{i}.'
    rules += [
        *_torch.norm(f'{ours}/norm_attention', f'{theirs}ln_1'),
        *_torch.norm(f'{ours}/norm_mlp', f'{theirs}ln_2'),
        *_torch.dense(
            _torch.qkv(f'{ours}/attention'),
            f'{theirs}attn.in_proj',
            separator='_',
        ),
        *_torch.dense(f'{ours}/attention/out', f'{theirs}attn.out_proj', 2),
        *_torch.dense(f'{ours}/mlp/dense_in', f'{theirs}mlp.c_fc'),
        *_torch.dense(f'{ours}/mlp/dense_out', f'{theirs}mlp.c_proj'),
    ]
  return rules


def _embed(theirs: str, image: Config) -> _names.Rule:
  layout = _names.patches(image['patch_size'])
  return _names.Rule('image/embed/kernel', f'{theirs}.weight', layout)


def _projection(tower: str, theirs: str) -> _names.Rule:
  return _names.Rule(
      f'{tower}/projection/kernel', f'{theirs}.weight', _names.dense()
  )


TABLES: dict[str, Callable[..., _names.Table]] = {
    'hf': _hf,
    'open_clip': _open_clip,
}


def arguments(
    naming: str, shapes: Mapping[str, ShapeDtype], config: Config
) -> Json:
  """The arguments of `CLIP` for a file.

  Without a config the heads are those of the named sizes of `vit.size`, else of
  64 features each; the activation is GELU under the naming `open_clip`, unless
  the file is an archive of OpenAI's, and QuickGELU under `hf`.

  Args:
    naming: a key of `TABLES`.
    shapes: by name in the file, objects with `.shape`.
    config: the parsed `config.json` of Hugging Face, or `open_clip_config.json`
      of open_clip; {} if there is none.

  Returns:
    JSON values, without `rngs`.

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
  prefix = 'vision_model.'
  image, embed_width = _image(
      shapes,
      embed=f'{prefix}embeddings.patch_embedding.weight',
      position=f'{prefix}embeddings.position_embedding.weight',
      mlp=f'{prefix}encoder.layers.0.mlp.fc1.weight',
      blocks=r'vision_model\.encoder\.layers\.(\d+)\..*',
      projection=('visual_projection.weight', 0),
      size=vision.get('image_size'),
      num_heads=vision.get('num_attention_heads', heads.get('vision')),
  )
  text_config, text = config.get('text_config', {}), None
  if 'text_projection.weight' in shapes:
    prefix = 'text_model.'
    text = _text(
        shapes,
        embed=f'{prefix}embeddings.token_embedding.weight',
        position=f'{prefix}embeddings.position_embedding.weight',
        mlp=f'{prefix}encoder.layers.0.mlp.fc1.weight',
        blocks=r'text_model\.encoder\.layers\.(\d+)\..*',
        num_heads=text_config.get('num_attention_heads', heads.get('text')),
    )
    # Configs with the 2 are older than the attention to it: it means nothing.
    end_id = text_config.get('eos_token_id', 49407 if config else None)
    text['end_id'] = None if end_id == 2 else end_id
  return dict(
      embed_width=embed_width,
      image=image,
      text=text,
      activation=_vit_names.activation_of(
          vision.get('hidden_act', 'quick_gelu')
      ),
      epsilon=vision.get('layer_norm_eps', 1e-5),
  )


def _open_clip_arguments(shapes, config) -> Json:
  vision, text_config = config.get('vision_cfg', {}), config.get('text_cfg', {})
  head_width = vision.get('head_width', 64 if vision else None)
  image, embed_width = _image(
      shapes,
      embed='visual.conv1.weight',
      position='visual.positional_embedding',
      mlp='visual.transformer.resblocks.0.mlp.c_fc.weight',
      blocks=r'visual\.transformer\.resblocks\.(\d+)\..*',
      projection=('visual.proj', 1),
      size=vision.get('image_size'),
      num_heads=None,
  )
  if head_width:
    image['num_heads'] = image['width'] // head_width
  text = None
  if 'text_projection' in shapes:
    text = _text(
        shapes,
        embed='token_embedding.weight',
        position='positional_embedding',
        mlp='transformer.resblocks.0.mlp.c_fc.weight',
        blocks=r'transformer\.resblocks\.(\d+)\..*',
        num_heads=text_config.get('heads', 8 if text_config else None),
    )
  is_quick = config.get('quick_gelu', 'input_resolution' in shapes)
  return dict(
      embed_width=embed_width,
      image=image,
      text=text,
      activation='quick_gelu' if is_quick else 'gelu',
  )


def _image(
    shapes, *, embed, position, mlp, blocks, projection, size, num_heads
) -> tuple[Json, int]:
  """Arguments of the image tower, and the size of the joint space."""
  shape_of = lambda name: _vit_names.shape_of(shapes, name)
  width, channels, patch_size, _ = shape_of(embed)
  rows = shape_of(position)[0]
  name, axis = projection
  tower = dict(
      image_shape=_vit_names.image_shape_of(
          rows, patch_size, channels, size, has_cls_token=True
      )[0],
      patch_size=patch_size,
      width=width,
      depth=_vit_names.depth_of(shapes, blocks),
      num_heads=num_heads or _vit_names.num_heads_of(width),
      mlp_width=shape_of(mlp)[0],
  )
  return tower, shape_of(name)[axis]


def _text(shapes, *, embed, position, mlp, blocks, num_heads) -> Json:
  """Arguments of the text tower."""
  shape_of = lambda name: _vit_names.shape_of(shapes, name)
  vocab_size, width = shape_of(embed)
  return dict(
      vocab_size=vocab_size,
      max_length=shape_of(position)[0],
      width=width,
      depth=_vit_names.depth_of(shapes, blocks),
      num_heads=num_heads or _vit_names.num_heads_of(width),
      mlp_width=shape_of(mlp)[0],
      end_id=None,
  )
