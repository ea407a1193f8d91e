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
from jaxsoup import ensembles
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
  """The recipes by name, each a function that makes its soup.

  Args:
    config: the experiment: `batch_size`, `learned` with `learning_rate`,
      `num_epochs`, `batch_size`, `val_fraction`, `patience`; and `recipes`, the
      names of those that are wanted, all if there is no such field.
    model: whose parameters these are.
    ingredients: the fine-tuned parameters.
    theta_0: what they were fine-tuned from.
    held_out: the data that choose.
    scores: the score log of the searches.
    sharding: how a batch lies on a mesh.
    prepare_fn: what the searches do to a soup before they score it: one of
      `statistics_fns`.

  Returns:
    Functions without arguments, which return a `Soup`: the plain mixture.

  Raises:
    UsageError: `config.recipes` has an unknown name.
  """
  eval_fn = score_fn(config, model.logits_fn, held_out, sharding)
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

  def prepared_fn(params):
    return eval_fn(prepare_fn(params))

  def at_least(params, bar, *, strict=False):
    return early_fn(prepare_fn(params), bar, strict=strict)

  early_fn: Any = getattr(eval_fn, 'at_least', None)
  if early_fn is not None:
    prepared_fn.at_least = at_least  # type: ignore[attr-defined]
  return prepared_fn


def statistics_fns(
    config: ml_collections.ConfigDict,
    model: modeling.Model,
    runs: Sequence[steps.Run],
    train: sources.Source,
    best_fn: Callable[[], Any],
    checked_fn: Callable[[Any], Any] = iter,
) -> dict[str, ParamsFn]:
  """The ways to give a soup the running statistics of BatchNorm.

  averaged: with the coefficients of the soup, as all other parameters
  first: those of the best single model
  re-estimated: of training batches, see `jaxsoup.models.batch_norm`

  Args:
    config: the experiment: `batch_norm`, the way that the searches take,
      'averaged' if there is no such field; `num_batch_norm_batches`, how many
      batches re-estimate, at most 100 if there is none.
    model: whose parameters these are.
    runs: of the ingredients: batches are augmented as theirs were.
    train: the training data.
    best_fn: returns the parameters of the best single model.
    checked_fn: as in `loop.probe`.

  Returns:
    Functions of parameters, by name, that of the searches first. Empty without
    running statistics.

  Raises:
    UsageError: `config.batch_norm` is not one of them.
  """
  recalibrate_fn, best_fn = model.recalibrate_fn, functools.cache(best_fn)
  if recalibrate_fn is None:
    return {}

  def first(params):
    is_kept = steps.is_trained(model, params)
    take = lambda is_kept, x, y: x if is_kept else y
    return jax.tree.map(take, is_kept, params, best_fn())

  def estimated(params):
    batches = loop.augmented_batches(
        model, config.finetune, runs, train, seed=config.seed
    )
    num_batches = config.get('num_batch_norm_batches', 100)
    batches = itertools.islice(batches, num_batches)
    return recalibrate_fn(params, checked_fn(batches))

  averaged = lambda params: params
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
  """

  def __init__(self, source: Any, size: int, sharding: NamedSharding | None):
    self.size = evaluation.divided(size, sharding)
    self.sharding, self._source = sharding, source
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
    if self.sharding is None:
      return jax.device_put(dict(batch))
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
  """The batches of an evaluation: on the device where they fit, else read.

  Args:
    source: of examples.
    batch_size: of a batch, the last one padded.
    sharding: how a batch lies on a mesh.

  Returns:
    A list of batches on the device, if those take at most a fifth of what is
    free there; else `Batches`.
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
    config: ml_collections.ConfigDict,
    logits_fn: LogitsFn,
    data: sources.Source,
    sharding: NamedSharding | None = None,
) -> EvalFn:
  """The `eval_fn` of the searches.

  Args:
    config: `select_by` is 'metric' (the default), or 'nll': minus the negative
      log-likelihood, which says more where the held-out set is small.
    logits_fn: `logits_fn(params, batch) -> [B, C]`.
    data: the held-out set.
    sharding: how a batch lies on a mesh.

  Returns:
    A function of the parameters; higher is better. Of accuracy it rejects
    early.
  """
  batches = batches_of(data, config.batch_size, sharding)
  return score_of_batches(config, logits_fn, batches)


def score_of_batches(
    config: ml_collections.ConfigDict, logits_fn: LogitsFn, batches: BatchesOf
) -> Any:
  """The same, of batches that are there; its `step` is what is compiled."""
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
    return float(
        np.mean(np.asarray(metrics.correct(logits, label)), dtype=float)
    )
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
) -> tuple['Rows', 'Rows']:
  """Two parts of the held-out set, in batches: to learn, and to stop early.

  Both in batches of `learned.batch_size`; a part that fills none is one batch.
  What is left over is not used.

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

  return (
      Rows(held_out, order[num_val:], size, sharding),
      Rows(held_out, order[:num_val], size, sharding),
  )


class Rows(Batches):
  """Batches of some rows of a source, all of one size and without a mask.

  A batch that the mesh does not divide is on every device.
  """

  def __init__(
      self,
      source: sources.Source,
      rows: np.ndarray,
      size: int,
      sharding: NamedSharding | None,
  ):
    size = min(size, len(rows))
    if sharding is not None and evaluation.divided(size, sharding) > size:
      sharding = NamedSharding(sharding.mesh, PartitionSpec())
    rows = rows[: len(rows) // size * size]
    # Not `subset`, for which rows of a stream have to ascend.
    super().__init__(sources.Subset(source, rows), size, sharding)

  def _placed(self, batch: sources.Batch) -> dict[str, jax.Array]:
    return super()._placed({k: x for k, x in batch.items() if k != 'mask'})


def ensemble_alphas(
    config: ml_collections.ConfigDict, logits: np.ndarray, label: np.ndarray
) -> dict[str, np.ndarray]:
  """The baselines: ensembles of all models, and of those greedy takes.

  Args:
    config: of the experiment: what greedy selects by.
    logits: held-out logits `[K, N, C]`.
    label: `[N]`.

  Returns:
    By name: the coefficient of each model, `[K]`.
  """
  score = lambda x: selection_score(config, x, label)
  return {
      'ensemble': ensembles.uniform(logits).alpha,
      'greedy ensemble': ensembles.greedy(logits, score).alpha,
  }
