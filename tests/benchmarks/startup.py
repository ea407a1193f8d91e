"""Seconds before anything happens: imports, and the help of the command.

python tests/benchmarks/startup.py [--repeats 9]

Medians of nine processes each, in turns; files in the page cache. Measured on
two CPU cores:

                                  seconds  x import jax
python                               0.01          0.02
import jax                           0.60          1.00
import jaxsoup                       0.03          0.04
import jaxsoup, and use a recipe     0.62          1.04
import jax, flax, optax              0.97          1.62
jaxsoup --help                       0.18          0.29
jaxsoup soup --help                  0.29          0.48
jaxsoup doctor                       0.75          1.26
"""

import argparse
import statistics
import subprocess
import sys
import time

COMMAND = 'import sys; from jaxsoup import cli; sys.argv[:] = ["jaxsoup"] + {}'
WAYS = {
    'python': 'pass',
    'import jax': 'import jax',
    'import jaxsoup': 'import jaxsoup',
    'import jaxsoup, and use a recipe': 'import jaxsoup; jaxsoup.uniform',
    'import jax, flax, optax': 'import jax, flax.nnx, optax',
    'jaxsoup --help': COMMAND.format('["--help"]; cli.main()'),
    'jaxsoup soup --help': COMMAND.format('["soup", "--help"]; cli.main()'),
    'jaxsoup doctor': COMMAND.format('["doctor"]; cli.main()'),
}


def seconds_of(code: str) -> float:
  start = time.perf_counter()
  subprocess.run([sys.executable, '-c', code], capture_output=True, check=True)
  return time.perf_counter() - start


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--repeats', type=int, default=9)
  arguments = parser.parse_args()
  times: dict[str, list[float]] = {name: [] for name in WAYS}
  for _ in range(arguments.repeats):
    for name, code in WAYS.items():
      times[name].append(seconds_of(code))
  medians = {name: statistics.median(of_way) for name, of_way in times.items()}
  print(f'{"":34}seconds  x import jax')
  for name, median in medians.items():
    print(f'{name:34}{median:7.2f}  {median / medians["import jax"]:12.2f}')


if __name__ == '__main__':
  main()
