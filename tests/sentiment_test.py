"""The rated sentences: reading, the band around neutral, splits by review."""

import io
import os
import re
import tarfile
import zipfile

import numpy as np
import pytest

from jaxsoup.data import sentiment

MOVIES = [
    ('1', 2.25, 'Fun for all &amp; sundry.'),
    ('2', -1.5, 'A pretentious mess…'),
    ('3', 0.5, 'There are actors in it.'),
    ('4', -0.5, 'It is long.'),
    ('5', 0.6, 'Naïve and charming.'),
    ('6', -0.51, 'A pretentious mess'),
    ('7', 3.0, 'Superb'),
]
AMAZON = [
    ('1_1', 1.0, 'wow'),
    ('1_2', -2.0, 'it broke.'),
    ('12_3', 2.0, 'works !'),
]


def _content(rows):
  return ''.join('\t'.join(map(str, row)) + '\r\n' for row in rows).encode()


FILES = {
    'movieReviewSnippets_GroundTruth.txt': _content(MOVIES),
    'amazonReviewSnippets_GroundTruth.txt': _content(AMAZON),
    'amazonReviewSnippets_anonDataRatings.txt': b'other\tfields',
}


def _tar(files):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode='w:gz') as tar:
    for name, content in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'hutto').mkdir()
  for name, content in FILES.items():
    (tmp_path / 'hutto' / name).write_bytes(content)
  return tmp_path


def _saved(folder, kind):
  """The same files in each form in which a user may have them."""
  inner = _tar({f'hutto_ICWSM_2014/{k}': v for k, v in FILES.items()})
  place = 'vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz'
  if kind == 'folder':
    return folder
  path = folder / 'out' / f'vaderSentiment-0.5.{kind}'
  path.parent.mkdir()
  if kind == 'zip':
    with zipfile.ZipFile(path, 'w') as archive:
      archive.writestr(place, inner)
      archive.writestr('vaderSentiment-0.5/setup.py', '')
  elif kind == 'tar.gz':
    path.write_bytes(_tar({place: inner}))
  else:
    path = path.with_name('renamed.tgz')
    path.write_bytes(inner)
  return path


@pytest.mark.parametrize('kind', ['folder', 'zip', 'tar.gz', 'inner'])
def test_every_form_of_the_file_gives_the_same(folder, kind):
  data = sentiment.load(_saved(folder, kind))
  assert list(data) == ['movies', 'amazon']
  movies, amazon = data.values()
  assert movies['text'] == [
      'Fun for all & sundry.',
      'A pretentious mess…',
      'Naïve and charming.',
      'A pretentious mess',
      'Superb',
  ]
  assert movies['rating'].dtype == np.float32
  np.testing.assert_allclose(movies['rating'], [2.25, -1.5, 0.6, -0.51, 3])
  assert movies['label'].dtype == np.int32
  np.testing.assert_array_equal(movies['label'], [1, 0, 1, 0, 1])
  np.testing.assert_array_equal(movies['review'], [1, 2, 5, 6, 7])
  np.testing.assert_array_equal(amazon['review'], [1, 1, 12])


def test_a_folder_of_what_pip_saved(folder):
  path = _saved(folder, 'zip')
  assert len(sentiment.load(path.parent)['amazon']['text']) == 3


def test_the_band_is_the_caller_s(folder):
  assert len(sentiment.load(folder, band=0.0)['movies']['text']) == 7
  assert sentiment.load(folder, band=2.5)['movies']['text'] == ['Superb']


@pytest.mark.parametrize('where', ['nowhere', 'empty'])
def test_what_is_missing_says_how_to_get_it(tmp_path, where):
  (tmp_path / 'empty').mkdir()
  with pytest.raises(FileNotFoundError, match=re.escape(sentiment.PIP)) as info:
    sentiment.load(tmp_path / where)
  assert str(tmp_path / where) in str(info.value)


@pytest.mark.parametrize('line', ['8\t1.0', '8\tgood\ttext', 'x\t1.0\ttext'])
def test_a_broken_line_is_named(tmp_path, line):
  content = _content(MOVIES) + line.encode()
  (tmp_path / 'movieReviewSnippets_GroundTruth.txt').write_bytes(content)
  with pytest.raises(
      ValueError, match='GroundTruth.txt, line 8: .*id, a rating'
  ):
    sentiment.load(tmp_path)


def _lengths(texts):
  return {'input_ids': np.array([[len(x)] for x in texts], np.int32)}


def test_splits_drop_repeated_texts(folder):
  # What a movie has as well may be trained on.
  also = ('13_1', 3.0, 'superb!')
  file = folder / 'hutto' / 'amazonReviewSnippets_GroundTruth.txt'
  file.write_bytes(_content([*AMAZON, also]))
  sizes = dict(train=2, held_out=1, test=1)
  splits = sentiment.splits(folder, _lengths, sizes, seed=0)
  rows = [
      split[np.arange(len(split))]
      for split in (splits.train, splits.held_out, splits.test)
  ]
  assert [len(x['label']) for x in rows] == [2, 1, 1]
  seen = [n for x in rows for n in x['input_ids'][:, 0]]
  texts = ['Fun for all & sundry.', 'A pretentious mess…', 'Superb']
  assert sorted(seen) == sorted(map(len, [*texts, 'Naïve and charming.']))
  amazon = splits.shifts['amazon'].arrays
  np.testing.assert_array_equal(amazon['label'], [1, 0, 1])
  np.testing.assert_array_equal(amazon['input_ids'][:, 0], [3, 9, 7])
  with pytest.raises(ValueError, match='ask for 5 of 4 examples, but .* test'):
    sentiment.splits(folder, _lengths, {**sizes, 'test': 2}, seed=0)


def test_reviews_lie_in_one_set(rng):
  review = rng.integers(0, 60, 300)
  sizes = dict(train=150, held_out=70, test=40)
  first, again, other = (sentiment.split(review, sizes, s) for s in (0, 0, 1))
  groups = {name: set(review[rows]) for name, rows in first.items()}
  assert not groups['train'] & groups['held_out']
  assert not groups['train'] & groups['test']
  assert not groups['held_out'] & groups['test']
  for name, size in sizes.items():
    assert len(set(first[name])) == size
    np.testing.assert_array_equal(first[name], again[name])
  assert not np.array_equal(first['test'], other['test'])


def test_texts_without_words_are_not_the_same():
  data = {'text': [':)', ':(', ':)', 'A b', 'a, B!']}
  assert sentiment.unique(data)['text'] == [':)', ':(', 'A b']


@pytest.mark.pretrained
def test_the_real_file():
  path = os.environ.get('JAXSOUP_SENTIMENT')
  if path is None:
    pytest.skip(f'JAXSOUP_SENTIMENT is not set to what `{sentiment.PIP}` saved')
  data = sentiment.load(path)
  counts = {name: len(x['text']) for name, x in data.items()}
  assert counts == dict(movies=10043, amazon=2943, nyt=2788, tweets=3362)
  assert data['movies']['text'][2] == 'Effective but too tepid biopic'
  np.testing.assert_allclose(data['movies']['rating'][2], -0.6)
  assert 0.49 < data['movies']['label'].mean() < 0.51
  assert len(set(data['amazon']['review'])) <= 309
  assert len(set(data['nyt']['review'])) <= 500
  sizes = dict(train=6000, held_out=2000, test=2000)
  splits = sentiment.splits(path, _lengths, sizes, seed=0)
  assert list(splits.shifts) == ['amazon', 'nyt', 'tweets']
  assert 2700 < len(splits.shifts['nyt']) < 2788
