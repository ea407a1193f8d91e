"""Ingredients: a lazy sequence over checkpoints."""

from collections.abc import Iterator
from collections.abc import Sequence
from concurrent import futures
import contextlib
import copy
import fnmatch
import functools
import pathlib
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp

from jaxsoup import _checked
from jaxsoup import _tree
from jaxsoup import _warnings
from jaxsoup.checkpoints import _checkpoint
from jaxsoup.checkpoints import _formats
from jaxsoup.checkpoints import _hub
from jaxsoup.checkpoints import _orbax
from jaxsoup.checkpoints import _orbax_layout
from jaxsoup.checkpoints import _refusals
from jaxsoup.checkpoints import _source
from jaxsoup.checkpoints import _streaming
from jaxsoup.checkpoints import _tokens
from jaxsoup.typing import Alpha
from jaxsoup.typing import DType
from jaxsoup.typing import Members
from jaxsoup.typing import Params
from jaxsoup.typing import PathLike

# Buffers that some versions of torch and transformers do not save.
OF_FIRST = ('*position_ids', '*num_batches_tracked')


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
    item, whole, dtype: as given.
  """

  def __init__(
      self,
      paths: Sequence[PathLike],
      abstract_params: Params | None = None,
      *,
      item: str | None = None,
      whole: bool = False,
      dtype: DType | None = None,
      ignore: Sequence[str] = (),
      intersect: bool = False,
      align_tokens: bool = False,
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
        `checkpoint-N` of a Trainer, the latest is taken. Or a model on the
        Hugging Face hub, `ORG/NAME` or `ORG/NAME@REVISION`, unless a folder ORG
        is here (huggingface_hub must be installed).
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
      whole: without `abstract_params`: read the whole state of a training, with
        its optimizer, and not only the model.
      dtype: of all floats, in which ingredients of different dtypes are read.
        An average adds up what is stored, in float32 or wider, and rounds once.
      ignore: patterns such as 'head*' for the names of leaves that are not
        averaged: those of the first ingredient are taken, and what only others
        have is left out. `position_ids` and `num_batches_tracked` are of this
        kind where some lack them, and with `abstract_params`.
      intersect: leaves out what some ingredients lack, with a warning. No
        effect with `abstract_params`, which say what is wanted.
      align_tokens: reads embeddings and heads in the order that the tokens have
        in the first of several Hugging Face directories, which must all have
        the same tokens.

    Raises:
      FileNotFoundError: a path without a finished checkpoint.
      ValueError: several checkpoints under one path. When one is read: the
        parameters are in several places of it, or in none.
      TypeError: one path in place of a list.
    """
    if isinstance(paths, (str, bytes)) or not hasattr(paths, '__len__'):
      raise TypeError(f'paths must be a list of paths, not {paths!r}.')
    paths = list(map(_hub.local, paths))
    self._given = [_orbax.absolute(path) for path in paths]
    self.paths = tuple(_formats.resolve(path, item) for path in paths)
    self.item = item
    self.whole = whole
    self._abstract = (
        None if abstract_params is None else _tree.flatten(abstract_params)
    )
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(f'dtype is {dtype}, expected one of floats.')
    self.dtype = dtype
    self._ignore = tuple(ignore)
    self._may_lack = (*ignore, *OF_FIRST)
    self._intersect = intersect
    self._align_tokens = align_tokens
    self._opened: dict[int, _checkpoint.Checkpoint] = {}
    self._checkpoints: dict[int, _checkpoint.Checkpoint] = {}
    # At most one.
    self._pending: dict[int, futures.Future[Params]] = {}
    self._reader = _new_reader()

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, k):
    if isinstance(k, slice):
      return [self[i] for i in range(len(self))[k]]
    k = range(len(self))[k]
    self.prefetch(k)
    return self._pending.pop(k).result()

  def __iter__(self):
    return (params for _, params in _checked.in_order(self, range(len(self))))

  def __copy__(self) -> 'Ingredients':
    """The same, for another thread."""
    other = object.__new__(type(self))
    own: dict[str, Any] = {'_pending': {}, '_opened': {}, '_checkpoints': {}}
    vars(other).update({**vars(self), **own, '_reader': _new_reader()})
    vars(other).pop('_common', None)
    return other

  def __getstate__(self) -> dict[str, Any]:
    """Paths and options, but no shardings: devices are those of a process."""
    state = vars(self.unsharded())
    del state['_reader']
    if (flat := state['_abstract']) is not None:
      state['_abstract'] = flat.replace(flat.leaves)
    return state

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state, _reader=_new_reader())
    if self._abstract is not None:
      self._abstract = _tree.flatten_in_place(self._abstract)

  def prefetch(self, k: int) -> None:
    """Starts reading ingredient k, which `self[k]` will return."""
    if k not in self._pending:
      self._pending = {k: self._reader.submit(self._read, k)}

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
    first = {n: self._checkpoint(0).stored[n] for n in self._of_first(k)}
    return self._checkpoint(k).stored | first

  def content_hash(self, k: int) -> str:
    """A hash of the parameters of ingredient k, which are read if necessary.

    Raises:
      ValueError: each of several processes reads a part of them only.
    """
    if self.known_hash(k) is None:
      self[k]
    if (content_hash := self.known_hash(k)) is None:
      raise ValueError(
          f'{self.paths[k]}: no process reads all of it. Make the ingredients '
          'without shardings in abstract_params.'
      )
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
    _checked.require_ingredients(self)
    for k in order:
      self.require_averageable(k)
    of_first = {name for k in order for name in self._of_first(k)}
    first = 0 if of_first else order[0]
    opened = {k: self._checkpoint(k) for k in (first, *order)}
    return _streaming.Average(
        opened, order, alpha, count, first, of_first, self.look_for_stop
    )

  def require_averageable(self, k: int) -> None:
    """Raises a ValueError where ingredient k is quantized, has LoRA factors, or
    another tokenizer than the first.

    Recipes call it before they read the ingredient.
    """
    _refusals.require_averageable(self._checkpoint(k))
    if not self._checkpoint(k).orders:
      _tokens.require_same_tokens(self._checkpoint(0), self._checkpoint(k))

  def targets(self) -> tuple[Any, dict[_tree.Path, _tree.Path]]:
    """The Orbax layout of a soup, None if the first ingredient has no such
    layout, and the path there of each leaf that is read.
    """
    first = self._checkpoint(0)
    layout = first.source.layout
    if layout is None:
      return None, first.places
    number = lambda step: int((re.findall(r'\d+', step) or ['-1'])[-1])
    step = max(map(self._step, range(len(self))), key=number)
    return layout._replace(step=step), first.targets

  def meaning(self) -> list[Any]:
    """All that decides what an average of these is, apart from alpha."""
    first = self._checkpoint(0)
    read = sorted(map(list, first.places.values()))
    options = [self.item, self.whole, self._ignore, self._align_tokens]
    return [*map(self.identity, range(len(self))), options, read]

  def file_at(self, path: pathlib.Path) -> pathlib.Path | None:
    """Where a copy of the first ingredient's file goes for a soup at this path;
    None if that soup is not to be such a copy.
    """
    source, given = self._checkpoint(0).source, pathlib.Path(self._given[0])
    file = pathlib.Path(source.metadata.path)
    if source.patch_fn is None or file.suffix == '.safetensors':
      return None
    ending = _formats.ending_of(file)
    if given == file:
      is_alike = _formats.ending_of(path) == ending
      return path if is_alike and not ending.endswith('.json') else None
    is_of_flax = ending in ('', '.msgpack', '.msgpack.index.json')
    return path / file.relative_to(given) if is_of_flax else None

  @property
  def given(self) -> tuple[str, ...]:
    """Absolute paths as they were given: directories of Hugging Face, too."""
    return tuple(map(str, self._given))

  def ending(self) -> str:
    """That of the first ingredient if a file was given, else ''."""
    given = pathlib.Path(self._given[0])
    is_file = str(given) == self.paths[0] and given.is_file()
    return _formats.ending_of(given) if is_file else ''

  @contextlib.contextmanager
  def patched(self, file: pathlib.Path) -> Iterator[_source.PutFn]:
    """A copy of the first ingredient's file, with other values put into it."""
    first = self._checkpoint(0)
    shutil.copyfile(first.source.metadata.path, file)
    assert first.source.patch_fn is not None
    averages = first.moving_averages()
    with first.source.patch_fn(file) as put:

      def put_all(name, start, piece):
        for place in (first.targets[name], *averages[name]):
          put(place, start, piece)

      yield put_all

  def _step(self, k: int) -> str:
    """Where a checkpoint lies in the run that was given."""
    layout, given = self._checkpoint(k).source.layout, self._given[k]
    if layout is None or layout.root == given:
      return layout.step if layout else ''
    if layout.root.is_relative_to(given):
      return str(layout.root.relative_to(given))
    return layout.step

  def left_out(self) -> list[str]:
    """What the first checkpoint holds in addition to what is read, as text."""
    first = self._checkpoint(0)
    said = [
        f'{k} ({n} array{"s" * (n > 1)})' for k, n in first.left_out().items()
    ]
    items = first.source.layout.items() if first.source.layout else []
    return said + [f'item {p.name}' for p in items if _orbax_layout.is_tree(p)]

  def of(self, paths: Sequence[PathLike]) -> 'Ingredients':
    """Other checkpoints with the same options, but without a template."""
    others = copy.copy(self)
    paths = list(map(_hub.local, paths))
    others._given = [_orbax.absolute(path) for path in paths]
    others.paths = tuple(_formats.resolve(path, self.item) for path in paths)
    others._abstract = None
    return others

  def unsharded(self) -> 'Ingredients':
    """The same, for one process alone."""
    alone = copy.copy(self)
    if (flat := self._abstract) is not None:
      # Or extra leaves of others would not match.
      shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
      alone._abstract = flat._replace(leaves=list(map(shape, flat.leaves)))
    return alone

  def look_for_stop(self) -> None:
    """Called between two leaves of a long average; may raise to end it."""

  def _read(self, k: int) -> Params:
    params = self._checkpoint(k).read()
    if not (names := self._of_first(k)):
      return params
    first = self._checkpoint(0)
    leaves = _by_path(first.part(names).read()) | _by_path(params)
    if leaves.keys() != set(first.flat.paths):
      return _tree.nest(leaves)  # A mismatch, which recipes report.
    return first.flat.replace(leaves[path] for path in first.flat.paths)

  def _whole_checkpoint(self, k: int) -> _checkpoint.Checkpoint:
    if k not in self._opened:
      is_whole = self.whole and self.item is None
      source = _formats.open_source(
          self.paths[k], self.item, self._abstract, is_whole
      )
      abstract = self._abstract
      if k and abstract is not None:
        leaves = abstract.by_path
        kept = {
            name: leaf
            for name, leaf in leaves.items()
            if not is_named(name, self._may_lack)
        }
        if len(kept) < len(leaves):
          abstract = _tree.flatten_in_place(_tree.nest(kept))
      whole = _checkpoint.Checkpoint(source, abstract, self.item, self.whole)
      if self.dtype is not None:
        whole.flat = _in_dtype(whole.flat, self.dtype)
      if k and self._align_tokens:
        _tokens.align(self._whole_checkpoint(0), whole)
      self._opened[k] = whole
    return self._opened[k]

  def _checkpoint(self, k: int) -> _checkpoint.Checkpoint:
    """What is averaged of ingredient k; of the first, all that a soup has."""
    if k not in self._checkpoints:
      whole = self._whole_checkpoint(k)
      names = [n for n in whole.stored if self._is_wanted(k, n)]
      part = whole.part(names) if len(names) < len(whole.stored) else whole
      self._checkpoints[k] = part
    return self._checkpoints[k]

  def _is_wanted(self, k: int, name: _tree.Path) -> bool:
    if is_named(name, self._ignore):
      return not k
    if self._common is not None and name not in self._common:
      return not k and is_named(name, OF_FIRST)
    is_in_first = not k or name in self._checkpoint(0).stored
    return is_in_first or not is_named(name, OF_FIRST)

  def _of_first(self, k: int) -> list[_tree.Path]:
    """The leaves that ingredient k takes from the first one."""
    own, first = self._checkpoint(k).stored, self._checkpoint(0).stored
    return [n for n in first if n not in own and is_named(n, self._may_lack)]

  @functools.cached_property
  def _common(self) -> set[_tree.Path] | None:
    """What all have, if only that is wanted; checks and tells what is not."""
    if self._abstract is not None or not (self._ignore or self._intersect):
      return None
    names = [
        self._whole_checkpoint(k).stored.keys() for k in range(len(self.paths))
    ]
    union, common = set().union(*names), set(names[0]).intersection(*names)
    for pattern in self._ignore:
      if not any(is_named(name, [pattern]) for name in union):
        raise ValueError(
            f'No leaf has a name like {pattern!r}, which is to be ignored. '
            f'Names are {", ".join(sorted(map(_tree.name_of, union))[:6])}, ...'
        )
    if not self._intersect:
      return None
    out = [n for n in union - common if not is_named(n, self._may_lack)]
    if not common:
      raise ValueError(
          f'There is nothing that all {len(names)} ingredients have: are they '
          'models of one architecture? Compare with `jaxsoup inspect`.'
      )
    if out:
      _warnings.warn(
          f'{len(out)} leaves that not all ingredients have are left out: '
          + _checked.listed(sorted(map(_tree.name_of, out)))
      )
    return common


def first_of(ingredients: Ingredients) -> _checkpoint.Checkpoint:
  """All that a soup of these ingredients has, as it lies in the first one."""
  return ingredients.of(ingredients.paths)._checkpoint(0)


def _new_reader() -> futures.ThreadPoolExecutor:
  # One thread: it also keeps the reads out of the caller's mesh context,
  # which has broken restores.
  return futures.ThreadPoolExecutor(1, 'jaxsoup-reader')


def _by_path(tree: Params) -> dict[_tree.Path, jax.Array]:
  return _tree.flatten_in_place(tree).by_path


def _in_dtype(flat: _tree.Flat, dtype: DType) -> _tree.Flat:
  def cast(x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

  return flat._replace(leaves=list(map(cast, flat.leaves)))


def is_named(path: _tree.Path, patterns: Sequence[str]) -> bool:
  """With keys joined by `/` as in our messages, or by dots as in torch."""
  return any(
      fnmatch.fnmatchcase(separator.join(path), pattern)
      for pattern in patterns
      for separator in '/.'
  )
