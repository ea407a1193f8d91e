"""The vision transformer and the augmentations, against plain jax.numpy."""

import math

import _weights
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoup.data import augment
from jaxsoup.models import vit

SMALL = dict(patch_size=2, width=12, depth=2, num_heads=3, mlp_width=20)


def make(has_cls_token=False, seed=0):
  model = vit.ViT(
      (6, 4, 2),
      num_classes=5,
      has_cls_token=has_cls_token,
      rngs=nnx.Rngs(seed),
      **SMALL,
  )
  # Biases, scales and the class token start as constants: move them.
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  flat, treedef = jax.tree.flatten(params)
  rng = np.random.default_rng(seed)
  flat = [x + 0.3 * rng.normal(size=x.shape).astype(np.float32) for x in flat]
  return nnx.graphdef(model), jax.tree.unflatten(treedef, flat)


def images(num=3):
  x = np.random.default_rng(1).random((num, 6, 4, 2))
  return x.astype(np.float32)


def norm(p, x):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
  return x * p['scale'] + p['bias']


def linear(p, x):
  return x @ p['kernel'] + p['bias']


def attention(p, x):
  q, k, v = (
      np.einsum('btd,dhe->bhte', x, p[n]['kernel']) + p[n]['bias'][:, None]
      for n in ('query', 'key', 'value')
  )
  scores = np.einsum('bhte,bhse->bhts', q, k) / np.sqrt(q.shape[-1])
  scores = np.exp(scores - scores.max(-1, keepdims=True))
  out = scores / scores.sum(-1, keepdims=True) @ v
  return np.einsum('bhte,hed->btd', out, p['out']['kernel']) + p['out']['bias']


def gelu(x):
  return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def vit_by_hand(params, image):
  """The same network in float64 NumPy, patch by patch."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  batch, height, width, _ = image.shape
  patches = [
      image[:, i : i + 2, j : j + 2].reshape(batch, -1)
      for i in range(0, height, 2)
      for j in range(0, width, 2)
  ]
  x = linear(p['embed'], np.stack(patches, 1))
  if 'cls_token' in p:
    x = np.concatenate([np.tile(p['cls_token'], (batch, 1, 1)), x], 1)
  x = x + p['position']
  for i in range(SMALL['depth']):
    b = p[f'block_{i}']
    x = x + attention(b['attention'], norm(b['norm_attention'], x))
    hidden = gelu(linear(b['mlp']['dense_in'], norm(b['norm_mlp'], x)))
    x = x + linear(b['mlp']['dense_out'], hidden)
  x = norm(p['norm'], x)
  return linear(p['head'], x[:, 0] if 'cls_token' in p else x.mean(1))


@pytest.mark.slow_variants
@pytest.mark.parametrize('has_cls_token', (False, True))
def test_equals_numpy(has_cls_token):
  graphdef, params = make(has_cls_token)
  assert ('cls_token' in params) == has_cls_token
  logits = nnx.merge(graphdef, params)(images())
  assert logits.shape == (3, 5)
  np.testing.assert_allclose(
      logits, vit_by_hand(params, images()), rtol=1e-4, atol=1e-4
  )


def test_order_of_patches_matters_by_position_only():
  graphdef, params = make()
  order = np.array([5, 2, 0, 1, 4, 3])
  patches = np.asarray(vit.patchify(jnp.asarray(images()), 2))
  mixed = patches[:, order].reshape(3, 3, 2, 2, 2, 2)
  mixed = mixed.transpose(0, 1, 3, 2, 4, 5).reshape(3, 6, 4, 2)
  moved = {**params, 'position': params['position'][order]}
  expected = nnx.merge(graphdef, params)(images())
  np.testing.assert_allclose(
      nnx.merge(graphdef, moved)(mixed), expected, rtol=1e-4, atol=1e-5
  )
  other = nnx.merge(graphdef, params)(mixed)
  assert np.abs(other - expected).max() > 1e-3


def test_batches_do_not_mix():
  graphdef, params = make()
  model = nnx.merge(graphdef, params)
  alone = jnp.concatenate([model(images()[i : i + 1]) for i in range(3)])
  np.testing.assert_allclose(model(images()), alone, rtol=1e-4, atol=1e-5)


def test_keys_are_strings():
  _, params = make()
  for path, _ in jax.tree_util.tree_leaves_with_path(params):
    assert all(isinstance(key.key, str) for key in path)


def test_patch_size_has_to_divide_the_image():
  with pytest.raises(ValueError, match='patch_size 3 does not divide .* 8 x 8'):
    vit.ViT((8, 8, 1), num_classes=10, patch_size=3, rngs=nnx.Rngs(0))


def test_mixup_mixes_images_as_targets():
  image = np.eye(6, dtype=np.float32).reshape(6, 6, 1, 1)
  target = np.eye(6, dtype=np.float32)
  mixed, mixed_target = augment.mixup(jax.random.key(0), image, target, 1.0)
  np.testing.assert_allclose(mixed[:, :, 0, 0], mixed_target, rtol=1e-6)
  np.testing.assert_allclose(mixed_target.sum(1), 1, rtol=1e-6)
  # An example keeps at least half of itself.
  assert (np.diagonal(mixed_target) >= 0.5).all()
  assert (np.diagonal(mixed_target) < 1).any()
  off = augment.mixup(jax.random.key(0), image, target, 0.0)
  np.testing.assert_array_equal(off[0], image)
  np.testing.assert_array_equal(off[1], target)


def test_affine_moves_an_image_by_its_draw():
  image = np.zeros((5, 5, 1), np.float32)
  image[2, 2] = 1
  moved = augment._turned(image, jnp.array([1.0, -1.0]), 0.0, 0.0)
  assert np.argmax(moved) == 3 * 5 + 1
  corner = np.zeros((5, 5, 1), np.float32)
  corner[0, 0] = 1
  turned = augment._turned(corner, jnp.zeros(2), jnp.pi / 2, 0.0)
  np.testing.assert_allclose(
      turned[..., 0], np.rot90(corner[..., 0], -1), atol=1e-5
  )


@pytest.mark.slow
@pytest.mark.parametrize('is_rematerialized', [False, True])
@pytest.mark.parametrize('has_cls_token', [False, True])
def test_a_scan_over_the_blocks_is_the_loop(has_cls_token, is_rematerialized):
  graphdef, params = make(has_cls_token)
  scanned = vit.ViT(
      (6, 4, 2),
      num_classes=5,
      has_cls_token=has_cls_token,
      is_scanned=True,
      is_rematerialized=is_rematerialized,
      rngs=nnx.Rngs(0),
      **SMALL,
  )

  def stack(params):
    blocks = [params[f'block_{i}'] for i in range(SMALL['depth'])]
    others = {k: x for k, x in params.items() if not k.startswith('block_')}
    return others | {'blocks': jax.tree.map(lambda *x: np.stack(x), *blocks)}

  loss_fn = lambda model: jnp.square(model(images())).sum()
  _weights.check_scan(graphdef, nnx.graphdef(scanned), params, stack, loss_fn)


@pytest.mark.slow
def test_scanned_blocks_start_apart_and_spread_as_in_the_loop():
  make_params = lambda is_scanned: nnx.to_pure_dict(
      nnx.state(
          vit.ViT(
              (6, 4, 2),
              5,
              width=64,
              depth=3,
              patch_size=2,
              is_scanned=is_scanned,
              rngs=nnx.Rngs(3),
          ),
          nnx.Param,
      )
  )
  loop, scanned = make_params(False), make_params(True)
  kernel = np.asarray(scanned['blocks']['mlp']['dense_in']['kernel'])
  expected = np.asarray(loop['block_1']['mlp']['dense_in']['kernel'])
  assert kernel.shape == (3, *expected.shape)
  np.testing.assert_allclose(
      kernel.std((1, 2)), np.full(3, expected.std()), rtol=0.03
  )
  correlation = np.corrcoef(kernel.reshape(3, -1)) - np.eye(3)
  assert np.abs(correlation).max() < 0.05


@pytest.mark.slow
def test_bfloat16_computes_near_float32_on_float32_parameters():
  graphdef, params = make()
  narrow = vit.ViT((6, 4, 2), 5, dtype='bfloat16', rngs=nnx.Rngs(0), **SMALL)
  logits = nnx.merge(nnx.graphdef(narrow), params)(images())
  assert logits.dtype == jnp.float32
  expected = vit_by_hand(params, images())
  error = np.abs(np.asarray(logits, np.float32) - expected).max()
  assert 1e-6 < error < 0.05 * np.abs(expected).max()
