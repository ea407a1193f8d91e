"""Fashion-MNIST: 70,000 grey images of clothes, and corruptions of them.

```
sizes = dict(train=1000, held_out=1000, test=2000)
splits = fashion.splits('/usr/share/datasets/fashion-mnist', sizes, seed=0)
splits.train[np.arange(8)]['image'].shape  # (8, 28, 28, 1)
splits.shifts['blur']
```

The files are those of the Debian package `dataset-fashion-mnist`, of which this
is the folder, or of the authors; TFDS has the set as `fashion_mnist`.
"""

from collections.abc import Mapping
import gzip
import pathlib
from typing import Any
import zlib

import numpy as np

from jaxsoup.data import imagenet
from jaxsoup.data import shifts
from jaxsoup.data import sources
from jaxsoup.data import tfds
from jaxsoup.data.digits import Dataset
from jaxsoup.typing import PathLike

Folder = PathLike | None

FOLDER = '/usr/share/datasets/fashion-mnist'
CLASSES = (
    'T-shirt/top',
    'Trouser',
    'Pullover',
    'Dress',
    'Coat',
    'Sandal',
    'Shirt',
    'Sneaker',
    'Bag',
    'Ankle boot',
)
# A small convolutional network that 6,000 clean images take to 86 or 87 % loses
# between 7 and 28 points to each of these, 17 or 18 to the median one.
SEVERITIES = dict(
    noise=0.2,
    impulse=0.1,
    blur=2.0,
    contrast=0.6,
    fog=0.5,
    occlusion=0.4,
    rotation=15.0,
    translation=2.5,
    shear=0.3,
    shrink=0.2,
)

# By split, how its files begin and how many examples it has.
_PARTS = {'train': ('train', 60_000), 'test': ('t10k', 10_000)}
# Type and dimensions of what the file has: bytes, of 1 or 3.
_MAGIC = {1: 2049, 3: 2051}


def splits(
    folder: Folder,
    sizes: Mapping[str, int],
    seed: int,
    *,
    severities: Mapping[str, float] | None = None,
) -> sources.Splits:
  """Draws disjoint sets, and corrupts the one that reports.

  Args:
    folder: where the four idx files are, compressed by gzip or not; None takes
      the set from TFDS, where `tfds build fashion_mnist` has made it.
    sizes: numbers of examples of `train`, `held_out` and, if a common start is
      trained, `pretrain`, all from the 60,000 of the training split; of `test`
      from the 10,000 others.
    seed: decides what is drawn, and the corruptions.
    severities: by the names of `shifts.SHIFTS`, those that are made; 0 leaves
      one out; `SEVERITIES` if None.

  Returns:
    Everything in memory.

  Raises:
    FileNotFoundError: a file is missing; the message says how to get it.
    ValueError: the content of a file does not fit its name; sizes ask for more
      examples than there are; an unknown shift or set.

  Source: Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for
  Benchmarking Machine Learning Algorithms", 2017.
  """
  drawn = _drawn(folder, sizes, seed)
  severities = SEVERITIES if severities is None else severities
  shifted = {
      name: sources.Arrays(
          shifts.apply(drawn['test'], name, severity, seed=seed)
      )
      for name, severity in severities.items()
      if severity
  }
  arrays: dict[str, Any] = {k: sources.Arrays(x) for k, x in drawn.items()}
  return sources.Splits(
      **arrays,
      shifts=shifted,
      originals=dict.fromkeys(shifted, arrays['test']),
      labels=CLASSES,
  )


def _drawn(
    folder: Folder, sizes: Mapping[str, int], seed: int
) -> dict[str, Dataset]:
  known = {'train', 'held_out', 'pretrain', 'test'}
  if not {'train', 'held_out', 'test'} <= sizes.keys() <= known:
    raise ValueError(
        f'sizes has the keys {sorted(sizes)}: expected train, held_out, test, '
        'and optionally pretrain.'
    )
  drawn = {}
  for part, (_, num_examples) in _PARTS.items():
    of_part = {
        k: n for k, n in sizes.items() if (k == 'test') == (part == 'test')
    }
    # The name keeps the streams of the two splits apart.
    own_seed = [seed, *part.encode()]
    rows_of = sources.disjoint(
        num_examples, of_part, own_seed, f'{part} images'
    )
    data = _read(folder, part)
    for name, rows in rows_of.items():
      drawn[name] = {
          'image': data['image'][rows].astype(np.float32) / 255,
          'label': data['label'][rows].astype(np.int32),
      }
  return drawn


def _read(folder: Folder, part: str) -> Dataset:
  """`image`, uint8 [N, 28, 28, 1], and `label`, integers [N]."""
  if folder is None:
    source = tfds.source('fashion_mnist', part, _example)
    return sources.in_memory(source).arrays
  prefix, num_examples = _PARTS[part]
  folder = pathlib.Path(folder)
  image = _read_idx(folder / f'{prefix}-images-idx3-ubyte', (28, 28))
  label = _read_idx(folder / f'{prefix}-labels-idx1-ubyte', ())
  if not len(image) == len(label) == num_examples:
    raise ValueError(
        f'{folder} has {len(image)} images and {len(label)} labels of the '
        f'{part} split, which has {num_examples}: download the files again.'
    )
  return {'image': image[..., None], 'label': label}


def _example(record: dict[str, Any], rng: Any) -> dict[str, Any]:
  del rng
  image = np.asarray(imagenet.decoded(record['image']))[..., :1]
  return {'image': image, 'label': record['label']}


def _read_idx(path: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray:
  """An array of bytes [N, *shape]: its kind and sizes, then its numbers."""
  zipped = path.with_name(f'{path.name}.gz')
  if zipped.exists():
    path = zipped
    try:
      content = gzip.decompress(zipped.read_bytes())
    except (EOFError, OSError, zlib.error) as e:
      raise ValueError(f'{path} is damaged: {e}. Download it again.') from e
  elif path.exists():
    content = path.read_bytes()
  else:
    raise FileNotFoundError(
        f'{path.parent} has no {path.name} and no {zipped.name}: install them '
        'with `apt-get install dataset-fashion-mnist` and pass '
        f'{FOLDER}; or run `tfds build fashion_mnist`, and pass None.'
    )
  num_dims = 1 + len(shape)
  start = 4 * (1 + num_dims)
  header = np.frombuffer(content[:start], '>i4').tolist()
  expected = [_MAGIC[num_dims], *header[1:2], *shape]
  if header != expected or len(content) != start + np.prod(header[1:]):
    raise ValueError(
        f'{path} starts with {header} and has {len(content)} bytes: it is not '
        f'an idx file of bytes [{", ".join(map(str, ("N", *shape)))}]. '
        'Download it again.'
    )
  return np.frombuffer(content, np.uint8, offset=start).reshape(header[1:])
