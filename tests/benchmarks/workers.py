"""Wall time of a greedy search and of a sweep on workers, against the ideal.

```
python tests/benchmarks/workers.py
python tests/benchmarks/workers.py --sweep [--config FILE OVERRIDE...]
```

32 ingredients, evaluations that sleep for 0.2 s, threads as workers; scores
such that so many of the 32 trials are accepted. The ideal: the singles, then,
between two acceptances, as many rounds as there are candidates for the workers.

On two cores that others use, too, and that all 64 threads share (what is stale
takes their time as well):

```
accepted  workers    time   ideal  speed-up  stale
       2        1   15.2 s  12.6 s      0.8x      0
       2        2    8.0 s   6.4 s      1.6x      0
       2        4    3.4 s   3.2 s      3.7x      0
       2        8    1.8 s   1.6 s      7.0x      0
       2       64    0.5 s   0.4 s     27.0x      0
       8        1   13.3 s  12.6 s      0.9x      0
       8        2    7.3 s   6.6 s      1.7x      5
       8        4    4.6 s   3.6 s      2.8x     14
       8        8    3.3 s   2.2 s      3.8x     37
       8       64    2.0 s   1.6 s      6.3x     93
      16        1   13.3 s  12.6 s      0.9x      0
      16        2    7.9 s   6.4 s      1.6x      9
      16        4    7.7 s   4.6 s      1.6x     35
      16        8    5.6 s   3.8 s      2.2x     84
      16       64    7.2 s   3.2 s      1.8x    197
two processes: 4.2 s to start, 0.15 ms a call
```

A sweep, 24 runs of `configs/digits.py` in four groups, from the end of the
pre-training to that of the fine-tuning (2 cores, spawned processes):

```
python tests/benchmarks/workers.py --sweep --config.sweep.group_size=6 \
    [--config.finetune.num_epochs=200]

epochs  here    1 worker  2 workers
    20  17.1 s    21.2 s     19.8 s
   200  71.2 s    69.3 s     50.7 s
```

A worker takes some ten seconds to start and to compile, and a run alone already
keeps 1.3 of the two cores busy, so that two workers can be 1.5 times as fast;
they are 1.4 times. Workers with a machine each do not share what limits here.
"""

import argparse
from concurrent import futures
import math
import multiprocessing
import pathlib
import tempfile
import time

import numpy as np

import jaxsoup
from jaxsoup import _workers
from jaxsoup.experiments import configs
from jaxsoup.experiments import main as experiments

NUM = 32
SECONDS = 0.2


def problem(num_accepted):
  """Models, and scores of which the order of trial accepts every n-th."""
  models = [np.eye(NUM, dtype=np.float32)[k] for k in range(NUM)]
  kept = np.linspace(0, NUM - 1, num_accepted).round().astype(int)
  gains = np.isin(np.arange(NUM), kept)

  def eval_fn(params):
    time.sleep(SECONDS)
    members = np.asarray(params) > 0
    if members.sum() == 1:
      return -float(members.argmax())  # Tried in this order.
    return float(members @ np.where(gains, 1.0, -1000.0))

  return models, eval_fn


def ideal(trials, num_workers):
  """Seconds, with evaluations of stale candidates that end at once."""
  rounds, run = math.ceil(NUM / num_workers), 0
  for trial in trials[1:]:  # The first one is a single.
    run += 1
    if trial.accepted:
      rounds, run = rounds + math.ceil(run / num_workers), 0
  return SECONDS * (rounds + math.ceil(run / num_workers))


def row(num_accepted, num_workers):
  models, eval_fn = problem(num_accepted)
  began = time.perf_counter()
  with futures.ThreadPoolExecutor(num_workers) as executor:
    soup = jaxsoup.greedy(
        models, eval_fn, executor=executor, num_ahead=num_workers
    )
    seconds = time.perf_counter() - began
  info = soup.info
  assert sum(t.accepted for t in info.trials) == num_accepted
  one = ideal(info.trials, 1)
  best = ideal(info.trials, num_workers)
  print(
      f'{num_accepted:8} {num_workers:8} {seconds:6.1f} s {best:5.1f} s '
      f'{one / seconds:8.1f}x {info.stale:6}',
      flush=True,
  )


def nothing(value):
  return value


def overhead(num=200):
  """Seconds for a call that does nothing, on two spawned processes."""
  context = multiprocessing.get_context('spawn')
  with futures.ProcessPoolExecutor(2, context) as executor:
    calls = _workers.Calls(executor, nothing, 4)
    began = time.perf_counter()
    list(calls.values(range(2)))
    start = time.perf_counter() - began
    began = time.perf_counter()
    list(calls.values(range(num)))
    return start, (time.perf_counter() - began) / num


class _TrainedError(Exception):
  """The fine-tuning is over."""


def sweep(config, overrides, num_workers):
  """Seconds of the fine-tuning on spawned processes; 0 is here."""
  loaded, began = configs.load(config, overrides), [0.0]

  def progress_fn(stage, share):
    if stage == 'pre-training':
      began[0] = time.perf_counter()
    if stage == 'souping':
      raise _TrainedError

  context = multiprocessing.get_context('spawn')
  with tempfile.TemporaryDirectory() as workdir:
    try:
      if not num_workers:
        experiments.run(loaded, workdir, progress_fn)
      with futures.ProcessPoolExecutor(num_workers, context) as executor:
        experiments.run(loaded, workdir, progress_fn, executor=executor)
    except _TrainedError:
      return time.perf_counter() - began[0]


def searches():
  models, _ = problem(1)  # Compiled once.
  jaxsoup.greedy(models, lambda params: float(params[0]))
  print('accepted  workers    time   ideal  speed-up  stale')
  for num_accepted in (2, 8, 16):
    for num_workers in (1, 2, 4, 8, 64):
      row(num_accepted, num_workers)
  start, seconds = overhead()
  print(
      f'two processes: {start:.1f} s to start, {1000 * seconds:.2f} ms a call'
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--sweep', action='store_true')
  root = pathlib.Path(__file__).parents[2]
  parser.add_argument('--config', default=str(root / 'configs' / 'digits.py'))
  asked, overrides = parser.parse_known_args()
  if not asked.sweep:
    searches()
    return
  for num_workers in (0, 1, 2):
    seconds = sweep(asked.config, overrides, num_workers)
    print(f'{num_workers} workers: {seconds:.1f} s', flush=True)


if __name__ == '__main__':
  main()
