"""One step of a training: its settings, its optimizer, its state.

```
settings = steps.settings_of(config.finetune, runs, num_examples)
state = steps.initial_state(settings, params, hyper)
state, metrics = steps.train_step(model, settings, state, hyper, batch, key)
```
"""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from jaxsoup import trajectory
from jaxsoup._recipes._running import AverageState
from jaxsoup._recipes._running import running_average
from jaxsoup.models import batch_norm
from jaxsoup.train import augmentation
from jaxsoup.train import modeling
from jaxsoup.typing import Config

Params = dict[str, Any]
Run = Mapping[str, Any]
# What a run may set, besides the names of `augmentation.ALL`.
# `sam` is the radius of sharpness-aware minimization. With `init_seed` a run
# starts from its own random parameters.
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
    final: share of the peak rate at the end; 1 is a constant rate.
    decay: a key of `trajectory.CURVES`, along which the rate falls.
    decay_from: share of the updates after which it begins to.
    augmentation: further arguments of augmentations, see `augmentation.apply`.
    optimizer: a key of `OPTIMIZERS`.
    momentum: of SGD.
    clip: largest norm of the gradient; 0 does not clip.
    num_accumulated: batches whose mean gradient makes one update.
    ema: decays per step; each keeps a moving average of the parameters.
    keep_steps: after which the parameters are kept as well.
    batch_norm: 'train', by the statistics of the batch, or 'frozen', by those
      that are there.
    augmentations: names of those that a run asks for.
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
  augmentation: ml_collections.FrozenConfigDict
  decay: str = 'cosine'
  decay_from: float = 0.0
  optimizer: str = 'adamw'
  momentum: float = 0.9
  clip: float = 0.0
  num_accumulated: int = 1
  ema: tuple[float, ...] = ()
  keep_steps: tuple[int, ...] = ()
  batch_norm: str = 'train'
  augmentations: tuple[str, ...] = ()
  is_sharp: bool = False
  is_scanned: bool = True


class State(NamedTuple):
  """Parameters, the optimizer's state, moving averages by name."""

  params: Params
  opt_state: Any
  ema: dict[str, AverageState]


OPTIMIZERS = {
    'adamw': lambda settings: optax.scale_by_adam(),
    'sgd': lambda settings: optax.trace(settings.momentum, nesterov=True),
    'adafactor': lambda settings: optax.chain(
        optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
    ),
}


def grouped(runs: Sequence[Run], size: int) -> list[list[int]]:
  """Indices of runs that train together: alike in `STATIC`, at most `size`.

  Those that draw their own initial parameters are apart from those that do not.

  Example:
    >>> grouped([{}, {'num_epochs': 3}, {}, {}], 2)
    [[0, 2], [3], [1]]
  """
  alike: dict[tuple[Any, ...], list[int]] = {}
  for i, run in enumerate(runs):
    kind = (*(run.get(k) for k in STATIC), 'init_seed' in run)
    alike.setdefault(kind, []).append(i)
  return [
      rows[start : start + size]
      for rows in alike.values()
      for start in range(0, len(rows), size)
  ]


def settings_of(
    phase: Config, runs: Sequence[Run], num_examples: int
) -> Settings:
  """The settings of a phase, such as `config.finetune`, for runs like these.

  What the runs set of `STATIC` goes before what the phase says.

  Raises:
    ValueError: no runs, runs that differ, unknown names or values, or too few
      examples.
  """
  if not runs:
    raise ValueError('No runs to train: pass at least one.')
  known = [*DEFAULTS, *OTHERS, *STATIC, *augmentation.ALL]
  if unknown := sorted(set().union(*runs) - set(known)):
    raise ValueError(
        f'Unknown hyper-parameters {unknown}: choose from {known}.'
    )
  if len(grouped(runs, len(runs))) > 1:
    raise ValueError(
        f'Runs that differ in {STATIC}, or of which only some have init_seed, '
        'cannot train together: train each group of steps.grouped by itself.'
    )
  given = {k: phase[k] for k in Settings._fields if k in phase}
  given |= {k: runs[0][k] for k in STATIC if k in runs[0]}
  for name in ('ema', 'keep_steps'):
    given[name] = tuple(given.get(name, ()))
  options = given.get('augmentation', {})
  given['augmentation'] = ml_collections.FrozenConfigDict(options)
  if num_examples < given['batch_size']:
    raise ValueError(
        f'{num_examples} examples do not fill one batch of '
        f'{given["batch_size"]}: use a smaller batch_size.'
    )
  num_steps = given['num_epochs'] * (num_examples // given['batch_size'])
  asked = set().union(*runs)
  settings = Settings(
      **given,
      num_updates=max(1, num_steps // given.get('num_accumulated', 1)),
      augmentations=tuple(name for name in augmentation.ALL if name in asked),
      is_sharp='sam' in asked,
  )
  for name, allowed in (
      ('optimizer', OPTIMIZERS),
      ('decay', trajectory.CURVES),
      ('batch_norm', ('train', 'frozen')),
  ):
    if (value := getattr(settings, name)) not in allowed:
      choices = ', '.join(allowed)
      raise ValueError(f'{name} is {value!r}: choose from {choices}.')
  if any(not 1 <= step <= num_steps for step in settings.keep_steps):
    raise ValueError(
        f'keep_steps is {settings.keep_steps}: expected steps from 1 to '
        f'{num_steps}, the last one.'
    )
  if settings.is_sharp and settings.num_accumulated > 1:
    raise ValueError(
        f'num_accumulated is {settings.num_accumulated} and runs have sam, '
        'whose second gradient is of one batch: set num_accumulated to 1.'
    )
  return settings


def stack_runs(runs):
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

  Scalars in `hyper`, perhaps traced: `learning_rate`, `weight_decay`, `sam`.
  """
  rate_fn = lambda count: hyper['learning_rate'] * schedule(settings, count)
  clip = optax.clip_by_global_norm(settings.clip) if settings.clip else None
  tx = optax.chain(
      clip or optax.identity(),
      OPTIMIZERS[settings.optimizer](settings),
      optax.add_decayed_weights(hyper['weight_decay']),
      optax.scale_by_learning_rate(rate_fn),
  )
  if settings.is_sharp:
    up = optax.chain(optax.contrib.normalize(), optax.sgd(hyper['sam']))
    tx = optax.contrib.sam(tx, up, opaque_mode=True)
  if settings.num_accumulated > 1:
    every = settings.num_accumulated
    tx = optax.MultiSteps(tx, every).gradient_transformation()
  return optax.with_extra_args_support(tx)


def schedule(settings: Settings, count: Any) -> Any:
  """Share of the peak rate: a linear warm-up times a decay to `final`."""
  done = jnp.asarray(count / settings.num_updates)
  decayed = (done - settings.decay_from) / (1 - settings.decay_from)
  kept = trajectory.CURVES[settings.decay](jnp.maximum(0, decayed))
  warm = jnp.minimum(1.0, done / settings.warmup) if settings.warmup else 1.0
  return warm * (settings.final + (1 - settings.final) * kept)


def initial_state(settings, params, hyper) -> State:
  """The state of one run before its first step."""
  # Moving averages start from theta_0.
  averages = {f'ema_{decay}': running_average(decay) for decay in settings.ema}
  ema = {k: x.update(x.init(params), params) for k, x in averages.items()}
  return State(params, make_tx(settings, hyper).init(params), ema)


def train_step(
    model: modeling.Model,
    settings: Settings,
    state: State,
    hyper: Mapping[str, jax.Array],
    batch: Mapping[str, jax.Array],
    key: jax.Array,
) -> tuple[State, dict[str, jax.Array]]:
  """One step of one run, whose hyper-parameters are scalars.

  Returns:
    The state after it, and `loss` and `gradient_norm`, before any clipping.
  """
  batch, target = augmentation.apply(
      key, batch, hyper, settings, model.num_classes
  )

  def loss_fn(params):
    if settings.batch_norm == 'train':
      logits, stats = model.train_fn(params, batch)
    else:
      logits, stats = model.logits_fn(params, batch), {}
    return optax.softmax_cross_entropy(logits, target).mean(), stats

  def grad_fn(params, _=None):
    return masked(jax.grad(loss_fn, has_aux=True)(params)[0])

  zeros = jax.tree.map(jnp.zeros_like, state.params)
  masked = lambda tree: where_trained(model, tree, zeros)
  (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  grads = masked(grads)
  tx = make_tx(settings, hyper)
  more = {'grad_fn': grad_fn} if settings.is_sharp else {}
  updates, opt_state = tx.update(grads, state.opt_state, state.params, **more)
  updates = masked(updates)  # No decay of statistics.
  updated = optax.apply_updates(state.params, updates)
  params = batch_norm.replaced(updated, stats)
  ema = {
      name: running_average(decay).update(copy, params, 1 - decay)
      for decay, (name, copy) in zip(settings.ema, state.ema.items())
  }
  squares = jax.tree.map(lambda g: jnp.sum(g.astype(jnp.float32) ** 2), grads)
  norm = jnp.sqrt(sum(jax.tree.leaves(squares)))
  return State(params, opt_state, ema), {'loss': loss, 'gradient_norm': norm}


def where_trained(model: modeling.Model, params: Params, other: Params) -> Any:
  """`params`, with the running statistics of BatchNorm of `other`."""
  is_other = lambda path: tuple(k.key for k in path) in model.statistics
  return jax.tree_util.tree_map_with_path(
      lambda path, x, y: y if is_other(path) else x, params, other
  )
