"""Averages of checkpoints that are read in parallel, piece by piece."""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup import _checked
from jaxsoup import _mixing
from jaxsoup import _processes
from jaxsoup import _tree
from jaxsoup.checkpoints import _checkpoint
from jaxsoup.checkpoints import _pieces
from jaxsoup.checkpoints import _resumable
from jaxsoup.checkpoints import _source
from jaxsoup.typing import Alpha
from jaxsoup.typing import DType
from jaxsoup.typing import Json
from jaxsoup.typing import Members
from jaxsoup.typing import Params
from jaxsoup.typing import ShapeDtype


class Cost(NamedTuple):
  """What an average takes from file to file, in bytes.

  Attributes:
    read: of all ingredients.
    written: the soup.
    of_a_host: what the host with the largest part reads and writes.
    held: at most, in the memory of a process.
  """

  read: int
  written: int
  of_a_host: int
  held: int


class Average:
  """`sum_k w_k theta_k / count`, with the memory of its result or of a piece.

  A piece of every ingredient is read while the sum of that piece is in the
  cache, so that adding costs almost nothing compared to reading.

  Attributes:
    leaves: shape and dtype of each leaf of the result.
  """

  def __init__(
      self,
      opened: Mapping[int, _checkpoint.Checkpoint],
      order: Sequence[int],
      alpha: Alpha | None,
      count: float,
      first: int,
      of_first: Collection[_tree.Path] = (),
      stop_fn: Callable[[], None] = lambda: None,
  ):
    """Raises a ValueError if the ingredients do not fit.

    Args as in `Ingredients.average`. The leaves `of_first` are not averaged but
    those of the ingredient `first`, which the others have to fit. `stop_fn` is
    called between two leaves.
    """
    self._stop_fn = stop_fn
    self._opened = opened
    self._order = order
    self._count = count
    self._first = first
    self._of_first = frozenset(of_first)
    self._template = opened[first]
    flat = self._template.flat
    self.leaves: dict[_tree.Path, ShapeDtype] = flat.by_path
    expected = self._compared(first)
    for k in order:
      if mismatches := _checked.mismatches(expected, self._compared(k)):
        raise _checked.mismatch_error(self._name(k), mismatches, is_stored=True)
    self._sums = {k: _checkpoint.Sums() for k in opened}
    floats = [n for n in flat.paths if _tree.is_float(self._template.stored[n])]
    averaged = [n for n in floats if n not in self._of_first]
    rows: dict[_tree.Path, Any] = dict.fromkeys(floats)
    if alpha is not None:
      others = set(flat.paths) - set(averaged)
      rows |= zip(averaged, _tree.alphas_of(alpha, averaged, others))
    self._wide = {n: self._wide_dtype(n) for n in floats}
    self._terms = {n: self._terms_of(n, row) for n, row in rows.items()}

  def _compared(self, k: int) -> dict[_tree.Path, ShapeDtype]:
    """Shapes, and dtypes: of floats those that are wanted."""
    stored, wanted = self._opened[k].stored, self._opened[k].flat.by_path
    return {
        n: wanted[n] if _tree.is_float(x) else x
        for n, x in stored.items()
        if n not in self._of_first
    }

  def _wide_dtype(self, name: _tree.Path) -> np.dtype[Any]:
    stored = [self._opened[k].stored[name].dtype for k in self._members(name)]
    wanted = self.leaves[name].dtype
    return np.result_type(*map(_tree.wide_dtype, (wanted, *stored)))

  def _members(self, name: _tree.Path) -> Sequence[int]:
    return [self._first] if name in self._of_first else self._order

  def params(self) -> Params:
    """The average as arrays, in the wanted container and shardings."""
    flat = self._template.flat
    plans = [self._plan(name) for name in flat.paths]
    read_fn = lambda i, index: self._piece(flat.paths[i], index)
    return _pieces.load(flat, plans, read_fn, self._verify)

  def put_all(
      self,
      put_fn: _resumable.PutFn,
      targets: Mapping[_tree.Path, _tree.Path],
      written: _resumable.Written,
  ) -> None:
    """Passes `(target, start, piece)` of every piece, `start` in bytes.

    Of what is not yet `written`, and of that the share of this process.
    """
    notes = {n: written.notes.get(target) for n, target in targets.items()}
    missing = [n for n in self._template.flat.paths if notes[n] is None]
    sizes = {n: _tree.num_bytes(self.leaves[n]) for n in missing}
    num = written.num_writers
    shares = [_processes.share_of(sizes, i, num) for i in range(num)]
    shares += [[]] * (jax.process_count() - num)
    names = shares[jax.process_index()]

    def piece_fn(i, index):
      piece = self._piece(names[i], index)
      columns = self.leaves[names[i]].shape[1:]
      row_bytes = piece.dtype.itemsize * math.prod(columns)
      start = index[0].start * row_bytes if index else 0
      put_fn(targets[names[i]], start, piece)

    num_questions = min(map(len, shares))  # As often in each process.
    with _processes.together():
      for i in _pieces.run([self._plan(n) for n in names], piece_fn):
        self._verify(names[i])
        written.add(targets[names[i]], self._note(names[i]))
        if i < num_questions:
          self._stop_fn()
    # Of what other processes read, or an earlier start of this program.
    for k, checkpoint in self._opened.items():
      known = {n: note.get(str(k)) for n, note in notes.items() if note}
      checkpoint.exchange({n: digest for n, digest in known.items() if digest})

  def cost(self, num_hosts: int) -> Cost:
    """What the average takes, from file to file; reads no array."""
    written = {n: _tree.num_bytes(x) for n, x in self.leaves.items()}
    read = {
        n: sum(_tree.num_bytes(self._opened[k].stored[n]) for k in members)
        for n in written
        for members in [self._members(n)]
    }
    both = {n: read[n] + written[n] for n in written}
    shares = [
        _processes.share_of(written, i, num_hosts) for i in range(num_hosts)
    ]
    pieces = [size for n in written for _, size in self._plan(n)]
    return Cost(
        read=sum(read.values()),
        written=sum(written.values()),
        of_a_host=max(sum(both[n] for n in share) for share in shares),
        held=_pieces.held_bytes(pieces),
    )

  def _note(self, name: _tree.Path) -> Json:
    digests = {k: c.digest_of(name) for k, c in self._opened.items()}
    return {str(k): digest for k, digest in digests.items() if digest}

  def duplicates(self) -> tuple[Members, ...]:
    """Groups of equal ingredients among those read; warns of them."""
    contents = {k: self._opened[k].content_hash() for k in self._order}
    known = {k: content for k, content in contents.items() if content}
    return _checked.duplicates_of(known, self._name)

  def _name(self, k: int) -> str:
    return f'ingredient {k} ({self._opened[k].source.metadata.path})'

  def _terms_of(self, name, row) -> list[tuple[Any, _source.ReadFn]]:
    """The terms of the sum of a leaf: weights (None is one) and readers."""
    wide = self._wide[name].type
    return [
        (
            None if row is None else wide(row[k]),
            self._opened[k].reader(name, self._sums[k]),
        )
        for k in self._members(name)
        if row is None or row[k]
    ]

  def _plan(self, name: _tree.Path) -> list[tuple[_source.Index, int]]:
    # A piece of one ingredient and of the soup; the wide sum and a product.
    stored = self._template.stored[name].dtype.itemsize
    wide = self._wide[name].itemsize if name in self._wide else stored
    times = 2 * (stored + wide) / stored
    plan = self._template.plan(name)
    return [(index, int(times * size)) for index, size in plan]

  def _verify(self, name: _tree.Path) -> None:
    for k in self._members(name):
      checkpoint = self._opened[k]
      checkpoint.verify(name, self._sums[k])

  def _piece(self, name: _tree.Path, index: _source.Index) -> np.ndarray:
    dtype = self.leaves[name].dtype
    if not _tree.is_float(self._template.stored[name]):
      return self._non_float(name, index).astype(dtype)
    shape, wide = [s.stop - s.start for s in index], self._wide[name]
    total = _source.scratch('total', shape, wide)
    product = _source.scratch('product', shape, wide)
    terms = ((weight, read(index)) for weight, read in self._terms[name])
    count = 1 if name in self._of_first else self._count
    _mixing.host_mean(terms, count, total, product)
    if not np.isfinite(np.add.reduce(total, axis=None)):
      self._find_not_finite(name, index)
    _require_fits(total, dtype, name)
    return total.astype(dtype, copy=False)

  def _find_not_finite(self, name, index) -> None:
    """Raises for the ingredient that makes the sum not finite, if one does."""
    for k in self._members(name):
      piece = self._opened[k].unverified(name)(index)
      if not np.isfinite(piece).all():
        raise _checked.not_finite_error(self._name(k), [name])

  def _non_float(self, name, index) -> np.ndarray:
    read = lambda k: self._opened[k].reader(name, self._sums[k])(index)
    members = self._members(name)
    expected = read(members[0]).copy()
    for k in members[1:]:
      actual = read(k)
      if not np.array_equal(expected, actual) and not (
          self._template.is_state(name)
      ):
        raise _checked.non_float_error(
            self._name(k), name, expected, actual, is_stored=True
        )
    return expected


def _require_fits(total: np.ndarray, dtype: DType, name: _tree.Path) -> None:
  """Raises where a dtype with a smaller range than float32 would overflow."""
  most = float(jnp.finfo(dtype).max)
  if most > 1e38 or not total.size:
    return
  largest = max(float(total.max()), -float(total.min()))
  if largest > most:
    raise ValueError(
        f'Leaf {_tree.name_of(name)!r} of the soup has a value of size '
        f'{largest:.3g}, but {dtype} ends at {most:.3g}. Ask for bfloat16 or '
        "float32: --dtype bfloat16, or Ingredients(..., dtype='bfloat16')."
    )
