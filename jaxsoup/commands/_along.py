"""Which steps of a run `jaxsoup soup trajectory` averages, and how."""

import math

from jaxsoup.commands import _common


def steps_of_run(runs, steps, best, metric):
  """Step numbers that count and their paths, the latest first.

  A soup has the form of its first ingredient, with which training goes on.
  """
  import numpy as np

  from jaxsoup import checkpoints
  from jaxsoup import trajectory

  if len(runs) != 1:
    raise ValueError(
        f'{len(runs)} paths were given: expected the directory of one run, '
        'whose steps are averaged.'
    )
  by_step = checkpoints.steps(runs[0])
  if len(by_step) < 2:
    raise ValueError(
        f'{runs[0]} has one step only, {list(by_step.values())[0]}: there is '
        'nothing to average. Give the directory of a run with several.'
    )
  numbers = np.array(list(by_step))[::-1]
  start, stop, every = steps or (None, None, None)
  where = trajectory.window(numbers, start=start, stop=stop, every=every)
  if every is not None and stop is not None:
    missing = set(range(start or 0, stop + 1, every)) - set(by_step)
    if missing:
      shown = ', '.join(map(str, sorted(missing)[:5]))
      _common.echo(
          f'Warning: {len(missing)} steps of --steps have no checkpoint: '
          f'{shown}{", ..." if len(missing) > 5 else ""}.',
          err=True,
      )
  numbers = numbers[where]
  if (best is None) != (metric is None):
    raise ValueError('--best and --metric go together: give both or neither.')
  if best is not None:
    file, _, name = metric.removesuffix(':min').rpartition(':')
    known = checkpoints.metric(file or runs[0], name)
    sign = -1 if metric.endswith(':min') else 1
    scores = [sign * known.get(step, math.nan) for step in numbers.tolist()]
    # Of equal scores, `best` takes the later of ascending steps.
    numbers = numbers[::-1][trajectory.best(scores[::-1], best)][::-1]
  paths = [_common.checkpoint(by_step[step]) for step in numbers.tolist()]
  return numbers, paths


def alphas(numbers, last, curves, is_compared):
  """Coefficients of these steps, by what they are; one of them, or several that
  are compared, with the last step.
  """
  from jaxsoup import trajectory

  if len(curves) * len(last or [None]) > 1 and not is_compared:
    raise ValueError(
        'Several --last or --decay were given, and nothing that chooses: add '
        '--eval, or give one of each.'
    )
  alphas = {}
  if is_compared:
    only_last = trajectory.window(numbers, last=1)
    alphas['last step'] = trajectory.swa(numbers, where=only_last)
  for num in last or [None]:
    where = trajectory.window(numbers, last=num)
    of = f'last {num}' if num else f'{len(numbers)} steps'
    for curve in curves:
      if curve == 'mean':
        alphas[f'mean of the {of}'] = trajectory.swa(numbers, where=where)
      else:
        name = f'{curve.value} over the {of}'
        alphas[name] = trajectory.decay(numbers, curve.value, where=where)
  return alphas
