"""The model of an experiment: `model(config)` of its file, or `config.model`.

```
model = architectures.of(experiment)
logits = model.logits_fn(params, {'image': image})
```
"""

import functools
import importlib

from flax import nnx
import jax
import ml_collections

from jaxsoup import models
from jaxsoup.data import preparation
from jaxsoup.experiments import configs
from jaxsoup.train import modeling
from jaxsoup.train.modeling import Model

# Where each family's class is, and what it is called with.
FAMILIES = {
    'vit': ('ViT', ('image',)),
    'bert': ('Bert', ('input_ids', 'attention_mask', 'token_type_ids')),
    'resnet': ('ResNet', ('image',)),
    'efficientnet': ('EfficientNet', ('image',)),
}


def of(experiment: configs.Experiment) -> Model:
  """The model of an experiment: `model(config)` of its file, or `make`."""
  model = (experiment.model_fn or make)(experiment.config)
  if not isinstance(model, Model):
    raise configs.UsageError(
        f'model(config) returned {model!r:.80}: expected a modeling.Model, as '
        'modeling.of_module makes it.'
    )
  return model


def make(config: ml_collections.ConfigDict) -> Model:
  """Makes the model that `config.model` describes.

  Equal descriptions give the same functions, so that what was compiled for
  them is reused.

  Args:
    config: `model.family`, a key of `FAMILIES` ('vit' by default); the
      arguments of its constructor next to it; `inputs`, the shape of each input
      of one example, unless that is `model.image_shape`; `init`, a file or
      directory of weights for all but the head, empty for none; and perhaps
      `image`, fields of `jaxsoup.data.preparation.ImageSpec`.

  Raises:
    UsageError: the config names no such family, or lacks the inputs.
  """
  family = config.model.get('family', 'vit')
  if family not in FAMILIES:
    raise configs.UsageError(
        f'model.family is {family!r}: choose from {", ".join(FAMILIES)}, or '
        'define a function model(config) in the config file.'
    )
  inputs = dict(config.get('inputs', {}))
  if 'image_shape' in config.model:
    inputs.setdefault('image', config.model.image_shape)
  if not inputs:
    raise configs.UsageError(
        'The config has no shapes of its inputs: set inputs=dict(image=(H, W, '
        'C)), or inputs=dict(input_ids=(T,), attention_mask=(T,)).'
    )
  fields = {k: config[k] for k in ('model', 'init', 'image') if k in config}
  return _made(ml_collections.FrozenConfigDict({**fields, 'inputs': inputs}))


@functools.cache
def _made(described: ml_collections.FrozenConfigDict) -> Model:
  arguments, inputs = described.model.to_dict(), described.inputs
  family = arguments.pop('family', 'vit')
  path, image = described.get('init'), described.get('image')
  class_name, names = FAMILIES[family]
  module = importlib.import_module(f'jaxsoup.models.{family}')

  def make_fn(key):
    return getattr(module, class_name)(**arguments, rngs=nnx.Rngs(key))

  def load_fn(key):
    return models.load(
        path,
        family=family,
        without=['head'],
        seed=int(jax.random.bits(key, dtype='uint32')) >> 1,
        **arguments,
    )

  return modeling.of_module(
      make_fn,
      inputs={name: inputs[name] for name in names if name in inputs},
      num_classes=arguments['num_classes'],
      load_fn=load_fn if path else None,
      image=preparation.ImageSpec(**image) if image else None,
  )
