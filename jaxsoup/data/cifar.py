"""CIFAR-10 and CIFAR-100 in memory, CIFAR-10.1 and CIFAR-10-C as shifts.

```
splits = cifar.splits(100)                            # prepared by TFDS
splits = cifar.splits(10, folder='cifar-10-batches-bin')
splits = cifar.splits(10, shifts=['CIFAR-10.1', 'fog_3', 'snow_5'])
```

The sets of TFDS download themselves: `tfds build cifar100
--file_format=array_record`. A folder is that of the binary version,
`cifar-10-binary.tar.gz` or `cifar-100-binary.tar.gz`, unpacked.
"""

from collections.abc import Sequence
import pathlib
from typing import Any

import numpy as np

from jaxsoup.data import imagenet
from jaxsoup.data import sources
from jaxsoup.data import tfds
from jaxsoup.typing import PathLike

# Labels before the pixels of an image (the last one counts), and the files.
FILES: dict[int, dict[str, tuple[str, ...]]] = {
    10: {
        'train': tuple(f'data_batch_{i}.bin' for i in range(1, 6)),
        'test': ('test_batch.bin',),
    },
    100: {'train': ('train.bin',), 'test': ('test.bin',)},
}
NUM_LABELS = {10: 1, 100: 2}
NUM_BYTES = 3 * 32 * 32

# CIFAR-10-C: the fifteen types of its benchmark, and four extra ones.
CORRUPTIONS = (
    'gaussian_noise', 'shot_noise', 'impulse_noise', 'defocus_blur',
    'frosted_glass_blur', 'motion_blur', 'zoom_blur', 'snow', 'frost', 'fog',
    'brightness', 'contrast', 'elastic', 'pixelate', 'jpeg_compression',
    'gaussian_blur', 'saturate', 'spatter', 'speckle_noise',
)  # fmt: skip


def splits(
    num_classes: int,
    *,
    data_dir: PathLike | None = None,
    folder: PathLike | None = None,
    shifts: Sequence[str] = (),
    share: float = 0.1,
    seed: int = 0,
) -> sources.Splits:
  """CIFAR, its held-out set, and shifts of CIFAR-10.

  Args:
    num_classes: 10 or 100.
    data_dir: of TFDS; its default if None.
    folder: with the files of the binary version, for CIFAR itself; TFDS is
      read if None.
    shifts: 'CIFAR-10.1' (version 6), and types of CIFAR-10-C with a severity,
      such as 'fog_3'; all of TFDS.
    share: of each class of the training set that is held out.
    seed: of the choice.

  Returns:
    `image` float32 [N, 32, 32, 3] in 0..1 and `label` int32 [N], in memory.

  Raises:
    FileNotFoundError: a set is missing; the message says what to do.
    ValueError: there is no such number of classes or shift.
  """
  if num_classes not in FILES:
    raise ValueError(f'There is no CIFAR-{num_classes}: choose 10 or 100.')
  names = {name: _tfds_name(name, num_classes) for name in shifts}
  name = f'cifar{num_classes}'
  parts = {
      split: read(num_classes, split, folder)
      if folder is not None
      else _read_tfds(name, split, data_dir)
      for split in ('train', 'test')
  }
  held_out = sources.held_out_rows(parts['train'].arrays['label'], share, seed)
  return sources.Splits(
      train=sources.subset(parts['train'], held_out.rest),
      held_out=sources.subset(parts['train'], held_out.rows),
      test=parts['test'],
      shifts={
          shift: _read_tfds(name, 'test', data_dir)
          for shift, name in names.items()
      },
      rules={'held_out': held_out.rule},
  )


def read(num_classes: int, split: str, folder: PathLike) -> sources.Arrays:
  """Images and labels of the binary version.

  A record is the label (of CIFAR-100 the coarse label, then the fine one, which
  is used), then 1024 bytes of red, of green, of blue, row by row.

  Args:
    num_classes: 10 or 100.
    split: 'train' or 'test'.
    folder: with the files.

  Returns:
    `image` float32 [N, 32, 32, 3] in 0..1 and `label` int32 [N].

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a file is not a whole number of records, or has a wrong label.
  """
  num_labels = NUM_LABELS[num_classes]
  size = num_labels + NUM_BYTES
  parts = []
  for name in FILES[num_classes][split]:
    file = pathlib.Path(folder) / name
    if not file.is_file():
      raise FileNotFoundError(
          f'{file} does not exist: unpack cifar-{num_classes}-binary.tar.gz, '
          f'and pass the folder that holds {name}.'
      )
    data = np.fromfile(file, np.uint8)
    if not len(data) or len(data) % size:
      raise ValueError(
          f'{file} has {len(data)} bytes, which is not a multiple of {size}: '
          f'it is not the binary version of CIFAR-{num_classes}, or truncated.'
      )
    parts.append(data.reshape(-1, size))
  records = np.concatenate(parts)
  label = records[:, num_labels - 1].astype(np.int32)
  if label.max() >= num_classes:
    raise ValueError(
        f'{folder} has the label {label.max()}, but CIFAR-{num_classes} only '
        f'0 to {num_classes - 1}: pass the folder of CIFAR-{num_classes}.'
    )
  image = records[:, num_labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  return sources.Arrays({'image': _scaled(image), 'label': label})


def _tfds_name(shift: str, num_classes: int) -> str:
  kind, _, severity = shift.rpartition('_')
  is_corruption = kind in CORRUPTIONS and severity in tuple('12345')
  if num_classes != 10 or not (is_corruption or shift == 'CIFAR-10.1'):
    raise ValueError(
        f'CIFAR-{num_classes} has no shift {shift!r}: CIFAR-10 has CIFAR-10.1 '
        f'and one of {CORRUPTIONS} with _1 to _5; CIFAR-100 has none.'
    )
  return f'cifar10_corrupted/{shift}' if is_corruption else 'cifar10_1/v6'


def _read_tfds(
    name: str, split: str, data_dir: PathLike | None
) -> sources.Arrays:
  source = tfds.source(name, split, _example, data_dir=data_dir)
  return sources.in_memory(source)


def _example(
    record: dict[str, Any], rng: np.random.Generator | None
) -> dict[str, Any]:
  del rng
  image = _scaled(np.asarray(imagenet.decoded(record['image'])))
  return {'image': image, 'label': np.int32(record['label'])}


def _scaled(image: np.ndarray) -> np.ndarray:
  return image.astype(np.float32) / 255
