"""The loss of a mix and its gradient, of ingredients that are read repeatedly.

```
streamed = Streamed(source, groups, alphas, loss_at)
loss, gradient = streamed.value_and_grad(variables, batch)
```
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np

from jaxsoup import _checked
from jaxsoup import _memory
from jaxsoup import _mixing
from jaxsoup import _processes
from jaxsoup import _tree
from jaxsoup._soup import LearnedPlan
from jaxsoup.typing import Tree

# Of each group `[K]`: w, alpha or a gradient.
ByGroup = dict[_tree.Path, jax.Array]
# w, and the temperature unless it is fixed.
Variables = tuple[ByGroup, jax.Array | None]
AlphasFn = Callable[[ByGroup], ByGroup]
# The loss of float leaves and a temperature on a batch.
LossAt = Callable[[list[jax.Array], jax.Array | None, Tree], jax.Array]


class Source:
  """Leaves of ingredients: the last one is kept, and copies of all if asked."""

  def __init__(
      self, checked: _checked.Checked, first: list[jax.Array], is_cached: bool
  ):
    self._checked = checked
    self._is_cached = is_cached
    self._cache: dict[int, list[Callable[[], jax.Array]]] = {}
    self._last = {0: self._copied(0, lambda: first)}

  def __len__(self) -> int:
    return len(self._checked)

  def __getitem__(self, k: int) -> list[jax.Array]:
    if k not in self._last:
      self._last = {}  # Freed before the next one is read.
      self._last = {k: self._copied(k, lambda: self._checked[k])}
    return self._last[k]

  def prefetch(self, k: int) -> None:
    if k not in self._cache and k not in self._last:
      self._checked.prefetch(k)

  def _copied(
      self, k: int, read: Callable[[], list[jax.Array]]
  ) -> list[jax.Array]:
    """The leaves after a round trip through the cache, if there is one."""
    if not self._is_cached:
      return read()
    if k not in self._cache:
      self._cache[k] = list(map(_copy_of, read()))
    leaves = [placed() for placed in self._cache[k]]
    return _widened(leaves, self._checked.layers.dtypes)


def _copy_of(x: jax.Array) -> Callable[[], jax.Array]:
  """Places what this host has of an array, in 16 bits where it is wider."""
  dtype: Any = x.dtype
  if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 2:
    # float16 has three more bits than bfloat16, but a smaller range.
    dtype = np.float16 if jax.device_get(_is_medium(x)) else jnp.bfloat16
  # By what part it is, of which several devices may have the same. Copied, or
  # on a CPU it would be the memory of the ingredient itself.
  parts = {str(part.index): part.data for part in x.addressable_shards}
  copies = {i: np.array(jax.device_get(p), dtype) for i, p in parts.items()}
  part_fn = lambda index: copies[str(index)]
  place = jax.make_array_from_callback
  return functools.partial(place, x.shape, x.sharding, part_fn)


@jax.jit
def _is_medium(x: jax.Array) -> jax.Array:
  """Whether float16 holds the largest value; LayerScale begins at 1e-6."""
  top, limits = jnp.abs(x).max(initial=0), jnp.finfo(jnp.float16)
  return (top >= limits.smallest_normal) & (top < limits.max)


@functools.partial(jax.jit, static_argnums=1)
def _widened(
    leaves: list[jax.Array], dtypes: tuple[np.dtype[Any], ...]
) -> list[jax.Array]:
  return [x.astype(d) for x, d in zip(leaves, dtypes)]


class Streamed:
  """The loss of a mix and its gradient, at the memory of a few models.

  Each pass reverses the order of the one before, and so begins with the
  ingredient that is still in memory.
  """

  def __init__(
      self,
      source: _checked.Leaves,
      groups: Sequence[_tree.Path],
      alphas: AlphasFn,
      loss_at: LossAt,
      dtypes: tuple[np.dtype[Any], ...],
      shardings: Sequence[jax.sharding.Sharding],
  ):
    self.source = source
    self._groups = groups
    self._dtypes = dtypes
    self._order = list(range(len(source)))
    self._alphas = jax.jit(alphas)
    # Otherwise each device could hold the whole gradient of a sharded model.
    on_mesh = [x if isinstance(x, NamedSharding) else None for x in shardings]
    self.step = jax.jit(
        jax.value_and_grad(loss_at, (0, 1)),
        out_shardings=(None, (on_mesh, None)),
    )
    self.loss = jax.jit(loss_at)
    self.inner = jax.jit(self._inner_products)
    self._pull = jax.jit(lambda w, inner: jax.vjp(alphas, w)[1](inner)[0])

  def mixed(self, w: ByGroup) -> list[jax.Array]:
    alpha = jax.device_get(self._alphas(w))
    weights_of = lambda k: [alpha[g][k] for g in self._groups]
    total = _mixing.weighted_sum(self.source, self._next(), weights_of)
    return _mixing.rounded(total, _tree.numbers(1.0), self._dtypes)

  def value_and_grad(
      self, variables: Variables, batch: Tree
  ) -> tuple[jax.Array, Variables]:
    w, scale = variables
    loss, (gradient, scale_gradient) = self.step(self.mixed(w), scale, batch)
    rows = {
        k: jax.device_get(self.inner(gradient, leaves))
        for k, leaves in _checked.in_order(self.source, self._next())
    }
    inner = {g: _tree.numbers([rows[k][g] for k in sorted(rows)]) for g in w}
    return loss, (self._pull(w, inner), scale_gradient)

  def _next(self) -> list[int]:
    order, self._order = self._order, self._order[::-1]
    return order

  def _inner_products(
      self, gradient: list[jax.Array], leaves: list[jax.Array]
  ) -> ByGroup:
    """`<dL/dtheta, theta_k>` in each group; runs on Explicit axes as well."""
    inner: ByGroup = {}
    for group, g, x in zip(self._groups, gradient, leaves):
      wide = _tree.wide_dtype(x.dtype)
      product = jnp.real(jnp.sum(x.astype(wide) * g.astype(wide)))
      inner[group] = inner.get(group, 0) + product.astype(jnp.float32)
    return inner


def memory_of(leaves: Sequence[jax.Array]) -> tuple[str, int, int]:
  """The platform of a model, its bytes on a device, and what is free there."""
  sharding = leaves[0].sharding
  device: jax.Device = next(iter(sharding.addressable_devices))
  shard_sizes = [math.prod(x.sharding.shard_shape(x.shape)) for x in leaves]
  num_bytes = sum(n * x.dtype.itemsize for n, x in zip(shard_sizes, leaves))
  if device.platform == 'cpu':  # Whose devices share one memory.
    num_bytes *= len(sharding.addressable_devices)
  free = _processes.agreed_min(_memory.free_bytes(device), leaves[0])
  return device.platform, num_bytes, free


def plan(
    leaves: Sequence[jax.Array], num_ingredients: int, memory: str
) -> LearnedPlan:
  """Resident if the stack fits as well as what a step needs, else streamed."""
  if _tree.is_traced(*leaves):
    raise TypeError(
        'learned and search are loops, which jax cannot trace: call them '
        'outside of jax.jit, jax.vmap and jax.grad.'
    )
  platform, model_bytes, free = memory_of(leaves)
  needed, is_fitting = fits(num_ingredients, model_bytes, free)
  reason = (
      f'the stack of {num_ingredients} ingredients and three more models (one '
      'being read, the mixed one, its gradient) takes '
      f'{_memory.amount(needed)} of {_memory.amount(free)} free on '
      f'{platform}, a third of which is kept for activations: it '
      f'{"fits" if is_fitting else "does not fit"}'
  )
  if memory == 'auto':
    memory = 'resident' if is_fitting else 'streamed'
  else:
    reason = f'memory={memory!r} was passed; {reason}'
  reads = 2 * (num_ingredients - 1) if memory == 'streamed' else 0
  return LearnedPlan(memory, reason, needed, free, reads)


def fits(num_ingredients: int, model_bytes: int, free: int) -> tuple[int, bool]:
  """Bytes of the stack and three more models; whether 2/3 of free suffice."""
  needed = (num_ingredients + 3) * model_bytes
  return needed, needed <= 2 / 3 * free
