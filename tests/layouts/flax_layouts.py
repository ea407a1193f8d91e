"""Checkpoints of Flax: its ImageNet example, its guide to NNX, its examples.

`imagenet_*` save the linen `TrainState` of the example, with batch statistics
and momentum, by `flax.training.checkpoints`, in its two formats, and by Orbax.
`nnx_guide*` follow the guide: a whole `nnx.State`, one with statistics and
random keys, and a plain dict. `nnx_example` holds model, optimizer and step.
"""

import pathlib
from typing import Any

import _common
import flax
from flax import linen as nn
from flax import nnx
from flax.training import checkpoints
from flax.training import train_state
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

_STEP = 3


class _ConvNet(nn.Module):
  """One block of the example's ResNet."""

  @nn.compact
  def __call__(self, x, train: bool = True):
    x = nn.Conv(4, (3, 3), use_bias=False, name='conv_init')(x)
    x = nn.BatchNorm(use_running_average=not train, name='bn_init')(x)
    return nn.Dense(3)(x.mean((1, 2)))


class _TrainState(train_state.TrainState):
  batch_stats: Any
  dynamic_scale: Any


def _train_state(seed: int) -> _TrainState:
  model = _ConvNet()
  variables = model.init(jax.random.key(0), jnp.ones((1, 4, 4, 3)))
  state = _TrainState.create(
      apply_fn=model.apply,
      params=variables['params'],
      tx=optax.sgd(0.1, momentum=0.9, nesterov=True),
      batch_stats=variables['batch_stats'],
      dynamic_scale=None,
  )
  return _common.fill(state.replace(step=_STEP if seed < 99 else 0), seed)


def _save_with_flax(run: pathlib.Path, seed: int, *, use_orbax: bool) -> None:
  flax.config.update('flax_use_orbax_checkpointing', use_orbax)
  checkpoints.save_checkpoint_multiprocess(
      run, _train_state(seed), _STEP, keep=3
  )


def _restore_with_flax(run: pathlib.Path):
  return checkpoints.restore_checkpoint(run, _train_state(99))


def _variables_with_flax(run: pathlib.Path):
  """Without a target: what a script for evaluation reads."""
  restored = checkpoints.restore_checkpoint(run, None)
  return {key: restored[key] for key in ('params', 'batch_stats')}


def _save_with_manager(run: pathlib.Path, seed: int) -> None:
  with ocp.CheckpointManager(run) as manager:
    manager.save(_STEP, args=ocp.args.StandardSave(_train_state(seed)))


def _resume_with_manager(run: pathlib.Path):
  with ocp.CheckpointManager(run) as manager:
    target = ocp.args.StandardRestore(_train_state(99))
    return manager.restore(manager.latest_step(), args=target)


def _variables_with_manager(run: pathlib.Path):
  with ocp.CheckpointManager(run) as manager:
    step = manager.latest_step()
    restored = manager.restore(step, args=ocp.args.StandardRestore())
  return {key: restored[key] for key in ('params', 'batch_stats')}


class _Perceptron(nnx.Module):
  """The guide's model; with statistics and keys where they are wanted."""

  def __init__(self, rngs: nnx.Rngs, *, with_keys: bool = False):
    self.linear1 = nnx.Linear(4, 4, rngs=rngs, use_bias=False)
    if with_keys:
      self.norm = nnx.BatchNorm(4, rngs=rngs)
      self.dropout = nnx.Dropout(0.1, rngs=rngs)
    self.linear2 = nnx.Linear(4, 4, rngs=rngs, use_bias=False)


def _save_state(run: pathlib.Path, seed: int, **options) -> None:
  _, state = nnx.split(_Perceptron(nnx.Rngs(0), **options))
  checkpointer = ocp.StandardCheckpointer()
  checkpointer.save(run, _common.fill(state, seed))
  checkpointer.wait_until_finished()


def _restore_state(run: pathlib.Path, **options):
  model = nnx.eval_shape(lambda: _Perceptron(nnx.Rngs(0), **options))
  graphdef, abstract_state = nnx.split(model)
  restored = ocp.StandardCheckpointer().restore(run, abstract_state)
  return nnx.to_pure_dict(nnx.state(nnx.merge(graphdef, restored)))


def _save_pure_dict(run: pathlib.Path, seed: int) -> None:
  state = _common.fill(nnx.state(_Perceptron(nnx.Rngs(0))), seed)
  checkpointer = ocp.StandardCheckpointer()
  checkpointer.save(run, nnx.to_pure_dict(state))
  checkpointer.wait_until_finished()


def _restore_pure_dict(run: pathlib.Path):
  restored = ocp.StandardCheckpointer().restore(run)
  model = nnx.eval_shape(lambda: _Perceptron(nnx.Rngs(0)))
  graphdef, state = nnx.split(model)
  nnx.replace_by_pure_dict(state, restored)
  return nnx.to_pure_dict(nnx.state(nnx.merge(graphdef, state)))


def _training(seed: int):
  model = _Perceptron(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
  return {
      'model': _common.fill(nnx.state(model), seed),
      'optimizer': _common.fill(nnx.state(optimizer), seed),
      'step': _STEP,
  }


def _save_example(run: pathlib.Path, seed: int) -> None:
  with ocp.CheckpointManager(run) as manager:
    manager.save(_STEP, args=ocp.args.StandardSave(_training(seed)))


def _resume_example(run: pathlib.Path):
  with ocp.CheckpointManager(run) as manager:
    target = ocp.args.StandardRestore(_training(99))
    restored = manager.restore(manager.latest_step(), args=target)
  return {
      key: nnx.to_pure_dict(x) if isinstance(x, nnx.State) else x
      for key, x in restored.items()
  }


def _restore_example(run: pathlib.Path):
  """The model alone."""
  handler = ocp.PyTreeCheckpointHandler()
  with ocp.CheckpointManager(run, item_handlers=handler) as manager:
    target = {'model': _training(99)['model']}
    restored = manager.restore(
        manager.latest_step(),
        args=ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        ),
    )
  return nnx.to_pure_dict(restored['model'])


LAYOUTS = {
    'imagenet_msgpack': _common.Layout(
        lambda run, seed: _save_with_flax(run, seed, use_orbax=False),
        _variables_with_flax,
        _restore_with_flax,
    ),
    'imagenet_orbax': _common.Layout(
        lambda run, seed: _save_with_flax(run, seed, use_orbax=True),
        _variables_with_flax,
        _restore_with_flax,
    ),
    'imagenet_manager': _common.Layout(
        _save_with_manager, _variables_with_manager, _resume_with_manager
    ),
    'nnx_guide': _common.Layout(_save_state, _restore_state),
    'nnx_guide_keys': _common.Layout(
        lambda run, seed: _save_state(run, seed, with_keys=True),
        lambda run: _restore_state(run, with_keys=True),
    ),
    'nnx_guide_pure_dict': _common.Layout(_save_pure_dict, _restore_pure_dict),
    'nnx_example': _common.Layout(
        _save_example, _restore_example, _resume_example
    ),
}

if __name__ == '__main__':
  _common.main(LAYOUTS)
