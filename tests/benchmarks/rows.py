"""A row of an experiment's table against another row, over its seeds.

  python tests/benchmarks/rows.py DIR uniform ensemble
  python tests/benchmarks/rows.py DIR uniform 'best single' --sets blur noise

Prints by how many points the first is better, with the 95% interval of
`statistics.crossed`: on test, on the shifts together, or on `--sets`; and how
much lower its calibration error on test is, with that of
`statistics.over_repeats`. The gains in `DIR/table.md` are those over the best
single model.
"""

import argparse
import pathlib

from jaxsoup import report
from jaxsoup import statistics
from jaxsoup.experiments import answers
from jaxsoup.paper import run


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('workdir', type=pathlib.Path)
  parser.add_argument('first', help='row')
  parser.add_argument('second', help='row')
  parser.add_argument('--sets', nargs='+', help='of these together')
  asked = parser.parse_args()
  files = sorted(asked.workdir.glob('seed*/results.json'))
  if len(files) < 2:
    parser.error(f'{asked.workdir} has results of {len(files)} seeds, not of 2')
  seeds = [answers.of_workdir(file.parent) for file in files]
  (example, *_), *_ = seeds
  for name in (asked.first, asked.second):
    if name not in example.rows:
      parser.error(f'no row {name}: {", ".join(example.rows)}')
  if unknown := {*(asked.sets or ())} - {*example.ids}:
    parser.error(f'no sets {sorted(unknown)}: {", ".join(example.ids)}')
  shifts = [name for name in example.ids if name not in ('held_out', 'test')]
  roles = {'test': ['test'], 'shifts': shifts}
  if asked.sets:
    roles = {', '.join(asked.sets): asked.sets}
  parts = lambda read_fn, sets: [report.by_set(x, read_fn, sets) for x in seeds]
  for role, sets in roles.items():
    a, b = (
        parts(lambda x, name=name: x.rows[name], sets)
        for name in (asked.first, asked.second)
    )
    gain = statistics.crossed(None, a, b, parts(lambda x: x.ids, sets))
    low, mean, high = (100 * x for x in (gain.low, gain.gain, gain.high))
    print(
        f'{role}: {mean:+.2f} [{low:.2f}, {high:.2f}], p = {gain.p_value:.2g}'
    )
  tables = [
      {row.name: row for row in report.summary(report.read_rows(file))}
      for file in files
  ]
  lower = [100 * (x[asked.second].ece - x[asked.first].ece) for x in tables]
  share = run.shares_of([{'test': x[0].ids['test']} for x in seeds])['test']
  gain = statistics.over_repeats(lower, share=share)
  print(f'ECE, lower by: {gain.gain:+.2f} [{gain.low:.2f}, {gain.high:.2f}]')


if __name__ == '__main__':
  main()
