"""Trains models: one from scratch, a head alone, or a sweep from one start.

```
theta_0 = model.start_fn(jax.random.key(0))
theta_0 = loop.probe(model, config.probe, theta_0, splits.train)
stacked = loop.train(model, config.finetune, theta_0, runs, splits.train)
```

`runs` is a list of plain dicts of hyper-parameters. All runs of one call train
together, vmapped, so hyper-parameters are traced. Where the start lies on a
mesh, so do their state (FSDP) and each batch of it, of which every process
reads its own rows. Otherwise data in memory go to the device as a whole, and an
epoch is one compiled scan. A run depends on its own dict and, in its last bits,
on the number of runs in the call and on the mesh; the same call gives the same
bits.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import functools
import itertools
import operator
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from jaxsoup import evaluation
from jaxsoup import running_average
from jaxsoup import sharding
from jaxsoup.data import sources
from jaxsoup.train import augmentation
from jaxsoup.train import modeling
from jaxsoup.train import steps
from jaxsoup.train import unfinished
from jaxsoup.typing import Config

# Epochs done, epochs, losses [K].
Progress = Callable[[int, int, np.ndarray], None]
# Name of a copy that is kept ('ema_0.99', 'step_200'), its stacked parameters.
Keep = Callable[[str, steps.Params], None]
# Row of the run in the call, and what is logged: `step`, `loss` and so on.
Log = Callable[[int, Mapping[str, float]], None]
# The keys of augmentations are none of those that parameters are drawn by.
_AUGMENTATIONS = int.from_bytes(b'augm')
_first = operator.itemgetter(0)


def train(
    model: modeling.Model,
    phase: Config,
    params: steps.Params,
    runs: Sequence[steps.Run],
    source: sources.Source,
    *,
    progress_fn: Progress = lambda *_: None,
    saved: unfinished.Saved | None = None,
    keep_fn: Keep | None = None,
    log_fn: Log | None = None,
    log_every: int = 50,
) -> steps.Params:
  """Trains a group of runs from one start.

  Args:
    model: of `modeling.of_module`.
    phase: such as `config.finetune`; what it may hold is in `steps.Settings`.
    params: theta_0, the common start.
    runs: K dicts with keys of `DEFAULTS`, which fills in what is missing, of
      `OTHERS`, `STATIC` (alike in all) and of `augmentation.ALL`.
    source: the training data; those in memory may be `distilled`.
    progress_fn: called after each epoch with (epochs done, epochs,
      losses [K]).
    saved: where the state is kept in between; the result does not depend on
      how often the training was stopped.
    keep_fn: called with the name and the stacked parameters of each copy that
      is kept next to the last one; the next step reuses the arrays.
    log_fn: called for each run with its row and the means of `log_every` steps:
      `step`, `epoch`, `loss`, `learning_rate`, `gradient_norm`, and
      `examples_per_second` of all runs together.
    log_every: steps; what is left of an epoch is logged as well.

  Returns:
    Stacked parameters, leaves [K, ...], in the order of `runs`.

  Raises:
    ValueError: there are no runs, a run has an unknown hyper-parameter, or the
      data do not fill one batch.
  """
  settings = steps.settings_of(phase, runs, len(source))
  hyper = steps.stack_runs(runs)
  mesh, is_local = mesh_of(params), jax.process_count() == 1
  if mesh is None and not (is_local and hasattr(source, 'arrays')):
    mesh = all_devices()
  data, walk = _feed(model, settings, hyper, source, mesh)
  state = start(model, settings, mesh, params, hyper)
  num_done, state = saved.restore(state) if saved else (0, state)
  num_steps = len(source) // settings.batch_size
  with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
    for epoch in range(num_done // num_steps, settings.num_epochs):
      before = epoch * num_steps
      seen = _Seen(settings, hyper, before, num_steps, log_fn, log_every)
      done = max(num_done - before, 0)
      for inputs in walk(epoch, done):
        place = jax.device_put((np.int32(epoch), np.int32(done)))
        state, metrics = advance(
            model, settings, state, hyper, data, *place, inputs
        )
        done += seen.add(metrics, done)
        if keep_fn is not None and before + done in settings.keep_steps:
          keep_fn(f'step_{before + done}', state.params)
        if saved and done < num_steps:
          saved.after(before + done, state)
      progress_fn(epoch + 1, settings.num_epochs, seen.losses())
      if saved:
        saved.after(before + num_steps, state)
  if keep_fn is not None:
    for name, copy in state.ema.items():
      keep_fn(name, jax.vmap(running_average().value)(copy))
  return state.params


def _feed(model, settings, hyper, source, mesh):
  """What `advance` takes: data or None, and (epoch, start) -> its inputs.

  Without a mesh the data lie on the device as a whole, and the inputs are rows
  of it, [K, steps, B]: of an epoch, or up to a step after which parameters are
  kept, or of one step where `is_scanned` is false. On a mesh they are batches,
  [K, 1, B, ...].
  """
  seeds = jax.device_get(hyper['seed']).tolist()
  size, num_steps = settings.batch_size, len(source) // settings.batch_size
  names = {*model.inputs, 'label', 'target'}
  only = lambda batch: {k: x for k, x in batch.items() if k in names}
  if mesh is None:

    def rows_of(epoch, start):
      order = [sources.shuffled(len(source), seed, epoch) for seed in seeds]
      rows = np.stack(order)[:, : num_steps * size]
      rows = rows.reshape(len(seeds), num_steps, size).astype(np.int32)
      kept = {step - epoch * num_steps for step in settings.keep_steps}
      each = range(num_steps) if not settings.is_scanned else kept
      ends = sorted(x for x in {*each, num_steps} if start < x <= num_steps)
      for first, last in itertools.pairwise([start, *ends]):
        yield jax.device_put(rows[:, first:last])

    return jax.device_put(only(source.arrays)), rows_of
  check_divided(size, mesh)

  def batches_of(epoch, start):
    walks = [
        sources.batches(
            source,
            size,
            seed=seed,
            epoch=epoch,
            start=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        for seed in seeds
    ]

    def placed(*xs):
      x = np.stack(xs) if len(xs) > 1 else xs[0][None]  # Of one without a copy.
      on_mesh = stacked_split(mesh)
      return jax.make_array_from_process_local_data(on_mesh, x[:, None])

    for batches in zip(*walks):
      yield jax.tree.map(placed, *map(only, batches))

  return None, batches_of


class _Seen:
  """Metrics of the steps of an epoch, logged as means over some of them."""

  def __init__(self, settings, hyper, before, num_steps, log_fn, every):
    self._settings, self._before, self._num_steps = settings, before, num_steps
    self._rates = jax.device_get(hyper['learning_rate']).tolist()
    self._log_fn, self._every = log_fn, every
    self._recent: list[Any] = []
    self._time = time.monotonic()
    self._losses: list[np.ndarray] = []

  def add(self, values, done: int) -> int:
    """Adds the metrics of a program, [K, steps]; returns how many steps."""
    num = values['loss'].shape[1]
    self._recent.append(values)
    # Few programs ahead of the device: batches in flight take memory.
    jax.block_until_ready(self._recent[-3:][0])
    if num * len(self._recent) >= self._every or done + num == self._num_steps:
      self._log(done + num)
    return num

  def losses(self) -> np.ndarray:
    """Their means, [K]."""
    return np.concatenate(self._losses, axis=1).mean(1)

  def _log(self, done: int) -> None:
    recent = jax.device_get(self._recent)
    recent = {k: np.concatenate([x[k] for x in recent], 1) for k in recent[0]}
    self._losses.append(recent['loss'])
    num, now = recent['loss'].shape[1], time.monotonic()
    settings = self._settings
    examples = num * settings.batch_size * len(self._rates)
    speed = round(examples / max(now - self._time, 1e-9), 1)
    self._recent, self._time = [], now
    for first in range(0, num if self._log_fn else 0, self._every):
      last = min(first + self._every, num)
      step = self._before + done - num + last
      share = steps.schedule(settings, (step - 1) // settings.num_accumulated)
      for row, peak in enumerate(self._rates):
        means = {k: float(x[row, first:last].mean()) for k, x in recent.items()}
        place = {'step': step, 'epoch': (step - 1) // self._num_steps + 1}
        means['learning_rate'] = peak * float(share)
        means['examples_per_second'] = speed
        self._log_fn(row, {**place, **means})


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames=('state',))
def advance(model, settings, state, hyper, data, epoch, first, inputs):
  """Some steps of all runs: the state after them, and metrics [K, steps].

  Leaves of the state, which is donated, and of `hyper` are [K, ...]. The inputs
  [K, steps, B, ...] are batches, or rows of the arrays in `data`. `first` is
  the number of the first step in the epoch.
  """

  def run_fn(state, hyper, inputs):
    key = jax.random.fold_in(jax.random.key(hyper['seed']), _AUGMENTATIONS)
    key = jax.random.fold_in(key, epoch)

    def step_fn(state, xs):
      step, batch = xs
      if data is not None:
        batch = jax.tree.map(lambda x: x[batch], data)
      step_key = jax.random.fold_in(key, step)
      return steps.train_step(model, settings, state, hyper, batch, step_key)

    num = len(jax.tree.leaves(inputs)[0])
    if num > 1:
      return jax.lax.scan(step_fn, state, (first + jnp.arange(num), inputs))
    state, metrics = step_fn(state, (first, jax.tree.map(_first, inputs)))
    return state, jax.tree.map(lambda x: x[None], metrics)

  if len(hyper['seed']) > 1:
    return jax.vmap(run_fn)(state, hyper, inputs)
  # A convolution that is vmapped takes a third longer on a CPU.
  one = jax.tree.map(_first, (state, hyper, inputs))
  return jax.tree.map(lambda x: x[None], run_fn(*one))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def start(model, settings, mesh, params, hyper):
  """The state of K runs before their first steps, on the mesh if there is one.

  Its leaves are [K, ...], each run sharded as by `jaxsoup.sharding.fsdp`; runs
  with `init_seed` draw their own parameters.
  """

  def run_fn(hyper):
    begin = params
    if 'init_seed' in hyper:
      begin = model.init_fn(jax.random.key(hyper['init_seed']))
    return steps.initial_state(settings, begin, hyper)

  state = jax.vmap(run_fn)(hyper)
  if mesh is None:
    return state
  abstract = abstract_state(settings, mesh, params, hyper)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  return jax.lax.with_sharding_constraint(state, shardings)


def abstract_state(settings, mesh, params, hyper):
  """Shapes and shardings of what `start` returns on a mesh."""
  (num,) = hyper['seed'].shape
  scalar = lambda x: jax.ShapeDtypeStruct((), x.dtype)
  init_fn = functools.partial(steps.initial_state, settings)
  one = jax.eval_shape(init_fn, params, jax.tree.map(scalar, hyper))
  on_mesh = sharding.fsdp(one, mesh)
  return jax.tree.map(functools.partial(stacked, num=num), on_mesh)


def stacked(x: jax.ShapeDtypeStruct, num: int) -> jax.ShapeDtypeStruct:
  """The shape of `num` such arrays on one mesh, each sharded like it."""
  spec = PartitionSpec(None, *x.sharding.spec)
  return jax.ShapeDtypeStruct(
      (num, *x.shape), x.dtype, sharding=NamedSharding(x.sharding.mesh, spec)
  )


def all_devices(
    devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """A mesh of all devices, or of those given, along one axis, `fsdp`."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh(
      (len(devices),), ('fsdp',), axis_types=(AxisType.Auto,), devices=devices
  )


def split(mesh: jax.sharding.Mesh) -> NamedSharding:
  """How a batch lies on it: each device has a part of the examples."""
  return NamedSharding(mesh, PartitionSpec('fsdp'))


def stacked_split(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The same for the inputs of `advance`, [K, steps, B, ...]."""
  return NamedSharding(mesh, PartitionSpec(None, None, 'fsdp'))


def check_divided(batch_size: int, mesh: jax.sharding.Mesh) -> None:
  """Raises unless each device gets as many examples of a training batch."""
  if batch_size % mesh.size:
    raise ValueError(
        f'batch_size is {batch_size}, which cannot be divided among '
        f'{mesh.size} devices: use a multiple of {mesh.size}.'
    )


def mesh_of(params: steps.Params) -> jax.sharding.Mesh | None:
  """The mesh that the parameters lie on; None if that is one device."""
  shardings = (getattr(x, 'sharding', None) for x in jax.tree.leaves(params))
  meshes = (getattr(x, 'mesh', None) for x in shardings)
  is_mesh = lambda x: isinstance(x, jax.sharding.Mesh) and x.size > 1
  return next(filter(is_mesh, meshes), None)


def distilled(source: sources.Arrays, logits: np.ndarray) -> sources.Arrays:
  """Training data whose targets are the predictions of a teacher.

  Args:
    source: the training data, in memory.
    logits: `[N, C]` of the teacher, such as the mean over an ensemble.

  Returns:
    The same examples, with `target` `[N, C]`: the softmax of the logits.

  Example:
    >>> source = sources.Arrays({'x': np.zeros(1), 'label': np.zeros(1, int)})
    >>> distilled(source, np.log([[1.0, 3.0]])).arrays['target'].round(2)
    array([[0.25, 0.75]], dtype=float32)

  Source: Hinton et al. 2015, "Distilling the knowledge in a neural network",
  at temperature 1.
  """
  target = jax.nn.softmax(jax.device_put(np.asarray(logits, np.float32)))
  return sources.Arrays({**source.arrays, 'target': np.asarray(target)})


def train_one(
    model: modeling.Model,
    phase: Config,
    params: steps.Params,
    run: steps.Run,
    source: sources.Source,
    **options: Any,
) -> steps.Params:
  """Trains one run; arguments as of `train`, the parameters are not stacked."""
  stacked = train(model, phase, params, [run], source, **options)
  return jax.jit(functools.partial(jax.tree.map, _first))(stacked)


def probe(
    model: modeling.Model,
    phase: Config,
    params: steps.Params,
    source: sources.Source,
    *,
    batch_size: int = 256,
    sharding: jax.sharding.Sharding | None = None,
    saved: unfinished.Saved | None = None,
    checked_fn: Callable[[Any], Any] = iter,
) -> steps.Params:
  """Trains the head alone, on features computed once: the LP of LP-FT.

  Args:
    model: with `features_fn`.
    phase: `run` with its hyper-parameters, and the rest as in `train`.
    params: the start; its head is not used.
    source: the training data, as they are: nothing is augmented.
    batch_size: of the features' computation.
    sharding: how a batch of it lies on a mesh.
    saved: as in `train`.
    checked_fn: batches -> the same batches, such as with a look for a request
      to stop before each one.

  Returns:
    The parameters with another `head`.

  Raises:
    ValueError: the model has no linear head.

  Source: Kumar et al., "Fine-tuning can distort pretrained features and
  underperform out-of-distribution", ICLR 2022.
  """
  features_fn = model.features_fn
  if features_fn is None:
    raise ValueError(
        'The model has no linear head for a linear probe: remove config.probe.'
    )

  def both_fn(params, batch):
    features = features_fn(params, batch).astype(jnp.float32)
    return {'feature': features, 'label': batch['label']}

  walk = sources.batches(source, evaluation.divided(batch_size, sharding))
  place_fn = functools.partial(evaluation.placed, sharding=sharding)
  batches = (jax.tree.map(place_fn, batch) for batch in checked_fn(walk))
  arrays = evaluation.logits_of(both_fn, batches)(params)
  arrays['label'] = arrays['label'].astype(np.int32)
  head_model = modeling.linear(arrays['feature'].shape[-1], model.num_classes)
  head = train_one(
      head_model,
      phase,
      head_model.start_fn(jax.random.key(0)),
      phase['run'],
      sources.Arrays(arrays),
      saved=saved,
  )
  # Of a model without a bias in its head, such as a CLIP's zero-shot head, that
  # of the probe is left out.
  head = {name: head.get(name, x) for name, x in params['head'].items()}
  return {**params, 'head': head}


def names_of(phase: Config) -> list[str]:
  """Names of the copies that a run leaves: '' is the last one."""
  return [
      '',
      *(f'step_{n}' for n in phase.get('keep_steps', ())),
      *(f'ema_{decay}' for decay in phase.get('ema', ())),
  ]


def augmented_batches(
    model: modeling.Model,
    phase: Config,
    runs: Sequence[steps.Run],
    source: sources.Source,
    *,
    seed: int = 0,
) -> Iterator[dict[str, jax.Array]]:
  """One walk through the data as training sees them, batch i as run i mod K.

  The seed is that of the order and of what is drawn.
  """
  settings = steps.settings_of(phase, runs[:1], len(source))
  names = [name for name in augmentation.ALL if any(name in x for x in runs)]
  settings = settings._replace(augmentations=tuple(names))
  none = dict.fromkeys(names, 0.0)
  key = jax.random.key(seed)
  walk = sources.batches(source, settings.batch_size, seed=seed)
  for i, batch in enumerate(walk):
    hyper = steps.stack_runs([{**none, **runs[i % len(runs)]}])
    batch = {name: batch[name] for name in (*model.inputs, 'label')}
    step_key = jax.random.fold_in(key, i)
    yield _augmented(model, settings, step_key, jax.device_put(batch), hyper)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _augmented(model, settings, key, batch, hyper):
  hyper = jax.tree.map(_first, hyper)
  return augmentation.apply(key, batch, hyper, settings, model.num_classes)[0]
