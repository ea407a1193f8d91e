"""Arrays of a file by the names that they have there."""

from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxsoup import _tree
from jaxsoup.checkpoints import _checkpoint
from jaxsoup.checkpoints import _formats
from jaxsoup.checkpoints import _orbax


class Arrays(Mapping):
  """Arrays of a checkpoint by their names in it, read when they are indexed.

  For files of other libraries, whose names are not those of our models:
  `models.load` reads them through this.

  Example:
    >>> import tempfile
    >>> from jaxsoup import checkpoints
    >>> file = tempfile.mkdtemp() + '/model.safetensors'
    >>> _ = checkpoints.save(file, {'head': {'weight': np.ones(2, 'f4')}})
    >>> arrays = Arrays(file)
    >>> list(arrays), arrays['head.weight']
    (['head.weight'], array([1., 1.], dtype=float32))

  Attributes:
    path: the file or directory, as a string.
    shapes: shape and dtype of each array, by name.
    metadata: what is stored beside the arrays.
    separator: of keys in the names of this format.
  """

  def __init__(self, path: Any, *, item: str | None = None):
    """Opens a checkpoint; reads no array.

    Args:
      path: a file or directory, as for `Ingredients`.
      item: which one, where a step holds several.

    Raises:
      FileNotFoundError: there is no finished checkpoint.
      ValueError: it is damaged, or there are several.
    """
    source = _formats.open_source(_formats.resolve(path, item))
    self.path = source.metadata.path
    self.metadata, self.separator = source.metadata, source.separator
    leaves = source.metadata.leaves
    paths = _orbax.without_value_keys(list(leaves))
    everything = _tree.Flat([leaves[p] for p in paths.values()], [*paths], None)
    self._checkpoint = _checkpoint.Checkpoint(source, everything)
    self._paths = {source.separator.join(p): p for p in paths}
    self.shapes: dict[str, jax.ShapeDtypeStruct] = dict(
        zip(self._paths, everything.leaves)
    )

  def __len__(self) -> int:
    return len(self._paths)

  def __iter__(self) -> Iterator[str]:
    return iter(self._paths)

  def __getitem__(self, name: str) -> np.ndarray:
    path, sums = self._paths[name], _checkpoint.Sums()
    index = tuple(slice(0, n) for n in self.shapes[name].shape)
    # A copy: the reader uses its memory again.
    array = np.array(self._checkpoint.reader(path, sums)(index))
    self._checkpoint.verify(path, sums)
    return array
