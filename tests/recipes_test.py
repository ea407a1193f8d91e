"""Every recipe on every container, dtype and placement, against NumPy."""

from typing import Any
from typing import NamedTuple

import _pairwise
import _reference
import _x64
from flax import nnx
from flax.core import FrozenDict
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import jaxsoup
from jaxsoup import trajectory

NUM = 3
ALPHA = np.float32([0.5, 0.75, -0.25])
QUARTER = np.float32([0.75, 0.25])
SHAPES = ((4,), (4, 3), ())


class Body(nnx.Module):

  def __init__(self, bias, kernel):
    self.bias = nnx.Param(bias)
    self.kernel = nnx.Param(kernel)


class Model(nnx.Module):

  def __init__(self, bias, kernel, scale):
    self.body = Body(bias, kernel)
    self.scale = nnx.Param(scale)


class Tuple(NamedTuple):
  bias: Any
  kernel: Any
  scale: Any


def linen(bias, kernel, scale):
  return {'body': {'bias': bias, 'kernel': kernel}, 'scale': scale}


CONTAINERS = {
    'linen': linen,
    'frozen': lambda *leaves: FrozenDict(linen(*leaves)),
    'state': lambda *leaves: nnx.state(Model(*leaves), nnx.Param),
    'module': Model,
    'namedtuple': Tuple,
    'list': lambda *leaves: list(leaves),
    'array': lambda bias, kernel, scale: kernel,
}


def values(num, dtype, seed=0):
  """Models around a common start that moved in about one direction."""
  rng = np.random.default_rng(seed)
  normal = lambda: [rng.normal(size=shape) for shape in SHAPES]
  start, shift = normal(), normal()
  moved = [
      [x + s + 0.5 * n for x, s, n in zip(start, shift, normal())]
      for _ in range(num)
  ]
  cast = lambda model: [np.asarray(x, jnp.dtype(dtype)) for x in model]
  return cast(start), [cast(model) for model in moved]


def leaves_of(tree):
  return [np.asarray(x) for x in jax.tree.leaves(tree)]


def score(model) -> float:
  leaves = jax.tree.leaves(jax.device_get(model))
  return -float(sum(np.sum((np.float64(x) - 0.3) ** 2) for x in leaves))


def loss_fn(params, batch, beta):
  leaves = jax.tree.leaves(params)
  losses = [jnp.mean((x.astype(jnp.float32) - batch) ** 2) for x in leaves]
  return beta * sum(losses)


# Each: (ingredients, theta_0) -> Soup, and (models, start) -> expected leaves
# and alpha, or None for what a test of its own looks at.


def _counted(members):
  return np.bincount(members, minlength=NUM) / len(members)


def _mixed_stack(ingredients, theta_0):
  del theta_0
  stacked = jaxsoup.stack(ingredients)
  return jaxsoup.Soup(jaxsoup.mix(stacked, ALPHA), ALPHA, None)


def _learned(ingredients, theta_0):
  del theta_0
  batches = [np.float32(0.3)]
  tx = optax.sgd(0.5)
  return jaxsoup.learned(ingredients, loss_fn, batches, tx=tx, num_epochs=1)


def _running(ingredients, theta_0):
  average = jaxsoup.running_average()
  update = jax.jit(average.update, donate_argnums=0)
  state = average.init(theta_0)
  for params, weight in zip(ingredients, ALPHA, strict=True):
    before, state = state, update(state, params, weight)
    for x in jax.tree.leaves(before.total):
      assert x.is_deleted()
    for x, like in zip(
        jax.tree.leaves(state.total), jax.tree.leaves(params), strict=True
    ):
      assert x.sharding.is_equivalent_to(like.sharding, x.ndim)
  return jaxsoup.Soup(average.value(state), ALPHA / ALPHA.sum(), None)


def _expected_search(search):
  def expected(models, start):
    del start
    members = search(models, score)
    return _reference.mean([models[k] for k in members]), _counted(members)

  return expected


def _expected_stock(models, start):
  soup, _, ratios = _reference.model_stock(models, start)
  return soup, [np.full(NUM, ratio / NUM) for ratio in ratios]


RECIPES = {
    'mix': (_mixed_stack, lambda m, _: (_reference.mix(m, ALPHA), ALPHA)),
    'uniform': (
        lambda m, _: jaxsoup.uniform(m),
        lambda m, _: (_reference.mean(m), np.full(NUM, 1 / NUM)),
    ),
    'average': (
        lambda m, _: jaxsoup.average(m, ALPHA),
        lambda m, _: (_reference.mix(m, ALPHA), ALPHA),
    ),
    'interpolate': (
        lambda m, _: jaxsoup.interpolate(m[0], m[1], 0.25),
        lambda m, _: (_reference.interpolate(*m[:2], 0.25), QUARTER),
    ),
    'greedy': (
        lambda m, _: jaxsoup.greedy(m, score),
        _expected_search(_reference.greedy),
    ),
    'pruned': (
        lambda m, _: jaxsoup.pruned(m, score),
        _expected_search(_reference.pruned),
    ),
    'model_stock': (jaxsoup.model_stock, _expected_stock),
    'learned': (_learned, None),
    'running_average': (
        _running,
        lambda m, _: (
            _reference.mix(m, ALPHA / sum(ALPHA)),
            ALPHA / sum(ALPHA),
        ),
    ),
}


def assert_rounded_once(actual, exact):
  """Within half a unit in the last place, and float32's own error."""
  half = float(jnp.finfo(actual.dtype).eps) / 2
  slack = 1e-6 * (1 + np.abs(exact))
  error = np.abs(np.float64(actual) - exact)
  np.testing.assert_array_less(error, half * np.abs(exact) + slack)


def assert_alike(tree, template):
  """The container, dtypes and shardings of one ingredient."""
  assert type(tree) is type(template)
  assert jax.tree.structure(tree) == jax.tree.structure(template)
  for x, like in zip(jax.tree.leaves(tree), jax.tree.leaves(template)):
    assert (x.shape, x.dtype) == (like.shape, like.dtype)
    assert x.sharding.is_equivalent_to(like.sharding, x.ndim)


@pytest.mark.parametrize(
    'recipe, container, dtype, placement',
    _pairwise.product(
        RECIPES,
        CONTAINERS,
        ('float32', 'bfloat16', 'float16'),
        ('one', 'auto', 'explicit'),
    ),
    indirect=['placement'],
)
def test_recipe(recipe, container, dtype, placement):
  run, expected_of = RECIPES[recipe]
  make = lambda model: CONTAINERS[container](*map(placement.put, model))
  start, models = values(NUM, dtype)
  theta_0, ingredients = make(start), [make(model) for model in models]
  soup = run(ingredients, theta_0)
  assert_alike(soup.params, ingredients[0])
  flat = [leaves_of(x) for x in ingredients]
  if expected_of is None:
    expected, alphas = _reference.mix(flat, soup.alpha), soup.alpha
    assert np.ptp(soup.alpha) > 1e-3  # It left the start.
    assert soup.alpha.sum() == pytest.approx(1, abs=1e-6)
  else:
    expected, alphas = expected_of(flat, leaves_of(theta_0))
  for x, exact in zip(leaves_of(soup.params), expected):
    assert_rounded_once(x, exact)
  for alpha, exact in zip(jax.tree.leaves(soup.alpha), jax.tree.leaves(alphas)):
    np.testing.assert_allclose(alpha, exact, atol=1e-5)


TRACED = {
    'uniform': lambda models, x: jaxsoup.uniform(models).params,
    'average': lambda models, x: jaxsoup.average(models, [x, 1 - x]).params,
    'average by group': lambda models, x: (
        jaxsoup.average(
            models, {'body': [x, 1 - x], 'scale': [1 - x, x]}
        ).params
    ),
    'interpolate': lambda models, x: jaxsoup.interpolate(*models, x).params,
    'curve': lambda models, x: (
        jaxsoup.interpolate(*models, jnp.stack([x, 2 * x])).params
    ),
    'model_stock': lambda models, x: (
        jaxsoup.model_stock(models, jax.tree.map(lambda y: x * y, models[0]))
    ).params,
    'stack': lambda models, x: jaxsoup.stack(models),
    'soup': lambda models, x: jaxsoup.average(models, [x, x]).alpha,
}


@pytest.mark.slow_variants
@pytest.mark.parametrize('name', TRACED)
def test_traced(name):
  """Under transformations a recipe is the function that it is without."""
  fn = TRACED[name]
  models = [linen(*map(jnp.asarray, m)) for m in values(2, 'float32')[1]]
  x = jnp.float32(0.3)
  close = lambda *trees: jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
      *trees,
  )
  expected = fn(models, x)
  close(jax.jit(fn)(models, x), expected)
  twice = jax.tree.map(lambda y: jnp.stack([y, 2 * y]), (models, x))
  mapped = jax.vmap(fn)(*twice)
  close(jax.tree.map(lambda y: y[0], mapped), expected)
  # Forward and reverse agree with each other and with a difference.
  total = lambda *args: sum(
      jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(fn(*args))
  )
  forward = jax.jacfwd(total, (0, 1))(models, x)
  close(jax.jacrev(total, (0, 1))(models, x), forward)
  difference = (total(models, x + 1e-2) - total(models, x - 1e-2)) / 2e-2
  np.testing.assert_allclose(forward[1], difference, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    'make',
    [
        lambda m: jaxsoup.uniform(m),
        lambda m: jaxsoup.average(m, {'body': [1, 0], 'scale': [0.5, 0.5]}),
        lambda m: jaxsoup.model_stock(m, m[1]),
        lambda m: jaxsoup.greedy(m, lambda params: 0.5),
    ],
)
def test_a_soup_is_a_pytree_of_its_parameters(make):
  models = [linen(*m) for m in values(2, 'float32')[1]]
  soup = make(models)
  assert jax.tree.structure(jax.tree.leaves(soup)) == jax.tree.structure(
      jax.tree.leaves(soup.params)
  )
  twice = lambda x: 2 * x
  for fn in (
      lambda s: jax.tree.map(twice, s),
      jax.jit(lambda s: jax.tree.map(twice, s)),
      lambda s: jax.tree.map(jnp.add, s, make(models)),
  ):
    double = fn(jax.device_put(soup))
    jax.tree.map(
        np.testing.assert_array_equal,
        double.params,
        jax.tree.map(twice, soup.params),
    )
    jax.tree.map(np.testing.assert_array_equal, double.alpha, soup.alpha)
    assert str(double.info) == str(soup.info)
  other = jaxsoup.average(models, [2, 3])
  with pytest.raises(ValueError):
    jax.tree.map(jnp.add, soup, other)
  seen = jax.jit(lambda s: jnp.asarray(jax.tree.leaves(s.alpha)[0]))
  np.testing.assert_array_equal(seen(soup), jax.tree.leaves(soup.alpha)[0])
  np.testing.assert_array_equal(seen(other), [2, 3])


def test_a_recipe_under_jit_returns_a_soup():
  models = [linen(*m) for m in values(2, 'float32')[1]]
  alpha = jnp.array([0.25, 0.75])
  soup = jax.jit(jaxsoup.average)(models, alpha)
  expected = jaxsoup.average(models, alpha)
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7),
      (soup.params, soup.alpha),
      (expected.params, expected.alpha),
  )
  assert soup.info == expected.info
  stock = jax.jit(jaxsoup.model_stock)(models, models[1])
  assert stock.info.ratio.keys() == {'body', 'scale'}


def test_what_is_static_is_checked_under_jit():
  models = [{'w': jnp.zeros(2)}, {'w': jnp.zeros(3)}]
  with pytest.raises(ValueError, match=r'shape \(3,\), expected \(2,\)'):
    jax.jit(lambda m: jaxsoup.uniform(m).params)(models)
  with pytest.raises(ValueError, match=r'shape \(3,\), but there are 2'):
    jax.jit(jaxsoup.average)([models[0]] * 2, jnp.zeros(3))


@pytest.mark.parametrize('alpha', [[1.0, np.nan], {'w': [np.inf, 0.0]}])
def test_alpha_is_finite(alpha):
  with pytest.raises(ValueError, match='expected finite numbers'):
    jaxsoup.average([{'w': np.ones(2, 'f4')}] * 2, alpha)
  with pytest.raises(ValueError, match='expected finite numbers'):
    jaxsoup.mix({'w': np.ones((2, 2), 'f4')}, alpha)


def test_float64_coefficients_are_not_rounded():
  rng = np.random.default_rng(0)
  models, alpha = rng.normal(size=(3, 50)), rng.dirichlet(np.ones(3))
  with _x64.x64():
    soup = jaxsoup.average([{'w': jnp.asarray(x)} for x in models], alpha)
    np.testing.assert_allclose(
        soup.params['w'], alpha @ models, rtol=1e-13, atol=1e-15
    )


def _learned_alone(models):
  tx = optax.sgd(0.1)
  return jaxsoup.learned(models, loss_fn, [np.float32(0)], tx=tx, num_epochs=1)


ALONE = {
    'uniform': jaxsoup.uniform,
    'average': lambda m: jaxsoup.average(m, [1.0]),
    'greedy': lambda m: jaxsoup.greedy(m, score),
    'pruned': lambda m: jaxsoup.pruned(m, score),
    'learned': _learned_alone,
    'model_stock': lambda m: jaxsoup.model_stock(m, linen(*values(1, 'f4')[0])),
}


@pytest.mark.parametrize('recipe', ALONE)
def test_one_ingredient_is_its_own_soup(recipe):
  model = linen(*values(1, 'float32')[1][0])
  soup = ALONE[recipe]([model])
  jax.tree.map(np.testing.assert_array_equal, soup.params, model)
  assert all(x.tolist() == [1.0] for x in jax.tree.leaves(soup.alpha))


@pytest.mark.parametrize('recipe', ALONE)
def test_no_ingredients(recipe):
  with pytest.raises(ValueError, match='empty.*at least one model'):
    ALONE[recipe]([])


@pytest.mark.parametrize('recipe', ALONE)
def test_a_generator_is_refused(recipe):
  model = linen(*values(1, 'float32')[1][0])
  with pytest.raises(TypeError, match=r'generator.*list\(it\)'):
    ALONE[recipe](m for m in [model])


@pytest.mark.parametrize('recipe', ['uniform', 'greedy', 'pruned', 'learned'])
def test_duplicates_are_named(recipe):
  _, models = values(2, 'float32')
  ingredients = [linen(*models[i]) for i in (0, 1, 0)]
  with pytest.warns(UserWarning, match='ingredient 0 and ingredient 2 have'):
    soup = ALONE[recipe](ingredients)
  assert soup.info.duplicates == ((0, 2),)


def test_duplicates_on_different_devices():
  models = [jax.device_put(np.ones(4), d) for d in jax.devices()[:2]]
  assert len(models) == 2
  with pytest.warns(UserWarning, match='have equal parameters'):
    assert jaxsoup.check_compatible(models) == ((0, 1),)


def test_duplicates_in_two_groups():
  models = [np.float32([k, 1]) for k in (3, 5, 3, 5, 3, 7)]
  with pytest.warns(UserWarning, match='equal') as caught:
    groups = jaxsoup.uniform(models).info.duplicates
  assert groups == ((0, 2, 4), (1, 3))
  assert len(caught) == 2


def test_bfloat16_mean_of_72_is_rounded_once():
  rng = np.random.default_rng(0)
  bfloat16 = jnp.dtype('bfloat16')
  models = [rng.normal(1, 0.1, 256).astype(bfloat16) for _ in range(72)]
  exact = np.mean(np.float64(models), axis=0)
  for soup in (
      jaxsoup.uniform(models),
      jaxsoup.average(models, np.full(72, 1 / 72)),
  ):
    params = np.asarray(soup.params)
    assert params.dtype == bfloat16
    error = np.abs(np.float64(params) - exact)
    assert (error <= np.abs(exact) * (2.0**-8 + 1e-6)).all()


def test_interpolate_curve_is_its_points(placement):
  theta_0, (theta_1,) = values(1, 'bfloat16')
  put = lambda model: [placement.put(x) for x in model]
  t = np.float32([-1, 0, 0.25, 1, 2])
  curve = jaxsoup.interpolate(put(theta_0), put(theta_1), t)
  assert curve.alpha.shape == (5, 2)
  for i, point in enumerate(t):
    expected = _reference.interpolate(theta_0, theta_1, point)
    for x, exact in zip(leaves_of(curve.params), expected):
      assert_rounded_once(x[i], exact)


def test_interpolate_repeats_non_floats():
  theta = {'step': np.int32(7), 'w': np.float32(1)}
  other = {'step': np.int32(7), 'w': np.float32(2)}
  curve = jaxsoup.interpolate(theta, other, [0.0, 1.0]).params
  assert curve['step'].tolist() == [7, 7]
  assert curve['w'].tolist() == [1.0, 2.0]


@pytest.mark.parametrize('dtype', ['uint8', 'bfloat16', 'float16'])
@pytest.mark.parametrize('is_traced', [False, True])
def test_interpolate_with_a_narrow_t(dtype, is_traced):
  t = jnp.array([0, 1, 2] if dtype == 'uint8' else [0.1, 0.9], dtype)
  run = lambda t: jaxsoup.interpolate(np.float32(1), np.float32(3), t)
  soup = (jax.jit(run) if is_traced else run)(t)
  exact = np.asarray(t, np.float32)
  np.testing.assert_array_equal(soup.alpha, np.stack([1 - exact, exact], -1))
  np.testing.assert_allclose(soup.params, 1 + 2 * exact, rtol=1e-6)


@pytest.mark.parametrize('t', [np.nan, np.inf, [0.0, np.nan], [[0.5]]])
def test_interpolate_refuses(t):
  with pytest.raises(ValueError, match='t has shape .* finite number'):
    jaxsoup.interpolate(np.zeros(2), np.ones(2), t)


def test_model_stock_info():
  start, models = values(4, 'float32')
  soup = jaxsoup.model_stock([linen(*m) for m in models], linen(*start))
  _, cosines, ratios = _reference.model_stock(models, start)
  info = jax.tree.leaves((soup.info.cosine, soup.info.ratio))
  np.testing.assert_allclose(info, [*cosines, *ratios], rtol=1e-4, atol=1e-6)
  assert jax.tree.structure(soup.info.ratio) == jax.tree.structure(
      linen(0, 0, 0)
  )


def test_model_stock_of_two_is_its_closed_form():
  angle = 0.7
  turned = [3 * np.cos(angle), 3 * np.sin(angle)]
  models = [np.float32([2, 0]), np.float32(turned)]
  soup = jaxsoup.model_stock(models, np.zeros(2, np.float32))
  cosine = np.cos(angle)
  ratio = 2 * cosine / (1 + cosine)
  np.testing.assert_allclose(soup.params, ratio * np.mean(models, 0), rtol=1e-5)


def test_model_stock_stays_where_models_disagree():
  models = [np.float32([1, 0]), np.float32([-3, 0])]
  soup = jaxsoup.model_stock(models, np.float32([0, 0]))
  assert soup.params.tolist() == [0, 0]
  assert (soup.info.cosine, soup.info.ratio) == (-1, 0)
  assert soup.alpha.tolist() == [0, 0]


def test_model_stock_leaves_unmoved_tensors():
  ones = np.ones(3, np.float32)
  start = {'a': ones, 'b': ones}
  models = [{'a': ones, 'b': ones + np.float32(k)} for k in (1, 2)]
  soup = jaxsoup.model_stock(models, start)
  assert soup.params['a'].tolist() == [1, 1, 1]
  assert soup.info.ratio['a'] == 1


def test_model_stock_counts_an_unmoved_task_vector_as_orthogonal():
  models = [np.float32([2, 0]), np.float32([0, 0]), np.float32([1, 0])]
  soup = jaxsoup.model_stock(models, np.float32([0, 0]))
  assert soup.info.cosine == pytest.approx(1 / 3)  # Of pairs 1, 0, 0.
  assert soup.info.ratio == pytest.approx(3 / 5)


def test_model_stock_names_theta_0():
  models = [{'w': np.ones(2, 'f4')}, {'w': np.zeros(2, 'f4')}]
  with pytest.raises(ValueError, match=r"theta_0 .* 'w' has shape \(3,\)"):
    jaxsoup.model_stock(models, {'w': np.zeros(3, 'f4')})


def test_average_skips_what_counts_nothing():
  class Lazy(list):

    def __getitem__(self, k):
      assert k != 1, 'ingredient 1 is not needed'
      return super().__getitem__(k)

  models = Lazy([np.float32(1), np.float32(2), np.float32(4)])
  assert jaxsoup.average(models, [0.5, 0.0, 0.5]).params == 2.5


def test_average_by_group():
  models = [{'a': np.float32(k), 'b': np.float32(k)} for k in (1, 3)]
  alpha = {'a': [1.0, 0.0], 'b': [0.25, 0.75]}
  soup = jaxsoup.average(models, alpha)
  assert (soup.params['a'], soup.params['b']) == (1.0, 2.5)
  assert soup.alpha['b'].tolist() == [0.25, 0.75]


@pytest.mark.parametrize('alpha', [[1.0], [[0.5, 0.5]], 1.0, {'w': [1.0]}])
def test_average_refuses_another_length(alpha):
  models = [{'w': np.float32(1)}, {'w': np.float32(2)}]
  with pytest.raises(ValueError, match=r'2 ingredients: expected \(2,\)'):
    jaxsoup.average(models, alpha)


@pytest.mark.parametrize('decay', [0.0, 0.5, 0.9])
def test_running_average_that_decays(decay):
  models = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
  average = jaxsoup.running_average(decay)
  state = average.init(models[0])
  started = average.update(state, models[0])
  for model in models:
    state = average.update(state, model)
    started = average.update(started, model, 1 - decay)
  weights = decay ** np.arange(5.0)[::-1]
  np.testing.assert_allclose(
      average.value(state), weights @ models / weights.sum(), rtol=1e-5
  )
  expected = trajectory.ema(range(6), decay=decay) @ [models[0], *models]
  np.testing.assert_allclose(average.value(started), expected, rtol=1e-5)


def test_running_average_of_a_window():
  models = np.random.default_rng(1).normal(size=(9, 3)).astype(np.float32)
  average = jaxsoup.running_average()
  state = average.init(models[0])
  for k, model in enumerate(models):
    state = average.update(state, model)
    if k >= 4:
      state = average.update(state, models[k - 4], -1.0)
  expected = models[-4:].mean(0)
  np.testing.assert_allclose(average.value(state), expected, rtol=1e-5)


def test_running_average_in_a_scan_is_saved_and_continued(tmp_path):
  models = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
  tree = lambda x: {'w': x, 'step': jnp.int32(7), 'key': jax.random.key(3)}
  average = jaxsoup.running_average()
  first = tree(jnp.asarray(models[0]))
  added = lambda state, x: (average.update(state, tree(x)), None)
  state, _ = jax.lax.scan(added, average.init(first), models[:4])
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', state)
    state = checkpointer.restore(tmp_path / 'state', average.init(first))
  state, _ = jax.lax.scan(added, state, models[4:])
  value = jax.jit(average.value)(state)
  np.testing.assert_allclose(value['w'], models.mean(0), rtol=1e-6)
  assert value['step'] == 7 and value['key'] == jax.random.key(3)
  gradient = jax.grad(
      lambda x: average.value(average.update(state, tree(x)))['w'].sum()
  )(jnp.zeros(3))
  np.testing.assert_allclose(gradient, np.full(3, 1 / 7), rtol=1e-6)


def test_running_average_refuses():
  average = jaxsoup.running_average()
  state = average.init({'w': np.zeros(2, 'f4')})
  with pytest.raises(ValueError, match='add up to 0: call update'):
    average.value(state)
  with pytest.raises(ValueError, match=r"leaf 'w' has shape \(3,\), expected"):
    jax.jit(average.update)(state, {'w': np.zeros(3, 'f4')})
  with pytest.raises(ValueError, match='decay is 1.5: expected a number from'):
    jaxsoup.running_average(1.5)
  with pytest.raises(ValueError, match='every is 0: expected start >= 0 and'):
    jaxsoup.running_average(every=0)
