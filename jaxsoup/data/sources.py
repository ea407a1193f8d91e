"""Examples by row, and batches of them.

```
train = sources.Arrays({'image': image, 'label': label})     # in memory
train = sources.Folder('train', example_fn)                  # train/CLASS/*.jpg

for batch in sources.batches(train, 256, seed=0, epoch=3, start=17):
  ...
```

A source is read by rows, so that a shuffle is a permutation: batches depend on
`seed` and `epoch` alone, training resumes at any step, and each process reads
its own rows of a batch.
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent import futures
import copy
import hashlib
import os
import pathlib
from typing import Any
from typing import NamedTuple
from typing import Protocol

import numpy as np

from jaxsoup.typing import PathLike

Batch = dict[str, np.ndarray]
# One record, and a generator where it is trained on (None: evaluation).
ExampleFn = Callable[[Any, np.random.Generator | None], Mapping[str, Any]]

IMAGE_SUFFIXES = ('.jpeg', '.jpg', '.png', '.webp', '.bmp')
_END: Any = object()


class Source(Protocol):
  """Examples by row.

  With an attribute `arrays` they are all in memory. With the methods `batches`
  and `only` they come in the order of files, as a `tfds.Stream` does.
  """

  def __len__(self) -> int:
    ...

  def __getitem__(self, rows: np.ndarray, /) -> Batch:
    """Arrays `[len(rows), ...]` of these rows."""
    ...


class Records(Protocol):
  """What examples are made from: one record for an index."""

  def __len__(self) -> int:
    ...

  def __getitem__(self, row: int, /) -> Any:
    ...


class Splits(NamedTuple):
  """The data of an experiment.

  Attributes:
    train: what models are trained on.
    held_out: what chooses ingredients.
    test: what reports.
    shifts: further sets that report, by name.
    pretrain: what the common start is trained on, if it is trained here.
    views: by name of a set with its own classes, logits [N, C] ->
      logits over those classes.
    rules: how sets were chosen, JSON values by the set's name.
    pools: by name of a set that the seed draws, the number of examples that it
      is drawn from; infinity if no seed ever draws an example again. Those of
      other sets are the same for all seeds.
  """

  train: Source
  held_out: Source
  test: Source
  shifts: Mapping[str, Source] = {}
  pretrain: Source | None = None
  views: Mapping[str, Callable[..., Any]] = {}
  rules: Mapping[str, Mapping[str, Any]] = {}
  pools: Mapping[str, float] = {}


class Arrays:
  """Examples in memory.

  Args:
    arrays: by name, `[N, ...]` with one N.

  Raises:
    ValueError: no arrays, or of different lengths.

  Example:
    >>> Arrays({'label': np.arange(5)})[np.array([3, 1])]
    {'label': array([3, 1])}
  """

  def __init__(self, arrays: Mapping[str, np.ndarray]):
    self.arrays = dict(arrays)
    lengths = {name: len(x) for name, x in self.arrays.items()}
    if len(set(lengths.values())) != 1:
      raise ValueError(
          f'The arrays have lengths {lengths}: expected at least one array, '
          'and the same length for all.'
      )

  def __len__(self) -> int:
    return len(next(iter(self.arrays.values())))

  def __getitem__(self, rows: np.ndarray) -> Batch:
    return {name: x[rows] for name, x in self.arrays.items()}


class Examples:
  """Examples made from records when they are read, in threads.

  Args:
    records: one for an index, such as a list or a data source of TFDS.
    example_fn: `(record, rng) -> {name: array}`, of the same shapes for all.
      `rng` is None in an evaluation; in a training its draws depend on the
      seed, the epoch and the row alone.
    num_threads: threads that read and decode; all of the machine if None.

  Example:
    >>> source = Examples([3, 5], lambda record, rng: {'x': np.array(record)})
    >>> source[np.array([1, 0, 1])]
    {'x': array([5, 3, 5])}
  """

  def __init__(
      self,
      records: Records,
      example_fn: ExampleFn,
      *,
      num_threads: int | None = None,
  ):
    self.records = records
    self._example_fn = example_fn
    self._num_threads = num_threads or os.cpu_count()
    self._draw: tuple[int, int] | None = None

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, rows: np.ndarray) -> Batch:
    with futures.ThreadPoolExecutor(self._num_threads) as pool:
      return stacked(list(pool.map(self._example, np.asarray(rows).tolist())))

  def drawn(self, seed: int, epoch: int) -> 'Examples':
    """The same examples with the random augmentation of one epoch."""
    source = copy.copy(self)
    source._draw = seed, epoch
    return source

  def _example(self, row: int) -> Mapping[str, Any]:
    return self._example_fn(self.records[row], generator(self._draw, row))


class Folder(Examples):
  """A folder of images with one folder for each class.

  Records are `{'image': path, 'label': int}`, in the order of their names.

  Args:
    path: of the folder.
    example_fn: see `Examples`.
    classes: names of the class folders in the order of their labels; sorted
      names of all folders if None.
    num_threads: see `Examples`.

  Attributes:
    classes: see above.
    labels: int32 [N]; no file was opened for them.

  Raises:
    FileNotFoundError: there is no image.
    ValueError: there are folders that `classes` does not name.
  """

  def __init__(
      self,
      path: PathLike,
      example_fn: ExampleFn,
      *,
      classes: Sequence[str] | None = None,
      num_threads: int | None = None,
  ):
    root = pathlib.Path(path)
    files = [
        (folder.name, file.name)
        for folder in sorted(root.glob('*/'))
        for file in sorted(os.scandir(folder), key=lambda entry: entry.name)
        if file.name.lower().endswith(IMAGE_SUFFIXES)
    ]
    if not files:
      raise FileNotFoundError(
          f'No images in {root}: expected one folder per class, with files '
          f'that end in {", ".join(IMAGE_SUFFIXES)}.'
      )
    folders = sorted({name for name, _ in files})
    self.classes = list(folders if classes is None else classes)
    label = {name: i for i, name in enumerate(self.classes)}
    unknown = [name for name in folders if name not in label]
    if unknown:
      raise ValueError(
          f'{root} has the folders {unknown[:5]}, which are not among the '
          f'{len(self.classes)} classes: remove them, or add them to classes.'
      )
    self.labels = np.array([label[name] for name, _ in files], np.int32)
    records = _Files(root, files, self.labels)
    super().__init__(records, example_fn, num_threads=num_threads)


class _Files:
  """Records of a folder, each made on access: there may be a million."""

  def __init__(
      self, root: pathlib.Path, files: list[tuple[str, str]], labels: np.ndarray
  ):
    self._root, self._files, self._labels = root, files, labels

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, row: int) -> dict[str, Any]:
    folder, name = self._files[row]
    label = int(self._labels[row])
    return {'image': self._root / folder / name, 'label': label}


class Subset:
  """Some rows of a source; see `subset`."""

  def __init__(self, source: Source, rows: np.ndarray):
    self._source, self.rows = source, np.asarray(rows)

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, rows: np.ndarray) -> Batch:
    return self._source[self.rows[rows]]

  def drawn(self, seed: int, epoch: int) -> 'Subset':
    """The same rows with the random augmentation of one epoch."""
    return Subset(_drawn(self._source, seed, epoch), self.rows)


def subset(source: Any, rows: np.ndarray) -> Any:
  """Some rows of a source, in memory where the source is.

  Args:
    source: of examples.
    rows: int [M].

  Returns:
    A source of M examples.

  Example:
    >>> source = Arrays({'label': np.arange(5)})
    >>> subset(source, np.array([4, 2])).arrays
    {'label': array([4, 2])}
  """
  if hasattr(source, 'arrays'):
    return Arrays(source[rows])
  if hasattr(source, 'only'):
    return source.only(rows)
  return Subset(source, rows)


def in_memory(source: Source) -> Arrays:
  """All examples of a source, read once."""
  return Arrays(source[np.arange(len(source))])


def batches(
    source: Any,
    batch_size: int,
    *,
    seed: int | None = None,
    epoch: int = 0,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
  """Batches of one epoch, of one size; read ahead where not in memory.

  Args:
    source: of N examples.
    batch_size: of all processes together, B.
    seed: shuffles and augments, by itself and the epoch. None walks in order.
    epoch: which walk through the data it is.
    start: the first step; what is before it is not read.
    process_index: of this process.
    process_count: each gets B / process_count rows of every batch.

  Returns:
    With a seed N // B batches: the rest is dropped. Without one all examples,
    the last one repeated to fill the last batch; `mask`, bool, says which rows
    count.

  Raises:
    ValueError: a batch does not divide among the processes, or a training set
      does not fill one batch.

  Example:
    >>> source = Arrays({'label': np.arange(3)})
    >>> [(b['label'].tolist(), b['mask'].tolist()) for b in batches(source, 2)]
    [([0, 1], [True, True]), ([2, 2], [True, False])]
  """
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
        f'batch_size is {batch_size}, which cannot be divided among '
        f'{process_count} processes: use a multiple of {process_count}.'
    )
  if seed is not None and len(source) < batch_size:
    raise ValueError(
        f'{len(source)} examples do not fill a batch of {batch_size}: use '
        'smaller batches or more examples.'
    )
  num_own = batch_size // process_count
  own = slice(process_index * num_own, (process_index + 1) * num_own)
  if hasattr(source, 'batches'):
    reader = source.batches(batch_size, own, seed, epoch, start)
  else:
    reader = _random_access(source, batch_size, own, seed, epoch, start)
  return reader if hasattr(source, 'arrays') else prefetched(reader)


def _random_access(
    source: Any,
    batch_size: int,
    own: slice,
    seed: int | None,
    epoch: int,
    start: int,
) -> Iterator[Batch]:
  num = len(source)
  if seed is None:
    for first in range(start * batch_size, num, batch_size):
      rows = np.arange(first, first + batch_size)[own]
      yield {**source[rows.clip(max=num - 1)], 'mask': rows < num}
    return
  order = np.random.default_rng([seed, epoch]).permutation(num)
  source = _drawn(source, seed, epoch)
  for step in range(start, num // batch_size):
    yield source[order[step * batch_size :][:batch_size][own]]


def prefetched(items: Iterator[Any], num: int = 2) -> Iterator[Any]:
  """The same items, made by a thread that is `num` ahead.

  Example:
    >>> list(prefetched(iter('abc')))
    ['a', 'b', 'c']
  """
  with futures.ThreadPoolExecutor(1) as pool:
    ahead = deque(pool.submit(next, items, _END) for _ in range(num))
    while (item := ahead.popleft().result()) is not _END:
      ahead.append(pool.submit(next, items, _END))
      yield item


class HeldOut(NamedTuple):
  """Rows of `held_out`, the other ones, and the rule as JSON values."""

  rows: np.ndarray
  rest: np.ndarray
  rule: dict[str, Any]


def held_out_rows(
    labels: np.ndarray, share: float = 0.02, seed: int = 0
) -> HeldOut:
  """Takes a share of every class out of the training set.

  Args:
    labels: int [N].
    share: of each class, rounded; at least one example of each.
    seed: decides which.

  Returns:
    Rows held out, rows that stay (both ascending), and the rule: its name,
    `share`, `seed`, `count`, `total` and `sha256` of the held-out rows (as
    little-endian int64).

  Raises:
    ValueError: the share is not in (0, 1), or nothing of a class would stay.

  Example:
    >>> held_out_rows(np.repeat([0, 1], 50)).rule['count']
    2
  """
  if not 0 < share < 1:
    raise ValueError(f'share is {share}: expected a number between 0 and 1.')
  rng = np.random.default_rng(seed)
  chosen = []
  for label in np.unique(labels):
    members = np.flatnonzero(labels == label)
    num = max(1, round(share * len(members)))
    if num == len(members):
      raise ValueError(
          f'Class {label} has {len(members)} examples, and a share of {share} '
          f'holds out {num}: use a smaller share or more examples.'
      )
    chosen.append(rng.choice(members, num, replace=False))
  rows = np.sort(np.concatenate(chosen))
  rest = np.setdiff1d(np.arange(len(labels)), rows)
  rule = {
      'rule': 'per class',
      'share': share,
      'seed': seed,
      'count': len(rows),
      'total': len(labels),
      'sha256': hashlib.sha256(rows.astype('<i8').tobytes()).hexdigest(),
  }
  return HeldOut(rows, rest, rule)


def files_of(source: Any) -> list[pathlib.Path]:
  """The files of a folder or of a subset of one; none of other sources."""
  if isinstance(source, Subset):
    files = files_of(source._source)
    return [files[row] for row in source.rows] if files else []
  if not isinstance(source, Folder):
    return []
  return [source.records[row]['image'] for row in range(len(source))]


def _drawn(source: Any, seed: int, epoch: int) -> Any:
  return source.drawn(seed, epoch) if hasattr(source, 'drawn') else source


def generator(
    draw: tuple[int, int] | None, row: int
) -> np.random.Generator | None:
  """What augments a row: by (seed, epoch) and row; None in evaluation."""
  return None if draw is None else np.random.default_rng([*draw, row])


def stacked(examples: list[Mapping[str, Any]]) -> Batch:
  """Examples as one batch."""
  return {
      name: np.stack([example[name] for example in examples])
      for name in examples[0]
  }
