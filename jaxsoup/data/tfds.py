"""Sets of TensorFlow Datasets as sources.

```
train = tfds.source('imagenet2012', 'train', example_fn)
label = [x['label'] for x in tfds.features('imagenet2012', 'train', ['label'])]
```
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent import futures
import copy
import importlib.util
import itertools
import os
from typing import Any

import numpy as np

from jaxsoup.data import sources
from jaxsoup.typing import PathLike

# Batches that are decoded while one is in use.
_NUM_AHEAD = 2


def source(
    name: str,
    split: str,
    example_fn: sources.ExampleFn,
    *,
    label_fn: sources.LabelFn | None = None,
    data_dir: PathLike | None = None,
    num_workers: int = 0,
) -> 'sources.Examples | Stream':
  """A prepared set of TensorFlow Datasets.

  Files in array_record format have random access and need no TensorFlow. Those
  in tfrecord format are a `Stream`, which needs it: `pip install "jaxsoup[tf]"`
  or, once, `tfds convert_format --out_file_format=array_record`.

  Args:
    name: such as 'imagenet2012' or 'cifar10_1/v6'.
    split: such as 'train' or 'train[2%:]'.
    example_fn: see `sources.Examples`; a record is the set's dict of features,
      an image the bytes of its file.
    label_fn: see `sources.Examples`.
    data_dir: where TFDS keeps its sets; its default if None.
    num_workers: see `sources.Examples`; a `Stream` has only threads.

  Returns:
    A source.

  Raises:
    FileNotFoundError: the set is not prepared.
    ImportError: the files are tfrecords, and there is no TensorFlow.
  """
  builder = _builder(name, data_dir)
  try:
    records = builder.as_data_source(split, decoders=_encoded_images(builder))
  except (NotImplementedError, ValueError) as error:
    if not builder.info.splits:
      raise FileNotFoundError(
          f'{name} is not prepared in {builder.data_dir}: run `tfds build '
          f'{name} --file_format=array_record` (--data_dir=DIR for another '
          'folder). It says where to put files that need a manual download.'
      ) from error
    if not isinstance(error, NotImplementedError):
      raise
    return Stream(builder, split, example_fn, label_fn=label_fn)
  return sources.Examples(
      records, example_fn, label_fn=label_fn, num_workers=num_workers
  )


def features(
    name: str,
    split: str,
    names: Sequence[str],
    *,
    data_dir: PathLike | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """Some features of every record in order; no image is decoded.

  One pass over the files. `np.fromiter` of the labels makes what
  `sources.held_out_rows` takes.

  Args:
    name: see `source`.
    split: see `source`.
    names: of features, such as `['label']`.
    data_dir: see `source`.

  Returns:
    One dict a record, in the order of rows.
  """
  import tensorflow_datasets

  builder = _builder(name, data_dir)
  decoders = _encoded_images(builder)
  records: Any
  try:
    by_row = builder.as_data_source(split, decoders=decoders)
    records = (by_row[row] for row in range(len(by_row)))
  except NotImplementedError:
    _require_tensorflow(name)
    dataset = builder.as_dataset(split=split, decoders=decoders)
    records = tensorflow_datasets.as_numpy(dataset)
  for record in records:
    yield {feature: record[feature] for feature in names}


def _encoded_images(builder: Any) -> dict[str, Any]:
  """Decoders that leave images as the bytes of their files."""
  import tensorflow_datasets

  return {
      name: tensorflow_datasets.decode.SkipDecoding()
      for name, feature in builder.info.features.items()
      if isinstance(feature, tensorflow_datasets.features.Image)
  }


def _builder(name: str, data_dir: PathLike | None) -> Any:
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
    example_fn: see `sources.Examples`.
    label_fn: see `sources.Examples`.
    buffer_size: records among which the shuffle draws, kept encoded.

  Raises:
    ImportError: there is no TensorFlow.
  """

  def __init__(
      self,
      builder: Any,
      split: str,
      example_fn: sources.ExampleFn,
      *,
      label_fn: sources.LabelFn | None = None,
      buffer_size: int = 10_000,
  ):
    _require_tensorflow(builder.info.name)
    self._builder, self._split = builder, split
    self._example_fn, self._label_fn = example_fn, label_fn
    self._buffer_size = buffer_size
    self._rows: np.ndarray | None = None

  def __len__(self) -> int:
    if self._rows is not None:
      return len(self._rows)
    return self._builder.info.splits[self._split].num_examples

  def __getitem__(self, rows: np.ndarray) -> sources.Batch:
    """Meant for a few of the first: reads up to the last of the rows."""
    examples = self._made(rows, lambda record: self._example_fn(record, None))
    return sources.stacked(examples)

  def labels_of(self, rows: np.ndarray) -> np.ndarray:
    """Labels of these rows, by one walk through all records."""
    label_fn = self._label_fn or (lambda x: self._example_fn(x, None)['label'])
    return np.stack(self._made(rows, label_fn))

  def _made(self, rows: np.ndarray, make_fn: Callable[[Any], Any]) -> list[Any]:
    """Reads up to the last of the rows."""
    rows = np.asarray(rows)
    records = itertools.islice(self._records(None, 0), rows.max(initial=-1) + 1)
    wanted = set(rows.tolist())
    made = {i: make_fn(x) for i, x in enumerate(records) if i in wanted}
    return [made[row] for row in rows.tolist()]

  def only(self, rows: np.ndarray) -> 'Stream':
    """Some rows, ascending; they can be walked in order, not shuffled."""
    rows = np.asarray(rows)
    if self._rows is not None:
      rows = self._rows[rows]
    if (np.diff(rows) <= 0).any():
      raise ValueError(
          f'{self._split!r} is in tfrecord files, which are read in order: '
          'pass ascending rows, each once.'
      )
    chosen = copy.copy(self)
    chosen._rows = rows
    return chosen

  def batches(
      self,
      batch_size: int,
      own: slice,
      seed: int | None,
      epoch: int,
      start: int,
  ) -> Iterator[sources.Batch]:
    """What `sources.batches` returns, for the rows `own` of every batch."""
    if seed is not None and self._rows is not None:
      raise ValueError(
          f'A subset of {self._split!r} cannot be shuffled in tfrecord files: '
          "use a split such as 'train[2%:]', or convert the set with "
          '`tfds convert_format --out_file_format=array_record`.'
      )
    draw = None if seed is None else (seed, epoch)

    def finished(work, mask):
      batch = sources.stacked([example.result() for example in work])
      return batch if draw else {**batch, 'mask': mask}

    with futures.ThreadPoolExecutor() as pool:
      ahead: deque[Any] = deque()
      for chunk, mask in self._chunks(batch_size, seed, epoch, start):
        work = [pool.submit(self._example, draw, *x) for x in chunk[own]]
        ahead.append((work, mask[own]))
        if len(ahead) > _NUM_AHEAD:
          yield finished(*ahead.popleft())
      yield from itertools.starmap(finished, ahead)

  def _chunks(
      self, batch_size: int, seed: int | None, epoch: int, start: int
  ) -> Iterator[tuple[list[tuple[int, Any]], np.ndarray]]:
    """Rows and records of each batch, and which of them are no padding."""
    records = itertools.islice(
        enumerate(self._records(seed, epoch)), start * batch_size, None
    )
    while chunk := list(itertools.islice(records, batch_size)):
      is_real = np.arange(batch_size) < len(chunk)
      chunk += chunk[-1:] * (batch_size - len(chunk))
      if seed is None or is_real.all():
        yield chunk, is_real

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

  def _example(
      self, draw: tuple[int, int] | None, row: int, record: Any
  ) -> Any:
    return self._example_fn(record, sources.generator(draw, row))


def _require_tensorflow(name: str) -> None:
  if importlib.util.find_spec('tensorflow') is None:
    raise ImportError(
        f'{name} is in tfrecord files, which need TensorFlow: pip install '
        '"jaxsoup[tf]", or convert it once with `tfds convert_format '
        '--out_file_format=array_record`.'
    )
