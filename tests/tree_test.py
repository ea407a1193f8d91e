"""The algebra of trees: check, stack, mix, prefix trees of alpha."""

import dataclasses
from typing import Any
from typing import NamedTuple

import _reference
from _x64 import x64
from flax import nnx
import hypothesis
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoup
from jaxsoup import _mixing
from jaxsoup import _tree

NUM = 3
FLOATS = st.floats(-4, 4, width=32, allow_subnormal=False)
VECTOR = st_np.arrays(np.float32, 5, elements=FLOATS)
MODELS = st.lists(VECTOR, min_size=NUM, max_size=NUM)
ALPHA = st_np.arrays(np.float32, NUM, elements=FLOATS)
TOLERANCE = 1e-4

# Equal models are drawn on purpose, and warned of.
quiet = pytest.mark.filterwarnings('ignore:.*equal parameters:UserWarning')


def mixed(models, alpha):
  return np.asarray(jaxsoup.mix({'w': np.stack(models)}, alpha)['w'])


# --- Algebra ------------------------------------------------------------------


@hypothesis.given(MODELS, ALPHA)
def test_mix_is_the_sum(models, alpha):
  (expected,) = _reference.mix([[m] for m in models], alpha)
  np.testing.assert_allclose(mixed(models, alpha), expected, atol=TOLERANCE)


@quiet
@hypothesis.given(MODELS, st.integers(0, NUM - 1))
def test_one_hot_returns_the_ingredient(models, k):
  stacked = jaxsoup.stack([{'w': m} for m in models])
  model = jaxsoup.mix(stacked, np.eye(NUM)[k])
  np.testing.assert_array_equal(model['w'], models[k])


@pytest.mark.parametrize('count', [1, NUM])
@pytest.mark.parametrize('is_weighted', [False, True])
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32', 'float64'])
def test_sums_of_numpy_are_those_of_jax(dtype, is_weighted, count, rng):
  """The two ways to add up: sums are equal, the rest within one rounding."""
  dtype = jnp.dtype(dtype)
  models = list(rng.normal(size=(NUM, 1000)).astype(dtype))
  with x64():
    wide = _tree.wide_dtype(dtype)
    given = rng.normal(size=NUM).astype(wide) if is_weighted else [None] * NUM
    total, product = np.empty((2, 1000), wide)
    _mixing.host_mean(zip(given, models), count, total, product)
    total_of_jax = None
    for weight, model in zip(given, models):
      weight = _tree.numbers(1.0 if weight is None else weight)
      total_of_jax = _mixing.add(total_of_jax, [jnp.asarray(model)], weight)
    (actual,) = _mixing.rounded(total_of_jax, _tree.numbers(count), (dtype,))
    assert actual.dtype == dtype and total_of_jax[0].dtype == wide
  expected = total.astype(dtype)
  weights = np.ones(NUM) if given[0] is None else np.float64(given)
  scale = np.abs(weights) @ np.abs(np.float64(models)) / count
  # XLA fuses products into sums, and divides by way of a reciprocal.
  is_exact = not is_weighted and count == 1
  most = 0 if is_exact else scale * float(jnp.finfo(dtype).eps)
  difference = np.abs(np.float64(actual) - np.float64(expected))
  assert (difference <= most).all()
  (exact,) = _reference.mix([[m] for m in models], weights)
  error = np.abs(np.float64(expected) - exact / count)
  assert (error <= 2 * scale * float(jnp.finfo(dtype).eps)).all()


# --- Prefix trees -------------------------------------------------------------

KEY = st.sampled_from('abc')
PATHS = st.lists(
    st.lists(KEY, min_size=1, max_size=3).map(tuple), min_size=1, unique=True
).filter(
    lambda paths: not any(
        p != q and p == q[: len(p)] for p in paths for q in paths
    )
)
NUM_KEYS = st.sampled_from([0, 1, 2, 9])


@hypothesis.given(PATHS, NUM_KEYS)
def test_alphas_of_finds_the_group(paths, num_keys):
  groups = _tree.groups_of(paths, lambda path: path[:num_keys])
  numbered = {g: np.float32([i]) for i, g in enumerate(sorted(set(groups)))}
  alphas = _tree.alphas_of(_tree.nest(numbered), paths)
  for group, alpha in zip(groups, alphas):
    assert alpha == numbered[group]


@hypothesis.given(PATHS)
def test_nest_is_the_inverse_of_flatten(paths):
  values = {path: np.float32(i) for i, path in enumerate(paths)}
  flat = _tree.flatten(_tree.nest(values))
  assert dict(zip(flat.paths, flat.leaves)) == values


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
  query: Any
  key: Any
  value: Any


def test_a_field_may_be_called_value(rng):
  models = [
      {'attention': Attention(*rng.normal(size=(3, 4)).astype(np.float32))}
      for _ in range(2)
  ]
  assert [path[-1] for path in _tree.flatten(models[0]).paths] == [
      'query',
      'key',
      'value',
  ]
  soup = jaxsoup.model_stock(models, models[0])
  assert soup.alpha['attention'].keys() == {'query', 'key', 'value'}
  again = jaxsoup.average(
      models, {'attention': {'query': [1, 0], 'key': [0, 1], 'value': [0, 1]}}
  )
  np.testing.assert_array_equal(
      again.params['attention'].query, models[0]['attention'].query
  )
  np.testing.assert_array_equal(
      again.params['attention'].value, models[1]['attention'].value
  )


def test_an_entry_of_alpha_may_stand_beside_integers():
  models = [{'w': np.float32([k]), 'table': np.int8([3])} for k in (1, 3)]
  for alpha in ({'w': [0.5, 0.5]}, {'w': [0.5, 0.5], 'table': [1, 0]}):
    for params in (
        jaxsoup.average(models, alpha).params,
        jaxsoup.mix(jaxsoup.stack(models), alpha),
    ):
      assert (params['w'].item(), params['table'].item()) == (2, 3)
  with pytest.raises(ValueError, match=r"entries \['other'\] that match no"):
    jaxsoup.average(models, {'w': [0.5, 0.5], 'other': [1, 0]})


@pytest.mark.parametrize('dtype', ['float4_e2m1fn', 'float8_e4m3fn', 'float16'])
def test_narrow_floats(dtype):
  models = [{'w': jnp.array(x, dtype)} for x in ([1, 2, 0.5], [2, 4, -0.5])]
  for params in (
      jaxsoup.uniform(models).params,
      jaxsoup.mix(jaxsoup.stack(models), [0.5, 0.5]),
  ):
    assert params['w'].dtype == dtype
    assert params['w'].astype(np.float32).tolist() == [1.5, 3, 0]


@pytest.mark.parametrize(
    'run',
    [
        jaxsoup.uniform,
        jaxsoup.check_compatible,
        lambda m: jaxsoup.greedy(m, lambda params: 0.0),
    ],
)
def test_a_warning_points_at_the_caller(run):
  with pytest.warns(UserWarning, match='equal parameters') as warned:
    run([np.ones(2, 'f4'), np.ones(2, 'f4')])
  assert warned[0].filename == __file__


def test_mix_by_prefix_tree():
  stacked = {
      'body': {'w': np.float32([1, 3]), 'b': np.float32([0, 4])},
      'head': [np.float32([10, 20]), np.float32([1, 2])],
  }
  alpha = {'body': [0.5, 0.5], 'head': {'0': [1, 0], '1': [-1, 1]}}
  model = jaxsoup.mix(stacked, alpha)
  assert jax.tree.leaves(jax.tree.map(float, model)) == [2, 2, 10, 1]


class Pair(NamedTuple):
  first: Any
  second: Any


def test_alpha_as_a_namedtuple_of_arrays():
  stacked = Pair(np.float32([1, 2]), np.float32([1, 2]))
  alpha = {'first': [1, 0], 'second': [0, 1]}
  assert tuple(map(float, jaxsoup.mix(stacked, alpha))) == (1, 2)


def test_alpha_of_one_recipe_serves_another():
  """What `learned` and `model_stock` return is what `mix` takes."""
  models = [nnx.Linear(2, 3, rngs=nnx.Rngs(k)) for k in range(3)]
  states = [nnx.state(m, nnx.Param) for m in models]
  alpha = jaxsoup.model_stock(models, models[0]).alpha
  for ingredients in (models, states):
    soup = jaxsoup.average(ingredients, alpha).params
    again = jaxsoup.mix(jaxsoup.stack(ingredients), alpha)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), soup, again
    )


@pytest.mark.parametrize(
    'alpha, message',
    [
        ({'a': [1, 0]}, "no entry for leaf 'b/c'; its entries are .*'a'"),
        ({'a': [1, 0], 'x': [1, 0]}, "no entry for leaf 'b/c'"),
        ({'a': [1, 0], 'b': [1, 0], 'x': [1, 0]}, "'x'.* match no leaf"),
        ([1, 0, 0], r'alpha has shape \(3,\) and leaf .a. has shape \(2,\)'),
        (0.5, r'alpha has shape \(\) .*expected \[K\] and \[K, ...\]'),
        ({'a': [1, 0], 'b': [[1, 0]]}, r'shape \(1, 2\) and leaf .b/c.'),
    ],
)
def test_mix_refuses_an_alpha(alpha, message):
  stacked = {'a': np.float32([1, 2]), 'b': {'c': np.float32([1, 2])}}
  with pytest.raises(ValueError, match=message):
    jaxsoup.mix(stacked, alpha)


def test_mix_refuses_what_is_not_stacked():
  with pytest.raises(ValueError, match=r'Stack the ingredients'):
    jaxsoup.mix({'w': np.float32(1)}, [0.5, 0.5])
  with pytest.raises(ValueError, match="'step' is not stacked"):
    jaxsoup.mix({'w': np.ones((2, 3), 'f'), 'step': np.int32(3)}, [0.5, 0.5])


# --- Gradients ----------------------------------------------------------------


def plain_mix(stacked, alpha):
  return jax.tree.map(lambda x: jnp.einsum('k,k...->...', alpha, x), stacked)


def loss_of(params):
  return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(params))


def test_gradient_in_a_prefix_tree(rng):
  stacked = {k: rng.normal(size=(NUM, 4)).astype(np.float32) for k in 'ab'}
  alpha = {k: jnp.float32(rng.normal(size=NUM)) for k in 'ab'}
  gradient = jax.grad(lambda a: loss_of(jaxsoup.mix(stacked, a)))(alpha)
  for k in 'ab':
    plain = jax.grad(lambda a, k=k: loss_of(plain_mix(stacked[k], a)))(alpha[k])
    np.testing.assert_allclose(gradient[k], plain, rtol=1e-5)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_gradient_in_low_precision_is_summed_in_float32(rng, dtype):
  values = rng.normal(1, 0.01, size=(2, 4096)).astype(jnp.dtype(dtype))
  total = lambda a: jaxsoup.mix(values, a).astype(jnp.float32).sum()
  gradient = jax.grad(total)(jnp.float32([0.5, 0.5]))
  assert gradient.dtype == np.float32
  np.testing.assert_allclose(gradient, np.float64(values).sum(1), rtol=1e-5)


def test_gradient_passes_a_second_transformation(rng):
  stacked = rng.normal(size=(2, NUM, 4)).astype(np.float32)
  alpha = jnp.ones(NUM) / NUM
  gradient = jax.grad(lambda a, x: loss_of(jaxsoup.mix(x, a)))
  rows = jax.vmap(gradient, (None, 0))(alpha, stacked)
  for row, x in zip(rows, stacked):
    np.testing.assert_allclose(row, gradient(alpha, x), rtol=1e-5)


# --- Checks -------------------------------------------------------------------

SAME = 'Only models of the same architecture'


@pytest.mark.parametrize(
    'first, other, message',
    [
        (
            {'a': {'w': np.zeros((2, 3), np.float32)}},
            {'a': {'w': np.zeros((2, 4), np.float32)}},
            r"ingredient 1 .*'a/w' has shape \(2, 4\), expected \(2, 3\)\. "
            + SAME,
        ),
        (
            {'w': np.zeros(2, np.float32)},
            {'w': np.zeros(2, np.float16)},
            "'w' has dtype float16, expected float32.* Cast one of them",
        ),
        (
            {'w': np.float32(0), 'b': np.float32(0)},
            {'w': np.float32(0)},
            "leaf 'b' is missing.*" + SAME,
        ),
        (
            {'w': np.float32(0)},
            {'w': np.float32(0), 'b': {'c': np.float32(0)}},
            "leaf 'b/c' is unexpected.*" + SAME,
        ),
        (
            [np.float32(0)],
            [np.float32(np.nan)],
            "ingredient 1 has NaN or infinite values in leaf '0'.*leave it out",
        ),
        (
            {'a': np.float32(0), 'b': np.float32(0)},
            {'a': np.float32(np.inf), 'b': np.float32(-np.inf)},
            "infinite values in leaf 'a' and 1 more",
        ),
        (
            {'w': np.float32(0), 'codes': np.int8([100])},
            {'w': np.float32(0), 'codes': np.int8([50])},
            r"ingredient 1: leaf 'codes' of dtype int8 is \[50\], but \[100\] "
            'in the first ingredient.*quantized weights have to be converted',
        ),
    ],
)
def test_mismatches_are_named(first, other, message):
  for run in (
      jaxsoup.check_compatible,
      jaxsoup.stack,
      jaxsoup.uniform,
      lambda m: jaxsoup.greedy(m, lambda params: 0.0),
  ):
    with pytest.raises(ValueError, match=message):
      run([first, other])


def test_many_mismatches_are_counted():
  first = {str(i): np.zeros(2, 'f4') for i in range(9)}
  other = {str(i): np.zeros(3, 'f4') for i in range(9)}
  with pytest.raises(ValueError, match=r'\(and 4 more\)'):
    jaxsoup.check_compatible([first, other])


def test_the_first_may_be_the_one_that_is_not_finite():
  with pytest.raises(ValueError, match='ingredient 0 has NaN'):
    jaxsoup.uniform([np.float32(np.nan), np.float32(0)])


@pytest.mark.parametrize('leaf', ['adamw', object(), None.__class__])
def test_what_is_no_array(leaf):
  with pytest.raises(TypeError, match="Leaf 'tx' is a .* parameters only"):
    jaxsoup.uniform([{'tx': leaf}, {'tx': leaf}])


@pytest.mark.parametrize(
    'ingredients', [{'w': np.zeros((2, 3))}, iter([]), {1, 2}, None, 5]
)
def test_ingredients_must_be_a_sequence(ingredients):
  with pytest.raises(TypeError, match=r'sequence of pytrees.* list\(it\)'):
    jaxsoup.check_compatible(ingredients)


def with_state(k):
  return {
      'w': np.float32(k),
      'step': np.int32(10 * k),
      'key': jax.random.key(k),
      'old_key': jax.random.PRNGKey(k),
      'is_on': np.bool_(True),
      'table': np.arange(3),
  }


def test_state_is_that_of_the_first_ingredient():
  models = [with_state(k) for k in (1, 2, 0)]
  worst = lambda params: -float(params['w'])
  soups = {
      1: [
          jaxsoup.uniform(models),
          jaxsoup.average(models, [0.5, 0.25, 0.25]),
          jaxsoup.greedy(models, lambda params: 0.0),
          jaxsoup.interpolate(*models[:2], 0.5),
          jaxsoup.model_stock(models, with_state(5)),
      ],
      2: [jaxsoup.average(models, [0, 1, 1])],
      0: [jaxsoup.pruned(models, worst)],
  }
  for k, soups_of_k in soups.items():
    for params in [soup.params for soup in soups_of_k]:
      assert params['step'] == 10 * k
      assert params['old_key'].tolist() == [0, k]
      assert (params['key'] == jax.random.key(k)).all()
      assert params['is_on'] and params['table'].tolist() == [0, 1, 2]
  stacked = jaxsoup.stack(models)
  assert stacked['step'].tolist() == [10] * 3
  assert jaxsoup.mix(stacked, [0.5, 0.5, 0])['step'] == 10


def test_state_does_not_depend_on_what_a_log_spares():
  models = [with_state(k) for k in range(3)]
  eval_fn = lambda params: -abs(float(params['w']) - 1.5)
  log: dict[tuple[int, ...], float] = {}
  first = jaxsoup.greedy(models, eval_fn, scores=log).params
  again = jaxsoup.greedy(models, eval_fn, scores=log).params
  assert first['step'] == again['step'] == 10


class WithState(nnx.Module):

  def __init__(self, rngs):
    self.linear = nnx.Linear(3, 4, rngs=rngs)
    self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.dropout(self.norm(self.linear(x)))


def test_whole_models_in_and_out(rng):
  x = rng.normal(size=(5, 3)).astype(np.float32)
  models = [WithState(nnx.Rngs(seed)) for seed in range(3)]
  for k, model in enumerate(models):
    for _ in range(k):
      model(x)  # Moves counters and running statistics.
    model.eval()
  soups = [jaxsoup.uniform([nnx.state(m) for m in models]).params]
  soups.append(nnx.state(jaxsoup.uniform([*models]).params))
  for soup in soups:
    assert soup['dropout']['rngs']['count'][...] == 0
    kernel = np.mean([m.linear.kernel[...] for m in models], 0)
    mean = np.mean([m.norm.mean[...] for m in models], 0)
    var = np.mean([m.norm.var[...] for m in models], 0)
    model = nnx.merge(nnx.graphdef(models[0]), soup)
    np.testing.assert_allclose(
        model(x),
        (x @ kernel - mean) / np.sqrt(var + 1e-5),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize('dtype', ['int8', 'uint8', 'int32', 'bool', 'uint32'])
def test_integers_and_booleans_must_be_equal(dtype):
  models = [{'w': np.float32(k), 'x': np.eye(2, dtype=dtype)} for k in (1, 2)]
  assert jaxsoup.uniform(models).params['x'].tolist() == [[1, 0], [0, 1]]
  models[1]['x'] = (1 - np.eye(2)).astype(dtype)
  with pytest.raises(ValueError, match="(?s)leaf 'x' of dtype .* but "):
    jaxsoup.uniform(models)


def test_duplicates_are_found_but_not_permutations():
  models = [np.float32(x) for x in ([1, 2, 3], [3, 2, 1], [1, 2, 3], [4, 4, 4])]
  with pytest.warns(UserWarning, match='ingredient 0 and ingredient 2'):
    assert jaxsoup.check_compatible(models) == ((0, 2),)
  assert jaxsoup.check_compatible(models[:2]) == ()


def test_container_metadata_do_not_matter():
  """Two States with other metadata, or listed in another order."""
  plain = nnx.State({'a': nnx.Param(jnp.ones(2)), 'b': nnx.Param(jnp.ones(2))})
  other = nnx.State(
      {
          'b': nnx.Param(jnp.zeros(2), note='fine-tuned'),
          'a': nnx.Param(3 * jnp.ones(2)),
      }
  )
  params = jaxsoup.uniform([plain, other]).params
  assert [x.tolist() for x in jax.tree.leaves(params)] == [[2, 2], [0.5, 0.5]]


def test_float64_and_complex_stay_wide():
  with x64():
    for dtype in ('float64', 'complex64', 'complex128'):
      models = [np.array([1 / 3], dtype) * k for k in (1, 2)]
      params = jaxsoup.uniform(models).params
      assert params.dtype == dtype
      tolerance = 1e-6 if dtype == 'complex64' else 1e-15
      np.testing.assert_allclose(params, np.mean(models, 0), rtol=tolerance)


def test_stack_keeps_every_row(placement, rng):
  models = [rng.normal(size=(4, 3)).astype(np.float16) for _ in range(5)]
  stacked = jaxsoup.stack([{'w': placement.put(m)} for m in models])['w']
  np.testing.assert_array_equal(stacked, models)
  expected = placement.put(np.stack(models), axis=1).sharding
  assert stacked.sharding.is_equivalent_to(expected, stacked.ndim)
