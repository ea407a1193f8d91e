"""The experiments of the paper, each of them one function of a bench.

```
figures, draw = studies.EXPERIMENTS[4].study(bench)     # a `pools.Bench`
```

`paper.run` is the command that runs them.
"""

import collections
from collections.abc import Callable
from collections.abc import Sequence
import functools
import itertools
import json
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxsoup
from jaxsoup import landscape
from jaxsoup import metrics
from jaxsoup import report
from jaxsoup import studies
from jaxsoup import trajectory
from jaxsoup.experiments import landscapes
from jaxsoup.paper import pools
from jaxsoup.typing import Params

# Figures by row and column; those of a column with '%' are drawn.
Figures = dict[str, dict[str, float]]
_TEST, _SHIFTS = 'test, %', 'shifts, %'
_WHERE = ('test', 'shifts')
# The figures, and the picture of one seed; None where it is the figures.
Result = tuple[Figures, Callable[[Any], None] | None]


class Experiment(NamedTuple):
  """One experiment of the paper: a title, and a function that runs it."""

  title: str
  study: Callable[[pools.Bench], Result]
  has_dots: bool = False  # Its picture is its figures, of all seeds.


def _scores(scores: pools.Scores) -> dict[str, float]:
  return {_TEST: scores.test, _SHIFTS: scores.shifts}


def _compared(
    prefix: str, singles: Sequence[pools.Scores], soup: pools.Scores
) -> Figures:
  """Some models and their soup."""
  best = max(singles, key=lambda scores: scores.held_out)
  return {
      f'{prefix}: best single': _scores(best),
      f'{prefix}: mean of singles': _scores(pools.mean_scores(singles)),
      f'{prefix}: uniform soup': _scores(soup),
  }


def _first(prefix: str, pool: pools.Pool) -> Figures:
  """As many models of a pool as the larger ones have, and their soup."""
  num = pools.NUM_RUNS
  return _compared(prefix, pool.singles[:num], pool.soup(range(num)))


def plane(bench: pools.Bench) -> Result:
  """Error at the start, at two models and in the middle of them."""
  pool = bench['sweep']
  path = pool.work.workdir / 'landscape/plane.json'
  # Large models have no plane: it is a grid of evaluations.
  surfaces = json.loads(path.read_text()) if path.exists() else {}
  best = np.argsort([-scores.held_out for scores in pool.singles], stable=True)
  corners = surfaces.get('corners', best[:2].tolist())
  two = [pool.singles[k] for k in corners]
  figures = {
      'start': _scores(pool.of(pool.theta_0)),
      'mean of the two': _scores(pools.mean_scores(two)),
      'middle of the two': _scores(pool.soup(corners)),
  }
  if not surfaces:
    return figures, None
  (section,) = report.plane_sections(surfaces, pool.names)
  pictures = [p for p in section.parts if isinstance(p, report.Picture)]
  return figures, pictures[-1].draw


def _sets(pool: pools.Pool, where: str) -> landscapes.Sets:
  """All test data ('test'), or all that are shifted ('shifts')."""
  names = ['test'] if where == 'test' else list(pool.work.splits.shifts)
  num = len(names) * len(pool.work.splits.test)
  return landscapes.Sets(pool.work, names, num)


def _is_large(bench: pools.Bench) -> bool:
  """Whether the start is given: nothing more is trained, and less evaluated."""
  return bool(bench.config.get('init'))


def _paired(bench: pools.Bench) -> tuple[pools.Pool, dict[Any, str]]:
  """A pool, and its pairs by the hyper-parameter in which they differ.

  Of large models neighbours of the sweep, which differ in all.
  """
  if _is_large(bench):
    pool = bench['sweep']
    return pool, dict.fromkeys(_neighbours(len(pool)), 'all')
  pool = bench['one_factor']
  return pool, {
      pair: name
      for name, sets in studies.groups(pool.runs, ignore=()).items()
      for group in sets
      for pair in itertools.combinations(group, 2)
  }


@functools.lru_cache(maxsize=1)
def _pairs(bench: pools.Bench) -> dict[str, list[landscape.Pair]]:
  """Pairs on test data and on shifts."""
  pool, varied = _paired(bench)
  angles = {
      pair: landscape.angle(pool.theta_0, *map(pool.models.__getitem__, pair))
      for pair in sorted(varied)
  }

  def scored(pair, where):
    of = lambda scores: getattr(scores, where) / 100
    singles = tuple(of(pool.singles[k]) for k in pair)
    soup, ensemble = of(pool.soup(pair)), of(pool.ensemble(pair))
    return landscape.Pair(pair, angles[pair], singles, soup, ensemble)

  return {where: [scored(pair, where) for pair in angles] for where in _WHERE}


def _drawn_pairs(bench, figures: Figures, draw, unit: str) -> Result:
  """With a picture of the pairs on shifts."""
  pairs = _pairs(bench)['shifts']
  members = [pair.members for pair in pairs]
  rates = report.pair_rates(members, _paired(bench)[0].runs)
  label = f'accuracy on shifts ({unit})'
  return figures, functools.partial(
      draw, pairs=pairs, values=rates, label=label
  )


def angles_and_gains(bench: pools.Bench) -> Result:
  """Angle and gain by what varies, and their correlation over all pairs."""
  figures: Figures = collections.defaultdict(dict)
  _, varied = _paired(bench)
  for where, pairs in _pairs(bench).items():
    column = f'gain on {where}, points'
    for name in dict.fromkeys(varied.values()):
      of_name = [p for p in pairs if varied[p.members] == name]
      row = figures[f'only {name} varies']
      row['angle, degrees'] = float(np.mean([p.angle for p in of_name]))
      row[column] = float(np.mean([100 * p.gain for p in of_name]))
    figures["Spearman's correlation"][column], _ = studies.rank_correlation(
        [p.angle for p in pairs], [100 * p.gain for p in pairs]
    )
  return _drawn_pairs(bench, figures, report.angles_and_gains, 'points')


def against_ensembles(bench: pools.Bench) -> Result:
  """The soup of two minus their ensemble."""
  row = {}
  for where, pairs in _pairs(bench).items():
    mean = float(np.mean([p.soup - p.ensemble for p in pairs]))
    row[f'on {where}, points'] = 100 * mean
  figures = {'soup less ensemble': row}
  return _drawn_pairs(bench, figures, report.against_ensembles, '%')


def _neighbours(num: int) -> list[tuple[int, int]]:
  return list(zip(range(0, num, 2), range(1, num, 2)))


def _lines(pool: pools.Pool, num: int) -> dict[Any, landscape.Path]:
  """The test error between neighbours."""
  sets, members = _sets(pool, 'test'), _neighbours(min(num, len(pool)))
  error_fn = lambda params: 1 - sets.score_of(params)
  return landscape.lines(error_fn, pool.models, members, 11, is_traced=False)


_draw_lines = functools.partial(
    report.lines, label='test error (points)', scale=100
)


def basin(bench: pools.Bench) -> Result:
  """The barrier between two runs at each learning rate."""
  pool = bench['rates']
  paths = _lines(pool, len(pool))
  values = {pair: pool.runs[pair[0]]['learning_rate'] for pair in paths}
  figures = {
      f'rate {values[pair]:.2g}': {
          'barrier, points': 100 * landscape.barrier(path),
          'error of the two, points': 100 * float(path.loss[[0, -1]].mean()),
      }
      for pair, path in paths.items()
  }
  return figures, functools.partial(_draw_lines, paths=paths, values=values)


def _rows(bench: pools.Bench) -> list[report.Row]:
  return report.read_rows(bench['sweep'].work.workdir / 'results.json')


def _summary(bench: pools.Bench) -> dict[str, report.Row]:
  return {row.name: row for row in report.summary(_rows(bench))}


def _of_row(row: report.Row) -> dict[str, float]:
  return {_TEST: 100 * row.test, _SHIFTS: 100 * row.mean_shift}


def table(bench: pools.Bench) -> Result:
  """Every recipe."""
  figures = {name: _of_row(row) for name, row in _summary(bench).items()}
  return figures, functools.partial(report.scatter, rows=_rows(bench))


def random_orders(bench: pools.Bench) -> Result:
  """Greedy by score, and in three random orders."""
  pool = bench['sweep']
  infos = studies.random_orders(
      pool.models, pool.eval_fn, num_orders=3, scores=pool.known
  )
  shuffled = [pool.soup(sorted(info.accepted)) for info in infos]
  spread = _scores(pools.Scores(*np.std(shuffled, axis=0, ddof=1).tolist()))
  return {
      'greedy, by score': _scores(pool.soup(pool.greedy().info.accepted)),
      'greedy, random order': _scores(pools.mean_scores(shuffled)),
      'spread of three orders': {
          k.replace('%', 'points'): x for k, x in spread.items()
      },
  }, None


def growth(bench: pools.Bench) -> Result:
  """Scores as the number of models grows."""
  pool = bench['sweep']
  nums = _nums(len(pool))
  figures: Figures = collections.defaultdict(dict)
  grown = {}
  for where in _WHERE:
    curves = studies.recipes(
        pool.models, pool.eval_fn, _field(pool.soup, where), scores=pool.known
    )
    curves['ensemble'] = _field(pool.ensemble, where)
    grown[where] = studies.growth(
        curves, len(pool), nums=nums, num_orders=1 if _is_large(bench) else 3
    )
    for name, rows in grown[where].scores.items():
      for num, value in zip(nums, rows.mean(0)):
        if num in (1, nums[len(nums) // 2], nums[-1]):
          figures[f'{name} of {num}'][f'{where}, %'] = float(value)
  return figures, functools.partial(
      report.growth, grown=grown['shifts'], label='shifts, %', scale=1
  )


def _field(scores_fn: Callable[..., pools.Scores], field: str) -> Any:
  """`members -> float`, of one data set."""
  return lambda members: getattr(scores_fn(members), field)


def _nums(num: int) -> list[int]:
  """1, 2, 4, ... and all."""
  return [2**i for i in range(num.bit_length()) if 2**i < num] + [num]


def one_varied(bench: pools.Bench) -> Result:
  """Soups of runs that differ in one hyper-parameter."""
  pool = bench['one_factor']
  figures: Figures = collections.defaultdict(dict)
  for where in _WHERE:
    groups = studies.one_varied(pool.runs, _field(pool.soup, where), ignore=())
    for group in groups:
      for what in ('best', 'mean', 'soup'):
        row = figures[f'{group.name} varies: {what}']
        row[f'{where}, %'] = getattr(group, what)
  return figures, functools.partial(
      report.varied, groups=groups, label='shifts, %', scale=1
  )


def greedy_ensemble(bench: pools.Bench) -> Result:
  """The greedy rule over logits, against that over parameters."""
  rows = _summary(bench)
  return {
      name: {**_of_row(rows[name]), 'passes': float(rows[name].cost)}
      for name in ('greedy', 'ensemble', 'greedy ensemble')
  }, None


def theory(bench: pools.Bench) -> Result:
  """The approximation of soup minus ensemble against the true difference."""
  terms, values = [], []
  names = ('sweep',) if _is_large(bench) else ('one_factor', 'rates')
  for name in names:
    pool = bench[name]
    members, logits_fn = _neighbours(len(pool)), pool.work.model.logits_fn
    batches = landscapes.Sets(pool.work, ['test'], 1000).batches
    for i, j in members:
      pair = logits_fn, pool.models[i], pool.models[j]
      terms.append(landscape.soup_minus_ensemble(*pair, batches))
    values += report.pair_rates(members, pool.runs) or []
  true = np.array([pair.soup - pair.ensemble for pair in terms])
  guess = np.array([pair.approximation for pair in terms])
  within = np.array(values) <= bench.config.sweep.learning_rate[1] * (1 + 1e-6)
  figures = {
      name: {
          'correlation': float(np.corrcoef(true[rows], guess[rows])[0, 1]),
          'error, share of the difference': float(
              np.abs(guess - true)[rows].mean() / np.abs(true)[rows].mean()
          ),
          'pairs': float(rows.sum()),
      }
      for name, rows in (
          ('rates of the sweep', within),
          ('all rates', within | True),
      )
  }
  return figures, functools.partial(report.theory, terms=terms, values=values)


def calibration(bench: pools.Bench) -> Result:
  """Equal-mass calibration error against the number of models.

  What may cause it is told apart: the number of bins, and targets that are not
  hard, from which models learn to be less sure than they are right.
  """
  num_orders = 1 if _is_large(bench) else 20
  figures, grown = _calibration(bench['sweep'], num_orders)
  if not _is_large(bench):
    others, _ = _calibration(bench['hard_labels'], num_orders)
    figures |= {f'hard labels, {name}': row for name, row in others.items()}
  draw = functools.partial(report.growth, label='test ECE, points')
  return figures, functools.partial(draw, grown=grown)


def _calibration(pool: pools.Pool, num_orders: int):
  """Figures of soups and ensembles, and the error in 15 bins as they grow."""
  labels = jnp.asarray(pool.work.labels['test'])
  ece = metrics.expected_calibration_error
  sure = lambda x: jax.nn.softmax(x).max(-1).mean()
  measures: dict[str, Callable[..., Any]] = {
      f'ECE of {n} bins, points': functools.partial(ece, num_bins=n)
      for n in (5, 15, 50)
  }
  measures['confidence minus accuracy, points'] = lambda logits, labels: (
      sure(logits) - metrics.accuracy(logits, labels)
  )
  logits_fns = {
      'soup': lambda members: pool.soup_logits(members)['test'],
      'ensemble': lambda members: pool.logits['test'][list(members)].mean(0),
  }
  figures: Figures = collections.defaultdict(dict)
  nums, curves = _nums(len(pool)), {}

  def score(measure_fn, logits_fn, members):
    return 100 * float(measure_fn(jnp.asarray(logits_fn(members)), labels))

  for measure, fn in measures.items():
    score_fns = {
        name: functools.partial(score, fn, logits_fn)
        for name, logits_fn in logits_fns.items()
    }
    curves[measure] = grown = studies.growth(
        score_fns, len(pool), nums=nums, num_orders=num_orders
    )
    for name, rows in grown.scores.items():
      for num in (1, nums[-1]):
        value = rows[:, nums.index(num)].mean()
        figures[f'{name} of {num}'][measure] = float(value)
  return dict(figures), curves['ECE of 15 bins, points']


def breadth(bench: pools.Bench) -> Result:
  """The same sweep from a start that saw few examples."""
  figures: Figures = {}
  for name, prefix in (('sweep', 'broad'), ('narrow', 'narrow')):
    pool = bench[name]
    soup = pool.soup(range(len(pool)))
    figures |= _compared(prefix, pool.singles, soup)
    greedy = pool.greedy().info.accepted
    figures[f'{prefix}: greedy soup'] = _scores(pool.soup(greedy))
  return figures, None


def scratch(bench: pools.Bench) -> Result:
  """Runs from random parameters: one start for all, and a start for each."""
  figures: Figures = {}
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
        'mean of singles, %': mean[_TEST],
        'uniform soup, %': soup[_TEST],
    }
  return figures, functools.partial(_draw_lines, paths=paths)


def averages(bench: pools.Bench) -> Result:
  """Soups of moving averages and of means over late epochs.

  Of runs whose rate falls to zero, and of runs at a constant rate: a rate that
  falls averages, too.
  """
  falling = _averages(bench['averaged'], 'falling rate')
  return falling | _averages(bench['averaged_constant'], 'constant rate'), None


def _averages(pool: pools.Pool, rate: str) -> Figures:
  names = pool.names
  of = lambda text: [k for k, name in enumerate(names) if text in name]
  last = [k for k, name in enumerate(names) if '_' not in name]
  swa = [
      jaxsoup.uniform(
          [pool.models[k] for k in [*of(f'{names[i]}_step'), i]]
      ).params
      for i in last
  ]
  figures: Figures = {}
  for name, members in (('last', last), ('EMA', of('_ema'))):
    singles = [pool.singles[k] for k in members]
    figures |= _compared(f'{rate}, {name}', singles, pool.soup(members))
  soup = pool.of(jaxsoup.uniform(swa).params)
  return figures | _compared(f'{rate}, SWA', list(map(pool.of, swa)), soup)


# Names of averages that are souped over runs as well.
_LAST, _LATE, _WSM = 'last iterate', 'mean of the second half', 'WSM, 1-sqrt'


def along_a_run(bench: pools.Bench) -> Result:
  """Averages along runs with a constant rate, against a rate that falls."""
  pool, decayed = bench['constant'], bench['decayed']
  steps, runs = pool.kept()
  by_run = [_along(pool, steps, models) for models in runs]
  figures: Figures = {
      'decayed rate': _scores(pools.mean_scores(decayed.singles))
  }
  for name in by_run[0]:
    scores = [pool.of(averages[name]) for averages in by_run]
    figures[name] = _scores(pools.mean_scores(scores))
  figures['soup of: decayed rate'] = _scores(decayed.soup(range(len(decayed))))
  for name in (_LAST, _LATE, _WSM):
    soup = jaxsoup.uniform([averages[name] for averages in by_run])
    figures[f'soup of: {name}'] = _scores(pool.of(soup.params))
  for base in (_LAST, 'decayed rate'):
    for row in figures.values():
      for where in _WHERE:
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


def sharpness_aware(bench: pools.Bench) -> Result:
  """Runs with and without SAM, and soups of both."""
  plain, sharp = bench['sweep'], bench['sam']
  half = pools.NUM_RUNS // 2
  both = plain.models[:half] + sharp.models[half : 2 * half]
  soup = _scores(plain.of(jaxsoup.uniform(both).params))
  figures = _first('plain', plain) | _first('SAM', sharp)
  return figures | {'half of each: uniform soup': soup}, None


def distillation(bench: pools.Bench) -> Result:
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
  return {name: _scores(x) for name, x in scores.items()}, None


def wise_ft(bench: pools.Bench) -> Result:
  """On the line from the start to singles and soups."""
  pool = bench['sweep']
  best = int(np.argmax([scores.held_out for scores in pool.singles]))
  models = {
      'best single': pool.models[best],
      'uniform soup': jaxsoup.uniform(pool.models).params,
  }
  score_fns = {where: _sets(pool, where).score_of for where in _WHERE}
  curves = studies.wise_ft(
      pool.theta_0,
      models,
      score_fns,
      num=6 if _is_large(bench) else 11,
      is_traced=False,
  )
  figures: Figures = {}
  for name, curve in curves.items():
    best = int(curve.scores['shifts'].argmax())
    for words, i in ((f'{name}, t = 1', -1), (f'{name}, best t', best)):
      figures[words] = {
          f'{where}, %': 100 * float(x[i]) for where, x in curve.scores.items()
      }
      figures[words]['t'] = float(curve.t[i])
  return figures, functools.partial(report.wise_ft, curves=curves)


def data_sets(bench: pools.Bench) -> Result:
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


def heads(bench: pools.Bench) -> Result:
  """The head of the start, a probed one, a random one."""
  figures = _first('head of the start', bench['sweep'])
  figures |= _first('linear probe', bench['probed'])
  return figures | _first('random head', bench['random_head']), None


def significance(bench: pools.Bench) -> Result:
  """Gains over the best single model, and their p-values."""
  figures: Figures = {}
  for name, row in _summary(bench).items():
    if row.gains:
      figures[name] = {
          'gain on test, points': 100 * row.gains['test'].gain,
          'p, exact McNemar': row.gains['test'].p_value,
          'gain on shifts, points': 100 * row.gains['shifts'].gain,
          'p, paired bootstrap': row.gains['shifts'].p_value,
      }
  return figures, functools.partial(report.scatter, rows=_rows(bench))


# By the number that they have in docs/experiments.md; 21 is text, and those
# after it are not of the paper.
EXPERIMENTS = {
    1: Experiment('loss and error slice', plane),
    2: Experiment('angle against gain', angles_and_gains),
    3: Experiment('soup against ensemble', against_ensembles),
    4: Experiment('learning-rate basin', basin),
    5: Experiment('the main table', table),
    6: Experiment('greedy in random order', random_orders, has_dots=True),
    7: Experiment('number of models', growth),
    8: Experiment('one hyper-parameter', one_varied),
    9: Experiment('greedy ensemble', greedy_ensemble, has_dots=True),
    10: Experiment('theory', theory),
    11: Experiment('calibration', calibration),
    12: Experiment('pre-training breadth', breadth, has_dots=True),
    13: Experiment('from scratch', scratch),
    14: Experiment('EMA and SWA', averages, has_dots=True),
    15: Experiment('SAM', sharpness_aware, has_dots=True),
    16: Experiment('distillation', distillation, has_dots=True),
    17: Experiment('robust fine-tuning', wise_ft),
    18: Experiment('several data sets', data_sets, has_dots=True),
    19: Experiment('LP-FT', heads, has_dots=True),
    20: Experiment('significance', significance),
    22: Experiment('averages along a run', along_a_run, has_dots=True),
}
