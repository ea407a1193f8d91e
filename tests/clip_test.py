"""CLIP under the names of others, against these others."""

import _timm
import _weights
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from jaxsoup.models import clip

TINY = dict(width=12, depth=2, num_heads=3, mlp_width=20)
MODEL = dict(
    embed_width=6,
    image=dict(image_shape=[8, 12, 3], patch_size=4, **TINY),
    text=dict(vocab_size=30, max_length=7, end_id=None, **TINY),
)


def images(height, width, num=2):
  shape = num, height, width, 3
  return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def texts(vocab_size, length, end_id):
  """Three texts of several lengths, each with its end, then anything."""
  rng = np.random.default_rng(2)
  text = rng.integers(0, min(end_id, vocab_size - 1), (3, length))
  text[np.arange(3), [length // 2, 1, length - 1]] = end_id
  return text


def assert_close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# --- Hugging Face -------------------------------------------------------------

HF = {
    'tiny': dict(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
    ),
    'base': dict(num_hidden_layers=1),
}


def make_hf(name, end_id, activation):
  transformers = pytest.importorskip('transformers')
  vision, text = dict(HF[name]), dict(HF[name])
  vision |= dict(image_size=8, patch_size=4) if name == 'tiny' else {}
  text |= dict(vocab_size=30, eos_token_id=end_id, bos_token_id=0)
  config = transformers.CLIPConfig(
      vision_config=dict(vision, hidden_act=activation),
      text_config=dict(text, hidden_act=activation, max_position_embeddings=9),
      projection_dim=6 if name == 'tiny' else 512,
  )
  return _weights.randomize_torch(transformers.CLIPModel(config))


def run_hf(model, image, text):
  import torch

  with torch.no_grad():
    out = model(
        pixel_values=torch.tensor(image.transpose(0, 3, 1, 2)),
        input_ids=torch.tensor(text),
    )
  return out.logits_per_image.numpy()


@pytest.mark.reference
@pytest.mark.parametrize(
    'name, end_id, activation',
    [
        ('tiny', 29, 'quick_gelu'),
        ('tiny', 2, 'gelu'),
        ('tiny', 7, 'gelu'),
        ('base', 29, 'quick_gelu'),
    ],
)
def test_hugging_face(name, end_id, activation, tmp_path):
  theirs = make_hf(name, end_id, activation)
  theirs.save_pretrained(tmp_path)
  ours, params, arguments, table = _weights.load(
      clip.CLIP, clip, 'hf', tmp_path
  )
  image = images(*arguments['image']['image_shape'][:2])
  text = texts(30, 9, 29 if end_id == 2 else end_id)
  assert_close(_weights.run(ours, image, text), run_hf(theirs, image, text))
  stored = safetensors.load_file(tmp_path / 'model.safetensors')
  given = _weights.write(params, table)
  assert given.keys() == stored.keys()
  _weights.assert_same_arrays(given, stored)
  scanned, *_ = _weights.load(clip.CLIP, clip, 'hf', tmp_path, is_scanned=True)
  expected = _weights.run(ours, image, text)
  assert_close(_weights.run(scanned, image, text), expected)
  moved = _weights.randomized(params)
  given = _weights.write(moved, table)
  safetensors.save_file(given, tmp_path / 'model.safetensors')
  again = type(theirs).from_pretrained(tmp_path)
  ours = nnx.merge(nnx.graphdef(ours), moved)
  assert_close(run_hf(again, image, text), _weights.run(ours, image, text))


@pytest.mark.reference
def test_the_image_tower_alone(tmp_path):
  transformers = pytest.importorskip('transformers')
  import torch

  config = transformers.CLIPVisionConfig(
      **HF['tiny'], image_size=8, patch_size=4, projection_dim=6
  )
  theirs = transformers.CLIPVisionModelWithProjection(config)
  _weights.randomize_torch(theirs).save_pretrained(tmp_path)
  ours, params, arguments, table = _weights.load(
      clip.CLIP, clip, 'hf', tmp_path
  )
  assert arguments['text'] is None and params.keys() == {'image'}
  image = images(8, 8)
  with torch.no_grad():
    expected = theirs(torch.tensor(image.transpose(0, 3, 1, 2))).image_embeds
  expected = clip.normalized(expected.numpy())
  actual = _weights.run(ours, image, method='image_features')
  assert_close(actual, expected)
  stored = safetensors.load_file(tmp_path / 'model.safetensors')
  _weights.assert_same_arrays(_weights.write(params, table), stored)


# --- open_clip ----------------------------------------------------------------


@pytest.mark.reference
@pytest.mark.parametrize('name', ['tiny', 'base'])
def test_open_clip(name, tmp_path):
  if name == 'tiny':
    vision = dict(width=24, head_width=8, mlp_ratio=2.0, image_size=[16, 24])
    text = dict(width=16, heads=2)
    is_quick = True
  else:
    vision = dict(width=768, image_size=32)
    text = dict(width=512, heads=8)
    is_quick = False
  config = dict(
      embed_dim=10,
      quick_gelu=is_quick,
      vision_cfg=dict(vision, layers=1, patch_size=8),
      text_cfg=dict(text, layers=2, vocab_size=50, context_length=9),
  )
  random = _timm.run('open_clip', tmp_path / 'random', **config)
  # The wide one is told by its shapes alone.
  known = {'model_cfg': config} if name == 'tiny' else {}
  ours, params, arguments, table = _weights.load(
      clip.CLIP, clip, 'open_clip', random.file, known
  )
  inputs = _weights.nhwc(random.data['image']), random.data['text']
  assert_close(_weights.run(ours, *inputs), random.data['logits'])
  features = _weights.run(ours, inputs[0], method='image_features')
  assert_close(features, random.data['image_features'])
  stored = safetensors.load_file(random.file)
  given = _weights.write(params, table)
  assert given.keys() == stored.keys()
  _weights.assert_same_arrays(given, stored)
  moved = _weights.randomized(params, 1)
  given = _timm.run(
      'open_clip',
      tmp_path / 'given',
      given=_weights.write(moved, table),
      **config,
  )
  scanned, *_ = _weights.load(
      clip.CLIP, clip, 'open_clip', given.file, known, is_scanned=True
  )
  assert_close(_weights.run(scanned, *inputs), given.data['logits'])


def test_archives_of_openai_are_told_by_their_numbers():
  _, params = _weights.random(clip.CLIP, **MODEL)
  stored = _weights.write(params, clip.TABLES['open_clip'](**MODEL))
  stored = _weights.Dict(stored, input_resolution=np.zeros(()))
  config = {'vision_cfg': {'head_width': 4, 'image_size': [8, 12]}}
  config['text_cfg'] = {'heads': 3}
  _, _, arguments, _ = _weights.load(
      clip.CLIP, clip, 'open_clip', stored, config
  )
  assert arguments == dict(MODEL, activation='quick_gelu')


# --- Without others -----------------------------------------------------------


def test_a_text_is_read_up_to_its_end():
  model, _ = _weights.random(clip.CLIP, **MODEL)
  text = texts(30, 7, 29)
  expected = _weights.run(model, text, method='text_features')
  other = text.copy()
  other[0, 4:] = other[1, 2:].max()
  assert (other != text).any()
  actual = _weights.run(model, other, method='text_features')
  assert_close(actual, expected)
  other[0, 2] += 1
  actual = _weights.run(model, other, method='text_features')
  assert np.abs(actual[0] - expected[0]).max() > 1e-3
  # Short texts need no padding.
  short = _weights.run(model, text[1:2, :2], method='text_features')
  assert_close(short, expected[1:2])


def test_the_end_of_a_text_is_its_first_end():
  text = np.array([[3, 9, 5, 9, 29]])
  arguments = dict(MODEL, text=dict(MODEL['text'], end_id=9))
  model, params = _weights.random(clip.CLIP, **arguments)
  actual = _weights.run(model, text, method='text_features')
  expected = _weights.run(model, text[:, :2], method='text_features')
  assert_close(actual, expected)


def test_texts_that_are_too_long():
  model, _ = _weights.random(clip.CLIP, **MODEL)
  with pytest.raises(ValueError, match='8 tokens are longer than the 7 pos'):
    model.text(jnp.zeros((1, 8), int))


def test_zero_shot_head_by_hand():
  table = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
  tokenize_fn = lambda texts: np.array([[len(x)] for x in texts])
  features_fn = lambda tokens: jnp.asarray(table)[tokens[:, 0]]
  names, templates = ['cat', 'a dog'], ['{}', 'a photo of a {}.', 'my {}!']
  kernel = clip.zero_shot_head(features_fn, names, templates, tokenize_fn)
  for c, lengths in enumerate([(3, 17, 7), (5, 19, 9)]):
    units = [table[n] / np.linalg.norm(table[n]) for n in lengths]
    mean = sum(units) / 3
    expected = 100 * mean / np.linalg.norm(mean)
    np.testing.assert_allclose(kernel[:, c], expected, rtol=1e-4)


def test_templates_need_a_place_for_the_name():
  with pytest.raises(ValueError, match=r"got \['a photo'\]"):
    clip.zero_shot_head(None, ['cat'], ['a {}', 'a photo'], None)


@pytest.mark.slow
@pytest.mark.parametrize('is_scanned', [False, True])
def test_a_classifier_with_a_zero_shot_head_is_clip(is_scanned):
  model, params = _weights.random(clip.CLIP, is_scanned=is_scanned, **MODEL)
  text, image = texts(30, 7, 29), images(8, 12)
  kernel = clip.zero_shot_head(
      model.text, '012', ['{}'], lambda x: text[[int(x[0])]]
  )
  arguments = {k: v for k, v in MODEL.items() if k != 'text'}
  classifier, _ = _weights.random(
      clip.ImageClassifier, num_classes=3, is_scanned=is_scanned, **arguments
  )
  tree = {'image': params['image'], 'head': {'kernel': kernel}}
  classifier = nnx.merge(nnx.graphdef(classifier), tree)
  expected = _weights.run(model, image, text)
  expected = expected / np.exp(params['logit_scale']) * 100
  np.testing.assert_allclose(
      _weights.run(classifier, image), expected, rtol=1e-4, atol=1e-4
  )


@pytest.mark.slow
def test_a_classifier_of_a_model():
  model, _ = _weights.random(clip.CLIP, **MODEL)
  image = images(8, 12)
  width = model.image(image).shape[1]
  kernel = np.random.default_rng(0).normal(size=(width, 4)).astype(np.float32)
  classifier = clip.image_classifier(model, jnp.asarray(kernel))
  features = np.asarray(model.image(image), np.float64)
  units = features / np.linalg.norm(features, axis=1, keepdims=True)
  np.testing.assert_allclose(
      _weights.run(classifier, image), units @ kernel, rtol=1e-4, atol=1e-5
  )


def test_a_classifier_with_a_bias_in_bfloat16():
  arguments = {k: v for k, v in MODEL.items() if k != 'text'}
  arguments |= dict(num_classes=3, has_bias=True)
  model, params = _weights.random(clip.ImageClassifier, **arguments)
  narrow, _ = _weights.random(
      clip.ImageClassifier, dtype='bfloat16', **arguments
  )
  narrow = nnx.merge(nnx.graphdef(narrow), params)
  logits = _weights.run(narrow, images(8, 12))
  assert logits.dtype == jnp.float32
  expected = _weights.run(model, images(8, 12))
  assert 1e-6 < np.abs(logits - expected).max() < 0.05
  assert params['head']['bias'].shape == (3,)


@pytest.mark.slow_variants
@pytest.mark.parametrize('is_scanned', [False, True])
@pytest.mark.parametrize('on_mesh', ['auto'], indirect=True)
def test_a_classifier_on_a_mesh(on_mesh, is_scanned):
  arguments = {k: v for k, v in MODEL.items() if k != 'text'}
  arguments |= dict(num_classes=3, is_scanned=is_scanned)
  model, params = _weights.random(clip.ImageClassifier, **arguments)
  image = images(8, 12, num=4)
  expected = _weights.run(model, image)
  sharded, _ = _weights.random(
      clip.ImageClassifier, batch_axis='fsdp', **arguments
  )
  sharded = nnx.merge(nnx.graphdef(sharded), params)
  with jax.set_mesh(on_mesh.mesh):
    assert_close(_weights.run(sharded, on_mesh.put(image)), expected)
