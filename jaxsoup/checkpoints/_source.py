"""What all formats have in common: metadata, and arrays read in pieces."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import math
import pathlib
import threading
from typing import Any
from typing import NamedTuple
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup import _json
from jaxsoup import _tree
from jaxsoup.runtime import buckets
from jaxsoup.typing import DType
from jaxsoup.typing import Json
from jaxsoup.typing import PathLike
from jaxsoup.typing import ShapeDtype

Index = tuple[slice, ...]
ReadFn = Callable[[Index], np.ndarray]
# Is given a leaf, the byte at which a piece of it begins, and the piece.
PutFn = Callable[[_tree.Path, int, np.ndarray], None]
PatchFn = Callable[[pathlib.Path], contextlib.AbstractContextManager[PutFn]]

# An archive that unpacks to more was made to fill memory, not to hold arrays.
_MOST_UNPACKED = 1 << 30
_MOST_TIMES = 100


class Metadata(NamedTuple):
  """What a checkpoint says about itself, without its arrays being read.

  Attributes:
    path: the directory or file that holds the pytree.
    leaves: shape and dtype of every leaf, by path.
    custom: what the writer stored in addition to the arrays.
    checksums: of each leaf, by name; empty if another program wrote it.
    identity: changes when the checkpoint is rewritten.
  """

  path: str
  leaves: dict[_tree.Path, jax.ShapeDtypeStruct]
  custom: Json
  checksums: dict[str, str]
  identity: str


def plain_metadata(
    path: pathlib.Path, leaves: Mapping[_tree.Path, ShapeDtype]
) -> Metadata:
  """Those of a file with nothing but arrays."""
  shapes = {
      p: jax.ShapeDtypeStruct(x.shape, np.dtype(x.dtype).newbyteorder('='))
      for p, x in leaves.items()
  }
  return Metadata(str(path), shapes, {}, {}, state_of(path))


class Source(NamedTuple):
  """An open checkpoint.

  Attributes:
    metadata: what it says about itself.
    reader_fn: `path -> (index -> array)`: reads a part of one leaf, which is
      good until the same thread reads again. Threads may read at the same time.
    rows_fn: `path -> int`: how many rows are the least that can be read.
    separator: of the keys of a path, in the names of the format.
    layout: of an Orbax checkpoint: an `_orbax_layout.Layout`.
    patch_fn: of a file that can be copied with other values in place of its
      own: opens the copy, and yields a `PutFn`. Files that an index lists are
      copied next to that of the index.
  """

  metadata: Metadata
  reader_fn: Callable[[_tree.Path], ReadFn]
  rows_fn: Callable[[_tree.Path], int] = lambda path: 1
  separator: str = '/'
  layout: Any = None
  patch_fn: 'PatchFn | None' = None


_scratch = threading.local()
_MOST_KEPT = 32 << 20


def scratch(name: str, shape: Sequence[int], dtype: DType) -> np.ndarray:
  """Memory of this thread that is reused, unless it is large: fresh pages are
  slow.

  It has any values, and is good until the next call with this name.
  """
  size = math.prod(shape) * np.dtype(dtype).itemsize
  if size > _MOST_KEPT:
    return np.empty(shape, dtype)
  memory = vars(_scratch).get(name)
  if memory is None or memory.size < size:
    memory = vars(_scratch)[name] = np.empty(size, np.uint8)
  return memory[:size].view(dtype).reshape(shape)


def reordered(read: ReadFn, order: np.ndarray) -> ReadFn:
  """Reads what `read` would if the rows of the array were in this order."""

  def read_in_order(index):
    rows = order[index[0]]
    runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    slices = [slice(int(run[0]), int(run[-1]) + 1) for run in runs]
    return np.concatenate([read((s, *index[1:])).copy() for s in slices])

  return read_in_order


def paths_of(names: Iterable[str], separator: str) -> list[_tree.Path]:
  """`a.b.weight` as nested keys; flat where one name is a prefix of another."""
  names = list(names)
  paths = [tuple(name.split(separator)) for name in names]
  groups = {p[:n] for p in paths for n in range(len(p))}
  if groups & set(paths):
    return [(name,) for name in names]
  return paths


def checked_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
  """A dtype that a file names; a ValueError if jax has no such numbers.

  NumPy has no bfloat16: two bytes without a type are that.
  """
  dtype = np.dtype(jnp.bfloat16) if dtype == 'V2' else dtype
  is_number = any(jnp.issubdtype(dtype, x) for x in (np.number, np.bool_))
  if not is_number or dtype in (np.longdouble, np.clongdouble):
    raise ValueError(f'dtype {dtype} is not one of numbers that jax has')
  return dtype


def checked_shape(shape: Sequence[Any]) -> tuple[int, ...]:
  """A shape that a file names; a ValueError if no array can have it."""
  if not all(type(n) is int and n >= 0 for n in shape):
    raise ValueError(f'an array has the shape {shape}')
  return tuple(shape)


# What is stored with the arrays, by name, and its types as JSON.
_OWN: dict[str, Any] = {
    'alpha': (dict, list),
    'checksums': dict,
    'content_hash': str,
    'files': dict,
    'info': dict,
    'ingredients': list,
    'metadata': dict,
}  # fmt: skip


def own_of(content: Any) -> Json:
  """What we stored with arrays, without its checksum.

  A TypeError if a value has another type than it must have; a ValueError if it
  was changed after it was written.
  """
  if not isinstance(content, dict):
    raise TypeError('what is stored with it is not a JSON object')
  own = _json.unsealed(content)
  for key, kind in _OWN.items():
    if own.get(key) is not None and not isinstance(own[key], kind):
      raise TypeError(f'its entry {key} is {str(own[key])[:60]!r}')
  is_outside = lambda p: p.is_absolute() or '..' in p.parts
  if odd := [f for f in own.get('files') or () if is_outside(pathlib.Path(f))]:
    raise TypeError(f'{odd[0]!r} is not a file of its directory')
  for key in ('checksums', 'files'):
    if not all(isinstance(x, str) for x in (own.get(key) or {}).values()):
      raise TypeError(f'a checksum in its entry {key} is not text')
  return own


def check_archive(archive: zipfile.ZipFile) -> None:
  """Raises a ValueError where a small archive would become a large one."""
  infos = archive.infolist()
  unpacked = sum(i.file_size for i in infos)
  packed = sum(i.compress_size for i in infos)
  if unpacked > max(_MOST_UNPACKED, _MOST_TIMES * packed):
    raise ValueError(
        f'its {packed:,} bytes would become {unpacked:,} when they are unpacked'
    )


class DamagedError(ValueError):
  """A checkpoint that cannot be read, or whose values changed."""


def damaged(path: PathLike, why: object) -> DamagedError:
  """The error for a checkpoint that cannot be read; `why` may be an error."""
  said = str(why).strip().split('\n')[0][:300] or type(why).__name__
  return DamagedError(
      f'{path} cannot be read: {said}. The checkpoint is damaged or incomplete:'
      ' leave it out, or restore it from a copy.'
  )


@contextlib.contextmanager
def parsing(path: PathLike) -> Iterator[None]:
  """For parsers, which raise all kinds of errors on invalid bytes."""
  try:
    yield
  except FileNotFoundError:
    raise
  except Exception as e:
    raise damaged(path, e) from e


def state_of(*files: PathLike) -> str:
  """Sizes and times of files: changes when they are rewritten."""
  stats = [buckets.stat(file) for file in files]
  return ' '.join(f'{size}-{version}' for size, version in stats)
