"""Soups in the layout of their ingredients: the owner's own restore finds them.

Each layout is saved twice and restored by the calls that its owner's users
write, and the soup is compared with the mean by NumPy.
"""

import json
import os
import pathlib

from flax import nnx
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from orbax.checkpoint import v1
import pytest
from typer import testing

import jaxsoup
from jaxsoup import checkpoints
from jaxsoup import cli
from jaxsoup.checkpoints import _orbax_files
from jaxsoup.checkpoints import _resumable
from jaxsoup.experiments import stopping
from jaxsoup.runtime import preemption

# Orbax says it where a restore is not told on which devices.
pytestmark = pytest.mark.filterwarnings('ignore:Sharding info not provided')


def soup(folder: pathlib.Path, *options: str) -> str:
  """What `jaxsoup soup uniform` says of the two runs in a folder."""
  runs = [str(folder / f'run{k}') for k in range(2)]
  command = ['soup', 'uniform', *runs, '--out', str(folder / 'soup'), *options]
  result = testing.CliRunner().invoke(cli.app, command)
  assert result.exit_code == 0, result.output
  return result.output


def assert_mean(actual, trees):
  """Compares by NumPy, whatever the container is."""
  first, other = trees
  assert jax.tree.structure(actual) == jax.tree.structure(first)
  for a, x, y in zip(*map(jax.tree.leaves, (actual, first, other))):
    assert isinstance(a, (jax.Array, np.ndarray))
    assert a.dtype == x.dtype
    expected = np.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.floating):
      wide = np.asarray(x, np.float32) + np.asarray(y, np.float32)
      expected = (wide / 2).astype(x.dtype)
    np.testing.assert_array_equal(np.asarray(a), expected)


def abstract_of(tree):
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)
  return jax.tree.map(shape, tree)


def params_of(seed):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {
      'layers': {'kernel': draw(3, 4, 5).astype(jnp.bfloat16)},
      'list': [draw(2), draw(3)],
      'scale': draw(),
  }


class State(train_state.TrainState):
  batch_stats: dict
  dynamic_scale: None = None


def state_of(seed):
  """As of flax's imagenet example, after one step."""
  params = params_of(seed)
  state = State.create(
      apply_fn=lambda: 0,
      params=params,
      tx=optax.adamw(0.1),
      batch_stats={'norm': {'mean': params['list'][0] + 1}},
  )
  state = state.apply_gradients(grads=params)
  return state.replace(step=jnp.asarray(state.step))


def manager_of(folder, **options):
  return ocp.CheckpointManager(folder, **options)


# --- Managers and steps -------------------------------------------------------


def test_a_manager_finds_the_step(tmp_path):
  trees = [{'params': params_of(k)} for k in range(2)]
  for k, tree in enumerate(trees):
    with manager_of(tmp_path / f'run{k}') as manager:
      manager.save(100 + k, args=ocp.args.StandardSave(tree))
  soup(tmp_path)
  with manager_of(tmp_path / 'soup') as manager:
    step = manager.latest_step()
    assert step == 101
    args = ocp.args.StandardRestore(abstract_of(trees[0]))
    assert_mean(manager.restore(step, args=args), trees)
    assert_mean(manager.restore(step), trees)


def test_items_of_a_step(tmp_path):
  """As Tunix saves: parameters and the optimizer apart, and JSON."""
  names = ('model_params', 'optimizer_state', 'notes')
  trees = [params_of(k) for k in range(2)]
  for k, tree in enumerate(trees):
    with manager_of(tmp_path / f'run{k}', item_names=names) as manager:
      args = ocp.args.Composite(
          model_params=ocp.args.PyTreeSave(tree),
          optimizer_state=ocp.args.PyTreeSave({'mu': tree}),
          notes=ocp.args.JsonSave({'tokenizer': 'sp'}),
      )
      manager.save(7, args=args, custom_metadata={'lr': 0.1})
  assert 'Left out: item optimizer_state.' in soup(tmp_path)
  with manager_of(tmp_path / 'soup', item_names=names) as manager:
    args = ocp.args.Composite(
        model_params=ocp.args.PyTreeRestore(
            trees[0],
            restore_args=ocp.checkpoint_utils.construct_restore_args(
                abstract_of(trees[0])
            ),
        ),
        notes=ocp.args.JsonRestore(),
    )
    restored = manager.restore(manager.latest_step(), args=args)
    assert_mean(restored.model_params, trees)
    assert restored.notes == {'tokenizer': 'sp'}
    custom = manager.metadata(7).custom_metadata
    assert custom['lr'] == 0.1 and 'jaxsoup' in custom


def test_all_items_of_a_step(tmp_path):
  names = ('model_params', 'optimizer_state')
  trees = [params_of(k) for k in range(2)]
  for k, tree in enumerate(trees):
    with manager_of(tmp_path / f'run{k}', item_names=names) as manager:
      args = ocp.args.Composite(
          model_params=ocp.args.StandardSave(tree),
          optimizer_state=ocp.args.StandardSave({'mu': tree}),
      )
      manager.save(7, args=args)
  assert 'Left out' not in soup(tmp_path, '--whole')
  with manager_of(tmp_path / 'soup', item_names=names) as manager:
    args = ocp.args.Composite(
        model_params=ocp.args.StandardRestore(abstract_of(trees[0])),
        optimizer_state=ocp.args.StandardRestore(abstract_of({'mu': trees[0]})),
    )
    restored = manager.restore(7, args=args)
  assert_mean(restored.model_params, trees)
  assert_mean(restored.optimizer_state['mu'], trees)
  # One of the items is an ingredient again, verified.
  again = checkpoints.Ingredients([tmp_path / 'soup'])[0]
  np.testing.assert_array_equal(again['scale'], restored.model_params['scale'])


def test_an_item_that_nothing_can_read(tmp_path):
  trees = [params_of(k) for k in range(2)]
  for k, tree in enumerate(trees):
    v1.save_checkpointables(tmp_path / f'run{k}', {'state': tree})
    (tmp_path / f'run{k}/other').mkdir()
    (tmp_path / f'run{k}/other/_METADATA').touch()
  soup(tmp_path)
  abstract = {'state': abstract_of(trees[0])}
  restored = v1.load_checkpointables(tmp_path / 'soup', abstract)['state']
  assert_mean(restored, trees)


@pytest.mark.parametrize('is_checkpointables', [False, True])
def test_orbax_v1(tmp_path, is_checkpointables):
  trees = [params_of(k) for k in range(2)]
  for k, tree in enumerate(trees):
    if is_checkpointables:
      v1.save_checkpointables(tmp_path / f'run{k}', {'model': tree})
    else:
      (getattr(v1, 'save', None) or v1.save_pytree)(tmp_path / f'run{k}', tree)
  soup(tmp_path)
  if is_checkpointables:
    abstract = {'model': abstract_of(trees[0])}
    restored = v1.load_checkpointables(tmp_path / 'soup', abstract)['model']
  else:
    load = getattr(v1, 'load', None) or v1.load_pytree
    restored = load(tmp_path / 'soup', abstract_of(trees[0]))
  assert_mean(restored, trees)


def test_a_step_keeps_its_place_in_the_run(tmp_path):
  trees = [params_of(k) for k in range(2)]
  for k, tree in enumerate(trees):
    options = ocp.CheckpointManagerOptions(step_prefix='ckpt')
    folder = tmp_path / f'run{k}/checkpoints'
    with manager_of(folder, options=options) as manager:
      manager.save(9, args=ocp.args.StandardSave(tree))
  soup(tmp_path)
  folder = tmp_path / 'soup/checkpoints'
  with manager_of(folder, options=options) as manager:
    assert_mean(manager.restore(manager.latest_step()), trees)


def test_metrics_are_those_of_no_soup(tmp_path):
  trees = [params_of(k) for k in range(2)]
  options = ocp.CheckpointManagerOptions(best_fn=lambda x: x['acc'])
  with manager_of(tmp_path / 'run', options=options) as manager:
    for k, tree in enumerate(trees):
      args = ocp.args.StandardSave(tree)
      manager.save(k, args=args, metrics={'acc': float(k)})
  ingredients = checkpoints.Ingredients(
      [tmp_path / 'run/1', tmp_path / 'run/0']
  )
  made = jaxsoup.uniform(ingredients)
  path = tmp_path / 'soup'
  checkpoints.save(path, made, ingredients=ingredients)
  with pytest.raises(ValueError, match="no metric 'acc'"):
    checkpoints.metric(path, 'acc')
  with manager_of(path, options=options) as manager:
    assert manager.metrics(1) is None and manager.latest_step() == 1
    assert_mean(manager.restore(1), trees)


# --- Trees --------------------------------------------------------------------


def test_nnx_as_its_guide_saves_it(tmp_path):
  make = lambda k: nnx.Sequential(
      nnx.Linear(2, 3, rngs=nnx.Rngs(k)),
      nnx.BatchNorm(3, rngs=nnx.Rngs(k)),
      nnx.Dropout(0.5, rngs=nnx.Rngs(k)),
  )
  models = [make(k) for k in range(2)]
  with ocp.StandardCheckpointer() as checkpointer:
    for k, model in enumerate(models):
      checkpointer.save(
          tmp_path / f'run{k}', nnx.split(model, nnx.RngState, ...)[2]
      )
  soup(tmp_path)
  abstract = nnx.eval_shape(lambda: make(0))
  graphdef, _, state = nnx.split(abstract, nnx.RngState, ...)
  with ocp.StandardCheckpointer() as checkpointer:
    restored = checkpointer.restore(tmp_path / 'soup', state)
  expected = [nnx.split(model, nnx.RngState, ...)[2] for model in models]
  assert_mean(restored, expected)


def test_keys_are_the_first_run_s(tmp_path):
  """Of a scanned stack there is one for each layer."""
  trees = [
      {'w': params_of(k), 'keys': jax.random.split(jax.random.key(k), 3)}
      for k in range(2)
  ]
  with ocp.StandardCheckpointer() as checkpointer:
    for k, tree in enumerate(trees):
      checkpointer.save(tmp_path / f'run{k}', tree)
  soup(tmp_path)
  with ocp.StandardCheckpointer() as checkpointer:
    restored = checkpointer.restore(tmp_path / 'soup', abstract_of(trees[0]))
  assert_mean(restored['w'], [tree['w'] for tree in trees])
  assert jnp.array_equal(restored['keys'], trees[0]['keys'])


def test_a_train_state_keeps_its_statistics(tmp_path):
  states = [state_of(k) for k in range(2)]
  for k, state in enumerate(states):
    with manager_of(tmp_path / f'run{k}') as manager:
      manager.save(1, args=ocp.args.StandardSave(state))
  said = soup(tmp_path)
  assert 'Left out: opt_state (9 arrays), step (1 array).' in said
  with manager_of(tmp_path / 'soup') as manager:
    restored = manager.restore(1)
  assert restored.pop('dynamic_scale') is None
  expected = [
      {'params': s.params, 'batch_stats': s.batch_stats} for s in states
  ]
  assert_mean(restored, expected)


def test_a_whole_train_state(tmp_path):
  states = [state_of(k) for k in range(2)]
  for k, state in enumerate(states):
    with manager_of(tmp_path / f'run{k}') as manager:
      manager.save(1, args=ocp.args.StandardSave(state))
  assert 'Left out' not in soup(tmp_path, '--whole')
  with manager_of(tmp_path / 'soup') as manager:
    args = ocp.args.StandardRestore(abstract_of(states[0]))
    restored = manager.restore(1, args=args)
  assert_mean(restored, states)
  restored.apply_gradients(grads=restored.params)  # Training goes on.


def test_parameters_two_levels_down(tmp_path):
  """As MaxText saves and loads them."""
  states = [
      {
          'params': {'params': params_of(k)},
          'opt_state': {'mu': {'params': params_of(k + 2)}},
          'step': jnp.int32(5),
      }
      for k in range(2)
  ]
  for k, state in enumerate(states):
    with manager_of(tmp_path / f'run{k}', item_names=('items',)) as manager:
      args = ocp.args.PyTreeSave(state, custom_metadata={'scan': True})
      manager.save(5, args=ocp.args.Composite(items=args))
  soup(tmp_path)
  wanted = {'params': abstract_of(states[0]['params'])}
  checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
  restored = checkpointer.restore(
      tmp_path / 'soup/5/items',
      args=ocp.args.PyTreeRestore(
          wanted,
          restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
          partial_restore=True,
      ),
  )
  assert_mean(restored['params'], [state['params'] for state in states])
  content = json.loads((tmp_path / 'soup/5/items/_METADATA').read_text())
  assert content['custom_metadata'] == {'scan': True}


@pytest.mark.parametrize('selected', ['ema_params', 'opt_state/ema'])
def test_a_moving_average_takes_the_place_of_the_parameters(tmp_path, selected):
  emas = [params_of(k + 5) for k in range(2)]
  for k, ema in enumerate(emas):
    state = {'params': params_of(k), 'opt_state': {'mu': params_of(k + 2)}}
    if selected == 'ema_params':
      state['ema_params'] = ema
    else:
      state['opt_state']['ema'] = ema
    ocp.PyTreeCheckpointer().save(tmp_path / f'run{k}', state)
  said = soup(tmp_path, '--select', selected)
  restored = ocp.PyTreeCheckpointer().restore(tmp_path / 'soup')
  assert restored.keys() == {'params'}
  assert 'Left out:' in said and 'opt_state' in said
  assert_mean(restored['params'], emas)


def test_a_soup_in_memory_is_written_so_too(tmp_path):
  states = [state_of(k) for k in range(2)]
  paths = [tmp_path / f'run{k}' for k in range(2)]
  for path, state in zip(paths, states):
    with manager_of(path) as manager:
      manager.save(3, args=ocp.args.StandardSave(state))
  abstract = jax.eval_shape(lambda: params_of(0))
  ingredients = checkpoints.Ingredients(paths, abstract)
  made = jaxsoup.greedy(ingredients, lambda params: 1.0)
  path = checkpoints.save(tmp_path / 'soup', made, ingredients=ingredients)
  with manager_of(tmp_path / 'soup') as manager:
    restored = manager.restore(3)
  assert_mean(restored['params'], [state.params for state in states])
  loaded = checkpoints.load(path, abstract)
  assert_mean(loaded.params, [state.params for state in states])
  assert loaded.info.accepted == made.info.accepted


@pytest.mark.parametrize('num_rows', [1, 5, 7, 64])
def test_arrays_in_several_files(tmp_path, monkeypatch, num_rows):
  row_bytes = 3 * 4
  monkeypatch.setattr(
      'jaxsoup.checkpoints._orbax_files._CHUNK_BYTES', num_rows * row_bytes
  )
  trees = [
      {'w': np.random.default_rng(k).normal(size=(13, 3)).astype(np.float32)}
      for k in range(2)
  ]
  for k, tree in enumerate(trees):
    checkpoints.save(tmp_path / f'run{k}', tree)
  files = list((tmp_path / 'run0/w').glob('*.0'))
  assert len(files) == -(-13 // num_rows)
  soup(tmp_path)
  assert_mean(ocp.PyTreeCheckpointer().restore(tmp_path / 'soup'), trees)
  assert_mean(jax.device_get(checkpoints.load(tmp_path / 'soup').params), trees)


@pytest.mark.parametrize(
    'dtype',
    ['bool', 'int8', 'uint16', 'int64', 'float16', 'float64', 'complex64']
    + ['bfloat16', 'float8_e4m3fn', 'float8_e5m2'],
)  # fmt: skip
def test_dtypes(tmp_path, dtype):
  x = np.arange(6).reshape(2, 3).astype(jnp.dtype(dtype))
  tree = {'x': x, 'scalar': x[1, 2], 'w': np.zeros(1, np.float32)}
  checkpoints.save(tmp_path / 'run', tree)
  restored = ocp.PyTreeCheckpointer().restore(tmp_path / 'run')
  assert restored['x'].dtype == x.dtype
  np.testing.assert_array_equal(restored['x'], x)
  np.testing.assert_array_equal(restored['scalar'], x[1, 2])


@pytest.mark.parametrize('name', ['soup', 'soup.safetensors'])
def test_an_average_that_is_asked_to_stop_leaves_nothing(tmp_path, name):
  runs = [tmp_path / f'run{k}' for k in range(2)]
  for k, run in enumerate(runs):
    checkpoints.save(run, params_of(k))
  stop = preemption.Stop()
  ingredients = stopping.Ingredients(runs, stop=stop, saved='nothing')
  stop.requested = True
  with pytest.raises(preemption.Preempted):
    checkpoints.save_average(tmp_path / name, ingredients)
  assert {p.name for p in tmp_path.iterdir()} == {'run0', 'run1'}


class Killed(BaseException):
  pass


def save_like(runs, tree_fn, out):
  """Saves runs, of which `out` is an average."""
  for k, run in enumerate(runs):
    if out == 'directory':
      checkpoints.save(run / 'model.safetensors', tree_fn(k))
      (run / 'config.json').write_text('{}')
    else:
      checkpoints.save(run, tree_fn(k))


def average_to(path, runs):
  ingredients = checkpoints.Ingredients(runs)
  if path.name.endswith('directory'):
    return checkpoints.save_directory(
        path, ingredients, max_shard_bytes=100, resume=True
    )
  return checkpoints.save_average(path, ingredients, resume=True)


@pytest.mark.parametrize('out', ['orbax', 'soup.safetensors', 'directory'])
def test_an_average_goes_on_where_it_was_killed(tmp_path, monkeypatch, out):
  rng = np.random.default_rng(0)
  trees = [
      {f'w{i}': rng.normal(size=(4, 3)).astype(np.float32) for i in range(6)}
      for _ in range(2)
  ]
  runs = [tmp_path / f'run{k}' for k in range(2)]
  save_like(runs, trees.__getitem__, out)
  read = []
  add = _resumable.Written.add

  def add_some(self, path, note):
    add(self, path, note)
    read.append(path[-1])
    if len(read) == 3:
      raise Killed

  monkeypatch.setattr(_resumable.Written, 'add', add_some)
  with pytest.raises(Killed):
    average_to(tmp_path / out, runs)
  (left,) = tmp_path.glob(f'{out}.resumable-*')
  # One of the leaves is damaged meanwhile, and a line is cut off.
  damaged = ((trees[0]['w1'] + trees[1]['w1']) / 2).tobytes()
  (file,) = [
      file
      for file in left.rglob('*')
      if file.is_file() and damaged in file.read_bytes()
  ]
  file.write_bytes(file.read_bytes().replace(damaged, bytes(48)))
  with (left / 'written-0.jsonl').open('a') as notes:
    notes.write('{"path": ["w5"], "dig')
  average_to(tmp_path / out, runs)
  assert read[3:] == ['w1', 'w3', 'w4', 'w5']
  assert_mean(jax.device_get(checkpoints.load(tmp_path / out).params), trees)
  whole = average_to(tmp_path / f'whole-{out}', runs)
  first, second = map(checkpoints.provenance, (tmp_path / out, whole))
  for key in ('ingredients', 'checksums', 'content_hash', 'info'):
    assert first.get(key) == second.get(key)
  names = {'run0', 'run1', out, f'whole-{out}'}
  assert {p.name for p in tmp_path.iterdir()} == names


def test_what_is_left_of_another_selection_is_not_used(tmp_path, monkeypatch):
  """Its leaves have the same names and shapes, and other values."""
  for k in range(2):
    tree = {'params': params_of(k), 'ema_params': params_of(k + 5)}
    ocp.PyTreeCheckpointer().save(tmp_path / f'run{k}', tree)
  runs = [tmp_path / f'run{k}' for k in range(2)]
  average = lambda item: checkpoints.save_average(
      tmp_path / 'soup', checkpoints.Ingredients(runs, item=item), resume=True
  )
  with monkeypatch.context() as patched:
    patched.setattr(_orbax_files, '_describe', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      average('ema_params')
  assert list(tmp_path.glob('soup.resumable-*'))
  average(None)
  restored = ocp.PyTreeCheckpointer().restore(tmp_path / 'soup')
  assert_mean(restored['params'], [params_of(0), params_of(1)])


def test_what_is_left_of_other_ingredients_goes(tmp_path):
  for k in range(2):
    checkpoints.save(tmp_path / f'run{k}', params_of(k))
  (tmp_path / 'soup[1].resumable-0123456789ab').mkdir()
  (tmp_path / 'soup1.resumable-0123456789ab').mkdir()  # Of another soup.
  ingredients = checkpoints.Ingredients([tmp_path / 'run0', tmp_path / 'run1'])
  checkpoints.save_average(tmp_path / 'soup[1]', ingredients, resume=True)
  assert {p.name for p in tmp_path.iterdir()} == {
      'run0', 'run1', 'soup[1]', 'soup1.resumable-0123456789ab',
  }  # fmt: skip


def describe(path: pathlib.Path, shapes: dict[str, tuple[int, ...]]):
  """A checkpoint of bfloat16 arrays without their values."""
  rows = {}
  for name, shape in shapes.items():
    (path / name).mkdir(parents=True)
    content = {
        'zarr_format': 2,
        'shape': shape,
        'chunks': shape,
        'dtype': 'bfloat16',
        'compressor': None,
        'dimension_separator': '.',
        'fill_value': None,
        'filters': None,
        'order': 'C',
    }
    (path / name / '.zarray').write_text(json.dumps(content))
    chunk = path / name / '.'.join('0' for _ in shape)
    chunk.touch()
    os.truncate(chunk, 2 * int(np.prod(shape, dtype=np.int64)))
    keys = [{'key': key, 'key_type': 2} for key in name.split('.')]
    kind = {'value_type': 'jax.Array', 'skip_deserialize': False}
    rows[name] = {'key_metadata': keys, 'value_metadata': kind}
  content = {'tree_metadata': rows, 'use_ocdbt': False, 'use_zarr3': False}
  (path / '_METADATA').write_text(json.dumps(content))


def test_plan_of_models_that_are_not_here(tmp_path):
  """Eight models of 120 billion parameters, of 240 GB each."""
  layers, width, hidden, num_experts = 60, 8192, 5120, 16
  shapes = {
      f'layers.{i}.wi': (num_experts, width, hidden) for i in range(layers)
  }
  shapes |= {
      f'layers.{i}.wo': (num_experts, hidden, width) for i in range(layers)
  }
  shapes |= {f'layers.{i}.attention': (width, 4 * width) for i in range(layers)}
  shapes['embedding'] = (256_000, width)
  num_bytes = 2 * sum(
      np.prod(shape, dtype=np.int64) for shape in shapes.values()
  )
  for k in range(8):
    describe(tmp_path / f'run{k}', shapes)
  runs = [str(tmp_path / f'run{k}') for k in range(8)]
  command = ['soup', 'uniform', *runs, '--out', str(tmp_path / 'soup')]
  command += ['--plan', '16']
  result = testing.CliRunner().invoke(cli.app, [*command, '--json'])
  assert result.exit_code == 0, result.output
  cost = json.loads(result.output)
  assert cost['read'] == 8 * num_bytes and cost['written'] == num_bytes
  # A piece is at least a row: as read and as written, its sum and a product.
  assert cost['held'] == (2 + 2 + 4 + 4) * width * hidden
  # Leaves are not cut, so that shares are not quite equal.
  assert 1 <= cost['of_a_host'] / (9 * num_bytes / 16) < 1.2
  text = testing.CliRunner().invoke(cli.app, command).output
  assert text.startswith(
      f'reads {8 * num_bytes / 1e12:.3g} TB of 8 checkpoints'
  )
  assert not (tmp_path / 'soup').exists()
