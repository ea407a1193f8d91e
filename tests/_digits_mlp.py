"""The digits with a model that compiles at once: a config for tests."""

import functools
import importlib.util
import pathlib

from flax import nnx

from jaxsoup.train import modeling

_FILE = pathlib.Path(__file__).parent.parent / 'configs' / 'digits.py'
_SPEC = importlib.util.spec_from_file_location('digits_config', _FILE)
_DIGITS = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_DIGITS)
data, sweep = _DIGITS.data, _DIGITS.sweep


class Mlp(nnx.Module):

  def __init__(self, rngs):
    self.embed = nnx.Linear(64, 24, rngs=rngs)
    self.head = nnx.Linear(24, 10, rngs=rngs)

  def features(self, image):
    return nnx.relu(self.embed(image.reshape(len(image), -1)))

  def __call__(self, image):
    return self.head(self.features(image))


@functools.cache
def _model():
  return modeling.of_module(
      lambda key: Mlp(nnx.Rngs(key)),
      inputs={'image': (8, 8, 1)},
      num_classes=10,
  )


def model(config):
  del config
  return _model()


def get_config(arg=None):
  config = _DIGITS.get_config(arg)
  config.sweep.num_runs = config.sweep.group_size = 4
  config.pretrain.num_epochs = 30
  config.finetune.num_epochs = 8
  config.learned.num_epochs = 1
  config.data.sizes.test = 100
  config.data.sizes.held_out = 80
  config.data.other_writers = 100
  if not arg:
    config.recipes = ('uniform', 'greedy')
  return config
