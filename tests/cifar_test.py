"""CIFAR: binary files, TFDS, shifts."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxsoup.data import cifar

NUM = {10: 20, 100: 200}


def _write(folder, num_classes, rng):
  """Files of the binary version, and what they hold, by split."""
  written = {}
  for split, names in cifar.FILES[num_classes].items():
    images, labels = [], []
    for name in names:
      num = NUM[num_classes]
      image = rng.integers(0, 256, (num, 32, 32, 3), np.uint8)
      label = np.arange(num, dtype=np.uint8) % num_classes
      with open(folder / name, 'wb') as file:
        for x, y in zip(image, label):
          coarse = [y // 5] if num_classes == 100 else []
          file.write(bytes([*coarse, y]))
          for channel in range(3):
            file.write(x[:, :, channel].tobytes())
      images.append(image)
      labels.append(label)
    written[split] = np.concatenate(images), np.concatenate(labels)
  return written


@pytest.fixture(params=[10, 100])
def num_classes(request):
  return request.param


def test_binary_files(num_classes, tmp_path, rng):
  written = _write(tmp_path, num_classes, rng)
  for split, (image, label) in written.items():
    arrays = cifar.read(num_classes, split, tmp_path).arrays
    assert arrays['image'].dtype == np.float32
    np.testing.assert_array_equal(arrays['image'], image / np.float32(255))
    assert arrays['label'].dtype == np.int32
    np.testing.assert_array_equal(arrays['label'], label)


def test_splits(num_classes, tmp_path, rng):
  written = _write(tmp_path, num_classes, rng)
  splits = cifar.splits(num_classes, folder=tmp_path, share=0.5, seed=2)
  parts = [x.arrays for x in (splits.train, splits.held_out)]
  seen = {x.tobytes() for part in parts for x in part['image']}
  image, _ = written['train']
  assert seen == {x.tobytes() for x in image / np.float32(255)}
  assert len(splits.train) + len(splits.held_out) == len(seen)
  counts = np.bincount(splits.held_out.arrays['label'])
  assert counts.tolist() == [len(image) // num_classes // 2] * num_classes
  assert splits.rules['held_out']['count'] == len(splits.held_out)
  np.testing.assert_array_equal(splits.test.arrays['label'], written['test'][1])


def test_broken_files_are_refused(tmp_path, rng):
  _write(tmp_path, 10, rng)
  file = tmp_path / 'test_batch.bin'
  whole = file.read_bytes()
  file.write_bytes(whole[:-1])
  with pytest.raises(ValueError, match='61459 bytes, .* multiple of 3073'):
    cifar.read(10, 'test', tmp_path)
  file.write_bytes(bytes([10]) + whole[1:])
  with pytest.raises(ValueError, match='label 10, but CIFAR-10 only 0 to 9'):
    cifar.read(10, 'test', tmp_path)
  file.unlink()
  with pytest.raises(FileNotFoundError, match='cifar-10-binary.tar.gz'):
    cifar.read(10, 'test', tmp_path)


def test_tfds_and_shifts(decoded_mocks):
  shifts = ['CIFAR-10.1', 'fog_3', 'speckle_noise_5']
  with tfds.testing.mock_data(num_examples=60):
    splits = cifar.splits(10, shifts=shifts, share=0.2)
    records = tfds.data_source('cifar10_1/v6', split='test')
    image = np.stack([records[i]['image'] for i in range(60)])
  assert list(splits.shifts) == shifts
  shift = splits.shifts['CIFAR-10.1'].arrays
  np.testing.assert_array_equal(shift['image'], image / np.float32(255))
  for source in (splits.train, splits.test, *splits.shifts.values()):
    assert source.arrays['image'].shape[1:] == (32, 32, 3)
    assert source.arrays['label'].dtype == np.int32


@pytest.mark.slow
def test_tfds_of_100_classes(decoded_mocks):
  with tfds.testing.mock_data(num_examples=3000):
    builder = tfds.builder('cifar100')
    assert builder.info.features['label'].num_classes == 100
    splits = cifar.splits(100)
  assert splits.train.arrays['label'].max() > 90


def test_corruptions_are_those_of_tfds():
  configs = tfds.builder_cls('cifar10_corrupted').builder_configs
  ours = {f'{kind}_{i}' for kind in cifar.CORRUPTIONS for i in range(1, 6)}
  assert ours == set(configs)


def test_what_there_is_not():
  with pytest.raises(ValueError, match='no CIFAR-20'):
    cifar.splits(20)
  for num, shift in ((10, 'fog'), (10, 'fog_6'), (100, 'fog_3'), (10, 'x_1')):
    with pytest.raises(ValueError, match=f'CIFAR-{num} has no shift {shift!r}'):
      cifar.splits(num, shifts=[shift])
