"""Every recipe on one set of ingredients, and their scores.

```
recipes = cook.recipes(config, model, ingredients, theta_0, held_out, scores)
soup = recipes['greedy']()
```
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import functools
import itertools
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import ml_collections
import numpy as np
import optax

import jaxsoup
from jaxsoup import _memory
from jaxsoup import _processes
from jaxsoup import evaluation
from jaxsoup import metrics
from jaxsoup._soup import Info
from jaxsoup._soup import LearnedInfo
from jaxsoup._soup import Scores
from jaxsoup._soup import Soup
from jaxsoup.data import sources
from jaxsoup.experiments import configs
from jaxsoup.train import loop
from jaxsoup.train import modeling
from jaxsoup.train import steps
from jaxsoup.typing import Batches as BatchesOf
from jaxsoup.typing import EvalFn
from jaxsoup.typing import LogitsFn
from jaxsoup.typing import MetricFn
from jaxsoup.typing import Params
from jaxsoup.typing import ParamsFn

# The names that `config.metric` may have, and what they are.
METRICS: dict[str, MetricFn] = {
    'accuracy': metrics.accuracy,
    'f1': metrics.f1,
    'accuracy and f1': lambda logits, label: (
        metrics.accuracy(logits, label) + metrics.f1(logits, label)
    )
    / 2,
    'matthews': metrics.matthews,
}


def metric_of(config: ml_collections.ConfigDict) -> MetricFn:
  """The metric that scores a model: `config.metric`, accuracy by default."""
  return METRICS[config.get('metric', 'accuracy')]


def recipes(
    config: ml_collections.ConfigDict,
    model: modeling.Model,
    ingredients: Sequence[Params],
    theta_0: Params,
    held_out: sources.Source,
    scores: Scores | None,
    sharding: NamedSharding | None = None,
    *,
    prepare_fn: ParamsFn | None = None,
) -> dict[str, Callable[[], Soup[Info]]]:
  """The recipes by name, each a function that makes its soup, a plain mixture.

  Args:
    config: of the experiment; its `recipes` are made, all by default.
    model: whose parameters these are.
    ingredients: the fine-tuned parameters.
    theta_0: what they were fine-tuned from.
    held_out: the data that choose.
    scores: the score log of the searches.
    sharding: how a batch lies on a mesh.
    prepare_fn: of `statistics_fns`, for soups that the searches score.

  Raises:
    UsageError: `config.recipes` has an unknown name.
  """
  batches = batches_of(held_out, config.batch_size, sharding)
  eval_fn = score_fn(config, model.logits_fn, batches)
  if prepare_fn is not None:
    eval_fn = _prepared(eval_fn, prepare_fn)
  learned_fn = functools.partial(
      learned, config, model, ingredients, held_out, sharding
  )
  made: dict[str, Callable[[], Soup[Info]]] = {
      'uniform': lambda: jaxsoup.uniform(ingredients),
      'greedy': lambda: jaxsoup.greedy(ingredients, eval_fn, scores=scores),
      'pruned': lambda: jaxsoup.pruned(ingredients, eval_fn, scores=scores),
      'learned': learned_fn,
      'learned by tensor': lambda: learned_fn(group_fn=lambda path: path),
      'Model Stock': lambda: jaxsoup.model_stock(ingredients, theta_0),
  }
  wanted = config.get('recipes', tuple(made))
  if unknown := [name for name in wanted if name not in made]:
    raise configs.UsageError(
        f'config.recipes has {unknown}: choose from {list(made)}.'
    )
  return {name: made[name] for name in wanted}


def _prepared(eval_fn: EvalFn, prepare_fn: ParamsFn) -> EvalFn:
  """`eval_fn` of what `prepare_fn` returns; it still rejects early."""
  prepared_fn: Any = lambda params: eval_fn(prepare_fn(params))
  early_fn: Any = getattr(eval_fn, 'at_least', None)
  if early_fn is not None:
    prepared_fn.at_least = lambda params, *bar, **options: early_fn(
        prepare_fn(params), *bar, **options
    )
  return prepared_fn


def statistics_fns(
    config: ml_collections.ConfigDict,
    model: modeling.Model,
    runs: Sequence[steps.Run],
    train: sources.Source,
    best_fn: Callable[[], Any],
    checked_fn: Callable[[Any], Any] = iter,
) -> dict[str, ParamsFn]:
  """The ways to give a soup running statistics; none without BatchNorm.

  - 'averaged': with the coefficients of the soup, as all other parameters;
  - 'first': those of the best single model, `best_fn()`;
  - 're-estimated': of `config.num_batch_norm_batches` training batches,
    augmented as those of the runs, see `jaxsoup.models.batch_norm`.

  Returns:
    Functions of parameters, by name; first `config.batch_norm`, the way that
    the searches take.

  Raises:
    UsageError: `config.batch_norm` is not one of them.
  """
  recalibrate_fn, best_fn = model.recalibrate_fn, functools.cache(best_fn)
  if recalibrate_fn is None:
    return {}

  def estimated(params):
    batches = loop.augmented_batches(
        model, config.finetune, runs, train, seed=config.seed
    )
    num = config.get('num_batch_norm_batches', 100)
    return recalibrate_fn(params, checked_fn(itertools.islice(batches, num)))

  averaged = lambda params: params
  first = lambda params: steps.where_trained(model, params, best_fn())
  fns = {'averaged': averaged, 'first': first, 're-estimated': estimated}
  chosen = config.get('batch_norm', 'averaged')
  if chosen not in fns:
    raise configs.UsageError(
        f'config.batch_norm is {chosen!r}: choose from {", ".join(fns)}.'
    )
  return {chosen: fns.pop(chosen), **fns}


class Batches:
  """Batches of a source in order, of which each process reads its own rows.

  They stay on the host if in no process they take more than an eighth of its
  free memory, so that eight processes can share a host; else each walk reads
  them again.

  Args:
    source: of examples.
    size: of a batch, rounded up to what the mesh divides; the last one is
      padded.
    sharding: how a batch lies on a mesh; without one every process reads all.
    has_mask: whether a batch says which of its rows count.
  """

  def __init__(
      self,
      source: Any,
      size: int,
      sharding: NamedSharding | None,
      has_mask: bool = True,
  ):
    self.size = evaluation.divided(size, sharding)
    self.sharding, self._source = sharding, source
    self._left_out = () if has_mask else ('mask',)
    self._index, self._count = _part_of(sharding, self.size)
    self._kept: list[sources.Batch] = []

  def __len__(self) -> int:
    return -(-len(self._source) // self.size)

  @functools.cached_property
  def num_bytes(self) -> int:
    """Bytes of all examples, of which one is read."""
    row = self._source[np.arange(1)]
    return len(self._source) * sum(x.nbytes for x in row.values())

  @functools.cached_property
  def _is_kept(self) -> bool:
    own, free = self.num_bytes / self._count, _memory.host_free_bytes()
    return not _processes.is_any(own > free / 8)

  def __iter__(self) -> Iterator[dict[str, jax.Array]]:
    yield from map(self._placed, self._kept)
    start = len(self._kept)
    read = sources.batches(
        self._source,
        self.size,
        start=start,
        process_index=self._index,
        process_count=self._count,
    )
    # A walk that was cut short is continued.
    for step, batch in enumerate(read, start):
      if self._is_kept and step == len(self._kept):
        # Copies: batches of workers are in shared memory, of which little is.
        self._kept.append({name: np.array(x) for name, x in batch.items()})
      yield self._placed(batch)

  def _placed(self, batch: sources.Batch) -> dict[str, jax.Array]:
    batch = {k: x for k, x in batch.items() if k not in self._left_out}
    if self.sharding is None:
      return jax.device_put(batch)
    return {
        name: jax.make_array_from_process_local_data(
            self.sharding, x, (self.size, *x.shape[1:])
        )
        for name, x in batch.items()
    }


def _part_of(sharding: NamedSharding | None, size: int) -> tuple[int, int]:
  """Which of how many equal parts of a batch this process holds."""
  if sharding is None:
    return 0, 1
  # In the order of the mesh, which need not be that of the processes.
  indices: Any = sharding.addressable_devices_indices_map((size,)).values()
  edges = {rows.indices(size)[:2] for (rows,) in indices}
  first, last = min(edges)[0], max(edges)[1]
  num = last - first
  is_part = num == sum(end - start for start, end in edges)
  is_part &= size % num == 0 and first % num == 0
  return (first // num, size // num) if is_part else (0, 1)


def batches_of(
    source: sources.Source,
    batch_size: int,
    sharding: NamedSharding | None = None,
) -> Any:
  """The batches of an evaluation, the last one padded.

  A list of batches on the device, if those take at most a fifth of what is free
  there; else `Batches`.
  """
  if not hasattr(source, 'arrays'):
    read = Batches(source, batch_size, sharding)
    free = _memory.free_bytes(jax.local_devices()[0])
    if _processes.is_any(not are_kept(read.num_bytes, free)):
      return read
  data = sources.in_memory(source).arrays
  return evaluation.batched(data, batch_size, sharding=sharding)


def are_kept(num_bytes: int, free: int) -> bool:
  """Whether the batches of an evaluation stay on a device, of all examples."""
  return num_bytes <= free / 5


def score_fn(
    config: ml_collections.ConfigDict, logits_fn: LogitsFn, batches: BatchesOf
) -> Any:
  """The `eval_fn` of the searches: higher is better.

  Args:
    config: `select_by` is 'metric' (the default), or 'nll': minus the negative
      log-likelihood, which says more where the held-out set is small.
    logits_fn: `logits_fn(params, batch) -> [B, C]`.
    batches: of the held-out set.

  Returns:
    A function of the parameters. Of accuracy it rejects early; its `step` is
    what is compiled.
  """
  select_by = config.get('select_by', 'metric')
  if select_by not in ('metric', 'nll'):
    raise ValueError(
        f"config.select_by is {select_by!r}: choose 'metric' or 'nll'."
    )

  def each_fn(params, batch):
    logits, label = logits_fn(params, batch), batch['label']
    if select_by == 'metric':
      return metrics.correct(logits, label)
    return -optax.softmax_cross_entropy_with_integer_labels(logits, label)

  if select_by == 'nll' or config.get('metric', 'accuracy') == 'accuracy':
    return evaluation.mean_of(each_fn, batches)
  return evaluation.score_of(metric_of(config), logits_fn, batches)


def selection_score(
    config: ml_collections.ConfigDict, logits: np.ndarray, label: np.ndarray
) -> float:
  """What `score_fn` returns, from logits."""
  if config.get('select_by', 'metric') == 'nll':
    return -float(metrics.negative_log_likelihood(logits, label))
  if config.get('metric', 'accuracy') == 'accuracy':
    # As `mean_of` adds it up: rounded to float32, a tie would be a loss.
    right = np.asarray(metrics.correct(logits, label))
    return float(np.mean(right, dtype=float))
  return float(metric_of(config)(logits, label))


def loss_fn_of(logits_fn: LogitsFn) -> Callable[..., jax.Array]:
  """Cross-entropy of the logits times beta, for `jaxsoup.learned`."""

  def loss_fn(params, batch, beta):
    return optax.softmax_cross_entropy_with_integer_labels(
        beta * logits_fn(params, batch), batch['label']
    ).mean()

  return loss_fn


def learned(
    config: ml_collections.ConfigDict,
    model: modeling.Model,
    ingredients: Sequence[Params],
    held_out: sources.Source,
    sharding: NamedSharding | None = None,
    **options: Any,
) -> Soup[LearnedInfo]:
  """The learned soup of an experiment; options as in `jaxsoup.learned`."""
  batches, val_batches = learning_batches(config, held_out, sharding)
  return jaxsoup.learned(
      ingredients,
      loss_fn_of(model.logits_fn),
      batches,
      tx=optax.adamw(config.learned.learning_rate, weight_decay=0.0),
      num_epochs=config.learned.num_epochs,
      val_batches=val_batches,
      patience=config.learned.patience,
      **options,
  )


def learning_batches(
    config: ml_collections.ConfigDict,
    held_out: sources.Source,
    sharding: NamedSharding | None = None,
) -> tuple[Batches, Batches]:
  """Two parts of the held-out set, in batches: to learn, and to stop early.

  Both in batches of `learned.batch_size`, all of one size; a part that fills
  none is one batch, on every device if the mesh does not divide it. What is
  left over is not used.

  Raises:
    ValueError: one of them would be empty.
  """
  num = len(held_out)
  order = np.random.default_rng(config.seed).permutation(num)
  num_val = int(num * config.learned.val_fraction)
  size = config.learned.batch_size
  if num - num_val < size or not num_val:
    raise ValueError(
        f'Of {num} held-out examples, {num_val} are for early stopping and '
        f'{num - num_val} for learning in batches of {size}: one part has no '
        'batch. Use a smaller learned.batch_size, or another '
        'learned.val_fraction.'
    )

  def batches(rows):
    own, on = min(size, len(rows)), sharding
    if on is not None and evaluation.divided(own, on) > own:
      on = NamedSharding(on.mesh, PartitionSpec())
    # Not `subset`, for which rows of a stream have to ascend.
    part = sources.Subset(held_out, rows[: len(rows) // own * own])
    return Batches(part, own, on, has_mask=False)

  return batches(order[num_val:]), batches(order[:num_val])
