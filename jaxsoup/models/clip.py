"""CLIP in Flax nnx: two towers, zero-shot heads, and image classifiers.

```
model = clip.CLIP(rngs=nnx.Rngs(0), **arguments)
logits = model(image, text)  # [B, H, W, C], [N, T] -> [B, N]
```
"""

from collections.abc import Callable
from collections.abc import Sequence
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from jaxsoup.models import _transformer
from jaxsoup.models import vit
from jaxsoup.models._clip_names import TABLES as TABLES
from jaxsoup.models._clip_names import arguments as arguments
from jaxsoup.typing import ArrayLike
from jaxsoup.typing import Config


class _Tower(_transformer.Stack):
  """What both towers have after their embedding."""

  def __init__(
      self,
      embed_width: int | None,
      *,
      width: int,
      depth: int,
      num_heads: int,
      mlp_width: int | None = None,
      activation: str = 'quick_gelu',
      epsilon: float = 1e-5,
      dtype: Any,
      rngs: nnx.Rngs,
      **stack: Any,
  ):
    shared = dict(epsilon=epsilon, dtype=dtype)
    self.add_blocks(
        lambda rngs: _transformer.Block(
            width,
            mlp_width or 4 * width,
            num_heads,
            activation=vit.activation_fn(activation),
            rngs=rngs,
            **shared,
        ),
        depth,
        rngs=rngs,
        **stack,
    )
    self.norm = nnx.LayerNorm(width, rngs=rngs, **shared)
    if embed_width is not None:
      self.projection = nnx.Linear(
          width,
          embed_width,
          use_bias=False,
          kernel_init=nnx.initializers.normal(width**-0.5),
          rngs=rngs,
      )


class ImageTower(_Tower):
  """The transformer of images, up to the joint space.

  ```
  patches, class token + position -> LN -> blocks -> class token -> LN -> linear
  ```

  Args:
    image_shape: (H, W, C) of one image; `patch_size` divides H and W.
    embed_width: size of the joint space; None for `tokens` alone.
    patch_size: side of a square patch, in pixels.
    width: size of a token.
    epsilon: of the LayerNorms.
    dtype: name of the dtype of the computation; None takes that of the
      parameters. Features are float32.
    rngs: source of the initial parameters.
    **others: `depth`, the number of blocks; `num_heads` of attention, which
      divides `width`; `mlp_width`, size of the hidden layers, `4 * width` if
      not given; `activation` of the MLPs: 'quick_gelu' (the default), 'gelu' or
      'gelu_tanh'; `is_scanned`, `is_rematerialized` and `batch_axis`, as of
      `ViT`.

  Source: Radford et al., "Learning transferable visual models from natural
  language supervision", ICML 2021, Section 2.4.
  """

  def __init__(
      self,
      image_shape: Sequence[int],
      embed_width: int | None,
      *,
      patch_size: int,
      width: int,
      epsilon: float = 1e-5,
      dtype: str | None = None,
      rngs: nnx.Rngs,
      **others: Any,
  ):
    shared: Any = dict(dtype=_transformer.as_dtype(dtype), rngs=rngs)
    normal = nnx.initializers.normal(width**-0.5)
    num_tokens = 1 + math.prod(vit.grid(image_shape, patch_size))
    self.patch_size = patch_size
    self.embed = nnx.Linear(
        patch_size**2 * image_shape[2],
        width,
        use_bias=False,
        **shared,
    )
    self.cls_token = nnx.Param(normal(rngs.params(), (1, width)))
    self.position = nnx.Param(normal(rngs.params(), (num_tokens, width)))
    shared['epsilon'] = epsilon
    self.norm_embed = nnx.LayerNorm(width, **shared)
    super().__init__(embed_width, width=width, **shared, **others)

  def tokens(self, image: jax.Array) -> jax.Array:
    """Returns what the blocks give, [B, T, width], for images [B, H, W, C]."""
    embed = self.gathered(*nnx.split(self.embed))
    x = self.on_batch_axis(embed(vit.patchify(image, self.patch_size)))
    x = jnp.concatenate([vit.repeated(self.cls_token[...], x), x], axis=1)
    x = self.norm_embed(x + self.position[...].astype(x.dtype))
    return self.through_blocks(x)

  def __call__(self, image: jax.Array) -> jax.Array:
    """Returns features, [B, embed_width], for images [B, H, W, C]."""
    x = self.norm(self.tokens(image)[:, 0])
    return self.gathered(*nnx.split(self.projection))(x)


class TextTower(_Tower):
  """The transformer of texts, up to the joint space.

  `tokens + position -> causal blocks -> LN -> token of the end -> linear`

  Args:
    embed_width: see `ImageTower`, as all that is not listed here.
    vocab_size: number of tokens.
    max_length: number of positions.
    end_id: id of the token that ends a text, the first one of which is taken;
      None takes the token with the largest id, as the first CLIP did.

  Source: Radford et al., ICML 2021, Section 2.4.
  """

  def __init__(
      self,
      embed_width: int,
      *,
      vocab_size: int,
      max_length: int,
      width: int,
      end_id: int | None = None,
      dtype: str | None = None,
      rngs: nnx.Rngs,
      **others: Any,
  ):
    shared: Any = dict(dtype=_transformer.as_dtype(dtype), rngs=rngs)
    normal = nnx.initializers.normal
    self.end_id = end_id
    self.embed = nnx.Embed(
        vocab_size, width, embedding_init=normal(0.02), **shared
    )
    self.position = nnx.Param(normal(0.01)(rngs.params(), (max_length, width)))
    super().__init__(embed_width, width=width, **shared, **others)

  def __call__(self, text: jax.Array) -> jax.Array:
    """Returns features, [B, embed_width], for ids of tokens [B, T]."""
    length = text.shape[1]
    if length > len(self.position[...]):
      raise ValueError(
          f'Texts of {length} tokens are longer than the '
          f'{len(self.position[...])} positions: truncate them before the end '
          'token.'
      )
    embed = self.gathered(*nnx.split(self.embed))
    x = self.on_batch_axis(embed(text))
    x = x + self.position[:length].astype(x.dtype)
    mask = jnp.tril(jnp.ones((1, 1, length, length), bool))
    x = self.norm(self.through_blocks(x, mask))
    at = text if self.end_id is None else text == self.end_id
    end = jnp.argmax(at, axis=1)[:, None, None]
    x = jnp.take_along_axis(x, end, axis=1)[:, 0]
    return self.gathered(*nnx.split(self.projection))(x)


class CLIP(nnx.Module):
  """Contrastive language-image pre-training: images and texts in one space.

  `logits = exp(s) I T^T,  I and T the normalized features`

  Args:
    embed_width: size of the joint space.
    image: arguments of the `ImageTower`: `image_shape`, `patch_size`, `width`,
      `depth`, `num_heads`, `mlp_width`.
    text: those of the `TextTower`: `vocab_size`, `max_length`, `width`,
      `depth`, `num_heads`, `mlp_width`, `end_id`; None for images alone.
    rngs: source of the initial parameters.
    **both: what both towers take: `activation`, `epsilon`, `dtype`,
      `is_scanned`, `is_rematerialized` and `batch_axis`.

  Example:
    >>> tower = dict(width=8, depth=1, num_heads=2)
    >>> image = dict(image_shape=(8, 8, 3), patch_size=4, **tower)
    >>> text = dict(vocab_size=20, max_length=5, **tower)
    >>> def logits_fn(x, ids):
    ...   model = CLIP(embed_width=6, image=image, text=text, rngs=nnx.Rngs(0))
    ...   return model(x, ids)
    >>> x, ids = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 5), int)
    >>> jax.eval_shape(logits_fn, x, ids).shape
    (2, 3)

  Source: Radford et al., "Learning transferable visual models from natural
  language supervision", ICML 2021, Figure 3.
  """

  def __init__(
      self,
      *,
      embed_width: int,
      image: Config,
      text: Config | None = None,
      rngs: nnx.Rngs,
      **both: Any,
  ):
    self.image = ImageTower(embed_width=embed_width, rngs=rngs, **image, **both)
    if text is not None:
      self.text = TextTower(embed_width, rngs=rngs, **text, **both)
      self.logit_scale = nnx.Param(jnp.log(1 / 0.07))

  def image_features(self, image: jax.Array) -> jax.Array:
    """Returns unit vectors, [B, embed_width], for images [B, H, W, C]."""
    return normalized(self.image(image))

  def text_features(self, text: jax.Array) -> jax.Array:
    """Returns unit vectors, [B, embed_width], for ids of tokens [B, T]."""
    return normalized(self.text(text))

  def __call__(self, image: jax.Array, text: jax.Array) -> jax.Array:
    """Returns logits, [num_images, num_texts]."""
    features = self.image_features(image), self.text_features(text)
    return jnp.exp(self.logit_scale[...]) * features[0] @ features[1].T


class ImageClassifier(nnx.Module):
  """The image tower of CLIP under a linear head, as it is fine-tuned.

  `logits = I W + b,  I the normalized features`

  The parameters are `image`, those of a CLIP, and `head`, of `zero_shot_head`
  or random ones:
  `{'image': params['image'], 'head': {'kernel': kernel}}`.

  Args:
    num_classes: number of logits.
    embed_width: size of the joint space; None for the mean of the patches in
      place of I, as `CLIPForImageClassification` of transformers has it.
    image: arguments of the `ImageTower`, as of `CLIP`.
    has_bias: whether the head has a bias.
    rngs: source of the initial parameters.
    **others: `activation`, `epsilon`, `dtype`, `is_scanned`,
      `is_rematerialized` and `batch_axis`.

  Example:
    >>> image = dict(
    ...     image_shape=(8, 8, 3), patch_size=4, width=8, depth=1, num_heads=2
    ... )
    >>> def logits_fn(x):
    ...   size = dict(embed_width=6, image=image)
    ...   return ImageClassifier(5, **size, rngs=nnx.Rngs(0))(x)
    >>> jax.eval_shape(logits_fn, jnp.zeros((2, 8, 8, 3))).shape
    (2, 5)

  Source: Wortsman et al., "Model soups", ICML 2022, Section 3.1.
  """

  def __init__(
      self,
      num_classes: int,
      *,
      embed_width: int | None,
      image: Config,
      has_bias: bool = False,
      rngs: nnx.Rngs,
      **others: Any,
  ):
    self.image = ImageTower(
        embed_width=embed_width, rngs=rngs, **image, **others
    )
    self.is_projected = embed_width is not None
    self.head = nnx.Linear(
        embed_width or image['width'], num_classes, use_bias=has_bias, rngs=rngs
    )

  def features(self, image: jax.Array) -> jax.Array:
    """Returns what the head sees, unit vectors [B, embed_width]."""
    if not self.is_projected:
      return self.image.tokens(image)[:, 1:].mean(axis=1)
    return normalized(self.image(image))

  def __call__(self, image: jax.Array) -> jax.Array:
    """Returns logits, [B, num_classes], for images [B, H, W, C]."""
    head = self.image.gathered(*nnx.split(self.head))
    return self.image.on_batch_axis(head(self.features(image)))


def normalized(x: jax.Array) -> jax.Array:
  """Vectors along the last axis, scaled to length one."""
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def zero_shot_head(
    text_features_fn: Callable[[jax.Array], jax.Array],
    class_names: Sequence[str],
    templates: Sequence[str],
    tokenize_fn: Callable[[Sequence[str]], ArrayLike],
    *,
    scale: float = 100.0,
) -> jax.Array:
  """A linear head that tells classes by their names.

  `w_c = scale n(mean_t n(f(template_t(class_c)))),  n(x) = x / |x|`

  Args:
    text_features_fn: features [N, width] of tokens [N, T]: `model.text` of a
      `CLIP`; jit it.
    class_names: such as 'tabby cat'.
    templates: with `{}` where the name goes, such as 'a photo of a {}.'.
    tokenize_fn: ids [N, T] of N texts. jaxsoup has no tokenizer: use any that
      fits the weights, such as `lambda texts: tokenizer(texts,
      padding='max_length', max_length=77, return_tensors='np')['input_ids']`
      with that of Hugging Face.
    scale: multiplies the kernel; 100 is what CLIP's own temperature ends at.

  Returns:
    A kernel [width, num_classes], float32, for the head of an
    `ImageClassifier`.

  Raises:
    ValueError: there are no templates, or one lacks `{}`.

  Example:
    >>> features_fn = lambda tokens: jnp.eye(3)[tokens[:, 0]]
    >>> tokenize_fn = lambda texts: jnp.array([[len(x) - 4] for x in texts])
    >>> head = zero_shot_head(features_fn, ['x', 'yy'], ['a {}.'], tokenize_fn)
    >>> head[:, 1]
    Array([  0., 100.,   0.], dtype=float32)

  Source: Radford et al., ICML 2021, Section 3.1.4; Wortsman et al., "Robust
  fine-tuning of zero-shot models", CVPR 2022, Section 2.
  """
  wrong = [t for t in templates if '{}' not in t]
  if wrong or not templates:
    raise ValueError(
        f"Templates must contain '{{}}' for the class name, got {wrong}."
    )
  columns = []
  for name in class_names:
    tokens = tokenize_fn([t.replace('{}', name) for t in templates])
    features = normalized(text_features_fn(jnp.asarray(tokens)))
    columns.append(normalized(features.astype(jnp.float32).mean(axis=0)))
  return scale * jnp.stack(columns, axis=1)


def image_classifier(model: CLIP, kernel: jax.Array) -> ImageClassifier:
  """The image tower of a CLIP under a head: what the soups paper fine-tunes.

  Args:
    model: with its weights, such as `models.load('clip-vit-base-patch32/')`.
    kernel: [embed_width, num_classes], of `zero_shot_head`.

  Returns:
    A classifier without a bias; it shares the tower's arrays with the model.

  Example:
    >>> image = dict(
    ...     image_shape=(8, 8, 3), patch_size=4, width=8, depth=1, num_heads=2
    ... )
    >>> model = CLIP(embed_width=6, image=image, text=None, rngs=nnx.Rngs(0))
    >>> image_classifier(model, jnp.ones((6, 5)))(jnp.zeros((2, 8, 8, 3))).shape
    (2, 5)

  Source: Wortsman et al., "Model soups", ICML 2022, Section 3.1.
  """
  embed_width, num_classes = kernel.shape
  # Its own tower is replaced: as small a one as there can be.
  smallest = dict(image_shape=(1, 1, 3), patch_size=1, width=1)
  classifier = ImageClassifier(
      num_classes,
      embed_width=embed_width,
      image=smallest | dict(depth=1, num_heads=1),
      rngs=nnx.Rngs(0),
  )
  classifier.image = model.image
  classifier.head.kernel[...] = kernel
  return classifier
