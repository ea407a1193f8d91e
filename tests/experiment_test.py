"""The experiment as a command: killed and resumed, and used wrongly."""

from concurrent import futures
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import _forked
import _xla
import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from jaxsoup import checkpoints
from jaxsoup import report
from jaxsoup.data import sources
from jaxsoup.experiments import configs
from jaxsoup.experiments import cook
from jaxsoup.experiments import defaults
from jaxsoup.experiments import main
from jaxsoup.experiments import workdirs

ROOT = pathlib.Path(__file__).parent.parent
# The digits with a model that compiles in no time.
CONFIG = f'{ROOT}/tests/_digits_mlp.py:runlocal'
TINY = (
    '--config.sweep.num_runs=4',
    '--config.sweep.group_size=2',
    '--config.pretrain.num_epochs=20',
    '--config.finetune.num_epochs=2',
    '--config.learned.num_epochs=2',
    '--config.landscape.num_pairs=0',
    '--config.landscape.num_points=0',
    '--config.landscape.is_diagnosed=False',
)


def command(workdir, *overrides):
  return [
      sys.executable,
      '-m',
      'jaxsoup.experiments.main',
      f'--config={CONFIG}',
      f'--workdir={workdir}',
      *TINY,
      *overrides,
  ]


def environment():
  # What one process compiled the next one finds: same programs, same bits.
  return os.environ | {
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'PYTHONPATH': str(ROOT),
      'XLA_FLAGS': _xla.flags(1),
  }


def finish(workdir, *overrides):
  done = _forked.run(command(workdir, *overrides), env=environment())
  assert done.returncode == 0, done.stderr
  return done


def kill_when(reached, workdir):
  """Starts the experiment and kills it at the first moment that fits."""
  process = _forked.Process(command(workdir), env=environment())
  try:
    while not reached(workdir) and process.poll() is None:
      time.sleep(0.002)
    assert process.poll() is None, 'It ended before the moment came.'
  finally:
    process.kill()
    process.wait()
  assert not (workdir / 'results.json').exists()


def num_lines(path):
  return path.read_bytes().count(b'\n') if path.exists() else 0


def leaves(path):
  params = checkpoints.Ingredients([path])[0]
  return [np.asarray(x) for x in jax.tree.leaves(params)]


def assert_same(workdir, expected, num_runs=4):
  results = [
      (folder / 'results.json').read_text() for folder in (workdir, expected)
  ]
  assert results[0] == results[1]
  paths = ['theta_0', *(f'runs/{k:02d}' for k in range(num_runs))]
  paths += [f'soups/{p.name}' for p in (expected / 'soups').iterdir()]
  for path in paths:
    for x, y in zip(leaves(workdir / path), leaves(expected / path)):
      np.testing.assert_array_equal(x, y)


MOMENTS = {
    'one run of a group is there': lambda w: (w / 'runs/00').exists(),
    'three scores are known': lambda w: num_lines(w / 'scores.jsonl') > 3,
    'the first soup is there': lambda w: (w / 'soups/uniform').exists(),
}


@pytest.mark.slow
def test_killed_and_resumed_is_the_same(tmp_path, uninterrupted):
  # One workdir, killed again and again, each time further on.
  for reached in MOMENTS.values():
    kill_when(reached, tmp_path)
    # And as if it had been killed in the middle of a checkpoint.
    for path in (tmp_path / 'runs' / '01', tmp_path / 'soups' / 'greedy'):
      unfinished = path.with_name(path.name + '.orbax-checkpoint-tmp')
      if not path.exists() and not unfinished.exists():
        shutil.copytree(tmp_path / 'theta_0', unfinished)
  finish(tmp_path)
  assert_same(tmp_path, uninterrupted)


@pytest.mark.slow
def test_parts_of_the_sweep_make_the_same(tmp_path, uninterrupted):
  """As two machines would, at the same time; then one makes the soups."""
  parts = [
      _forked.Process(
          command(tmp_path, f'--config.sweep.shard={i}/2'), env=environment()
      )
      for i in range(2)
  ]
  for part in parts:
    out, error = part.communicate()
    assert part.returncode == 0, error
    assert 'without sweep.shard' in out
  assert len(list((tmp_path / 'runs').iterdir())) == 4
  assert not (tmp_path / 'soups').exists()
  finish(tmp_path)
  assert_same(tmp_path, uninterrupted)


@pytest.mark.slow
def test_runs_on_workers_are_the_same(tmp_path, uninterrupted):
  """And only those that are not there are trained."""
  for name in ('theta_0', 'runs/00'):
    shutil.copytree(uninterrupted / name, tmp_path / 'workdir' / name)
  shutil.copy(uninterrupted / 'config.json', tmp_path / 'workdir')
  script = ROOT / 'tests/_on_workers.py'
  args = [sys.executable, script, CONFIG, tmp_path / 'workdir', *TINY]
  done = subprocess.run(
      args, env=environment(), capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert_same(tmp_path / 'workdir', uninterrupted)
  rows = (tmp_path / 'workdir/metrics.jsonl').read_text().splitlines()
  saved = [r['run'] for r in map(json.loads, rows) if 'held_out' in r]
  assert sorted(saved) == [1, 2, 3]


def test_workers_load_an_experiment_by_its_path(tmp_path):
  loaded = configs.load(CONFIG, TINY)
  executor = futures.ThreadPoolExecutor(1)
  with pytest.raises(configs.UsageError, match='what configs.load returned'):
    main.run(loaded._replace(source=None), tmp_path, executor=executor)


def test_parts_that_are_none(tmp_path, capsys):
  for text in ('2/2', 'x', '1'):
    argv = command(tmp_path, f'--config.sweep.shard={text}')[3:]
    assert main.main(argv) == 2
    assert f'sweep.shard is {text!r}' in capsys.readouterr().err


@pytest.mark.slow
def test_the_held_out_set_is_drawn_several_times(tmp_path, uninterrupted):
  more = ('--config.num_splits=3',)
  finish(tmp_path, *more)
  results = json.loads((tmp_path / 'results.json').read_text())
  tables = results['splits']
  assert len(tables) == 3
  # The first is the split of the data.
  assert (
      tables[0]
      == json.loads((uninterrupted / 'results.json').read_text())['rows']
  )
  for row, *others in zip(results['rows'], *tables):
    for name in ('held_out', 'test', 'nll'):
      mean = np.mean([other[name] for other in others])
      assert row[name] == pytest.approx(mean)
  # The same examples, parted otherwise: 80 that select, 100 that report.
  singles = [[r for r in t if r['kind'] == 'single'] for t in tables]
  for k in range(4):
    rights = [80 * t[k]['held_out'] + 100 * t[k]['test'] for t in singles]
    np.testing.assert_allclose(rights, rights[0], atol=1e-3)
  assert len({t[0]['held_out'] for t in singles}) > 1
  assert '±' in (tmp_path / 'table.md').read_text()


@pytest.mark.slow
def test_copies_of_runs_are_ingredients(tmp_path, uninterrupted):
  more = ['--config.finetune.ema=(0.9,)', '--config.finetune.keep_steps=(5,)']
  more += ['--config.tensorboard=True', '--config.sweep.num_runs=2']
  finish(tmp_path, *more)
  names = sorted(path.name for path in (tmp_path / 'runs').iterdir())
  copies = ['', '_ema_0.9', '_step_5']
  assert names == [f'{k:02d}{copy}' for k in range(2) for copy in copies]
  results = json.loads((tmp_path / 'results.json').read_text())
  singles = [r['name'] for r in results['rows'] if r['kind'] == 'single']
  assert sorted(singles) == names
  assert len(results['alpha']['uniform']) == 6
  made = checkpoints.provenance(tmp_path / 'runs/01_ema_0.9')['metadata']
  assert made['copy'] == 'ema_0.9'
  # The last parameters do not depend on what is kept beside them.
  for x, y in zip(
      leaves(tmp_path / 'runs/01'), leaves(uninterrupted / 'runs/01')
  ):
    np.testing.assert_allclose(x, y, atol=1e-4)
  events = list((tmp_path / 'tensorboard' / '1').glob('events*'))
  assert any(b'loss' in path.read_bytes() for path in events)


def test_reports_go_where_the_config_sends_them(tmp_path):
  more = '\nSEEN = []\ndef log(config):\n  return SEEN.append\n'
  text = f'from configs.digits import data, get_config, sweep{more}'
  (tmp_path / 'c.py').write_text(text)
  experiment = configs.load(f'{tmp_path}/c.py:runlocal', TINY)
  work = workdirs.work_of(experiment, tmp_path / 'w')
  work.log.write({'run': 0, 'step': 3, 'loss': 0.5})
  assert sys.modules['jaxsoup_config'].SEEN == [
      {'run': 0, 'step': 3, 'loss': 0.5}
  ]
  (tmp_path / 'c.py').write_text(text.replace('return SEEN.append', 'pass'))
  experiment = configs.load(f'{tmp_path}/c.py:runlocal', TINY)
  with pytest.raises(configs.UsageError, match=r'log\(config\) returned None'):
    workdirs.work_of(experiment, tmp_path / 'w')


@pytest.mark.parametrize('override', ['batch_size=61', 'val_fraction=0.0'])
def test_too_few_held_out_examples_to_learn_on(override):
  config = configs.load(CONFIG, [*TINY, f'--config.learned.{override}']).config
  held_out = sources.Arrays({'label': np.zeros(80, np.int32)})
  with pytest.raises(ValueError, match='Of 80 held-out .* has no batch'):
    cook.learning_batches(config, held_out)


def test_a_sweep_that_was_edited_is_refused(tmp_path, uninterrupted):
  # Else the first run is reported with a learning rate that it did not have.
  shutil.copytree(uninterrupted, tmp_path / 'w')
  experiment = configs.load(CONFIG, TINY)
  then = experiment.runs[1]['learning_rate']
  experiment.runs[1]['learning_rate'] = 0.5
  words = f'runs/01 was trained with learning_rate {then} .now 0.5.: sweep'
  with pytest.raises(configs.UsageError, match=words):
    main.run(experiment, tmp_path / 'w')


def test_pretraining_is_a_role_too(tmp_path):
  experiment = configs.load(CONFIG, TINY)
  splits = experiment.data_fn(experiment.config)
  leaking = splits._replace(pretrain=splits.test)
  experiment = experiment._replace(data_fn=lambda config: leaking)
  with pytest.raises(ValueError, match='train.*test'):
    main.run(experiment, tmp_path / 'w')


@pytest.mark.slow
def test_a_run_that_diverges_is_left_out(tmp_path, uninterrupted):
  # Else it is all trained, and then no soup can be made of it.
  shutil.copytree(uninterrupted / 'theta_0', tmp_path / 'w/theta_0')
  shutil.copy(uninterrupted / 'config.json', tmp_path / 'w')
  experiment = configs.load(CONFIG, TINY)
  experiment.runs[2]['learning_rate'] = 1e30
  with pytest.warns(UserWarning, match='02 diverged .*not be part of any soup'):
    rows = main.run(experiment, tmp_path / 'w')
  names = ['00', '01', '03']
  assert [row.name for row in rows if row.kind == 'single'] == names
  results = json.loads((tmp_path / 'w/results.json').read_text())
  assert results['diverged'] == ['02'] and len(results['runs']) == 4
  assert np.isfinite(results['alpha']['uniform']).all()
  uniform = leaves(tmp_path / 'w/soups/uniform')
  mean = [leaves(tmp_path / 'w/runs' / name) for name in names]
  for x, *parts in zip(uniform, *mean):
    np.testing.assert_allclose(x, np.mean(parts, 0), rtol=1e-5, atol=1e-6)
  words = 'Left out, with NaN or infinite values: 02.'
  assert words in (tmp_path / 'w/table.md').read_text()
  files = report.write_report(tmp_path / 'w')
  assert 'Left out, with NaN or infinite values: 02.' in files[0].read_text()
  # Again: nothing is trained anew.
  before = (tmp_path / 'w/runs/02').stat().st_mtime_ns
  with pytest.warns(UserWarning, match='02 diverged'):
    main.run(experiment, tmp_path / 'w')
  assert (tmp_path / 'w/runs/02').stat().st_mtime_ns == before


def test_early_stopping_takes_batches_of_the_size_that_is_planned():
  # All of it as one batch, on every device, would be the largest of all arrays.
  overrides = [*TINY, '--config.learned.batch_size=8']
  config = configs.load(CONFIG, overrides).config
  held_out = sources.Arrays({'label': np.arange(80, dtype=np.int32)})
  mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, PartitionSpec('data'))
  parts = cook.learning_batches(config, held_out, sharding)
  assert [len(part) for part in parts] == [7, 2]  # 60 and 20 examples.
  seen = []
  for part in parts:
    first, again = list(part), list(part)
    for x, y in zip(first, again, strict=True):
      np.testing.assert_array_equal(x['label'], y['label'])
      assert x['label'].shape == (8,)
      assert x['label'].addressable_shards[0].data.shape == (2,)
      seen += x['label'].tolist()
  assert len(set(seen)) == len(seen) == 72
  config.learned.batch_size = 30
  first, last = cook.learning_batches(config, held_out, sharding)
  assert [len(b['label']) for b in first] == [30, 30]
  assert [len(b['label']) for b in last] == [20]


@pytest.mark.parametrize('free, is_kept', [(10**6, True), (1000, False)])
def test_batches_stay_on_the_host_where_they_fit(monkeypatch, free, is_kept):
  decoded = []

  def example_fn(record, rng):
    del rng
    decoded.append(int(record))
    return {'x': np.full(100, record, np.uint8)}

  monkeypatch.setattr(cook._memory, 'free_bytes', lambda device: 0)
  monkeypatch.setattr(cook._memory, 'host_free_bytes', lambda: free)
  batches = cook.batches_of(sources.Examples(np.arange(12), example_fn), 4)
  decoded.clear()  # The first was read to know its size.
  # A walk that is cut short, as by an early rejection, and whole ones.
  assert next(iter(batches))['x'].dtype == np.uint8
  for _ in range(2):
    x = np.concatenate([batch['x'] for batch in batches])
    np.testing.assert_array_equal(x, np.arange(12)[:, None].repeat(100, 1))
  assert decoded.count(0) == (1 if is_kept else 3)
  decoded.clear()
  list(batches)
  assert len(decoded) == (0 if is_kept else 12)


@pytest.mark.parametrize('select_by', ['metric', 'nll'])
def test_scores_of_logits_are_those_of_the_searches(select_by):
  """To the last bit, or a search takes a tie for a loss or a gain."""
  config = configs.load(CONFIG, TINY).config
  with config.unlocked():
    config.select_by = select_by
  rng = np.random.default_rng(0)
  label = rng.integers(0, 10, 400).astype(np.int32)
  data = sources.Arrays({'x': np.arange(400), 'label': label})
  right = 10 * np.eye(10, dtype=np.float32)[label]
  for num_wrong in (3, 77, 135):  # Accuracies that float32 does not hold.
    logits = np.where(np.arange(400)[:, None] < num_wrong, 1 - right, right)
    logits_fn = lambda params, batch: params[batch['x']]
    batches = cook.batches_of(data, config.batch_size)
    score_fn = cook.score_fn(config, logits_fn, batches)
    score = cook.selection_score(config, logits, label)
    if select_by == 'metric':
      assert score == score_fn(logits) == 1 - num_wrong / 400
    else:
      assert score == pytest.approx(score_fn(logits), rel=1e-4)


def test_metrics_of_the_training(uninterrupted):
  lines = (uninterrupted / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  pretraining = [r['loss'] for r in rows if r['run'] == 'pretrain']
  assert len(pretraining) == 20 and pretraining[-1] < pretraining[0]
  for run in range(4):
    of_run = [r for r in rows if r['run'] == run]
    assert [r.get('epoch') for r in of_run] == [1, 2, None]
    assert {'step', 'learning_rate', 'gradient_norm'} < of_run[0].keys()
    assert 0 < of_run[-1]['held_out'] <= 1


def test_what_a_workdir_holds(uninterrupted):
  results = json.loads((uninterrupted / 'results.json').read_text())
  kinds = [row['kind'] for row in results['rows']]
  assert kinds == ['single'] * 4 + ['soup'] * 6 + ['ensemble'] * 2
  assert len(results['runs']) == 4
  assert results['config']['sweep.num_runs'] == 4
  answers = np.load(uninterrupted / 'answers.npz')
  right, label = answers['answers/test'], answers['label/test']
  scores = [row['test'] for row in results['rows']]
  np.testing.assert_allclose(right.mean(1), scores, atol=1e-6)
  logits = np.load(uninterrupted / 'logits/01.npz')['test']
  np.testing.assert_array_equal(right[1], logits.argmax(-1) == label)
  for name in ('test_against_shifts.png', 'trials.png'):
    assert (uninterrupted / name).read_bytes().startswith(b'\x89PNG')
  table = (uninterrupted / 'table.md').read_text()
  assert '| greedy |' in table and '| mean of singles |' in table
  made = checkpoints.provenance(uninterrupted / 'soups/greedy')
  assert len(made['ingredients']) == 4 and made['metadata']['seed'] == 0
  greedy = checkpoints.load(uninterrupted / 'soups/greedy')
  rows = {row['name']: row for row in results['rows']}
  assert rows['greedy']['held_out'] == pytest.approx(greedy.info.score)
  # Bins of the best single model, soups and ensembles; beta is applied.
  singles = [row for row in results['rows'] if row['kind'] == 'single']
  rows['best single'] = max(singles, key=lambda row: row['held_out'])
  # Five corruptions, and digits of other writers.
  shifts = rows['best single']['shifts']
  assert len(shifts) == 6 and 'other writers (100)' in table
  right = answers['answers/other writers'].mean(1)
  scores = [row['shifts']['other writers'] for row in results['rows']]
  np.testing.assert_allclose(right, scores, atol=1e-6)
  (line,) = (x for x in table.splitlines() if x.startswith('| best single |'))
  mean = 100 * np.mean(list(shifts.values()))
  assert line.split('|')[5].strip() == f'{mean:.1f}'
  assert len(results['calibration']) == 1 + 6 + 2
  for name, bins in results['calibration'].items():
    gap = np.abs(np.subtract(bins['confidence'], bins['accuracy']))
    ece = np.average(gap, weights=bins['num'])
    assert ece == pytest.approx(rows[name]['ece'], abs=1e-6)


@pytest.mark.slow
def test_stability_of_the_searches(uninterrupted, tmp_path):
  """Of a workdir that is done; the choice on all examples is the search's."""
  workdir = tmp_path / 'done'
  shutil.copytree(uninterrupted, workdir)
  finish(workdir, '--config.stability.greedy=3')
  results = json.loads((workdir / 'results.json').read_text())
  assert (
      results['rows']
      == json.loads((uninterrupted / 'results.json').read_text())['rows']
  )
  greedy = checkpoints.load(workdir / 'soups/greedy').info
  stability = results['stability']
  assert stability['greedy']['chosen'] == sorted(greedy.accepted)
  assert len(stability['greedy']['sizes']) == 3
  stable = stability['greedy ensemble']
  assert len(stable['sizes']) == 100
  assert sum(stable['frequency']) == pytest.approx(np.mean(stable['sizes']))
  # Of a single model that is chosen, and of an ensemble, from their logits.
  logits = np.stack(
      [np.load(p)['held_out'] for p in sorted(workdir.glob('logits/0*.npz'))]
  )
  experiment = configs.load(CONFIG, TINY)
  label = experiment.data_fn(experiment.config).held_out.arrays['label']
  right = lambda members: np.mean(
      logits[list(members)].mean(0).argmax(-1) == label
  )
  best = max(right([k]) for k in range(4))
  assert right(stable['chosen']) >= best


@pytest.mark.slow
def test_report_of_a_workdir(uninterrupted, tmp_path):
  files = report.write_report(uninterrupted, tmp_path / 'report.html')
  text = files[0].read_text(encoding='utf-8')
  for title in ('Scores', 'Mixing coefficients', 'Calibration', 'Provenance'):
    assert f'>{title}</h2>' in text
  greedy = [r for r in report.read_rows(uninterrupted / 'results.json')][5]
  assert greedy.name == 'greedy'
  assert f'<td>{100 * greedy.test:.1f}</td>' in text


def test_workdir_begun_with_another_config(uninterrupted, capsys):
  before = (uninterrupted / 'results.json').read_bytes()
  argv = command(uninterrupted, '--config.seed=3')[3:]
  assert main.main(argv) == 2
  error = capsys.readouterr().err
  assert 'started with another config: seed was 0, is now 3' in error
  assert (uninterrupted / 'results.json').read_bytes() == before


def test_a_config_that_failed_at_once_is_put_right(tmp_path, capsys):
  file = str(ROOT / 'configs/fashion_vit.py')
  experiment = lambda path: configs.load(
      file, [f'--config.data.path={path}', '--config.sweep.num_runs=1']
  )
  argv = [f'--config={file}', f'--workdir={tmp_path}']
  assert main.main([*argv, '--config.data.path=nowhere']) == 1
  assert 'nowhere has no train-images' in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ['config.json']
  right = experiment('elsewhere').config
  stored = tmp_path / 'config.json'
  configs.check_unchanged(right, stored)
  assert 'elsewhere' in stored.read_text()
  # But not what belongs to another part of the sweep, or to what was made.
  for name in ('.lock_1_4', 'runs'):
    (tmp_path / name).mkdir()
    with pytest.raises(configs.UsageError, match='started with another config'):
      configs.check_unchanged(experiment('nowhere').config, stored)
    (tmp_path / name).rmdir()
  assert 'elsewhere' in stored.read_text()
  # Nor a file of others, of this name.
  stored.write_text('{"hidden_size": 4}')
  with pytest.raises(configs.UsageError, match='started with another config'):
    configs.check_unchanged(right, stored)
  assert stored.read_text() == '{"hidden_size": 4}'


def test_another_process_writes_the_config_meanwhile(tmp_path, monkeypatch):
  config = configs.load(CONFIG).config
  stored = tmp_path / 'config.json'
  unfinished = tmp_path / 'config.json.unfinished-0a1b'
  unfinished.touch()
  (tmp_path / '.lock_0_4').touch()
  configs.check_unchanged(config, stored)
  content = stored.read_bytes()
  stored.unlink()

  # It comes when the folder has been listed, with what is made next.
  def listed(workdir, own, others=configs.others):
    names = others(workdir, own)
    stored.write_bytes(content)
    (tmp_path / 'metrics.jsonl').touch()
    return names

  monkeypatch.setattr(configs, 'others', listed)
  configs.check_unchanged(config, stored)


def test_another_process_starts_the_first_seed_meanwhile(tmp_path, monkeypatch):
  monkeypatch.setattr(main, 'run', lambda *_: [])
  (tmp_path / 'seed0').mkdir()
  assert len(main.run_seeds(CONFIG, tmp_path, num_seeds=2)) == 2
  (tmp_path / 'notes.txt').touch()
  with pytest.raises(configs.UsageError, match=r'holds notes\.txt, and no exp'):
    main.run_seeds(CONFIG, tmp_path, num_seeds=2)


WHOLE = [f'--config={CONFIG}', '--workdir=w']


@pytest.mark.parametrize(
    'argv, text',
    [
        ([], '--config is missing'),
        (WHOLE[:1], '--workdir is missing'),
        (WHOLE[1:], '--config is missing'),
        (['--config=configs/digit.py', '--workdir=w'],
         'no config configs/digit'),
        ([f'--config={ROOT}/configs/digit.py', '--workdir=w'], 'digits.py'),
        ([*WHOLE, 'extra'], "argument 'extra'"),
        ([*WHOLE, 'config.seed=5'], "argument 'config.seed=5'"),
        ([*WHOLE, '--wrokdir=x'], 'wrokdir'),
        ([f'{WHOLE[0]}x', '--workdir=w'], "'runlocalx': choose from runlocal"),
        ([*WHOLE, '--config.sweep.num_run=3'], 'Did you mean sweep.num_runs'),
        ([*WHOLE, '--config.learning_rat=3'], 'The config has no'),
        ([*WHOLE, '--config.sweep.num_runs=many'],
         'sweep.num_runs is int, such as 4'),
        ([*WHOLE, '--config.learned.learning_rate=fast'],
         'learned.learning_rate is float'),
        ([*WHOLE, '--config.sweep=3'], 'sweep'),
    ],
)  # fmt: skip
def test_usage(argv, text, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert main.main(argv) == 2
  error = capsys.readouterr().err
  assert error.startswith('Error: ') and text in error
  assert 'Traceback' not in error and error.count('\n') == 1
  assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize(
    'file', sorted((ROOT / 'configs').glob('*.py')), ids=lambda p: p.stem
)
def test_a_copy_of_a_config_works_in_any_folder(file, tmp_path, monkeypatch):
  original = configs.load(f'{file}:runlocal')
  monkeypatch.chdir(tmp_path)
  shutil.copy(file, 'mine.py')
  copy = configs.load('mine.py:runlocal')
  assert copy.config == original.config and copy.runs == original.runs
  assert copy.data_fn is not None


CONFIG_WITH_DATA = """
import ml_collections
import numpy as np
from jaxsoup.data import sources

get_config = lambda arg: ml_collections.ConfigDict({'seed': 0})
sweep = lambda config: [{}]

def example(record, rng):
  return {'x': np.array(record)}

def data(config):
  made = sources.Examples(list(range(8)), example, num_workers=1)
  return sources.Splits(made, made, made)
"""


def test_examples_of_a_config_file_in_other_processes(tmp_path):
  """Which cannot import the file."""
  (tmp_path / 'mine.py').write_text(CONFIG_WITH_DATA)
  experiment = configs.load(str(tmp_path / 'mine.py'))
  train = experiment.data_fn(experiment.config).train
  batches = list(sources.batches(train, 4))
  assert [x['x'].tolist() for x in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_changed_settings_do_not_change_the_defaults():
  before = defaults.config(), defaults.learned(), defaults.sweep(3)
  config = defaults.config()
  config.landscape.num_points = 7
  config.learned = defaults.learned(patience=9)
  config.sweep = defaults.sweep(4, group_size=2, mixup=(0.0, 0.5))
  config.sweep.draw = 1
  assert config.sweep.to_dict() == dict(
      draw=1, num_runs=4, group_size=2, shard='0/1', mixup=(0.0, 0.5)
  )
  training = defaults.training(2, 8, warmup=0.3, run=dict(learning_rate=1.0))
  assert training['warmup'] == 0.3 and training['final'] == 0.0
  assert before == (defaults.config(), defaults.learned(), defaults.sweep(3))
  assert defaults.package_folder('no_such_package') is None


def test_runs_carry_their_config_and_score(uninterrupted):
  made = checkpoints.provenance(uninterrupted / 'runs/03')['metadata']
  results = json.loads((uninterrupted / 'results.json').read_text())
  assert made['config'] == results['runs'][3]
  assert made['held_out'] == pytest.approx(results['rows'][3]['held_out'])
