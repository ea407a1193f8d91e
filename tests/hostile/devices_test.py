"""Arrays on several devices or deleted, and recipes under jax.jit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsoup


def score(params):
  return -float(abs(params['w'] - 1).sum())


def learned(models):
  loss_fn = (
      lambda params, batch, beta: beta * ((params['w'] - batch) ** 2).sum()
  )
  batches = [np.float32(1)]
  return jaxsoup.learned(models, loss_fn, batches, tx=optax.sgd(0.1))


RECIPES = {
    'uniform': jaxsoup.uniform,
    'average': lambda models: jaxsoup.average(models, [0.5, 0.25, 0.25]),
    'greedy': lambda models: jaxsoup.greedy(models, score),
    'pruned': lambda models: jaxsoup.pruned(models, score),
    'learned': learned,
    'model_stock': lambda models: jaxsoup.model_stock(models, models[0]),
}


@pytest.mark.parametrize('recipe', RECIPES)
def test_each_model_on_its_own_device(recipe):
  # As several trainings on one machine leave them.
  models = [{'w': np.float32([k, 2, 1])} for k in range(3)]
  expected = RECIPES[recipe](models)
  devices = jax.devices()[1:4]
  apart = [jax.device_put(m, d) for m, d in zip(models, devices)]
  soup = RECIPES[recipe](apart)
  np.testing.assert_array_equal(soup.params['w'], expected.params['w'])
  assert soup.params['w'].devices() == {devices[0]}


def test_one_model_on_two_devices():
  first, second = jax.devices()[:2]
  model = {
      'a': jax.device_put(np.float32([1]), first),
      'b': jax.device_put(np.float32([1]), second),
  }
  words = "ingredient 0: leaf 'a' is on .* and leaf 'b' is on .*device_put"
  for recipe in RECIPES.values():
    with pytest.raises(ValueError, match=words):
      recipe([model] * 3)


def test_arrays_that_were_donated():
  models = [{'w': jnp.ones(2)}, {'w': jnp.zeros(2)}]
  models[1]['w'].delete()
  with pytest.raises(ValueError, match="Leaf 'w' was deleted: it was donated"):
    jaxsoup.uniform(models)


@pytest.mark.parametrize('trace', [jax.jit, jax.vmap, jax.jacfwd])
def test_what_decides_by_values_cannot_be_traced(trace):
  models = lambda x: [{'w': x}, {'w': x + 1}]
  x = jnp.ones((2, 3))
  with pytest.raises(TypeError, match='a search decides by its scores'):
    search = lambda x: jaxsoup.greedy(models(x), lambda p: p['w'].sum())
    trace(lambda x: search(x).params['w'])(x)
  for recipe in (learned, lambda models: jaxsoup.search(
      models, lambda p: p['w'].sum(), num_evaluations=3
  )):  # fmt: skip
    with pytest.raises(TypeError, match='learned and search are loops'):
      trace(lambda x, recipe=recipe: recipe(models(x)).params['w'])(x)
