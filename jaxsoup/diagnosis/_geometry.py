"""Inner products of all ingredients, leaf by leaf, in one walk over them.

```
geometry = measure(pool, members)
geometry.squares().sum(0)                  # |theta_i - theta_j|^2, [K, K]
```
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxsoup import _tree
from jaxsoup.diagnosis import _pool
from jaxsoup.typing import Leaf
from jaxsoup.typing import ProgressFn

# Of an ulp the rounding error is uniform: ulp / sqrt(12), and the mean over
# mantissas in [1, 2) that are log-uniform.
_ROUNDING = (3 / (8 * np.log(2))) ** 0.5 / 12**0.5


class Geometry(NamedTuple):
  """What one walk over K ingredients (and theta_0, the last row) tells.

  Attributes:
    paths: of the L leaves that are floats.
    sizes: numbers in each leaf, [L].
    ranks: number of axes of each leaf, [L].
    gram: `<theta_i, theta_j>` of each leaf, [L, K + 1, K + 1]; NaN in the last
      row where theta_0 has no such leaf.
    same: labels of equal leaves, [L, K]: two ingredients with one label are
      equal there.
    is_start: whether the leaf is that of theta_0, [L, K].
    finite: whether all values of a leaf are, [L, K].
    eps: spacing of the numbers near one that each ingredient holds, [K]; that
      of bfloat16 where float32 holds no more than that.
    statistics: whether a leaf is a running statistic of BatchNorm, [L].
  """

  paths: list[_tree.Path]
  sizes: np.ndarray
  ranks: np.ndarray
  gram: np.ndarray
  same: np.ndarray
  is_start: np.ndarray
  finite: np.ndarray
  eps: np.ndarray
  statistics: np.ndarray

  def take(self, rows: Sequence[int]) -> 'Geometry':
    """The same of some ingredients, and theta_0."""
    rows = list(rows)
    both = [*rows, -1]
    return self._replace(
        gram=self.gram[:, both][:, :, both],
        same=self.same[:, rows],
        is_start=self.is_start[:, rows],
        finite=self.finite[:, rows],
        eps=self.eps[rows],
    )

  @property
  def has_start(self) -> np.ndarray:
    """Whether theta_0 has the leaf, [L]."""
    return np.isfinite(self.gram[:, -1, -1])

  @property
  def trained(self) -> np.ndarray:
    """Leaves in which distances are measured: no running statistics, [L]."""
    return ~self.statistics

  def norms(self) -> np.ndarray:
    """`|theta_k|` of each leaf, [L, K + 1]."""
    return np.sqrt(np.einsum('lkk->lk', self.gram))

  def squares(self) -> np.ndarray:
    """`|theta_i - theta_j|^2` of each leaf, [L, K + 1, K + 1]."""
    own = np.einsum('lkk->lk', self.gram)
    squares = own[:, :, None] + own[:, None] - 2 * self.gram
    # What is left of rounding in a difference of equal models.
    noise = 1e-14 * (own[:, :, None] + own[:, None])
    return np.where(squares > noise, squares, 0)

  def rounding(self) -> np.ndarray:
    """Root of the summed squares of the rounding errors of each leaf, [L, K].

    An error is uniform in an ulp: `0.21 eps |theta|`.
    """
    return _ROUNDING * self.eps * self.norms()[:, :-1]


def measure(
    pool: _pool.Pool,
    paths: Sequence[_tree.Path],
    members: Sequence[int],
    progress_fn: ProgressFn | None = None,
) -> Geometry:
  """Walks once over leaves that all members have in one shape."""
  paths = list(paths)
  num, shapes = len(members), pool.leaves[members[0]]
  gram = np.zeros((len(paths), num + 1, num + 1))
  finite = np.ones((len(paths), num + 1), bool)
  # float32 that holds no more than bfloat16 can.
  narrow = np.ones((len(paths), num), bool)
  hashes = [[0] * (num + 1) for _ in paths]
  has_start = np.zeros(len(paths), bool)
  numbers = {path: i for i, path in enumerate(paths)}
  for path, rows in pool.chunks(paths, members):
    i = numbers[path]
    if progress_fn is not None:
      progress_fn('weights', i / len(paths))
    has_start[i] = len(rows) > num
    # A complex number counts as two real ones.
    is_complex = any(map(np.iscomplexobj, rows))
    dtype = np.complex128 if is_complex else np.float64
    wide = np.stack([row.astype(dtype) for row in rows]).view(np.float64)
    finite[i, : len(rows)] &= np.isfinite(wide).all(-1)
    wide[~np.isfinite(wide)] = 0
    wide += 0.0  # -0 is 0.
    gram[i, : len(rows), : len(rows)] += wide @ wide.T
    for k, row in enumerate(rows):
      hashes[i][k] = hash((hashes[i][k], wide[k].tobytes()))
      if k < num and narrow[i, k]:
        narrow[i, k] = _fits_bfloat16(row)
  gram[~has_start, -1] = gram[~has_start, :, -1] = np.nan
  is_start = np.array([[x == h[-1] for x in h[:-1]] for h in hashes])
  return Geometry(
      paths=paths,
      sizes=np.array([int(np.prod(shapes[p].shape)) for p in paths], int),
      ranks=np.array([len(shapes[p].shape) for p in paths], int),
      gram=gram,
      same=np.array([[h.index(x) for x in h[:-1]] for h in hashes], int),
      is_start=is_start.reshape(-1, num) & has_start[:, None],
      finite=finite[:, :-1],
      eps=_spacings(pool, paths, members, narrow),
      statistics=_tree.statistics_of(paths),
  )


def _fits_bfloat16(row: np.ndarray) -> bool:
  if row.dtype != np.float32:
    return False
  return not (np.ascontiguousarray(row).view(np.uint32) & 0xFFFF).any()


def _spacings(pool, paths, members, narrow) -> np.ndarray:
  """The spacing of the numbers in which most of each ingredient is held."""
  spacings = []
  for i, k in enumerate(members):
    sizes: dict[float, int] = {}
    for path, is_narrow in zip(paths, narrow[:, i]):
      leaf: Leaf = pool.leaves[k][path]
      # Vectors of ones and zeros fit any dtype.
      if len(leaf.shape) > 1:
        eps = 2.0**-7 if is_narrow else float(jnp.finfo(leaf.dtype).eps)
        sizes[eps] = sizes.get(eps, 0) + int(np.prod(leaf.shape))
    spacings.append(max(sizes, key=lambda eps: sizes[eps]) if sizes else 0.0)
  return np.array(spacings)


def groups_of(related: np.ndarray) -> list[list[int]]:
  """Connected components, the largest first, then by their first member.

  Example:
    >>> groups_of(np.array([[1, 0, 0], [0, 1, 1], [0, 1, 1]], bool))
    [[1, 2], [0]]
  """
  from scipy.sparse import csgraph

  num, labels = csgraph.connected_components(related, directed=False)
  groups = [np.flatnonzero(labels == i).tolist() for i in range(num)]
  return sorted(groups, key=lambda g: (-len(g), g))


def lengths(distances: np.ndarray) -> np.ndarray:
  """`|tau_k|` of task vectors, from distances between models alone, [K].

  Task vectors are nearly at right angles, so that `|theta_i - theta_j|^2 =
  |tau_i|^2 + |tau_j|^2`, and among models that went about as far

  |tau_k| = median_j |theta_k - theta_j| / sqrt(2).

  A median, so that one outlier does not lengthen the others. Where task vectors
  share a direction, that part is not seen.

  Example:
    >>> points = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    >>> lengths(np.linalg.norm(points[:, None] - points, axis=-1))
    array([1., 1., 1.])
  """
  rows = [np.delete(row, k) for k, row in enumerate(distances)]
  return np.median(rows, axis=1) / 2**0.5
