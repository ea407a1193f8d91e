"""Checkpoints of Orbax itself: checkpointers, managers, its new interface."""

import pathlib

import _common
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import v1

_STEP = 3


def _params(seed: int):
  """With a list, whose indices are keys of a checkpoint, and bfloat16."""
  tree = {
      'embed': {'embedding': jnp.zeros((4, 2), jnp.bfloat16)},
      'layers': [{'kernel': jnp.zeros((2, 3)), 'bias': jnp.zeros(3)}] * 2,
      'scale': jnp.zeros(()),
  }
  return _common.fill(tree, seed)


def _state(seed: int):
  params = _params(seed)
  moments = jax.tree.map(lambda x: x / 2, params)
  step = jnp.asarray(_STEP if seed < 99 else 0)
  return {'params': params, 'opt_state': {'mu': moments}, 'step': step}


def _save_pytree(run: pathlib.Path, seed: int) -> None:
  ocp.PyTreeCheckpointer().save(run, _state(seed))


def _resume_pytree(run: pathlib.Path):
  target = _state(99)
  restore_args = ocp.checkpoint_utils.construct_restore_args(target)
  return ocp.PyTreeCheckpointer().restore(
      run, item=target, restore_args=restore_args
  )


def _restore_pytree(run: pathlib.Path):
  """A part of the tree."""
  target = {'params': _params(99)}
  restore_args = ocp.checkpoint_utils.construct_restore_args(target)
  arguments = ocp.args.PyTreeRestore(
      target, restore_args=restore_args, partial_restore=True
  )
  return ocp.PyTreeCheckpointer().restore(run, args=arguments)


def _save_standard(run: pathlib.Path, seed: int) -> None:
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(run, _params(seed))


def _restore_standard(run: pathlib.Path):
  abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _params(99))
  return ocp.StandardCheckpointer().restore(run, abstract)


def _save_step(run: pathlib.Path, arguments, **options) -> None:
  with ocp.CheckpointManager(run, **options) as manager:
    manager.save(_STEP, args=arguments)


def _restore_step(run: pathlib.Path, arguments):
  with ocp.CheckpointManager(run) as manager:
    return manager.restore(manager.latest_step(), args=arguments)


def _save_items(run: pathlib.Path, seed: int) -> None:
  state = _state(seed)
  arguments = ocp.args.Composite(
      params=ocp.args.StandardSave(state['params']),
      opt_state=ocp.args.StandardSave(state['opt_state']),
      config=ocp.args.JsonSave({'width': 2}),
  )
  _save_step(run, arguments)


def _restore_items(run: pathlib.Path, items=('params',)):
  state = _state(99)
  arguments = {item: ocp.args.StandardRestore(state[item]) for item in items}
  if 'opt_state' in items:
    arguments['config'] = ocp.args.JsonRestore()
  restored = _restore_step(run, ocp.args.Composite(**arguments))
  return {item: restored[item] for item in arguments}


def _save_v1_items(run: pathlib.Path, seed: int) -> None:
  state = _state(seed)
  items = {key: state[key] for key in ('params', 'opt_state')}
  v1.save_checkpointables(run, items | {'config': {'width': 2}})


def _restore_v1_items(run: pathlib.Path, items=('params',)):
  state = _state(99)
  return v1.load_checkpointables(run, {key: state[key] for key in items})


def _save_v1_training(run: pathlib.Path, seed: int) -> None:
  with v1.training.Checkpointer(run) as checkpointer:
    checkpointer.save_pytree(_STEP, _state(seed))


def _resume_v1_training(run: pathlib.Path):
  with v1.training.Checkpointer(run) as checkpointer:
    return checkpointer.load_pytree(checkpointer.latest, _state(99))


def _restore_v1_training(run: pathlib.Path):
  context = v1.Context(
      pytree_options=v1.options.PyTreeOptions(
          loading=v1.options.PyTreeOptions.Loading(partial_load=True)
      )
  )
  with context, v1.training.Checkpointer(run) as checkpointer:
    return checkpointer.load_pytree(
        checkpointer.latest, {'params': _params(99)}
    )


_BOTH = ('params', 'opt_state')
LAYOUTS = {
    'pytree': _common.Layout(_save_pytree, _restore_pytree, _resume_pytree),
    'standard': _common.Layout(_save_standard, _restore_standard),
    # One item without a name; and one handler, so that there is no item.
    'manager_default': _common.Layout(
        lambda run, seed: _save_step(run, ocp.args.StandardSave(_state(seed))),
        lambda run: _restore_step(run, ocp.args.StandardRestore(_state(99))),
    ),
    'manager_items': _common.Layout(
        _save_items, _restore_items, lambda run: _restore_items(run, _BOTH)
    ),
    'v1_pytree': _common.Layout(
        lambda run, seed: v1.save_pytree(run, _params(seed)),
        lambda run: v1.load_pytree(run, _params(99)),
    ),
    'v1_checkpointables': _common.Layout(
        _save_v1_items,
        _restore_v1_items,
        lambda run: _restore_v1_items(run, _BOTH),
    ),
    'v1_training': _common.Layout(
        _save_v1_training, _restore_v1_training, _resume_v1_training
    ),
}

if __name__ == '__main__':
  _common.main(LAYOUTS)
