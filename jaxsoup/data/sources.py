"""Examples by row, and batches of them.

```
train = sources.Arrays({'image': image, 'label': label})     # in memory
train = sources.Folder('train', example_fn)                  # train/CLASS/*.jpg
train = sources.tfds('imagenet2012', 'train', example_fn)    # TFDS

for batch in sources.batches(train, 256, seed=0, epoch=3, start=17):
  ...
```

A source is read by rows, so that a shuffle is a permutation: batches depend on
`seed` and `epoch` alone, a training goes on at any step, and each process reads
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
import importlib.util
import os
import pathlib
from typing import Any
from typing import NamedTuple
from typing import Protocol

import numpy as np

Batch = dict[str, np.ndarray]
# One record, and a generator where it is trained on (None: evaluation).
ExampleFn = Callable[[Any, np.random.Generator | None], Mapping[str, Any]]

IMAGE_SUFFIXES = ('.jpeg', '.jpg', '.png', '.webp', '.bmp')
_END: Any = object()


class Source(Protocol):
  """Examples by row. With an attribute `arrays` they are all in memory."""

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
    views: for the names of sets with classes of their own, logits [N, C] ->
      logits over those classes.
    rules: how sets were chosen, JSON values by the set's name.
  """

  train: Source
  held_out: Source
  test: Source
  shifts: Mapping[str, Source] = {}
  pretrain: Source | None = None
  views: Mapping[str, Callable] = {}
  rules: Mapping[str, Mapping[str, Any]] = {}


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
          f'Arrays of lengths {lengths} are no examples: give at least one '
          'array, and all with the same number of rows.'
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
    num_threads: that read and decode at once; those of the machine if None.

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
      return _stacked(list(pool.map(self._example, np.asarray(rows).tolist())))

  def drawn(self, seed: int, epoch: int) -> 'Examples':
    """The same examples with the random augmentation of one epoch."""
    source = copy.copy(self)
    source._draw = seed, epoch
    return source

  def _example(self, row: int) -> Mapping[str, Any]:
    return self._example_fn(self.records[row], _rng(self._draw, row))


class Folder(Examples):
  """A folder of images with one folder for each class.

  Records are `{'image': path, 'label': int}`, in the order of their names.

  Args:
    path: of the folder.
    example_fn: see `Examples`.
    classes: names of the class folders in the order of their labels; sorted
      names of what is there if None.
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
      path: str | os.PathLike,
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
          f'No images in {root}: it should hold one folder a class, with files '
          f'that end in {", ".join(IMAGE_SUFFIXES)}.'
      )
    found = sorted({name for name, _ in files})
    self.classes = list(found if classes is None else classes)
    label = {name: i for i, name in enumerate(self.classes)}
    unknown = [name for name in found if name not in label]
    if unknown:
      raise ValueError(
          f'{root} holds the folders {unknown[:5]}, which are none of the '
          f'{len(self.classes)} classes: take them away, or name them.'
      )
    self.labels = np.array([label[name] for name, _ in files], np.int32)
    records = _Files(root, files, self.labels)
    super().__init__(records, example_fn, num_threads=num_threads)


class _Files:
  """Records of a folder; a million of them are made when they are asked for."""

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
  if isinstance(source, Stream):
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
    process_count: which each get B / process_count rows of every batch.

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
        f'A batch of {batch_size} does not divide among {process_count} '
        f'processes: take a multiple of {process_count}.'
    )
  if seed is not None and len(source) < batch_size:
    raise ValueError(
        f'{len(source)} examples do not fill a batch of {batch_size}: take '
        'smaller batches or more examples.'
    )
  num_own = batch_size // process_count
  own = slice(process_index * num_own, (process_index + 1) * num_own)
  if isinstance(source, Stream):
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
    raise ValueError(f'A share of {share} cannot be held out: take 0 to 1.')
  rng = np.random.default_rng(seed)
  chosen = []
  for label in np.unique(labels):
    members = np.flatnonzero(labels == label)
    num = max(1, round(share * len(members)))
    if num == len(members):
      raise ValueError(
          f'Class {label} has {len(members)} examples, and {num} would be held '
          f'out at a share of {share}: take a smaller share or more examples.'
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


def tfds(
    name: str,
    split: str,
    example_fn: ExampleFn,
    *,
    data_dir: str | os.PathLike | None = None,
    num_threads: int | None = None,
) -> 'Examples | Stream':
  """A set of TensorFlow Datasets, prepared before.

  Files in array_record format have random access and need no TensorFlow. Those
  in tfrecord format are a `Stream`, which needs it: `pip install "jaxsoup[tf]"`
  or, once, `tfds convert_format --out_file_format=array_record`.

  Args:
    name: such as 'imagenet2012' or 'cifar10_1/v6'.
    split: such as 'train' or 'train[2%:]'.
    example_fn: see `Examples`; a record is the set's dict of features, an
      image [H, W, C] uint8 or the bytes of its file.
    data_dir: where TFDS keeps its sets; its default if None.
    num_threads: see `Examples`.

  Returns:
    A source.

  Raises:
    FileNotFoundError: the set was not prepared.
    ImportError: the files are tfrecords, and there is no TensorFlow.
  """
  builder = _builder(name, data_dir)
  try:
    records = builder.as_data_source(split)
  except (NotImplementedError, ValueError) as error:
    if not builder.info.splits:
      raise FileNotFoundError(
          f'{name} is not prepared in {builder.data_dir}: run `tfds build '
          f'{name} --file_format=array_record`, with --data_dir for another '
          'place, and files that need a manual download where it says.'
      ) from error
    if not isinstance(error, NotImplementedError):
      raise
    return Stream(builder, split, example_fn, num_threads=num_threads)
  return Examples(records, example_fn, num_threads=num_threads)


def tfds_features(
    name: str,
    split: str,
    features: Sequence[str],
    *,
    data_dir: str | os.PathLike | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """Some features of every record in order; no image is decoded.

  One pass over the files. `np.fromiter` of the labels makes what
  `held_out_rows` takes.

  Args:
    name: see `tfds`.
    split: see `tfds`.
    features: names, such as `['label']`.
    data_dir: see `tfds`.

  Returns:
    One dict a record, in the order of rows.
  """
  import tensorflow_datasets

  builder = _builder(name, data_dir)
  decoders = _encoded_images(builder)
  records: Any
  try:
    source = builder.as_data_source(split, decoders=decoders)
    records = (source[row] for row in range(len(source)))
  except NotImplementedError:
    _require_tensorflow(name)
    dataset = builder.as_dataset(split=split, decoders=decoders)
    records = tensorflow_datasets.as_numpy(dataset)
  for record in records:
    yield {feature: record[feature] for feature in features}


def _encoded_images(builder: Any) -> dict[str, Any]:
  """Decoders that leave images as the bytes of their files."""
  import tensorflow_datasets

  return {
      name: tensorflow_datasets.decode.SkipDecoding()
      for name, feature in builder.info.features.items()
      if isinstance(feature, tensorflow_datasets.features.Image)
  }


def _builder(name: str, data_dir: str | os.PathLike | None) -> Any:
  import tensorflow_datasets

  where = None if data_dir is None else os.fspath(data_dir)
  return tensorflow_datasets.builder(name, data_dir=where)


class Stream:
  """A set of TFDS in files without random access, read through tf.data.

  Batches are those of a source in every respect but two. The shuffle is that of
  the files and of a buffer, by seed and epoch. And a start in the middle, or
  another process's rows, are read, though not decoded.

  Args:
    builder: of TFDS.
    split: such as 'train[2%:]'.
    example_fn: see `Examples`.
    buffer_size: records among which the shuffle draws, kept encoded.
    num_threads: see `Examples`.

  Raises:
    ImportError: there is no TensorFlow.
  """

  def __init__(
      self,
      builder: Any,
      split: str,
      example_fn: ExampleFn,
      *,
      buffer_size: int = 10_000,
      num_threads: int | None = None,
  ):
    _require_tensorflow(builder.info.name)
    self._builder, self._split = builder, split
    self._example_fn, self._buffer_size = example_fn, buffer_size
    self._num_threads = num_threads or os.cpu_count()
    self._rows: np.ndarray | None = None

  def __len__(self) -> int:
    if self._rows is not None:
      return len(self._rows)
    return self._builder.info.splits[self._split].num_examples

  def __getitem__(self, rows: np.ndarray) -> Batch:
    """Reads up to the last of the rows; meant for all of a small set."""
    rows = np.asarray(rows)
    wanted = set(rows.tolist())
    found: dict[int, Any] = {}
    for row, record in enumerate(self._records(None, 0)):
      if row in wanted:
        found[row] = record
      if len(found) == len(wanted):
        break
    return self._decoded([(int(row), found[int(row)]) for row in rows], None)

  def only(self, rows: np.ndarray) -> 'Stream':
    """Some rows, ascending; they can be walked in order, not shuffled."""
    rows = np.asarray(rows)
    if self._rows is not None:
      rows = self._rows[rows]
    if (np.diff(rows) <= 0).any():
      raise ValueError(
          f'Rows of {self._split!r} come in the order of the files: pass them '
          'ascending, each once.'
      )
    source = copy.copy(self)
    source._rows = rows
    return source

  def batches(
      self,
      batch_size: int,
      own: slice,
      seed: int | None,
      epoch: int,
      start: int,
  ) -> Iterator[Batch]:
    """What `batches` returns, for the rows `own` of every batch."""
    if seed is not None and self._rows is not None:
      raise ValueError(
          f'Chosen rows of {self._split!r} cannot be shuffled in tfrecord '
          "files: take a split such as 'train[2%:]', or convert the set with "
          '`tfds convert_format --out_file_format=array_record`.'
      )
    draw = None if seed is None else (seed, epoch)
    chunk: list[tuple[int, Any]] = []
    for row, record in enumerate(self._records(seed, epoch)):
      if row < start * batch_size:
        continue
      chunk.append((row, record))
      if len(chunk) == batch_size:
        batch = self._decoded(chunk[own], draw)
        if seed is None:
          batch['mask'] = np.ones(len(chunk[own]), bool)
        chunk = []
        yield batch
    if chunk and seed is None:
      is_real = np.arange(batch_size) < len(chunk)
      chunk += chunk[-1:] * (batch_size - len(chunk))
      yield {**self._decoded(chunk[own], None), 'mask': is_real[own]}

  def _records(self, seed: int | None, epoch: int) -> Iterator[Any]:
    """Records with encoded images, shuffled if there is a seed."""
    import tensorflow_datasets

    number = None
    if seed is not None:
      state = np.random.SeedSequence([seed, epoch]).generate_state(1)
      number = int(state[0] >> 1)
    dataset = self._builder.as_dataset(
        split=self._split,
        shuffle_files=seed is not None,
        decoders=_encoded_images(self._builder),
        read_config=tensorflow_datasets.ReadConfig(shuffle_seed=number),
    )
    if seed is not None:
      dataset = dataset.shuffle(self._buffer_size, seed=number)
    records = iter(tensorflow_datasets.as_numpy(dataset))
    if self._rows is None:
      return records
    chosen = set(self._rows.tolist())
    return (record for row, record in enumerate(records) if row in chosen)

  def _decoded(
      self, chunk: list[tuple[int, Any]], draw: tuple[int, int] | None
  ) -> Batch:
    def example(item):
      row, record = item
      return self._example_fn(record, _rng(draw, row))

    with futures.ThreadPoolExecutor(self._num_threads) as pool:
      return _stacked(list(pool.map(example, chunk)))


def _require_tensorflow(name: str) -> None:
  if importlib.util.find_spec('tensorflow') is None:
    raise ImportError(
        f'{name} lies in tfrecord files, which TensorFlow reads: pip install '
        '"jaxsoup[tf]", or convert it once with `tfds convert_format '
        '--out_file_format=array_record`.'
    )


def _drawn(source: Any, seed: int, epoch: int) -> Any:
  return source.drawn(seed, epoch) if hasattr(source, 'drawn') else source


def _rng(draw: tuple[int, int] | None, row: int) -> np.random.Generator | None:
  return None if draw is None else np.random.default_rng([*draw, row])


def _stacked(examples: list[Mapping[str, Any]]) -> Batch:
  return {
      name: np.stack([example[name] for example in examples])
      for name in examples[0]
  }
