"""Fashion-MNIST from files of its kind, its shifts, and what models want."""

import gzip
import os
import pathlib
import struct

import jax
import numpy as np
from PIL import Image
import pytest
from sklearn import neighbors

from jaxsoup.data import fashion
from jaxsoup.data import preparation
from jaxsoup.data import shifts
from jaxsoup.data import sources

NUMS = {'train': 300, 't10k': 200}
SIZES = dict(train=100, held_out=80, test=150)


def _image(prefix):
  """Images of which every one is known by its first two pixels."""
  num = NUMS[prefix]
  rng = np.random.default_rng(len(prefix))
  image = rng.integers(0, 256, (num, 28, 28), np.uint8)
  image[:, 0, 0], image[:, 0, 1] = divmod(np.arange(num), 256)
  return image


def _label(prefix):
  return (np.arange(NUMS[prefix]) % 10).astype(np.uint8)


@pytest.fixture(params=['gzip', 'plain'])
def folder(request, tmp_path, monkeypatch):
  """The four files, by their description, with fewer examples."""
  for prefix, num in NUMS.items():
    for kind, header, array in (
        ('images-idx3', (0x803, num, 28, 28), _image(prefix)),
        ('labels-idx1', (0x801, num), _label(prefix)),
    ):
      content = struct.pack(f'>{len(header)}I', *header) + array.tobytes()
      path = tmp_path / f'{prefix}-{kind}-ubyte'
      if request.param == 'gzip':
        path = path.with_name(path.name + '.gz')
        content = gzip.compress(content)
      path.write_bytes(content)
  parts = {'train': ('train', 300), 'test': ('t10k', 200)}
  monkeypatch.setattr(fashion, '_PARTS', parts)
  return tmp_path


def read(folder):
  return fashion.splits(folder, SIZES, 0, severities={})


def test_files_are_read(folder):
  sizes = dict(train=300 - 1, held_out=1, test=200)
  data = fashion.splits(folder, sizes, 0, severities={})
  for prefix, part in zip(NUMS, (data.train.arrays, data.test.arrays)):
    assert part['image'].dtype == np.float32
    assert part['label'].dtype == np.int32
    rows = _rows(sources.Arrays(part))
    np.testing.assert_allclose(
        part['image'][..., 0], _image(prefix)[rows] / 255, atol=1e-7
    )
    np.testing.assert_array_equal(part['label'], _label(prefix)[rows])


def _rows(source):
  pixels = np.round(source.arrays['image'][:, 0, :2, 0] * 255).astype(int)
  rows = pixels[:, 0] * 256 + pixels[:, 1]
  np.testing.assert_array_equal(source.arrays['label'], rows % 10)
  return rows


def test_sets_are_disjoint_and_decided_by_the_seed(folder):
  sizes = {**SIZES, 'pretrain': 120}
  first, again, other = (fashion.splits(folder, sizes, s) for s in (0, 0, 1))
  of_train = [*_rows(first.train), *_rows(first.held_out)]
  of_train += [*_rows(first.pretrain)]
  assert sorted(of_train) == list(range(300))
  assert len(set(_rows(first.test))) == len(first.test) == 150
  for name in sizes:
    ours, same = (_rows(getattr(splits, name)) for splits in (first, again))
    np.testing.assert_array_equal(ours, same)
    assert len(ours) == sizes[name]
  assert set(_rows(first.test)) != set(_rows(other.test))
  assert fashion.splits(folder, SIZES, 0).pretrain is None


def test_shifts_are_those_of_the_test_set(folder):
  splits = fashion.splits(folder, SIZES, 3)
  assert splits.shifts.keys() == fashion.SEVERITIES.keys()
  assert splits.shifts.keys() == shifts.SHIFTS.keys()
  for name, source in splits.shifts.items():
    expected = shifts.apply(
        splits.test.arrays, name, fashion.SEVERITIES[name], seed=3
    )
    np.testing.assert_array_equal(source.arrays['image'], expected['image'])
    np.testing.assert_array_equal(
        source.arrays['label'], splits.test.arrays['label']
    )
  some = fashion.splits(
      folder, SIZES, 3, severities=dict(blur=1.0, noise=0.0, fog=0.2)
  )
  assert list(some.shifts) == ['blur', 'fog']


def test_errors(folder):
  with pytest.raises(
      ValueError, match='ask for 301 examples, but the train .* 300'
  ):
    fashion.splits(folder, {**SIZES, 'train': 221}, 0)
  with pytest.raises(
      ValueError, match='ask for 201 examples, but the test .* 200'
  ):
    fashion.splits(folder, {**SIZES, 'test': 201}, 0)
  with pytest.raises(
      ValueError, match="keys .'test', 'train'.: expected train"
  ):
    fashion.splits(folder, dict(train=1, test=1), 0)
  with pytest.raises(ValueError, match="No shift 'snow'"):
    fashion.splits(folder, SIZES, 0, severities=dict(snow=1.0))
  with pytest.raises(
      FileNotFoundError, match='apt-get install dataset-fashion'
  ):
    read(folder / 'nowhere')


@pytest.mark.parametrize('folder', ['plain'], indirect=True)
def test_broken_files_are_named(folder):
  label = folder / 't10k-labels-idx1-ubyte'
  content = label.read_bytes()
  label.write_bytes(content[:-1])
  with pytest.raises(
      ValueError, match='t10k-labels.* has 207 bytes: it is not'
  ):
    read(folder)
  label.write_bytes((folder / 't10k-images-idx3-ubyte').read_bytes())
  with pytest.raises(
      ValueError, match=r'labels.* starts with .2051, 200. and .* .N.'
  ):
    read(folder)
  label.write_bytes(struct.pack('>2I', 0x801, 199) + content[8:-1])
  with pytest.raises(ValueError, match='200 images and 199 labels of the test'):
    read(folder)


@pytest.mark.parametrize('folder', ['gzip'], indirect=True)
@pytest.mark.parametrize('content', [b'<html>', gzip.compress(b'0' * 99)[:20]])
def test_broken_archives_are_named(folder, content):
  (folder / 't10k-labels-idx1-ubyte.gz').write_bytes(content)
  with pytest.raises(ValueError, match='t10k-labels.*gz is damaged: '):
    read(folder)


def test_tfds(decoded_mocks, monkeypatch):
  tfds = pytest.importorskip('tensorflow_datasets')
  monkeypatch.setattr(
      fashion, '_PARTS', {'train': ('train', 20), 'test': ('t10k', 20)}
  )
  with tfds.testing.mock_data(num_examples=20):
    rows = list(tfds.data_source('fashion_mnist', split='train'))
    sizes = dict(train=19, held_out=1, test=20)
    splits = fashion.splits(None, sizes, 0, severities={})
  key = lambda image, label: (image.astype(np.float32).tobytes(), int(label))
  assert splits.train.arrays['image'].shape == (19, 28, 28, 1)
  assert {key(row['image'] / 255, row['label']) for row in rows} == {
      key(*pair)
      for part in (splits.train, splits.held_out)
      for pair in zip(*part.arrays.values())
  }


@pytest.mark.pretrained
def test_the_real_files():
  folder = pathlib.Path(os.environ.get('JAXSOUP_FASHION', fashion.FOLDER))
  if not folder.exists():
    pytest.skip(f'{folder} is not there: dataset-fashion-mnist, a .deb package')
  sizes = dict(train=3000, held_out=500, test=1000)
  splits = fashion.splits(folder, sizes, seed=0)
  train, test = (s.arrays for s in (splits.train, splits.test))
  assert np.bincount(train['label'], minlength=10).min() > 200
  # The mean of all training pixels, as is known.
  np.testing.assert_allclose(train['image'].mean(), 0.2860, atol=0.01)
  flat = lambda arrays: arrays['image'].reshape(len(arrays['image']), -1)
  model = neighbors.KNeighborsClassifier(5)
  model.fit(flat(train), train['label'])
  clean = model.score(flat(test), test['label'])
  assert 0.77 < clean < 0.88
  for name, source in splits.shifts.items():
    score = model.score(flat(source.arrays), source.arrays['label'])
    assert 0.25 < score < clean, name


# --- What models want ---------------------------------------------------------


@pytest.mark.parametrize('method', ['bicubic', 'bilinear'])
@pytest.mark.parametrize('shape', [(56, 56), (42, 70), (14, 28), (9, 11)])
def test_resizing_is_that_of_pil(method, shape, rng):
  image = rng.random((3, 28, 28, 1), np.float32)
  filter_ = getattr(Image.Resampling, method.upper())
  expected = np.stack(
      [Image.fromarray(x[..., 0]).resize(shape[::-1], filter_) for x in image]
  )
  spec = preparation.ImageSpec(
      (*shape, 1), (0.0,), (1.0,), interpolation=method
  )
  got = spec.prepare(image)
  np.testing.assert_allclose(got[..., 0], expected.clip(0, 1), atol=1e-5)


def test_grey_becomes_colours_in_the_model_s_units(rng):
  image = rng.random((2, 8, 8, 1), np.float32)
  spec = preparation.ImageSpec(8)
  got = spec.prepare(image)
  for i, (mean, std) in enumerate(
      zip(preparation.IMAGENET_MEAN, preparation.IMAGENET_STD)
  ):
    np.testing.assert_allclose(
        got[..., i], (image[..., 0] - mean) / std, rtol=1e-5, atol=1e-6
    )
  traced = jax.jit(spec.prepare)(image)
  np.testing.assert_allclose(traced, got, atol=1e-5)


def test_colours_stay_and_cannot_become_grey(rng):
  image = rng.random((2, 8, 8, 3), np.float32)
  half = preparation.HALF
  got = preparation.ImageSpec(8, half, half).prepare(image)
  np.testing.assert_allclose(got, 2 * image - 1, atol=1e-6)
  with pytest.raises(ValueError, match='3 channels, but the model takes 1'):
    preparation.ImageSpec((8, 8, 1)).prepare(image)
  with pytest.raises(
      ValueError, match='3 and 3 numbers, but the model takes 1'
  ):
    preparation.ImageSpec((8, 8, 1)).prepare(image[..., :1])
