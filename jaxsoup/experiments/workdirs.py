"""The workdir of an experiment: opened, locked, with what all stages share.

```
with workdirs.locked(experiment, folder):
  work = workdirs.work_of(experiment, folder)
  work.copies(), work.data, work.logits(params)
```
"""

import collections
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import pathlib
from typing import Any

import jax
from jax.sharding import NamedSharding
import ml_collections
import numpy as np

from jaxsoup import _files
from jaxsoup import _processes
from jaxsoup import _warnings
from jaxsoup import checkpoints
from jaxsoup import evaluation
from jaxsoup import sharding
from jaxsoup import statistics
from jaxsoup.data import sources
from jaxsoup.experiments import architectures
from jaxsoup.experiments import configs
from jaxsoup.experiments import cook
from jaxsoup.experiments import stopping
from jaxsoup.runtime import buckets
from jaxsoup.runtime import locking
from jaxsoup.runtime import metric_log
from jaxsoup.runtime import preemption
from jaxsoup.runtime import progress
from jaxsoup.runtime import user_code
from jaxsoup.train import loop
from jaxsoup.train import modeling
from jaxsoup.train import unfinished
from jaxsoup.typing import Json
from jaxsoup.typing import Params


class Logits(collections.UserDict[str, Any]):
  """Logits `[N, C]` of a model by data set, made or read on each access."""

  def __init__(self, names: Iterable[str], read_fn: Callable[[str], Any]):
    super().__init__(dict.fromkeys(names))
    self._read_fn = read_fn

  def __getitem__(self, name: str) -> np.ndarray:
    if name not in self:
      raise KeyError(name)
    return self._read_fn(name)


@dataclasses.dataclass(frozen=True)
class Work:
  """What all stages of one experiment share."""

  experiment: configs.Experiment
  model: modeling.Model
  splits: sources.Splits
  workdir: pathlib.Path
  progress_fn: progress.ProgressFn
  stop: preemption.Stop
  log: metric_log.MetricLog
  _stored: dict[pathlib.Path, Json] = dataclasses.field(default_factory=dict)

  @property
  def config(self) -> ml_collections.ConfigDict:
    return self.experiment.config

  @functools.cached_property
  def data(self) -> dict[str, sources.Source]:
    """What scores the models: held-out chooses, test and its shifts report."""
    return {
        'held_out': self.splits.held_out,
        'test': self.splits.test,
        **self.splits.shifts,
    }

  @functools.cached_property
  def labels(self) -> dict[str, np.ndarray]:
    """The labels of each data set."""
    return {name: sources.labels_of(x) for name, x in self.data.items()}

  def logits(self, params: Params) -> dict[str, np.ndarray]:
    """Logits `[N, C]` of a model on each data set."""
    return {name: fn(params) for name, fn in self._logits_fns.items()}

  def logits_of(
      self, path: pathlib.Path, params_fn: Callable[[], Params]
  ) -> Logits:
    """Logits of a model from the disk; evaluated once.

    Those of `WORKDIR/runs/03` are in `WORKDIR/logits/03.npz`.
    """
    file = path.parent.parent / 'logits' / f'{path.name}.npz'
    if not _processes.agreed(file.exists()):
      arrays: dict[str, Any] = self.logits(params_fn())
      if _processes.is_main():
        file.parent.mkdir(parents=True, exist_ok=True)
        with _files.replaced(file) as unfinished, unfinished.open('wb') as f:
          np.savez(f, **arrays)
      _processes.wait_for_all('the logits are written')

    def read_fn(name):
      with file.open('rb') as opened, np.load(opened) as stored:
        return stored[name]  # Only this array of it is read.

    return Logits(self.data, read_fn)

  def stopping(self, batches: Iterable[Any]) -> stopping.Stoppable:
    """Batches that look for a request to stop before each one."""
    saved = f'{self.workdir} holds what is finished'
    return stopping.Stoppable(batches, self.stop, saved)

  def logits_fn(self, source: sources.Source) -> Callable[[Params], Any]:
    """`params -> [N, C]`, the logits of the examples of a source."""
    sharding, size = on(self.config), self.config.batch_size
    batches = self.stopping(cook.batches_of(source, size, sharding))
    return evaluation.logits_of(self.model.logits_fn, batches)

  @functools.cached_property
  def _logits_fns(self) -> dict[str, Callable[[Params], Any]]:
    return {name: self.logits_fn(source) for name, source in self.data.items()}

  def saved(self, name: str) -> unfinished.Saved:
    return unfinished.Saved(
        self.workdir / 'unfinished' / name,
        self.stop,
        minutes=self.config.save_every_minutes,
    )

  def copies(self) -> list[tuple[int, str, pathlib.Path]]:
    """Run, name of the copy, and path of everything that is to be souped.

    Not of what diverged.
    """
    names = self.config.get('ingredients', None)
    copies = [
        (i, name, self.workdir / 'runs' / f'{i:02d}_{name}'.rstrip('_'))
        for i in range(len(self.experiment.runs))
        for name in loop.names_of(self.config.finetune)
        if names is None or name in names
    ]
    return [x for x in copies if not self.stored(x[-1]).get('diverged')]

  def diverged(self) -> list[str]:
    """Names of the runs that are there with NaN or infinite values."""
    stored = self._stored.items()
    return sorted(path.name for path, x in stored if x.get('diverged'))

  def stored(self, path: pathlib.Path) -> Json:
    """What was saved with a run; empty if it is not there. Read once."""
    if path not in self._stored and buckets.is_whole(path):
      self._stored[path] = checkpoints.provenance(path)['metadata']
    return self._stored.get(path, {})


@contextlib.contextmanager
def locked(
    experiment: configs.Experiment, folder: pathlib.Path
) -> Iterator[None]:
  """A workdir, by its absolute path, locked, of this config, without leftovers.

  Raises:
    UsageError: no data, or the workdir was started with another config.
    InUseError: another process uses the workdir.
  """
  if experiment.data_fn is None:
    raise configs.UsageError(
        'The config file has no function data(config). It must return '
        'jaxsoup.data.sources.Splits: see configs/digits.py.'
    )
  shard, num_shards = shard_of(experiment.config)
  name = '.lock' if num_shards == 1 else f'.lock_{shard}_{num_shards}'
  mesh = mesh_of(experiment.config)
  if jax.process_count() > 1 and mesh is None:
    raise configs.UsageError(
        f'{jax.process_count()} processes can train one run together only if '
        'config.is_sharded is True: set it, or start the processes separately, '
        'with --config.sweep.shard=i/n.'
    )
  with contextlib.ExitStack() as stack:
    if _processes.is_main():
      if _files.is_remote(folder):
        _warnings.warn(
            'There are no locks in a bucket: make sure that no other process '
            f'uses {folder}.'
        )
      stack.enter_context(locking.locked(folder / name, folder))
    if mesh:
      stack.enter_context(jax.set_mesh(mesh))
    configs.check_unchanged(experiment.config, folder / 'config.json')
    if _processes.is_main() and num_shards == 1:  # It is ours.
      for name in ('.', 'runs', 'soups', 'exported', 'logits', 'landscape'):
        _files.clear_leftovers(folder / name)
      for path in folder.glob('splits/*/*'):
        _files.clear_leftovers(path)
    yield


def work_of(
    experiment: configs.Experiment,
    folder: pathlib.Path,
    progress_fn: progress.ProgressFn = progress.silent,
    stop: preemption.Stop | None = None,
) -> Work:
  """Model and data of an experiment, with its workdir, an absolute path.

  Raises:
    UsageError: a function of the config file returned something else.
    ValueError: examples with two roles.
  """
  config = experiment.config
  progress_fn('pre-training', 0.0)
  splits = experiment.data_fn(config)  # type: ignore[misc]
  if not isinstance(splits, sources.Splits):
    raise configs.UsageError(
        f'data(config) returned {splits!r:.80}: expected '
        'jaxsoup.data.sources.Splits, see configs/digits.py.'
    )
  write_fn = None
  if experiment.log_fn is not None and _processes.is_main():
    write_fn = experiment.log_fn(config)
    if not callable(write_fn):
      raise configs.UsageError(
          f'log(config) returned {write_fn!r:.80}: expected a function that is '
          "called with dicts, such as wandb.init(project='soups').log."
      )
    write_fn = user_code.guarded(write_fn, None, 'the function of log(config)')
  board = folder / 'tensorboard' if config.get('tensorboard', False) else None
  work = Work(
      experiment=experiment,
      model=architectures.of(experiment),
      splits=splits,
      workdir=folder,
      progress_fn=progress_fn,
      stop=stop or preemption.Stop(),
      log=metric_log.MetricLog(
          folder / 'metrics.jsonl', tensorboard=board, write_fn=write_fn
      ),
  )
  check_roles(work)
  return work


def check_roles(work: Work) -> None:
  """Rejects examples that have two roles: training, selecting, reporting.

  Compared are data in memory, and files of folders, those only until theta_0
  is there: they may be millions. Other sources document by what rule the
  held-out set is taken out of the training data.

  Raises:
    ValueError: examples with two roles; names them.
  """
  splits = work.splits
  pretrain = [splits.pretrain] if 'pretrain' in work.config else []
  roles: dict[str, list[Any]] = {
      'train': [splits.train, *pretrain],
      'held_out': [splits.held_out],
      'test': [splits.test, *splits.shifts.values()],
  }
  inputs_of = lambda x: [{name: x.arrays[name] for name in work.model.inputs}]
  by_role = lambda fn: {
      role: [part for x in members for part in fn(x)]
      for role, members in roles.items()
  }
  statistics.check_disjoint(
      **by_role(lambda x: inputs_of(x) if hasattr(x, 'arrays') else [])
  )
  if not (work.workdir / 'theta_0').exists():
    statistics.check_disjoint_files(**by_role(sources.files_of))


def shard_of(config: ml_collections.ConfigDict) -> tuple[int, int]:
  """Which part of the runs is trained here: (i, n) of `sweep.shard` = 'i/n'.

  Raises:
    UsageError: it is malformed.
  """
  text = config.sweep.get('shard', '0/1')
  i, _, n = text.partition('/')
  if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
    raise configs.UsageError(
        f"sweep.shard is {text!r}: write 'i/n' with i in 0..n-1, such as '0/4'."
    )
  return int(i), int(n)


def mesh_of(config: ml_collections.ConfigDict) -> jax.sharding.Mesh | None:
  """The mesh of all devices, if the experiment is sharded."""
  return loop.all_devices() if config.get('is_sharded', False) else None


def abstract(config: ml_collections.ConfigDict, params: Params) -> Params:
  """Shapes of the parameters, with shardings if the experiment is sharded."""
  shapes, mesh = jax.eval_shape(lambda: params), mesh_of(config)
  return sharding.fsdp(shapes, mesh) if mesh else shapes


def on(config: ml_collections.ConfigDict) -> NamedSharding | None:
  """How batches lie, if the experiment is sharded."""
  mesh = mesh_of(config)
  return loop.split(mesh) if mesh else None
