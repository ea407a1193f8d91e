"""Diagnosis: planted faults are found, and none is invented.

Small networks, trained on real images; each fault is planted in one pool.
"""

import itertools
from typing import Any
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoup import checkpoints
from jaxsoup import diagnosis
from jaxsoup import evaluation
from jaxsoup import metrics
from jaxsoup.data import digits
from jaxsoup.data import sources
from jaxsoup.experiments import finetune
from jaxsoup.experiments import modeling
from jaxsoup.models import batch_norm

# As in the tests of checkpoints: what Orbax leaves behind when a read failed.
pytestmark = pytest.mark.filterwarnings(
    'ignore::pytest.PytestUnraisableExceptionWarning'
)

NUM_PIXELS, NUM_UNITS, NUM_CLASSES = 64, 96, 10
PRETRAIN = dict(num_epochs=40, batch_size=50, warmup=0.1, final=0.0)
FINETUNE = dict(num_epochs=6, batch_size=50, warmup=0.1, final=0.0, ema=(0.9,))
RATES = (1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3)
tree = jax.tree.map


class Net(nnx.Module):
  """Two hidden layers."""

  def __init__(self, *, has_norm, rngs):
    self.first = nnx.Linear(NUM_PIXELS, NUM_UNITS, rngs=rngs)
    self.second = nnx.Linear(NUM_UNITS, NUM_UNITS, rngs=rngs)
    self.head = nnx.Linear(NUM_UNITS, NUM_CLASSES, rngs=rngs)
    if has_norm:
      self.norm = nnx.BatchNorm(NUM_UNITS, use_running_average=True, rngs=rngs)

  def __call__(self, image):
    x = jax.nn.relu(self.first(image.reshape(len(image), -1)))
    x = self.second(x)
    if hasattr(self, 'norm'):
      x = self.norm(x)
    return self.head(jax.nn.relu(x))


class World(NamedTuple):
  """A start, runs from it, and what scores them."""

  model: modeling.Model
  graphdef: Any
  data: dict[str, Any]
  theta_0: Any
  runs: list[Any]
  averages: list[Any]
  eval_fn: Any
  logits_fn: Any

  def train(self, theta, *runs):
    return trained(self.model, self.data, theta, runs)[0]


def trained(model, data, theta, runs):
  kept = {}
  stacked = finetune.train(
      model,
      FINETUNE,
      theta,
      list(runs),
      sources.Arrays(data['train']),
      keep_fn=lambda name, x: kept.update({name: jax.device_get(x)}),
  )
  rows = lambda x: [tree(lambda a, k=k: a[k], x) for k in range(len(runs))]
  return rows(jax.device_get(stacked)), rows(kept['ema_0.9'])


def pretrained(model, data, seed):
  run = dict(learning_rate=2e-3, weight_decay=0.05, seed=seed)
  return jax.device_get(
      finetune.train_one(
          model,
          PRETRAIN,
          model.start_fn(jax.random.key(seed)),
          run,
          sources.Arrays(data['pretrain']),
      )
  )


def world_of(has_norm):
  make_fn = lambda key: Net(has_norm=has_norm, rngs=nnx.Rngs(key))
  model = modeling.of_module(
      make_fn, inputs={'image': (8, 8, 1)}, num_classes=NUM_CLASSES
  )
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_fn(jax.random.key(0))))
  sizes = dict(pretrain=300, train=300, held_out=500)
  data = digits.load(0, sizes)
  theta_0 = pretrained(model, data, seed=0)
  hyper = [dict(learning_rate=r, seed=i) for i, r in enumerate(RATES)]
  runs, averages = trained(model, data, theta_0, hyper)
  batches = evaluation.batched(data['held_out'], 500)
  eval_fn = evaluation.mean_of(
      lambda params, batch: metrics.correct(
          model.logits_fn(params, batch), batch['label']
      ),
      batches,
  )
  logits_fn = evaluation.logits_of(model.logits_fn, batches)
  return World(
      model, graphdef, data, theta_0, runs, averages, eval_fn, logits_fn
  )


@pytest.fixture(scope='module')
def world():
  return world_of(has_norm=False)


@pytest.fixture(scope='module')
def stranger(world):
  """A run from another initialization."""
  theta_0 = pretrained(world.model, world.data, seed=7)
  return world.train(theta_0, dict(learning_rate=2e-3, seed=9))[0]


def codes(found):
  return sorted(f.code for f in found.findings)


def only(found, code):
  assert codes(found) == [code], found.as_text()
  return found.findings[0]


def options(world):
  """All that a diagnosis may be given: nothing, the start, data, both."""
  start = {'theta_0': world.theta_0}
  data = {'eval_fn': world.eval_fn, 'logits_fn': world.logits_fn}
  return [{}, start, data, start | data]


# --- planted faults -----------------------------------------------------------


def test_nothing_is_wrong(world):
  for given in options(world):
    found = diagnosis.diagnose(world.runs, **given)
    assert codes(found) == [], found.as_text()
    assert found.verdict.action == 'soup all'
    assert found.verdict.members == (0, 1, 2, 3, 4)
    assert 'Nothing wrong' in found.as_text()


def test_two_initializations(world, stranger):
  pool = [*world.runs[:2], stranger, *world.runs[2:]]
  for given in options(world):
    found = diagnosis.diagnose(pool, **given)
    finding = only(found, 'initialization')
    assert finding.ingredients == finding.leave_out == (2,)
    assert finding.severity == 'error'
    assert found.verdict[:2] == ('soup a subset', (0, 1, 3, 4, 5))
    if 'eval_fn' in given:
      assert 'falls by up to' in finding.seen
      assert found.measured['barriers'][0, 2] > 0.05


def test_every_run_from_its_own_start(world, stranger):
  theta_0 = pretrained(world.model, world.data, seed=8)
  other = world.train(theta_0, dict(learning_rate=2e-3, seed=3))[0]
  for data in ({}, {'eval_fn': world.eval_fn}):
    found = diagnosis.diagnose([world.runs[0], stranger, other], **data)
    assert only(found, 'initialization').leave_out == (1, 2)
    assert found.verdict.action == 'do not soup'
    assert len(found.verdict.members) == 1


def test_a_start_that_is_none(world, stranger):
  found = diagnosis.diagnose(world.runs, theta_0=stranger)
  only(found, 'start')
  assert found.verdict.action == 'soup all'


@pytest.mark.parametrize('rate', [0.1, 1.0])
def test_a_learning_rate_far_too_high(world, rate):
  wild = world.train(world.theta_0, dict(learning_rate=rate, seed=5))[0]
  pool = [*world.runs, wild]
  for given in options(world):
    found = diagnosis.diagnose(pool, **given)
    finding = only(found, 'far')
    assert finding.leave_out == (5,)
    assert finding.severity == ('error' if 'eval_fn' in given else 'warning')
    assert found.verdict[:2] == ('soup a subset', (0, 1, 2, 3, 4))


def test_a_random_head(world):
  head = world.model.start_fn(jax.random.key(3))['head']
  pool = [*world.runs[:4], {**world.runs[4], 'head': head}]
  for given in options(world):
    found = diagnosis.diagnose(pool, **given)
    finding = only(found, 'part')
    assert finding.leaves == ('head/kernel',)
    assert finding.leave_out == (4,)
    assert found.verdict[:2] == ('soup a subset', (0, 1, 2, 3))
  assert 'all but head can be averaged' in finding.seen


def test_every_run_with_a_head_of_its_own(world):
  pool = [
      {**run, 'head': world.model.start_fn(jax.random.key(10 + k))['head']}
      for k, run in enumerate(world.runs)
  ]
  found = diagnosis.diagnose(pool, theta_0=world.theta_0)
  finding = only(found, 'part')
  assert finding.leaves == ('head/kernel',)
  assert 'every ingredient' in finding.seen
  assert found.verdict.action == 'do not soup'


def test_a_duplicate(world):
  pool = [*world.runs[:3], tree(np.copy, world.runs[1]), world.runs[3]]
  for given in options(world):
    found = diagnosis.diagnose(pool, **given)
    finding = only(found, 'duplicate')
    assert finding.ingredients == (1, 3) and finding.leave_out == (3,)
    assert found.verdict[:2] == ('soup a subset', (0, 1, 2, 4))


def test_not_fine_tuned(world):
  pool = [world.runs[0], world.theta_0, *world.runs[1:]]
  for given in options(world)[1::2]:
    found = diagnosis.diagnose(pool, **given)
    finding = only(found, 'unmoved')
    assert finding.leave_out == (1,)
    assert found.verdict[:2] == ('soup a subset', (0, 2, 3, 4, 5))


def test_hardly_fine_tuned(world):
  run = dict(learning_rate=1e-6, seed=4)
  pool = [*world.runs, world.train(world.theta_0, run)[0]]
  found = diagnosis.diagnose(pool, theta_0=world.theta_0)
  assert only(found, 'unmoved').leave_out == (5,)


def test_not_a_number(world):
  bad = tree(np.copy, world.runs[2])
  bad['second']['kernel'][3, 4] = np.nan
  for given in options(world):
    found = diagnosis.diagnose([*world.runs[:2], bad, world.runs[3]], **given)
    finding = only(found, 'not_finite')
    assert finding.leaves == ('second/kernel',)
    assert finding.leave_out == (2,)
    assert found.verdict[:2] == ('soup a subset', (0, 1, 3))


def permuted(params, rng, names=('first', 'second', 'head')):
  """The same function, its hidden units in another order."""
  params = tree(np.copy, params)
  for name, after in itertools.pairwise(names):
    order = rng.permutation(NUM_UNITS)
    params[name] = tree(lambda x, o=order: x[..., o], params[name])
    params[after]['kernel'] = params[after]['kernel'][order]
  return params


@pytest.mark.parametrize(
    'names', [('first', 'second', 'head'), ('first', 'second')]
)
def test_permuted_units(world, rng, names):
  moved = permuted(world.runs[2], rng, names)
  expected, same = (world.logits_fn(x) for x in (world.runs[2], moved))
  np.testing.assert_allclose(same, expected, atol=1e-4)
  pool = [*world.runs[:2], moved, *world.runs[3:]]
  for given in options(world):
    found = diagnosis.diagnose(pool, **given)
    finding = only(found, 'permuted')
    assert 'first/kernel' in finding.leaves
    assert finding.leave_out == (2,)
    assert found.verdict[:2] == ('soup a subset', (0, 1, 3, 4))


def test_a_moving_average_among_runs(world):
  pool = [*world.runs, world.averages[3]]
  for given in options(world):
    found = diagnosis.diagnose(pool, **given)
    finding = only(found, 'copies')
    assert finding.ingredients == (3, 5)
    assert found.verdict.action == 'soup all'


def test_moving_averages_that_say_so(world, tmp_path):
  pool = [*world.runs[:3], *world.averages[3:]]
  paths = [tmp_path / f'{k}' for k in range(len(pool))]
  for k, params in enumerate(pool):
    metadata: dict[str, Any] = {'config': {'learning_rate': RATES[k]}}
    if k > 2:
      metadata['copy'] = 'ema_0.9'
    checkpoints.save(paths[k], params, metadata=metadata)
  found = diagnosis.diagnose(checkpoints.Ingredients(paths))
  finding = only(found, 'copies')
  assert finding.ingredients == (3, 4) and 'ema_0.9' in finding.seen
  # All of one kind are no mixture.
  found = diagnosis.diagnose(checkpoints.Ingredients(paths[3:]))
  assert codes(found) == []


def test_only_moving_averages(world):
  for given in options(world):
    assert codes(diagnosis.diagnose(world.averages, **given)) == []


@pytest.mark.parametrize('is_cast_back', [False, True])
def test_bfloat16(world, is_cast_back):
  """Runs that moved less than bfloat16 can hold."""
  hyper = [dict(learning_rate=2e-5, seed=i) for i in range(4)]
  narrow = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16))
  pool = [tree(narrow, x) for x in world.train(world.theta_0, *hyper)]
  if is_cast_back:
    pool = tree(np.float32, pool)
  for given in [{}, {'theta_0': world.theta_0}, {'eval_fn': world.eval_fn}]:
    found = diagnosis.diagnose(pool, **given)
    finding = only(found, 'rounding')
    assert 'bfloat16' in finding.title
    assert found.verdict.action == 'soup all'
  # In float32 nothing is wrong, and in bfloat16 of runs that moved neither.
  assert codes(diagnosis.diagnose(world.train(world.theta_0, *hyper))) == []
  moved = [tree(narrow, x) for x in world.runs]
  assert codes(diagnosis.diagnose(moved, theta_0=world.theta_0)) == []


def test_batch_norm():
  world = world_of(has_norm=True)
  images = [world.data['train']['image']]
  recalibrate_fn = lambda params: batch_norm.recalibrated(
      world.graphdef, params, images
  )
  given = {'eval_fn': world.eval_fn, 'recalibrate_fn': recalibrate_fn}
  for options in ({}, {'theta_0': world.theta_0}, given):
    found = diagnosis.diagnose(world.runs, **options)
    finding = only(found, 'batch_norm')
    assert finding.leaves == ('norm/mean', 'norm/var')
    assert found.verdict.action == 'soup all'
  scores = found.measured['batch_norm']
  assert list(scores) == ['first', 'averaged', 're-estimated']
  mean = tree(lambda *x: np.mean(x, axis=0), *world.runs)
  assert scores['averaged'] == pytest.approx(world.eval_fn(mean), abs=0.003)
  first = {**mean, 'norm': {**mean['norm']}}
  for name in ('mean', 'var'):
    first['norm'][name] = world.runs[0]['norm'][name]
  assert scores['first'] == pytest.approx(world.eval_fn(first), abs=0.003)
  assert found.measured['soup'] == scores['re-estimated']


def test_batch_norm_whose_statistics_break_the_soup():
  """Statistics that are far off in the average alone."""
  rng = np.random.default_rng(0)
  start = rng.normal(size=(40, 40))
  runs = [
      {
          'w': start + 0.1 * rng.normal(size=(40, 40)),
          'norm': {'mean': np.full(40, 9.0 * k), 'var': np.ones(40)},
      }
      for k in range(3)
  ]
  eval_fn = lambda params: 0.9 if params['norm']['mean'][0] < 1 else 0.2
  reset_fn = lambda params: {
      **params, 'norm': tree(np.zeros_like, params['norm'])
  }  # fmt: skip
  found = diagnosis.diagnose(
      runs, eval_fn=eval_fn, recalibrate_fn=reset_fn, tolerance=0.5
  )
  finding = only(found, 'batch_norm')
  assert finding.severity == 'warning'
  assert found.measured['batch_norm'] == {
      'first': 0.9, 'averaged': 0.2, 're-estimated': 0.9
  }  # fmt: skip
  # Without an estimate the verdict sees the broken soup.
  found = diagnosis.diagnose(runs, eval_fn=eval_fn)
  assert found.verdict.action == 'do not soup'
