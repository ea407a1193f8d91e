"""Scores of a model on held-out data, as the `eval_fn` that recipes take.

```
batches = evaluation.batched(held_out, batch_size=256)

def correct(params, batch):                       # [B], one number an example
  return logits_fn(params, batch['image']).argmax(-1) == batch['label']

soup = jaxsoup.greedy(ingredients, evaluation.mean_of(correct, batches))
```
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup import _tree
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
    sharding: how a batch lies on a mesh, such as `NamedSharding(mesh,
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
        f'{batch_size}: they must have one length, at least 1.'
    )
  while sharding is not None and not _divides(sharding, batch_size):
    batch_size += 1
  batches = []
  for start in range(0, num, batch_size):
    rows = np.arange(start, start + batch_size)
    batch = {k: np.asarray(x)[rows.clip(max=num - 1)] for k, x in data.items()}
    batch['mask'] = rows < num
    batches.append({k: _placed(x, sharding) for k, x in batch.items()})
  return batches


def _divides(sharding: jax.sharding.Sharding, batch_size: int) -> bool:
  try:
    sharding.shard_shape((batch_size,))
  except ValueError:
    return False
  return True


def _placed(x: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
  if sharding is None:
    return jax.device_put(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])


def mean_of(
    metric_fn: Callable[[Params, Batch], jax.Array], batches: Iterable[Batch]
) -> EvalFn:
  """The mean of a metric over all examples, as a function of the parameters.

  `1/N sum_j metric(params, example_j)`. Compiled once, however many models it
  scores. Sums of at most 2^24 right answers are exact.

  Args:
    metric_fn: `metric_fn(params, batch) -> [B]`, one number an example, higher
      is better.
    batches: mappings of arrays `[B, ...]` that can be walked through any number
      of times. Where a batch has a `mask` `[B]`, only those examples count.

  Returns:
    `eval_fn(params) -> float`.

  Raises:
    ValueError: (when called) no example counts, or `metric_fn` returned no
      vector.

  Example:
    >>> batches = batched({'x': np.array([1.0, 2.0, 6.0])}, 2)
    >>> mean_of(lambda params, batch: params * batch['x'], batches)(2.0)
    6.0
  """
  sum_and_count = sum_and_count_of(metric_fn)

  def eval_fn(params: Params) -> float:
    params = jax.tree.map(_tree.on_device, params)
    parts = [sum_and_count(params, _on_device(batch)) for batch in batches]
    parts = jax.device_get(parts)
    count = sum(int(n) for _, n in parts)
    if not count:
      raise ValueError(
          'There was no example to score: no batch, or all of them masked. An '
          'iterator is used up after one walk: pass a list.'
      )
    return float(sum(float(s) for s, _ in parts) / count)

  return eval_fn


def sum_and_count_of(
    metric_fn: Callable[[Params, Batch], jax.Array],
) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
  """What `mean_of` runs on each batch: the compiled evaluation step.

  Args:
    metric_fn: as in `mean_of`.

  Returns:
    `fn(params, batch) -> (sum of the metric, number of examples)`, jitted.
  """

  @jax.jit
  def sum_and_count(params, batch):
    values = metric_fn(params, batch)
    if values.ndim != 1:
      raise ValueError(
          f'metric_fn returned shape {values.shape}: expected [B], one number '
          'an example, which mean_of averages. For a metric of the whole set '
          'use evaluation.score_of.'
      )
    mask = batch.get('mask', jnp.ones(values.shape, bool))
    return jnp.where(mask, values.astype(jnp.float32), 0).sum(), mask.sum()

  return sum_and_count


def logits_of(
    logits_fn: Callable[[Params, Batch], jax.Array], batches: Iterable[Batch]
) -> Callable[[Params], np.ndarray]:
  """The outputs of a model on all examples: run once, then score at will.

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
      logits = np.asarray(jax.device_get(compiled(params, _on_device(batch))))
      mask = batch.get('mask')
      keep = slice(None) if mask is None else np.asarray(jax.device_get(mask))
      rows.append(logits[keep])
    if not rows:
      raise ValueError(
          'There was no batch: an iterator is used up by one walk.'
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
