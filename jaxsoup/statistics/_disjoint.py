"""Data that choose and data that report: split, compared, kept apart."""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent import futures
import hashlib
import pathlib
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from jaxsoup.typing import Config
from jaxsoup.typing import Json
from jaxsoup.typing import Rows

_NOT_INPUTS = ('label', 'mask')
_NUM_AT_ONCE = 1024
# Files of equal size mostly differ in their last bytes.
_NUM_LAST = 4096


class Split(NamedTuple):
  """Disjoint rows of one data set.

  Attributes:
    rows: row numbers by name, each ascending.
    record: what to store: `num`, `sizes`, `seed` and `hash`, for JSON.
  """

  rows: dict[str, np.ndarray]
  record: Json


def split(
    num: int,
    sizes: Mapping[str, int],
    seed: int,
    *,
    record: Config | None = None,
) -> Split:
  """Draws disjoint rows for each role.

  Args:
    num: examples in the data set.
    sizes: how many each role gets, such as `{'select': 400, 'report': 897}`.
    seed: of the draw.
    record: that of an earlier split, which this one must repeat.

  Returns:
    A `Split`.

  Raises:
    ValueError: more rows than there are, a size below 1, or other rows than
      the record says.

  Example:
    >>> parts = split(5, {'select': 2, 'report': 3}, seed=0)
    >>> {name: rows.tolist() for name, rows in parts.rows.items()}
    {'select': [2, 4], 'report': [0, 1, 3]}
  """
  if not sizes or min(sizes.values()) < 1 or sum(sizes.values()) > num:
    raise ValueError(
        f'sizes {dict(sizes)} ask for {sum(sizes.values())} rows of {num}: '
        f'expected at least 1 each, and at most {num} in all.'
    )
  order = np.random.default_rng(seed).permutation(num)
  parts = np.split(order, np.cumsum(list(sizes.values())))
  rows = {name: np.sort(part) for name, part in zip(sizes, parts)}
  digest = hashlib.sha256()
  for name, part in rows.items():
    digest.update(f'{name}:{",".join(map(str, part.tolist()))};'.encode())
  made = dict(num=num, sizes=dict(sizes), seed=seed, hash=digest.hexdigest())
  if record is not None and dict(record) != made:
    raise ValueError(
        f'The split is {made}, the record {dict(record)}. Scores of different '
        'rows cannot be compared: pass the arguments of the record, or start '
        'over without it.'
    )
  return Split(rows, made)


def shared_rows(a: Rows, b: Rows) -> tuple[np.ndarray, np.ndarray]:
  """Which examples two data sets have in common, by content.

  Args:
    a: an array `[N, ...]`; a mapping of those; a `data.Source`; or a sequence
      of those, whose rows are counted through. Labels and masks are not
      compared: an example under two labels is one example.
    b: another, in the same form and dtype.

  Returns:
    Row numbers of a that are also in b, and rows of b that are also in a: what
    to drop from one of them.

  Example:
    >>> shared_rows(np.array([[1, 2], [3, 4]]), np.array([[3, 4], [5, 6]]))
    (array([1]), array([0]))
  """
  hashes = [list(_row_hashes(x)) for x in (a, b)]
  return _shared(*hashes)


def ids_of(data: Rows) -> np.ndarray:
  """Which examples these are, by content: what `crossed` compares.

  Args:
    data: as in `shared_rows`.

  Returns:
    `[N]` uint64; equal of equal examples, in other data sets and runs, too.

  Example:
    >>> a, b = ids_of(np.array([[1, 2], [3, 4]])), ids_of(np.array([[3, 4]]))
    >>> bool(a[1] == b[0]), bool(a[0] == b[0])
    (True, False)
  """
  return np.frombuffer(b''.join(x[:8] for x in _row_hashes(data)), np.uint64)


def check_disjoint(**sets: Rows) -> None:
  """Refuses data sets of different roles that share examples.

  What chose must not report: pass what each role sees, before it is augmented.

  Args:
    **sets: by role, such as `select=held_out, report=[test, shifted]`, each as
      in `shared_rows`.

  Raises:
    ValueError: one data set in two roles, or examples in two roles: which, how
      many, and one of them.

  Example:
    >>> check_disjoint(select=np.array([1, 2]), report=np.array([3, 4]))
  """
  names = list(sets)
  pairs = [(p, q) for i, p in enumerate(names) for q in names[i + 1 :]]
  for p, q in pairs:
    same = {id(x) for x in _parts(sets[p])} & {id(x) for x in _parts(sets[q])}
    if same:
      raise ValueError(_twice(p, q))
  hashes = {name: list(_row_hashes(x)) for name, x in sets.items()}
  for p, q in pairs:
    in_p, in_q = _shared(hashes[p], hashes[q])
    if len(in_p) == len(hashes[p]) > 0 and len(in_q) == len(hashes[q]):
      raise ValueError(_twice(p, q))
    if len(in_p):
      same_row = hashes[q].index(hashes[p][in_p[0]])
      raise ValueError(
          f'{p} and {q} share examples: {len(in_p)} of the {len(hashes[p])} '
          f'rows of {p} are also in {q} ({len(hashes[q])} rows); row '
          f'{in_p[0]} of {p} is row {same_row} of {q}. Drop them from one: '
          f'statistics.shared_rows({p}, {q}) lists them.'
      )


def check_disjoint_files(**sets: Sequence[pathlib.Path]) -> None:
  """Refuses files of different roles that have the same content.

  Only files of equal size are opened, and those with equal ends read in full.

  Args:
    **sets: by role, such as `train=paths, test=other_paths`.

  Raises:
    ValueError: files in two roles: how many contents, and two of the files.
  """
  rows: list[tuple[str, pathlib.Path, tuple[Any, ...]]]
  rows = [(role, path, ()) for role, paths in sets.items() for path in paths]
  with futures.ThreadPoolExecutor() as pool:
    for key_fn in (_size, _end, _whole):
      parts = pool.map(key_fn, [path for _, path, _ in rows])
      rows = [
          (role, path, (*key, part))
          for (role, path, key), part in zip(rows, parts)
      ]
      roles: dict[Any, set[str]] = {}
      for role, _, key in rows:
        roles.setdefault(key, set()).add(role)
      rows = [row for row in rows if len(roles[row[-1]]) > 1]
  if rows:
    keys = [key for *_, key in rows]
    same = {role: path for role, path, key in rows if key == keys[0]}
    (p, path_p), (q, path_q) = list(same.items())[:2]
    raise ValueError(
        f'{len(set(keys))} files have two roles: {path_p} of {p} and {path_q} '
        f'of {q} have the same content. Data that choose a model '
        'cannot also report its score: leave each out of one of the sets.'
    )


def _size(path: pathlib.Path) -> int:
  return path.stat().st_size


def _end(path: pathlib.Path) -> bytes:
  with path.open('rb') as file:
    file.seek(max(0, _size(path) - _NUM_LAST))
    return hashlib.blake2b(file.read(), digest_size=16).digest()


def _whole(path: pathlib.Path) -> bytes:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'blake2b').digest()


def _twice(p: str, q: str) -> str:
  return (
      f'{p} and {q} are the same data set. Data that choose a model cannot '
      'also report its score: split it with statistics.split.'
  )


def _shared(a: list[bytes], b: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
  both = set(a) & set(b)
  in_a, in_b = (
      np.array([i for i, h in enumerate(x) if h in both], np.int64)
      for x in (a, b)
  )
  return in_a, in_b


def _parts(data: Rows) -> list[Rows]:
  parts = data if isinstance(data, list | tuple) else [data]
  return [getattr(part, 'arrays', part) for part in parts]


def _row_hashes(data: Rows) -> Iterator[bytes]:
  for part in _parts(data):
    for inputs in _in_chunks(part):
      for row in zip(*map(_row_bytes, inputs)):
        digest = hashlib.blake2b(digest_size=16)
        for content in row:
          digest.update(content)
        yield digest.digest()


def _in_chunks(data: Rows) -> Iterator[list[np.ndarray]]:
  """The inputs of a data set, sorted by name, some rows at a time."""
  if hasattr(data, 'shape'):
    data = {'': data}
  num = len(next(iter(data.values())) if isinstance(data, Mapping) else data)
  for start in range(0, num, _NUM_AT_ONCE):
    end = min(start + _NUM_AT_ONCE, num)
    if isinstance(data, Mapping):
      part = {name: x[start:end] for name, x in data.items()}
    else:
      part = data[np.arange(start, end)]
    names = sorted(part.keys() - set(_NOT_INPUTS))
    yield [np.asarray(jax.device_get(part[name])) for name in names]


def _row_bytes(x: np.ndarray) -> Iterator[Any]:
  if x.dtype.kind in 'OSU':  # Texts: their width depends on the longest one.
    return (repr(row.tolist()).encode() for row in x.astype(str)[:, None])
  flat = np.ascontiguousarray(x).reshape(len(x), -1).view(np.uint8)
  return iter(flat)
