"""What cannot be averaged is refused, with what to do."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from typer import testing

import jaxsoup
from jaxsoup import _tree
from jaxsoup import checkpoints
from jaxsoup import cli
from jaxsoup import lora

F32, F8 = np.float32, jnp.float8_e4m3fn


def written(folder, arrays, config=None):
  """A directory, or without config a bare file, as others write it."""
  folder.mkdir(parents=True)
  file = folder / 'model.safetensors'
  safetensors.numpy.save_file(arrays, file)
  if config is None:
    return str(file)
  (folder / 'config.json').write_text(json.dumps(config))
  return str(folder)


def soup(*args):
  result = testing.CliRunner().invoke(cli.app, ['soup', *map(str, args)])
  assert isinstance(result.exception, (SystemExit, type(None)))
  return result


QUANTIZED = {
    # As the libraries name them; shapes of a layer of 8 x 8.
    'fp8 in blocks': {'q.weight': (8, F8), 'q.weight_scale_inv': (1, F32)},
    'fp8': {'q.weight': (8, F8), 'q.weight_scale': (1, F32)},
    'gptq': {
        'q.qweight': (1, np.int32), 'q.qzeros': (1, np.int32),
        'q.scales': (1, np.float16), 'q.g_idx': (8, np.int32),
    },
    'bitsandbytes, 4 bits': {
        'q.weight': (4, np.uint8), 'q.weight.absmax': (1, F32),
        'q.weight.quant_map': (16, F32),
        'q.weight.quant_state.bitsandbytes__nf4': (9, np.uint8),
    },
    'bitsandbytes, 8 bits': {'q.weight': (8, np.int8), 'q.SCB': (8, F32)},
    'mxfp4': {
        'experts.up_proj_blocks': (4, np.uint8),
        'experts.up_proj_scales': (4, np.uint8),
    },
    'compressed-tensors': {
        'q.weight_packed': (1, np.int32), 'q.weight_scale': (8, jnp.bfloat16),
        'q.weight_shape': (2, np.int64),
    },
}  # fmt: skip


def arrays_of(kind, k=0):
  arrays = {n: np.ones(m, d) for n, (m, d) in QUANTIZED[kind].items()}
  return {**arrays, 'norm.weight': np.full(8, k, np.float32)}


@pytest.mark.parametrize('kind', QUANTIZED)
def test_quantized_files(tmp_path, kind):
  runs = [
      written(tmp_path / name, arrays_of(kind, k))
      for k, name in enumerate('ab')
  ]
  result = soup('uniform', *runs, '--out', tmp_path / 'soup.safetensors')
  assert result.exit_code == 1
  assert runs[0] in result.stderr and 'is quantized' in result.stderr
  assert 'Dequantize' in result.stderr
  assert not (tmp_path / 'soup.safetensors').exists()
  ingredients = checkpoints.Ingredients(runs)
  for recipe_fn in (
      jaxsoup.uniform,
      lambda x: jaxsoup.greedy(x, lambda params: 0.0),
  ):
    with pytest.raises(ValueError, match='is quantized'):
      recipe_fn(ingredients)


@pytest.mark.parametrize('nested', [False, True])
def test_a_config_that_says_so(tmp_path, nested):
  own = {'quantization_config': {'quant_method': 'awq', 'bits': 4}}
  config = {'text_config': own} if nested else own
  arrays = {'w': np.ones(3, np.float32)}
  runs = [
      written(tmp_path / 'a', arrays, {}),
      written(tmp_path / 'b', arrays, config),
  ]
  for out in ('soup', 'soup.safetensors'):
    result = soup('uniform', *runs, '--out', tmp_path / out)
    assert result.exit_code == 1
    assert f"{tmp_path / 'b' / 'config.json'} has quantization_config" in (
        result.stderr
    )
    assert "'awq'" in result.stderr
  with pytest.raises(ValueError, match='has quantization_config'):
    checkpoints.save_directory(tmp_path / 'soup', checkpoints.Ingredients(runs))


def test_a_template_does_not_hide_the_scales(tmp_path):
  # The values without their scales are no weights.
  runs = [
      written(
          tmp_path / name, {'w': np.ones(3, F8), 'w_scale': np.ones((), F32)}
      )
      for name in 'ab'
  ]
  abstract = {'w': jax.ShapeDtypeStruct((3,), jnp.bfloat16)}
  with pytest.raises(ValueError, match="'w' of dtype float8_e4m3fn is quant"):
    jaxsoup.uniform(checkpoints.Ingredients(runs, abstract))


@pytest.mark.parametrize('kind', ['qwix', 'gemma'])
def test_jax_trees_that_are_quantized(tmp_path, kind):
  key, scale = {
      'qwix': ('w/array/qvalue', 'w/array/scale'),
      'gemma': ('q/kernel', 'q/scale'),
  }[kind]
  paths = [tuple(name.split('/')) for name in (key, scale)]
  values = np.ones((4, 4), np.int8), np.ones((1, 4), np.float32)
  params = _tree.nest(dict(zip(paths, values)))
  runs = [checkpoints.save(tmp_path / name, params) for name in 'ab']
  with pytest.raises(ValueError, match=f'{key!r} of dtype int8 is quantized'):
    jaxsoup.uniform(checkpoints.Ingredients(runs))


def test_floats_of_8_bits_without_scales_are_averaged(tmp_path):
  runs = [
      written(tmp_path / name, {'w': np.full(3, k, F8), 'norm.scale': F32([k])})
      for k, name in ((1, 'a'), (2, 'b'))
  ]
  params = jaxsoup.uniform(checkpoints.Ingredients(runs)).params
  assert params['w'].tolist() == [1.5] * 3


ADAPTED = {
    'nnx': {'q': {'kernel': 0, 'lora_a': 0, 'lora_b': 0}},
    'qwix': {'q': {'w': 0, 'w_lora_a': 0, 'w_lora_b': 0}},
    'gemma': {'q': {'w': 0, 'lora': {'a': 0, 'b': 0}}},
    'maxtext': {'q': {'lora_a.kernel': 0, 'lora_b.kernel': 0}},
    'peft': {'q': {'lora_A': {'weight': 0}, 'lora_B': {'weight': 0}}},
}


@pytest.mark.parametrize('kind', ADAPTED)
def test_factors_of_adapters(tmp_path, kind):
  params = jax.tree.map(lambda _: np.ones((2, 2), np.float32), ADAPTED[kind])
  params['bias'] = np.ones(2, np.float32)
  runs = [checkpoints.save(tmp_path / name, params) for name in 'ab']
  result = soup('uniform', *runs, '--out', tmp_path / 'soup')
  assert result.exit_code == 1
  assert 'holds factors of LoRA' in result.stderr
  assert 'jaxsoup.lora.average' in result.stderr
  with pytest.raises(ValueError, match='holds factors of LoRA'):
    jaxsoup.greedy(checkpoints.Ingredients(runs), lambda params: 0.0)


def test_adapters_can_still_be_read_and_averaged_as_such(tmp_path):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  trees = [{'q': {'lora_a': draw(4, 2), 'lora_b': draw(2, 3)}} for _ in 'ab']
  runs = [checkpoints.save(tmp_path / n, x) for n, x in zip('ab', trees)]
  soup = lora.average(checkpoints.Ingredients(runs))
  products = [x['q']['lora_a'] @ x['q']['lora_b'] for x in trees]
  np.testing.assert_allclose(
      lora.dense(soup.params)['q'], np.mean(products, 0), rtol=1e-5
  )


def test_a_base_without_its_adapters_is_averaged(tmp_path):
  trees = [{'w': F32([k]), 'w_lora_a': F32([k])} for k in (1, 2)]
  runs = [checkpoints.save(tmp_path / n, x) for n, x in zip('ab', trees)]
  abstract = {'w': jax.ShapeDtypeStruct((1,), np.float32)}
  params = jaxsoup.uniform(checkpoints.Ingredients(runs, abstract)).params
  assert params['w'].tolist() == [1.5]


def test_names_that_only_look_like_it(tmp_path):
  arrays = {
      'flora.a': F32([1]), 'lora.alpha': F32([1]), 'blocks.scale': F32([1]),
      'mask': np.ones(2, np.bool_), 'scale': F32([2]),
  }  # fmt: skip
  other = {**arrays, 'scale': F32([3])}
  runs = [written(tmp_path / 'a', arrays), written(tmp_path / 'b', other)]
  result = soup('uniform', *runs, '--out', tmp_path / 'soup.safetensors')
  assert result.exit_code == 0, result.output


# --- Tokenizers ---------------------------------------------------------------

WORDS = ['[PAD]', 'good', 'bad', 'film']


def tokenizers(words):
  """The same tokens, as they are stored by different tokenizers."""
  ids = {w: i for i, w in enumerate(words)}
  added = [{'id': len(words) - 1, 'content': words[-1]}]
  first = {w: i for w, i in ids.items() if w != words[-1]}
  scores = [[w, -1.0] for w in words]
  return {
      'vocab.txt': '\n'.join(words) + '\n',
      'vocab.json': json.dumps(ids),
      'tokenizer.json': json.dumps(
          {'model': {'vocab': first}, 'added_tokens': added}
      ),
      'unigram/tokenizer.json': json.dumps({'model': {'vocab': scores}}),
  }


def with_tokens(folder, words, kind, num_rows=None):
  rows = np.arange(num_rows or len(words), dtype=np.float32)
  arrays = {
      'embed.weight': rows[:, None] + np.ones(3, np.float32),
      'head.bias': rows,
      'classes': np.ones((2, 3), np.float32),
  }
  path = written(folder, arrays, {})
  file = folder / kind.rpartition('/')[2]
  file.write_text(tokenizers(words)[kind])
  return path


@pytest.mark.parametrize('kind', tokenizers(WORDS))
def test_tokens_in_another_order(tmp_path, kind):
  runs = [
      with_tokens(tmp_path / 'a', WORDS, kind),
      with_tokens(tmp_path / 'b', ['[PAD]', 'bad', 'good', 'film'], kind),
  ]
  result = soup('uniform', *runs, '--out', tmp_path / 'soup')
  assert result.exit_code == 1
  assert f"Token 'good' has id 1 in {runs[0]}/" in result.stderr
  assert 'but 2 in' in result.stderr
  with pytest.raises(ValueError, match="Token 'good' has id 1"):
    jaxsoup.greedy(checkpoints.Ingredients(runs), lambda params: 0.0)


@pytest.mark.parametrize('kind', tokenizers(WORDS))
@pytest.mark.parametrize('is_first', [True, False])
def test_more_tokens(tmp_path, kind, is_first):
  more = [*WORDS, '<a>', '<b>', '<c>', '<d>']
  runs = [
      with_tokens(tmp_path / 'a', more if is_first else WORDS, kind),
      with_tokens(tmp_path / 'b', WORDS if is_first else more, kind),
  ]
  result = soup('uniform', *runs, '--out', tmp_path / 'soup')
  assert result.exit_code == 1
  rows = '4 rows, expected 8' if is_first else '8 rows, expected 4'
  assert f"leaf 'embed/weight' has {rows}. Rows 4 to 7 are" in result.stderr
  assert "the tokens '<a>', '<b>', '<c>', ... of" in result.stderr
  assert runs[not is_first] in result.stderr


@pytest.mark.filterwarnings('ignore:.*have equal parameters')
def test_tokenizers_that_go_together(tmp_path):
  # One more token, in a row that both have; and the same ones in other files.
  runs = [
      with_tokens(tmp_path / 'a', WORDS, 'vocab.json', 6),
      with_tokens(tmp_path / 'b', [*WORDS, '<a>'], 'tokenizer.json', 6),
      with_tokens(tmp_path / 'c', WORDS, 'vocab.txt', 6),
  ]
  result = soup('uniform', *runs, '--out', tmp_path / 'soup')
  assert result.exit_code == 0, result.output


def test_heads_of_other_sizes_have_no_tokens(tmp_path):
  runs = [with_tokens(tmp_path / n, WORDS, 'vocab.txt') for n in 'ab']
  file = tmp_path / 'b' / 'model.safetensors'
  arrays = safetensors.numpy.load_file(file)
  arrays['classes'] = np.ones((3, 3), np.float32)
  safetensors.numpy.save_file(arrays, file)
  result = soup('uniform', *runs, '--out', tmp_path / 'soup')
  assert result.exit_code == 1
  assert 'has shape (3, 3), expected (2, 3)' in result.stderr


# --- Inspection ---------------------------------------------------------------


def problems(*runs):
  args = ['inspect', *map(str, runs), '--json']
  result = testing.CliRunner().invoke(cli.app, args)
  assert result.exit_code in (0, 1), result.output
  found = json.loads(result.stdout)['problems']
  assert bool(found) == result.exit_code
  return found


def test_inspect_says_what_recipes_refuse(tmp_path):
  plain = written(tmp_path / 'plain', {'w': F32([1])})
  quantized = written(tmp_path / 'quantized', arrays_of('gptq'))
  (problem,) = problems(quantized)
  assert 'is quantized' in problem
  adapted = checkpoints.save(tmp_path / 'lora', {'q': {'lora_a': F32([1])}})
  mismatch, problem = problems(plain, adapted)
  assert 'does not match' in mismatch and 'holds factors of LoRA' in problem
  runs = [
      with_tokens(tmp_path / 'a', WORDS, 'vocab.txt'),
      with_tokens(tmp_path / 'b', WORDS[::-1], 'vocab.txt'),
  ]
  (problem,) = problems(*runs)
  assert "Token '[PAD]' has id 0" in problem


@pytest.mark.parametrize('is_first', [True, False])
def test_inspect_lists_no_buffers_that_recipes_take(tmp_path, is_first):
  buffers = {
      'position_ids': np.arange(3),
      'bn.num_batches_tracked': np.int64(3),
  }
  arrays = {'w': F32([1])}, {'w': F32([2])} | {
      n: np.asarray(x) for n, x in buffers.items()
  }
  runs = [written(tmp_path / f'{k}', x) for k, x in enumerate(arrays)]
  runs = runs[::-1] if is_first else runs
  assert not problems(*runs)
  other = written(tmp_path / 'other', {'w': F32([1]), 'more': F32([1])})
  (problem,) = problems(*runs, other)
  assert 'more' in problem and 'position_ids' not in problem
