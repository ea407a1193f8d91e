"""Checkpoints of Kauldron: the state of a training."""

import pathlib

import _common
from flax import linen as nn
import jax
import jax.numpy as jnp
from kauldron import kd
import optax

_STEP = 3


class _Model(nn.Module):

  @nn.compact
  def __call__(self, x):
    x = nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x))
    return nn.Dense(3)(x)


def _state(seed: int) -> kd.train.TrainState:
  variables = _Model().init(jax.random.key(0), jnp.ones((1, 2)))
  params = variables['params']
  state = kd.train.TrainState(
      step=jnp.asarray(_STEP if seed < 99 else 0),
      params=params,
      collections={'batch_stats': variables['batch_stats']},
      opt_state=optax.adam(1e-3).init(params),
  )
  return _common.fill(state, seed)


def _checkpointer(run: pathlib.Path) -> kd.ckpts.Checkpointer:
  return kd.ckpts.Checkpointer(workdir=run, save_interval_steps=1)


def _save(run: pathlib.Path, seed: int) -> None:
  with _checkpointer(run) as checkpointer:
    checkpointer.save(_state(seed), step=_STEP)
    checkpointer.wait_until_finished()


def _restore(run: pathlib.Path):
  """Without a target. `PartialKauldronLoader` imports what no Orbax has."""
  with _checkpointer(run) as checkpointer:
    restored = checkpointer.restore(kd.ckpts.items.StandardCheckpointItem())
  return {key: restored[key] for key in ('params', 'collections')}


def _resume(run: pathlib.Path):
  with _checkpointer(run) as checkpointer:
    return checkpointer.restore(_state(99))


LAYOUTS = {'training': _common.Layout(_save, _restore, _resume)}

if __name__ == '__main__':
  _common.main(LAYOUTS)
