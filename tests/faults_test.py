"""What a stop, a full disk or a damaged file does: no data lost, a way out."""

import contextlib
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings

import _forked
import experiment_test
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from typer.testing import CliRunner

import jaxsoup
from jaxsoup import _files
from jaxsoup import checkpoints
from jaxsoup import cli
from jaxsoup.experiments import main
from jaxsoup.runtime import locking
from jaxsoup.runtime import preemption
from jaxsoup.train import unfinished

# As in the tests of checkpoints: what Orbax leaves behind when a read failed.
pytestmark = pytest.mark.filterwarnings(
    'ignore::pytest.PytestUnraisableExceptionWarning',
    'ignore::pytest.PytestUnhandledThreadExceptionWarning',
)

ROOT = pathlib.Path(__file__).parent.parent
# One group of long runs, so that a signal comes in the middle of it.
LONG = (
    '--config.sweep.num_runs=2',
    '--config.finetune.num_epochs=30',
    '--config.pretrain.num_epochs=30',
)


def params_of(k):
  rng = np.random.default_rng(k)
  return {
      'dense': {'kernel': rng.normal(size=(16, 8)).astype('f4')},
      'bias': rng.normal(size=8).astype('f4'),
  }


@pytest.fixture
def runs(tmp_path):
  paths = [tmp_path / f'run{k}' for k in range(3)]
  for k, path in enumerate(paths):
    checkpoints.save(path, params_of(k))
  return paths


def score(params):
  return -abs(float(params['bias'][0]) - 0.3)


def invoke(*args):
  return CliRunner().invoke(cli.app, [str(a) for a in args])


def assert_equal(actual, expected):
  for x, y in zip(
      jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def wait_for(reached, process):
  """Waits for files, not for time: a slow machine gives the same moment."""
  while not reached() and process.poll() is None:
    time.sleep(0.002)
  assert process.poll() is None, process.stderr


@contextlib.contextmanager
def started(args):
  process = _forked.Process(args, env=experiment_test.environment())
  try:
    yield process
  finally:
    process.kill()
    process.communicate()


# --- Signals ------------------------------------------------------------------


def test_first_sigterm_asks_second_kills():
  # A handler that stays would swallow every later SIGTERM of the process.
  before = signal.getsignal(signal.SIGTERM)
  with preemption.handled() as stop:
    stop.check('nothing')
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  assert signal.getsignal(signal.SIGTERM) == before


def test_stopped_says_what_is_saved(capsys):
  with pytest.raises(SystemExit) as e, preemption.handled() as stop:
    stop.requested = True
    stop.check('FILE holds it')
  assert e.value.code == 143
  error = capsys.readouterr().err
  assert error.startswith('Stopped by SIGTERM: FILE holds it.')
  assert error.count('\n') == 1


def test_train_state_comes_back(tmp_path):
  # A NamedTuple that comes back as a dict, or a count as a float, would change
  # or break the next step of the optimizer.
  params = {'w': jax.device_put(np.arange(4, dtype='f4'))}
  tx = optax.scale_by_adam()
  state = params, tx.update(params, tx.init(params))[1]
  stop = preemption.Stop()
  saved = unfinished.Saved(tmp_path / 'x', stop, minutes=0)
  assert saved.restore(state) == (0, state)
  saved.after(9, state)
  saved.after(10, state)
  saved.wait()
  assert os.listdir(tmp_path / 'x') == ['10']
  (tmp_path / 'x' / '11.orbax-checkpoint-tmp').mkdir()
  saved = unfinished.Saved(tmp_path / 'x', stop)
  num_done, restored = saved.restore(jax.tree.map(jnp.zeros_like, state))
  assert num_done == 10
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert [x.dtype for x in jax.tree.leaves(restored)] == [
      x.dtype for x in jax.tree.leaves(state)
  ]
  assert_equal(restored, state)
  # Not due, and not asked for: nothing is written.
  saved.after(11, state)
  assert os.listdir(tmp_path / 'x') == ['10']
  stop.requested = True
  with pytest.raises(preemption.Preempted, match='x/12 holds the training'):
    saved.after(12, state)
  assert os.listdir(tmp_path / 'x') == ['12']
  os.truncate(tmp_path / 'x' / '12' / 'default' / '_METADATA', 20)
  with pytest.raises(ValueError, match='x/12, .*restart that training'):
    saved.restore(state)


@pytest.mark.parametrize('is_asked', [True, False])
def test_no_room_for_a_train_state(tmp_path, is_asked):
  # It is written in the background: the error must not be lost there.
  stop = preemption.Stop()
  stop.requested = is_asked
  folder = tmp_path / 'x'
  saved = unfinished.Saved(folder, stop, minutes=0)
  rng = np.random.default_rng(0)
  state = {'w': jax.device_put(rng.normal(size=(600, 600)).astype('f4'))}
  error = pytest.raises(_files.FullDiskError, match='disk is full')
  with room_for(200), error, _files.room_for(folder):
    saved.after(1, state)
    saved.delete()
  stop.requested = False
  saved = unfinished.Saved(folder, stop, minutes=0)
  assert saved.restore(state)[0] == 0
  saved.after(2, state)
  saved.wait()
  assert saved.restore(state)[0] == 2 and os.listdir(folder) == ['2']


@pytest.mark.slow
def test_stopped_at_any_point_is_the_same(tmp_path):
  # SIGTERM in the middle of either training, SIGKILL twice further on, and on
  # to the end: an optimizer that starts anew, or an epoch that is done twice,
  # gives other bits.
  workdir, uninterrupted = tmp_path / 'w', tmp_path / 'uninterrupted'
  experiment_test.finish(uninterrupted, *LONG)
  args = experiment_test.command(workdir, *LONG)
  for name, before in (('theta_0', '.lock'), ('runs_00', 'theta_0')):
    with started(args) as process:
      wait_for((workdir / before).exists, process)
      process.send_signal(signal.SIGTERM)
      _, error = process.communicate()
    assert process.returncode == 143, error
    (state,) = (workdir / 'unfinished' / name).iterdir()
    assert f'Stopped by SIGTERM: {state} holds the training' in error
    assert 0 < int(state.name) < 30
    # As a kill in the middle of the next save would have left it.
    shutil.copytree(state, state.with_name('31.orbax-checkpoint-tmp'))
  for reached in (
      (workdir / 'runs/00').exists,
      lambda: experiment_test.num_lines(workdir / 'scores.jsonl') > 3,
  ):
    with started(args) as process:
      wait_for(reached, process)
  experiment_test.finish(workdir, *LONG)
  experiment_test.assert_same(workdir, uninterrupted, num_runs=2)


EVAL = """
import os, pathlib, time
def score(params):
  with open('calls', 'a') as file:
    file.write('.')
  while pathlib.Path('wait').exists():
    time.sleep(0.005)
  return -abs(float(params['bias'][0]) - 0.3)
"""


def test_soup_stopped_and_started_twice(tmp_path, runs, monkeypatch):
  # The trial that runs is finished and stored; nobody else may write OUT
  # meanwhile; the next start scores only what is missing.
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'mine.py').write_text(EVAL)
  (tmp_path / 'wait').touch()
  args = ['soup', 'greedy', *runs, '--eval', 'mine:score']
  args += ['--out', 'out', '--scores', 'log']
  command = [sys.executable, '-c', 'from jaxsoup import cli; cli.main()']
  with started([*command, *map(str, args)]) as process:
    wait_for((tmp_path / 'calls').exists, process)
    second = invoke(*args)
    assert second.exit_code == 1
    assert f'out is in use by process {process.pid} on' in second.output
    process.send_signal(signal.SIGTERM)
    (tmp_path / 'wait').unlink()
    _, error = process.communicate()
  assert process.returncode == 143, error
  assert error.startswith('Stopped by SIGTERM: log holds the scores so far')
  assert not (tmp_path / 'out').exists()
  num_known = len(checkpoints.ScoreLog('log'))
  assert num_known == (tmp_path / 'calls').stat().st_size > 0
  done = invoke(*args)
  assert done.exit_code == 0, done.output
  soup = checkpoints.load('out')
  expected = jaxsoup.greedy(checkpoints.Ingredients(runs), score)
  assert soup.info == expected.info
  assert_equal(soup.params, expected.params)
  num_calls = (tmp_path / 'calls').stat().st_size
  assert num_calls == len(expected.info.scores) > num_known
  assert not list(tmp_path.glob('.*'))  # No lock is left.


KILLED_SAVE = """
import sys, numpy as np
from jaxsoup import checkpoints
params = {f'w{i}': np.full((500, 500), i, 'f4') for i in range(50)}
print('ready', flush=True)
checkpoints.save(sys.argv[1], params)
"""


def test_half_written_soups_never_look_finished(tmp_path):
  # A save that wrote in place would leave some of the leaves.
  path = tmp_path / 'soup'
  with started([sys.executable, '-c', KILLED_SAVE, path]) as process:
    wait_for(lambda: list(tmp_path.iterdir()), process)
    process.kill()
  (left,) = tmp_path.iterdir()
  assert left.name != 'soup'
  for wrong in (path, left):
    for read in (checkpoints.load, lambda p: checkpoints.Ingredients([p])):
      with pytest.raises(FileNotFoundError, match=str(wrong)):
        read(wrong)
    result = invoke('inspect', wrong)
    assert result.exit_code == 1 and str(wrong) in result.output
  checkpoints.save(path, params_of(0))
  assert_equal(checkpoints.Ingredients([path])[0], params_of(0))
  assert invoke('inspect', '--deep', path).exit_code == 0


@pytest.mark.parametrize('content', ('', '{"seed"', '3'))
def test_config_of_a_workdir_is_unreadable(tmp_path, content, capsys):
  (tmp_path / 'config.json').write_text(content)
  assert main.main(experiment_test.command(tmp_path)[3:]) == 1
  error = capsys.readouterr().err.splitlines()[-1]
  assert f'{tmp_path}/config.json is unreadable' in error
  assert 'Delete that file' in error
  assert (tmp_path / 'config.json').read_text() == content


# --- Locks --------------------------------------------------------------------


def test_lock_names_its_holder(tmp_path):
  lock = tmp_path / 'new' / '.lock'
  with locking.locked(lock, 'DIR'):
    with pytest.raises(locking.InUseError) as e, locking.locked(lock, 'DIR'):
      raise AssertionError('Two hold it.')
    text = str(e.value)
    assert text.startswith(f'DIR is in use by process {os.getpid()} on ')
    assert text.endswith('or use another path.')
  assert not lock.exists()


def test_no_locks_on_this_file_system(tmp_path, monkeypatch):
  # Some network file systems: better a word than no experiment.
  def flock(*_):
    raise OSError(locking.errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(locking.fcntl, 'flock', flock)
  with (
      pytest.warns(UserWarning, match='does not support locks'),
      locking.locked(tmp_path / '.lock', 'DIR'),
  ):
    pass


def test_second_experiment_on_a_workdir(tmp_path, capsys):
  argv = experiment_test.command(tmp_path)[3:]
  with locking.locked(tmp_path / '.lock', tmp_path):
    assert main.main(argv) == 1
  error = capsys.readouterr().err.splitlines()[-1]
  assert error.startswith(f'Error: {tmp_path} is in use by process')
  assert not list(tmp_path.iterdir())


def test_two_writers_of_one_score_log(tmp_path):
  # No lock: lines are whole, so the worst is a score that is computed twice.
  path = tmp_path / 'log'
  first, second = checkpoints.ScoreLog(path), checkpoints.ScoreLog(path)
  first[(0,)], second[(1,)], first[(2,)] = 0.5, 0.25, 0.75
  assert dict(checkpoints.ScoreLog(path)) == {(0,): 0.5, (1,): 0.25, (2,): 0.75}


# --- A full disk --------------------------------------------------------------


@contextlib.contextmanager
def room_for(num_bytes):
  """No file of this process may grow beyond that; writing more fails."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  # What Python and jax keep is not to be cut off for the tests that come later.
  was_off, sys.dont_write_bytecode = sys.dont_write_bytecode, True
  was_on = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    jax.config.update('jax_enable_compilation_cache', was_on)
    sys.dont_write_bytecode = was_off


@pytest.mark.parametrize('num_bytes', (0, 200, 500))
def test_no_room_for_a_soup(tmp_path, num_bytes):
  # Orbax writes in threads of its own: its error must not be lost there.
  path = tmp_path / 'soup'
  with room_for(num_bytes), pytest.raises(OSError) as e:
    checkpoints.save(path, params_of(0))
  assert str(path) in str(e.value) and 'free some space' in str(e.value)
  assert not list(tmp_path.iterdir())
  checkpoints.save(path, params_of(0))
  assert_equal(checkpoints.Ingredients([path])[0], params_of(0))


@pytest.mark.parametrize('more', (0, 1, 20, 45))
def test_no_room_for_a_score(tmp_path, more):
  # Half a line, and the next one behind it, would be one unreadable line.
  path = tmp_path / 'log'
  log = checkpoints.ScoreLog(path)
  log[(0,)] = 0.5
  before = path.read_bytes()
  words = 'could not be stored.*free some space'
  with room_for(len(before) + more), pytest.raises(OSError, match=words):
    log[tuple(range(9))] = 0.1 + 0.2
  assert path.read_bytes() == before
  log[(1,)] = 0.25
  assert dict(checkpoints.ScoreLog(path)) == {(0,): 0.5, (1,): 0.25}


@pytest.mark.slow
def test_no_room_for_an_experiment(tmp_path, uninterrupted):
  # At its last file, so that everything before it is there to be kept.
  workdir = tmp_path / 'w'
  shutil.copytree(uninterrupted, workdir)
  (workdir / 'results.json').unlink()
  done = subprocess.run(
      ['bash', '-c', 'ulimit -f 1; "$@"', 'bash']
      + experiment_test.command(workdir),
      env=experiment_test.environment(),
      capture_output=True,
      text=True,
  )
  assert done.returncode == 1
  error = done.stderr.splitlines()[-1]
  assert error.startswith(f'Error: {workdir} could not be written because')
  assert 'Finished work is kept: free some space' in error
  assert not (workdir / 'results.json').exists()
  experiment_test.finish(workdir)
  experiment_test.assert_same(workdir, uninterrupted)


# --- Ingredients that change --------------------------------------------------


def test_an_ingredient_vanishes_during_a_search(tmp_path, runs):
  # The scores before it are kept, and used when it is back.
  calls = []

  def vanishing(params):
    calls.append(1)
    if len(calls) == 2:
      runs[2].rename(tmp_path / 'elsewhere')
    return score(params)

  expected = jaxsoup.greedy(checkpoints.Ingredients(runs), score)
  for eval_fn in (vanishing, score):
    ingredients = checkpoints.Ingredients(runs)
    log = checkpoints.ScoreLog(tmp_path / 'log', ingredients)
    if eval_fn is vanishing:
      with pytest.raises((OSError, ValueError), match=str(runs[2])) as e:
        jaxsoup.greedy(ingredients, eval_fn, scores=log)
      assert 'estore' in str(e.value) or 'does not exist' in str(e.value)
      assert len(checkpoints.ScoreLog(tmp_path / 'log', ingredients)) >= 2
      (tmp_path / 'elsewhere').rename(runs[2])
  soup = jaxsoup.greedy(ingredients, score, scores=log)
  assert soup.info == expected.info
  assert_equal(soup.params, expected.params)


def test_an_ingredient_is_rewritten_during_a_search(tmp_path, runs):
  # Scores of the old values would decide about the new ones.
  ingredients = checkpoints.Ingredients(runs)
  log = checkpoints.ScoreLog(tmp_path / 'log', ingredients)
  calls = []

  def rewriting(params):
    calls.append(1)
    if len(calls) == 3:
      shutil.rmtree(runs[0])
      checkpoints.save(runs[0], params_of(7))
    return score(params)

  with pytest.raises(ValueError, match=f'(?s){runs[0]}.*estore'):
    jaxsoup.greedy(ingredients, rewriting, scores=log)
    ingredients[0]
  with pytest.raises(
      ValueError, match='log holds scores of other .* Delete it'
  ):
    checkpoints.ScoreLog(tmp_path / 'log', checkpoints.Ingredients(runs))


# --- Damaged files ------------------------------------------------------------


def test_unfinished_step_is_skipped_with_a_word(tmp_path, runs):
  folder = tmp_path / 'run'
  shutil.copytree(runs[0], folder / '10')
  shutil.copytree(runs[1], folder / '20.orbax-checkpoint-tmp')
  word = '20.orbax-checkpoint-tmp is unfinished'
  with pytest.warns(UserWarning, match=word):
    ingredients = checkpoints.Ingredients([folder])
  assert_equal(ingredients[0], params_of(0))
  with warnings.catch_warnings():
    warnings.simplefilter('default')
    result = invoke('inspect', folder)
  assert result.exit_code == 0
  assert result.stderr.startswith(f'Warning: {folder}: {word}')


def files_of(path):
  return sorted(p for p in path.rglob('*') if p.is_file())


def damages(content, rng):
  """Cut short at several lengths, and single bytes flipped."""
  for length in {0, 1, len(content) // 2, max(len(content) - 1, 0)}:
    yield content[:length]
  for position in rng.integers(len(content), size=4 if content else 0):
    damaged = bytearray(content)
    damaged[position] ^= 1 << int(rng.integers(8))
    yield bytes(damaged)


def test_damage_is_an_error_or_harmless(tmp_path):
  # Any file of a soup: never other values, never another kind of exception.
  models = [params_of(k) for k in range(2)]
  soup = jaxsoup.uniform(models)
  path = pathlib.Path(checkpoints.save(tmp_path / 'soup', soup))
  rng = np.random.default_rng(0)
  num_errors = 0
  for file in files_of(path):
    content = file.read_bytes()
    for damaged in damages(content, rng):
      if damaged == content:
        continue
      file.write_bytes(damaged)
      try:
        assert_equal(checkpoints.Ingredients([path])[0], soup.params)
      except (OSError, ValueError) as e:
        assert str(path) in str(e), (file, e)
        num_errors += 1
    file.write_bytes(content)
  assert num_errors > 20
  assert_equal(checkpoints.load(path).params, soup.params)


def test_inspect_deep_names_damage(tmp_path, runs):
  # Not every byte is used; of those that are, none may be missed.
  num_found = 0
  for file in files_of(runs[1]):
    content = file.read_bytes()
    for position in range(0, len(content), 97):
      damaged = bytearray(content)
      damaged[position] ^= 4
      file.write_bytes(damaged)
      try:
        assert_equal(checkpoints.Ingredients(runs[1:2])[0], params_of(1))
      except ValueError:
        result = invoke('inspect', '--deep', *runs)
        assert result.exit_code == 1 and str(runs[1]) in result.output
        num_found += 'damaged' in result.output
    file.write_bytes(content)
  assert num_found > 3
  assert invoke('inspect', '--deep', *runs).exit_code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_score_log_without_permission(tmp_path):
  path = tmp_path / 'log'
  checkpoints.ScoreLog(path)[(0,)] = 0.5
  path.chmod(0)
  with pytest.raises(PermissionError, match=str(path)):
    checkpoints.ScoreLog(path)
