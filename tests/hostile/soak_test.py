"""Killed at random moments, and with bytes flipped at random: nothing is lost.

`pytest -m slow tests/hostile/soak_test.py --soak 200` kills 200 processes and
flips 20,000 bytes; by default a tenth of that.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time

import _forked
import experiment_test
import numpy as np
import pretrained_test
import pytest
from safetensors import numpy as safetensors

import jaxsoup
from jaxsoup import _json
from jaxsoup import checkpoints
from jaxsoup.models import _pretrained

pytestmark = pytest.mark.slow

SCORE = """
def score(params):
  return -abs(float(params['a'].sum()) - 3)
"""
RUNS = ['m0', 'm1', 'm2']
# Commands that write `out`; what they write beside it is removed before they
# start from scratch.
COMMANDS = {
    'average to Orbax': ['soup', 'uniform', *RUNS, '--out', 'out'],
    'average to a file': ['soup', 'uniform', *RUNS, '--out', 'out.safetensors'],
    'average of directories': ['soup', 'uniform', 'd0', 'd1', '--out', 'out'],
    'greedy': [
        *('soup', 'greedy', *RUNS, '--out', 'out', '--scores', 'log'),
        *('--eval', 'soak_task:score'),
    ],
    'convert': ['convert', 'vit.safetensors', 'out'],
    'experiment': ['experiment', *experiment_test.command('out')[3:]],
}


def params_of(k):
  rng = np.random.default_rng(k)
  return {
      'a': rng.normal(size=(4, 3)).astype('f4'),
      'b': {'c': rng.normal(size=(300, 500)).astype('f4')},
  }


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Models, and directories of Hugging Face."""
  folder = tmp_path_factory.mktemp('soak')
  for k in range(3):
    checkpoints.save(folder / RUNS[k], params_of(k))
  for name in ('d0', 'd1'):
    (folder / name).mkdir()
    arrays = {'a': params_of(int(name[1]))['a'], 'b.c': np.ones(9, 'f4')}
    safetensors.save_file(arrays, folder / name / 'model.safetensors')
    (folder / name / 'config.json').write_text('{"model_type": "mine"}')
    (folder / name / 'tokenizer.json').write_text('{}')
  kind = _pretrained.Kind('vit', 'timm', pretrained_test.TINY['vit'])
  params = pretrained_test.random_params(kind)
  pretrained_test.write(folder / 'vit.safetensors', kind, params)
  (folder / 'soak_task.py').write_text(SCORE)
  return folder


def files_of(path):
  return sorted(p for p in path.rglob('*') if p.is_file())


def arrays_of(path):
  """Names and values of a checkpoint, as one text of bytes."""
  arrays = checkpoints.Arrays(path)
  return [(name, str(x.dtype), x.tobytes()) for name, x in arrays.items()]


# --- Killed -------------------------------------------------------------------


def started(folder, name):
  first, *others = COMMANDS[name]
  if first == 'experiment':
    command = ['-m', 'jaxsoup.experiments.main', *others]
  else:
    command = ['-c', 'from jaxsoup import cli; cli.main()', first, *others]
  return _forked.Process(
      [sys.executable, *command],
      cwd=folder,
      env=experiment_test.environment(),
  )


def finished(folder, name):
  process = started(folder, name)
  assert process.wait() == 0, process.stderr


def made(folder, name):
  """Names and values that a command has made; None where there is nothing."""
  names = 'out.safetensors', 'out/soups/greedy', 'out'
  paths = [folder / name for name in names if (folder / name).exists()]
  if not paths or name == 'experiment' and paths == [folder / 'out']:
    return None
  return arrays_of(paths[0])


def clear(folder):
  """Removes what commands have written."""
  for path in [*folder.glob('out*'), folder / 'log']:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def inputs(folder):
  return {
      str(p): p.read_bytes()
      for p in files_of(folder)
      if p.relative_to(folder).parts[0]
      in {*RUNS, 'd0', 'd1', 'vit.safetensors'}
  }


@pytest.mark.parametrize('name', COMMANDS)
def test_killed(folder, name, request):
  """After each kill: inputs as they were, and nothing or all of the output."""
  rng = random.Random(name)
  before = inputs(folder)
  # The first one imports and compiles: it takes several times as long.
  for _ in range(2):
    clear(folder)
    begin = time.monotonic()
    finished(folder, name)
    seconds = time.monotonic() - begin
  expected, names = made(folder, name), sorted(os.listdir(folder))
  num_kills = request.config.getoption('--soak') // len(COMMANDS) + 1
  num_killed = 0
  # An experiment goes on where it was; other commands have no more to do.
  is_done = lambda: name != 'experiment' and made(folder, name) is not None
  for attempt in range(20 * num_kills):
    # Ten in a row on what the others left, then to the end.
    if attempt % 10 == 0 or is_done():
      clear(folder)
    process = started(folder, name)
    time.sleep(rng.uniform(0, seconds))
    process.kill()
    num_killed += process.wait() == -signal.SIGKILL
    assert made(folder, name) in (None, expected)
    assert inputs(folder) == before
    if attempt % 10 == 9 or num_killed == num_kills:
      if is_done():
        clear(folder)
      finished(folder, name)
      assert made(folder, name) == expected
      assert sorted(os.listdir(folder)) == names
      assert not [
          path
          for path in folder.rglob('*')
          if '.unfinished-' in path.name or 'checkpoint-tmp' in path.name
      ]
    if num_killed == num_kills:
      return
  raise AssertionError(f'It was killed only {num_killed} times.')


# --- Flipped ------------------------------------------------------------------


def soup_of(path):
  soup = checkpoints.load(path)
  return arrays_of(path), repr((soup.alpha, soup.info))


class Scores(frozenset):
  """The last one may be lost: it is computed again."""

  def __eq__(self, other):
    return self <= other and len(self) >= len(other) - 1

  __hash__ = frozenset.__hash__


def scores_of(path):
  return Scores(checkpoints.ScoreLog(path).items())


def write_all(folder):
  """All that holds parameters, alpha or scores: its path, and a reader."""
  soup = jaxsoup.greedy([params_of(0), params_of(1)], lambda p: p['a'].sum())
  adapter = {'q': {'lora_a': np.ones((3, 2), 'f4'), 'lora_b': np.eye(2, 4)}}
  runs = checkpoints.Ingredients([folder / 'd0', folder / 'd1'])
  log = checkpoints.ScoreLog(folder / 'scores.jsonl', runs, 'accuracy')
  for k in range(9):
    log[(0, k)] = 0.1 * k
  content = {'rows': [], 'alpha': {'greedy': [0.25, 0.75]}}
  results = folder / 'results.json'
  results.write_text(json.dumps(_json.sealed(content), indent=1))
  return {
      checkpoints.save(folder / 'orbax', soup): soup_of,
      checkpoints.save(folder / 'soup.safetensors', soup): soup_of,
      checkpoints.save_directory(folder / 'one', runs): soup_of,
      checkpoints.save_directory(
          folder / 'several', runs, max_shard_bytes=40
      ): soup_of,
      checkpoints.save_adapter(folder / 'adapter', adapter): lambda path: repr(
          checkpoints.load_adapters([path]).params
      ),
      str(folder / 'scores.jsonl'): scores_of,
      str(results): lambda path: {
          key: _json.read(pathlib.Path(path))[key] for key in content
      },
  }


def test_flipped(tmp_path, folder, request):
  """Reading what was changed fails, with its path, or finds what was there."""
  shutil.copytree(folder / 'd0', tmp_path / 'd0')
  shutil.copytree(folder / 'd1', tmp_path / 'd1')
  written = write_all(tmp_path)
  expected = {path: read(path) for path, read in written.items()}
  rng = random.Random(0)
  num_refused = 0
  for _ in range(100 * request.config.getoption('--soak')):
    path = rng.choice(sorted(written))
    place = pathlib.Path(path)
    file = rng.choice(files_of(place) if place.is_dir() else [place])
    content = file.read_bytes()
    position, bit = rng.randrange(len(content)), rng.randrange(8)
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    file.write_bytes(changed)
    where = f'{file}, byte {position}, bit {bit}'
    try:
      assert written[path](path) == expected[path], where
    except (OSError, ValueError) as e:
      assert str(place) in str(e), where
      num_refused += 1
    file.write_bytes(content)
  assert num_refused > 0
  print(f'{num_refused} refused')
