"""Pools of fine-tuned models: a sweep, and what else the paper's studies vary.

```
with pools.Bench(experiment, workdir) as bench:
  pool = bench['rates']                     # trained, if it is missing
  pool.soup((0, 1)).shifts, pool.ensemble((0, 1)).shifts
```

Each pool is a separate workdir in `workdir`, in which everything resumes.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import copy
import dataclasses
import functools
import itertools
import pathlib
from typing import Any
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

import jaxsoup
from jaxsoup import checkpoints
from jaxsoup import ensembles
from jaxsoup._soup import SearchInfo
from jaxsoup.data import shifts
from jaxsoup.data import sources
from jaxsoup.experiments import configs
from jaxsoup.experiments import cook
from jaxsoup.experiments import results
from jaxsoup.experiments import stages
from jaxsoup.experiments import workdirs
from jaxsoup.runtime import preemption
from jaxsoup.train import loop
from jaxsoup.train import modeling
from jaxsoup.typing import Params
from jaxsoup.typing import PathLike

# Hyper-parameters that `one_factor` varies, each in `NUM_VALUES` runs.
FACTORS = ('seed', 'learning_rate', 'mixup', 'affine')
NUM_VALUES = 4
# Of the larger pools; a multiple of a group, so that few programs are compiled.
NUM_RUNS = 8
SAM_RADIUS = 0.05
# Shifts that models are fine-tuned on, one each, under a head that is frozen.
DATA_SETS = ('noise', 'occlusion', 'shear')
NUM_NARROW = 50


class Scores(NamedTuple):
  """Of one model, in per cent; `shifts` is the mean over the shifted sets."""

  held_out: float
  test: float
  shifts: float


class Variant(NamedTuple):
  """How a pool differs from the sweep of the config.

  Attributes:
    runs: hyper-parameters of each run.
    start_fn: (work, theta_0 of the sweep) -> theta_0. None: it is pre-trained
      again.
    change_fn: changes the config in place.
    data_fn: (config, splits) -> splits.
    frozen: the part of the model that is not trained.
  """

  runs: list[configs.Run]
  start_fn: Callable[[workdirs.Work, Params], Params] | None = lambda work, x: x
  change_fn: Callable[[ml_collections.ConfigDict], Any] = lambda config: None
  data_fn: Callable[[Any, sources.Splits], sources.Splits] = lambda _, x: x
  frozen: str = ''


class Pool:
  """Fine-tuned models in memory, and scores of them and their soups.

  Attributes:
    work: the experiment of this pool.
    theta_0: the start of its runs.
    models: K pytrees.
    names: of the models: '03', '03_ema_0.95'.
    logits: `[K, N, C]` by data set.
    known: remembered held-out scores, by members.
    eval_fn: the score on the held-out data.
  """

  def __init__(self, work: workdirs.Work, theta_0: Params):
    self.work, self.theta_0 = work, theta_0
    stages.finetune_all(work, theta_0)
    paths = [path for _, _, path in work.copies()]
    self.names = [path.name for path in paths]
    ingredients = checkpoints.Ingredients(paths)
    self.models = [ingredients[k] for k in range(len(paths))]
    each = [
        work.logits_of(path, functools.partial(self.models.__getitem__, k))
        for k, path in enumerate(paths)
    ]
    self.logits = {
        name: np.stack([logits[name] for logits in each]) for name in work.data
    }
    self.known: dict[Any, Any] = {}  # Scores, or bounds on them.
    batches = cook.batches_of(work.splits.held_out, work.config.batch_size)
    self.eval_fn = cook.score_fn(work.config, work.model.logits_fn, batches)
    self._soups: dict[tuple[int, ...], Scores] = {}

  @property
  def runs(self) -> list[configs.Run]:
    return self.work.experiment.runs

  def __len__(self) -> int:
    return len(self.models)

  def scores_of(self, logits: Mapping[str, np.ndarray]) -> Scores:
    """Of logits `[N, C]` by data set."""
    metric = cook.metric_of(self.work.config)
    scores = {
        name: 100 * float(metric(x, self.work.labels[name]))
        for name, x in logits.items()
    }
    shifted = [scores[name] for name in self.work.splits.shifts]
    return Scores(scores['held_out'], scores['test'], float(np.mean(shifted)))

  def of(self, params: Params) -> Scores:
    """Of any parameters."""
    return self.scores_of(self.work.logits(params))

  @functools.cached_property
  def singles(self) -> list[Scores]:
    return [
        self.scores_of({name: x[k] for name, x in self.logits.items()})
        for k in range(len(self))
    ]

  def _of(self, members: Sequence[int] | None) -> Sequence[int]:
    return range(len(self)) if members is None else members

  def mean(self, members: Sequence[int] | None = None) -> Scores:
    """The mean of the scores of single models."""
    return mean_scores([self.singles[k] for k in self._of(members)])

  def best(self, members: Sequence[int] | None = None) -> int:
    """Which single model is the best on the held-out data."""
    return max(self._of(members), key=lambda k: self.singles[k].held_out)

  def soup(self, members: Sequence[int] | None = None) -> Scores:
    """The uniform soup of some models, all by default."""
    members = tuple(self._of(members))
    if members not in self._soups:
      soup = jaxsoup.uniform([self.models[k] for k in members])
      self._soups[members] = self.of(soup.params)
    return self._soups[members]

  def ensemble(self, members: Sequence[int] | None = None) -> Scores:
    """The mean of the logits of some models, all by default."""
    rows = list(self._of(members))
    return self.scores_of(
        {name: x[rows].mean(0) for name, x in self.logits.items()}
    )

  def greedy(self) -> jaxsoup.Soup[SearchInfo]:
    """The greedy soup."""
    return jaxsoup.greedy(self.models, self.eval_fn, scores=self.known)


def mean_scores(scores: Sequence[Scores]) -> Scores:
  """Of several models, set by set."""
  return Scores(*np.mean(scores, axis=0).tolist())


class Bench(contextlib.ExitStack):
  """The pools of one experiment by name, each trained on first access.

  A context, at the end of which their workdirs are no longer locked.
  """

  def __init__(
      self,
      experiment: configs.Experiment,
      workdir: PathLike,
      stop: preemption.Stop | None = None,
  ):
    """Trains nothing yet.

    Args:
      experiment: of `configs.load`, with data in memory and the ranges of
        `configs/digits.py` in its sweep.
      workdir: where the pools go.
      stop: whether the script is asked to stop.
    """
    super().__init__()
    self.experiment = experiment
    self.workdir, self._stop = pathlib.Path(workdir).absolute(), stop
    self._pools: dict[str, Pool] = {}
    self._frozen: modeling.Model | None = None
    self.cache: dict[str, Any] = {}

  @property
  def config(self) -> ml_collections.ConfigDict:
    return self.experiment.config

  @property
  def runs(self) -> list[configs.Run]:
    return self.experiment.runs

  def __getitem__(self, name: str) -> Pool:
    if name not in self._pools:
      self._pools[name] = self._made(name, VARIANTS[name](self))
    return self._pools[name]

  def _made(self, name: str, variant: Variant) -> Pool:
    base = self.experiment
    config = copy.deepcopy(base.config)
    variant.change_fn(config)
    make_fn: Any = base.data_fn
    experiment = base._replace(
        config=config,
        runs=variant.runs,
        data_fn=lambda config: variant.data_fn(config, make_fn(config)),
    )
    folder = self.workdir / name
    self.enter_context(workdirs.locked(experiment, folder))
    work = workdirs.work_of(experiment, folder, stop=self._stop)
    path = work.workdir / 'theta_0'
    if variant.start_fn is not None and not path.exists():
      checkpoints.save(path, variant.start_fn(work, self['sweep'].theta_0))
    theta_0 = stages.theta_0(work)
    if variant.frozen:
      # One model for all pools, or each would be compiled.
      self._frozen = self._frozen or modeling.frozen(
          work.model, variant.frozen, theta_0
      )
      work = dataclasses.replace(work, model=self._frozen)
    pool = Pool(work, theta_0)
    if name == 'sweep':
      results.make(work, theta_0)
    return pool

  def teacher(self) -> np.ndarray:
    """Logits `[N, C]` of the ensemble of the sweep, on the training data."""
    pool = self['sweep']
    batches = cook.batches_of(
        pool.work.splits.train, pool.work.config.batch_size
    )
    logits = ensembles.collect(pool.models, pool.work.model.logits_fn, batches)
    return np.mean(logits, axis=0)


def middle(config: ml_collections.ConfigDict) -> configs.Run:
  """The run in the middle of all ranges of the sweep.

  Example:
    >>> sweep = dict(num_runs=3, learning_rate=(1e-3, 1e-1), mixup=(0.0, 0.5))
    >>> middle(ml_collections.ConfigDict({'sweep': sweep}))
    {'seed': 0, 'learning_rate': 0.01, 'mixup': 0.25}
  """
  run: configs.Run = {'seed': 0}
  for name, value in config.sweep.items():
    if isinstance(value, tuple):
      low, high = value
      run[name] = float(_spread(low, high, 3)[1])
  return run


def _spread(low: float, high: float, num: int) -> np.ndarray:
  """From one end to the other; of rates, by equal factors."""
  is_rate = low > 0 and high / low > 5
  return (np.geomspace if is_rate else np.linspace)(low, high, num)


def _one_factor(bench: Bench) -> Variant:
  """Runs that differ in one hyper-parameter."""
  centre = middle(bench.config)
  runs = []
  for name in FACTORS:
    values: Sequence[float] = range(1, NUM_VALUES + 1)
    if name != 'seed':
      low, high = bench.config.sweep[name]
      values = _spread(low, high, NUM_VALUES).tolist()
    runs += [{**centre, name: value} for value in values]
  return Variant(runs)


def rates(config: ml_collections.ConfigDict) -> list[float]:
  """From the lowest rate of the sweep to ten times the highest."""
  low, high = config.sweep.learning_rate
  return np.geomspace(low, 10 * high, NUM_VALUES).tolist()


def _rates(bench: Bench) -> Variant:
  """Two runs at each learning rate."""
  runs = [
      {**middle(bench.config), 'learning_rate': rate, 'seed': seed}
      for rate, seed in itertools.product(rates(bench.config), (1, 2))
  ]
  return Variant(runs)


def _narrow(bench: Bench) -> Variant:
  """The same sweep from a start that saw few examples."""

  def data_fn(config, splits):
    del config
    few = sources.subset(splits.pretrain, np.arange(NUM_NARROW))
    return splits._replace(pretrain=few)

  return Variant(bench.runs, start_fn=None, data_fn=data_fn)


def _scratch(bench: Bench, is_shared: bool) -> Variant:
  """From random parameters, as long as the pre-training."""

  def change_fn(config):
    config.finetune.num_epochs = config.pretrain.num_epochs

  runs = [
      {**run, 'init_seed': 0 if is_shared else k}
      for k, run in enumerate(bench.runs[:NUM_RUNS])
  ]
  return Variant(runs, change_fn=change_fn)


def _averaged(bench: Bench) -> Variant:
  """Copies of each run: a moving average, and four late epochs."""

  def change_fn(config):
    last = config.finetune.num_epochs
    config.finetune.ema = (0.95,)
    late = np.linspace(last / 2, last, 5)[:-1].round().astype(int)
    config.finetune.keep_epochs = tuple(late.tolist())

  return Variant(bench.runs[:NUM_RUNS], change_fn=change_fn)


def _probed(bench: Bench) -> Variant:
  """A linear probe first, from a new random head."""

  def start_fn(work, theta_0):
    phase = dict(work.config.pretrain.to_dict(), run={'learning_rate': 3e-3})
    return loop.probe(
        work.model, phase, _new_head(work, theta_0), work.splits.train
    )

  return Variant(bench.runs[:NUM_RUNS], start_fn=start_fn)


def _new_head(work: workdirs.Work, theta_0: Params) -> Params:
  drawn = work.model.init_fn(jax.random.key(work.config.seed + 1))
  return {**theta_0, 'head': drawn['head']}


def _on_data_set(bench: Bench, name: str) -> Variant:
  """One run on shifted training data; the head stays as it is."""

  def data_fn(config, splits):
    severity = config.shifts[name]
    moved = shifts.apply(
        splits.train.arrays, name, severity, seed=config.seed + 1
    )
    return splits._replace(train=sources.Arrays(moved))

  runs = [{**middle(bench.config), 'mixup': 0.0, 'affine': 0.0}]
  return Variant(runs, data_fn=data_fn, frozen='head')


def _distilled(bench: Bench) -> Variant:
  """Runs with the hyper-parameters in the middle, taught by the ensemble."""
  runs = [run for run in _one_factor(bench).runs if run['seed']]
  target = bench.teacher()

  def data_fn(config, splits):
    del config
    return splits._replace(train=loop.distilled(splits.train, target))

  return Variant(runs, data_fn=data_fn)


VARIANTS: dict[str, Callable[[Bench], Variant]] = {
    'sweep': lambda bench: Variant(bench.runs, start_fn=None),
    'one_factor': _one_factor,
    'rates': _rates,
    'narrow': _narrow,
    'scratch_shared': functools.partial(_scratch, is_shared=True),
    'scratch_apart': functools.partial(_scratch, is_shared=False),
    'averaged': _averaged,
    'sam': lambda bench: Variant(
        [{**run, 'sam': SAM_RADIUS} for run in bench.runs[:NUM_RUNS]]
    ),
    'probed': _probed,
    'random_head': lambda bench: Variant(
        bench.runs[:NUM_RUNS], start_fn=_new_head
    ),
    'distilled': _distilled,
    **{
        f'on_{name}': functools.partial(_on_data_set, name=name)
        for name in DATA_SETS
    },
}
