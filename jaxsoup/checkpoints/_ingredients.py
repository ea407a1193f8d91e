"""Ingredients: a lazy sequence over checkpoints."""

from collections.abc import Iterator
from collections.abc import Sequence
from concurrent import futures

import jax
import numpy as np

from jaxsoup import _tree
from jaxsoup.checkpoints import _checkpoint
from jaxsoup.checkpoints import _formats
from jaxsoup.checkpoints import _source
from jaxsoup.checkpoints import _streaming
from jaxsoup.typing import Alpha
from jaxsoup.typing import Members
from jaxsoup.typing import Params
from jaxsoup.typing import PathLike


class Ingredients(Sequence[Params]):
  """Parameters in checkpoints, read when they are indexed.

  Pass it to any recipe in place of a list. While a recipe works on one
  ingredient the next one is read in the background. `uniform` and `average`
  read all of them in parallel, piece by piece, at the memory of the result.

  Example:
    >>> import tempfile
    >>> import jax
    >>> import numpy as np
    >>> from jaxsoup import checkpoints
    >>> run = tempfile.mkdtemp() + '/run'
    >>> _ = checkpoints.save(run, {'w': np.ones(2, np.float32)})
    >>> abstract_params = {'w': jax.ShapeDtypeStruct((2,), 'float32')}
    >>> Ingredients([run], abstract_params)[0]
    {'w': Array([1., 1.], dtype=float32)}

  Attributes:
    paths: the files or directories that hold the pytrees, as strings.
    item: as given.
  """

  def __init__(
      self,
      paths: Sequence[PathLike],
      abstract_params: Params | None = None,
      *,
      item: str | None = None,
  ):
    """Finds the checkpoints; reads no arrays.

    Args:
      paths: one for each ingredient: an Orbax checkpoint (v0 or v1); a run
        directory, whose latest finished step is taken; a directory of a
        `CheckpointManager`, or of one of its steps; a `.safetensors` file, its
        index, or a directory with one; a `.npz` file; a file of torch (`.pth`,
        `.pth.tar`, `.pt`, `.bin`, `.ckpt`), Keras (`.keras`, `.weights.h5`) or
        Equinox (`.eqx`; torch or h5py must be installed for its files); a
        `.msgpack` or `checkpoint_N` of flax. Of several `checkpoint_N`, or
        `checkpoint-N` of a Trainer, the latest is taken.
      abstract_params: parameters as `jax.ShapeDtypeStruct` (from
        `jax.eval_shape`, see also `sharding.fsdp`): what to read, in which
        container, dtypes and shardings. Each process reads what its devices
        hold. They may be inside a larger train state, where those below
        `params` come first and those of an optimizer (`opt...`) last. None
        reads what is below `params`, or all, as nested dicts.
      item: which item of a step that holds several; 'params', 'state' or
        'default' is the default. Or which subtree of the checkpoint, such as
        'ema_params' or 'state_dict_ema', where the parameters fit into several;
        or both, as in 'state/ema_params'.

    Raises:
      FileNotFoundError: a path without a finished checkpoint.
      ValueError: several checkpoints under one path. When one is read: the
        parameters are in several places of it, or in none.
      TypeError: one path in place of a list.
    """
    if isinstance(paths, (str, bytes)) or not hasattr(paths, '__len__'):
      raise TypeError(f'paths must be a list of paths, not {paths!r}.')
    self.paths = tuple(_formats.resolve(path, item) for path in paths)
    self.item = item
    self._abstract = (
        None if abstract_params is None else _tree.flatten(abstract_params)
    )
    self._checkpoints: dict[int, _checkpoint.Checkpoint] = {}
    self._pending: tuple[int, futures.Future[Params]] | None = None
    # One thread: it also keeps the reads out of the caller's mesh context,
    # which has broken restores.
    self._reader = futures.ThreadPoolExecutor(1, 'jaxsoup-reader')

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, k):
    if isinstance(k, slice):
      return [self[i] for i in range(len(self))[k]]
    k = range(len(self))[k]
    if self._pending is not None and self._pending[0] == k:
      future = self._pending[1]
    else:
      future = self._reader.submit(self._read, k)
    self._pending = None
    return future.result()

  def __iter__(self):
    for k in range(len(self)):
      params = self[k]
      if k + 1 < len(self):
        self.prefetch(k + 1)
      yield params

  def prefetch(self, k: int) -> None:
    """Starts reading ingredient k, which `self[k]` will return."""
    if self._pending is None or self._pending[0] != k:
      self._pending = k, self._reader.submit(self._read, k)

  def metadata(self, k: int) -> _source.Metadata:
    """Shapes, dtypes and stored metadata of ingredient k; reads no array."""
    return self._checkpoint(k).source.metadata

  @property
  def abstract_params(self) -> Params:
    """Shapes, dtypes and shardings of what is read; reads no array."""
    flat = self._abstract or self._checkpoint(0).flat
    return flat.replace(flat.leaves)

  def stored(self, k: int) -> dict[_tree.Path, jax.ShapeDtypeStruct]:
    """Shape and dtype of each leaf that is read, as stored; reads no array."""
    return self._checkpoint(k).stored

  def pieces(
      self, k: int, path: _tree.Path, like: int = 0
  ) -> Iterator[np.ndarray]:
    """One leaf of ingredient k as it is stored, cut along its first axis.

    Args:
      k: the ingredient.
      path: of the leaf.
      like: the ingredient whose layout says where to cut, so that the pieces
        of several go together.

    Yields:
      Each piece, good until this thread reads again.

    Raises:
      ValueError: the file is damaged; after the last piece, if its checksum
        differs.
    """
    checkpoint, sums = self._checkpoint(k), _checkpoint.Sums()
    read = checkpoint.reader(path, sums)
    for index, _ in self._checkpoint(like).plan(path):
      yield read(index)
    checkpoint.verify(path, sums)

  def content_hash(self, k: int) -> str:
    """A hash of the parameters of ingredient k, which are read if necessary."""
    if self.known_hash(k) is None:
      self[k]
    content_hash = self.known_hash(k)
    assert content_hash is not None
    return content_hash

  def known_hash(self, k: int) -> str | None:
    """`content_hash(k)`, if it was stored or ingredient k has been read."""
    return self._checkpoint(k).content_hash()

  def identity(self, k: int) -> str:
    """A text that changes when ingredient k is rewritten; reads no array."""
    return self.metadata(k).identity

  def average(
      self,
      order: Sequence[int],
      alpha: Alpha | None,
      count: float,
  ) -> tuple[Params, tuple[Members, ...]]:
    """`sum_k w_k theta_k / count`, read in parallel, piece by piece.

    What `jaxsoup.uniform` and `jaxsoup.average` call.

    Args:
      order: the ingredients that are read.
      alpha: the weights, `[K]` or a prefix tree of those; None: all one.
      count: what the sum is divided by.

    Returns:
      The average, and groups of equal ingredients among those read.
    """
    streamed = self.streamed(order, alpha, count)
    params = self._reader.submit(streamed.params).result()
    return params, streamed.duplicates()

  def streamed(
      self, order: Sequence[int], alpha: Alpha | None, count: float
  ) -> _streaming.Average:
    """The same, not yet computed: it can go to a file instead."""
    opened = {k: self._checkpoint(k) for k in order}
    return _streaming.Average(opened, order, alpha, count)

  def unsharded(self) -> 'Ingredients':
    """The same, for one process alone."""
    if self._abstract is None:  # Then extra leaves of others are mismatches.
      return Ingredients(self.paths, item=self.item)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.abstract_params
    )
    return Ingredients(self.paths, shapes, item=self.item)

  def _read(self, k: int) -> Params:
    return self._checkpoint(k).read()

  def _checkpoint(self, k: int) -> _checkpoint.Checkpoint:
    if k not in self._checkpoints:
      source = _formats.open_source(self.paths[k], self.item, self._abstract)
      self._checkpoints[k] = _checkpoint.Checkpoint(
          source, self._abstract, self.item
      )
    return self._checkpoints[k]
