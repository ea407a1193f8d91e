"""Texts as arrays of tokens, of one length.

```
tokenize = text.tokenizer('minilm/tokenizer.json', length=32)
batch = tokenize(['Superb', 'A pretentious mess'])
batch['input_ids'].shape  # (2, 32)
logits = model(batch['input_ids'], batch['attention_mask'])
pairs = tokenize(premises, hypotheses)  # one text of two, as in GLUE
```
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import importlib
import pathlib

import numpy as np

from jaxsoup.typing import PathLike

# The first of these that exists in a folder is read.
FILES = ('tokenizer.json', 'spiece.model', 'sentencepiece.model', 'vocab.txt')

# The tokens of a text by number, and the type of each: first text 0, second 1.
Encoded = tuple[Sequence[int], Sequence[int]]
EncodeFn = Callable[[Sequence[str], Sequence[str] | None], Iterable[Encoded]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
  """A function from texts to arrays, made by `tokenizer`.

  Args:
    encode_fn: texts, and seconds or None, to at most `length` tokens each.
    length: T, the number of tokens of every text.
    vocab_size: number of tokens there are.
    pad_id: what fills up a text.
    mask_id: what stands for a hidden token, as `augment` may put it in; None if
      the vocabulary has none.
    special_ids: tokens that are no part of a text, `pad_id` among them.
  """

  encode_fn: EncodeFn
  length: int
  vocab_size: int
  pad_id: int
  mask_id: int | None
  special_ids: tuple[int, ...]

  def __call__(
      self, texts: Sequence[str], seconds: Sequence[str] | None = None
  ) -> dict[str, np.ndarray]:
    """Cuts texts to `length` tokens, and fills them up to it.

    Of a pair the longer text is cut first. The ends that a model expects, such
    as [CLS] and [SEP], are in the length.

    Args:
      texts: N texts.
      seconds: N more, to be read together with the first.

    Returns:
      `input_ids`, `attention_mask` (1 where there is a token) and
      `token_type_ids` (1 in the second text, where the model knows such), int32
      [N, T].

    Raises:
      ValueError: the numbers of first and second texts differ.
    """
    if seconds is not None and len(seconds) != len(texts):
      raise ValueError(
          f'There are {len(texts)} texts, but {len(seconds)} second texts: '
          'pass one for each.'
      )
    shape = (len(texts), self.length)
    input_ids = np.full(shape, self.pad_id, np.int32)
    attention_mask, token_type_ids = (np.zeros(shape, np.int32) for _ in '12')
    for i, (ids, types) in enumerate(self.encode_fn(texts, seconds)):
      input_ids[i, : len(ids)] = ids
      attention_mask[i, : len(ids)] = 1
      token_type_ids[i, : len(ids)] = types
    return {
        'input_ids': input_ids,
        'attention_mask': attention_mask,
        'token_type_ids': token_type_ids,
    }


def tokenizer(path: PathLike, length: int) -> Tokenizer:
  """Reads the vocabulary of a pre-trained model.

  Args:
    path: a `tokenizer.json` of any model of Hugging Face, the `vocab.txt` of
      BERT (texts lose their capitals and accents where no word in it has a
      capital), the `spiece.model` of T5, or a folder with one of them.
    length: T, the number of tokens of every text; more is cut, and costs time
      on every shorter one.

  Returns:
    A function of N texts, or of N pairs, to a dict of arrays [N, T].

  Raises:
    FileNotFoundError: no such file, or a folder without one of them.
    ImportError: the library that reads it is not installed.
    ValueError: the file is of another kind, or length is too short.
  """
  file = _file(pathlib.Path(path))
  from_fns = {
      '.json': _from_json,
      '.txt': _from_vocabulary,
      '.model': _from_sentencepiece,
  }
  if file.suffix not in from_fns:
    raise ValueError(
        f'{file} is not a tokenizer.json, vocab.txt or spiece.model: pass the '
        'path of one.'
    )
  return from_fns[file.suffix](file, length)


def _file(path: pathlib.Path) -> pathlib.Path:
  if path.is_file():
    return path
  files = [path / name for name in FILES if (path / name).is_file()]
  if not files:
    where = 'has none of' if path.is_dir() else 'does not exist: expected'
    raise FileNotFoundError(
        f'{path} {where} {", ".join(FILES)}. Pass the folder of a pre-trained '
        'model, or the path of such a file.'
    )
  return files[0]


def _from_json(file: pathlib.Path, length: int) -> Tokenizer:
  tokenizers = _library('tokenizers')
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
  except Exception as e:  # It raises nothing more special.
    raise ValueError(f'{file} is no valid tokenizer.json: {e}.') from e
  return _wrapped(tokenizer, file, length)


def _from_vocabulary(file: pathlib.Path, length: int) -> Tokenizer:
  tokenizers = _library('tokenizers')
  # Not `splitlines`: there are words that are other ends of a line.
  words = file.read_text(encoding='utf-8').rstrip('\n').split('\n')
  has_capitals = any(w != w.lower() for w in words if not w.startswith('['))
  made = tokenizers.BertWordPieceTokenizer(
      {word: i for i, word in enumerate(words)}, lowercase=not has_capitals
  )
  return _wrapped(tokenizers.Tokenizer.from_str(made.to_str()), file, length)


def _wrapped(made, file: pathlib.Path, length: int) -> Tokenizer:
  """A tokenizer of the library `tokenizers` as ours."""
  _check_length(length, made.num_special_tokens_to_add(True), file)
  padding = made.padding or {}
  made.no_padding()
  made.enable_truncation(length)

  def encode_fn(texts, seconds):
    pairs = texts if seconds is None else list(zip(texts, seconds))
    return [(x.ids, x.type_ids) for x in made.encode_batch(list(pairs))]

  def id_fn(*names):
    ids = [made.token_to_id(name) for name in names]
    return next((i for i in ids if i is not None), None)

  # CLIP pads with the end of a text.
  pad_id = padding.get('pad_id', id_fn('[PAD]', '<pad>', '<|endoftext|>'))
  if pad_id is None:
    raise ValueError(
        f'{file} has no padding token, [PAD] or <pad>: add one of them to its '
        'vocabulary.'
    )
  added = made.get_added_tokens_decoder()
  return Tokenizer(
      encode_fn=encode_fn,
      length=length,
      vocab_size=made.get_vocab_size(),
      pad_id=pad_id,
      mask_id=id_fn('[MASK]', '<mask>', '<extra_id_0>'),
      special_ids=tuple(sorted(i for i, x in added.items() if x.special)),
  )


def _from_sentencepiece(file: pathlib.Path, length: int) -> Tokenizer:
  """T5's: text, end; of a pair: first, end, second, end."""
  sentencepiece = _library('sentencepiece')
  _check_length(length, 2, file)
  pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
  end = pieces.eos_id()

  def encode_fn(texts, seconds):
    parts = [pieces.encode(list(texts))]
    if seconds is not None:
      parts.append(pieces.encode(list(seconds)))
    encoded = []
    for text in zip(*parts):
      ids = [i for part in _cut(text, length - len(text)) for i in [*part, end]]
      encoded.append((ids, [0] * len(ids)))
    return encoded

  return Tokenizer(
      encode_fn=encode_fn,
      length=length,
      vocab_size=pieces.get_piece_size(),
      pad_id=pieces.pad_id(),
      # T5's vocabulary goes on with 100 tokens for what is hidden, the last of
      # which is the first one's.
      mask_id=pieces.get_piece_size() + 99,
      special_ids=tuple(
          i
          for i in range(pieces.get_piece_size())
          if pieces.is_control(i) or pieces.is_unknown(i)
      ),
  )


def _cut(parts: Sequence[list[int]], room: int) -> list[list[int]]:
  """Cuts the longer of two parts; both to half the room where both are long."""
  if len(parts) == 1:
    return [parts[0][:room]]
  lengths = [len(part) for part in parts]
  short = min(*lengths, room // 2)
  ends = [short, room - short]
  # As `tokenizers` has it the second is the longer one in a tie.
  if lengths[0] > lengths[1]:
    ends.reverse()
  return [part[:end] for part, end in zip(parts, ends)]


def _check_length(length: int, num_ends: int, file: pathlib.Path):
  if length <= num_ends:
    raise ValueError(
        f'length is {length}, and {file} adds {num_ends} special tokens to '
        'each text: use a larger length.'
    )


def _library(name: str):
  """Imported late: only texts need one of them."""
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ImportError(
        f'The tokenizer needs {name}, which is not installed: '
        'pip install "jaxsoup[text]"'
    ) from error
