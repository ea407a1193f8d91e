"""T5 in Flax nnx: text to text, and classification as text.

```
model = t5.T5(vocab_size=100, rngs=nnx.Rngs(0))
logits = model(input_ids, t5.shift_right(label_ids), attention_mask)
scores = t5.score_labels(model, input_ids, attention_mask, label_ids)
texts = t5.greedy_decode(model, input_ids, attention_mask, num_tokens=8)
```
"""

from collections.abc import Callable
from collections.abc import Mapping
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup.models import _names
from jaxsoup.models import _torch
from jaxsoup.models import _transformer
from jaxsoup.typing import Config
from jaxsoup.typing import DType
from jaxsoup.typing import Json
from jaxsoup.typing import ShapeDtype


class _Attention(nnx.Module):
  """Attention without biases, whose scores are not scaled by 1 / sqrt(d).

  softmax(Q K^T + bias) V W_out
  """

  def __init__(
      self,
      width: int,
      num_heads: int,
      head_width: int,
      *,
      dtype: DType | None,
      rngs: nnx.Rngs,
  ):
    heads = num_heads, head_width
    general = functools.partial(
        nnx.LinearGeneral, use_bias=False, dtype=dtype, rngs=rngs
    )
    # The scale that other models give to the scores is in the queries here.
    scales = (width * head_width) ** -0.5, width**-0.5, width**-0.5
    self.query, self.key, self.value = (
        general(width, heads, kernel_init=nnx.initializers.normal(scale))
        for scale in scales
    )
    self.out = general(heads, width, axis=(-2, -1))

  def __call__(
      self,
      x: jax.Array,
      context: jax.Array,
      bias: jax.Array | None = None,
      mask: jax.Array | None = None,
  ) -> jax.Array:
    """Tokens [B, T, width] that ask those of a context, [B, S, width].

    The bias is [1, H, T, S]; mask [B or 1, 1, T or 1, S], True is seen.
    """
    x = jax.nn.dot_product_attention(
        self.query(x),
        self.key(context),
        self.value(context),
        bias,
        mask,
        scale=1.0,
    )
    return self.out(x)


class _Block(nnx.Module):
  """One pre-LN block of either tower; the norms are RMSNorms.

  x += Attention(N(x), N(x)),  x += Attention(N(x), encoded),  x += MLP(N(x))
  """

  def __init__(
      self,
      width: int,
      mlp_width: int,
      num_heads: int,
      head_width: int,
      *,
      is_decoder: bool,
      is_gated: bool,
      epsilon: float,
      dtype: DType | None,
      rngs: nnx.Rngs,
  ):
    norm = lambda: nnx.RMSNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)
    attention = lambda: _Attention(
        width, num_heads, head_width, dtype=dtype, rngs=rngs
    )
    self.norm_attention, self.attention = norm(), attention()
    if is_decoder:
      self.norm_cross, self.cross = norm(), attention()
    self.norm_mlp = norm()
    self.mlp = _transformer.Mlp(
        width,
        mlp_width,
        # The GELU is its approximation by tanh.
        activation=nnx.gelu if is_gated else _transformer.relu,
        is_gated=is_gated,
        use_bias=False,
        dtype=dtype,
        rngs=rngs,
    )

  def __call__(
      self,
      x: jax.Array,
      bias: jax.Array,
      mask: jax.Array | None = None,
      encoded: jax.Array | None = None,
      encoded_mask: jax.Array | None = None,
  ) -> jax.Array:
    """Returns tokens, [B, T, width]; `encoded` is [B, S, width]."""
    y = self.norm_attention(x)
    x = x + self.attention(y, y, bias, mask)
    if encoded is not None:
      y = self.norm_cross(x)
      x = x + self.cross(y, encoded, mask=encoded_mask)
    return x + self.mlp(self.norm_mlp(x))


class _Tower(_transformer.Stack):
  """The encoder or the decoder: blocks that share a bias by distance.

  Tokens of a decoder see only those before them, and what the encoder returned.
  """

  def __init__(
      self,
      width: int,
      depth: int,
      num_heads: int,
      *,
      is_decoder: bool,
      num_buckets: int,
      max_distance: int,
      make_block: Callable[..., nnx.Module],
      make_norm: Callable[..., nnx.Module],
      stack: Config,
      rngs: nnx.Rngs,
  ):
    self.is_decoder, self.max_distance = is_decoder, max_distance
    normal = nnx.initializers.normal(width**-0.5)
    self.distance = nnx.Param(normal(rngs.params(), (num_buckets, num_heads)))
    self.add_blocks(make_block, depth, rngs=rngs, **stack)
    self.norm = make_norm(rngs=rngs)

  def __call__(
      self,
      x: jax.Array,
      mask: jax.Array | None = None,
      encoded: jax.Array | None = None,
      encoded_mask: jax.Array | None = None,
  ) -> jax.Array:
    """Tokens [B, T, width] after the last block; masks are 0 for padding."""
    length = x.shape[1]
    table = self.distance[...]
    buckets = distance_buckets(
        length,
        is_bidirectional=not self.is_decoder,
        num_buckets=table.shape[0],
        max_distance=self.max_distance,
    )
    bias = table[buckets].transpose(2, 0, 1)[None]
    mask = _transformer.over_keys(mask)
    if self.is_decoder:
      causal = jnp.tril(jnp.ones((1, 1, length, length), bool))
      mask = causal if mask is None else causal & mask
    x = self.through_blocks(
        x, bias, mask, encoded, _transformer.over_keys(encoded_mask)
    )
    return self.norm(x)


def distance_buckets(
    length: int,
    *,
    is_bidirectional: bool,
    num_buckets: int = 32,
    max_distance: int = 128,
) -> np.ndarray:
  """Classes of distances between tokens: exact when near, logarithmic when far.

  With n buckets a direction, e = n / 2 and distance d:
  d < e: d,  else min(n - 1, e + floor((n - e) log(d / e) / log(D / e)))

  Args:
    length: T, number of tokens.
    is_bidirectional: whether half of the buckets are for tokens that follow;
      else these are in bucket 0.
    num_buckets: of both directions together.
    max_distance: D, from which on all distances are in the last bucket.

  Returns:
    [T, T], integers: rows are the tokens that look, columns those looked at.

  Example:
    >>> distance_buckets(
    ...     5, is_bidirectional=False, num_buckets=4, max_distance=4
    ... )
    array([[0, 0, 0, 0, 0],
           [1, 0, 0, 0, 0],
           [2, 1, 0, 0, 0],
           [3, 2, 1, 0, 0],
           [3, 3, 2, 1, 0]])

  Source: Raffel et al. 2020, section 2.1; the buckets are those of their code.
  """
  offset = np.arange(length)[None] - np.arange(length)[:, None]
  if is_bidirectional:
    num_buckets //= 2
    start, distance = num_buckets * (offset > 0), np.abs(offset)
  else:
    start, distance = np.zeros_like(offset), np.maximum(-offset, 0)
  exact = num_buckets // 2
  # In float32 as in the original: bounds between buckets depend on rounding.
  far = np.maximum(distance, exact).astype(np.float32) / np.float32(exact)
  far = np.log(far) / np.float32(np.log(max_distance / exact))
  far = exact + (far * np.float32(num_buckets - exact)).astype(int)
  near = np.where(distance < exact, distance, far)
  return start + np.minimum(near, num_buckets - 1)


class T5(nnx.Module):
  """T5, an encoder and a decoder; 1.0, and 1.1 with its descendants.

  Args:
    vocab_size: number of words.
    width: size of a token.
    depth: number of blocks of the encoder.
    decoder_depth: of the decoder; as many if not given.
    num_heads: number of attention heads.
    head_width: size of each; their sum may differ from `width`.
    mlp_width: size of the hidden layers, `4 * width` if not given.
    is_gated: whether the MLPs are gated by a GELU (1.1) or have a ReLU (1.0).
    is_tied: whether the embedding gives the logits too (1.0), or a head of its
      own does (1.1).
    has_scaled_logits: whether what gives the logits is divided by
      `sqrt(width)`; as `is_tied` if not given.
    num_buckets: number of classes of distances between tokens.
    max_distance: from which on all distances are in one class.
    epsilon: of the RMSNorms.
    dtype: see `ViT`, as all that follow.
    is_scanned: stores all blocks of a tower as one.
    is_rematerialized: keeps of each block only its input.
    batch_axis: name of the mesh axis over which batches are sharded.
    rngs: source of the initial parameters.

  Example:
    >>> def logits_fn(ids, said):
    ...   size = dict(width=8, depth=1, num_heads=2, head_width=4)
    ...   return T5(9, **size, rngs=nnx.Rngs(0))(ids, said)
    >>> ids, said = jnp.array([[5, 3, 1]]), jnp.array([[0, 7]])
    >>> jax.eval_shape(logits_fn, ids, said).shape
    (1, 2, 9)

  Source: Raffel et al., "Exploring the Limits of Transfer Learning with a
  Unified Text-to-Text Transformer", JMLR 2020, section 2.1; the gated MLP:
  Shazeer 2020, "GLU variants improve transformer".
  """

  def __init__(
      self,
      vocab_size: int = 32128,
      *,
      width: int = 512,
      depth: int = 6,
      decoder_depth: int | None = None,
      num_heads: int = 8,
      head_width: int = 64,
      mlp_width: int | None = None,
      is_gated: bool = False,
      is_tied: bool = True,
      has_scaled_logits: bool | None = None,
      num_buckets: int = 32,
      max_distance: int = 128,
      epsilon: float = 1e-6,
      dtype: str | None = None,
      is_scanned: bool = False,
      is_rematerialized: bool = False,
      batch_axis: str | None = None,
      rngs: nnx.Rngs,
  ):
    self.is_tied = is_tied
    if has_scaled_logits is None:
      has_scaled_logits = is_tied
    self.has_scaled_logits = has_scaled_logits
    dtype_ = _transformer.as_dtype(dtype)
    shared = dict(epsilon=epsilon, dtype=dtype_)
    sizes = width, mlp_width or 4 * width, num_heads, head_width
    block = functools.partial(_Block, *sizes, is_gated=is_gated, **shared)
    tower = lambda depth, is_decoder: _Tower(
        width,
        depth,
        num_heads,
        is_decoder=is_decoder,
        num_buckets=num_buckets,
        max_distance=max_distance,
        make_block=lambda rngs: block(is_decoder=is_decoder, rngs=rngs),
        make_norm=functools.partial(nnx.RMSNorm, width, **shared),
        stack=dict(
            is_scanned=is_scanned,
            is_rematerialized=is_rematerialized,
            batch_axis=batch_axis,
        ),
        rngs=rngs,
    )
    normal = nnx.initializers.normal(1.0)
    self.embed = nnx.Embed(
        vocab_size, width, embedding_init=normal, dtype=dtype_, rngs=rngs
    )
    self.encoder = tower(depth, False)
    self.decoder = tower(
        depth if decoder_depth is None else decoder_depth, True
    )
    if not is_tied:
      self.head = nnx.Linear(width, vocab_size, use_bias=False, rngs=rngs)

  def encode(
      self, input_ids: jax.Array, attention_mask: jax.Array | None = None
  ) -> jax.Array:
    """What the encoder makes of texts.

    Args:
      input_ids: [B, S], integers.
      attention_mask: [B, S], 1 where there is a token, 0 where there is
        padding; None if there is none.

    Returns:
      [B, S, width]; those of padding mean nothing.
    """
    return self.encoder(self._embedded(input_ids), attention_mask)

  def decode(
      self,
      decoder_input_ids: jax.Array,
      encoded: jax.Array,
      attention_mask: jax.Array | None = None,
  ) -> jax.Array:
    """The logits of each next token, given those before it.

    Args:
      decoder_input_ids: [B, T], integers: the start token, then the text so
        far. Padding at the end needs no mask: nothing before it sees it.
      encoded: what `encode` returned, [B, S, width].
      attention_mask: of the encoder's texts, [B, S], as there.

    Returns:
      [B, T, vocab_size], float32.
    """
    x = self.decoder(
        self._embedded(decoder_input_ids),
        encoded=encoded,
        encoded_mask=attention_mask,
    )
    if self.has_scaled_logits:
      x = x * x.shape[-1] ** -0.5
    gathered = self.encoder.gathered
    if self.is_tied:
      kernel = gathered(*nnx.split(self.embed)).embedding[...].T
    else:
      kernel = gathered(*nnx.split(self.head)).kernel[...]
    logits = jnp.matmul(
        x, kernel.astype(x.dtype), preferred_element_type=jnp.float32
    )
    return self.encoder.on_batch_axis(logits)

  def __call__(
      self,
      input_ids: jax.Array,
      decoder_input_ids: jax.Array,
      attention_mask: jax.Array | None = None,
  ) -> jax.Array:
    """Logits, [B, T, vocab_size], for texts [B, S] and beginnings [B, T]."""
    encoded = self.encode(input_ids, attention_mask)
    return self.decode(decoder_input_ids, encoded, attention_mask)

  def _embedded(self, ids: jax.Array) -> jax.Array:
    embed = self.encoder.gathered(*nnx.split(self.embed))
    return self.encoder.on_batch_axis(embed(ids))


def shift_right(label_ids: jax.Array, *, start_id: int = 0) -> jax.Array:
  """What the decoder is given to predict a text: `y_0 = start, y_t = l_(t-1)`.

  Args:
    label_ids: [..., L], integers.
    start_id: the token before the first; T5 starts with its padding, 0.

  Returns:
    [..., L].

  Example:
    >>> shift_right(jnp.array([[7, 8, 1]])).tolist()
    [[0, 7, 8]]
  """
  label_ids = jnp.asarray(label_ids)
  start = jnp.full_like(label_ids[..., :1], start_id)
  return jnp.concatenate([start, label_ids[..., :-1]], axis=-1)


def score_labels(
    model: T5,
    input_ids: jax.Array,
    attention_mask: jax.Array | None,
    label_ids: jax.Array,
    *,
    pad_id: int = 0,
) -> jax.Array:
  """How probable each label's text is after each input: classification.

  `s_bc = sum_t log p(l_ct | l_c1 ... l_c(t-1), x_b)`

  They serve as logits: their softmax is the probability of each label given
  that the model says one of them.

  Args:
    model: a T5.
    input_ids: [B, S], integers.
    attention_mask: [B, S], 0 where there is padding; None if there is none.
    label_ids: the labels' texts, [C, L], each with its end token, then padded.
    pad_id: marks padding in `label_ids`.

  Returns:
    [B, C], float32.

  Example:
    >>> model = T5(
    ...     9, width=8, depth=1, num_heads=2, head_width=4, rngs=nnx.Rngs(0)
    ... )
    >>> labels = jnp.array([[4, 1, 0], [5, 6, 1]])
    >>> score_labels(model, jnp.array([[5, 3, 1]]), None, labels).shape
    (1, 2)

  Source: Raffel et al., JMLR 2020, section 2.2 (labels as texts).
  """
  encoded = model.encode(input_ids, attention_mask)

  def score(labels):
    inputs = jnp.tile(shift_right(labels), (len(encoded), 1))
    logits = model.decode(inputs, encoded, attention_mask)
    log_probs = jax.nn.log_softmax(logits)[:, jnp.arange(len(labels)), labels]
    return jnp.where(labels != pad_id, log_probs, 0).sum(-1)

  # One label after another: logits of all at once are large, [B, C, L, V].
  return jax.lax.map(score, jnp.asarray(label_ids)).T


def greedy_decode(
    model: T5,
    input_ids: jax.Array,
    attention_mask: jax.Array | None = None,
    *,
    num_tokens: int,
    start_id: int = 0,
    end_id: int = 1,
    pad_id: int = 0,
) -> jax.Array:
  """Texts of the most probable next tokens; for short ones, such as labels.

  Each step computes the whole text again: `num_tokens` squared in all.

  Args:
    model: a T5.
    input_ids: [B, S], integers.
    attention_mask: [B, S], 0 where there is padding; None if there is none.
    num_tokens: L, the longest text.
    start_id: the token before the first.
    end_id: ends a text.
    pad_id: follows the end.

  Returns:
    [B, L], integers; with the end token where it was reached.

  Example:
    >>> model = T5(
    ...     9, width=8, depth=1, num_heads=2, head_width=4, rngs=nnx.Rngs(0)
    ... )
    >>> greedy_decode(model, jnp.array([[5, 3, 1]]), num_tokens=4).shape
    (1, 4)
  """
  encoded = model.encode(input_ids, attention_mask)

  def step(i, text):
    inputs = shift_right(text, start_id=start_id)
    logits = model.decode(inputs, encoded, attention_mask)[:, i]
    is_over = (text == end_id).any(-1)
    token = jnp.where(is_over, pad_id, logits.argmax(-1))
    return text.at[:, i].set(token.astype(text.dtype))

  text = jnp.full((len(encoded), num_tokens), pad_id, jnp.int32)
  return jax.lax.fori_loop(0, num_tokens, step, text)


# --- Names in files -----------------------------------------------------------


def _attention(i: int, ours: str, theirs: str) -> dict[str, str]:
  names = {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'o'}
  layer = f'layer.{i}.'
  return {f'{ours}/{x}': f'{layer}{theirs}.{y}' for x, y in names.items()} | {
      f'norm_{ours}': f'{layer}layer_norm'
  }


def _block(is_decoder: bool, is_gated: bool) -> dict[str, str]:
  """The layers of one block."""
  layers = _attention(0, 'attention', 'SelfAttention')
  if is_decoder:
    layers |= _attention(1, 'cross', 'EncDecAttention')
  denses = {'dense_in': 'wi', 'dense_out': 'wo'}
  if is_gated:
    denses = {'dense_gate': 'wi_0', 'dense_in': 'wi_1', 'dense_out': 'wo'}
  layer = f'layer.{1 + is_decoder}.'
  return {
      **layers,
      **{f'mlp/{x}': f'{layer}DenseReluDense.{y}' for x, y in denses.items()},
      'norm_mlp': f'{layer}layer_norm',
  }


def hf_table(
    *,
    depth: int = 6,
    decoder_depth: int | None = None,
    is_gated: bool = False,
    is_tied: bool = True,
    **_: object,
) -> _names.Table:
  """Names of Hugging Face's `T5ForConditionalGeneration`.

  Files of older releases hold copies of the embedding, which are ignored; and a
  bias of distances in the decoder's attention to the encoder, never used.
  """
  rules = [_names.Rule('embed/embedding', 'shared.weight')]
  depths = depth, depth if decoder_depth is None else decoder_depth
  bias = 'block.0.layer.0.SelfAttention.relative_attention_bias.weight'
  ends = {} if is_tied else {'head': 'lm_head'}
  for tower, number in zip(('encoder', 'decoder'), depths):
    rules.append(_names.Rule(f'{tower}/distance', f'{tower}.{bias}'))
    ends[f'{tower}/norm'] = f'{tower}.final_layer_norm'
    block = _block(tower == 'decoder', is_gated)
    for i in range(number):
      ours, theirs = f'{tower}/block_{i}/', f'{tower}.block.{i}.'
      rules += _torch.layers(ours, theirs, block, has_bias=False)
  rules += _torch.layers('', '', ends, has_bias=False)
  ignored = [
      r'(encoder|decoder)\.embed_tokens\.weight',
      r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias'
      r'\.weight',
  ]
  if is_tied:
    ignored.append(r'lm_head\.weight')
  return _names.Table(rules, ignored)


TABLES = {'hf': hf_table}


def arguments(
    naming: str, shapes: Mapping[str, ShapeDtype], config: Config
) -> Json:
  """The arguments of `T5` for a file.

  See `vit.arguments` for what it takes and returns.

  Raises:
    ValueError: it is another kind of model, or has another activation.
  """
  del naming
  for name in ('shared.weight', 'decoder.final_layer_norm.weight'):
    if name not in shapes:
      raise ValueError(
          f'{name!r} is missing: this is not an encoder-decoder model with '
          'shared embeddings (`T5ForConditionalGeneration`).'
      )
  first = 'encoder.block.0.layer.'
  is_gated = f'{first}1.DenseReluDense.wi_0.weight' in shapes
  expected = 'gated-gelu' if is_gated else 'relu'
  only = {'feed_forward_proj': expected}
  _names.check_config(config, only, 'a T5 of these arrays supports')
  attention = f'{first}0.SelfAttention.'
  bias = shapes[f'{attention}relative_attention_bias.weight']
  num_buckets, num_heads = bias.shape
  vocab_size, width = shapes['shared.weight'].shape
  mlp = f'{first}1.DenseReluDense.wi{"_0" if is_gated else ""}.weight'
  # Since release 5 `tie_word_embeddings` is true in every config that
  # transformers writes, and what it was is in `scale_decoder_outputs`.
  tie = config.get('tie_word_embeddings', not (is_gated and not config))
  has_scaled_logits = config.get('scale_decoder_outputs', tie)
  return {
      'vocab_size': vocab_size,
      'width': width,
      'depth': _names.depth_of(shapes, r'encoder\.block\.'),
      'decoder_depth': _names.depth_of(shapes, r'decoder\.block\.'),
      'num_heads': num_heads,
      'head_width': shapes[f'{attention}q.weight'].shape[0] // num_heads,
      'mlp_width': shapes[mlp].shape[0],
      'is_gated': is_gated,
      # With scaled logits an `lm_head` is a copy of the embedding.
      'is_tied': has_scaled_logits or 'lm_head.weight' not in shapes,
      'has_scaled_logits': has_scaled_logits,
      'num_buckets': num_buckets,
      'max_distance': config.get('relative_attention_max_distance', 128),
      'epsilon': config.get('layer_norm_epsilon', 1e-6),
  }
