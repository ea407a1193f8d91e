"""GLUE: files as they lie on disks, TFDS, prefixes, held-out sets."""

import importlib.util

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxsoup.data import glue

FILES = {
    'mrpc': 'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n{rows}',
    'rte': 'index\tsentence1\tsentence2\tlabel\n{rows}',
    'cola': '{rows}',
    'sst2': 'sentence\tlabel\n{rows}',
}
ROWS = {
    'mrpc': '{label}\t{i}\t9\tFirst "{i}.\tSecond {i}.',
    'rte': '{i}\tFirst "{i}.\tSecond {i}.\t{name}',
    'cola': 'gj04\t{label}\t*\tFirst "{i}.',
    'sst2': 'First "{i}.\t{label}',
}
NUM = dict(train=40, dev=7)
# Other examples than those of the training set.
FIRST = dict(train=0, dev=60)


def _label(i):
  return i % 3 % 2


@pytest.fixture(params=glue.TASKS)
def task(request):
  return request.param


@pytest.fixture
def folder(task, tmp_path):
  details = glue.TASKS[task]
  (tmp_path / details.folder).mkdir()
  for stem, num in NUM.items():
    rows = [
        ROWS[task].format(i=i, label=_label(i), name=details.labels[_label(i)])
        for i in range(FIRST[stem], FIRST[stem] + num)
    ]
    text = FILES[task].format(rows='\n'.join(rows) + '\n')
    # The file of MRPC begins with a byte-order mark.
    encoding = 'utf-8-sig' if task == 'mrpc' else 'utf-8'
    (tmp_path / details.folder / f'{stem}.tsv').write_text(text, encoding)
  return tmp_path


def tokenize(texts, seconds=None):
  """Two numbers: the digits of the first text, the length of the second."""
  digits = [int(''.join(filter(str.isdigit, text))) for text in texts]
  lengths = [0] * len(texts) if seconds is None else list(map(len, seconds))
  return {'input_ids': np.stack([digits, lengths], 1).astype(np.int32)}


def test_files(task, folder):
  for split, stem in (('train', 'train'), ('validation', 'dev')):
    texts = glue.read(task, split, folder=folder)
    rows = range(FIRST[stem], FIRST[stem] + NUM[stem])
    assert texts.columns[0] == [f'First "{i}.' for i in rows]
    if len(glue.TASKS[task].columns) == 2:
      assert texts.columns[1] == [f'Second {i}.' for i in rows]
    assert texts.label.dtype == np.int32
    assert texts.label.tolist() == [_label(i) for i in rows]


def test_splits(task, folder):
  splits = glue.splits(task, tokenize, folder=folder, share=0.2, seed=1)
  parts = [
      splits.train.arrays['input_ids'][:, 0],
      splits.held_out.arrays['input_ids'][:, 0],
  ]
  assert sorted(np.concatenate(parts)) == list(range(NUM['train']))
  for part in (splits.train, splits.held_out, splits.test):
    label = part.arrays['label']
    assert label.tolist() == list(map(_label, part.arrays['input_ids'][:, 0]))
  # A fifth of 27 and of 13.
  assert np.bincount(splits.held_out.arrays['label']).tolist() == [5, 3]
  assert splits.rules['held_out']['count'] == 8
  assert len(splits.test) == NUM['dev']
  has_pairs = len(glue.TASKS[task].columns) == 2
  assert (splits.test.arrays['input_ids'][:, 1] > 0).all() == has_pairs


def test_prefixes(task, folder):
  seen = []

  def recorded(texts, seconds=None):
    assert seconds is None
    seen.extend(texts)
    return {'input_ids': np.arange(len(seen))[-len(texts) :, None]}

  glue.splits(task, recorded, folder=folder, is_prefixed=True)
  expected = {
      'mrpc': 'mrpc sentence1: First "0. sentence2: Second 0.',
      'rte': 'rte sentence1: First "0. sentence2: Second 0.',
      'cola': 'cola sentence: First "0.',
      'sst2': 'sst2 sentence: First "0.',
  }
  assert seen[0] == expected[task]
  assert len(seen) == sum(NUM.values())


def test_what_is_there_twice_trains_once_and_never_reports(tmp_path):
  (tmp_path / 'SST-2').mkdir()
  train = [*range(20), *range(5), 30, 31]
  for stem, numbers in dict(train=train, dev=[30, 40, 31, 40]).items():
    lines = [f'Text {i}.\t{i % 2}' for i in numbers]
    text = '\n'.join(['sentence\tlabel', *lines])
    (tmp_path / 'SST-2' / f'{stem}.tsv').write_text(text)
  splits = glue.splits('sst2', tokenize, folder=tmp_path, share=0.2)
  both = [
      part.arrays['input_ids'][:, 0].tolist()
      for part in (splits.train, splits.held_out)
  ]
  assert sorted(sum(both, [])) == list(range(20))
  assert splits.test.arrays['input_ids'][:, 0].tolist() == [30, 40, 31, 40]
  assert splits.rules['held_out']['dropped'] == 7


def test_a_missing_file_says_where_it_goes(task, tmp_path):
  folder = glue.TASKS[task].folder
  with pytest.raises(FileNotFoundError, match=f'gluebenchmark.*{folder}/dev'):
    glue.read(task, 'train', folder=tmp_path)


def test_test_labels_are_secret():
  with pytest.raises(ValueError, match='secret'):
    glue.read('mrpc', 'test')
  with pytest.raises(ValueError, match="'qqp'"):
    glue.read('qqp', 'train')


@pytest.mark.parametrize(
    'text, message',
    [
        ('sentence\tlabel\nGood.\t1\nBad.\n', 'train.tsv:3 has 1 columns'),
        ('sentence\tlabel\nGood.\t-1\n', "train.tsv:2 has the label '-1'"),
        ('', 'train.tsv holds no examples'),
        ('sentence\tlabel\n', 'train.tsv holds no examples'),
        ('text\tlabel\nGood.\t1\n', "no column 'sentence', only"),
    ],
)
def test_broken_files(tmp_path, text, message):
  (tmp_path / 'SST-2').mkdir()
  (tmp_path / 'SST-2' / 'train.tsv').write_text(text)
  with pytest.raises(ValueError, match=message):
    glue.read('sst2', 'train', folder=tmp_path)


def test_tfds_agrees(task):
  """Names of configs, columns and labels are those of TFDS."""
  if importlib.util.find_spec('tensorflow') is None:
    pytest.skip('TFDS has GLUE with TensorFlow only: the extra `tf`')
  details = glue.TASKS[task]
  with tfds.testing.mock_data(num_examples=5):
    info = tfds.builder(f'glue/{task}').info
    texts = glue.read(task, 'validation')
  assert tuple(info.features['label'].names) == details.labels
  assert set(info.features) == {*details.columns, 'label', 'idx'}
  assert len(texts.columns) == len(details.columns)
  assert all(isinstance(t, str) for column in texts.columns for t in column)
  assert texts.label.shape == (5,)
