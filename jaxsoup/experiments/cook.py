"""Every recipe on one set of ingredients, and their scores.

```
recipes = cook.recipes(config, model, ingredients, theta_0, held_out, scores)
soup = recipes['greedy']()
```
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
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
from jaxsoup.report import Row
from jaxsoup.train import loop
from jaxsoup.train import modeling
from jaxsoup.train import steps
from jaxsoup.typing import Batches as BatchesOf
from jaxsoup.typing import EvalFn
from jaxsoup.typing import LogitsFn
from jaxsoup.typing import MetricFn
from jaxsoup.typing import Params
from jaxsoup.typing import ParamsFn

Dataset = Mapping[str, np.ndarray]

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

  made: dict[str, Callable[[], Soup[Info]]] = {
      'uniform': lambda: jaxsoup.uniform(ingredients),
      'greedy': lambda: jaxsoup.greedy(ingredients, eval_fn, scores=scores),
      'pruned': lambda: jaxsoup.pruned(ingredients, eval_fn, scores=scores),
      'learned': lambda: learned(
          config, model, ingredients, held_out, sharding
      ),
      'learned by tensor': lambda: learned(
          config,
          model,
          ingredients,
          held_out,
          sharding,
          group_fn=lambda path: path,
      ),
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
    return recalibrate_fn(params, itertools.islice(batches, num_batches))

  fns = {
      'averaged': lambda params: params,
      'first': first,
      're-estimated': estimated,
  }
  chosen = config.get('batch_norm', 'averaged')
  if chosen not in fns:
    raise configs.UsageError(
        f'config.batch_norm is {chosen!r}: choose from {", ".join(fns)}.'
    )
  return {chosen: fns.pop(chosen), **fns}


class Batches:
  """Batches of a source, read again in each pass.

  As `evaluation.batched` cuts them: of a size that the mesh divides.
  """

  def __init__(self, source, batch_size, sharding=None):
    self.size = evaluation.divided(batch_size, sharding)
    self.sharding, self._source = sharding, source

  def __len__(self) -> int:
    return -(-len(self._source) // self.size)

  def __iter__(self) -> Iterator[dict[str, jax.Array]]:
    for batch in sources.batches(self._source, self.size):
      yield {
          name: evaluation.placed(x, self.sharding) for name, x in batch.items()
      }


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
    free there; else an iterable that reads them in each walk.
  """
  if not hasattr(source, 'arrays'):
    row = source[np.arange(1)]
    size = len(source) * sum(x.nbytes for x in row.values())
    free = _memory.free_bytes(jax.local_devices()[0])
    if _processes.is_any(not are_kept(size, free)):
      return Batches(source, batch_size, sharding)
  data = sources.in_memory(source).arrays
  return evaluation.batched(data, batch_size, sharding=sharding)


def are_kept(num_bytes: int, free: int) -> bool:
  """Whether the batches of an evaluation stay on a device, of all examples."""
  return num_bytes <= free / 5


def labels_of(source: sources.Source) -> np.ndarray:
  """The labels of all examples."""
  if hasattr(source, 'arrays'):
    return source.arrays['label']
  return np.concatenate(
      [batch['label'][batch['mask']] for batch in sources.batches(source, 256)]
  )


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
  if select_by == 'nll':
    return evaluation.mean_of(
        lambda params, batch: -optax.softmax_cross_entropy_with_integer_labels(
            logits_fn(params, batch), batch['label']
        ),
        batches,
    )
  if select_by != 'metric':
    raise ValueError(
        f"config.select_by is {select_by!r}: choose 'metric' or 'nll'."
    )
  if config.get('metric', 'accuracy') == 'accuracy':
    return evaluation.mean_of(
        lambda params, batch: metrics.correct(
            logits_fn(params, batch), batch['label']
        ),
        batches,
    )
  return evaluation.score_of(metric_of(config), logits_fn, batches)


def selection_score(
    config: ml_collections.ConfigDict, logits: np.ndarray, label: np.ndarray
) -> float:
  """What `score_fn` returns, from logits."""
  if config.get('select_by', 'metric') == 'nll':
    return -float(metrics.negative_log_likelihood(logits, label))
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

  Both in batches of `learned.batch_size`, which are read when they are used; a
  part that fills none is one batch. What is left over is not used.

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


class Rows:
  """Batches of some rows of a source, all of one size, read in each pass.

  A batch that the mesh does not divide is on every device.
  """

  def __init__(
      self,
      source: sources.Source,
      rows: np.ndarray,
      size: int,
      sharding: NamedSharding | None,
  ):
    self.size = size = min(size, len(rows))
    if sharding is not None and evaluation.divided(size, sharding) > size:
      sharding = NamedSharding(sharding.mesh, PartitionSpec())
    self.sharding, self._source = sharding, source
    self._rows = rows[: len(rows) // size * size].reshape(-1, size)

  def __len__(self) -> int:
    return len(self._rows)

  def __iter__(self) -> Iterator[dict[str, jax.Array]]:
    for rows in self._rows:
      batch = self._source[rows].items()
      yield {name: evaluation.placed(x, self.sharding) for name, x in batch}


def row(
    name: str,
    kind: str,
    logits: Mapping[str, np.ndarray],
    labels: Mapping[str, np.ndarray],
    *,
    metric: str = 'accuracy',
    beta: float = 1.0,
    cost: float = 1,
) -> Row:
  """The scores of one model from its logits.

  Args:
    name: of the row.
    kind: of the row.
    logits: `[N, C]` by data set: 'held_out', 'test' and the shifts.
    labels: `[N]` by data set.
    metric: a key of `METRICS`.
    beta: the temperature that multiplies the logits.
    cost: forward passes for one prediction.

  Returns:
    A `Row`.
  """
  of_metric = METRICS[metric]
  score = {k: float(of_metric(x, labels[k])) for k, x in logits.items()}
  shifts = {k: v for k, v in score.items() if k not in ('held_out', 'test')}
  scaled = np.float32(beta) * logits['test']
  label = labels['test']
  return Row(
      name=name,
      kind=kind,
      held_out=score['held_out'],
      test=score['test'],
      shifts=shifts,
      nll=float(metrics.negative_log_likelihood(scaled, label)),
      ece=float(metrics.expected_calibration_error(scaled, label)),
      cost=cost,
      metric=metric,
  )


def ensemble_logits(
    config: ml_collections.ConfigDict,
    logits: Mapping[str, np.ndarray],
    labels: Mapping[str, np.ndarray],
) -> dict[str, tuple[dict[str, np.ndarray], int]]:
  """The baselines: ensembles of all models, and of those greedy takes.

  Args:
    config: of the experiment: what greedy selects by.
    logits: `[K, N, C]` by data set.
    labels: `[N]` by data set.

  Returns:
    By name: logits `[N, C]` by data set, and forward passes for a prediction.
  """
  score = lambda x: selection_score(config, x, labels['held_out'])
  alphas = {
      'ensemble': ensembles.uniform(logits['held_out']).alpha,
      'greedy ensemble': ensembles.greedy(logits['held_out'], score).alpha,
  }
  return {
      name: (
          {k: np.asarray(jaxsoup.mix(x, alpha)) for k, x in logits.items()},
          int(np.count_nonzero(alpha)),
      )
      for name, alpha in alphas.items()
  }
