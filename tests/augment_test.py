"""Augmentations, against the Python Imaging Library and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from PIL import ImageEnhance
from PIL import ImageOps
import pytest

from jaxsoup.data import augment
from jaxsoup.data import pixels

# One grey level, and half of one for what was rounded before.
LEVEL = 1.5 / 255
KEY = jax.random.key(0)
MATRIX = dict(
    rotate=lambda m: _rotation(np.radians(30) * m),
    shear_x=lambda m: [[1, 0], [0.3 * m, 1]],
    shear_y=lambda m: [[1, 0.3 * m], [0, 1]],
)
FACTOR = lambda magnitude: 1 + 0.9 * magnitude
PIL_OPS = dict(
    identity=lambda x, m: x,
    color=lambda x, m: ImageEnhance.Color(x).enhance(FACTOR(m)),
    contrast=lambda x, m: ImageEnhance.Contrast(x).enhance(FACTOR(m)),
    brightness=lambda x, m: ImageEnhance.Brightness(x).enhance(FACTOR(m)),
    sharpness=lambda x, m: ImageEnhance.Sharpness(x).enhance(FACTOR(m)),
    solarize=lambda x, m: ImageOps.solarize(x, 256 * (1 - abs(m))),
    posterize=lambda x, m: ImageOps.posterize(x, 8 - round(4 * abs(m))),
    autocontrast=lambda x, m: ImageOps.autocontrast(x),
    equalize=lambda x, m: ImageOps.equalize(x),
)


def photo(channels=3, size=(24, 20), seed=0):
  """Smooth, with a skewed histogram, as photographs are; in grey levels."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(10, 200, (5, 4, channels)).astype(np.uint8)
  planes = [
      Image.fromarray(coarse[..., c]).resize(size[::-1], Image.BICUBIC)
      for c in range(channels)
  ]
  return np.stack([np.asarray(plane) for plane in planes], -1)


def unit(image):
  return np.asarray(image, np.float32) / 255


def as_pil(levels):
  return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


def from_pil(image):
  levels = np.asarray(image)
  return unit(levels[..., None] if levels.ndim == 2 else levels)


def _rotation(angle):
  cos, sin = np.cos(angle), np.sin(angle)
  return [[cos, -sin], [sin, cos]]


# Compiled: op by op, every one of their small steps would be.
operate = jax.jit(augment.operate)
rand = jax.jit(augment.rand)


def test_every_operation_is_tested():
  moves = {'translate_x', 'translate_y', *MATRIX}
  assert {*PIL_OPS, *moves} == set(augment.OPERATIONS)


@pytest.mark.parametrize('magnitude', [-1.0, -0.4, 0.3, 0.75, 1.0])
@pytest.mark.parametrize('name', PIL_OPS)
@pytest.mark.parametrize('channels', [1, 3])
def test_operations_are_those_of_pil(name, magnitude, channels):
  levels = photo(channels)
  expected = from_pil(PIL_OPS[name](as_pil(levels), magnitude))
  op = augment.OPERATIONS.index(name)
  got = operate(unit(levels), op, magnitude)
  if name in ('solarize', 'posterize', 'equalize'):
    np.testing.assert_allclose(got, expected, atol=1e-5)
  np.testing.assert_allclose(got, expected, atol=LEVEL)
  if name == 'identity':
    np.testing.assert_allclose(got, unit(levels), atol=1e-6)
  elif not (name == 'color' and channels == 1):
    assert np.abs(got - unit(levels)).max() > 0.5 / 255


@pytest.mark.parametrize('magnitude', [-1.0, 0.5])
@pytest.mark.parametrize('name', MATRIX)
def test_moves_are_those_of_pil(name, magnitude):
  levels = photo()
  height, width, _ = levels.shape
  # PIL asks for x before y, and for coordinates of corners, not of middles.
  matrix = np.array(MATRIX[name](magnitude))[::-1, ::-1]
  centre = np.array([width, height]) / 2
  rows = np.column_stack([matrix, centre - matrix @ centre])
  data, size = tuple(rows.ravel()), (width, height)

  def moved(x):
    x = Image.fromarray(x)
    return unit(x.transform(size, Image.AFFINE, data, Image.BILINEAR))

  op = augment.OPERATIONS.index(name)
  got = np.asarray(operate(unit(levels), op, magnitude))
  # PIL repeats the outermost half pixel, where ours fades into the grey.
  reach = np.full_like(levels, 255)
  reach[0], reach[-1], reach[:, 0], reach[:, -1] = 0, 0, 0, 0
  is_inside = moved(reach) == 1
  assert is_inside.mean() > 0.4
  expected = moved(levels)[is_inside]
  np.testing.assert_allclose(got[is_inside], expected, atol=LEVEL)


@pytest.mark.parametrize('name, axis', [('translate_y', 0), ('translate_x', 1)])
def test_translations_are_slices(name, axis):
  image = unit(photo(size=(20, 20)))
  op = augment.OPERATIONS.index(name)
  got = operate(image, op, 1 / 3)  # 0.45 / 3 of 20 pixels: 3 of them.
  before, after = np.moveaxis(image, axis, 0), np.moveaxis(got, axis, 0)
  np.testing.assert_allclose(after[:-3], before[3:], atol=1e-5)
  np.testing.assert_allclose(after[-3:], 0.5, atol=1e-5)


def test_equalize_leaves_one_level_and_few_pixels():
  constant = np.full((20, 20, 1), 0.3, np.float32)
  np.testing.assert_array_equal(pixels.equalize(constant), constant)
  np.testing.assert_array_equal(pixels.autocontrast(constant), constant)
  few = np.random.default_rng(0).random((4, 4, 1)).astype(np.float32)
  np.testing.assert_array_equal(pixels.equalize(few), few)


@pytest.mark.parametrize('box', [(0, 0, 24, 20), (3.2, 1.7, 11.5, 13.1)])
def test_a_crop_is_that_of_pil(box):
  top, left, height, width = box
  levels = photo(1)
  expected = as_pil(levels.astype(np.float32)).resize(
      (20, 24), Image.BILINEAR, box=(left, top, left + width, top + height)
  )
  got = pixels.crop(unit(levels), jnp.array(box[:2]), jnp.array(box[2:]))
  np.testing.assert_allclose(got[..., 0], np.asarray(expected) / 255, atol=1e-4)


def test_crops_are_parts_of_the_sizes_that_are_asked_for(monkeypatch):
  seen = []
  monkeypatch.setattr(
      pixels, 'crop', lambda x, start, size: seen.append((start, size)) or x
  )
  monkeypatch.setattr(jax, 'vmap', lambda fn: fn)
  image = jnp.zeros((2000, 10, 20, 1))
  augment.crop(KEY, image, 0.5)
  start, size = map(np.asarray, seen[0])
  assert (start >= 0).all() and (start + size <= [10 + 1e-4, 20 + 1e-4]).all()
  share = (size / [10, 20]).prod(1)
  ratio = size[:, 1] / size[:, 0] / 2
  is_cut = (size >= [10 - 1e-4, 20 - 1e-4]).any(1)
  assert 0.1 < is_cut.mean() < 0.5
  # Uniform from 1 - 0.5 * 0.92 where nothing was cut, and never below.
  assert 0.54 - 1e-4 <= share.min() < 0.56
  assert np.abs(np.log(ratio)).max() <= 0.5 * np.log(4 / 3) + 1e-4
  assert ratio.min() < 0.88 and ratio.max() > 1.14


def test_flips_are_as_frequent_as_asked():
  image = np.random.default_rng(0).random((400, 3, 4, 2)).astype(np.float32)
  got = np.asarray(augment.flip(KEY, image, 0.25))
  is_flipped = (got == image[:, :, ::-1]).all((1, 2, 3))
  is_same = (got == image).all((1, 2, 3))
  assert (is_flipped ^ is_same).all()
  assert 70 < is_flipped.sum() < 130


@pytest.mark.slow
def test_rand_runs_the_operations_it_draws():
  image = unit(np.stack([photo(seed=i) for i in range(6)]))
  got = rand(KEY, image, 0.6)
  op_key, sign_key = jax.random.split(KEY)
  ops = jax.random.randint(op_key, (2, 6), 0, len(augment.OPERATIONS))
  signs = jax.random.rademacher(sign_key, (2, 6))
  for i, expected in enumerate(image):
    for op, sign in zip(ops[:, i], signs[:, i]):
      expected = operate(expected, op, 0.6 * sign)
    np.testing.assert_allclose(got[i], expected, atol=1e-4)


def test_rand_draws_every_operation_as_often():
  key, _ = jax.random.split(KEY)
  ops = jax.random.randint(key, (2, 7000), 0, len(augment.OPERATIONS))
  share = np.bincount(ops.ravel(), minlength=14) / 1000
  np.testing.assert_allclose(share, 1, atol=0.12)


@pytest.mark.slow_variants
@pytest.mark.parametrize('name', ['flip', 'crop', 'rand', 'affine', 'noise'])
def test_images_at_strength_0_and_over_strengths(name):
  augment_fn = jax.jit(getattr(augment, name))
  image = unit(np.stack([photo(seed=i) for i in range(3)]))
  strengths = jnp.array([0.0, 0.5, 1.0])
  swept = jax.jit(jax.vmap(lambda s: augment_fn(KEY, image, s)))(strengths)
  np.testing.assert_allclose(swept[0], image, atol=1e-5)
  for got, strength in zip(swept, strengths):
    np.testing.assert_allclose(got, augment_fn(KEY, image, strength), atol=1e-4)
    is_new = np.abs(got - image).max() > 0.01
    assert is_new == (strength > 0)


@pytest.mark.parametrize('name', ['flip', 'crop', 'rand', 'affine'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('channels', [1, 2, 3])
def test_images_keep_their_shape_and_dtype(name, dtype, channels):
  image = jax.ShapeDtypeStruct((2, 8, 9, channels), dtype)
  strength = jax.ShapeDtypeStruct((), 'float32')
  got = jax.eval_shape(getattr(augment, name), KEY, image, strength)
  assert (got.shape, got.dtype) == (image.shape, image.dtype)


def test_cutmix_pastes_a_box_and_counts_its_pixels():
  num, size = 64, 12
  image = np.broadcast_to(
      np.arange(num, dtype=np.float32)[:, None, None, None],
      (num, size, size, 1),
  )
  target = np.eye(num, dtype=np.float32)
  mixed, mixed_target = map(np.asarray, augment.cutmix(KEY, image, target, 1.0))
  num_boxes = 0
  for i in range(num):
    is_pasted = mixed[i, :, :, 0] != i
    expected = np.zeros(num)
    for value in mixed[i].ravel().astype(int):
      expected[value] += 1 / size**2
    np.testing.assert_allclose(mixed_target[i], expected, atol=1e-5)
    # A box is the product of the rows and the columns it touches.
    box = np.outer(is_pasted.any(1), is_pasted.any(0))
    np.testing.assert_array_equal(is_pasted, box)
    num_boxes += is_pasted.any()
  assert num_boxes > num / 2


def test_cutmix_at_strength_0_and_over_strengths():
  image = unit(np.stack([photo(seed=i) for i in range(8)]))
  target = np.eye(8, dtype=np.float32)
  fn = lambda s: augment.cutmix(KEY, image, target, s)
  mixed, mixed_target = jax.vmap(fn)(jnp.array([0.0, 0.3, 1.0]))
  np.testing.assert_array_equal(mixed[0], image)
  np.testing.assert_array_equal(mixed_target[0], target)
  kept = np.diagonal(mixed_target, axis1=1, axis2=2).mean(1)
  # A box keeps its area where it lies inside, and loses some at the edge.
  assert 1 > kept[1] > 1 - 0.15 > kept[2] > 0.4


def test_token_dropout_spares_special_tokens():
  rng = np.random.default_rng(0)
  input_ids = rng.integers(1000, 2000, (50, 20)).astype(np.int32)
  input_ids[:, 0], input_ids[:, 14], input_ids[:, 15:] = 101, 102, 0
  drop_fn = lambda s: augment.token_dropout(
      KEY, input_ids, s, mask_id=103, special_ids=(0, 101, 102)
  )
  none, some, every = np.asarray(jax.vmap(drop_fn)(jnp.array([0.0, 0.3, 1.0])))
  np.testing.assert_array_equal(none, input_ids)
  is_word = input_ids >= 1000
  np.testing.assert_array_equal(every, np.where(is_word, 103, input_ids))
  np.testing.assert_array_equal(some[~is_word], input_ids[~is_word])
  is_dropped = some != input_ids
  assert (some[is_dropped] == 103).all()
  assert 0.24 < is_dropped[is_word].mean() < 0.36
