"""Ingredients of different dtypes, or that do not have the same leaves."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from typer import testing

import jaxsoup
from jaxsoup import checkpoints
from jaxsoup import cli

DTYPES = (np.float32, jnp.bfloat16, np.float16)


def draw(k, *shape):
  return np.random.default_rng(k).normal(size=shape).astype(np.float32)


def arrays_of(k, dtype=np.float32):
  return {
      'body.weight': draw(k, 40, 8).astype(dtype),
      'head.bias': draw(10 + k, 5).astype(dtype),
      'codes': np.arange(3, dtype=np.int64),
  }


def written(folder, arrays, config=None):
  folder = pathlib.Path(folder)
  folder.mkdir()
  safetensors.numpy.save_file(arrays, folder / 'model.safetensors')
  (folder / 'config.json').write_text(json.dumps(config or {}))
  return str(folder)


def nested(arrays):
  tree = {}
  for name, x in arrays.items():
    parent, _, key = name.rpartition('.')
    (tree.setdefault(parent, {}) if parent else tree)[key] = x
  return tree


def soup(*args):
  result = testing.CliRunner().invoke(cli.app, ['soup', *map(str, args)])
  assert isinstance(result.exception, (SystemExit, type(None)))
  return result


def read(path):
  return safetensors.numpy.load_file(pathlib.Path(path) / 'model.safetensors')


@pytest.fixture(autouse=True)
def cwd(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', list(sys.path))


@pytest.fixture
def mixed():
  """Runs of three dtypes."""
  arrays = [arrays_of(k, d) for k, d in enumerate(DTYPES)]
  for name, x in zip('abc', arrays):
    written(name, x, {'dtype': 'float32', 'text': {'torch_dtype': 'float16'}})
  return arrays


def mean(arrays, name, dtype=np.float64):
  return np.mean([x[name].astype(np.float64) for x in arrays], 0).astype(dtype)


# --- Dtypes -------------------------------------------------------------------


def test_without_dtype_it_is_an_error_that_names_the_option(mixed):
  result = soup('uniform', *'abc', '--out', 'out')
  assert result.exit_code == 1
  assert 'has dtype bfloat16, expected float32' in result.stderr
  assert '--dtype float32' in result.stderr and 'jax.tree' not in result.stderr
  with pytest.raises(ValueError, match=r"Ingredients\(\.\.\., dtype='float32'"):
    jaxsoup.greedy(checkpoints.Ingredients([*'abc']), lambda p: 0.0)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16', 'float64'])
@pytest.mark.parametrize('out', ['out', 'out.safetensors'])
def test_one_dtype_from_file_to_file(mixed, dtype, out):
  result = soup('uniform', *'abc', '--dtype', dtype, '--out', out)
  assert result.exit_code == 0, result.output
  if out == 'out':
    stored = read(out)
    config = json.loads(pathlib.Path('out/config.json').read_text())
    assert config == {'dtype': dtype, 'text': {'torch_dtype': dtype}}
  else:
    stored = safetensors.numpy.load_file(out)
  for name in ('body.weight', 'head.bias'):
    assert stored[name].dtype == jnp.dtype(dtype)
    expected = mean(mixed, name)
    # One rounding of a sum in float32.
    spacing = float(jnp.finfo(dtype).eps) / 2 + 3e-7
    np.testing.assert_allclose(
        stored[name].astype(np.float64), expected, rtol=spacing, atol=3e-7
    )
  assert stored['codes'].tolist() == [0, 1, 2]


def test_float64_is_summed_as_such():
  arrays = [{'w': np.float64([1 + k * 1e-12])} for k in range(2)]
  for name, x in zip('ab', arrays):
    written(name, x)
  assert (
      soup('uniform', 'a', 'b', '--dtype', 'float64', '--out', 'x').exit_code
      == 0
  )
  assert read('x')['w'] == 1 + 0.5e-12


@pytest.mark.parametrize(
    'recipe, options',
    [
        ('uniform', ()),
        ('average', ('--alpha', '0.5,0.25,0.25')),
        ('greedy', ('--eval', 'mine:score')),
        ('model-stock', ('--init', 'a')),
    ],
)
@pytest.mark.parametrize('out', ['dir', 'x.safetensors', 'orbax'])
@pytest.mark.filterwarnings('ignore:.*have equal parameters')
def test_all_recipes_have_it(mixed, recipe, options, out):
  pathlib.Path('mine.py').write_text('def score(params):\n  return 0.0\n')
  runs = ['a', 'b', 'c/model.safetensors' if out == 'orbax' else 'c']
  options = (*options, '--dtype', 'bfloat16', '--out', out)
  result = soup(recipe, *runs, *options)
  assert result.exit_code == 0, result.output
  params = checkpoints.load(out).params
  assert params['body']['weight'].dtype == jnp.bfloat16
  if recipe != 'model-stock':
    alpha = checkpoints.load(out).alpha
    expected = sum(
        a * x['body.weight'].astype(np.float64) for a, x in zip(alpha, mixed)
    )
    actual = np.asarray(params['body']['weight'], np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0.01, atol=0.01)


def test_a_template_says_it_too(mixed):
  abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nested(mixed[0])
  )
  del abstract['codes']
  params = jaxsoup.uniform(checkpoints.Ingredients([*'abc'], abstract)).params
  np.testing.assert_allclose(
      params['body']['weight'], mean(mixed, 'body.weight'), rtol=1e-6, atol=1e-6
  )
  half = checkpoints.Ingredients([*'abc'], abstract, dtype='bfloat16')
  assert jaxsoup.uniform(half).params['head']['bias'].dtype == jnp.bfloat16


def test_a_dtype_that_is_too_small():
  for name, value in zip('ab', (1e5, 3e5)):
    written(name, {'w': np.float32([value])})
  result = soup('uniform', 'a', 'b', '--dtype', 'float16', '--out', 'x')
  assert result.exit_code == 1 and '--dtype bfloat16' in result.stderr
  assert not pathlib.Path('x').exists()
  with pytest.raises(ValueError, match='dtype is int8, expected one of floats'):
    checkpoints.Ingredients([*'ab'], dtype='int8')


# --- Leaves that not all have -------------------------------------------------

BUFFERS = {
    'text.position_ids': np.arange(4)[None],
    'bn.num_batches_tracked': np.asarray(7),
}


@pytest.mark.parametrize('first', ['with', 'without'])
@pytest.mark.parametrize('recipe', ['uniform', 'greedy'])
@pytest.mark.parametrize('out', ['out', 'orbax'])
def test_buffers_that_some_have(first, recipe, out):
  pathlib.Path('mine.py').write_text('def score(params):\n  return 0.0\n')
  written('with', arrays_of(0) | BUFFERS)
  written('without', arrays_of(1))
  runs = sorted(['with', 'without'], key=lambda x: x != first)
  options = ('--eval', 'mine:score') if recipe == 'greedy' else ()
  if out == 'orbax':
    runs[1] += '/model.safetensors'
  result = soup(recipe, *runs, *options, '--out', out)
  assert result.exit_code == 0 and not result.stderr, result.output
  params = checkpoints.load(out).params
  expected = arrays_of(0) | (BUFFERS if first == 'with' else {})
  jax.tree.map(lambda *_: None, params, nested(expected))  # The same leaves.
  if first == 'with':
    assert params['bn']['num_batches_tracked'] == 7
  np.testing.assert_allclose(
      params['head']['bias'],
      mean([arrays_of(0), arrays_of(1)], 'head.bias'),
      rtol=1e-6,
      atol=1e-6,
  )


def test_buffers_with_a_template():
  written('a', arrays_of(0) | BUFFERS)
  written('b', arrays_of(1))
  abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
      nested(arrays_of(0) | BUFFERS),
  )
  params = jaxsoup.uniform(checkpoints.Ingredients([*'ab'], abstract)).params
  assert params['bn']['num_batches_tracked'] == 7
  result = soup('uniform', *'ab', '--shard', '--out', 'out')
  assert result.exit_code == 0, result.output
  assert read('out').keys() == arrays_of(0).keys() | BUFFERS.keys()


def test_buffers_that_all_have_must_still_be_equal():
  written('a', BUFFERS | arrays_of(0))
  written(
      'b', {**BUFFERS, 'text.position_ids': np.ones((1, 4), int)} | arrays_of(1)
  )
  result = soup('uniform', 'a', 'b', '--out', 'out')
  assert result.exit_code == 1
  assert "--ignore 'text/position_ids'" in result.stderr
  assert 'nnx' not in result.stderr
  result = soup('uniform', 'a', 'b', '--out', 'out', '--ignore', 'text/pos*')
  assert result.exit_code == 0, result.stderr
  assert read('out')['text.position_ids'].tolist() == [[0, 1, 2, 3]]


@pytest.fixture
def heads():
  """A head of another shape, one that is missing, and another one."""
  arrays = [arrays_of(k) for k in range(4)]
  arrays[1]['head.bias'] = draw(0, 3)
  del arrays[2]['head.bias']
  arrays[3]['head.weight'] = draw(0, 3)
  for name, x in zip('abcd', arrays):
    written(name, x)
  return arrays


@pytest.mark.parametrize(
    'recipe', ['uniform', 'average', 'greedy', 'model-stock']
)
@pytest.mark.parametrize('out', ['out', 'orbax'])
def test_what_is_ignored_is_that_of_the_first(heads, recipe, out):
  pathlib.Path('mine.py').write_text('def score(params):\n  return 0.0\n')
  options = {
      'average': ('--alpha', '0,0.5,0.25,0.25'),
      'greedy': ('--eval', 'mine:score'),
      'model-stock': ('--init', 'd'),
  }
  runs = ['a', 'b', 'c', 'd' if out == 'out' else 'd/model.safetensors']
  if recipe == 'model-stock':
    runs = runs[:3]
  result = soup(
      recipe,
      *runs,
      *options.get(recipe, ()),
      '--ignore',
      'head.*',
      '--out',
      out,
  )
  assert result.exit_code == 0, result.output
  made = checkpoints.load(out)
  np.testing.assert_allclose(
      made.params['head']['bias'], heads[0]['head.bias'], rtol=1e-6
  )
  assert [*made.params['head']] == ['bias']
  if recipe != 'model-stock':
    expected = sum(
        a * x['body.weight'].astype(np.float64)
        for a, x in zip(made.alpha, heads)
    )
    np.testing.assert_allclose(
        made.params['body']['weight'], expected, rtol=1e-5, atol=1e-6
    )
  if out == 'out' and recipe in ('uniform', 'average'):
    np.testing.assert_array_equal(read(out)['head.bias'], heads[0]['head.bias'])


def test_ignored_with_a_template_and_pieces(heads):
  abstract = {
      'body': {'weight': jax.ShapeDtypeStruct((40, 8), np.float32)},
      'head': {'bias': jax.ShapeDtypeStruct((5,), np.float32)},
  }
  ingredients = checkpoints.Ingredients([*'abc'], abstract, ignore=['head*'])
  for k in range(3):
    np.testing.assert_array_equal(
        ingredients[k]['head']['bias'], heads[0]['head.bias']
    )
    assert ingredients.stored(k)['head', 'bias'].shape == (5,)
  params = jaxsoup.uniform(ingredients).params
  np.testing.assert_allclose(
      params['body']['weight'], mean(heads[:3], 'body.weight'), atol=1e-6
  )


def test_what_is_not_ignored_still_has_to_match(heads):
  result = soup('uniform', *'abcd', '--out', 'out')
  assert result.exit_code == 1 and '--ignore PATTERN' in result.stderr
  del heads[2]['body.weight']
  written('e', heads[2])
  result = soup('uniform', *'ae', '--ignore', 'head*', '--out', 'out')
  assert result.exit_code == 1 and "'body/weight' is missing" in result.stderr
  with pytest.raises(ValueError, match="'body/weight' is missing"):
    ingredients = checkpoints.Ingredients([*'ae'], ignore=['head*'])
    jaxsoup.greedy(ingredients, lambda p: 0.0)
  result = soup('uniform', *'ac', '--ignore', 'heads*', '--out', 'out')
  assert result.exit_code == 1
  assert "No leaf has a name like 'heads*'" in result.stderr


def test_what_only_others_have_is_seen_when_they_are_sharded(heads):
  result = soup('uniform', *'ad', '--shard', '--out', 'out.safetensors')
  assert (
      result.exit_code == 1 and "'head/weight' is unexpected" in result.stderr
  )
  options = ('--shard', '--ignore', 'head*', '--dtype', 'bfloat16')
  result = soup('uniform', *'acd', *options, '--out', 'out')
  assert result.exit_code == 0, result.output
  expected = mean([heads[0], heads[2], heads[3]], 'body.weight')
  actual = read('out')['body.weight']
  assert actual.dtype == jnp.bfloat16
  np.testing.assert_allclose(
      actual.astype(float), expected, rtol=1e-2, atol=1e-6
  )


@pytest.mark.filterwarnings('default:.*leaves that not all')
@pytest.mark.parametrize('recipe', ['uniform', 'greedy'])
def test_only_what_all_have(heads, recipe):
  pathlib.Path('mine.py').write_text('def score(params):\n  return 0.0\n')
  options = ('--eval', 'mine:score') if recipe == 'greedy' else ()
  result = soup(recipe, *'acd', *options, '--intersect', '--out', 'out')
  assert result.exit_code == 0, result.output
  assert result.stderr == (
      'Warning: 2 leaves that not all ingredients have are left out: '
      'head/bias; head/weight\n'
  )
  stored = read('out')
  assert stored.keys() == {'body.weight', 'codes'}
  np.testing.assert_allclose(
      stored['body.weight'],
      mean([heads[0], heads[2], heads[3]], 'body.weight'),
      rtol=1e-5,
      atol=1e-6,
  )
  # One of another shape is no leaf that only some have.
  assert soup('uniform', *'ab', '--intersect', '--out', 'x').exit_code == 1


def test_nothing_in_common():
  written('a', {'v': draw(0, 1)})
  written('b', {'w': draw(0, 1)})
  result = soup('uniform', *'ab', '--intersect', '--out', 'x')
  assert result.exit_code == 1 and 'There is nothing that all' in result.stderr
