"""Reads the files of torch: `torch.save(model.state_dict(), 'model.pth')`.

Through `torch.load(weights_only=True)`, which runs no code from the file. Its
bytes are memory-mapped and read when they are needed; files from torch before
1.6 are read as a whole.
"""

import argparse
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import itertools
import pathlib
import re
import threading
from typing import Any
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup.checkpoints import _source

ENDINGS = ('.pth', '.pt', '.bin', '.ckpt', '.pth.tar')
IN_DIRECTORY = 'pytorch_model.bin'  # Of Hugging Face, before safetensors.
# What torch says of a pickle that would call functions.
_REFUSED = re.compile(
    r'unsupported (?:global|class).*?(?= was not| whose module|$)'
    r'|TorchScript archive',
    re.IGNORECASE | re.MULTILINE,
)
# Entries of training scripts: a model, or its moving average.
_MODEL = re.compile('(?:model|state_dict|ema|_)+')
# Of torch, for all threads.
_lock = threading.Lock()
# A pickled dict can contain itself.
_MOST_LEVELS = 100
_MOST_ENTRIES = 1_000_000
# dtypes that NumPy lacks, and integers of their size.
_VIEWS = {
    'bfloat16': ('int16', jnp.bfloat16),
    'float8_e4m3fn': ('uint8', jnp.float8_e4m3fn),
    'float8_e5m2': ('uint8', jnp.float8_e5m2),
    'float8_e4m3fnuz': ('uint8', jnp.float8_e4m3fnuz),
    'float8_e5m2fnuz': ('uint8', jnp.float8_e5m2fnuz),
}


def open_source(path: pathlib.Path, item: str | None = None) -> _source.Source:
  """Opens a file; reads only names and shapes if its format is current."""
  content, num_bytes = _loaded(path)
  state = _state_dict(path, content, item)
  try:
    pairs = list(_tensors(state))
    tensors = dict(pairs)
    if len(tensors) < len(pairs):
      raise ValueError('two of its tensors have the same name')
  except ValueError as e:
    raise _source.damaged(path, e) from e
  if not tensors:
    raise ValueError(
        f'{path} holds no tensors. Save only the tensors: '
        'torch.save(model.state_dict(), path).'
    )
  for name, tensor in tensors.items():
    _check(path, name, tensor, num_bytes)
  by_path = dict(zip(_source.paths_of(tensors, '.'), tensors.values()))
  shapes = {
      p: jax.ShapeDtypeStruct(tuple(t.shape), _dtype_of(t))
      for p, t in by_path.items()
  }
  return _source.Source(
      _source.plain_metadata(path, shapes),
      reader_fn=lambda p: _reader(by_path[p]),
      separator='.',
      patch_fn=lambda copy: _patched(copy, item),
  )


@contextlib.contextmanager
def _patched(path: pathlib.Path, item: str | None) -> Iterator[_source.PutFn]:
  """Puts other values into the tensors of a file, which is saved again.

  A moving average next to the model gets them too: scripts of training load it
  in place of the model.
  """
  import torch

  content, _ = _loaded(path, is_mapped=False)
  tensors = dict(_tensors(_state_dict(path, content, item)))
  by_path = dict(zip(_source.paths_of(tensors, '.'), tensors.values()))
  top = content if isinstance(content, Mapping) else {}
  others = [
      dict(_tensors(x))
      for key, x in top.items()
      if _MODEL.fullmatch(str(key)) and isinstance(x, Mapping)
  ]
  odd = [p for p, t in by_path.items() if not t.is_contiguous()]
  if odd:
    raise ValueError(
        f'{path}: {".".join(odd[0])!r} is not contiguous, so that no other '
        'values can be put in its place. Save the soup as .safetensors.'
    )
  flat = {p: t.view(-1).view(torch.uint8) for p, t in by_path.items()}

  def put(name, start, piece):
    data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
    flat[name][start : start + data.size] = torch.from_numpy(data)

  yield put
  for model in others:
    for name, tensor in tensors.items():
      name = name.removeprefix(f'{item}.')
      if name in model and model[name].shape == tensor.shape:
        model[name].copy_(tensor)
  torch.save(content, path)


def _loaded(path: pathlib.Path, is_mapped: bool = True) -> tuple[Any, int]:
  """The content of a file, and its bytes when they are unpacked."""
  try:
    import torch
  except ImportError as e:
    raise ImportError(
        f'{path} is a torch file, and torch is not installed: '
        '`pip install torch`, or save the model as safetensors.'
    ) from e
  try:
    with path.open('rb') as f:
      is_archive = f.read(4) == b'PK\x03\x04'
    num_bytes = path.stat().st_size
    is_mapped = is_mapped and is_archive
    if is_archive:
      with zipfile.ZipFile(path) as archive:
        _source.check_archive(archive)
        infos = archive.infolist()
      # torch would take compressed bytes for values.
      is_mapped &= all(i.compress_type == zipfile.ZIP_STORED for i in infos)
      num_bytes = sum(i.file_size for i in infos)
    # Options of a script, which timm saves.
    with _lock, torch.serialization.safe_globals([argparse.Namespace]):
      content = torch.load(
          str(path), map_location='cpu', mmap=is_mapped, weights_only=True
      )
    return content, num_bytes
  # The unpickler raises all kinds of errors on invalid bytes.
  except Exception as e:
    said = str(e)
    if refused := _REFUSED.search(said):
      raise ValueError(
          f'{path} is refused because it would run code when it is loaded '
          f'({refused[0]}). If you trust its author, load it yourself, and '
          'save only the tensors: torch.save(model.state_dict(), path).'
      ) from e
    # The rest of torch's page says how to switch the protection off.
    is_page = 'weights_only' in said
    reason = 'its pickle is invalid' if is_page else said or e
    raise _source.damaged(path, reason) from e


def _state_dict(path: pathlib.Path, content: Any, item: str | None) -> Any:
  """The state dict, without the wrappers of training scripts."""
  first = (item or '').partition('/')[0]
  for _ in range(_MOST_LEVELS):
    if not isinstance(content, Mapping):
      return content
    inside = {str(k): x for k, x in content.items() if isinstance(x, Mapping)}
    if first in inside:
      return {first: inside[first]}
    models = [k for k in inside if _MODEL.fullmatch(k) and _is_any(inside[k])]
    if len(models) > 1:
      raise ValueError(
          f'{path} holds several models: {" and ".join(models)}. Pass item=NAME'
          f' (--item NAME), such as item={models[0]!r}.'
      )
    if not models:
      states = [
          k for k in inside if 'optim' in k or 'param_groups' in inside[k]
      ]
      return {k: x for k, x in content.items() if str(k) not in states}
    content = inside[models[0]]
  return content  # Which contains itself: `_tensors` says so.


def _is_any(content: Mapping[Any, Any]) -> bool:
  """Whether there may be tensors."""
  inside = content.values()
  return any(isinstance(x, Mapping) or hasattr(x, 'shape') for x in inside)


def _tensors(content: Any) -> Iterator[tuple[str, Any]]:
  """The tensors by name; epochs, arguments and the like are left out."""
  import torch

  counter = itertools.count(1)

  def visit(content, keys):
    if len(keys) > _MOST_LEVELS or next(counter) > _MOST_ENTRIES:
      raise ValueError('its dicts contain one another, or too many entries')
    if isinstance(content, torch.Tensor):
      yield '.'.join(keys) or 'tensor', content.detach()
    elif isinstance(content, Mapping):
      for key, child in content.items():
        yield from visit(child, (*keys, str(key)))

  return visit(content, ())


def _check(path: pathlib.Path, name: str, tensor: Any, num_bytes: int) -> None:
  import torch

  if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
    raise ValueError(
        f'{path}: {name!r} is sparse, quantized or has no values. Save dense '
        'tensors: tensor.to_dense(), tensor.dequantize().'
    )
  if tensor.numel() * tensor.element_size() > num_bytes:
    raise _source.damaged(
        path,
        f'{name!r} declares {tensor.numel() * tensor.element_size():,} bytes, '
        f'but the file has {num_bytes:,}',
    )
  try:
    _dtype_of(tensor)
  except TypeError as e:
    raise ValueError(
        f'{path}: {name!r} has dtype {tensor.dtype}, which jax does not have. '
        'Convert it, and save the file again.'
    ) from e


def _dtype_of(tensor: Any) -> np.dtype:
  name = str(tensor.dtype).removeprefix('torch.')
  return np.dtype(_VIEWS[name][1] if name in _VIEWS else name)


def _reader(tensor: Any) -> _source.ReadFn:
  import torch

  name = str(tensor.dtype).removeprefix('torch.')

  def read(index):
    part = tensor[index].resolve_conj().resolve_neg().contiguous()
    if name not in _VIEWS:
      return part.numpy()
    integers, dtype = _VIEWS[name]
    return part.view(getattr(torch, integers)).numpy().view(dtype)

  return read
