"""The power of an experiment over seeds, before it is run.

  python tests/benchmarks/power.py --gain 4.6 --deviation 4.0 --differ 25 \
      --seeds 8 --examples 1000 --pool 10000 --sets 5

How often `statistics.crossed` finds a gain that is there, and one that is not.
An example is answered better, worse or equally by the soup. How often depends
on the seed, by `--deviation`, and on the example: each leans to one side in all
seeds, three to one. Corruptions are of the same examples.
"""

import argparse

import numpy as np

from jaxsoup import statistics


def draw(rng, asked, gain):
  """Differences, `[sets, examples]` a seed, and which examples those are."""
  differ = asked.differ / 100
  of_example = rng.choice([-0.5, 0.5], asked.pool)
  repeats, ids = [], []
  for seed in rng.normal(gain / 100, asked.deviation / 100, asked.seeds):
    rows = rng.permutation(asked.pool)[: asked.examples]
    lean = np.clip(seed / differ + of_example[rows], -1, 1)
    draws = rng.random((2, asked.sets, asked.examples))
    signs = np.where(draws[0] < (1 + lean) / 2, 1, -1)
    repeats.append(signs * (draws[1] < differ))
    ids.append(rows)
  return repeats, ids


def share_significant(rng, asked, gain) -> float:
  found = []
  for _ in range(asked.num):
    repeats, ids = draw(rng, asked, gain)
    names = range(asked.sets)
    a = [dict(zip(names, x)) for x in repeats]
    nothing = [{name: 0 * x for name, x in each.items()} for each in a]
    of_sets = [dict.fromkeys(names, x) for x in ids]
    found.append(statistics.crossed(None, a, nothing, of_sets).is_significant)
  return float(np.mean(found))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--gain', type=float, required=True, help='points')
  parser.add_argument(
      '--deviation', type=float, required=True, help='of seeds, points'
  )
  parser.add_argument(
      '--differ', type=float, required=True, help='answers that differ, %%'
  )
  for name in ('seeds', 'examples', 'pool'):
    parser.add_argument(f'--{name}', type=int, required=True)
  parser.add_argument('--sets', type=int, default=1, help='corruptions')
  parser.add_argument('--num', type=int, default=1000, help='simulations')
  asked = parser.parse_args()
  rng = np.random.default_rng(0)
  power, size = (share_significant(rng, asked, x) for x in (asked.gain, 0.0))
  print(f'power {power:.2f}; of no gain {size:.2f} are significant')


if __name__ == '__main__':
  main()
