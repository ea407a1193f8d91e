"""What the experiments on ImageNet share: settings, sweep and data.

```
config = imagenet.config(preparation.ImageSpec(224))
splits = imagenet.splits(config)
```
"""

import atexit
import functools
import os
import tempfile

import ml_collections
import numpy as np

from jaxsoup.data import imagenet
from jaxsoup.data import made_up
from jaxsoup.data import preparation
from jaxsoup.data import sources
from jaxsoup.experiments import defaults
from jaxsoup.experiments import random_search
from jaxsoup.typing import Json

# 2 % of the training set are held out.
SIZES = dict(train=1_255_544, held_out=25_623, test=50_000)
MOCK_SIZES = dict(train=64, held_out=16, test=40)
# A ViT for images of few pixels.
TINY = dict(width=16, depth=2, num_heads=2, mlp_width=32)


def config(
    image: preparation.ImageSpec, *, is_short: bool = False
) -> ml_collections.ConfigDict:
  """The settings of the paper's sweep of ViT-B/32; a config adds the model.

  Args:
    image: what the model was pre-trained on.
    is_short: three runs on random images instead of ImageNet's.

  Returns:
    A config with `image`, whose `data` hold `sizes`, which a plan counts with,
    and where the data lie: `path`, the folder of TFDS, empty for its default;
    `folders` of images in its place; `objectnet`, empty leaves that set out;
    `labels`, an .npy file of those of the training set, of each class of which
    a share is then held out; `num_workers`, the processes that read.
  """
  config = defaults.config()
  del config.num_splits, config.stability
  config.image = image._asdict()
  config.data = dict(
      is_mock=is_short,
      sizes=MOCK_SIZES if is_short else SIZES,
      path='',
      folders=dict.fromkeys(('train', 'validation', *imagenet.NATURAL), ''),
      objectnet='',
      labels='',
      share=0.2 if is_short else 0.02,
      num_workers=0 if is_short else os.cpu_count(),
  )
  config.finetune = defaults.training(
      num_epochs=10,
      batch_size=16 if is_short else 512,
      warmup=0.05,
      clip=1.0,
  )
  # One run at a time, on the whole mesh.
  config.is_sharded = True
  config.sweep = defaults.sweep(
      3 if is_short else 72,
      learning_rate=(1e-6, 1e-4),
      weight_decay=(8e-5, 0.5),
      num_epochs=(1, 2) if is_short else (4, 16),
      label_smoothing=(0.0, 0.25),
      mixup=(0.0, 0.9),
      rand=(0.0, 1.0),
  )
  config.learned = defaults.learned(
      num_epochs=2 if is_short else 5,
      batch_size=4 if is_short else 256,
      patience=3,
  )
  config.batch_size = 16 if is_short else 1024
  config.landscape.num_examples = 1000
  return config


def probe(is_short: bool, learning_rate: float) -> Json:
  """The linear probe before the fine-tuning, for `config.probe`."""
  return defaults.training(
      num_epochs=10,
      batch_size=16 if is_short else 1024,
      warmup=0.05,
      run=dict(learning_rate=learning_rate),
  )


def sweep(config: ml_collections.ConfigDict) -> list[Json]:
  """Draws the runs by random search, by `config.seed` and `sweep.draw`.

  RandAugment is on in 44 of 71 runs, as in the paper.
  """
  return random_search.runs(
      config.sweep,
      config.seed,
      log_uniform=['learning_rate', 'weight_decay'],
      uniform=['label_smoothing', 'mixup'],
      sometimes={'rand': 44 / 71},
      integer=['num_epochs'],
  )


def splits(config: ml_collections.ConfigDict) -> sources.Splits:
  """ImageNet with its held-out set, and the natural shifts of the paper.

  See `jaxsoup.data.imagenet.splits`.
  """
  data = config.data
  folders = {name: path for name, path in data.folders.items() if path}
  return imagenet.splits(
      preparation.ImageSpec(**config.image),
      data_dir=data.path or None,
      folders=_mocked(config.seed) if data.is_mock else folders,
      objectnet=data.objectnet or None,
      share=data.share,
      seed=config.seed,
      labels=np.load(data.labels) if data.labels else None,
      num_workers=data.num_workers,
  )


@functools.cache
def _mocked(seed: int) -> dict[str, str]:
  """Eight classes that all sets hold; gone when the process ends."""
  root = tempfile.TemporaryDirectory(prefix='jaxsoup-mock-')
  atexit.register(root.cleanup)
  ids = imagenet.wordnet_ids()
  both = sorted({*imagenet.R_CLASSES} & {*imagenet.A_CLASSES})[:8]
  names = [ids[label] for label in both]
  of_sets = dict.fromkeys(('validation', *imagenet.NATURAL), names)
  train = made_up.folders(root.name, {'train': names}, num_images=10, seed=seed)
  return train | made_up.folders(root.name, of_sets, num_images=5, seed=seed)
