"""What predicts the gain of a uniform soup before it is evaluated.

python tests/benchmarks/guide.py [--pools FOLDER] [--seeds 0 1 --check 2]

Draws pools of 2 to 8 runs from those of `_pools.py` (one start; rates from low
to far too high, longer and shorter runs, moving averages, heads of their own),
and measures on 400 held-out digits what can be known of single models and
pairs, and on 797 test images the gain: the accuracy of the soup minus that of
the best single model on the held-out digits. Prints rank correlations with
bootstrap intervals over pools, mean gains, and, on pools of other seeds too,
what is lost by following the held-out gain, as it is and corrected by how much
the best model is flattered by the images that chose it.
"""

import argparse
import itertools

import _pools
import jax
import numpy as np
from scipy import stats

NUM_POOLS = 60
GROUPS = ('good', 'many', 'low', 'high', 'hot', 'long', 'own heads', 'bodies')
PREDICTORS = (
    'barrier', 'angle', 'disagreement', 'spread of rates', 'K', 'distance',
    'best - mean',
)  # fmt: skip


def _flat(params):
  params = params['params'] if 'batch_stats' in params else params
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])


def pools_of(world, rng):
  """Records of one world: predictors and gains."""
  names = [(g, i) for g in GROUPS for i in range(len(world.runs[g]))]
  models = {name: world.runs[name[0]][name[1]] for name in names}
  models |= {('average', i): x for i, x in enumerate(world.extra['average'])}
  rates = {name: world.rates[name[0]][name[1]] for name in names}
  rates |= {('average', i): r for i, r in enumerate(world.rates['good'])}
  start = _flat(world.theta_0)
  tasks = {name: _flat(x) - start for name, x in models.items()}
  unit = {name: x / np.linalg.norm(x) for name, x in tasks.items()}
  data = world.data
  classes_fn = jax.jit(
      lambda params, image: world.logits(params, {'image': image}).argmax(-1)
  )

  def classes(params):
    return [
        np.asarray(classes_fn(params, data[part]['image']))
        for part in ('held_out', 'test')
    ]

  labels = [data[part]['label'] for part in ('held_out', 'test')]
  singles = {name: classes(x) for name, x in models.items()}
  scores = {
      n: [(c == y).mean() for c, y in zip(x, labels)]
      for n, x in singles.items()
  }

  def soup(members):
    mean = jax.tree.map(
        lambda *x: np.mean(x, axis=0), *(models[n] for n in members)
    )
    mean = world.recalibrated(mean) if world.net == 'cnn' else mean
    return [(c == y) for c, y in zip(classes(mean), labels)]

  records = []
  for _ in range(NUM_POOLS):
    # Of one to three groups, so that pools are as alike as those of a sweep.
    some = set(rng.choice([*GROUPS, 'average'], rng.integers(1, 4)))
    inside = [n for n in models if n[0] in some]
    size = int(min(rng.choice([2, 3, 4, 6, 8]), len(inside)))
    members = [inside[i] for i in rng.permutation(len(inside))[:size]]
    if size < 2:
      continue
    held = np.array([scores[n][0] for n in members])
    best = members[int(held.argmax())]
    mixed = soup(members)
    pairs = list(itertools.combinations(members, 2))
    drops = [
        (scores[a][0] + scores[b][0]) / 2 - soup([a, b])[0].mean()
        for a, b in pairs
        if best in (a, b)
    ]
    cosines = [np.clip(unit[a] @ unit[b], -1, 1) for a, b in pairs]
    right = [singles[best][i] == labels[i] for i in (0, 1)]
    apart = [mixed[i].astype(float) - right[i] for i in (0, 1)]
    records.append(
        {
            'barrier': max(drops),
            'angle': np.degrees(np.arccos(cosines)).mean(),
            'disagreement': np.mean([
                (singles[a][0] != singles[b][0]).mean() for a, b in pairs
            ]),
            'spread of rates': np.ptp(np.log([rates[n] for n in members])),
            'K': size,
            'distance': np.mean([np.linalg.norm(tasks[n]) for n in members])
            / np.linalg.norm(start),
            'best - mean': held.max() - held.mean(),
            'held-out gain': apart[0].mean(),
            'flattered': flattered(
                np.array([singles[n][0] == labels[0] for n in members], float),
                rng,
            ),
            'gain': apart[1].mean(),
            'over mean': mixed[1].mean()
            - np.mean([scores[n][1] for n in members]),
        }
    )  # fmt: skip
  return records


def _interval(values_fn, num, rng):
  """The 95 % bootstrap interval over pools."""
  draws = [values_fn(rng.integers(0, num, num)) for _ in range(500)]
  return np.nanquantile(draws, [0.025, 0.975])


def flattered(right, rng):
  """How much too high the best of some scores is; rows of right answers."""
  num = right.shape[1]
  draws = rng.multinomial(num, np.full(num, 1 / num), 500)
  scores = right @ draws.T / num
  return (scores.max(0) - right.mean(1)[scores.argmax(0)]).mean()


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--pools', default='/tmp/jaxsoup-pools')
  parser.add_argument('--nets', nargs='+', default=_pools.NETS)
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1])
  parser.add_argument('--check', type=int, nargs='*', default=[2])
  args = parser.parse_args()
  rng = np.random.default_rng(0)
  made = lambda seeds: [
      record
      for net, seed in itertools.product(args.nets, seeds)
      for record in pools_of(_pools.made(net, seed, args.pools), rng)
  ]
  records, others = made(args.seeds), made(args.check)
  column = lambda some, name: np.array([r[name] for r in some])
  in_basin = lambda some: [r for r in some if r['barrier'] < 0.03]
  for title, some in (('all', records), ('no barrier', in_basin(records))):
    print(f'{title}: {len(some)} pools')
    for name in PREDICTORS:
      x, cells = column(some, name), []
      for target in ('gain', 'over mean'):
        y = column(some, target)
        rank = lambda rows, x=x, y=y: stats.spearmanr(
            x[rows], y[rows]
        ).statistic
        low, high = _interval(rank, len(some), rng)
        cells.append(f'{rank(slice(None)):+.2f} [{low:+.2f}, {high:+.2f}]')
      print(f'| {name} | {" | ".join(cells)} |')
  for name, edges in (
      ('barrier', (-1, -0.02, 0, 0.02, 0.05, 0.1, 1)),
      ('disagreement', (0, 0.02, 0.04, 0.08, 0.16, 1)),
      ('distance', (0, 0.1, 0.2, 0.4, 1, 100)),
      ('best - mean', (0, 0.005, 0.01, 0.02, 0.05, 1)),
  ):
    for low, high in itertools.pairwise(edges):
      some = [r for r in records if low <= r[name] < high]
      if len(some) > 4:
        y = 100 * column(some, 'gain')
        ends = _interval(lambda rows: y[rows].mean(), len(y), rng)  # noqa: B023
        over = 100 * column(some, 'over mean').mean()
        print(
            f'| {name} {low} to {high} | {len(some)} | {y.mean():+.1f} '
            f'[{ends[0]:+.1f}, {ends[1]:+.1f}] | {over:+.1f} | '
            f'{100 * (y >= 0).mean():.0f} % |'
        )
  for title, some in (('these', records), ('other seeds', others)):
    some = in_basin(some)
    if not some:
      continue
    y, g = column(some, 'gain'), column(some, 'held-out gain')
    after = g + column(some, 'flattered')
    print(
        f'{title}: {len(some)} pools without a barrier; test minus held-out '
        f'gain, points: {100 * (y - g).mean():+.2f}, with the correction '
        f'{100 * (y - after).mean():+.2f}; loss to the better one: soup '
        f'{100 * np.maximum(-y, 0).mean():.2f}, best model '
        f'{100 * np.maximum(y, 0).mean():.2f}, by the held-out gain '
        f'{100 * np.where(g >= 0, -y, y).clip(0).mean():.2f}, corrected '
        f'{100 * np.where(after >= 0, -y, y).clip(0).mean():.2f}'
    )


if __name__ == '__main__':
  main()
