"""Pools of fine-tuned models: a sweep, and what else the paper's studies vary.

```
with pools.Bench(experiment, workdir) as bench:
  pool = bench['rates']                     # trained, if it is missing
  pool.soup((0, 1)).shifts, pool.ensemble((0, 1)).shifts
```

Each pool is a separate workdir in `workdir`, in which everything resumes.
"""

import collections
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import copy
import dataclasses
import functools
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
from jaxsoup.experiments import landscapes
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
# Of runs at a constant rate: how many there are, and checkpoints of each.
NUM_LONG, NUM_KEPT = 2, 20
# Shifts that models are fine-tuned on, one each, under a head that is frozen.
DATA_SETS = ('noise', 'occlusion', 'shear')
NUM_NARROW = 50


class Scores(NamedTuple):
  """Of one model, in per cent; `shifts` is the mean over the shifted sets."""

  held_out: float
  test: float
  shifts: float

  @property
  def row(self) -> dict[str, float]:
    """What is reported."""
    return {'test, %': self.test, 'shifts, %': self.shifts}


class Variant(NamedTuple):
  """How a pool differs from the sweep of the config.

  Attributes:
    runs: hyper-parameters of each run.
    start_fn: (work, theta_0 of `start`) -> theta_0. None: it is pre-trained
      again.
    start: the pool that begins where this one does.
    finetune: changes `config.finetune`.
    data_fn: (config, splits) -> splits.
    frozen: the part of the model that is not trained.
  """

  runs: list[configs.Run]
  start_fn: Callable[[workdirs.Work, Params], Params] | None = lambda work, x: x
  start: str = 'sweep'
  finetune: Mapping[str, Any] = {}
  data_fn: Callable[[Any, sources.Splits], sources.Splits] = lambda _, x: x
  frozen: str = ''


class Pool:
  """Fine-tuned models in memory, and scores of them and their soups.

  Attributes:
    work: the experiment of this pool.
    theta_0: the start of its runs.
    names: of the models: '03', '03_ema_0.95'.
    runs: hyper-parameters of each model, K dicts.
    models: K pytrees.
    known: remembered held-out scores, by members.
    eval_fn: the score on the held-out data.
  """

  def __init__(self, work: workdirs.Work, theta_0: Params):
    self.work, self.theta_0 = work, theta_0
    stages.finetune_all(work, theta_0)
    self._run_of, _, paths = zip(*work.copies())
    self.names = [path.name for path in paths]
    self.runs = [work.experiment.runs[i] for i in self._run_of]
    self.models = list(checkpoints.Ingredients(paths))
    self.known: dict[Any, Any] = {}  # Scores, or bounds on them.
    batches = cook.batches_of(work.splits.held_out, work.config.batch_size)
    self.eval_fn = cook.score_fn(work.config, work.model.logits_fn, batches)
    self._soups: dict[tuple[int, ...], dict[str, np.ndarray]] = {}

  def __len__(self) -> int:
    return len(self.models)

  @functools.cached_property
  def logits(self) -> dict[str, np.ndarray]:
    """`[K, N, C]` by data set."""
    each = [
        self.work.logits_of(path, functools.partial(self.models.__getitem__, k))
        for k, (_, _, path) in enumerate(self.work.copies())
    ]
    return {name: np.stack([x[name] for x in each]) for name in self.work.data}

  @functools.cached_property
  def singles(self) -> list[Scores]:
    """Scores of each model."""
    return [self.soup((k,)) for k in range(len(self))]

  def kept(self) -> tuple[np.ndarray, list[list[Params]]]:
    """Steps of what is kept of each run, the last too, and these models.

    Not of runs that diverged.
    """
    names = loop.names_of(self.work.config.finetune)
    phase, num_train = self.work.config.finetune, len(self.work.splits.train)
    last = phase.num_epochs * (num_train // phase.batch_size)
    of_run = collections.defaultdict(list)
    for i, model in zip(self._run_of, self.models):
      of_run[i].append(model)
    runs = [[*x[1:], x[0]] for x in of_run.values() if len(x) == len(names)]
    return np.array([*phase.keep_steps, last]), runs

  def by_set(self, logits: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The score of logits `[N, C]` by data set."""
    metric = cook.metric_of(self.work.config)
    return {
        name: 100 * float(metric(x, self.work.labels[name]))
        for name, x in logits.items()
    }

  def scores_of(self, logits: Mapping[str, np.ndarray]) -> Scores:
    """Of logits `[N, C]` by data set."""
    scores = self.by_set(logits)
    shifted = [scores[name] for name in self.work.splits.shifts]
    return Scores(scores['held_out'], scores['test'], float(np.mean(shifted)))

  def of(self, params: Params) -> Scores:
    """Of any parameters."""
    return self.scores_of(self.work.logits(params))

  def soup_logits(self, members: Iterable[int]) -> dict[str, np.ndarray]:
    """Of the uniform soup of some models, by data set."""
    members = tuple(sorted(members))
    if len(members) == 1:
      return {name: x[members[0]] for name, x in self.logits.items()}
    if members not in self._soups:
      soup = jaxsoup.uniform([self.models[k] for k in members])
      self._soups[members] = self.work.logits(soup.params)
    return self._soups[members]

  def soup(self, members: Iterable[int]) -> Scores:
    """The uniform soup of some models."""
    return self.scores_of(self.soup_logits(members))

  def ensemble(self, members: Iterable[int]) -> Scores:
    """The mean of the logits of some models."""
    rows = list(members)
    return self.scores_of(
        {name: x[rows].mean(0) for name, x in self.logits.items()}
    )

  def neighbours(self, num: int | None = None) -> list[tuple[int, int]]:
    """Pairs of the runs 2 i and 2 i + 1, at most of the first `num`."""
    # The first copy of each run; of one that diverged there is none.
    first = {i: self._run_of.index(i) for i in self._run_of}
    runs = range(len(self.work.experiment.runs))[:num]
    return [
        (first[i], first[j])
        for i, j in zip(runs[::2], runs[1::2])
        if i in first and j in first
    ]

  def sets(self, where: str) -> landscapes.Sets:
    """All test data ('test'), or all that are shifted ('shifts')."""
    names = ['test'] if where == 'test' else list(self.work.splits.shifts)
    num = len(names) * len(self.work.splits.test)
    return landscapes.Sets(self.work, names, num)

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
      experiment: of `configs.load`, with data in memory.
      workdir: where the pools go.
      stop: whether the script is asked to stop.
    """
    super().__init__()
    self.experiment = experiment
    self.config, self.runs = experiment.config, experiment.runs
    self.workdir, self._stop = pathlib.Path(workdir).absolute(), stop
    self._pools: dict[str, Pool] = {}
    self._frozen: dict[str, modeling.Model] = {}

  def __getitem__(self, name: str) -> Pool:
    if name in self._pools:
      return self._pools[name]
    variant = VARIANTS[name](self)
    config = copy.deepcopy(self.config)
    with config.unlocked():  # Not all configs have what is set.
      config.finetune.update(variant.finetune)
    make_fn: Any = self.experiment.data_fn
    experiment = self.experiment._replace(
        config=config,
        runs=variant.runs,
        data_fn=lambda config: variant.data_fn(config, make_fn(config)),
    )
    folder = self.workdir / name
    self.enter_context(workdirs.locked(experiment, folder))
    work = workdirs.work_of(experiment, folder, stop=self._stop)
    path = work.workdir / 'theta_0'
    if variant.start_fn is not None and not path.exists():
      checkpoints.save(
          path, variant.start_fn(work, self[variant.start].theta_0)
      )
    theta_0 = stages.theta_0(work)
    if variant.frozen:
      # One model for all pools, or each would be compiled.
      model = modeling.frozen(work.model, variant.frozen, theta_0)
      model = self._frozen.setdefault(variant.frozen, model)
      work = dataclasses.replace(work, model=model)
    pool = self._pools[name] = Pool(work, theta_0)
    if name == 'sweep':
      results.make(work, theta_0)
    return pool

  @property
  def is_given(self) -> bool:
    """Whether nothing but the sweep is trained for experiments on it.

    So it is where the start is given, as such models are large, and where the
    sweep lacks ranges that `one_factor` varies.
    """
    ranges = {'seed', *self.config.sweep}
    return 'pretrain' not in self.config or not ranges.issuperset(FACTORS)

  def ids(self) -> dict[str, np.ndarray]:
    """The examples that report, in all pools, as `results.ids`."""
    make_fn: Any = self.experiment.data_fn
    splits = make_fn(self.config)
    by_set = results.ids(splits, self.config.seed)
    shifts = [by_set[name] for name in splits.shifts]
    return {'test': by_set['test'], 'shifts': np.concatenate([*shifts, []])}


def middle(config: ml_collections.ConfigDict) -> configs.Run:
  """The run in the middle of all ranges of the sweep.

  Example:
    >>> sweep = dict(num_runs=3, learning_rate=(1e-3, 1e-1), mixup=(0.0, 0.5))
    >>> middle(ml_collections.ConfigDict({'sweep': sweep}))
    {'seed': 0, 'learning_rate': 0.01, 'mixup': 0.25}
  """
  ranges = {k: x for k, x in config.sweep.items() if isinstance(x, tuple)}
  return {'seed': 0, **{k: _spread(x, 3)[1] for k, x in ranges.items()}}


def _spread(ends: tuple[float, float], num: int) -> list[float]:
  """From one end to the other; of rates, by equal factors."""
  low, high = ends
  is_rate = low > 0 and high / low > 5
  return (np.geomspace if is_rate else np.linspace)(low, high, num).tolist()


def _one_factor(bench: Bench) -> Variant:
  """Runs that differ in one hyper-parameter."""
  centre, sweep = middle(bench.config), bench.config.sweep
  values = {k: _spread(sweep[k], NUM_VALUES) for k in FACTORS if k != 'seed'}
  values['seed'] = list(range(1, NUM_VALUES + 1))
  return Variant([{**centre, k: x} for k in FACTORS for x in values[k]])


def _rates(bench: Bench) -> Variant:
  """Two runs at each rate, from the lowest to ten times the highest."""
  low, high = bench.config.sweep.learning_rate
  runs = [
      {**middle(bench.config), 'learning_rate': rate, 'seed': seed}
      for rate in np.geomspace(low, 10 * high, NUM_VALUES).tolist()
      for seed in (1, 2)
  ]
  return Variant(runs)


def _narrow(bench: Bench) -> Variant:
  """The same sweep from a start that saw few examples."""
  few = lambda source: sources.subset(source, np.arange(NUM_NARROW))
  data_fn = lambda _, splits: splits._replace(pretrain=few(splits.pretrain))
  return Variant(bench.runs, start_fn=None, data_fn=data_fn)


def _scratch(bench: Bench, is_shared: bool) -> Variant:
  """From random parameters, as long as the pre-training."""
  runs = [
      {**run, 'init_seed': 0 if is_shared else k}
      for k, run in enumerate(bench.runs[:NUM_RUNS])
  ]
  num_epochs = bench.config.pretrain.num_epochs
  return Variant(runs, finetune={'num_epochs': num_epochs})


def _averaged(bench: Bench, **others: Any) -> Variant:
  """Copies of each run: a moving average, and four in its second half."""
  kept = _steps(bench, 0.5, 5)[:-1]
  finetune = {'ema': (0.95,), 'keep_steps': kept, **others}
  return Variant(bench.runs[:NUM_RUNS], finetune=finetune)


def _steps(bench: Bench, start: float, num: int) -> tuple[int, ...]:
  """Steps at equal distances from a share of the fine-tuning to its end."""
  phase, sizes = bench.config.finetune, bench.config.data.sizes
  last = phase.num_epochs * (sizes.train // phase.batch_size)
  return tuple(
      np.linspace(start * last, last, num).round().astype(int).tolist()
  )


def _constant(bench: Bench) -> Variant:
  """Runs at one rate that does not fall, and what they were on the way."""
  kept = _steps(bench, 1 / NUM_KEPT, NUM_KEPT)[:-1]
  runs = [{**middle(bench.config), 'seed': 1 + k} for k in range(NUM_LONG)]
  finetune = {'final': 1.0, 'keep_steps': kept}
  return Variant(runs, start_fn=None, finetune=finetune)


def _decayed(bench: Bench) -> Variant:
  """The same runs, whose rate falls in their second half."""
  finetune = {'final': 0.0, 'decay': '1-sqrt', 'decay_from': 0.5}
  runs = bench['constant'].work.experiment.runs
  return Variant(runs, start='constant', finetune=finetune)


def _probed(bench: Bench) -> Variant:
  """A linear probe first, from a new random head."""

  def start_fn(work, theta_0):
    phase = dict(work.config.pretrain.to_dict(), run={'learning_rate': 3e-3})
    head = _new_head(work, theta_0)
    return loop.probe(work.model, phase, head, work.splits.train)

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
  pool = bench['sweep']
  batches = cook.batches_of(pool.work.splits.train, bench.config.batch_size)
  logits = ensembles.collect(pool.models, pool.work.model.logits_fn, batches)
  target = np.mean(logits, axis=0)
  data_fn = lambda _, splits: splits._replace(
      train=loop.distilled(splits.train, target)
  )
  runs = [run for run in _one_factor(bench).runs if run['seed']]
  return Variant(runs, data_fn=data_fn)


VARIANTS: dict[str, Callable[[Bench], Variant]] = {
    'sweep': lambda bench: Variant(bench.runs, start_fn=None),
    'one_factor': _one_factor,
    'rates': _rates,
    'narrow': _narrow,
    'scratch_shared': lambda bench: _scratch(bench, is_shared=True),
    'scratch_apart': lambda bench: _scratch(bench, is_shared=False),
    'averaged': _averaged,
    'averaged_constant': lambda bench: _averaged(bench, final=1.0),
    'hard_labels': lambda bench: Variant(
        [{**run, 'label_smoothing': 0.0, 'mixup': 0.0} for run in bench.runs]
    ),
    'constant': _constant,
    'decayed': _decayed,
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
