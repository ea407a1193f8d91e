"""What an experiment says of the space between its models, and the report."""

import io
import json
import pathlib
import shutil
import time

import jax
import numpy as np
import pytest

from jaxsoup import checkpoints
from jaxsoup import landscape
from jaxsoup import report
from jaxsoup.experiments import architectures
from jaxsoup.experiments import configs
from jaxsoup.experiments import landscapes
from jaxsoup.experiments import main
from jaxsoup.report import _workdir
from jaxsoup.runtime import preemption
from jaxsoup.runtime import progress

# All of them share the workdir of an experiment.
pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = f'{ROOT}/tests/_digits_mlp.py'
NUM_POINTS, NUM_EXAMPLES = 3, 60
TINY = [
    '--config.finetune.num_epochs=2',
    f'--config.landscape.num_points={NUM_POINTS}',
    '--config.landscape.num_pairs=3',
    f'--config.landscape.num_examples={NUM_EXAMPLES}',
]
PARTS = ('angles', 'diagnosis', 'lines', 'pairs', 'plane')


def loaded(*overrides):
  return configs.load(CONFIG, [*TINY, *overrides])


@pytest.fixture(scope='module')
def experiment():
  return loaded()


@pytest.fixture(scope='module')
def made(experiment, tmp_path_factory):
  """A workdir, and what the progress was."""
  workdir = tmp_path_factory.mktemp('made')
  told = []
  main.run(experiment, workdir, lambda *x: told.append(x))
  return workdir, told


@pytest.fixture(scope='module')
def workdir(made):
  return made[0]


def part(workdir, name):
  return json.loads((workdir / 'landscape' / f'{name}.json').read_text())


def params_of(workdir, name):
  return checkpoints.Ingredients([workdir / name])[0]


def flat(params):
  leaves = jax.tree.leaves(params)
  return np.concatenate([np.asarray(x, float).ravel() for x in leaves])


def some(num, most):
  return np.linspace(0, num - 1, min(num, most)).astype(int)


class Data:
  """The experiment's data sets, as every part takes them."""

  def __init__(self, experiment):
    self.model = architectures.of(experiment)
    self.splits = experiment.data_fn(experiment.config)

  def error(self, params, name, most=NUM_EXAMPLES):
    data = getattr(self.splits, name, None) or self.splits.shifts[name]
    arrays = data[some(len(data), most)]
    logits = np.asarray(self.model.logits_fn(params, arrays))
    return np.mean(logits.argmax(-1) != arrays['label'])

  def error_on_shifts(self, params):
    names = list(self.splits.shifts)
    each = NUM_EXAMPLES // len(names)
    return np.mean([self.error(params, name, each) for name in names])

  def loss(self, params):
    arrays = self.splits.train[some(len(self.splits.train), NUM_EXAMPLES)]
    z = np.asarray(self.model.logits_fn(params, arrays), float)
    z -= z.max(-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return -np.mean(log_p[np.arange(len(z)), arrays['label']])


@pytest.fixture(scope='module')
def data(experiment):
  return Data(experiment)


def mixed(models, alpha):
  mix = lambda *xs: sum(np.float32(a) * x for a, x in zip(alpha, xs))
  return jax.tree.map(mix, *models)


@pytest.fixture(scope='module')
def runs(workdir):
  return [params_of(workdir, f'runs/{k:02d}') for k in range(4)]


def test_every_part_is_there(workdir):
  names = sorted(path.name for path in (workdir / 'landscape').iterdir())
  assert names == [f'{name}.json' for name in PARTS]


def test_angles(workdir, runs):
  start = flat(params_of(workdir, 'theta_0'))
  tasks = [flat(params) - start for params in runs]
  units = [task / np.linalg.norm(task) for task in tasks]
  expected = np.degrees(np.arccos(np.clip(np.inner(units, units), -1, 1)))
  angles = np.array(part(workdir, 'angles')['angles'])
  apart = ~np.eye(4, dtype=bool)
  np.testing.assert_allclose(angles[apart], expected[apart], atol=0.01)


def test_lines_are_the_test_error_of_mixtures(workdir, runs, data):
  lines = part(workdir, 'lines')
  assert len(lines['members']) == 3 and lines['t'] == [0, 0.5, 1]
  for (i, j), errors in zip(lines['members'], lines['error']):
    expected = [
        data.error(mixed([runs[i], runs[j]], [1 - t, t]), 'test')
        for t in lines['t']
    ]
    np.testing.assert_allclose(errors, expected, atol=1e-6)


def test_pairs(workdir, runs, data):
  pairs = part(workdir, 'pairs')
  for pair in pairs['test']:
    i, j = pair['members']
    singles = [1 - data.error(runs[k], 'test') for k in (i, j)]
    np.testing.assert_allclose(pair['singles'], singles, atol=1e-6)
    half = mixed([runs[i], runs[j]], [0.5, 0.5])
    assert pair['soup'] == pytest.approx(1 - data.error(half, 'test'))
  for pair in pairs['mean of shifts']:
    half = mixed([runs[k] for k in pair['members']], [0.5, 0.5])
    assert pair['soup'] == pytest.approx(1 - data.error_on_shifts(half))


def test_plane(workdir, runs, data):
  """Every point of the grid, by Gram-Schmidt in NumPy."""
  plane = part(workdir, 'plane')
  theta_0 = params_of(workdir, 'theta_0')
  first, second = (runs[k] for k in plane['corners'])
  origin = flat(theta_0)
  d_1, d_2 = flat(first) - origin, flat(second) - origin
  u = d_1 / np.linalg.norm(d_1)
  rest = d_2 - d_2 @ u * u
  height = np.linalg.norm(rest)
  for i, y in enumerate(plane['y']):
    for j, x in enumerate(plane['x']):
      # x u + y v = a d_1 + b d_2.
      b = y / height
      a = (x - b * (d_2 @ u)) / np.linalg.norm(d_1)
      params = mixed([theta_0, first, second], [1 - a - b, a, b])
      values = {name: rows[i][j] for name, rows in plane['loss'].items()}
      assert values['training loss'] == pytest.approx(
          data.loss(params), rel=1e-3
      )
      # An example on the edge between two classes may fall to either side.
      assert values['test error'] == pytest.approx(
          data.error(params, 'test'), abs=1.1 / NUM_EXAMPLES
      )
      assert values['mean error on shifts'] == pytest.approx(
          data.error_on_shifts(params), abs=1.1 / NUM_EXAMPLES
      )
  # The start, two corners, four models, all soups.
  assert len(plane['points']) == 3 + 4 + len(plane['soups'])
  assert plane['off'][:3] == [0, 0, 0]


def test_corners_are_the_best_two(workdir):
  rows = report.read_rows(workdir / 'results.json')[:4]
  scores = [row.held_out for row in rows]
  first, second = part(workdir, 'plane')['corners']
  order = sorted(range(4), key=lambda k: (-scores[k], k))
  assert [first, second] == order[:2]


def test_diagnosis_has_the_held_out_scores(workdir, runs, data):
  report = part(workdir, 'diagnosis')
  assert report['names'] == [f'{k:02d}' for k in range(4)]
  expected = [1 - data.error(params, 'held_out') for params in runs]
  np.testing.assert_allclose(report['measured']['scores'], expected, atol=1e-6)
  assert report['verdict']['action'] in (
      'soup all',
      'soup a subset',
      'do not soup',
      'cannot tell',
  )


def test_progress_goes_on_with_every_point(made):
  _, told = made
  shares = [done for stage, done in told if stage == 'landscapes']
  assert shares == sorted(shares)
  assert shares[0] == 0 and shares[-1] == pytest.approx(1)
  # Each point of each line and of the plane, at least.
  assert len(set(shares)) > 3 * NUM_POINTS + NUM_POINTS**2
  names = list(dict.fromkeys(stage for stage, _ in told))
  assert names == list(main.STAGES)


class Terminal(io.StringIO):

  def isatty(self):
    return True


@pytest.mark.parametrize('file', [Terminal(), io.StringIO()])
def test_progress_is_a_bar_with_the_time_left_or_lines(made, file, monkeypatch):
  monkeypatch.setenv('TERM', 'xterm')
  _, told = made
  with progress.shown(main.STAGES, file=file) as progress_fn:
    for stage, done in told:
      progress_fn(stage, done)
      if (stage, done > 0.5) == ('landscapes', True):
        time.sleep(0.01)  # A bar is drawn ten times a second.
  text = file.getvalue()
  if file.isatty():
    assert '━' in text and '\x1b[' in text and '0:00:00' in text
    assert 'landscapes' in text and '100%' in text
  else:
    (line,) = (x for x in text.split('\n') if x.startswith('landscapes'))
    share = 1 - main.STAGES['landscapes'] / sum(main.STAGES.values())
    assert f'{share:.0%} of all' in line and 's left' in line
    assert '\x1b' not in text


def kept(workdir):
  folder = workdir / 'landscape'
  return {path.stem: path.stat().st_mtime_ns for path in folder.iterdir()}


def copied(workdir, tmp_path):
  return pathlib.Path(shutil.copytree(workdir, tmp_path / 'copy'))


def test_stopped_and_resumed_is_the_same(experiment, workdir, tmp_path):
  """A stop between two parts; what is whole is not made again."""
  again = copied(workdir, tmp_path)
  for name in ('diagnosis', 'lines', 'pairs', 'plane'):
    (again / 'landscape' / f'{name}.json').unlink()
  stop = preemption.Stop()

  def stop_at(stage, done):
    del done
    if (again / 'landscape/pairs.json').exists():
      stop.requested = True

  with pytest.raises(preemption.Preempted, match='copy holds'):
    main.run(experiment, again, stop_at, stop)
  before = kept(again)
  assert {'angles', 'diagnosis', 'pairs'} <= before.keys() < set(PARTS)
  main.run(experiment, again)
  assert kept(again).items() >= before.items()
  for name in PARTS:  # The command has paths.
    text = json.dumps(part(again, name)).replace(str(again), str(workdir))
    assert json.loads(text) == part(workdir, name), name


def test_other_settings_in_a_workdir_that_is_done(workdir, tmp_path):
  again = copied(workdir, tmp_path)
  fewer = ['--config.landscape.num_pairs=1', '--config.landscape.num_points=0']
  fewer += ['--config.landscape.is_diagnosed=False']
  main.run(loaded(*fewer), again)
  assert [len(part(again, 'pairs')[k]) for k in ('test', 'mean of shifts')] == [
      1,
      1,
  ]
  assert part(again, 'lines') == part(workdir, 'lines')


def test_a_damaged_part_is_named(experiment, workdir, tmp_path):
  again = copied(workdir, tmp_path)
  path = again / 'landscape' / 'lines.json'
  path.write_text(path.read_text()[:50])
  with pytest.raises(ValueError, match='lines.json is unreadable'):
    main.run(experiment, again)
  with pytest.raises(ValueError, match='lines.json is unreadable'):
    _workdir.read_workdir(again)


def test_pairs_of_many_models():
  scores = np.random.default_rng(0).random(30)
  pairs = landscapes.pairs_of(scores, 20)
  assert len(set(pairs)) == len(pairs) == 20
  assert all(0 <= i < j < 30 for i, j in pairs)
  # More than there are: all of few models, a spanning subset of many.
  assert len(landscapes.pairs_of(scores[:5], 99)) == 10
  pairs = landscapes.pairs_of(scores, 999)
  best = int(scores.argmax())
  assert sum(best in pair for pair in pairs) == 29


def test_report_has_the_numbers(workdir, tmp_path):
  files = report.write_report(workdir, tmp_path / 'report.html')
  text = files[0].read_text(encoding='utf-8')
  titles = ['Landscape', 'Barriers', 'Angles and pairs', 'Diagnosis']
  at = [text.index(f'>{title}</h2>') for title in titles]
  assert at == sorted(at)
  assert at[-1] < text.index('>Provenance</h2>')
  lines = part(workdir, 'lines')
  barriers = [
      landscape.barrier(landscape.Path(np.array(lines['t']), np.array(e)))
      for e in lines['error']
  ]
  assert f'rises by at most {100 * max(barriers):.1f} points' in text
  apart = np.array(part(workdir, 'angles')['angles'])[np.triu_indices(4, 1)]
  assert f'{apart.min():.0f} to {apart.max():.0f} degrees apart' in text
  assert part(workdir, 'diagnosis')['verdict']['reason'] in text
  row = f'landscape.num_examples</th><td>{NUM_EXAMPLES}</td>'
  assert row in text
  names = [path.stem for path in files if path.suffix == '.svg']
  assert {
      'plane_training_loss',
      'plane_test_error',
      'plane_mean_error_on_shifts',
      'barriers',
      'angles',
      'angles_and_gains_test',
      'against_ensembles_mean_of_shifts',
      'barrier_map',
  } <= set(names)
  assert {'plane.csv', 'barriers.csv', 'pairs.csv'} <= {f.name for f in files}


def test_what_is_not_a_number_is_left_out(workdir, tmp_path):
  """A loss that overflows on the plane, and a model that did not move."""
  again = copied(workdir, tmp_path)
  plane, pairs = part(again, 'plane'), part(again, 'pairs')
  losses = next(iter(plane['loss'].values()))
  lowest = min(x for row in losses[1:] for x in row)
  losses[0] = [None] * len(losses[0])
  pairs['test'] += [{**pairs['test'][0], 'angle': None}] * 5
  for name, content in (('plane', plane), ('pairs', pairs)):
    path = again / 'landscape' / f'{name}.json'
    path.write_text(json.dumps(content))
  text = report.write_report(again, tmp_path / 'report.html')[0].read_text()
  assert f'Training loss: lowest {lowest:.3g}, at' in text
  assert f'over {len(pairs["test"])} pairs' in text


def test_sections_of_a_workdir_without_landscapes(workdir, tmp_path):
  again = copied(workdir, tmp_path)
  shutil.rmtree(again / 'landscape')
  contents = _workdir.read_workdir(again)
  titles = [section.title for section in _workdir.sections_of(contents)]
  assert 'Scores' in titles and titles[-1] == 'Provenance'
  assert not {'Landscape', 'Barriers', 'Diagnosis'} & set(titles)
