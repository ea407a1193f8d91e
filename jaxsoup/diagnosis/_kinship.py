"""Which ingredients, and which of their parts, come from one initialization.

Models that were fine-tuned from one start still point where it points: in
their matrices `<theta_i, theta_j> / min(|theta_i|, |theta_j|)^2` is near 1,
however far one of them went. From two starts it is near 0, with an error of
`max / (min sqrt(n))` for n numbers. Vectors tell nothing: every scale of a norm
starts at 1, every bias at 0.
"""

from collections.abc import Sequence

import numpy as np

from jaxsoup.diagnosis import _geometry
from jaxsoup.diagnosis import _pool

# Below it, or below three times the noise, two matrices are unrelated.
_RELATED = 0.15
_LARGEST_NOISE = 0.1
_CONTAINED = 0.5
# Units that are compared, and the cosine from which two are the same.
_NUM_UNITS = 64
_MATCHED = 0.75


def unrelated(geometry: _geometry.Geometry) -> np.ndarray:
  """Pairs whose matrices have nothing to do with each other, [L, K+1, K+1].

  False where it cannot be told: vectors, matrices that are small or zero, and
  rows of a theta_0 that is not there.
  """
  norms = geometry.norms()
  small = np.fmin(norms[:, :, None], norms[:, None])
  large = np.fmax(norms[:, :, None], norms[:, None])
  with np.errstate(divide='ignore', invalid='ignore'):
    share = geometry.gram / small**2
    noise = large / small / np.sqrt(geometry.sizes)[:, None, None]
    bar = np.fmax(_RELATED, 3 * noise)
    is_apart = (share < bar) & (noise < _LARGEST_NOISE)
  # What began at zero, as new heads may, shares nothing but the task.
  is_grown = norms[:, -1] == 0
  return is_apart & (_matrices(geometry) & ~is_grown)[:, None, None]


def _matrices(geometry: _geometry.Geometry) -> np.ndarray:
  """Leaves that are drawn at random, [L]; biases of attention have two axes."""
  is_bias = ['bias' in path[-1] if path else False for path in geometry.paths]
  return (geometry.ranks > 1) & geometry.trained & ~np.array(is_bias, bool)


def relatives(geometry: _geometry.Geometry, apart: np.ndarray) -> np.ndarray:
  """Pairs that come from one start: most of their numbers say so, [K+1, K+1].

  A pair of which nothing can be told counts as related.
  """
  sizes = geometry.sizes * _matrices(geometry)
  known = np.isfinite(geometry.gram)
  total = np.einsum('l,lij->ij', sizes, known)
  total_apart = np.einsum('l,lij->ij', sizes, apart)
  # Without a theta_0 its row is related to nothing.
  return (total_apart <= total / 2) & known.any(0)


def contain_start(geometry: _geometry.Geometry, leaf: int) -> np.ndarray:
  """Who has theta_0 as a whole in a leaf, [K+1].

  `<theta_i, theta_0> / |theta_0|^2` is near 1 of a model that began there, and
  small of one that only learned the same task.
  """
  gram = geometry.gram[leaf]
  with np.errstate(divide='ignore', invalid='ignore'):
    return gram[:, -1] / gram[-1, -1] > _CONTAINED


def permuted_leaves(
    pool: _pool.Pool,
    geometry: _geometry.Geometry,
    leaves: Sequence[int],
    k: int,
    other: int,
) -> list[tuple[int, float]]:
  """Leaves whose units are those of another ingredient in another order.

  Some units of one (rows along one axis) are compared with all of the other:
  if unrelated, the largest of m cosines in d dimensions is about
  `sqrt(2 log(m) / d)`; of a permuted relative it is near one, elsewhere than in
  its own place, and in another place for each unit. Returns numbers of leaves,
  with the share of units at another position.
  """
  moved = []
  for i in leaves:
    pair = [pool.leaf(j, geometry.paths[i]) for j in (k, other)]
    shares = [
        _share_moved(*(np.moveaxis(x, axis, 0) for x in pair))
        for axis in range(pair[0].ndim)
    ]
    if max(shares) > 0.5:
      moved.append((i, max(shares)))
  return moved


def _share_moved(ours: np.ndarray, theirs: np.ndarray) -> float:
  """The share of our units that are at another position among theirs."""
  num = len(ours)
  ours, theirs = (_unit_rows(x) for x in (ours, theirs))
  chance = np.sqrt(2 * np.log(max(num, 2)) / theirs.shape[1])
  if num < 4 or 1.5 * chance > _MATCHED:
    return 0.0  # With so few dimensions unrelated units look alike.
  some = np.linspace(0, num - 1, min(num, _NUM_UNITS)).astype(int)
  cosines = ours[some] @ theirs.T
  place = cosines.argmax(1)
  alike = cosines.max(1) > _MATCHED
  moved = alike & (place != some)
  # Units that are all alike would all match one position.
  return len(set(place[moved])) / len(some)


def _unit_rows(x: np.ndarray) -> np.ndarray:
  dtype = np.complex64 if np.iscomplexobj(x) else np.float32
  rows = np.ascontiguousarray(x, dtype).view(np.float32).reshape(len(x), -1)
  norms = np.linalg.norm(rows, axis=1, keepdims=True)
  return rows / np.where(norms > 0, norms, 1)
