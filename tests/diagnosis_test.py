"""Diagnosis: planted faults are reported, and nothing else.

Small networks, trained on real images; each fault is planted in one pool.
"""

from collections.abc import Sequence
import itertools
import json
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
from jaxsoup import statistics
from jaxsoup.data import digits
from jaxsoup.data import sources
from jaxsoup.models import batch_norm
from jaxsoup.train import loop
from jaxsoup.train import modeling

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
  stacked = loop.train(
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
      loop.train_one(
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
def unrelated(world):
  """A run from another initialization."""
  theta_0 = pretrained(world.model, world.data, seed=7)
  return world.train(theta_0, dict(learning_rate=2e-3, seed=9))[0]


def codes(report):
  """All but that the best model is ahead, which is no fault."""
  return sorted(f.code for f in report.findings if f.code != 'uneven')


def only(report, code):
  assert codes(report) == [code], report.as_text()
  return report.findings[0]


def options(world):
  """All that a diagnosis may be given: nothing, the start, data, both."""
  start = {'theta_0': world.theta_0}
  data = {'eval_fn': world.eval_fn, 'logits_fn': world.logits_fn}
  return [{}, start, data, start | data]


# --- planted faults -----------------------------------------------------------


def test_nothing_is_wrong(world):
  for given in options(world):
    report = diagnosis.diagnose(world.runs, **given)
    assert codes(report) == [], report.as_text()
    assert report.verdict.action in ('soup all', 'cannot tell')
    assert report.verdict.members == (0, 1, 2, 3, 4)
    assert 'No problems' in report.as_text()


@pytest.mark.slow
def test_two_initializations(world, unrelated):
  pool = [*world.runs[:2], unrelated, *world.runs[2:]]
  for given in options(world):
    report = diagnosis.diagnose(pool, **given)
    finding = only(report, 'initialization')
    assert finding.ingredients == finding.leave_out == (2,)
    assert finding.severity == 'error'
    assert report.verdict.members == (0, 1, 3, 4, 5)
    if 'eval_fn' in given:
      assert 'below the mean of the two' in finding.seen
      assert np.nanmax(report.measured['barriers'][2]) > 0.05


def test_every_run_from_its_own_start(world, unrelated):
  theta_0 = pretrained(world.model, world.data, seed=8)
  other = world.train(theta_0, dict(learning_rate=2e-3, seed=3))[0]
  for data in ({}, {'eval_fn': world.eval_fn}):
    report = diagnosis.diagnose([world.runs[0], unrelated, other], **data)
    assert only(report, 'initialization').leave_out == (1, 2)
    assert report.verdict.action == 'do not soup'
    assert len(report.verdict.members) == 1


def test_a_start_that_is_none(world, unrelated):
  report = diagnosis.diagnose(world.runs, theta_0=unrelated)
  only(report, 'start')
  assert report.verdict.action in ('soup all', 'cannot tell')


@pytest.mark.parametrize('rate', [0.1, 1.0])
def test_a_learning_rate_far_too_high(world, rate):
  wild = world.train(world.theta_0, dict(learning_rate=rate, seed=5))[0]
  pool = [*world.runs, wild]
  for given in options(world):
    report = diagnosis.diagnose(pool, **given)
    finding = only(report, 'far')
    assert finding.leave_out == (5,)
    assert finding.severity == ('error' if 'eval_fn' in given else 'warning')
    assert report.verdict.members == (0, 1, 2, 3, 4)


def test_a_random_head(world):
  head = world.model.start_fn(jax.random.key(3))['head']
  pool = [*world.runs[:4], {**world.runs[4], 'head': head}]
  for given in options(world):
    report = diagnosis.diagnose(pool, **given)
    finding = only(report, 'part')
    assert finding.leaves == ('head/kernel',)
    assert finding.leave_out == (4,)
    assert report.verdict.members == (0, 1, 2, 3)


def test_every_run_with_a_head_of_its_own(world):
  pool = [
      {**run, 'head': world.model.start_fn(jax.random.key(10 + k))['head']}
      for k, run in enumerate(world.runs)
  ]
  report = diagnosis.diagnose(pool, theta_0=world.theta_0)
  finding = only(report, 'part')
  assert finding.leaves == ('head/kernel',)
  assert 'every ingredient' in finding.seen
  assert report.verdict.action == 'do not soup'


def test_heads_of_their_own_that_learned_the_task_of_theta_0(world):
  """Trained, each is a little like that of theta_0, and not like another."""
  start = world.theta_0['head']['kernel']
  rng = np.random.default_rng(0)

  def learned(run):
    noise = rng.normal(size=start.shape)
    kernel = 0.15 * start + 0.6 * np.std(start) * noise
    head = {**run['head'], 'kernel': kernel.astype(np.float32)}
    return {**run, 'head': head}

  pool = [learned(run) for run in world.runs]
  report = diagnosis.diagnose(pool, theta_0=world.theta_0)
  assert only(report, 'part').leaves == ('head/kernel',)
  assert report.verdict.action == 'do not soup'
  # A head that began there, and went far, still contains where it began.
  far = [
      {**run, 'head': {**run['head'], 'kernel': run['head']['kernel'] + 4 * d}}
      for run, d in zip(world.runs, _orthogonal(start, len(world.runs)))
  ]
  report = diagnosis.diagnose(far, theta_0=world.theta_0)
  assert not [x for x in report.findings if x.code == 'part']


def _orthogonal(start, num):
  """Directions at right angles to an array and to each other, as long as it."""
  rng = np.random.default_rng(1)
  columns = np.stack([start.ravel(), *rng.normal(size=(num, start.size))], 1)
  basis = np.linalg.qr(columns)[0].T[1:] * np.linalg.norm(start)
  return basis.reshape(num, *start.shape).astype(np.float32)


def test_a_duplicate(world):
  pool = [*world.runs[:3], tree(np.copy, world.runs[1]), world.runs[3]]
  for given in options(world):
    report = diagnosis.diagnose(pool, **given)
    finding = only(report, 'duplicate')
    assert finding.ingredients == (1, 3) and finding.leave_out == (3,)
    assert report.verdict.members == (0, 1, 2, 4)


def test_not_fine_tuned(world):
  pool = [world.runs[0], world.theta_0, *world.runs[1:]]
  for given in options(world)[1::2]:
    report = diagnosis.diagnose(pool, **given)
    finding = only(report, 'unmoved')
    assert finding.leave_out == (1,)
    assert report.verdict.members == (0, 2, 3, 4, 5)


def test_hardly_fine_tuned(world):
  run = dict(learning_rate=1e-6, seed=4)
  pool = [*world.runs, world.train(world.theta_0, run)[0]]
  report = diagnosis.diagnose(pool, theta_0=world.theta_0)
  assert only(report, 'unmoved').leave_out == (5,)


def test_not_a_number(world):
  bad = tree(np.copy, world.runs[2])
  bad['second']['kernel'][3, 4] = np.nan
  for given in options(world):
    report = diagnosis.diagnose([*world.runs[:2], bad, world.runs[3]], **given)
    finding = only(report, 'not_finite')
    assert finding.leaves == ('second/kernel',)
    assert finding.leave_out == (2,)
    assert report.verdict.members == (0, 1, 3)


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
    report = diagnosis.diagnose(pool, **given)
    finding = only(report, 'permuted')
    assert 'first/kernel' in finding.leaves
    assert finding.leave_out == (2,)
    assert report.verdict.members == (0, 1, 3, 4)


def test_a_moving_average_among_runs(world):
  pool = [*world.runs, world.averages[3]]
  for given in options(world)[1::2]:
    report = diagnosis.diagnose(pool, **given)
    finding = only(report, 'copies')
    assert finding.ingredients == (3, 5)
    assert report.verdict.members == (0, 1, 2, 3, 4)
  report = diagnosis.diagnose(pool)
  assert codes(report) == [] and 'copies of one run' in report.untested[0]


def test_moving_averages_that_say_so(world, tmp_path):
  pool = [*world.runs[:3], *world.averages[3:]]
  paths = [tmp_path / f'{k}' for k in range(len(pool))]
  for k, params in enumerate(pool):
    metadata: dict[str, Any] = {'config': {'learning_rate': RATES[k]}}
    if k > 2:
      metadata['copy'] = 'ema_0.9'
    checkpoints.save(paths[k], params, metadata=metadata)
  report = diagnosis.diagnose(checkpoints.Ingredients(paths))
  finding = only(report, 'copies')
  assert finding.ingredients == (3, 4) and 'ema_0.9' in finding.seen
  # All of one kind are no mixture.
  report = diagnosis.diagnose(checkpoints.Ingredients(paths[3:]))
  assert codes(report) == []


def test_only_moving_averages(world):
  for given in options(world):
    assert codes(diagnosis.diagnose(world.averages, **given)) == []


@pytest.mark.slow
@pytest.mark.parametrize('is_cast_back', [False, True])
def test_bfloat16(world, is_cast_back):
  """Runs that moved less than bfloat16 can hold."""
  hyper = [dict(learning_rate=2e-5, seed=i) for i in range(4)]
  narrow = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16))
  pool = [tree(narrow, x) for x in world.train(world.theta_0, *hyper)]
  if is_cast_back:
    pool = tree(np.float32, pool)
  for given in [{}, {'theta_0': world.theta_0}, {'eval_fn': world.eval_fn}]:
    report = diagnosis.diagnose(pool, **given)
    finding = only(report, 'rounding')
    assert 'bfloat16' in finding.seen
    assert report.verdict.action in ('soup all', 'cannot tell')
  # In float32 nothing is wrong, and in bfloat16 of runs that moved neither.
  assert codes(diagnosis.diagnose(world.train(world.theta_0, *hyper))) == []
  moved = [tree(narrow, x) for x in world.runs]
  assert codes(diagnosis.diagnose(moved, theta_0=world.theta_0)) == []


@pytest.mark.slow
def test_batch_norm():
  world = world_of(has_norm=True)
  images = [world.data['train']['image']]
  recalibrate_fn = lambda params: batch_norm.recalibrated(
      world.graphdef, params, images
  )
  given = {'eval_fn': world.eval_fn, 'recalibrate_fn': recalibrate_fn}
  report = diagnosis.diagnose(world.runs, theta_0=world.theta_0)
  assert codes(report) == []
  assert 'new statistics of BatchNorm' in report.untested[-1]
  report = diagnosis.diagnose(world.runs, **given)
  assert codes(report) == [] and 'recalibrated' in report.verdict.command
  mean = tree(lambda *x: np.mean(x, axis=0), *world.runs)
  new = world.eval_fn(recalibrate_fn(mean))
  assert report.measured['soup'] == pytest.approx(new, abs=0.003)
  change = new - world.eval_fn(mean)
  assert report.measured['statistics'][0] == pytest.approx(change, abs=0.003)


def test_batch_norm_whose_statistics_break_the_soup():
  """Statistics that are far off in the average alone."""
  rng = np.random.default_rng(0)
  start = rng.normal(size=(40, 40))
  runs = [
      {
          'w': start + 0.1 * rng.normal(size=(40, 40)),
          'norm': {'mean': np.full(40, k), 'var': np.ones(40)},
      }
      for k in (0.0, 1.0, 3.0)
  ]
  own = [run['norm']['mean'][0] for run in runs]
  eval_fn = lambda params: 0.9 if params['norm']['mean'][0] in own else 0.2
  reset_fn = lambda params: {
      **params, 'norm': tree(np.zeros_like, params['norm'])
  }  # fmt: skip
  report = diagnosis.diagnose(
      runs, eval_fn=eval_fn, recalibrate_fn=reset_fn, num_examples=1000
  )
  only(report, 'batch_norm')
  assert report.measured['statistics'][0] == pytest.approx(0.7)
  assert 'recalibrated' in report.verdict.command
  # Without an estimate the averages are broken.
  report = diagnosis.diagnose(runs, eval_fn=eval_fn, num_examples=1000)
  assert 'batch_norm' in codes(report)
  assert report.verdict[:2] == ('do not soup', (0,))


# --- the same function in other coordinates, and other mistakes ---------------


def transposed(params):
  second = params['second']
  return params | {'second': second | {'kernel': second['kernel'].T}}


def rescaled(params):
  scale = np.linspace(0.2, 5, NUM_UNITS, dtype=np.float32)
  first = {name: x * scale for name, x in params['first'].items()}
  kernel = params['second']['kernel'] / scale[:, None]
  return params | {
      'first': first,
      'second': params['second'] | {'kernel': kernel},
  }


def moments(params):
  return tree(lambda x: 1e-3 * np.square(x), params)


def other_labels(params):
  return params | {'head': tree(lambda x: np.roll(x, 3, -1), params['head'])}


@pytest.mark.parametrize(
    'change_fn, code',
    [
        (transposed, 'transposed'),
        (rescaled, 'rescaled'),
        (moments, 'moments'),
        (other_labels, 'labels'),
    ],
)
def test_a_changed_member(world, change_fn, code):
  pool = [*world.runs[:2], change_fn(world.runs[2]), *world.runs[3:]]
  for given in options(world):
    report = diagnosis.diagnose(pool, **given)
    assert only(report, code).leave_out == (2,)
    assert report.verdict.members == (0, 1, 3, 4)


def related(rng, num=4, shapes=(), spread=0.1):
  """Models of some matrices from one start."""
  start = {name: rng.normal(size=shape) for name, shape in shapes}
  near = lambda x: x + spread * rng.normal(size=x.shape)
  return [tree(near, start) for _ in range(num)]


def test_layers_in_each_others_place(rng):
  pool = related(rng, shapes=[(x, (30, 30)) for x in 'abc'])
  pool[1] = {'a': pool[1]['b'], 'b': pool[1]['a'], 'c': pool[1]['c']}
  finding = only(diagnosis.diagnose(pool), 'swapped')
  assert finding.leaves == ('a', 'b') and finding.leave_out == (1,)


def test_rotated_queries_and_keys(rng):
  pool = related(rng, shapes=[(x, (40, 2, 8)) for x in 'kqv'])
  turn = np.linalg.qr(rng.normal(size=(8, 8)))[0]
  pool[3] |= {x: pool[3][x] @ turn for x in 'kq'}
  finding = only(diagnosis.diagnose(pool), 'rotated')
  assert set(finding.leaves) == {'k', 'q'} and finding.leave_out == (3,)


def test_a_soup_among_its_ingredients(rng):
  pool = related(rng, shapes=[('w', (30, 30))])
  pool.append(
      {'w': 0.5 * pool[0]['w'] + 0.3 * pool[1]['w'] + 0.2 * pool[2]['w']}
  )
  finding = only(diagnosis.diagnose(pool), 'soup_of_others')
  assert finding.leave_out == (4,) and '0.50, 0.30, 0.20' in finding.seen


def test_a_tied_copy_that_drifted(rng):
  pool = [
      {'table': x['w'], 'head': x['w'].T, 'v': x['v']}
      for x in related(rng, shapes=[('w', (30, 20)), ('v', (30, 30))])
  ]
  pool[2]['head'] = pool[2]['head'] + 0.01 * rng.normal(size=(20, 30))
  assert only(diagnosis.diagnose(pool), 'untied').leave_out == (2,)


def test_two_seeds_at_a_low_rate_are_no_copies(world):
  hyper = [dict(learning_rate=2e-4, seed=20 + i) for i in range(2)]
  pool = [*world.runs[:4], *world.train(world.theta_0, *hyper)]
  for given in options(world):
    assert 'copies' not in codes(diagnosis.diagnose(pool, **given))


def test_another_order_of_labels_in_the_predictions(rng):
  """Weights that say nothing: only what is predicted does."""
  pool = in_bowls([0, 0.1, 0.2, 4], rng)
  label = rng.integers(0, 5, 400)
  is_odd = lambda x: float(np.asarray(x['head']['w'])[0, 0]) > 3
  logits_fn = lambda x: np.eye(5)[(label + 2 * is_odd(x)) % 5]
  report = diagnosis.diagnose(
      pool, eval_fn=bowls, num_examples=400, logits_fn=logits_fn
  )
  finding = only(report, 'labels')
  assert finding.leave_out == (3,)
  assert 'on 0 % of the examples, and on 100 %' in finding.seen


def test_a_start_in_another_nesting(world):
  other = {'model': {f'leaf_{p[0]}_{p[-1]}': x for p, x in _by_path(world)}}
  pool = [world.runs[0], world.theta_0, *world.runs[1:]]
  report = diagnosis.diagnose(pool, theta_0=other)
  assert only(report, 'unmoved').leave_out == (1,)


def _by_path(world):
  return [
      ((layer, name), x)
      for layer, leaves in world.theta_0.items()
      for name, x in leaves.items()
  ]


def test_files_next_to_the_weights(world, tmp_path):
  paths = [tmp_path / f'run{k}' for k in range(3)]
  for k, (path, params) in enumerate(zip(paths, world.runs)):
    checkpoints.save(path, params)
    content = {'image_mean': [0.5 if k == 2 else 0.45]}
    file = path / 'preprocessor_config.json'
    file.write_text(json.dumps(content))
  report = diagnosis.diagnose(checkpoints.Ingredients(paths))
  finding = only(report, 'preprocessing')
  assert finding.leave_out == (2,) and 'image_mean' in finding.seen
  command = f'jaxsoup soup uniform {paths[0]} {paths[1]} --out soup'
  assert report.verdict.command == command


def test_no_more_evaluations_than_said(world, unrelated, rng):
  noise = world.train(world.theta_0, dict(learning_rate=1.0, seed=5))
  for pool in (world.runs, [*world.runs, unrelated, *noise]):
    calls = []
    eval_fn = lambda x, calls=calls: calls.append(1) or world.eval_fn(x)
    report = diagnosis.diagnose(pool, eval_fn=eval_fn)
    assert len(calls) == report.measured['num_evaluations']
    assert len(calls) <= 2 * len(pool) + 4


def test_intervals_are_of_the_same_examples(world):
  report = diagnosis.diagnose(world.runs, eval_fn=world.eval_fn)
  soup = tree(lambda *x: np.mean(x, axis=0), *world.runs)
  best = world.runs[int(np.argmax(report.measured['scores']))]
  batch = evaluation.batched(world.data['held_out'], 500)[0]
  right = [
      np.asarray(
          metrics.correct(world.model.logits_fn(x, batch), batch['label'])
      )
      for x in (soup, best)
  ]
  expected = statistics.mcnemar(*right)
  np.testing.assert_allclose(report.measured['gain'], expected[:3], atol=1e-6)


def test_units_are_put_back(world, rng):
  moved = permuted(world.runs[2], rng)
  back = diagnosis.aligned(moved, like=world.runs[0])
  tree(np.testing.assert_array_equal, back, world.runs[2])
  with pytest.raises(ValueError, match='other names or shapes'):
    diagnosis.aligned(moved, like={'first': world.runs[0]['first']})


def test_statistics_next_to_the_parameters_are_kept(rng, tmp_path):
  paths = [tmp_path / f'{k}' for k in range(3)]
  for path, params in zip(paths, related(rng, shapes=[('w', (30, 30))])):
    stats = {'norm': {'mean': np.ones(4), 'var': np.ones(4)}}
    variables = {'params': params, 'batch_stats': stats}
    checkpoints.save(path, tree(np.float32, variables))
  seen = []
  report = diagnosis.diagnose(
      checkpoints.Ingredients(paths),
      eval_fn=lambda x: seen.append(set(x)) or 0.5,
  )
  assert seen and all(x == {'params', 'batch_stats'} for x in seen)
  assert 'mutable=["batch_stats"]' in report.verdict.command
  assert 'training examples' in report.untested[-1]


# --- what only data show ------------------------------------------------------


def bowls(params):
  """A score with a bowl around 0 and another around 10, along one weight."""
  x = float(np.asarray(params['head']['w'])[0, 0])
  return 0.9 - 0.1 * min(abs(x), abs(x - 10), 5)


def in_bowls(places, rng, size=60):
  """Relatives that differ in one weight, which is all that the score sees."""
  start = rng.normal(size=(size, size))
  runs = []
  for place in places:
    head = start.copy() + 0.1 * rng.normal(size=(size, size))
    head[0, 0] = place
    body = start + 0.1 * rng.normal(size=(size, size))
    runs.append({'body': {'w': body}, 'head': {'w': head}})
  return runs


def test_data_overrule_the_length_of_a_task_vector(rng):
  """A run that moved far, without a barrier, is one of the soup."""
  start = rng.normal(size=(60, 60))
  scales = [0.1, 0.1, 0.1, 0.1, 1.0]
  pool = [{'w': start + x * rng.normal(size=start.shape)} for x in scales]
  report = diagnosis.diagnose(pool, theta_0={'w': start})
  assert only(report, 'far').leave_out == (4,)
  assert report.verdict.members == (0, 1, 2, 3)
  report = diagnosis.diagnose(
      pool,
      theta_0={'w': start},
      eval_fn=lambda params: 0.8 + 0.01 * (params['w'] is pool[4]['w']),
      num_examples=1000,
  )
  assert codes(report) == [] and report.verdict.members == (0, 1, 2, 3, 4)


def test_a_barrier_that_only_data_show(rng):
  pool = in_bowls([0, 0.1, 10, 0.2, 9.9], rng)
  assert codes(diagnosis.diagnose(pool)) == []
  report = diagnosis.diagnose(
      pool, eval_fn=bowls, num_examples=1000, is_thorough=True
  )
  finding = only(report, 'barrier')
  assert finding.leave_out == (2, 4) and finding.cost == pytest.approx(0.5)
  assert 'In 2 of 4 pairs' in finding.seen
  assert report.verdict.members == (0, 1, 3)
  # x = 5 half-way between 0 and 10: 0.9 - 0.5.
  barriers = report.measured['barriers']
  assert barriers[0, 2] == barriers[2, 0] == pytest.approx(0.5)
  assert barriers[0, 1] == pytest.approx(0, abs=1e-6)
  assert np.isnan(np.diag(barriers)).all()
  assert report.measured['soup'] == pytest.approx(0.9 - 0.01)


def test_few_examples_tell_nothing(rng):
  """The same drop with 20 examples, and with 2,000."""
  pool = in_bowls([0, 0.1, 0.3], rng)
  at = lambda params: float(np.asarray(params['head']['w'])[0, 0])
  eval_fn = lambda x: 0.9 if np.isclose(at(x), (0, 0.1, 0.3)).any() else 0.85
  few, many = (
      diagnosis.diagnose(pool, eval_fn=eval_fn, num_examples=num)
      for num in (20, 2000)
  )
  assert few.verdict.action == 'cannot tell' and not codes(few)
  low, high = few.measured['gain'][1:]
  assert low < 0 < high
  assert many.verdict[:2] == ('do not soup', (0,))
  assert 'unlike these examples' not in many.verdict.reason  # Below its models.
  score_of = lambda x: {0: 0.9, 0.1: 0.6, 0.3: 0.6}.get(round(x, 6), 0.8)
  above = diagnosis.diagnose(
      pool, eval_fn=lambda x: score_of(at(x)), num_examples=2000
  )
  assert above.verdict[:2] == ('do not soup', (0,))
  assert 'unlike these examples' in above.verdict.reason


def test_nothing_to_score():
  pool = [{'w': np.full((3, 3), np.nan, 'f')}] * 2
  report = diagnosis.diagnose(pool, eval_fn=lambda params: 0.5)
  assert report.verdict[:2] == ('do not soup', ())
  assert 'NaN' in only(report, 'not_finite').seen


def test_no_pair_without_a_barrier(rng):
  report = diagnosis.diagnose(
      in_bowls([0, 10], rng), eval_fn=bowls, num_examples=1000
  )
  assert only(report, 'barrier').severity == 'error'
  assert report.verdict[:2] == ('do not soup', (0,))
  assert report.verdict.command == 'params = ingredients[0]'


def test_a_barrier_of_the_mean_alone(rng):
  """Pairs are fine, and the average of all is not."""
  pool = in_bowls([1, 2, 6], rng)
  good = (1, 2, 6, 1.5, 3.5, 4)
  at = lambda params: float(np.asarray(params['head']['w'])[0, 0])
  eval_fn = lambda params: 0.9 if np.isclose(at(params), good).any() else 0.5
  report = diagnosis.diagnose(pool, eval_fn=eval_fn, num_examples=1000)
  assert 'none has a barrier' in only(report, 'barrier').seen
  assert report.verdict[:2] == ('do not soup', (0,))


def test_learning_rates_of_barriers(rng, tmp_path):
  pool = in_bowls([0, 0.1, 10, 0.2, 9.9], rng)
  for k, (params, rate) in enumerate(zip(pool, [1, 2, 8, 3, 9])):
    metadata = {'config': {'learning_rate': rate * 1e-3}}
    path = tmp_path / f'{k}'
    checkpoints.save(path, tree(np.float32, params), metadata=metadata)
  ingredients = checkpoints.Ingredients([tmp_path / f'{k}' for k in range(5)])
  report = diagnosis.diagnose(ingredients, eval_fn=bowls, num_examples=10**6)
  finding = only(report, 'barrier')
  assert 'Learning rate: 0.008 to 0.009; of the others: 0.001 to 0.003' in (
      finding.seen
  )


def test_one_that_is_much_worse(rng):
  pool = in_bowls([0, 0.1, 0.2, 0.1, 3], rng)
  report = diagnosis.diagnose(pool, eval_fn=bowls, num_examples=1000)
  finding = only(report, 'weak')
  assert finding.leave_out == (4,)
  assert report.verdict.members == (0, 1, 2, 3)


def test_disagreement(world, rng):
  report = diagnosis.diagnose(
      world.runs,
      eval_fn=world.eval_fn,
      logits_fn=world.logits_fn,
      is_thorough=True,
  )
  classes = [world.logits_fn(run).argmax(-1) for run in world.runs]
  expected = [[(x != y).mean() for y in classes] for x in classes]
  np.testing.assert_allclose(report.measured['disagreement'], expected)
  pool = in_bowls([0, 0.1, 0.2], rng)
  report = diagnosis.diagnose(
      pool,
      eval_fn=bowls,
      logits_fn=lambda params: np.eye(3),
      is_thorough=True,
  )
  assert only(report, 'alike').severity == 'note'
  assert report.verdict.action in ('soup all', 'cannot tell')


def test_many_are_compared_along_a_spanning_subset(rng):
  pool = in_bowls([*np.linspace(0, 0.1, 14), 10, 10.1], rng, size=40)
  report = diagnosis.diagnose(
      pool, eval_fn=bowls, num_examples=10**6, is_thorough=True
  )
  assert only(report, 'unknown').leave_out == (14, 15)
  assert np.isfinite(report.measured['barriers']).sum() == 2 * (2 * 16 - 3)


# --- what does not fit --------------------------------------------------------


def test_another_head_size(world):
  other = tree(np.copy, world.runs[2])
  other['head'] = {'kernel': np.ones((96, 7)), 'bias': np.ones(7)}
  pool = [*world.runs[:2], other, world.runs[3]]
  report = diagnosis.diagnose(pool, eval_fn=world.eval_fn)
  finding = only(report, 'structure')
  assert 'head' in finding.seen and 'subtrees' in finding.remedy
  assert report.verdict.members == (0, 1, 3)


def test_another_dtype(world):
  pool = [*world.runs[:3], tree(np.float16, world.runs[3])]
  report = diagnosis.diagnose(pool, eval_fn=world.eval_fn)
  finding = only(report, 'dtype')
  assert 'float16' in finding.seen and 'float32' in finding.seen
  assert report.verdict.members == (0, 1, 2)


def test_integers_that_differ(world):
  codes_of = lambda k: np.int8([k == 2] * 8)
  pool = [{**run, 'codes': codes_of(k)} for k, run in enumerate(world.runs)]
  report = diagnosis.diagnose(pool)
  finding = only(report, 'integers')
  assert (finding.leaves, finding.ingredients) == (('codes',), (2,))


def test_state_and_frozen_leaves(world, rng):
  fixed = rng.normal(size=(30, 4)).astype(np.float32)
  pool = [
      {**run, 'step': np.int32(k), 'fixed': fixed}
      for k, run in enumerate(world.runs)
  ]
  report = diagnosis.diagnose(pool)
  assert codes(report) == ['frozen']
  assert report.findings[0].leaves == ('fixed',)
  assert report.verdict.action in ('soup all', 'cannot tell')
  # Without the start a common step of all looks frozen; with it, it is none.
  theta_0 = {**world.theta_0, 'fixed': fixed * 1.001}
  assert not codes(diagnosis.diagnose(pool, theta_0=theta_0))


def test_some_that_trained_only_the_head(world):
  pool = [
      {**world.theta_0, 'head': run['head']} for run in world.runs[:2]
  ] + world.runs[2:]
  for given in options(world):
    report = diagnosis.diagnose(pool, **given)
    finding = only(report, 'partly_frozen')
    assert finding.ingredients == (0, 1)
    assert set(finding.leaves) == {
        'first/kernel', 'first/bias', 'second/kernel', 'second/bias'
    }  # fmt: skip


@pytest.mark.parametrize('names', [None, ['a', 'b']])
def test_wrong_arguments(world, names):
  with pytest.raises(ValueError, match='2 names and 1 ingr|There is 1'):
    diagnosis.diagnose(world.runs[:1], names=names)
  with pytest.raises(TypeError, match='must be a sequence'):
    diagnosis.diagnose({'w': 1})
  with pytest.raises(TypeError, match="Leaf 'w' is a str"):
    diagnosis.diagnose([{'w': 'x'}, {'w': 'y'}])


# --- checkpoints, memory ------------------------------------------------------


class Lazy(Sequence):
  """A sequence that counts what is read."""

  def __init__(self, models):
    self.models = models
    self.num_reads = 0

  def __len__(self):
    return len(self.models)

  def __getitem__(self, k):
    self.num_reads += 1
    return tree(np.copy, self.models[k])


def test_containers_agree(world, unrelated, tmp_path):
  pool = [*world.runs, unrelated]
  expected = diagnosis.diagnose(pool, theta_0=world.theta_0)
  paths = [tmp_path / f'run{k}' for k in range(6)]
  for path, params in zip(paths, pool):
    checkpoints.save(path, params)
  for container in (Lazy(pool), checkpoints.Ingredients(paths)):
    report = diagnosis.diagnose(container, theta_0=world.theta_0)
    for name, value in expected.measured.items():
      np.testing.assert_allclose(report.measured[name], value, rtol=1e-6)
    assert codes(report) == codes(expected)
    assert report.verdict[:3] == expected.verdict[:3]
  assert report.names == tuple(f'run{k}' for k in range(6))


def test_lengths_distances_and_cosines(world):
  measured = diagnosis.diagnose(world.runs, theta_0=world.theta_0).measured
  flat = lambda x: np.concatenate(
      [np.ravel(a).astype(np.float64) for a in jax.tree.leaves(x)]
  )
  runs, start = np.stack([flat(x) for x in world.runs]), flat(world.theta_0)
  tasks = runs - start
  norms = np.linalg.norm(tasks, axis=1)
  np.testing.assert_allclose(measured['norms'], norms, rtol=1e-5)
  np.testing.assert_allclose(
      measured['distances'], np.linalg.norm(runs[:, None] - runs, axis=-1),
      atol=1e-6,
  )  # fmt: skip
  np.testing.assert_allclose(
      measured['cosines'],
      tasks @ tasks.T / norms / norms[:, None],
      rtol=1e-5,
  )


def test_a_damaged_file(world, tmp_path):
  paths = [tmp_path / f'run{k}.safetensors' for k in range(4)]
  for path, params in zip(paths, world.runs):
    arrays = {
        f'{layer}.{name}': x
        for layer, leaves in params.items()
        for name, x in leaves.items()
    }
    checkpoints.save_arrays(path, arrays, arrays.items())
  assert codes(diagnosis.diagnose(checkpoints.Ingredients(paths))) == []
  content = bytearray(paths[1].read_bytes())
  content[-1000] ^= 64
  paths[1].write_bytes(bytes(content))
  report = diagnosis.diagnose(checkpoints.Ingredients(paths))
  finding = only(report, 'damaged')
  assert finding.leave_out == (1,) and 'checksum' in finding.seen


def test_json_has_no_nan(world):
  report = diagnosis.diagnose(
      [*world.runs, tree(lambda x: x * np.nan, world.runs[0])],
      eval_fn=world.eval_fn,
  )
  text = json.dumps(report.as_json(), allow_nan=False)
  loaded = json.loads(text)
  assert loaded['verdict']['action'] == 'soup a subset'
  assert loaded['findings'][0]['names'] == ['ingredient 5']
  assert loaded['measured']['scores'][5] is None


def test_imaginary_parts_are_parts_of_the_weights(rng):
  real = rng.normal(size=(16, 8))
  imaginary = lambda: 0.1 * rng.normal(size=(16, 8))
  models = [
      {'w': (real + 1j * imaginary()).astype(np.complex64)} for _ in range(3)
  ]
  report = diagnosis.diagnose(models)
  assert not [f for f in report.findings if f.code == 'duplicate']
  expected = [[np.linalg.norm(x['w'] - y['w']) for y in models] for x in models]
  np.testing.assert_allclose(report.measured['distances'], expected, atol=1e-5)
  again = diagnosis.diagnose([*models, models[0]])
  assert [f.ingredients for f in again.findings if f.code == 'duplicate'] == [
      (0, 3)
  ]


def test_permuted_complex_units(rng):
  z = rng.normal(size=(64, 64)) + 1j * rng.normal(size=(64, 64))
  noise = lambda: 0.01 * rng.normal(size=(64, 64))
  models = [{'w': (z + noise()).astype(np.complex64)} for _ in range(3)]
  models[2] = {'w': models[2]['w'][rng.permutation(64)]}
  codes = {f.code: f.ingredients for f in diagnosis.diagnose(models).findings}
  assert codes['permuted'] == (2,)


def test_parameters_without_floats_are_an_error():
  with pytest.raises(ValueError, match='The parameters have no floats'):
    diagnosis.diagnose([{'step': np.int32(3)}] * 2)
