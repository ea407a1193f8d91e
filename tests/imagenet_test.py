"""ImageNet: pixels, label spaces, views, held-out sets, folders."""

import collections
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets

from jaxsoup.data import imagenet
from jaxsoup.data import sources
from jaxsoup.data import tfds

PIXELS = imagenet.Pixels(size=16)
PLAIN = imagenet.Pixels(size=16, mean=(0, 0, 0), std=(1, 1, 1))


def _image(rng, width, height):
  """Smooth noise, as bytes of pixels."""
  small = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
  image = Image.fromarray(small).resize((width, height))
  return np.asarray(image)


def _lanes(width, height):
  """Red grows from the left to the right, green from the top down."""
  red = np.linspace(0, 255, width)[None, :] * np.ones((height, 1))
  green = np.linspace(0, 255, height)[:, None] * np.ones((1, width))
  return np.stack([red, green, 0 * red], -1).round().astype(np.uint8)


def test_an_evaluation_sees_the_middle():
  # 128 x 64 becomes 36 x 18, of which rows 1..17 and columns 10..26 are seen.
  image = PLAIN.evaluated(_lanes(128, 64))
  assert image.shape == (16, 16, 3) and image.dtype == np.float32
  column = (np.arange(10, 26) + 0.5) / 36
  row = (np.arange(1, 17) + 0.5) / 18
  np.testing.assert_allclose(image[5, :, 0], column, atol=0.01)
  np.testing.assert_allclose(image[:, 5, 1], row, atol=0.01)


@pytest.mark.reference
@pytest.mark.parametrize('shape', [(70, 50), (50, 70), (18, 18), (12, 15)])
def test_an_evaluation_agrees_with_torch(rng, shape):
  torch = pytest.importorskip('torch', reason='the extra `reference`')
  image = _image(rng, *shape)
  height, width = image.shape[:2]
  if width < height:
    size = (int(18 * height / width), 18)
  else:
    size = (18, int(18 * width / height))
  x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
  x = torch.nn.functional.interpolate(
      x, size, mode='bicubic', antialias=True, align_corners=False
  )
  top, left = (size[0] - 16) // 2, (size[1] - 16) // 2
  x = x[0, :, top : top + 16, left : left + 16].permute(1, 2, 0).numpy()
  expected = (x / 255 - imagenet.IMAGENET_MEAN) / imagenet.IMAGENET_STD
  # Of 255 grey levels, one.
  np.testing.assert_allclose(PIXELS.evaluated(image), expected, atol=0.02)


def test_normalization():
  pixels = imagenet.Pixels(8, imagenet.CLIP_MEAN, imagenet.CLIP_STD)
  image = np.full((20, 20, 3), (51, 102, 255), np.uint8)
  expected = (np.array([0.2, 0.4, 1.0]) - pixels.mean) / pixels.std
  for result in (
      pixels.evaluated(image),
      pixels.trained(image, np.random.default_rng(0)),
  ):
    assert result.shape == (8, 8, 3) and result.dtype == np.float32
    np.testing.assert_allclose(result[3, 4], expected, atol=1e-6)


def test_images_come_in_any_form(tmp_path):
  image = np.full((20, 24, 3), (10, 20, 30), np.uint8)
  Image.fromarray(image).save(tmp_path / 'x.png')
  expected = PIXELS.evaluated(image)
  for form in (
      tmp_path / 'x.png',
      str(tmp_path / 'x.png'),
      (tmp_path / 'x.png').read_bytes(),
      Image.fromarray(image).convert('RGBA'),
  ):
    np.testing.assert_array_equal(PIXELS.evaluated(form), expected)
  grey = np.full((20, 24, 1), 10, np.uint8)
  np.testing.assert_array_equal(
      PIXELS.evaluated(grey), PIXELS.evaluated(grey.repeat(3, -1))
  )


def test_training_shows_what_its_draws_say():
  """Box and flip are read off an image whose colours are its coordinates."""
  image = _lanes(400, 300)
  pixels = imagenet.Pixels(32, (0, 0, 0), (1, 1, 1), min_area=0.25)
  areas, ratios, flips = [], [], []
  for seed in range(300):
    shown = pixels.trained(image, np.random.default_rng(seed))
    # From centre to centre of the outer pixels, 31 of 32 of the side.
    across = shown[16, -1, 0] - shown[16, 0, 0]
    down = shown[-1, 16, 1] - shown[0, 16, 1]
    flips.append(across < 0)
    areas.append(abs(across) * down * (32 / 31) ** 2)
    ratios.append(abs(across) * 400 / (down * 300))
  areas, ratios = np.array(areas), np.array(ratios)
  assert 0.24 < areas.min() < 0.3 and 0.8 < areas.max() < 1.01
  assert 0.72 < ratios.min() < 0.8 and 1.27 < ratios.max() < 1.36
  assert 0.4 < np.mean(flips) < 0.6
  # Boxes that do not fit are drawn again: large ones are rarer.
  assert 0.45 < areas.mean() < 0.625


def test_training_is_decided_by_the_generator(rng):
  image = _image(rng, 40, 30)
  draw = lambda seed: PIXELS.trained(image, np.random.default_rng(seed))
  np.testing.assert_array_equal(draw(0), draw(0))
  assert not np.array_equal(draw(0), draw(1))


def test_a_narrow_image_shows_its_middle():
  narrow = _lanes(300, 4)
  shown = PLAIN.trained(narrow, np.random.default_rng(0))
  # Five of 300 columns.
  middle = shown[:, :, 0]
  assert middle.max() - middle.min() < 6 / 300
  np.testing.assert_allclose(middle.mean(), 0.5, atol=0.02)


def test_class_lists():
  for classes in (imagenet.R_CLASSES, imagenet.A_CLASSES):
    assert len(classes) == 200 and list(classes) == sorted(set(classes))
  assert len({*imagenet.R_CLASSES} & {*imagenet.A_CLASSES}) == 86


@pytest.mark.reference
@pytest.mark.parametrize(
    'letter, classes',
    [('r', imagenet.R_CLASSES), ('a', imagenet.A_CLASSES)],
)
def test_class_lists_are_those_of_timm(letter, classes):
  info = _timm_info()
  file = info / f'imagenet_{letter}_indices.txt'
  assert tuple(map(int, file.read_text().split())) == classes
  synsets = (info / f'imagenet_{letter}_synsets.txt').read_text().split()
  assert [imagenet.wordnet_ids()[i] for i in classes] == synsets


@functools.cache
def _timm_info() -> pathlib.Path:
  """The folder of timm's lists, found without importing timm."""
  python = os.environ.get('JAXSOUP_TIMM_PYTHON', sys.executable)
  code = (
      'import importlib.util as u; s = u.find_spec("timm"); '
      'print(s.submodule_search_locations[0] if s else "")'
  )
  done = subprocess.run([python, '-c', code], capture_output=True, text=True)
  if not done.stdout.strip():
    pytest.skip(f'{python} has no timm: set JAXSOUP_TIMM_PYTHON')
  return pathlib.Path(done.stdout.strip()) / 'data' / '_info'


def test_wordnet_ids():
  ids = imagenet.wordnet_ids()
  assert len(ids) == 1000 and list(ids) == sorted(set(ids))
  # Tench and toilet tissue.
  assert (ids[0], ids[999]) == ('n01440764', 'n15075141')


@pytest.fixture
def mocked(monkeypatch):
  # What TFDS makes up for images that stay encoded needs TensorFlow.
  monkeypatch.setattr(tfds, '_encoded_images', lambda builder: None)
  with tensorflow_datasets.testing.mock_data(num_examples=9):
    yield


@pytest.fixture
def no_class_lists(monkeypatch):
  """Made-up labels are any of the 1000: R and A hold all of them here."""
  for name in ('ImageNet-R', 'ImageNet-A'):
    shift = imagenet.SHIFTS[name]._replace(classes=tuple(range(999, -1, -1)))
    monkeypatch.setitem(imagenet.SHIFTS, name, shift)


def test_splits_of_mocked_tfds(mocked, no_class_lists):
  splits = imagenet.splits(PIXELS, shifts=tuple(imagenet.SHIFTS), seed=5)
  assert list(splits.shifts) == list(imagenet.SHIFTS)
  for part in (splits.train, splits.held_out, splits.test):
    batch = part[np.arange(9)]
    assert batch['image'].shape == (9, 16, 16, 3)
    assert batch['image'].dtype == np.float32
    assert batch['label'].dtype == np.int32
  records = tensorflow_datasets.data_source('imagenet_r', split='test')
  labels = np.array([int(records[i]['label']) for i in range(9)])
  shift = splits.shifts['ImageNet-R'][np.arange(9)]
  np.testing.assert_array_equal(shift['label'], 999 - labels)
  logits = np.eye(1000)[labels]
  viewed = splits.views['ImageNet-R'](logits)
  np.testing.assert_array_equal(viewed.argmax(-1), shift['label'])
  assert splits.views.keys() == {'ImageNet-R', 'ImageNet-A'}


@pytest.mark.parametrize(
    'name, field',
    [('ReaL', 'real_label'), ('multi-label', 'correct_multi_labels')],
)
def test_several_right_labels(mocked, name, field):
  """Of the multi-label set also those on which the experts disagreed."""
  shift = imagenet.SHIFTS[name]
  records = tensorflow_datasets.data_source(shift.name, split='validation')
  records = [records[i] for i in range(9)]
  kept = [
      r for r in records if len(r[field]) and not r.get('is_problematic', False)
  ]
  source = imagenet.splits(PIXELS, shifts=[name]).shifts[name]
  label = source[np.arange(len(source))]['label']
  assert label.dtype == bool and label.shape == (len(kept), 1000)
  for row, record in zip(label, kept, strict=True):
    unclear = record.get('unclear_multi_labels', np.array([], int))
    expected = {*record[field].tolist(), *unclear.tolist()}
    assert set(np.flatnonzero(row)) == expected


def test_images_without_a_right_label_are_left_out(mocked, monkeypatch):
  features = [{'real_label': [3]}, {'real_label': []}, {'real_label': [1, 2]}]
  monkeypatch.setattr(tfds, 'features', lambda *a, **k: iter(features))
  source = imagenet.splits(PIXELS, shifts=['ReaL']).shifts['ReaL']
  assert source.rows.tolist() == [0, 2]
  features = [
      {'correct_multi_labels': [1], 'is_problematic': True},
      {'correct_multi_labels': [1], 'is_problematic': False},
  ]
  source = imagenet.splits(PIXELS, shifts=['multi-label'])
  assert source.shifts['multi-label'].rows.tolist() == [1]


def test_consecutive_records_are_held_out(monkeypatch):
  asked = []
  monkeypatch.setattr(
      tfds, 'source', lambda name, split, *args, **kwargs: asked.append(split)
  )
  rules = [
      imagenet.splits(PIXELS, shifts=(), seed=seed).rules['held_out']
      for seed in (0, 0, 1)
  ]
  assert rules[0] == rules[1] != rules[2]
  rule = json.loads(json.dumps(rules[0]))
  assert rule['count'] == 25_623 and rule['total'] == 1_281_167
  rest, chosen, _ = asked[:3]
  assert chosen == rule['split']
  # TFDS itself says that the two are disjoint and all.
  info = tensorflow_datasets.core.SplitInfo(
      name='train',
      shard_lengths=[640_000, 641_167],
      num_bytes=0,
      filename_template=tensorflow_datasets.core.ShardedFileTemplate(
          data_dir='.', dataset_name='x', filetype_suffix='array_record'
      ),
  )
  split_dict = tensorflow_datasets.core.splits.SplitDict([info])
  covered = np.zeros(1_281_167, int)
  for split in (rest, chosen):
    for part in split_dict[split].file_instructions:
      first = 640_000 * ('00001-of' in os.fspath(part.filename)) + part.skip
      covered[first : first + part.take] += 1
  assert (covered == 1).all()


def test_a_share_of_each_class_is_held_out_where_labels_are_known(mocked):
  labels = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2])
  splits = imagenet.splits(PIXELS, shifts=(), share=0.3, labels=labels)
  assert splits.rules['held_out']['rule'] == 'per class'
  assert sorted(labels[splits.held_out.rows]) == [0, 1, 2]
  assert len(splits.train) == 6
  with pytest.raises(ValueError, match='8 labels for 9 training images'):
    imagenet.splits(PIXELS, shifts=(), labels=labels[:8])


def test_train_labels(mocked):
  labels = imagenet.train_labels()
  records = tensorflow_datasets.data_source('imagenet2012', split='train')
  assert labels.dtype == np.int32
  assert labels.tolist() == [int(records[i]['label']) for i in range(9)]


def _folders(root, classes, num):
  """A PNG file for each of `num` images of a class; red is the label."""
  for label, name in classes.items():
    (root / name).mkdir(parents=True)
    for i in range(num):
      image = Image.new('RGB', (24, 20), (label % 256, i, 0))
      image.save(root / name / f'{i}.png')


def test_folders(tmp_path):
  ids = imagenet.wordnet_ids()
  few = {label: ids[label] for label in (0, 6, 999)}
  _folders(tmp_path / 'train', few, num=4)
  _folders(tmp_path / 'val', few, num=1)
  _folders(tmp_path / 'v2', {i: str(i) for i in (0, 17)}, num=1)
  _folders(tmp_path / 'a', {i: ids[i] for i in (6, 11, 988)}, num=1)
  splits = imagenet.splits(
      PLAIN,
      folders={
          'train': tmp_path / 'train',
          'validation': tmp_path / 'val',
          'ImageNet-V2': tmp_path / 'v2',
          'ImageNet-A': tmp_path / 'a',
      },
      shifts=('ImageNet-V2', 'ImageNet-A'),
      share=0.25,
  )
  held_out = splits.held_out[np.arange(3)]
  assert held_out['label'].tolist() == [0, 6, 999]
  assert len(splits.train) == 9
  seen = [
      (int(label), round(float(image[8, 8, 1]) * 255))
      for part in (splits.train, splits.held_out)
      for image, label in zip(*part[np.arange(len(part))].values())
  ]
  assert collections.Counter(label for label, _ in seen) == {0: 4, 6: 4, 999: 4}
  assert len(set(seen)) == 12
  labels = lambda source: source[np.arange(len(source))]['label'].tolist()
  assert labels(splits.test) == [0, 6, 999]
  assert labels(splits.shifts['ImageNet-V2']) == [0, 17]
  assert labels(splits.shifts['ImageNet-A']) == [0, 1, 199]
  # A logit for each class of A, at its label.
  logits = np.zeros((1, 1000))
  logits[0, 988] = 5.0
  assert splits.views['ImageNet-A'](logits).argmax() == 199


def test_training_is_augmented_and_resumes(tmp_path):
  ids = imagenet.wordnet_ids()
  rng = np.random.default_rng(0)
  for name in ids[:2]:
    (tmp_path / name).mkdir()
    for i in range(6):
      image = Image.fromarray(_image(rng, 40, 32))
      image.save(tmp_path / name / f'{i}.png')
  splits = imagenet.splits(
      PIXELS,
      folders={'train': tmp_path, 'validation': tmp_path},
      shifts=(),
      share=0.2,
  )
  walk = lambda source, **k: [
      b['image'] for b in sources.batches(source, 2, **k)
  ]
  first, again, other = (
      walk(splits.train, seed=1, epoch=epoch) for epoch in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert not {x.tobytes() for x in np.concatenate(first)} & {
      x.tobytes() for x in np.concatenate(other)
  }
  np.testing.assert_array_equal(
      first[3:], walk(splits.train, seed=1, epoch=0, start=3)
  )
  # The held-out set stays as it is, also where a soup is learned on it.
  plain = {x.tobytes() for x in np.concatenate(walk(splits.held_out))}
  shuffled = walk(splits.held_out, seed=3)
  assert {x.tobytes() for x in np.concatenate(shuffled)} == plain


def test_sets_that_are_not_there(tmp_path):
  with pytest.raises(ValueError, match="No set 'ImageNet-C'"):
    imagenet.splits(PIXELS, shifts=['ImageNet-C'])
  with pytest.raises(FileNotFoundError, match='tfds build imagenet2012'):
    imagenet.splits(PIXELS, data_dir=tmp_path)
  with pytest.raises(ValueError, match='one label per image'):
    _folders(tmp_path / 'x', {0: imagenet.wordnet_ids()[0]}, num=2)
    imagenet.splits(
        PIXELS,
        folders=dict.fromkeys(('train', 'validation', 'ReaL'), tmp_path / 'x'),
        shifts=['ReaL'],
        share=0.5,
    )


@pytest.fixture
def objectnet(tmp_path):
  """Four folders of three ImageNet classes, and one that has none.

  The challenge's ids are those of ImageNet backwards.
  """
  mappings = tmp_path / 'mappings'
  mappings.mkdir()
  names = [f'name {i}, also {i}' for i in range(1000)]
  (mappings / 'imagenet_to_label_2012_v2').write_text(
      '\n'.join(reversed(names)) + '\n'
  )
  files = {
      'pytorch_to_imagenet_2012_id': {str(i): 999 - i for i in range(1000)},
      'folder_to_objectnet_label': {
          'zebra': 'Zebra', 'alarm_clock': 'Alarm clock', 'yak': 'Yak',
          'bow_tie': 'Tie',
      },
      'objectnet_to_imagenet_1k': {
          'Tie': names[457],
          'Alarm clock': f'{names[409]}; {names[530]}',
          'Zebra': names[340],
      },
  }  # fmt: skip
  for name, content in files.items():
    (mappings / f'{name}.json').write_text(json.dumps(content))
  for label, name in enumerate(files['folder_to_objectnet_label']):
    (tmp_path / 'images' / name).mkdir(parents=True)
    pixels = np.full((24, 24, 3), (255, 0, 0), np.uint8)
    pixels[2:-2, 2:-2] = 50 * label
    Image.fromarray(pixels).save(tmp_path / 'images' / name / 'x.png')
  return tmp_path


def test_objectnet(objectnet):
  pixels = PLAIN._replace(crop=1.0)
  source, view = imagenet.read_objectnet(objectnet, pixels)
  batch = source[np.arange(len(source))]
  # Alarm clock, tie and zebra, without a trace of the border.
  assert batch['label'].tolist() == [0, 1, 2]
  expected = np.broadcast_to([[50], [150], [0]], (3, 3)) / 255
  for i, image in enumerate(batch['image']):
    np.testing.assert_allclose(
        image, np.broadcast_to(expected[i], image.shape), atol=1e-6
    )
  logits = np.random.default_rng(0).normal(size=(5, 1000))
  closed = np.stack(
      [
          np.maximum(logits[:, 409], logits[:, 530]),
          logits[:, 457],
          logits[:, 340],
      ],
      axis=1,
  )
  np.testing.assert_array_equal(view(logits), closed)
  np.testing.assert_allclose(view(jnp.array(logits)), closed, rtol=1e-6)


def test_objectnet_says_what_is_missing(objectnet):
  (objectnet / 'mappings' / 'imagenet_to_label_2012_v2').unlink()
  with pytest.raises(FileNotFoundError, match='objectnet-1.0.zip'):
    imagenet.read_objectnet(objectnet, PIXELS)
