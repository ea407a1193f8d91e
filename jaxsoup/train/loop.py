"""Trains models: one from scratch, a head alone, or a sweep from one start.

```
model = modeling.of_module(make_fn, inputs=inputs, num_classes=10)
theta_0 = model.start_fn(jax.random.key(0))
theta_0 = finetune.probe(model, config.probe, theta_0, splits.train)
stacked = finetune.train(model, config.finetune, theta_0, runs, splits.train)
```

`runs` is a list of plain dicts of hyper-parameters. Data in memory go to the
device as a whole, and all runs of one call train together, vmapped inside one
compiled scan, so hyper-parameters are traced. Other data are read while one
run trains on the whole mesh. A run depends on its own dict and, in its last
bits, on the number of runs in the call; the same call gives the same bits.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup import evaluation
from jaxsoup import running_average
from jaxsoup.data import sources
from jaxsoup.train import augmentation
from jaxsoup.train import modeling
from jaxsoup.train import steps
from jaxsoup.train import streaming
from jaxsoup.train import train_state
from jaxsoup.typing import Config

# Epochs done, epochs, losses [K].
Progress = Callable[[int, int, np.ndarray], None]
# Name of a copy that is kept ('ema_0.99', 'epoch_2'), its stacked parameters.
Keep = Callable[[str, steps.Params], None]


def train(
    model: modeling.Model,
    phase: Config,
    params: steps.Params,
    runs: Sequence[steps.Run],
    source: sources.Source,
    *,
    progress_fn: Progress | None = None,
    saved: train_state.Saved | None = None,
    keep_fn: Keep | None = None,
) -> steps.Params:
  """Trains a group of runs from one start.

  Args:
    model: of `modeling.of_module`.
    phase: such as `config.finetune`; what it may hold is in `steps.Settings`.
    params: theta_0, the common start.
    runs: K dicts with keys of `DEFAULTS`, which fills in what is missing, of
      `OTHERS`, `STATIC` (alike in all) and of `augmentation.ALL`.
    source: the training data. In memory of one process they go to the device,
      and may be `distilled`; else one run trains on all devices.
    progress_fn: called after each epoch with (epochs done, epochs,
      losses [K]).
    saved: where the state is kept in between; the result does not depend on
      how often the training was stopped.
    keep_fn: called with the name and the stacked parameters of each copy that
      is kept next to the last one; the next step reuses the arrays.

  Returns:
    Stacked parameters, leaves [K, ...], in the order of `runs`.

  Raises:
    ValueError: there are no runs, or several where one trains on all devices;
      a run has an unknown hyper-parameter; or the data do not fill
      one batch.
  """
  settings = steps.settings_of(phase, runs, len(source))
  hyper = steps.stack_runs(runs)
  if hasattr(source, 'arrays') and jax.process_count() == 1:
    fields = [*model.inputs, 'label', *({'target'} & set(source.arrays))]
    data = jax.device_put({name: source.arrays[name] for name in fields})
    state = _start(model, settings, params, hyper)
    num_units = 1  # Of what is saved in an epoch.
    as_stacked = lambda tree: tree
    epoch_fn = lambda state, epoch, done, after_fn: _epoch(
        model, settings, state, hyper, data, jax.device_put(np.int32(epoch))
    )
  else:
    streamed = streaming.Streamed(model, settings, hyper, source)
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
      keep_fn(name, jax.vmap(running_average().value)(as_stacked(copy)))
  return as_stacked(state.params)


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
  return jax.jit(functools.partial(jax.tree.map, lambda x: x[0]))(stacked)


def probe(
    model: modeling.Model,
    phase: Config,
    params: steps.Params,
    source: sources.Source,
    *,
    batch_size: int = 256,
    sharding: jax.sharding.Sharding | None = None,
) -> steps.Params:
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
        'The model has no linear head for a linear probe: remove config.probe.'
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
    return {'feature': features, 'label': batch['label']}

  batches = (
      {name: evaluation.placed(x, sharding) for name, x in batch.items()}
      for batch in sources.batches(
          source, evaluation.divided(batch_size, sharding)
      )
  )
  arrays = evaluation.logits_of(both_fn, batches)(params)
  return sources.Arrays({**arrays, 'label': arrays['label'].astype(np.int32)})


def _without_bias(params, head):
  """The head that was trained; of a model without a bias in its head, no bias.

  A bias that all classes share changes nothing; others are lost, as the
  zero-shot head of a CLIP has none.
  """
  return {name: x for name, x in head.items() if name in params['head']}


def names_of(phase: Config) -> list[str]:
  """Names of the copies that a run leaves: '' is the last one."""
  return [
      '',
      *(f'epoch_{n}' for n in phase.get('keep_epochs', ())),
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

  Args:
    model: whose inputs they are.
    phase: such as `config.finetune`: the batch size.
    runs: K dicts: the strengths of the augmentations.
    source: the training data.
    seed: of the order and of what is drawn.

  Yields:
    The model's inputs and `label`.
  """
  settings = steps.settings_of(phase, runs[:1], len(source))
  key = jax.random.key(seed)
  walk = sources.batches(source, settings.batch_size, seed=seed)
  for i, batch in enumerate(walk):
    hyper = steps.stack_runs([runs[i % len(runs)]])
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


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(model, settings, params, hyper):
  """The state of K runs, stacked."""

  def run_fn(hyper):
    start = params
    if 'init_seed' in hyper:
      start = model.init_fn(jax.random.key(hyper['init_seed']))
    return steps.initial_state(settings, start, hyper)

  return jax.vmap(run_fn)(hyper)


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
    return steps.train_step(model, settings, state, hyper, batch, step_key)

  return order_fn, step_fn


def _each(run_fn, state, hyper):
  """`run_fn` of all runs at once."""
  if len(hyper['seed']) > 1:
    return jax.vmap(run_fn)(state, hyper)
  # A convolution that is vmapped takes a third longer on a CPU.
  one = jax.tree.map(lambda x: x[0], (state, hyper))
  return jax.tree.map(lambda x: x[None], run_fn(*one))
