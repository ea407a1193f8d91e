"""Checkpoints of every layout, laziness, damage, and soups on disk."""

import functools
import gc
import json
import pathlib
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import optax
import orbax.checkpoint as ocp
from orbax.checkpoint import v1
import pytest

import jaxsoup
from jaxsoup import _memory
from jaxsoup import checkpoints
from jaxsoup import sharding
from jaxsoup.checkpoints import _checkpoint
from jaxsoup.checkpoints import _orbax

# After a read that failed, threads of Orbax may still call into its event loop,
# which is closed by then: a warning, at any later moment.
pytestmark = pytest.mark.filterwarnings(
    'ignore::pytest.PytestUnraisableExceptionWarning'
)


@pytest.fixture(scope='module', autouse=True)
def collected():
  yield
  gc.collect()


def params_of(seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {
      'body': {'kernel': normal(8, 4), 'bias': normal(4)},
      'head': {'kernel': normal(4, 3)},
  }


def abstract_of(params, dtype=None):
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), params
  )


def assert_equal(got, expected):
  got, expected = (
      jax.tree_util.tree_leaves_with_path(t) for t in (got, expected)
  )
  assert len(got) == len(expected)
  for (got_path, x), (path, y) in zip(got, expected):
    assert got_path == path and x.dtype == y.dtype
    np.testing.assert_array_equal(jax.device_get(x), jax.device_get(y))


@pytest.fixture
def runs(tmp_path):
  """Three runs that we saved."""
  paths = [tmp_path / f'run{k}' for k in range(3)]
  for k, path in enumerate(paths):
    checkpoints.save(path, params_of(k), metadata={'seed': k})
  return paths


def save_v1(path, tree):
  (getattr(v1, 'save', None) or v1.save_pytree)(path, tree)


def save_standard(path, tree):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, tree)


def save_manager(path, tree):
  with ocp.CheckpointManager(path) as manager:
    for step in (2, 10):
      scaled = jax.tree.map(lambda x, s=step: (x * s).astype(x.dtype), tree)
      manager.save(step, args=ocp.args.StandardSave(scaled))
    manager.wait_until_finished()


WRITERS = {
    'own': checkpoints.save,
    'v0': lambda path, tree: ocp.PyTreeCheckpointer().save(path, tree),
    'standard': save_standard,
    'v1': save_v1,
}


# --- Layouts ------------------------------------------------------------------


@pytest.mark.parametrize('writer', WRITERS)
def test_layouts(tmp_path, writer):
  params = params_of()
  WRITERS[writer](tmp_path / 'run', params)
  for abstract_params in (None, abstract_of(params)):
    ingredients = checkpoints.Ingredients([tmp_path / 'run'], abstract_params)
    assert_equal(ingredients[0], params)


@pytest.mark.parametrize('writer', WRITERS)
def test_params_inside_a_train_state(tmp_path, writer):
  params = params_of()
  opt_state = {
      'mu': jax.tree.map(np.zeros_like, params),
      'nu': jax.tree.map(np.ones_like, params),
      'count': np.array(7, np.int32),
  }
  state = {'step': np.array(7, np.int32), 'params': params, 'opt': opt_state}
  WRITERS[writer](tmp_path / 'run', state)
  for abstract_params in (None, abstract_of(params)):
    ingredients = checkpoints.Ingredients([tmp_path / 'run'], abstract_params)
    assert_equal(ingredients[0], params)


def _save_state(folder, state):
  """The same train state as Orbax and as safetensors."""
  return [
      checkpoints.save(folder / 'orbax', state),
      checkpoints.save(folder / 'state.safetensors', state),
  ]


@pytest.mark.parametrize(
    'ema, model', [('ema_params', 'model'), ('ema/params', 'params')]
)
def test_parameters_in_several_places_are_an_error(tmp_path, ema, model):
  trees = {ema: params_of(0), model: params_of(1)}
  state: dict = {'opt_state': {'mu': params_of(2), 'nu': params_of(3)}}
  for name, tree in trees.items():
    *outer, last = name.split('/')
    functools.reduce(lambda d, k: d.setdefault(k, {}), outer, state)[
        last
    ] = tree
  abstract = abstract_of(params_of())
  for path in _save_state(tmp_path, state):
    with pytest.raises(ValueError, match='in several places') as e:
      checkpoints.Ingredients([path], abstract)[0]
    assert ema in str(e.value) and model in str(e.value)
    assert 'item=' in str(e.value) and '--item' in str(e.value)
    for name, tree in trees.items():
      ingredients = checkpoints.Ingredients([path], abstract, item=name)
      assert_equal(ingredients[0], tree)
      assert_equal(ingredients.unsharded()[0], tree)
      assert_equal(checkpoints.Ingredients([path], item=name)[0], tree)
      assert len(checkpoints.Arrays(path, item=name)) == 3
    with pytest.raises(
        ValueError, match="no item 'other'; it holds .*opt_state"
    ):
      checkpoints.Ingredients([path], abstract, item='other')[0]


@pytest.mark.parametrize(
    'state, expected',
    [
        ({'params': 1, 'ema_params': 0}, 'params'),
        ({'model': 1, 'opt_state': {'0': {'mu': 0, 'nu': 2}}}, 'model'),
        ({'ema': 0, 'state': {'params': 1}}, 'state/params'),
        ({'optimizer': 1}, 'optimizer'),
        ({'body': 'own', 'head': 'own', 'ema': 0}, ''),
    ],
)
def test_what_is_meant_among_several_places(tmp_path, state, expected):
  filled = jax.tree.map(
      lambda x: x if isinstance(x, str) else params_of(x), state
  )
  filled |= {k: params_of(1)[k] for k, x in state.items() if x == 'own'}
  for path in _save_state(tmp_path, filled):
    read = checkpoints.Ingredients([path], abstract_of(params_of()))
    assert_equal(read[0], params_of(1))


def test_places_of_other_shapes_do_not_count(tmp_path):
  wider = jax.tree.map(lambda x: np.tile(x, 2), params_of(0))
  state = {'teacher': wider, 'student': params_of(1)}
  for path in _save_state(tmp_path, state):
    read = checkpoints.Ingredients([path], abstract_of(params_of()))
    assert_equal(read[0], params_of(1))


def test_a_subtree_of_an_item(tmp_path):
  state = {'ema': params_of(0), 'model': params_of(1)}
  for item in ('state', 'other'):
    checkpoints.save(tmp_path / 'run' / '3' / item, state)
  abstract = abstract_of(params_of())
  for k, name in enumerate(state):
    ingredients = checkpoints.Ingredients(
        [tmp_path / 'run'], abstract, item=f'state/{name}'
    )
    assert_equal(ingredients[0], params_of(k))
  with pytest.raises(ValueError, match='ema and model'):
    checkpoints.Ingredients([tmp_path / 'run'], abstract, item='state')[0]


def test_run_directory_gives_the_latest_step(tmp_path):
  params = params_of()
  save_manager(tmp_path / 'run', params)
  latest = checkpoints.Ingredients([tmp_path / 'run'], abstract_of(params))
  assert latest.paths == (str(tmp_path / 'run/10/default'),)
  np.testing.assert_array_equal(
      latest[0]['body']['bias'], params['body']['bias'] * 10
  )
  step = checkpoints.Ingredients([tmp_path / 'run/2'], abstract_of(params))
  np.testing.assert_array_equal(
      step[0]['body']['bias'], params['body']['bias'] * 2
  )


def test_steps_are_compared_as_numbers(tmp_path):
  for step in ('step_9', 'step_10'):
    checkpoints.save(tmp_path / 'run' / step, params_of())
  ingredients = checkpoints.Ingredients([tmp_path / 'run'])
  assert ingredients.paths == (str(tmp_path / 'run/step_10'),)


def test_step_with_several_items(tmp_path):
  params, ema = params_of(0), params_of(1)
  with ocp.CheckpointManager(tmp_path / 'run') as manager:
    items = ocp.args.Composite(
        raw=ocp.args.StandardSave(params), ema=ocp.args.StandardSave(ema)
    )
    manager.save(3, args=items)
    manager.wait_until_finished()
  for item, expected in (('raw', params), ('ema', ema)):
    ingredients = checkpoints.Ingredients([tmp_path / 'run'], item=item)
    assert_equal(ingredients[0], expected)
  with pytest.raises(
      ValueError, match=r"several checkpoints: \['ema', 'raw'\]"
  ):
    checkpoints.Ingredients([tmp_path / 'run'])


class Net(nnx.Module):

  def __init__(self, rngs):
    self.dense_in = nnx.Linear(4, 6, rngs=rngs)
    self.dense_out = nnx.Linear(6, 2, rngs=rngs)


def pure(state):
  return nnx.to_pure_dict(state)


@pytest.mark.parametrize('writer', ('own', 'v0', 'standard'))
def test_nnx_state(tmp_path, writer):
  state = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
  WRITERS[writer](tmp_path / 'run', state)
  abstract_state = nnx.state(
      nnx.eval_shape(lambda: Net(nnx.Rngs(0))), nnx.Param
  )
  read_state = checkpoints.Ingredients([tmp_path / 'run'], abstract_state)[0]
  assert isinstance(read_state, nnx.State)
  assert_equal(pure(read_state), pure(state))
  nnx.update(Net(nnx.Rngs(1)), read_state)
  # The 'value' keys of what Orbax stores are no part of the names.
  assert_equal(checkpoints.Ingredients([tmp_path / 'run'])[0], pure(state))


@pytest.mark.parametrize('writer', WRITERS)
def test_lists_inside(tmp_path, writer):
  params = {'layers': [np.ones(2, np.float32), np.zeros(3, np.float32)]}
  WRITERS[writer](tmp_path / 'run', params)
  restored = checkpoints.Ingredients([tmp_path / 'run'], abstract_of(params))[0]
  assert isinstance(restored['layers'], list)
  assert_equal(restored, params)


def test_a_subtree_is_enough(tmp_path):
  checkpoints.save(tmp_path / 'run', params_of())
  wanted = {'head': abstract_of(params_of())['head']}
  head = checkpoints.Ingredients([tmp_path / 'run'], wanted)[0]
  assert_equal(head, {'head': params_of()['head']})


# --- Dtypes and meshes --------------------------------------------------------


def test_dtype_that_is_asked_for(runs):
  abstract_params = abstract_of(params_of(), jnp.bfloat16)
  params = checkpoints.Ingredients(runs, abstract_params)[0]
  expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of())
  assert_equal(params, expected)


@pytest.mark.parametrize('dtype', (jnp.bfloat16, jnp.float16, jnp.float32))
def test_dtypes_come_back(tmp_path, dtype):
  params = jax.tree.map(lambda x: x.astype(dtype), params_of())
  params['scalar'] = np.asarray(2.5, dtype)
  checkpoints.save(tmp_path / 'run', params)
  assert_equal(checkpoints.Ingredients([tmp_path / 'run'])[0], params)


def test_orbax_checkpoint_of_four_devices_is_read_on_one(tmp_path):
  mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(AxisType.Auto,))
  abstract_params = sharding.fsdp(abstract_of(params_of()), mesh, min_size=0)
  spread = jax.tree.map(
      lambda x, a: jax.device_put(x, a.sharding), params_of(), abstract_params
  )
  save_standard(tmp_path / 'run', spread)
  assert_equal(checkpoints.Ingredients([tmp_path / 'run'])[0], params_of())


def test_reading_while_a_mesh_is_set(runs, on_mesh):
  mesh = on_mesh.mesh
  abstract_params = sharding.fsdp(abstract_of(params_of()), mesh, min_size=0)
  with jax.set_mesh(mesh), jax.transfer_guard('disallow'):
    models = list(checkpoints.Ingredients(runs, abstract_params))
  for k, params in enumerate(models):
    assert_equal(params, params_of(k))


# --- Laziness -----------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
  """The checkpoints whose arrays were read, in order."""
  seen = []
  original = _checkpoint.Checkpoint.stored_reader

  def stored_reader(self, name):
    read = original(self, name)

    def read_and_tell(index):
      run = pathlib.Path(self.source.metadata.path).name
      if run not in seen:
        seen.append(run)
      return read(index)

    return read_and_tell

  monkeypatch.setattr(_checkpoint.Checkpoint, 'stored_reader', stored_reader)
  return seen


def test_nothing_is_read_before_it_is_used(runs, reads):
  ingredients = checkpoints.Ingredients(runs, abstract_of(params_of()))
  assert len(ingredients) == 3
  ingredients.metadata(1), ingredients.identity(2)
  assert reads == []
  ingredients[-1]
  assert reads == ['run2']


def test_next_one_is_read_while_the_present_one_is_used(runs, reads):
  ingredients = checkpoints.Ingredients(runs)
  walk = iter(ingredients)
  next(walk)
  ingredients._reader.submit(lambda: None).result(timeout=60)
  assert reads == ['run0', 'run1']
  assert_equal(next(walk), params_of(1))
  assert_equal(next(walk), params_of(2))
  assert reads == ['run0', 'run1', 'run2']
  with pytest.raises(StopIteration):
    next(walk)


def test_recipes_prefetch_too(runs, reads):
  ingredients = checkpoints.Ingredients(runs)
  seen = []

  def eval_fn(params):
    ingredients._reader.submit(lambda: None).result(timeout=60)
    seen.append(list(reads))
    return 0.0

  jaxsoup.greedy(ingredients, eval_fn, order=[0, 1, 2])
  assert seen[0] == ['run0', 'run1']


def test_coefficients_of_zero_are_not_read(runs, reads):
  jaxsoup.average(checkpoints.Ingredients(runs), [0.0, 1.0, 0.0])
  assert reads == ['run1']


def test_a_prefetch_that_was_not_wanted_is_dropped(runs):
  ingredients = checkpoints.Ingredients(runs)
  ingredients.prefetch(1)
  assert_equal(ingredients[2], params_of(2))
  assert_equal(ingredients[1], params_of(1))


def test_error_of_a_prefetch_comes_when_it_is_asked_for(tmp_path, runs):
  checkpoints.save(tmp_path / 'other', {'w': np.ones(2, np.float32)})
  ingredients = checkpoints.Ingredients(
      [runs[0], tmp_path / 'other'], abstract_of(params_of())
  )
  ingredients.prefetch(1)  # Fails in the background: nothing is raised yet.
  with pytest.raises(ValueError, match='lacks leaf'):
    ingredients[1]
  assert_equal(ingredients[0], params_of(0))


def test_is_a_sequence(runs):
  ingredients = checkpoints.Ingredients(runs)
  assert_equal(ingredients[-1], params_of(2))
  assert len(ingredients[1:]) == 2
  assert_equal(list(reversed(ingredients))[0], params_of(2))
  with pytest.raises(IndexError):
    ingredients[3]


@pytest.mark.parametrize('writer', [w for w in WRITERS if w != 'own'])
def test_metadata_needs_no_array(tmp_path, writer):
  params = {
      'w': np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32),
      'b': np.ones(3, jnp.bfloat16),
  }
  WRITERS[writer](tmp_path / 'run', params)
  # The values are here; the other files are the index of the leaves.
  for folder in list((tmp_path / 'run').rglob('ocdbt.process_0')):
    shutil.rmtree(folder)
  metadata = checkpoints.metadata(tmp_path / 'run')
  shapes = {'/'.join(p): (x.shape, x.dtype) for p, x in metadata.leaves.items()}
  assert shapes == {'b': ((3,), jnp.bfloat16), 'w': ((64, 64), np.float32)}
  with pytest.raises(ValueError, match='run.* cannot be read: .*damaged'):
    checkpoints.Ingredients([tmp_path / 'run'])[0]


@pytest.mark.parametrize('size', [0, 3, 100])
def test_a_file_of_another_size_is_seen_at_once(tmp_path, size):
  checkpoints.save(tmp_path / 'run', {'b': np.ones(3, jnp.bfloat16)})
  (tmp_path / 'run/b/0').write_bytes(b'x' * size)
  with pytest.raises(ValueError, match=f'has {size} bytes, expected 6'):
    checkpoints.metadata(tmp_path / 'run')


# --- What does not work, and how it is said -----------------------------------


def test_unfinished_checkpoints(tmp_path, runs):
  unfinished = tmp_path / 'run' / '20.orbax-checkpoint-tmp'
  shutil.copytree(runs[0], unfinished)
  with pytest.raises(FileNotFoundError, match='run holds only an unfinished'):
    checkpoints.Ingredients([tmp_path / 'run'])
  with pytest.raises(FileNotFoundError, match='unfinished checkpoint'):
    checkpoints.Ingredients([unfinished])
  shutil.copytree(runs[1], tmp_path / 'run' / '10')
  with pytest.warns(UserWarning, match='20.orbax.*unfinished .* skipped'):
    ingredients = checkpoints.Ingredients([tmp_path / 'run'])
  assert ingredients.paths == (str(tmp_path / 'run/10'),)


def test_missing_paths(tmp_path, runs):
  with pytest.raises(
      FileNotFoundError, match='rum0 does not exist.*run0, run1'
  ):
    checkpoints.Ingredients([tmp_path / 'rum0'])
  with pytest.raises(FileNotFoundError, match='Nor does'):
    checkpoints.Ingredients([tmp_path / 'no' / 'run'])
  (tmp_path / 'empty').mkdir()
  with pytest.raises(FileNotFoundError, match='holds no Orbax checkpoint'):
    checkpoints.Ingredients([tmp_path / 'empty'])


def test_several_checkpoints_under_one_path(tmp_path):
  for name in ('red', 'green'):
    checkpoints.save(tmp_path / 'runs' / name, params_of())
  with pytest.raises(ValueError, match=r"\['green', 'red'\].*item=NAME"):
    checkpoints.Ingredients([tmp_path / 'runs'])


def test_one_path_in_place_of_a_list(runs):
  for path in (str(runs[0]), runs[0]):
    with pytest.raises(TypeError, match='must be a list of paths'):
      checkpoints.Ingredients(path)


def test_missing_leaf_and_wrong_shape(runs):
  abstract_params = abstract_of(params_of())
  abstract_params['tail'] = {'bias': jax.ShapeDtypeStruct((2,), np.float32)}
  with pytest.raises(ValueError, match="run0 lacks leaf 'tail/bias'; it holds"):
    checkpoints.Ingredients(runs, abstract_params)[0]
  abstract_params = abstract_of(params_of())
  abstract_params['head']['kernel'] = jax.ShapeDtypeStruct((4, 7), np.float32)
  with pytest.raises(
      ValueError, match=r"'head/kernel' has shape \(4, 3\), exp"
  ):
    checkpoints.Ingredients(runs, abstract_params)[0]


def test_save_overwrites_nothing(runs):
  before = checkpoints.provenance(runs[0])
  with pytest.raises(FileExistsError, match='run0 exists'):
    checkpoints.save(runs[0], params_of(1))
  assert checkpoints.provenance(runs[0]) == before
  assert_equal(checkpoints.Ingredients(runs)[0], params_of(0))


def test_what_cannot_be_saved(tmp_path):
  with pytest.raises(ValueError, match='Orbax would confuse leaves'):
    params = {'a.b': np.ones(2), 'a': {'b': np.zeros(2)}}
    checkpoints.save(tmp_path / 'run', params)
  for params in (np.ones(2), {'': 1.0}, {'../x': 1.0}, {'a/../b': 1.0}):
    with pytest.raises(ValueError, match='cannot be the name of a directory'):
      checkpoints.save(tmp_path / 'run', params)
  with pytest.raises(TypeError, match="'key' is a PRNG key"):
    checkpoints.save(tmp_path / 'run', {'key': jax.random.key(0)})
  with pytest.raises(TypeError, match='cannot be stored as JSON'):
    checkpoints.save(tmp_path / 'run', params_of(), metadata={'x': object()})
  assert not list(tmp_path.iterdir())


def test_other_values_under_our_checksums_are_named(runs, monkeypatch):
  original = _checkpoint.Checkpoint.stored_reader

  def stored_reader(self, name):
    def read(index):
      piece = np.array(original(self, name)(index))
      if name == ('body', 'bias'):
        piece.view(np.uint8)[3] ^= 1
      return piece

    return read

  monkeypatch.setattr(_checkpoint.Checkpoint, 'stored_reader', stored_reader)
  with pytest.raises(ValueError, match="Leaf 'body/bias' of .*run0 is damaged"):
    checkpoints.Ingredients(runs)[0]


# --- Identity and provenance --------------------------------------------------


def test_content_hash(tmp_path, runs):
  checkpoints.save(tmp_path / 'copy', params_of(0))
  changed = params_of(0)
  changed['body']['bias'][0] = np.nextafter(changed['body']['bias'][0], 9)
  checkpoints.save(tmp_path / 'changed', changed)
  ingredients = checkpoints.Ingredients(
      [runs[0], runs[1], tmp_path / 'copy', tmp_path / 'changed']
  )
  first, other, copy, almost = map(ingredients.content_hash, range(4))
  assert first == copy
  assert len({first, other, almost}) == 3
  assert first == checkpoints.provenance(runs[0])['content_hash']


@pytest.mark.parametrize('writer', WRITERS)
def test_identity_changes_when_written_anew(tmp_path, writer):
  path = tmp_path / 'run'
  WRITERS[writer](path, params_of(0))
  before = checkpoints.Ingredients([path]).identity(0)
  assert checkpoints.Ingredients([path]).identity(0) == before
  shutil.rmtree(path)
  WRITERS[writer](path, params_of(1))
  assert checkpoints.Ingredients([path]).identity(0) != before


def test_provenance(tmp_path, runs):
  ingredients = checkpoints.Ingredients(runs)
  metadata = {
      'recipe': 'uniform',
      'nested': {'list': [1, 2.5, None]},
      'like ours': {'__type__': 'tuple', 'x': 1},
  }
  path = checkpoints.save(
      tmp_path / 'soup',
      jaxsoup.uniform(ingredients),
      ingredients=ingredients,
      metadata=metadata,
  )
  own = checkpoints.provenance(path)
  assert [row['path'] for row in own['ingredients']] == list(map(str, runs))
  assert [row['content_hash'] for row in own['ingredients']] == [
      ingredients.content_hash(k) for k in range(3)
  ]
  assert own['metadata'] == metadata
  assert own['versions']['jax'] == jax.__version__
  assert own['versions']['jaxsoup'] == jaxsoup.__version__
  assert isinstance(own['command'], list) and own['time'].startswith('20')


def test_others_have_no_provenance(tmp_path):
  save_standard(tmp_path / 'run', params_of())
  assert checkpoints.provenance(tmp_path / 'run') == {}
  with pytest.raises(ValueError, match='but not a soup'):
    checkpoints.load(tmp_path / 'run')


# --- Soups --------------------------------------------------------------------


def eval_fn(params):
  """A score with an optimum inside the hull of the ingredients."""
  return -float(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params)))


def loss_fn(params, batch, beta):
  x = jnp.tanh(batch @ params['body']['kernel'] + params['body']['bias'])
  return jnp.square(beta * (x @ params['head']['kernel'])).mean()


BATCHES = [np.full((2, 8), 0.1, np.float32), np.full((2, 8), -0.2, np.float32)]


def learned(ingredients, num_keys):
  return jaxsoup.learned(
      ingredients,
      loss_fn,
      BATCHES,
      tx=optax.sgd(0.5),
      num_epochs=2,
      group_fn=lambda path: path[:num_keys],
      val_batches=BATCHES[:1],
  )


RECIPES = {
    'uniform': jaxsoup.uniform,
    'average': lambda x: jaxsoup.average(x, np.array([0.2, 0.5, 0.3])),
    'greedy': lambda x: jaxsoup.greedy(x, eval_fn),
    'pruned': lambda x: jaxsoup.pruned(x, eval_fn),
    'learned': lambda x: learned(x, 0),
    'learned by block': lambda x: learned(x, 1),
    'learned by tensor': lambda x: learned(x, 9),
    'model_stock': lambda x: jaxsoup.model_stock(x, params_of(9)),
}


def assert_same_fields(got, expected):
  """Equal in types and values, NamedTuples field for field."""
  if isinstance(expected, dict):
    assert got.keys() == expected.keys()
    for key in expected:
      assert_same_fields(got[key], expected[key])
  elif isinstance(expected, (tuple, list)):
    assert type(got) is type(expected) and len(got) == len(expected)
    for x, y in zip(got, expected):
      assert_same_fields(x, y)
  elif hasattr(expected, 'dtype') and hasattr(got, 'dtype'):
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)
  else:
    assert got == expected


@pytest.mark.parametrize('recipe', RECIPES)
def test_soups_come_back_as_they_were(tmp_path, runs, recipe):
  ingredients = checkpoints.Ingredients(runs)
  soup = RECIPES[recipe](ingredients)
  path = checkpoints.save(tmp_path / 'soup', soup, ingredients=ingredients)
  loaded = checkpoints.load(path)
  assert_equal(loaded.params, soup.params)
  assert_same_fields(loaded.alpha, soup.alpha)
  assert_same_fields(loaded.info, soup.info)


@pytest.mark.parametrize('recipe', RECIPES)
def test_recipes_on_checkpoints_equal_those_on_a_list(
    monkeypatch, runs, recipe
):
  # What is free changes while the test runs, and is part of a plan.
  monkeypatch.setattr(_memory, 'free_bytes', lambda device: 10**9)
  lazy = RECIPES[recipe](
      checkpoints.Ingredients(runs, abstract_of(params_of()))
  )
  listed = RECIPES[recipe]([params_of(k) for k in range(3)])
  # A compiler may round `sum + alpha theta` once, the streamed sum does twice.
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, atol=1e-7),
      lazy.params,
      listed.params,
  )
  assert_same_fields(lazy.alpha, listed.alpha)
  assert_same_fields(lazy.info, listed.info)


def test_soup_of_nnx_states_loads_into_a_state(tmp_path):
  states = [nnx.state(Net(nnx.Rngs(seed)), nnx.Param) for seed in range(2)]
  soup = jaxsoup.uniform(states)
  path = checkpoints.save(tmp_path / 'soup', soup)
  loaded = checkpoints.load(path, states[0])
  assert isinstance(loaded.params, nnx.State)
  assert_equal(pure(loaded.params), pure(soup.params))


def test_any_orbax_reads_our_soups(tmp_path, runs):
  soup = jaxsoup.greedy(checkpoints.Ingredients(runs), eval_fn)
  path = pathlib.Path(checkpoints.save(tmp_path / 'soup', soup))
  assert_equal(ocp.PyTreeCheckpointer().restore(path), soup.params)
  assert_equal(checkpoints.Ingredients([path, runs[0]])[0], soup.params)
  stored = json.loads((path / '_CHECKPOINT_METADATA').read_text())
  assert 'jaxsoup' in stored['custom_metadata']


def test_paths_in_buckets_are_not_taken_for_local_ones(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert str(_orbax.absolute('gs://bucket/runs/00')) == 'gs://bucket/runs/00'
  assert str(_orbax.absolute('runs/00')) == str(tmp_path / 'runs' / '00')
