"""Checkpoints of Equinox: leaves one after another, without their names."""

import _common
import equinox as eqx
import jax


def _model(seed: int) -> eqx.nn.MLP:
  model = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
  return _common.fill(model, seed)


LAYOUTS = {
    'leaves': _common.Layout(
        lambda run, seed: eqx.tree_serialise_leaves(run, _model(seed)),
        lambda run: eqx.tree_deserialise_leaves(run, _model(99)),
    )
}

if __name__ == '__main__':
  _common.main(LAYOUTS)
