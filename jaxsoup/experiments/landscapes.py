"""The landscape between the models of an experiment, and a diagnosis.

```
landscapes.make(work, theta_0, soups, scores)
```

Each part is one file in the workdir, `landscape/NAME.json`, which the report
draws. An existing file is made again only when the settings in
`config.landscape` that it depends on changed:

angles     at the initialization, between all pairs
pairs      the soup of two against its models, its ensemble and their angle
lines      the test error between two models
plane      loss and error around theta_0 and two models, all others projected
diagnosis  of `jaxsoup.diagnosis`, with the held-out data
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import itertools
import json
import pathlib

import jax
import ml_collections
import numpy as np

from jaxsoup import _json
from jaxsoup import _memory
from jaxsoup import checkpoints
from jaxsoup import diagnosis
from jaxsoup import evaluation
from jaxsoup import landscape
from jaxsoup import metrics
from jaxsoup import studies
from jaxsoup.data import sources
from jaxsoup.experiments import cook
from jaxsoup.experiments import stages
from jaxsoup.experiments import workdirs
from jaxsoup.runtime import progress
from jaxsoup.typing import Array
from jaxsoup.typing import Json
from jaxsoup.typing import MetricFn
from jaxsoup.typing import Params
from jaxsoup.typing import ParamsFn

# Two copies of one run span no plane.
_LEAST_ANGLE = 10.0
# The parts, and the settings that each depends on.
_PARTS = {
    'angles': (),
    'diagnosis': ('num_examples',),
    'pairs': ('num_pairs', 'num_examples'),
    'lines': ('num_pairs', 'num_points', 'num_examples'),
    'plane': ('num_points', 'num_examples'),
}


def missing(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, num_models: int
) -> dict[str, Json]:
  """The parts that `make` has to make for so many runs, with their settings."""
  # Not in several processes: the diagnosis takes parameters to the host.
  if 'landscape' not in config or num_models < 2 or jax.process_count() > 1:
    return {}
  settings = config.landscape.to_dict()
  off = {name for name in ('num_pairs', 'num_points') if not settings[name]}
  asked = {
      name: {key: settings[key] for key in keys}
      for name, keys in _PARTS.items()
      if not off.intersection(keys)
      and (name != 'diagnosis' or settings['is_diagnosed'])
  }
  return {
      name: wanted
      for name, wanted in asked.items()
      if _settings_of(workdir / 'landscape' / f'{name}.json') != wanted
  }


def _settings_of(path: pathlib.Path) -> Json | None:
  """What a part was made with, if it is there."""
  try:
    return json.loads(path.read_text())['settings'] if path.exists() else None
  except (KeyError, TypeError, ValueError) as e:
    raise ValueError(
        f'{path} is unreadable: {e!r}. Delete it, and run the same command '
        'again, which makes a new one.'
    ) from e


class Sets:
  """Some examples of data sets, in memory, and the mean of scores on them.

  At most `num` of all sets together, as many of each. Their names are 'train',
  and those of `work.data`.
  """

  def __init__(self, work: workdirs.Work, names: Sequence[str], num: int):
    all_sets = {'train': work.splits.train, **work.data}
    parts = []
    for source in map(all_sets.__getitem__, names):
      size = min(max(num // len(names), 1), len(source))
      # Evenly spaced: some sets are sorted by class.
      parts.append(source[np.linspace(0, len(source) - 1, size).astype(int)])
    pooled = {
        name: np.concatenate([part[name] for part in parts])
        for name in (*work.model.inputs, 'label')
    }
    ends = np.cumsum([len(part['label']) for part in parts])
    self._views = [work.splits.views.get(name, lambda x: x) for name in names]
    self._split = lambda x: np.split(x, ends[:-1])
    self.labels = pooled['label']
    batches = cook.batches_of(
        sources.Arrays(pooled), work.config.batch_size, workdirs.on(work.config)
    )
    self.batches = work.stopping(batches)
    self.logits_of = evaluation.logits_of(work.model.logits_fn, self.batches)
    self._metric = cook.metric_of(work.config)

  def score_of(self, params: Params, metric: MetricFn | None = None) -> float:
    """The score of a model."""
    return self.score(self.logits_of(params), self.labels, metric)

  def score(
      self, logits: Array, labels: Array, metric: MetricFn | None = None
  ) -> float:
    """A metric, by default the experiment's; the mean over the sets."""
    metric_fn = metric or self._metric
    values = [
        float(metric_fn(view(x), label))
        for view, x, label in zip(
            self._views, self._split(logits), self._split(labels)
        )
    ]
    return float(np.mean(values))


class Held(checkpoints.Ingredients):
  """Ingredients that stay in memory: small ones take longer to read."""

  average = None  # type: ignore[assignment]  # It would read them again.

  def __init__(self, ingredients: checkpoints.Ingredients):
    super().__init__(ingredients.paths, ingredients.abstract_params)
    self._held = list(ingredients)

  def __getitem__(self, k):
    return self._held[k]

  def prefetch(self, k: int) -> None:
    pass


def make(
    work: workdirs.Work,
    theta_0: Params,
    soups: Mapping[str, Params],
    scores: Sequence[float],
    prepare_fn: ParamsFn | None = None,
) -> None:
  """Makes what is missing of `landscape/`, by `config.landscape`.

  Several processes leave it out: the same command in one process makes it.

  Args:
    work: the experiment.
    theta_0: the start of the runs.
    soups: by name.
    scores: of the K runs on the examples that select, `[K]`.
    prepare_fn: new statistics of BatchNorm for a mixture, as in the searches.

  Raises:
    ValueError: a damaged file of an earlier call.
    Preempted: the script is to stop; parts that are whole are saved.
  """
  asked = missing(work.config, work.workdir, len(scores))
  if not asked:
    return
  runs = stages.ingredients(work, theta_0)
  size = len(runs) * sum(x.nbytes for x in jax.tree.leaves(theta_0))
  free = _memory.free_bytes(jax.local_devices()[0])
  ingredients = runs if size > free / 5 else Held(runs)
  parts = Parts(work, theta_0, ingredients, soups, scores, prepare_fn).all()
  total, num_done = sum(parts[name][0] for name in asked), 0
  for name, settings in asked.items():
    num_models, make_fn = parts[name]

    def on_points(num, of, size=num_models, before=num_done):
      work.stop.check(f'{work.workdir} holds all soups')
      work.progress_fn('landscapes', (before + size * num / of) / total)

    on_points(0, 1)
    content = _json.plain({'settings': settings, **make_fn(on_points)})
    path = work.workdir / 'landscape' / f'{name}.json'
    _json.write(path, content, indent=None)
    num_done += num_models


class Parts:
  """The parts of one experiment; data are read when a part needs them."""

  def __init__(self, work, theta_0, ingredients, soups, scores, prepare_fn):
    self._work, self._theta_0 = work, theta_0
    self._ingredients, self._soups = ingredients, soups
    self._scores, self._prepare_fn = scores, prepare_fn or (lambda x: x)
    self._settings = work.config.landscape
    self._pairs = pairs_of(scores, self._settings.num_pairs)

  def all(self) -> dict[str, tuple[int, Callable[..., Json]]]:
    """How many models are evaluated for a file, about, and what makes it.

    Functions get a callback for the points done, and of all.
    """
    num, num_pairs = len(self._ingredients), len(self._pairs)
    num_points = self._settings.num_points
    num_trials = 2 * num + len(studies.connected_pairs(self._scores))
    num_sets = 1 + bool(self._work.splits.shifts)
    return {
        'angles': (1, self._angles),
        'diagnosis': (num_trials, self._diagnosis),
        'pairs': ((num + num_pairs) * num_sets, self._pairs_part),
        'lines': (num_pairs * num_points, self._lines),
        # Each point is evaluated on three sets.
        'plane': (3 * num_points**2, self._plane),
    }

  def _sets(self, names: Sequence[str]) -> Sets:
    return Sets(self._work, names, self._settings.num_examples)

  def _angles(self, on_points) -> Json:
    del on_points  # One pass over the ingredients.
    return {'angles': landscape.angles(self._ingredients, self._theta_0)}

  def _diagnosis(self, on_points) -> Json:
    held_out = self._sets(['held_out'])
    model = self._work.model
    # Right or wrong, by example: the same examples make intervals narrow.
    config = {**self._work.config, 'select_by': 'metric'}
    by_metric = ml_collections.ConfigDict(config)
    report = diagnosis.diagnose(
        self._ingredients,
        theta_0=self._theta_0,
        eval_fn=cook.score_fn(by_metric, model.logits_fn, held_out.batches),
        logits_fn=held_out.logits_of,
        recalibrate_fn=model.recalibrate_fn and self._prepare_fn,
        num_examples=len(held_out.labels),
        is_thorough=True,
        names=[pathlib.Path(path).name for path in self._ingredients.paths],
        progress_fn=lambda stage, share: on_points(
            progress.total_done(diagnosis.STAGES, stage, share), 1
        ),
    )
    return report.as_json()

  def _pairs_part(self, on_points) -> Json:
    where = {'test': ['test'], 'mean of shifts': list(self._work.splits.shifts)}
    where = {name: sets for name, sets in where.items() if sets}
    done, num = itertools.count(1), len(where) * len(self._pairs)
    by_name = {}
    for name, names in where.items():
      sets = self._sets(names)
      by_name[name] = landscape.pairs(
          self._ingredients,
          self._theta_0,
          self._work.model.logits_fn,
          sets.batches,
          metric=sets.score,
          members=self._pairs,
          prepare_fn=self._prepare_fn,
          on_pair=lambda _: on_points(next(done), num),
      )
    return by_name

  def _lines(self, on_points) -> Json:
    test = self._sets(['test'])
    num = self._settings.num_points
    done, num_all = itertools.count(1), num * len(self._pairs)
    paths = landscape.lines(
        lambda params: 1 - test.score_of(self._prepare_fn(params)),
        self._ingredients,
        self._pairs,
        num,
        is_traced=False,
        on_points=lambda *_: on_points(next(done), num_all),
    )
    return {
        'members': self._pairs,
        't': next(iter(paths.values())).t,
        'error': [path.loss for path in paths.values()],
    }

  def _plane(self, on_points) -> Json:
    corners = self._corners()
    if corners is None:
      return {}
    surfaces, values = self._surfaces(), []

    def loss_fn(params):
      # One walk over the grid for all of them.
      params = self._prepare_fn(params)
      values.append([fn(params) for fn in surfaces.values()])
      return values[-1][-1]

    num = self._settings.num_points
    plane = landscape.plane(
        loss_fn,
        self._theta_0,
        *(self._ingredients[k] for k in corners),
        others=itertools.chain(
            map(self._ingredients.__getitem__, range(len(self._scores))),
            (soup.params for soup in self._soups.values()),
        ),
        num=num,
        is_traced=False,
        on_points=on_points,
    )
    return {
        'corners': corners,
        'soups': list(self._soups),
        **plane._asdict(),
        'loss': {
            name: np.reshape(of_name, (num, num))
            for name, of_name in zip(surfaces, zip(*values))
        },
    }

  def _surfaces(self) -> dict[str, Callable[[Params], float]]:
    """What is drawn on the plane: as figure 2 of the paper."""
    train, test = self._sets(['train']), self._sets(['test'])
    loss = metrics.negative_log_likelihood
    surfaces = {
        'training loss': lambda params: train.score_of(params, loss),
        'test error': lambda params: 1 - test.score_of(params),
    }
    if self._work.splits.shifts:
      shifts = self._sets(list(self._work.splits.shifts))
      name = 'mean error on shifts'
      surfaces[name] = lambda params: 1 - shifts.score_of(params)
    return surfaces

  def _corners(self) -> tuple[int, int] | None:
    """The best two models that are not close: two copies of a run are."""
    first, *others = np.argsort(-np.asarray(self._scores), kind='stable')
    for k in others:
      pair = [self._ingredients[int(first)], self._ingredients[int(k)]]
      if landscape.angle(self._theta_0, *pair) > _LEAST_ANGLE:
        return int(first), int(k)
    return None


def pairs_of(scores: Sequence[float], num: int) -> list[tuple[int, int]]:
  """At most `num` pairs of models.

  All pairs of few models; of many the best with every other one and neighbours
  in the order of scores, thinned evenly to `num`.

  Example:
    >>> pairs_of([0.9, 0.8, 0.7], 9), len(pairs_of([0.5] * 20, 10))
    ([(0, 1), (0, 2), (1, 2)], 10)
  """
  known = studies.connected_pairs(scores)
  rows = np.linspace(0, len(known) - 1, min(num, len(known))).astype(int)
  return sorted(known[i] for i in rows)
