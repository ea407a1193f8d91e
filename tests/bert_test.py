"""BERT and sentence embeddings: NumPy, transformers, and real weights."""

import json
import math
import os
import warnings

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxsoup import checkpoints
from jaxsoup.models import _names
from jaxsoup.models import bert

pytestmark = [
    pytest.mark.filterwarnings('ignore::DeprecationWarning'),
    pytest.mark.filterwarnings('ignore::FutureWarning'),
]
SMALL = dict(
    vocab_size=11, width=12, depth=2, num_heads=3, mlp_width=20, num_positions=9
)
IDS = np.array([[1, 5, 7, 2, 0, 0], [1, 3, 4, 10, 9, 2], [1, 2, 0, 0, 0, 0]])
MASK = (IDS > 0).astype(np.int32)
TYPES = np.array([[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]])


def params_of(model):
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def moved(params, scale=0.2, seed=0):
  """Biases and scales start as constants: move them."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: np.asarray(x + scale * rng.normal(size=x.shape), np.float32),
      params,
  )


def make(num_classes=3, **kwargs):
  model = bert.Bert(num_classes, rngs=nnx.Rngs(0), **SMALL | kwargs)
  return nnx.graphdef(model), moved(params_of(model))


def stack(params, depth):
  """The parameters of the model that scans over its blocks."""
  blocks = [params[f'block_{i}'] for i in range(depth)]
  others = {n: x for n, x in params.items() if not n.startswith('block_')}
  return {**others, 'blocks': jax.tree.map(lambda *x: np.stack(x), *blocks)}


def assert_equal(first, second):
  assert jax.tree.structure(first) == jax.tree.structure(second)
  jax.tree.map(np.testing.assert_array_equal, first, second)


# --- Against NumPy ------------------------------------------------------------


def norm(p, x):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-12)
  return x * p['scale'] + p['bias']


def linear(p, x):
  return x @ p['kernel'] + p['bias']


def attention(p, x, mask):
  q, k, v = (
      np.einsum('btd,dhe->bhte', x, p[n]['kernel']) + p[n]['bias'][:, None]
      for n in ('query', 'key', 'value')
  )
  scores = np.einsum('bhte,bhse->bhts', q, k) / np.sqrt(q.shape[-1])
  scores = np.exp(scores - scores.max(-1, keepdims=True))
  scores = scores * mask[:, None, None, :]
  out = scores / scores.sum(-1, keepdims=True) @ v
  return np.einsum('bhte,hed->btd', out, p['out']['kernel']) + p['out']['bias']


def gelu(x):
  return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def bert_by_hand(params, ids, mask, types):
  """Tokens and logits of the same network in float64 NumPy."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  x = p['word']['embedding'][ids] + p['token_type']['embedding'][types]
  x = norm(p['norm'], x + p['position'][: ids.shape[1]])
  for i in range(SMALL['depth']):
    b = p[f'block_{i}']
    x = norm(b['norm_attention'], x + attention(b['attention'], x, mask))
    hidden = gelu(linear(b['mlp']['dense_in'], x))
    x = norm(b['norm_mlp'], x + linear(b['mlp']['dense_out'], hidden))
  return x, linear(p['head'], np.tanh(linear(p['pooler'], x[:, 0])))


def test_equals_numpy():
  graphdef, params = make()
  model = nnx.merge(graphdef, params)
  tokens, logits = bert_by_hand(params, IDS, MASK, TYPES)
  inputs = IDS, MASK, TYPES
  np.testing.assert_allclose(model.tokens(*inputs), tokens, atol=1e-5)
  np.testing.assert_allclose(model(*inputs), logits, atol=1e-5)
  without = bert_by_hand(params, IDS, np.ones_like(IDS), np.zeros_like(IDS))
  np.testing.assert_allclose(model(IDS), without[1], atol=1e-5)


def test_padding_changes_nothing_and_batches_do_not_mix():
  graphdef, params = make()
  model = nnx.merge(graphdef, params)
  expected = model(IDS, MASK)
  garbage = np.where(MASK, IDS, 8)
  np.testing.assert_allclose(model(garbage, MASK), expected, atol=1e-6)
  assert np.abs(model(garbage) - model(IDS)).max() > 1e-3
  for row, logits in enumerate(expected):
    ids = IDS[row : row + 1, : MASK[row].sum()]
    np.testing.assert_allclose(model(ids)[0], logits, atol=1e-5)


def test_without_head_and_pooler_the_first_token():
  graphdef, params = make(num_classes=0, has_pooler=False)
  assert 'head' not in params and 'pooler' not in params
  model = nnx.merge(graphdef, params)
  expected = model.tokens(IDS, MASK)[:, 0]
  np.testing.assert_array_equal(model(IDS, MASK), expected)


def test_mean_pooled():
  tokens = np.random.default_rng(0).normal(size=(3, 6, 4)).astype(np.float32)
  expected = [x[m > 0].mean(0) for x, m in zip(tokens, MASK)]
  pooled = bert.mean_pooled(tokens, MASK)
  np.testing.assert_allclose(pooled, expected, rtol=1e-5)
  np.testing.assert_allclose(
      bert.mean_pooled(tokens), tokens.mean(1), rtol=1e-4, atol=1e-6
  )
  unit = bert.mean_pooled(tokens, MASK, is_normalized=True)
  np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), 1, rtol=1e-6)
  empty = bert.mean_pooled(tokens, np.zeros_like(MASK), is_normalized=True)
  np.testing.assert_array_equal(empty, 0)


@pytest.mark.parametrize('is_rematerialized', [False, True])
def test_a_scan_over_the_blocks_is_the_loop(is_rematerialized):
  graphdef, params = make()
  scanned, _ = make(is_scanned=True, is_rematerialized=is_rematerialized)

  def loss_of(graphdef):
    return jax.jit(
        jax.value_and_grad(
            lambda p: jnp.square(nnx.merge(graphdef, p)(IDS, MASK)).sum()
        )
    )

  expected, gradient = loss_of(graphdef)(params)
  actual, stacked_gradient = loss_of(scanned)(stack(params, 2))
  np.testing.assert_allclose(actual, expected, rtol=1e-5)
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
      stacked_gradient,
      stack(gradient, 2),
  )


def test_bfloat16_computes_near_float32_on_float32_parameters():
  graphdef, params = make()
  narrow, narrow_params = make(dtype='bfloat16')
  assert {x.dtype for x in jax.tree.leaves(narrow_params)} == {np.dtype('f4')}
  logits = nnx.merge(narrow, params)(IDS, MASK)
  assert logits.dtype == jnp.float32
  expected = nnx.merge(graphdef, params)(IDS, MASK)
  error = np.abs(logits - expected).max()
  assert 1e-6 < error < 0.05 * np.abs(expected).max()


def test_what_does_not_fit():
  with pytest.raises(ValueError, match='num_heads 5 does not divide width 12'):
    make(num_heads=5)
  graphdef, params = make()
  with pytest.raises(ValueError, match='has 10 tokens a text, the model 9'):
    nnx.merge(graphdef, params)(np.ones((1, 10), np.int32))
  shapes = jax.eval_shape(lambda: file_of(*make(num_classes=3)))
  for name, value in (
      ('hidden_act', 'relu'),
      ('position_embedding_type', 'relative_key'),
      ('is_decoder', True),
  ):
    with pytest.raises(ValueError, match=f'config.json has {name} {value!r}'):
      bert.arguments('hf', shapes, {name: value})
  headless = {n: x for n, x in shapes.items() if 'pooler' not in n}
  with pytest.raises(ValueError, match='head classifies tokens'):
    bert.arguments('hf', headless, {})


# --- Files --------------------------------------------------------------------


def file_of(graphdef, params):
  del graphdef
  depth = sum(name.startswith('block_') for name in params)
  table = bert.hf_table(
      num_classes=params['head']['bias'].size if 'head' in params else 0,
      depth=depth,
      has_pooler='pooler' in params,
  )
  return dict(_names.write(params, table))


def load(folder, **overrides):
  """What a loader does: arguments, graphdef, parameters and table."""
  arrays = checkpoints.Arrays(folder / 'model.safetensors')
  config = folder / 'config.json'
  config = json.loads(config.read_text()) if config.exists() else {}
  arguments = bert.arguments('hf', arrays.shapes, config)
  model = nnx.eval_shape(
      lambda: bert.Bert(**arguments | overrides, rngs=nnx.Rngs(0))
  )
  table = bert.TABLES['hf'](**arguments)
  return nnx.graphdef(model), _names.read(arrays, params_of(model), table), table


@pytest.mark.parametrize('num_classes', [0, 3])
@pytest.mark.parametrize('has_pooler', [True, False])
def test_files_in_every_spelling(tmp_path, num_classes, has_pooler):
  has_pooler = has_pooler or num_classes > 0
  graphdef, params = make(num_classes, width=64, has_pooler=has_pooler)
  file = file_of(graphdef, params)
  spellings = [
      file,
      {n.removeprefix('bert.'): x for n, x in file.items()},
      {
          'bert.' * (not n.startswith(('bert.', 'classifier.'))) + n: x
          for n, x in file.items()
      },
      {
          n.replace('Norm.weight', 'Norm.gamma').replace('Norm.bias', 'Norm.beta'): x
          for n, x in file.items()
      }
      | {'cls.predictions.bias': np.zeros(11, 'f4')},
  ]
  for i, spelling in enumerate(spellings):
    folder = tmp_path / str(i)
    folder.mkdir()
    safetensors.numpy.save_file(spelling, folder / 'model.safetensors')
    if i == 0:
      (folder / 'config.json').write_text('{"num_attention_heads": 3}')
    _, read, _ = load(folder) if i else (None, None, None)
    if read is not None:
      assert_equal(read, params)


# --- Against transformers -----------------------------------------------------
