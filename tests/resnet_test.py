"""ResNets against NumPy, transformers and timm; and BatchNorm of soups."""

import _cnn
from flax import nnx
import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

import jaxsoup
from jaxsoup import models
from jaxsoup import sharding
from jaxsoup.models import _names
from jaxsoup.models import batch_norm
from jaxsoup.models import resnet

pytestmark = pytest.mark.filterwarnings(
    'ignore::DeprecationWarning:transformers', 'ignore::FutureWarning'
)
SMALL = dict(num_classes=5, depths=(2, 1), width=8, num_groups=4)


def make(seed=0, **changes):
  arguments = {**SMALL, **changes}
  graphdef, shapes = _cnn.abstract(resnet.ResNet, arguments)
  return graphdef, _cnn.random_params(shapes, seed)


# --- Against NumPy ------------------------------------------------------------


def standardized_conv(p, x, stride=1):
  kernel = p['kernel'] - p['kernel'].mean((0, 1, 2))
  kernel = kernel / np.sqrt(np.square(kernel).mean((0, 1, 2)) + 1e-8)
  return _cnn.conv(kernel, x, stride)


def group_norm(p, x):
  batch, height, width, channels = x.shape
  groups = x.reshape(batch, height, width, SMALL['num_groups'], -1)
  mean = groups.mean((1, 2, 4), keepdims=True)
  var = groups.var((1, 2, 4), keepdims=True)
  x = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
  return x * p['scale'] + p['bias']


def max_pool(x, padding):
  sides = ((0, 0), (1, 1), (1, 1), (0, 0))
  x = np.pad(x, sides, constant_values=padding)
  windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))
  return windows[:, ::2, ::2].max((-2, -1))


def resnet_by_hand(params, x, is_bottleneck, has_small_stem):
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  conv = lambda p, x, stride=1: _cnn.conv(p['kernel'], x, stride)
  norm = lambda p, x: _cnn.batch_norm(p, x, 1e-5)
  x = conv(p['conv_stem'], x, 1 if has_small_stem else 2)
  x = _cnn.relu(norm(p['norm_stem'], x))
  x = x if has_small_stem else max_pool(x, -np.inf)
  for i, depth in enumerate(SMALL['depths']):
    for j in range(depth):
      b = p[f'stage_{i}'][f'block_{j}']
      stride = 2 if i and not j else 1
      strides = (1, stride, 1) if is_bottleneck else (stride, 1)
      y = x
      for k, step in enumerate(strides):
        y = norm(b[f'norm_{k}'], conv(b[f'conv_{k}'], y, step))
        y = _cnn.relu(y) if k < len(strides) - 1 else y
      if 'conv_shortcut' in b:
        x = norm(b['norm_shortcut'], conv(b['conv_shortcut'], x, stride))
      x = _cnn.relu(x + y)
  return _cnn.dense(p['head'], x.mean((1, 2)))


def bit_by_hand(params, x, has_small_stem):
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  x = standardized_conv(p['conv_stem'], x, 1 if has_small_stem else 2)
  x = x if has_small_stem else max_pool(x, 0)
  for i, depth in enumerate(SMALL['depths']):
    for j in range(depth):
      b = p[f'stage_{i}'][f'block_{j}']
      stride = 2 if i and not j else 1
      y = _cnn.relu(group_norm(b['norm_0'], x))
      if j == 0:
        x = standardized_conv(b['conv_shortcut'], y, stride)
      y = standardized_conv(b['conv_0'], y)
      y = _cnn.relu(group_norm(b['norm_1'], y))
      y = standardized_conv(b['conv_1'], y, stride)
      y = _cnn.relu(group_norm(b['norm_2'], y))
      x = x + standardized_conv(b['conv_2'], y)
  x = _cnn.relu(group_norm(p['norm'], x))
  return _cnn.dense(p['head'], x.mean((1, 2)))


@pytest.mark.parametrize('has_small_stem', [False, True])
@pytest.mark.parametrize('is_bottleneck', [False, True])
def test_equals_numpy(is_bottleneck, has_small_stem):
  kind = dict(is_bottleneck=is_bottleneck, has_small_stem=has_small_stem)
  graphdef, params = make(**kind)
  image = _cnn.images((13, 10))
  _cnn.assert_close(
      _cnn.apply(graphdef, params, image),
      resnet_by_hand(params, image, **kind),
  )


@pytest.mark.parametrize('has_small_stem', [False, True])
def test_bit_equals_numpy(has_small_stem):
  graphdef, params = make(is_bit=True, has_small_stem=has_small_stem)
  image = _cnn.images((13, 10))
  _cnn.assert_close(
      _cnn.apply(graphdef, params, image),
      bit_by_hand(params, image, has_small_stem),
  )


@pytest.mark.slow_variants
@pytest.mark.parametrize(
    ('num_layers', 'is_bit', 'millions'),
    [
        (18, False, 11.689512),
        (34, False, 21.797672),
        (50, False, 25.557032),
        (101, False, 44.549160),
        (152, False, 60.192808),
        (50, True, 25.549352),
    ],
)
def test_number_of_parameters_is_that_of_the_papers(
    num_layers, is_bit, millions
):
  arguments = {**resnet.size(num_layers), 'is_bit': is_bit}
  model = nnx.eval_shape(
      lambda: resnet.ResNet(1000, **arguments, rngs=nnx.Rngs(0))
  )
  leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
  assert sum(x.size for x in leaves) == round(millions * 1e6)


def test_there_is_no_resnet_20():
  with pytest.raises(ValueError, match=r'ResNet with 20 layers.*\[18, 34'):
    resnet.size(20)


def test_on_a_mesh():
  graphdef, params = make()
  image = _cnn.images(32, 4)
  expected = _cnn.apply(graphdef, params, image)
  mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(AxisType.Auto,))
  shardings = jax.tree.map(
      lambda x: x.sharding, sharding.fsdp(params, mesh, min_size=0)
  )
  assert not all(x.is_fully_replicated for x in jax.tree.leaves(shardings))
  params = jax.device_put(params, shardings)
  image = jax.device_put(image, NamedSharding(mesh, PartitionSpec('fsdp')))
  _cnn.assert_close(_cnn.apply(graphdef, params, image), expected, 1e-5)


@pytest.mark.slow
def test_rematerialized_blocks_compute_the_same():
  graphdef, params = make()
  params = _cnn.settled(graphdef, params)
  again, _ = make(is_rematerialized=True)
  image = _cnn.images(32)
  _cnn.assert_same_step(again, graphdef, params, image)
  assert _cnn.num_rematerialized(again, params, image) > 1
  assert not _cnn.num_rematerialized(graphdef, params, image)


@pytest.mark.slow_variants
@pytest.mark.parametrize('is_bit', [False, True])
def test_bfloat16_computes_near_float32_on_float32_parameters(is_bit):
  _, params = make(is_bit=is_bit)
  narrow, _ = make(is_bit=is_bit, dtype='bfloat16')
  graphdef, _ = make(is_bit=is_bit)
  image = _cnn.images(32)
  expected = _cnn.apply(graphdef, params, image)
  logits = _cnn.apply(narrow, params, image)
  assert logits.dtype == np.float32
  error = np.abs(logits - expected).max()
  assert 1e-5 < error < 0.05 * np.abs(expected).max()


# --- BatchNorm ----------------------------------------------------------------


def test_statistics_move_in_training_alone():
  graphdef, params = make(momentum=0.75)
  image = _cnn.images(16)
  _, moved = _cnn.train(graphdef, params, image)
  x = _cnn.conv(params['conv_stem']['kernel'].astype(float), image, 2)
  new, old = moved['norm_stem'], params['norm_stem']
  for name, moment in (('mean', x.mean((0, 1, 2))), ('var', x.var((0, 1, 2)))):
    expected = 0.75 * old[name] + 0.25 * moment
    np.testing.assert_allclose(new[name], expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(new['scale'], old['scale'])

  @jax.jit
  def evaluate(params):
    model = nnx.merge(graphdef, params)
    model.train()
    model.eval()
    return model(image), nnx.to_pure_dict(nnx.state(model, _cnn.STATE))

  logits, state = evaluate(moved)
  _cnn.assert_trees_equal(state, moved)
  expected = resnet_by_hand(moved, image, True, False)
  _cnn.assert_close(logits, expected)


def inputs_of_batch_norms(graphdef, params, batches, monkeypatch):
  """What each BatchNorm sees in training, in the order of their use."""
  call = nnx.BatchNorm.__call__
  seen = []

  def recorded(self, x, *args, **kwargs):
    seen.append((self.scale[...], x))
    return call(self, x, *args, **kwargs)

  @jax.jit
  def inputs(params, batch):
    seen.clear()
    model = nnx.merge(graphdef, params)
    model.train()
    model(batch)
    return list(seen)

  with monkeypatch.context() as patch:
    patch.setattr(nnx.BatchNorm, '__call__', recorded)
    layers = [jax.device_get(inputs(params, batch)) for batch in batches]
  return {
      np.asarray(layer[0][0]).tobytes(): np.concatenate(
          [x.astype(np.float64) for _, x in layer]
      )
      for layer in zip(*layers)
  }


def layers_of(tree, name):
  """The dicts of a nested dict that have an entry."""
  if not isinstance(tree, dict):
    return []
  layers = [tree] if name in tree else []
  return layers + [y for x in tree.values() for y in layers_of(x, name)]


def test_statistics_of_a_soup_are_those_of_its_own_activations(monkeypatch):
  graphdef, first = make(seed=0)
  _, second = make(seed=1)
  soup = jaxsoup.uniform([first, second]).params
  # Scales, biases and statistics of BatchNorm are averaged as all else is.
  for x, y, z in zip(*map(jax.tree.leaves, (soup, first, second))):
    np.testing.assert_allclose(x, (y + z) / 2, rtol=1e-6, atol=1e-7)
  batches = [3 + _cnn.images(16, num, seed=num) for num in (3, 2, 2)]
  estimated = batch_norm.recalibrated(graphdef, soup, batches)
  inputs = inputs_of_batch_norms(graphdef, soup, batches, monkeypatch)
  norms = layers_of(estimated, 'var')
  assert len(norms) == len(inputs) == 1 + 2 * 3 + 3 + 2
  for norm in norms:
    x = inputs[np.asarray(norm['scale']).tobytes()]
    axes = (0, 1, 2)
    np.testing.assert_allclose(norm['mean'], x.mean(axes), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm['var'], x.var(axes), rtol=1e-4, atol=1e-5)
  for x, y in zip(layers_of(estimated, 'var'), layers_of(soup, 'var')):
    np.testing.assert_array_equal(x['scale'], y['scale'])
    assert np.abs(x['var'] - y['var']).max() > 1e-3
  for x, y in zip(layers_of(estimated, 'kernel'), layers_of(soup, 'kernel')):
    np.testing.assert_array_equal(x['kernel'], y['kernel'])


def test_one_batch_makes_evaluation_what_training_computes():
  graphdef, params = make()
  image = _cnn.images(16, 4)
  estimated = batch_norm.recalibrated(graphdef, params, [image])
  expected, _ = _cnn.train(graphdef, params, image)
  _cnn.assert_close(_cnn.apply(graphdef, estimated, image), expected)


def test_batches_may_be_what_the_model_is_called_with():
  graphdef, params = make()
  image = _cnn.images(16, 4)
  expected = batch_norm.recalibrated(graphdef, params, [image])
  params_again = batch_norm.recalibrated(
      graphdef,
      params,
      [{'image': (image - 1) / 2}],
      call=lambda model, batch: model(2 * batch['image'] + 1),
  )
  for x, y in zip(*map(jax.tree.leaves, (params_again, expected)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


class Net(nnx.Module):
  """BatchNorm after Dropout, and what has random streams beside it."""

  def __init__(self, rngs):
    self.dense = nnx.Linear(2, 2, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.norm = nnx.BatchNorm(2, rngs=rngs)
    self.rngs = rngs

  def __call__(self, x):
    return self.norm(self.dropout(self.dense(x)))


@pytest.mark.parametrize('which', (models.params_of, nnx.state))
def test_statistics_after_dropout_are_those_without_it(which):
  net = Net(nnx.Rngs(0))
  graphdef, params = nnx.graphdef(net), which(net)
  if which is nnx.state:  # With the random streams.
    params = nnx.to_pure_dict(params)
  batches = np.random.default_rng(0).normal(size=(3, 8, 2)).astype(np.float32)
  with jax.transfer_guard('disallow'):
    estimated = batch_norm.recalibrated(graphdef, params, batches)
  x = batches.reshape(-1, 2).astype(np.float64)
  x = x @ np.asarray(params['dense']['kernel'])
  np.testing.assert_allclose(estimated['norm']['mean'], x.mean(0), atol=1e-6)
  np.testing.assert_allclose(estimated['norm']['var'], x.var(0), rtol=1e-5)
  assert jax.tree.structure(estimated) == jax.tree.structure(params)


def test_params_of_another_model_are_an_error():
  graphdef = nnx.graphdef(Net(nnx.Rngs(0)))
  params = models.params_of(Net(nnx.Rngs(0)))
  del params['dense']['bias']
  with pytest.raises(ValueError, match='leaves'):
    batch_norm.recalibrated(graphdef, params, [np.ones((4, 2), 'f')])


@pytest.mark.parametrize('dtype', (bool, np.float32))
def test_padding_is_not_estimated(dtype):
  graphdef, params = make()
  image = _cnn.images(16, 7)
  expected = batch_norm.recalibrated(graphdef, params, [image[:4], image[4:]])
  masks = np.array([[1, 0.5, 2, 0], [0, 0, 0, 0]]).astype(dtype)
  batches = [
      {'image': image[:4]},
      {'image': image[[4, 5, 6, 6]], 'mask': masks[0]},
      {'image': 9 * image[:4], 'mask': masks[1]},  # Nothing but padding.
  ]
  padded = batch_norm.recalibrated(
      graphdef, params, batches, call=lambda model, b: model(b['image'])
  )
  for x, y in zip(*map(jax.tree.leaves, (padded, expected)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_nothing_to_estimate():
  graphdef, params = make()
  with pytest.raises(ValueError, match='0 images'):
    batch_norm.recalibrated(graphdef, params, [])
  graphdef, params = make(is_bit=True)
  with pytest.raises(ValueError, match='a model with nnx.BatchNorm'):
    batch_norm.recalibrated(graphdef, params, [_cnn.images(16)])


# --- Files --------------------------------------------------------------------


def file_of(naming='hf', **changes):
  """Arguments, parameters and file of a small model."""
  arguments = {**SMALL, **changes}
  _, params = make(**changes)
  table = resnet.TABLES[naming](**arguments)
  return params, _cnn.Stored(dict(_names.write(params, table)))


@pytest.mark.parametrize('naming', list(resnet.TABLES))
@pytest.mark.parametrize(
    'kind',
    [
        {'is_bottleneck': False},
        {'is_bottleneck': True, 'num_channels': 1},
        {'is_bit': True},
        {'has_small_stem': True},
    ],
)
def test_a_file_says_what_it_holds(naming, kind):
  params, stored = file_of(naming, **kind)
  stored.arrays['conv.num_batches_tracked'] = np.array(7)
  config = {'num_groups': 4}
  _, again, _ = _cnn.load(resnet, resnet.ResNet, naming, stored, config)
  _cnn.assert_trees_equal(again, params)


def test_files_that_are_no_resnet_of_ours():
  _, stored = file_of()
  with pytest.raises(ValueError, match="with names 'timm': conv1"):
    resnet.arguments('timm', stored.shapes, {})
  with pytest.raises(ValueError, match='downsample_in_bottleneck = True'):
    resnet.arguments('hf', stored.shapes, {'downsample_in_bottleneck': True})
  del stored.arrays['classifier.1.weight']
  assert resnet.arguments('hf', stored.shapes, {})['num_classes'] == 0


SMALL_HF = dict(embedding_size=8, depths=[2, 1])


@pytest.mark.reference
@pytest.mark.parametrize(
    ('size', 'options'),
    [
        (33, dict(SMALL_HF, hidden_sizes=[8, 16], layer_type='basic')),
        (33, dict(SMALL_HF, hidden_sizes=[32, 64])),
        (64, dict(depths=[1, 2, 1, 1])),
    ],
)
def test_resnet_of_transformers(size, options, tmp_path):
  transformers = pytest.importorskip('transformers')
  config = transformers.ResNetConfig(num_labels=7, **options)
  reference = transformers.ResNetForImageClassification(config)
  _cnn.check_hf(resnet, resnet.ResNet, reference, size, tmp_path)


@pytest.mark.reference
@pytest.mark.parametrize(
    ('size', 'options'),
    [
        (33, dict(SMALL_HF, hidden_sizes=[32, 64], num_groups=4)),
        (64, dict(depths=[1, 1, 1, 1])),
    ],
)
def test_bit_of_transformers(size, options, tmp_path):
  transformers = pytest.importorskip('transformers')
  config = transformers.BitConfig(num_labels=7, **options)
  reference = transformers.BitForImageClassification(config)
  _cnn.check_hf(resnet, resnet.ResNet, reference, size, tmp_path)


@pytest.mark.slow_variants
@pytest.mark.reference
@pytest.mark.parametrize(
    ('name', 'num_layers', 'atol'),
    [
        ('resnet18', 18, 1e-5),
        ('resnet50', 50, 1e-5),
        # At this depth float32 is 2e-5 from float64, in torch as here.
        ('resnetv2_50x1_bit', 50, 5e-5),
    ],
)
def test_resnets_of_timm(name, num_layers, atol, tmp_path):
  kind = {**resnet.size(num_layers), 'is_bit': name.endswith('bit')}
  arguments = {'num_classes': 7, **kind}
  _, shapes = _cnn.abstract(resnet.ResNet, arguments)
  _cnn.check_timm(
      resnet,
      resnet.ResNet,
      name,
      arguments,
      _cnn.random_params(shapes),
      tmp_path,
      config={},
      atol=atol,
  )
