"""Reads and writes Orbax checkpoints: layouts, metadata, checksums."""

from collections.abc import Mapping
import contextlib
import hashlib
import json
import re
from typing import Any
from typing import NamedTuple
import warnings
import zlib

from absl import logging
from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxsoup import _tree

# A directory with this file holds one pytree, whoever wrote it: Orbax v0, v1
# (below `state/`) or a CheckpointManager (below `STEP/ITEM/`).
_PYTREE_FILE = '_METADATA'
_UNFINISHED = '.orbax-checkpoint-tmp'


class Metadata(NamedTuple):
  """What a checkpoint says about itself, without its arrays being read.

  Attributes:
    path: the directory that holds the pytree.
    leaves: shape and dtype of every leaf, by path.
    tree: the same as nested dicts and lists, as they were saved.
    custom: what the writer stored beside the arrays.
    checksums: CRC-32 of each leaf that we wrote, by path; empty for others.
    identity: changes when the checkpoint is written anew.
  """

  path: epath.Path
  leaves: dict[_tree.Path, jax.ShapeDtypeStruct]
  tree: Any
  custom: dict[str, Any]
  checksums: dict[str, int]
  identity: str


def resolve(path: Any, item: str | None = None) -> epath.Path:
  """The directory that holds the pytree, of a step, run or manager directory.

  Args:
    path: a checkpoint; a run directory, whose latest step is taken; or a step
      of a `CheckpointManager`.
    item: which one, where a step holds several.

  Raises:
    FileNotFoundError: there is no finished checkpoint.
    ValueError: there are several, and nothing tells which is meant.
  """
  path = epath.Path(path).absolute()
  if not path.exists():
    raise FileNotFoundError(
        f'{path} does not exist.{_siblings(path)} Give a checkpoint or a run '
        'directory.'
    )
  if not path.is_dir():
    raise ValueError(
        f'{path} is a file; an Orbax checkpoint is a directory. Give a '
        'checkpoint or a run directory.'
    )
  found = _resolve(path, item)
  if found is None:
    if _UNFINISHED in path.name or any(
        _UNFINISHED in p.name for p in _directories(path)
    ):
      raise FileNotFoundError(
          f'{path} holds only an unfinished checkpoint (its writer was '
          'stopped). Delete it, or save that run again.'
      )
    raise FileNotFoundError(
        f'{path} holds no Orbax checkpoint: neither it nor a directory below it'
        f' has a file named {_PYTREE_FILE}.'
    )
  return found


def _resolve(path: epath.Path, item: str | None) -> epath.Path | None:
  if _UNFINISHED in path.name:
    return None
  if (path / _PYTREE_FILE).exists():
    return path
  children = {
      child.name: found
      for child in _directories(path)
      if (found := _resolve(child, item)) is not None
  }
  unfinished = [p.name for p in _directories(path) if _UNFINISHED in p.name]
  if children and unfinished:
    warnings.warn(
        f'{path}: {", ".join(unfinished)} is unfinished (its writer was '
        'stopped) and skipped. Delete it, or save that step again.',
        stacklevel=2,
    )
  if item in children:
    return children[item]
  steps = {
      int(match[1]): found
      for name, found in children.items()
      if (match := re.fullmatch(r'(?:.*[_-])?(\d+)', name))
  }
  if steps and len(steps) == len(children):
    return steps[max(steps)]
  for usual in ('params', 'state', 'default'):
    if usual in children and item is None:
      return children[usual]
  if len(children) > 1:
    raise ValueError(
        f'{path} holds several checkpoints: {sorted(children)}. Give the path '
        'of one, or item=NAME.'
    )
  return next(iter(children.values()), None)


def _directories(path: epath.Path) -> list[epath.Path]:
  return sorted(p for p in path.iterdir() if p.is_dir())


def _siblings(path: epath.Path) -> str:
  if not path.parent.exists():
    return f' Nor does {path.parent}.'
  names = [p.name for p in _directories(path.parent)]
  return f' There is: {", ".join(names[:8])}.' if names else ''


def metadata(path: Any, item: str | None = None) -> Metadata:
  """Shapes, dtypes and what was stored beside them; reads no array.

  Args:
    path: a checkpoint or run directory, see `Ingredients`.
    item: which item of a step that holds several.

  Returns:
    A `Metadata`.

  Raises:
    FileNotFoundError: there is no finished checkpoint.
    ValueError: it is damaged, or there are several.
  """
  path = resolve(path, item)
  try:
    with quiet():
      tree = ocp.PyTreeCheckpointer().metadata(path)
  except Exception as e:
    raise ValueError(
        f'The metadata of {path} cannot be read: {_first_line(e)}. The '
        'checkpoint is damaged or incomplete: leave it out, or restore it from '
        'a copy.'
    ) from e
  tree = getattr(tree, 'item_metadata', tree)
  tree = getattr(tree, 'tree', tree)
  leaves = dict(_leaves(tree))
  if not leaves:
    raise ValueError(
        f'{path} names no leaf. The checkpoint is empty, damaged or incomplete:'
        ' leave it out, or restore it from a copy.'
    )
  described = _describe(path)
  custom = described.get('custom_metadata') or {}
  own = custom.get('jaxsoup', {})
  return Metadata(
      path=path,
      leaves=leaves,
      tree=tree,
      custom=custom,
      checksums=own.get('checksums', {}),
      identity=own.get('content_hash')
      or str(described.get('init_timestamp_nsecs')),
  )


def _describe(path: epath.Path) -> dict[str, Any]:
  """`_CHECKPOINT_METADATA`, which a manager writes one level up."""
  for directory in (path, path.parent):
    file = directory / '_CHECKPOINT_METADATA'
    if file.exists():
      try:
        return json.loads(file.read_text())
      except ValueError as e:
        raise ValueError(
            f'{file} is unreadable: {_first_line(e)}. The checkpoint is '
            'damaged: leave it out, or restore it from a copy.'
        ) from e
  return {}


def _leaves(tree: Any):
  with_paths, _ = jax.tree_util.tree_flatten_with_path(
      tree, is_leaf=lambda x: hasattr(x, 'shape')
  )
  for key_path, leaf in with_paths:
    dtype = leaf.dtype if leaf.dtype is not None else np.float32
    yield _tree.path_of(key_path), jax.ShapeDtypeStruct(leaf.shape, dtype)


def without_value_keys(paths: list[_tree.Path]) -> dict[_tree.Path, _tree.Path]:
  """Stored paths by the name of the leaf: `nnx.State` is stored with a last
  key `value`, which is no part of the name.
  """
  if paths and all(path[-1:] == ('value',) for path in paths):
    return {path[:-1]: path for path in paths}
  return {path: path for path in paths}


def read(
    source: Metadata, wanted: list[_tree.Path]
) -> dict[_tree.Path, np.ndarray]:
  """Reads some leaves to the host, and verifies their checksums."""
  target = _pruned(source.tree, (), set(wanted))
  to_numpy = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target
  )
  args = ocp.args.PyTreeRestore(
      item=target, restore_args=to_numpy, partial_restore=True
  )
  try:
    with quiet():
      restored = ocp.PyTreeCheckpointer().restore(source.path, args=args)
  except Exception as e:
    raise ValueError(
        f'{source.path} cannot be read: {_first_line(e)}. The checkpoint is '
        'damaged or incomplete: leave it out, or restore it from a copy.'
    ) from e
  with_paths, _ = jax.tree_util.tree_flatten_with_path(restored)
  arrays = {_tree.path_of(p): np.asarray(x) for p, x in with_paths}
  for path in wanted:
    stored = source.checksums.get(_tree.name_of(path))
    if stored is not None and checksum(arrays[path]) != stored:
      raise ValueError(
          f'Leaf {_tree.name_of(path)!r} of {source.path} is damaged: its '
          f'checksum is {checksum(arrays[path]):08x}, and {stored:08x} was '
          'stored with it. Restore the checkpoint from a copy, or leave it out.'
      )
  return {path: arrays[path] for path in wanted}


def _pruned(tree: Any, path: _tree.Path, wanted: set[_tree.Path]) -> Any:
  """The stored structure with the wanted leaves; lists stay whole."""
  if isinstance(tree, Mapping):
    return {
        key: _pruned(child, (*path, str(key)), wanted)
        for key, child in tree.items()
        if any(w[: len(path) + 1] == (*path, str(key)) for w in wanted)
    }
  if isinstance(tree, (list, tuple)) and not hasattr(tree, 'shape'):
    return type(tree)(
        jax.tree.map(lambda _: 0, child, is_leaf=lambda x: hasattr(x, 'shape'))
        for child in tree
    )
  return 0


def write(path: Any, params: Any, custom: dict[str, Any]) -> epath.Path:
  """Writes a tree as nested dicts, with a checksum for each leaf.

  It appears under its name only when it is whole.
  """
  path = epath.Path(path).absolute()
  if path.exists():
    raise FileExistsError(
        f'{path} exists and is not overwritten. Delete it, or give another '
        'path.'
    )
  flat = _tree.flatten(params)
  arrays = {p: _host_array(leaf, p) for p, leaf in zip(flat.paths, flat.leaves)}
  dotted = {'.'.join(p) for p in arrays}
  if len(dotted) < len(arrays) or () in arrays:
    raise ValueError(
        'Orbax would confuse leaves of this tree: its keys contain dots that '
        "make two paths equal (such as 'a.b' and {'a': {'b'}}), or it is a "
        'bare array. Rename the keys, or wrap it in a dict.'
    )
  checksums = {_tree.name_of(p): checksum(x) for p, x in arrays.items()}
  own = {
      'checksums': checksums,
      'content_hash': content_hash(arrays),
      **custom.pop('jaxsoup', {}),
  }
  with quiet():
    ocp.PyTreeCheckpointer().save(
        path, _tree.nest(arrays), custom_metadata={'jaxsoup': own, **custom}
    )
  return path


def _host_array(leaf: Any, path: _tree.Path) -> np.ndarray:
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    raise TypeError(
        f'Leaf {_tree.name_of(path)!r} is a PRNG key, which is no parameter. '
        'Save parameters only: nnx.state(model, nnx.Param).'
    )
  return np.asarray(jax.device_get(leaf))


def checksum(array: np.ndarray) -> int:
  """CRC-32 of the bytes: at some 7 GB/s it costs less than reading them."""
  octets = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
  return zlib.crc32(octets.data)


def content_hash(arrays: Mapping[_tree.Path, np.ndarray]) -> str:
  """One hash of a tree: of its paths, dtypes, shapes and checksums."""
  rows = [
      [_tree.name_of(p), str(x.dtype), list(x.shape), checksum(x)]
      for p, x in sorted(arrays.items())
  ]
  return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@contextlib.contextmanager
def quiet():
  """Orbax tells the log of every step it takes."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


def _first_line(error: Exception) -> str:
  return str(error).strip().split('\n')[0][:300] or type(error).__name__
