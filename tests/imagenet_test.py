"""ImageNet: pixels, label spaces, views, held-out sets, folders."""

import collections
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets

from jaxsoup.data import imagenet
from jaxsoup.data import preparation
from jaxsoup.data import sources
from jaxsoup.data import tfds

SPEC = preparation.ImageSpec(16)


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
  image = imagenet.evaluated(_lanes(128, 64), SPEC)
  assert image.shape == (16, 16, 3)
  column = (np.arange(10, 26) + 0.5) / 36
  row = (np.arange(1, 17) + 0.5) / 18
  np.testing.assert_allclose(image[5, :, 0] / 255, column, atol=0.01)
  np.testing.assert_allclose(image[:, 5, 1] / 255, row, atol=0.01)


SHAPES = [
    (70, 50),
    (50, 70),
    (18, 18),
    (12, 15),
    (53, 40),
    (45, 33),
    (375, 500),
]
SPECS = [
    SPEC,
    # The protocols of ViT and of CLIP.
    preparation.ImageSpec(24, preparation.HALF, preparation.HALF),
    preparation.ImageSpec(
        24, preparation.CLIP_MEAN, preparation.CLIP_STD, crop=1.0
    ),
    preparation.ImageSpec(24, crop=0.9, interpolation='bilinear'),
]


def _resized_and_cropped(image, spec):
  """`Resize(floor(size / crop))` and `CenterCrop(size)`, as documented."""
  image, size = Image.fromarray(image), spec.size
  short, (width, height) = int(size / spec.crop), image.size
  longer = lambda side: int(short * side / min(width, height))
  shape = (short, longer(height)) if width <= height else (longer(width), short)
  filter_ = getattr(Image.Resampling, spec.interpolation.upper())
  image = image.resize(shape, filter_)
  left, top = (int(round((side - size) / 2.0)) for side in shape)
  return np.asarray(image)[top : top + size, left : left + size]


@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.parametrize('shape', SHAPES)
def test_an_evaluation_is_that_of_pil(rng, shape, spec):
  image = _image(rng, *shape)
  got = imagenet.evaluated(image, spec)
  expected = _resized_and_cropped(image, spec)
  np.testing.assert_array_equal(got, expected)
  assert got.dtype == np.uint8
  # As if all were computed on the host, in floats.
  normalized = expected.astype(np.float32) / 255
  normalized = (normalized - np.float32(spec.mean)) / np.float32(spec.std)
  for prepare in (spec.prepare, jax.jit(spec.prepare)):
    np.testing.assert_allclose(prepare(got[None])[0], normalized, atol=1e-6)
    in_unit = got[None].astype(np.float32) / 255
    np.testing.assert_allclose(prepare(in_unit)[0], normalized, atol=1e-6)


@pytest.mark.reference
@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.parametrize('shape', SHAPES)
def test_an_evaluation_is_that_of_torchvision(rng, shape, spec):
  pytest.importorskip('torchvision')
  from torchvision import transforms

  image = _image(rng, *shape)
  mode = transforms.InterpolationMode(spec.interpolation)
  transform = transforms.Compose(
      [
          transforms.Resize(int(spec.size / spec.crop), mode),
          transforms.CenterCrop(spec.size),
          transforms.ToTensor(),
          transforms.Normalize(spec.mean, spec.std),
      ]
  )
  expected = transform(Image.fromarray(image)).permute(1, 2, 0).numpy()
  got = spec.prepare(imagenet.evaluated(image, spec)[None])[0]
  np.testing.assert_allclose(got, expected, atol=1e-6)


def test_sides_of_their_own(rng):
  spec = preparation.ImageSpec((20, 12, 3), crop=0.5)
  image = _lanes(120, 100)
  # 24 x 40 are to be covered: the height decides, 48 x 40.
  expected = np.asarray(Image.fromarray(image).resize((48, 40), 3))
  got = imagenet.evaluated(image, spec)
  np.testing.assert_array_equal(got, expected[10:30, 18:30])
  assert imagenet.trained(image, spec, rng).shape == (20, 12, 3)


def test_images_come_in_any_form(tmp_path):
  image = np.full((20, 24, 3), (10, 20, 30), np.uint8)
  Image.fromarray(image).save(tmp_path / 'x.png')
  evaluated_fn = lambda image: imagenet.evaluated(image, SPEC)
  expected = evaluated_fn(image)
  for form in (
      tmp_path / 'x.png',
      str(tmp_path / 'x.png'),
      (tmp_path / 'x.png').read_bytes(),
      Image.fromarray(image).convert('RGBA'),
  ):
    np.testing.assert_array_equal(evaluated_fn(form), expected)
  grey = np.full((20, 24, 1), 10, np.uint8)
  np.testing.assert_array_equal(
      evaluated_fn(grey), evaluated_fn(grey.repeat(3, -1))
  )


def test_training_shows_what_its_draws_say():
  """Box and flip are read off an image whose colours are its coordinates."""
  image = _lanes(400, 300)
  spec = preparation.ImageSpec(32)
  areas, ratios, flips = [], [], []
  for seed in range(300):
    shown = imagenet.trained(
        image, spec, np.random.default_rng(seed), min_area=0.25
    )
    shown = shown / 255
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
  draw = lambda seed: imagenet.trained(image, SPEC, np.random.default_rng(seed))
  np.testing.assert_array_equal(draw(0), draw(0))
  assert not np.array_equal(draw(0), draw(1))


def test_a_narrow_image_shows_its_middle():
  narrow = _lanes(300, 4)
  shown = imagenet.trained(narrow, SPEC, np.random.default_rng(0))
  # Five of 300 columns.
  middle = shown[:, :, 0] / 255
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
def mocked(decoded_mocks):
  with tensorflow_datasets.testing.mock_data(num_examples=9):
    yield


@pytest.fixture
def no_class_lists(monkeypatch):
  """Made-up labels are any of the 1000: R and A hold all of them here."""
  for name in ('ImageNet-R', 'ImageNet-A'):
    shift = imagenet.SHIFTS[name]._replace(classes=tuple(range(999, -1, -1)))
    monkeypatch.setitem(imagenet.SHIFTS, name, shift)


def test_splits_of_mocked_tfds(mocked, no_class_lists):
  splits = imagenet.splits(SPEC, shifts=tuple(imagenet.SHIFTS), seed=5)
  assert list(splits.shifts) == list(imagenet.SHIFTS)
  for part in (splits.train, splits.held_out, splits.test):
    batch = part[np.arange(9)]
    assert batch['image'].shape == (9, 16, 16, 3)
    assert batch['image'].dtype == np.uint8
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
  source = imagenet.splits(SPEC, shifts=[name]).shifts[name]
  label = source[np.arange(len(source))]['label']
  assert label.dtype == bool and label.shape == (len(kept), 1000)
  for row, record in zip(label, kept, strict=True):
    unclear = record.get('unclear_multi_labels', np.array([], int))
    expected = {*record[field].tolist(), *unclear.tolist()}
    assert set(np.flatnonzero(row)) == expected


def test_images_without_a_right_label_are_left_out(mocked, monkeypatch):
  features = [{'real_label': [3]}, {'real_label': []}, {'real_label': [1, 2]}]
  monkeypatch.setattr(tfds, 'features', lambda *a, **k: iter(features))
  source = imagenet.splits(SPEC, shifts=['ReaL']).shifts['ReaL']
  assert source.rows.tolist() == [0, 2]
  features = [
      {'correct_multi_labels': [1], 'is_problematic': True},
      {'correct_multi_labels': [1], 'is_problematic': False},
  ]
  source = imagenet.splits(SPEC, shifts=['multi-label'])
  assert source.shifts['multi-label'].rows.tolist() == [1]


def test_consecutive_records_are_held_out(monkeypatch):
  asked = []
  monkeypatch.setattr(
      tfds, 'source', lambda name, split, *args, **kwargs: asked.append(split)
  )
  rules = [
      imagenet.splits(SPEC, shifts=(), seed=seed).rules['held_out']
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
  splits = imagenet.splits(SPEC, shifts=(), share=0.3, labels=labels)
  assert splits.rules['held_out']['rule'] == 'per class'
  assert sorted(labels[splits.held_out.rows]) == [0, 1, 2]
  assert len(splits.train) == 6
  with pytest.raises(ValueError, match='8 labels for 9 training images'):
    imagenet.splits(SPEC, shifts=(), labels=labels[:8])


def test_train_labels(mocked):
  labels = imagenet.train_labels()
  records = tensorflow_datasets.data_source('imagenet2012', split='train')
  assert labels.dtype == np.int32
  assert labels.tolist() == [int(records[i]['label']) for i in range(9)]


def _folders(root, classes, num, kind='png'):
  """A file for each of `num` images of a class; red is the label."""
  for label, name in classes.items():
    (root / name).mkdir(parents=True)
    for i in range(num):
      image = Image.new('RGB', (24, 20), (label % 256, i, 0))
      image.save(root / name / f'{i}.{kind}')


def test_folders(tmp_path):
  ids = imagenet.wordnet_ids()
  few = {label: ids[label] for label in (0, 6, 999)}
  _folders(tmp_path / 'train', few, num=4)
  _folders(tmp_path / 'val', few, num=1)
  _folders(tmp_path / 'v2', {i: str(i) for i in (0, 17)}, num=1)
  _folders(tmp_path / 'a', {i: ids[i] for i in (6, 11, 988)}, num=1)
  splits = imagenet.splits(
      SPEC,
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
  # They are the middle of the images of these files.
  files = sources.files_of(splits.held_out)
  assert len({*files} - {*sources.files_of(splits.train)}) == 3
  for image, file in zip(held_out['image'], files):
    np.testing.assert_array_equal(image, imagenet.evaluated(file, SPEC))
  assert len(splits.train) == 9
  seen = [
      (int(label), int(image[8, 8, 1]))
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
      SPEC,
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


def test_labels_need_no_image(tmp_path, monkeypatch):
  ids = imagenet.wordnet_ids()
  shifted = {i: ids[i] for i in imagenet.R_CLASSES[:2]}
  _folders(tmp_path / 'train', {i: ids[i] for i in (0, 7)}, num=5, kind='jpg')
  _folders(tmp_path / 'r', shifted, num=2, kind='jpg')
  splits = imagenet.splits(
      SPEC,
      folders=dict(
          dict.fromkeys(('train', 'validation'), tmp_path / 'train'),
          **{'ImageNet-R': tmp_path / 'r'},
      ),
      shifts=['ImageNet-R'],
      share=0.4,
  )
  num_opened, open_fn = 0, Image.open

  def counted(*args, **kwargs):
    nonlocal num_opened
    num_opened += 1
    return open_fn(*args, **kwargs)

  monkeypatch.setattr(Image, 'open', counted)
  parts = (splits.train, splits.held_out, splits.test, *splits.shifts.values())
  labels = [sources.labels_of(part) for part in parts]
  assert num_opened == 0
  assert [x.tolist() for x in labels] == [
      [0] * 3 + [7] * 3, [0] * 2 + [7] * 2, [0] * 5 + [7] * 5, [0, 0, 1, 1]
  ]  # fmt: skip
  for part, label in zip(parts, labels):
    batch = part[np.arange(len(part))]
    np.testing.assert_array_equal(batch['label'], label)
    assert batch['label'].dtype == label.dtype
  assert num_opened == sum(map(len, parts))


def test_sets_that_are_not_there(tmp_path):
  with pytest.raises(ValueError, match="No set 'ImageNet-C'"):
    imagenet.splits(SPEC, shifts=['ImageNet-C'])
  with pytest.raises(ValueError, match="No set 'validation'"):
    imagenet.splits(SPEC, shifts=['validation'])
  with pytest.raises(ValueError, match='share is 1.0: expected a number betw'):
    imagenet.splits(SPEC, share=1.0)
  with pytest.raises(FileNotFoundError, match='tfds build imagenet2012'):
    imagenet.splits(SPEC, data_dir=tmp_path)
  with pytest.raises(ValueError, match='one label per image'):
    _folders(tmp_path / 'x', {0: imagenet.wordnet_ids()[0]}, num=2)
    imagenet.splits(
        SPEC,
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
  spec = SPEC._replace(crop=1.0)
  source, view = imagenet.read_objectnet(objectnet, spec)
  batch = source[np.arange(len(source))]
  # Alarm clock, tie and zebra, without a trace of the border.
  assert batch['label'].tolist() == [0, 1, 2]
  for image, level in zip(batch['image'], (50, 150, 0), strict=True):
    np.testing.assert_array_equal(image, np.full((16, 16, 3), level))
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
    imagenet.read_objectnet(objectnet, SPEC)
