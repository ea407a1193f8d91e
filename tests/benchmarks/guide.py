"""What predicts the gain of a uniform soup before it is evaluated.

  python tests/benchmarks/guide.py [--pools FOLDER] [--seeds 0 1 --check 2]
  python tests/benchmarks/guide.py --studies WORKDIR --seeds 0 1 2 3 4 5 \
      --check 6 7 [--config FILE OVERRIDE...]

Draws pools of 2 to 8 runs, from those of `_pools.py` (one start; rates from low
to far too high, longer and shorter runs, moving averages, heads of their own),
or from those of `python -m jaxsoup.paper.run --workdir=WORKDIR` (sweeps, one
factor at a time, rates, a start that saw little, from scratch, SAM, moving
averages, probed and random heads), one to three kinds together. Measures on
held-out data what can be known of single models and pairs, and on test data and
shifts the gain: the accuracy of the soup minus that of the best single model on
the held-out data. Prints rank correlations with bootstrap intervals over pools,
mean gains, and, on pools of other seeds too, what is lost by following the
held-out gain, as it is and corrected by how much the best model is flattered by
the examples that chose it.
"""

import argparse
from collections.abc import Callable
import itertools
import pathlib
from typing import Any
from typing import NamedTuple

import _pools
import jax
import numpy as np
from scipy import stats

import jaxsoup
from jaxsoup.experiments import configs
from jaxsoup.paper import pools

ROOT = pathlib.Path(__file__).parents[2]
NUM_POOLS = 20  # Of each kind, but of three at most.
GROUPS = ('good', 'many', 'low', 'high', 'hot', 'long', 'own heads', 'bodies')
# Kinds of runs by their start.
STUDIES = (
    ('sweep', 'one_factor', 'rates', 'averaged', 'hard_labels', 'sam'),
    ('narrow',), ('scratch_shared',), ('probed',), ('random_head',),
)  # fmt: skip
PREDICTORS = (
    'barrier', 'angle', 'disagreement', 'spread of rates', 'K', 'distance',
    'best - mean',
)  # fmt: skip
TARGETS = ('gain', 'gain on shifts', 'over mean')


class Source(NamedTuple):
  """K models of one start, and what is known of them.

  Attributes:
    groups: the kind of each.
    rates: learning rates, [K].
    tasks: task vectors, [K, P], as multiples of the length of the start.
    classes: predicted on held-out data, [K, N].
    right: which examples are right, [K, ...] by set: 'held_out', 'test', and
      others, which are shifts.
    pair_fn: the held-out score of the average of two.
    soup_fn: which examples are right with the soup of some, by set.
  """

  groups: list[str]
  rates: np.ndarray
  tasks: np.ndarray
  classes: np.ndarray
  right: dict[str, np.ndarray]
  pair_fn: Callable[[list[int]], float]
  soup_fn: Callable[[list[int]], dict[str, np.ndarray]]


def _flat(params):
  params = params['params'] if 'batch_stats' in params else params
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])


def _tasks(models, theta_0):
  start = _flat(theta_0)
  return np.stack([_flat(x) - start for x in models]) / np.linalg.norm(start)


def of_world(world) -> Source:
  """The models of `_pools.py`."""
  rows = [(g, *x) for g in GROUPS for x in zip(world.runs[g], world.rates[g])]
  averages = zip(world.extra['average'], world.rates['good'])
  rows += [('average', *x) for x in averages]
  groups, models, rates = zip(*rows)
  parts = {name: world.data[name] for name in ('held_out', 'test')}
  classes_fn = jax.jit(
      lambda params, image: world.logits(params, {'image': image}).argmax(-1)
  )
  classes = lambda params, name: np.asarray(
      classes_fn(params, parts[name]['image'])
  )
  right = lambda params, name: classes(params, name) == parts[name]['label']

  def soup(members):
    some = [models[k] for k in members]
    mean = jax.tree.map(lambda *x: np.mean(x, axis=0), *some)
    return world.recalibrated(mean) if world.net == 'cnn' else mean

  return Source(
      list(groups),
      np.array(rates),
      _tasks(models, world.theta_0),
      np.stack([classes(x, 'held_out') for x in models]),
      {name: np.stack([right(x, name) for x in models]) for name in parts},
      lambda members: right(soup(members), 'held_out').mean(),
      lambda members: (
          mean := soup(members), {name: right(mean, name) for name in parts}
      )[1],
  )  # fmt: skip


def of_studies(bench, names) -> Source:
  """The models of some of the paper's studies."""
  some = [(name, bench[name]) for name in names]
  models = [params for _, pool in some for params in pool.models]
  first = bench[names[0]]
  right = lambda logits: {
      name: x.argmax(-1) == first.work.labels[name]
      for name, x in logits.items()
  }
  of_pools = [right(pool.logits) for _, pool in some]
  mean = lambda ks: jaxsoup.uniform([models[k] for k in ks]).params
  return Source(
      [name for name, pool in some for _ in pool.models],
      np.array(
          [
              pool.runs[k]['learning_rate']
              for _, pool in some
              for k, _, _ in pool.work.copies()
          ]
      ),
      _tasks(models, first.theta_0),
      np.concatenate([pool.logits['held_out'].argmax(-1) for _, pool in some]),
      {
          name: np.concatenate([x[name] for x in of_pools])
          for name in of_pools[0]
      },
      lambda ks: first.eval_fn(mean(ks)),
      lambda ks: right(first.work.logits(mean(ks))),
  )


def records_of(source, rng):
  """Predictors and gains of pools that are drawn."""
  lengths = np.linalg.norm(source.tasks, axis=1)
  unit = source.tasks / np.maximum(lengths, 1e-12)[:, None]
  cosines = np.clip(unit @ unit.T, -1, 1)
  held = source.right['held_out']
  shifts = source.right.keys() - {'held_out', 'test'}
  kinds = sorted(set(source.groups))
  records = []
  for _ in range(NUM_POOLS * min(len(kinds), 3)):
    # Of one to three kinds, so that pools are as alike as those of a sweep.
    some = set(rng.choice(kinds, rng.integers(1, 4)))
    inside = np.flatnonzero([g in some for g in source.groups])
    size = min(rng.choice([2, 3, 4, 6, 8]), len(inside))
    members = rng.permutation(inside)[:size].tolist()
    if size < 2:
      continue
    scores = held[members].mean(1)
    best = members[int(scores.argmax())]
    mixed = source.soup_fn(members)
    pairs = list(itertools.combinations(members, 2))
    drops = [
        held[list(pair)].mean() - source.pair_fn(list(pair))
        for pair in pairs
        if best in pair
    ]
    gain = {
        name: mixed[name].mean() - x[best].mean()
        for name, x in source.right.items()
    }
    angles = [np.degrees(np.arccos(cosines[pair])) for pair in pairs]
    apart = [(source.classes[a] != source.classes[b]).mean() for a, b in pairs]
    records.append(
        {
            'barrier': max(drops),
            'angle': np.mean(angles),
            'disagreement': np.mean(apart),
            'spread of rates': np.ptp(np.log(source.rates[members])),
            'K': size,
            'distance': lengths[members].mean(),
            'best - mean': scores.max() - scores.mean(),
            'held-out gain': gain['held_out'],
            'flattered': flattered(held[members].astype(float), rng),
            'gain': gain['test'],
            'gain on shifts': np.mean(
                [gain[name] for name in shifts] or np.nan
            ),
            'over mean': mixed['test'].mean()
            - source.right['test'][members].mean(),
        }
    )
  return records


def flattered(right, rng):
  """How much too high the best of some scores is; rows of right answers."""
  num = right.shape[1]
  draws = rng.multinomial(num, np.full(num, 1 / num), 500)
  scores = right @ draws.T / num
  return (scores.max(0) - right.mean(1)[scores.argmax(0)]).mean()


def _interval(values_fn, num, rng):
  """The 95 % bootstrap interval over pools."""
  draws = [values_fn(rng.integers(0, num, num)) for _ in range(500)]
  return np.nanquantile(draws, [0.025, 0.975])


def _column(records, name):
  return np.array([r[name] for r in records])


def _known(records):
  return [t for t in TARGETS if np.isfinite(_column(records, t)).all()]


def _print_correlations(title, records, rng):
  print(f'{title}: {len(records)} pools')
  targets = _known(records)
  print(f'| | {" | ".join(targets)} |')
  for name in PREDICTORS:
    x, cells = _column(records, name), []
    for y in (_column(records, target) for target in targets):
      rank = lambda rows, x=x, y=y: stats.spearmanr(x[rows], y[rows]).statistic
      low, high = _interval(rank, len(records), rng)
      cells.append(f'{rank(slice(None)):+.2f} [{low:+.2f}, {high:+.2f}]')
    print(f'| {name} | {" | ".join(cells)} |')


def _print_means(name, edges, records, rng):
  for low, high in itertools.pairwise(edges):
    some = [r for r in records if low <= r[name] < high]
    if len(some) > 4:
      cells = []
      for target in _known(some):
        y = 100 * _column(some, target)
        ends = _interval(lambda rows: y[rows].mean(), len(y), rng)  # noqa: B023
        cells.append(f'{y.mean():+.1f} [{ends[0]:+.1f}, {ends[1]:+.1f}]')
      share = (_column(some, 'gain') >= 0).mean()
      print(
          f'| {name} {low} to {high} | {len(some)} | {" | ".join(cells)} | '
          f'{100 * share:.0f} % |'
      )


def _print_losses(title, records):
  some = [r for r in records if r['barrier'] < 0.03]
  if not some:
    return
  y, g = _column(some, 'gain'), _column(some, 'held-out gain')
  after = g + _column(some, 'flattered')
  lost = lambda is_soup: 100 * np.where(is_soup, -y, y).clip(0).mean()
  print(
      f'{title}: {len(some)} pools without a barrier; test minus held-out '
      f'gain, points: {100 * (y - g).mean():+.2f}, with the correction '
      f'{100 * (y - after).mean():+.2f}; loss to the better one: soup '
      f'{lost(y == y):.2f}, best model {lost(y != y):.2f}, by the held-out '
      f'gain {lost(g >= 0):.2f}, corrected {lost(after >= 0):.2f}'
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--pools', default='/tmp/jaxsoup-pools')
  parser.add_argument('--nets', nargs='+', default=_pools.NETS)
  parser.add_argument('--studies', type=pathlib.Path)
  parser.add_argument('--config', default=str(ROOT / 'configs' / 'digits.py'))
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1])
  parser.add_argument('--check', type=int, nargs='*', default=[2])
  args, overrides = parser.parse_known_args()
  rng = np.random.default_rng(0)

  def records(seed) -> list[dict[str, Any]]:
    if args.studies is None:
      worlds = [_pools.made(net, seed, args.pools) for net in args.nets]
      return [r for world in worlds for r in records_of(of_world(world), rng)]
    experiment = configs.load(
        args.config, [*overrides, f'--config.seed={seed}']
    )
    with pools.Bench(experiment, args.studies / f'seed{seed}') as bench:
      return [
          record
          for names in STUDIES
          for record in records_of(of_studies(bench, names), rng)
      ]

  here, others = (
      [record for seed in seeds for record in records(seed)]
      for seeds in (args.seeds, args.check)
  )
  _print_correlations('all', here, rng)
  _print_correlations(
      'no barrier', [r for r in here if r['barrier'] < 0.03], rng
  )
  for name, edges in (
      ('barrier', (-1, -0.02, 0, 0.02, 0.05, 0.1, 1)),
      ('disagreement', (0, 0.02, 0.04, 0.08, 0.16, 1)),
      ('distance', (0, 0.1, 0.2, 0.4, 1, 100)),
      ('best - mean', (0, 0.005, 0.01, 0.02, 0.05, 1)),
  ):
    _print_means(name, edges, here, rng)
  _print_losses('these', here)
  _print_losses('other seeds', others)


if __name__ == '__main__':
  main()
