"""Texts in the format of GLUE and folders of images, made at random.

```
made_up.glue(folder, 'mrpc', sizes=dict(train=200, dev=80), seed=0)
tokenize = made_up.tokenizer(length=24)
splits = glue.splits('mrpc', tokenize, folder=folder)
paths = made_up.folders(folder, {'train': ['cat', 'dog'], 'test': ['cat']})
```

To try an experiment without its data. Half of the words speak for one label and
half for the other, and seven in ten words of a text are those of its label.
Scores on them show that the code runs, and nothing else.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import itertools
import pathlib
import zlib

import numpy as np

from jaxsoup.data import glue as real
from jaxsoup.data import text
from jaxsoup.typing import PathLike

WORDS = [a + b for a, b in itertools.product('bdfgklmnprst', 'aeiou')]


def glue(
    folder: PathLike,
    task: str,
    sizes: Mapping[str, int],
    seed: int = 0,
) -> None:
  """Writes the files of a task as `jaxsoup.data.glue` reads them.

  Args:
    folder: where `MRPC/train.tsv` and so on are written.
    task: a key of `jaxsoup.data.glue.TASKS`.
    sizes: number of examples of 'train' and of 'dev'.
    seed: decides the texts.
  """
  details = real.TASKS[task]
  place = pathlib.Path(folder, details.folder)
  place.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  columns = details.header or details.fields
  for name, size in sizes.items():
    lines = [] if details.header else ['\t'.join(columns)]
    for i in range(size):
      label = i % 2
      *texts, _ = details.fields
      fields = dict.fromkeys(columns, '-')
      fields |= {name: _text(rng, label) for name in texts}
      fields[details.fields[-1]] = str(label)
      lines.append('\t'.join(fields.values()))
    (place / f'{name}.tsv').write_text('\n'.join(lines) + '\n')


def _text(rng: np.random.Generator, label: int) -> str:
  num = int(rng.integers(6, 11))
  kind = np.where(rng.random(num) < 0.7, label, 1 - label)
  number = 2 * rng.integers(len(WORDS) // 2, size=num) + kind
  return ' '.join(WORDS[i] for i in number)


def tokenizer(length: int, vocab_size: int = 512) -> text.Tokenizer:
  """A token for each word, by a hash of it: a vocabulary without a file.

  Args:
    length: T, number of tokens of every text; more is cut.
    vocab_size: number of tokens; 0 fills up, and 1 ends a text.

  Example:
    >>> tokenizer(length=4)(['ba', 'ba bo'])['attention_mask'].tolist()
    [[1, 1, 0, 0], [1, 1, 1, 0]]
  """

  def ids_of(line):
    words = [zlib.crc32(word.encode()) for word in line.split()]
    return [2 + word % (vocab_size - 2) for word in words] + [1]

  def encode_fn(texts, seconds):
    for first, second in zip(texts, seconds or [''] * len(texts)):
      first = ids_of(first)
      second = ids_of(second) if seconds else []
      types = [0] * len(first) + [1] * len(second)
      yield (first + second)[:length], types[:length]

  return text.Tokenizer(
      encode_fn=encode_fn,
      length=length,
      vocab_size=vocab_size,
      pad_id=0,
      mask_id=None,
      special_ids=(0, 1),
  )


def folders(
    root: PathLike,
    sets: Mapping[str, Sequence[str]],
    *,
    num_images: int = 4,
    size: int = 40,
    seed: int = 0,
) -> dict[str, str]:
  """Writes sets of images, each with one folder a class.

  An image is the pattern of its class, the same in all sets, plus noise, so
  that there is something to learn.

  Args:
    root: a folder, made where it is not there.
    sets: names of the classes, by the name of a set.
    num_images: of each class in each set.
    size: height and width, a multiple of 4.
    seed: of patterns and noise.

  Returns:
    The folder of each set, by its name.

  Example:
    >>> import tempfile
    >>> path = folders(tempfile.mkdtemp(), {'test': ['cat']}, num_images=1)
    >>> [file.name for file in pathlib.Path(path['test']).glob('cat/*')]
    ['0.png']
  """
  from PIL import Image

  for set_name, classes in sets.items():
    for class_name in classes:
      folder = pathlib.Path(root, set_name, class_name)
      folder.mkdir(parents=True, exist_ok=True)
      pattern_rng = np.random.default_rng([seed, *class_name.encode()])
      pattern = pattern_rng.integers(40, 216, (4, 4, 3))
      pattern = pattern.repeat(size // 4, 0).repeat(size // 4, 1)
      rng = np.random.default_rng([seed, *f'{set_name}/{class_name}'.encode()])
      for i in range(num_images):
        noise = rng.integers(-40, 40, pattern.shape)
        image = Image.fromarray((pattern + noise).astype(np.uint8))
        image.save(folder / f'{i}.png')
  return {name: str(pathlib.Path(root, name)) for name in sets}
