"""ImageNet, and the shifted sets that report on a soup.

```
splits = imagenet.splits(
    preparation.ImageSpec(224), objectnet='objectnet-1.0'
)
logits = splits.views['ImageNet-R'](logits)   # [N, 1000] -> [N, 200]
```

Sets come from TFDS, or from folders with one folder a class. What has to be
downloaded by hand, after registration at image-net.org, goes to the folder
`downloads/manual` of TFDS's own:

*   `ILSVRC2012_img_train.tar`, `ILSVRC2012_img_val.tar`: ImageNet; the second
    one is also in ReaL and the multi-label set.

Then `tfds build imagenet2012 --file_format=array_record`, and likewise
`imagenet_v2`, `imagenet_r`, `imagenet_a`, `imagenet_sketch` (which download
themselves), `imagenet2012_real` and `imagenet2012_multilabel`. Writing needs
TensorFlow; reading these files does not.

ObjectNet is `objectnet-1.0.zip` of objectnet.dev, unpacked. Its licence forbids
training on it in any form, so it is among the sets that report.

The held-out set is taken out of the training set, 2 % by default. Where labels
are known it is a share of each class. Those of TFDS take one pass over the
files: `np.save('labels.npy', imagenet.train_labels())`. Without them it is one
run of consecutive records, which needs no pass: TFDS writes records in an
order that is a hash of their names, so that any run is a random sample, only
that the classes are not equally many.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
from importlib import resources
import io
import json
import math
import os
import pathlib
from typing import Any
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxsoup.data import preparation
from jaxsoup.data import sources
from jaxsoup.data import tfds
from jaxsoup.typing import PathLike

NUM_CLASSES = 1000
NUM_TRAIN = 1_281_167

# The classes that ImageNet-R and ImageNet-A hold, among the 1000.
# fmt: off
R_CLASSES = (
    1, 2, 4, 6, 8, 9, 11, 13, 22, 23, 26, 29, 31, 39, 47, 63, 71, 76, 79, 84,
    90, 94, 96, 97, 99, 100, 105, 107, 113, 122, 125, 130, 132, 144, 145, 147,
    148, 150, 151, 155, 160, 161, 162, 163, 171, 172, 178, 187, 195, 199, 203,
    207, 208, 219, 231, 232, 234, 235, 242, 245, 247, 250, 251, 254, 259, 260,
    263, 265, 267, 269, 276, 277, 281, 288, 289, 291, 292, 293, 296, 299, 301,
    308, 309, 310, 311, 314, 315, 319, 323, 327, 330, 334, 335, 337, 338, 340,
    341, 344, 347, 353, 355, 361, 362, 365, 366, 367, 368, 372, 388, 390, 393,
    397, 401, 407, 413, 414, 425, 428, 430, 435, 437, 441, 447, 448, 457, 462,
    463, 469, 470, 471, 472, 476, 483, 487, 515, 546, 555, 558, 570, 579, 583,
    587, 593, 594, 596, 609, 613, 617, 621, 629, 637, 657, 658, 701, 717, 724,
    763, 768, 774, 776, 779, 780, 787, 805, 812, 815, 820, 824, 833, 847, 852,
    866, 875, 883, 889, 895, 907, 928, 931, 932, 933, 934, 936, 937, 943, 945,
    947, 948, 949, 951, 953, 954, 957, 963, 965, 967, 980, 981, 983, 988,
)
A_CLASSES = (
    6, 11, 13, 15, 17, 22, 23, 27, 30, 37, 39, 42, 47, 50, 57, 70, 71, 76, 79,
    89, 90, 94, 96, 97, 99, 105, 107, 108, 110, 113, 124, 125, 130, 132, 143,
    144, 150, 151, 207, 234, 235, 254, 277, 283, 287, 291, 295, 298, 301, 306,
    307, 308, 309, 310, 311, 313, 314, 315, 317, 319, 323, 324, 326, 327, 330,
    334, 335, 336, 347, 361, 363, 372, 378, 386, 397, 400, 401, 402, 404, 407,
    411, 416, 417, 420, 425, 428, 430, 437, 438, 445, 456, 457, 461, 462, 470,
    472, 483, 486, 488, 492, 496, 514, 516, 528, 530, 539, 542, 543, 549, 552,
    557, 561, 562, 569, 572, 573, 575, 579, 589, 606, 607, 609, 614, 626, 627,
    640, 641, 642, 643, 658, 668, 677, 682, 684, 687, 701, 704, 719, 736, 746,
    749, 752, 758, 763, 765, 768, 773, 774, 776, 779, 780, 786, 792, 797, 802,
    803, 804, 813, 815, 820, 823, 831, 833, 835, 839, 845, 847, 850, 859, 862,
    870, 879, 880, 888, 890, 897, 900, 907, 913, 924, 932, 933, 934, 937, 943,
    945, 947, 951, 954, 956, 957, 959, 971, 972, 980, 981, 984, 986, 987, 988,
)
# fmt: on


def evaluated(image: Any, spec: preparation.ImageSpec) -> npt.NDArray[np.uint8]:
  """The middle of an image, the shorter side resized to `size / crop`.

  Args:
    image: [H, W, C] uint8, the bytes or the path of a file, or a PIL image.
    spec: of the result.

  Returns:
    [height, width, 3] uint8; the same pixels as of torchvision's `Resize` and
    `CenterCrop`.
  """
  image = decoded(image)
  sides = spec.shape[1::-1]
  least = [math.floor(side / spec.crop) for side in sides]
  # The side that has to grow the most becomes what it must be at least.
  new, old = max(zip(least, image.size), key=lambda pair: pair[0] / pair[1])
  shape = [max(low, x * new // old) for low, x in zip(least, image.size)]
  image = image.resize(tuple(shape), _filter(spec))
  left, top = (round((x - side) / 2) for x, side in zip(shape, sides))
  return np.asarray(image.crop((left, top, left + sides[0], top + sides[1])))


def trained(
    image: Any,
    spec: preparation.ImageSpec,
    rng: np.random.Generator,
    *,
    min_area: float = 0.08,
) -> npt.NDArray[np.uint8]:
  """A random part of an image at a random aspect ratio, half of them flipped.

  The share of the area is uniform in `min_area`..1, the logarithm of the ratio
  in 3/4..4/3.

  Args:
    image: see `evaluated`.
    spec: of the result.
    rng: numpy generator.
    min_area: smallest share of the area that is shown.

  Returns:
    [height, width, 3] uint8.

  Source: Szegedy et al., "Going deeper with convolutions", CVPR 2015.
  """
  from PIL import Image

  image = decoded(image)
  box = _random_box(image.size, min_area, rng)
  image = image.resize(spec.shape[1::-1], _filter(spec), box=box)
  if rng.random() < 0.5:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return np.asarray(image)


def _filter(spec: preparation.ImageSpec) -> Any:
  from PIL import Image

  return Image.Resampling[spec.interpolation.upper()]


def decoded(image: Any) -> Any:
  """A PIL image in RGB of an array, a file, the bytes of one, or an image."""
  from PIL import Image

  if isinstance(image, np.ndarray):
    # Grey images of TFDS have one channel.
    image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
  elif isinstance(image, bytes):
    image = Image.open(io.BytesIO(image))
  elif isinstance(image, str | os.PathLike):
    with open(image, 'rb') as file:
      image = Image.open(file).convert('RGB')
  return image.convert('RGB')


def _random_box(
    shape: tuple[int, int], min_area: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
  width, height = shape
  limit = math.log(4 / 3)
  for _ in range(10):
    area = width * height * rng.uniform(min_area, 1)
    ratio = math.exp(rng.uniform(-limit, limit))
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      left = int(rng.integers(0, width - w + 1))
      top = int(rng.integers(0, height - h + 1))
      return left, top, left + w, top + h
  # A narrow image: the largest middle part within the ratios.
  w = min(width, round(height * 4 / 3))
  h = min(height, round(width * 4 / 3))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


class Shift(NamedTuple):
  """A set that reports.

  Attributes:
    name: of TFDS.
    split: of TFDS.
    label: its feature; a sequence if `is_several`.
    classes: its subset of the classes, in the order of its labels; None: all.
    is_several: whether an image may have several right labels, or none that is
      known: those are left out.
    flag: the feature that marks an image that is left out.
    unclear: the feature with classes that count as right as well.
  """

  name: str
  split: str = 'test'
  label: str = 'label'
  classes: tuple[int, ...] | None = None
  is_several: bool = False
  flag: str | None = None
  unclear: str | None = None


SHIFTS = {
    'ImageNet-V2': Shift('imagenet_v2/matched-frequency'),
    'ImageNet-R': Shift('imagenet_r', classes=R_CLASSES),
    'ImageNet-Sketch': Shift('imagenet_sketch'),
    'ImageNet-A': Shift('imagenet_a', classes=A_CLASSES),
    'ReaL': Shift(
        'imagenet2012_real', 'validation', 'real_label', is_several=True
    ),
    'multi-label': Shift(
        'imagenet2012_multilabel',
        'validation',
        'correct_multi_labels',
        is_several=True,
        flag='is_problematic',
        # Its authors recommend to be lenient where the experts disagreed. They
        # also average over classes; the mean here is over images.
        unclear='unclear_multi_labels',
    ),
}
# Those of the paper's main table; ObjectNet is the fifth.
NATURAL = ('ImageNet-V2', 'ImageNet-R', 'ImageNet-Sketch', 'ImageNet-A')


def splits(
    spec: preparation.ImageSpec,
    *,
    data_dir: PathLike | None = None,
    folders: Mapping[str, PathLike] | None = None,
    objectnet: PathLike | None = None,
    shifts: Sequence[str] = NATURAL,
    share: float = 0.02,
    seed: int = 0,
    labels: np.ndarray | None = None,
    min_area: float = 0.08,
    num_workers: int = 0,
) -> sources.Splits:
  """ImageNet and its shifts.

  Args:
    spec: of the images; they come as uint8.
    data_dir: of TFDS; its default if None.
    folders: for 'train', 'validation' and names of shifts, folders with one
      folder a class (by its WordNet id such as n01440764, or its number), to
      be read in place of TFDS.
    objectnet: the unpacked folder of ObjectNet, with `images` and `mappings`;
      no ObjectNet if None.
    shifts: keys of `SHIFTS`.
    share: of the training set that is held out.
    seed: of what is held out.
    labels: int [N] of the training set in the order of TFDS's records, see
      `train_labels`: a share of each class is held out. Folders need none.
    min_area: see `trained`.
    num_workers: see `sources.Examples`.

  Returns:
    `train`, with random crops and flips; `held_out`, of the training set;
    `test`, the official validation set; the shifts, their views, and the rule
    of the held-out set. Labels are int32, or bool [1000] where several may be
    right.

  Raises:
    FileNotFoundError: a set is missing; the message says what to do.
    ValueError: no shift has such a name, or a folder has too many classes.
  """
  folders = dict(folders or {})
  for known, names in (
      ({*SHIFTS}, shifts),
      ({'train', 'validation', *SHIFTS}, folders),
  ):
    if unknown := sorted({*names} - known):
      raise ValueError(f'No set {unknown[0]!r}: choose from {sorted(known)}.')
  options = dict(data_dir=data_dir, num_workers=num_workers)
  train, held_out, rule = _train(
      spec, min_area, folders.get('train'), share, seed, labels, options
  )
  validation = Shift('imagenet2012', 'validation')
  test = _shift(spec, validation, folders.get('validation'), options)
  sets = {
      name: _shift(spec, SHIFTS[name], folders.get(name), options)
      for name in shifts
  }
  views: dict[str, Callable[..., Any]] = {
      name: functools.partial(_largest, groups=np.array(classes)[:, None])
      for name in shifts
      if (classes := SHIFTS[name].classes) is not None
  }
  if objectnet is not None:
    sets['ObjectNet'], views['ObjectNet'] = read_objectnet(
        objectnet, spec, num_workers=num_workers
    )
  return sources.Splits(
      train=train,
      held_out=held_out,
      test=test,
      shifts=sets,
      views=views,
      rules={'held_out': rule},
  )


def train_labels(data_dir: PathLike | None = None) -> np.ndarray:
  """Labels of TFDS's training set by row, int32; one pass over its files."""
  records = tfds.features('imagenet2012', 'train', ['label'], data_dir=data_dir)
  return np.fromiter((record['label'] for record in records), np.int32)


@functools.cache
def wordnet_ids() -> tuple[str, ...]:
  """The WordNet ids of the 1000 classes by label; TFDS ships them."""
  root = resources.files('tensorflow_datasets')
  file = root / 'datasets' / 'imagenet2012' / 'labels.txt'
  return tuple(file.read_text().split())


def _train(
    spec: preparation.ImageSpec,
    min_area: float,
    folder: PathLike | None,
    share: float,
    seed: int,
    labels: np.ndarray | None,
    options: dict[str, Any],
) -> tuple[Any, Any, dict[str, Any]]:
  """Training set, held-out set and its rule."""
  label_fn = functools.partial(_label, shift=Shift('imagenet2012', 'train'))
  held_out_fn = functools.partial(_example, spec, label_fn)
  train_fn = functools.partial(held_out_fn, min_area=min_area)
  read = lambda split, fn: tfds.source(
      'imagenet2012', split, fn, label_fn=label_fn, **options
  )
  both: list[Any]
  if folder is not None:
    files = _folder(folder, train_fn, None, options['num_workers'])
    both, labels = [files, files.remade(held_out_fn)], files.labels
  elif labels is None:
    rest, rule = _consecutive(share, seed)
    return read(rest, train_fn), read(rule['split'], held_out_fn), rule
  else:
    both = [read('train', fn) for fn in (train_fn, held_out_fn)]
  if len(labels) != len(both[0]):
    raise ValueError(
        f'There are {len(labels)} labels for {len(both[0])} training images: '
        'compute them again with `train_labels`.'
    )
  held_out = sources.held_out_rows(labels, share, seed)
  return (
      sources.subset(both[0], held_out.rest),
      sources.subset(both[1], held_out.rows),
      held_out.rule,
  )


def _consecutive(share: float, seed: int) -> tuple[str, dict[str, Any]]:
  """What stays of the training set, and the rule of what is held out."""
  count = round(share * NUM_TRAIN)
  if not 0 < count < NUM_TRAIN - 1:
    raise ValueError(f'share is {share}: expected a number between 0 and 1.')
  # TFDS rejects empty slices: something is left on either side.
  first = int(np.random.default_rng(seed).integers(1, NUM_TRAIN - count))
  rest = f'train[:{first}]+train[{first + count}:]'
  rule = {
      'rule': 'consecutive records',
      'share': share,
      'seed': seed,
      'count': count,
      'total': NUM_TRAIN,
      'split': f'train[{first}:{first + count}]',
  }
  return rest, rule


def _shift(
    spec: preparation.ImageSpec,
    shift: Shift,
    folder: PathLike | None,
    options: dict[str, Any],
) -> Any:
  label_fn = functools.partial(_label, shift=shift)
  example_fn = functools.partial(_example, spec, label_fn)
  if folder is not None:
    if shift.is_several:
      raise ValueError(
          f'A folder has one label per image, but {shift.name} has several: '
          'read it from TFDS.'
      )
    # Folders count their own classes.
    label_fn = functools.partial(_label, shift=Shift(shift.name))
    own_fn = functools.partial(_example, spec, label_fn)
    return _folder(folder, own_fn, shift.classes, options['num_workers'])
  source = tfds.source(
      shift.name, shift.split, example_fn, label_fn=label_fn, **options
  )
  if not shift.is_several:
    return source
  features = [shift.label, *([shift.flag] if shift.flag else [])]
  records = tfds.features(
      shift.name, shift.split, features, data_dir=options['data_dir']
  )
  is_counted = [
      len(r[shift.label]) > 0 and not (shift.flag and r[shift.flag])
      for r in records
  ]
  return sources.subset(source, np.flatnonzero(is_counted))


def _folder(
    path: PathLike,
    example_fn: sources.ExampleFn,
    classes: tuple[int, ...] | None,
    num_workers: int,
) -> sources.Folder:
  """A folder whose class folders are WordNet ids, or numbers of classes."""
  root = pathlib.Path(path)
  numbers = range(NUM_CLASSES) if classes is None else classes
  is_numbered = (root / str(numbers[0])).is_dir()
  names = [str(i) if is_numbered else wordnet_ids()[i] for i in numbers]
  return sources.Folder(
      root, example_fn, classes=names, num_workers=num_workers
  )


def _example(
    spec: preparation.ImageSpec,
    label_fn: Callable[..., Any],
    record: Mapping[str, Any],
    rng: np.random.Generator | None,
    min_area: float | None = None,
) -> dict[str, Any]:
  """Without `min_area` of an evaluation, also where batches are shuffled."""
  if rng is None or min_area is None:
    image = evaluated(record['image'], spec)
  else:
    image = trained(record['image'], spec, rng, min_area=min_area)
  return {'image': image, 'label': label_fn(record)}


def _label(record: Mapping[str, Any], shift: Shift) -> Any:
  label = record[shift.label]
  if shift.is_several:
    is_right = np.zeros(NUM_CLASSES, bool)
    is_right[np.asarray(label, int)] = True
    if shift.unclear is not None:
      is_right[np.asarray(record[shift.unclear], int)] = True
    return is_right
  if shift.classes is not None:
    return np.int32(shift.classes.index(int(label)))
  return np.int32(label)


def _largest(logits: Any, groups: np.ndarray) -> Any:
  """The largest logit of each group; groups are [num_groups, M] classes."""
  return logits[..., groups].max(-1)


def read_objectnet(
    path: PathLike,
    spec: preparation.ImageSpec,
    *,
    num_workers: int = 0,
) -> tuple[sources.Source, sources.ExampleFn]:
  """The 113 classes of ObjectNet that ImageNet also has.

  logit of a class = max over the ImageNet classes that its files map to it

  The red border, two pixels wide, which tells that an image must not be trained
  on, is cut away.

  Args:
    path: of the unpacked folder, with `images` and `mappings`.
    spec: of the images; they come as uint8.
    num_workers: see `sources.Examples`.

  Returns:
    The examples, with labels by the sorted names of the 113 folders, and the
    view of logits [N, 1000] -> [N, 113].

  Raises:
    FileNotFoundError: a mapping file or the images are not there.

  Source: Barbu et al., "ObjectNet: a large-scale bias-controlled dataset for
  pushing the limits of object recognition models", NeurIPS 2019.
  """
  root = pathlib.Path(path)
  classes = _objectnet_classes(root / 'mappings')

  def example_fn(record, rng):
    del rng
    image = decoded(record['image'])
    width, height = image.size
    image = image.crop((2, 2, width - 2, height - 2))
    label = np.int32(record['label'])
    return {'image': evaluated(image, spec), 'label': label}

  # Folders that have no class of ImageNet come last, and are left out.
  others = {f.name for f in (root / 'images').glob('*') if f.is_dir()}
  names = [*classes, *sorted(others - set(classes))]
  folder = sources.Folder(
      root / 'images', example_fn, classes=names, num_workers=num_workers
  )
  source = sources.subset(folder, np.flatnonzero(folder.labels < len(classes)))
  longest = max(map(len, classes.values()))
  # A group is filled up with its own first class, which changes no maximum.
  groups = [ids + ids[:1] * (longest - len(ids)) for ids in classes.values()]
  return source, functools.partial(_largest, groups=np.array(groups))


def _objectnet_classes(mappings: pathlib.Path) -> dict[str, list[int]]:
  """ImageNet's labels by ObjectNet's folder, in the order of folder names."""

  def text_of(name):
    file = mappings / name
    if not file.is_file():
      raise FileNotFoundError(
          f'{file} does not exist: unpack objectnet-1.0.zip of objectnet.dev, '
          'and pass the folder that holds `images` and `mappings`.'
      )
    return file.read_text()

  names = json.loads(text_of('objectnet_to_imagenet_1k.json'))
  name_of_folder = json.loads(text_of('folder_to_objectnet_label.json'))
  # Lines are in the order of the challenge's own ids, ours in that of WordNet.
  id_of_label = json.loads(text_of('pytorch_to_imagenet_2012_id.json'))
  label_of_id = {int(i): int(label) for label, i in id_of_label.items()}
  lines = text_of('imagenet_to_label_2012_v2').splitlines()
  label_of_name = {line.strip(): label_of_id[i] for i, line in enumerate(lines)}
  return {
      folder: [label_of_name[x] for x in names[name].split('; ')]
      for folder, name in sorted(name_of_folder.items())
      if name in names
  }
