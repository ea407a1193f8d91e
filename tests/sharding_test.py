"""On a mesh, with one set, and where no transfer is allowed."""

import functools
import re

import _pairwise
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

import jaxsoup
from jaxsoup import ensembles
from jaxsoup import evaluation
from jaxsoup import sharding
from jaxsoup._soup import LearnedPlan
from jaxsoup.plan import hlo

NUM = 3
COLLECTIVE = re.compile(
    'all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter'
)


def loss_of(params):
  leaves = jax.tree.leaves(params)
  return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in leaves)


def plain_mix(stacked, alpha):
  return {
      k: jnp.sum(jnp.reshape(alpha, (-1,) + (1,) * (x.ndim - 1)) * x, 0)
      for k, x in stacked.items()
  }


@pytest.fixture
def stacked(rng):
  return {
      'w': rng.normal(size=(NUM, 4, 8)).astype(np.float32),
      'b': rng.normal(size=(NUM, 4)).astype(np.float32),
  }


@pytest.fixture
def alpha():
  return np.float32([0.5, 0.75, -0.25])


# Placements of the stack: on the rows of a model, on its columns.
@pytest.mark.parametrize('axis', [1, 2])
@pytest.mark.parametrize('argnum', [0, 1])
def test_gradient_of_mix_on_a_mesh(on_mesh, stacked, alpha, axis, argnum):
  on_device = jax.tree.map(lambda x: on_mesh.put(x, axis), stacked)
  gradient = lambda f: jax.grad(lambda *args: loss_of(f(*args)), argnum)
  actual = jax.jit(gradient(jaxsoup.mix))(on_device, jax.device_put(alpha))
  expected = gradient(plain_mix)(stacked, alpha)
  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, actual, expected)
  if argnum == 0:
    for x, like in zip(jax.tree.leaves(actual), jax.tree.leaves(on_device)):
      assert x.sharding.is_equivalent_to(like.sharding, x.ndim)


@pytest.mark.parametrize(
    'derivative', [jax.jacfwd, jax.jacrev, jax.hessian, jax.jit, jax.vmap]
)
def test_transformations_of_mix(derivative, stacked, alpha):
  """Those of a bilinear function, against the plain sum."""

  def transformed(mix):
    if derivative in (jax.jit, jax.vmap):
      return derivative(mix)(*jax.tree.map(add_axis, (stacked, alpha)))
    fn = lambda *x: loss_of(mix(*x))
    return derivative(fn, (0, 1))(stacked, alpha)

  is_vmap = derivative is jax.vmap
  add_axis = lambda x: jnp.stack([x, 2 * x]) if is_vmap else x
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
      transformed(jaxsoup.mix),
      transformed(plain_mix),
  )


@pytest.mark.parametrize('is_by_group', [False, True])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_mix_needs_no_collective(on_mesh, stacked, alpha, dtype, is_by_group):
  put = lambda x: on_mesh.put(x.astype(jnp.dtype(dtype)), 1)
  on_device = jax.tree.map(put, stacked)
  alpha = jax.device_put({'w': alpha, 'b': alpha} if is_by_group else alpha)
  compiled = jax.jit(jaxsoup.mix).lower(on_device, alpha).compile()
  assert not COLLECTIVE.findall(compiled.as_text())


def test_gradient_needs_one_collective(on_mesh, stacked, alpha):
  """K inner products, each the sum of those of the devices."""
  on_device = jax.tree.map(lambda x: on_mesh.put(x, 1), stacked)
  gradient = jax.grad(lambda a, x: loss_of(jaxsoup.mix(x, a)))
  lowered = jax.jit(gradient).lower(jax.device_put(alpha), on_device)
  (traffic,) = hlo.collectives_of(lowered.compile().as_text()).items()
  # The inner products of all leaves together.
  num_bytes = len(on_device) * alpha.nbytes
  assert traffic == ('all-reduce', hlo.Traffic(1, num_bytes))


def temporaries(num, dtype):
  """Bytes that the gradient of a mix holds, without arguments and result."""
  stacked = {
      'w': jax.ShapeDtypeStruct((num, 64, 512), dtype),
      'b': jax.ShapeDtypeStruct((num, 4096), dtype),
  }
  gradient = jax.grad(lambda a, x: loss_of(jaxsoup.mix(x, a)))
  alpha = jax.ShapeDtypeStruct((num,), 'float32')
  compiled = jax.jit(gradient).lower(alpha, stacked).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow_variants
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_temporaries_do_not_grow_with_the_number_of_models(dtype):
  few, some, many = (temporaries(num, dtype) for num in (8, 32, 72))
  # A few bytes a model are [K] itself; a copy of its leaves would be 140 kB.
  assert abs(some - few) < 24 * 64
  assert abs(many - few) < 64 * 64


def test_fsdp_takes_the_largest_axis_that_fits(on_mesh):
  shapes = {'a': (4, 8), 'b': (8, 6), 'c': (3, 5), 'd': (), 'e': (4, 4)}
  tree = {k: jax.ShapeDtypeStruct(v, 'bfloat16') for k, v in shapes.items()}
  specs = {
      k: tuple(x.sharding.spec)
      for k, x in sharding.fsdp(tree, on_mesh.mesh, min_size=0).items()
  }
  assert specs == {
      'a': (None, 'fsdp'),
      'b': ('fsdp', None),
      'c': (None, None),
      'd': (),
      'e': (None, 'fsdp'),
  }


def test_fsdp_keeps_shape_and_dtype_of_arrays(on_mesh):
  (leaf,) = sharding.fsdp(
      [np.zeros((8, 2), np.float16)], on_mesh.mesh, min_size=0
  )
  assert (leaf.shape, leaf.dtype) == ((8, 2), np.float16)
  assert leaf.sharding.spec == PartitionSpec('fsdp', None)


@pytest.mark.parametrize(
    'min_size, num_sharded', [(0, 4), (33, 2), (64, 2), (65, 1)]
)
def test_fsdp_replicates_small_leaves(on_mesh, min_size, num_sharded):
  tree = [np.zeros(x, 'f') for x in ((64, 64), (8, 8), (4, 8), (8,), (3,))]
  leaves = sharding.fsdp(tree, on_mesh.mesh, min_size=min_size)
  is_sharded = [not x.sharding.is_fully_replicated for x in leaves]
  assert is_sharded == [i < num_sharded for i in range(5)]


def test_fsdp_replicates_biases_and_norms_of_a_transformer(on_mesh):
  shapes = {'kernel': (384, 384), 'bias': (3072,), 'embedding': (512, 128)}
  tree = {k: jax.ShapeDtypeStruct(v, 'float32') for k, v in shapes.items()}
  placed = sharding.fsdp(tree, on_mesh.mesh)
  assert [k for k, x in placed.items() if x.sharding.is_fully_replicated] == [
      'bias'
  ]


def test_fsdp_names_the_axes(on_mesh):
  with pytest.raises(ValueError, match="no axis 'model'.*'fsdp'.*axis=NAME"):
    sharding.fsdp({}, on_mesh.mesh, axis='model')


# --- Everything public, where little is allowed -------------------------------


def models_of(num=NUM):
  rng = np.random.default_rng(0)
  return [
      {
          'b': rng.normal(size=4).astype(np.float32),
          'w': rng.normal(size=(4, 8)).astype(np.float32),
      }
      for _ in range(num)
  ]


BATCH = {'x': np.ones((2, 4), np.float32), 'label': np.int32([0, 1])}


def logits_fn(params, batch):
  return batch['x'] @ params['w'] + params['b'].sum()


def is_right(params, batch):
  return logits_fn(params, batch).argmax(-1) == batch['label']


def model_loss(params, batch, beta):
  logits = beta * logits_fn(params, batch)
  labels = jax.nn.one_hot(batch['label'], 8)
  return optax.softmax_cross_entropy(logits, labels).mean()


def score(params) -> float:
  leaves = jax.tree.leaves(jax.device_get(params))
  return -float(sum(np.abs(x).sum() for x in leaves))


def learn(models, **options):
  options = {'tx': optax.sgd(0.5), 'num_epochs': 2, **options}
  return jaxsoup.learned(models, model_loss, [BATCH], **options)


def from_cached_logits(models):
  logits = ensembles.collect(models, logits_fn, [BATCH])
  ensembles.uniform(logits)
  return ensembles.greedy(logits, score)


ALPHA = [0.5, 0.75, -0.25]
PUBLIC = {
    'check_compatible': jaxsoup.check_compatible,
    'stack and mix': lambda m: jaxsoup.mix(jaxsoup.stack(m), ALPHA),
    'mix by group': lambda m: jaxsoup.mix(
        jaxsoup.stack(m), {'b': ALPHA, 'w': ALPHA}
    ),
    'uniform': jaxsoup.uniform,
    'average': lambda m: jaxsoup.average(m, np.full(NUM, 1 / NUM)),
    'interpolate': lambda m: jaxsoup.interpolate(m[0], m[1], 0.5),
    'curve': lambda m: jaxsoup.interpolate(m[0], m[1], np.linspace(0, 1, 3)),
    'greedy': lambda m: jaxsoup.greedy(m, score, num_passes=2),
    'pruned': lambda m: jaxsoup.pruned(m, score),
    'model_stock': lambda m: jaxsoup.model_stock(m, models_of(4)[-1]),
    'learned': learn,
    'learned by tensor': lambda m: learn(
        m,
        group_fn=lambda path: path,
        alpha_fn=jaxsoup.hyperplane,
        beta=2.0,
        val_batches=[BATCH],
        patience=1,
    ),
    'mean_of': lambda m: jaxsoup.greedy(
        m, evaluation.mean_of(is_right, evaluation.batched(BATCH, 1))
    ),
    'ensembles': from_cached_logits,
}
# A key is made where transfers are still allowed: it is the caller's.
KEYED = 'greedy by key'


def run(name, models, key=None):
  if name == KEYED:
    return jaxsoup.greedy(models, score, key=key)
  return PUBLIC[name](models)


@functools.cache
def expected_of(name):
  return jax.device_get(run(name, models_of(), jax.random.key(0)))


def assert_close(actual, expected):
  # How much memory is free changes from run to run.
  is_plan = lambda x: isinstance(x, LearnedPlan)

  def close(x, y):
    if not is_plan(x):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)

  jax.tree.map(close, _parts(actual), _parts(expected), is_leaf=is_plan)


def _parts(soup):
  if isinstance(soup, jaxsoup.Soup):
    soup = soup.params, soup.alpha, soup.info
  return jax.device_get(soup)


@pytest.mark.parametrize('where', ['host', 'device'])
@pytest.mark.parametrize('name', [*PUBLIC, KEYED])
def test_no_implicit_transfer(name, where):
  models, key = models_of(), jax.random.key(0)
  expected = expected_of(name)
  given = models if where == 'host' else jax.device_put(models)
  with jax.transfer_guard('disallow'):
    soup = run(name, given, key)
  assert_close(soup, expected)


@pytest.mark.parametrize(
    'name, where, on_mesh',
    _pairwise.product([*PUBLIC, KEYED], ['host', 'mesh'], ['auto', 'explicit']),
    indirect=['on_mesh'],
)
def test_with_a_mesh_set(name, where, on_mesh):
  models, key = models_of(), jax.random.key(0)
  expected = expected_of(name)
  needs_model = 'learned' in name or name in ('mean_of', 'ensembles')
  # Were the axis sharded that the model contracts, Explicit axes would ask its
  # author for an out_sharding. That is not ours to test.
  put = lambda x: on_mesh.put(x, axis=x.ndim - 1 if needs_model else 0)
  if where == 'mesh':
    models = jax.tree.map(put, models)
  with jax.set_mesh(on_mesh.mesh):
    soup = run(name, models, key)
  assert_close(soup, expected)


def test_the_first_rule_that_matches_shards_a_leaf():
  mesh = jax.make_mesh((2, 2), ('data', 'tensor'))
  shapes = {
      'mlp': {'kernel': jax.ShapeDtypeStruct((6, 4), 'float32')},
      'head': {'kernel': jax.ShapeDtypeStruct((4, 5), 'bfloat16')},
      'scale': jax.ShapeDtypeStruct((), 'float32'),
  }
  rules = [
      ('^mlp/', PartitionSpec('data', 'tensor')),
      ('kernel$', PartitionSpec('tensor', None)),
      ('mlp', PartitionSpec()),
  ]
  placed = sharding.by_rules(shapes, mesh, rules)
  spec_of = lambda x: tuple(x.sharding.spec)
  assert spec_of(placed['mlp']['kernel']) == ('data', 'tensor')
  assert spec_of(placed['head']['kernel']) == ('tensor', None)
  assert spec_of(placed['scale']) == ()
  assert placed['head']['kernel'].dtype == 'bfloat16'
  with pytest.raises(ValueError, match=r"'head/kernel' of shape \(4, 5\)"):
    sharding.by_rules(shapes, mesh, [('kernel', PartitionSpec(None, 'data'))])
  twice = PartitionSpec('data', 'data')
  with pytest.raises(ValueError, match="'data'.*does not fit leaf 'mlp/kernel"):
    sharding.by_rules(shapes, mesh, [('mlp', twice)])
