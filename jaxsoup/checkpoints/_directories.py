"""Soups in the form of Hugging Face directories: weights, config, tokenizer.

The names of the tensors stay the same, and no model code is needed.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import fnmatch
import json
import math
import os
import pathlib
import re
import shutil
from typing import Any
from typing import NamedTuple

import numpy as np

from jaxsoup import _checked
from jaxsoup import _files
from jaxsoup import _json
from jaxsoup import _processes
from jaxsoup import _tree
from jaxsoup import _warnings
from jaxsoup._soup import AverageInfo
from jaxsoup._soup import Info
from jaxsoup._soup import Soup
from jaxsoup.checkpoints import _card
from jaxsoup.checkpoints import _checkpoint
from jaxsoup.checkpoints import _checksum
from jaxsoup.checkpoints import _formats
from jaxsoup.checkpoints import _hub
from jaxsoup.checkpoints import _ingredients
from jaxsoup.checkpoints import _refusals
from jaxsoup.checkpoints import _safetensors
from jaxsoup.checkpoints import _soups
from jaxsoup.checkpoints import _source
from jaxsoup.checkpoints import _torch
from jaxsoup.typing import Alpha
from jaxsoup.typing import Config
from jaxsoup.typing import Params
from jaxsoup.typing import PathLike
from jaxsoup.typing import ShapeDtype

_MOST_BYTES = 100_000_000
_MODULES = 'modules.json'  # Of sentence-transformers.
# What may differ between the configs of one model.
_NOT_COMPARED = {
    '_name_or_path', 'dtype', 'torch_dtype', 'transformers_version'
}  # fmt: skip


def is_directory(path: PathLike) -> bool:
  """Whether a path is a Hugging Face model: a config next to weights.

  Args:
    path: any path.

  Returns:
    True if it is a directory that `save_directory` can average.

  Example:
    >>> is_directory('/no/such/path')
    False
  """
  if '://' in str(path):
    return False
  path = pathlib.Path(path).absolute()
  return (path / _refusals.CONFIG).is_file() and _formats.find(path) is not None


def save_directory(
    path: PathLike,
    ingredients: _ingredients.Ingredients,
    soup: Soup[Info] | None = None,
    *,
    alpha: Alpha | None = None,
    max_shard_bytes: int = 5_000_000_000,
    metadata: Config | None = None,
    resume: bool = False,
) -> str:
  """Writes a soup as a directory that `from_pretrained` loads.

  `theta = sum_k alpha_k theta_k`, piece by piece from file to file, or the
  params of a soup that another recipe made. Tensors keep the names and dtypes
  that they have in the first ingredient, unless `ingredients` have a `dtype`,
  which its config then gets too; config and tokenizer are copied. A model card
  and `soup.json` say how the soup was made. What was written is read back and
  compared; the directory gets its name only when it is complete.
  Modules of sentence-transformers are averaged and copied as well. Several
  processes each take a part of the tensors of an average.

  Args:
    path: a directory that does not exist yet.
    ingredients: of directories, see `is_directory`.
    soup: of these ingredients; None averages them here.
    alpha: as in `jaxsoup.average`; None is the uniform soup.
    max_shard_bytes: larger soups are several files with an index.
    metadata: as in `save`; `recipe` is named in the model card.
    resume: as in `save_average`; not of a soup that is given.

  Returns:
    The absolute path.

  Raises:
    FileExistsError: the path exists; it is not touched.
    ValueError: the ingredients do not match, are damaged, or are not
      directories.
    OSError: the disk is full.

  Example:
    >>> import tempfile
    >>> from jaxsoup import checkpoints
    >>> folder = tempfile.mkdtemp()
    >>> def made(name, value):
    ...   params = {'head': {'weight': np.float32([value])}}
    ...   checkpoints.save(f'{folder}/{name}/model.safetensors', params)
    ...   _ = pathlib.Path(folder, name, 'config.json').write_text('{}')
    ...   return f'{folder}/{name}'
    >>> runs = [made('a', 1), made('b', 2)]
    >>> ingredients = checkpoints.Ingredients(runs)
    >>> path = save_directory(f'{folder}/soup', ingredients)
    >>> sorted(os.listdir(path))
    ['README.md', 'config.json', 'model.safetensors', 'soup.json']
    >>> checkpoints.load(path).params
    {'head': {'weight': Array([1.5], dtype=float32)}}
  """
  path = _soups.new_path(path)
  _require_directories(ingredients)
  folders = [pathlib.Path(p).parent for p in ingredients.paths]
  if soup is None:
    ingredients = ingredients.unsharded()
  own_alpha = alpha if soup is None else soup.alpha
  parts = [_part('', ingredients, max_shard_bytes)]
  for module in modules_with_weights(folders[0]):
    paths = [folder / module for folder in folders]
    of_module = _ingredients.Ingredients(paths, dtype=ingredients.dtype)
    _require_one_alpha(own_alpha, of_module)
    parts.append(_part(module, of_module))
  odd = ingredients.stored(0).keys() ^ parts[0].targets.keys()
  if odd:
    raise ValueError(
        f'abstract_params and {ingredients.paths[0]} differ in leaf '
        f'{_tree.name_of(min(odd))!r}: a directory has all tensors of '
        'the first one. Leave abstract_params out, or use checkpoints.save.'
    )
  averaged = parts if soup is None else parts[1:]
  streams = [_soups.streamed_soup(x.ingredients, own_alpha) for x in averaged]
  for module in ('', *_modules(folders[0])):
    _warn_of_configs([folder / module for folder in folders])

  def fill_fn(put_fn, written):
    if soup is not None:
      _put_params(put_fn, soup.params, parts[0])
    for part, (streamed, _) in zip(averaged, streams):
      streamed.put_all(put_fn, part.targets, written)
    written.read_back()

  def end_fn(folder):
    _write_index(folder, parts[0].leaves)
    made = streams[0][1]() if soup is None else soup
    names = _names_of(ingredients.paths)
    card = _card.text(path.name, names, made, metadata or {})
    (folder / 'README.md').write_text(card)
    copy_other_files(pathlib.Path(ingredients.paths[0]), folder)
    if ingredients.dtype is not None:
      config = folder / _refusals.CONFIG
      dtype = str(np.dtype(ingredients.dtype))
      write_json(config, _with_dtype(_refusals.config_of(config), dtype))
    own = _soups.own_of(made, ingredients, metadata)
    own['files'] = {file: _digest(folder / file) for file in _of_model(folder)}
    write_json(folder / _soups.SIDECAR_FILE, _json.sealed(own))

  key = None
  if resume and soup is None:
    key = _soups.key_of(alpha, [(x.ingredients, x.leaves) for x in parts])
  leaves = {p: leaf for part in parts for p, leaf in part.leaves.items()}
  with _files.room_for(path):
    _safetensors.write(path, leaves, dict, fill_fn, 0, end_fn, key)
  return str(path)


def save_like(
    path: PathLike,
    params: Params,
    ingredients: _ingredients.Ingredients | None = None,
) -> str:
  """Writes a model of the structure of ingredients as the first of them is.

  A Hugging Face directory, a file of the same format, or an Orbax checkpoint in
  the same layout: what `save` and `save_directory` write, for a program that
  evaluates the model. It says nothing of a soup.

  Args:
    path: a directory that does not exist yet; a file gets the ending of the
      first ingredient.
    params: of the model.
    ingredients: None writes an Orbax checkpoint of the bare parameters.

  Returns:
    The path.

  Raises:
    FileExistsError: the path exists.
    ValueError: a model of sentence-transformers with further modules, for which
      there are no params.
  """
  if ingredients is None:
    return _soups.save(path, params)
  # Zeros: no module of its own can be averaged.
  alpha = np.zeros(len(ingredients), np.float32)
  soup = Soup(params, alpha, AverageInfo(()))
  if all(is_directory(pathlib.Path(p).parent) for p in ingredients.paths):
    return save_directory(path, ingredients, soup)
  ending = ingredients.ending()
  return _soups.save(f'{path}{ending}', soup, ingredients=ingredients)


def _require_directories(ingredients) -> None:
  _checked.require_ingredients(ingredients)
  for path in ingredients.paths:
    if not is_directory(pathlib.Path(path).parent):
      raise ValueError(
          f'{path} is not in a Hugging Face directory (config.json next to '
          'the weights). Give such directories, or use checkpoints.save.'
      )
  source = _formats.open_source(ingredients.paths[0])
  whole = _checkpoint.Checkpoint(source, None)
  if len(whole.places) < len(source.metadata.leaves):
    raise ValueError(
        f'{source.metadata.path} holds tensors inside and outside of params; '
        'only those inside would be averaged. Rename them.'
    )


def _require_one_alpha(alpha, of_module) -> None:
  if alpha is not None and (
      isinstance(alpha, dict) or abs(sum(alpha) - 1) > 1e-3
  ):
    raise ValueError(
        f'{of_module.paths[0]} is a module of its own, for which this recipe '
        'has no coefficients. Make a uniform soup, or give one coefficient for '
        'each model, with a sum of 1: jaxsoup soup average --alpha.'
    )


def _warn_of_configs(folders: Sequence[pathlib.Path]) -> None:
  """Equal shapes can hide classes in another order, or another activation."""
  files = [folder / _refusals.CONFIG for folder in folders]
  configs = [_refusals.config_of(f) if f.is_file() else {} for f in files]
  for folder, config in zip(folders[1:], configs[1:]):
    keys = (configs[0].keys() | config.keys()) - _NOT_COMPARED
    odd = sorted(k for k in keys if configs[0].get(k) != config.get(k))
    if odd:
      _warnings.warn(
          f'{folder / _refusals.CONFIG} differs from that of {folders[0]} in '
          f'{", ".join(odd[:5])}: the soup gets the latter. Check that the '
          'outputs of the models have the same meaning.'
      )


def _with_dtype(config: Any, dtype: str) -> Any:
  """A config in which a model and its parts are of this dtype."""
  if not isinstance(config, dict):
    return config
  return {
      key: dtype
      if key in ('dtype', 'torch_dtype') and isinstance(value, str)
      else _with_dtype(value, dtype)
      for key, value in config.items()
  }


class _Part(NamedTuple):
  """The model, or a module of it with weights of its own."""

  ingredients: _ingredients.Ingredients
  targets: dict[_tree.Path, _tree.Path]  # File and path in there, by name.
  leaves: dict[_tree.Path, ShapeDtype]  # By their targets.


def _part(module, ingredients, most=math.inf) -> _Part:
  """One file, or several, named as in the first ingredient."""
  first = _ingredients.first_of(ingredients)
  wanted = first.flat.by_path
  file = pathlib.Path(first.source.metadata.path).name
  is_torch = file == _torch.IN_DIRECTORY
  stem = 'model' if is_torch else file.partition('.safetensors')[0]
  shards: list[list[_tree.Path]] = []
  total = 0  # Larger leaves than `most` are alone.
  for name in first.stored:  # In their order.
    num_bytes = _tree.num_bytes(wanted[name])
    total += num_bytes
    if not shards or total > most:
      shards.append([])
      total = num_bytes
    shards[-1].append(name)
  targets: dict[_tree.Path, _tree.Path] = {}
  for i, names in enumerate(shards):
    number = f'-{i + 1:05}-of-{len(shards):05}' if len(shards) > 1 else ''
    file = os.path.join(module, f'{stem}{number}.safetensors')
    targets |= {name: (file, *first.places[name]) for name in names}
  leaves = {target: wanted[name] for name, target in targets.items()}
  return _Part(ingredients, targets, leaves)


def _put_params(put_fn, params: Params, part: _Part) -> None:
  values = _tree.flatten_in_place(params).by_path
  for name, target in part.targets.items():
    array = _processes.gathered(values[name])
    if _processes.is_main():
      # jax has no 64-bit arrays by default.
      put_fn(target, 0, array.astype(part.leaves[target].dtype))


def _write_index(folder, leaves) -> None:
  """Where each tensor is, if there are several files."""
  weight_map = {'.'.join(place): file for file, *place in leaves}
  stem, *ending = re.split('-00001-of-', next(iter(weight_map.values())))
  if ending:
    size = sum(map(_tree.num_bytes, leaves.values()))
    content = {'metadata': {'total_size': size}, 'weight_map': weight_map}
    write_json(folder / f'{stem}.safetensors.index.json', content)


def write_json(file: pathlib.Path, content: Any) -> None:
  file.write_text(json.dumps(content, indent=2) + '\n')


def copy_other_files(weights: pathlib.Path, folder: pathlib.Path) -> None:
  """Copies config, tokenizer, preprocessor etc. of the first ingredient."""
  for file in _of_model(weights.parent):
    (folder / file).parent.mkdir(exist_ok=True)
    shutil.copyfile(weights.parent / file, folder / file)


def _of_model(own: pathlib.Path) -> Iterator[str]:
  """The files of a directory that belong to a model, without its weights.

  A link is followed within the directory only, or within that of the model in
  the cache of the hub: it could lead to any file of this machine.
  """
  cached = [p for p in own.parents if p.name.startswith('models--')]
  model = (cached or [own])[0].resolve()
  files = [f for x in ('', *_modules(own)) for f in sorted((own / x).iterdir())]
  for file in files:
    if (
        any(fnmatch.fnmatch(file.name, pattern) for pattern in _hub.OF_A_MODEL)
        and file.resolve().is_relative_to(model)
        and file.is_file()
        and file.stat().st_size <= _MOST_BYTES
    ):
      yield file.relative_to(own).as_posix()


def _modules(own: pathlib.Path) -> list[str]:
  """The subdirectories with modules of sentence-transformers."""
  file = own / _MODULES
  try:
    rows = _json.parsed(file.read_bytes()) if file.is_file() else []
    paths = [row['path'] for row in rows]
    # The list is data: it may not name other directories.
    if odd := [p for p in paths if p and pathlib.PurePath(p).name != p]:
      raise ValueError(f'{odd[0]!r} is not a subdirectory')
  except (KeyError, TypeError, ValueError) as e:
    raise _source.damaged(file, e) from e
  return [p for p in paths if p and (own / p).is_dir()]


def modules_with_weights(own: pathlib.Path) -> list[str]:
  """Those that are averaged as checkpoints of their own."""
  modules = _modules(own) if is_directory(own) else []
  return [module for module in modules if _formats.find(own / module)]


def _digest(file: pathlib.Path) -> str:
  return _checksum.of(np.frombuffer(file.read_bytes(), np.uint8))


def verify_others(folder: pathlib.Path) -> tuple[list[str], list[str]]:
  """The files next to weights that changed since `save_directory` wrote them,
  and those of a model of which it stored no checksum.
  """
  stored = _soups.sidecar_of(folder).get('files') or {}
  is_model = is_directory(folder)
  own = set(_of_model(folder)) if is_model else set()
  changed = [
      name
      for name, digest in stored.items()
      if not (folder / name).is_file() or _digest(folder / name) != digest
  ]
  return changed, sorted(own - stored.keys())


def _names_of(paths: Sequence[str]) -> list[str]:
  """Public names of ingredients: on the hub, or below their common folder."""
  folders = [pathlib.Path(path).parent for path in paths]
  shared = os.path.commonpath([folder.parent for folder in folders])
  return [
      _hub_name(folder) or folder.relative_to(shared).as_posix()
      for folder in folders
  ]


def _hub_name(folder: pathlib.Path) -> str | None:
  """`models--ORGANIZATION--NAME/snapshots/...` in the cache of the hub."""
  cached = [p.name for p in folder.parents if p.name.startswith('models--')]
  if folder.parent.name != 'snapshots' or not cached:
    return None
  return cached[0].removeprefix('models--').replace('--', '/')
