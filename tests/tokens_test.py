"""Models that have the same tokens in another order, averaged by token."""

import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
from typer import testing

import jaxsoup
from jaxsoup import checkpoints
from jaxsoup import cli
from jaxsoup import sharding
from jaxsoup.checkpoints import _pieces

WORDS = ['[PAD]', 'good', 'bad', 'film', 'a', 'the', '<x>']
NUM_ROWS = 9  # As some pad their embeddings.


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
  """Many pieces a leaf, as large models have."""
  monkeypatch.setattr(_pieces, '_PIECE_BYTES', 30)


def words_of(k):
  return [WORDS[i] for i in np.random.default_rng(k).permutation(len(WORDS))]


def arrays_of(k):
  rng = np.random.default_rng(k)
  draw = lambda *shape: rng.integers(-64, 64, shape).astype(np.float32)
  return {
      'embed.weight': draw(NUM_ROWS, 3),
      'head.weight': draw(NUM_ROWS, 3),
      'head.bias': draw(NUM_ROWS),
      'layers.0.weight': draw(3, 3),
  }


def made(folder, arrays, words, kind='tokenizer.json', **config):
  """A directory whose last word is an added token."""
  folder.mkdir()
  safetensors.numpy.save_file(arrays, folder / 'model.safetensors')
  config = {'text_config': {'vocab_size': NUM_ROWS, 'hidden_size': 3}} | config
  (folder / 'config.json').write_text(json.dumps(config))
  ids = {w: i for i, w in enumerate(words)}
  added = ids.pop('<x>', None)
  if kind == 'tokenizer.json':
    ids = {
        'model': {'vocab': ids},
        'added_tokens': [{'content': '<x>', 'id': added}],
    }
  elif kind == 'vocab.txt':
    ids['<x>'] = added
  else:
    (folder / 'added_tokens.json').write_text(json.dumps({'<x>': added}))
  text = '\n'.join(words) if kind == 'vocab.txt' else json.dumps(ids)
  (folder / kind).write_text(text)
  return str(folder)


@pytest.fixture
def runs(tmp_path):
  kinds = ['tokenizer.json', 'vocab.json', 'vocab.txt']
  return [
      made(tmp_path / f'run{k}', arrays_of(k), words_of(k), kind)
      for k, kind in enumerate(kinds)
  ]


def in_first_order(k):
  """The arrays of a model as the first one has its tokens, word by word."""
  arrays = arrays_of(k)
  own, first = words_of(k), words_of(0)
  rows = [own.index(w) for w in first] + list(range(len(first), NUM_ROWS))
  for name in ('embed.weight', 'head.weight', 'head.bias'):
    arrays[name] = np.stack([arrays[name][i] for i in rows])
  return arrays


def mean(ks):
  trees = [in_first_order(k) for k in ks]
  return {n: np.mean([t[n] for t in trees], 0) for n in trees[0]}


def assert_equal(actual, expected):
  assert actual.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_allclose(actual[name], x, rtol=1e-6)


def flat(params):
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {'.'.join(k.key for k in p): np.asarray(x) for p, x in leaves}


def soup(*args):
  result = testing.CliRunner().invoke(cli.app, ['soup', *map(str, args)])
  assert isinstance(result.exception, (SystemExit, type(None)))
  return result


@pytest.mark.parametrize('out', ['soup', 'soup.safetensors'])
def test_files(tmp_path, runs, out):
  out = tmp_path / out
  result = soup('uniform', *runs, '--out', out, '--align-tokens')
  assert result.exit_code == 0, result.output
  file = out / 'model.safetensors' if out.is_dir() else out
  assert_equal(safetensors.numpy.load_file(file), mean(range(3)))
  if out.is_dir():
    read = lambda folder: pathlib.Path(folder, 'tokenizer.json').read_text()
    assert read(out) == read(runs[0])


def test_recipes(runs):
  ingredients = checkpoints.Ingredients(runs, align_tokens=True)
  for k, params in enumerate(ingredients):
    assert_equal(flat(params), in_first_order(k))
  assert_equal(flat(jaxsoup.uniform(ingredients).params), mean(range(3)))
  target = mean([0, 2])
  score = lambda params: -sum(
      float(np.abs(x - target[n]).sum()) for n, x in flat(params).items()
  )
  greedy = jaxsoup.greedy(ingredients, score)
  assert_equal(flat(greedy.params), target)


def test_a_mesh(runs):
  mesh = jax.make_mesh((len(jax.devices()),), ('fsdp',))
  shapes = checkpoints.Ingredients(runs[:1]).abstract_params
  shapes = sharding.fsdp(shapes, mesh, min_size=1)
  ingredients = checkpoints.Ingredients(runs, shapes, align_tokens=True)
  assert_equal(flat(ingredients[1]), in_first_order(1))


def test_damage(tmp_path, runs):
  run = tmp_path / 'run1'
  params = checkpoints.Ingredients([run])[0]
  (run / 'model.safetensors').unlink()
  file = pathlib.Path(checkpoints.save(run / 'model.safetensors', params))
  aligned = checkpoints.Ingredients(runs, align_tokens=True)
  assert_equal(flat(aligned[1]), in_first_order(1))
  content = bytearray(file.read_bytes())
  place = content.index(arrays_of(1)['embed.weight'].tobytes())
  content[place + 5] ^= 1
  file.write_bytes(content)
  for read_fn in (lambda x: x[1], jaxsoup.uniform):
    with pytest.raises(ValueError, match="'embed/weight' .* is damaged"):
      read_fn(checkpoints.Ingredients(runs, align_tokens=True))


def test_equal_tokenizers_need_no_order(tmp_path, runs):
  run = made(tmp_path / 'equal', arrays_of(5), words_of(0))
  pair = [runs[0], run]
  ingredients = checkpoints.Ingredients(pair, align_tokens=True)
  assert_equal(flat(ingredients[1]), arrays_of(5))


def test_what_cannot_be_aligned(tmp_path, runs):
  more = [*words_of(1), '<y>']
  without = made(tmp_path / 'without', arrays_of(1), words_of(1))
  pathlib.Path(without, 'tokenizer.json').unlink()
  square = arrays_of(3) | {'w': np.ones((NUM_ROWS, NUM_ROWS), np.float32)}
  block = arrays_of(3) | {'h.0.w': np.ones((NUM_ROWS, 3), np.float32)}
  pairs = {
      "only one has '<y>'": [
          runs[0],
          made(tmp_path / 'more', arrays_of(1), more),
      ],
      'without/.* have 7 and 0 tokens': [runs[0], without],
      'but w may have': [
          made(tmp_path / f'square{k}', square, words_of(k)) for k in (0, 1)
      ],
      'but h/0/w may have': [
          made(tmp_path / f'block{k}', block, words_of(k)) for k in (0, 1)
      ],
      'but n_ctx may have': [
          made(tmp_path / f'ctx{k}', arrays_of(k), words_of(k), n_ctx=NUM_ROWS)
          for k in (0, 1)
      ],
      r'vocab_size \[5\], with 7 tokens and 0 arrays': [
          made(tmp_path / f'v{k}', arrays_of(k), words_of(k), text_config={
              'vocab_size': 5
          })
          for k in (0, 1)
      ],
  }  # fmt: skip
  for match, pair in pairs.items():
    ingredients = checkpoints.Ingredients(pair, align_tokens=True)
    with pytest.raises(ValueError, match=match):
      jaxsoup.uniform(ingredients)
  result = soup('uniform', *runs[:2], '--out', tmp_path / 'soup')
  assert result.exit_code == 1 and '--align-tokens' in result.stderr


@pytest.mark.parametrize('word', ['model', 'vocab', 'added_tokens'])
def test_words_that_are_keys_of_another_file(tmp_path, word):
  words = ['a', word, 'b', *WORDS[:4]]
  runs = [
      made(tmp_path / f'run{k}', arrays_of(k), order, 'vocab.json')
      for k, order in enumerate((words, ['b', word, 'a', *WORDS[:4]]))
  ]
  for run in runs:
    pathlib.Path(run, 'added_tokens.json').unlink()
  with pytest.raises(ValueError, match="Token 'a' has id 0 in .*, but 2 in"):
    jaxsoup.uniform(checkpoints.Ingredients(runs))


@pytest.mark.parametrize('name', ['added_tokens.json', 'spiece.model'])
def test_files_that_are_read_with_others_differ(tmp_path, name):
  """Added tokens next to an equal vocabulary, or SentencePiece alone."""
  runs = []
  for k in (0, 1):
    run = made(tmp_path / f'run{k}', arrays_of(k), WORDS, 'vocab.json')
    if name == 'spiece.model':
      pathlib.Path(run, 'vocab.json').unlink()
    ids = {'<x>': 6, '<y>': 7} if k else {'<y>': 6, '<x>': 7}
    pathlib.Path(run, name).write_text(json.dumps(ids))
    runs.append(run)
  result = soup('uniform', *runs, '--out', tmp_path / 'soup')
  assert result.exit_code == 1 and not (tmp_path / 'soup').exists()
  assert 'a row of the embeddings' in result.stderr
  pathlib.Path(runs[1], name).write_bytes(
      pathlib.Path(runs[0], name).read_bytes()
  )
  assert soup('uniform', *runs, '--out', tmp_path / 'soup').exit_code == 0
