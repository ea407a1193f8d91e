"""Synthetic texts in the format of GLUE, to try an experiment without data.

```
made_up.glue(folder, 'mrpc', sizes=dict(train=200, dev=80), seed=0)
tokenize = made_up.tokenizer(length=24)
splits = glue.splits('mrpc', tokenize, folder=folder)
```

Half of the words speak for one label and half for the other, and seven in ten
words of a text are those of its label. Scores on them show that the code runs,
and nothing else.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import itertools
import pathlib
import zlib

import numpy as np

from jaxsoup.data import glue as real
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
      fields |= {text: _text(rng, label) for text in texts}
      fields[details.fields[-1]] = str(label)
      lines.append('\t'.join(fields.values()))
    (place / f'{name}.tsv').write_text('\n'.join(lines) + '\n')


def _text(rng: np.random.Generator, label: int) -> str:
  num = int(rng.integers(6, 11))
  kind = np.where(rng.random(num) < 0.7, label, 1 - label)
  number = 2 * rng.integers(len(WORDS) // 2, size=num) + kind
  return ' '.join(WORDS[i] for i in number)


def tokenizer(length: int, vocab_size: int = 512):
  """A token for each word, by a hash of it: a vocabulary without a file.

  Args:
    length: T, number of tokens of every text; more is cut.
    vocab_size: number of tokens; 0 fills up, and 1 ends a text.

  Returns:
    A function of N texts, or of N pairs, to `input_ids`, `attention_mask` and
    `token_type_ids`, int32 [N, T], as a `jaxsoup.data.text.Tokenizer`.

  Example:
    >>> tokenizer(length=4)(['ba', 'ba bo'])['attention_mask'].tolist()
    [[1, 1, 0, 0], [1, 1, 1, 0]]
  """

  def ids_of(text):
    words = [zlib.crc32(word.encode()) for word in text.split()]
    return [2 + word % (vocab_size - 2) for word in words] + [1]

  def tokenize(texts: Sequence[str], seconds: Sequence[str] | None = None):
    arrays = {
        name: np.zeros((len(texts), length), np.int32)
        for name in ('input_ids', 'attention_mask', 'token_type_ids')
    }
    for row, parts in enumerate(zip(texts, seconds or [''] * len(texts))):
      first = ids_of(parts[0])
      ids = first if seconds is None else first + ids_of(parts[1])
      ids = ids[:length]
      arrays['input_ids'][row, : len(ids)] = ids
      arrays['attention_mask'][row, : len(ids)] = 1
      arrays['token_type_ids'][row, len(first) : len(ids)] = 1
    return arrays

  return tokenize
