"""Arrays of a file by their names in it."""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import pathlib

import jax
import numpy as np

from jaxsoup import _files
from jaxsoup import _processes
from jaxsoup import _tree
from jaxsoup.checkpoints import _checkpoint
from jaxsoup.checkpoints import _directories
from jaxsoup.checkpoints import _formats
from jaxsoup.checkpoints import _orbax
from jaxsoup.checkpoints import _orbax_files
from jaxsoup.checkpoints import _safetensors
from jaxsoup.checkpoints import _soups
from jaxsoup.checkpoints import _source
from jaxsoup.typing import Config
from jaxsoup.typing import Json
from jaxsoup.typing import PathLike
from jaxsoup.typing import ShapeDtype


class Arrays(Mapping[str, np.ndarray]):
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
    metadata: what is stored with the arrays.
    separator: of keys in the names of this format.
  """

  def __init__(self, path: PathLike, *, item: str | None = None):
    """Opens a checkpoint; reads no array.

    Args:
      path: a file or directory, as for `Ingredients`.
      item: which one, where a step holds several; or which subtree.

    Raises:
      FileNotFoundError: there is no finished checkpoint.
      ValueError: it is damaged, or there are several.
    """
    source = _formats.open_source(_formats.resolve(path, item), item)
    self.path = source.metadata.path
    self.metadata, self.separator = source.metadata, source.separator
    stored = _checkpoint.below(source.metadata, item)
    paths = _orbax.without_value_keys(list(stored))
    leaves = [source.metadata.leaves[stored[p]] for p in paths.values()]
    everything = _tree.Flat(leaves, [*paths], None)
    self._checkpoint = _checkpoint.Checkpoint(source, everything, item)
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
    # A copy, because the reader reuses its memory.
    array = np.array(self._checkpoint.reader(path, sums)(index))
    self._checkpoint.verify(path, sums)
    return array


def save_arrays(
    path: PathLike,
    shapes: Mapping[str, ShapeDtype],
    arrays: Iterable[tuple[str, np.ndarray]],
    *,
    separator: str = '.',
    like: PathLike | None = None,
    configs: Mapping[str, Json] | None = None,
    metadata: Config | None = None,
) -> str:
  """Writes arrays under given names, with only one of them in memory.

  Args:
    path: a `.safetensors` file that does not exist yet; or a new directory, for
      Orbax or with other files, see `like`.
    shapes: shape and dtype of each array, by name.
    arrays: names and arrays, each of `shapes` once, in any order.
    separator: of the keys in the names, for Orbax, which stores nested dicts.
    like: a file of weights: `path` becomes a directory like that of this file,
      with `model.safetensors` and the small files there (config, tokenizer) if
      one is a config.json; not used if `path` ends in `.safetensors`.
    configs: JSON files by name that replace those.
    metadata: as in `save`.

  Returns:
    The absolute path.

  Raises:
    FileExistsError: the path exists; it is not touched.
    ValueError: the file reads back with other values.

  Example:
    >>> import tempfile
    >>> x = np.ones(2, np.float32)
    >>> path = tempfile.mkdtemp() + '/model.safetensors'
    >>> _ = save_arrays(path, {'head.weight': x}, [('head.weight', x)])
    >>> Arrays(path)['head.weight']
    array([1., 1.], dtype=float32)
  """
  path = _soups.new_path(path)
  own = _soups.own_of(None, None, metadata)
  is_file = path.name.endswith('.safetensors')
  is_orbax = not is_file and like is None
  paths = _source.paths_of(shapes, separator if is_orbax else '.')
  file = path.name if is_file else 'model.safetensors'
  targets = dict(
      zip(shapes, paths if is_orbax else ((file, *p) for p in paths))
  )

  def fill_fn(put_fn, written):
    for name, array in arrays:
      if _processes.is_main():
        put_fn(targets[name], 0, array)
    if not is_orbax:
      written.read_back()

  def end_fn(folder):
    weights = pathlib.Path(like or '')
    if _directories.is_directory(weights.parent):
      _directories.copy_other_files(weights, folder)
      for name, content in (configs or {}).items():
        _directories.write_json(folder / name, content)

  leaves = {targets[name]: x for name, x in shapes.items()}
  with _files.room_for(path):
    if is_orbax:
      _orbax_files.write(path, leaves, lambda: own, fill_fn)
    else:
      end = None if is_file else end_fn
      _safetensors.write(path, leaves, lambda: own, fill_fn, end_fn=end)
  return str(path)
