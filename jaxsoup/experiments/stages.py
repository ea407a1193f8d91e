"""From a start to fine-tuned runs: the stages of an experiment that train.

```
theta_0 = stages.theta_0(work)
is_complete = stages.finetune_all(work, theta_0)
ingredients = stages.ingredients(work, theta_0)
```

Each stage does what is left to do, and leaves checkpoints in the workdir.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import operator
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup import _json
from jaxsoup import _processes
from jaxsoup import _warnings
from jaxsoup import checkpoints
from jaxsoup import evaluation
from jaxsoup.experiments import configs
from jaxsoup.experiments import cook
from jaxsoup.experiments import stopping
from jaxsoup.experiments import workdirs
from jaxsoup.runtime import buckets
from jaxsoup.runtime import locking
from jaxsoup.runtime import preemption
from jaxsoup.train import loop
from jaxsoup.train import steps
from jaxsoup.typing import Params


def theta_0(work: workdirs.Work) -> Params:
  """The start of all runs: from a file or from scratch, then pre-trained by
  `config.pretrain`, then with a probed head by `config.probe`.

  Of several processes with one workdir one makes it, and the others wait.
  """
  path = work.workdir / 'theta_0'
  if not buckets.are_whole(path):
    with _alone(work, path):
      if not buckets.are_whole(path):
        work.progress_fn('pre-training', 0.0)
        metadata = {'seed': work.config.seed}
        checkpoints.save(path, _start(work), metadata=metadata)
        work.saved('theta_0').delete()
  # Always from the disk, so that a second start sees the same parameters.
  return _read(work, path)


@contextlib.contextmanager
def _alone(work: workdirs.Work, path: pathlib.Path) -> Iterator[None]:
  """Waits until no other experiment is making what is at the path."""
  if not _processes.is_main():
    yield
    return
  while True:
    try:
      with locking.locked(path.with_name(f'.{path.name}.lock'), path):
        yield
        return
    except locking.InUseError:
      if jax.process_count() == 1:  # Else the others do not ask here.
        work.stop.check(f'another process is making {path}')
      time.sleep(1.0)


def _start(work: workdirs.Work) -> Params:
  config, model = work.config, work.model
  params = model.start_fn(jax.random.key(config.seed))
  if workdirs.on(config) is not None:
    params = jax.tree.map(
        lambda x, like: evaluation.placed(np.asarray(x), like.sharding),
        params,
        workdirs.abstract(config, params),
    )
  if 'pretrain' in config:
    params = _pretrained(work, params)
  if 'probe' in config:
    params = loop.probe(
        model,
        config.probe,
        params,
        work.splits.train,
        batch_size=config.batch_size,
        sharding=workdirs.on(config),
        saved=work.saved('probe'),
        checked_fn=work.stopping,
    )
  return params


def _pretrained(work: workdirs.Work, params: Params) -> Params:
  """Kept until theta_0 is there: the probe may be stopped."""
  path = work.workdir / 'unfinished' / 'pretrained'
  if not buckets.are_whole(path):
    if work.splits.pretrain is None:
      raise configs.UsageError(
          'config.pretrain is set, but data(config) returns no `pretrain` set: '
          'add one, or remove config.pretrain.'
      )
    settings = work.config.pretrain
    trained = loop.train_one(
        work.model,
        settings,
        params,
        {**settings.run.to_dict(), 'seed': work.config.seed},
        work.splits.pretrain,
        progress_fn=lambda epoch, num_epochs, _: work.progress_fn(
            'pre-training', epoch / num_epochs
        ),
        saved=work.saved('theta_0'),
        **_logged(work, ['pretrain']),
    )
    checkpoints.save(path, trained)
  return _read(work, path)


def _read(work: workdirs.Work, path: pathlib.Path) -> Params:
  stored = checkpoints.Ingredients([path]).abstract_params
  abstract = workdirs.abstract(work.config, stored)
  return checkpoints.Ingredients([path], abstract)[0]


def _logged(work: workdirs.Work, names: Sequence[Any]) -> dict[str, Any]:
  """Options of `loop.train` that log the metrics of runs with these names."""
  log = lambda row, values: work.log.write({'run': names[row], **values})
  return {'log_fn': log, 'log_every': work.config.get('log_every_steps', 50)}


def finetune_all(work: workdirs.Work, start: Params) -> bool:
  """Fine-tunes those runs of this shard that are not there yet, from a start.

  Returns:
    Whether all runs of all shards are there.

  Raises:
    UsageError: a run that is there was trained with other hyper-parameters.
  """
  _check_trained(work)
  size = work.config.sweep.group_size
  shard, num_shards = workdirs.shard_of(work.config)
  mine = steps.grouped(work.experiment.runs, size)[shard::num_shards]
  num_runs = sum(map(len, mine))
  num_done = 0
  for group in mine:

    def progress_fn(epoch, num_epochs, _, group=group, before=num_done):
      done = (before + len(group) * epoch / num_epochs) / num_runs
      work.progress_fn('fine-tuning', done)

    with _alone(work, work.workdir / 'runs' / f'{group[0]:02d}'):
      _finetune_group(work, start, group, progress_fn)
    num_done += len(group)
  is_complete = buckets.are_whole(*(path for _, _, path in work.copies()))
  if is_complete:
    warn_of(work.diverged())
    if not work.copies():
      raise configs.UsageError(
          'All runs diverged: lower config.sweep.learning_rate, and use '
          'another workdir.'
      )
    if _processes.is_main():
      buckets.remove(work.workdir / 'unfinished')
  return is_complete


def warn_of(diverged: Sequence[str]) -> None:
  """Says which runs are left out."""
  if diverged:
    _warnings.warn(
        f'{", ".join(diverged)} diverged (NaN or infinite values), and will '
        'not be part of any soup.'
    )


def _check_trained(work: workdirs.Work) -> None:
  """Raises if a run is there that `sweep(config)` now describes otherwise."""
  for run, _, path in work.copies():
    now = _json.plain(work.experiment.runs[run])
    then = work.stored(path).get('config', now)
    differing = [
        f'{key} {then.get(key)!r} (now {now.get(key)!r})'
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    if differing:
      raise configs.UsageError(
          f'{path} was trained with {", ".join(differing)}: sweep(config) was '
          'changed since. Undo that, or use another workdir.'
      )


def _finetune_group(work: workdirs.Work, start, group, progress_fn) -> None:
  """Trains all runs of a group if one is missing, and saves those.

  All of them, so that a run does not depend on which others were missing.
  """
  saved = work.saved(f'runs_{group[0]:02d}')
  paths = {(i, name): path for i, name, path in work.copies() if i in group}
  for (i, name), path in paths.items():
    unscored = _unscored(work, path)
    if buckets.are_whole(unscored):
      _save(work, path, i, name, _read(work, unscored))
  if not buckets.are_whole(*paths.values()):

    def keep_fn(name, stacked):
      if jax.process_count() == 1:
        stacked = jax.device_get(stacked)
      for row, i in enumerate(group):
        if (i, name) in paths:
          params = jax.tree.map(operator.itemgetter(row), stacked)
          _save(work, paths[i, name], i, name, params)

    stacked = loop.train(
        work.model,
        work.config.finetune,
        start,
        [work.experiment.runs[i] for i in group],
        work.splits.train,
        progress_fn=progress_fn,
        saved=saved,
        keep_fn=keep_fn,
        **_logged(work, group),
    )
    keep_fn('', stacked)
  if work.stop.requested:
    raise preemption.Preempted(f'{work.workdir} holds the runs so far')
  saved.delete()


def _unscored(work: workdirs.Work, path: pathlib.Path) -> pathlib.Path:
  return work.workdir / 'unfinished' / 'unscored' / path.name


def _save(work: workdirs.Work, path, run: int, name: str, params) -> None:
  """Saves a run with its score; first its logits, which are needed later.

  When the script is to stop, without a score: the next call does the rest.
  """
  if buckets.are_whole(path):
    return
  try:
    logits = work.logits_of(path, lambda: params)
  except preemption.Preempted:
    if not buckets.are_whole(_unscored(work, path)):
      checkpoints.save(_unscored(work, path), params)
    return
  metric = cook.metric_of(work.config)
  score = float(metric(logits['held_out'], work.labels['held_out']))
  metadata = {'config': dict(work.experiment.runs[run]), 'held_out': score}
  if name:
    metadata['copy'] = name
  if not jax.device_get(_is_finite(params)):
    metadata['diverged'] = True
  checkpoints.save(path, params, metadata=metadata)
  work.log.write({'run': run, 'copy': name, 'held_out': score})


@jax.jit
def _is_finite(params: Params) -> jax.Array:
  leaves = jax.tree.leaves(params)
  return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()


def ingredients(work: workdirs.Work, start: Params) -> stopping.Ingredients:
  """The fine-tuned runs, on the devices that `config.is_sharded` asks for."""
  return stopping.Ingredients(
      [path for _, _, path in work.copies()],
      workdirs.abstract(work.config, start),
      stop=work.stop,
      saved=f'{work.workdir} holds all runs, and the scores and soups so far',
  )
