"""A workdir in a bucket, through the protocol of Google Cloud Storage."""

import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from jaxsoup.runtime import buckets
from jaxsoup.runtime import locking

HERE = pathlib.Path(__file__).parent
EXPERIMENT = [
    sys.executable, '-m', 'jaxsoup.experiments.main',
    f'--config={HERE}/_digits_mlp.py:runlocal', '--config.sweep.num_runs=3',
    '--config.sweep.group_size=1', '--config.finetune.num_epochs=2',
]  # fmt: skip
# Prints the leaves of all checkpoints below an address, and its results.
SHOW = """
import sys, jax, json
from etils import epath
from jaxsoup import checkpoints
root = epath.Path(sys.argv[1])
paths = [root / 'theta_0', *sorted((root / 'runs').iterdir())]
paths += sorted((root / 'soups').iterdir())
for path in paths:
  leaves = jax.tree.leaves(checkpoints.Ingredients([path])[0])
  print(path.name, [x.tolist() for x in leaves])
rows = json.loads((root / 'results.json').read_text())['rows']
print(json.dumps(rows))
print(sorted(path.name for path in root.iterdir()))
"""


@pytest.fixture
def bucket():
  """The environment of processes that have a bucket, gs://bucket."""
  for package in ('gcp_storage_emulator', 'gcsfs'):
    if importlib.util.find_spec(package) is None:
      pytest.skip(f'{package} is not installed: only CI installs it')
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  server = subprocess.Popen(
      [sys.executable, HERE / '_bucket.py', str(port)],
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
  )
  assert server.stdout.readline() == 'ready\n'
  address = f'http://localhost:{port}'
  yield {
      **os.environ,
      'TENSORSTORE_GCS_HTTP_URL': address,
      'STORAGE_EMULATOR_HOST': address,
      'GOOGLE_CLOUD_PROJECT': 'project',
      'EPATH_USE_TF': 'false',
  }
  server.kill()
  server.wait()
  server.stdout.close()


def run(command, **options):
  result = subprocess.run(command, capture_output=True, text=True, **options)
  assert result.returncode == 0, result.stderr[-3000:]
  return result


@pytest.mark.slow
def test_a_workdir_in_a_bucket_is_one_of_this_machine(tmp_path, bucket):
  place = 'gs://bucket/work'
  command = [*EXPERIMENT, f'--workdir={place}']
  # Killed when the first of the runs is there.
  process = subprocess.Popen(command, env=bucket, stderr=subprocess.DEVNULL)
  seen = f"import etils.epath as e; print(e.Path('{place}/runs/00').exists())"
  deadline = time.monotonic() + 200
  while 'True' not in run([sys.executable, '-c', seen], env=bucket).stdout:
    assert time.monotonic() < deadline and process.poll() is None
  process.send_signal(signal.SIGKILL)
  process.wait()
  said = run(command, env=bucket).stderr
  assert 'There are no locks in a bucket' in said
  run([*EXPERIMENT, f'--workdir={tmp_path}/work'])
  shown = [
      run([sys.executable, '-c', SHOW, root], env=bucket).stdout
      for root in (place, f'{tmp_path}/work')
  ]
  assert shown[0] == shown[1]
  assert len(shown[0].splitlines()) == 1 + 3 + 6 + 2
  # Again: nothing is left to do, and nothing was lost.
  before = run([sys.executable, '-c', SHOW, place], env=bucket).stdout
  assert 'best single' in run(command, env=bucket).stdout
  assert run([sys.executable, '-c', SHOW, place], env=bucket).stdout == before
  lines = run(
      [sys.executable, '-c', 'import sys, etils.epath as e; '
       'print(e.Path(sys.argv[1]).read_text())', f'{place}/metrics.jsonl'],
      env=bucket,
  ).stdout  # fmt: skip
  rows = [json.loads(line) for line in lines.split('\n') if line]
  assert [row['run'] for row in rows if 'held_out' in row][-2:] == [1, 2]


def test_addresses_that_are_not_of_buckets():
  with pytest.raises(ValueError, match='https://x/y is not the address of a'):
    buckets.path_of('https://x/y')
  assert buckets.path_of('runs/00') == pathlib.Path('runs/00')
  # There are none there.
  with locking.locked('gs://bucket/.lock', 'gs://bucket'):
    pass
