"""Which format a path holds."""

import pathlib

from etils import epath

from jaxsoup.checkpoints import _npz
from jaxsoup.checkpoints import _orbax
from jaxsoup.checkpoints import _safetensors
from jaxsoup.checkpoints import _source
from jaxsoup.checkpoints import _torch
from jaxsoup.typing import PathLike

_FILES = {'.npz': _npz.open_source} | dict.fromkeys(
    _torch.SUFFIXES, _torch.open_source
)


def resolve(path: PathLike, item: str | None = None) -> str:
  """The file or directory that holds the pytree.

  Args:
    path: a `.safetensors` file or its index, or a directory with one; a `.npz`
      file; a `.pth`, `.pt` or `.bin` file of torch; an Orbax checkpoint; a run
      directory, whose latest step is taken; or a step of a `CheckpointManager`.
    item: which one, where a step holds several.

  Returns:
    Its absolute path.

  Raises:
    FileNotFoundError: there is no finished checkpoint.
    ValueError: there are several, and nothing tells which is meant.
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


def open_source(resolved: str) -> _source.Source:
  """Opens what `resolve` returned; reads no array."""
  suffix = pathlib.PurePath(resolved).suffix
  if suffix in _FILES:
    return _FILES[suffix](pathlib.Path(resolved))
  if resolved.endswith(('.safetensors', '.json')):
    return _safetensors.open_source(pathlib.Path(resolved))
  return _orbax.open_source(epath.Path(resolved))


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
