"""The data of the experiments on ImageNet, real or mocked.

```
config.data = imagenet.data_config(size=224, is_mock=arg == 'runlocal')

def data(config):
  return imagenet.splits(config)
```
"""

import atexit
from collections.abc import Sequence
import functools
import tempfile

import ml_collections
import numpy as np

from jaxsoup.data import imagenet
from jaxsoup.data import mock
from jaxsoup.data import preparation
from jaxsoup.data import sources
from jaxsoup.typing import Json

# 2 % of the training set are held out.
SIZES = dict(train=1_255_544, held_out=25_623, test=50_000)
MOCK_SIZES = dict(train=64, held_out=16, test=40)


def data_config(
    size: int,
    *,
    mean: Sequence[float] = preparation.IMAGENET_MEAN,
    std: Sequence[float] = preparation.IMAGENET_STD,
    crop: float = 0.875,
    is_mock: bool = False,
) -> Json:
  """What `config.data` holds.

  Args:
    size: of the images.
    mean: of the pixels that the model was pre-trained on, of each channel.
    std: of them, as well.
    crop: share of the shorter side that an evaluation sees.
    is_mock: whether to use random images instead of ImageNet's.

  Returns:
    `pixels`; `sizes`, which a plan counts with; and where the data lie: `path`,
    the folder of TFDS, empty for its default; `folders` of images in its place;
    `objectnet`, empty leaves that set out; `labels`, an .npy file of those of
    the training set, of each class of which a share is then held out.
  """
  return dict(
      is_mock=is_mock,
      pixels=dict(size=size, mean=tuple(mean), std=tuple(std), crop=crop),
      sizes=MOCK_SIZES if is_mock else SIZES,
      path='',
      folders=dict.fromkeys(('train', 'validation', *imagenet.NATURAL), ''),
      objectnet='',
      labels='',
      share=0.2 if is_mock else 0.02,
  )


def splits(config: ml_collections.ConfigDict) -> sources.Splits:
  """ImageNet with its held-out set, and the natural shifts of the paper.

  Args:
    config: the experiment, with `seed` and the `data` of `data_config`.

  Returns:
    See `jaxsoup.data.imagenet.splits`.
  """
  data = config.data
  folders = {name: path for name, path in data.folders.items() if path}
  return imagenet.splits(
      imagenet.Pixels(**data.pixels),
      data_dir=data.path or None,
      folders=_mocked(config.seed) if data.is_mock else folders,
      objectnet=data.objectnet or None,
      share=data.share,
      seed=config.seed,
      labels=np.load(data.labels) if data.labels else None,
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
  train = mock.folders(root.name, {'train': names}, num_images=10, seed=seed)
  return train | mock.folders(root.name, of_sets, num_images=5, seed=seed)
