"""Checkpoints of MaxText: the state of a training, and parameters alone."""

import pathlib

import _common
from flax import nnx
import maxtext
from maxtext.common import checkpointing
from maxtext.common import train_state_nnx
from maxtext.configs import pyconfig
from maxtext.utils import maxtext_utils
from maxtext.utils import model_creation_utils
from maxtext.utils import train_utils

_STEP = 3
_TOY = dict(
    run_name='toy',
    skip_jax_distributed_system=True,
    hardware='cpu',
    base_emb_dim=8,
    base_num_query_heads=2,
    base_num_kv_heads=2,
    base_mlp_dim=4,
    base_num_decoder_layers=3,
    head_dim=4,
    vocab_size=16,
    max_target_length=4,
    per_device_batch_size=1,
    dataset_type='synthetic',
    async_checkpointing=False,
    enable_goodput_recording=False,
    monitor_goodput=False,
)


class _Training:
  """What MaxText's trainer sets up before its first step."""

  def __init__(self, run: pathlib.Path, **options):
    folder = pathlib.Path(maxtext.__file__).parent / 'configs'
    options = dict(base_output_directory=str(run), **_TOY) | options
    arguments = [f'{key}={value}' for key, value in options.items()]
    self.config = pyconfig.initialize(
        ['', str(folder / 'base.yml'), *arguments]
    )
    self.mesh = maxtext_utils.get_mesh_from_config(self.config)
    create, model = model_creation_utils.create_nnx_abstract_model(
        self.config, self.mesh
    )
    _, tx = train_utils.create_training_optimizer(self.config, model, self.mesh)

    def init():
      model = create()
      optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      return train_state_nnx.TrainStateNNX(model, optimizer)

    self.init = init

  def manager(self, run: pathlib.Path):
    return checkpointing.create_orbax_checkpoint_manager(
        str(run), True, False, 1
    )

  def state(self, manager=None):
    """The initial one, in which MaxText puts what it restores."""
    return maxtext_utils.setup_initial_state(
        None, self.config, self.mesh, manager, self.init
    )[0]


def _filled(training: _Training, seed: int) -> nnx.State:
  state = _common.fill(nnx.state(training.state()), seed)
  arrays = state.to_pure_dict()
  arrays['optimizer']['step'] += _STEP
  nnx.replace_by_pure_dict(state, arrays)
  return state


def _save(run: pathlib.Path, seed: int) -> None:
  training = _Training(run.parent / 'logs')
  state = _filled(training, seed)
  manager = training.manager(run)
  checkpointing.save_checkpoint(manager, _STEP, state, training.config)
  manager.close()


def _save_params(run: pathlib.Path, seed: int) -> None:
  training = _Training(run.parent / 'logs')
  state = _filled(training, seed)
  params = train_state_nnx.to_checkpoint_dict(state)['params']
  checkpointing.save_params_to_path(str(run), params)


def _restore(run: pathlib.Path):
  """`load_parameters_path`: a training or a decoder starts with these."""
  if (run / str(_STEP)).exists():
    run = run / str(_STEP) / 'items'
  training = _Training(run.parent / 'logs', load_parameters_path=str(run))
  return nnx.state(training.state())['model'].to_pure_dict()


def _resume(run: pathlib.Path):
  """The training goes on in its directory."""
  training = _Training(run.parent / 'logs')
  state = training.state(training.manager(run))
  return nnx.to_pure_dict(nnx.state(state))


LAYOUTS = {
    'state': _common.Layout(_save, _restore, _resume),
    'params': _common.Layout(_save_params, _restore),
}

if __name__ == '__main__':
  _common.main(LAYOUTS)
