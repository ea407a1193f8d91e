"""Models with weights from files, and weights under the names of files.

```
model = models.load('vit-base-patch16-224/')
model = models.load('vit-base-patch16-224/', without=['head'], num_classes=10)
models.save('soup/', soup.params, like='vit-base-patch16-224/')
```
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import importlib
import pathlib
import re
from typing import Any
from typing import NamedTuple

from etils import epath
from flax import nnx
import jax

from jaxsoup import _json
from jaxsoup import _tree
from jaxsoup import _warnings
from jaxsoup import checkpoints
from jaxsoup.models import _names
from jaxsoup.models import _served
from jaxsoup.models import vit
from jaxsoup.typing import Json
from jaxsoup.typing import Params
from jaxsoup.typing import PathLike

_FAMILIES = {
    'vit': 'ViT',
    'clip': 'CLIP',
    'bert': 'Bert',
    't5': 'T5',
    'resnet': 'ResNet',
    'efficientnet': 'EfficientNet',
}
# `model_type` of a Hugging Face config, where it is not the family's name.
_MODEL_TYPES = {'dinov2': 'vit', 'bit': 'resnet', 'clip_vision_model': 'clip'}
# What a soup averages: running statistics as well.
_VARIABLES = (nnx.Param, nnx.BatchStat)
# Our own names; all others are listed in the families' TABLES.
_OWN = 'flax'


class Kind(NamedTuple):
  """What the arrays of a file are."""

  family: str
  names: str  # Whose they are: 'flax' (ours), 'hf', 'timm', ...
  arguments: Json  # Of the model's constructor.
  separator: str = '.'  # Of keys in names of ours.

  def as_json(self) -> Json:
    """What is stored with the arrays."""
    fields = self._asdict()
    del fields['separator']
    return fields

  @property
  def is_clip_classifier(self) -> bool:
    return self.family == 'clip' and 'num_classes' in self.arguments

  def make(self, key: jax.Array | int) -> nnx.Module:
    name = _FAMILIES[self.family]
    if self.is_clip_classifier:
      name = 'ImageClassifier'
    model_class = getattr(_module(self.family), name)
    return model_class(**self.arguments, rngs=nnx.Rngs(key))

  def abstract(self) -> nnx.Module:
    """The model with shapes in place of arrays."""
    return nnx.eval_shape(lambda: self.make(0))

  def table(self) -> _names.Table:
    """Where each array is."""
    if self.names != _OWN:
      return _tables(self.family)[self.names](**self.arguments)
    return _own_table(params_of(self.abstract()), self.separator)


def _own_table(params: Params, separator: str) -> _names.Table:
  """Our own names, of single blocks whether they are stacked or not."""
  rules = []
  for path, leaf in _names.leaves_of(params).items():
    theirs = path.replace('/', separator)
    if re.search(r'\bblocks/', path) is None:
      rules.append(_names.Rule(path, theirs))
      continue
    for i in range(leaf.shape[0]):
      one = re.sub(r'\bblocks/', f'block_{i}/', path)
      rules.append(_names.Rule(one, theirs, _names.row(i, leaf.shape[0])))
  return _names.Table(rules)


def params_of(model: nnx.Module) -> Params:
  """What a soup averages, as nested dicts: parameters, running statistics.

  Args:
    model: any nnx module.

  Returns:
    Nested dicts with string keys.

  Example:
    >>> model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    >>> sorted(params_of(model))
    ['bias', 'mean', 'scale', 'var']
  """
  return nnx.to_pure_dict(nnx.state(model, _VARIABLES))


def load(
    path: PathLike,
    *,
    without: Sequence[str] = (),
    family: str | None = None,
    names: str | None = None,
    seed: int = 0,
    **changes: Any,
) -> nnx.Module:
  """Makes a model from a file or a directory, with its weights.

  Family, naming and size are read from `config.json` or from the names and
  shapes of the arrays.

  Args:
    path: a directory of Hugging Face, a `.safetensors`, `.npz` or torch file,
      or an Orbax checkpoint that `convert` or `save` wrote.
    without: beginnings of our parameters' paths that are not taken from the
      file, such as 'head': they keep their initial values.
    family: 'vit', 'clip', 'bert', 't5', 'resnet' or 'efficientnet'; None
      detects it.
    names: 'hf', 'timm', ...; None detects them.
    seed: of the initial values of what is left out.
    **changes: arguments of the model's constructor that replace those of the
      file, such as `num_classes=10`, `dtype='bfloat16'`, `is_scanned=True`.
      Another `image_shape` of a ViT interpolates its positions.

  Returns:
    An nnx module. Its parameters are `models.params_of(model)`.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: no family matches; or arrays are missing, unexpected or of
      another shape: lists all.
  """
  stored = checkpoints.Arrays(path)
  kind = identify(stored, family=family, names=names)
  arguments = kind.arguments
  if 'num_classes' in changes:
    arguments = _served.with_head(*kind[:3], changes['num_classes'])
  wanted = kind._replace(arguments=arguments | changes)
  if wanted.is_clip_classifier:
    parts = ['image/projection'] * (wanted.arguments['embed_width'] is None)
    without = [*without, 'text', 'logit_scale', *parts]
  is_resized = (
      wanted.family == 'vit'
      and 'image_shape' in changes
      and not _names.is_below('position', without)
  )
  native = dict(wanted.arguments)
  if is_resized:
    native['image_shape'] = kind.arguments['image_shape']
  # Our own names are those of the file, however the model stacks its blocks.
  table = kind.table() if kind.names == _OWN else wanted.table()
  left_out = [
      re.escape(rule.theirs)
      for rule in kind.table().rules
      if any(_names.is_below(p, without) for p in rule.paths)
  ]
  if without:  # What the file has on top of what is left out.
    left_out += kind.table().ignored
  table = table._replace(ignored=[*table.ignored, *left_out])
  params = params_of(wanted._replace(arguments=native).abstract())
  params = _names.read(stored, params, table, initial=without)
  if is_resized:
    position, shape = params['position'], changes['image_shape']
    params['position'] = vit.at_resolution(position, native, shape)
  initial, others = _initial(wanted, without, seed)
  graphdef, state, _ = _split(wanted.abstract())
  flat_tree = _tree.flatten_in_place(params)
  params = flat_tree.replace(
      initial.get(_tree.name_of(path), leaf)
      for path, leaf in zip(flat_tree.paths, flat_tree.leaves)
  )
  nnx.replace_by_pure_dict(state, jax.device_put(params))
  return nnx.merge(graphdef, state, others)


def _split(model: nnx.Module) -> Any:
  return nnx.split(model, _VARIABLES, ...)


def _initial(kind: Kind, without: Sequence[str], seed: int):
  """The initial values of what is left out, and the other variables."""

  def start(key):
    _, state, others = _split(kind.make(key))
    leaves = _names.leaves_of(nnx.to_pure_dict(state))
    return {
        p: x for p, x in leaves.items() if _names.is_below(p, without)
    }, others

  # Under jit only the needed values are computed.
  return jax.jit(start)(jax.random.key(seed))


def identify(
    stored: checkpoints.Arrays,
    *,
    family: str | None = None,
    names: str | None = None,
) -> Kind:
  """Detects the model of the arrays in a file, without reading them.

  Raises:
    ValueError: no family matches, or what is known of it is not.
  """
  own = checkpoints.provenance(stored.path).get('metadata', {})
  if 'model' in own:
    try:
      kind = Kind(**own['model'], separator=stored.separator)
      return kind._replace(arguments=dict(kind.arguments))
    except (TypeError, ValueError) as e:
      raise ValueError(
          f'{stored.path} says of its model {str(own["model"])[:60]!r}: '
          f'expected a family, names and arguments ({e}). Restore it from a '
          'copy.'
      ) from e
  config = _config_next_to(stored.path)
  if 'model_type' in config and family is None:
    model_type = config['model_type']
    family = _MODEL_TYPES.get(model_type, model_type)
    if family not in _FAMILIES:
      raise ValueError(
          f'{stored.path}: config.json has model_type {model_type!r}, expected '
          f'one of {", ".join(_FAMILIES)}. Other models can be averaged as '
          'well: jaxsoup soup uniform.'
      )
    names = names or 'hf'
  elif 'architecture' in config:  # Of timm: it tells padding and epsilon.
    names = names or 'timm'
  candidates = [
      (share, kind)
      for f in ([family] if family else _FAMILIES)
      for n in ([names] if names else _tables(f))
      if family or n in _tables(f)
      for share, kind in _fitting(stored, f, n, config)
  ]
  if not candidates:
    raise ValueError(
        f'{stored.path} matches no known family ({", ".join(_FAMILIES)}). It '
        f'holds {", ".join(list(stored.shapes)[:4])}, ... Give family= and '
        'names= (--family, --from-names) to see what does not match.'
    )
  kind = max(candidates, key=lambda pair: pair[0])[1]
  is_unclear = (kind.family, kind.names) == ('efficientnet', 'timm')
  if is_unclear and 'architecture' not in config:
    raise ValueError(
        f'{stored.path} does not say whether it came from TensorFlow, as '
        'those do whose names in timm begin with tf_: padding and epsilon '
        'depend on it. Write a config.json next to it with the name in timm, '
        'such as {"architecture": "tf_efficientnet_b0"}.'
    )
  return kind


def _tables(family: str) -> Mapping[str, Callable[..., _names.Table]]:
  return _module(family).TABLES


def _module(family: str) -> Any:
  return importlib.import_module(f'jaxsoup.models.{family}')


def _fitting(stored, family, names, config) -> Iterator[tuple[float, Kind]]:
  """The kind, and the share of its names that are there; or nothing."""
  if names not in _tables(family):
    known = ', '.join(_tables(family))
    raise ValueError(f'{family} has no names {names!r}: choose from {known}.')
  try:
    arguments = _module(family).arguments(names, stored.shapes, config)
    kind = Kind(family, names, arguments)
    share = _names.matches(stored.shapes, kind.table())
  except (AttributeError, IndexError, KeyError, TypeError, ValueError):
    return  # Names of another family: sizes cannot be read from them.
  if share > 0.5:
    yield share, kind


def _config_next_to(path: str) -> Json:
  """The config of Hugging Face, timm or open_clip next to weights, or {}."""
  is_open_clip = 'open_clip' in pathlib.Path(path).name
  name = 'open_clip_config.json' if is_open_clip else 'config.json'
  return _json_next_to(path, name)


def _json_next_to(path: str, name: str) -> Json:
  file = epath.Path(path)
  config = file.with_name(name)
  if not config.is_file():
    return {}
  content = _json.read(config)
  if not isinstance(content, dict):
    raise ValueError(f'{config} is not a JSON object. Restore it from a copy.')
  is_of_hub = file.suffix in ('.safetensors', '.json', '.bin')
  return content if is_of_hub or 'architecture' in content else {}


def save(
    path: PathLike,
    params: Params,
    *,
    like: PathLike,
    labels: Sequence[str] | None = None,
    **changes: Any,
) -> str:
  """Writes parameters under the names that they have in another file.

  Args:
    path: a new `.safetensors` file. Or a new directory: with the small files
      next to `like` (config, tokenizer) if that is a Hugging Face model, or an
      Orbax checkpoint if that is one.
    params: nested dicts, such as a soup's, or the model. A head may be new: the
      config then names the class of transformers that has one.
    like: the file or directory that they came from, see `load`.
    labels: names of the classes by number, for the config.
    **changes: as given to `load`; checked, as names do not tell how a model
      pools. Needed where images of another size are not square.

  Returns:
    The absolute path.

  Raises:
    FileExistsError: the path exists; it is not touched.
    ValueError: the parameters are not those of that model, what reads such a
      file computes another one, or there are more or fewer labels than classes.
  """
  if isinstance(params, nnx.Module):
    params = params_of(params)
  model, held = checkpoints.Arrays(like), _Held(_names.leaves_of(params))
  old = identify(model)
  new = old._replace(arguments=_served.fitted(*old[:3], held, changes))
  kind = new._replace(names=_OWN, separator='/')
  return _converted(held, path, kind, old, new, model.path, labels)


class _Held(dict[str, Any]):
  """Parameters in memory as a file shows its arrays."""

  path = 'What is given'

  @property
  def shapes(self) -> dict[str, Any]:
    return self


def convert(
    source: PathLike,
    path: PathLike,
    *,
    names: str | None = None,
    is_orbax: bool | None = None,
    like: PathLike | None = None,
    family: str | None = None,
    from_names: str | None = None,
    labels: Sequence[str] | None = None,
    **changes: Any,
) -> str:
  """Writes the arrays of a file under other names, one leaf after another.

  Args:
    source: as for `load`.
    path: a new `.safetensors` file; or a new directory: an Orbax checkpoint, or
      `model.safetensors` and the small files next to `like` or `source`
      (config, tokenizer).
    names: 'flax' for ours, 'hf', 'timm', ...; or those of `like`.
    is_orbax: whether a directory is an Orbax checkpoint; None: if the names are
      ours.
    like: a file of the same model, perhaps without its head. With it `source`
      may be any checkpoint with our names, such as a soup.
    family: as for `load`.
    from_names: the names in `source`; None detects them.
    labels: as for `save`.
    **changes: as for `save`, with `like`.

  Returns:
    The absolute path.

  Raises:
    FileExistsError: the path exists; it is not touched.
    ValueError: the family has no such names; or as for `load` and `save`.
  """
  stored = checkpoints.Arrays(source)
  model = stored if like is None else checkpoints.Arrays(like)
  if like is None:
    kind = old = new = identify(stored, family=family, names=from_names)
  else:
    old = new = identify(model, family=family)
    if from_names in (None, _OWN):
      leaves = {
          name.replace(stored.separator, '/'): x
          for name, x in stored.shapes.items()
      }
      new = old._replace(arguments=_served.fitted(*old[:3], leaves, changes))
    kind = new._replace(names=from_names or _OWN, separator=stored.separator)
  new = new._replace(names=names or new.names)
  return _converted(stored, path, kind, old, new, model.path, labels, is_orbax)


def _converted(
    stored,
    path: PathLike,
    kind: Kind,
    old: Kind,
    new: Kind,
    like_file: str,
    labels: Sequence[str] | None,
    is_orbax: bool | None = None,
) -> str:
  """Writes what is stored as `kind` as `new`, next to files of `old`."""
  new, table = _for_path(path, new, is_orbax)
  abstract = params_of(new.abstract())
  ours = kind.table()
  leaf_fn = _names.reader(stored, abstract, ours)
  abstract = _names.with_dtypes_of(stored, abstract, ours)
  # As they are read, or stacked blocks would be read again for each.
  order = {p: i for i, rule in enumerate(ours.rules) for p in rule.paths}
  rules = sorted(table.rules, key=lambda rule: order[rule.paths[0]])
  table = table._replace(rules=rules)
  shapes = _names.shapes(abstract, table)
  configs: dict[str, Json] = {}
  is_folder = not str(path).endswith('.safetensors')
  if is_folder and not _is_orbax(path, new, is_orbax):
    read = {name: _json_next_to(like_file, name) for name in _served.FILES}
    configs = {name: content for name, content in read.items() if content}
  if 'config.json' in configs:
    dtype = str(next(iter(shapes.values())).dtype)
    _served.update(configs, old.arguments, new.arguments, labels, dtype)
  elif labels is not None:
    raise ValueError(
        f'labels (--labels) belong in a config.json: {path} has none if it is '
        f'a file, or if there is none next to {like_file}.'
    )
  made = checkpoints.save_arrays(
      path,
      shapes,
      _names.written(leaf_fn, table),
      separator=new.separator,
      like=None if _is_orbax(path, new, is_orbax) else like_file,
      configs=configs,
      metadata={'model': new.as_json()},
  )
  weights = pathlib.Path(made, 'model.safetensors')
  config = pathlib.Path(made, 'config.json')
  if new.names == 'hf' and weights.exists() and not config.exists():
    _warnings.warn(
        f'{made} has no config.json, which from_pretrained needs: there is none'
        f' next to {like_file}. Copy it from the original model, or pass its '
        'directory as like= (--like).'
    )
  return made


def _is_orbax(path: PathLike, kind: Kind, is_orbax: bool | None) -> bool:
  if str(path).endswith('.safetensors'):
    return False
  return kind.names == _OWN if is_orbax is None else is_orbax


def _for_path(
    path: PathLike, kind: Kind, is_orbax: bool | None = None
) -> tuple[Kind, _names.Table]:
  """The kind as it will be in a file, and its table."""
  known = [_OWN, *_tables(kind.family)]
  if kind.names not in known:
    raise ValueError(
        f'{kind.family} has no names {kind.names!r}: choose from '
        f'{", ".join(known)}.'
    )
  # Files have single blocks, even where the model scans over them.
  kind = kind._replace(
      separator='/' if _is_orbax(path, kind, is_orbax) else '.',
      arguments={k: v for k, v in kind.arguments.items() if k != 'is_scanned'},
  )
  return kind, kind.table()
