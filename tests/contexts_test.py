"""Metrics and checkpoints where transfers are forbidden, or a mesh is set."""

import contextlib

import jax
import numpy as np
import pytest

import jaxsoup
from jaxsoup import checkpoints
from jaxsoup import evaluation
from jaxsoup import metrics
from jaxsoup import statistics

METRICS = (
    metrics.accuracy,
    metrics.top_k_accuracy,
    metrics.log_likelihood,
    metrics.negative_log_likelihood,
    metrics.brier,
    metrics.expected_calibration_error,
    metrics.f1,
    metrics.matthews,
)


@contextlib.contextmanager
def _mesh_set(mesh):
  with jax.set_mesh(mesh):
    yield


@pytest.fixture(params=['no transfers', 'auto', 'explicit'])
def context(request):
  if request.param == 'no transfers':
    return jax.transfer_guard('disallow')
  types = {
      'auto': jax.sharding.AxisType.Auto,
      'explicit': jax.sharding.AxisType.Explicit,
  }
  return _mesh_set(
      jax.make_mesh((4,), ('fsdp',), axis_types=(types[request.param],))
  )


@pytest.mark.parametrize('metric', METRICS, ids=lambda m: m.__name__)
def test_metrics(metric, context, rng):
  logits = rng.normal(size=(12, 6)).astype(np.float32)
  labels = rng.integers(6, size=12)
  expected = jax.device_get(metric(logits, labels))
  with context:
    actual = jax.device_get(metric(logits, labels))
  np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize('metric', (metrics.correct, metrics.matthews))
def test_comparisons(metric, context, rng):
  a, b = rng.normal(size=(2, 30, 3)).astype(np.float32)
  labels = rng.integers(3, size=30)
  run = lambda: statistics.compare(
      a, b, labels, metric=metric, num_resamples=40
  )
  expected = run()
  with context:
    assert run()[:4] == pytest.approx(expected[:4], abs=1e-6)


def test_scores_of_whole_sets(context, rng):
  data = {'x': rng.normal(size=(10, 3)), 'label': rng.integers(3, size=10)}
  params = rng.normal(size=(3, 3)).astype(np.float32)
  batches = evaluation.batched(data, 4)
  eval_fn = evaluation.score_of(
      metrics.matthews, lambda p, batch: batch['x'] @ p, batches
  )
  expected = eval_fn(params)
  with context:
    assert eval_fn(params) == pytest.approx(expected, abs=1e-6)


def test_checkpoints(context, rng, tmp_path):
  models = [{'w': rng.normal(size=(8, 3)).astype('f')} for _ in range(3)]
  paths = [tmp_path / str(k) for k in range(3)]
  with context:
    for path, model in zip(paths, models):
      checkpoints.save(path, model)
    ingredients = checkpoints.Ingredients(
        paths, jax.eval_shape(lambda: models[0])
    )
    soup = jaxsoup.uniform(ingredients)
    checkpoints.save(tmp_path / 'soup', soup, ingredients=ingredients)
    loaded = checkpoints.load(tmp_path / 'soup')
  expected = np.mean([m['w'] for m in models], axis=0)
  np.testing.assert_allclose(loaded.params['w'], expected, rtol=1e-6)
  np.testing.assert_array_equal(loaded.alpha, soup.alpha)
