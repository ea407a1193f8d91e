"""Ingredients, and what one read of each tells: inner products, leaf by leaf.

```
pool = Pool(ingredients, theta_0)
geometry, finite = measure(pool, members)
geometry.squares()                         # |theta_i - theta_j|^2, [n, n, L]
```
"""

from collections.abc import Iterable
from collections.abc import Sequence
import functools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup import _checked
from jaxsoup import _tree
from jaxsoup.diagnosis import _findings
from jaxsoup.landscape import _geometry
from jaxsoup.typing import Json
from jaxsoup.typing import Leaf
from jaxsoup.typing import Params
from jaxsoup.typing import ProgressFn

# Of an ulp the rounding error is uniform: ulp / sqrt(12), and the mean over
# mantissas in [1, 2) that are log-uniform.
_ROUNDING = (3 / (8 * np.log(2))) ** 0.5 / 12**0.5
# What is left of rounding in sums of float32, relative to what is added.
NOISE = 1e-5


class Pool:
  """K ingredients, and perhaps what they were fine-tuned from.

  Attributes:
    ingredients: as they were given.
    names: of the ingredients.
    leaves: shape and dtype of each leaf by its path, of each ingredient.
    start: leaves of theta_0 by path; empty without one.
    configs: hyper-parameters from the metadata of runs; {} if missing.
    copies: which copy of its run an ingredient says that it is ('ema_0.99');
      '' is the run itself, None that it says nothing.
    damaged: what was wrong with a file, by ingredient; known after a read.
  """

  def __init__(
      self,
      ingredients: Sequence[Params],
      theta_0: Params | None = None,
      names: Sequence[str] | None = None,
  ):
    _checked.require_ingredients(ingredients)
    self.ingredients = ingredients
    self.names = _names_of(ingredients, names)
    self.damaged: dict[int, str] = {}
    self.read = functools.lru_cache(2)(
        lambda k: _tree.flatten(ingredients[k]).by_path
    )
    numbers = range(len(ingredients))
    self.leaves = list(map(self._abstract, numbers))
    self.start: dict[_tree.Path, Leaf] = {}
    if theta_0 is not None:
      self.start = _tree.flatten(theta_0).by_path
    customs = list(map(self._custom, numbers))
    self.configs = [dict(c.get('config') or {}) for c in customs]
    self.copies = [
        c.get('copy', '') if 'config' in c else None for c in customs
    ]

  def listed(self, members: Iterable[int]) -> str:
    """Names in a sentence."""
    return _findings.listed([self.names[k] for k in members])

  def leaf(self, k: int, path: _tree.Path) -> np.ndarray:
    """One leaf of one ingredient, complex numbers as two real ones."""
    x = np.asarray(self.read(k)[path])
    if np.iscomplexobj(x):
      return np.stack([x.real, x.imag], -1)
    return x.astype(np.float32)

  def floats(self, k: int) -> list[_tree.Path]:
    """Paths of its floats."""
    return [p for p, x in self.leaves[k].items() if _tree.is_float(x)]

  def _abstract(self, k: int) -> dict[_tree.Path, Leaf]:
    if hasattr(self.ingredients, 'stored'):
      return self.ingredients.stored(k)
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    return {p: shape(x) for p, x in self.read(k).items()}

  def _custom(self, k: int) -> Json:
    if not hasattr(self.ingredients, 'metadata'):
      return {}
    custom = self.ingredients.metadata(k).custom or {}
    own = custom.get('jaxsoup', {}).get('metadata') or custom
    # Other programs store other things under these names.
    return own if isinstance(own.get('config', {}), dict) else {}


class Geometry(NamedTuple):
  """What one read of n members (and theta_0) tells, by leaf.

  Attributes:
    members: numbers of the ingredients.
    paths: of the L leaves that are floats and no running statistics.
    sizes: of those, [L].
    matrices: which of them are drawn at random, [L].
    tasks: `<theta_i - o, theta_j - o>`, [n, n, L]; o is theta_0, and of leaves
      that it lacks, the first member.
    products: `<theta_i, theta_j>`, [n + 1, n + 1, L]; o is the last row.
    has_start: whether o is theta_0, [L].
    low: the smallest value, [n, L].
    eps: spacing of the numbers near one that each member holds, [n]; that of
      bfloat16 where float32 holds no more than that.
  """

  members: tuple[int, ...]
  paths: list[_tree.Path]
  sizes: np.ndarray
  matrices: np.ndarray
  tasks: np.ndarray
  products: np.ndarray
  has_start: np.ndarray
  low: np.ndarray
  eps: np.ndarray

  def take(self, rows: Iterable[int]) -> 'Geometry':
    """The same of some members, and theta_0."""
    rows = list(rows)
    both = [*rows, -1]
    return self._replace(
        members=tuple(self.members[i] for i in rows),
        tasks=self.tasks[np.ix_(rows, rows)],
        products=self.products[np.ix_(both, both)],
        low=self.low[rows],
        eps=self.eps[rows],
    )

  def where(self, rows: np.ndarray) -> list[int]:
    """The members of rows that are true."""
    return [self.members[i] for i in np.flatnonzero(rows)]

  def leaf_names(self, leaves: np.ndarray) -> list[str]:
    """The names of leaves that are true."""
    return [_tree.name_of(self.paths[i]) for i in np.flatnonzero(leaves)]

  def share(self, leaves: np.ndarray) -> str:
    """Which part of all parameters such leaves are."""
    return f'{100 * self.sizes[leaves].sum() / self.sizes.sum():.2g} %'

  def norms(self) -> np.ndarray:
    """`|theta_k|`, [n + 1, L]."""
    return np.sqrt(_diagonal(self.products).clip(0))

  def own(self) -> np.ndarray:
    """`|theta_k - o|^2`, [n, L]."""
    return _diagonal(self.tasks)

  def squares(self) -> np.ndarray:
    """`|theta_i - theta_j|^2`, [n, n, L]; 0 of equal leaves only."""
    own = self.own()
    return (own[:, None] + own[None] - 2 * self.tasks).clip(0)

  def distances(self) -> np.ndarray:
    return np.sqrt(self.squares().sum(-1))

  def lengths(self) -> np.ndarray:
    """`|tau_k|` of task vectors, [n]; without theta_0 from distances alone.

    Task vectors are nearly at right angles, so that `|theta_i - theta_j|^2 =
    |tau_i|^2 + |tau_j|^2`: the least squares of that, by medians.
    """
    if self.has_start.any():
      return np.sqrt(self.own()[:, self.has_start].sum(-1))
    distances = self.distances()
    if len(distances) < 2:
      return np.zeros(len(distances))
    others = [np.delete(row, i) for i, row in enumerate(distances)]
    return np.median(others, axis=1) / 2**0.5

  def cosines(self) -> np.ndarray:
    """Of task vectors, [n, n]; NaN without theta_0."""
    total = self.tasks[..., self.has_start].sum(-1)
    norms = np.sqrt(np.diag(total))
    with np.errstate(divide='ignore', invalid='ignore'):
      return np.clip(total / norms[:, None] / norms, -1, 1)

  def rounding(self) -> np.ndarray:
    """Root of the summed squares of rounding errors, `0.21 eps |theta|`."""
    return _ROUNDING * self.eps * np.sqrt((self.norms()[:-1] ** 2).sum(-1))


def _diagonal(x: np.ndarray) -> np.ndarray:
  """`[n, n, L]` to `[n, L]`."""
  return np.einsum('iil->il', x)


def measure(
    pool: Pool,
    members: Sequence[int],
    progress_fn: ProgressFn | None = None,
) -> tuple[Geometry, np.ndarray]:
  """Reads members of one structure; also which leaves are finite, [n, F]."""
  paths = pool.floats(members[0])
  _checked.require_floats(paths)
  shapes = [pool.leaves[members[0]][p].shape for p in paths]
  rows = _Rows(pool, members, paths, progress_fn)
  first = rows[0]
  has_start = np.array(
      [
          p in pool.start and np.shape(pool.start[p]) == shape
          for p, shape in zip(paths, shapes)
      ]
  )
  origin = [
      jnp.asarray(pool.start[p]) if known else x
      for p, known, x in zip(paths, has_start, first)
  ]
  tasks = _geometry.of_pairs(
      rows, paths, lambda x, y: _geometry.inner_products(x, y, origin)
  )
  seen = [rows.seen[i] for i in range(len(members))]
  finite, low, narrow = map(np.array, zip(*seen))
  sizes = np.array([int(np.prod(shape)) for shape in shapes])
  # A bias may have two axes; vectors of ones and zeros fit any dtype.
  matrices = np.array(
      [
          len(shape) > 1 and 'bias' not in (p[-1] if p else '')
          for p, shape in zip(paths, shapes)
      ]
  )
  eps = [
      _spacing([pool.leaves[k][p].dtype for p in paths], sizes * matrices, row)
      for k, row in zip(members, narrow)
  ]
  keep = ~_tree.statistics_of(paths)
  geometry = Geometry(
      tuple(members),
      [p for p, is_kept in zip(paths, keep) if is_kept],
      sizes[keep],
      matrices[keep],
      tasks[:-1, :-1, keep],
      _of_weights(tasks)[..., keep],
      has_start[keep],
      low[:, keep],
      np.array(eps),
  )
  return geometry, finite


def _of_weights(tasks: np.ndarray) -> np.ndarray:
  """`<theta_i, theta_j>` from task vectors, of which the last is `0 - o`."""
  zero = tasks[-1]
  products = tasks - zero[:, None] - zero[None] + zero[-1]
  # The last row becomes o.
  products[-1, :-1] = products[:-1, -1] = (zero[-1] - zero)[:-1]
  products[-1, -1] = zero[-1]
  return products


class _Rows:
  """The members' float leaves, and zeros; notes what it sees on the way."""

  def __init__(self, pool, members, paths, progress_fn):
    self._pool, self._members, self._paths = pool, members, paths
    self._progress_fn = progress_fn
    self.seen: dict[int, list[np.ndarray]] = {}

  def __len__(self) -> int:
    return len(self._members) + 1

  def __getitem__(self, i: int) -> list[jax.Array]:
    if i == len(self._members):
      stored = self._pool.leaves[self._members[0]]
      like = [stored[path] for path in self._paths]
      dtype_of = lambda x: jax.dtypes.canonicalize_dtype(x.dtype)
      return [jnp.zeros(x.shape, dtype_of(x)) for x in like]
    k = self._members[i]
    if self._progress_fn is not None and i not in self.seen:
      self._progress_fn('weights', i / len(self))
    try:
      by_path = self._pool.read(k)
    except ValueError as e:
      if len(self) < 3 or not hasattr(self._pool.ingredients, 'paths'):
        raise
      self._pool.damaged[k] = str(e)
      stored = self._pool.leaves[k]
      by_path = {p: jnp.zeros(x.shape, x.dtype) for p, x in stored.items()}
    leaves, *seen = _looked_at([by_path[path] for path in self._paths])
    self.seen[i] = [np.array(jax.device_get(x)) for x in seen]
    return leaves

  def prefetch(self, i: int) -> None:
    if i < len(self._members) and hasattr(self._pool.ingredients, 'prefetch'):
      self._pool.ingredients.prefetch(self._members[i])


@jax.jit
def _looked_at(leaves):
  """Leaves with 0 for NaN; which are finite, their minima, fit bfloat16."""
  finite = [jnp.isfinite(x).all() for x in leaves]
  leaves = [jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)) for x in leaves]
  low = [jnp.real(x).min(initial=jnp.inf) for x in leaves]
  narrow = [
      x.dtype == jnp.float32 and (x == jax.lax.reduce_precision(x, 8, 7)).all()
      for x in leaves
  ]
  return leaves, finite, low, narrow


def _spacing(dtypes, sizes, narrow) -> float:
  """The spacing of the numbers in which most of a member is held."""
  totals: dict[float, int] = {}
  for dtype, size, is_narrow in zip(dtypes, sizes, narrow):
    eps = 2.0**-7 if is_narrow else float(jnp.finfo(dtype).eps)
    totals[eps] = totals.get(eps, 0) + size
  return max(totals, key=lambda eps: totals[eps]) if sizes.any() else 0.0


def _names_of(
    ingredients: Sequence[Params], names: Sequence[str] | None
) -> tuple[str, ...]:
  num = len(ingredients)
  paths = getattr(ingredients, 'paths', None)
  if names is not None and len(names) != num:
    raise ValueError(
        f'There are {len(names)} names and {num} ingredients: pass one name '
        'for each.'
    )
  if names is not None:
    return tuple(map(str, names))
  if paths is None:
    return tuple(f'ingredient {k}' for k in range(num))
  common = os.path.commonpath(paths) if num > 1 else '.'
  return tuple(os.path.relpath(path, common) for path in paths)
