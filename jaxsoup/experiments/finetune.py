"""Pre-trains a model once and fine-tunes a sweep of runs from it.

  theta_0 = finetune.pretrain(config, splits['pretrain'])
  stacked = finetune.finetune(config, theta_0, runs, splits['train'])
  logits = finetune.make_model(config).logits_fn(theta_0, image)

`runs` is a list of plain dicts of hyper-parameters. All runs of one call train
together, vmapped inside one compiled scan, so hyper-parameters are traced. A
run depends on its own dict, and in its last bits on the number of runs beside
it; the same call gives the same bits.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from jaxsoup.data import augment
from jaxsoup.experiments import train_state
from jaxsoup.models import vit

Params = dict[str, Any]
Progress = Callable[[int, int, np.ndarray], None]

# What a run may set. `affine` and `noise` are strengths of augmentation, see
# `jaxsoup.data.augment`; they and `mixup` are off at 0.
DEFAULTS = {
    'seed': 0,
    'learning_rate': 1e-3,
    'weight_decay': 0.0,
    'label_smoothing': 0.0,
    'mixup': 0.0,
    'affine': 0.0,
    'noise': 0.0,
}


class Model(NamedTuple):
  """A model as two pure functions.

  Attributes:
    init_fn: key -> params, a plain nested dict with string keys.
    logits_fn: (params, image [B, H, W, C]) -> logits [B, num_classes].
  """

  init_fn: Callable[[jax.Array], Params]
  logits_fn: Callable[[Params, jax.Array], jax.Array]


def make_model(config: ml_collections.ConfigDict) -> Model:
  """Makes the model that `config.model` describes.

  Equal descriptions give the same functions, so that what was compiled for
  them is found again.

  Args:
    config: with the arguments of `jaxsoup.models.ViT` under `model`.

  Returns:
    The model's pure functions; `logits_fn` is jitted.
  """
  arguments = config.model.to_dict()
  arguments['image_shape'] = tuple(arguments['image_shape'])
  return _make_model(tuple(sorted(arguments.items())))


@functools.cache
def _make_model(arguments: tuple[tuple[str, Any], ...]) -> Model:
  def build_fn(key):
    return vit.ViT(**dict(arguments), rngs=nnx.Rngs(key))

  abstract_model = nnx.eval_shape(lambda: build_fn(jax.random.key(0)))
  graphdef = nnx.graphdef(abstract_model)

  def init_fn(key):
    return nnx.to_pure_dict(nnx.state(build_fn(key), nnx.Param))

  def logits_fn(params, image):
    return nnx.merge(graphdef, params)(image)

  return Model(init_fn, jax.jit(logits_fn))


def pretrain(
    config: ml_collections.ConfigDict,
    data: Mapping[str, np.ndarray],
    *,
    progress_fn: Progress | None = None,
    saved: train_state.Saved | None = None,
) -> Params:
  """Trains one model from scratch, by `config.pretrain`.

  Args:
    config: the experiment; `config.seed` decides the initial parameters and
      the order of the data.
    data: `image` [N, H, W, C], `label` [N].
    progress_fn: called after each epoch with (epochs done, epochs,
      losses [1]).
    saved: where the state is kept in between; the result does not depend on
      how often the training was stopped.

  Returns:
    The parameters theta_0, a plain nested dict.
  """
  run = {**config.pretrain.run.to_dict(), 'seed': config.seed}
  init_fn = make_model(config).init_fn
  params = jax.jit(lambda: init_fn(jax.random.key(config.seed)))()
  stacked = _train(
      config,
      config.pretrain,
      params,
      [run],
      data,
      progress_fn=progress_fn,
      saved=saved,
  )
  return jax.jit(functools.partial(jax.tree.map, lambda x: x[0]))(stacked)


def finetune(
    config: ml_collections.ConfigDict,
    params: Params,
    runs: Sequence[Mapping[str, float]],
    data: Mapping[str, np.ndarray],
    *,
    progress_fn: Progress | None = None,
    saved: train_state.Saved | None = None,
) -> Params:
  """Fine-tunes a group of runs from one start, by `config.finetune`.

  Args:
    config: the experiment.
    params: theta_0, the common start.
    runs: K dicts; keys as in `DEFAULTS`, which fills in what is missing.
    data: `image` [N, H, W, C], `label` [N].
    progress_fn: called after each epoch with (epochs done, epochs,
      losses [K]).
    saved: as for `pretrain`.

  Returns:
    Stacked parameters, leaves [K, ...], in the order of `runs`.

  Raises:
    ValueError: there are no runs, a run has a hyper-parameter that is not
      known, or the data do not fill one batch.
  """
  return _train(
      config,
      config.finetune,
      params,
      runs,
      data,
      progress_fn=progress_fn,
      saved=saved,
  )


class Settings(NamedTuple):
  """What shapes the compiled program: static, hence hashable."""

  num_epochs: int
  batch_size: int
  warmup: float
  final: float
  num_classes: int


def _train(config, phase, params, runs, data, *, progress_fn, saved):
  """Trains all runs from one start, an epoch a call of the compiled scan."""
  settings = _make_settings(config, phase, data)
  hyper = _stack_runs(runs)
  data = jax.device_put({name: data[name] for name in ('image', 'label')})
  params, opt_state = _start(params, len(runs))
  logits_fn = make_model(config).logits_fn
  num_done = 0
  if saved is not None:
    num_done, (params, opt_state) = saved.restore((params, opt_state))
  for epoch in range(num_done, settings.num_epochs):
    params, opt_state, losses = _epoch(
        logits_fn,
        settings,
        params,
        opt_state,
        hyper,
        data,
        jax.device_put(np.int32(epoch)),
    )
    if progress_fn is not None:
      progress_fn(epoch + 1, settings.num_epochs, np.asarray(losses))
    if saved is not None:
      saved.after_epoch(epoch + 1, (params, opt_state))
  return params


def _make_settings(config, phase, data):
  if len(data['label']) < phase.batch_size:
    raise ValueError(
        f'{len(data["label"])} examples do not fill one batch of '
        f'{phase.batch_size}: make the batch smaller.'
    )
  return settings_of(config, phase)


def settings_of(config, phase) -> Settings:
  """The settings of a phase: of `config.pretrain` or `config.finetune`."""
  return Settings(
      num_epochs=phase.num_epochs,
      batch_size=phase.batch_size,
      warmup=phase.warmup,
      final=phase.final,
      num_classes=config.model.num_classes,
  )


def _stack_runs(runs):
  """A dict of [K] from K dicts, with what is missing filled in."""
  if not runs:
    raise ValueError('No runs to train: pass at least one.')
  for run in runs:
    if unknown := sorted(set(run) - set(DEFAULTS)):
      raise ValueError(
          f'Unknown hyper-parameters {unknown}: choose from {list(DEFAULTS)}.'
      )
  columns = {k: [run.get(k, v) for run in runs] for k, v in DEFAULTS.items()}
  return jax.device_put(
      {
          name: np.asarray(column, np.uint32 if name == 'seed' else np.float32)
          for name, column in columns.items()
      }
  )


@functools.partial(jax.jit, static_argnums=1)
def _start(params, num_runs):
  params = jax.tree.map(lambda x: jnp.stack([x] * num_runs), params)
  return params, jax.vmap(optax.scale_by_adam().init)(params)


@functools.partial(
    jax.jit, static_argnums=(0, 1), donate_argnames=('params', 'opt_state')
)
def _epoch(logits_fn, settings, params, opt_state, hyper, data, epoch):
  """One pass over the data for all runs; K along the leading axes."""
  num_examples = len(data['label'])
  num_steps = num_examples // settings.batch_size

  def run_fn(params, opt_state, hyper):
    key = jax.random.fold_in(jax.random.key(hyper['seed']), epoch)
    order = jax.random.permutation(key, num_examples)
    order = order[: num_steps * settings.batch_size].reshape(num_steps, -1)

    def step_fn(carry, xs):
      step, index = xs
      batch = jax.tree.map(lambda x: x[index], data)
      done = epoch + step / num_steps
      step_key = jax.random.fold_in(key, step)
      return train_step(
          logits_fn, settings, carry, hyper, batch, step_key, done
      )

    carry, losses = jax.lax.scan(
        step_fn, (params, opt_state), (jnp.arange(num_steps), order)
    )
    return *carry, losses.mean()

  return jax.vmap(run_fn)(params, opt_state, hyper)


def train_step(logits_fn, settings, carry, hyper, batch, key, epoch):
  """AdamW, decoupled: theta <- theta - rate (adam(g) + weight_decay theta).

  Args:
    logits_fn: of the model.
    settings: of the phase.
    carry: parameters, and the state of the optimizer.
    hyper: hyper-parameters of this run, scalars.
    batch: `image` [B, H, W, C] and `label` [B].
    key: of the augmentation.
    epoch: how many epochs are done, with the fraction of this one.

  Returns:
    The new carry, and the loss.
  """
  image, target = _augment(key, batch, hyper, settings.num_classes)
  rate = _schedule(settings, epoch) * hyper['learning_rate']
  return _step(logits_fn, carry, image, target, rate, hyper['weight_decay'])


def _step(logits_fn, carry, image, target, rate, weight_decay):
  params, opt_state = carry

  def loss_fn(params):
    logits = logits_fn(params, image)
    return optax.softmax_cross_entropy(logits, target).mean()

  loss, grads = jax.value_and_grad(loss_fn)(params)
  updates, opt_state = optax.scale_by_adam().update(grads, opt_state)
  params = jax.tree.map(
      lambda p, u: p - rate * (u + weight_decay * p), params, updates
  )
  return (params, opt_state), loss


def _augment(key, batch, hyper, num_classes):
  keys = jax.random.split(key, 3)
  image = augment.affine(keys[0], batch['image'], hyper['affine'])
  image = augment.noise(keys[1], image, hyper['noise'])
  target = jax.nn.one_hot(batch['label'], num_classes)
  target = optax.smooth_labels(target, hyper['label_smoothing'])
  return augment.mixup(keys[2], image, target, hyper['mixup'])


def _schedule(settings, epoch):
  """Share of the peak rate: a linear warm-up times a cosine to `final`."""
  done = epoch / settings.num_epochs
  cosine = 0.5 * (1 + jnp.cos(jnp.pi * done))
  warm = jnp.minimum(1.0, done / settings.warmup) if settings.warmup else 1.0
  return warm * (settings.final + (1 - settings.final) * cosine)
