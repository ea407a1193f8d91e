"""Soups on disk: parameters, alpha, and provenance."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import pathlib
import platform
from typing import Any

import jax
import numpy as np

import jaxsoup
from jaxsoup import _files
from jaxsoup import _json
from jaxsoup import _processes
from jaxsoup import _soup
from jaxsoup import _tree
from jaxsoup import _warnings
from jaxsoup._soup import Soup
from jaxsoup.checkpoints import _card
from jaxsoup.checkpoints import _formats
from jaxsoup.checkpoints import _ingredients
from jaxsoup.checkpoints import _orbax
from jaxsoup.checkpoints import _orbax_files
from jaxsoup.checkpoints import _orbax_layout
from jaxsoup.checkpoints import _resumable
from jaxsoup.checkpoints import _safetensors
from jaxsoup.checkpoints import _source
from jaxsoup.checkpoints import _streaming
from jaxsoup.typing import Alpha
from jaxsoup.typing import Config
from jaxsoup.typing import Json
from jaxsoup.typing import Params
from jaxsoup.typing import PathLike
from jaxsoup.typing import ShapeDtype

_FILE = '.safetensors'
SIDECAR_FILE = 'soup.json'  # In a Hugging Face directory.
_TYPES = {'AtMost': _soup.AtMost} | {
    cls.__name__: cls
    for cls in vars(_soup).values()
    if isinstance(cls, type) and issubclass(cls, tuple)
}


def save(
    path: PathLike,
    params: Params | Soup[_soup.Info],
    *,
    ingredients: _ingredients.Ingredients | None = None,
    metadata: Config | None = None,
) -> str:
  """Writes a soup with its provenance, or plain parameters.

  An Orbax checkpoint, in the layout of its ingredients if those are given: the
  item and the keys at which their owner looks for the parameters, in a step of
  the same number. Otherwise nested dicts with string keys, which any Orbax
  restores; or one safetensors file, with keys joined by dots.
  In addition to the arrays it holds a checksum for each leaf, alpha and info,
  and the provenance: each ingredient's path and content hash, the versions of
  the packages, the command and the time. It gets its name only when it is
  complete.

  Args:
    path: a directory that does not exist yet; or a new file whose name ends in
      `.safetensors`, which holds the same.
    params: a `Soup`, or a pytree of parameters.
    ingredients: the `checkpoints.Ingredients` of a soup.
    metadata: anything that JSON can store: seed, config, scores.

  Returns:
    The absolute path.

  Raises:
    FileExistsError: the path exists; it is not touched.
    ValueError, TypeError: metadata that JSON cannot store, or leaves that
      cannot be saved.
    OSError: the disk is full.

  Example:
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + '/soup'
    >>> soup = jaxsoup.uniform([{'w': np.float32([x])} for x in (1, 2)])
    >>> _ = save(path, soup, metadata={'seed': 0})
    >>> load(path).params, provenance(path)['metadata']
    ({'w': Array([1.5], dtype=float32)}, {'seed': 0})
  """
  soup = params if isinstance(params, Soup) else None
  params = params.params if isinstance(params, Soup) else params
  own = own_of(soup, ingredients, metadata)
  _warn_of_modules(ingredients)
  return _write(path, _orbax.savable(params), lambda: own, ingredients)


def _write(path, leaves, own_fn, ingredients, streamed=None, key=None) -> str:
  """Writes leaves, or those of an average, in the format of the path."""
  file = _file_at(path, ingredients, leaves)
  path = new_path(path)
  layout, targets = _orbax_layout.BARE, {p: p for p in leaves}
  is_orbax = file is None and path.suffix != _FILE
  if file is None and not is_orbax:
    targets = {p: (path.name, *p) for p in leaves}
  elif is_orbax and ingredients is not None:
    found, places = ingredients.targets()
    if found is not None and places.keys() == leaves.keys():
      layout, targets = found, places

  def fill_fn(put_fn, written):
    if streamed is not None:
      streamed.put_all(put_fn, targets, written)
      return
    for name, leaf in leaves.items():
      leaf = leaf if is_orbax else _processes.gathered(leaf)
      if _processes.is_main() or _processes.is_spread(leaf):
        put_fn(targets[name], 0, leaf)

  placed = {targets[name]: leaf for name, leaf in leaves.items()}
  with _files.room_for(path):
    if file is not None:
      _write_copy(path, file, leaves, own_fn, fill_fn, ingredients)
    elif is_orbax:
      _orbax_files.write(path, placed, own_fn, fill_fn, layout, key)
    else:
      # Hashes of ingredients, and duplicates, are known when all is read.
      num_more = 200 * len(ingredients) if streamed is not None else 0
      _safetensors.write(path, placed, own_fn, fill_fn, num_more, key=key)
  return str(path)


def _warn_of_modules(ingredients: _ingredients.Ingredients | None) -> None:
  """Of sentence-transformers, which only their directories have."""
  from jaxsoup.checkpoints import _directories

  folder = pathlib.Path(ingredients.paths[0] if ingredients else '').parent
  if ingredients and (left_out := _directories.modules_with_weights(folder)):
    _warnings.warn(
        f'The soup has the root module of {folder} only, not '
        f'{", ".join(left_out)}. checkpoints.save_directory, or --out with a '
        'new directory, averages these modules too.'
    )


def _write_copy(path, file, leaves, own_fn, fill_fn, ingredients) -> None:
  """Writes a soup as a copy of the first file, with other values.

  Alpha and what else is known of a soup are next to it: `soup.json` in a
  directory, else `NAME.soup.json`. The main process does it.
  """
  from jaxsoup.checkpoints import _directories

  stored = ingredients.stored(0)
  for name, leaf in leaves.items():
    if _tree.is_float(leaf) and leaf.dtype != stored[name].dtype:
      raise ValueError(
          f'{path} is to be like {ingredients.paths[0]}, where '
          f'{_tree.name_of(name)!r} is {stored[name].dtype}, not {leaf.dtype}. '
          'Save a .safetensors file, or leave the dtype as it is.'
      )
  is_main, is_file = _processes.is_main(), file == path
  with _resumable.shared(path, is_file=is_file) as shared:
    folder = pathlib.Path(shared)
    made = folder / (path.name if is_file else file.relative_to(path))
    written = _resumable.Written(shared, {}, is_kept=False)
    written.num_writers = 1
    with _processes.together(), contextlib.ExitStack() as stack:
      put_fn: Any = None
      if is_main:
        made.parent.mkdir(parents=True, exist_ok=True)
        put_fn = stack.enter_context(ingredients.patched(made))
      # jax has no 64-bit integers by default.
      cast = lambda n, x: x.astype(stored[n].dtype)
      fill_fn(lambda n, start, x: put_fn(n, start, cast(n, x)), written)
    with _processes.together():
      if is_main and not is_file:
        first = pathlib.Path(ingredients.paths[0])
        _directories.copy_other_files(first, made.parent)
        sidecar_file(folder).write_text(json.dumps(_json.sealed(own_fn())))
  if is_main and is_file:
    sidecar_file(path).write_text(json.dumps(_json.sealed(own_fn())))


def save_average(
    path: PathLike,
    ingredients: _ingredients.Ingredients,
    alpha: Alpha | None = None,
    *,
    metadata: Config | None = None,
    resume: bool = False,
) -> str:
  """Averages checkpoints on disk, without holding a model in memory.

  `theta = sum_k alpha_k theta_k`, piece by piece from file to file: what
  `save(path, uniform(ingredients), ingredients=ingredients)` writes, in some
  hundred megabytes of memory whatever the size and number of the models; into
  a bucket, in that of one model.
  Several processes each take a part of the leaves, except of a copy of the
  first file, such as `.npz`.

  Args:
    path: as in `save`.
    ingredients: the checkpoints.
    alpha: as in `jaxsoup.average`; None is the uniform soup.
    metadata: as in `save`.
    resume: whether what a killed program left unfinished is continued, next to
      `path`. Nothing else may write there meanwhile.

  Returns:
    The absolute path.

  Raises:
    FileExistsError: the path exists; it is not touched.
    ValueError: the ingredients do not fit, or are damaged.

  Example:
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> models = [{'w': np.float32([k, 1])} for k in (1, 2)]
    >>> runs = [save(f'{folder}/{i}', m) for i, m in enumerate(models)]
    >>> ingredients = _ingredients.Ingredients(runs)
    >>> path = save_average(f'{folder}/soup.safetensors', ingredients)
    >>> load(path).params
    {'w': Array([1.5, 1. ], dtype=float32)}
  """
  _warn_of_modules(ingredients)
  ingredients = ingredients.unsharded()
  streamed, soup_fn = streamed_soup(ingredients, alpha)
  own_fn = lambda: own_of(soup_fn(), ingredients, metadata)
  if _files.is_remote(path):  # There a file is written at once.
    leaves = _orbax.savable(streamed.params())
    return _write(path, leaves, own_fn, ingredients)
  key = key_of(alpha, [(ingredients, streamed.leaves)]) if resume else None
  return _write(path, streamed.leaves, own_fn, ingredients, streamed, key)


def key_of(
    alpha: Alpha | None,
    averages: Sequence[
        tuple[_ingredients.Ingredients, Mapping[_tree.Path, ShapeDtype]]
    ],
) -> str:
  """A short text that stands for all that decides what averages are."""
  what = [np.asarray(x).tolist() for x in jax.tree.leaves(alpha)]
  for ingredients, leaves in averages:
    what += ingredients.meaning()
    what += [(p, str(x.dtype), x.shape) for p, x in leaves.items()]
  return hashlib.blake2b(json.dumps(what).encode(), digest_size=6).hexdigest()


def streamed_soup(
    ingredients: _ingredients.Ingredients,
    alpha: Alpha | None,
) -> tuple[_streaming.Average, Callable[[], Soup[_soup.Info]]]:
  """An average that is not yet computed, and a function for its `Soup` without
  params, whose duplicates are known when all is read.
  """
  num = len(ingredients)
  if alpha is None:
    streamed = ingredients.streamed(range(num), None, num)
    alpha = np.full(num, 1 / num, np.float32)
  else:
    alpha = _tree.checked_alpha(alpha, num)
    streamed = ingredients.streamed(range(num), alpha, 1)

  def soup_fn():
    return Soup(None, alpha, _soup.AverageInfo(streamed.duplicates()))

  return streamed, soup_fn


def new_path(path: PathLike) -> pathlib.Path:
  """The absolute path of something that does not exist yet."""
  root: Any = _orbax.absolute(path)
  if not _files.is_remote(path):
    root = pathlib.Path(root)
  _files.require_new(root)
  root.parent.mkdir(parents=True, exist_ok=True)
  return root


def own_of(
    soup: Soup[_soup.Info] | None,
    ingredients: _ingredients.Ingredients | None,
    metadata: Config | None,
) -> Json:
  """What is stored in addition to the arrays."""
  own: Json = {
      'metadata': _to_json(_model_of(ingredients) | dict(metadata or {}))
  }
  if soup is not None:
    own |= {'alpha': _to_json(soup.alpha), 'info': _to_json(soup.info)}
  return own | {
      'ingredients': _describe(ingredients),
      'versions': _versions(),
      'command': _card.command(),
      # Always as long, since the place in a header is kept for it.
      'time': datetime.datetime.now(datetime.UTC).isoformat(
          timespec='microseconds'
      ),
  }


def _model_of(ingredients: _ingredients.Ingredients | None) -> Json:
  """The stored architecture of the first ingredient, which the soup has too."""
  if ingredients is None:
    return {}
  own = _from_json(ingredients.metadata(0).custom.get('jaxsoup', {}))
  model = own.get('metadata', {}).get('model')
  return {} if model is None else {'model': model}


def load(path: PathLike, abstract_params: Params | None = None) -> Soup[Any]:
  """Reads a soup that `save` wrote.

  Args:
    path: its directory.
    abstract_params: the container, dtypes and shardings to read into, as for
      `Ingredients`; None gives nested dicts.

  Returns:
    The `Soup`, with params, alpha and info.

  Raises:
    FileNotFoundError: no finished checkpoint there.
    ValueError: not a soup, damaged, or not of that structure.
  """
  own = provenance(path)
  if 'alpha' not in own:
    raise ValueError(
        f'{path} is a checkpoint, but not a soup. Read its parameters with '
        'checkpoints.Ingredients([path])[0].'
    )
  params = _ingredients.Ingredients([path], abstract_params)[0]
  return Soup(params, own['alpha'], own['info'])


def provenance(path: PathLike) -> Json:
  """What `save` stored in addition to the arrays; reads no array.

  Args:
    path: a directory or file that `save` or a similar function wrote.

  Returns:
    A dict with `ingredients` (of each the path, the identity of its file, and
    the content hash if it was stored there or the model was read), `metadata`,
    `versions`, `command`, `time`, `checksums`, `content_hash`; for a soup also
    `alpha` and `info`. Empty for checkpoints of other programs.
  """
  own = sidecar_of(pathlib.Path(path))
  if not own or pathlib.Path(path).is_dir():
    own |= _formats.metadata(path).custom.get('jaxsoup', {})
  try:
    return _from_json(own)
  except (KeyError, TypeError) as e:
    raise _source.damaged(path, f'what is stored with it is wrong: {e}') from e


def _file_at(path, ingredients, leaves) -> pathlib.Path | None:
  if ingredients is None or _files.is_remote(path):
    return None
  if leaves.keys() != ingredients.stored(0).keys():
    return None
  return ingredients.file_at(pathlib.Path(path).absolute())


def sidecar_file(path: pathlib.Path) -> pathlib.Path:
  """What is stored next to weights: in their directory, or next to a file."""
  if path.is_dir():
    return path / SIDECAR_FILE
  return path.with_name(f'{path.name}.{SIDECAR_FILE}')


def sidecar_of(path: pathlib.Path) -> Json:
  """What is stored next to the weights of a directory, or a file."""
  file = sidecar_file(path)
  if not file.is_file():
    return {}
  try:
    return _source.own_of(_json.read(file))
  except TypeError as e:
    raise _source.damaged(file, e) from e


def _describe(ingredients: _ingredients.Ingredients | None) -> list[Json]:
  if ingredients is None:
    return []
  return [
      {
          'path': ingredients.paths[k],
          'content_hash': ingredients.known_hash(k),
          'identity': ingredients.identity(k),
      }
      for k in range(len(ingredients))
  ]


def _versions() -> dict[str, str]:
  packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
  return {
      'jaxsoup': jaxsoup.__version__,
      'python': platform.python_version(),
      **{name: importlib.metadata.version(name) for name in packages},
  }


def _to_json(value: Any) -> Any:
  """NamedTuples with their names, dicts with any keys, arrays as lists."""
  if type(value).__name__ in _TYPES:
    is_tuple = isinstance(value, tuple)
    fields = value._asdict() if is_tuple else vars(value)
    return {'__type__': type(value).__name__, **_to_json(fields)}
  if isinstance(value, Mapping):
    if all(isinstance(key, str) and key != '__type__' for key in value):
      return {key: _to_json(child) for key, child in value.items()}
    items = [[_to_json(k), _to_json(v)] for k, v in value.items()]
    return {'__type__': 'dict', 'items': items}
  if isinstance(value, tuple):
    return {'__type__': 'tuple', 'items': [_to_json(x) for x in value]}
  if isinstance(value, list):
    return [_to_json(x) for x in value]
  if isinstance(value, (jax.Array, np.ndarray, np.generic)):
    array = np.asarray(jax.device_get(value))
    return {
        '__type__': 'array', 'dtype': str(array.dtype), 'items': array.tolist()
    }  # fmt: skip
  if value is None or isinstance(value, (str, bool, int, float)):
    return value
  raise TypeError(
      f'{value!r} of type {type(value).__name__} cannot be stored as JSON: '
      'pass numbers, strings, lists and dicts as metadata.'
  )


def _from_json(value: Any) -> Any:
  if isinstance(value, list):
    return [_from_json(x) for x in value]
  if not isinstance(value, dict):
    return value
  kind = value.get('__type__')
  if kind == 'array':
    return np.array(value['items'], value['dtype'])
  if kind == 'tuple':
    return tuple(_from_json(x) for x in value['items'])
  if kind == 'dict':
    return {_from_json(k): _from_json(v) for k, v in value['items']}
  fields = {k: _from_json(v) for k, v in value.items() if k != '__type__'}
  return _TYPES[kind](**fields) if kind in _TYPES else fields
