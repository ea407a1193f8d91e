"""What a workdir keeps: nothing is evaluated twice, and little is in memory."""

import dataclasses
import functools
import json
import pathlib
import shutil
import tracemalloc

import jax
import ml_collections
import numpy as np
import pytest

from jaxsoup import checkpoints
from jaxsoup import metrics
from jaxsoup import report
from jaxsoup import statistics
from jaxsoup.data import sources
from jaxsoup.experiments import architectures
from jaxsoup.experiments import configs
from jaxsoup.experiments import defaults
from jaxsoup.experiments import main
from jaxsoup.experiments import results
from jaxsoup.experiments import stages
from jaxsoup.experiments import workdirs
from jaxsoup.runtime import metric_log
from jaxsoup.runtime import preemption
from jaxsoup.statistics import _disjoint

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = f'{ROOT}/tests/_digits_mlp.py'
TINY = (
    '--config.pretrain.num_epochs=5',
    '--config.finetune.num_epochs=1',
    '--config.batch_size=40',
    '--config.landscape.num_pairs=1',
    '--config.landscape.num_points=0',
    '--config.landscape.num_examples=100',
    '--config.landscape.is_diagnosed=False',
    '--config.stability.greedy=2',
)


class Counted:
  """An experiment that counts how often its model was run on a batch."""

  def __init__(self, *overrides):
    loaded = configs.load(CONFIG, [*TINY, *overrides])
    config = loaded.config
    with config.unlocked():
      config.probe = defaults.training(
          num_epochs=2, batch_size=50, run=dict(learning_rate=3e-3)
      )
    self._num, self._base = 0, loaded
    self.num_made = 0
    self.experiment = loaded._replace(
        model_fn=lambda config: self._model, data_fn=self._data
    )

  @property
  def num(self):
    jax.effects_barrier()
    return self._num

  def run(self, workdir, stop=None):
    return main.run(self.experiment, workdir, stop=stop)

  def _data(self, config):
    self.num_made += 1
    return self._base.data_fn(config)

  @functools.cached_property
  def _model(self):
    model = architectures.of(self._base)

    def counting(fn):
      def counted(params, batch):
        jax.debug.callback(self._count)
        return fn(params, batch)

      return counted

    return dataclasses.replace(
        model,
        logits_fn=counting(model.logits_fn),
        features_fn=counting(model.features_fn),
    )

  def _count(self):
    self._num += 1


@pytest.fixture(scope='module')
def counted():
  return Counted()


@pytest.fixture(scope='module')
def made(counted, tmp_path_factory):
  """A finished workdir, not to be changed, its rows, and the evaluations."""
  workdir = tmp_path_factory.mktemp('made') / 'w'
  rows = counted.run(workdir)
  return workdir, rows, counted.num


def copied(made, tmp_path):
  return pathlib.Path(shutil.copytree(made[0], tmp_path / 'w'))


def test_a_finished_workdir_answers_without_data_and_models(
    counted, made, tmp_path
):
  workdir = copied(made, tmp_path)
  before = counted.num, counted.num_made
  text = (workdir / 'table.md').read_text()
  assert counted.run(workdir) == made[1]
  assert (counted.num, counted.num_made) == before and made[2] > 0
  # A picture that is missing is drawn, from what is in files.
  (workdir / 'trials.png').unlink()
  assert counted.run(workdir) == made[1]
  assert counted.num == before[0]
  assert (workdir / 'trials.png').exists()
  assert (workdir / 'table.md').read_text() == text


def test_with_data_that_are_drawn_several_times(tmp_path):
  several = Counted('--config.num_splits=2', '--config.stability.greedy=0')
  rows = several.run(tmp_path / 'w')
  num = several.num
  # As text: gains on the shifts have no interval, which is NaN.
  assert repr(several.run(tmp_path / 'w')) == repr(rows)
  assert several.num == num
  content = (tmp_path / 'w/results.json').read_bytes()
  (tmp_path / 'w/results.json').unlink()
  assert repr(several.run(tmp_path / 'w')) == repr(rows)
  assert several.num == num
  assert (tmp_path / 'w/results.json').read_bytes() == content


def test_a_soup_that_was_deleted_is_made_again(counted, made, tmp_path):
  workdir = copied(made, tmp_path)
  shutil.rmtree(workdir / 'soups' / 'uniform')
  before = counted.num
  assert counted.run(workdir) == made[1] and counted.num == before
  assert (workdir / 'soups' / 'uniform').exists()


def _other_number(content):
  content['rows'][0]['test'] = 1.0
  return content


def _other_runs(content):
  content['runs'] = content['runs'][::-1]
  return results._json.sealed(_without_checksum(content))


def _without_checksum(content):
  return {k: v for k, v in content.items() if k != 'checksum'}


@pytest.mark.parametrize(
    'change_fn',
    [
        _other_number,
        _other_runs,
        lambda content: _without_checksum(_other_number(content)),
        lambda content: [],
        lambda content: {**content, 'checksum': 'none'},
        lambda content: {},
    ],
)
def test_damaged_results_are_made_again(counted, made, tmp_path, change_fn):
  workdir = copied(made, tmp_path)
  path = workdir / 'results.json'
  path.write_text(json.dumps(change_fn(json.loads(path.read_text()))))
  before = counted.num
  assert counted.run(workdir) == made[1]
  assert path.read_bytes() == (made[0] / 'results.json').read_bytes()
  # Only the stability, whose soups are in no file, is evaluated.
  assert 0 < counted.num - before < made[2] / 3
  before = counted.num
  assert counted.run(workdir) == made[1] and counted.num == before


def test_later_settings_add_what_is_missing(counted, made, tmp_path):
  workdir = copied(made, tmp_path)
  kept = {
      path: path.stat().st_mtime_ns
      for path in workdir.rglob('*')
      if path.is_file() and path.name not in ('results.json', 'metrics.jsonl')
  }
  content = json.loads((workdir / 'results.json').read_text())
  more = Counted(
      '--config.landscape.num_points=2',
      '--config.stability.greedy_ensemble=7',
  )
  assert more.run(workdir) == made[1]
  # Two points of a line, and three sets at four points of the plane; in each
  # at most 100 examples, in batches of 40.
  assert 0 < more.num <= (2 + 3 * 4) * 3
  for path, time in kept.items():
    assert path.stat().st_mtime_ns == time, path
  assert (workdir / 'landscape/plane.json').exists()
  now = json.loads((workdir / 'results.json').read_text())
  assert now['stability']['greedy'] == content['stability']['greedy']
  assert len(now['stability']['greedy ensemble']['sizes']) == 7
  for name in content.keys() - {'stability', 'checksum'}:
    assert now[name] == content[name]
  # And without any.
  none = Counted(
      '--config.stability.greedy=0', '--config.stability.greedy_ensemble=0'
  )
  assert none.run(workdir) == made[1] and none.num == 0
  now = json.loads((workdir / 'results.json').read_text())
  assert now['stability'] == {}


class StopAt(preemption.Stop):
  """A SIGTERM at the k-th look for it after something is there."""

  def __init__(self, counted, is_there, k=1):
    self._counted, self._is_there, self._left = counted, is_there, k
    self.num = None

  @property
  def requested(self):
    if self.num is None and self._is_there():
      self._left -= 1
      if self._left < 0:
        self.num = self._counted.num
    return self.num is not None


STAGES = {
    'features of the probe': ('unfinished/pretrained', 2),
    'training of the probe': ('unfinished/pretrained', 8),
    'logits of the second run': ('logits/00.npz', 3),
    'logits of the second soup': ('logits/uniform.npz', 3),
    'stability': ('results.json', 3),
    'landscapes': ('landscape/angles.json', 4),
}


@pytest.mark.parametrize('stage', STAGES)
def test_stopped_in_any_stage(counted, made, tmp_path, stage):
  name, k = STAGES[stage]
  workdir = tmp_path / 'w'
  begun = counted.num
  stop = StopAt(counted, (workdir / name).exists, k)
  with pytest.raises(preemption.Preempted):
    counted.run(workdir, stop)
  assert counted.num - stop.num <= 1
  kept = {
      path: path.stat().st_mtime_ns
      for folder in ('theta_0', 'runs', 'logits', 'soups', 'landscape')
      for path in (workdir / folder).rglob('*')
  }
  if stage == 'logits of the second run':
    names = [path.name for path in workdir.glob('unfinished/unscored/*')]
    assert sorted(names) == ['01', '02', '03']
    shutil.rmtree(workdir / 'unfinished' / 'runs_00', ignore_errors=True)
  assert counted.run(workdir) == made[1]
  for path, time in kept.items():
    assert path.stat().st_mtime_ns == time, path
  _assert_same(workdir, made[0])
  # At most one data set of a model, and the stability, begin again.
  assert counted.num - begun <= made[2] + 40


def _assert_same(workdir, expected):
  names = lambda folder: {
      path.relative_to(folder).as_posix()
      for pattern in ('*', 'logits/*', 'landscape/*', 'soups/*', 'runs/*')
      for path in folder.glob(pattern)
  }
  assert names(workdir) == names(expected)
  for name in names(expected):
    path, other = workdir / name, expected / name
    if name.endswith('.npz'):
      with np.load(path) as x, np.load(other) as y:
        assert x.files == y.files
        for key in x.files:
          np.testing.assert_array_equal(x[key], y[key])
    elif name.endswith(('.json', '.md', '.png')):
      assert path.read_bytes() == other.read_bytes(), name
    elif '/' in name or name == 'theta_0':
      ours, theirs = (checkpoints.Ingredients([p])[0] for p in (path, other))
      jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_trained_runs_that_were_not_scored_are_not_trained_again(
    counted, made, tmp_path, monkeypatch
):
  workdir = tmp_path / 'w'
  stop = StopAt(counted, (workdir / 'logits/00.npz').exists, 0)
  with pytest.raises(preemption.Preempted):
    counted.run(workdir, stop)

  def train(*args, **options):
    raise AssertionError('It was trained.')

  monkeypatch.setattr(stages.loop, 'train', train)
  assert counted.run(workdir) == made[1]


# --- Memory -------------------------------------------------------------------

NUM, NUM_CLASSES = 8_000, 50
NUM_BYTES = 4 * NUM * NUM_CLASSES
SETS = ('held_out', 'test', 'blur', 'noise')


def work_with(folder, num_models, num=NUM, **others):
  """A workdir with logits of models, and without the models."""
  rng = np.random.default_rng(0)
  sizes = dict.fromkeys(SETS, num) | {'held_out': 100}
  labels = {name: rng.integers(0, NUM_CLASSES, n) for name, n in sizes.items()}
  sets = {name: sources.Arrays({'label': x}) for name, x in labels.items()}
  config = ml_collections.ConfigDict({'finetune': {}, 'seed': 0, **others})
  (folder / 'logits').mkdir(parents=True)
  for k in range(num_models):
    logits = {
        name: rng.normal(size=(n, NUM_CLASSES)).astype(np.float32)
        for name, n in sizes.items()
    }
    for name, x in logits.items():
      x[np.arange(len(x)), labels[name]] += 1
    np.savez(folder / 'logits' / f'{k:02d}.npz', **logits)
  return workdirs.Work(
      experiment=configs.Experiment(config, [{}] * num_models, None),
      model=None,
      splits=sources.Splits(
          train=sets['held_out'],
          held_out=sets['held_out'],
          test=sets['test'],
          shifts={name: sets[name] for name in SETS[2:]},
      ),
      workdir=folder,
      progress_fn=lambda *_: None,
      stop=preemption.Stop(),
      log=metric_log.MetricLog(folder / 'metrics.jsonl'),
  )


def models_of(work, split):
  logits = [work.logits_of(path, lambda: None) for *_, path in work.copies()]
  cooked = results.Cooked([], None, {}, {})
  return results._models(work, split, cooked, logits)


def table(work):
  split = results.splits(work)[0]
  return results._table(work, split, models_of(work, split))[0]


def peak_of(function):
  tracemalloc.start()
  try:
    return function(), tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()


def test_logits_of_one_model_are_in_memory(tmp_path):
  peaks = {}
  for num_models in (4, 8):
    work = work_with(tmp_path / str(num_models), num_models)
    table(work)  # Compiled.
    rows, peaks[num_models] = peak_of(lambda: table(work))  # noqa: B023
  assert peaks[8] < 5.5 * NUM_BYTES
  assert peaks[8] - peaks[4] < 0.5 * NUM_BYTES
  # The ensemble, by NumPy.
  stored = [np.load(p) for p in sorted((tmp_path / '8/logits').iterdir())]
  ensemble = next(row for row in rows if row.name == 'ensemble')
  for name, score in {'test': ensemble.test, **ensemble.shifts}.items():
    mean = np.mean([x[name].astype(float) for x in stored], 0)
    expected = np.mean(mean.argmax(-1) == work.labels[name])
    assert score == pytest.approx(expected, abs=5e-4)
  best = report.best_single(rows)
  gain = ensemble.gains['test'].gain
  assert gain == pytest.approx(ensemble.test - rows[best].test, abs=1e-6)


def test_other_metrics_and_draws(tmp_path):
  work = work_with(tmp_path, 3, 60, metric='f1')
  rows = np.arange(0, 160, 2), np.arange(1, 160, 2)
  split = results.Split(
      tmp_path, work.splits.held_out, dict(zip(('held_out', 'test'), rows))
  )
  models = models_of(work, split)
  pool = lambda x: np.concatenate([x['held_out'], x['test']])
  label = pool(work.labels)
  for k, model in enumerate(models[:3]):
    row, *_ = results._scored(work, split, model)
    logits = pool(np.load(tmp_path / 'logits' / f'{k:02d}.npz'))
    for name, at in zip(('held_out', 'test'), rows):
      expected = float(metrics.f1(logits[at], label[at]))
      assert getattr(row, name) == pytest.approx(expected, abs=1e-6)


def test_data_that_select_and_report_are_refused(tmp_path):
  work = work_with(tmp_path, 2, 100)
  for path in (tmp_path / 'logits').iterdir():
    with np.load(path) as stored:
      arrays = dict(stored)
    np.savez(path, **{**arrays, 'blur': arrays['held_out']})
  work.labels['blur'] = work.labels['held_out']
  with pytest.raises(ValueError, match='held_out and blur are the same data'):
    table(work)


# --- Roles of folders ---------------------------------------------------------


def folder_of(root, contents):
  (root / 'a').mkdir(parents=True)
  for name, content in contents.items():
    (root / 'a' / name).write_bytes(content)
  return sources.Folder(root, lambda record, rng: {'label': record['label']})


def roles_of(tmp_path, train, held_out, test):
  work = work_with(tmp_path / 'w', 1, 100)
  splits = work.splits._replace(
      train=train, held_out=held_out, test=test, shifts={}
  )
  return dataclasses.replace(work, splits=splits)


def test_files_in_two_roles_are_named(tmp_path):
  rng = np.random.default_rng(0)
  contents = {f'{k}.png': rng.bytes(10_000 + k // 2) for k in range(6)}
  pool = folder_of(tmp_path / 'train', contents)
  train, held_out = (
      sources.subset(pool, np.array(rows)) for rows in ([0, 2, 4], [1, 3, 5])
  )
  # Of equal size with others, but for the last one.
  others = {'x.png': rng.bytes(10_001), 'y.png': rng.bytes(500)}
  test = folder_of(tmp_path / 'test', others)
  workdirs.check_roles(roles_of(tmp_path / '1', train, held_out, test))
  # One file, copied under another name; the last bytes alone do not decide.
  start = b'\0' * 100
  others['z.png'] = contents['4.png']
  others['x.png'] = start + contents['2.png'][100:]
  test = folder_of(tmp_path / 'other', others)
  work = roles_of(tmp_path / '2', train, held_out, test)
  words = r'1 files .*train/a/4.png of train .*other/a/z.png of test'
  with pytest.raises(ValueError, match=words):
    workdirs.check_roles(work)
  with pytest.raises(ValueError, match='4 files .*of train .*of held_out'):
    workdirs.check_roles(roles_of(tmp_path / '3', pool, held_out, test))
  # Once: not in a workdir whose training has begun.
  (work.workdir / 'theta_0').mkdir()
  workdirs.check_roles(work)


def test_few_files_are_opened(tmp_path, monkeypatch):
  paths = [tmp_path / str(k) for k in range(20)]
  for k, path in enumerate(paths):
    path.write_bytes(bytes(10 + k // 2))
  opened = []
  for name in ('_end', '_whole'):
    fn = getattr(_disjoint, name)
    monkeypatch.setattr(
        _disjoint,
        name,
        lambda path, fn=fn: (opened.append(path.name), fn(path))[1],
    )
  statistics.check_disjoint_files(a=paths[:10], b=paths[10:])
  assert not opened
  paths[3].write_bytes(bytes([1] * 15))
  statistics.check_disjoint_files(a=paths[:10], b=paths[10:])
  assert sorted(opened) == ['10', '11', '3']
  with pytest.raises(ValueError, match='2 files have two roles'):
    statistics.check_disjoint_files(
        a=paths[::2][:2], b=paths[1:2], c=[paths[2], paths[0]]
    )
