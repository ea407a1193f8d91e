"""The learned soup, against closed forms."""

import math
import re

import _reference
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsoup

NUM = 3
ONCE = [np.float32(0)]  # A batch that no loss below looks at.


def quadratic(targets):
  """`|sum_k alpha_k theta_k - target|^2`, over all leaves."""

  def loss_fn(params, batch, beta):
    del batch, beta
    square = lambda x, y: jnp.sum((x - y) ** 2)
    return sum(jax.tree.leaves(jax.tree.map(square, params, targets)))

  return loss_fn


def fit(models, targets, num_steps=400, learning_rate=0.05, **options):
  return jaxsoup.learned(
      models,
      quadratic(targets),
      ONCE * num_steps,
      num_epochs=1,
      beta=1.0,
      tx=optax.adam(learning_rate),
      **options,
  )


@pytest.mark.parametrize('seed', range(2))
def test_hyperplane_reaches_least_squares(seed):
  rng = np.random.default_rng(seed)
  models = list(rng.normal(size=(NUM, 4)).astype(np.float32))
  target = rng.normal(size=4).astype(np.float32)
  soup = fit(models, target, alpha_fn=jaxsoup.hyperplane, num_steps=800)
  expected = _reference.least_squares(models, target)
  np.testing.assert_allclose(soup.alpha, expected, atol=1e-3)
  assert soup.alpha.sum() == pytest.approx(1, abs=1e-5)
  (mixed,) = _reference.mix([[m] for m in models], soup.alpha)
  np.testing.assert_allclose(soup.params, mixed, atol=1e-5)


def test_softmax_reaches_an_inner_optimum(rng):
  models = list(rng.normal(size=(NUM, 4)).astype(np.float32))
  alpha = np.float32([0.2, 0.5, 0.3])
  soup = fit(models, alpha @ np.array(models))
  np.testing.assert_allclose(soup.alpha, alpha, atol=1e-3)


@pytest.mark.parametrize('seed', range(2))
def test_softmax_reaches_the_optimum_of_the_simplex(seed):
  rng = np.random.default_rng(seed)
  models = list(rng.normal(size=(NUM, 4)).astype(np.float32))
  target = np.float32(2 * models[0] - models[1])
  soup = fit(models, target, learning_rate=0.2)
  expected = _reference.simplex_least_squares(models, target)
  assert min(expected) == 0  # On the edge, where softmax ends at infinity.
  loss = lambda alpha: np.sum((alpha @ np.array(models) - target) ** 2)
  assert loss(soup.alpha) == pytest.approx(loss(expected), rel=1e-3)
  np.testing.assert_allclose(soup.alpha, expected, atol=0.02)
  assert (soup.alpha >= 0).all()


BY_MODULE = lambda path: path[:1]
BY_TENSOR = lambda path: path
GROUPS = {
    'model': ({}, '*', [[('a', 'x'), ('a', 'y'), ('b', 'z')]]),
    'module': (
        {'group_fn': BY_MODULE},
        {'a': '*', 'b': '*'},
        [[('a', 'x'), ('a', 'y')], [('b', 'z')]],
    ),
    'tensor': (
        {'group_fn': BY_TENSOR},
        {'a': {'x': '*', 'y': '*'}, 'b': {'z': '*'}},
        [[('a', 'x')], [('a', 'y')], [('b', 'z')]],
    ),
}


@pytest.mark.parametrize('name', GROUPS)
def test_each_group_has_its_own_optimum(rng, name):
  options, expected_tree, groups = GROUPS[name]
  make = lambda: jax.tree.map(
      lambda _: rng.normal(size=4).astype(np.float32),
      {'a': {'x': 0, 'y': 0}, 'b': {'z': 0}},
  )
  models, target = [make() for _ in range(NUM)], make()
  soup = fit(models, target, 800, alpha_fn=jaxsoup.hyperplane, **options)
  assert jax.tree.structure(soup.alpha) == jax.tree.structure(expected_tree)
  pick = lambda tree, group: np.concatenate([tree[i][j] for i, j in group])
  for alpha, group in zip(jax.tree.leaves(soup.alpha), groups):
    thetas = [pick(model, group) for model in models]
    expected = _reference.least_squares(thetas, pick(target, group))
    np.testing.assert_allclose(alpha, expected, atol=1e-3)
  again = jaxsoup.average(models, soup.alpha).params
  close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5)
  jax.tree.map(close, soup.params, again)


def test_a_group_is_how_a_path_begins():
  models = [{'a': {'x': np.float32(k)}} for k in range(2)]
  with pytest.raises(ValueError, match=r"\('x',\): expected the first keys"):
    fit(models, models[0], group_fn=lambda path: path[1:])


def nll(params, batch, beta):
  logits = beta * jnp.stack([jnp.zeros(()), params])
  log_probabilities = jax.nn.log_softmax(logits)
  return -log_probabilities[batch].mean()


def test_temperature_reaches_its_optimum():
  """With logits (0, 1) and three labels 1 in four: `sigmoid(beta) = 3/4`."""
  labels = np.int32([1, 1, 1, 0])
  soup = jaxsoup.learned(
      [np.float32(1)], nll, [labels] * 300, tx=optax.adam(0.05), num_epochs=1
  )
  assert soup.info.beta == pytest.approx(math.log(3), abs=1e-3)
  assert soup.params == 1  # The soup itself is not scaled.


def test_temperature_stays_where_it_is_fixed():
  seen = lambda params, batch, beta: params**2 + beta
  models = [np.float32(-1), np.float32(2)]
  soup = jaxsoup.learned(
      models,
      seen,
      ONCE * 20,
      beta=2.5,
      tx=optax.adamw(0.1, weight_decay=0.1),
      num_epochs=1,
  )
  start = jaxsoup.learned(models, seen, ONCE, tx=optax.sgd(0.0), beta=2.5)
  assert soup.info.losses[0] == pytest.approx(0.25 + 2.5)
  assert start.info.beta == 2.5
  # Neither the gradient nor the optimizer's weight decay may move it.
  assert soup.info.beta == 2.5


def test_starts_from_the_uniform_soup():
  models = [np.float32(x) for x in (1, 2, 6)]
  for alpha_fn in (jax.nn.softmax, jaxsoup.hyperplane):
    soup = fit(models, np.float32(0), 1, learning_rate=0.0, alpha_fn=alpha_fn)
    np.testing.assert_allclose(soup.alpha, [1 / 3] * 3, rtol=1e-6)
    assert soup.info.losses.tolist() == pytest.approx([9.0])


def towards(params, batch, beta):
  return (params - batch) ** 2


def stop_early(num_epochs, patience, val):
  """From 0.5 towards 1, past the second split's optimum."""
  return jaxsoup.learned(
      [np.float32(0), np.float32(1)],
      towards,
      [np.float32(1)],
      tx=optax.sgd(0.3),
      num_epochs=num_epochs,
      val_batches=[np.float32(val), np.float32(val)],
      patience=patience,
  )


@pytest.mark.parametrize('val', [0.45, 0.6])
@pytest.mark.parametrize('patience', [None, 0, 1, 2])
def test_returns_the_best_epoch(patience, val):
  soup = stop_early(12, patience, val)
  val_losses, best = soup.info.val_losses, soup.info.best_epoch
  assert best == np.argmin(val_losses)
  assert (best == 0) == (val < 0.5)
  # 0 and 1 are the same, as in Keras.
  num_epochs = 12 if patience is None else min(best + max(patience, 1), 12)
  assert len(val_losses) == num_epochs + 1
  assert len(soup.info.losses) == num_epochs
  until_best = jaxsoup.learned(
      [np.float32(0), np.float32(1)],
      towards,
      [np.float32(1)] * best or [np.float32(1)],
      tx=optax.sgd(0.3 if best else 0.0),
      num_epochs=1,
  )
  np.testing.assert_allclose(soup.alpha, until_best.alpha, rtol=1e-5)
  loss_there = (float(soup.params) - val) ** 2
  assert loss_there == pytest.approx(val_losses[best], abs=1e-6)


def test_without_a_second_split_the_last_epoch_counts():
  soup = fit([np.float32(0), np.float32(1)], np.float32(1), 3)
  assert soup.info.val_losses.size == 0
  assert soup.info.best_epoch == 1


def test_losses_are_those_of_every_step():
  soup = jaxsoup.learned(
      [np.float32(0), np.float32(2)],
      towards,
      [np.float32(3), np.float32(5)],
      tx=optax.sgd(0.0),
      num_epochs=3,
  )
  assert soup.info.losses.tolist() == [4, 16] * 3


def test_is_deterministic(rng):
  models = list(rng.normal(size=(NUM, 4)).astype(np.float32))
  first, second = (fit(models, np.float32([1, 0, 0, 0]), 20) for _ in range(2))
  np.testing.assert_array_equal(first.alpha, second.alpha)
  np.testing.assert_array_equal(first.params, second.params)


def test_any_parametrization():
  """One's own: the first model counts at least a half."""
  at_least_half = lambda w: jax.nn.softmax(w) / 2 + jnp.eye(len(w))[0] / 2
  models = [np.float32(0), np.float32(1)]
  soup = fit(models, np.float32(1), learning_rate=0.5, alpha_fn=at_least_half)
  np.testing.assert_allclose(soup.alpha, [0.5, 0.5], atol=0.01)


@pytest.mark.parametrize('batches', ['batches', 'val_batches'])
def test_an_exhausted_iterator(batches):
  options = {'batches': ONCE, 'val_batches': ONCE, batches: iter(ONCE)}
  with pytest.raises(ValueError, match=rf'no batches .*{batches}.*: pass'):
    jaxsoup.learned(
        [np.float32(0), np.float32(1)],
        towards,
        **options,
        tx=optax.sgd(0.1),
        num_epochs=2,
    )


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_loss_that_is_not_finite(bad):
  with pytest.raises(ValueError, match=f'loss is {bad} at batch 1 .*epoch 1'):
    jaxsoup.learned(
        [np.float32(0), np.float32(1)],
        towards,
        [np.float32(0), np.float32(bad)],
        tx=optax.sgd(0.1),
    )


def test_patience_needs_a_second_split():
  with pytest.raises(ValueError, match='patience needs val_batches'):
    fit([np.float32(0)], np.float32(0), patience=0)
  with pytest.raises(ValueError, match='patience is -1: .* at least 0'):
    stop_early(12, -1, 0.5)


def test_hyperplane_is_the_projection(rng):
  w = rng.normal(size=5).astype(np.float32)
  alpha = np.asarray(jaxsoup.hyperplane(jnp.asarray(w)))
  assert alpha.sum() == pytest.approx(1, abs=1e-6)
  assert np.ptp(alpha - w) < 1e-6  # It moved along (1, ..., 1) only.


@pytest.mark.parametrize('memory', ['resident', 'streamed'])
def test_every_step_runs_one_program(placement, caplog, memory):
  models = [{'w': placement.put(np.arange(8.0) + k)} for k in range(NUM)]
  traces = []

  def loss_fn(params, batch, beta):
    traces.append(1)
    return jnp.sum((beta * params['w'] - batch) ** 2)

  batches = [placement.put(np.ones(8))] * 3
  with jax.log_compiles():
    jaxsoup.learned(
        models,
        loss_fn,
        batches,
        tx=optax.adam(0.1),
        num_epochs=2,
        val_batches=batches[:1],
        memory=memory,
    )
  compiled = re.findall(r'XLA compilation of jit\((\w+)\)', caplog.text)
  counts = {x: compiled.count(x) for x in ('loss_of', 'loss_at', 'updated')}
  # The loss with its gradient, the loss alone, and the optimizer.
  expected = {'loss_of': 0, 'loss_at': 2} if memory == 'streamed' else {}
  assert counts == {'loss_of': 1, 'loss_at': 1, 'updated': 1} | expected
  assert len(traces) == 2


def test_parameters_without_floats_are_an_error():
  with pytest.raises(ValueError, match='The parameters have no floats'):
    fit([{'step': np.int32(3)}] * 2, {'step': np.int32(3)})
