"""Averages of LoRA adapters: of what they add to a base, not of their factors.

```
adapters = [lora.load(path) for path in paths]       # directories of PEFT
averaged = lora.average(adapters)                    # exact, of a larger rank
averaged = lora.average(adapters, rank=8)            # the nearest of rank 8
averaged.residuals                                   # what that costs, by layer
lora.save('soup', averaged.adapter)
```
"""

import collections
from collections.abc import Mapping
from collections.abc import Sequence
import json
import math
import pathlib
import re
from typing import Any
from typing import NamedTuple
import warnings

import numpy as np

from jaxsoup import checkpoints
from jaxsoup.checkpoints import _directories

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

# Initializations that also change the base.
_CHANGES_BASE = ('pissa', 'olora', 'corda', 'loftq', 'lora_ga')


class Adapter(NamedTuple):
  """What a LoRA adds to the matrices of a base: `dW = B A` for each layer.

  Attributes:
    factors: by the layer's name, `{'A': [r, in], 'B': [out, r]}`; the scaling
      `alpha / r` is folded into B.
    config: the adapter_config.json of PEFT, or {}.
  """

  factors: Mapping[str, Mapping[str, np.ndarray]]
  config: Mapping[str, Any] = {}


class Averaged(NamedTuple):
  """An average of adapters.

  Attributes:
    adapter: the average.
    residuals: of each layer `||dW - dW_r|| / ||dW||`, what the rank leaves out.
  """

  adapter: Adapter
  residuals: dict[str, float]


def average(
    adapters: Sequence[Adapter], alpha: Any = None, *, rank: int | None = None
) -> Averaged:
  """Averages what adapters of one base add to it.

  `dW = sum_k alpha_k B_k A_k = [alpha_1 B_1, ..., alpha_K B_K] [A_1; ...; A_K]`

  This is exact, and of rank `sum_k r_k`. The product of averaged factors is
  not: it mixes the B of one adapter with the A of another. With
  `rank` the nearest matrix of that rank in the Frobenius norm is taken, from
  the SVD of a small core: dW is never formed.

  Args:
    adapters: K of them, of any ranks. A layer that one of them lacks is zero
      there.
    alpha: `[K]` weights; None is `1 / K` for each.
    rank: of the result; None means exact.

  Returns:
    The average in float32, and the residual of each layer.

  Raises:
    ValueError: a layer has different sizes in two adapters, a factor is not
      finite, or the number of weights is wrong.

  Example:
    >>> first = Adapter({'q': {'A': np.eye(1, 2), 'B': np.ones((2, 1))}})
    >>> other = Adapter({'q': {'A': np.eye(1, 2, 1), 'B': np.ones((2, 1))}})
    >>> averaged = average([first, other])
    >>> dense(averaged.adapter)['q.weight']
    array([[0.5, 0.5],
           [0.5, 0.5]], dtype=float32)
    >>> average([first, other], rank=1).adapter.factors['q']['A'].shape
    (1, 2)

  Source: Hu et al., LoRA, 2021, section 4.1.
  """
  num = len(adapters)
  alpha = np.full(num, 1 / max(1, num)) if alpha is None else np.asarray(alpha)
  if not num or alpha.shape != (num,):
    raise ValueError(
        f'alpha has shape {alpha.shape}, but there are {num} adapters: give '
        'at least one adapter, and one weight for each.'
    )
  if rank is not None and rank < 1:
    raise ValueError(f'rank is {rank}, expected at least 1.')
  _check(adapters)
  factors, residuals = {}, {}
  for layer in dict.fromkeys(n for a in adapters for n in a.factors):
    parts = [
        (weight, adapter.factors[layer])
        for weight, adapter in zip(alpha, adapters)
        if layer in adapter.factors
    ]
    a = np.concatenate([np.asarray(p['A'], np.float64) for _, p in parts])
    b = np.concatenate(
        [w * np.asarray(p['B'], np.float64) for w, p in parts], 1
    )
    residuals[layer] = 0.0
    if rank is not None and rank < len(a):
      b, a, residuals[layer] = _of_rank(b, a, rank)
    factors[layer] = {'A': a.astype(np.float32), 'B': b.astype(np.float32)}
  return Averaged(Adapter(factors, adapters[0].config), residuals)


def _of_rank(
    b: np.ndarray, a: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray, float]:
  """The best factors of a rank (Eckart and Young), from `B A = Q_b core Q_a'`.

  Args:
    b: `[out, R]`.
    a: `[R, in]`.
    rank: r.

  Returns:
    `[out, r]` and `[r, in]`, of equal norms, and the relative residual.
  """
  q_b, r_b = np.linalg.qr(b)
  q_a, r_a = np.linalg.qr(a.T)
  u, s, v = np.linalg.svd(r_b @ r_a.T)
  total, root = np.linalg.norm(s), np.sqrt(s[:rank])
  residual = np.linalg.norm(s[rank:]) / total if total else 0.0
  b = q_b @ (u[:, : len(root)] * root)
  a = (root[:, None] * v[: len(root)]) @ q_a.T
  return b, a, float(residual)


def _check(adapters: Sequence[Adapter]) -> None:
  """Raises where adapters do not have the same base model."""
  seen: dict[str, tuple[int, tuple[int, int]]] = {}
  for k, adapter in enumerate(adapters):
    for layer, factor in adapter.factors.items():
      a, b = np.shape(factor['A']), np.shape(factor['B'])
      where = f'adapter {k}: layer {layer!r}'
      if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise ValueError(
            f'{where} has A {a} and B {b}, expected [r, in] and [out, r].'
        )
      first, sizes = seen.setdefault(layer, (k, (b[0], a[1])))
      if sizes != (b[0], a[1]):
        raise ValueError(
            f'{where} adds a matrix of shape {(b[0], a[1])}, but adapter '
            f'{first} adds {sizes}. Average adapters of the same base model.'
        )
      for name, x in factor.items():
        if not np.isfinite(np.asarray(x, np.float64)).all():
          raise ValueError(
              f'{where} has NaN or infinite values in {name}: leave it out.'
          )
  for key in ('base_model_name_or_path', 'fan_in_fan_out'):
    values = [adapter.config.get(key) for adapter in adapters]
    odd = [v for v in values if v != values[0]]
    if odd:
      warnings.warn(
          f'{key} is {values[0]!r} in one adapter and {odd[0]!r} in another: '
          'do they have the same base model?',
          stacklevel=3,
      )


def dense(adapter: Adapter) -> dict[str, np.ndarray]:
  """The matrices to be added to the base: `dW = B A`.

  Args:
    adapter: an adapter.

  Returns:
    By the names of the matrices in the base, `NAME.weight`: `[out, in]`, or
    `[in, out]` where the config says `fan_in_fan_out`; float32.

  Example:
    >>> adapter = Adapter({'q': {'A': np.ones((1, 2)), 'B': np.eye(2, 1)}})
    >>> dense(adapter)
    {'q.weight': array([[1., 1.], [0., 0.]], dtype=float32)}
  """
  turned = bool(adapter.config.get('fan_in_fan_out'))
  products = {
      layer: np.asarray(f['B'], np.float64) @ np.asarray(f['A'], np.float64)
      for layer, f in adapter.factors.items()
  }
  return {
      f'{layer}.weight': (x.T if turned else x).astype(np.float32)
      for layer, x in products.items()
  }


def load(path: Any) -> Adapter:
  """Reads a directory of PEFT.

  Args:
    path: with adapter_config.json and adapter_model.safetensors (or .bin).

  Returns:
    The adapter, with `alpha / r` folded into B; `alpha / sqrt(r)` if it is
    rank-stabilized (Kalajdzievski, 2023).

  Raises:
    FileNotFoundError: no adapter there.
    ValueError: it is not just matrices `B A`: DoRA, trained biases, whole
      modules, embeddings, convolutions.
  """
  path = pathlib.Path(path)
  if not (path / _CONFIG).is_file():
    raise FileNotFoundError(
        f'{path} has no {_CONFIG}. Give a directory that PEFT saved.'
    )
  config = json.loads((path / _CONFIG).read_text())
  _check_config(path, config)
  file = path / _WEIGHTS
  arrays = checkpoints.Arrays(
      file if file.exists() else file.with_suffix('.bin')
  )
  factors: dict[str, dict[str, np.ndarray]] = {}
  for name, shape in arrays.shapes.items():
    match = _NAME.fullmatch(name)
    if match is None or len(shape.shape) != 2:
      raise ValueError(
          f'{arrays.path}: {name!r} of shape {shape.shape} is not a LoRA '
          'factor of a dense layer. Adapters of embeddings or '
          'convolutions, or with whole modules, cannot be averaged: merge each '
          'into its base model, and average those.'
      )
    factors.setdefault(match[1], {})[match[2]] = arrays[name].astype(np.float32)
  for layer, factor in factors.items():
    if set(factor) != {'A', 'B'}:
      raise ValueError(
          f'{arrays.path}: layer {layer!r} has only {[*factor]}, expected A '
          'and B. Give a complete copy of the adapter.'
      )
    factor['B'] = factor['B'] * _scaling(config, layer, len(factor['A']))
  return Adapter(factors, config)


def _check_config(path: pathlib.Path, config: Mapping[str, Any]) -> None:
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


def _scaling(config: Mapping[str, Any], layer: str, rank: int) -> np.float32:
  alpha = config.get('lora_alpha', rank)
  for pattern, value in (config.get('alpha_pattern') or {}).items():
    if re.match(rf'(.*\.)?({pattern})$', layer):  # As PEFT does.
      alpha = value
      break
  is_stabilized = config.get('use_rslora')
  return np.float32(alpha / (math.sqrt(rank) if is_stabilized else rank))


def save(path: Any, adapter: Adapter) -> str:
  """Writes a directory that PEFT loads.

  `lora_alpha` is the rank of each layer, so that PEFT multiplies with one.

  Args:
    path: a directory that does not exist yet.
    adapter: from `load` or `average`.

  Returns:
    The absolute path.

  Raises:
    FileExistsError: the path exists; it is not touched.

  Example:
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + '/adapter'
    >>> adapter = Adapter({'q': {'A': np.ones((1, 2)), 'B': np.eye(2, 1)}})
    >>> dense(load(save(path, adapter)))
    {'q.weight': array([[1., 1.], [0., 0.]], dtype=float32)}
  """
  path = pathlib.Path(path).absolute()
  if path.exists():
    raise FileExistsError(f'{path} already exists. Give another path.')
  arrays = {
      f'{_PREFIX}{layer}.lora_{name}.weight': np.asarray(x, np.float32)
      for layer, factor in adapter.factors.items()
      for name, x in factor.items()
  }
  config = json.dumps(_config(adapter), indent=2) + '\n'
  path.parent.mkdir(parents=True, exist_ok=True)
  with _directories.atomic_directory(path) as folder:
    checkpoints.save(folder / _WEIGHTS, arrays)
    (folder / _CONFIG).write_text(config)
  return str(path)


def _config(adapter: Adapter) -> dict[str, Any]:
  ranks = {layer: len(f['A']) for layer, f in adapter.factors.items()}
  most = collections.Counter(ranks.values()).most_common(1)
  rank = most[0][0] if most else 1
  # PEFT looks for these as ends of names, unless they begin with ^.
  others = {f'^{re.escape(n)}': r for n, r in ranks.items() if r != rank}
  return {
      'peft_type': 'LORA',
      **adapter.config,
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
