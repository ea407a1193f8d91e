"""How leaves of one model correspond to those of another: where they went.

```
found = correspondence(theirs, ours, lost, usual)   # leaves by path
found.code, found.paths                             # 'permuted', (path, ...)
params = aligned(params, like)                      # units in the other's order
```
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import itertools
from typing import NamedTuple

import jax
import numpy as np

from jaxsoup import _tree
from jaxsoup.typing import Params

_Leaves = Mapping[_tree.Path, np.ndarray]
# Axes that are solved for: the time is cubic in their length.
_LONGEST = 2048
# The largest leaves are compared: more would tell no more.
_MOST = 12


class Match(NamedTuple):
  """A change that turns leaves of one model into those of another.

  Attributes:
    code: 'swapped', 'transposed', 'permuted', 'labels' or 'rotated'.
    paths: the leaves.
    text: what was seen.
  """

  code: str
  paths: tuple[_tree.Path, ...]
  text: str


def _bar(before: float, usual: float) -> float:
  """A distance below it is explained: nearer to the usual one than before.

  Half-way on a log scale. The usual one counts at least a tenth of that before,
  so that rounding and short training do not matter, and at most half, so that
  most of the square is explained.
  """
  return float(np.sqrt(before * np.clip(usual, before / 10, before / 2)))


def _apart(x: np.ndarray, y: np.ndarray) -> float:
  return float(np.linalg.norm(x - y))


def correspondence(
    theirs: _Leaves,
    ours: _Leaves,
    lost: Sequence[_tree.Path],
    usual: Mapping[_tree.Path, float],
) -> Match | None:
  """What turns `theirs` into `ours`, in leaves that are unrelated."""
  some = sorted(lost, key=lambda p: -ours[p].size)[:_MOST]
  bars = {p: _bar(_apart(theirs[p], ours[p]), usual[p]) for p in ours}
  transposed = [
      p
      for p in some
      if ours[p].ndim == 2
      and ours[p].shape[0] == ours[p].shape[1]
      and _apart(theirs[p].T, ours[p]) < bars[p]
  ]
  if transposed:
    return Match(
        'transposed', tuple(transposed), 'is that of the others, transposed'
    )
  pairs = [
      (p, q)
      for p, q in itertools.permutations(ours, 2)
      if p in some
      and ours[p].shape == ours[q].shape
      and _apart(theirs[p], ours[q]) < bars[p]
  ]
  if pairs:
    text = f'is {_tree.name_of(pairs[0][1])} of the others'
    return Match('swapped', tuple(p for p, _ in pairs), text)
  orders = orders_of(theirs, ours, some, usual)
  if orders:
    return _permuted(orders, ours)
  rotated = _rotated(theirs, ours, some)
  if rotated:
    text = 'differs, but its product with the other is that of the others'
    return Match('rotated', rotated, text)
  return None


def _permuted(orders, ours) -> Match:
  path, axes = next(iter(orders.items()))
  axis, order = next(iter(axes.items()))
  share = np.mean(order != np.arange(len(order)))
  # The order of an output alone: nothing reads it in that order.
  is_read = any(
      axis != ours[p].ndim - 1 for p, axes in orders.items() for axis in axes
  )
  what = 'units' if is_read else 'outputs'
  text = f'has {100 * share:.0f} % of its {len(order)} {what} in other places'
  return Match('permuted' if is_read else 'labels', tuple(orders), text)


def orders_of(
    theirs: _Leaves,
    ours: _Leaves,
    lost: Sequence[_tree.Path],
    usual: Mapping[_tree.Path, float],
) -> dict[_tree.Path, dict[int, np.ndarray]]:
  """For leaves whose units were reordered, by axis the order that aligns them.

  One axis is solved for, the others take an order that is known from another
  leaf, until no leaf changes: `linear_sum_assignment` of inner products.
  """
  bars = {p: _bar(_apart(theirs[p], ours[p]), usual[p]) for p in lost}
  orders: dict[_tree.Path, dict[int, np.ndarray]] = {}
  known: list[np.ndarray] = []
  for _ in range(len(lost)):
    new = [p for p in lost if p not in orders]
    for path in new:
      best = min(
          _candidates(theirs[path], ours[path], known),
          key=lambda c: _apart(_ordered(theirs[path], c), ours[path]),
          default=None,
      )
      if best and _apart(_ordered(theirs[path], best), ours[path]) < min(
          bars[path], _bar(_chance(theirs[path], ours[path], best), usual[path])
      ):
        orders[path] = best
        known += best.values()
    if all(p not in orders for p in new):
      break
  return orders


def _chance(theirs, ours, axes) -> float:
  """The distance that the best order leaves of unrelated numbers."""
  rng = np.random.default_rng(0)
  other = rng.permutation(ours.ravel()).reshape(ours.shape)
  rest = {i: o for i, o in list(axes.items())[:-1]}
  last = list(axes)[-1]
  order = _order(_ordered(theirs, rest), other, last)
  return _apart(_ordered(theirs, rest | {last: order}), other)


def _candidates(theirs, ours, known) -> Iterator[dict[int, np.ndarray]]:
  lengths = ours.shape
  of = lambda axis: [None, *(o for o in known if len(o) == lengths[axis])]
  for given in itertools.product(*map(of, range(ours.ndim))):
    axes = {i: order for i, order in enumerate(given) if order is not None}
    if len(axes) > 2:
      continue
    if axes:
      yield axes
    for axis in set(range(ours.ndim)) - axes.keys():
      if 1 < lengths[axis] <= _LONGEST:
        yield axes | {axis: _order(_ordered(theirs, axes), ours, axis)}


def _order(theirs, ours, axis) -> np.ndarray:
  from scipy import optimize

  rows = lambda x: np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
  products = rows(ours) @ rows(theirs).T
  return optimize.linear_sum_assignment(products, maximize=True)[1]


def _ordered(x: np.ndarray, axes: Mapping[int, np.ndarray]) -> np.ndarray:
  for axis, order in axes.items():
    x = np.take(x, order, axis)
  return x


def _rotated(theirs, ours, some) -> tuple[_tree.Path, ...]:
  """Two leaves whose product is the same: q and k, or v and out."""
  kernels = lambda x: [x.reshape(len(x), -1), x.reshape(-1, x.shape[-1])]
  products = (
      lambda x, y: kernels(x)[0] @ kernels(y)[0].T,
      lambda x, y: kernels(x)[1].T @ kernels(y)[1],
      lambda x, y: kernels(x)[0] @ kernels(y)[1],
  )
  for p, q in itertools.permutations(some, 2):
    for product in products:
      try:
        mine, other = product(theirs[p], theirs[q]), product(ours[p], ours[q])
      except ValueError:  # Other lengths.
        continue
      if _apart(mine, other) < 0.5 * np.linalg.norm(other):
        return p, q
  return ()


def rescaled(
    theirs: _Leaves, ours: _Leaves, off: Sequence[_tree.Path]
) -> tuple[_tree.Path, _tree.Path, float] | None:
  """A layer that was multiplied, the next one divided, and by how much.

  u and v are logs of the ratios of the norms of units, of what goes out of one
  layer and into the next: `u + v = 0`, and not `|u + v|^2 = |u|^2 + |v|^2`.
  """

  def logs(path, views):
    for view in views:
      norms = [
          np.sqrt((view(x[path]) ** 2).sum(1)).clip(1e-9)
          for x in (theirs, ours)
      ]
      yield np.log(norms[0] / norms[1])

  # Units that go out, [units, all else], perhaps over heads; and that come in.
  out = (lambda x: x.reshape(len(x) if x.ndim > 1 else 1, -1).T,
         lambda x: x.reshape(-1, x.shape[-1]).T)  # fmt: skip
  come = (lambda x: np.moveaxis(x, -2, 0).reshape(x.shape[-2], -1),
          lambda x: x.reshape(-1, x.shape[-1]))  # fmt: skip
  for p, q in itertools.permutations(off, 2):
    if ours[q].ndim < 2:
      continue
    for u, v in itertools.product(logs(p, out), logs(q, come)):
      if u.shape != v.shape or not len(u) > 1:
        continue
      if ((u + v) ** 2).sum() < 0.5 * ((u**2).sum() + (v**2).sum()):
        return p, q, float(np.exp(np.sqrt((u**2).mean())))
  return None


def aligned(params: Params, like: Params) -> Params:
  """The same model with its hidden units in the order of another one.

  The units of each layer are matched by `linear_sum_assignment`, and what reads
  them is put in the same order, for leaves that agree afterwards.

  Args:
    params: of the model whose units are to be reordered.
    like: of a model with the same start, in whose order they are put.

  Returns:
    A tree like `params`. Score it: only if everything that reads a unit could
    be aligned, it is the same function.

  Raises:
    ValueError: leaves of other names or shapes.

  Example:
    >>> like = {'a': np.diag(np.arange(1.0, 7)), 'b': np.diag(np.arange(1., 7))}
    >>> order = [2, 0, 1, 4, 5, 3]
    >>> params = {'a': like['a'][:, order], 'b': like['b'][order]}
    >>> bool((aligned(params, like)['a'] == like['a']).all())
    True

  Source: Ainsworth et al. 2023, "Git Re-Basin", algorithm 1.
  """
  flat, other = _tree.flatten(params), _tree.flatten(like).by_path
  theirs = {p: np.asarray(x) for p, x in flat.floats.items()}
  shapes = {p: other[p].shape for p in theirs if p in other}
  if shapes != {p: x.shape for p, x in theirs.items()}:
    raise ValueError('The two models have leaves of other names or shapes.')
  ours = {p: np.asarray(other[p]) for p in theirs}
  apart = {p: _apart(theirs[p], ours[p]) for p in theirs}
  far = [
      p
      for p in sorted(theirs, key=lambda p: -theirs[p].size)
      if theirs[p].ndim > 1 and apart[p] ** 2 > (ours[p] ** 2).sum() / 2
  ]
  # Without a third model, what is usual is not known: half of what chance has.
  usual = {p: apart[p] / 4 for p in theirs}
  orders = orders_of(theirs, ours, far, usual)
  new = {p: _ordered(x, orders.get(p, {})) for p, x in theirs.items()}
  known = [o for axes in orders.values() for o in axes.values()]
  for path in theirs.keys() - orders.keys():
    best = min(
        (c for c in _candidates_known(theirs[path], known)),
        key=lambda c: _apart(_ordered(theirs[path], c), ours[path]),
        default={},
    )
    if _apart(_ordered(theirs[path], best), ours[path]) < apart[path]:
      new[path] = _ordered(theirs[path], best)
  leaves = [new.get(p, x) for p, x in flat.by_path.items()]
  return jax.tree.map(jax.numpy.asarray, flat.replace(leaves))


def _candidates_known(x, known) -> Iterator[dict[int, np.ndarray]]:
  """Known orders of one axis: of biases, norms and their statistics."""
  for axis, length in enumerate(x.shape):
    yield from ({axis: o} for o in known if len(o) == length)
