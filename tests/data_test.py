"""The digits and their shifts."""

import jax
import numpy as np
import pytest
from sklearn import datasets

from jaxsoup.data import digits
from jaxsoup.data import shifts

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
