"""Models of the Hugging Face hub, from a server that speaks its protocol."""

import hashlib
from http import server
import json
import os
import pathlib
import sys
import threading

import _forked
import numpy as np
import pytest
import safetensors.numpy

from jaxsoup import checkpoints

pytest.importorskip('huggingface_hub')

MAIN = [sys.executable, '-c', 'from jaxsoup import cli; cli.main()']
SHA = {'main': '1' * 40, 'v2': '2' * 40}


def weights(*values):
  return safetensors.numpy.save({'head.weight': np.float32(values)})


CONFIG = {'config.json': b'{"hidden": 1}', 'tokenizer.json': b'{}'}
INDEX = json.dumps({'weight_map': {'head.weight': 'model-1-of-1.safetensors'}})
# By model and revision, the files.
MODELS = {
    'org/a': {
        'main': {
            **CONFIG,
            'model.safetensors': weights(1, 2),
            'pytorch_model.bin': b'the same once more',
            'model.fp16.safetensors': b'and again',
            'training_args.bin': b'private',
        },
        'v2': {**CONFIG, 'model.safetensors': weights(9, 9)},
    },
    'org/b': {
        'main': {
            **CONFIG,
            'model.safetensors.index.json': INDEX.encode(),
            'model-1-of-1.safetensors': weights(3, 4),
        }
    },
    'org/gated': {'main': {**CONFIG, 'model.safetensors': weights(1, 2)}},
    'org/gguf': {'main': {'model.gguf': b'GGUF'}},
}


class Hub(server.BaseHTTPRequestHandler):
  """What `snapshot_download` asks for, of the models above."""

  def do_GET(self):
    self.server.asked.append((self.command, self.path))
    path = self.path.partition('?')[0].removeprefix('/api/models')
    parts = path.strip('/').split('/')
    name = '/'.join(parts[:2])
    kind, revision, *file = parts[2:] or ['revision', 'main']
    if name not in MODELS:
      return self.answer(401, error='RepoNotFound')
    by_sha = {SHA[r]: files for r, files in MODELS[name].items()}
    sha = SHA.get(revision, revision)
    if sha not in by_sha:
      return self.answer(404, error='RevisionNotFound')
    files = by_sha[sha]
    if kind == 'revision':
      siblings = [{'rfilename': file} for file in files]
      content = {'id': name, 'sha': sha, 'siblings': siblings}
    elif kind == 'tree':
      content = [
          {'type': 'file', 'path': f, 'size': len(x), 'oid': digest(x)}
          for f, x in files.items()
      ]
    elif name == 'org/gated':
      return self.answer(403, error='GatedRepo')
    else:
      data = files['/'.join(file)]
      return self.answer(200, data, etag=f'"{digest(data)}"', sha=sha)
    return self.answer(200, json.dumps(content).encode())

  do_HEAD = do_GET

  def answer(self, status, data=b'', error=None, etag=None, sha=None):
    self.send_response(status)
    headers = {
        'Content-Length': str(len(data)), 'X-Error-Code': error,
        'X-Error-Message': error, 'ETag': etag, 'X-Repo-Commit': sha,
        'Content-Type': 'application/json',
    }  # fmt: skip
    for key, value in headers.items():
      if value is not None:
        self.send_header(key, value)
    self.end_headers()
    if self.command == 'GET':
      self.wfile.write(data)

  def log_message(self, *_):
    pass


def digest(data):
  return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(tmp_path):
  """A server, and a function that runs Python where it is the hub."""
  with server.ThreadingHTTPServer(('localhost', 0), Hub) as made:
    made.asked = []
    threading.Thread(target=made.serve_forever, daemon=True).start()
    (tmp_path / 'here').mkdir()

    def run(*command, **environment):
      env = {
          **os.environ,
          'HF_ENDPOINT': f'http://localhost:{made.server_port}',
          'HF_HOME': str(tmp_path / 'home'),
          **environment,
      }
      return _forked.run(command, env=env, cwd=tmp_path / 'here')

    made.run = run
    yield made
    made.shutdown()


def test_soups_of_models_on_the_hub(hub, tmp_path):
  soup = [*MAIN, 'soup', 'uniform', 'org/a', 'org/b', '--out', 'soup']
  done = hub.run(*soup)
  assert done.returncode == 0, done.stderr
  out = tmp_path / 'here' / 'soup'
  params = checkpoints.load(out).params
  np.testing.assert_array_equal(params['head']['weight'], [2, 3])
  # In the form in which models are on the hub, and named as there.
  assert (out / 'tokenizer.json').read_bytes() == b'{}'
  assert 'org/a' in (out / 'README.md').read_text()
  # Neither the same weights twice, nor what may be private.
  names = {path.rpartition('/')[2] for method, path in hub.asked if
           method == 'GET' and '/resolve/' in path}  # fmt: skip
  assert names == {'config.json', 'tokenizer.json', 'model.safetensors',
                   'model.safetensors.index.json',
                   'model-1-of-1.safetensors'}  # fmt: skip
  # What is in the cache needs no connection.
  asked = len(hub.asked)
  done = hub.run(*MAIN, 'inspect', 'org/a', 'org/b', HF_HUB_OFFLINE='1')
  assert 'The checkpoints match.' in done.stdout, done.stderr
  assert len(hub.asked) == asked


def test_revisions_and_paths(hub, tmp_path):
  script = (
      'import pathlib, sys; from jaxsoup import checkpoints\n'
      'for path in sys.argv[1:]:\n'
      '  print(checkpoints.Ingredients([path])[0]["head"]["weight"].tolist())\n'
      'print(checkpoints.Arrays(pathlib.Path("org", "a"))["head.weight"])'
  )
  commit = f'org/a@{SHA["v2"]}'
  done = hub.run(
      sys.executable, '-c', script, 'org/a', 'org/a@main', 'org/a@v2', commit
  )
  assert done.stdout.splitlines() == [
      '[1.0, 2.0]', '[1.0, 2.0]', '[9.0, 9.0]', '[9.0, 9.0]', '[1. 2.]'
  ], done.stderr  # fmt: skip
  # A path that is here wins, and where the folder is here so does a typo.
  folder = tmp_path / 'here' / 'org' / 'a'
  folder.mkdir(parents=True)
  (folder / 'model.safetensors').write_bytes(weights(5, 5))
  hub.asked.clear()
  done = hub.run(sys.executable, '-c', script, 'org/a')
  assert done.stdout.splitlines() == ['[5.0, 5.0]', '[5. 5.]'], done.stderr
  done = hub.run(*MAIN, 'inspect', 'org/b')
  assert 'org/b does not exist' in done.stderr
  assert not hub.asked


@pytest.mark.parametrize(
    'name, environment, said',
    [
        ('org/none', {}, 'org/none is neither a path here nor a model on'),
        ('org/a@v3', {}, 'org/a@v3 has no such revision. Give a branch'),
        ('org/gated', {}, 'org/gated is gated: ask for access on http'),
        ('org/gguf', {}, 'org/gguf on the Hugging Face hub holds no weights'),
        (
            'org/a',
            {'HF_ENDPOINT': 'http://localhost:9'},
            'org/a is not a path here, and was not downloaded from http',
        ),
        ('org/a', {'HF_HUB_OFFLINE': '1'}, '(Cannot reach http'),
    ],
)
def test_errors_are_one_line(hub, name, environment, said):
  done = hub.run(*MAIN, 'inspect', name, **environment)
  assert done.returncode == 1
  lines = [x for x in done.stderr.splitlines() if x.startswith('Error: ')]
  assert len(lines) == 1 and said in lines[0], done.stderr
  assert 'Traceback' not in done.stderr


def test_without_the_package(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(ImportError, match=r"install 'jaxsoup\[hub\]'"):
    checkpoints.Ingredients(['org/a'])
  with pytest.raises(FileNotFoundError, match='does not exist'):
    checkpoints.Ingredients([pathlib.Path('org/a/b')])
