"""Two processes on one machine do what one does."""

import json
import os
import pathlib
import random
import re
import signal
import socket
import sys
import time

import _forked
import _xla
import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors
from safetensors import safe_open

from jaxsoup import checkpoints

WORKER = pathlib.Path(__file__).parent / '_distributed_worker.py'
DIGITS = pathlib.Path(__file__).parent.parent / 'configs' / 'digits.py'
NUM = 4
NAMES = (
    'uniform',
    'greedy',
    'learned',
    'streamed',
    'cached',
    'searched',
    'undecided',
)


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def _start(command, **options) -> _forked.Process:
  return _forked.Process([sys.executable, *command], **options)


def _finish(processes):
  results = []
  for process in processes:
    out, err = process.communicate(timeout=240)
    results.append((process.returncode, out, err))
  return results


def _save_runs(folder):
  for k in range(NUM):
    rng = np.random.default_rng(k)
    shapes = {'w': (16, 8), 'columns': (3, 8), 'b': (3,), 'bias': (8,)}
    params = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    checkpoints.save(folder / 'runs' / str(k), params)


def _run(folder, num_processes):
  """What each of the processes printed."""
  _save_runs(folder)
  port = _free_port()
  results = _finish(
      [
          _start([WORKER, folder, port, num_processes, process])
          for process in range(num_processes)
      ]
  )
  for code, _, err in results:
    assert code == 0, err
  return [json.loads(out.splitlines()[-1]) for _, out, _ in results]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
  (one,) = _run(tmp_path / 'one', 1)
  first, second = _run(tmp_path / 'two', 2)
  assert first == second
  assert first['scores'] == one['scores'] and len(one['scores']) > NUM
  assert first['weighted'] == pytest.approx(one['weighted'], rel=1e-5)
  np.testing.assert_allclose(first['ensemble'], one['ensemble'], rtol=1e-5)
  assert first['duplicates'] == one['duplicates'] == [[0, 2]]
  assert first['command'] == one['command'] == [1.0, 2.0]
  for name in NAMES:
    assert first[name]['is_restored'] and one[name]['is_restored']
    np.testing.assert_allclose(
        first[name]['alpha'], one[name]['alpha'], atol=1e-6
    )
  # All stream where one of them has to.
  assert (first['memory'], one['memory']) == ('streamed', 'resident')
  np.testing.assert_allclose(first['distances'], one['distances'], rtol=1e-5)
  # Sums do not depend on the mesh; inner products are added in another order.
  for name in ('uniform', 'greedy'):
    assert first[name]['hash'] == one[name]['hash']
  # Written once, by the first; the same in both formats.
  lines = (tmp_path / 'two' / 'scores.jsonl').read_text().splitlines()
  assert len(lines) == 1 + len(one['scores'])
  for name in NAMES:
    orbax = checkpoints.load(tmp_path / 'two' / name).params
    file = safetensors.load_file(tmp_path / 'two' / f'{name}.safetensors')
    for key, value in orbax.items():
      np.testing.assert_array_equal(np.asarray(value), file[key])
    own = checkpoints.provenance(tmp_path / 'two' / name)
    assert own['content_hash'] == first[name]['hash']


MAIN = 'from jaxsoup import cli; cli.main()'
# The command waits longer than a test does.
IMPATIENT = f"""
import functools
from jaxsoup.runtime import distributed
distributed.start = functools.partial(distributed.start, timeout=3)
{MAIN}
"""


def _joined(port, num_processes, process):
  """What the environment says to one of the processes."""
  return {
      'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
      'JAX_NUM_PROCESSES': str(num_processes),
      'JAX_PROCESS_ID': str(process),
  }


def _start_soup(folder, port, process, code=MAIN):
  runs = sorted((folder / 'runs').iterdir())
  command = ['-c', code, 'soup', 'uniform', *runs, '--distributed']
  environ = os.environ | _joined(port, 2, process)
  return _start([*command, '--out', folder / 'soup'], env=environ)


def test_the_command_in_two_processes(tmp_path):
  _save_runs(tmp_path)
  port = _free_port()
  results = _finish([_start_soup(tmp_path, port, i) for i in range(2)])
  for i, (code, _, err) in enumerate(results):
    assert code == 0, err
    assert f'process {i} of 2' in err and str(tmp_path / 'soup') in err
  assert 'Soup: ' in results[0][1] and 'Soup: ' not in results[1][1]
  mean = np.mean(
      [np.asarray(p['w']) for p in checkpoints.Ingredients(
          sorted((tmp_path / 'runs').iterdir()))], axis=0
  )  # fmt: skip
  w = checkpoints.load(tmp_path / 'soup').params['w']
  np.testing.assert_allclose(np.asarray(w), mean, atol=1e-6)


def _save_directories(folder, num_leaves=5, size=100):
  """Models in the form of Hugging Face, of which a soup is several files."""
  runs = [folder / f'd{k}' for k in range(3)]
  for k, run in enumerate(runs):
    rng = np.random.default_rng(k)
    params = {f'w{i}': rng.random((size, 256), 'f4') for i in range(num_leaves)}
    checkpoints.save(run / 'model.safetensors', params)
    (run / 'config.json').write_text('{}')
  return runs


# How much was read, at the end of what is printed.
COUNTED = f"""
import atexit, pathlib
status = pathlib.Path('/proc/self/io')
atexit.register(lambda: print(status.read_text().split()[1]))
{MAIN}
"""


def _start_average(runs, out, num_processes=1, code=COUNTED):
  command = ['-c', code, 'soup', 'uniform', *runs, '--out', out]
  command += ['--max-shard-size', '200KB']
  if num_processes == 1:
    return [_start(command)]
  port = _free_port()
  return [
      _start(
          [*command, '--distributed'],
          env=os.environ | _joined(port, num_processes, i),
      )
      for i in range(num_processes)
  ]


def _num_read(processes):
  """Bytes that all of them have read together, when they have ended."""
  results = _finish(processes)
  for code, _, err in results:
    assert code == 0, err
  return sum(int(out.splitlines()[-1]) for _, out, _ in results)


def _weights(folder):
  """The files with weights, and their index: what does not hold the time."""
  files = [*folder.glob('*.safetensors'), *folder.glob('*.index.json')]
  return {file.name: file.read_bytes() for file in files}


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_directory_of_two_processes_is_that_of_one(tmp_path):
  transformers = pytest.importorskip('transformers')
  config = transformers.BertConfig(
      vocab_size=500,
      hidden_size=64,
      num_hidden_layers=2,
      num_attention_heads=2,
      intermediate_size=128,
  )
  runs = [tmp_path / f'd{k}' for k in range(3)]
  for k, run in enumerate(runs):
    transformers.set_seed(k)
    transformers.BertModel(config).save_pretrained(run)
  one, two = tmp_path / 'one', tmp_path / 'two'
  _num_read(_start_average(runs, one))
  _num_read(_start_average(runs, two, 2))
  assert len(_weights(two)) > 3 and _weights(two) == _weights(one)
  assert {p.name for p in tmp_path.iterdir()} == {
      'd0',
      'd1',
      'd2',
      'one',
      'two',
  }
  models = [safetensors.load_file(r / 'model.safetensors') for r in runs]
  for file in two.glob('*.safetensors'):
    with safe_open(file, 'numpy') as opened:
      for name in opened.keys():  # noqa: SIM118
        mean = np.mean([model.pop(name) for model in models], axis=0)
        np.testing.assert_allclose(opened.get_tensor(name), mean, atol=1e-6)
  assert not models[0]
  transformers.BertModel.from_pretrained(two)


# The second process is another machine, where the first one's files are not.
ELSEWHERE = f"""
import os
from jaxsoup import _processes
from_main = _processes.from_main
if os.environ['JAX_PROCESS_ID'] == '1':
  other = lambda x: from_main(x).replace(b'/soup', b'/other/soup')
  _processes.from_main = other
{COUNTED}
"""


@pytest.mark.slow_variants
@pytest.mark.parametrize('out', ['soup', 'soup.safetensors'])
def test_without_a_shared_file_system_the_first_process_writes(tmp_path, out):
  runs = _save_directories(tmp_path)
  _num_read(_start_average(runs, tmp_path / 'one', 2))
  _num_read(_start_average(runs, tmp_path / out, 2, ELSEWHERE))
  one, other = (
      {name: x.tobytes() for name, x in checkpoints.Arrays(path).items()}
      for path in (tmp_path / 'one', tmp_path / out)
  )
  assert len(one) == 5 and one == other
  assert not (tmp_path / 'other').exists()


def test_what_one_process_finds_damaged_ends_both(tmp_path):
  runs = _save_directories(tmp_path)
  file = runs[1] / 'model.safetensors'
  content = bytearray(file.read_bytes())
  content[-1] ^= 1
  file.write_bytes(content)
  results = _finish(_start_average(runs, tmp_path / 'soup', 2))
  assert [code for code, _, _ in results] == [1, 1]
  damaged, other = sorted(err.splitlines()[-1] for _, _, err in results)
  assert f"Leaf 'w4' of {file} is damaged" in damaged
  assert 'Another process failed' in other
  assert not list(tmp_path.glob('soup*'))


@pytest.mark.slow
@pytest.mark.parametrize('out', ['soup', 'soup.safetensors'])
def test_an_average_goes_on_where_its_processes_were_killed(tmp_path, out):
  runs = _save_directories(tmp_path, num_leaves=32, size=4000)
  out, whole = tmp_path / out, tmp_path / f'whole-{out}'
  all_read = _num_read(_start_average(runs, whole, 2))

  def num_written(number):
    files = tmp_path.glob(f'{out.name}.resumable-*/written-{number}.jsonl')
    return sum(len(file.read_text().splitlines()) for file in files)

  for least in sorted(random.Random(0).sample(range(1, 28), 3)):
    processes = _start_average(runs, out, 2)
    while num_written('*') < least:
      assert all(process.poll() is None for process in processes)
      time.sleep(0.001)
    for process in processes:
      process.kill()
      process.wait()
    assert not out.exists()
  assert num_written(0) and num_written(1)
  assert _num_read(_start_average(runs, out, 2)) < all_read * 0.8
  if out.is_dir():
    assert len(_weights(out)) > 3 and _weights(out) == _weights(whole)
  arrays, expected = map(checkpoints.Arrays, (out, whole))
  assert list(arrays) == list(expected)
  for name in expected:
    np.testing.assert_array_equal(arrays[name], expected[name])
  assert not list(tmp_path.glob('*.resumable-*'))


@pytest.mark.parametrize('process', [0, 1])
def test_a_peer_that_never_comes(tmp_path, process):
  _save_runs(tmp_path)
  started = _start_soup(tmp_path, _free_port(), process, IMPATIENT)
  ((code, _, err),) = _finish([started])
  assert code == 1
  assert f'Process {process} waited 3 s for the other processes' in err
  assert not (tmp_path / 'soup').exists()


def test_an_environment_that_says_too_little(tmp_path):
  _save_runs(tmp_path)
  args = ['soup', 'uniform', tmp_path / 'runs' / '0', '--distributed']
  command = ['-c', MAIN, *args, '--out', tmp_path / 'soup']
  said = 'Set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES=N and'
  wrong = "JAX_NUM_PROCESSES='two' is not a number"
  address = {'JAX_COORDINATOR_ADDRESS': '127.0.0.1:1'}
  processes = [
      _start(command, env=os.environ | address),
      _start(command, env=os.environ | {'JAX_NUM_PROCESSES': 'two'}),
  ]
  for (code, _, err), text in zip(_finish(processes), (said, wrong)):
    assert code == 1 and text in err, err


# Evaluates a set that is not in memory twice: its scores, and what was decoded.
EVALUATION = """
import collections
import json
import sys

import jax
import numpy as np

port, num, process = map(int, sys.argv[1:])
if num > 1:
  jax.distributed.initialize(f'127.0.0.1:{port}', num, process)

from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxsoup import _memory, evaluation
from jaxsoup.data import sources
from jaxsoup.experiments import cook

decoded = collections.Counter()

def example_fn(record, rng):
  decoded[int(record)] += 1
  return {'x': np.float32(record), 'label': np.int32(record % 3)}

_memory.free_bytes = lambda device: 0
# Not in the order of the processes.
mesh = Mesh(np.array(jax.devices())[::-1], 'fsdp')
batches = cook.batches_of(
    sources.Examples(np.arange(48), example_fn),
    16,
    NamedSharding(mesh, PartitionSpec('fsdp')),
)
decoded.clear()  # The first was read to know its size.
times = lambda name: lambda params, batch: params * batch[name]
values_fn = evaluation.logits_of(times('x'), batches)
eval_fn = evaluation.mean_of(times('label'), batches)
values = [values_fn(2.0).tolist(), values_fn(3.0).tolist(), eval_fn(2.0)]
print(json.dumps([values, sorted(decoded.items())]))
"""


def _evaluated(num):
  port = _free_port()
  flags = {'XLA_FLAGS': _xla.flags(4 // num), 'JAX_PLATFORMS': 'cpu'}
  results = _finish(
      [
          _start(['-c', EVALUATION, port, num, i], env=os.environ | flags)
          for i in range(num)
      ]
  )
  for code, _, err in results:
    assert code == 0, err
  return [json.loads(out.splitlines()[-1]) for _, out, _ in results]


def test_an_evaluation_decodes_each_example_once():
  ((values, decoded),) = _evaluated(1)
  assert values == [
      [2.0 * i for i in range(48)], [3.0 * i for i in range(48)], 2.0
  ]  # fmt: skip
  assert decoded == [[i, 1] for i in range(48)]
  (first, own), (second, others) = _evaluated(2)
  assert first == second == values
  is_first = lambda row: row % 16 >= 8
  assert own == [[i, 1] for i in range(48) if is_first(i)]
  assert others == [[i, 1] for i in range(48) if not is_first(i)]


# --- Experiments --------------------------------------------------------------

# The digits, read as what does not fit into memory: one run on all devices.
LAZY = f"""
import importlib.util
from jaxsoup.data import sources

spec = importlib.util.spec_from_file_location('digits', {str(DIGITS)!r})
digits = importlib.util.module_from_spec(spec)
spec.loader.exec_module(digits)
sweep = digits.sweep


def get_config(arg=None):
  config = digits.get_config('runlocal')
  config.is_sharded = True
  config.model.update(width=16, depth=1, num_heads=2, mlp_width=16)
  config.data.sizes.update(pretrain=96, train=96, held_out=120, test=100)
  config.data.other_writers = 100
  config.batch_size = 100
  config.sweep.update(num_runs=2, group_size=1)
  config.recipes = ('uniform', 'greedy', 'learned')
  config.pretrain.update(num_epochs=1, batch_size=48)
  config.finetune.update(num_epochs=3, batch_size=48, ema=(0.5,))
  config.learned.update(batch_size=48, num_epochs=1)
  return config


class Lazy:
  def __init__(self, source):
    self._source = source

  def __len__(self):
    return len(self._source)

  def __getitem__(self, rows):
    return self._source[rows]


def data(config):
  splits = digits.data(config)
  return splits._replace(
      train=Lazy(splits.train), pretrain=Lazy(splits.pretrain)
  )
"""


def _experiment(folder, workdir, num_processes, *more):
  """Starts an experiment on four devices."""
  (folder / 'lazy.py').write_text(LAZY)
  port = _free_port()
  num_local = 4 // num_processes
  flags = {'XLA_FLAGS': _xla.flags(num_local), 'JAX_PLATFORMS': 'cpu'}
  environ = os.environ | flags
  command = [
      '-m', 'jaxsoup.experiments.main', f'--config={folder}/lazy.py',
      f'--workdir={workdir}', *more,
  ]  # fmt: skip
  if num_processes == 1:
    return [_start(command, env=environ)]
  command.append('--distributed')
  return [
      _start(command, env=environ | _joined(port, num_processes, i))
      for i in range(num_processes)
  ]


def _vector(path):
  leaves = jax.tree.leaves(checkpoints.Ingredients([path])[0])
  return np.concatenate([np.ravel(leaf) for leaf in leaves])


def _results(workdir):
  return json.loads((workdir / 'results.json').read_text())


def _stop(workdir, processes):
  """SIGTERM to one of them, in the middle of the first run."""
  log = workdir / 'metrics.jsonl'
  deadline = time.monotonic() + 240
  while not (log.exists() and '"run": 0' in log.read_text()):
    if time.monotonic() > deadline or processes[0].poll() is not None:
      processes[1].kill()
      pytest.fail(f'not begun: {_finish(processes)}')
    time.sleep(0.05)
  processes[1].send_signal(signal.SIGTERM)
  for code, _, err in _finish(processes):
    assert code == 143 and re.search('holds the (training|runs)', err), err


@pytest.mark.slow
def test_an_experiment_in_two_processes(tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  _stop(two, _experiment(tmp_path, two, 2))
  for workdir, num_processes in ((one, 1), (two, 2)):
    results = _finish(_experiment(tmp_path, workdir, num_processes))
    for code, _, err in results:
      assert code == 0, err
  assert 'best single' in results[0][1]
  assert 'best single' not in results[1][1]
  actual, expected = _results(two), _results(one)
  assert actual['runs'] == expected['runs']
  assert actual['data'] == expected['data']
  # Sums over devices of two processes are added in another order.
  scores = lambda row: [row['test'], row['nll'], row['ece']]
  for x, y in zip(actual['rows'], expected['rows'], strict=True):
    assert x['name'] == y['name']
    np.testing.assert_allclose(scores(x), scores(y), atol=0.01)
  names = ['00', '00_ema_0.5', '01', '01_ema_0.5']
  assert sorted(path.name for path in (two / 'runs').iterdir()) == names
  for name in ('theta_0', *(f'runs/{name}' for name in names)):
    x, y = _vector(two / name), _vector(one / name)
    assert np.linalg.norm(x - y) < 0.01 * np.linalg.norm(y), name
  # No epoch was trained twice.
  lines = map(json.loads, (two / 'metrics.jsonl').read_text().splitlines())
  seen = [(x['run'], x['epoch']) for x in lines if 'epoch' in x]
  assert len(seen) == len(set(seen)) == 1 + 2 * 3
  assert not (two / 'unfinished').exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    'more, said',
    [
        (['--config.is_sharded=False'], 'config.is_sharded is True'),
        (['--process=0'], "Unknown command line flag 'process'"),
        (
            ['--workdir=https://bucket/x'],
            'is not the address of a bucket: expected gs://',
        ),
    ],
)
def test_what_processes_cannot_do(tmp_path, more, said):
  num_processes = 2 if 'is_sharded' in more[0] else 1
  for code, _, err in _finish(
      _experiment(tmp_path, tmp_path / 'w', num_processes, *more)
  ):
    assert code == 2 and said in err, err
