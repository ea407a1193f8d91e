"""Scores of a model on held-out data, as the `eval_fn` that recipes take.

```
batches = evaluation.batched(held_out, batch_size=256)

def correct(params, batch):                       # [B], one number per example
  return logits_fn(params, batch['image']).argmax(-1) == batch['label']

soup = jaxsoup.greedy(ingredients, evaluation.mean_of(correct, batches))
```
"""

import bisect
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup import _processes
from jaxsoup import _tree
from jaxsoup._soup import AtMost
from jaxsoup._soup import EvalFn
from jaxsoup._soup import Params

Batch = Mapping[str, Any]


def batched(
    data: Batch,
    batch_size: int,
    *,
    sharding: jax.sharding.Sharding | None = None,
) -> list[dict[str, jax.Array]]:
  """Cuts arrays into batches of one size, the last one padded and masked.

  Args:
    data: arrays `[N, ...]` with one N.
    batch_size: number of examples in a batch, B.
    sharding: of a batch on a mesh, such as `NamedSharding(mesh,
      PartitionSpec('data'))`; B is rounded up to what it divides. Every process
      passes the same data, and holds its part of each batch.

  Returns:
    Batches on the device, with leaves `[B, ...]` and `mask`, `[B]` bool: False
    for the padding. They compile once, and are transferred once.

  Raises:
    ValueError: no examples, or arrays of different lengths.

  Example:
    >>> batches = batched({'label': np.arange(3)}, 2)
    >>> [(b['label'].tolist(), b['mask'].tolist()) for b in batches]
    [([0, 1], [True, True]), ([2, 2], [True, False])]
  """
  lengths = {name: len(x) for name, x in data.items()}
  num = min(lengths.values(), default=0)
  if num == 0 or len(set(lengths.values())) > 1 or batch_size < 1:
    raise ValueError(
        f'Arrays of lengths {lengths} cannot be cut into batches of '
        f'{batch_size}: their lengths must be equal, and lengths and batch '
        'size at least 1.'
    )
  while sharding is not None and not _divides(sharding, batch_size):
    batch_size += 1
  batches = []
  for start in range(0, num, batch_size):
    rows = np.arange(start, start + batch_size)
    batch = {k: np.asarray(x)[rows.clip(max=num - 1)] for k, x in data.items()}
    batch['mask'] = rows < num
    batches.append({k: placed(x, sharding) for k, x in batch.items()})
  return batches


def _divides(sharding: jax.sharding.Sharding, batch_size: int) -> bool:
  try:
    sharding.shard_shape((batch_size,))
  except ValueError:
    return False
  return True


def placed(x: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
  """Places an array; every process passes the same one."""
  if sharding is None:
    return jax.device_put(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])


def mean_of(
    metric_fn: Callable[[Params, Batch], jax.Array], batches: Iterable[Batch]
) -> 'MeanOf':
  """The mean of a metric over all examples, as a function of the parameters.

  `1/N sum_j metric(params, example_j)`. Compiled once, however many models it
  scores. Sums of at most 2^24 right answers are exact.

  Where the metric is boolean (right or wrong, such as `metrics.correct`), the
  searches reject a candidate as soon as it has too many wrong answers, with the
  decisions of the full evaluation: see `MeanOf`. For other metrics no bound
  exists, and every evaluation runs in full: `repr(eval_fn)` says which it is.

  Args:
    metric_fn: `metric_fn(params, batch) -> [B]`, one number per example,
      higher is better. bool makes rejections cheap.
    batches: mappings of arrays `[B, ...]` that can be read any number of times.
      Where a batch has a `mask` `[B]`, only those examples count.

  Returns:
    `eval_fn(params) -> float`, with a method `at_least`.

  Raises:
    ValueError: (when called) no example counts, or `metric_fn` returned no
      vector.

  Example:
    >>> batches = batched({'x': np.array([1.0, 2.0, 6.0])}, 2)
    >>> mean_of(lambda params, batch: params * batch['x'], batches)(2.0)
    6.0
  """
  return MeanOf(metric_fn, batches)


class MeanOf:
  """What `mean_of` returns.

  It counts how many models got each example wrong. `at_least` walks the
  examples hard-first by that count, in batches of the same shape, so that wrong
  answers come early. The smaller the batches, the earlier it can stop.

  The order changes no answer, if the answer to an example does not depend on
  its neighbours in the batch. Examples are put in order where `batches` is a
  list of batches of one structure, all on this process; those in use are then
  held a second time. Other batches are walked in the order given.

  Attributes:
    num_seen: how many examples the last evaluation looked at.
    batches: as given.
    step: `step(params, batch)`, jitted: sum of the metric, number of examples,
      and of a boolean metric who is wrong, `[B]`, else None.
  """

  def __init__(
      self,
      metric_fn: Callable[[Params, Batch], jax.Array],
      batches: Iterable[Batch],
  ):
    self.num_seen = 0
    self._metric_fn = metric_fn
    self.batches = batches
    self.step = jax.jit(functools.partial(_sums, metric_fn))
    self._steps = jax.jit(jax.vmap(self.step, (0, None)))
    # Known when a model was scored: the number of examples, and the rest.
    self._num = 0
    self._is_boolean: bool | None = None
    self._hard_first: _HardFirst | None = None

  def __repr__(self) -> str:
    name = getattr(self._metric_fn, '__name__', repr(self._metric_fn))
    says = {
        None: 'no model scored yet',
        True: 'boolean: rejections end early',
        False: 'not boolean: every evaluation runs in full',
    }
    return f'mean_of({name}; {says[self._is_boolean]})'

  def __call__(self, params: Params) -> float:
    """The score of a model."""
    params = jax.tree.map(_tree.on_device, params)
    parts = [self.step(params, _on_device(batch)) for batch in self.batches]
    totals = jax.device_get([part[:2] for part in parts])
    count = sum(int(n) for _, n in totals)
    _require_examples(count)
    wrong = [part[2] for part in parts]
    if not self._num:
      self._is_boolean = wrong[0] is not None
      if self._is_boolean and _can_be_ordered(self.batches, wrong):
        self._hard_first = _HardFirst(list(self.batches))
    if self._hard_first is not None:
      self._hard_first.saw_all(jax.device_get(wrong))
    self._num = self.num_seen = count
    return float(sum(float(s) for s, _ in totals) / count)

  def of_many(self, stacked: Params) -> np.ndarray:
    """The scores of n models that are run side by side.

    Args:
      stacked: pytree with leaves `[n, ...]`, such as a curve that
        `jaxsoup.interpolate` returns.

    Returns:
      `[n]` float64.
    """
    stacked = jax.tree.map(_tree.on_device, stacked)
    parts = [self._steps(stacked, _on_device(b))[:2] for b in self.batches]
    _require_examples(parts)
    totals, counts = np.sum(jax.device_get(parts), axis=0, dtype=float)
    _require_examples(counts.all())
    return totals / counts

  def at_least(
      self, params: Params, bar: float, *, strict: bool = False
  ) -> float | AtMost:
    """The score if it reaches the bar, else an `AtMost` that does not.

    With w wrong answers so far, the score of N examples is at most (N - w) / N.
    Bound and score are quotients of the same integers, so that no rounding
    makes the decision differ from that of the full evaluation.

    Args:
      params: a model.
      bar: the score to reach.
      strict: whether it must be exceeded.

    Returns:
      The exact score, a float; or an `AtMost`: the largest score of N examples
      that does not reach the bar, whatever the order of the examples. Without a
      bound always the exact score.
    """
    reaches = lambda score: score > bar if strict else score >= bar
    if self._is_boolean:
      score = self._score_or_bound(params, reaches)
    else:
      score = self(params)
    # Known since the first call.
    if not self._is_boolean or reaches(score):
      return score
    num = self._num
    num_enough = bisect.bisect_left(
        range(num + 1), True, key=lambda right: reaches(right / num)
    )
    return AtMost((num_enough - 1) / num)

  def _score_or_bound(
      self, params: Params, reaches: Callable[[float], bool]
  ) -> float:
    """The score, or the first bound on it that does not reach the bar."""
    params = jax.tree.map(_tree.on_device, params)
    most, self.num_seen = self._num, 0
    for rows, batch in self._in_order():
      right, count, wrong = self.step(params, batch)
      if self._hard_first is None:
        right, count = jax.device_get((right, count))
      else:
        right, count, wrong = jax.device_get((right, count, wrong))
        self._hard_first.saw(rows, wrong[: len(rows)])
      self.num_seen += int(count)
      most -= int(count) - int(right)
      if not reaches(most / self._num):
        return most / self._num
    if self.num_seen != self._num:
      raise ValueError(
          f'The batches hold {self.num_seen} examples, but held {self._num} '
          'before. An iterator can be read only once: pass a list.'
      )
    return most / self._num

  def _in_order(self) -> Iterator[tuple[Any, Batch]]:
    if self._hard_first is not None:
      yield from self._hard_first.batches()
    else:
      for batch in self.batches:
        yield None, _on_device(batch)


def _require_examples(num: Any) -> None:
  if not num:
    raise ValueError(
        'There are no examples to score: no batches, or all are masked. An '
        'iterator can be read only once: pass a list.'
    )


def _sums(metric_fn, params, batch):
  """Of one batch: sum and count, and of a boolean metric who is wrong."""
  values = metric_fn(params, batch)
  if values.ndim != 1:
    raise ValueError(
        f'metric_fn returned shape {values.shape}: expected [B], one number '
        'per example. For a metric of the whole data set use '
        'evaluation.score_of.'
    )
  mask = batch.get('mask', jnp.ones(values.shape, bool))
  total = jnp.where(mask, values.astype(jnp.float32), 0).sum()
  wrong = ~values if values.dtype == bool else None
  return total, mask.sum(), wrong


def _can_be_ordered(batches: Any, wrong: Sequence[jax.Array]) -> bool:
  """Whether rows can be moved between these batches, of which each has B."""
  size = wrong[0].shape[0]

  def shapes(batch):
    return {name: (x.shape, x.dtype) for name, x in batch.items()}

  def is_movable(x):
    if isinstance(x, jax.Array):
      # Rows on other processes are out of reach; keys have no host form.
      is_known = x.is_fully_addressable and hasattr(x.dtype, 'itemsize')
      is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
      return is_known and not is_key and x.shape[:1] == (size,)
    return isinstance(x, np.ndarray) and x.shape[:1] == (size,)

  return (
      isinstance(batches, Sequence)
      # Else other processes hold a part of the answers.
      and wrong[0].is_fully_addressable
      and all(is_movable(x) for batch in batches for x in batch.values())
      and all(shapes(batch) == shapes(batches[0]) for batch in batches)
  )


class _HardFirst:
  """Examples in the order of how many models got them wrong.

  A row is a number over all batches: `rows // B` is its batch.
  """

  def __init__(self, batches: Sequence[Batch]):
    self._batches = batches
    self._size = len(next(iter(batches[0].values())))
    num_rows = len(batches) * self._size
    masks = [
        jax.device_get(b.get('mask', np.ones(self._size, bool)))
        for b in batches
    ]
    self._rows = np.flatnonzero(np.concatenate(masks))
    self._num_seen = np.zeros(num_rows, np.int64)
    self._num_wrong = np.zeros(num_rows, np.int64)
    self._num_walks = self._num_ordered = 0
    self._order = self._rows
    self._made: dict[int, Batch] = {}

  def saw(self, rows: np.ndarray, wrong: np.ndarray) -> None:
    """Takes note of the answers of a model to some examples."""
    self._num_seen[rows] += 1
    self._num_wrong[rows] += wrong

  def saw_all(self, wrong: Sequence[np.ndarray]) -> None:
    """Takes note of the answers to all, in the batches as given."""
    self._num_walks += 1
    self.saw(self._rows, np.concatenate(wrong)[self._rows])

  def batches(self) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yields rows and their batch, the hardest first."""
    # To move the rows costs time: only when twice as much is known.
    if self._num_walks >= 2 * self._num_ordered:
      self._num_ordered = self._num_walks
      self._order = self._rows[np.argsort(-self._rates(), kind='stable')]
      self._made = {}
    self._num_walks += 1
    for start in range(0, len(self._order), self._size):
      rows = self._order[start : start + self._size]
      if start not in self._made:
        self._made[start] = self._gather(rows)
      yield rows, self._made[start]

  def _rates(self) -> np.ndarray:
    """How likely a wrong answer is; the mean, where nothing is known."""
    seen, wrong = self._num_seen[self._rows], self._num_wrong[self._rows]
    return (wrong + wrong.sum() / max(seen.sum(), 1)) / (seen + 1)

  def _gather(self, rows: np.ndarray) -> Batch:
    """A batch of these rows, shaped and placed as the first one given."""
    batch = {}
    padded = np.pad(rows, (0, self._size - len(rows)), 'edge')
    for name, like in self._batches[0].items():
      if name == 'mask':
        values = (np.arange(self._size) < len(rows)).astype(like.dtype)
      else:
        given = [jax.device_get(b[name]) for b in self._batches]
        values = np.stack(
            [given[j // self._size][j % self._size] for j in padded]
        )
      # On a mesh only where the given ones are: a jitted function takes no
      # arrays that are committed to different devices.
      is_placed = isinstance(like, jax.Array) and like.committed
      batch[name] = jax.device_put(values, like.sharding if is_placed else None)
    return batch


def logits_of(
    logits_fn: Callable[[Params, Batch], jax.Array], batches: Iterable[Batch]
) -> Callable[[Params], np.ndarray]:
  """The outputs of a model on all examples, for any number of metrics.

  Args:
    logits_fn: `logits_fn(params, batch) -> [B, ...]`.
    batches: as in `mean_of`; masked examples are dropped.

  Returns:
    `fn(params) -> [N, ...]`, a NumPy array.

  Example:
    >>> batches = batched({'x': np.array([1.0, 2.0, 6.0])}, 2)
    >>> logits_of(lambda params, batch: params * batch['x'], batches)(2.0)
    array([ 2.,  4., 12.], dtype=float32)
  """
  compiled = jax.jit(logits_fn)

  def fn(params: Params) -> np.ndarray:
    params = jax.tree.map(_tree.on_device, params)
    rows = []
    for batch in batches:
      logits = _processes.gathered(compiled(params, _on_device(batch)))
      mask = batch.get('mask')
      keep = slice(None) if mask is None else _processes.gathered(mask)
      rows.append(logits[keep])
    if not rows:
      raise ValueError(
          'There are no batches. An iterator can be read only once: pass a '
          'list.'
      )
    return np.concatenate(rows)

  return fn


def score_of(
    metric: Callable[[Any, Any], Any],
    logits_fn: Callable[[Params, Batch], jax.Array],
    batches: Iterable[Batch],
    *,
    label: str = 'label',
) -> EvalFn:
  """A metric of the whole set, such as `metrics.matthews`, as an `eval_fn`.

  Args:
    metric: `metric(logits, labels) -> scalar`, higher is better.
    logits_fn: `logits_fn(params, batch) -> [B, C]`.
    batches: as in `mean_of`.
    label: the key of the labels in a batch.

  Returns:
    `eval_fn(params) -> float`.
  """
  all_logits = logits_of(logits_fn, batches)
  all_labels = logits_of(lambda _, batch: batch[label], batches)

  def eval_fn(params: Params) -> float:
    score = metric(all_logits(params), all_labels(()))
    return float(jax.device_get(score))

  return eval_fn


def _on_device(batch: Batch) -> dict[str, jax.Array]:
  return {name: _tree.on_device(x, (name,)) for name, x in batch.items()}
