"""Soups on disk: parameters, alpha, and how they came about."""

from collections.abc import Mapping
import datetime
import importlib.metadata
import platform
import sys
from typing import Any

import jax
import numpy as np

import jaxsoup
from jaxsoup import _soup
from jaxsoup._soup import Params
from jaxsoup._soup import Soup
from jaxsoup.checkpoints import _disk
from jaxsoup.checkpoints import _ingredients
from jaxsoup.checkpoints import _orbax

_NAMED_TUPLES = {
    cls.__name__: cls
    for cls in vars(_soup).values()
    if isinstance(cls, type) and issubclass(cls, tuple) and cls is not Soup
}


def save(
    path: Any,
    params: Params | Soup,
    *,
    ingredients: Any = None,
    metadata: Mapping[str, Any] | None = None,
) -> str:
  """Writes a soup with its provenance, or plain parameters.

  An Orbax checkpoint of nested dicts with string keys: any Orbax restores it.
  Beside the arrays it holds a checksum for each leaf, alpha and info, and the
  provenance: each ingredient's path and content hash, the versions of the
  packages, the command and the time. It appears under its name only when it is
  whole.

  Args:
    path: a directory that does not exist yet.
    params: a `Soup`, or a pytree of parameters.
    ingredients: the `checkpoints.Ingredients` of a soup.
    metadata: anything that fits into JSON: seed, config, scores.

  Returns:
    The absolute path.

  Raises:
    FileExistsError: the path exists; it is not touched.
    ValueError, TypeError: metadata that is no JSON, or leaves that cannot be
      saved.
    OSError: the disk is full.

  Example:
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + '/soup'
    >>> soup = jaxsoup.uniform([{'w': np.ones(2)}, {'w': np.zeros(2)}])
    >>> _ = save(path, soup, metadata={'seed': 0})
    >>> load(path).params, provenance(path)['metadata']
    ({'w': Array([0.5, 0.5], dtype=float32)}, {'seed': 0})
  """
  own: dict[str, Any] = {'metadata': _to_json(metadata or {})}
  if isinstance(params, Soup):
    own |= {'alpha': _to_json(params.alpha), 'info': _to_json(params.info)}
    params = params.params
  own |= {
      'ingredients': _describe(ingredients),
      'versions': _versions(),
      'command': sys.argv,
      'time': datetime.datetime.now(datetime.UTC).isoformat(),
  }
  try:
    return str(_orbax.write(path, params, {'jaxsoup': own}))
  except (OSError, RuntimeError, ValueError) as e:
    if not _disk.is_full(e):
      raise
    raise OSError(
        f'{path} could not be saved, there is no room: '
        f'{str(e).splitlines()[0][:200]}. Nothing has appeared under that name:'
        ' free some space, and save again.'
    ) from e


def load(path: Any, abstract_params: Params | None = None) -> Soup:
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


def provenance(path: Any) -> dict[str, Any]:
  """What `save` stored beside the arrays, which are not read.

  Args:
    path: a directory that `save` wrote.

  Returns:
    A dict with `ingredients` (path and content hash of each), `metadata`,
    `versions`, `command`, `time`, `checksums`, `content_hash`; for a soup also
    `alpha` and `info`. Empty for checkpoints that others wrote.
  """
  return _from_json(_orbax.metadata(path).custom.get('jaxsoup', {}))


def _describe(ingredients: Any) -> list[dict[str, Any]]:
  if ingredients is None:
    return []
  return [
      {
          'path': ingredients.paths[k],
          'content_hash': ingredients.content_hash(k),
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
  if type(value).__name__ in _NAMED_TUPLES:
    fields = {k: _to_json(v) for k, v in value._asdict().items()}
    return {'__type__': type(value).__name__, **fields}
  if isinstance(value, Mapping):
    if all(isinstance(key, str) for key in value):
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
      f'{value!r} of type {type(value).__name__} does not fit into JSON: pass '
      'numbers, texts, lists and dicts as metadata.'
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
  return _NAMED_TUPLES[kind](**fields) if kind in _NAMED_TUPLES else fields
