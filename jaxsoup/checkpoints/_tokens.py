"""Which token a row of the embeddings belongs to."""

from collections.abc import Sequence
import pathlib
import re

import numpy as np

from jaxsoup import _json
from jaxsoup import _tree
from jaxsoup.checkpoints import _checkpoint
from jaxsoup.checkpoints import _refusals

_VOCABULARIES = ('tokenizer.json', 'vocab.json', 'vocab.txt')
# Of SentencePiece, which are compared as they are.
_PIECES = ('spiece.model', 'tokenizer.model', 'sentencepiece.bpe.model')
_ADDED = 'added_tokens.json'
_NUMBERS = re.compile(r'"(\w+)": *(\d+)[,\s}]')


def require_same_tokens(
    first: _checkpoint.Checkpoint, other: _checkpoint.Checkpoint
) -> None:
  """Raises where rows of embeddings are of different tokens, or are more."""
  rows = {
      name: (x.shape[0], other.stored[name].shape[0])
      for name, x in first.stored.items()
      if x.shape and name in other.stored
      if x.shape[1:] == other.stored[name].shape[1:]
      if x.shape[0] != other.stored[name].shape[0]
  }
  paths = dict.fromkeys(c.source.metadata.path for c in (first, other))
  of_kind = lambda names: [
      f for p in paths if (f := _refusals.next_to(p, names))
  ]
  files = of_kind(_VOCABULARIES)
  if len(files) < 2:
    _require_same_pieces(of_kind(_PIECES))
    return
  added = [f.with_name(_ADDED) for f in files]
  if not rows and _is_same(*files) and _is_same(*added):
    return
  tokens = list(map(_tokens_of, files))
  ids = {token: i for i, token in tokens[1].items()}
  for i, token in sorted(tokens[0].items()):
    if tokens[1].get(i, token) != token or ids.get(token, i) != i:
      raise ValueError(
          f'Token {token!r} has id {i} in {files[0]}, but {ids.get(token)} in '
          f'{files[1]}: a row of the embeddings belongs to different tokens. '
          'Only models with one tokenizer can be averaged, or with the same '
          'tokens in another order: --align-tokens, align_tokens=True.'
      )
  for name, sizes in rows.items():
    if any(max(t, default=0) >= n for t, n in zip(tokens, sizes)):
      continue  # Rows of something else, such as classes.
    k = sizes[1] > sizes[0]
    more = [tokens[k].get(i) for i in range(min(sizes), max(sizes))]
    raise ValueError(
        f'{other.source.metadata.path}: leaf {_tree.name_of(name)!r} has '
        f'{sizes[1]} rows, expected {sizes[0]}. Rows {min(sizes)} to '
        f'{max(sizes) - 1} are the tokens {str(more[:3])[1:-1]}'
        f'{", ..." if len(more) > 3 else ""} of {files[k]} (None: unused). '
        'Give all models the same tokens first (with transformers: '
        'model.resize_token_embeddings, save_pretrained).'
    )


def _is_same(a: pathlib.Path, b: pathlib.Path) -> bool:
  contents = [f.read_bytes() if f.is_file() else b'' for f in (a, b)]
  return contents[0] == contents[1]


def _require_same_pieces(files: Sequence[pathlib.Path]) -> None:
  if len(files) == 2 and not _is_same(*files):
    raise ValueError(
        f'{files[0]} and {files[1]} differ: a row of the embeddings may belong '
        'to different tokens. If the tokens are the same, save both tokenizers '
        'with transformers as tokenizer.json, which is compared token by token '
        '(AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained).'
    )


def align(first: _checkpoint.Checkpoint, other: _checkpoint.Checkpoint) -> None:
  """Lets the other one be read in the order that its tokens have in the first.

  Raises a ValueError unless both have the same tokens.
  """
  paths = [c.source.metadata.path for c in (first, other)]
  files = [_refusals.next_to(path, _VOCABULARIES) for path in paths]
  by_id = [sorted(_tokens_of(file).items()) if file else [] for file in files]
  wanted, own = ({token: i for i, token in tokens} for tokens in by_id)
  odd = sorted(wanted.keys() ^ own.keys())
  if odd or not wanted:
    raise ValueError(
        f'{paths[0]} and {paths[1]} have {len(wanted)} and {len(own)} tokens '
        f'in {", ".join(_VOCABULARIES)}; only one has {str(odd[:3])[1:-1]}. '
        'Only the same tokens can be aligned: give all models the same first.'
    )
  if own == wanted:
    return
  num_ids = 1 + max(*own.values(), *wanted.values())
  size, names = _rows_of_tokens(first, num_ids)
  rest = lambda ids: sorted(set(range(size)) - set(ids.values()))
  order = np.empty(size, np.int64)
  order[rest(wanted)] = rest(own)  # Rows without tokens.
  order[list(wanted.values())] = [own[token] for token in wanted]
  stored = {name: other.stored[name] for name in names if name in other.stored}
  other.orders = {n: order for n, x in stored.items() if x.shape[:1] == (size,)}


def _rows_of_tokens(checkpoint, num_ids: int) -> tuple[int, list[_tree.Path]]:
  """The size of the vocabulary, and the leaves with so many rows."""
  path = pathlib.Path(checkpoint.source.metadata.path)
  config = path.with_name(_refusals.CONFIG)
  content = config.read_text() if config.is_file() else ''
  numbers = [(k, int(n)) for k, n in _NUMBERS.findall(content)]
  sizes = {n for key, n in numbers if key == 'vocab_size'} or {num_ids}
  size = max(sizes)
  leaves = {n: x.shape for n, x in checkpoint.stored.items() if size in x.shape}
  others = [
      key
      for key, n in numbers
      if n == size and not key.endswith(('vocab_size', '_id', '_index'))
  ] + [
      _tree.name_of(name)
      for name, shape in leaves.items()
      if size in shape[1:] or re.search(r'(^|[./])\d+[./]', '/'.join(name))
  ]
  if len(sizes) > 1 or size < num_ids or not leaves or others:
    raise ValueError(
        f'{config} has the vocab_size {sorted(sizes)}, with {num_ids} tokens '
        f'and {len(leaves)} arrays of this size. Tokens can be aligned where '
        'they are the rows of some arrays, and nothing else has this size'
        + (f', but {", ".join(others[:3])} may have.' if others else '.')
    )
  return size, list(leaves)


def _tokens_of(file: pathlib.Path) -> dict[int, str]:
  """By id; empty where the file is of a kind that is not known."""
  tokens, more = _tokens_in(file), file.with_name(_ADDED)
  is_old = file.name != _VOCABULARIES[0] and more.is_file()
  return tokens | _tokens_in(more) if tokens and is_old else tokens


def _tokens_in(file: pathlib.Path) -> dict[int, str]:
  content = file.read_bytes()
  if file.suffix == '.txt':
    lines = content.decode(errors='replace').removesuffix('\n').split('\n')
    return dict(enumerate(line.removesuffix('\r') for line in lines))
  try:
    tokens = _json.parsed(content)
    if file.name == _VOCABULARIES[0]:  # Elsewhere any key is a token.
      added = tokens.get('added_tokens') or ()
      tokens = tokens['model']['vocab']
      if isinstance(tokens, list):  # With scores, in the order of their ids.
        tokens = {token: i for i, (token, _) in enumerate(tokens)}
      tokens = tokens | {x['content']: x['id'] for x in added}
    items = tokens.items()
    return {i: token for token, i in items if isinstance(i, int) and i >= 0}
  except (AttributeError, KeyError, TypeError, ValueError):
    return {}
