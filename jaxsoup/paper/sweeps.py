"""The experiments of the paper on the models of a sweep.

```
figures, draw = sweeps.EXPERIMENTS[5].study(bench)     # a `pools.Bench`
```

`paper.run` is the command that runs them.
"""

import collections
from collections.abc import Callable
import functools
import itertools
import json
import math
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
from jaxsoup.experiments import landscapes
from jaxsoup.paper import pools

# Figures by row and column; those of a column with '%' are drawn.
Figures = dict[str, dict[str, float]]
_TEST, _SHIFTS = 'test, %', 'shifts, %'
WHERE = ('test', 'shifts')
# The figures, and the picture of one seed; None where it is the figures.
Result = tuple[Figures, Callable[[Any], None] | None]


class Experiment(NamedTuple):
  """One experiment of the paper.

  Attributes:
    title: its name.
    study: runs it.
    has_dots: whether its picture is its figures, of all seeds.
    needs: what the config has to set.
  """

  title: str
  study: Callable[[pools.Bench], Result]
  has_dots: bool = False
  needs: tuple[str, ...] = ()


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
      'start': pool.of(pool.theta_0).row,
      'mean of the two': pools.mean_scores(two).row,
      'middle of the two': pool.soup(corners).row,
  }
  if 'loss' not in surfaces:  # Nor if no two models differ in direction.
    return figures, None
  (section,) = report.plane_sections(surfaces, pool.names)
  pictures = [p for p in section.parts if isinstance(p, report.Picture)]
  return figures, pictures[-1].draw


def _paired(bench: pools.Bench) -> tuple[pools.Pool, dict[Any, str]]:
  """A pool, and its pairs by the hyper-parameter in which they differ.

  Of large models neighbours of the sweep, which differ in all.
  """
  if bench.is_given:
    pool = bench['sweep']
    return pool, dict.fromkeys(pool.neighbours(), 'all')
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

  return {where: [scored(pair, where) for pair in angles] for where in WHERE}


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
  spread = pools.Scores(*np.std(shuffled, axis=0, ddof=1).tolist()).row
  return {
      'greedy, by score': pool.soup(pool.greedy().info.accepted).row,
      'greedy, random order': pools.mean_scores(shuffled).row,
      'spread of three orders': {
          k.replace('%', 'points'): x for k, x in spread.items()
      },
  }, None


def growth(bench: pools.Bench) -> Result:
  """Scores as the number of models grows."""
  pool = bench['sweep']
  nums = _nums(bench)
  figures: Figures = collections.defaultdict(dict)
  grown = {}
  for where in WHERE:
    curves = studies.recipes(
        pool.models, pool.eval_fn, field(pool.soup, where), scores=pool.known
    )
    curves['ensemble'] = field(pool.ensemble, where)
    grown[where] = studies.growth(curves, len(pool), nums=nums)
    for name, rows in grown[where].scores.items():
      for num, value in zip(nums, rows.mean(0)):
        if num in (1, nums[len(nums) // 2], nums[-1]):
          figures[f'{name} of {num}'][f'{where}, %'] = float(value)
  return figures, functools.partial(
      report.growth, grown=grown['shifts'], label='shifts, %', scale=1
  )


def field(scores_fn: Callable[..., pools.Scores], where: str) -> Any:
  """`members -> float`, of one data set."""
  return lambda members: getattr(scores_fn(members), where)


def _nums(bench: pools.Bench) -> list[int]:
  """1, 2, 4, ... and all; of large models only one between the ends."""
  num = len(bench['sweep'])
  if bench.is_given:
    return sorted({1, math.isqrt(num), num})
  return [2**i for i in range(num.bit_length()) if 2**i < num] + [num]


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
  names = ('sweep',) if bench.is_given else ('one_factor', 'rates')
  for name in names:
    pool = bench[name]
    members, logits_fn = pool.neighbours(), pool.work.model.logits_fn
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
  how = _nums(bench), 3 if bench.is_given else 20
  figures, grown = _calibration(bench['sweep'], *how)
  if not bench.is_given:
    others, _ = _calibration(bench['hard_labels'], *how)
    figures |= {f'hard labels, {name}': row for name, row in others.items()}
  draw = functools.partial(report.growth, label='test ECE, points')
  return figures, functools.partial(draw, grown=grown)


def _calibration(pool: pools.Pool, nums: list[int], num_orders: int):
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
  curves = {}

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


def wise_ft(bench: pools.Bench) -> Result:
  """On the line from the start to singles and soups."""
  pool = bench['sweep']
  best = int(np.argmax([scores.held_out for scores in pool.singles]))
  models = {
      'best single': pool.models[best],
      'uniform soup': jaxsoup.uniform(pool.models).params,
  }
  score_fns = {where: pool.sets(where).score_of for where in WHERE}
  curves = studies.wise_ft(
      pool.theta_0,
      models,
      score_fns,
      num=6 if bench.is_given else 11,
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


# By the number that they have in docs/experiments.md.
EXPERIMENTS = {
    1: Experiment('loss and error slice', plane),
    2: Experiment('angle against gain', angles_and_gains),
    3: Experiment('soup against ensemble', against_ensembles),
    5: Experiment('the main table', table),
    6: Experiment('greedy in random order', random_orders, has_dots=True),
    7: Experiment('number of models', growth),
    9: Experiment('greedy ensemble', greedy_ensemble, has_dots=True),
    10: Experiment('theory', theory),
    11: Experiment('calibration', calibration),
    17: Experiment('robust fine-tuning', wise_ft),
    20: Experiment('significance', significance),
}
