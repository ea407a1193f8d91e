"""Checkpoints of Keras 3: weights, whole models, and its Orbax callback."""

import pathlib

import _common
import keras
import numpy as np


def _model(seed: int) -> keras.Model:
  keras.utils.clear_session()
  image = keras.Input((2,))
  hidden = keras.layers.Dense(4, name='hidden')(image)
  norm = keras.layers.BatchNormalization(name='norm')(hidden)
  model = keras.Model(image, keras.layers.Dense(3, name='head')(norm))
  model.compile('adam', 'mse')
  model.optimizer.build(model.trainable_variables)
  rng = np.random.default_rng(seed)
  for variable in (*model.weights, *model.optimizer.variables):
    if 'float' in variable.dtype and 'learning_rate' not in variable.path:
      variable.assign(_common.numbers(rng, variable.shape))
  return model


def _variables(model: keras.Model, *, with_optimizer: bool = True):
  variables = model.weights
  if with_optimizer:
    variables = (*variables, *model.optimizer.variables)
  return {x.path: np.asarray(x) for x in variables}


def _load_weights(run: pathlib.Path):
  model = _model(99)
  model.load_weights(run)
  return _variables(model, with_optimizer=False)


def _save_orbax(run: pathlib.Path, seed: int) -> None:
  callback = keras.callbacks.OrbaxCheckpoint(run, save_on_background=False)
  callback.set_model(_model(seed))
  callback.on_epoch_end(0)
  callback.on_train_end()


LAYOUTS = {
    'weights': _common.Layout(
        lambda run, seed: _model(seed).save_weights(run), _load_weights
    ),
    'model': _common.Layout(
        lambda run, seed: _model(seed).save(run),
        lambda run: _variables(keras.models.load_model(run)),
    ),
    'orbax': _common.Layout(
        _save_orbax,
        _load_weights,
        lambda run: _variables(keras.models.load_model(run)),
    ),
}

if __name__ == '__main__':
  _common.main(LAYOUTS)
