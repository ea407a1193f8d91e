"""T5, labels as TEXTS, and greedy decoding: NumPy and transformers."""

import json

import _weights
from flax import nnx
import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxsoup import checkpoints
from jaxsoup.models import _names
from jaxsoup.models import t5

SMALL = dict(
    vocab_size=11,
    width=12,
    depth=1,
    decoder_depth=2,
    num_heads=3,
    head_width=5,
    mlp_width=20,
    num_buckets=4,
    max_distance=5,
)
IDS = np.array([[3, 5, 7, 2, 1, 0], [4, 3, 4, 10, 9, 1], [2, 1, 0, 0, 0, 0]])
MASK = (IDS > 0).astype(np.int32)
LABELS = np.array([[5, 1, 0, 0], [6, 7, 8, 1], [5, 6, 1, 0]])
TEXTS = np.array([[0, 5, 1, 0], [0, 6, 7, 8], [0, 5, 6, 1]])
V1_1 = dict(is_gated=True, is_tied=False)
KINDS = pytest.mark.parametrize('kind', [{}, V1_1], ids=['v1.0', 'v1.1'])


def params_of(model):
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def moved(params, scale, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: np.asarray(x + scale * rng.normal(size=x.shape), np.float32),
      params,
  )


def make(**kwargs):
  model = nnx.eval_shape(lambda: t5.T5(rngs=nnx.Rngs(0), **SMALL | kwargs))
  zeros = jax.tree.map(lambda x: np.zeros(x.shape), params_of(model))
  return nnx.graphdef(model), moved(zeros, scale=0.5)


def logits_of(graphdef, params, *inputs):
  model_fn = lambda params, *inputs: nnx.merge(graphdef, params)(*inputs)
  return np.asarray(jax.jit(model_fn)(params, *inputs))


def stack(params):
  """The parameters of the model that scans over its blocks."""

  def stacked(tower):
    depth = sum(name.startswith('block_') for name in tower)
    blocks = [tower[f'block_{i}'] for i in range(depth)]
    others = {n: x for n, x in tower.items() if not n.startswith('block_')}
    return {
        **others,
        'blocks': jax.tree.map(lambda *x: np.stack(x), *blocks),
    }

  towers = {n: stacked(params[n]) for n in ('encoder', 'decoder')}
  return {**params, **towers}


def assert_equal(first, second):
  assert jax.tree.structure(first) == jax.tree.structure(second)
  jax.tree.map(np.testing.assert_array_equal, first, second)


# --- Against NumPy ------------------------------------------------------------


def norm(p, x):
  x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
  return x * p['scale']


def attention(p, x, context, bias, mask):
  q, k, v = (
      np.einsum('btd,dhe->bhte', y, p[n]['kernel'])
      for n, y in (('query', x), ('key', context), ('value', context))
  )
  scores = np.einsum('bhte,bhse->bhts', q, k) + bias
  scores = np.exp(scores - scores.max(-1, keepdims=True)) * mask
  out = scores / scores.sum(-1, keepdims=True) @ v
  return np.einsum('bhte,hed->btd', out, p['out']['kernel'])


def mlp(p, x):
  hidden = x @ p['dense_in']['kernel']
  if 'dense_gate' not in p:
    return np.maximum(hidden, 0) @ p['dense_out']['kernel']
  x = x @ p['dense_gate']['kernel']
  gate = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
  return (0.5 * x * (1 + gate) * hidden) @ p['dense_out']['kernel']


def tower(p, x, is_decoder, mask, encoded=None, encoded_mask=None):
  length = x.shape[1]
  bias = np.zeros((length, length, SMALL['num_heads']))
  for i in range(length):
    for j in range(length):
      # Four buckets up to a distance of five, written out.
      if is_decoder:
        bucket = [0, 1, 2, 2, 3, 3][max(i - j, 0)]
      else:
        bucket = 2 * (j > i) + min(abs(i - j), 1)
      bias[i, j] = p['distance'][bucket]
  bias = bias.transpose(2, 0, 1)
  for i in range(sum(name.startswith('block_') for name in p)):
    b = p[f'block_{i}']
    y = norm(b['norm_attention'], x)
    x = x + attention(b['attention'], y, y, bias, mask)
    if is_decoder:
      y = norm(b['norm_cross'], x)
      x = x + attention(b['cross'], y, encoded, 0, encoded_mask)
    x = x + mlp(b['mlp'], norm(b['norm_mlp'], x))
  return norm(p['norm'], x)


def t5_by_hand(params, ids, mask, texts):
  """Logits of the same network in float64 NumPy."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  embedding, mask = p['embed']['embedding'], mask[:, None, None]
  encoded = tower(p['encoder'], embedding[ids], False, mask)
  causal = np.tril(np.ones((texts.shape[1],) * 2))
  x = tower(p['decoder'], embedding[texts], True, causal, encoded, mask)
  if 'head' in p:
    return x @ p['head']['kernel']
  return x @ embedding.T / np.sqrt(SMALL['width'])


@pytest.mark.slow_variants
@KINDS
def test_equals_numpy(kind):
  graphdef, params = make(**kind)
  np.testing.assert_allclose(
      logits_of(graphdef, params, IDS, TEXTS, MASK),
      t5_by_hand(params, IDS, MASK, TEXTS),
      atol=2e-5,
  )
  np.testing.assert_allclose(
      logits_of(graphdef, params, IDS, TEXTS),
      t5_by_hand(params, IDS, np.ones_like(MASK), TEXTS),
      atol=2e-5,
  )


@pytest.mark.slow
def test_padding_changes_nothing_and_batches_do_not_mix():
  graphdef, params = make()
  expected = logits_of(graphdef, params, IDS, TEXTS, MASK)
  garbage = np.where(MASK, IDS, 8)
  np.testing.assert_allclose(
      logits_of(graphdef, params, garbage, TEXTS, MASK), expected, atol=1e-5
  )
  for row, logits in enumerate(expected):
    ids = IDS[row : row + 1, : MASK[row].sum()]
    alone = logits_of(graphdef, params, ids, TEXTS[row : row + 1])
    np.testing.assert_allclose(alone[0], logits, atol=1e-5)


def test_the_decoder_does_not_see_what_follows():
  graphdef, params = make()
  expected = logits_of(graphdef, params, IDS, TEXTS, MASK)
  texts = np.where(np.arange(4) < 2, TEXTS, 9)
  other = logits_of(graphdef, params, IDS, texts, MASK)
  np.testing.assert_allclose(other[:, :2], expected[:, :2], atol=1e-5)
  assert np.abs(other[:, 2:] - expected[:, 2:]).max() > 1e-2


@pytest.mark.slow
def test_a_scan_over_the_blocks_is_the_loop():
  graphdef, params = make()
  scanned, _ = make(is_scanned=True, is_rematerialized=True)
  loss_fn = lambda model: model(IDS, TEXTS, MASK).std()
  _weights.check_scan(graphdef, scanned, params, stack, loss_fn, atol=1e-5)


@pytest.mark.slow
def test_sharded_over_a_mesh_the_logits_are_the_same():
  graphdef, params = make()
  on_mesh, _ = make(batch_axis='fsdp', is_scanned=True)
  inputs = IDS, TEXTS, MASK
  _weights.check_sharded(graphdef, params, on_mesh, stack(params), inputs)


@pytest.mark.slow
def test_bfloat16_computes_near_float32_on_float32_parameters():
  graphdef, params = make(**V1_1)
  narrow, narrow_params = make(dtype='bfloat16', **V1_1)
  assert {x.dtype for x in jax.tree.leaves(narrow_params)} == {np.dtype('f4')}
  logits = logits_of(narrow, params, IDS, TEXTS, MASK)
  assert logits.dtype == np.float32
  expected = logits_of(graphdef, params, IDS, TEXTS, MASK)
  error = np.abs(logits - expected).max()
  assert 1e-6 < error < 0.1 * np.abs(expected).max()


# --- Labels and texts ---------------------------------------------------------


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_the_decoder_is_given_the_text_one_later():
  np.testing.assert_array_equal(t5.shift_right(LABELS), TEXTS)


def test_scores_of_labels_by_hand():
  graphdef, params = make()
  score_fn = lambda p, ids, mask: t5.score_labels(
      nnx.merge(graphdef, p), ids, mask, LABELS
  )
  scores = jax.jit(score_fn)(params, IDS, MASK)
  assert scores.shape == (3, 3)
  for c, label in enumerate(LABELS):
    text = label[label > 0]
    inputs = np.tile([0, *text[:-1]], (len(IDS), 1))
    log_probs = log_softmax(t5_by_hand(params, IDS, MASK, inputs))
    expected = log_probs[:, np.arange(len(text)), text].sum(-1)
    np.testing.assert_allclose(scores[:, c], expected, atol=5e-5)


@pytest.mark.slow
def test_probabilities_of_all_texts_of_two_tokens_sum_to_one():
  graphdef, params = make()
  texts = np.stack(np.meshgrid(*[np.arange(11)] * 2), -1).reshape(-1, 2)
  scores = t5.score_labels(
      nnx.merge(graphdef, params), IDS, MASK, texts, pad_id=-1
  )
  np.testing.assert_allclose(np.exp(scores).sum(1), 1, rtol=1e-4)


def test_greedy_decoding_by_hand():
  graphdef, params = make()
  text = np.zeros((3, 5), int)
  for i in range(5):
    inputs = np.concatenate([np.zeros((3, 1), int), text[:, :i]], 1)
    logits = t5_by_hand(params, IDS, MASK, inputs)[:, -1]
    text[:, i] = logits.argmax(-1)
  # Whatever the second text says second ends texts.
  end_id = int(text[1, 1])
  is_over = np.cumsum(text == end_id, 1) - (text == end_id)
  expected = np.where(is_over, 10, text)
  assert is_over.any() and not is_over.all()

  def decode_fn(params):
    return t5.greedy_decode(
        nnx.merge(graphdef, params),
        IDS,
        MASK,
        num_tokens=5,
        end_id=end_id,
        pad_id=10,
    )

  np.testing.assert_array_equal(jax.jit(decode_fn)(params), expected)


# --- Files --------------------------------------------------------------------


def save(folder, file, config=None):
  folder.mkdir(exist_ok=True)
  safetensors.numpy.save_file(file, folder / 'model.safetensors')
  if config is not None:
    (folder / 'config.json').write_text(json.dumps(config))


def load(folder, **overrides):
  """What a loader does: the model's graphdef, parameters, and the table."""
  arrays = checkpoints.Arrays(folder / 'model.safetensors')
  config = folder / 'config.json'
  config = json.loads(config.read_text()) if config.exists() else {}
  arguments = t5.arguments('hf', arrays.shapes, config) | overrides
  model = nnx.eval_shape(lambda: t5.T5(**arguments, rngs=nnx.Rngs(0)))
  table = t5.TABLES['hf'](**arguments)
  params = _names.read(arrays, params_of(model), table)
  return nnx.graphdef(model), params, table


def file_of(params, **arguments):
  table = t5.hf_table(depth=1, decoder_depth=2, **arguments)
  return dict(_names.write(params, table))


@KINDS
def test_files_without_a_config(kind, tmp_path):
  _, params = make(**kind)
  save(tmp_path, file_of(params, **kind))
  assert_equal(load(tmp_path)[1], params)
  arguments = t5.arguments('hf', file_of(params, **kind), {})
  v1_0 = dict(is_gated=False, is_tied=True, has_scaled_logits=True)
  v1_1 = dict(is_gated=True, is_tied=False, has_scaled_logits=False)
  assert arguments == {
      **SMALL,
      **(v1_1 if kind else v1_0),
      'max_distance': 128,
      'epsilon': 1e-6,
  }


def test_copies_of_the_embedding_are_ignored(tmp_path):
  _, params = make()
  file = file_of(params)
  bias = 'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias'
  for name in ('encoder.embed_tokens', 'decoder.embed_tokens', 'lm_head'):
    file[f'{name}.weight'] = file['shared.weight'].copy()
  save(tmp_path, file | {f'{bias}.weight': np.zeros((4, 3), np.float32)})
  assert_equal(load(tmp_path)[1], params)


@pytest.mark.parametrize(
    'config, has_head, is_tied, is_scaled',
    [
        ({'tie_word_embeddings': True}, False, True, True),
        ({'tie_word_embeddings': True}, True, True, True),
        ({'tie_word_embeddings': False}, True, False, False),
        # As release 5 of transformers writes them.
        (
            {'tie_word_embeddings': True, 'scale_decoder_outputs': False},
            True,
            False,
            False,
        ),
        (
            {'tie_word_embeddings': True, 'scale_decoder_outputs': False},
            False,
            True,
            False,
        ),
    ],
)
def test_ties_of_configs(config, has_head, is_tied, is_scaled):
  file = file_of(make(is_tied=not has_head)[1], is_tied=not has_head)
  arguments = t5.arguments('hf', file, config)
  assert arguments['is_tied'] == is_tied
  assert arguments['has_scaled_logits'] == is_scaled


def test_a_file_of_another_kind():
  file = file_of(make()[1])
  with pytest.raises(ValueError, match="'gated-silu', but .* only 'relu'"):
    t5.arguments('hf', file, {'feed_forward_proj': 'gated-silu'})
  encoder = {n: x for n, x in file.items() if not n.startswith('decoder.')}
  with pytest.raises(ValueError, match="'decoder.final_.* is missing"):
    t5.arguments('hf', encoder, {})


# --- Against transformers -----------------------------------------------------

TINY = dict(
    vocab_size=11,
    d_model=12,
    d_kv=5,
    d_ff=20,
    num_layers=1,
    num_decoder_layers=2,
    num_heads=3,
    relative_attention_num_buckets=4,
    relative_attention_max_distance=5,
)
REAL = dict(vocab_size=11, num_layers=2)
THEIR_V1_1 = dict(feed_forward_proj='gated-gelu', tie_word_embeddings=False)
THEIR_KINDS = pytest.mark.parametrize(
    'kind', [{}, THEIR_V1_1], ids=['v1.0', 'v1.1']
)


def reference(scale, **config):
  """A model of transformers, nothing of which is as it was initialized."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  config = transformers.T5Config(decoder_start_token_id=0, **config)
  model = transformers.T5ForConditionalGeneration(config).eval()
  if not config.scale_decoder_outputs:
    # Release 5 ties whatever the config says; files of 1.1 are not tied.
    size = model.shared.weight.shape
    head = torch.randn(size) * size[1] ** -0.5
    model.lm_head.weight = torch.nn.Parameter(head)
  with torch.no_grad():
    for param in model.parameters():
      param.add_(scale * torch.randn_like(param))
  return model


def their_logits(model, ids, mask, labels):
  torch = pytest.importorskip('torch')
  ids, mask, labels = map(torch.tensor, (ids, mask, labels))
  with torch.no_grad():
    out = model(input_ids=ids, attention_mask=mask, decoder_input_ids=labels)
  return out.logits.numpy()


@pytest.mark.reference
@pytest.mark.parametrize('size', [TINY, REAL], ids=['tiny', 'real'])
@THEIR_KINDS
def test_equals_transformers(kind, size, tmp_path):
  scale = 0.1 if size is TINY else 0.01
  theirs = reference(scale, **size, **kind)
  theirs.save_pretrained(tmp_path / 'theirs')
  graphdef, params, table = load(tmp_path / 'theirs')
  expected = their_logits(theirs, IDS, MASK, TEXTS)
  assert np.abs(expected).max() > 0.1
  np.testing.assert_allclose(
      logits_of(graphdef, params, IDS, TEXTS, MASK),
      expected,
      rtol=0,
      atol=1e-5,
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
      their_logits(again.eval(), IDS, MASK, TEXTS),
      logits_of(graphdef, params, IDS, TEXTS, MASK),
      rtol=0,
      atol=1e-5,
  )


@pytest.mark.reference
@THEIR_KINDS
def test_the_round_trip_of_a_file_is_exact(kind, tmp_path):
  reference(0.1, **TINY, **kind).save_pretrained(tmp_path)
  _, params, table = load(tmp_path)
  file = safetensors.numpy.load_file(tmp_path / 'model.safetensors')
  assert_equal(dict(_names.write(params, table)), file)
  _, scanned, _ = load(tmp_path, is_scanned=True)
  assert_equal(scanned, stack(params))
  assert_equal(dict(_names.write(scanned, table)), file)


@pytest.mark.reference
def test_texts_and_scores_are_those_of_transformers(tmp_path):
  torch = pytest.importorskip('torch')
  theirs = reference(0.1, **TINY)
  theirs.save_pretrained(tmp_path)
  graphdef, params, _ = load(tmp_path)
  model = nnx.merge(graphdef, params)
  ids, mask = torch.tensor(IDS), torch.tensor(MASK)
  expected = theirs.generate(
      ids,
      attention_mask=mask,
      max_new_tokens=6,
      do_sample=False,
      # Its cache has as many layers as the encoder, the decoder more.
      use_cache=False,
  )[:, 1:].numpy()
  text = t5.greedy_decode(model, IDS, MASK, num_tokens=6)
  expected = np.pad(expected, ((0, 0), (0, 6 - expected.shape[1])))
  np.testing.assert_array_equal(text, expected)

  scores = t5.score_labels(model, IDS, MASK, LABELS)
  for c, label in enumerate(LABELS):
    target = torch.tensor(np.where(label, label, -100))[None]
    for b in range(len(IDS)):
      with torch.no_grad():
        inputs = dict(input_ids=ids[b : b + 1], labels=target)
        loss = theirs(**inputs, attention_mask=mask[b : b + 1]).loss
      mean = -scores[b, c] / (label > 0).sum()
      np.testing.assert_allclose(mean, loss.item(), atol=1e-5)


@pytest.mark.reference
@pytest.mark.parametrize('is_bidirectional', [False, True])
@pytest.mark.parametrize('bounds', [(32, 128), (8, 20), (4, 5), (64, 256)])
def test_buckets_are_those_of_transformers(is_bidirectional, bounds):
  torch = pytest.importorskip('torch')
  modeling = pytest.importorskip('transformers.models.t5.modeling_t5')
  num_buckets, max_distance = bounds
  offset = torch.arange(300)[None] - torch.arange(300)[:, None]
  expected = modeling.T5Attention._relative_position_bucket(
      offset, is_bidirectional, num_buckets, max_distance
  )
  buckets = t5.distance_buckets(
      300,
      is_bidirectional=is_bidirectional,
      num_buckets=num_buckets,
      max_distance=max_distance,
  )
  np.testing.assert_array_equal(buckets, expected.numpy())
