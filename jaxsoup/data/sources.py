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

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import copy
import dataclasses
import hashlib
import multiprocessing
import os
import pathlib
import signal
import threading
from typing import Any
from typing import NamedTuple
from typing import Protocol

from absl import flags
import grain
import jax
import numpy as np

from jaxsoup.typing import PathLike

Batch = dict[str, np.ndarray]
# One record, and a generator where it is trained on (None: evaluation).
ExampleFn = Callable[[Any, np.random.Generator | None], Mapping[str, Any]]
LabelFn = Callable[[Any], Any]

IMAGE_SUFFIXES = ('.jpeg', '.jpg', '.png', '.webp', '.bmp')
# Each of them makes a whole batch.
_NUM_THREADS = min(8, os.cpu_count() or 1)


class Source(Protocol):
  """Examples by row.

  With an attribute `arrays` they are all in memory. With the methods `batches`
  and `only` they come in the order of files, as a `tfds.Stream` does. A method
  `labels_of(rows)` returns labels without making the rest of the examples.
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
    originals: by name of a shift that was made from other examples, such as a
      corruption, those `[N]`: by them it is told which examples seeds have in
      common.
    labels: the names of the classes by number, if they are known.
  """

  train: Source
  held_out: Source
  test: Source
  shifts: Mapping[str, Source] = {}
  pretrain: Source | None = None
  views: Mapping[str, Callable[..., Any]] = {}
  rules: Mapping[str, Mapping[str, Any]] = {}
  originals: Mapping[str, Source] = {}
  labels: Sequence[str] = ()


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
  """Examples made from records when they are read.

  Args:
    records: one for an index, such as a list or a data source of TFDS.
    example_fn: `(record, rng) -> {name: array}`, of the same shapes for all.
      `rng` is None in an evaluation; in a training its draws depend on the
      seed, the epoch and the row alone.
    label_fn: record -> the label that `example_fn` gives it, by itself; None
      makes whole examples for their labels.
    num_workers: processes that make batches of them, each a batch at a time; 0
      makes them in threads of this process. Processes import the main script
      again: what it does must stand under `if __name__ == '__main__'`. Batches
      come through shared memory (in Docker: `--shm-size`).

  Raises:
    ValueError: num_workers is negative; or, when read, an example cannot be
      made.

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
      label_fn: LabelFn | None = None,
      num_workers: int = 0,
  ):
    if num_workers < 0:
      raise ValueError(f'num_workers is {num_workers}: expected 0 or more.')
    self.records = records
    self.num_workers = num_workers
    self._example_fn, self._label_fn = example_fn, label_fn
    self._draw: tuple[int, int] | None = None

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, rows: np.ndarray) -> Batch:
    return stacked([self._example(row) for row in np.asarray(rows).tolist()])

  def labels_of(self, rows: np.ndarray) -> np.ndarray:
    """Labels of these rows."""
    if self._label_fn is None:
      return _labels_of_examples(self, rows)
    return np.stack([self._label_fn(self.records[int(i)]) for i in rows])

  def drawn(self, seed: int, epoch: int) -> 'Examples':
    """The same examples with the random augmentation of one epoch."""
    source = copy.copy(self)
    source._draw = seed, epoch
    return source

  def remade(self, example_fn: ExampleFn) -> 'Examples':
    """Other examples of the same records, such as without augmentation."""
    source = copy.copy(self)
    source._example_fn = example_fn
    return source

  def _example(self, row: int) -> Mapping[str, Any]:
    try:
      return self._example_fn(self.records[row], generator(self._draw, row))
    except Exception as error:
      # Not the error itself: it names no file, and may not leave a process.
      raise ValueError(
          f'{self._name(row)} cannot be read: {type(error).__name__}: {error}. '
          'Replace it or leave it out.'
      ) from error

  def _name(self, row: int) -> str:
    return f'Record {row} of {len(self)}'


class Folder(Examples):
  """A folder of images with one folder for each class.

  Records are `{'image': path, 'label': int}`, in the order of their names.

  Args:
    path: of the folder.
    example_fn: see `Examples`; the label of an example is that of its record.
    classes: names of the class folders in the order of their labels; sorted
      names of all folders if None.
    num_workers: see `Examples`.

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
      num_workers: int = 0,
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
    names = np.array([os.fsencode(name) for _, name in files])
    records = _Files(root, self.classes, names, self.labels)
    super().__init__(records, example_fn, num_workers=num_workers)

  def _name(self, row: int) -> str:
    return str(self.records[row]['image'])

  def labels_of(self, rows: np.ndarray) -> np.ndarray:
    """Labels of these rows, by their folders."""
    return self.labels[rows]


@dataclasses.dataclass
class _Files:
  """Records of a folder, each made on access.

  There may be a million, of which each worker gets a copy: bytes in one array.
  """

  root: pathlib.Path
  classes: list[str]
  names: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, row: int) -> dict[str, Any]:
    label, name = int(self.labels[row]), os.fsdecode(self.names[row])
    return {'image': self.root / self.classes[label] / name, 'label': label}


class Subset:
  """Some rows of a source; see `subset`."""

  def __init__(self, source: Source, rows: np.ndarray):
    self._source, self.rows = source, np.asarray(rows)
    self.num_workers = getattr(source, 'num_workers', 0)

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, rows: np.ndarray) -> Batch:
    return self._source[self.rows[rows]]

  def labels_of(self, rows: np.ndarray) -> np.ndarray:
    """Labels of these rows."""
    return labels_of(self._source, self.rows[rows])

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


def labels_of(source: Any, rows: np.ndarray | None = None) -> np.ndarray:
  """Labels of some rows, or of all; images are left alone if the source can.

  Example:
    >>> labels_of(Arrays({'label': np.arange(3)}))
    array([0, 1, 2])
  """
  rows = np.arange(len(source)) if rows is None else np.asarray(rows)
  if hasattr(source, 'labels_of'):
    return source.labels_of(rows)
  return _labels_of_examples(source, rows)


def _labels_of_examples(source: Source, rows: np.ndarray) -> np.ndarray:
  # Whole examples may be large: few at a time.
  parts = np.array_split(rows, max(1, len(rows) // 256))
  return np.concatenate([source[part]['label'] for part in parts])


def in_memory(source: Source) -> Arrays:
  """All examples of a source, read once."""
  if hasattr(source, 'arrays'):
    return Arrays(source.arrays)
  parts: dict[str, list[np.ndarray]] = {}
  for batch in batches(source, min(256, len(source))):
    mask = batch.pop('mask')
    for name, x in batch.items():
      parts.setdefault(name, []).append(x[mask])
  return Arrays({name: np.concatenate(x) for name, x in parts.items()})


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

  Rows, their order and their draws depend on `seed` and `epoch` alone, not on
  workers or processes: the state of a walk is its epoch and step, and a walk
  from `start` on is the rest of the whole one.

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
    return source.batches(batch_size, own, seed, epoch, start)
  num = len(source)
  if seed is None:
    order = np.arange(-(-num // batch_size) * batch_size)
  else:
    source = _drawn(source, seed, epoch)
    order = shuffled(num, seed, epoch)[: num // batch_size * batch_size]
  rows = order.reshape(-1, batch_size)[start:, own]
  steps = _Steps(source, rows, is_masked=seed is None)
  if hasattr(source, 'arrays') or not len(steps):
    return (steps[step] for step in range(len(steps)))
  return _read_ahead(steps, getattr(source, 'num_workers', 0))


def shuffled(num: int, seed: int, epoch: int) -> np.ndarray:
  """The order in which one epoch walks through the examples, int64 [N]."""
  return np.random.default_rng([*b'shuffle', seed, epoch]).permutation(num)


@dataclasses.dataclass
class _Steps:
  """The batches of a walk by number: the rows of one process, one stacking."""

  source: Any
  rows: np.ndarray
  is_masked: bool

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, step: int) -> Batch:
    rows, num = self.rows[step], len(self.source)
    batch = self.source[rows.clip(max=num - 1)]
    return {**batch, 'mask': rows < num} if self.is_masked else batch


def _read_ahead(steps: _Steps, num_workers: int) -> Iterator[Batch]:
  num_workers = min(num_workers, len(steps))
  # A worker holds the batch it makes, and one that waits.
  num_threads = 0 if num_workers else min(_NUM_THREADS, len(steps))
  options = grain.ReadOptions(num_threads, prefetch_buffer_size=num_threads)
  dataset = grain.MapDataset.source(steps).to_iter_dataset(options)
  if num_workers:
    if not flags.FLAGS.is_parsed():
      # It reads a flag of its own, in programs without flags too.
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(
        grain.MultiprocessingOptions(num_workers), _start_worker
    )
  iterator = iter(dataset)
  try:
    yield from iterator
  finally:
    iterator.close()


def _start_worker(index: int, count: int) -> None:
  """What a worker process does first."""
  del index, count
  # Devices belong to the parent.
  jax.config.update('jax_platforms', 'cpu')
  # Those to a group of processes are the parent's: it ends its workers.
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  """A parent that is killed cannot end its workers."""
  if parent := multiprocessing.parent_process():
    parent.join()
    os._exit(1)


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


def disjoint(
    num_examples: int,
    sizes: Mapping[str, int],
    seed: int | Sequence[int],
    name: str,
) -> dict[str, np.ndarray]:
  """Draws disjoint sets of rows.

  Args:
    num_examples: number of rows there are.
    sizes: number of rows of each set, by its name, in order.
    seed: decides the draw.
    name: of the rows, for the error.

  Returns:
    For each name its rows.

  Raises:
    ValueError: sizes ask for more examples than there are.
  """
  num_wanted = sum(sizes.values())
  if num_wanted > num_examples:
    raise ValueError(
        f'sizes {dict(sizes)} ask for {num_wanted} examples, but the {name} '
        f'are {num_examples}: make a set smaller.'
    )
  order = np.random.default_rng(seed).permutation(num_examples)
  ends = np.cumsum(list(sizes.values()))
  return dict(zip(sizes, np.split(order, ends)))


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
  # The last number is not 0: NumPy takes lists that differ in zeros at the end
  # for the same seed.
  return None if draw is None else np.random.default_rng([row, *draw, 1])


def stacked(examples: list[Mapping[str, Any]]) -> Batch:
  """Examples as one batch."""
  return {
      name: np.stack([example[name] for example in examples])
      for name in examples[0]
  }
