"""The augmentations of a training step, by the names that runs give them.

```
batch, target = augmentation.apply(key, batch, hyper, names, num_classes)
```

A strength of 0 is off. Only what a run of a group names is compiled.
"""

from collections.abc import Mapping
from collections.abc import Sequence

import jax
import optax

from jaxsoup.data import augment

# In the order in which they are applied: to the image, then to pairs of
# examples and their targets.
IMAGE = {
    'affine': augment.affine,
    'noise': augment.noise,
}
PAIRS = {
    'mixup': augment.mixup,
}
ALL = (*IMAGE, *PAIRS)


def apply(
    key: jax.Array,
    batch: Mapping[str, jax.Array],
    hyper: Mapping[str, jax.Array],
    names: Sequence[str],
    num_classes: int,
) -> tuple[dict[str, jax.Array], jax.Array]:
  """Augments a batch, and makes what the logits are compared with.

  Args:
    key: jax key.
    batch: the inputs of a model, and `label` [B].
    hyper: scalars, perhaps traced: the strengths, and `label_smoothing`.
    names: those of `ALL` that are applied.
    num_classes: C.

  Returns:
    The batch, and targets [B, C] that sum to 1.
  """
  batch = dict(batch)
  target = jax.nn.one_hot(batch['label'], num_classes)
  target = optax.smooth_labels(target, hyper['label_smoothing'])
  for name, name_key in zip(ALL, jax.random.split(key, len(ALL))):
    if name not in names:
      continue
    if name in IMAGE:
      batch['image'] = IMAGE[name](name_key, batch['image'], hyper[name])
    else:
      batch['image'], target = PAIRS[name](
          name_key, batch['image'], target, hyper[name]
      )
  return batch, target
