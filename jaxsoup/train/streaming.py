"""The training of one run on data that are not in memory.

```
streamed = streaming.Streamed(model, settings, hyper, source)
state = streamed.start(params)
state, losses = streamed.epoch(state, 0)
```
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import functools

import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from jaxsoup import evaluation
from jaxsoup import sharding
from jaxsoup.data import sources
from jaxsoup.train import steps


class Streamed:
  """The training of one run on data that are not in memory, on all devices.

  Parameters and the optimizer's state are sharded over the mesh (FSDP), and so
  is each batch; every process reads its own rows.
  """

  def __init__(self, model, settings, hyper, source):
    num_runs = len(hyper['seed'])
    if num_runs > 1:
      raise ValueError(
          f'{num_runs} runs cannot train together on data that are not in '
          'memory, or in several processes: set sweep.group_size to 1.'
      )
    self._model, self._settings, self._source = model, settings, source
    self._hyper = jax.tree.map(lambda x: x[0], jax.device_get(hyper))
    self._mesh = mesh()
    check_divided(settings.batch_size, split(self._mesh))

  def start(self, params: steps.Params) -> steps.State:
    """The state before the first step."""
    return _start(self._model, self._settings, self._mesh, params, self._hyper)

  def epoch(
      self,
      state: steps.State,
      epoch: int,
      start: int = 0,
      after_fn: Callable[[int, steps.State], None] = lambda step, state: None,
  ) -> tuple[steps.State, np.ndarray]:
    """One walk through the data, or what is left of it.

    Args:
      state: before it.
      epoch: its number.
      start: steps of this epoch that are done.
      after_fn: called after each step but the last with the number of steps
        done and the state.

    Returns:
      The state after it, and the mean loss of the steps taken, [1].
    """
    key = jax.random.fold_in(jax.random.key(self._hyper['seed']), epoch)
    losses = []
    for step, batch in enumerate(self._batches(epoch, start), start):
      if step > start:
        after_fn(step, state)
      step_key = jax.random.fold_in(key, step)
      with jax.set_mesh(self._mesh):
        state, loss = step_fn(
            self._model, self._settings, state, self._hyper, batch, step_key
        )
      losses.append(loss)
      # Few steps ahead of the device: batches in flight take memory.
      jax.block_until_ready(losses[-3:][0])
    mean = np.mean(jax.device_get(losses), keepdims=True)
    return state, mean

  def _batches(self, epoch: int, start: int) -> Iterator[dict[str, jax.Array]]:
    for batch in sources.batches(
        self._source,
        self._settings.batch_size,
        seed=int(self._hyper['seed']),
        epoch=epoch,
        start=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    ):
      names = (*self._model.inputs, 'label')
      yield {
          name: jax.make_array_from_process_local_data(
              split(self._mesh), batch[name]
          )
          for name in names
      }


# One program for all runs that are alike, not one for each.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _start(model, settings, on_mesh, params, hyper):
  if 'init_seed' in hyper:
    params = model.init_fn(jax.random.key(hyper['init_seed']))
  init_fn = functools.partial(steps.initial_state, settings)
  abstract = sharded_state(jax.eval_shape(init_fn, params, hyper), on_mesh)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  return jax.lax.with_sharding_constraint(init_fn(params, hyper), shardings)


step_fn = jax.jit(
    steps.train_step, static_argnums=(0, 1), donate_argnames=('state',)
)


def mesh(devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """All devices, or those given, along one axis, `fsdp`."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh(
      (len(devices),), ('fsdp',), axis_types=(AxisType.Auto,), devices=devices
  )


def split(on_mesh: jax.sharding.Mesh) -> NamedSharding:
  """How a batch lies on it: each device has a part of the examples."""
  return NamedSharding(on_mesh, PartitionSpec('fsdp'))


def check_divided(batch_size: int, sharding: NamedSharding) -> None:
  """Raises unless each device gets as many examples of a training batch."""
  if (needed := evaluation.divided(batch_size, sharding)) != batch_size:
    raise ValueError(
        f'finetune.batch_size is {batch_size}, which {sharding.num_devices} '
        f'devices cannot divide: use a multiple, such as {needed}.'
    )


def sharded_state(
    state: steps.State, on_mesh: jax.sharding.Mesh
) -> steps.State:
  """Puts the shardings of FSDP on an abstract state; scalars are replicated."""
  return sharding.fsdp(state, on_mesh)
