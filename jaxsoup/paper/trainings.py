"""The experiments of the paper that train other pools than the sweep.

```
figures, draw = trainings.EXPERIMENTS[4].study(bench)     # a `pools.Bench`
```

They differ from the sweep in their starts, data, rates or losses.
`configs/digits.py` has all that they need.
"""

import collections
from collections.abc import Sequence
import functools
from typing import Any

import numpy as np

import jaxsoup
from jaxsoup import landscape
from jaxsoup import report
from jaxsoup import studies
from jaxsoup import trajectory
from jaxsoup.paper import pools
from jaxsoup.paper import sweeps
from jaxsoup.typing import Params


def _compared(
    prefix: str, singles: Sequence[pools.Scores], soup: pools.Scores
) -> sweeps.Figures:
  """Some models and their soup."""
  best = max(singles, key=lambda scores: scores.held_out)
  return {
      f'{prefix}: best single': best.row,
      f'{prefix}: mean of singles': pools.mean_scores(singles).row,
      f'{prefix}: uniform soup': soup.row,
  }


def _first(prefix: str, pool: pools.Pool) -> sweeps.Figures:
  """As many models of a pool as the larger ones have, and their soup."""
  num = pools.NUM_RUNS
  return _compared(prefix, pool.singles[:num], pool.soup(range(num)))


def _lines(
    pool: pools.Pool, num: int | None = None
) -> dict[Any, landscape.Path]:
  """The test error between neighbours."""
  sets, members = pool.sets('test'), pool.neighbours(num)
  error_fn = lambda params: 1 - sets.score_of(params)
  return landscape.lines(error_fn, pool.models, members, 11, is_traced=False)


_draw_lines = functools.partial(
    report.lines, label='test error (points)', scale=100
)


def basin(bench: pools.Bench) -> sweeps.Result:
  """The barrier between two runs at each learning rate."""
  pool = bench['rates']
  paths = _lines(pool)
  values = {pair: pool.runs[pair[0]]['learning_rate'] for pair in paths}
  figures = {
      f'rate {values[pair]:.2g}': {
          'barrier, points': 100 * landscape.barrier(path),
          'error of the two, points': 100 * float(path.loss[[0, -1]].mean()),
      }
      for pair, path in paths.items()
  }
  return figures, functools.partial(_draw_lines, paths=paths, values=values)


def one_varied(bench: pools.Bench) -> sweeps.Result:
  """Soups of runs that differ in one hyper-parameter."""
  pool = bench['one_factor']
  figures: sweeps.Figures = collections.defaultdict(dict)
  for where in sweeps.WHERE:
    groups = studies.one_varied(
        pool.runs, sweeps.field(pool.soup, where), ignore=()
    )
    for group in groups:
      for what in ('best', 'mean', 'soup'):
        row = figures[f'{group.name} varies: {what}']
        row[f'{where}, %'] = getattr(group, what)
  return figures, functools.partial(
      report.varied, groups=groups, label='shifts, %', scale=1
  )


def breadth(bench: pools.Bench) -> sweeps.Result:
  """The same sweep from a start that saw few examples."""
  figures: sweeps.Figures = {}
  for name, prefix in (('sweep', 'broad'), ('narrow', 'narrow')):
    pool = bench[name]
    soup = pool.soup(range(len(pool)))
    figures |= _compared(prefix, pool.singles, soup)
    greedy = pool.greedy().info.accepted
    figures[f'{prefix}: greedy soup'] = pool.soup(greedy).row
  return figures, None


def scratch(bench: pools.Bench) -> sweeps.Result:
  """Runs from random parameters: one start for all, and a start for each."""
  figures: sweeps.Figures = {}
  paths = {}
  for name, words in (
      ('sweep', 'pre-trained'),
      ('scratch_shared', 'one random start'),
      ('scratch_apart', 'a start for each'),
  ):
    pool = bench[name]
    lines = list(_lines(pool, pools.NUM_RUNS).values())
    paths[words] = lines[0]
    _, mean, soup = _first(words, pool).values()
    barriers = [100 * landscape.barrier(path) for path in lines]
    figures[words] = {
        'barrier, points': float(np.mean(barriers)),
        'mean of singles, %': mean['test, %'],
        'uniform soup, %': soup['test, %'],
    }
  return figures, functools.partial(_draw_lines, paths=paths)


def averages(bench: pools.Bench) -> sweeps.Result:
  """Soups of moving averages and of means over late epochs.

  Of runs whose rate falls to zero, and of runs at a constant rate: a rate that
  falls averages, too.
  """
  falling = _averages(bench['averaged'], 'falling rate')
  return falling | _averages(bench['averaged_constant'], 'constant rate'), None


def _averages(pool: pools.Pool, rate: str) -> sweeps.Figures:
  names = pool.names
  of = lambda text: [k for k, name in enumerate(names) if text in name]
  last = [k for k, name in enumerate(names) if '_' not in name]
  swa = [
      jaxsoup.uniform(
          [pool.models[k] for k in [*of(f'{names[i]}_step'), i]]
      ).params
      for i in last
  ]
  figures: sweeps.Figures = {}
  for name, members in (('last', last), ('EMA', of('_ema'))):
    singles = [pool.singles[k] for k in members]
    figures |= _compared(f'{rate}, {name}', singles, pool.soup(members))
  soup = pool.of(jaxsoup.uniform(swa).params)
  return figures | _compared(f'{rate}, SWA', list(map(pool.of, swa)), soup)


# Names of averages that are souped over runs as well.
_LAST, _LATE, _WSM = 'last iterate', 'mean of the second half', 'WSM, 1-sqrt'


def along_a_run(bench: pools.Bench) -> sweeps.Result:
  """Averages along runs with a constant rate, against a rate that falls."""
  pool, decayed = bench['constant'], bench['decayed']
  steps, runs = pool.kept()
  by_run = [_along(pool, steps, models) for models in runs]
  figures: sweeps.Figures = {
      'decayed rate': pools.mean_scores(decayed.singles).row
  }
  for name in by_run[0]:
    scores = [pool.of(averages[name]) for averages in by_run]
    figures[name] = pools.mean_scores(scores).row
  figures['soup of: decayed rate'] = decayed.soup(range(len(decayed))).row
  for name in (_LAST, _LATE, _WSM):
    soup = jaxsoup.uniform([averages[name] for averages in by_run])
    figures[f'soup of: {name}'] = pool.of(soup.params).row
  for base in (_LAST, 'decayed rate'):
    for row in figures.values():
      for where in sweeps.WHERE:
        gain = row[f'{where}, %'] - figures[base][f'{where}, %']
        row[f'{where} minus {base}, points'] = gain
  size, score = 5, lambda params: 100 * float(pool.eval_fn(params))
  drawn = {
      'iterate': (steps, list(map(score, runs[0]))),
      f'mean of {size}': (
          steps[size - 1 :],
          [score(soup.params) for soup in trajectory.sliding(runs[0], size)],
      ),
  }
  return figures, functools.partial(report.by_step, scores=drawn)


def _along(pool: pools.Pool, steps: np.ndarray, models: list[Params]):
  """Averages of the checkpoints of one run, by name."""
  last, half = steps[-1], trajectory.window(steps, start=steps[-1] // 2)
  of_last = lambda num: trajectory.window(steps, last=num)
  alphas = {
      _LAST: trajectory.swa(steps, where=of_last(1)),
      'mean of the last 2': trajectory.swa(steps, where=of_last(2)),
      'mean of the last 5': trajectory.swa(steps, where=of_last(5)),
      _LATE: trajectory.swa(steps, where=half),
      'mean of all': trajectory.swa(steps),
      _WSM: trajectory.decay(steps, '1-sqrt', where=half),
      'WSM, linear': trajectory.decay(steps, 'linear', where=half),
      'WSM, cosine': trajectory.decay(steps, 'cosine', where=half),
      **{
          f'EMA, half-life {share:.0%} of the run': trajectory.ema(
              steps, decay=0.5 ** (1 / (share * last))
          )
          for share in (0.05, 0.2)
      },
  }
  averages = {
      name: jaxsoup.average(models, alpha).params
      for name, alpha in alphas.items()
  }
  late = [model for model, is_late in zip(models, half) if is_late]
  return averages | {
      'post-hoc EMA, length by held-out': _post_hoc(pool, models),
      'greedy over the second half': jaxsoup.greedy(late, pool.eval_fn).params,
  }


def _post_hoc(pool: pools.Pool, models: list[Params]) -> Params:
  """From two EMAs that are stored now and then, the best of several lengths."""
  stored = {}
  for length in (0.05, 0.1):
    average = jaxsoup.running_average(trajectory.power_decay(length))
    state = average.init(models[0])
    for num, model in enumerate(models, 1):
      state = average.update(state, model)
      if num % 5 == 0:
        stored[num, length] = average.value(state)
  nums, lengths = zip(*stored)
  alpha_of = functools.partial(
      trajectory.post_hoc_ema, nums, lengths, step=len(models)
  )
  averages = [
      jaxsoup.average(list(stored.values()), alpha_of(length=length)).params
      for length in (0.05, 0.1, 0.15, 0.2, 0.25)
  ]
  return max(averages, key=pool.eval_fn)


def sharpness_aware(bench: pools.Bench) -> sweeps.Result:
  """Runs with and without SAM, and soups of both."""
  plain, sharp = bench['sweep'], bench['sam']
  half = pools.NUM_RUNS // 2
  both = plain.models[:half] + sharp.models[half : 2 * half]
  soup = plain.of(jaxsoup.uniform(both).params).row
  figures = _first('plain', plain) | _first('SAM', sharp)
  return figures | {'half of each: uniform soup': soup}, None


def distillation(bench: pools.Bench) -> sweeps.Result:
  """The ensemble in one model, against the soup."""
  pool, factor = bench['sweep'], bench['one_factor']
  # The others have the seed 0.
  of_labels = [x for x, run in zip(factor.singles, factor.runs) if run['seed']]
  scores = {
      'taught by labels': pools.mean_scores(of_labels),
      'taught by the ensemble': pools.mean_scores(bench['distilled'].singles),
      'uniform soup': pool.soup(range(len(pool))),
      'ensemble': pool.ensemble(range(len(pool))),
  }
  return {name: x.row for name, x in scores.items()}, None


def data_sets(bench: pools.Bench) -> sweeps.Result:
  """Models of several data sets under one frozen head, and their soup."""
  pool = bench['sweep']
  names = {
      'their data sets, %': pools.DATA_SETS,
      'elsewhere, %': pool.work.splits.shifts.keys() - pools.DATA_SETS,
  }

  def row(params):
    scores = pool.by_set(pool.work.logits(params))
    return {
        column: float(np.mean([x for name, x in scores.items() if name in of]))
        for column, of in names.items()
    }

  models = {name: bench[f'on_{name}'].models[0] for name in pools.DATA_SETS}
  return {
      'start': row(pool.theta_0),
      **{f'on {name}': row(params) for name, params in models.items()},
      'soup': row(jaxsoup.uniform(list(models.values())).params),
  }, None


def heads(bench: pools.Bench) -> sweeps.Result:
  """The head of the start, a probed one, a random one."""
  figures = _first('head of the start', bench['sweep'])
  figures |= _first('linear probe', bench['probed'])
  return figures | _first('random head', bench['random_head']), None


_FACTORS = tuple(f'sweep.{name}' for name in pools.FACTORS if name != 'seed')
_SIZE = ('data.sizes.train',)
_SHIFTS = tuple(f'shifts.{name}' for name in pools.DATA_SETS)
# By the number that they have in docs/experiments.md; those above 21 are not of
# the paper.
EXPERIMENTS = {
    4: sweeps.Experiment('learning-rate basin', basin),
    8: sweeps.Experiment('one hyper-parameter', one_varied, needs=_FACTORS),
    12: sweeps.Experiment(
        'pre-training breadth', breadth, has_dots=True, needs=('pretrain',)
    ),
    13: sweeps.Experiment('from scratch', scratch, needs=('pretrain',)),
    14: sweeps.Experiment('EMA and SWA', averages, has_dots=True, needs=_SIZE),
    15: sweeps.Experiment('SAM', sharpness_aware, has_dots=True),
    16: sweeps.Experiment(
        'distillation', distillation, has_dots=True, needs=_FACTORS
    ),
    18: sweeps.Experiment(
        'several data sets', data_sets, has_dots=True, needs=_SHIFTS + _FACTORS
    ),
    19: sweeps.Experiment('LP-FT', heads, has_dots=True, needs=('pretrain',)),
    22: sweeps.Experiment(
        'averages along a run', along_a_run, has_dots=True, needs=_SIZE
    ),
}
