"""Sources and batches: order, resumption, processes, folders, TFDS."""

import hashlib
import importlib.util
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets

from jaxsoup import evaluation
from jaxsoup.data import sources
from jaxsoup.data import tfds

NUM = 23


class Numbered(tensorflow_datasets.core.GeneratorBasedBuilder):
  """Images whose pixels are their label, as tensors: no TensorFlow to write."""

  VERSION = tensorflow_datasets.core.Version('1.0.0')
  IMAGE = tensorflow_datasets.features.Tensor(shape=(4, 4, 1), dtype=np.uint8)

  def _info(self):
    label = tensorflow_datasets.features.ClassLabel(num_classes=NUM)
    features = tensorflow_datasets.features.FeaturesDict(
        {'image': self.IMAGE, 'label': label}
    )
    return tensorflow_datasets.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    del dl_manager
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i in range(NUM):
      yield i, {'image': np.full((4, 4, 1), i, np.uint8), 'label': i}


class Pictures(Numbered):
  """The same as encoded images."""

  IMAGE = tensorflow_datasets.features.Image(
      shape=(4, 4, 1), encoding_format='png'
  )

  def _generate_examples(self):
    for i in range(NUM):
      file = io.BytesIO()
      Image.new('L', (4, 4), 10 * i).save(file, 'png')
      file.seek(0)
      yield i, {'image': file, 'label': i}


def picture_fn(record, rng):
  pixels = np.asarray(Image.open(io.BytesIO(record['image'])))[..., None]
  return record_fn({**record, 'image': pixels}, rng)


def label_fn(record):
  return np.int32(record['label'])


def example_fn(record, rng):
  """The record's number, and a draw that stands for an augmentation."""
  draw = 0.0 if rng is None else rng.random()
  return {'label': np.int32(record), 'draw': np.float32(draw)}


def image_fn(record, rng):
  del rng
  with Image.open(record['image']) as image:
    pixels = np.asarray(image, np.float32)
  return {'image': pixels, 'label': np.int32(record['label'])}


def record_fn(record, rng):
  image = record['image'].astype(np.float32)
  return {'image': image, **example_fn(record['label'], rng)}


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """A folder with the set in array_record files."""
  folder = tmp_path_factory.mktemp('tfds')
  builder = Numbered(data_dir=folder, file_format='array_record')
  builder.download_and_prepare()
  return folder


def _sources():
  everything = np.arange(2 * NUM)
  examples = sources.Examples(everything, example_fn)
  return {
      'arrays': sources.Arrays({'label': np.arange(NUM, dtype=np.int32)}),
      'examples': sources.Examples(np.arange(NUM), example_fn),
      'subset': sources.subset(examples, everything[::2]),
  }


@pytest.fixture(params=['arrays', 'examples', 'subset'])
def source(request):
  return _sources()[request.param]


def _assert_equal(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


def _of_all_processes(source, batch_size, process_count, **options):
  """The batches of each process, joined."""
  parts = [
      sources.batches(
          source,
          batch_size,
          process_index=i,
          process_count=process_count,
          **options,
      )
      for i in range(process_count)
  ]
  return [
      {name: np.concatenate([b[name] for b in group]) for name in group[0]}
      for group in zip(*parts, strict=True)
  ]


def test_training_batches_are_a_permutation(source):
  batches = list(sources.batches(source, 5, seed=3, epoch=1))
  seen = np.concatenate([batch['label'] for batch in batches])
  assert [len(b['label']) for b in batches] == [5] * 4
  everything = source[np.arange(len(source))]['label']
  assert len(set(seen.tolist())) == 20 and set(seen) <= set(everything)
  order = np.random.default_rng([*b'shuffle', 3, 1]).permutation(NUM)[:20]
  np.testing.assert_array_equal(seen, everything[order])


def test_batches_depend_on_seed_and_epoch_alone(source):
  walk = lambda seed, epoch: list(
      sources.batches(source, 5, seed=seed, epoch=epoch)
  )
  first = walk(0, 0)
  _assert_equal(first, walk(0, 0))
  for other in (walk(1, 0), walk(0, 1)):
    assert not np.array_equal(first[0]['label'], other[0]['label'])


@pytest.mark.parametrize('seed', [None, 7])
def test_resumed_is_uninterrupted(source, seed):
  whole = list(sources.batches(source, 4, seed=seed, epoch=2))
  for start in (0, 1, 3, len(whole)):
    rest = list(sources.batches(source, 4, seed=seed, epoch=2, start=start))
    _assert_equal(whole[start:], rest)


@pytest.mark.parametrize('seed', [None, 7])
@pytest.mark.parametrize('process_count', [2, 4])
def test_processes_together_have_the_whole_batch(source, seed, process_count):
  joined = _of_all_processes(source, 8, process_count, seed=seed)
  _assert_equal(list(sources.batches(source, 8, seed=seed)), joined)


def test_evaluation_is_in_order_and_padded_like_evaluation_batched(source):
  batches = list(sources.batches(source, 10))
  everything = source[np.arange(len(source))]
  expected = evaluation.batched({'label': everything['label']}, 10)
  assert len(batches) == len(expected) == 3
  for batch, other in zip(batches, expected):
    for name in ('label', 'mask'):
      np.testing.assert_array_equal(batch[name], other[name])
  assert [int(b['mask'].sum()) for b in batches] == [10, 10, 3]


def test_only_records_in_use_are_read():
  read = []
  source = sources.Examples(
      np.arange(NUM), lambda r, rng: read.append(int(r)) or {'x': np.array(r)}
  )
  list(sources.batches(source, 4, start=4, process_index=1, process_count=2))
  assert sorted(read) == [18, 19, 22, 22]


def test_augmentation_is_drawn_by_seed_epoch_and_row():
  source = sources.Examples(np.arange(NUM), example_fn)
  draws = {}
  for epoch in (0, 1):
    for batch in sources.batches(source, 1, seed=5, epoch=epoch):
      row = int(batch['label'][0])
      draws[epoch, row] = batch['draw'][0]
      expected = np.random.default_rng([row, 5, epoch, 1]).random()
      assert batch['draw'][0] == np.float32(expected)
  assert len(set(draws.values())) == 2 * NUM
  assert not source[np.arange(NUM)]['draw'].any()


def test_no_two_streams_of_numbers_are_one():
  # NumPy fills short lists of seeds with zeros: [5, 0] and [5, 0, 0] are one.
  draw = lambda rng: rng.integers(2**62, size=2).tolist()
  rows = [
      draw(sources.generator((5, e), row)) for e in (0, 1) for row in (0, 1)
  ]
  others = [draw(np.random.default_rng(seeds)) for seeds in ([5, 0], [0, 5])]
  assert len({tuple(x) for x in rows + others}) == 6


def test_batches_that_cannot_be_are_refused_at_once(source):
  with pytest.raises(ValueError, match='batch_size is 5, .* divided among 2'):
    sources.batches(source, 5, process_count=2)
  with pytest.raises(ValueError, match='23 examples do not fill .* of 24'):
    sources.batches(source, 24, seed=0)
  assert len(list(sources.batches(source, 24))) == 1


def test_arrays_of_different_lengths_are_refused():
  with pytest.raises(ValueError, match="{'a': 2, 'b': 3}"):
    sources.Arrays({'a': np.zeros(2), 'b': np.zeros(3)})
  with pytest.raises(ValueError, match='at least one'):
    sources.Arrays({})


def test_batches_are_read_ahead():
  read, is_ahead = [], threading.Event()

  def noted(record, rng):
    del rng
    read.append(int(record))
    if len(read) > 1:
      is_ahead.set()
    return {'x': record}

  walk = sources.batches(sources.Examples(np.arange(NUM), noted), 1)
  assert next(walk)['x'] == 0
  assert is_ahead.wait(10)
  assert [int(batch['x'][0]) for batch in walk] == list(range(1, NUM))
  assert sorted(read) == list(range(NUM))


def test_an_abandoned_walk_ends_its_threads():
  num_before = threading.active_count()
  source = sources.Examples(np.arange(NUM), example_fn)
  walk = sources.batches(source, 2, seed=0)
  next(walk)
  walk.close()
  _wait_for(lambda: threading.active_count() <= num_before)


def _wait_for(condition):
  deadline = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)


def _walk(num_workers, num_processes, **options):
  """A walk through every second record; the parts of all processes joined."""

  # Sent to a worker as it is: to import this file takes long.
  def drawn(record, rng):
    draw = 0.0 if rng is None else rng.random()
    return {'label': np.int32(record), 'draw': np.float32(draw)}

  source = sources.Examples(np.arange(2 * NUM), drawn, num_workers=num_workers)
  source = sources.subset(source, np.arange(0, 2 * NUM, 2))
  return _of_all_processes(source, 4, num_processes, **options)


@pytest.mark.parametrize(
    'num_workers, num_processes, seed, start',
    [(2, 1, 7, 2), (1, 2, None, 0)],
)
def test_workers_and_processes_change_no_bit(
    num_workers, num_processes, seed, start
):
  whole = _walk(0, 1, seed=seed, epoch=3)
  assert len(whole) == (6 if seed is None else 5)
  rest = _walk(num_workers, num_processes, seed=seed, epoch=3, start=start)
  _assert_equal(whole[start:], rest)


WORKER = """
import os
import sys

import jax
import numpy as np

from jaxsoup.data import sources

def example_fn(record, rng):
  is_cpu = jax.devices()[0].platform == 'cpu'
  return {'worker': np.int32(os.getpid()), 'is_cpu': is_cpu}

if __name__ == '__main__':
  source = sources.Examples(range(10), example_fn, num_workers=1)
  walk = sources.batches(source, 2)
  batch = next(walk)
  print(batch['worker'][0], os.getpid(), batch['is_cpu'].all(), flush=True)
  sys.stdin.read()
"""


def test_workers_see_no_devices_and_end_with_their_parent(tmp_path):
  (tmp_path / 'main.py').write_text(WORKER)
  with subprocess.Popen(
      [sys.executable, tmp_path / 'main.py'],
      # A platform that is not there: the parent asks for no device.
      env=os.environ | {'JAX_PLATFORMS': 'cuda'},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
  ) as parent:
    worker, pid, is_cpu = parent.stdout.readline().split()
    worker = int(worker)
    assert int(pid) == parent.pid != worker and is_cpu == 'True'
    # A signal to all processes of a group is for the parent to answer.
    os.kill(worker, signal.SIGTERM)
    time.sleep(0.2)
    os.kill(worker, 0)
    parent.kill()
  _wait_for(lambda: not _is_running(worker))


def _is_running(pid):
  try:
    state = pathlib.Path(f'/proc/{pid}/stat').read_text().rsplit(')')[1].split()
  except FileNotFoundError:
    return False
  return state[0] != 'Z'


@pytest.mark.slow_variants
@pytest.mark.parametrize('num_workers', [0, 1])
def test_an_example_that_cannot_be_made_is_named(tmp_path, num_workers):
  (tmp_path / 'cat').mkdir()
  for i in range(3):
    Image.new('L', (64, 64)).save(tmp_path / 'cat' / f'{i}.jpg')
  damaged = tmp_path / 'cat' / '1.jpg'
  damaged.write_bytes(damaged.read_bytes()[:-90])
  source = sources.Folder(tmp_path, image_fn, num_workers=num_workers)
  words = f'{damaged} cannot be read: OSError: .*runcated'
  with pytest.raises(ValueError, match=words):
    list(sources.batches(source, 1))
  assert source[np.array([0, 2])]['image'].shape == (2, 64, 64)


def test_a_record_without_a_file_is_named_by_its_row():
  source = sources.Examples([1, 0], lambda x, rng: {'x': np.array(1 // x)})
  words = 'Record 1 of 2 cannot be read: ZeroDivisionError'
  with pytest.raises(ValueError, match=words):
    sources.subset(source, np.array([1]))[np.array([0])]


def test_a_negative_number_of_workers_is_refused():
  with pytest.raises(ValueError, match='num_workers is -1: expected 0'):
    sources.Examples([1], example_fn, num_workers=-1)


class Plain:
  """No more than the protocol asks for."""

  def __len__(self):
    return 600

  def __getitem__(self, rows):
    assert len(rows) < 600
    return {'label': 2 * rows}


def test_labels_of_any_source(source):
  expected = source[np.arange(len(source))]['label']
  np.testing.assert_array_equal(sources.labels_of(source), expected)
  part = sources.subset(source, np.array([5, 2]))
  assert sources.labels_of(part).tolist() == expected[[5, 2]].tolist()
  assert sources.labels_of(Plain()).tolist() == list(range(0, 1200, 2))


def test_only_labels_that_are_asked_for_are_read():
  class Records(list):

    def __getitem__(self, row):
      read.append(row)
      return super().__getitem__(row)

  read: list[int] = []
  source = sources.Examples(
      Records(range(NUM)), None, label_fn=lambda record: 10 * record
  )
  part = sources.subset(source, np.array([7, 3, 9]))
  assert sources.labels_of(part, np.array([2, 0])).tolist() == [90, 70]
  assert read == [9, 7]


def test_in_memory_and_its_subset():
  source = sources.Examples(np.arange(NUM), example_fn)
  memory = sources.in_memory(source)
  _assert_equal([memory.arrays], [source[np.arange(NUM)]])
  part = sources.subset(memory, np.array([4, 2]))
  assert part.arrays['label'].tolist() == [4, 2]


@pytest.fixture
def folder(tmp_path):
  """Two cats of value 0 and 1, three dogs of value 100, 101, 102."""
  for name, first, num in (('dog', 100, 3), ('cat', 0, 2)):
    (tmp_path / name).mkdir()
    for i in range(num):
      image = Image.new('L', (3, 2), first + i)
      image.save(tmp_path / name / f'{i}.png')
  (tmp_path / 'dog' / 'notes.txt').write_text('no image')
  return tmp_path


def test_folder(folder):
  source = sources.Folder(folder, image_fn)
  assert source.classes == ['cat', 'dog']
  assert source.labels.dtype == np.int32
  batch = source[np.arange(len(source))]
  assert batch['image'].shape == (5, 2, 3)
  assert batch['image'][:, 0, 0].tolist() == [0, 1, 100, 101, 102]
  np.testing.assert_array_equal(batch['label'], [0, 0, 1, 1, 1])
  np.testing.assert_array_equal(source.labels, batch['label'])
  np.testing.assert_array_equal(
      source.labels_of(np.array([4, 0])), batch['label'][[4, 0]]
  )


def test_folder_with_given_classes(folder):
  source = sources.Folder(folder, image_fn, classes=['dog', 'cow', 'cat'])
  assert source.labels.tolist() == [2, 2, 0, 0, 0]
  with pytest.raises(ValueError, match=r"\['dog'\], which are not among the 1"):
    sources.Folder(folder, image_fn, classes=['cat'])


def test_a_folder_without_images_is_an_error(tmp_path):
  with pytest.raises(FileNotFoundError, match='one folder per class'):
    sources.Folder(tmp_path, image_fn)


def test_held_out_rows_are_a_share_of_every_class():
  labels = np.random.default_rng(0).permutation(
      np.repeat([0, 1, 4], [1300, 732, 10])
  )
  rows, rest, rule = sources.held_out_rows(labels, share=0.02, seed=3)
  counts = np.bincount(labels[rows], minlength=5)
  assert counts.tolist() == [26, 15, 0, 0, 1]
  np.testing.assert_array_equal(
      np.sort(np.concatenate([rows, rest])), np.arange(2042)
  )
  assert (np.diff(rows) > 0).all() and (np.diff(rest) > 0).all()
  assert json.loads(json.dumps(rule)) == {
      'rule': 'per class',
      'share': 0.02,
      'seed': 3,
      'count': 42,
      'total': 2042,
      'sha256': hashlib.sha256(rows.astype('<i8').tobytes()).hexdigest(),
  }


def test_held_out_rows_are_decided_by_the_seed():
  labels = np.repeat(np.arange(10), 100)
  first, again, other = (
      sources.held_out_rows(labels, 0.1, seed) for seed in (0, 0, 1)
  )
  assert first.rule == again.rule
  assert first.rule['sha256'] != other.rule['sha256']


def test_held_out_shares_that_cannot_be_are_refused():
  with pytest.raises(ValueError, match='share is 1.5'):
    sources.held_out_rows(np.zeros(10, int), 1.5)
  with pytest.raises(ValueError, match='Class 7 has 1 examples'):
    sources.held_out_rows(np.array([0, 0, 7]), 0.5)


def test_tfds_of_array_record_files(prepared):
  source = tfds.source('numbered', 'train', record_fn, data_dir=prepared)
  batch = source[np.arange(NUM)]
  assert sorted(batch['label'].tolist()) == list(range(NUM))
  np.testing.assert_array_equal(batch['image'][:, 1, 2, 0], batch['label'])
  part = tfds.source('numbered', 'train[5:9]', record_fn, data_dir=prepared)
  np.testing.assert_array_equal(
      part[np.arange(4)]['label'], batch['label'][5:9]
  )
  walk = list(sources.batches(source, 4, seed=1, start=2))
  _assert_equal(walk, list(sources.batches(source, 4, seed=1))[2:])


def test_tfds_features_come_in_the_order_of_rows(prepared):
  source = tfds.source('numbered', 'train', record_fn, data_dir=prepared)
  records = list(
      tfds.features('numbered', 'train', ['label'], data_dir=prepared)
  )
  assert all(record.keys() == {'label'} for record in records)
  labels = [int(record['label']) for record in records]
  assert labels == source[np.arange(NUM)]['label'].tolist()


def test_a_set_that_is_not_prepared_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='tfds build numbered'):
    tfds.source('numbered', 'train', record_fn, data_dir=tmp_path)


def test_a_split_that_is_not_there_is_named(prepared):
  with pytest.raises(ValueError, match='nowhere'):
    tfds.source('numbered', 'nowhere', record_fn, data_dir=prepared)


def test_encoded_images_without_tensorflow(tmp_path, monkeypatch):
  builder = Pictures(data_dir=tmp_path, file_format='array_record')
  builder.download_and_prepare()
  source = tfds.source(
      'pictures', 'train', picture_fn, label_fn=label_fn, data_dir=tmp_path
  )
  assert isinstance(source, sources.Examples)
  batch = source[np.arange(NUM)]
  np.testing.assert_array_equal(batch['image'][:, 1, 2, 0], batch['label'] * 10)
  record, *_ = tfds.features(
      'pictures', 'train', ['image', 'label'], data_dir=tmp_path
  )
  assert record['image'].startswith(b'\x89PNG')
  # Labels need no image.
  feature = tensorflow_datasets.features.Image
  for owner, name in ((Image, 'open'), (feature, 'decode_example_np')):
    monkeypatch.setattr(owner, name, None)
  np.testing.assert_array_equal(sources.labels_of(source), batch['label'])
  with pytest.raises(ValueError, match='Record 0 of .* cannot be read'):
    source[np.arange(1)]


def test_mocked_tfds(decoded_mocks):
  with tensorflow_datasets.testing.mock_data(num_examples=6):
    source = tfds.source('cifar10', 'train', record_fn)
    batch = source[np.arange(6)]
  assert batch['image'].shape == (6, 32, 32, 3)
  assert batch['label'].max() < 10


@pytest.fixture(scope='module')
def stream(tmp_path_factory):
  pytest.importorskip('tensorflow', reason='the extra `tf`')
  folder = tmp_path_factory.mktemp('tfrecord')
  builder = Pictures(data_dir=folder, file_format='tfrecord')
  builder.download_and_prepare()
  source = tfds.source(
      'pictures', 'train', picture_fn, label_fn=label_fn, data_dir=folder
  )
  assert isinstance(source, tfds.Stream)
  return source


def test_stream_walks_in_order(stream):
  assert len(stream) == NUM
  everything = stream[np.arange(NUM)]
  np.testing.assert_array_equal(
      everything['image'][:, 1, 2, 0], everything['label'] * 10
  )
  walk = list(sources.batches(stream, 10))
  labels = np.concatenate([batch['label'] for batch in walk])
  mask = np.concatenate([batch['mask'] for batch in walk])
  np.testing.assert_array_equal(labels[mask], everything['label'])
  assert mask.tolist() == [True] * NUM + [False] * 7
  rows = np.array([7, 2])
  for labels in (stream[rows]['label'], stream.labels_of(rows)):
    np.testing.assert_array_equal(labels, everything['label'][rows])


def test_stream_is_shuffled_by_seed_and_epoch(stream):
  walk = lambda **kwargs: list(sources.batches(stream, 4, **kwargs))
  first = walk(seed=1, epoch=2)
  labels = np.concatenate([batch['label'] for batch in first])
  assert len(labels) == len(set(labels.tolist())) == 20
  _assert_equal(first, walk(seed=1, epoch=2))
  for other in (walk(seed=2, epoch=2), walk(seed=1, epoch=3)):
    assert not np.array_equal(first[0]['label'], other[0]['label'])


@pytest.mark.parametrize('seed', [None, 7])
def test_stream_resumes_and_divides(stream, seed):
  whole = list(sources.batches(stream, 4, seed=seed))
  _assert_equal(whole[3:], list(sources.batches(stream, 4, seed=seed, start=3)))
  _assert_equal(whole, _of_all_processes(stream, 4, 2, seed=seed))


def test_rows_of_a_stream(stream):
  labels = stream[np.arange(NUM)]['label']
  part = sources.subset(stream, np.array([3, 8, 20]))
  assert len(part) == 3
  np.testing.assert_array_equal(
      sources.in_memory(part).arrays['label'], labels[[3, 8, 20]]
  )
  (batch,) = sources.batches(part, 4)
  assert batch['mask'].tolist() == [True, True, True, False]
  with pytest.raises(ValueError, match='train.2%:.*convert_format'):
    list(sources.batches(part, 2, seed=0))
  with pytest.raises(ValueError, match='ascending'):
    sources.subset(stream, np.array([3, 1]))


def test_tfrecord_files_without_tensorflow_say_what_to_do(
    prepared, monkeypatch
):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)

  def no_random_access(*args, **kwargs):
    raise NotImplementedError

  monkeypatch.setattr(Numbered, 'as_data_source', no_random_access)
  with pytest.raises(ImportError, match=r'jaxsoup\[tf\].*convert_format'):
    tfds.source('numbered', 'train', record_fn, data_dir=prepared)
