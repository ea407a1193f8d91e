"""The augmentations of a training step, by the names that runs give them.

```
batch, target = augmentation.apply(key, batch, hyper, settings, num_classes)
```

Images may be uint8; what comes back, and all augmentations, are in 0..1. A
strength of 0 is off. Only what a run of a group names is compiled.
"""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import optax

from jaxsoup.data import augment
from jaxsoup.data import preparation

# In the order in which they are applied: to inputs, then to pairs of examples
# and their targets.
INPUTS: dict[str, tuple[str, Callable[..., jax.Array]]] = {
    'crop': ('image', augment.crop),
    'flip': ('image', augment.flip),
    'affine': ('image', augment.affine),
    'rand': ('image', augment.rand),
    'noise': ('image', augment.noise),
    'token_dropout': ('input_ids', augment.token_dropout),
}
PAIRS = {'mixup': augment.mixup, 'cutmix': augment.cutmix}
ALL = (*INPUTS, *PAIRS)


def apply(
    key: jax.Array,
    batch: Mapping[str, jax.Array],
    hyper: Mapping[str, jax.Array],
    settings: Any,
    num_classes: int,
) -> tuple[dict[str, jax.Array], jax.Array]:
  """Augments a batch, and makes the targets of the loss.

  Args:
    key: jax key.
    batch: the inputs of a model, and `label` [B]; or `target` [B, C], the
      probabilities of a teacher, instead of it.
    hyper: scalars, perhaps traced: the strengths, and `label_smoothing`.
    settings: `steps.Settings`: the names of those that are applied, and more
      arguments of functions of `jaxsoup.data.augment`.
    num_classes: C.

  Returns:
    The batch, and targets [B, C] that sum to 1.
  """
  batch = dict(batch)
  if 'image' in batch:
    batch['image'] = preparation.in_unit_range(batch['image'])
  target = batch.pop('target', None)
  if target is None:
    target = jax.nn.one_hot(batch['label'], num_classes)
  target = optax.smooth_labels(target, hyper['label_smoothing'])
  for name, name_key in zip(ALL, jax.random.split(key, len(ALL))):
    if name not in settings.augmentations:
      continue
    more = settings.augmentation.get(name, {})
    if name in INPUTS:
      field, fn = INPUTS[name]
      batch[field] = fn(name_key, batch[field], hyper[name], **more)
    else:
      batch['image'], target = PAIRS[name](
          name_key, batch['image'], target, hyper[name], **more
      )
  return batch, target
