"""What cannot be averaged, although its structure fits."""

from collections.abc import Collection
from collections.abc import Sequence
import pathlib
import re
from typing import Any

from etils import epath
import numpy as np

from jaxsoup import _files
from jaxsoup import _json
from jaxsoup import _tree
from jaxsoup.checkpoints import _checkpoint
from jaxsoup.checkpoints import _source
from jaxsoup.typing import Json

CONFIG = 'config.json'
_LORA = re.compile(r'(^|[./_])lora[./_]?(embedding_)?[ab]($|[./_])', re.I)
# Of GPTQ and AWQ, compressed-tensors, fp8 in blocks, bitsandbytes.
_QUANTIZED = re.compile(
    r'(^|[./])(qweight|qzeros|weight_packed|weight_scale_inv|(nested_)?absmax|'
    r'quant_state)($|[./])'
)
# `scale` alone is that of a norm.
_OF_SCALES = re.compile(r'.scales?(_inv)?$|^SCB$')
_DEQUANTIZE = (
    'The mean of quantized numbers is not that of the weights. Dequantize each '
    'model first (with transformers: model.dequantize(), save_pretrained), and '
    'average those.'
)


def require_averageable(checkpoint: _checkpoint.Checkpoint) -> None:
  """Raises where a mean of the leaves is not a mean of models."""
  metadata = checkpoint.source.metadata
  if checkpoint.source.layout is None:
    file = next_to(metadata.path, [CONFIG])
    quantization = _quantization(config_of(file)) if file else None
    if quantization:
      raise ValueError(
          f'{file} has quantization_config {str(quantization)[:200]}. '
          f'{_DEQUANTIZE}'
      )
  with_scales = {
      stem
      for path in metadata.leaves
      for stem, key in [_stem_and_key(path)]
      if _OF_SCALES.search(key)
  }
  for leaf_path, path in checkpoint.places.items():
    name, leaf = _tree.name_of(path), metadata.leaves[path]
    if _LORA.search(name):
      raise ValueError(
          f'{metadata.path} holds factors of LoRA, such as {name!r}: the '
          'product of averaged factors is not the average of the products. '
          'Average adapters with jaxsoup.lora.average in Python, or merge each '
          'into its base model first.'
      )
    if path != leaf_path and _is_of_a_sum(path, metadata.leaves):
      raise ValueError(
          f'{metadata.path}: {name!r} is the sum of a running average, not its '
          'value. In training, save jaxsoup.trajectory.kept(opt_state) as '
          'items of their own; or average whole states: --whole, whole=True.'
      )
    stem, key = _stem_and_key(path)
    is_scaled = (
        stem in with_scales
        or key == 'qvalue'  # Of Qwix.
        or (key in ('kernel', 'weight') and not _tree.is_float(leaf))
    )
    if _QUANTIZED.search(name) or (is_scaled and _is_narrow(leaf.dtype)):
      raise ValueError(
          f'{metadata.path}: {name!r} of dtype {leaf.dtype} is quantized. '
          f'{_DEQUANTIZE}'
      )


def _is_of_a_sum(path: _tree.Path, leaves: Collection[_tree.Path]) -> bool:
  """Whether it lies in the `total` of a `jaxsoup.running_average`."""
  return any(
      key == 'total'
      and (*path[:i], 'weight') in leaves
      and (*path[:i], 'count') in leaves
      for i, key in enumerate(path)
  )


def _stem_and_key(path: _tree.Path) -> tuple[str, str]:
  stem, _, key = '.'.join(path).rpartition('.')
  return stem, key


def _is_narrow(dtype: np.dtype[Any]) -> bool:
  """Whether a number has at most 8 bits."""
  return dtype.itemsize == 1 and dtype != np.bool_


def _quantization(config: Any) -> Any:
  """Of the model, or of one of its parts."""
  if not isinstance(config, dict):
    return None
  own = config.get('quantization_config') or config.get('compression_config')
  return own or next(filter(None, map(_quantization, config.values())), None)


def next_to(path: str, names: Sequence[str]) -> Any:
  """The first of these files that is next to weights, or None."""
  if _files.is_remote(path):  # One question in place of several.
    listed = {p.name: p for p in epath.Path(path).parent.iterdir()}
    return next((listed[name] for name in names if name in listed), None)
  files = (pathlib.Path(path).with_name(name) for name in names)
  return next((file for file in files if file.is_file()), None)


def config_of(file: pathlib.Path) -> Json:
  try:
    return dict(_json.parsed(file.read_bytes()))
  except (TypeError, ValueError) as e:
    raise _source.damaged(file, e) from e
