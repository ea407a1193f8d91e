"""From fine-tuned runs to soups, tables and pictures.

```
rows = results.make(work, theta_0)
```
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any
from typing import NamedTuple
import zlib

import jax.numpy as jnp
import numpy as np

import jaxsoup
from jaxsoup import _json
from jaxsoup import _processes
from jaxsoup import checkpoints
from jaxsoup import ensembles
from jaxsoup import metrics
from jaxsoup import report
from jaxsoup import statistics
from jaxsoup.data import sources
from jaxsoup.experiments import answers
from jaxsoup.experiments import configs
from jaxsoup.experiments import cook
from jaxsoup.experiments import landscapes
from jaxsoup.experiments import stages
from jaxsoup.experiments import workdirs
from jaxsoup.runtime import buckets
from jaxsoup.typing import Json
from jaxsoup.typing import Params
from jaxsoup.typing import ParamsFn

_RESULTS, _TABLE = 'results.json', 'table.md'
_SCATTER, _TRIALS = 'test_against_shifts.png', 'trials.png'


class Split(NamedTuple):
  """One way to divide examples into those that select and those that report."""

  folder: pathlib.Path  # Of its soups and scores.
  held_out: sources.Source  # The examples that select.
  # Of 'held_out' followed by 'test', those of its own 'held_out' and 'test'.
  # None: those are the sets of the data.
  rows: Mapping[str, np.ndarray] | None = None

  def of(self, arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Logits or labels by data set, as this split has them."""
    if (rows := self.rows) is None:
      return arrays

    def read_fn(name):
      if name not in rows:
        return arrays[name]
      return np.concatenate([arrays['held_out'], arrays['test']])[rows[name]]

    return workdirs.Logits(arrays, read_fn)

  def soup_path(self, name: str) -> pathlib.Path:
    stem = name.replace(',', '').replace(' ', '_').lower()
    return self.folder / 'soups' / stem


class Cooked(NamedTuple):
  """The soups of a split by name, and what they were made with."""

  scores: list[float]  # Of the K runs on the examples that select.
  best_fn: Callable[[], Params]  # Parameters of the best run.
  statistics_fns: dict[str, ParamsFn]  # Of `cook.statistics_fns`.
  soups: dict[str, jaxsoup.Soup[Any]]


class Compared(NamedTuple):
  """What is compared: kind, name and cost are those of its `report.Row`."""

  kind: str
  name: str
  logits: Mapping[str, np.ndarray]  # By data set, one at a time in memory.
  beta: float = 1.0  # The temperature.
  cost: int = 1


def finished(
    experiment: configs.Experiment, workdir: pathlib.Path
) -> list[report.Row]:
  """The rows of a workdir in which nothing is missing; else none.

  The data and the model of the experiment are not made.
  """
  content = _stored(experiment, workdir)
  if content is None or not buckets.are_whole(
      *map(workdir.joinpath, content['files'])
  ):
    return []
  config, rows = experiment.config, report.read_rows(workdir / _RESULTS)
  num_models = sum(row.kind == 'single' for row in rows)
  is_left = not _is_stable(config, content) or landscapes.missing(
      config, workdir, num_models
  )
  if _processes.agreed(bool(is_left)):
    return []
  stages.warn_of(content['diverged'])
  return rows


def _stored(experiment, workdir: pathlib.Path) -> Json | None:
  """What is in results.json, if its checksum, config and runs are right."""
  content: Json | None = None
  try:
    sealed = _json.parsed((workdir / _RESULTS).read_bytes())
    unsealed = _json.unsealed(sealed)
    config = json.loads((workdir / 'config.json').read_text())
    runs = json.loads(json.dumps(list(experiment.runs)))
    has_checksum = len(unsealed) < len(sealed)
    is_ours = unsealed['config'] == config and unsealed['runs'] == runs
    has_answers = any(x.endswith(answers.FILE) for x in unsealed['files'])
    if has_checksum and is_ours and has_answers:
      content = unsealed
  except (AttributeError, KeyError, OSError, TypeError, ValueError):
    pass  # It is made again.
  return None if _processes.is_any(content is None) else content


def make(work: workdirs.Work, theta_0: Params) -> list[report.Row]:
  """Makes every soup, writes tables and pictures; only what is missing.

  Returns:
    A row a model; means over the splits, where there are several.
  """
  ingredients = stages.ingredients(work, theta_0)
  logits = [
      work.logits_of(path, functools.partial(ingredients.__getitem__, k))
      for k, (_, _, path) in enumerate(work.copies())
  ]
  content = _stored(work.experiment, work.workdir)
  stable = content['stability'] if content else {}
  if content is not None and not buckets.are_whole(
      *map(work.workdir.joinpath, content['files'])
  ):
    content = None
  all_splits = splits(work)
  made: list[_Table] = []
  for i, split in enumerate(all_splits):
    part = (i, len(all_splits))
    cooked = _cooked(work, ingredients, theta_0, split, logits, part)
    if i == 0:
      first = cooked
    if content is not None:
      break  # All that is left to do is of the first split.
    made.append(_table(work, split, _models(work, split, cooked, logits)))
  work.progress_fn('reporting', 0.0)
  if content is None:
    content = _content(work, made, all_splits, first.soups)
    content['stability'] = stable
    if _processes.is_main():
      _write(work, content, first.soups)
      for split, table in zip(all_splits, made):
        answers.write(split.folder, table.given)
      _store(work, content)
  prepare_fn = next(iter(first.statistics_fns.values()), None)
  _add_stability(work, content, ingredients, all_splits[0], logits, prepare_fn)
  _processes.wait_for_all(f'{_RESULTS} is written')
  landscapes.make(work, theta_0, first.soups, first.scores, prepare_fn)
  return report.rows_of(content['rows'])


def splits(work: workdirs.Work) -> list[Split]:
  """The split of the data, and further ones at random: `config.num_splits`.

  All have as many examples that select. The runs stay what they are: none was
  trained on any of these examples.
  """
  held_out, test = work.splits.held_out, work.splits.test
  number = work.config.get('num_splits', 1)
  if number == 1:
    return [Split(work.workdir, held_out)]
  pool = {
      name: np.concatenate([x, sources.in_memory(test).arrays[name]])
      for name, x in sources.in_memory(held_out).arrays.items()
  }
  folder = work.workdir / 'splits'
  drawn = [Split(folder / '0', held_out)]
  for i in range(1, number):
    rng = np.random.default_rng([work.config.seed, i, *b'split'])
    order = rng.permutation(len(held_out) + len(test))
    select, rest = map(np.sort, np.split(order, [len(held_out)]))
    part = sources.Arrays({name: x[select] for name, x in pool.items()})
    rows = {'held_out': select, 'test': rest}
    drawn.append(Split(folder / str(i), part, rows))
  return drawn


def _resamples(config) -> dict[str, int]:
  """How often the held-out set is resampled, by the search.

  None of those whose score is not a mean over examples.
  """
  is_mean = config.get('metric', 'accuracy') == 'accuracy'
  if not is_mean and config.get('select_by', 'metric') != 'nll':
    return {}
  asked = config.get('stability', {})
  return {name.replace('_', ' '): n for name, n in asked.items() if n}


def _is_stable(config, content: Json) -> bool:
  """Whether the content has the stability that the config asks for."""
  known = {name: len(x['sizes']) for name, x in content['stability'].items()}
  return known == _resamples(config)


def _add_stability(
    work, content: Json, ingredients, split: Split, logits, prepare_fn
) -> None:
  """Adds how far greedy's choice depends on the held-out examples.

  As the fields of `statistics.Stability`, of as many resamples as
  `config.stability` says. Each soup that no search met before is evaluated; the
  ensembles are of the logits alone.
  """
  if _is_stable(work.config, content):
    return
  singles = np.stack([split.of(x)['held_out'] for x in logits])
  run = work.logits_fn(split.held_out)

  def of_soup(members):
    if len(members) == 1:
      return singles[members[0]]
    params = jaxsoup.uniform([ingredients[k] for k in members]).params
    return run(prepare_fn(params) if prepare_fn else params)

  def of_ensemble(members):
    return singles[list(members)].astype(np.float32).mean(0)

  label = split.of(work.labels)['held_out']
  is_nll = work.config.get('select_by', 'metric') == 'nll'
  metric = metrics.log_likelihood if is_nll else metrics.correct
  fns = {'greedy': of_soup, 'greedy ensemble': of_ensemble}

  def metric_fn(logits_fn, members):
    return metric(jnp.asarray(logits_fn(members)), label)

  asked = _resamples(work.config)
  for name, num in asked.items():
    known = content['stability'].get(name, {'sizes': ()})
    if len(known['sizes']) != num:
      made = statistics.stability(
          functools.partial(metric_fn, fns[name]),
          len(singles),
          num_resamples=num,
          seed=work.config.seed,
      )
      content['stability'][name] = _json.plain(made)
      _store(work, content)  # Each is kept when it is made.
  content['stability'] = {name: content['stability'][name] for name in asked}
  _store(work, content)


def _cooked(work, ingredients, theta_0, split, logits, part) -> Cooked:
  """Soups by name; of a model with running statistics each in three ways."""
  config, label = work.config, split.of(work.labels)['held_out']
  singles = [
      cook.selection_score(config, split.of(x)['held_out'], label)
      for x in logits
  ]
  best_fn = functools.partial(ingredients.__getitem__, int(np.argmax(singles)))
  fns = cook.statistics_fns(
      config,
      work.model,
      # Batches as all copies saw them.
      [work.experiment.runs[i] for i, _, _ in work.copies()],
      work.splits.train,
      best_fn,
      work.stopping,
  )
  chosen = next(iter(fns), '')
  soups = {}
  with buckets.local_copy(split.folder / 'scores.jsonl') as file:
    scores = checkpoints.ScoreLog(file, ingredients)
    for k, score in enumerate(singles):
      # Soups with new statistics are compared with models that have such, too.
      if (k,) not in scores and chosen != 're-estimated':
        scores[(k,)] = score
    recipes = cook.recipes(
        config,
        work.model,
        ingredients,
        theta_0,
        split.held_out,
        scores,
        workdirs.on(config),
        prepare_fn=fns.get(chosen),
    )
    for i, (recipe, mixture) in enumerate(recipes.items()):
      work.progress_fn('souping', (part[0] + i / len(recipes)) / part[1])
      work.stop.check(
          f'{work.workdir} holds all runs, and {i} of {len(recipes)} soups'
      )
      mixture = functools.cache(mixture)
      for way, fn in (fns or {'': lambda params: params}).items():
        name = f'{recipe}, {way}' if way else recipe
        path = split.soup_path(name)
        if not buckets.are_whole(path):
          soup = mixture()
          soup = dataclasses.replace(soup, params=fn(soup.params))
          metadata = {'recipe': recipe, 'seed': config.seed}
          metadata |= {'batch_norm': way} if way else {}
          checkpoints.save(
              path, soup, ingredients=ingredients, metadata=metadata
          )
        soups[name] = checkpoints.load(path, workdirs.abstract(config, theta_0))
  return Cooked(singles, best_fn, fns, soups)


def _models(work, split, cooked: Cooked, logits) -> list[Compared]:
  """All that is compared, as this split has it."""

  def soup(name, params_fn, beta=1.0):
    of_soup = work.logits_of(split.soup_path(name), params_fn)
    return Compared('soup', name, split.of(of_soup), beta)

  mine = [split.of(x) for x in logits]
  models = [
      Compared('single', path.name, x)
      for (_, _, path), x in zip(work.copies(), mine)
  ]
  models += [
      soup(name, lambda made=made: made.params, getattr(made.info, 'beta', 1.0))
      for name, made in cooked.soups.items()
  ]
  held_out = np.stack([x['held_out'] for x in mine])
  label = split.of(work.labels)['held_out']
  score = lambda x: cook.selection_score(work.config, x, label)
  alphas = {
      'ensemble': ensembles.uniform(held_out).alpha,
      'greedy ensemble': ensembles.greedy(held_out, score).alpha,
  }
  for name, alpha in alphas.items():
    mean = workdirs.Logits(mine[0], functools.partial(_mean, mine, alpha))
    cost = int(np.count_nonzero(alpha))
    models.append(Compared('ensemble', name, mean, cost=cost))
  if fns := cooked.statistics_fns:
    # What the statistics do by themselves, without any averaging.
    params_fn = lambda: fns['re-estimated'](cooked.best_fn())
    models.append(soup('best single, re-estimated', params_fn))
  return models


def _mean(logits, alpha: np.ndarray, name: str) -> np.ndarray:
  """`sum_k alpha_k logits_k` of one data set, one model at a time."""
  total = np.zeros((), np.float32)
  for a, of_model in zip(alpha, logits):
    if a:
      total = total + np.float32(a) * of_model[name].astype(np.float32)
  return total


def _scored(work, split, model: Compared):
  """A model's row, without gains, by reading each of its arrays once.

  And by data set whether each example is right, or for metrics that are not a
  mean the logits; and the reliability on test data.
  """
  metric_name = work.config.get('metric', 'accuracy')
  labels = split.of(work.labels)
  views = work.splits.views  # Of sets with their own classes.
  logits = workdirs.Logits(
      model.logits,
      lambda name: views.get(name, lambda x: x)(model.logits[name]),
  )
  scores, given = {}, {}
  for name, x in logits.items():
    label = labels[name]
    scores[name] = float(cook.METRICS[metric_name](x, label))
    given[name] = np.asarray(metrics.correct(x, label))
    if name == 'test':
      scaled = np.float32(model.beta) * x
      nll = float(metrics.negative_log_likelihood(scaled, label))
      ece = float(metrics.expected_calibration_error(scaled, label))
      curve = metrics.reliability(scaled, label)._asdict()
  row = report.Row(
      name=model.name,
      kind=model.kind,
      held_out=scores.pop('held_out'),
      test=scores.pop('test'),
      shifts=scores,
      nll=nll,
      ece=ece,
      cost=model.cost,
      metric=metric_name,
  )
  curve = {key: x.tolist() for key, x in curve.items()}
  return row, given if metric_name == 'accuracy' else logits, curve


class _Table(NamedTuple):
  """What a split has to tell."""

  rows: list[report.Row]  # With gains: what is resampled are its examples.
  calibration: dict[str, Json]  # Reliability of what a user would choose.
  given: answers.Given


def _table(work, split, models) -> _Table:
  rows, given, curves = zip(*(_scored(work, split, x) for x in models))
  best = report.best_single(rows)
  report.refuse_twice(models[best].logits)
  # Answers one by one are known: the exact test is of those.
  is_mean = rows[0].metric == 'accuracy'
  metric = None if is_mean else cook.METRICS[rows[0].metric]
  labels = split.of(work.labels)
  calibration = {
      'best single' if i == best else row.name: curve
      for i, (row, curve) in enumerate(zip(rows, curves))
      if i == best or row.kind != 'single'
  }
  answer = lambda x: x if is_mean else x.argmax(-1).astype(np.int32)
  stacked = {
      name: np.stack([answer(of_row[name]) for of_row in given])
      for name in labels
  }
  own_ids = split.of(ids(work.splits, work.config.seed))
  return _Table(
      report.with_gains(rows, given, labels, metric=metric),
      calibration,
      answers.Given(stacked, labels, own_ids),
  )


def ids(splits: sources.Splits, seed: int) -> dict[str, np.ndarray]:
  """Which examples the sets have that score the models, `[N]` by name.

  Of a set in memory by content, of a shift by that of its originals. Of a
  stream by row and name: such sets are the same for all seeds, but for those
  that are drawn, which have a rule.
  """
  by_set = {}
  sets = {'held_out': splits.held_out, 'test': splits.test, **splits.shifts}
  for name, source in (sets | dict(splits.originals)).items():
    if hasattr(source, 'arrays'):
      by_set[name] = statistics.ids_of(source)
    else:
      drawn = str(seed) if name in splits.rules else ''
      start = zlib.crc32(f'{name} {drawn}'.encode()) << 32
      by_set[name] = np.uint64(start) + np.arange(len(source), dtype=np.uint64)
  return by_set


def roles(work: workdirs.Work) -> dict[str, dict[str, int]]:
  """The data sets of each role, and how many examples they have."""
  shifts = {name: len(x) for name, x in work.splits.shifts.items()}
  if len(shifts) > 6:
    shifts = {f'{len(shifts)} shifts': sum(shifts.values())}
  return {
      'trained': {'train': len(work.splits.train)},
      'selected and tuned': {'held-out': len(work.splits.held_out)},
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


def _content(work, made: Sequence[_Table], all_splits, soups) -> Json:
  """What is in results.json, but for the stability."""
  workdir = work.workdir
  paths = [workdir / 'theta_0', *(path for _, _, path in work.copies())]
  paths += [split.soup_path(name) for split in all_splits for name in soups]
  paths += [split.folder / answers.FILE for split in all_splits]
  names = [path.relative_to(workdir).as_posix() for path in paths]
  names += [_SCATTER, *([_TRIALS] if _searches(soups) else []), _TABLE]
  by_split = [[table.given.of(table.rows)] for table in made]
  tables = [table.rows for table in made]
  as_json = lambda rows: [row._asdict() for row in rows]
  content = {
      'config': json.loads((workdir / 'config.json').read_text()),
      'runs': list(work.experiment.runs),
      'diverged': work.diverged(),
      'data': record(work),
      'rows': as_json(report.mean_rows(tables, by_split)[0]),
      'alpha': {
          name: soup.alpha.tolist()
          for name, soup in soups.items()
          if isinstance(soup.alpha, np.ndarray)
      },
      'roles': roles(work),
      'calibration': made[0].calibration,
      'files': names,
  }
  if len(tables) > 1:
    content['splits'] = [*map(as_json, tables)]
    summary = report.mean_rows([*map(report.summary, tables)], by_split)
    content['summary'] = [*map(as_json, summary)]
  return content


def _searches(soups) -> Json:
  """What the searches tried, by their names."""
  searches: Json = {}
  for name, soup in soups.items():
    if (recipe := name.partition(',')[0]) in ('greedy', 'pruned'):
      searches.setdefault(recipe, soup.info)
  return searches


def _write(work, content: Json, soups) -> None:
  """Pictures and the table; results.json comes last, and stands for all."""
  workdir = work.workdir
  rows = report.rows_of(content['rows'])
  draw = functools.partial(report.scatter, rows=rows)
  with buckets.local_copy(workdir / _SCATTER) as file:
    report.save(draw, file, size=(7.2, 4.2))
  if searches := _searches(soups):
    with buckets.local_copy(workdir / _TRIALS) as file:
      report.save(lambda ax: report.trials(ax, searches), file)
  shown = [*map(report.rows_of, content.get('summary', ()))]
  means, deviations = shown or (report.summary(rows), None)
  text = report.markdown(means, deviations, sets=content['roles'])
  if names := ', '.join(content['diverged']):
    text += f'\n\nLeft out, with NaN or infinite values: {names}.'
  (workdir / _TABLE).write_text(text + '\n')


def _store(work, content: Json) -> None:
  if _processes.is_main():
    _json.write(work.workdir / _RESULTS, _json.sealed(content))
