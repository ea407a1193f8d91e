"""BERT in Flax nnx, and sentence embeddings as MiniLM makes them.

```
model = bert.Bert(num_classes=2, vocab_size=100, rngs=nnx.Rngs(0))
logits = model(input_ids, attention_mask)  # [B, T], [B, T] -> [B, 2]
tokens = model.tokens(input_ids, attention_mask)  # [B, T, 768]
sentences = bert.mean_pooled(tokens, attention_mask)  # [B, 768]
```
"""

from collections.abc import Mapping

from flax import nnx
import jax
import jax.numpy as jnp

from jaxsoup.models import _names
from jaxsoup.models import _torch
from jaxsoup.models import _transformer
from jaxsoup.typing import Config
from jaxsoup.typing import DType
from jaxsoup.typing import Json
from jaxsoup.typing import ShapeDtype


class _Block(nnx.Module):
  """One post-LN transformer block, with exact GELU.

  `y = LN(x + Attention(x)),  out = LN(y + MLP(y))`

  Source: Vaswani et al., "Attention is all you need", NeurIPS 2017.
  """

  def __init__(
      self,
      width: int,
      mlp_width: int,
      num_heads: int,
      *,
      epsilon: float,
      dtype: DType | None,
      rngs: nnx.Rngs,
  ):
    norm = lambda: nnx.LayerNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)
    self.attention = _transformer.attention(width, num_heads, dtype, rngs)
    self.norm_attention = norm()
    self.mlp = _transformer.Mlp(width, mlp_width, dtype=dtype, rngs=rngs)
    self.norm_mlp = norm()

  def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Returns tokens, [B, T, width]; mask is [B, 1, 1, T], True is seen."""
    x = self.norm_attention(x + self.attention(x, mask=mask))
    return self.norm_mlp(x + self.mlp(x))


class Bert(_transformer.Stack):
  """BERT, for classification or for the tokens and sentences themselves.

  `word + position + token type -> LN -> blocks -> first token -> tanh -> head`

  Args:
    num_classes: number of logits; 0 leaves out the head.
    vocab_size: number of words.
    width: size of a token.
    depth: number of blocks.
    num_heads: number of attention heads; divides `width`.
    mlp_width: size of the hidden layers, `4 * width` if not given.
    num_positions: the longest text, in tokens.
    num_token_types: kinds of tokens: first and second sentence.
    has_pooler: whether a dense layer and tanh follow on the first token.
    epsilon: of the LayerNorms.
    dtype: see `ViT`, as all that follow.
    is_scanned: stores all blocks as one.
    is_rematerialized: keeps of each block only its input.
    batch_axis: name of the mesh axis over which batches are sharded.
    rngs: source of the initial parameters.

  Raises:
    ValueError: `num_heads` does not divide `width`; in calls: a text is longer
      than `num_positions`.

  Example:
    >>> def logits_fn(ids, mask):
    ...   size = dict(vocab_size=9, width=8, depth=2, num_heads=2)
    ...   return Bert(3, **size, rngs=nnx.Rngs(0))(ids, mask)
    >>> ids, mask = jnp.array([[1, 5, 2, 0]]), jnp.array([[1, 1, 1, 0]])
    >>> jax.eval_shape(logits_fn, ids, mask).shape
    (1, 3)

  Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers
  for Language Understanding", NAACL 2019, section 3.
  """

  def __init__(
      self,
      num_classes: int = 0,
      *,
      vocab_size: int = 30522,
      width: int = 768,
      depth: int = 12,
      num_heads: int = 12,
      mlp_width: int | None = None,
      num_positions: int = 512,
      num_token_types: int = 2,
      has_pooler: bool = True,
      epsilon: float = 1e-12,
      dtype: str | None = None,
      is_scanned: bool = False,
      is_rematerialized: bool = False,
      batch_axis: str | None = None,
      rngs: nnx.Rngs,
  ):
    if width % num_heads:
      raise ValueError(
          f'num_heads {num_heads} does not divide width {width}: choose a '
          'divisor.'
      )
    self.num_classes, self.has_pooler = num_classes, has_pooler
    dtype_ = _transformer.as_dtype(dtype)
    normal = nnx.initializers.normal(0.02)
    embed = lambda num: nnx.Embed(
        num, width, embedding_init=normal, dtype=dtype_, rngs=rngs
    )
    self.word = embed(vocab_size)
    self.position = nnx.Param(normal(rngs.params(), (num_positions, width)))
    self.token_type = embed(num_token_types)
    self.norm = nnx.LayerNorm(width, epsilon=epsilon, dtype=dtype_, rngs=rngs)
    self.add_blocks(
        lambda rngs: _Block(
            width,
            mlp_width or 4 * width,
            num_heads,
            epsilon=epsilon,
            dtype=dtype_,
            rngs=rngs,
        ),
        depth,
        is_scanned=is_scanned,
        is_rematerialized=is_rematerialized,
        batch_axis=batch_axis,
        rngs=rngs,
    )
    if has_pooler:
      self.pooler = nnx.Linear(width, width, dtype=dtype_, rngs=rngs)
    if num_classes:
      self.head = nnx.Linear(width, num_classes, rngs=rngs)

  def tokens(
      self,
      input_ids: jax.Array,
      attention_mask: jax.Array | None = None,
      token_type_ids: jax.Array | None = None,
  ) -> jax.Array:
    """The tokens after the last block.

    Args:
      input_ids: [B, T], integers.
      attention_mask: [B, T], 1 where there is a token, 0 where there is
        padding; None if there is none.
      token_type_ids: [B, T], integers; None means 0.

    Returns:
      [B, T, width]; values for padding are meaningless.
    """
    length, num_positions = input_ids.shape[1], self.position.shape[0]
    if length > num_positions:
      raise ValueError(
          f'input_ids has {length} tokens per text, but the model has '
          f'{num_positions} positions: truncate the texts.'
      )
    if token_type_ids is None:
      token_type_ids = jnp.zeros_like(input_ids)
    word = self.gathered(*nnx.split(self.word))
    x = self.on_batch_axis(word(input_ids)) + self.token_type(token_type_ids)
    x = self.norm(x + self.position[...][:length].astype(x.dtype))
    return self.through_blocks(x, _transformer.over_keys(attention_mask))

  def features(
      self,
      input_ids: jax.Array,
      attention_mask: jax.Array | None = None,
      token_type_ids: jax.Array | None = None,
  ) -> jax.Array:
    """What the head sees, [B, width]: the pooler's output or first tokens."""
    x = self.tokens(input_ids, attention_mask, token_type_ids)[:, 0]
    if not self.has_pooler:
      return x
    return jnp.tanh(self.gathered(*nnx.split(self.pooler))(x))

  def __call__(
      self,
      input_ids: jax.Array,
      attention_mask: jax.Array | None = None,
      token_type_ids: jax.Array | None = None,
  ) -> jax.Array:
    """Logits, [B, num_classes]; without a head the features, [B, width]."""
    x = self.features(input_ids, attention_mask, token_type_ids)
    if not self.num_classes:
      return x
    return self.on_batch_axis(self.gathered(*nnx.split(self.head))(x))


def mean_pooled(
    tokens: jax.Array,
    attention_mask: jax.Array | None = None,
    *,
    is_normalized: bool = False,
) -> jax.Array:
  """Sentence embeddings: the mean over the tokens that are not padding.

  `e = sum_t m_t x_t / sum_t m_t,  or  e / |e|`

  Args:
    tokens: [B, T, width], of `Bert.tokens`.
    attention_mask: [B, T], 1 where there is a token; None if all are.
    is_normalized: whether each is divided by its length.

  Returns:
    [B, width], float32; zeros for a text without any token.

  Example:
    >>> tokens = jnp.array([[[3.0, 0.0], [3.0, 8.0], [9.0, 9.0]]])
    >>> mean_pooled(tokens, jnp.array([[1, 1, 0]])).tolist()
    [[3.0, 4.0]]
    >>> mean_pooled(tokens, jnp.array([[1, 1, 0]]), is_normalized=True).tolist()
    [[0.6, 0.8]]

  Source: Reimers and Gurevych, "Sentence-BERT", EMNLP 2019, section 3.
  """
  x = tokens.astype(jnp.float32)
  if attention_mask is None:
    attention_mask = jnp.ones(x.shape[:2])
  mask = attention_mask.astype(jnp.float32)[..., None]
  x = (x * mask).sum(1) / jnp.maximum(mask.sum(1), 1)
  if is_normalized:
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
  return x


# --- Names in files -----------------------------------------------------------

_BLOCK = {
    'attention/query': 'attention.self.query',
    'attention/key': 'attention.self.key',
    'attention/value': 'attention.self.value',
    'attention/out': 'attention.output.dense',
    'norm_attention': 'attention.output.LayerNorm',
    'mlp/dense_in': 'intermediate.dense',
    'mlp/dense_out': 'output.dense',
    'norm_mlp': 'output.LayerNorm',
}


def hf_table(
    *,
    num_classes: int = 0,
    depth: int = 12,
    has_pooler: bool = True,
    **_: object,
) -> _names.Table:
  """Names of Hugging Face's `BertForSequenceClassification` or `BertModel`.

  Files are read with the prefix `bert.` and without it. Written are those of
  the first if there are classes, else those of the second. The heads of
  pre-training, `cls.*`, are ignored: no model here has them.
  """
  prefix = 'bert.' if num_classes else ''
  embeddings = f'{prefix}embeddings.'
  rules = [
      _names.Rule(ours, f'{embeddings}{theirs}_embeddings.weight')
      for ours, theirs in (
          ('word/embedding', 'word'),
          ('position', 'position'),
          ('token_type/embedding', 'token_type'),
      )
  ]
  for i in range(depth):
    theirs = f'{prefix}encoder.layer.{i}.'
    rules += _torch.layers(f'block_{i}/', theirs, _BLOCK)
  ends = {'norm': f'{embeddings}LayerNorm'}
  if has_pooler:
    ends['pooler'] = f'{prefix}pooler.dense'
  if num_classes:
    ends['head'] = 'classifier'
  rules += _torch.layers('', '', ends)
  return _names.Table(
      rules,
      ignored=(r'(bert\.)?embeddings\.position_ids', r'cls\..*'),
      aliases=(
          (r'^(bert\.)?(?=embeddings\.|encoder\.|pooler\.)', prefix),
          # Files converted from the first release, in TensorFlow.
          (r'(?<=LayerNorm\.)gamma$', 'weight'),
          (r'(?<=LayerNorm\.)beta$', 'bias'),
      ),
  )


TABLES = {'hf': hf_table}
_ONLY = {
    'hidden_act': 'gelu',
    'position_embedding_type': 'absolute',
    'is_decoder': False,
}


def arguments(
    naming: str, shapes: Mapping[str, ShapeDtype], config: Config
) -> Json:
  """The arguments of `Bert` for a file.

  See `vit.arguments` for what it takes and returns.

  Raises:
    ValueError: it is another kind of model.
  """
  del naming
  _names.check_config(config, _ONLY, '`Bert` supports')
  shape_of = {n.removeprefix('bert.'): x.shape for n, x in shapes.items()}
  if 'embeddings.word_embeddings.weight' not in shape_of:
    raise ValueError(
        "'embeddings.word_embeddings.weight' is missing, with and without the "
        'prefix `bert.`: this is not a BERT model.'
    )
  vocab_size, width = shape_of['embeddings.word_embeddings.weight']
  has_pooler = 'pooler.dense.weight' in shape_of
  if 'classifier.weight' in shape_of and not has_pooler:
    raise ValueError(
        "The file has 'classifier.weight' but no 'pooler.dense.weight': its "
        'head classifies tokens. Load a model that classifies texts.'
    )
  # Heads have size 64; MiniLM keeps its teacher's number of heads instead.
  num_heads = 12 if width == 384 else max(1, width // 64)
  return {
      'num_classes': shape_of.get('classifier.weight', (0,))[0],
      'vocab_size': vocab_size,
      'width': width,
      'depth': _names.depth_of(shape_of, r'encoder\.layer\.'),
      'num_heads': config.get('num_attention_heads', num_heads),
      'mlp_width': shape_of['encoder.layer.0.intermediate.dense.weight'][0],
      'num_positions': shape_of['embeddings.position_embeddings.weight'][0],
      'num_token_types': shape_of['embeddings.token_type_embeddings.weight'][0],
      'has_pooler': has_pooler,
      'epsilon': config.get('layer_norm_eps', 1e-12),
  }
