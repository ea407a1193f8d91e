"""The loss on lines and planes between models."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from concurrent import futures
import functools
from typing import Any
from typing import NamedTuple
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from jaxsoup import _checked
from jaxsoup import _mixing
from jaxsoup import _programs
from jaxsoup import _tree
from jaxsoup import _workers
from jaxsoup import evaluation
from jaxsoup.landscape import _geometry
from jaxsoup.typing import Array
from jaxsoup.typing import CountFn
from jaxsoup.typing import ObjectiveFn
from jaxsoup.typing import Params
from jaxsoup.typing import Scalar

_T = TypeVar('_T')


class Path(NamedTuple):
  """The loss on a straight line.

  Attributes:
    t: where, `[T]`: 0 is theta_1, 1 is theta_2.
    loss: `[T]`.
  """

  t: np.ndarray
  loss: np.ndarray

  @property
  def above_chord(self) -> np.ndarray:
    """`L(t) - ((1 - t) L(0) + t L(1))`, `[T]`."""
    return self.loss - ((1 - self.t) * self.loss[0] + self.t * self.loss[-1])


class Plane(NamedTuple):
  """The loss on the plane through three models.

  Coordinates are distances in parameter space: theta_0 is at (0, 0), theta_1 on
  the positive x axis, theta_2 above it.

  Attributes:
    x: `[X]`.
    y: `[Y]`.
    loss: `[Y, X]`.
    points: theta_0, theta_1, theta_2 and the others, projected, `[M, 2]`.
    off: how far each of them lies off the plane, `[M]`; at its projection the
      plane says nothing about the loss of a model that is far off.
  """

  x: np.ndarray
  y: np.ndarray
  loss: np.ndarray
  points: np.ndarray
  off: np.ndarray


def line(
    loss_fn: ObjectiveFn,
    theta_1: Params,
    theta_2: Params,
    num: int = 21,
    *,
    chunk_size: int = 1,
    is_traced: bool = True,
    sharding: NamedSharding | None = None,
    on_points: CountFn | None = None,
    executor: futures.Executor | None = None,
    num_ahead: int | None = None,
) -> Path:
  """The loss on the line between two models.

  `L((1 - t) theta_1 + t theta_2)` for t from 0 to 1.

  Args:
    loss_fn: `loss_fn(params) -> scalar`, which jax can trace; or an
      `evaluation.mean_of`, which goes through batches. It may also be a score.
    theta_1: parameters at t = 0.
    theta_2: parameters at t = 1. Leaves that are not floats are theta_1's.
    num: number of points, T, both ends included.
    chunk_size: points that are evaluated together, by `jax.vmap`: that many
      models and their activations are in memory.
    is_traced: False calls `loss_fn` as it is, with one model, for functions
      that jax cannot trace, such as an `evaluation.score_of`.
    sharding: how the points of a chunk lie on a mesh, such as
      `NamedSharding(mesh, PartitionSpec('points'))`: each device then evaluates
      its own. Data of `loss_fn` must lie on that mesh, or be uncommitted.
    on_points: is called with the number of points done, and that of all.
    executor: where the points are evaluated, as in `jaxsoup.greedy`; the models
      and `loss_fn` are sent with each part of the points. Not with a sharding.
    num_ahead: into how many parts they are cut, at least as many as there are
      workers. None: twice the number of cores of this machine.

  Returns:
    A `Path`.

  Raises:
    ValueError: the models do not fit, fewer than two points, or a chunk that
      the sharding does not divide.
    TypeError: jax cannot trace `loss_fn`, or it returned no scalar.

  Example:
    >>> path = line(lambda x: (x**2 - 1) ** 2, -1.0, 1.0, num=5)
    >>> path.loss.tolist()
    [0.0, 0.5625, 1.0, 0.5625, 0.0]

  Source: Goodfellow et al. 2015, "Qualitatively characterizing neural network
  optimization problems"; Neyshabur et al. 2020.
  """
  if num < 2:
    raise ValueError(f'num is {num}: a line needs at least 2 points.')
  t = np.linspace(0, 1, num)
  grid = Grid([theta_1, theta_2], chunk_size, is_traced, sharding, on_points)
  alpha = np.stack([1 - t, t], axis=1)
  return Path(t, grid.values(loss_fn, alpha, executor, num_ahead))


def lines(
    loss_fn: ObjectiveFn,
    ingredients: Sequence[Params],
    members: Iterable[tuple[int, int]],
    num: int = 21,
    *,
    chunk_size: int = 1,
    is_traced: bool = True,
    sharding: NamedSharding | None = None,
    on_points: CountFn | None = None,
    executor: futures.Executor | None = None,
    num_ahead: int | None = None,
) -> dict[tuple[int, int], Path]:
  """The loss on the lines between pairs of ingredients.

  With pairs that share a learning rate it shows up to which rate runs stay in
  one basin; with pairs of other starts, that those are in others.

  Args:
    loss_fn: as in `line`.
    ingredients: K pytrees of one structure, or `checkpoints.Ingredients`.
    members: the pairs. Of those in a row with the same first one it is read
      once.
    num: number of points of each.
    chunk_size: as in `line`.
    is_traced: as in `line`.
    sharding: as in `line`.
    on_points: as in `line`, for each pair.
    executor: as in `line`.
    num_ahead: as in `line`.

  Returns:
    A `Path` for each pair.

  Raises:
    ValueError: as in `line`.
  """
  first = functools.lru_cache(1)(ingredients.__getitem__)
  loss_on_line = functools.partial(
      line,
      loss_fn,
      num=num,
      chunk_size=chunk_size,
      is_traced=is_traced,
      sharding=sharding,
      on_points=on_points,
      executor=executor,
      num_ahead=num_ahead,
  )
  return {(i, j): loss_on_line(first(i), ingredients[j]) for i, j in members}


def barrier(path: Path) -> float:
  """How far the loss rises above the chord between the two ends.

  `max_t L(t) - ((1 - t) L(0) + t L(1))`, in the unit of the loss. Models with
  no barrier between them are in one basin, where averages stay good.

  Args:
    path: from `line`, of a loss: of a score lower is worse, so negate it.

  Returns:
    At least 0, which it is at both ends.

  Example:
    >>> barrier(Path(np.array([0, 0.5, 1]), np.array([1.0, 5.0, 3.0])))
    3.0

  Source: Frankle et al. 2020, "Linear mode connectivity and the lottery ticket
  hypothesis"; the chord: Entezari et al. 2022.
  """
  return float(np.max(path.above_chord))


def plane(
    loss_fn: ObjectiveFn,
    theta_0: Params,
    theta_1: Params,
    theta_2: Params,
    *,
    others: Iterable[Params] = (),
    num: int = 21,
    margin: float = 0.25,
    chunk_size: int = 1,
    is_traced: bool = True,
    sharding: NamedSharding | None = None,
    on_points: CountFn | None = None,
    executor: futures.Executor | None = None,
    num_ahead: int | None = None,
) -> Plane:
  """The loss on the plane through three models, and where others lie on it.

  The basis is orthonormal, by Gram-Schmidt: with `d_k = theta_k - theta_0`,
  `u = d_1 / |d_1|`, `v = (d_2 - <d_2, u> u) / |...|`, and
  `theta(x, y) = theta_0 + x u + y v`. A model's projection has
  `x = <theta - theta_0, u>` and `y = <theta - theta_0, v>`.

  Args:
    loss_fn: as in `line`.
    theta_0: parameters at the origin: the initialization.
    theta_1: parameters on the x axis.
    theta_2: parameters above it.
    others: models and soups that are only projected; read one at a time.
    num: number of points along each axis.
    margin: how far the grid goes beyond all projections, as a share of their
      extent.
    chunk_size: as in `line`.
    is_traced: as in `line`.
    sharding: as in `line`.
    on_points: as in `line`.
    executor: as in `line`.
    num_ahead: as in `line`.

  Returns:
    A `Plane`.

  Raises:
    ValueError: as in `line`; or the three models lie on one line.
    TypeError: as in `line`.

  Example:
    >>> corners = [np.array(x) for x in ([0.0, 0], [2.0, 0], [1.0, 3.0])]
    >>> plane(lambda w: w @ w, *corners, num=2, margin=0.0).loss.tolist()
    [[0.0, 4.0], [9.0, 13.0]]

  Source: Garipov et al. 2018, "Loss surfaces, mode connectivity, and fast
  ensembling of DNNs", section 3; figure 2 of Wortsman et al. 2022.
  """
  if num < 2:
    raise ValueError(f'num is {num}: an axis needs at least 2 points.')
  grid = Grid(
      [theta_0, theta_1, theta_2], chunk_size, is_traced, sharding, on_points
  )
  basis = _Basis(grid.models)
  projected = [basis.project(m) for m in (theta_0, theta_1, theta_2)]
  projected += [
      basis.project(other, f'others[{k}]') for k, other in enumerate(others)
  ]
  points, off = (np.array(values) for values in zip(*projected))
  x, y = (_axis(values, num, margin) for values in points.T)
  at = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
  loss = grid.values(loss_fn, basis.alpha(at), executor, num_ahead)
  return Plane(x, y, loss.reshape(num, num), points, off)


def _axis(values: np.ndarray, num: int, margin: float) -> np.ndarray:
  low, high = values.min(), values.max()
  room = margin * (high - low)
  return np.linspace(low - room, high + room, num)


class _Basis:
  """The orthonormal basis (u, v) of a plane, without u and v.

  With the inner products `G = <d_i, d_j> = C C^T` (Cholesky), the rows of C are
  the coordinates of d_1 and d_2: Gram-Schmidt, in two dimensions. A point
  `(x, y) = (alpha_1, alpha_2) C` is a mixture of the three models like any
  other.
  """

  def __init__(self, corners: _checked.Checked):
    _checked.require_floats(corners.layers.paths)
    self._corners = corners
    self._origin, *self._tasks = (corners[k] for k in range(3))
    gram = np.array([self._products(task)[:2] for task in self._tasks])
    # Sums in float32 resolve a sine of a thousandth.
    if np.linalg.det(gram) <= 1e-6 * gram[0, 0] * gram[1, 1]:
      lengths = np.sqrt(np.diagonal(gram))
      raise ValueError(
          'theta_0, theta_1 and theta_2 lie on one line: theta_1 and theta_2 '
          f'are {lengths[0]:.3g} and {lengths[1]:.3g} away from theta_0, in '
          'parallel directions, and span no plane: use `line`.'
      )
    self._coordinates = np.linalg.cholesky(gram)

  def alpha(self, points: np.ndarray) -> np.ndarray:
    """Mixing coefficients `[P, 3]` of points `[P, 2]`."""
    tasks = points @ np.linalg.inv(self._coordinates)
    return np.concatenate([1 - tasks.sum(1, keepdims=True), tasks], axis=1)

  def project(
      self, params: Params, name: str = 'theta_0'
  ) -> tuple[np.ndarray, Scalar]:
    """Coordinates `[2]` of a model, and its distance from the plane."""
    leaves = _checked.fitting_leaves(self._corners, params, name)
    *along, square = self._products(leaves)
    point = np.linalg.solve(self._coordinates, along)
    off = np.sqrt(np.maximum(square - point @ point, 0))
    # What is left of a difference of float32 sums is no distance.
    return point, off if off > 1e-3 * np.sqrt(square) else 0.0

  def _products(self, leaves: list[jax.Array]) -> list[float]:
    """Inner products of `theta - theta_0` with d_1, with d_2, and itself."""
    products = [
        _geometry.inner_products(leaves, other, self._origin)
        for other in (*self._tasks, leaves)
    ]
    return [float(x.astype(float).sum()) for x in jax.device_get(products)]


class Grid:
  """Mixtures of a few models, evaluated in chunks."""

  def __init__(
      self,
      models: Sequence[Params],
      chunk_size: int = 1,
      is_traced: bool = True,
      sharding: NamedSharding | None = None,
      on_points: CountFn | None = None,
  ):
    self.models = _checked.Checked(models)
    self._given = models, chunk_size, is_traced
    self._size = chunk_size if is_traced else 1
    self._is_traced = is_traced
    self._sharding = sharding
    self._on_points = on_points or (lambda num_done, num: None)
    _check_chunks(self._size, sharding)

  def values(
      self,
      loss_fn: ObjectiveFn,
      alpha: np.ndarray,
      executor: futures.Executor | None = None,
      num_ahead: int | None = None,
  ) -> np.ndarray:
    """The loss at each point, `[P]`, from alpha `[P, M]`."""
    if executor is None:
      return self._values(loss_fn, alpha)
    if self._sharding is not None:
      raise ValueError(
          f'An executor is given, and the sharding {self._sharding}, which is '
          'of devices of this process: choose one.'
      )
    part_fn = functools.partial(_part, self._given, loss_fn)
    calls = _workers.Calls(executor, part_fn, num_ahead)
    # Of whole chunks, so that they are the same as here.
    size = self._size * -(-len(alpha) // (self._size * calls.num_ahead))
    losses: list[np.ndarray] = []
    parts = np.split(alpha, range(size, len(alpha), size))
    for losses_of_part in calls.values(parts):
      losses.append(losses_of_part)
      self._on_points(sum(map(len, losses)), len(alpha))
    return np.concatenate(losses)

  def _values(self, loss_fn: ObjectiveFn, alpha: np.ndarray) -> np.ndarray:
    stacked = _mixing.stack_leaves(self.models)
    if self._sharding is not None:
      stacked = [_on_mesh(x, self._sharding.mesh) for x in stacked]
    losses: list[np.ndarray] = []
    for start in range(0, len(alpha), self._size):
      rows = alpha[start : start + self._size]
      # One shape for all chunks, or the last one would be compiled again.
      padded = np.pad(rows, ((0, self._size - len(rows)), (0, 0)), 'edge')
      values = self._chunk(loss_fn, padded, stacked)
      losses.append(np.asarray(jax.device_get(values), float)[: len(rows)])
      self._on_points(start + len(rows), len(alpha))
    return np.concatenate(losses)

  def _chunk(
      self, loss_fn: ObjectiveFn, alpha: np.ndarray, stacked: list[jax.Array]
  ) -> Array | list[Scalar]:
    if self._size == 1:
      floats = _mixing.mix_many(_tree.numbers(alpha[0]), stacked)
      return [_value(loss_fn, self.models.replace(floats), self._is_traced)]
    alpha = jax.device_put(alpha.astype(np.float32), self._sharding)
    floats = _mixing.mix_many(alpha, stacked)
    models = _mixing.with_rows(self.models.template, floats, self._size)
    values = _values(loss_fn, models)
    if self._sharding is not None:  # Each process wants all of them.
      everywhere = NamedSharding(self._sharding.mesh, PartitionSpec())
      values = jax.device_put(values, everywhere)
    return values


def _part(
    given: tuple[Any, ...], loss_fn: ObjectiveFn, alpha: np.ndarray
) -> np.ndarray:
  """The loss at some of the points, on a worker."""
  return Grid(*given).values(loss_fn, alpha)


def _check_chunks(size: int, sharding: NamedSharding | None) -> None:
  try:
    if size < 1:
      raise ValueError('it must be at least 1')
    if sharding is not None:
      sharding.shard_shape((size,))
  except ValueError as e:
    raise ValueError(
        f'chunk_size is {size} and sharding {sharding}: {e}. Pass a positive '
        'multiple of the number of devices that share the points of a chunk.'
    ) from e


def _on_mesh(
    x: jax.Array, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> jax.Array:
  if isinstance(x.sharding, NamedSharding):
    return x
  return jax.device_put(x, NamedSharding(mesh, PartitionSpec()))


def _value(loss_fn: ObjectiveFn, params: Params, is_traced: bool) -> Scalar:
  """The loss of one model."""
  if not is_traced or isinstance(loss_fn, evaluation.MeanOf):
    return loss_fn(params)
  return _run(_one, loss_fn, params)


def _values(loss_fn: ObjectiveFn, stacked: Params) -> Array:
  """The losses of n models, `[n]`."""
  if isinstance(loss_fn, evaluation.MeanOf):
    return loss_fn.of_many(stacked)
  return _run(_side_by_side, loss_fn, stacked)


def _run(
    jitted: Callable[[ObjectiveFn, Params], _T],
    loss_fn: ObjectiveFn,
    params: Params,
) -> _T:
  try:
    return jitted(loss_fn, params)
  except jax.errors.JAXTypeError as e:
    raise TypeError(
        f'jax cannot trace loss_fn, {loss_fn!r}, which needs the values of '
        'arrays. Pass is_traced=False to call it as it is.'
    ) from e


@_programs.jit_of(1)
def _one(loss_fn: ObjectiveFn, params: Params) -> jax.Array:
  return _scalar(loss_fn(params))


@_programs.jit_of(1)
def _side_by_side(loss_fn: ObjectiveFn, stacked: Params) -> jax.Array:
  return jax.vmap(lambda params: _scalar(loss_fn(params)))(stacked)


def _scalar(value: Any) -> Any:
  if jnp.shape(value):
    raise TypeError(
        f'loss_fn returned shape {jnp.shape(value)}: expected a scalar, such '
        'as the mean over the examples.'
    )
  return value
