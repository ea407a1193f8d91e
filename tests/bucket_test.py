"""A workdir in a bucket, through the protocol of Google Cloud Storage."""

import importlib.util
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

from etils.epath import backend
import fsspec
from fsspec.registry import _registry
import numpy as np
import pytest
import safetensors.numpy
from typer import testing

import jaxsoup
from jaxsoup import checkpoints
from jaxsoup import cli
from jaxsoup.checkpoints import _pieces
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
from jaxsoup.experiments import answers
root = epath.Path(sys.argv[1])
paths = [root / 'theta_0', *sorted((root / 'runs').iterdir())]
paths += sorted((root / 'soups').iterdir())
for path in paths:
  leaves = jax.tree.leaves(checkpoints.Ingredients([path])[0])
  print(path.name, [x.tolist() for x in leaves])
rows = json.loads((root / 'results.json').read_text())['rows']
print(json.dumps(rows))
print(sorted(path.name for path in root.iterdir()))
print(answers.of_workdir(root))
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
  assert len(shown[0].splitlines()) >= 1 + 3 + 6 + 2 + 1
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
  # Those of the killed process were lost with it.
  runs = [row['run'] for row in rows if 'held_out' in row]
  assert runs == [0, 1, 2][3 - len(runs) :]


def test_addresses_that_are_not_of_buckets():
  with pytest.raises(ValueError, match='https://x/y is not the address of a'):
    buckets.path_of('https://x/y')
  assert buckets.path_of('runs/00') == pathlib.Path('runs/00')
  # There are none there.
  with locking.locked('gs://bucket/.lock', 'gs://bucket'):
    pass


class Fake(fsspec.AbstractFileSystem):
  """A bucket in memory that remembers which ranges were read."""

  protocol = ('gs', 'gcs')
  files: dict[str, bytes] = {}
  ranges: list[tuple[str, int, int]] = []
  threads: set[int] = set()

  def ls(self, path, detail=True, **_):
    path = self._strip_protocol(path)
    rows = {}
    for name, data in self.files.items():
      if name == path:
        rows[name] = {'name': name, 'type': 'file', 'size': len(data),
                      'etag': str(hash(data))}  # fmt: skip
      elif name.startswith(f'{path}/'):
        child = f'{path}/{name.removeprefix(path + "/").split("/")[0]}'
        rows[child] = self.ls(child)[0] if child == name else {
            'name': child, 'type': 'directory', 'size': 0}  # fmt: skip
    if not rows:
      raise FileNotFoundError(path)
    return list(rows.values()) if detail else list(rows)

  def cat_file(self, path, start=None, end=None, **_):
    self.ranges.append((path, start, end))
    self.threads.add(threading.get_ident())
    return self.files[path][start:end]

  def _open(self, path, mode='rb', **_):
    assert mode == 'rb' and not path.endswith('.safetensors')
    return io.BytesIO(self.files[path])


@pytest.fixture
def fake(monkeypatch):
  clear = lambda: (
      Fake.files.clear(), Fake.ranges.clear(), Fake.threads.clear(),
      Fake.clear_instance_cache(),
      backend.fsspec_backend._get_filesystem.cache_clear(),
  )  # fmt: skip
  for name in Fake.protocol:
    monkeypatch.setitem(_registry, name, Fake)
  clear()
  yield Fake
  clear()


def model(k, dtype=np.float32):
  rng = np.random.default_rng(k)
  shapes = {'body.kernel': (400, 2000), 'head.bias': (3,), 'scale': ()}
  return {n: rng.normal(size=s).astype(dtype) for n, s in shapes.items()}


def mean(models):
  return {n: np.mean([m[n] for m in models], axis=0) for n in models[0]}


def test_safetensors_in_a_bucket_are_read_by_ranges(fake, tmp_path):
  models = list(map(model, range(3)))
  names = [f'b/{k}/model.safetensors' for k in range(3)]
  for name, arrays in zip(names, models):
    fake.files[name] = safetensors.numpy.save(arrays)
  # A file, and directories.
  paths = [f'gs://{names[0]}', 'gs://b/1', 'gs://b/2/']
  ingredients = checkpoints.Ingredients(paths)
  assert ingredients.paths == tuple(f'gs://{name}' for name in names)
  sizes = {n: x.shape for n, x in models[0].items()}
  stored = ingredients.stored(1)
  assert {'.'.join(p): x.shape for p, x in stored.items()} == sizes
  # So far the headers of the first and of this one.
  expected = set()
  for name in names[:2]:
    header = 8 + int.from_bytes(fake.files[name][:8], 'little')
    expected |= {(name, 0, 8), (name, 8, header)}
  assert set(fake.ranges) == expected and len(fake.ranges) == 4
  fake.ranges.clear()
  # A part of a leaf, and no more.
  path = 'body', 'kernel'
  checkpoint = ingredients._checkpoint(1)
  checkpoint.stored_reader(path)(checkpoint.plan(path)[0][0])
  ((_, start, end),) = fake.ranges
  assert end - start <= _pieces._PIECE_BYTES
  assert end - start < models[0]['body.kernel'].nbytes
  fake.ranges.clear()
  fake.threads.clear()
  out = checkpoints.save_average(tmp_path / 's.safetensors', ingredients)
  expected = mean(models)
  for name, x in safetensors.numpy.load_file(out).items():
    np.testing.assert_allclose(x, expected[name], rtol=1e-5, atol=1e-6)
  # Each byte once, and in several threads.
  of_each = {
      name: [r[1:] for r in fake.ranges if r[0] == name] for name in names
  }
  for name, read in of_each.items():
    assert sum(end - start for start, end in read) == len(fake.files[name])
    assert len(read) == len(set(read))
  assert len(fake.threads) > 1
  soup = jaxsoup.uniform(ingredients)
  np.testing.assert_allclose(
      soup.params['head']['bias'], expected['head.bias'], rtol=1e-5
  )


def test_an_index_in_a_bucket(fake):
  arrays = model(0)
  parts = {'a.safetensors': ['body.kernel'], 'b.safetensors': ['head.bias']}
  for file, names in parts.items():
    part = {n: arrays[n] for n in names}
    fake.files[f'b/m/{file}'] = safetensors.numpy.save(part)
  places = {n: file for file, names in parts.items() for n in names}
  index = json.dumps({'weight_map': places}).encode()
  fake.files['b/m/model.safetensors.index.json'] = index
  for path in ('gs://b/m', 'gs://b/m/model.safetensors.index.json'):
    stored = checkpoints.Arrays(path)
    assert list(stored) == ['body.kernel', 'head.bias']
    np.testing.assert_array_equal(stored['head.bias'], arrays['head.bias'])
  del fake.files['b/m/b.safetensors']
  with pytest.raises(ValueError, match='gs://b/m/b.safetensors is missing'):
    checkpoints.Ingredients(['gs://b/m'])[0]


def test_what_is_checked_of_files_in_a_bucket(fake, tmp_path):
  for k in range(2):
    fake.files[f'b/{k}/model.safetensors'] = safetensors.numpy.save(model(k))
  paths = ['gs://b/0', 'gs://b/1']
  # A file that is rewritten is another one.
  first = checkpoints.Ingredients(paths).identity(0)
  assert checkpoints.Ingredients(paths).identity(0) == first
  fake.files['b/0/model.safetensors'] = safetensors.numpy.save(model(7))
  assert checkpoints.Ingredients(paths).identity(0) != first
  # Tokens with other ids, and quantized weights.
  for k, vocabulary in enumerate(({'a': 0, 'b': 1}, {'a': 1, 'b': 0})):
    fake.files[f'b/{k}/vocab.json'] = json.dumps(vocabulary).encode()
  with pytest.raises(ValueError, match="'a' has id 0 in gs://b/0/vocab.json"):
    jaxsoup.uniform(checkpoints.Ingredients(paths))
  config = b'{"quantization_config": {"bits": 4}}'
  fake.files['b/0/config.json'] = config
  with pytest.raises(ValueError, match='gs://b/0/config.json has quantization'):
    jaxsoup.uniform(checkpoints.Ingredients(paths))
  # A file that ends too early, and others.
  whole = fake.files['b/1/model.safetensors']
  fake.files['b/1/model.safetensors'] = whole[:-1]
  with pytest.raises(ValueError, match='gs://b/1/model.safetensors cannot be'):
    checkpoints.Ingredients(paths)[1]
  fake.files['b/x.npz'] = b'PK'
  with pytest.raises(ValueError, match='in a bucket without the ending .safe'):
    checkpoints.Ingredients(['gs://b/x.npz'])


def test_commands_read_from_a_bucket(fake, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  models = list(map(model, range(2)))
  for k, arrays in enumerate(models):
    fake.files[f'b/{k}.safetensors'] = safetensors.numpy.save(arrays)
  paths = ['gs://b/0.safetensors', 'gs://b/1.safetensors']
  invoke = lambda *args: testing.CliRunner().invoke(cli.app, args)
  assert 'The checkpoints match.' in invoke('inspect', *paths, '--deep').output
  out = ['--out', 's.safetensors']
  done = invoke('soup', 'model-stock', *paths, '--init', paths[0], *out)
  assert done.exit_code == 0, done.output
  os.remove('s.safetensors')
  done = invoke('soup', 'average', *paths, '--alpha', '0.25,0.75', *out)
  assert done.exit_code == 0, done.output
  made = safetensors.numpy.load_file('s.safetensors')
  for name, x in made.items():
    expected = 0.25 * models[0][name] + 0.75 * models[1][name]
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)
  own = checkpoints.provenance('s.safetensors')
  assert [row['path'] for row in own['ingredients']] == paths
  assert invoke('inspect', 'gs://b/2').exit_code == 1


@pytest.mark.slow
def test_an_average_in_a_bucket_of_google(tmp_path, bucket):
  models = [{'w': np.full((1500, 1000), k, np.float32)} for k in (1, 2)]
  for k, params in enumerate(models):
    checkpoints.save(tmp_path / f'{k}', params)  # 6 MB: several pieces.
  code = (
      'import sys\n'
      'from jaxsoup import checkpoints\n'
      '*paths, out = sys.argv[1:]\n'
      'checkpoints.save_average(out, checkpoints.Ingredients(paths))\n'
      'soup = checkpoints.load(out)\n'
      "print(soup.alpha, set(soup.params['w'].ravel().tolist()))\n"
  )
  paths = [tmp_path / '0', tmp_path / '1', 'gs://bucket/soup']
  said = run([sys.executable, '-c', code, *paths], env=bucket).stdout
  assert said == '[0.5 0.5] {1.5}\n'


@pytest.mark.slow
def test_safetensors_in_a_bucket_of_google(tmp_path, bucket):
  models = list(map(model, range(2)))
  paths = [f'gs://bucket/{k}/model.safetensors' for k in range(2)]
  send = (
      'import sys, pathlib, etils.epath as e\n'
      'data = pathlib.Path(sys.argv[1]).read_bytes()\n'
      'e.Path(sys.argv[2]).write_bytes(data)'
  )
  for path, arrays in zip(paths, models):
    safetensors.numpy.save_file(arrays, tmp_path / 'model')
    run([sys.executable, '-c', send, tmp_path / 'model', path], env=bucket)
  main = [sys.executable, '-c', 'from jaxsoup import cli; cli.main()']
  out = tmp_path / 'soup.safetensors'
  run([*main, 'soup', 'uniform', *paths, '--out', out], env=bucket)
  expected = mean(models)
  for name, x in safetensors.numpy.load_file(out).items():
    np.testing.assert_allclose(x, expected[name], rtol=1e-5, atol=1e-6)
  folders = ['gs://bucket/0', 'gs://bucket/1/']
  said = run([*main, 'inspect', *folders, '--deep'], env=bucket).stdout
  assert 'The checkpoints match.' in said
