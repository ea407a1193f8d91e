"""Which format a path holds."""

import math
import pathlib

from etils import epath

from jaxsoup import _tree
from jaxsoup.checkpoints import _npz
from jaxsoup.checkpoints import _orbax
from jaxsoup.checkpoints import _safetensors
from jaxsoup.checkpoints import _source
from jaxsoup.checkpoints import _torch
from jaxsoup.typing import PathLike

_FILES = {'.npz': _npz.open_source} | dict.fromkeys(
    _torch.SUFFIXES, _torch.open_source
)

# What an array can have in NumPy.
_MOST_AXES = 64
_MOST_BYTES = 2**63 - 1


def resolve(path: PathLike, item: str | None = None) -> str:
  """The absolute path of the file or directory that holds the pytree.

  For paths as `Ingredients` takes them. A FileNotFoundError if there is no
  finished checkpoint, a ValueError if nothing tells which of several is meant.
  """
  return str(find(path) or _orbax.resolve(path, item))


def find(path: PathLike) -> pathlib.Path | None:
  """The file to open, if the path is one or a directory of Hugging Face."""
  if '://' in str(path):
    return None
  path = pathlib.Path(path).absolute()
  if path.is_file() and path.suffix in _FILES:
    return path
  file = _safetensors.find(path)
  if file is None and (path / _torch.IN_DIRECTORY).is_file():
    return path / _torch.IN_DIRECTORY
  return file


def open_source(resolved: str, is_whole: bool = False) -> _source.Source:
  """Opens what `resolve` returned, or its whole step; reads no array."""
  source = _opened(resolved, is_whole)
  for path, leaf in source.metadata.leaves.items():
    num_bytes = math.prod(max(n, 1) for n in leaf.shape) * leaf.dtype.itemsize
    if len(leaf.shape) > _MOST_AXES or num_bytes > _MOST_BYTES:
      raise _source.damaged(
          resolved,
          f'{_tree.name_of(path)!r} has shape {list(leaf.shape)}, which no '
          'array can have',
      )
  return source


def _opened(resolved: str, is_whole: bool) -> _source.Source:
  suffix = pathlib.PurePath(resolved).suffix
  if suffix in _FILES:
    return _FILES[suffix](pathlib.Path(resolved))
  if resolved.endswith(('.safetensors', '.json')):
    return _safetensors.open_source(pathlib.Path(resolved))
  open_fn = _orbax.open_whole if is_whole else _orbax.open_source
  return open_fn(epath.Path(resolved))


def metadata(path: PathLike, item: str | None = None) -> _source.Metadata:
  """Shapes, dtypes and what was stored with them; reads no array.

  Args:
    path: a checkpoint or run directory, see `Ingredients`.
    item: which item of a step that holds several.

  Returns:
    A `Metadata`.

  Raises:
    FileNotFoundError: there is no finished checkpoint.
    ValueError: it is damaged, or there are several.
  """
  return open_source(resolve(path, item)).metadata
