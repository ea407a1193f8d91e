"""Files of other libraries, written by these libraries."""

import argparse
import io
import json
import os
import pathlib
import sys
import warnings
import zipfile

import _damaging
import flax
from flax import serialization
from flax.training import checkpoints as flax_checkpoints
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from typer import testing

import jaxsoup
from jaxsoup import checkpoints
from jaxsoup import cli


def tree_of(seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {
      'dense': {'kernel': normal(7, 5), 'bias': normal(5).astype(jnp.bfloat16)},
      'scale': normal(),
      'empty': normal(0, 3),
      'mask': rng.random(6) < 0.5,
      'third': {'0': normal(2, 3, 4).astype(np.float16)},
  }


def assert_same(tree, expected):
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(expected)):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def inspect(path, *options):
  result = testing.CliRunner().invoke(cli.app, ['inspect', str(path), *options])
  assert 'Traceback' not in result.output
  return result.exit_code, ' '.join(result.output.split())


def read_all(path, *more):
  """Reads a file, which is whole, or damaged in a way that is said."""
  try:
    ingredients = checkpoints.Ingredients([path], *more)
    ingredients[0]
  except ValueError as e:
    assert str(path) in str(e)


# --- flax ---------------------------------------------------------------------


@pytest.mark.parametrize('chunk', [1 << 30, 64, 8])
def test_msgpack(tmp_path, monkeypatch, chunk):
  monkeypatch.setattr(serialization, 'MAX_CHUNK_SIZE', chunk)
  path = tmp_path / 'x.msgpack'
  path.write_bytes(serialization.to_bytes(tree_of()))
  assert (b'chunked' in path.read_bytes()) == (chunk < 1 << 30)
  assert_same(checkpoints.Ingredients([path])[0], tree_of())
  assert inspect(path, '--deep')[0] == 0


def test_msgpack_is_read_in_pieces(tmp_path, monkeypatch):
  monkeypatch.setattr(serialization, 'MAX_CHUNK_SIZE', 1_000_000)
  trees = [{'w': np.full((3_000, 512), k, np.float32)} for k in range(3)]
  paths = [tmp_path / f'{k}.msgpack' for k in range(3)]
  for path, tree in zip(paths, trees):
    path.write_bytes(serialization.to_bytes(tree))
  out = checkpoints.save_average(
      tmp_path / 'soup.safetensors', checkpoints.Ingredients(paths)
  )
  read = checkpoints.Ingredients([out])[0]
  assert_same(read, {'w': np.ones((3_000, 512), np.float32)})


def test_a_train_state_of_flax_gives_its_parameters(tmp_path):
  state = {
      'params': tree_of(),
      'opt_state': {'0': {'mu': tree_of(1)}},
      'step': 7,
      'note': 'x' * 10_000,
      'history': [1.0, {'loss': 2.0}],
  }
  (tmp_path / 'x').write_bytes(serialization.msgpack_serialize(state))
  abstract = jax.eval_shape(tree_of)
  for more in ((), (abstract,)):
    read = checkpoints.Ingredients([tmp_path / 'x'], *more)[0]
    assert_same(read, tree_of())


@pytest.fixture
def legacy():
  """flax.training.checkpoints without Orbax."""
  flax.config.update('flax_use_orbax_checkpointing', False)
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'Flax Checkpointing will soon')
    yield
  flax.config.update('flax_use_orbax_checkpointing', True)


@pytest.mark.parametrize('steps', [(1, 9, 10), (0.5, 2.25)])
def test_the_latest_of_flax(tmp_path, legacy, steps):
  for step in steps:
    flax_checkpoints.save_checkpoint(
        tmp_path, {'w': np.float32([step])}, step, keep=9
    )
  (tmp_path / 'checkpoint_tmp').write_text('unfinished')
  ingredients = checkpoints.Ingredients([tmp_path])
  latest = flax_checkpoints.latest_checkpoint(tmp_path)
  assert ingredients.paths == (latest,)
  assert_same(ingredients[0], {'w': np.float32([steps[-1]])})


def test_orbax_directories_with_the_names_of_flax(tmp_path, legacy):
  flax_checkpoints.save_checkpoint(tmp_path, {'w': np.float32([1])}, 1)
  checkpoints.save(tmp_path / 'checkpoint_2', {'w': np.float32([2])})
  assert_same(checkpoints.Ingredients([tmp_path])[0], {'w': np.float32([2])})


def test_a_directory_of_hugging_face_that_flax_wrote(tmp_path):
  for name in ('a', 'b'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'config.json').write_text('{"model_type": "mine"}')
  content = serialization.to_bytes(tree_of())
  (tmp_path / 'a' / 'flax_model.msgpack').write_bytes(content)
  tree = tree_of()
  shards = {'x-1.msgpack': {'dense': tree.pop('dense')}, 'x-2.msgpack': tree}
  weight_map = {}
  for name, shard in shards.items():
    (tmp_path / 'b' / name).write_bytes(serialization.to_bytes(shard))
    paths = jax.tree_util.tree_leaves_with_path(shard)
    weight_map |= {'/'.join(k.key for k in path): name for path, _ in paths}
  index = tmp_path / 'b' / 'flax_model.msgpack.index.json'
  index.write_text(json.dumps({'weight_map': weight_map}))
  for ingredient in checkpoints.Ingredients([tmp_path / 'a', tmp_path / 'b']):
    assert_same(ingredient, tree_of())


BROKEN = {
    'nothing': (b'', 'cannot be read'),
    'a number': (b'\x05', 'holds no arrays of flax'),
    'other msgpack': (b'\x81\xa1a\x93\x01\x02\x03', 'holds no arrays of flax'),
    'deep': (b'\x81\xa1a' * 200 + b'\x01', 'nested too deeply'),
    'repeated': (b'\x82\xa1a\x01\xa1a\x01', 'the same name'),
    'endless': (b'\xdf\xff\xff\xff\xff\xa1a\x01', 'cannot be read'),
    'elsewhere': (
        serialization.msgpack_serialize({'a': '//GDAPlaceholder:a'}),
        'is in a directory next to it',
    ),
    'objects': (
        serialization.msgpack_serialize({'a': np.ones(2, 'M8[s]')}),
        'is not one of numbers',
    ),
}


@pytest.mark.parametrize('name', BROKEN)
def test_broken_msgpack(tmp_path, name):
  content, words = BROKEN[name]
  path = tmp_path / 'x.msgpack'
  path.write_bytes(content)
  code, said = inspect(path)
  assert code == 1 and str(path) in said and words in said


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.data())
def test_changed_msgpack(tmp_path_factory, data):
  path = tmp_path_factory.getbasetemp() / 'changed.msgpack'
  path.write_bytes(_damaging.changed(serialization.to_bytes(tree_of()), data))
  read_all(path)


# --- torch --------------------------------------------------------------------


@pytest.fixture
def torch():
  return pytest.importorskip('torch', reason='reads files of torch')


@pytest.fixture
def trained(torch):
  """A model and its optimizer after a step."""
  model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
  optimizer = torch.optim.AdamW(model.parameters())
  model(torch.ones(4, 3)).sum().backward()
  optimizer.step()
  return model.state_dict(), optimizer.state_dict()


def assert_model(read, state):
  named = {
      '.'.join(k.key for k in path): x
      for path, x in jax.tree_util.tree_leaves_with_path(read)
  }
  assert named.keys() == state.keys()
  for name, x in state.items():
    np.testing.assert_array_equal(named[name], x.numpy())


@pytest.mark.reference
@pytest.mark.parametrize(
    'name, model, optimizer',
    [
        ('x.pth.tar', 'state_dict', 'optimizer'),  # timm.
        ('x.pth', 'model', 'optimizer'),  # torchvision, DeiT.
        ('x.pt', 'model_state_dict', 'optimizer_state_dict'),  # torch's guide.
        ('x.ckpt', 'state_dict', 'optimizer_states'),  # Lightning.
    ],
)
def test_a_training_file_gives_its_model(
    tmp_path, torch, trained, name, model, optimizer
):
  state, moments = trained
  content = {
      'epoch': 3,
      'args': argparse.Namespace(lr=0.1, mean=(0.5, 0.5), name='vit'),
      model: state,
      optimizer: [moments] if optimizer.endswith('s') else moments,
      'ema': {'decay': 0.9},
      'metric': 0.5,
  }
  torch.save(content, tmp_path / name)
  assert_model(checkpoints.Ingredients([tmp_path / name])[0], state)
  assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.reference
def test_entries_of_unknown_names_are_kept_but_no_optimizer(
    tmp_path, torch, trained
):
  state, moments = trained
  content = {'net': {'w': torch.ones(2)}, 'g_optim': moments, 'sgd': moments}
  torch.save(content, tmp_path / 'x.pth')
  read = checkpoints.Ingredients([tmp_path / 'x.pth'])[0]
  assert_same(read, {'net': {'w': np.ones(2, np.float32)}})


@pytest.mark.reference
@pytest.mark.parametrize('names', [('state_dict', 'state_dict_ema')])
def test_a_moving_average_is_chosen(tmp_path, torch, trained, names):
  state, _ = trained
  average = {name: x * 2 for name, x in state.items()}
  path = tmp_path / 'x.pth.tar'
  torch.save(dict(zip(names, (state, average))), path)
  words = f'{path} holds several models: state_dict and state_dict_ema. Pass'
  with pytest.raises(ValueError, match=words):
    checkpoints.Ingredients([path])[0]
  code, said = inspect(path)
  assert code == 1 and '--item NAME' in said
  for name, expected in zip(names, (state, average)):
    read = checkpoints.Ingredients([path], item=name)[0]
    assert_model(read, expected)
    assert inspect(path, '--item', name, '--deep')[0] == 0
    abstract = jax.eval_shape(lambda x=read: x)
    assert_model(
        checkpoints.Ingredients([path], abstract, item=name)[0], expected
    )


@pytest.mark.reference
def test_a_namespace_runs_no_code(tmp_path, torch):
  class Evil:

    def __reduce__(self):
      return pathlib.Path.touch, (tmp_path / 'ran',)

  content = {'w': torch.ones(2), 'args': argparse.Namespace(x=Evil())}
  torch.save(content, tmp_path / 'x.pth.tar')
  with pytest.raises(ValueError, match='would run code when it is loaded'):
    checkpoints.Arrays(tmp_path / 'x.pth.tar')
  assert not (tmp_path / 'ran').exists()


@pytest.mark.reference
def test_shards_of_torch(tmp_path, torch, trained):
  hub = pytest.importorskip('huggingface_hub')
  state, _ = trained
  folders = [tmp_path / name for name in 'ab']
  for k, folder in enumerate(folders):
    folder.mkdir()
    (folder / 'config.json').write_text('{"model_type": "mine"}')
    hub.save_torch_state_dict(
        {name: x + k for name, x in state.items()},
        folder,
        safe_serialization=False,
        max_shard_size=40,
    )
    assert (folder / 'pytorch_model.bin.index.json').exists()
  assert_model(checkpoints.Ingredients(folders[:1])[0], state)
  out = tmp_path / 'out'
  command = ['soup', 'uniform', *map(str, folders), '--out', str(out)]
  result = testing.CliRunner().invoke(cli.app, command)
  assert result.exit_code == 0, result.output
  read = checkpoints.Arrays(out / 'model.safetensors')
  assert {*read} == {*state}
  weight = state['0.weight'].numpy()
  expected = (weight + (weight + np.float32(1))) / 2
  np.testing.assert_array_equal(read['0.weight'], expected)
  shard = sorted(folders[0].glob('pytorch_model-*.bin'))[0]
  shard.unlink()
  with pytest.raises(ValueError, match=f'{shard.name} is missing'):
    checkpoints.Arrays(folders[0])


@pytest.mark.reference
def test_a_model_that_transformers_saved_in_steps(tmp_path, torch):
  transformers = pytest.importorskip('transformers')
  config = transformers.BertConfig(
      vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
      intermediate_size=8, max_position_embeddings=8,
  )  # fmt: skip
  models = {n: transformers.BertModel(config) for n in (5, 50, 500)}
  for step, model in models.items():
    model.save_pretrained(tmp_path / f'checkpoint-{step}')
  (tmp_path / 'runs').mkdir()
  ingredients = checkpoints.Ingredients([tmp_path])
  assert 'checkpoint-500' in ingredients.paths[0]
  assert_model(ingredients[0], models[500].state_dict())
  models[5].save_pretrained(tmp_path / 'best')
  with pytest.raises(ValueError, match=r"several checkpoints: \['best', 'che"):
    checkpoints.Ingredients([tmp_path])
  (tmp_path / 'best').rename(tmp_path / 'runs' / 'best')
  (tmp_path / 'checkpoint-1000').mkdir()
  with pytest.raises(FileNotFoundError, match='-1000, the latest .* holds no'):
    checkpoints.Ingredients([tmp_path])


# --- safetensors --------------------------------------------------------------


def write_safetensors(path, array, dtype):
  """Writes an array under the name of a dtype that NumPy may lack."""
  if not hasattr(safetensors, 'TensorSpec'):
    pytest.skip('safetensors before 0.8 has no such dtypes')
  spec = safetensors.TensorSpec(
      dtype=dtype,
      shape=array.shape,
      data_ptr=array.ctypes.data,
      data_len=array.nbytes,
  )
  path.write_bytes(safetensors.serialize({'w': spec}))


@pytest.mark.parametrize(
    'name, dtype',
    [
        ('C64', np.complex64),
        ('F8_E8M0', jnp.float8_e8m0fnu),
        ('F8_E4M3FNUZ', jnp.float8_e4m3fnuz),
    ],
)
def test_dtypes_of_safetensors(tmp_path, name, dtype):
  array = np.asarray([1, 2, 4, 0.5], dtype)
  write_safetensors(tmp_path / 'x.safetensors', array, array.dtype.name)
  assert name.encode() in (tmp_path / 'x.safetensors').read_bytes()
  arrays = checkpoints.Arrays(tmp_path / 'x.safetensors')
  assert arrays['w'].dtype == array.dtype
  np.testing.assert_array_equal(arrays['w'], array)


def test_dtypes_that_are_packed(tmp_path):
  path = tmp_path / 'x.safetensors'
  write_safetensors(path, np.zeros(4, np.uint8), 'float4_e2m1fn_x2')
  code, said = inspect(path)
  assert code == 1 and "'w' has dtype 'F4', which is not supported" in said
  assert 'damaged' not in said


# --- Keras --------------------------------------------------------------------


@pytest.fixture(scope='module')
def keras():
  pytest.importorskip('h5py')
  os.environ.setdefault('KERAS_BACKEND', 'jax')
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return pytest.importorskip('keras', reason='writes files of Keras')


@pytest.fixture
def keras_model(keras):
  """A model with the state of an optimizer, and its arrays by their names."""
  layers = keras.layers
  model = keras.Sequential(
      [
          layers.Input((4,)),
          layers.Dense(3),
          layers.Dropout(0.5),
          layers.BatchNormalization(),
          layers.Dense(2, dtype=keras.DTypePolicy('bfloat16')),
      ]
  )
  model.compile('adam', 'mse')
  model.optimizer.build(model.trainable_variables)
  names = ['dense', 'batch_normalization', 'dense_1']
  parts = [x for x in model.layers if not isinstance(x, layers.Dropout)]
  arrays = {
      f'layers/{name}/vars/{i}': np.asarray(x.value)
      for name, layer in zip(names, parts)
      for i, x in enumerate(layer.weights)
  }
  return model, arrays


@pytest.mark.filterwarnings(
    'ignore:__array__ implementation:DeprecationWarning'
)
@pytest.mark.reference
@pytest.mark.parametrize('name', ['x.keras', 'x.weights.h5'])
def test_keras(tmp_path, keras_model, name):
  model, expected = keras_model
  path = tmp_path / name
  model.save(path) if name == 'x.keras' else model.save_weights(path)
  arrays = checkpoints.Arrays(path)
  assert set(arrays) - {'layers/dropout/seed_generator/vars/0'} == {*expected}
  assert {str(x.dtype) for x in expected.values()} == {'bfloat16', 'float32'}
  for key, x in expected.items():
    assert arrays[key].dtype == x.dtype
    np.testing.assert_array_equal(arrays[key], x)


@pytest.mark.filterwarnings(
    'ignore:__array__ implementation:DeprecationWarning'
)
@pytest.mark.reference
def test_a_soup_of_keras(tmp_path, keras_model):
  model, expected = keras_model
  paths = [tmp_path / f'{k}.keras' for k in range(3)]
  for k, path in enumerate(paths):
    model.layers[0].kernel.assign(np.full((4, 3), k))
    model.save(path)
  soup = jaxsoup.uniform(checkpoints.Ingredients(paths)).params
  layers = soup['layers']
  np.testing.assert_array_equal(layers['dense']['vars']['0'], np.ones((4, 3)))
  moving = expected['layers/batch_normalization/vars/3']
  np.testing.assert_array_equal(
      layers['batch_normalization']['vars']['3'], moving
  )


def test_keras_without_h5py(tmp_path, monkeypatch):
  (tmp_path / 'x.keras').write_bytes(b'PK')
  monkeypatch.setitem(sys.modules, 'h5py', None)
  with pytest.raises(
      ImportError, match='x.keras .* not installed: `pip install'
  ):
    checkpoints.Arrays(tmp_path / 'x.keras')


def _external(h5py, f, folder):
  (folder / 'secret').write_bytes(bytes(8))
  f.create_dataset('w', (2,), 'f4', external=[(folder / 'secret', 0, 8)])


def _linked(h5py, f, folder):
  with h5py.File(folder / 'other.h5', 'w') as other:
    other['w'] = np.ones(2, np.float32)
  f['w'] = h5py.ExternalLink(folder / 'other.h5', 'w')


def _virtual(h5py, f, folder):
  layout = h5py.VirtualLayout((2,), 'f4')
  layout[:] = h5py.VirtualSource(folder / 'other.h5', 'w', (2,))
  f.create_virtual_dataset('w', layout)


@pytest.mark.parametrize(
    'make, words',
    [
        (_external, 'is not stored in one piece'),
        (_linked, 'it holds no arrays'),
        (_virtual, 'is not stored in one piece'),
        (lambda h5py, f, _: f.create_dataset('w', (9**9,), 'f4'), 'one piece'),
        (
            lambda h5py, f, _: f.create_dataset(
                'w', data=np.zeros(9999), compression='gzip'
            ),
            'is not stored in one piece',
        ),
        (
            lambda h5py, f, _: f.create_dataset('w', data=['text']),
            'is not one of numbers',
        ),
    ],
)
def test_hdf5_that_keras_does_not_write(tmp_path, make, words):
  h5py = pytest.importorskip('h5py')
  path = tmp_path / 'x.weights.h5'
  with h5py.File(path, 'w') as f:
    make(h5py, f, tmp_path)
  code, said = inspect(path)
  assert code == 1 and str(path) in said and words in said


def test_big_endian_hdf5(tmp_path):
  h5py = pytest.importorskip('h5py')
  with h5py.File(tmp_path / 'x.weights.h5', 'w') as f:
    f['a/w'] = np.arange(6, dtype='>f4').reshape(2, 3)
    f['a/mask'] = np.array([True, False])
  expected = {
      'w': np.arange(6, dtype=np.float32).reshape(2, 3),
      'mask': np.array([True, False]),
  }
  read = checkpoints.Ingredients([tmp_path / 'x.weights.h5'])[0]
  assert_same(read, {'a': expected})


def test_a_compressed_archive_of_keras(tmp_path):
  pytest.importorskip('h5py')
  path = tmp_path / 'x.keras'
  for name, words in (
      ('x', 'model.weights.h5'),
      ('model.weights.h5', 'is com'),
  ):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
      archive.writestr(name, bytes(100))
    code, said = inspect(path)
    assert code == 1 and words in said


@pytest.mark.slow
def test_no_damage_of_hdf5_crashes(tmp_path):
  h5py = pytest.importorskip('h5py')
  with h5py.File(tmp_path / 'whole.weights.h5', 'w') as f:
    for name in ('a', 'b', 'optimizer'):
      f[f'{name}/vars/0'] = np.ones((2, 3), np.float32)
      f[f'{name}/vars'].attrs['name'] = name
    f['b/vars/1'] = np.ones(3, jnp.bfloat16).view('V2')
    f['b/vars/1'].attrs['dtype'] = 'bfloat16'  # HDF5 hangs if it is damaged.
  _damaging.survives('formats_test', tmp_path, 1000)


# --- Equinox ------------------------------------------------------------------


@pytest.fixture
def equinox():
  return pytest.importorskip('equinox', reason='writes files of Equinox')


def equinox_model(equinox, seed=0):
  keys = jax.random.split(jax.random.key(seed), 2)
  return equinox.nn.Sequential(
      [
          equinox.nn.Linear(3, 4, key=keys[0]),
          equinox.nn.Dropout(0.3),  # With two numbers of Python.
          equinox.nn.Lambda(jax.nn.relu),
          equinox.nn.Linear(4, 2, dtype=jnp.bfloat16, key=keys[1]),
      ]
  )


def abstract_of(equinox, make):
  is_array = lambda x: isinstance(x, jax.ShapeDtypeStruct)
  return equinox.filter(equinox.filter_eval_shape(make), is_array)


@pytest.mark.reference
@pytest.mark.parametrize('line', [b'', b'{"width": 4}\n'])
def test_equinox(tmp_path, equinox, line):
  models = [equinox_model(equinox, k) for k in range(2)]
  paths = [tmp_path / f'{k}.eqx' for k in range(2)]
  for path, model in zip(paths, models):
    with path.open('wb') as f:
      f.write(line)
      equinox.tree_serialise_leaves(f, model)
  abstract = abstract_of(equinox, lambda: equinox_model(equinox))
  ingredients = checkpoints.Ingredients(paths, abstract)
  params = [equinox.filter(model, equinox.is_array) for model in models]
  for ingredient, expected in zip(ingredients, params):
    assert_same(ingredient, expected)
  assert_same(
      jaxsoup.uniform(ingredients).params, jaxsoup.uniform(params).params
  )


@pytest.mark.reference
def test_equinox_needs_the_right_template(tmp_path, equinox):
  path = tmp_path / 'x.eqx'
  equinox.tree_serialise_leaves(path, equinox_model(equinox))
  code, said = inspect(path)
  assert code == 1 and 'checkpoints.Ingredients(paths, abstract_params)' in said
  make = lambda: equinox.nn.Linear(3, 4, key=jax.random.key(0))
  with pytest.raises(ValueError, match='4 arrays, but abstract_params has 2'):
    checkpoints.Ingredients([path], abstract_of(equinox, make))[0]
  make = lambda: [make_linear() for make_linear in [
      lambda: equinox.nn.Linear(3, 5, key=jax.random.key(0))] * 2]  # fmt: skip
  with pytest.raises(ValueError, match=r"'0/weight' has shape \(4, 3\), expec"):
    checkpoints.Ingredients([path], abstract_of(equinox, make))[0]


@hypothesis.settings(max_examples=200)
@hypothesis.given(st.data())
def test_changed_equinox(tmp_path_factory, data):
  tree = [np.ones((2, 3), np.float32), np.ones(4, np.int32)]
  file = io.BytesIO()
  for x in tree:  # As Equinox does.
    np.save(file, x)
  path = tmp_path_factory.getbasetemp() / 'changed.eqx'
  path.write_bytes(_damaging.changed(file.getvalue(), data))
  read_all(path, tree)


# --- What is not read ---------------------------------------------------------


@pytest.mark.parametrize(
    'name, content, kind',
    [
        ('model.gguf', b'GGUF\3\0\0\0', 'a GGUF file'),
        ('model', b'GGUF\3\0\0\0', 'a GGUF file'),
        ('model.onnx', b'\x08\x07\x12', 'an ONNX model'),
        ('saved_model.pb', b'\x08\1', 'a TensorFlow SavedModel'),
        ('model.ckpt.index', b'\0', 'a TensorFlow checkpoint'),
        ('model.ckpt.data-00000-of-00001', b'\0', 'a TensorFlow checkpoint'),
        ('model.h5', b'\x89HDF\r\n\x1a\n', 'HDF5'),
        ('x.dump', b'\x80\4K\1.', 'a pickle, which can run code'),
        ('x.zip', b'PK\3\4', 'a zip archive, such as torch'),
        ('x.npy', b'\x93NUMPY\1\0', 'an array of NumPy'),
        ('x.tar.gz', b'\x1f\x8b', 'a compressed archive'),
        ('config.json', b'{"model_type": "bert"}', 'text'),
        ('notes', 'höher'.encode(), 'text'),
        ('x', b'', 'empty, or of an unknown format'),
        ('x', bytes(9) + b'\xff', 'empty, or of an unknown format'),
    ],
)
def test_what_is_not_read(tmp_path, name, content, kind):
  path = tmp_path / name
  path.write_bytes(content)
  code, said = inspect(path)
  assert code == 1 and f'{path} seems to be {kind}' in said
  assert 'is not read. Give an Orbax' in said and '.npz' in said


def test_a_directory_of_tensorflow(tmp_path):
  (tmp_path / 'saved_model.pb').write_bytes(b'\x08\1')
  code, said = inspect(tmp_path)
  assert code == 1 and 'seems to be a directory of TensorFlow, which' in said


def test_soups_in_the_formats_of_their_runs(tmp_path):
  """NumPy verifies the checksums of an archive when it reads it."""
  for k in range(2):
    np.savez(tmp_path / f'{k}.npz', a=np.full((3, 2), k, 'f'), n=np.arange(3))
  runs = [tmp_path / f'{k}.npz' for k in range(2)]
  path = checkpoints.save_average(
      tmp_path / 'soup.npz', checkpoints.Ingredients(runs)
  )
  soup = np.load(path)
  np.testing.assert_array_equal(soup['a'], np.full((3, 2), 0.5))
  np.testing.assert_array_equal(soup['n'], np.arange(3))
  assert checkpoints.load(path).alpha.tolist() == [0.5, 0.5]


@pytest.mark.reference
def test_a_soup_of_equinox(tmp_path):
  eqx = pytest.importorskip('equinox')
  make = lambda k: eqx.nn.Linear(2, 3, key=jax.random.key(k))
  models = list(map(make, range(2)))
  runs = [tmp_path / f'{k}.eqx' for k in range(2)]
  for run, model in zip(runs, models):
    eqx.tree_serialise_leaves(run, model)
  is_array = lambda x: isinstance(x, jax.ShapeDtypeStruct)
  abstract = eqx.filter(eqx.filter_eval_shape(make, 0), is_array)
  ingredients = checkpoints.Ingredients(runs, abstract)
  path = checkpoints.save_average(tmp_path / 'soup.eqx', ingredients)
  soup = eqx.tree_deserialise_leaves(path, models[0])
  for name in ('weight', 'bias'):
    first, other, mean = (getattr(m, name) for m in (*models, soup))
    np.testing.assert_array_equal(mean, (first + other) / 2)


def test_a_bare_array_in_msgpack(tmp_path):
  serialization = pytest.importorskip('flax.serialization')
  array = np.ones(3, np.float32)
  (tmp_path / 'a.msgpack').write_bytes(serialization.to_bytes(array))
  read = checkpoints.Ingredients([tmp_path / 'a.msgpack'])[0]
  np.testing.assert_array_equal(read, array)
