"""The experiments of the paper: the table of them, and the command."""

import functools
import importlib
import json
import pathlib
import re

import jax
import numpy as np
import pytest
from scipy import special

from jaxsoup import checkpoints
from jaxsoup import landscape
from jaxsoup.experiments import architectures
from jaxsoup.experiments import configs
from jaxsoup.experiments import workdirs
from jaxsoup.paper import criteria
from jaxsoup.paper import pools
from jaxsoup.paper import run

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENT = ROOT / 'jaxsoup/docs/experiments.md'
CONFIG = f'{ROOT}/tests/_digits_mlp.py'
TINY = [
    '--config.landscape.num_points=2',
    '--config.landscape.num_pairs=0',
    '--config.landscape.is_diagnosed=False',
]


# The table.


@functools.cache
def lines():
  return [
      [cell.strip() for cell in line.strip('|').split('|')]
      for line in DOCUMENT.read_text().splitlines()
      if re.match(r'\| *\d+ *\|', line)
  ]


def table():
  return {int(cells[0]): cells[1:] for cells in lines() if len(cells) == 6}


def test_there_is_a_line_for_each():
  assert list(table()) == list(range(1, 23))
  assert all(len(cells) == 5 for cells in table().values())


def resolved(name):
  """What a dotted name leads to."""
  parts = name.split('.')
  for end in range(len(parts), 0, -1):
    try:
      target = importlib.import_module('.'.join(parts[:end]))
    except ModuleNotFoundError:
      continue
    return functools.reduce(getattr, parts[end:], target)
  raise AssertionError(f'{name} leads nowhere')


@pytest.mark.parametrize('number', range(1, 23))
def test_functions_and_figures_exist(number):
  _, held, where, functions, figures = table()[number]
  for cell in (functions, figures):
    names = re.findall(r'`([\w.]+)`', cell)
    assert names, cell
    for name in names:
      assert callable(resolved(f'jaxsoup.{name}')), name
      assert not any(part.startswith('_') for part in name.split('.')), name
  for file in re.findall(r'configs/\w+\.py', where):
    assert (ROOT / file).is_file(), file
  assert re.match(r'(yes|no|partly|open|cannot tell)\b', held), held


def test_titles_are_those_of_the_command():
  for number, experiment in run.EXPERIMENTS.items():
    assert table()[number][0] == experiment.title


def check_verdict(text):
  """Of '+1.06 [0.58, 1.55], holds'."""
  value, word = text.split('], ')
  gain, low, high = map(float, re.findall(r'[-+.\d]+', value))
  assert low <= gain <= high
  expected = 'holds' if low > 0 else 'does not hold' if high < 0 else 'cannot'
  assert word.startswith(expected), text


def test_the_page_has_every_criterion_and_its_verdict():
  told = {}
  for number, finding, value, word, other in (
      x for x in lines() if len(x) == 5
  ):
    told.setdefault(int(number), []).append(finding)
    for cells in (f'{value}, {word}', other):
      if cells:
        check_verdict(cells)
  assert told == {
      number: list(known) for number, known in criteria.CRITERIA.items()
  }


# The command.


NUM_RUNS = 4


@pytest.fixture(scope='module', autouse=True)
def few_runs():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pools, 'NUM_RUNS', NUM_RUNS)
    yield


@pytest.fixture(scope='module')
def made(tmp_path_factory, few_runs):
  workdir = tmp_path_factory.mktemp('paper')
  return workdir, run.run(CONFIG, workdir, TINY)


@pytest.fixture(scope='module')
def problem():
  experiment = configs.load(CONFIG, TINY)
  model = architectures.of(experiment)
  return model, experiment.data_fn(experiment.config)


def pool_of(workdir, name, pattern='*'):
  paths = sorted((workdir / 'seed0' / name / 'runs').glob(pattern))
  return [checkpoints.Ingredients([path])[0] for path in paths]


def mean(models):
  return jax.tree.map(
      lambda *xs: np.mean(xs, axis=0, dtype=np.float32), *models
  )


def accuracy(problem, params, name='test'):
  model, splits = problem
  source = splits.test if name == 'test' else splits.shifts[name]
  logits = np.asarray(model.logits_fn(params, source.arrays))
  return 100 * np.mean(logits.argmax(-1) == source.arrays['label'])


def on_shifts(problem, params):
  _, splits = problem
  return np.mean([accuracy(problem, params, name) for name in splits.shifts])


@pytest.mark.slow
def test_every_experiment_found_something(made):
  workdir, rows_of = made
  assert list(rows_of) == list(run.EXPERIMENTS)
  text = (workdir / 'experiments.md').read_text()
  for number, rows in rows_of.items():
    assert rows and f'## {number}. ' in text
    values = [x for row in rows.values() for one in row.values() for x in one]
    assert all(isinstance(x, float) for x in values if x is not None), number
    folder = workdir if run.EXPERIMENTS[number].has_dots else workdir / 'seed0'
    picture = folder / f'experiments/{number:02d}.png'
    assert picture.read_bytes().startswith(b'\x89PNG')
    figures = {r: {k: x[0] for k, x in row.items()} for r, row in rows.items()}
    for finding, value_fn in criteria.CRITERIA[number].items():
      if finding.startswith('learned'):
        continue  # This config has no such recipe.
      assert np.isfinite(value_fn(figures)), finding
      assert f'| {number} | {finding} | ' in text


def test_verdicts_are_of_intervals():
  """Of eight seeds that agree, of two that do not, and of the other side."""
  shares = {'test': 0.5, 'shifts': 0.5}

  def told(number, of_seeds, shares=shares):
    lines = run._verdicts({number: of_seeds}, shares)
    return lines[0], [line.split(' | ')[-1].strip(' |') for line in lines[4:]]

  noise = np.linspace(-0.1, 0.1, 8)
  row = lambda test, shifts: {'test, %': test, 'shifts, %': shifts}
  of_seeds = lambda ensemble: [
      {'greedy': row(90, 91 + 20 * x), 'greedy ensemble': row(ensemble + x, 91)}
      for x in noise
  ]
  assert told(9, of_seeds(91))[1] == ['holds', 'cannot tell']
  assert told(9, of_seeds(89))[1][0] == 'does not hold'
  # What a config has no pools for has no line.
  few = [{'soup of 1': {'ECE of 15 bins, points': x}} for x in (2.0, 3.0)]
  assert len(told(11, few)[1]) == 1
  # The same examples in all seeds: of other seeds.
  words, _ = told(9, of_seeds(91), {'test': 1.0, 'shifts': 0.3})
  assert words == 'Intervals tell of other seeds on the same examples.'
  # The correlation of one pair is NaN, which is null in JSON.
  undefined = [{'rates of the sweep': {'correlation': x}} for x in (None, 0.9)]
  assert told(10, undefined)[1][0].startswith('cannot tell')


@pytest.mark.slow
def test_a_second_call_makes_nothing_anew(made):
  workdir, rows_of = made
  made_once = (workdir / 'seed0').rglob('*')
  times = {p: p.stat().st_mtime_ns for p in made_once if p.is_file()}
  assert run.run(CONFIG, workdir, TINY) == rows_of
  assert times == {path: path.stat().st_mtime_ns for path in times}


@pytest.mark.slow
def test_another_config_makes_nothing(made):
  workdir, _ = made
  other = [*TINY, '--config.finetune.num_epochs=99']
  with pytest.raises(configs.UsageError, match='finetune.num_epochs was'):
    run.run(CONFIG, workdir, other, only=[5])


@pytest.mark.slow
def test_runs_that_diverged_leave_no_gap(made, monkeypatch):
  """Each model keeps the hyper-parameters of its own run."""
  workdir, _ = made
  copies = workdirs.Work.copies
  left = lambda work: [x for x in copies(work) if x[0] != 2]
  bench_fn = lambda: pools.Bench(configs.load(CONFIG, TINY), workdir / 'seed0')
  with bench_fn() as bench:
    whole = bench['rates']
  monkeypatch.setattr(workdirs.Work, 'copies', left)
  with bench_fn() as bench:
    pool = bench['rates']
    assert pool.runs == [x for i, x in enumerate(whole.runs) if i != 2]
    assert whole.neighbours() == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert whole.neighbours(4) == [(0, 1), (2, 3)]
    pairs = pool.neighbours()
    assert pairs == [(0, 1), (3, 4), (5, 6)]
    for i, j in pairs:
      assert pool.runs[i]['learning_rate'] == pool.runs[j]['learning_rate']
    # Six models of each run: an average, four epochs, the last one.
    steps, runs = bench['averaged'].kept()
    assert len(runs) == NUM_RUNS - 1 and {len(x) for x in runs} == {6}


@pytest.mark.slow
def test_soups_against_numpy(made, problem):
  """One figure of each pool, from its checkpoints."""
  workdir, rows_of = made

  def check(number, row, params):
    scores = rows_of[number][row]
    assert scores['test, %'] == pytest.approx([accuracy(problem, params)], 1e-4)
    assert scores['shifts, %'] == pytest.approx([on_shifts(problem, params)])

  sweep = pool_of(workdir, 'sweep')
  check(5, 'uniform', mean(sweep))
  check(12, 'narrow: uniform soup', mean(pool_of(workdir, 'narrow')))
  ema = mean(pool_of(workdir, 'averaged', '*_ema*'))
  check(14, 'falling rate, EMA: uniform soup', ema)
  last = pool_of(workdir, 'averaged')
  # A moving average, four epochs and the last parameters of each run.
  assert len(last) == NUM_RUNS * 6
  swa = mean(pool_of(workdir, 'averaged', '*_step*'))
  plain = mean(pool_of(workdir, 'averaged', '??'))
  swa = jax.tree.map(lambda x, y: np.float32(0.8 * x + 0.2 * y), swa, plain)
  check(14, 'falling rate, SWA: uniform soup', swa)
  check(14, 'falling rate, last: uniform soup', plain)
  check(15, 'SAM: uniform soup', mean(pool_of(workdir, 'sam')))
  half = [*sweep[:2], *pool_of(workdir, 'sam')[2:]]
  check(15, 'half of each: uniform soup', mean(half))
  ends = [mean(pool_of(workdir, 'constant', f'{k:02d}*')) for k in (0, 1)]
  scores = [accuracy(problem, params) for params in ends]
  row = rows_of[22]['mean of all']
  np.testing.assert_allclose(row['test, %'], [np.mean(scores)], atol=1e-3)
  check(22, 'soup of: decayed rate', mean(pool_of(workdir, 'decayed')))
  check(19, 'linear probe: uniform soup', mean(pool_of(workdir, 'probed')))
  check(19, 'random head: uniform soup', mean(pool_of(workdir, 'random_head')))


@pytest.mark.slow
def test_barriers_against_numpy(made, problem):
  workdir, rows_of = made
  models = pool_of(workdir, 'rates')
  t = np.linspace(0, 1, 11)
  for k, (name, row) in enumerate(rows_of[4].items()):
    first, second = models[2 * k : 2 * k + 2]
    errors = [100 - accuracy(problem, mean_of(first, second, x)) for x in t]
    expected = landscape.barrier(landscape.Path(t, np.array(errors)))
    assert row['barrier, points'] == pytest.approx([expected], abs=1e-3), name


@pytest.mark.slow
def test_fewer_runs_than_the_pools_take(made, monkeypatch):
  workdir, rows_of = made
  monkeypatch.setattr(pools, 'NUM_RUNS', 99)
  assert run.run(CONFIG, workdir, TINY, only=[13]) == {13: rows_of[13]}


def mean_of(first, second, t):
  return jax.tree.map(
      lambda x, y: np.float32(1 - t) * x + np.float32(t) * y, first, second
  )


@pytest.mark.slow
def test_one_hyper_parameter_varies(made):
  workdir, rows_of = made
  runs = [
      checkpoints.provenance(path)['metadata']['config']
      for path in sorted((workdir / 'seed0/one_factor/runs').iterdir())
  ]
  for k, name in enumerate(pools.FACTORS):
    group = runs[4 * k : 4 * k + 4]
    varying = {n for n in group[0] if len({run[n] for run in group}) > 1}
    assert varying == {name}
  for name in pools.FACTORS:
    rows = [rows_of[8][f'{name} varies: {what}'] for what in ('best', 'mean')]
    for column in rows[0]:
      assert rows[0][column] >= rows[1][column]


@pytest.mark.slow
def test_the_teacher_is_the_ensemble(made, problem):
  workdir, _ = made
  model, splits = problem
  train = splits.train.arrays
  logits = np.mean(
      [model.logits_fn(p, train) for p in pool_of(workdir, 'sweep')], axis=0
  )
  with pools.Bench(configs.load(CONFIG, TINY), workdir / 'seed0') as bench:
    pool = bench['distilled']
    target = pool.work.splits.train.arrays['target']
  np.testing.assert_allclose(target, special.softmax(logits, -1), atol=1e-5)


@pytest.mark.slow
def test_heads_and_data_sets(made):
  workdir, _ = made
  start = checkpoints.Ingredients([workdir / 'seed0/sweep/theta_0'])[0]
  for name in pools.DATA_SETS:
    (params,) = pool_of(workdir, f'on_{name}')
    for x, y in zip(jax.tree.leaves(params['head']),
                    jax.tree.leaves(start['head'])):  # fmt: skip
      np.testing.assert_array_equal(x, y)
    assert not np.array_equal(
        params['embed']['kernel'], start['embed']['kernel']
    )
  for name in ('probed', 'random_head'):
    other = checkpoints.Ingredients([workdir / f'seed0/{name}/theta_0'])[0]
    np.testing.assert_array_equal(
        other['embed']['kernel'], start['embed']['kernel']
    )
    assert not np.array_equal(other['head']['kernel'], start['head']['kernel'])


def test_figures_of_several_seeds_are_means(tmp_path):
  seeds = [
      {'soup': {'test, %': x, 'p': y, 'test, points': x - 92}}
      for x, y in ((90, 0.5), (94, 0.1))
  ]
  run._write(tmp_path, {5: seeds}, {'test': 0.5, 'shifts': 0.5})
  text = (tmp_path / 'experiments.md').read_text()
  # Deviations with one degree of freedom.
  # Of a gain an interval: t is 12.7, times 2.8 sqrt(1 / 2 + 1).
  assert '| soup | 92.0 ± 2.8 | 0.30 ± 0.28 | +0.00 [-44.02, 44.02] |' in text


@pytest.mark.parametrize(
    'argv, text',
    [
        (['--only=99'], 'There is no experiment 99: choose from 1, 2'),
        (['--only=x'], 'Write --only=4,13'),
        (['--seeds=0'], '0 is not a positive integer'),
        (['--sedes=2'], 'sedes'),
    ],
)
def test_usage(argv, text, tmp_path, capsys):
  argv = [f'--config={CONFIG}', f'--workdir={tmp_path}/w', *argv]
  assert run.main(argv) == 2
  error = capsys.readouterr().err
  assert text in error and 'Traceback' not in error
  assert not (tmp_path / 'w').exists()


def test_what_a_config_lacks(tmp_path, capsys):
  config = f'{ROOT}/configs/reviews_minilm.py'
  argv = [f'--config={config}', f'--workdir={tmp_path}/w']
  for number, lacks in ((8, 'sweep.mixup, sweep.affine'), (12, 'pretrain')):
    assert run.main([*argv, f'--only=1,{number}']) == 2
    error = capsys.readouterr().err
    assert f'Experiment {number} needs {lacks}, which {config} does' in error
    assert 'choose from 1, 2, 3, 4, 5' in error
  assert not run._lacks(configs.load(config).config, 22)
  assert not any(
      run._lacks(configs.load(CONFIG).config, n) for n in range(1, 21)
  )
  assert not (tmp_path / 'w').exists()


@pytest.mark.slow
def test_figures_are_json(made):
  workdir, rows_of = made
  for path in (workdir / 'seed0/experiments').glob('*.json'):
    rows = json.loads(path.read_text())
    assert {r: {k: [x] for k, x in row.items()} for r, row in rows.items()} == (
        rows_of[int(path.stem)]
    )
