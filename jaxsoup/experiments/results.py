"""From fine-tuned runs to soups, tables and pictures.

```
rows = results.make(work, theta_0)
```
"""

from collections.abc import Mapping
import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

import jaxsoup
from jaxsoup import _files
from jaxsoup import _json
from jaxsoup import _processes
from jaxsoup import checkpoints
from jaxsoup import evaluation
from jaxsoup import metrics
from jaxsoup import report
from jaxsoup import statistics
from jaxsoup.data import sources
from jaxsoup.experiments import cook
from jaxsoup.experiments import landscapes
from jaxsoup.experiments import stages
from jaxsoup.experiments import workdirs
from jaxsoup.typing import Json
from jaxsoup.typing import MetricFn
from jaxsoup.typing import Params


class Models(NamedTuple):
  """What is compared: all that the rows of a table need.

  Attributes:
    logits: by kind and name of a model: `[N, C]` by data set.
    beta: the temperature of those that have one.
    cost: forward passes for one prediction, of those that need several.
  """

  logits: dict[tuple[str, str], dict[str, np.ndarray]]
  beta: dict[str, float]
  cost: dict[str, int]


class Split(NamedTuple):
  """One way to divide examples into those that select and those that report.

  Attributes:
    folder: of its soups and scores.
    held_out: the examples that select.
    select: rows of 'held_out' followed by 'test' that select.
    report: rows of those that report.
  """

  folder: pathlib.Path
  held_out: sources.Source
  select: np.ndarray
  report: np.ndarray

  def of(self, arrays: Mapping[str, np.ndarray], axis: int = 0):
    """Logits or labels by data set, as this split has them."""
    pool = np.concatenate([arrays['held_out'], arrays['test']], axis=axis)
    return {
        **arrays,
        'held_out': pool.take(self.select, axis),
        'test': pool.take(self.report, axis),
    }


def make(work: workdirs.Work, theta_0: Params) -> list[report.Row]:
  """Makes every soup, writes tables and pictures.

  Args:
    work: the experiment, all runs of which are finished.
    theta_0: the start of the runs.

  Returns:
    A row a model; means over the splits, where there are several.
  """
  ingredients = stages.ingredients(work, theta_0)
  logits = stages.all_logits(work, ingredients.__getitem__)
  labels = work.labels
  tables: list[list[report.Row]] = []
  first: Json = {}
  around: Json = {}
  calibration: Json = {}
  all_splits = splits(work)
  for i, split in enumerate(all_splits):
    scores = _scores(work, split, logits)
    best_fn = functools.partial(ingredients.__getitem__, int(np.argmax(scores)))
    fns = _statistics_fns(work, best_fn)
    part = (i, len(all_splits))
    soups = _soups(work, ingredients, theta_0, split, scores, fns, part)
    first = first or soups
    around = around or {
        'scores': scores,
        'prepare_fn': next(iter(fns.values()), None),
    }
    models = _models(work, ingredients, soups, logits, split, labels)
    if fns:
      # What the statistics do by themselves, without any averaging.
      params = fns['re-estimated'](best_fn())
      name = 'best single, re-estimated'
      models.logits['soup', name] = split.of(work.logits(params))
    tables.append(_rows(work, models, split.of(labels)))
    calibration = calibration or _calibration(work, models, split, tables[0])
  work.progress_fn('reporting', 0.0)
  stable = {
      'greedy': stability(
          work, ingredients, all_splits[0], logits, around['prepare_fn']
      ),
      'greedy ensemble': stability_of_ensemble(work, all_splits[0], logits),
  }
  if _processes.is_main():
    _write(work, tables, first, calibration, stable)
  landscapes.make(work, theta_0, first, **around)
  return report.averaged(tables)[0]


def splits(work: workdirs.Work) -> list[Split]:
  """The split of the data, and further ones at random: `config.num_splits`.

  All have as many examples that select. The runs stay what they are: none was
  trained on any of these examples.
  """
  held_out, test = work.splits.held_out, work.splits.test
  num_select, num = len(held_out), len(held_out) + len(test)
  number = work.config.get('num_splits', 1)
  first = np.arange(num)
  drawn = [
      Split(work.workdir, held_out, first[:num_select], first[num_select:])
  ]
  if number == 1:
    return drawn
  pool = {
      name: np.concatenate([x, sources.in_memory(test).arrays[name]])
      for name, x in sources.in_memory(held_out).arrays.items()
  }
  for i in range(1, number):
    rng = np.random.default_rng([work.config.seed, i, *b'split'])
    order = rng.permutation(num)
    select, rest = np.sort(order[:num_select]), np.sort(order[num_select:])
    part = sources.Arrays({name: x[select] for name, x in pool.items()})
    drawn.append(Split(work.workdir, part, select, rest))
  return [
      split._replace(folder=work.workdir / 'splits' / str(i))
      for i, split in enumerate(drawn)
  ]


def stability(work, ingredients, split, logits, prepare_fn) -> Json:
  """How far greedy's choice depends on the held-out examples.

  Args:
    work: the experiment; `config.stability.greedy` says how often the held-out
      set is resampled: 0, or no such field, leaves it out. Each soup that no
      search met before is evaluated.
    ingredients: the fine-tuned runs.
    split: whose held-out set it is.
    logits: `[K, N, C]` by data set.
    prepare_fn: gives a soup its running statistics; None without any.

  Returns:
    Fields of `jaxsoup.statistics.Stability`, as lists; empty if left out.
  """
  num_resamples = work.config.get('stability', {}).get('greedy', 0)
  if not num_resamples:
    return {}
  run = evaluation.logits_of(
      work.model.logits_fn,
      cook.batches_of(
          split.held_out, work.config.batch_size, workdirs.on(work.config)
      ),
  )

  def values_fn(members):
    if len(members) == 1:
      return singles[members[0]]
    params = jaxsoup.uniform([ingredients[k] for k in members]).params
    return run(prepare_fn(params) if prepare_fn else params)

  singles = split.of(logits, axis=1)['held_out']
  return _stability(work, split, values_fn, len(singles), num_resamples)


def stability_of_ensemble(work, split, logits) -> Json:
  """The same for the greedy ensemble, from the logits alone.

  Args:
    work: the experiment; `config.stability.greedy_ensemble` says how often.
    split: whose held-out set it is.
    logits: `[K, N, C]` by data set.

  Returns:
    As `stability`.
  """
  num_resamples = work.config.get('stability', {}).get('greedy_ensemble', 0)
  if not num_resamples:
    return {}
  singles = np.asarray(split.of(logits, axis=1)['held_out'], np.float32)
  mean_fn = lambda members: singles[list(members)].mean(0)
  return _stability(work, split, mean_fn, len(singles), num_resamples)


def _stability(work, split, logits_fn, num, num_resamples) -> Json:
  """Stability by `logits_fn` of members; {} if the score is not a mean."""
  label = split.of(work.labels)['held_out']
  of_logits: MetricFn = metrics.correct
  if work.config.get('select_by', 'metric') == 'nll':
    of_logits = metrics.log_likelihood
  elif work.config.get('metric', 'accuracy') != 'accuracy':
    return {}
  stable = statistics.stability(
      lambda members: of_logits(jnp.asarray(logits_fn(members)), label),
      num,
      num_resamples=num_resamples,
      seed=work.config.seed,
  )
  return _json.plain(stable._asdict())


def _scores(work, split, logits) -> list[float]:
  """The score of each single model on the examples that select."""
  label = split.of(work.labels)['held_out']
  singles = split.of(logits, axis=1)['held_out']
  return [cook.selection_score(work.config, x, label) for x in singles]


def _statistics_fns(work, best_fn) -> dict[str, cook.ParamsFn]:
  """The ways to give a soup running statistics; batches as all copies saw."""
  return cook.statistics_fns(
      work.config,
      work.model,
      [work.experiment.runs[i] for i, _, _ in work.copies()],
      work.splits.train,
      best_fn,
  )


def _soups(work, ingredients, theta_0, split, singles, fns, part):
  """Soups by name; of a model with running statistics each in three ways."""
  config = work.config
  scores = checkpoints.ScoreLog(split.folder / 'scores.jsonl', ingredients)
  way = next(iter(fns), '')
  for k, score in enumerate(singles):
    # Soups with new statistics are compared with models that have such, too.
    if (k,) not in scores and way != 're-estimated':
      scores[(k,)] = score
  recipes = cook.recipes(
      config,
      work.model,
      ingredients,
      theta_0,
      split.held_out,
      scores,
      workdirs.on(config),
      prepare_fn=fns.get(way),
  )
  soups = {}
  for i, (recipe_name, recipe) in enumerate(recipes.items()):
    work.progress_fn('souping', (part[0] + i / len(recipes)) / part[1])
    work.stop.check(
        f'{work.workdir} holds all runs, and {i} of {len(recipes)} soups'
    )
    mixture = functools.cache(recipe)
    for way, fn in (fns or {'': lambda params: params}).items():
      name = f'{recipe_name}, {way}' if way else recipe_name
      stem = name.replace(',', '').replace(' ', '_').lower()
      path = split.folder / 'soups' / stem
      if not _processes.agreed(path.exists()):
        soup = mixture()
        metadata = {'recipe': recipe_name, 'seed': config.seed}
        checkpoints.save(
            path,
            dataclasses.replace(soup, params=fn(soup.params)),
            ingredients=ingredients,
            metadata=metadata | ({'batch_norm': way} if way else {}),
        )
      soups[name] = checkpoints.load(path, workdirs.abstract(config, theta_0))
  return soups


def _models(work, ingredients, soups, logits, split, labels) -> Models:
  """The logits of all that is compared, as this split has them."""
  mine = split.of(logits, axis=1)
  models = Models({}, {}, {})
  for k, path in enumerate(ingredients.paths):
    name = pathlib.Path(path).name
    models.logits['single', name] = {d: x[k] for d, x in mine.items()}
  for name, soup in soups.items():
    models.logits['soup', name] = split.of(work.logits(soup.params))
    models.beta[name] = getattr(soup.info, 'beta', 1.0)
  made = cook.ensemble_logits(work.config, mine, split.of(labels))
  for name, (of_ensemble, cost) in made.items():
    models.logits['ensemble', name] = of_ensemble
    models.cost[name] = cost
  return models


def _calibration(work, models: Models, split, rows) -> Json:
  """Reliability on test data: of the best single, soups and ensembles."""
  view = work.splits.views.get('test', lambda x: x)
  label = split.of(work.labels)['test']
  best = report.best_single(rows)
  curves = {}
  for i, ((kind, name), logits) in enumerate(models.logits.items()):
    if kind != 'single' or i == best:
      scaled = np.float32(models.beta.get(name, 1.0)) * view(logits['test'])
      curve = metrics.reliability(scaled, label)
      key = name if kind != 'single' else 'best single'
      curves[key] = {k: x.tolist() for k, x in curve._asdict().items()}
  return curves


def _rows(work, models: Models, labels) -> list[report.Row]:
  """A row a model, with the gain over the best single model and how sure it is.

  What is resampled for that are the examples of this split.
  """
  views = work.splits.views
  logits = [
      {d: views.get(d, lambda x: x)(x) for d, x in of_model.items()}
      for of_model in models.logits.values()
  ]
  name_of_metric = work.config.get('metric', 'accuracy')
  rows = [
      cook.row(
          name,
          kind,
          of_model,
          labels,
          metric=name_of_metric,
          beta=models.beta.get(name, 1.0),
          cost=models.cost.get(name, 1),
      )._replace(shares=shares(work))
      for (kind, name), of_model in zip(models.logits, logits)
  ]
  metric = cook.METRICS[name_of_metric]
  if name_of_metric == 'accuracy':
    metric = metrics.correct  # Answers one by one: the exact test is of those.
  return report.with_gains(rows, logits, labels, metric=metric)


def shares(work: workdirs.Work) -> dict[str, float]:
  """The share of its pool that each set is: what seeds have in common."""
  share = {
      name: len(source) / work.splits.pools.get(name, len(source))
      for name, source in work.data.items()
  }
  shifts = [share.pop(name) for name in work.splits.shifts]
  return share | ({'shifts': max(shifts)} if shifts else {})


def roles(work: workdirs.Work) -> dict[str, dict[str, int]]:
  """The data sets of each role, and how many examples they have."""
  shifts = {name: len(x) for name, x in work.splits.shifts.items()}
  if len(shifts) > 4:
    shifts = {f'{len(shifts)} shifts': sum(shifts.values())}
  held_out = {'held-out': len(work.splits.held_out)}
  return {
      'trained': {'train': len(work.splits.train)},
      'selected and tuned': held_out,
      'reported': {'test': len(work.splits.test), **shifts},
  }


def record(work: workdirs.Work) -> Json:
  """Which examples these were: numbers, contents in memory, and rules."""
  entries: Json = {}
  for name, source in {'train': work.splits.train, **work.data}.items():
    entries[name] = {'num': len(source)}
    if hasattr(source, 'arrays'):
      digest = hashlib.sha256()
      for field in sorted(source.arrays):
        digest.update(np.ascontiguousarray(source.arrays[field]).tobytes())
      entries[name]['sha256'] = digest.hexdigest()
    if name in work.splits.rules:
      entries[name]['rule'] = work.splits.rules[name]
  return entries


def _write(work, tables, soups, calibration, stable) -> None:
  workdir = work.workdir
  rows = report.averaged(tables)[0]
  report.save(
      lambda ax: report.scatter(ax, rows),
      workdir / 'test_against_shifts.png',
      size=(7.2, 4.2),
  )
  searches: Json = {}
  for name, soup in soups.items():
    if (recipe := name.partition(',')[0]) in ('greedy', 'pruned'):
      searches.setdefault(recipe, soup.info)
  if searches:
    report.save(
        lambda ax: report.trials(ax, searches),
        workdir / 'trials.png',
    )
  means, deviations = report.averaged(
      [report.summary(table) for table in tables]
  )
  (workdir / 'table.md').write_text(
      report.markdown(
          means,
          deviations if len(tables) > 1 else None,
          sets=roles(work),
      )
      + '\n'
  )
  content = {
      'config': json.loads((workdir / 'config.json').read_text()),
      'runs': list(work.experiment.runs),
      'diverged': work.diverged(),
      'data': record(work),
      'rows': [row._asdict() for row in rows],
      'alpha': {
          name: soup.alpha.tolist()
          for name, soup in soups.items()
          if isinstance(soup.alpha, np.ndarray)
      },
      'roles': roles(work),
      'calibration': calibration,
  }
  content['stability'] = {name: x for name, x in stable.items() if x}
  if len(tables) > 1:
    content['splits'] = [[r._asdict() for r in table] for table in tables]
  with _files.replaced(workdir / 'results.json') as unfinished:
    unfinished.write_text(json.dumps(_json.sealed(content), indent=1))
