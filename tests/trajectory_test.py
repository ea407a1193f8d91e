"""Averages along one run, against NumPy, optax and recursions."""

import json
import sys

from flax import linen as nn
from flax import nnx
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from typer import testing

import jaxsoup
from jaxsoup import checkpoints
from jaxsoup import cli
from jaxsoup import trajectory
from jaxsoup.commands import _options
from jaxsoup.nnx import Averages

STEPS = np.array([0, 10, 20, 50, 60])
TIMES = np.arange(1.0, 401.0)


@pytest.fixture(scope='module')
def walk():
  """A random walk, [T, 2]: a run that drifts."""
  steps = np.random.default_rng(0).normal(size=(len(TIMES), 2))
  return np.cumsum(steps, axis=0).astype(np.float32)


@pytest.mark.parametrize(
    'options, expected',
    [
        ({}, [0, 10, 20, 50, 60]),
        ({'last': 2}, [50, 60]),
        ({'start': 10, 'stop': 50}, [10, 20, 50]),
        ({'start': 10, 'every': 20}, [10, 50]),
        ({'every': 20, 'last': 2}, [20, 60]),
    ],
)
def test_windows(options, expected):
  assert STEPS[trajectory.window(STEPS, **options)].tolist() == expected
  shuffled = np.random.default_rng(0).permutation(STEPS)
  chosen = shuffled[trajectory.window(shuffled, **options)]
  assert sorted(chosen) == expected


def test_swa_in_a_window():
  where = trajectory.window(STEPS, last=2)
  assert trajectory.swa(STEPS, where=where).tolist() == [0, 0, 0, 0.5, 0.5]
  assert trajectory.swa([7]).tolist() == [1]


@pytest.mark.parametrize('decay', [0.0, 0.5, 0.97])
@pytest.mark.parametrize('num', [1, 2, 5])
def test_ema_is_the_recursion(num, decay):
  steps = STEPS[:num]
  models = np.random.default_rng(num).normal(size=(num, 3))
  moving = models[0]
  for model, distance in zip(models[1:], np.diff(steps)):
    kept = decay**distance
    moving = kept * moving + (1 - kept) * model
  order = np.random.default_rng(0).permutation(num)
  alpha = trajectory.ema(steps[order], decay=decay)
  np.testing.assert_allclose(alpha @ models[order], moving, atol=1e-6)
  assert alpha.sum() == pytest.approx(1) and alpha.dtype == np.float32


@pytest.mark.parametrize('every', [1, 5])
@pytest.mark.parametrize('name', trajectory.CURVES)
def test_decay_replaces_the_schedule_where_gradients_do_not_move(name, every):
  """On a linear loss with noise, the run with that schedule is the merge."""
  num, rate = 60, 0.1
  gradients = np.random.default_rng(1).normal(size=(num, 3)).astype('f4')
  curve = lambda count: trajectory.CURVES[name](np.asarray(count) / num)

  def run(schedule):
    # optax counts for itself.
    tx = optax.sgd(schedule)
    theta = [np.ones(3, np.float32)]
    state = tx.init(theta[0])
    for gradient in gradients:
      updates, state = tx.update(gradient, state)
      theta.append(np.asarray(optax.apply_updates(theta[-1], updates)))
    return np.array(theta)

  constant = run(rate)[::every]
  means = np.asarray(curve(np.arange(num))).reshape(-1, every).mean(1)
  decayed = run(lambda count: rate * jnp.asarray(means)[count // every])
  alpha = trajectory.decay(np.arange(0, num + 1, every), name)
  np.testing.assert_allclose(alpha @ constant, decayed[-1], atol=2e-6)
  assert alpha.sum() == pytest.approx(1) and alpha.min() >= 0
  by_schedule = trajectory.decay(np.arange(0, num + 1, every), curve)
  np.testing.assert_allclose(by_schedule, alpha, atol=1e-7)
  # A rate that never falls: the last iterate.
  constant = optax.constant_schedule(1.0)
  assert trajectory.decay([0, 5, 9], constant).tolist() == [0, 0, 1]


def test_decay_weights_the_updates_of_any_run():
  """`sum_j c_j theta_j = theta_0 + sum_i w_i (theta_i - theta_(i-1))`."""
  rng = np.random.default_rng(2)
  hessian, rate, theta = np.array([0.1, 1.0, 3.0]), 0.2, [np.ones(3)]
  for _ in range(STEPS[-1]):
    gradient = hessian * theta[-1] + rng.normal(size=3)
    theta.append(theta[-1] - rate * gradient)
  models = np.array(theta)[STEPS]
  alpha = trajectory.decay(STEPS, 'linear')
  kept = [1 - (np.arange(a, b) / 60).mean() for a, b in zip(STEPS, STEPS[1:])]
  expected = models[0] + kept @ np.diff(models, axis=0)
  np.testing.assert_allclose(alpha @ models, expected, atol=1e-6)


@pytest.mark.parametrize('length', [0.05, 0.1, 0.25])
def test_power_decay_is_the_recursion_of_the_source(walk, length):
  """`beta_t = (1 - 1/t)^(gamma + 1)`, and the deviation of its weights."""
  gamma = trajectory._power_of(length)
  moving, weights = np.zeros(2), np.zeros(len(TIMES))
  for t, model in enumerate(walk.astype(float), 1):
    beta = (1 - 1 / t) ** (gamma + 1)
    moving = beta * moving + (1 - beta) * model
    weights = beta * weights
    weights[t - 1] = 1 - beta
  average = jaxsoup.running_average(trajectory.power_decay(length))
  add = lambda state, x: (average.update(state, x), None)
  state, _ = jax.lax.scan(add, average.init(walk[0]), walk)
  np.testing.assert_allclose(average.value(state), moving, rtol=1e-4)
  mean = weights @ TIMES
  deviation = np.sqrt(weights @ (TIMES - mean) ** 2) / len(TIMES)
  assert deviation == pytest.approx(length, rel=0.02)


def _profiles(steps, lengths):
  """Weights of the models that each average is of, [K, T], by quadrature."""
  powers = np.array([trajectory._power_of(x) for x in lengths])[:, None]
  times = np.linspace(0, max(steps), 40_001)[1:] - max(steps) / 80_000
  ends = np.asarray(steps, float)[:, None]
  weights = np.where(times <= ends, (times / ends) ** powers, 0)
  return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize('length', [0.03, 0.07, 0.15, 0.2])
def test_post_hoc_ema_is_the_closest(length):
  """Against a least-squares fit of the weights on a fine grid."""
  steps = np.tile([100, 200, 300, 400], 2)
  lengths = np.repeat([0.05, 0.1], 4)
  alpha = trajectory.post_hoc_ema(steps, lengths, step=400, length=length)
  stored = _profiles(steps, lengths)
  (wanted,) = _profiles([400], [length])
  # Coefficients that sum to one: of differences to the first.
  fitted = np.linalg.lstsq(
      (stored[1:] - stored[0]).T, wanted - stored[0], rcond=None
  )[0]
  error = lambda x: np.linalg.norm(x @ stored - wanted)
  best = np.append(1 - fitted.sum(), fitted)
  assert alpha.sum() == pytest.approx(1, abs=1e-5)
  assert error(alpha) <= error(best) * 1.01
  assert alpha.min() < 0


def test_post_hoc_ema_of_what_was_stored(walk):
  steps, lengths = np.tile([100, 200, 300, 400], 2), np.repeat([0.05, 0.1], 4)
  alpha = trajectory.post_hoc_ema(steps, lengths, step=400, length=0.1)
  np.testing.assert_allclose(alpha, np.eye(8)[7], atol=1e-3)
  # And one in between, from averages along a run.
  stored = []
  for length in (0.05, 0.1):
    average = jaxsoup.running_average(trajectory.power_decay(length))
    state = average.init(walk[0])
    for t, model in enumerate(walk, 1):
      state = average.update(state, model)
      if t % 100 == 0:
        stored.append(average.value(state))
  alpha = trajectory.post_hoc_ema(steps, lengths, step=400, length=0.08)
  soup = jaxsoup.average(stored, alpha).params
  power = trajectory._power_of(0.08) + 1
  weights = np.diff(np.append(0, TIMES**power)) / TIMES[-1] ** power
  np.testing.assert_allclose(soup, weights @ walk, rtol=1e-2)


@pytest.mark.parametrize(
    'steps, lengths, most',
    [
        (range(40, 401, 40), (0.04, 0.07, 0.10, 0.13, 0.16), 0.03),
        ((200, 400), (0.05, 0.06, 0.08, 0.10), 0.08),
    ],
)
def test_post_hoc_ema_is_as_close_as_the_guide_says(steps, lengths, most):
  """The sum of the absolute differences of the weights."""
  stored = [(step, length) for length in (0.05, 0.1) for step in steps]
  profiles = _profiles(*zip(*stored))
  for length in lengths:
    alpha = trajectory.post_hoc_ema(*zip(*stored), step=400, length=length)
    (wanted,) = _profiles([400], [length])
    assert np.abs(alpha @ profiles - wanted).sum() < most, length


def test_best_takes_the_later_of_equal_ones():
  best = lambda *args: trajectory.best(*args).tolist()
  assert best([1, 3, 3, 3, 2], 2) == [False, False, True, True, False]
  assert best([np.nan, 1, 2], 2) == [False, True, True]


class Counted(list):
  """Ingredients that count how often they are read."""

  num_reads = 0

  def __getitem__(self, k):
    self.num_reads += isinstance(k, int)
    return super().__getitem__(k)


@pytest.mark.parametrize(
    'size, every', [(1, 1), (5, 1), (5, 2), (5, 7), (9, 9)]
)
def test_sliding_windows(walk, size, every):
  run = Counted({'w': x, 'step': np.int32(3)} for x in walk[:60])
  soups = list(trajectory.sliding(run, size, every=every))
  ends = range(size, 61, every)
  assert len(soups) == len(ends)
  for soup, end in zip(soups, ends):
    mean = walk[end - size : end].astype(float).mean(0)
    np.testing.assert_allclose(soup.params['w'], mean, rtol=1e-6, atol=1e-6)
    assert np.flatnonzero(soup.alpha).tolist() == [*range(end - size, end)]
    assert soup.params['step'] == 3
  # One to add and one to subtract, and every `size` windows all of one anew.
  assert run.num_reads <= 3 * max(every, 1) * len(ends) + size + 1


def test_sliding_windows_do_not_drift(rng):
  """Large values leave the sum, and their rounding errors with them."""
  run = [np.float32(x) for x in rng.normal(size=600)]
  run[:100] = [x * np.float32(1e6) for x in run[:100]]
  *_, soup = trajectory.sliding(run, 50)
  expected = np.mean(run[-50:], dtype=float)
  assert float(soup.params) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: trajectory.swa([1, 1]), 'Two checkpoints have one step'),
        (lambda: trajectory.swa(4), 'expected the step number of each'),
        (lambda: trajectory.swa([]), 'expected the step number of each'),
        (lambda: trajectory.swa([0.5]), 'expected the step number of each'),
        (lambda: trajectory.swa([1, 2], where=[1, 0]), 'expected a bool for'),
        (lambda: trajectory.swa([1], where=[False]), 'at least one True'),
        (lambda: trajectory.ema([1], decay=1.0), r'decay is 1.0: expected'),
        (lambda: trajectory.decay([1], 'sqrt'), "curve is 'sqrt': choose from"),
        (
            lambda: trajectory.window([1, 2], last=3),
            'has 2 of the 2 checkpoints',
        ),
        (
            lambda: trajectory.window([1, 2], start=5),
            r'\(start 5\) has 0 of the 2',
        ),
        (lambda: trajectory.window([1, 2], every=0), 'every is 0: expected'),
        (lambda: trajectory.best([1, np.nan], 2), '1 of 2 checkpoints have'),
        (lambda: trajectory.power_decay(0.3), 'EMA is 0.3: expected a share'),
        (
            lambda: trajectory.post_hoc_ema([1, 2], [0.1], step=2, length=0.1),
            '2 steps and 1 lengths',
        ),
        (lambda: trajectory.sliding([np.ones(1)], 2), 'expected a size from 1'),
        (lambda: trajectory.kept(()), 'has no averages'),
        (
            lambda: trajectory.keep({}).update(1.0, trajectory.Kept({})),
            'call tx.update',
        ),
    ],
)
def test_refuses(make, message):
  with pytest.raises(ValueError, match=message):
    make()


class Net(nn.Module):
  """Parameters in bfloat16."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3, param_dtype=jnp.bfloat16)(x)


AVERAGES = {
    'ema': jaxsoup.running_average(0.9),
    'swa': jaxsoup.running_average(start=3, every=2),
    'restarted': jaxsoup.running_average(lambda n: n % 4 != 1),
    'on the host': jaxsoup.running_average(is_on_host=True),
}


def _expected(history):
  """Of the parameters after each update, in float64."""
  history = np.asarray(history, float)
  weights = 0.9 ** np.arange(len(history))[::-1]
  return {
      'ema': np.tensordot(weights, history, 1) / weights.sum(),
      'swa': history[3::2].mean(0),
      'restarted': history[(len(history) - 1) // 4 * 4 :].mean(0),
      'on the host': history.mean(0),
  }


def _state(num_accumulated=1):
  net = Net()
  params = net.init(jax.random.key(0), jnp.ones((1, 4)))
  tx = optax.chain(optax.adam(0.1), trajectory.keep(AVERAGES))
  if num_accumulated > 1:
    tx = optax.MultiSteps(tx, num_accumulated)
  return train_state.TrainState.create(apply_fn=net.apply, params=params, tx=tx)


@jax.jit
def _step(state, x):
  loss_fn = lambda p: (state.apply_fn(p, x) ** 2).mean()
  return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))


def _batches(num):
  return jax.random.normal(jax.random.key(1), (num, 8, 4))


@pytest.mark.parametrize('num_accumulated', [1, 2])
def test_averages_in_a_train_state(num_accumulated):
  state, history = _state(num_accumulated), []
  for i, x in enumerate(_batches(10 * num_accumulated), 1):
    state = _step(state, x)
    if i % num_accumulated == 0:
      history.append(state.params['params']['Dense_0']['kernel'])
  for kept in (trajectory.kept, jax.jit(trajectory.kept)):
    averages = kept(state.opt_state)
    for name, expected in _expected(history).items():
      kernel = averages[name]['params']['Dense_0']['kernel']
      assert kernel.dtype == jnp.bfloat16
      rounded = expected.astype(jnp.bfloat16).astype(float)
      np.testing.assert_allclose(
          kernel.astype(float), rounded, rtol=2**-8, err_msg=name
      )


def test_averages_go_on_with_the_same_bits_after_a_kill(tmp_path):
  batches = _batches(9)
  whole = _state()
  for x in batches:
    whole = _step(whole, x)
  state = _state()
  for x in batches[:5]:
    state = _step(state, x)
  items = {
      name.replace(' ', '_'): ocp.args.StandardSave(x)
      for name, x in trajectory.kept(state.opt_state).items()
  }
  with ocp.CheckpointManager(tmp_path / 'run') as manager:
    saved = ocp.args.StandardSave(state)
    manager.save(5, args=ocp.args.Composite(state=saved, **items))
    manager.wait_until_finished()
    restored = ocp.args.StandardRestore(_state())
    step = manager.restore(5, args=ocp.args.Composite(state=restored))
  del state
  state = step['state']
  for x in batches[5:]:
    state = _step(state, x)
  jax.tree.map(np.testing.assert_array_equal, state.opt_state, whole.opt_state)
  # The averages are checkpoints of their own.
  (swa,) = checkpoints.Ingredients([tmp_path / 'run'], item='swa')
  assert swa['Dense_0']['kernel'].shape == (4, 3)


def test_averages_lie_like_their_parameters(on_mesh):
  params = {'w': on_mesh.put(jnp.ones((8, 4), jnp.bfloat16), 0)}
  averages = dict(AVERAGES)
  if jax.__version_info__ < (0, 8):  # A CPU has one memory only there.
    del averages['on the host']
  tx = optax.chain(optax.sgd(0.1), trajectory.keep(averages))
  init = tx.init(params)
  for state in (init, jax.jit(tx.update)(params, init, params)[1]):
    for name, average in state[-1].averages.items():
      total = average.total['w']
      assert total.dtype == jnp.float32
      assert total.addressable_shards[0].data.shape == (2, 4)
      is_on_host = total.sharding.memory_kind == 'pinned_host'
      assert is_on_host == (name == 'on the host')


class Normed(nnx.Module):

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.dense = nnx.Linear(4, 3, rngs=rngs)
    self.norm = nnx.BatchNorm(3, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)

  def __call__(self, x):
    return self.dropout(self.norm(self.dense(x)))


@pytest.fixture(scope='module')
def trained():
  """An nnx model, averages of both kinds, and what they are of."""
  model = Normed()
  tx = optax.chain(optax.sgd(0.1), trajectory.keep(AVERAGES))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  averages = Averages(model, AVERAGES)

  @nnx.jit
  def step(model, optimizer, averages, x):
    gradient = nnx.grad(lambda m: ((m(x) - 1) ** 2).mean())(model)
    optimizer.update(model, gradient)
    averages.update(model)

  history = []
  for x in _batches(10):
    step(model, optimizer, averages, x)
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    history.append([np.asarray(x) for x in jax.tree.leaves(state)])
  return model, optimizer, averages, [np.array(x) for x in zip(*history)]


@pytest.mark.parametrize('name', AVERAGES)
def test_averages_of_an_nnx_model(trained, name):
  _, optimizer, averages, history = trained
  model = Normed()
  nnx.update(model, averages[name])
  state = nnx.state(model, (nnx.Param, nnx.BatchStat))
  for leaf, values in zip(jax.tree.leaves(state), history, strict=True):
    shape = values.shape[1:]
    expected = _expected(values.reshape(len(values), -1))[name]
    np.testing.assert_allclose(leaf, expected.reshape(shape), rtol=1e-5)
  of_optimizer = trajectory.kept(optimizer.opt_state)[name]
  np.testing.assert_array_equal(
      of_optimizer['dense']['kernel'], model.dense.kernel[...]
  )


def test_averages_of_an_nnx_model_are_saved(trained, tmp_path):
  model, _, averages, _ = trained
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'averages', nnx.state(averages))
    checkpointer.wait_until_finished()
    again = Averages(Normed(), AVERAGES)
    target = nnx.state(again)
    nnx.update(again, checkpointer.restore(tmp_path / 'averages', target))
  averages.update(model)
  again.update(model)
  jax.tree.map(
      np.testing.assert_array_equal, nnx.state(averages), nnx.state(again)
  )


@pytest.fixture
def run(tmp_path):
  """A run with stored metrics and an unfinished step."""
  options = ocp.CheckpointManagerOptions(best_fn=lambda x: x['accuracy'])
  path = tmp_path / 'run/checkpoints'
  with ocp.CheckpointManager(path, options=options) as manager:
    for step in range(0, 50, 10):
      state = {'params': {'w': jnp.full(3, float(step))}, 'step': step}
      manager.save(
          step,
          args=ocp.args.StandardSave(state),
          metrics={'accuracy': float(abs(25 - step))},
      )
  (path / '60.orbax-checkpoint-tmp-17').mkdir()
  return path


def test_steps_of_a_run(run, tmp_path):
  steps = checkpoints.steps(run)
  assert list(steps) == [0, 10, 20, 30, 40]
  assert checkpoints.steps(run.parent) == steps  # Where it is the only run.
  values = checkpoints.Ingredients(steps.values())
  assert [float(x['w'][0]) for x in values] == [0, 10, 20, 30, 40]
  (run.parent / 'eval/5').mkdir(parents=True)
  with pytest.raises(ValueError, match=r"several runs: \['checkpoints', 'eval"):
    checkpoints.steps(run.parent)
  with pytest.raises(FileNotFoundError, match='is one checkpoint'):
    checkpoints.steps(run / '10')
  with pytest.raises(FileNotFoundError, match='holds no steps of a run'):
    checkpoints.steps(run / '10/default/ocdbt.process_0/d')
  with pytest.raises(FileNotFoundError, match='is not a directory'):
    checkpoints.steps(tmp_path / 'nowhere')
  (run / '0010').mkdir()
  with pytest.raises(ValueError, match='has one step twice'):
    checkpoints.steps(run)
  (run / '0010').rmdir()
  (run / 'theta_0').mkdir()  # Alone of its kind.
  (run / 'events.out.tfevents.17.host-0').touch()
  assert checkpoints.steps(run) == steps
  (run / 'theta_1').mkdir()
  with pytest.raises(ValueError, match='steps of several kinds: .*theta_'):
    checkpoints.steps(run)


def test_a_soup_among_steps_of_an_older_orbax(tmp_path):
  """Of which only the soup has the file that is written last."""
  run = tmp_path / 'run'
  for step in (100, 200):
    params = {'w': jnp.full(2, float(step))}
    checkpoints.save(run / f'ck_{step}', params)
    (run / f'ck_{step}/commit_success.txt').unlink()
  checkpoints.save(run / 'ck_150', {'w': jnp.full(2, 150.0)})
  assert list(checkpoints.steps(run)) == [100, 150, 200]
  assert checkpoints.Ingredients([run])[0]['w'][0] == 200


def test_a_directory_that_is_no_run(tmp_path):
  """As the workdir of an experiment: `theta_0` is not a trajectory."""
  checkpoints.save(tmp_path / 'work/theta_0', {'w': np.ones(2, np.float32)})
  (tmp_path / 'work/soups').mkdir()
  result = _invoke(tmp_path / 'work', '--out', tmp_path / 'out')
  assert result.exit_code == 1 and not (tmp_path / 'out').exists()
  assert 'has one step only' in result.stderr and 'theta_0' in result.stderr


def test_metrics_of_a_run(run, tmp_path):
  known = {0: 25.0, 10: 15.0, 20: 5.0, 30: 5.0, 40: 15.0}
  assert checkpoints.metric(run, 'accuracy') == known
  rows = [{'step': k, 'accuracy': x} for k, x in known.items()]
  rows += [{'step': 5, 'loss': 1.0}]
  lines, table = tmp_path / 'log.jsonl', tmp_path / 'log.csv'
  lines.write_text('\n'.join(map(json.dumps, rows)))
  table.write_text(
      'step,loss,accuracy\n' + ''.join(f'{k},,{x}\n' for k, x in known.items())
  )
  trainer = tmp_path / 'trainer_state.json'
  trainer.write_text(json.dumps({'log_history': rows}))
  for file in (lines, table, trainer):
    assert checkpoints.metric(file, 'accuracy') == known
  with pytest.raises(ValueError, match="no metric 'f1'.*accuracy"):
    checkpoints.metric(lines, 'f1')
  table.write_text('nothing')
  lines.write_text('{"accuracy": 1}')
  for file in (table, lines):
    with pytest.raises(ValueError, match=file.name):
      checkpoints.metric(file, 'accuracy')


def test_a_run_of_a_trainer(tmp_path):
  """Directories of Hugging Face: as transformers leaves them."""
  losses = {5: 3.0, 10: 1.0, 100: 2.0}
  for step in losses:
    folder = tmp_path / f'run/checkpoint-{step}'
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text('{}')
    weights = {'w': np.full(3, step, np.float32)}
    safetensors.numpy.save_file(weights, folder / 'model.safetensors')
    rows = [{'step': k, 'loss': x} for k, x in losses.items() if k <= step]
    content = json.dumps({'log_history': rows})
    (folder / 'trainer_state.json').write_text(content)
  assert checkpoints.metric(tmp_path / 'run', 'loss') == losses
  options = ('--best', 2, '--metric', 'loss:min', '--out', tmp_path / 'soup')
  result = _invoke(tmp_path / 'run', *options)
  assert result.exit_code == 0, (result.output, result.exception)
  soup = safetensors.numpy.load_file(tmp_path / 'soup/model.safetensors')
  assert soup['w'].tolist() == [55.0] * 3


def _invoke(*args):
  args = ['soup', 'trajectory', *map(str, args)]
  return testing.CliRunner().invoke(cli.app, args)


@pytest.mark.parametrize(
    'options, steps, alpha',
    [
        ((), [40, 30, 20, 10, 0], [0.2] * 5),
        (('--steps', '10:40:20'), [30, 10], [0.5, 0.5]),
        (('--steps', ':20'), [20, 10, 0], [1 / 3] * 3),
        (('--last', 2), [40, 30], [0.5, 0.5]),
        (('--best', 2, '--metric', 'accuracy:min'), [30, 20], [0.5, 0.5]),
        (('--best', 2, '--metric', 'log.csv:loss:min'), [20, 10], [0.5, 0.5]),
        (('--best', 1, '--metric', 'accuracy'), [0], [1.0]),
        (
            ('--decay', 'linear', '--steps', '20:40'),
            [40, 30, 20],
            [0.275, 0.5, 0.225],
        ),
    ],
)
def test_command(run, tmp_path, monkeypatch, options, steps, alpha):
  monkeypatch.chdir(tmp_path)
  rows = ''.join(f'{k},{abs(k - 14)}\n' for k in range(0, 50, 10))
  (tmp_path / 'log.csv').write_text('step,loss\n' + rows)
  result = _invoke(run, *options, '--whole', '--out', 'out', '--json')
  assert result.exit_code == 0, (result.output, result.exception)
  # As the run itself restores, its step that of the latest ingredient.
  with ocp.CheckpointManager(tmp_path / 'out') as manager:
    assert manager.latest_step() == steps[0]
    target = {'params': {'w': jnp.zeros(3)}, 'step': 0}
    restore = ocp.args.StandardRestore(target)
    state = manager.restore(steps[0], args=restore)
  expected = np.dot(alpha, steps)
  np.testing.assert_allclose(state['params']['w'], [expected] * 3, rtol=1e-6)
  assert state['step'] == steps[0]
  stored = checkpoints.provenance(tmp_path / 'out')
  assert stored['metadata']['steps'] == steps
  np.testing.assert_allclose(stored['alpha'], alpha, atol=1e-6)


def test_command_that_compares(run, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', list(sys.path))
  (tmp_path / 'chosen.py').write_text(
      'def score(params):\n  return -abs(float(params["w"].mean()) - 26)\n'
  )
  options = ('--last', 2, '--last', 4, '--decay', 'mean', '--decay', 'linear')
  result = _invoke(run, *options, '--eval', 'chosen:score', '--out', 'out')
  assert result.exit_code == 0, (result.output, result.exception)
  assert [line.split()[1:] for line in result.stderr.splitlines()] == [
      ['last', 'step'],
      ['mean', 'of', 'the', 'last', '2'],
      ['linear', 'over', 'the', 'last', '2'],
      ['mean', 'of', 'the', 'last', '4'],
      ['linear', 'over', 'the', 'last', '4'],
  ]
  stored = checkpoints.provenance(tmp_path / 'out')['metadata']
  scores = [float(line.split()[0]) for line in result.stderr.splitlines()]
  assert stored['average'].endswith('over the last 4')
  assert stored['score'] == pytest.approx(max(scores), abs=1e-4)
  result = _invoke(run, '--eval', 'chosen:score', '--out', 'again', '--json')
  printed = json.loads(result.stdout)
  assert printed['average'] == 'mean of the 5 steps'
  assert printed['score'] == pytest.approx(-6)


@pytest.mark.parametrize(
    'options, code, message',
    [
        (('--steps', '1:2:3:4'), 2, 'write START:STOP or START:STOP:EVERY'),
        (
            ('--steps', '41:50'),
            1,
            'The window (start 41, stop 50) has 0 of the 5',
        ),
        (('--steps', '0:40:0'), 1, 'every is 0: expected at least 1'),
        (('--best', 2), 1, '--best and --metric go together'),
        (('--best', 2, '--metric', 'loss'), 1, "no metric 'loss' for any step"),
        (('--last', 1, '--last', 2), 1, 'add --eval, or give one of each'),
        (('--decay', 'sqrt'), 2, "'sqrt' is not one of"),
        (('--whole', '--eval', 'x:y'), 1, '--eval scores models, and --whole'),
    ],
)
def test_mistakes_in_the_command(run, tmp_path, options, code, message):
  result = _invoke(run, *options, '--out', tmp_path / 'out')
  assert result.exit_code == code
  assert message in ' '.join(result.stderr.replace('│', ' ').split())
  assert not (tmp_path / 'out').exists()


def test_a_plan_makes_no_soup(run, tmp_path):
  result = _invoke(run, '--last', 2, '--plan', 3, '--out', tmp_path / 'out')
  assert 'of 2 checkpoints' in result.stdout and result.exit_code == 0
  assert not (tmp_path / 'out').exists()


def test_the_sum_of_an_average_is_not_taken_for_it(tmp_path):
  state = _state()
  assert_none = pytest.raises(ValueError, match='Nothing has been added')
  with assert_none:
    trajectory.kept(trajectory.Kept({'swa': AVERAGES['swa'].init(1.0)}))
  state = _step(state, _batches(1)[0])
  # That which starts later has no value yet.
  assert sorted(trajectory.kept(state.opt_state)) == sorted(
      AVERAGES.keys() - {'swa'}
  )
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', state)
  item = 'opt_state/1/averages/ema/total'
  ingredients = checkpoints.Ingredients([tmp_path / 'state'], item=item)
  with pytest.raises(ValueError, match='is the sum of a running average'):
    jaxsoup.uniform(ingredients)
  whole = checkpoints.Ingredients([tmp_path / 'state'], whole=True)
  assert 'opt_state' in jaxsoup.uniform(whole).params


def test_missing_steps_are_said(run, tmp_path):
  result = _invoke(run, '--steps', '0:40:5', '--out', tmp_path / 'out')
  assert result.exit_code == 0
  assert (
      '4 steps of --steps have no checkpoint: 5, 15, 25, 35.' in result.stderr
  )


def test_the_command_has_every_curve():
  assert sorted(_options.Curve) == sorted(['mean', *trajectory.CURVES])
