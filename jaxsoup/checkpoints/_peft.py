"""Reads and writes LoRA adapters in directories of PEFT.

```
adapters, config = load_adapters(paths)
soup = lora.average(adapters, rank=8)
save_adapter('soup', soup.params, config)
```
"""

import collections
from collections.abc import Mapping
from collections.abc import Sequence
import math
import pathlib
import re
from typing import NamedTuple

import jax
import numpy as np

from jaxsoup import _json
from jaxsoup import _processes
from jaxsoup import _tree
from jaxsoup import _warnings
from jaxsoup.checkpoints import _arrays
from jaxsoup.checkpoints import _directories
from jaxsoup.checkpoints import _resumable
from jaxsoup.checkpoints import _soups
from jaxsoup.typing import Config
from jaxsoup.typing import Json
from jaxsoup.typing import Params
from jaxsoup.typing import PathLike

_CONFIG = 'adapter_config.json'
_WEIGHTS = 'adapter_model.safetensors'
_PREFIX = 'base_model.model.'
_NAME = re.compile(re.escape(_PREFIX) + r'(.+)\.lora_([AB])\.weight')
# Settings with which an adapter is not just `B A`.
_REFUSED = (
    'use_dora', 'lora_bias', 'use_qalora', 'modules_to_save',
    'trainable_token_indices', 'target_parameters', 'layer_replication',
    'alora_invocation_tokens',
)  # fmt: skip

# Settings that say what the factors are multiplied with.
_OF_SCALING = (
    'r', 'lora_alpha', 'rank_pattern', 'alpha_pattern', 'use_rslora'
)  # fmt: skip
# Initializations that also change the base.
_CHANGES_BASE = ('pissa', 'olora', 'corda', 'loftq', 'lora_ga')


class Adapters(NamedTuple):
  """What `load_adapters` returns.

  Attributes:
    params: of each adapter, by the layer's name, `{'lora_a': [in, r], 'lora_b':
      [r, out]}` in float32; the scaling `alpha / r` is folded into lora_b.
    config: the adapter_config.json of the first one.
  """

  params: list[Params]
  config: Config


def load_adapters(paths: Sequence[PathLike]) -> Adapters:
  """Reads LoRA adapters, for `lora.average`.

  Args:
    paths: directories of PEFT, with adapter_config.json and
      adapter_model.safetensors (or .bin).

  Returns:
    The `Adapters`, with `alpha / r` folded into lora_b; `alpha / sqrt(r)` if
    they are rank-stabilized (Kalajdzievski, 2023).

  Raises:
    FileNotFoundError: no adapter there.
    ValueError: one is not just a product of matrices: DoRA, trained biases,
      whole modules, embeddings, convolutions.
  """
  configs = [_config_of(pathlib.Path(path)) for path in paths]
  for key in ('base_model_name_or_path', 'fan_in_fan_out'):
    values = [config.get(key) for config in configs]
    odd = [v for v in values if v != values[0]]
    if odd:
      _warnings.warn(
          f'{key} is {values[0]!r} in one adapter and {odd[0]!r} in another: '
          'do they have the same base model?'
      )
  params = [_load(pathlib.Path(p), c) for p, c in zip(paths, configs)]
  return Adapters(params, configs[0] if configs else {})


def _config_of(path: pathlib.Path) -> Json:
  if not (path / _CONFIG).is_file():
    raise FileNotFoundError(
        f'{path} has no {_CONFIG}. Give a directory that PEFT saved.'
    )
  config = _json.read(path / _CONFIG)
  odd = [key for key in _REFUSED if config.get(key)]
  if config.get('bias', 'none') != 'none':
    odd.append('bias')
  if str(config.get('init_lora_weights')).startswith(_CHANGES_BASE):
    odd.append('init_lora_weights')
  if config.get('peft_type', 'LORA') != 'LORA':
    odd.append('peft_type')
  if odd:
    raise ValueError(
        f'{path / _CONFIG} has {odd[0]}={config[odd[0]]!r}: the adapter is not '
        'just a product B A, and cannot be averaged as one. Merge each adapter '
        'into its base model (merge_and_unload of PEFT), and average those.'
    )
  return config


def _load(path: pathlib.Path, config: Config) -> Params:
  file = path / _WEIGHTS
  arrays = _arrays.Arrays(file if file.exists() else file.with_suffix('.bin'))
  own = arrays.metadata.custom.get('jaxsoup', {}).get('metadata', {})
  then, now = own.get('scaling', _scaling_of(config)), _scaling_of(config)
  if then != now:
    raise ValueError(
        f'{path / _CONFIG} was changed: it has {now}, but the weights were '
        f'written with {then}. Restore it from a copy.'
    )
  params: dict[str, dict[str, np.ndarray]] = {}
  for name, shape in arrays.shapes.items():
    match = _NAME.fullmatch(name)
    if match is None or len(shape.shape) != 2:
      raise ValueError(
          f'{arrays.path}: {name!r} of shape {shape.shape} is not a LoRA '
          'factor of a dense layer. Adapters of embeddings or '
          'convolutions, or with whole modules, cannot be averaged: merge each '
          'into its base model, and average those.'
      )
    # PEFT multiplies from the left, Flax from the right.
    factor = arrays[name].astype(np.float32).T
    params.setdefault(match[1], {})[f'lora_{match[2].lower()}'] = factor
  for layer, factors in params.items():
    if len(factors) < 2:
      raise ValueError(
          f'{arrays.path}: layer {layer!r} has only {[*factors]}, expected '
          'lora_a and lora_b. Give a complete copy of the adapter.'
      )
    scaling = _scaling(config, layer, factors['lora_a'].shape[1])
    factors['lora_b'] = factors['lora_b'] * scaling
  return params


def _scaling_of(config: Config) -> Json:
  return {key: config.get(key) for key in _OF_SCALING}


def _scaling(config: Config, layer: str, rank: int) -> np.float32:
  alpha = config.get('lora_alpha', 8)  # PEFT's default.
  for pattern, value in (config.get('alpha_pattern') or {}).items():
    if re.match(rf'(.*\.)?({pattern})$', layer):  # As PEFT does.
      alpha = value
      break
  is_stabilized = config.get('use_rslora')
  return np.float32(alpha / (math.sqrt(rank) if is_stabilized else rank))


def save_adapter(
    path: PathLike, params: Params, config: Config | None = None
) -> str:
  """Writes a directory that PEFT loads.

  `lora_alpha` is the rank of each layer, so that PEFT multiplies with one.

  Args:
    path: a directory that does not exist yet.
    params: an adapter, as `load_adapters` or `lora.average` returns it. Keys of
      nested dicts are joined by dots.
    config: the other settings of PEFT's adapter_config.json.

  Returns:
    The absolute path.

  Raises:
    FileExistsError: the path exists; it is not touched.
    ValueError: leaves that are no pairs of matrices.

  Example:
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + '/adapter'
    >>> params = {'q': {'lora_a': np.ones((2, 1)), 'lora_b': np.eye(1, 2)}}
    >>> load_adapters([save_adapter(path, params)]).params[0]['q']['lora_b']
    array([[1., 0.]], dtype=float32)
  """
  path = _soups.new_path(path)
  flat = _tree.flatten_in_place(params)
  arrays = {}
  ranks: dict[str, int] = {}
  for (*layer, name), leaf in flat.by_path.items():
    factor = np.asarray(jax.device_get(leaf), np.float32)
    if name not in ('lora_a', 'lora_b') or factor.ndim != 2:
      raise ValueError(
          f'Leaf {_tree.name_of((*layer, name))!r} of shape {factor.shape} is '
          'no factor lora_a [in, r] or lora_b [r, out], which PEFT has.'
      )
    module = '.'.join(layer)
    key = f'{_PREFIX}{module}.lora_{name[-1].upper()}.weight'
    arrays[key] = np.ascontiguousarray(factor.T)
    rank = factor.shape[name == 'lora_a']
    if ranks.setdefault(module, rank) != rank:
      raise ValueError(
          f'Layer {module!r} has factors of rank {ranks[module]} and {rank}: '
          'lora_a is [in, r] and lora_b [r, out].'
      )
  if len(arrays) < 2 * len(ranks):
    raise ValueError(f'Each of {[*ranks][:5]} needs lora_a and lora_b.')
  config = _config(ranks, config or {})
  metadata = {'scaling': _scaling_of(config)}
  with _resumable.shared(path) as folder:
    _soups.save(folder / _WEIGHTS, arrays, metadata=metadata)
    if _processes.is_main():
      _directories.write_json(folder / _CONFIG, config)
  return str(path)


def _config(ranks: Mapping[str, int], config: Config) -> Json:
  most = collections.Counter(ranks.values()).most_common(1)
  rank = most[0][0] if most else 1
  # PEFT looks for these as ends of names, unless they begin with ^.
  others = {f'^{re.escape(n)}': r for n, r in ranks.items() if r != rank}
  return {
      'peft_type': 'LORA',
      **config,
      'r': rank,
      'lora_alpha': rank,
      'rank_pattern': others,
      'alpha_pattern': others,
      'use_rslora': False,
      'target_modules': sorted(ranks),
      'layers_to_transform': None,
      'layers_pattern': None,
      'exclude_modules': None,
      'inference_mode': True,
  }
