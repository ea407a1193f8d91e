"""Scores on batches equal scores on the whole set."""

import gc

import _pairwise
from flax import nnx
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from jaxsoup import ensembles
from jaxsoup import evaluation
from jaxsoup import landscape
from jaxsoup import metrics
from jaxsoup import sharding
from jaxsoup.models import batch_norm


def dataset(num=23, width=4, num_classes=3):
  rng = np.random.default_rng(0)
  return {
      'x': rng.normal(size=(num, width)).astype(np.float32),
      'label': rng.integers(0, num_classes, num).astype(np.int32),
  }


def model(seed=0):
  w = np.random.default_rng(seed).normal(size=(4, 3))
  return {'w': w.astype(np.float32)}


def logits_fn(params, batch):
  return batch['x'] @ params['w']


def nll_fn(params, batch):
  log_p = jax.nn.log_softmax(logits_fn(params, batch))
  return jnp.take_along_axis(log_p, batch['label'][:, None], -1)[:, 0]


def test_batches_are_padded_and_masked():
  data = dataset(num=5)
  batches = evaluation.batched(data, 2)
  assert [b['mask'].tolist() for b in batches] == [[1, 1], [1, 1], [1, 0]]
  assert {b['x'].shape for b in batches} == {(2, 4)}
  for name in data:
    rows = [np.asarray(b[name])[np.asarray(b['mask'])] for b in batches]
    np.testing.assert_array_equal(np.concatenate(rows), data[name])
  # Padding is a real example, never something that could be NaN.
  np.testing.assert_array_equal(batches[-1]['x'][1], data['x'][-1])


@pytest.mark.parametrize(
    'data, batch_size',
    [
        ({}, 2),
        ({'x': np.zeros(0)}, 2),
        ({'x': np.zeros(3), 'y': np.zeros(2)}, 2),
        ({'x': np.zeros(3)}, 0),
    ],
)
def test_what_cannot_be_cut_is_an_error(data, batch_size):
  with pytest.raises(ValueError, match='lengths must be equal'):
    evaluation.batched(data, batch_size)


@settings(max_examples=15, deadline=None)
@given(num=st.integers(1, 12), batch_size=st.integers(1, 15))
def test_mean_does_not_depend_on_the_batches(num, batch_size):
  data = dataset(num)
  params = model()
  expected = np.mean(nll_fn(params, jax.tree.map(jnp.asarray, data)))
  eval_fn = evaluation.mean_of(nll_fn, evaluation.batched(data, batch_size))
  np.testing.assert_allclose(eval_fn(params), expected, rtol=1e-5)


def test_padding_that_is_not_finite_does_not_count():
  batch = {
      'x': np.array([2.0, np.nan, np.inf]),
      'mask': np.array([1, 0, 0]) > 0,
  }
  eval_fn = evaluation.mean_of(lambda params, b: b['x'] * params, [batch])
  assert eval_fn(3.0) == 6.0


def test_batches_without_mask_count_in_full():
  batches = [{'x': np.array([1.0, 2.0])}, {'x': np.array([6.0])}]
  eval_fn = evaluation.mean_of(lambda params, b: b['x'], batches)
  assert eval_fn(()) == 3.0


def test_right_answers_as_booleans():
  data = dataset()
  eval_fn = evaluation.mean_of(
      lambda p, b: logits_fn(p, b).argmax(-1) == b['label'],
      evaluation.batched(data, 10),
  )
  expected = np.mean((data['x'] @ model()['w']).argmax(-1) == data['label'])
  assert eval_fn(model()) == pytest.approx(expected, abs=1e-12)


def test_what_is_no_batch_is_named():
  eval_fn = evaluation.mean_of(nll_fn, [(np.ones((2, 3)), np.zeros(2, int))])
  with pytest.raises(TypeError, match='batch 0 is a tuple: expected a dict'):
    eval_fn(model())
  with pytest.raises(ValueError, match="Leaf 'id' of dtype int64 holds 10995"):
    evaluation.batched({'id': np.array([2**40, 1])}, 2)


def test_a_metric_of_each_example_is_named():
  logits_fn = lambda params, batch: batch['x'] @ params['w']
  batches = evaluation.batched(dataset(), 5)
  eval_fn = evaluation.score_of(metrics.correct, logits_fn, batches)
  with pytest.raises(ValueError, match='metric returned shape .*mean_of'):
    eval_fn(model())


def test_metric_that_returns_a_scalar_is_named():
  eval_fn = evaluation.mean_of(
      lambda p, b: nll_fn(p, b).mean(), evaluation.batched(dataset(), 5)
  )
  with pytest.raises(ValueError, match=r'expected \[B\].*score_of'):
    eval_fn(model())


def test_batches_may_be_nested():
  data = dataset()
  batches = [{'input': {'x': data['x']}, 'mask': data['label'] > 0}]
  kept = data['x'][data['label'] > 0, 0]
  first = lambda params, batch: batch['input']['x'][:, 0]
  got = evaluation.mean_of(first, batches)(())
  assert got == pytest.approx(kept.mean(), rel=1e-5)
  np.testing.assert_array_equal(evaluation.logits_of(first, batches)(()), kept)


@pytest.mark.parametrize(
    'batches', ([], [{'x': np.ones(2), 'mask': np.zeros(2, bool)}])
)
def test_no_example_is_an_error(batches):
  eval_fn = evaluation.mean_of(lambda p, b: b['x'], batches)
  with pytest.raises(ValueError, match='no examples to score'):
    eval_fn(())
  with pytest.raises(ValueError, match='no examples to score'):
    evaluation.logits_of(lambda p, b: b['x'], batches)(())


def test_used_up_iterator_is_an_error():
  data = evaluation.batched(dataset(), 5)
  mean = evaluation.mean_of(nll_fn, iter(data))
  mean(model())
  with pytest.raises(ValueError, match='pass a list'):
    mean(model())
  outputs = evaluation.logits_of(logits_fn, iter(data))
  outputs(model())
  with pytest.raises(ValueError, match='only once'):
    outputs(model())


@pytest.mark.parametrize('batch_size', (1, 7, 23, 40))
def test_logits_of_drops_the_padding(batch_size):
  data = dataset()
  got = evaluation.logits_of(logits_fn, evaluation.batched(data, batch_size))
  logits = got(model())
  assert isinstance(logits, np.ndarray) and logits.shape == (23, 3)
  np.testing.assert_allclose(logits, data['x'] @ model()['w'], rtol=1e-5)


def test_score_of_is_the_metric_of_the_whole_set():
  data = dataset()
  eval_fn = evaluation.score_of(
      metrics.matthews, logits_fn, evaluation.batched(data, 5)
  )
  expected = metrics.matthews(data['x'] @ model()['w'], data['label'])
  assert isinstance(eval_fn(model()), float)
  assert eval_fn(model()) == pytest.approx(float(expected))


def test_score_of_with_another_key():
  data = dataset()
  data['target'] = data.pop('label')
  eval_fn = evaluation.score_of(
      metrics.accuracy, logits_fn, evaluation.batched(data, 5), label='target'
  )
  expected = np.mean((data['x'] @ model()['w']).argmax(-1) == data['target'])
  assert eval_fn(model()) == pytest.approx(expected)


@pytest.mark.parametrize('axis_type', (AxisType.Auto, AxisType.Explicit))
def test_sharded_equals_single_device(axis_type):
  mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(axis_type,))
  data = dataset(num=22)
  batches = evaluation.batched(data, 8)
  rows = NamedSharding(mesh, P('fsdp'))
  spread = [jax.device_put(batch, rows) for batch in batches]
  abstract_params = sharding.fsdp(
      jax.eval_shape(lambda: model()), mesh, min_size=0
  )
  placed = jax.tree.map(
      lambda x, a: jax.device_put(x, a.sharding), model(), abstract_params
  )
  replicated = jax.device_put(model(), NamedSharding(mesh, P()))

  expected = evaluation.mean_of(nll_fn, batches)(model())
  eval_fn = evaluation.mean_of(nll_fn, spread)
  assert eval_fn(replicated) == pytest.approx(expected, rel=1e-6)
  assert len(placed['w'].sharding.device_set) == 4
  if axis_type == AxisType.Auto:
    # On Explicit axes a product over a sharded axis is the model's to write.
    assert eval_fn(placed) == pytest.approx(expected, rel=1e-6)
  logits = evaluation.logits_of(logits_fn, spread)(replicated)
  np.testing.assert_allclose(logits, data['x'] @ model()['w'], rtol=1e-5)


def test_numpy_params_and_batches_pass_a_transfer_guard():
  data = dataset()
  batches = [data, {k: x[:9] for k, x in data.items()}]
  score = evaluation.score_of(metrics.accuracy, logits_fn, batches)
  mean = evaluation.mean_of(nll_fn, batches)
  expected = score(model()), mean(model())
  with jax.transfer_guard('disallow'):
    got = score(model()), mean(model())
  assert got == expected


# --- What a mask means --------------------------------------------------------

THREE = np.array([10.0, 20.0, 30.0], np.float32)
# Bool, or weights: which count, and how much.
MASKS = {
    'bool': np.array([True, True, False]),
    'weights': np.array([1.0, 0.5, 0.0], np.float32),
    'bfloat16': np.asarray(jnp.array([1.0, 0.5, 0.0], jnp.bfloat16)),
}
BAD_MASKS = {
    'integers': (
        np.array([1, 1, 0]),
        r'batch 1 is int\w*\[3\].*astype\(bool\)',
    ),
    'a column': (np.ones((3, 1), bool), r'batch 1 is bool\[3, 1\]'),
    'too short': (np.ones(2, bool), r'shape \(2,\).* 3 examples'),
    'too short weights': (np.ones(2, 'f'), r'shape \(2,\).* 3 examples'),
    'one for all': (np.ones(1, bool), r'shape \(1,\).* 3 examples'),
    'NaN': (np.array([1, np.nan, 0], 'f'), 'batch 1 has weight nan at row 1'),
    'infinite': (np.array([1, 0, np.inf], 'f'), 'weight inf at row 2'),
    'negative': (np.array([1, 1, -0.5], 'f'), 'weight -0.5 at row 2.*or more'),
}


def column(params, batch):
  return batch['x'] * params


def is_above_15(params, batch):
  return batch['x'] * params > 15


def _at_least(batches):
  eval_fn = evaluation.mean_of(is_above_15, [batches[0]])
  eval_fn(np.float32(1))
  eval_fn.batches, eval_fn._hard_first = batches, None
  return eval_fn.at_least(np.float32(1), 0.1)


# What reads the masks of batches of x and label.
READERS = {
    'mean_of': lambda b: evaluation.mean_of(column, b)(np.float32(1)),
    'at_least': _at_least,
    'of_many': lambda b: evaluation.mean_of(column, b).of_many(np.ones(2, 'f')),
    'logits_of': lambda b: evaluation.logits_of(column, b)(np.float32(1)),
    'score_of': lambda b: evaluation.score_of(
        lambda x, y: np.mean(x), column, b, label='x'
    )(np.float32(1)),
    'collect': lambda b: ensembles.collect(np.ones(2, 'f'), column, b),
    'sharpness': lambda b: landscape.sharpness(
        evaluation.mean_of(
            lambda params, batch: batch['x'] * (params**2).sum(), b
        ),
        np.ones(2, 'f'),
    ),
    'soup_minus_ensemble': lambda b: landscape.soup_minus_ensemble(
        lambda params, batch: batch['x'][:, None] * params,
        *np.ones((2, 1), 'f'),
        b,
        output_loss_fn=lambda z, batch: z[:, 0],
    ),
    'recalibrated': lambda b: recalibrated_statistics(b),
}


def recalibrated_statistics(batches):
  graphdef, state = nnx.split(nnx.BatchNorm(1, rngs=nnx.Rngs(0)))
  params = batch_norm.recalibrated(
      graphdef,
      nnx.to_pure_dict(state),
      batches,
      call=lambda norm, batch: norm(batch['x'][:, None]),
  )
  return float(params['mean'][0]), float(params['var'][0])


@pytest.mark.parametrize(
    'reader, bad, is_on_device',
    _pairwise.product(READERS, BAD_MASKS, (False, True)),
)
def test_a_mask_that_is_none_is_an_error(reader, bad, is_on_device):
  mask, message = BAD_MASKS[bad]
  batches = [{'x': THREE}, {'x': THREE, 'mask': mask}]
  if is_on_device:
    batches = jax.device_put(batches)
  with pytest.raises(ValueError, match=message):
    READERS[reader](batches)


@pytest.mark.parametrize('mask', MASKS.values(), ids=MASKS)
def test_a_mask_means_the_same_everywhere(mask):
  padded = {'x': np.array([60, np.nan], 'f'), 'mask': mask[::2]}
  batches = [{'x': THREE, 'mask': mask}, padded]
  x, w = np.array([10.0, 20.0, 60.0]), np.array([*mask[:2], 1], np.float64)
  mean = (w * x).sum() / w.sum()
  assert READERS['mean_of'](batches) == pytest.approx(mean, rel=1e-6)
  np.testing.assert_allclose(READERS['of_many'](batches), mean, rtol=1e-6)
  # The Hessian of the weighted mean of x_j |theta|^2, and the mean of x_j.
  finite = [{**batch, 'x': np.nan_to_num(batch['x'])} for batch in batches]
  sharpness = READERS['sharpness'](finite)
  assert sharpness.eigenvalue == pytest.approx(2 * mean, rel=1e-4)
  difference = READERS['soup_minus_ensemble'](batches)
  assert difference.soup == pytest.approx(mean, rel=1e-6)
  # Where rows are returned, or seen by a model, a weight keeps or drops.
  np.testing.assert_array_equal(READERS['logits_of'](batches), x)
  np.testing.assert_array_equal(READERS['collect'](batches), [x, x])
  assert READERS['score_of'](batches) == pytest.approx(x.mean())
  statistics = READERS['recalibrated'](batches)
  assert statistics == pytest.approx((x.mean(), x.var()), rel=1e-6)


def test_weights_of_right_answers_have_no_bound():
  rng = np.random.default_rng(0)
  weights = rng.random(40).astype(np.float32)
  data = {'x': 30 * rng.random(40).astype(np.float32), 'mask': weights}
  eval_fn = evaluation.mean_of(is_above_15, evaluation.batched(data, 8))
  expected = np.average(data['x'] > 15, weights=weights.astype(np.float64))
  assert eval_fn(np.float32(1)) == pytest.approx(expected, rel=1e-6)
  assert 'weighted: every evaluation runs in full' in repr(eval_fn)
  assert eval_fn.at_least(np.float32(1), 0.99) == eval_fn(np.float32(1))
  assert eval_fn.num_seen == pytest.approx(weights.sum(), rel=1e-6)


@pytest.mark.parametrize('dtype', (bool, np.float32, np.float16))
def test_batched_keeps_the_mask_of_the_data(dtype):
  mask = np.array([1, 0, 1, 1, 1]).astype(dtype)
  batches = evaluation.batched({'x': np.arange(5.0), 'mask': mask}, 4)
  got = np.concatenate([b['mask'] for b in batches])
  np.testing.assert_array_equal(got, [*mask, 0, 0, 0])
  assert got.dtype == dtype


@pytest.mark.parametrize('axis_type', (AxisType.Auto, AxisType.Explicit))
@pytest.mark.parametrize('dtype', (bool, np.float32))
def test_masks_on_a_mesh(axis_type, dtype):
  mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(axis_type,))
  rows = NamedSharding(mesh, P('fsdp'))
  data = {
      'x': np.random.default_rng(0).normal(size=11).astype(np.float32),
      'mask': np.arange(11) % 3,
  }
  data['mask'] = data['mask'].astype(dtype)
  batches = evaluation.batched(data, 8)
  spread = evaluation.batched(data, 8, sharding=rows)
  params = jax.device_put(np.float32(2), NamedSharding(mesh, P()))
  for name in ('logits_of', 'mean_of'):
    got = getattr(evaluation, name)(column, spread)(params)
    np.testing.assert_allclose(got / 2, READERS[name](batches), rtol=1e-6)
  if axis_type == AxisType.Auto:
    statistics = READERS['recalibrated'](spread)
    x = data['x'][data['mask'] > 0].astype(np.float64)
    assert statistics == pytest.approx((x.mean(), x.var()), rel=1e-5)


# --- One walk -----------------------------------------------------------------


class Shuffled:
  """A loader that reads the examples in another order each time."""

  def __init__(self, data, batch_size):
    self.data, self.batch_size = data, batch_size
    self.rng = np.random.default_rng(0)

  def __iter__(self):
    order = self.rng.permutation(len(self.data['label']))
    shuffled = {name: x[order] for name, x in self.data.items()}
    return iter(evaluation.batched(shuffled, self.batch_size))


def one_hot_problem():
  label = np.arange(30) % 3
  return {'x': np.eye(4, dtype='f')[label], 'label': label}


@pytest.mark.parametrize('metric', (metrics.accuracy, metrics.matthews))
def test_labels_are_read_in_the_walk_of_the_logits(metric):
  batches = Shuffled(one_hot_problem(), 8)
  params = {'w': np.eye(4, 3, dtype='f')}
  assert evaluation.score_of(metric, logits_fn, batches)(params) == 1
  both_fn = lambda p, b: {'logits': logits_fn(p, b), 'label': b['label']}
  got = evaluation.logits_of(both_fn, batches)(params)
  np.testing.assert_array_equal(got['logits'].argmax(-1), got['label'])
  mean = evaluation.mean_of(
      lambda p, b: metrics.correct(logits_fn(p, b), b['label']), batches
  )
  assert mean(params) == mean.at_least(params, 0.5) == 1


def test_outputs_in_another_order_are_an_error():
  data = dataset(num=30)
  run = evaluation.logits_of(logits_fn, Shuffled(data, 8))
  assert run(model()).shape == (30, 3)
  with pytest.raises(ValueError, match='30 examples then, 30 now'):
    run(model())
  with pytest.raises(ValueError, match='differ from row'):
    ensembles.collect([model(0), model(1)], logits_fn, Shuffled(data, 8))


@pytest.mark.parametrize('axis_type', (AxisType.Auto, AxisType.Explicit))
def test_one_order_is_recognized(axis_type):
  """Whatever the examples are made of, and wherever they lie."""
  mesh = jax.make_mesh((2, 2), ('d', 'e'), axis_types=(axis_type,) * 2)
  tokens = np.array([[1, 2, 0, 3], [2, 1, 0, 3], [0, 2, 1, 3], [0, 0, 3, 3]])
  batch = {
      'tokens': jax.device_put(tokens, NamedSharding(mesh, P('d', 'e'))),
      'key': jax.random.split(jax.random.key(0), 4),
      'none': np.zeros((4, 0)),
  }
  run = evaluation.logits_of(lambda params, b: b['tokens'], [batch])
  np.testing.assert_array_equal(run(()), run(()))
  for other in tokens[::-1], tokens[[0, 2, 1, 3]]:
    batch['tokens'] = jax.device_put(other, batch['tokens'].sharding)
    with pytest.raises(ValueError, match='differ from row'):
      run(())


# --- What is in memory --------------------------------------------------------


@pytest.mark.parametrize('name', ('step', '_steps'))
def test_few_batches_are_in_flight(name):
  def slow_fn(params, batch):
    x = params * jnp.eye(100) + batch['x']
    x = jax.lax.fori_loop(0, 200, lambda _, x: jnp.tanh(x @ x), x)
    return 0 * x[0] + batch['x']

  class Loader:
    outputs, num_ahead = [], []

    def __iter__(self):
      for i in range(20):
        # What was asked for before, and is not there yet.
        is_there = [x.is_ready() for x in self.outputs]
        self.num_ahead.append(is_there.count(False))
        yield {'x': np.full(100, i, np.float32)}

  loader = Loader()
  eval_fn = evaluation.mean_of(slow_fn, loader)
  step = getattr(eval_fn, name)

  def recorded(params, batch):
    result = step(params, batch)
    loader.outputs.append(result[0])
    return result

  setattr(eval_fn, name, recorded)
  if name == 'step':
    assert eval_fn(np.float32(0.5)) == 9.5
  else:
    np.testing.assert_array_equal(eval_fn.of_many(np.float32([0, 1])), 9.5)
  assert len(loader.num_ahead) == 20 and max(loader.num_ahead) < 3


def test_batches_are_not_copied_to_the_host(monkeypatch):
  """An array on a device keeps its host copy for as long as it lives."""
  copied = []
  device_get = jax.device_get

  def recorded(tree):
    copied.extend(id(x) for x in jax.tree.leaves(tree))
    return device_get(tree)

  data = dataset(num=64)
  batches = evaluation.batched(data, 8)
  eval_fn = evaluation.mean_of(
      lambda p, b: metrics.correct(logits_fn(p, b), b['label']), batches
  )
  monkeypatch.setattr(jax, 'device_get', recorded)
  for seed in range(6):
    score = eval_fn(model(seed))
    assert eval_fn.at_least(model(seed), 0.0) == score
    right = (data['x'] @ model(seed)['w']).argmax(-1) == data['label']
    assert score == np.mean(right)
  given = {id(x) for b in batches for k, x in b.items() if k != 'mask'}
  assert copied and not given & set(copied)


def test_batches_on_the_host_stay_there():
  data = dataset(num=64)
  batches = [
      {k: x[i : i + 8] for k, x in data.items()} for i in range(0, 64, 8)
  ]
  sizes = []

  def metric_fn(params, batch):
    return metrics.correct(logits_fn(params, batch), batch['label'])

  eval_fn = evaluation.mean_of(metric_fn, batches)
  score = eval_fn(model())
  for _ in range(3):
    assert eval_fn.at_least(model(), 0.0) == score
    gc.collect()
    sizes.append(sum(x.shape == (8, 4) for x in jax.live_arrays()))
  assert sizes[0] <= 3 and sizes == sizes[:1] * 3
