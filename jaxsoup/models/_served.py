"""A fine-tuned model among the files of its encoder: head, size and config.

```
arguments = fitted('bert', 'hf', old_arguments, leaves_of(params), {})
update(files, old_arguments, arguments, labels, 'float32')
```
"""

from collections.abc import Mapping
from collections.abc import Sequence
import json
import re

from jaxsoup.models import _vit_names
from jaxsoup.typing import Config
from jaxsoup.typing import Json
from jaxsoup.typing import Leaf

# JSON files next to weights that depend on head and size.
FILES = 'config.json', 'preprocessor_config.json'
# How the classes of transformers begin, by `model_type`.
_CLASSES = {
    'bert': 'Bert',
    'bit': 'Bit',
    'clip': 'CLIP',
    'clip_vision_model': 'CLIP',
    'dinov2': 'Dinov2',
    'efficientnet': 'EfficientNet',
    'resnet': 'ResNet',
    'vit': 'ViT',
}
# Arguments that say how a model is computed, not what its arrays mean; and
# those that `fitted` sees.
_FREE = {
    'dtype', 'is_scanned', 'is_rematerialized', 'batch_axis', 'momentum',
    'num_classes', 'image_shape', 'has_bias',
}  # fmt: skip


def with_head(
    family: str, names: str, arguments: Config, num_classes: int
) -> Json:
  """The arguments of the same encoder under a head, or of it alone for 0."""
  if family == 't5':
    return dict(arguments)
  made = {**arguments, 'num_classes': num_classes}
  if num_classes and names == 'hf' and arguments.get('has_layer_scale'):
    made['pool'] = 'cls+mean'
  if family == 'clip':
    # A classifier has no texts, and a CLIP no classes.
    for name in ['text'] if num_classes else ['num_classes', 'has_bias']:
      made.pop(name, None)
  return made


def fitted(
    family: str,
    names: str,
    arguments: Config,
    leaves: Mapping[str, Leaf],
    changes: Config,
) -> Json:
  """The arguments of the model that has these leaves, by path.

  Raises a ValueError if what reads such a file computes another one than
  `changes`, arguments that were given to `load`.
  """
  has_head = 'head/kernel' in leaves
  num_classes = leaves['head/kernel'].shape[-1] if has_head else 0
  made = with_head(family, names, arguments, num_classes)
  if any(re.search(r'\bblocks/', path) for path in leaves):
    made['is_scanned'] = True
  if family == 'bert':
    made['has_pooler'] = 'pooler/kernel' in leaves
    if names == 'hf' and has_head and not made['has_pooler']:
      raise ValueError(
          'BertForSequenceClassification has a pooler, and these parameters '
          "have none: load with has_pooler=True, without=['head', 'pooler'], "
          'and fine-tune that.'
      )
  if family == 'clip' and has_head:
    made['has_bias'] = 'head/bias' in leaves
    if 'image/projection/kernel' not in leaves:
      made['embed_width'] = None
  if family == 'vit' and 'position' in leaves:
    *size, channels = made['image_shape']
    made['image_shape'] = changes.get('image_shape') or (
        _vit_names.image_shape_of(
            leaves['position'].shape[0],
            made['patch_size'],
            channels,
            size,
            made.get('has_cls_token', False),
        )[0]
    )
  differing = {
      name: value
      for name, value in changes.items()
      if name in made and name not in _FREE and not isinstance(value, Mapping)
      if json.dumps(value) != json.dumps(made[name])
  }
  if differing and names != 'flax':
    name, value = next(iter(differing.items()))
    raise ValueError(
        f'The model has {name} = {value!r}, but what reads files with the '
        f'names {names!r} computes that of `like`, {made[name]!r}: fine-tune '
        f'with {made[name]!r}, or save with our own names.'
    )
  return made | differing


def update(
    files: dict[str, Json],
    old: Config,
    new: Config,
    labels: Sequence[str] | None,
    dtype: str,
) -> None:
  """Changes JSON files of a model with old arguments for one with new ones.

  Raises a ValueError if there are not as many labels as classes.
  """
  num_classes = new.get('num_classes', 0)
  if labels is not None and len(set(labels)) != num_classes:
    raise ValueError(
        f'labels (--labels) has {len(set(labels))} different names, but the '
        f'head has {num_classes} classes: give one for each, in the order of '
        'the logits.'
    )
  config = files['config.json']
  if old.get('num_classes', 0) != num_classes or labels is not None:
    set_head = _set_timm_head if 'architecture' in config else _set_head
    set_head(config, old, new, labels)
  for name in {'dtype', 'torch_dtype'} & config.keys():
    config[name] = dtype
  if list(old.get('image_shape', ())) != list(new.get('image_shape', ())):
    _set_size(files, new['image_shape'])


def _set_head(config, old, new, labels) -> None:
  """Sets what transformers reads: class, number of classes and their names."""
  num_classes = new.get('num_classes', 0)
  for name in ('num_labels', 'id2label', 'label2id', 'problem_type'):
    config.pop(name, None)
  if bool(old.get('num_classes')) != bool(num_classes):
    kind = config['model_type']
    task = 'ForSequence' if kind == 'bert' else 'ForImage'
    end = f'{task}Classification' if num_classes else 'Model'
    if num_classes and (width := new.get('embed_width')):
      end = 'VisionModelWithProjection'  # What is below the head.
      config.get('vision_config', config)['projection_dim'] = width
    config['architectures'] = [f'{_CLASSES[kind]}{end}']
  if num_classes:
    names = labels or [f'LABEL_{i}' for i in range(num_classes)]
    config['num_labels'] = num_classes
    config['id2label'] = {str(i): name for i, name in enumerate(names)}
    config['label2id'] = {name: i for i, name in enumerate(names)}


def _set_timm_head(config, old, new, labels) -> None:
  """The same for timm, whose classes have the names of their sizes."""
  del old
  for part in (config, config.get('pretrained_cfg', {})):
    part.pop('label_names', None)
    part.pop('label_descriptions', None)
  config['num_classes'] = new['num_classes']
  if labels is not None:
    config['label_names'] = list(labels)


def _set_size(files, image_shape) -> None:
  """Sets the size of images, to which the preprocessor then resizes them."""
  height, width, channels = image_shape
  config = files['config.json']
  if 'architecture' in config:
    config.setdefault('model_args', {})['img_size'] = [height, width]
    size = [channels, height, width]
    config.setdefault('pretrained_cfg', {})['input_size'] = size
    return
  config['image_size'] = height if height == width else [height, width]
  if 'preprocessor_config.json' in files:
    processor = files['preprocessor_config.json']
    processor['size'] = {'height': height, 'width': width}
    processor |= {'do_resize': True, 'do_center_crop': False}
