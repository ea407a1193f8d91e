"""Checkpoints of Tunix: a model, alone and with its optimizer."""

import pathlib

import _common
from flax import nnx
import optax
import orbax.checkpoint as ocp
from tunix.sft import checkpoint_manager

_STEP = 3


class _Model(nnx.Module):
  """Two layers with what a transformer of Tunix has: blocks in a list."""

  def __init__(self, rngs: nnx.Rngs):
    self.embedder = nnx.Embed(8, 4, rngs=rngs)
    self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
    self.final_norm = nnx.RMSNorm(4, rngs=rngs)


def _training(seed: int):
  model = _Model(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
  for module in (model, optimizer):
    nnx.update(module, _common.fill(nnx.state(module), seed))
  return model, optimizer


def _manager(run: pathlib.Path) -> checkpoint_manager.CheckpointManager:
  return checkpoint_manager.CheckpointManager(
      str(run), ocp.CheckpointManagerOptions()
  )


def _save(run: pathlib.Path, seed: int, *, with_optimizer: bool) -> None:
  model, optimizer = _training(seed)
  manager = _manager(run)
  manager.save(
      _STEP,
      model,
      optimizer if with_optimizer else None,
      force=True,
      custom_metadata={'global_step': _STEP},
  )
  manager.close()


def _restore(run: pathlib.Path):
  model, _ = _training(99)
  step, _ = _manager(run).maybe_restore(model)
  return {'model': nnx.to_pure_dict(nnx.state(model)), 'step': step}


def _resume(run: pathlib.Path):
  model, optimizer = _training(99)
  step, metadata = _manager(run).maybe_restore(model, optimizer)
  return {
      'model': nnx.to_pure_dict(nnx.state(model)),
      'optimizer': nnx.to_pure_dict(nnx.state(optimizer)),
      'step': step,
      'metadata': metadata,
  }


LAYOUTS = {
    'model': _common.Layout(
        lambda run, seed: _save(run, seed, with_optimizer=False), _restore
    ),
    'training': _common.Layout(
        lambda run, seed: _save(run, seed, with_optimizer=True),
        _restore,
        _resume,
    ),
}

if __name__ == '__main__':
  _common.main(LAYOUTS)
