"""Every recipe on one set of ingredients, and how well each does.

```
soups = cook.all_recipes(ingredients, theta_0, model_fn, held_out, ...)
rows = cook.evaluate(...)
```
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import math
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

import jaxsoup
from jaxsoup import ensembles
from jaxsoup import evaluation
from jaxsoup import metrics
from jaxsoup._soup import EvalFn
from jaxsoup.report import Row

Dataset = Mapping[str, np.ndarray]
LogitsFn = Callable[[Any, jax.Array], jax.Array]


def recipes(
    config: ml_collections.ConfigDict,
    ingredients: Sequence[Any],
    theta_0: Any,
    logits_fn: LogitsFn,
    held_out: Dataset,
    scores: Any,
) -> dict[str, Callable[[], jaxsoup.Soup]]:
  """The recipes by name, each a function that makes its soup.

  Args:
    config: the experiment: `batch_size`, and `learned` with `learning_rate`,
      `num_epochs`, `batch_size`, `val_fraction`, `patience`.
    ingredients: the fine-tuned parameters.
    theta_0: what they were fine-tuned from.
    logits_fn: `logits_fn(params, image) -> [B, C]`.
    held_out: the data that choose: `image` and `label`.
    scores: the score log of the searches.

  Returns:
    Functions without arguments, which return a `Soup`.
  """
  eval_fn = accuracy_of(config, logits_fn, held_out)

  return {
      'uniform': lambda: jaxsoup.uniform(ingredients),
      'greedy': lambda: jaxsoup.greedy(ingredients, eval_fn, scores=scores),
      'pruned': lambda: jaxsoup.pruned(ingredients, eval_fn, scores=scores),
      'learned': lambda: learned(config, ingredients, logits_fn, held_out),
      'learned by tensor': lambda: learned(
          config, ingredients, logits_fn, held_out, depth=math.inf
      ),
      'Model Stock': lambda: jaxsoup.model_stock(ingredients, theta_0),
  }


def accuracy_of(
    config: ml_collections.ConfigDict, logits_fn: LogitsFn, data: Dataset
) -> EvalFn:
  """The `eval_fn` of the searches: the share of right answers on `data`."""
  return evaluation.mean_of(
      lambda params, batch: metrics.correct(
          logits_fn(params, batch['image']), batch['label']
      ),
      evaluation.batched(data, config.batch_size),
  )


def loss_fn_of(logits_fn: LogitsFn) -> Callable[..., jax.Array]:
  """Cross-entropy of the logits, times beta: what `jaxsoup.learned` wants."""

  def loss_fn(params, batch, beta):
    logits = beta * logits_fn(params, batch['image'])
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, batch['label']
    ).mean()

  return loss_fn


def learned(
    config: ml_collections.ConfigDict,
    ingredients: Sequence[Any],
    logits_fn: LogitsFn,
    held_out: Dataset,
    **options: Any,
) -> jaxsoup.Soup:
  """The learned soup of an experiment; options as in `jaxsoup.learned`."""
  batches, val_batches = learning_batches(config, held_out)
  return jaxsoup.learned(
      ingredients,
      loss_fn_of(logits_fn),
      batches,
      tx=optax.adamw(config.learned.learning_rate, weight_decay=0.0),
      num_epochs=config.learned.num_epochs,
      val_batches=val_batches,
      patience=config.learned.patience,
      **options,
  )


def learning_batches(
    config: ml_collections.ConfigDict, held_out: Dataset
) -> tuple[list[Any], list[Any]]:
  """Two parts of the held-out set, in batches: to learn on, and to stop by."""
  num = len(held_out['label'])
  order = np.random.default_rng(config.seed).permutation(num)
  num_val = int(num * config.learned.val_fraction)
  part = lambda rows: {name: x[rows] for name, x in held_out.items()}
  size = config.learned.batch_size
  full = (num - num_val) // size * size
  batches = [
      jax.device_put(part(order[num_val + i : num_val + i + size]))
      for i in range(0, full, size)
  ]
  return batches, [jax.device_put(part(order[:num_val]))]


def all_logits(
    config: ml_collections.ConfigDict,
    models: Sequence[Any],
    logits_fn: LogitsFn,
    data: Mapping[str, Dataset],
) -> dict[str, np.ndarray]:
  """Logits `[K, N, C]` of every model on every data set, each run once."""
  run = lambda params, batch: logits_fn(params, batch['image'])
  return {
      name: ensembles.collect(
          models, run, evaluation.batched(dataset, config.batch_size)
      )
      for name, dataset in data.items()
  }


def row(
    name: str,
    kind: str,
    logits: Mapping[str, np.ndarray],
    data: Mapping[str, Dataset],
    *,
    beta: float = 1.0,
    cost: float = 1,
) -> Row:
  """The scores of one model from its logits.

  Args:
    name: of the row.
    kind: of the row.
    logits: `[N, C]` by data set: 'held_out', 'test' and the shifts.
    data: the same data sets.
    beta: the temperature that multiplies the logits.
    cost: forward passes for one prediction.

  Returns:
    A `Row`.
  """
  score = {
      k: float(metrics.accuracy(x, data[k]['label'])) for k, x in logits.items()
  }
  shifts = {k: v for k, v in score.items() if k not in ('held_out', 'test')}
  scaled = np.float32(beta) * logits['test']
  label = data['test']['label']
  return Row(
      name=name,
      kind=kind,
      held_out=score['held_out'],
      test=score['test'],
      shifts=shifts,
      nll=float(metrics.negative_log_likelihood(scaled, label)),
      ece=float(metrics.expected_calibration_error(scaled, label)),
      cost=cost,
  )


def ensemble_rows(
    logits: Mapping[str, np.ndarray], data: Mapping[str, Dataset]
) -> list[Row]:
  """The baselines: ensembles of all models, and of those greedy takes.

  Args:
    logits: `[K, N, C]` by data set, as `all_logits` returns them.
    data: the same data sets.

  Returns:
    Two rows.
  """
  num_models = len(logits['held_out'])
  label = data['held_out']['label']
  alphas = {
      'ensemble': ensembles.uniform(logits['held_out']).alpha,
      'greedy ensemble': ensembles.greedy(
          logits['held_out'], lambda x: metrics.accuracy(x, label)
      ).alpha,
  }
  return [
      row(
          name,
          'ensemble',
          {k: np.asarray(jaxsoup.mix(x, alpha)) for k, x in logits.items()},
          data,
          cost=int(np.count_nonzero(alpha)) if num_models else 0,
      )
      for name, alpha in alphas.items()
  ]
