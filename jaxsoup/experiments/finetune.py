"""Trains models: one from scratch, a head alone, or a sweep from one start.

```
model = modeling.of(experiment)
theta_0 = model.start_fn(jax.random.key(0))
theta_0 = finetune.probe(model, config.probe, theta_0, splits.train)
stacked = finetune.train(model, config.finetune, theta_0, runs, splits.train)
```

`runs` is a list of plain dicts of hyper-parameters. Data in memory go to the
device as a whole, and all runs of one call train together, vmapped inside one
compiled scan, so hyper-parameters are traced. Other data are read while one
run trains on the whole mesh. A run depends on its own dict, and in its last
bits on the number of runs beside it; the same call gives the same bits.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import json
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import ml_collections
import numpy as np
import optax

from jaxsoup import evaluation
from jaxsoup import sharding
from jaxsoup.data import sources
from jaxsoup.experiments import augmentation
from jaxsoup.experiments import modeling
from jaxsoup.experiments import train_state

Params = dict[str, Any]
Run = Mapping[str, Any]
# Epochs done, epochs, losses [K].
Progress = Callable[[int, int, np.ndarray], None]
# Name of a copy that is kept ('ema_0.99', 'epoch_2'), its stacked parameters.
Keep = Callable[[str, Params], None]

# What a run may set, beside what `jaxsoup.experiments.augmentation` applies.
# `sam` is the radius of sharpness-aware minimization. With `init_seed` a run
# starts from initial parameters of its own.
DEFAULTS = {
    'seed': 0,
    'learning_rate': 1e-3,
    'weight_decay': 0.0,
    'label_smoothing': 0.0,
}
OTHERS = ('sam', 'init_seed')
# What shapes the compiled program: runs that differ in it train apart.
STATIC = ('num_epochs', 'batch_size', 'optimizer')


class Settings(NamedTuple):
  """What shapes the compiled program: static, hence hashable.

  Attributes:
    num_epochs: walks through the data.
    batch_size: examples a step.
    num_updates: of the parameters, in all epochs.
    warmup: share of the updates in which the rate rises linearly.
    final: share of the peak rate at the end of the cosine.
    optimizer: a key of `OPTIMIZERS`.
    momentum: of SGD.
    clip: largest norm of the gradient; 0 does not clip.
    num_accumulated: batches whose mean gradient makes one update.
    ema: decays per step; each keeps a moving average of the parameters.
    keep_epochs: after which the parameters are kept as well.
    batch_norm: 'train', by the statistics of the batch, or 'frozen', by those
      that are there.
    augmentations: names of those that a run asks for.
    augmentation: JSON of their further arguments, see `augmentation.apply`.
    is_sharp: whether a run asks for sharpness-aware minimization.
    is_scanned: whether the steps of an epoch are one compiled loop, in which
      XLA:CPU takes four times as long for convolutions; else they are called
      one by one.
  """

  num_epochs: int
  batch_size: int
  num_updates: int
  warmup: float
  final: float
  optimizer: str = 'adamw'
  momentum: float = 0.9
  clip: float = 0.0
  num_accumulated: int = 1
  ema: tuple[float, ...] = ()
  keep_epochs: tuple[int, ...] = ()
  batch_norm: str = 'train'
  augmentations: tuple[str, ...] = ()
  augmentation: str = '{}'
  is_sharp: bool = False
  is_scanned: bool = True


class State(NamedTuple):
  """Parameters, the optimizer's state, moving averages by name."""

  params: Params
  opt_state: Any
  ema: dict[str, Params]


OPTIMIZERS = {
    'adamw': lambda settings: optax.scale_by_adam(),
    'sgd': lambda settings: optax.trace(settings.momentum, nesterov=True),
    'adafactor': lambda settings: optax.chain(
        optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
    ),
}


def train(
    model: modeling.Model,
    phase: Mapping[str, Any],
    params: Params,
    runs: Sequence[Run],
    source: sources.Source,
    *,
    progress_fn: Progress | None = None,
    saved: train_state.Saved | None = None,
    keep_fn: Keep | None = None,
) -> Params:
  """Trains a group of runs from one start.

  Args:
    model: of `modeling.of`.
    phase: such as `config.finetune`; what it may hold is in `Settings`.
    params: theta_0, the common start.
    runs: K dicts with keys of `DEFAULTS`, which fills in what is missing, of
      `OTHERS`, `STATIC` (alike in all) and of `augmentation.ALL`.
    source: the training data. In memory they go to the device; else one run
      trains on all devices.
    progress_fn: called after each epoch with (epochs done, epochs,
      losses [K]).
    saved: where the state is kept in between; the result does not depend on
      how often the training was stopped.
    keep_fn: called with the name and the stacked parameters of each copy that
      is kept beside the last one; the next step reuses the arrays.

  Returns:
    Stacked parameters, leaves [K, ...], in the order of `runs`.

  Raises:
    ValueError: there are no runs, or several where the data are not in memory;
      a run has a hyper-parameter that is not known; or the data do not fill
      one batch.
  """
  settings = settings_of(phase, runs, len(source))
  hyper = _stack_runs(runs)
  if hasattr(source, 'arrays'):
    data = {name: source.arrays[name] for name in (*model.inputs, 'label')}
    data = jax.device_put(data)
    state = _start(model, settings, params, hyper)
    num_units = 1  # Of what is saved in an epoch.
    as_stacked = lambda tree: tree
    epoch_fn = lambda state, epoch, done, after_fn: _epoch(
        model, settings, state, hyper, data, jax.device_put(np.int32(epoch))
    )
  else:
    streamed = Streamed(model, settings, hyper, source)
    state, epoch_fn = streamed.start(params), streamed.epoch
    num_units = len(source) // settings.batch_size
    as_stacked = functools.partial(jax.tree.map, lambda x: x[None])
  num_done = 0
  if saved is not None:
    num_done, state = saved.restore(state)
  for epoch in range(num_done // num_units, settings.num_epochs):
    before = epoch * num_units

    def after_fn(done, state, before=before):
      if saved is not None:
        saved.after(before + done, state)

    done = max(num_done - before, 0)
    state, losses = epoch_fn(state, epoch, done, after_fn)
    if progress_fn is not None:
      progress_fn(epoch + 1, settings.num_epochs, np.asarray(losses))
    if keep_fn is not None and epoch + 1 in settings.keep_epochs:
      keep_fn(f'epoch_{epoch + 1}', as_stacked(state.params))
    after_fn(num_units, state)
  if keep_fn is not None:
    for name, copy in state.ema.items():
      keep_fn(name, as_stacked(copy))
  return as_stacked(state.params)


def train_one(
    model: modeling.Model,
    phase: Mapping[str, Any],
    params: Params,
    run: Run,
    source: sources.Source,
    **options: Any,
) -> Params:
  """Trains one run; arguments as of `train`, the parameters are not stacked."""
  stacked = train(model, phase, params, [run], source, **options)
  return jax.jit(functools.partial(jax.tree.map, lambda x: x[0]))(stacked)


def probe(
    model: modeling.Model,
    phase: Mapping[str, Any],
    params: Params,
    source: sources.Source,
    *,
    batch_size: int = 256,
    sharding: jax.sharding.Sharding | None = None,
) -> Params:
  """Trains the head alone, on features computed once: the LP of LP-FT.

  Args:
    model: with `features_fn`.
    phase: `run` with its hyper-parameters, and the rest as in `train`.
    params: the start; its head is not used.
    source: the training data, as they are: nothing is augmented.
    batch_size: of the features' computation.
    sharding: how a batch of it lies on a mesh.

  Returns:
    The parameters with another `head`.

  Raises:
    ValueError: the model has no linear head.

  Source: Kumar et al., "Fine-tuning can distort pretrained features and
  underperform out-of-distribution", ICLR 2022.
  """
  if model.features_fn is None:
    raise ValueError(
        'The model has no linear head that could be probed: leave out '
        'config.probe.'
    )
  features = _features(model, params, source, batch_size, sharding)
  head_model = modeling.linear(
      features.arrays['feature'].shape[-1], model.num_classes
  )
  head = train_one(
      head_model,
      phase,
      head_model.start_fn(jax.random.key(0)),
      phase['run'],
      features,
  )
  return {**params, 'head': {**params['head'], **_without_bias(params, head)}}


def _features(model, params, source, batch_size, sharding) -> sources.Arrays:
  """What the head sees of all examples, and their labels, in one walk."""

  def both_fn(params, batch):
    features = model.features_fn(params, batch).astype(jnp.float32)
    return jnp.concatenate([features, batch['label'][:, None]], axis=1)

  batches = (
      jax.device_put(batch, sharding)
      for batch in sources.batches(source, batch_size)
  )
  rows = evaluation.logits_of(both_fn, batches)(params)
  # Integers up to 2^24 are exact in float32.
  return sources.Arrays(
      {'feature': rows[:, :-1], 'label': rows[:, -1].astype(np.int32)}
  )


def _without_bias(params, head):
  """The head that was trained; of a model without a bias in its head, no bias.

  A bias that all classes share changes nothing; others are lost, as the
  zero-shot head of a CLIP has none.
  """
  return {name: x for name, x in head.items() if name in params['head']}


def names_of(phase: Mapping[str, Any]) -> list[str]:
  """Names of the copies that a run leaves: '' is the last one."""
  return [
      '',
      *(f'epoch_{n}' for n in phase.get('keep_epochs', ())),
      *(f'ema_{decay}' for decay in phase.get('ema', ())),
  ]


def grouped(runs: Sequence[Run], size: int) -> list[list[int]]:
  """Indices of runs that train together: alike in `STATIC`, at most `size`.

  Example:
    >>> grouped([{}, {'num_epochs': 3}, {}, {}], 2)
    [[0, 2], [3], [1]]
  """
  alike: dict[tuple, list[int]] = {}
  for i, run in enumerate(runs):
    alike.setdefault(tuple(run.get(k) for k in STATIC), []).append(i)
  return [
      rows[start : start + size]
      for rows in alike.values()
      for start in range(0, len(rows), size)
  ]


def settings_of(
    phase: Mapping[str, Any], runs: Sequence[Run], num_examples: int
) -> Settings:
  """The settings of a phase, for runs that train together.

  Args:
    phase: such as `config.finetune`.
    runs: what they set of `STATIC` goes before what the phase says.
    num_examples: of the training data.

  Returns:
    `Settings`.

  Raises:
    ValueError: no runs, runs that differ, names that are not known, a value
      that no optimizer takes, or too few examples.
  """
  if not runs:
    raise ValueError('No runs to train: pass at least one.')
  known = [*DEFAULTS, *OTHERS, *STATIC, *augmentation.ALL]
  if unknown := sorted(set().union(*runs) - set(known)):
    raise ValueError(
        f'Unknown hyper-parameters {unknown}: choose from {known}.'
    )
  if len(grouped(runs, len(runs))) > 1:
    raise ValueError(f'Runs that differ in {STATIC} cannot train together.')
  given = {k: phase[k] for k in Settings._fields if k in phase}
  given |= {k: runs[0][k] for k in STATIC if k in runs[0]}
  for name in ('ema', 'keep_epochs'):
    given[name] = tuple(given.get(name, ()))
  options = given.get('augmentation', {})
  if isinstance(options, ml_collections.ConfigDict):
    options = options.to_dict()
  given['augmentation'] = json.dumps(options, sort_keys=True)
  if num_examples < given['batch_size']:
    raise ValueError(
        f'{num_examples} examples do not fill one batch of '
        f'{given["batch_size"]}: make the batch smaller.'
    )
  num_steps = given['num_epochs'] * (num_examples // given['batch_size'])
  asked = set().union(*runs)
  settings = Settings(
      **given,
      num_updates=max(1, num_steps // given.get('num_accumulated', 1)),
      augmentations=tuple(name for name in augmentation.ALL if name in asked),
      is_sharp='sam' in asked,
  )
  return _checked(settings)


def _checked(settings: Settings) -> Settings:
  if settings.optimizer not in OPTIMIZERS:
    raise ValueError(
        f'optimizer is {settings.optimizer!r}: choose from '
        f'{", ".join(OPTIMIZERS)}.'
    )
  if settings.batch_norm not in ('train', 'frozen'):
    raise ValueError(
        f"batch_norm is {settings.batch_norm!r}: 'train' or 'frozen'."
    )
  if settings.is_sharp and settings.num_accumulated > 1:
    raise ValueError(
        f'num_accumulated is {settings.num_accumulated} and runs have sam: the '
        'second gradient of SAM is of one batch. Make num_accumulated 1.'
    )
  return settings


def _stack_runs(runs):
  """A dict of [K] from K dicts, with what is missing filled in."""
  names = set().union(DEFAULTS, *runs) - set(STATIC)
  return jax.device_put(
      {
          name: np.asarray(
              [run.get(name, DEFAULTS.get(name, 0)) for run in runs],
              np.uint32 if name.endswith('seed') else np.float32,
          )
          for name in sorted(names)
      }
  )


def make_tx(
    settings: Settings, hyper: Mapping[str, Any]
) -> optax.GradientTransformationExtraArgs:
  """The optimizer: `theta <- theta - rate (direction + weight_decay theta)`.

  Args:
    settings: of the phase.
    hyper: scalars, perhaps traced: `learning_rate`, `weight_decay`, `sam`.

  Returns:
    An optax transformation.
  """
  rate_fn = lambda count: hyper['learning_rate'] * schedule(settings, count)
  clip = optax.clip_by_global_norm(settings.clip) if settings.clip else None
  parts = [
      clip or optax.identity(),
      OPTIMIZERS[settings.optimizer](settings),
      optax.add_decayed_weights(hyper['weight_decay']),
      optax.scale_by_learning_rate(rate_fn),
  ]
  tx = optax.chain(*parts)
  if settings.is_sharp:
    up = optax.chain(optax.contrib.normalize(), optax.sgd(hyper['sam']))
    tx = optax.contrib.sam(tx, up, opaque_mode=True)
  if settings.num_accumulated > 1:
    every = settings.num_accumulated
    tx = optax.MultiSteps(tx, every).gradient_transformation()
  return optax.with_extra_args_support(tx)


def schedule(settings: Settings, count: Any) -> Any:
  """Share of the peak rate: a linear warm-up times a cosine to `final`."""
  done = count / settings.num_updates
  cosine = 0.5 * (1 + jnp.cos(jnp.pi * done))
  warm = jnp.minimum(1.0, done / settings.warmup) if settings.warmup else 1.0
  return warm * (settings.final + (1 - settings.final) * cosine)


def train_step(
    model: modeling.Model,
    settings: Settings,
    state: State,
    hyper: Mapping[str, jax.Array],
    batch: Mapping[str, jax.Array],
    key: jax.Array,
) -> tuple[State, jax.Array]:
  """One step of one run.

  Args:
    model: of `modeling.of`.
    settings: of the phase.
    state: before.
    hyper: hyper-parameters of this run, scalars.
    batch: the model's inputs, and `label` [B].
    key: of the augmentation.

  Returns:
    The state after it, and the loss.
  """
  batch, target = augmentation.apply(
      key,
      batch,
      hyper,
      settings.augmentations,
      model.num_classes,
      json.loads(settings.augmentation),
  )

  def loss_fn(params):
    if settings.batch_norm == 'train':
      logits, stats = model.train_fn(params, batch)
    else:
      logits, stats = model.logits_fn(params, batch), {}
    return optax.softmax_cross_entropy(logits, target).mean(), stats

  def grad_fn(params, _=None):
    grads, stats = jax.grad(loss_fn, has_aux=True)(params)
    del stats
    return jax.tree.map(_where, mask, grads)

  mask = is_trained(model, state.params)
  (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  grads = jax.tree.map(_where, mask, grads)
  tx = make_tx(settings, hyper)
  more = {'grad_fn': grad_fn} if settings.is_sharp else {}
  updates, opt_state = tx.update(grads, state.opt_state, state.params, **more)
  updates = jax.tree.map(_where, mask, updates)  # No decay of statistics.
  params = _replaced(optax.apply_updates(state.params, updates), stats)
  ema = {
      name: optax.incremental_update(params, copy, 1 - decay)
      for decay, (name, copy) in zip(settings.ema, state.ema.items())
  }
  return State(params, opt_state, ema), loss


def augmented_batches(
    model: modeling.Model,
    phase: Mapping[str, Any],
    runs: Sequence[Run],
    source: sources.Source,
    *,
    seed: int = 0,
) -> Iterator[dict[str, jax.Array]]:
  """One walk through the data as training sees them, batch i as run i mod K.

  Args:
    model: whose inputs they are.
    phase: such as `config.finetune`: the batch size.
    runs: K dicts: the strengths of the augmentations.
    source: the training data.
    seed: of the order and of what is drawn.

  Yields:
    The model's inputs and `label`.
  """
  settings = settings_of(phase, runs[:1], len(source))
  key = jax.random.key(seed)
  walk = sources.batches(source, settings.batch_size, seed=seed)
  for i, batch in enumerate(walk):
    hyper = _stack_runs([runs[i % len(runs)]])
    batch = {name: batch[name] for name in (*model.inputs, 'label')}
    step_key = jax.random.fold_in(key, i)
    yield _augmented(model, settings, step_key, jax.device_put(batch), hyper)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _augmented(model, settings, key, batch, hyper):
  return augmentation.apply(
      key,
      batch,
      jax.tree.map(lambda x: x[0], hyper),
      settings.augmentations,
      model.num_classes,
      json.loads(settings.augmentation),
  )[0]


def is_trained(model: modeling.Model, params: Params) -> Any:
  """A tree of bools: False for the running statistics of BatchNorm."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: tuple(k.key for k in path) not in model.statistics, params
  )


def _where(is_kept: bool, x: jax.Array) -> jax.Array:
  return x if is_kept else jnp.zeros_like(x)


def _replaced(params: Any, new: Any) -> Any:
  """`params` with those leaves that the nested dict `new` holds."""
  if not isinstance(new, dict):
    return new
  return {k: _replaced(x, new[k]) if k in new else x for k, x in params.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(model, settings, params, hyper):
  """The state of K runs, stacked."""

  def run_fn(hyper):
    start = params
    if 'init_seed' in hyper:
      start = model.init_fn(jax.random.key(hyper['init_seed']))
    return initial_state(settings, start, hyper)

  return jax.vmap(run_fn)(hyper)


def initial_state(settings, params, hyper) -> State:
  """The state of one run before its first step."""
  return State(
      params,
      make_tx(settings, hyper).init(params),
      {f'ema_{decay}': params for decay in settings.ema},
  )


def _epoch(model, settings, state, hyper, data, epoch):
  """One pass over the data for all runs; K along the leading axes."""
  if settings.is_scanned:
    return _scanned(model, settings, state, hyper, data, epoch)
  losses = []
  for step in range(len(data['label']) // settings.batch_size):
    step = jax.device_put(np.int32(step))
    state, loss = _step(model, settings, state, hyper, data, epoch, step)
    losses.append(loss)
  return state, np.mean(jax.device_get(losses), axis=0)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames=('state',))
def _scanned(model, settings, state, hyper, data, epoch):
  num_steps = len(data['label']) // settings.batch_size

  def run_fn(state, hyper):
    order_fn, step_fn = _steps(model, settings, hyper, data, epoch)
    steps = (jnp.arange(num_steps), order_fn())
    state, losses = jax.lax.scan(step_fn, state, steps)
    return state, losses.mean()

  return _each(run_fn, state, hyper)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames=('state',))
def _step(model, settings, state, hyper, data, epoch, step):
  def run_fn(state, hyper):
    order_fn, step_fn = _steps(model, settings, hyper, data, epoch)
    return step_fn(state, (step, order_fn()[step]))

  return _each(run_fn, state, hyper)


def _steps(model, settings, hyper, data, epoch):
  """The rows of each step of one run, and what a step does with them."""
  num_examples = len(data['label'])
  num_steps = num_examples // settings.batch_size
  key = jax.random.fold_in(jax.random.key(hyper['seed']), epoch)

  def order_fn():
    order = jax.random.permutation(key, num_examples)
    return order[: num_steps * settings.batch_size].reshape(num_steps, -1)

  def step_fn(state, xs):
    step, index = xs
    batch = jax.tree.map(lambda x: x[index], data)
    step_key = jax.random.fold_in(key, step)
    return train_step(model, settings, state, hyper, batch, step_key)

  return order_fn, step_fn


def _each(run_fn, state, hyper):
  """`run_fn` of all runs at once."""
  if len(hyper['seed']) > 1:
    return jax.vmap(run_fn)(state, hyper)
  # A convolution that is vmapped takes a third longer on a CPU.
  one = jax.tree.map(lambda x: x[0], (state, hyper))
  return jax.tree.map(lambda x: x[None], run_fn(*one))


class Streamed:
  """The training of one run on data that are read meanwhile, on all devices.

  Parameters and the optimizer's state are sharded over the mesh (FSDP), and so
  is each batch; every process reads its own rows.
  """

  def __init__(self, model, settings, hyper, source):
    num_runs = len(hyper['seed'])
    if num_runs > 1:
      raise ValueError(
          f'{num_runs} runs cannot train together on data that are not in '
          'memory: make sweep.group_size 1.'
      )
    self._model, self._settings, self._source = model, settings, source
    self._hyper = jax.tree.map(lambda x: x[0], jax.device_get(hyper))
    self._mesh = mesh()
    self._step = jax.jit(
        functools.partial(train_step, model, settings), donate_argnums=(0,)
    )
    self._shardings: Any = None

  def start(self, params: Params) -> State:
    """The state before the first step."""
    hyper = self._hyper
    if 'init_seed' in hyper:
      params = self._model.init_fn(jax.random.key(hyper['init_seed']))
    init_fn = functools.partial(
        initial_state, self._settings, hyper=dict(hyper)
    )
    abstract = sharded_state(jax.eval_shape(init_fn, params), self._mesh)
    self._shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(init_fn, out_shardings=self._shardings)(params)

  def epoch(
      self,
      state: State,
      epoch: int,
      start: int = 0,
      after_fn: Callable[[int, State], None] = lambda step, state: None,
  ) -> tuple[State, np.ndarray]:
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
    # A state that was restored lies elsewhere.
    state = jax.device_put(jax.tree.map(lambda x: x[0], state), self._shardings)
    key = jax.random.fold_in(jax.random.key(self._hyper['seed']), epoch)
    losses = []
    for step, batch in enumerate(self._batches(epoch, start), start):
      if step > start:
        after_fn(step, state)
      step_key = jax.random.fold_in(key, step)
      with jax.set_mesh(self._mesh):
        state, loss = self._step(state, self._hyper, batch, step_key)
      losses.append(loss)
      # Few steps ahead of the device: batches in flight take memory.
      jax.block_until_ready(losses[-3:][0])
    mean = np.mean(jax.device_get(losses), keepdims=True)
    return state, mean

  def _batches(self, epoch: int, start: int) -> Iterator[dict[str, jax.Array]]:
    split = NamedSharding(self._mesh, PartitionSpec('fsdp'))
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
          name: jax.make_array_from_process_local_data(split, batch[name])
          for name in names
      }


def mesh() -> jax.sharding.Mesh:
  """All devices along one axis, `fsdp`."""
  return jax.make_mesh(
      (jax.device_count(),), ('fsdp',), axis_types=(AxisType.Auto,)
  )


def sharded_state(state: State, on_mesh: jax.sharding.Mesh) -> State:
  """Puts the shardings of FSDP on an abstract state; scalars are replicated."""
  return sharding.fsdp(state, on_mesh)
