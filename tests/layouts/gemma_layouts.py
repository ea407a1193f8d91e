"""Checkpoints of Gemma: as its code saves them, and as they were released.

`gm.ckpts.save_params` writes the nested layout. Gemma converts to the flat and
the stacked one only when it loads them: here its own functions convert first.
"""

import pathlib

import _common
from gemma import gm
from gemma.gm.ckpts import _checkpoint
import jax
import jax.numpy as jnp

# Two layers, of two kinds of attention: the stacked layout has two stacks.
_CONFIG = gm.nn.config.TransformerConfig(
    num_embed=8,
    embed_dim=4,
    hidden_dim=4,
    num_heads=2,
    head_dim=2,
    num_kv_heads=1,
    final_logit_softcap=None,
    use_post_attn_norm=True,
    use_post_ffw_norm=True,
    use_qk_norm=True,
    sliding_window_size=4,
    attention_types=2
    * (
        gm.nn.AttentionType.LOCAL_SLIDING,
        gm.nn.AttentionType.GLOBAL,
    ),
)


def _params(seed: int):
  model = gm.nn.Transformer(config=_CONFIG, tokens='tokens')
  init = lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
  shapes = jax.eval_shape(init)['params']
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.bfloat16), shapes)
  return _common.fill(zeros, seed)


def _save(run: pathlib.Path, seed: int, as_layout) -> None:
  gm.ckpts.save_params(as_layout(_params(seed)), run, wait_until_finished=True)


def _restore(run: pathlib.Path):
  return gm.ckpts.load_params(run)


def _resume(run: pathlib.Path):
  """Into the parameters of a model. To donate them fails when stacked."""
  return gm.ckpts.load_params(run, params=_params(99), donate=False)


def _layout(as_layout):
  return _common.Layout(
      lambda run, seed: _save(run, seed, as_layout), _restore, _resume
  )


LAYOUTS = {
    'nested': _layout(lambda params: params),
    'flat': _layout(_checkpoint._nested_to_flat),
    'stacked': _layout(lambda p: _checkpoint._nested_to_stacked(p, 2)),
}

if __name__ == '__main__':
  _common.main(LAYOUTS)
