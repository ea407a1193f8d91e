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
from collections.abc import Sized
import functools
import math
from typing import Any
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup import _masks
from jaxsoup import _processes
from jaxsoup import _tree
from jaxsoup._soup import AtMost
from jaxsoup.typing import Batch
from jaxsoup.typing import Batches
from jaxsoup.typing import EvalFn
from jaxsoup.typing import ExampleMetricFn
from jaxsoup.typing import LogitsFn
from jaxsoup.typing import MetricFn
from jaxsoup.typing import OutputsFn
from jaxsoup.typing import Params
from jaxsoup.typing import Tree

_T = TypeVar('_T')
# Batches in flight: enough that the device does not wait for the host.
_NUM_AHEAD = 3


def batched(
    data: Batch,
    batch_size: int,
    *,
    sharding: jax.sharding.Sharding | None = None,
) -> list[dict[str, jax.Array]]:
  """Cuts arrays into batches of one size, the last one padded and masked.

  Args:
    data: arrays `[N, ...]` with one N; perhaps a `mask` `[N]`, as in `mean_of`.
    batch_size: number of examples in a batch, B.
    sharding: of a batch on a mesh, such as `NamedSharding(mesh,
      PartitionSpec('data'))`; B is rounded up to what it divides. Every process
      passes the same data, and holds its part of each batch.

  Returns:
    Batches on the device, with leaves `[B, ...]` and `mask`, `[B]`: True or the
    mask of the data, and False or 0 for the padding. They compile once, and are
    transferred once. The data stay on the host as well, for `mean_of`.

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
  arrays = {k: _tree.as_numbers(x, (k,)) for k, x in data.items()}
  for name, x in arrays.items():
    _tree.require_integers_fit(x, x.dtype, (name,))
  arrays.setdefault('mask', np.ones(num, bool))
  return _Batched(arrays, divided(batch_size, sharding), sharding)


def divided(batch_size: int, sharding: jax.sharding.Sharding | None) -> int:
  """The least batch size from this one on that a sharding divides equally."""
  while sharding is not None:
    try:
      sharding.shard_shape((batch_size,))
      break
    except ValueError:
      batch_size += 1
  return batch_size


class _Batched(list[dict[str, jax.Array]]):
  """Batches of arrays, which stay on the host, to make other batches of."""

  def __init__(
      self,
      data: dict[str, np.ndarray],
      size: int,
      sharding: jax.sharding.Sharding | None,
  ):
    self._data, self.size, self._sharding = data, size, sharding
    rows = np.arange(len(data['mask']))
    super().__init__(map(self.of, np.split(rows, range(size, len(rows), size))))

  def __reduce__(self) -> Any:
    return _Batched, (self._data, self.size, self._sharding)

  def of(self, rows: np.ndarray) -> dict[str, jax.Array]:
    """A batch of at most B rows of the data, padded."""
    padded = np.pad(rows, (0, self.size - len(rows)), 'edge')
    batch = {k: x[padded] for k, x in self._data.items()}
    # Padding has weight 0, whatever the mask of the data says.
    batch['mask'][len(rows) :] = 0
    return {k: placed(x, self._sharding) for k, x in batch.items()}


def placed(x: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
  """Places an array; every process passes the same one."""
  if sharding is None:
    return jax.device_put(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])


def mean_of(metric_fn: ExampleMetricFn, batches: Batches) -> 'MeanOf':
  """The mean of a metric over all examples, as a function of the parameters.

  `sum_j w_j metric(params, example_j) / sum_j w_j`. Compiled once, however many
  models it scores. Sums of at most 2^24 right answers are exact.

  Where the metric is boolean (right or wrong, such as `metrics.correct`), the
  searches reject a candidate as soon as it has too many wrong answers, with the
  decisions of the full evaluation: see `MeanOf`. For other metrics, and for
  weighted examples, there is no bound, and every evaluation runs in full:
  `repr(eval_fn)` says which it is.

  Args:
    metric_fn: `metric_fn(params, batch) -> [B]`, one number per example,
      higher is better.
    batches: mappings of arrays `[B, ...]` that can be read any number of times.
      A batch may have a `mask` `[B]`: bool, only those examples count; or
      floats, the weights w of the examples, finite and not negative.

  Returns:
    `eval_fn(params) -> float`, with a method `at_least`.

  Raises:
    ValueError: (when called) no example counts, a mask is invalid, or
      `metric_fn` returned no vector.

  Example:
    >>> batches = batched({'x': np.array([1.0, 2.0, 6.0])}, 2)
    >>> mean_of(lambda params, batch: params * batch['x'], batches)(2.0)
    6.0
    >>> weighted = {'x': np.array([1.0, 2.0]), 'mask': np.array([1.0, 0.25])}
    >>> mean_of(lambda params, batch: batch['x'], [weighted])(())
    1.2
  """
  return MeanOf(metric_fn, batches)


class MeanOf:
  """What `mean_of` returns.

  It counts how many models got each example wrong. `at_least` walks the
  examples hard-first by that count, in batches of the same shape, so that wrong
  answers come early. The smaller the batches, the earlier it can stop.

  The order changes no answer, if the answer to an example does not depend on
  its neighbours in the batch. Batches of `batched` are put in that order, and
  those in use are held on the device a second time; other batches are walked in
  the order given. At most three are in flight.

  Attributes:
    num_seen: how many examples the last evaluation looked at, or their weight.
    batches: as given.
    step: `step(params, batch)`, jitted: sum of the metric, number of examples
      or their weight, and who is wrong, `[B]`, where there is a bound, else
      None.
  """

  def __init__(self, metric_fn: ExampleMetricFn, batches: Batches):
    self.num_seen = 0
    self._metric_fn = metric_fn
    self.batches = batches
    self.step = step = jax.jit(functools.partial(_sums, metric_fn))
    sums_fn = lambda *args: step(*args)[:2]
    self._steps = jax.jit(jax.vmap(sums_fn, (0, None)))
    # Known when a model was scored: the number of examples, and the rest.
    self._num = 0
    self._is_boolean: bool | None = None
    self._hard_first: _HardFirst | None = None

  def __reduce__(self) -> Any:
    return MeanOf, (self._metric_fn, self.batches)

  def __repr__(self) -> str:
    name = getattr(self._metric_fn, '__name__', repr(self._metric_fn))
    says = {
        None: 'no model scored yet',
        True: 'boolean: rejections end early',
        False: 'not boolean, or weighted: every evaluation runs in full',
    }
    return f'mean_of({name}; {says[self._is_boolean]})'

  def __call__(self, params: Params) -> float:
    """The score of a model."""
    return self.answers(params)[0]

  def answers(self, params: Params) -> tuple[float, np.ndarray | None]:
    """The score, and which examples are right, `[N]` bool.

    None in place of the second where the metric is not boolean, or weighted.
    """
    step = lambda params, batch: (*self.step(params, batch), batch.get('mask'))
    parts = self._walk(step, params)
    totals = jax.device_get([part[:2] for part in parts])
    count = sum(n.item() for _, n in totals)
    _require_examples(count)
    wrong = [part[2] for part in parts]
    if not self._num:
      self._is_boolean = all(x is not None for x in wrong)
      if self._is_boolean and isinstance(self.batches, _Batched):
        self._hard_first = _HardFirst(self.batches)
    right = None
    if self._is_boolean:
      wrong = [_processes.gathered(x) for x in wrong]
      masks = [
          None if part[3] is None else _processes.gathered(part[3])
          for part in parts
      ]
      kept = [~x if m is None else ~x[m] for x, m in zip(wrong, masks)]
      right = np.concatenate(kept)
    if self._hard_first:
      self._hard_first.saw_all(wrong)
    self._num = self.num_seen = count
    score = float(sum(float(s) for s, _ in totals) / count)
    return score, right

  def _walk(self, step: Callable[..., _T], params: Params) -> list[_T]:
    """A step on each batch, few at a time: batches in flight take memory."""
    params = jax.tree.map(_tree.on_device, params)
    parts: list[_T] = []
    for batch in _masks.checked(self.batches):
      parts.append(step(params, batch))
      jax.block_until_ready(parts[-_NUM_AHEAD:][0])
    return parts

  def of_many(self, stacked: Params) -> np.ndarray:
    """The scores of n models that are run side by side.

    Args:
      stacked: pytree with leaves `[n, ...]`, such as a curve that
        `jaxsoup.interpolate` returns.

    Returns:
      `[n]` float64.
    """
    parts = self._walk(self._steps, stacked)
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
    walk: Iterable[tuple[Any, Batch]] = (
        self._hard_first.batches()
        if self._hard_first
        else ((None, batch) for batch in _masks.checked(self.batches))
    )
    for rows, batch in walk:
      right, count, wrong = self.step(params, batch)
      right, count = map(int, jax.device_get((right, count)))
      if self._hard_first:
        wrong = _processes.gathered(wrong)
        self._hard_first.saw(rows, wrong[: len(rows)])
      self.num_seen += count
      most -= count - right
      if not reaches(most / self._num):
        return most / self._num
    if self.num_seen != self._num:
      raise ValueError(
          f'The batches hold {self.num_seen} examples, but held {self._num} '
          'before. An iterator can be read only once: pass a list.'
      )
    return most / self._num


def worst(scores: Mapping[str, float]) -> float:
  """The least of several scores, as an `objective` of a search.

  Args:
    scores: by name.

  Returns:
    One of them.

  Example:
    >>> worst({'code': 0.4, 'math': 0.7})
    0.4
  """
  return min(scores.values())


def _require_examples(num: Sized | float) -> None:
  if not num:
    raise ValueError(
        'There are no examples to score: no batches, or all are masked. An '
        'iterator can be read only once: pass a list.'
    )


def _sums(
    metric_fn: ExampleMetricFn, params: Params, batch: dict[str, Any]
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Of one batch: sum, count, and where there is a bound, who is wrong."""
  values = metric_fn(params, batch)
  if values.ndim != 1:
    raise ValueError(
        f'metric_fn returned shape {values.shape}: expected [B], one number '
        'per example. For a metric of the whole data set use '
        'evaluation.score_of.'
    )
  weights = _masks.weights_of(batch, len(values))
  wrong = ~values if values.dtype == weights.dtype == bool else None
  return _masks.weighted_sum(values, weights), weights.sum(), wrong


class _HardFirst:
  """Examples in the order of how many models got them wrong."""

  def __init__(self, batches: _Batched):
    self._batches = batches
    masks = [_processes.gathered(batch['mask']) for batch in batches]
    self._rows = self._order = np.flatnonzero(np.concatenate(masks))
    # Of each row: how many models answered it, and how many of them wrong.
    self._num_seen, self._num_wrong = np.zeros((2, self._rows[-1] + 1), int)
    self._num_walks = self._num_ordered = 0
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
      self._num_ordered, self._made = self._num_walks, {}
      seen, wrong = self._num_seen[self._rows], self._num_wrong[self._rows]
      # How likely a wrong answer is; the mean, where nothing is known.
      rates = (wrong + wrong.sum() / max(seen.sum(), 1)) / (seen + 1)
      self._order = self._rows[np.argsort(-rates, kind='stable')]
    self._num_walks += 1
    size = self._batches.size
    for start in range(0, len(self._order), size):
      rows = self._order[start : start + size]
      if start not in self._made:
        self._made[start] = self._batches.of(rows)
      yield rows, self._made[start]


def logits_of(logits_fn: LogitsFn, batches: Batches) -> OutputsFn:
  """The outputs of a model on all examples, for any number of metrics.

  Args:
    logits_fn: `logits_fn(params, batch) -> [B, ...]`, or a pytree of those: to
      have the labels in the order of the logits, return both.
    batches: as in `mean_of`, in one order in every walk. Masked examples, and
      those of weight 0, are dropped; all others are returned as they are.

  Returns:
    `fn(params) -> [N, ...]`, a NumPy array, or a pytree of those.

  Raises:
    ValueError: (when called) no example counts, a mask is invalid, or the
      examples are not those of the first call in the same order.

  Example:
    >>> batches = batched({'x': np.array([1.0, 2.0, 6.0])}, 2)
    >>> logits_of(lambda params, batch: params * batch['x'], batches)(2.0)
    array([ 2.,  4., 12.], dtype=float32)
  """
  step = jax.jit(logits_fn)
  first: list[np.ndarray] = []

  def fn(params: Params) -> Tree:
    outputs, hashes = outputs_of(step, batches, params)
    if not first:
      first.append(hashes)
    require_same_examples(first[0], hashes)
    return outputs

  return fn


def require_same_examples(first: np.ndarray, hashes: np.ndarray) -> None:
  """Raises unless two walks saw the same examples in the same order."""
  num = min(len(first), len(hashes))
  is_same = [*(first[:num] == hashes[:num]), len(first) == len(hashes)]
  if not all(is_same):
    raise ValueError(
        'The batches are not those of the first call: they differ from row '
        f'{is_same.index(False)} on ({len(first)} examples then, {len(hashes)} '
        'now). Outputs of different models would not line up: pass a list, or '
        'a loader that does not shuffle.'
    )


def outputs_of(
    step: LogitsFn, batches: Batches, params: Params
) -> tuple[Tree, np.ndarray]:
  """As `logits_of`, in any order, and a hash of each example, `[N]`."""
  params = jax.tree.map(_tree.on_device, params)
  parts = []
  for batch in _masks.checked(batches):
    part = step(params, batch)
    num = len(jax.tree.leaves(part)[0])
    keep = _masks.kept_rows(batch, num)
    kept = lambda x: _processes.gathered(x)[keep]  # noqa: B023
    parts.append(jax.tree.map(kept, (part, _hashes(batch, num))))
  _require_examples(sum(len(hashes) for _, hashes in parts))
  return jax.tree.map(lambda *x: np.concatenate(x), *parts)


@functools.partial(jax.jit, static_argnums=1)
def _hashes(batch: Batch, num: int) -> jax.Array:
  """Numbers that tell the examples of a batch apart, `[B]` uint32."""
  total = jnp.zeros(num, jnp.uint32)
  for x in jax.tree.leaves(batch):
    is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
    if x.shape[:1] != (num,) or is_key:
      continue
    x = jnp.real(x).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    odd = 2 * jnp.arange(math.prod(x.shape[1:]), dtype=jnp.uint32) + 1
    bits = bits * odd.reshape(1, *x.shape[1:])
    total = 31 * total + bits.sum(tuple(range(1, x.ndim)), dtype=jnp.uint32)
  return total


def score_of(
    metric: MetricFn,
    logits_fn: LogitsFn,
    batches: Batches,
    *,
    label: str = 'label',
) -> EvalFn:
  """A metric of the whole set, such as `metrics.matthews`, as an `eval_fn`.

  Args:
    metric: `metric(logits, labels) -> scalar`, higher is better.
    logits_fn: `logits_fn(params, batch) -> [B, C]`.
    batches: as in `mean_of`; of weights it matters only which are 0: those
      examples are dropped.
    label: the key of the labels in a batch, read in the walk of the logits.

  Returns:
    `eval_fn(params) -> float`, with `step(params, batch)`, jitted.
  """
  step = jax.jit(lambda params, batch: (logits_fn(params, batch), batch[label]))

  def eval_fn(params: Params) -> float:
    (logits, labels), _ = outputs_of(step, batches, params)
    score = np.asarray(jax.device_get(metric(logits, labels)))
    if score.ndim:
      raise ValueError(
          f'metric returned shape {score.shape}: expected one number for all '
          'examples. For one number an example use evaluation.mean_of.'
      )
    return float(score)

  eval_fn.step = step  # type: ignore[attr-defined]
  return eval_fn
