"""The training of an experiment, against NumPy, optax and scikit-learn."""

import dataclasses
import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize
from scipy import special
from sklearn import metrics as sk

import jaxsoup
from jaxsoup import sharding
from jaxsoup.data import preparation
from jaxsoup.data import sources
from jaxsoup.experiments import architectures
from jaxsoup.experiments import configs
from jaxsoup.runtime import preemption
from jaxsoup.train import loop
from jaxsoup.train import modeling
from jaxsoup.train import steps
from jaxsoup.train import unfinished

NUM_FEATURES, NUM_CLASSES = 5, 3
PHASE = dict(num_epochs=2, batch_size=8, warmup=0.25, final=0.1)


@pytest.fixture(autouse=True)
def from_the_root(request, monkeypatch):
  monkeypatch.chdir(request.config.rootpath)


# A linear classifier, whose gradient is known: x (softmax(z) - t).


def features(num=16, seed=0):
  rng = np.random.default_rng(seed)
  label = rng.integers(0, NUM_CLASSES, num).astype(np.int32)
  centres = rng.normal(size=(NUM_CLASSES, NUM_FEATURES))
  feature = centres[label] + rng.normal(size=(num, NUM_FEATURES))
  return {'feature': feature.astype(np.float32), 'label': label}


def gradient(params, batch):
  x, label = batch['feature'].astype(np.float64), batch['label']
  z = x @ params['kernel'] + params['bias']
  p = np.exp(z - z.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  error = (p - np.eye(NUM_CLASSES)[label]) / len(label)
  return {'kernel': x.T @ error, 'bias': error.sum(0)}


def start(seed=3):
  rng = np.random.default_rng(seed)
  return {
      'kernel': rng.normal(size=(NUM_FEATURES, NUM_CLASSES)),
      'bias': rng.normal(size=NUM_CLASSES),
  }


def rate_of(settings, count):
  done = count / settings.num_updates
  cosine = 0.5 * (1 + math.cos(math.pi * done))
  return min(1, done / 0.25) * (0.1 + 0.9 * cosine)


LINEAR = modeling.linear(NUM_FEATURES, NUM_CLASSES)
tree = jax.tree.map


def stepped(run, num=4, **phase):
  """What `train_step` makes of a few batches; and the batches."""
  data = features(8 * num)
  batches = [
      {k: x[8 * i : 8 * i + 8] for k, x in data.items()} for i in range(num)
  ]
  settings = steps.settings_of(PHASE | phase, [run], 8 * num)
  hyper = tree(lambda x: x[0], steps.stack_runs([run]))
  params = tree(np.float32, start())
  state = steps.initial_state(settings, params, hyper)
  step_fn = jax.jit(functools.partial(steps.train_step, LINEAR, settings))
  for batch in batches:
    state, _ = step_fn(state, hyper, batch, jax.random.key(0))
  return settings, state, batches


def assert_close(actual, expected, atol=2e-5):
  tree(
      lambda x, y: np.testing.assert_allclose(x, y, atol=atol), actual, expected
  )


def test_sgd_is_nesterov_momentum_with_decoupled_decay():
  run = {'learning_rate': 0.3, 'weight_decay': 0.02}
  settings, state, batches = stepped(run, optimizer='sgd', momentum=0.8)
  params, velocity = start(), tree(np.zeros_like, start())
  for count, batch in enumerate(batches):
    grads = gradient(params, batch)
    velocity = tree(lambda v, g: 0.8 * v + g, velocity, grads)
    rate = 0.3 * rate_of(settings, count)
    params = tree(
        lambda p, v, g, r=rate: p - r * (g + 0.8 * v + 0.02 * p),
        params,
        velocity,
        grads,
    )
  assert_close(state.params, params)


def test_adamw_is_that_of_optax():
  run = {'learning_rate': 0.1, 'weight_decay': 0.3}
  settings, state, batches = stepped(run)
  tx = optax.adamw(
      lambda count: 0.1 * steps.schedule(settings, count), weight_decay=0.3
  )
  params = tree(np.float32, start())
  opt_state = tx.init(params)
  for batch in batches:
    grads = tree(np.float32, gradient(params, batch))
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
  assert_close(state.params, params)


def test_sam_takes_the_gradient_at_the_edge_of_a_ball():
  run = {'learning_rate': 0.3, 'sam': 0.5}
  settings, state, batches = stepped(run, optimizer='sgd', momentum=0.0)
  params = start()
  for count, batch in enumerate(batches):
    grads = gradient(params, batch)
    norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
    edge = tree(lambda p, g, n=norm: p + 0.5 * g / n, params, grads)
    rate = 0.3 * rate_of(settings, count)
    params = tree(lambda p, g, r=rate: p - r * g, params, gradient(edge, batch))
  assert_close(state.params, params)
  # At radius 0 it is the plain step.
  flat, plain = ({'learning_rate': 0.3, **x} for x in ({'sam': 0.0}, {}))
  options = dict(optimizer='sgd', momentum=0.0)
  assert_close(
      stepped(flat, **options)[1].params, stepped(plain, **options)[1].params
  )


def test_accumulated_batches_make_one_update_of_their_mean():
  run = {'learning_rate': 0.3}
  settings, state, batches = stepped(
      run, optimizer='sgd', momentum=0.0, num_accumulated=2
  )
  assert settings.num_updates == 4  # Two epochs of four batches.
  params = start()
  for count in range(2):
    pair = [gradient(params, b) for b in batches[2 * count : 2 * count + 2]]
    rate = 0.3 * rate_of(settings, count)
    params = tree(lambda p, a, b, r=rate: p - r * (a + b) / 2, params, *pair)
  assert_close(state.params, params)


def test_moving_averages_and_clipping():
  run = {'learning_rate': 0.3}
  options = dict(optimizer='sgd', momentum=0.0, clip=0.01, ema=(0.5, 0.9))
  settings, state, batches = stepped(run, **options)
  params, copies = start(), {0.5: start(), 0.9: start()}
  for count, batch in enumerate(batches):
    grads = gradient(params, batch)
    norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
    assert norm > 0.01
    rate = 0.3 * rate_of(settings, count) * 0.01 / norm
    params = tree(lambda p, g, r=rate: p - r * g, params, grads)
    for d, copy in copies.items():
      copies[d] = tree(lambda c, p, d=d: d * c + (1 - d) * p, copy, params)
  assert_close(state.params, params)
  for d, copy in copies.items():
    ema = jaxsoup.running_average().value(state.ema[f'ema_{d}'])
    assert_close(ema, copy)


def test_adafactor_learns():
  data = sources.Arrays(features(64))
  phase = PHASE | dict(num_epochs=20, optimizer='adafactor')
  losses = []
  loop.train(
      LINEAR,
      phase,
      tree(np.float32, start()),
      [{'learning_rate': 0.03}],
      data,
      progress_fn=lambda n, num, loss: losses.append(loss[0]),
  )
  assert losses[-1] < 0.5 * losses[0]


def test_a_probe_is_logistic_regression():
  data = features(200)
  model = dataclasses.replace(
      LINEAR,
      features_fn=lambda params, batch: params['scale'] * batch['feature'],
  )
  params = {'scale': np.float32(2.0), 'head': tree(np.float32, start())}
  phase = dict(
      num_epochs=60, batch_size=50, warmup=0.1, final=0.0,
      run={'learning_rate': 0.3},
  )  # fmt: skip
  trained = loop.probe(model, phase, params, sources.Arrays(data))
  assert trained['scale'] == 2.0
  batch = {'feature': 2.0 * data['feature'], 'label': data['label']}
  of_flat = lambda x: {'kernel': x[:-3].reshape(-1, 3), 'bias': x[-3:]}

  def loss(head):
    logits = batch['feature'] @ head['kernel'] + head['bias']
    return sk.log_loss(batch['label'], special.softmax(logits, axis=1))

  def jac(x):
    grads = gradient(of_flat(x), batch)
    return np.concatenate([grads['kernel'].ravel(), grads['bias']])

  start_at = np.zeros((NUM_FEATURES + 1) * NUM_CLASSES)
  best = optimize.minimize(lambda x: loss(of_flat(x)), start_at, jac=jac)
  assert best.fun <= loss(tree(np.asarray, trained['head'])) < 1.02 * best.fun


def test_a_probe_needs_a_head():
  with pytest.raises(ValueError, match='no linear head'):
    loop.probe(LINEAR, {}, {}, sources.Arrays(features()))


# A small ViT, several runs at once.


@pytest.fixture(scope='module')
def config():
  overrides = {
      'model.depth': 1,
      'model.width': 12,
      'finetune.num_epochs': 2,
      'finetune.batch_size': 8,
      'pretrain.num_epochs': 30,
      'pretrain.run.learning_rate': 1e-2,
      'pretrain.run.affine': 0.0,
      'pretrain.batch_size': 8,
  }
  argv = [f'--config.{name}={value}' for name, value in overrides.items()]
  return configs.load('configs/digits.py', argv).config


@pytest.fixture(scope='module')
def model(config):
  return architectures.make(config)


@pytest.fixture(scope='module')
def data():
  rng = np.random.default_rng(0)
  return sources.Arrays(
      {
          'image': rng.random((16, 8, 8, 1)).astype(np.float32),
          'label': rng.integers(0, 10, 16).astype(np.int32),
      }
  )


@pytest.fixture(scope='module')
def theta_0(model):
  return model.start_fn(jax.random.key(0))


RUNS = [
    {'seed': 1, 'learning_rate': 1e-3},
    {'seed': 2, 'learning_rate': 3e-3, 'mixup': 0.8, 'label_smoothing': 0.2},
    {'seed': 3, 'learning_rate': 2e-3, 'weight_decay': 0.4, 'affine': 0.5},
]


@pytest.mark.slow
def test_a_group_equals_its_runs_alone(config, model, theta_0, data):
  group = loop.train(model, config.finetune, theta_0, RUNS, data)
  everything = dict.fromkeys(('mixup', 'affine'), 0.0)
  for k, run in enumerate(RUNS):
    # With the same augmentations: each has a key of its own.
    alone = loop.train_one(
        model, config.finetune, theta_0, everything | run, data
    )
    one = jax.tree.map(lambda x, k=k: x[k], group)
    for params in (one, alone):
      # No gradient reaches it but rounding, which Adam blows up: a softmax
      # does not feel what is added to all its scores.
      params['block_0']['attention']['key']['bias'] = 0
    assert_close(one, alone, atol=1e-4)
    moved = max(
        float(abs(x[k] - z).max())
        for x, z in zip(*map(jax.tree.leaves, (group, theta_0)))
    )
    assert moved > 1e-3


def assert_equal(first, second):
  for x, y in zip(*map(jax.tree.leaves, (first, second)), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_the_same_call_gives_the_same_bits(config, model, theta_0, data):
  assert_equal(
      *(
          loop.train(model, config.finetune, theta_0, RUNS, data)
          for _ in range(2)
      )
  )


@pytest.mark.slow
def test_pretraining_learns_and_repeats_itself(config, model, theta_0, data):
  seen = []
  first, second = (
      loop.train_one(
          model,
          config.pretrain,
          theta_0,
          config.pretrain.run.to_dict(),
          data,
          progress_fn=lambda n, num, losses: seen.append((n, num, losses)),
      )
      for _ in range(2)
  )
  assert_equal(first, second)
  assert [n for n, _, _ in seen] == [*range(1, 31)] * 2
  assert {num for _, num, _ in seen} == {30}
  assert seen[29][2].shape == (1,)
  assert seen[29][2][0] < 0.7 * seen[0][2][0]


def keeper(kept):
  """The next step reuses the arrays."""
  return lambda name, stacked: kept.update({name: jax.device_get(stacked)})


@pytest.mark.slow
def test_steps_within_an_epoch_are_kept(config, model, theta_0, data):
  """In one compiled loop up to them, or step by step."""
  phase = config.finetune.to_dict() | dict(keep_steps=(1, 3))
  kept = {True: {}, False: {}}
  for is_scanned, copies in kept.items():
    settings = phase | dict(is_scanned=is_scanned)
    keep_fn = keeper(copies)
    loop.train(model, settings, theta_0, RUNS[:2], data, keep_fn=keep_fn)
  assert list(kept[True]) == list(kept[False]) == ['step_1', 'step_3']
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *kept.values()
  )


@pytest.mark.parametrize(
    'given, expected',
    [
        (dict(final=1.0), [1, 1, 1, 1, 1]),
        (dict(decay='linear'), [1, 0.75, 0.5, 0.25, 0]),
        (dict(decay='linear', decay_from=0.5), [1, 1, 1, 0.5, 0]),
        (dict(decay='1-sqrt', decay_from=0.5), [1, 1, 1, 1 - 0.5**0.5, 0]),
        (dict(decay='linear', final=0.2), [1, 0.8, 0.6, 0.4, 0.2]),
        (dict(decay='linear', warmup=0.5), [0, 0.375, 0.5, 0.25, 0]),
        (dict(decay_from=1.0), [1, 1, 1, 1]),
    ],
)
def test_schedules(config, data, given, expected):
  phase = config.finetune.to_dict() | dict(warmup=0.0) | given
  settings = steps.settings_of(phase, RUNS[:1], len(data))
  assert settings.num_updates == 4
  counts = np.arange(len(expected))
  rates = steps.schedule(settings, counts)
  np.testing.assert_allclose(rates, expected, atol=1e-6)


@pytest.mark.slow
def test_copies_are_kept(config, model, theta_0, data):
  num = len(data) // config.finetune.batch_size
  phase = config.finetune.to_dict() | dict(ema=(0.9,), keep_steps=(num,))
  kept = {}
  last = loop.train(model, phase, theta_0, RUNS[:2], data, keep_fn=keeper(kept))
  assert ['', *kept] == loop.names_of(phase)
  # After one epoch it is where the first epoch of the same schedule ends.
  leaves = lambda t: np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)])
  assert abs(leaves(kept[f'step_{num}']) - leaves(last)).max() > 1e-4
  distance = lambda t: np.linalg.norm(
      leaves(t) - leaves(jax.tree.map(lambda x: np.stack([x, x]), theta_0))
  )
  assert 0 < distance(kept['ema_0.9']) < distance(last)


@pytest.mark.slow
def test_runs_with_initial_parameters_of_their_own(
    config, model, theta_0, data
):
  phase = config.finetune.to_dict() | dict(num_epochs=1)
  runs = [{'init_seed': s, 'learning_rate': 0.0} for s in (1, 2)]
  stacked = loop.train(model, phase, theta_0, runs, data)
  for k, run in enumerate(runs):
    expected = jax.jit(model.init_fn)(jax.random.key(run['init_seed']))
    assert_close(tree(lambda x, k=k: x[k], stacked), expected, atol=1e-7)


def test_a_group_with_and_without_initial_parameters_of_their_own(
    config, model, theta_0, data
):
  runs = [{'init_seed': 1, 'learning_rate': 0.0}, {'learning_rate': 0.0}]
  assert steps.grouped(runs, 2) == [[0], [1]]
  with pytest.raises(ValueError, match='only some have init_seed'):
    loop.train(model, config.finetune, theta_0, runs, data)


def test_what_cannot_be_trained(config, model, theta_0, data):
  train = functools.partial(loop.train, model, config.finetune, theta_0)
  with pytest.raises(ValueError, match=r"Unknown hyper-parameters \['lr'\]"):
    train([{'lr': 1.0}], data)
  with pytest.raises(ValueError, match='No runs'):
    train([], data)
  few = sources.Arrays({name: x[:7] for name, x in data.arrays.items()})
  with pytest.raises(ValueError, match='7 examples do not fill one batch of 8'):
    train(RUNS, few)
  with pytest.raises(ValueError, match='cannot train together'):
    train([{}, {'num_epochs': 3}], data)
  with pytest.raises(
      ValueError, match="optimizer is 'adam': choose from adamw"
  ):
    train([{'optimizer': 'adam'}], data)
  phase = config.finetune.to_dict() | dict(num_accumulated=2)
  with pytest.raises(ValueError, match='set num_accumulated to 1'):
    loop.train(model, phase, theta_0, [{'sam': 0.1}], data)


# Data that are not in memory: one run on all devices.


class Read:
  """A source without `.arrays`."""

  def __init__(self, arrays):
    self._arrays = sources.Arrays(arrays)

  def __len__(self):
    return len(self._arrays)

  def __getitem__(self, rows):
    return self._arrays[rows]


def streamed_steps(model, phase, theta_0, run, source):
  """The same on one device, step by step."""
  settings = steps.settings_of(phase, [run], len(source))
  hyper = tree(lambda x: x[0], steps.stack_runs([run]))
  state = steps.initial_state(settings, theta_0, hyper)
  step_fn = jax.jit(functools.partial(steps.train_step, model, settings))
  for epoch in range(settings.num_epochs):
    key = jax.random.fold_in(jax.random.key(run['seed']), 0x6175676D)
    key = jax.random.fold_in(key, epoch)
    batches = sources.batches(
        source, settings.batch_size, seed=run['seed'], epoch=epoch
    )
    for step, batch in enumerate(batches):
      state, _ = step_fn(state, hyper, batch, jax.random.fold_in(key, step))
  return state


@pytest.mark.slow
def test_on_a_mesh_as_on_one_device(config, model, theta_0, data):
  source = Read(data.arrays)
  run = {'seed': 1, 'learning_rate': 0.1, 'mixup': 0.5}
  phase = config.finetune.to_dict() | dict(ema=(0.9,), optimizer='sgd')
  assert jax.device_count() == 4
  kept, progress = {}, []
  trained = loop.train(
      model, phase, theta_0, [run], source,
      keep_fn=keeper(kept), progress_fn=lambda *x: progress.append(x),
  )  # fmt: skip
  expected = streamed_steps(model, phase, theta_0, run, source)
  assert_close(tree(lambda x: x[0], trained), expected.params, atol=1e-5)
  ema = jaxsoup.running_average().value(expected.ema['ema_0.9'])
  assert_close(tree(lambda x: x[0], kept['ema_0.9']), ema)
  assert [x[:2] for x in progress] == [(1, 2), (2, 2)]


@pytest.mark.slow
def test_runs_that_are_alike_compile_once(config, model, theta_0, data, caplog):
  runs = [{'seed': k, 'learning_rate': 0.1 * k} for k in (1, 2)]
  with jax.log_compiles():
    for run in runs:
      loop.train(model, config.finetune, theta_0, [run], Read(data.arrays))
  for name in ('start', 'advance'):
    assert caplog.text.count(f'XLA compilation of jit({name})') == 1


@pytest.mark.slow
def test_a_group_on_a_mesh_is_that_of_one_device(
    config, model, theta_0, data, monkeypatch
):
  phase = config.finetune.to_dict() | dict(optimizer='sgd')
  train = functools.partial(loop.train, model, phase)
  expected = train(theta_0, RUNS, data)
  read = train(theta_0, RUNS, Read(data.arrays))
  shapes = []
  advance = loop.advance

  def seen(*args):
    state, inputs = args[2], args[-1]
    image, kernel = inputs['image'], state.params['block_0']['mlp']['dense_in']
    shapes.append(
        [x.addressable_shards[0].data.shape for x in (image, kernel['kernel'])]
    )
    return advance(*args)

  monkeypatch.setattr(loop, 'advance', seen)
  # In memory, too: each device takes its part of every batch.
  abstract = sharding.fsdp(theta_0, loop.all_devices(), min_size=1)
  shardings = tree(lambda x: x.sharding, abstract)
  spread = train(jax.device_put(theta_0, shardings), RUNS, data)
  width, hidden = theta_0['block_0']['mlp']['dense_in']['kernel'].shape
  assert shapes == 4 * [[(3, 1, 2, 8, 8, 1), (3, width, hidden)]]
  for params in (read, spread):
    assert_close(params, expected, atol=2e-5)
  with pytest.raises(ValueError, match='batch_size is 6, .*among 4 devices'):
    train(theta_0, [{'batch_size': 6}], Read(data.arrays))


def test_metrics_are_logged_by_step():
  data = sources.Arrays(features(48))
  runs = [{'learning_rate': 0.2}, {'learning_rate': 0.1, 'seed': 5}]
  phase = PHASE | dict(optimizer='sgd', momentum=0.0)
  logged, losses = [], []
  log = lambda every, **more: loop.train(
      LINEAR, phase | more, tree(np.float32, start()), runs, data,
      log_fn=lambda row, values: logged.append((row, values)), log_every=every,
      progress_fn=lambda n, num, loss: losses.append(loss),
  )  # fmt: skip
  log(4)
  places = [(row, x['step'], x['epoch']) for row, x in logged]
  assert places == [
      (row, step, epoch)
      for step, epoch in ((4, 1), (6, 1), (10, 2), (12, 2))
      for row in (0, 1)
  ]
  # The means over the steps of an epoch.
  for row in (0, 1):
    first, last = (x['loss'] for r, x in logged[:4] if r == row)
    np.testing.assert_allclose((4 * first + 2 * last) / 6, losses[0][row], 1e-6)
  settings = steps.settings_of(phase, runs, 48)
  rates = [0.2 * rate_of(settings, step - 1) for step in (4, 6, 10, 12)]
  rows = [x for row, x in logged if row == 0]
  np.testing.assert_allclose([x['learning_rate'] for x in rows], rates, 1e-5)
  assert all(x['examples_per_second'] > 0 for x in rows)
  # The norm of the first gradient, from its formula; steps one by one.
  logged.clear()
  log(1, is_scanned=False)
  order = sources.shuffled(48, 0, 0)[:8]
  grads = gradient(start(), {k: x[order] for k, x in data.arrays.items()})
  norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
  assert logged[0][1]['gradient_norm'] == pytest.approx(norm, rel=1e-4)
  assert len(logged) == 2 * 12


@pytest.mark.slow_variants
@pytest.mark.parametrize('is_read', [False, True])
def test_stopped_and_resumed_is_the_same(
    is_read, config, model, theta_0, data, tmp_path
):
  source = Read(data.arrays) if is_read else data
  phase = config.finetune.to_dict() | dict(num_epochs=3, ema=(0.9,))
  kept = [{}, {}]
  train = lambda **options: loop.train(
      model, phase, theta_0, RUNS[:1], source, **options
  )
  whole = train(keep_fn=keeper(kept[0]))
  stop = preemption.Stop()
  saved = unfinished.Saved(tmp_path, stop)
  stop.requested = True
  with pytest.raises(preemption.Preempted):
    train(saved=saved)
  stop.requested = False
  # After one epoch of two steps; or after one step, in the middle of it.
  name = '1' if is_read else '2'
  assert [p.name for p in tmp_path.iterdir()] == [name]
  assert_equal(train(saved=saved, keep_fn=keeper(kept[1])), whole)
  assert_equal(*kept)
  saved.delete()
  # As if it were killed later: states are written while the training goes on.
  saved = unfinished.Saved(tmp_path, stop, minutes=0)
  train(saved=saved)
  saved.wait()
  (name,) = (p.name for p in tmp_path.iterdir())
  assert name == '6'
  assert_equal(train(saved=unfinished.Saved(tmp_path, stop)), whole)
  # Damaged, it is not trusted.
  for file in (tmp_path / name).rglob('*'):
    if file.is_file():
      file.write_bytes(b'?')
  with pytest.raises(ValueError, match='cannot be read: .* Delete it'):
    train(saved=unfinished.Saved(tmp_path, stop))


# BatchNorm.


class Net(nnx.Module):

  def __init__(self, rngs):
    self.dense = nnx.Linear(4, 6, rngs=rngs)
    self.norm = nnx.BatchNorm(
        6, momentum=0.5, use_running_average=True, rngs=rngs
    )
    self.head = nnx.Linear(6, 3, rngs=rngs)

  def features(self, x):
    return self.norm(self.dense(x))

  def __call__(self, x):
    return self.head(self.features(x))


@pytest.mark.slow_variants
@pytest.mark.parametrize('batch_norm', ['train', 'frozen'])
def test_running_statistics_follow_and_are_not_trained(batch_norm):
  model = modeling.of_module(
      lambda key: Net(nnx.Rngs(key)), inputs={'image': (4,)}, num_classes=3
  )
  assert model.statistics == {('norm', 'mean'), ('norm', 'var')}
  params = model.start_fn(jax.random.key(1))
  rng = np.random.default_rng(0)
  data = sources.Arrays(
      {
          'image': rng.normal(size=(8, 4)).astype(np.float32),
          'label': rng.integers(0, 3, 8).astype(np.int32),
      }
  )
  phase = dict(
      num_epochs=1, batch_size=8, warmup=0.0, final=1.0, batch_norm=batch_norm
  )
  run = {'learning_rate': 0.1, 'weight_decay': 0.5}
  trained = loop.train_one(model, phase, params, run, data)
  x = data.arrays['image'] @ params['dense']['kernel'] + params['dense']['bias']
  expected = {'mean': np.zeros(6), 'var': np.ones(6)}
  if batch_norm == 'train':
    expected = {'mean': 0.5 * x.mean(0), 'var': 0.5 + 0.5 * x.var(0)}
  for name, value in expected.items():
    np.testing.assert_allclose(trained['norm'][name], value, atol=1e-5)
  assert abs(trained['norm']['scale'] - 1).max() > 0.01


def test_a_model_without_inputs_is_refused(config):
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.model = dict(family='bert', num_classes=2)
  with pytest.raises(configs.UsageError, match='no shapes of its inputs'):
    architectures.make(config)
  config.model.family = 'gpt'
  with pytest.raises(configs.UsageError, match="model.family is 'gpt'"):
    architectures.make(config)


@pytest.mark.slow
def test_a_text_model_by_its_config(config):
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.model = dict(
        family='bert', num_classes=2, vocab_size=11, width=8, depth=1,
        num_heads=2, num_positions=6,
    )  # fmt: skip
    config.inputs = dict(attention_mask=(6,), input_ids=(6,))
  model = architectures.make(config)
  assert list(model.inputs) == ['input_ids', 'attention_mask']
  batch = {
      'input_ids': jnp.arange(6)[None],
      'attention_mask': jnp.array([[1, 1, 1, 1, 0, 0]]),
  }
  params = model.start_fn(jax.random.key(0))
  logits = model.logits_fn(params, batch)
  assert logits.shape == (1, 2)
  # What is masked does not count.
  other = batch | {'input_ids': batch['input_ids'].at[0, 5].set(9)}
  np.testing.assert_allclose(model.logits_fn(params, other), logits, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('is_read', [False, True])
def test_images_train_as_bytes_as_they_do_in_floats(config, is_read):
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.image = dict(size=(8, 8, 1), mean=[0.3], std=[0.2])
  model = architectures.make(config)
  assert model.image == preparation.ImageSpec((8, 8, 1), (0.3,), (0.2,))
  assert model.inputs['image'].dtype == np.uint8
  rng = np.random.default_rng(0)
  levels = rng.integers(0, 256, (8, 6, 6, 1), np.uint8)
  label = rng.integers(0, 10, 8).astype(np.int32)
  start = model.start_fn(jax.random.key(0))
  # Not Adam, nor RandAugment: they make much of the last bit.
  phase = PHASE | dict(optimizer='sgd')
  run = {'learning_rate': 0.1, 'crop': 0.5, 'mixup': 0.5, 'noise': 0.1}
  trained, logits = [], []
  for image in (levels, levels / np.float32(255)):
    source = sources.Arrays({'image': image, 'label': label})
    if is_read:
      source = sources.Subset(source, np.arange(8))
    trained.append(loop.train_one(model, phase, start, run, source))
    logits.append(model.logits_fn(trained[0], {'image': image}))
  assert_close(*trained, atol=1e-5)
  moved = tree(lambda x, y: np.abs(x - y).max(), trained[0], start)
  assert max(jax.tree.leaves(moved)) > 1e-2
  assert_close(*logits, atol=1e-5)


# One step at a time, and batches as training sees them.


@pytest.mark.slow
def test_steps_one_by_one_are_those_of_the_loop(config, model, theta_0, data):
  stepped_params, expected = (
      loop.train(
          model,
          config.finetune.to_dict() | {'is_scanned': is_scanned},
          theta_0,
          RUNS[:num],
          data,
      )
      for num, is_scanned in ((2, False), (2, True))
  )
  for params in (stepped_params, expected):
    params['block_0']['attention']['key']['bias'] = 0  # Rounding, see above.
  assert_close(stepped_params, expected, atol=1e-4)
  losses = []
  loop.train(
      model,
      config.finetune.to_dict() | {'is_scanned': False},
      theta_0,
      RUNS[:2],
      data,
      progress_fn=lambda n, num, loss: losses.append(loss),
  )
  assert np.shape(losses) == (2, 2)


@pytest.mark.parametrize('first', [{'flip': 0.0}, {}, {'noise': 0.0}])
def test_batches_are_augmented_as_the_runs_were(config, model, data, first):
  runs = [first, {'flip': 1.0}]
  walk = loop.augmented_batches(model, config.finetune, runs, data, seed=3)
  order = list(sources.batches(data, 8, seed=3))
  assert len(order) == 2
  for i, (augmented, batch) in enumerate(zip(walk, order, strict=True)):
    image = batch['image'][:, :, :: -1 if i else 1]
    np.testing.assert_array_equal(augmented['image'], image)
    np.testing.assert_array_equal(augmented['label'], batch['label'])


# Teachers, and parts that are not trained.


def test_targets_of_a_teacher():
  """The gradient is x (softmax(z) - target), whatever the label says."""
  data = features(8)
  rng = np.random.default_rng(5)
  teacher = 2 * rng.normal(size=(8, NUM_CLASSES))
  source = loop.distilled(sources.Arrays(data), teacher)
  expected = special.softmax(teacher, axis=-1)
  np.testing.assert_allclose(source.arrays['target'], expected, rtol=1e-5)
  phase = dict(num_epochs=1, batch_size=8, warmup=0, final=1, optimizer='sgd')
  phase['momentum'] = 0.0
  trained = loop.train_one(
      LINEAR, phase, tree(np.float32, start()), {'learning_rate': 0.5}, source
  )
  params = start()
  z = data['feature'] @ params['kernel'] + params['bias']
  error = (special.softmax(z, axis=-1) - expected) / 8
  grads = {'kernel': data['feature'].T @ error, 'bias': error.sum(0)}
  assert_close(trained, tree(lambda p, g: p - 0.5 * g, params, grads))


def test_a_frozen_part_stays():
  phase = dict(PHASE, num_epochs=3)
  run = {'learning_rate': 0.3, 'weight_decay': 0.5}
  params = tree(np.float32, start())
  model = modeling.frozen(LINEAR, 'bias', params)
  trained = loop.train_one(
      model, phase, params, run, sources.Arrays(features())
  )
  np.testing.assert_array_equal(trained['bias'], params['bias'])
  assert np.abs(trained['kernel'] - params['kernel']).max() > 0.1
  with pytest.raises(ValueError, match="No part 'head' to freeze: .*kernel"):
    modeling.frozen(LINEAR, 'head', params)
