"""Two processes on one machine do what one does."""

import json
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from safetensors import numpy as safetensors

from jaxsoup import checkpoints

WORKER = pathlib.Path(__file__).parent / '_distributed_worker.py'
NUM = 4
NAMES = ('uniform', 'greedy', 'learned', 'streamed')


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def _start(command) -> subprocess.Popen:
  return subprocess.Popen(
      [sys.executable, *map(str, command)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
  )


def _finish(processes):
  results = []
  for process in processes:
    out, err = process.communicate(timeout=240)
    results.append((process.returncode, out, err))
  return results


def _save_runs(folder):
  for k in range(NUM):
    rng = np.random.default_rng(k)
    shapes = {'w': (16, 8), 'columns': (3, 8), 'b': (3,)}
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


def test_two_processes_find_what_one_finds(tmp_path):
  (one,) = _run(tmp_path / 'one', 1)
  first, second = _run(tmp_path / 'two', 2)
  assert first == second
  assert first['scores'] == one['scores'] and len(one['scores']) > NUM
  for name in NAMES:
    assert first[name]['is_restored'] and one[name]['is_restored']
    np.testing.assert_allclose(
        first[name]['alpha'], one[name]['alpha'], atol=1e-6
    )
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


def _soup_command(folder, out, port, process, *more):
  runs = sorted((folder / 'runs').iterdir())
  return [
      '-c', 'from jaxsoup import cli; cli.main()', 'soup', *runs,
      '--recipe', 'uniform', '--out', folder / out,
      '--coordinator', f'127.0.0.1:{port}', '--num-processes', 2,
      '--process', process, *more,
  ]  # fmt: skip


def test_the_command_in_two_processes(tmp_path):
  _save_runs(tmp_path)
  port = _free_port()
  results = _finish(
      [_start(_soup_command(tmp_path, 'soup', port, i)) for i in range(2)]
  )
  for i, (code, _, err) in enumerate(results):
    assert code == 0, err
    assert f'process {i} of 2' in err and str(tmp_path / 'soup') in err
  assert 'Soup: ' in results[0][1] and 'Soup: ' not in results[1][1]
  mean = np.mean(
      [np.asarray(p['w']) for p in checkpoints.Ingredients(
          sorted((tmp_path / 'runs').iterdir()))], axis=0
  )  # fmt: skip
  found = checkpoints.load(tmp_path / 'soup').params['w']
  np.testing.assert_allclose(np.asarray(found), mean, atol=1e-6)


@pytest.mark.parametrize('process', [0, 1])
def test_a_peer_that_never_comes(tmp_path, process):
  _save_runs(tmp_path)
  command = _soup_command(
      tmp_path, 'soup', _free_port(), process, '--timeout', 3
  )
  ((code, _, err),) = _finish([_start(command)])
  assert code == 1
  assert f'Process {process} waited 3 s for the other processes' in err
  assert not (tmp_path / 'soup').exists()
