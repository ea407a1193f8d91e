"""Random search over hyper-parameters, as the paper draws its sweeps.

```
def sweep(config):
  return random_search.runs(
      config.sweep,
      config.seed,
      log_uniform=['learning_rate', 'weight_decay'],
      uniform=['label_smoothing'],
      sometimes={'mixup': 0.5},
  )
```
"""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsoup.typing import Json


def runs(
    ranges: Mapping[str, Any],
    seed: int,
    *,
    log_uniform: Sequence[str] = (),
    uniform: Sequence[str] = (),
    integer: Sequence[str] = (),
    sometimes: Mapping[str, float] | None = None,
    choice: Sequence[str] = (),
) -> list[Json]:
  """Draws the runs of a sweep.

  Args:
    ranges: such as `config.sweep`: (low, high) by name, `num_runs`, and `draw`,
      which makes another sweep of the same seed.
    seed: of the experiment.
    log_uniform: names whose logarithms are uniform.
    uniform: names that are uniform.
    integer: names that are uniform among integers, both ends included.
    sometimes: by name, how often it is on; it is 0 in the other runs, and
      uniform in these.
    choice: names of which one of the listed integers is drawn.

  Returns:
    `num_runs` dicts, each with its own `seed`; fewer are always the first of
    more.

  Example:
    >>> ranges = dict(num_runs=2, draw=0, learning_rate=(1e-4, 1e-2))
    >>> [sorted(run) for run in runs(ranges, 0, log_uniform=['learning_rate'])]
    [['learning_rate', 'seed'], ['learning_rate', 'seed']]

  Source: Bergstra and Bengio, "Random search for hyper-parameter optimization",
  JMLR 2012; Wortsman et al., "Model soups", ICML 2022, Section 3.1.
  """
  rng = np.random.default_rng(stream(seed, ranges['draw']))
  sometimes = sometimes or {}
  for name in (*log_uniform, *uniform, *sometimes, *integer):
    # Of one number alone, NumPy would draw up to 1.
    if np.shape(ranges[name]) != (2,):
      raise ValueError(
          f'The range of {name} is {ranges[name]!r}: expected two numbers, low '
          'and high.'
      )

  def run_fn():
    run: Json = {'seed': int(rng.integers(2**31))}
    for name in log_uniform:
      run[name] = float(np.exp(rng.uniform(*np.log(ranges[name]))))
    for name in uniform:
      run[name] = float(rng.uniform(*ranges[name]))
    for name, share in sometimes.items():
      is_on = rng.random() < share
      run[name] = float(rng.uniform(*ranges[name])) if is_on else 0.0
    for name in integer:
      low, high = ranges[name]
      run[name] = int(rng.integers(low, high, endpoint=True))
    for name in choice:
      run[name] = int(rng.choice(ranges[name]))
    return run

  return [run_fn() for _ in range(ranges['num_runs'])]


def stream(seed: int, draw: int) -> list[int]:
  """Seeds the draws of a sweep: other draws, and data, have other streams."""
  return [seed, *([draw] if draw else []), *b'sweep']
