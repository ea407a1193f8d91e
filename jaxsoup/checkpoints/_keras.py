"""Reads the weights of Keras 3: `.keras` and `.weights.h5`.

h5py finds the arrays, which are then read from their places in the file.
"""

import io
import pathlib
from typing import Any
import zipfile

import jax.numpy as jnp
import numpy as np

from jaxsoup.checkpoints import _npz
from jaxsoup.checkpoints import _raw
from jaxsoup.checkpoints import _source

ENDINGS = ('.keras', '.weights.h5')
_MEMBER = 'model.weights.h5'
_OPTIMIZER = 'optimizer'


class _Part(io.FileIO):
  """A file that begins within another one."""

  start = 0

  def seek(self, offset: int, whence: int = 0, /) -> int:
    moved = offset + (self.start if whence == 0 else 0)
    return super().seek(moved, whence) - self.start

  def tell(self) -> int:
    return super().tell() - self.start


def open_source(path: pathlib.Path) -> _source.Source:
  """Opens a file; reads only names and shapes. The optimizer is left out."""
  try:
    import h5py
  except ImportError as e:
    raise ImportError(
        f'{path} is a file of Keras, and h5py is not installed: '
        '`pip install jaxsoup[keras]`.'
    ) from e
  with _source.parsing(path), _Part(path) as part:
    if path.suffix == '.keras':
      part.start = _start_of_member(path)
    with h5py.File(part, 'r') as f:
      arrays = _arrays(path, f, part.start)
    if not arrays:
      raise ValueError('it holds no arrays')
  return _raw.source(path, arrays)


def _start_of_member(path: pathlib.Path) -> int:
  with zipfile.ZipFile(path) as archive, path.open('rb') as f:
    info = archive.getinfo(_MEMBER)
    if info.compress_type != zipfile.ZIP_STORED:
      raise ValueError(f'{_MEMBER} is compressed, which Keras does not do')
    return _npz.data_start(f, info)


def _arrays(path, f, start: int) -> dict[tuple[str, ...], _raw.Array]:
  """The arrays of a file, of which none may be in another file."""
  import h5py

  num_bytes = path.stat().st_size
  arrays = {}

  def visit(name: str, item: Any) -> None:
    keys = tuple(name.split('/'))
    if not isinstance(item, h5py.Dataset) or keys[0] == _OPTIMIZER:
      return
    is_bfloat16 = item.attrs.get('dtype') == 'bfloat16' and item.dtype == 'V2'
    dtype = np.dtype(jnp.bfloat16) if is_bfloat16 else item.dtype
    array = _raw.Array(
        str(path), 0, item.shape, _source.checked_dtype(np.dtype(dtype))
    )
    offset = item.id.get_offset() if array.num_bytes else 0
    if offset is None or item.chunks or item.external or item.is_virtual:
      raise ValueError(f'{name!r} is not stored in one piece, as Keras does')
    if dtype.itemsize != item.id.get_type().get_size():
      raise ValueError(f'{name!r} has a type that NumPy lacks')
    if start + offset + array.num_bytes > num_bytes:
      raise ValueError(f'{name!r} ends after {num_bytes:,} bytes of the file')
    arrays[keys] = array._replace(start=start + offset)

  f.visititems(visit)  # Which follows no links to other files.
  return arrays
