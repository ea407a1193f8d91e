"""Which format a path holds."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import itertools
import math
import pathlib
import re

from etils import epath

from jaxsoup import _files
from jaxsoup import _tree
from jaxsoup.checkpoints import _equinox
from jaxsoup.checkpoints import _hub
from jaxsoup.checkpoints import _keras
from jaxsoup.checkpoints import _msgpack
from jaxsoup.checkpoints import _npz
from jaxsoup.checkpoints import _orbax
from jaxsoup.checkpoints import _safetensors
from jaxsoup.checkpoints import _sharded
from jaxsoup.checkpoints import _source
from jaxsoup.checkpoints import _torch
from jaxsoup.typing import PathLike

# Opens a file, of which an item or abstract parameters are asked.
OpenFn = Callable[[pathlib.Path, str | None, _tree.Flat | None], _source.Source]

# Formats by the endings of their files.
_FORMATS: dict[tuple[str, ...], OpenFn] = {
    _safetensors.ENDINGS: lambda path, *_: _safetensors.open_source(path),
    ('.npz',): lambda path, *_: _npz.open_source(path),
    _torch.ENDINGS: lambda path, item, _: _torch.open_source(path, item),
    ('.msgpack',): lambda path, *_: _msgpack.open_source(path),
    _keras.ENDINGS: lambda path, *_: _keras.open_source(path),
    ('.eqx',): lambda path, _, abstract: _equinox.open_source(path, abstract),
    ('.bin.index.json', '.msgpack.index.json'): (
        lambda path, *_: _open_index(path)
    ),
}
# In a directory of Hugging Face, without safetensors.
_OF_TORCH = (_torch.IN_DIRECTORY, _torch.IN_DIRECTORY + _sharded.ENDING)
_OF_FLAX = ('flax_model.msgpack', 'flax_model.msgpack' + _sharded.ENDING)
# Of flax.training.checkpoints, and of the Trainer of transformers.
_FLAX_STEP = re.compile(r'checkpoint_(\d+(?:\.\d+)?)')
_TRAINER_STEP = re.compile(r'checkpoint-(\d+)')

# What a file may be in place of that, by its name or its first bytes.
_OTHERS = {
    'a GGUF file': ('.gguf', b'GGUF'),
    'an ONNX model': ('.onnx',),
    'a TensorFlow SavedModel': ('.pb',),
    'a TensorFlow checkpoint': ('.index', '.data-00000-of-00001'),
    'an array of NumPy (np.savez writes .npz)': (b'\x93NUMPY',),
    'HDF5': ('.h5', '.hdf5', b'\x89HDF\r\n\x1a\n'),
    'a pickle, which can run code': ('.pkl', '.pickle', b'\x80'),
    'a zip archive, such as torch and np.savez write': (b'PK\3\4',),
    'a compressed archive': ('.gz', '.tar', '.bz2', '.xz', '.zst', b'\x1f\x8b'),
}  # fmt: skip

# What an array can have in NumPy.
_MOST_AXES = 64
_MOST_BYTES = 2**63 - 1


def resolve(path: PathLike, item: str | None = None) -> str:
  """The absolute path of the file or directory that holds the pytree.

  For paths as `Ingredients` takes them. A FileNotFoundError if there is no
  finished checkpoint, a ValueError if nothing tells which of several is meant.
  """
  path = _hub.local(path)
  if file := find(path) or _of_flax(path):
    return str(file)
  root = _orbax.absolute(path)
  if root.exists() and not root.is_dir():
    raise _not_read(root)
  try:
    return str(_orbax.resolve(path, item))
  except FileNotFoundError:
    if '://' in str(path) or not root.is_dir():
      raise
    if file := _below(pathlib.Path(root)):
      return str(file)
    if any(root.glob('saved_model.pb')) or any(root.glob('*.index')):
      raise _not_read(root) from None
    raise


def find(path: PathLike) -> pathlib.Path | None:
  """The file to open, if the path is one or a directory of Hugging Face."""
  if _files.is_remote(path):
    return _safetensors.find(epath.Path(path))
  path = pathlib.Path(path).absolute()
  if path.is_file():
    return path if _open_fn(path) else None
  return _safetensors.find(path) or _first_of(path, _OF_TORCH)


def _first_of(
    directory: pathlib.Path, names: Sequence[str]
) -> pathlib.Path | None:
  files = (directory / name for name in names)
  return next((file for file in files if file.is_file()), None)


def _of_flax(path: PathLike) -> pathlib.Path | None:
  """The file in a directory of flax: of Hugging Face, or the latest step."""
  path = pathlib.Path(path).absolute()
  latest = _latest(path.glob('checkpoint_*'), _FLAX_STEP)
  if file := _first_of(path, _OF_FLAX):
    return file
  return latest if latest and latest.is_file() else None  # Else Orbax's.


def _latest(
    paths: Iterable[pathlib.Path], step: re.Pattern[str]
) -> pathlib.Path | None:
  steps = {float(m[1]): p for p in paths if (m := step.fullmatch(p.name))}
  return steps[max(steps)] if steps else None


def _below(path: pathlib.Path) -> pathlib.Path | None:
  """The weights of a directory in this one: the latest of a Trainer."""
  folders = sorted(p for p in path.iterdir() if p.is_dir())
  weights = {p: file for p in folders if (file := find(p) or _of_flax(p))}
  latest = _latest(folders, _TRAINER_STEP)
  is_trainer = all(_TRAINER_STEP.fullmatch(p.name) for p in weights)
  if weights and latest and is_trainer:
    if latest not in weights:
      raise FileNotFoundError(
          f'{latest}, the latest checkpoint there, holds no weights that are '
          'read. Give the path of another one.'
      )
    return weights[latest]
  if len(weights) > 1:
    raise ValueError(
        f'{path} holds several checkpoints: {[p.name for p in weights]}. Give '
        'the path of one.'
    )
  return next(iter(weights.values()), None)


def _open_index(path: pathlib.Path) -> _source.Source:
  source = _sharded.open_source(path, lambda file: _opened(str(file)))
  if path.name not in _OF_TORCH:
    return source
  # As one file is called: a soup is written in its place.
  whole = str(path.with_name(_torch.IN_DIRECTORY))
  return source._replace(metadata=source.metadata._replace(path=whole))


def _open_fn(path: pathlib.Path) -> OpenFn | None:
  """How to open a file: by its name, or by what it begins with."""
  for endings, open_fn in _FORMATS.items():
    if path.name.endswith(endings):
      return open_fn
  return _FORMATS['.msgpack',] if _msgpack.is_dict(path) else None


def ending_of(path: pathlib.Path) -> str:
  """The ending of a file that is read by its name; '' if it is not."""
  endings = itertools.chain(*_FORMATS)
  return max(filter(path.name.endswith, endings), key=len, default='')


def _not_read(path: PathLike) -> ValueError:
  endings = ', '.join(itertools.chain(*_FORMATS))
  return ValueError(
      f'{path} seems to be {_kind_of(path)}, which is not read. Give an Orbax '
      'checkpoint or a run directory, a directory of Hugging Face, a '
      f'checkpoint_N of flax, or a file that ends in {endings}.'
  )


def _kind_of(path: PathLike) -> str:
  """What else a file may be."""
  if '://' in str(path):
    return 'a file in a bucket without the ending .safetensors'
  path = pathlib.Path(path)
  if path.is_dir():
    return 'a directory of TensorFlow'
  if not path.is_file():
    return 'a pipe or a device'
  with path.open('rb') as f:
    start = f.read(256)
  for kind, signs in _OTHERS.items():
    names = tuple(x for x in signs if isinstance(x, str))
    magic = tuple(x for x in signs if isinstance(x, bytes))
    if start.startswith(magic) or path.name.endswith(names):
      return kind
  is_text = all(byte >= 9 for byte in start)
  return 'text' if start and is_text else 'empty, or of an unknown format'


def open_source(
    resolved: str,
    item: str | None = None,
    abstract: _tree.Flat | None = None,
    is_whole: bool = False,
) -> _source.Source:
  """Opens what `resolve` returned, for an item or abstract parameters.

  Or the whole step of an Orbax checkpoint.
  """
  source = _opened(resolved, item, abstract, is_whole)
  for path, leaf in source.metadata.leaves.items():
    num_bytes = math.prod(max(n, 1) for n in leaf.shape) * leaf.dtype.itemsize
    if len(leaf.shape) > _MOST_AXES or num_bytes > _MOST_BYTES:
      raise _source.damaged(
          resolved,
          f'{_tree.name_of(path)!r} has shape {list(leaf.shape)}, which no '
          'array can have',
      )
  return source


def _opened(
    resolved, item=None, abstract=None, is_whole=False
) -> _source.Source:
  path = pathlib.Path(resolved)
  is_remote = _files.is_remote(resolved)
  if is_remote and resolved.endswith(_safetensors.ENDINGS):
    return _safetensors.open_source(epath.Path(resolved))
  if is_remote or path.is_dir():
    open_step = _orbax.open_whole if is_whole else _orbax.open_source
    return open_step(epath.Path(resolved))
  if (open_fn := _open_fn(path)) is None:
    raise _not_read(path)
  return open_fn(path, item, abstract)


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
  return open_source(resolve(path, item), item).metadata
