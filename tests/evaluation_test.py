"""Scores on batches equal scores on the whole set."""

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

from jaxsoup import evaluation
from jaxsoup import metrics
from jaxsoup import sharding


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


def test_compiled_once_for_many_models():
  traces = []

  def metric_fn(params, batch):
    traces.append(1)
    return nll_fn(params, batch)

  eval_fn = evaluation.mean_of(metric_fn, evaluation.batched(dataset(), 5))
  scores = {eval_fn(model(seed)) for seed in range(4)}
  assert len(scores) == 4
  assert len(traces) == 1


def test_metric_that_returns_a_scalar_is_named():
  eval_fn = evaluation.mean_of(
      lambda p, b: nll_fn(p, b).mean(), evaluation.batched(dataset(), 5)
  )
  with pytest.raises(ValueError, match=r'expected \[B\].*score_of'):
    eval_fn(model())


@pytest.mark.parametrize(
    'batches', ([], [{'x': np.ones(2), 'mask': np.zeros(2, bool)}])
)
def test_no_example_is_an_error(batches):
  eval_fn = evaluation.mean_of(lambda p, b: b['x'], batches)
  with pytest.raises(ValueError, match='no examples to score'):
    eval_fn(())


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
