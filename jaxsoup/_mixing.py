"""The arithmetic of soups: stack, mix, and running sums.

```
stacked = jaxsoup.stack(ingredients)           # leaves [K, ...]
params = jaxsoup.mix(stacked, alpha)           # sum_k alpha_k theta_k
```

Sums are in float32 or wider, with one rounding at the end: sum and count, never
a running mean.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import functools
from typing import Any

import jax
from jax import extend
from jax.interpreters import ad
from jax.interpreters import batching
from jax.interpreters import mlir
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from jaxsoup import _checked
from jaxsoup import _tree
from jaxsoup.typing import Alpha
from jaxsoup.typing import ArrayLike
from jaxsoup.typing import Params

BinaryFn = Callable[[jax.Array, jax.Array], jax.Array]
TransposeFn = Callable[[jax.Array, Any, Any], jax.Array]


def _bilinear(
    name: str,
    by_row: BinaryFn,
    whole: BinaryFn,
    by_first: BinaryFn,
    by_second: TransposeFn,
) -> BinaryFn:
  """A function `(x, stacked)` that JAX knows to be linear in each argument.

  It has derivatives of any order and mode. The products that JAX would
  transpose from `tensordot` copy the stack on a CPU, and raise on a mesh with
  Explicit axes. `by_first` is `(cotangent, stacked) -> cotangent of x`;
  `by_second` the same of stacked, of which only `stacked.aval` is known.
  """

  def fn(x: jax.Array, stacked: jax.Array) -> jax.Array:
    x = x.astype(_tree.wide_dtype(stacked.dtype))
    if x.dtype == stacked.dtype:
      return whole(x, stacked)
    # XLA:CPU makes a float32 copy of a whole stack of a narrow dtype.
    return jax.lax.platform_dependent(x, stacked, cpu=by_row, default=whole)

  def transposed(cotangent: jax.Array, x: Any, stacked: jax.Array) -> jax.Array:
    product, dtype = by_first(cotangent, stacked), x.aval.dtype
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    return (product if is_complex else product.real).astype(dtype)

  primitive = extend.core.Primitive(name)
  primitive.def_impl(jax.jit(fn))
  primitive.def_abstract_eval(lambda *x: jax.make_jaxpr(fn)(*x).out_avals[0])
  ad.defbilinear(primitive, transposed, by_second)
  batcher = lambda x, axes: (jax.vmap(fn, axes)(*x), 0)
  batching.primitive_batchers[primitive] = batcher
  mlir.register_lowering(primitive, mlir.lower_fun(fn, multiple_results=False))
  return primitive.bind


def _mix_whole(alpha: jax.Array, stacked: jax.Array) -> jax.Array:
  """`sum_k alpha_k theta_k` of a leaf `[K, ...]`."""
  # HIGHEST: TPUs and recent GPUs would round the factors of a product.
  mixed = jnp.tensordot(
      alpha, stacked.astype(alpha.dtype), 1, precision=jax.lax.Precision.HIGHEST
  )
  return mixed.astype(stacked.dtype)


def _mix_by_row(alpha: jax.Array, stacked: jax.Array) -> jax.Array:
  add_row = lambda k, total: total + alpha[k] * _row(stacked, k)
  start = alpha[0] * _row(stacked, 0)
  mixed = jax.lax.fori_loop(1, stacked.shape[0], add_row, start)
  return mixed.astype(stacked.dtype)


def _inner_whole(x: jax.Array, stacked: jax.Array) -> jax.Array:
  """`<x, theta_k>` for each k: K inner products."""
  wide = stacked.astype(x.dtype)
  axes = tuple(range(1, stacked.ndim))
  spec = getattr(getattr(jax.typeof(x), 'sharding', None), 'spec', ())
  if any(axis is not None for axis in spec):
    # A product that contracts a sharded axis raises on Explicit axes.
    return jnp.sum(wide * x, axis=axes)
  both, precision = (axes, tuple(range(x.ndim))), jax.lax.Precision.HIGHEST
  return jnp.tensordot(wide, x, both, precision=precision)


def _inner_by_row(x: jax.Array, stacked: jax.Array) -> jax.Array:
  one = lambda k: jnp.sum(_row(stacked, k) * x)
  return jax.lax.map(one, jnp.arange(stacked.shape[0]))


def _row(stacked: jax.Array, k: int | jax.Array) -> jax.Array:
  """Row k in float32, without XLA:CPU making a float32 copy of all rows.

  It widens the operand of a slice of bfloat16 (not of integers), and moves
  what does not depend on k out of a loop (the barrier makes it depend on k).
  """
  stacked, k = jax.lax.optimization_barrier((stacked, jnp.int32(k)))
  unsigned = getattr(jnp, f'uint{jnp.finfo(stacked.dtype).bits}')
  bits = jax.lax.bitcast_convert_type(stacked, unsigned)
  row = jax.lax.dynamic_index_in_dim(bits, k, keepdims=False)
  return jax.lax.bitcast_convert_type(row, stacked.dtype).astype(jnp.float32)


def _outer(alpha: jax.Array, x: jax.Array, stacked: Any) -> jax.Array:
  """`alpha_k x` for each k, in the dtype of the stack."""
  wide = _tree.wide_dtype(stacked.aval.dtype)
  alpha = jnp.expand_dims(alpha.astype(wide), range(1, 1 + x.ndim))
  return (alpha * x.astype(wide)).astype(stacked.aval.dtype)


_mix_leaf: BinaryFn = _bilinear(
    'jaxsoup_mix',
    _mix_by_row,
    _mix_whole,
    lambda x, stacked: _inner_leaf(x, stacked),
    lambda x, alpha, stacked: _outer(alpha, x, stacked),
)
_inner_leaf: BinaryFn = _bilinear(
    'jaxsoup_inner', _inner_by_row, _inner_whole, _mix_leaf, _outer
)


@jax.jit
def mix_leaves(
    alphas: list[jax.Array], stacked: list[jax.Array]
) -> list[jax.Array]:
  return list(map(_mix_leaf, alphas, stacked))


@jax.jit
def first_rows(stacked: list[jax.Array]) -> list[jax.Array]:
  return [x[0] for x in stacked]


@jax.jit
def mix_many(alpha: jax.Array, stacked: list[jax.Array]) -> list[jax.Array]:
  """A model from alpha `[K]`, or those of a curve or a grid from `[n, K]`."""
  mix = lambda a: mix_leaves([a] * len(stacked), stacked)
  return jax.vmap(mix)(alpha) if alpha.ndim > 1 else mix(alpha)


def mix(stacked: Params, alpha: Alpha) -> Params:
  """Mixes K stacked models into one.

  `theta = sum_k alpha_k theta_k`, summed in float32 (or wider), rounded once.
  Linear in either argument, with derivatives of any order and mode; the
  gradient in alpha costs K inner products. Runs under `jax.jit` and `jax.vmap`,
  and on any mesh: ingredients sharded alike mix without communication.

  Args:
    stacked: pytree with leaves `[K, ...]`, from `stack` or a vmapped training.
      Of a leaf that is not a float the first row is taken.
    alpha: mixing coefficients, `[K]`; or a prefix tree: nested dicts whose
      paths lead to groups of leaves, such as `{'body': [K], 'head': [K]}`. They
      need not sum to one.

  Returns:
    A pytree like one ingredient, in its dtypes.

  Raises:
    ValueError: alpha does not fit: names the leaf or the entry of alpha.

  Example:
    >>> stacked = {'w': jnp.array([[0.0, 2.0], [1.0, 4.0]])}
    >>> mix(stacked, [0.5, 0.5])
    {'w': Array([0.5, 3. ], dtype=float32)}

  Source: Wortsman et al. 2022, section 2.
  """
  flat = _tree.flatten(stacked)
  floats, others = flat.floats, flat.others
  alphas = _tree.alphas_of(alpha, list(floats), others)
  for coefficients, (path, leaf) in zip(alphas, floats.items()):
    if leaf.ndim < 1 or coefficients.shape != leaf.shape[:1]:
      raise ValueError(
          f'alpha has shape {coefficients.shape} and leaf '
          f'{_tree.name_of(path)!r} has shape {leaf.shape}: expected [K] and '
          '[K, ...]. Stack the ingredients with jaxsoup.stack.'
      )
  # Leaves of one group share one array, which goes to the device once.
  one_each = {id(a): a for a in alphas}
  placed = {key: _tree.on_device(a) for key, a in one_each.items()}
  mixed = mix_leaves([placed[id(a)] for a in alphas], list(floats.values()))
  for path, leaf in others.items():
    if leaf.ndim < 1:
      raise ValueError(
          f'Leaf {_tree.name_of(path)!r} is not stacked: expected [K, ...]. '
          'Stack the ingredients with jaxsoup.stack.'
      )
  rows = first_rows(list(others.values())) if others else ()
  return flat.combine(mixed, rows)


def stack(ingredients: Sequence[Params]) -> Params:
  """Stacks K models along a new first axis.

  At most one ingredient is held as well as the stack: K + 1 models in all.

  Args:
    ingredients: K pytrees of one structure, or `checkpoints.Ingredients`.

  Returns:
    A pytree with leaves `[K, ...]`, in the container of the first ingredient,
    whose leaves that are not floats are repeated.

  Raises:
    ValueError: see `check_compatible`.

  Example:
    >>> stack([{'w': np.float32(1)}, {'w': np.float32(3)}])
    {'w': Array([1., 3.], dtype=float32)}
  """
  checked = _checked.Checked(ingredients)
  return with_rows(checked.template, stack_leaves(checked), len(checked))


def with_rows(flat: _tree.Flat, floats: list[jax.Array], num: int) -> Params:
  """The tree with floats `[num, ...]`, and the rest of it repeated."""
  return flat.combine(floats, repeat(list(flat.others.values()), num))


def stack_leaves(checked: _checked.Leaves) -> list[jax.Array]:
  """The float leaves `[K, ...]` of all ingredients, read one after another."""
  num = len(checked)
  stacked: list[jax.Array] = []
  for k, leaves in _checked.in_order(checked, range(num)):
    if not stacked:
      stacked = repeat(leaves, num)
    else:
      rows = [_on_mesh_of(s, x) for x, s in zip(leaves, stacked)]
      stacked = _set_row(stacked, rows, _tree.numbers(k, np.int32))
  return stacked


def _on_mesh_of(stacked: jax.Array, x: jax.Array) -> jax.Array:
  # jax 0.7 puts the stack of unsharded leaves on an Explicit mesh that is set.
  if _tree.is_traced(stacked, x):
    return x
  sharding = stacked.sharding
  if isinstance(sharding, NamedSharding) and not isinstance(
      x.sharding, NamedSharding
  ):
    spec = PartitionSpec(*sharding.spec[1:])
    return jax.device_put(x, NamedSharding(sharding.mesh, spec))
  return x


@functools.partial(jax.jit, static_argnums=1)
def repeat(leaves: list[jax.Array], num: int) -> list[jax.Array]:
  return [jnp.broadcast_to(x, (num, *x.shape)) for x in leaves]


@functools.partial(jax.jit, donate_argnums=0)
def _set_row(
    stacked: list[jax.Array], leaves: list[jax.Array], k: jax.Array
) -> list[jax.Array]:
  return [
      jax.lax.dynamic_update_index_in_dim(s, x, k, 0)
      for s, x in zip(stacked, leaves)
  ]


def _added(
    total: list[jax.Array] | None,
    leaves: list[jax.Array],
    weights: jax.Array,
    decay: jax.Array | None = None,
) -> list[jax.Array]:
  by_leaf = weights if weights.ndim else [weights] * len(leaves)
  wide = [x.astype(_tree.wide_dtype(x.dtype)) for x in leaves]
  terms = [w.astype(x.real.dtype) * x for w, x in zip(by_leaf, wide)]
  if total is None:
    return terms
  if decay is not None:
    total = [decay.astype(t.real.dtype) * t for t in total]
  return [t + term for t, term in zip(total, terms)]


# `decay * total + weight * theta` of every leaf, in float32 or wider: a running
# sum, which begins as None. The weights are `[L]`, or one for all leaves.
added = jax.jit(_added)
add = jax.jit(_added, donate_argnums=0)  # In place.


@functools.partial(jax.jit, static_argnums=2)
def rounded(
    total: list[jax.Array], count: jax.Array, dtypes: tuple[np.dtype[Any], ...]
) -> list[jax.Array]:
  """`total / count`, rounded once to the dtypes of the ingredients."""
  return [(t / count.astype(t.dtype)).astype(d) for t, d in zip(total, dtypes)]


@jax.jit
def rounded_with(
    total: list[jax.Array],
    leaves: list[jax.Array],
    weight: jax.Array,
    count: jax.Array,
) -> list[jax.Array]:
  """`(total + weight * theta) / count`: a candidate, the sum left as it is."""
  dtypes = tuple(x.dtype for x in leaves)
  return rounded(_added(total, leaves, weight), count, dtypes)


def host_mean(
    terms: Iterable[tuple[np.number[Any] | None, np.ndarray]],
    count: float,
    total: np.ndarray,
    product: np.ndarray,
) -> None:
  """`sum_k w_k theta_k / count` of pairs `(w_k, theta_k)`, written to `total`.

  What `added` and `rounded` compute, in NumPy: three times as fast in the
  caches of a core, and float64 without jax_enable_x64. The caller rounds from
  `total`, of the wide dtype like `product`. A weight of None is one.
  """
  total.fill(0)
  # Of values that are not finite; the caller looks at the sum.
  with np.errstate(over='ignore', invalid='ignore'):
    for weight, leaf in terms:
      if weight is not None:
        leaf = np.multiply(leaf, weight, out=product)
      np.add(total, leaf, out=total)
    if count != 1:
      np.divide(total, total.dtype.type(count), out=total)


def weighted_sum(
    source: _checked.Leaves,
    order: Sequence[int],
    weights_fn: Callable[[int], ArrayLike] = lambda k: 1.0,
) -> list[jax.Array]:
  """`sum_k w_k theta_k` of those in `order`, one ingredient at a time.

  The weights of ingredient k are `[L]`, or one for all leaves.
  """
  total: list[jax.Array] | None = None
  for k, leaves in _checked.in_order(source, order):
    total = add(total, leaves, _tree.numbers(weights_fn(k)))
    # Otherwise reading could run ahead of adding, and fill the memory.
    jax.block_until_ready(total)
  assert total is not None
  return total
