"""Reads the files of `equinox.tree_serialise_leaves`: arrays without names.

They are in the order of the leaves of the model.
"""

from collections.abc import Iterator
import os
import pathlib

import numpy as np

from jaxsoup import _tree
from jaxsoup.checkpoints import _npz
from jaxsoup.checkpoints import _raw
from jaxsoup.checkpoints import _source

_MOST_LINE_BYTES = 1 << 20
# Python's numbers, which are leaves of a model as well.
_NUMBERS = tuple(map(np.dtype, (bool, np.int64, np.float64, np.complex128)))


def open_source(
    path: pathlib.Path, abstract: _tree.Flat | None
) -> _source.Source:
  """Opens a file; reads only shapes, and takes the names of a template."""
  if abstract is None:
    raise ValueError(
        f'{path} holds the leaves of an Equinox model without their names. '
        'Read it in Python: checkpoints.Ingredients(paths, abstract_params), '
        'where abstract_params = eqx.filter(eqx.filter_eval_shape(make_model), '
        'lambda x: isinstance(x, jax.ShapeDtypeStruct)).'
    )
  with _source.parsing(path):
    arrays = list(_arrays(path))
  if len(arrays) > len(abstract.paths):
    arrays = [a for a in arrays if a.shape or a.dtype not in _NUMBERS]
  if len(arrays) != len(abstract.paths):
    raise ValueError(
        f'{path} holds {len(arrays)} arrays, but abstract_params has '
        f'{len(abstract.paths)} leaves. Is it another model?'
    )
  return _raw.source(path, dict(zip(abstract.paths, arrays)))


def _arrays(path: pathlib.Path) -> Iterator[_raw.Array]:
  """The arrays of a file, each with a header of `np.save`."""
  with path.open('rb') as f:
    # Equinox's guide puts a line of hyperparameters first.
    if f.peek(1)[:1] == b'{':
      f.readline(_MOST_LINE_BYTES)
    while f.peek(1):
      start = f.tell()
      shape, dtype, is_fortran, length = _npz.header(f'byte {start:,}', f)
      if is_fortran and len(shape) > 1:
        raise ValueError(f'the array at byte {start:,} is in Fortran order')
      array = _raw.Array(str(path), start + length, shape, dtype)
      yield array
      f.seek(array.num_bytes, os.SEEK_CUR)
