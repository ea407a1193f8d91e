"""Sharpness: how much the loss bends in its sharpest direction."""

from collections.abc import Callable
from collections.abc import Iterator
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup import _checked
from jaxsoup import _masks
from jaxsoup import _mixing
from jaxsoup import _programs
from jaxsoup import _tree
from jaxsoup import evaluation
from jaxsoup.typing import Batch
from jaxsoup.typing import Leaf
from jaxsoup.typing import ObjectiveFn
from jaxsoup.typing import Params
from jaxsoup.typing import Scalar

_Leaves = list[jax.Array]


class Sharpness(NamedTuple):
  """What `sharpness` returns.

  Attributes:
    eigenvalue: estimate of the largest eigenvalue of the Hessian.
    error: an eigenvalue lies within this distance of the estimate.
    num_steps: products of the Hessian with a vector.
  """

  eigenvalue: float
  error: float
  num_steps: int


def sharpness(
    loss_fn: ObjectiveFn,
    params: Params,
    *,
    tolerance: float = 1e-3,
    max_steps: int = 100,
    seed: int = 0,
) -> Sharpness:
  """The largest eigenvalue of the Hessian of the loss, by Lanczos' method.

  `max_v <v, H v> / <v, v>`, over the span of `v, Hv, H^2 v, ...` of a random v.
  A step is one product `H v = d/ds grad L(theta + s v)`, at the cost of about
  two gradients; three vectors of the size of the model are kept.

  Args:
    loss_fn: `loss_fn(params) -> scalar`, twice differentiable; or an
      `evaluation.mean_of` of a loss, which goes through batches.
    params: where. Narrow floats are widened to float32. A complex number counts
      as two real ones.
    tolerance: stop when the error is below this share of the eigenvalue.
    max_steps: stop then at the latest.
    seed: of the first v.

  Returns:
    A `Sharpness`; look at its `error`.

  Raises:
    ValueError: params have no floats, or values that are not finite; a mask is
      invalid; or the loss bends by a number that is not finite.

  Example:
    >>> loss_fn = lambda w: w[0] ** 2 + 3 * w[1] ** 2 - w[2] ** 2
    >>> round(sharpness(loss_fn, np.zeros(3)).eigenvalue, 3)
    6.0

  Source: Lanczos 1950; Golub and Van Loan, "Matrix computations", section 10.1.
  """
  checked = _checked.Checked([params])
  _checked.require_floats(checked.layers.paths)
  leaves = _widened(checked[0])
  widened, leaves = checked.replace(leaves), _reals(leaves)
  product_fn = functools.partial(_product, loss_fn, widened)
  eigenvalue, error, num = 0.0, np.inf, 0
  for diagonal, off_diagonal in _lanczos(product_fn, _random(leaves, seed)):
    num += 1
    eigenvalue, error = _largest(diagonal, off_diagonal)
    if not np.isfinite(eigenvalue):
      raise ValueError(
          f'A product of the Hessian with a vector is {eigenvalue}: check that '
          'loss_fn and its gradients are finite at params.'
      )
    if num == max_steps or error <= tolerance * abs(eigenvalue):
      break
  return Sharpness(eigenvalue, error, num)


def _lanczos(
    product_fn: Callable[[_Leaves], _Leaves], v: _Leaves
) -> Iterator[tuple[list[float], list[float]]]:
  """Yields the tridiagonal matrix of H, one row longer each time.

  `b_j v_{j+1} = H v_j - a_j v_j - b_{j-1} v_{j-1}`. The v_j lose their
  orthogonality in floats, which repeats extreme eigenvalues and moves none.
  """
  diagonal: list[float] = []
  off_diagonal: list[float] = []
  before, last = v, _tree.numbers(0.0)
  while True:
    v, before, a, last = _next(product_fn(v), v, before, last)
    diagonal.append(float(jax.device_get(a)))
    off_diagonal.append(float(jax.device_get(last)))
    yield diagonal, off_diagonal


@jax.jit
def _next(
    product: _Leaves, v: _Leaves, before: _Leaves, last: jax.Array
) -> tuple[_Leaves, _Leaves, jax.Array, jax.Array]:
  a = _inner(product, v)
  rest = [
      p - a.astype(p.dtype) * x - last.astype(p.dtype) * y
      for p, x, y in zip(product, v, before)
  ]
  b = jnp.sqrt(_inner(rest, rest))
  return [r / jnp.where(b > 0, b, 1).astype(r.dtype) for r in rest], v, a, b


def _largest(
    diagonal: list[float], off_diagonal: list[float]
) -> tuple[float, float]:
  """The largest Ritz value, and the norm of its residual."""
  if not np.isfinite([*diagonal, *off_diagonal]).all():
    return float('nan'), float('nan')
  off = np.diag(off_diagonal[:-1], 1)
  values, vectors = np.linalg.eigh(np.diag(diagonal) + off + off.T)
  return float(values[-1]), float(abs(off_diagonal[-1] * vectors[-1, -1]))


def _product(loss_fn: ObjectiveFn, params: Params, v: _Leaves) -> _Leaves:
  """`H v`; of a mean over batches the mean of their products."""
  if not isinstance(loss_fn, evaluation.MeanOf):
    return _of_function(loss_fn, params, v)
  total: _Leaves | None = None
  count = 0.0
  for batch in _masks.checked(loss_fn.batches):
    product, num = _of_batch(loss_fn.step, params, v, batch)
    total = _mixing.add(total, product, _tree.numbers(1.0))
    count += float(jax.device_get(num))
  return _mixing.rounded(total, _tree.numbers(count), tuple(x.dtype for x in v))


@_programs.jit_of(1)
def _of_function(loss_fn: ObjectiveFn, params: Params, v: _Leaves) -> _Leaves:
  return _hessian_product(loss_fn, params, v)


@_programs.jit_of(1)
def _of_batch(
    step: Callable[..., tuple[jax.Array, ...]],
    params: Params,
    v: _Leaves,
    batch: Batch,
) -> tuple[_Leaves, jax.Array]:
  sum_fn = lambda p: step(p, batch)[0]
  return _hessian_product(sum_fn, params, v), step(params, batch)[1]


def _hessian_product(
    loss_fn: ObjectiveFn, params: Params, v: _Leaves
) -> _Leaves:
  """`d/ds grad L(theta + s v)` at s = 0."""
  flat = _tree.flatten_in_place(params)
  floats = [x for x in flat.leaves if _tree.is_float(x)]

  def loss(reals: _Leaves) -> Scalar:
    rows = iter(reals)

    def put(x: Leaf) -> Leaf:
      if not _tree.is_float(x):
        return x
      return jax.lax.complex(*next(rows)) if jnp.iscomplexobj(x) else next(rows)

    return loss_fn(flat.replace(map(put, flat.leaves)))

  return jax.jvp(jax.grad(loss), (_reals(floats),), (v,))[1]


@jax.jit
def _widened(leaves: _Leaves) -> _Leaves:
  return [x.astype(_tree.wide_dtype(x.dtype)) for x in leaves]


@jax.jit
def _reals(leaves: _Leaves) -> _Leaves:
  """Complex leaves as their real and imaginary parts, `[2, ...]`."""
  return [
      jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x for x in leaves
  ]


def _random(leaves: _Leaves, seed: int) -> _Leaves:
  """A random vector of length one."""
  # Of NumPy: XLA takes minutes to compile normal draws for dozens of leaves.
  rng = np.random.default_rng(seed)
  v = [rng.standard_normal(x.shape, np.float32) for x in leaves]
  norm = np.sqrt(sum(np.vdot(x, x) for x in v))
  return [
      jax.device_put((x / norm).astype(like.dtype), like.sharding)
      for x, like in zip(v, leaves)
  ]


def _inner(x: _Leaves, y: _Leaves) -> jax.Array:
  return sum((jnp.sum(a * b) for a, b in zip(x, y)), jnp.zeros(()))
