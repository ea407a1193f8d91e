"""The workdir of an experiment: opened, locked, with what all stages share.

```
with workdirs.opened(experiment, folder) as work:
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

  def __init__(
      self, names: Iterable[str], read_fn: Callable[[str], np.ndarray]
  ):
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

    Args:
      path: of the model, such as `WORKDIR/runs/03`; its logits are in
        `WORKDIR/logits/03.npz`.
      params_fn: returns its parameters.
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

  @functools.cached_property
  def _logits_fns(self) -> dict[str, Any]:
    sharding = on(self.config)
    return {
        name: evaluation.logits_of(
            self.model.logits_fn,
            self.stopping(
                cook.batches_of(source, self.config.batch_size, sharding)
            ),
        )
        for name, source in self.data.items()
    }

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
def opened(
    experiment: configs.Experiment,
    folder: pathlib.Path,
    progress_fn: progress.ProgressFn = progress.silent,
    stop: preemption.Stop | None = None,
) -> Iterator[Work]:
  """`work_of` in a workdir that is `locked`: see these for errors."""
  with locked(experiment, folder):
    yield work_of(experiment, folder, progress_fn, stop)


@contextlib.contextmanager
def locked(
    experiment: configs.Experiment, folder: pathlib.Path
) -> Iterator[None]:
  """A workdir that is locked, belongs to the config, and has no leftovers.

  Args:
    experiment: of `configs.load`.
    folder: the workdir, an absolute path.

  Raises:
    UsageError: no data, or the workdir was started with another config.
    InUseError: another process uses the workdir.
  """
  if experiment.data_fn is None:
    raise configs.UsageError(
        'The config file has no function data(config). It must return '
        'jaxsoup.data.sources.Splits: see configs/digits.py.'
    )
  config = experiment.config
  shard, num_shards = shard_of(config)
  name = '.lock' if num_shards == 1 else f'.lock_{shard}_{num_shards}'
  mesh = mesh_of(config)
  if jax.process_count() > 1 and mesh is None:
    raise configs.UsageError(
        f'{jax.process_count()} processes can train one run together only if '
        'config.is_sharded is True: set it, or start the processes separately, '
        'with --config.sweep.shard=i/n.'
    )
  held = (
      locking.locked(folder / name, folder)
      if _processes.is_main()
      else contextlib.nullcontext()
  )
  if _files.is_remote(folder) and _processes.is_main():
    _warnings.warn(
        f'There are no locks in a bucket: make sure that no other process uses '
        f'{folder}.'
    )
  with held, jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
    is_alone = _processes.is_main() and num_shards == 1
    if is_alone:
      _files.clear_leftovers(folder, 'config.json')
    configs.check_unchanged(config, folder / 'config.json')
    if is_alone:  # It is ours.
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
  """Model and data of an experiment, with its workdir.

  Args:
    experiment: of `configs.load`.
    folder: the workdir, an absolute path.
    progress_fn: as in `run`.
    stop: as in `run`.

  Returns:
    What the stages share.

  Raises:
    UsageError: `data(config)` returned something else.
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
  has_board = config.get('tensorboard', False)
  work = Work(
      experiment=experiment,
      model=architectures.of(experiment),
      splits=splits,
      workdir=folder,
      progress_fn=progress_fn,
      stop=stop or preemption.Stop(),
      log=metric_log.MetricLog(
          folder / 'metrics.jsonl',
          tensorboard=folder / 'tensorboard' if has_board else None,
          write_fn=_write_fn(experiment),
      ),
  )
  check_roles(work)
  return work


def _write_fn(experiment: configs.Experiment) -> metric_log.WriteFn | None:
  """What `log(config)` of the config file returns; on the main process only."""
  if experiment.log_fn is None or not _processes.is_main():
    return None
  write_fn = experiment.log_fn(experiment.config)
  if not callable(write_fn):
    raise configs.UsageError(
        f'log(config) returned {write_fn!r:.80}: expected a function that is '
        "called with dicts, such as wandb.init(project='soups').log."
    )
  return user_code.guarded(write_fn, None, 'the function of log(config)')


def check_roles(work: Work) -> None:
  """Rejects examples that have two roles: training, selecting, reporting.

  Compared are data in memory, and files of folders, those only until theta_0
  is there: they may be millions. Other sources document by what rule the
  held-out set is taken out of the training data.

  Raises:
    ValueError: examples with two roles; names them.
  """
  pretrain = [work.splits.pretrain] if 'pretrain' in work.config else []
  roles: dict[str, list[Any]] = {
      'train': [work.splits.train, *pretrain],
      'held_out': [work.splits.held_out],
      'test': [work.splits.test, *work.splits.shifts.values()],
  }
  statistics.check_disjoint(
      **{
          role: [
              {name: x.arrays[name] for name in work.model.inputs}
              for x in members
              if hasattr(x, 'arrays')
          ]
          for role, members in roles.items()
      }
  )
  if not (work.workdir / 'theta_0').exists():
    statistics.check_disjoint_files(
        **{
            role: [path for x in members for path in sources.files_of(x)]
            for role, members in roles.items()
        }
    )


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
