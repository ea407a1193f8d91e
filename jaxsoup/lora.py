"""Averages of LoRA adapters: of what they add to a base, not of their factors.

```
adapters = [nnx.state(model, nnx.LoRAParam) for model in models]
soup = lora.average(adapters)                        # exact, of a larger rank
soup = lora.average(adapters, rank=8)                # the nearest of rank 8
soup.info.residuals                                  # what that costs, by layer
```

`checkpoints.load_adapters` and `save_adapter` read and write those of PEFT.
"""

from collections.abc import Mapping
from collections.abc import Sequence

import jax
import numpy as np

from jaxsoup import _tree
from jaxsoup._soup import AdapterInfo
from jaxsoup._soup import Soup
from jaxsoup.typing import Alpha
from jaxsoup.typing import Params

# Of one layer, in float64: `[..., in, r]` and `[..., r, out]`.
_Factors = tuple[np.ndarray, np.ndarray]


def average(
    adapters: Sequence[Params],
    alpha: Alpha | None = None,
    *,
    rank: int | None = None,
) -> Soup[AdapterInfo]:
  """Averages what adapters of one base add to it.

  `dW = sum_k alpha_k A_k B_k = [A_1, ..., A_K] [alpha_1 B_1; ...; alpha_K B_K]`

  This is exact, and of rank `sum_k r_k`. The product of averaged factors is
  not: it mixes the B of one adapter with the A of another. With
  `rank` the nearest matrix of that rank in the Frobenius norm is taken, from
  the SVD of a small core: dW is never formed.

  Args:
    adapters: K pytrees with two leaves for each layer, as of `flax.nnx.LoRA`:
      `lora_a`, `[..., in, r]`, and `lora_b`, `[..., r, out]`, of any ranks. A
      layer that one of them lacks is zero there.
    alpha: `[K]` weights; None is `1 / K` for each.
    rank: of the result; None means exact.

  Returns:
    A `Soup` with an `AdapterInfo`. Its params are in the container and dtypes
    of the first adapter; in nested dicts, where others have layers that the
    first one lacks.

  Raises:
    ValueError: leaves that are no factors, a layer of different sizes in two
      adapters, values that are not finite, or a wrong number of weights.

  Example:
    >>> first = {'q': {'lora_a': np.eye(2, 1), 'lora_b': np.ones((1, 2))}}
    >>> other = {'q': {'lora_a': np.eye(2, 1, -1), 'lora_b': np.ones((1, 2))}}
    >>> soup = average([first, other])
    >>> dense(soup.params)['q']
    array([[0.5, 0.5],
           [0.5, 0.5]], dtype=float32)
    >>> average([first, other], rank=1).params['q']['lora_a'].shape
    (2, 1)

  Source: Hu et al., LoRA, 2021, section 4.1.
  """
  num = len(adapters)
  alpha = np.full(num, 1 / max(1, num)) if alpha is None else np.asarray(alpha)
  if not num or alpha.shape != (num,) or not np.isfinite(alpha).all():
    raise ValueError(
        f'alpha is {alpha} of shape {alpha.shape}, but there are {num} '
        'adapters: give at least one adapter, and one finite weight for each.'
    )
  if rank is not None and rank < 1:
    raise ValueError(f'rank is {rank}, expected at least 1.')
  flats = [_tree.flatten(adapter) for adapter in adapters]
  factors = [_factors(flat, f'adapter {k}') for k, flat in enumerate(flats)]
  averaged: dict[_tree.Path, np.ndarray] = {}
  residuals = {}
  for layer in dict.fromkeys(layer for f in factors for layer in f):
    parts = {k: f[layer] for k, f in enumerate(factors) if layer in f}
    try:
      a = np.concatenate([a for a, _ in parts.values()], axis=-1)
      b = np.concatenate([alpha[k] * b for k, (_, b) in parts.items()], axis=-2)
    except ValueError as e:
      shapes = {k: (*a.shape[:-1], b.shape[-1]) for k, (a, b) in parts.items()}
      raise ValueError(
          f'layer {_tree.name_of(layer)!r}: the adapters add matrices of the '
          f'shapes {shapes}. Average adapters of the same base model.'
      ) from e
    residual = 0.0
    if rank is not None and rank < a.shape[-1]:
      a, b, residual = _of_rank(a, b, rank)
    averaged |= {(*layer, 'lora_a'): a, (*layer, 'lora_b'): b}
    residuals[_tree.name_of(layer)] = residual
  return Soup(
      params=_in_container(averaged, flats),
      alpha=alpha.astype(np.float32),
      info=AdapterInfo(residuals),
  )


def _factors(flat: _tree.Flat, name: str) -> dict[_tree.Path, _Factors]:
  """The two factors of each layer, by its path."""
  leaves: dict[_tree.Path, dict[str, np.ndarray]] = {}
  for path, leaf in flat.by_path.items():
    where = f'{name}: leaf {_tree.name_of(path)!r} of shape {leaf.shape}'
    if path[-1:] not in (('lora_a',), ('lora_b',)) or leaf.ndim < 2:
      raise ValueError(
          f'{where} is no factor lora_a or lora_b. Pass the parameters of the '
          'adapter only, such as nnx.state(model, nnx.LoRAParam).'
      )
    value = np.asarray(jax.device_get(leaf), np.float64)
    if not np.isfinite(value).all():
      raise ValueError(f'{where} has NaN or infinite values: leave it out.')
    leaves.setdefault(path[:-1], {})[path[-1]] = value
  factors = {}
  for layer, pair in leaves.items():
    a, b = pair.get('lora_a'), pair.get('lora_b')
    if a is None or b is None or (*a.shape[:-2], a.shape[-1]) != b.shape[:-1]:
      shapes = {key: x.shape for key, x in pair.items()}
      raise ValueError(
          f'{name}: layer {_tree.name_of(layer)!r} has {shapes}, expected '
          'lora_a [..., in, r] and lora_b [..., r, out].'
      )
    factors[layer] = a, b
  return factors


def _of_rank(
    a: np.ndarray, b: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray, float]:
  """The best factors of a rank (Eckart and Young), from `A B = Q_a core Q_b'`.

  From `[..., in, R]` and `[..., R, out]` to `[..., in, r]` and `[..., r, out]`,
  of equal norms, and the relative residual.
  """
  q_a, r_a = np.linalg.qr(a)
  q_b, r_b = np.linalg.qr(b.swapaxes(-1, -2))
  u, s, v = np.linalg.svd(r_a @ r_b.swapaxes(-1, -2))
  rank = min(rank, s.shape[-1])
  total, root = np.linalg.norm(s), np.sqrt(s[..., :rank])
  residual = np.linalg.norm(s[..., rank:]) / total if total else 0.0
  a = q_a @ (u[..., :rank] * root[..., None, :])
  b = (root[..., None] * v[..., :rank, :]) @ q_b.swapaxes(-1, -2)
  return a, b, float(residual)


def _in_container(
    factors: Mapping[_tree.Path, np.ndarray], flats: Sequence[_tree.Flat]
) -> Params:
  """The factors in the container of the first adapter, if it has all layers."""
  dtypes = {p: x.dtype for f in flats[::-1] for p, x in f.by_path.items()}
  leaves = {
      path: _tree.on_device(x.astype(dtypes[path]))
      for path, x in factors.items()
  }
  if leaves.keys() - set(flats[0].paths):
    return _tree.nest(leaves)
  return flats[0].replace(map(leaves.__getitem__, flats[0].paths))


def dense(params: Params) -> dict[str, np.ndarray]:
  """The matrices to be added to the base: `dW = A B`.

  Args:
    params: an adapter.

  Returns:
    By the paths of the layers, `[..., in, out]` float32.

  Example:
    >>> dense({'q': {'lora_a': np.ones((2, 1)), 'lora_b': np.eye(1, 2)}})
    {'q': array([[1., 0.], [1., 0.]], dtype=float32)}
  """
  factors = _factors(_tree.flatten(params), 'the adapter')
  return {
      _tree.name_of(layer): (a @ b).astype(np.float32)
      for layer, (a, b) in factors.items()
  }
