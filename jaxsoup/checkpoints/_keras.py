"""Reads the weights of Keras 3: `.keras` and `.weights.h5`.

h5py finds the arrays, which are then read from their places in the file.
"""

import io
import pathlib
from typing import Any
import zipfile

from jaxsoup.checkpoints import _npz
from jaxsoup.checkpoints import _raw
from jaxsoup.checkpoints import _source

ENDINGS = ('.keras', '.weights.h5')
_MEMBER = 'model.weights.h5'


def open_source(path: pathlib.Path) -> _source.Source:
  """Opens a file; reads only names and shapes. The optimizer is left out."""
  try:
    import h5py
  except ImportError as e:
    raise ImportError(
        f'{path} is a file of Keras, and h5py is not installed: '
        '`pip install jaxsoup[keras]`.'
    ) from e
  with _source.parsing(path), path.open('rb') as f:
    file, start = (f, 0) if path.suffix != '.keras' else _member(path, f)
    with h5py.File(file, 'r') as content:
      arrays = _arrays(path, content, start)
    if not arrays:
      raise ValueError('it holds no arrays')
  is_archive = path.suffix == '.keras'
  return _raw.source(
      path, arrays, _npz.renew_checksums if is_archive else lambda path: None
  )


def _member(path, f) -> tuple[io.BytesIO, int]:
  """The HDF5 in an archive, and where it begins."""
  with zipfile.ZipFile(path) as archive:
    info = archive.getinfo(_MEMBER)
    if info.compress_type != zipfile.ZIP_STORED:
      raise ValueError(f'{_MEMBER} is compressed, which Keras does not do')
    return io.BytesIO(archive.read(info)), _npz.data_start(f, info)


def _arrays(path, f, start: int) -> dict[tuple[str, ...], _raw.Array]:
  """The arrays of a file, of which none may be in another file."""
  import h5py

  arrays = {}

  def visit(name: str, item: Any) -> None:
    keys = tuple(name.split('/'))
    if not isinstance(item, h5py.Dataset) or keys[0] == 'optimizer':
      return
    # Of bfloat16 an attribute tells as well, but HDF5 can hang where text is
    # damaged.
    dtype = _source.checked_dtype(item.dtype)
    offset = item.id.get_offset() if item.size else 0
    is_whole = offset is not None and not (item.external or item.is_virtual)
    if not is_whole or dtype.itemsize != item.id.get_type().get_size():
      raise ValueError(f'{name!r} is not stored in one piece, as Keras does')
    arrays[keys] = _raw.Array(str(path), start + offset, item.shape, dtype)

  f.visititems(visit)  # Which follows no links to other files.
  return arrays
