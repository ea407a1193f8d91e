"""Four tasks of GLUE: paraphrase, entailment, acceptability, sentiment.

```
tokenize = text.tokenizer('bert-base-uncased/vocab.txt', length=128)
splits = glue.splits('mrpc', tokenize, folder='glue_data')
config.metric = glue.TASKS['mrpc'].metric
```

Either GLUE's own TSV files, `glue_data/MRPC/train.tsv` and `dev.tsv`, or TFDS,
which reads `glue/*` with TensorFlow only. The labels of GLUE's test sets are
secret: the validation set reports, and a part of the training set chooses.

Source: Wang et al., "GLUE", ICLR 2019.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import csv
import pathlib
from typing import Any
from typing import NamedTuple

import numpy as np

from jaxsoup.data import sources
from jaxsoup.data import tfds
from jaxsoup.typing import PathLike

# N texts, and N second texts of pairs or None, to arrays [N, ...].
Tokenize = Callable[
    [Sequence[str], Sequence[str] | None], Mapping[str, np.ndarray]
]


class Task(NamedTuple):
  """A task of GLUE.

  Attributes:
    folder: its name among GLUE's files.
    columns: names of one text, or of the two of a pair.
    labels: their names by number; T5 was trained to write them.
    metric: what GLUE reports, by its name in a config.
    fields: which columns of the files have the texts and the label.
    header: for files without one.
  """

  folder: str
  columns: tuple[str, ...]
  labels: tuple[str, str]
  metric: str
  fields: tuple[str, ...]
  header: tuple[str, ...] = ()


TASKS = {
    'mrpc': Task(
        'MRPC',
        ('sentence1', 'sentence2'),
        ('not_equivalent', 'equivalent'),
        'accuracy and f1',
        ('#1 String', '#2 String', 'Quality'),
    ),
    'rte': Task(
        'RTE',
        ('sentence1', 'sentence2'),
        ('entailment', 'not_entailment'),
        'accuracy',
        ('sentence1', 'sentence2', 'label'),
    ),
    'cola': Task(
        'CoLA',
        ('sentence',),
        ('unacceptable', 'acceptable'),
        'matthews',
        ('sentence', 'label'),
        ('source', 'label', 'mark', 'sentence'),
    ),
    'sst2': Task(
        'SST-2',
        ('sentence',),
        ('negative', 'positive'),
        'accuracy',
        ('sentence', 'label'),
    ),
}


class Texts(NamedTuple):
  """N examples: for each column N texts, and labels int32 [N]."""

  columns: tuple[list[str], ...]
  label: np.ndarray


def read(
    task: str,
    split: str,
    *,
    folder: PathLike | None = None,
    data_dir: PathLike | None = None,
) -> Texts:
  """The texts of a task.

  Args:
    task: a key of `TASKS`.
    split: 'train' or 'validation'.
    folder: with GLUE's files, `MRPC/train.tsv`, `MRPC/dev.tsv` and so on; TFDS
      is read if None.
    data_dir: of TFDS; its default if None.

  Returns:
    Texts and labels, in the order of the files.

  Raises:
    FileNotFoundError: the files are not there.
    ValueError: no such task or split, or a malformed line.
  """
  if task not in TASKS or split not in ('train', 'validation'):
    raise ValueError(
        f'There is no task {task!r} with split {split!r}: choose a task of '
        f"{list(TASKS)}, and 'train' or 'validation' (GLUE's test labels are "
        'secret).'
    )
  if folder is not None:
    return _read_files(TASKS[task], split, pathlib.Path(folder))
  names = TASKS[task].columns
  records = tfds.features(
      f'glue/{task}', split, [*names, 'label'], data_dir=data_dir
  )
  return _texts(
      ([_text(r[name]) for name in names], int(r['label'])) for r in records
  )


def splits(
    task: str,
    tokenize: Tokenize,
    *,
    folder: PathLike | None = None,
    data_dir: PathLike | None = None,
    share: float = 0.1,
    seed: int = 0,
    is_prefixed: bool = False,
) -> sources.Splits:
  """A task as token ids in memory.

  Args:
    task: a key of `TASKS`.
    tokenize: (texts, second texts or None) -> arrays `[N, ...]` by name, such
      as `input_ids` and `attention_mask`.
    folder: see `read`.
    data_dir: see `read`.
    share: of each class of the training set that is held out.
    seed: of the choice.
    is_prefixed: whether each example becomes one text, as T5 was trained on:
      see `prefixed`.

  Returns:
    `train` and `held_out`, both of the training set, without duplicates and
    examples of the validation set; the validation set as `test`; and the rule
    of the held-out set, with the number of examples `dropped`.

  Raises:
    FileNotFoundError: the files are not there.
    ValueError: no such task, or a malformed line.
  """
  parts = {}
  for split in ('train', 'validation'):
    texts = read(task, split, folder=folder, data_dir=data_dir)
    columns = texts.columns
    if is_prefixed:
      columns = (prefixed(task, columns),)
    second = columns[1] if len(columns) > 1 else None
    tokens = tokenize(columns[0], second)
    parts[split] = sources.Arrays({**tokens, 'label': texts.label})
  apart = _apart(parts['train'].arrays, parts['validation'].arrays)
  train = sources.subset(parts['train'], apart)
  held_out = sources.held_out_rows(train.arrays['label'], share, seed)
  num_dropped = len(parts['train']) - len(apart)
  return sources.Splits(
      train=sources.subset(train, held_out.rest),
      held_out=sources.subset(train, held_out.rows),
      test=parts['validation'],
      rules={'held_out': {**held_out.rule, 'dropped': num_dropped}},
      labels=TASKS[task].labels,
  )


def _apart(train: Mapping[str, Any], test: Mapping[str, Any]) -> np.ndarray:
  """Rows of the training set that a model sees once, and not in the test set.

  Some sentences of SST-2 appear several times: one that trains must not choose
  or report as well.
  """

  def keys(arrays):
    columns = [x for name, x in sorted(arrays.items()) if name != 'label']
    return [b''.join(x.tobytes() for x in row) for row in zip(*columns)]

  seen = set(keys(test))
  rows = []
  for row, key in enumerate(keys(train)):
    if key not in seen:
      seen.add(key)
      rows.append(row)
  return np.array(rows, int)


def prefixed(task: str, columns: Sequence[Sequence[str]]) -> list[str]:
  """Examples as single texts that name the task and each part.

  Args:
    task: a key of `TASKS`.
    columns: N texts for each column of the task.

  Returns:
    N texts.

  Example:
    >>> prefixed('mrpc', [['One.'], ['Two.']])
    ['mrpc sentence1: One. sentence2: Two.']
    >>> prefixed('cola', [['One.']])
    ['cola sentence: One.']

  Source: Raffel et al., "Exploring the limits of transfer learning with a
  unified text-to-text transformer", JMLR 2020, appendix D.
  """
  names = TASKS[task].columns
  return [
      ' '.join([task, *(f'{n}: {t}' for n, t in zip(names, parts))])
      for parts in zip(*columns, strict=True)
  ]


def _read_files(task: Task, split: str, folder: pathlib.Path) -> Texts:
  stem = 'train' if split == 'train' else 'dev'
  file = folder / task.folder / f'{stem}.tsv'
  if not file.is_file():
    raise FileNotFoundError(
        f'{file} does not exist: unpack the files of gluebenchmark.com/tasks '
        f'into {folder}, so that it holds {task.folder}/train.tsv and '
        f'{task.folder}/dev.tsv.'
    )
  # The files quote nothing, and quotation marks are part of the texts.
  with file.open(encoding='utf-8-sig', newline='') as stream:
    rows = list(csv.reader(stream, delimiter='\t', quoting=csv.QUOTE_NONE))
  header = list(task.header) or (rows.pop(0) if rows else [])
  if not rows:
    raise ValueError(f'{file} holds no examples: download it again.')
  missing = [field for field in task.fields if field not in header]
  if missing:
    raise ValueError(
        f'{file} has no column {missing[0]!r}, only {header}: check that it is '
        'the file of GLUE.'
    )
  places = [header.index(field) for field in task.fields]
  return _texts(
      _parsed(row, places, task, f'{file}:{number}')
      for number, row in enumerate(rows, 1 if task.header else 2)
  )


def _parsed(
    row: list[str], places: list[int], task: Task, where: str
) -> tuple[list[str], int]:
  if len(row) <= max(places):
    raise ValueError(
        f'{where} has {len(row)} columns, expected at least '
        f'{max(places) + 1}: download the file again.'
    )
  *texts, label = (row[place] for place in places)
  names = {**{name: i for i, name in enumerate(task.labels)}, '0': 0, '1': 1}
  if label not in names:
    raise ValueError(
        f'{where} has the label {label!r}, expected one of {sorted(names)}: '
        'download the file again.'
    )
  return texts, names[label]


def _texts(examples: Iterable[tuple[list[str], int]]) -> Texts:
  texts, labels = zip(*examples, strict=True)
  columns = tuple(list(column) for column in zip(*texts, strict=True))
  return Texts(columns, np.array(labels, np.int32))


def _text(value: Any) -> str:
  return value.decode() if isinstance(value, bytes) else str(value)
