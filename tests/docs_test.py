"""The reference is complete, and the guide to errors quotes real messages."""

import ast
import collections
import json
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

import jaxsoup
from jaxsoup import checkpoints
from jaxsoup import evaluation
from jaxsoup import metrics
from jaxsoup import statistics
from jaxsoup.data import sources
from jaxsoup.experiments import configs
from jaxsoup.experiments import workdirs
from jaxsoup.runtime import user_code

ROOT = pathlib.Path(jaxsoup.__file__).parent
CONTRIBUTING = ROOT.parent / '.github' / 'CONTRIBUTING.md'
PAGE = ROOT / 'docs' / 'guides' / 'troubleshooting.md'
# Their reference is `jaxsoup --help`.
NO_REFERENCE = ('cli', 'commands', 'docs')


def _public_names(path: pathlib.Path) -> set[str]:
  """What a module defines, or re-exports under its own name."""
  names = set()
  for node in ast.parse(path.read_text()).body:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      names.add(node.name)
    elif isinstance(node, ast.ImportFrom):
      names |= {a.name for a in node.names if a.asname == a.name}
  return {name for name in names if not name.startswith('_')}


def _reference() -> list[str]:
  """Full names of all that the reference has to describe."""
  names = [f'jaxsoup.{name}' for name in jaxsoup.__all__]
  for path in ROOT.rglob('*.py'):
    parts = path.relative_to(ROOT).with_suffix('').parts
    if parts[-1] == '__init__':
      parts = parts[:-1]
    if not parts or parts[0] in NO_REFERENCE or any(
        p.startswith('_') for p in parts
    ):  # fmt: skip
      continue
    module = '.'.join(('jaxsoup', *parts))
    names += [f'{module}.{name}' for name in _public_names(path)]
  # What a package takes from its modules is described once, as its own.
  taken = lambda *outer: '.'.join((*outer[:-2], outer[-1]))
  return sorted(n for n in set(names) if taken(*n.split('.')) not in names)


@pytest.fixture(scope='module')
def pages(tmp_path_factory):
  """The pages that the command of CONTRIBUTING.md builds, elsewhere."""
  pytest.importorskip('sphinx', reason='extra `docs`')
  command = re.search(
      r'^.*(sphinx-build .*)$', CONTRIBUTING.read_text(), re.MULTILINE
  )
  *args, _ = shlex.split(command[1])[1:]
  assert '-W' in args
  out = tmp_path_factory.mktemp('docs')
  run = [sys.executable, '-m', 'sphinx', *args, str(out)]
  result = subprocess.run(run, cwd=ROOT.parent, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  return out


@pytest.mark.slow
def test_the_reference_has_every_public_name(pages):
  from sphinx.util import inventory

  with (pages / 'objects.inv').open('rb') as file:
    objects = inventory.InventoryFile.load(file, '', lambda base, uri: uri)
  described = {
      n for kind, of in objects.items() if kind[:3] == 'py:' for n in of
  }
  names = _reference()
  assert len(names) > 300
  missing = [n for n in names if n not in described]
  assert missing == [], 'They need a docstring, or their module a page.'


@pytest.mark.slow
def test_no_page_loads_anything_from_elsewhere(pages):
  for page in pages.rglob('*.html'):
    text = page.read_text()
    loaded = re.findall(r'(?:src|<link[^>]* href)="(https?:[^"]*)"', text)
    assert not loaded, page


# The guide to errors.

MESSAGES = re.findall(r'^`(.+)`\n: ', PAGE.read_text(), re.MULTILINE)


def _pattern(message: str) -> re.Pattern:
  parts = [re.escape(p.strip()) for p in message.split('…')]
  return re.compile('.*'.join(parts), re.DOTALL)


def _text(node: ast.AST) -> str:
  """What a string in the source says, with … for what is filled in."""
  if isinstance(node, ast.Constant) and isinstance(node.value, str):
    return node.value
  if isinstance(node, ast.JoinedStr):
    return ''.join(map(_text, node.values))
  if isinstance(node, ast.BinOp):
    return _text(node.left) + _text(node.right)
  return '…'


@pytest.fixture(scope='module')
def texts() -> set[str]:
  strings = set()
  for path in ROOT.rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)):
        strings.add(_text(node))
  return strings


@pytest.mark.parametrize('message', MESSAGES)
def test_messages_of_the_guide_are_in_the_source(message, texts):
  assert any(map(_pattern(message).search, texts))


def test_each_message_is_there_once():
  assert len(MESSAGES) > 50
  assert [m for m, n in collections.Counter(MESSAGES).items() if n > 1] == []


W = {'w': np.ones(2, np.float32)}
LABELS = np.zeros(3, int)


def _save(path, params=W):
  return checkpoints.save(path, params)


def _damaged(path):
  file = pathlib.Path(_save(f'{path}.safetensors'))
  content = bytearray(file.read_bytes())
  content[-1] ^= 1
  file.write_bytes(content)
  return checkpoints.Ingredients([file])[0]


def _cut(path):
  file = pathlib.Path(_save(f'{path}.safetensors'))
  file.write_bytes(file.read_bytes()[:-1])
  return checkpoints.Ingredients([file])[0]


def _other_scores(path):
  runs = [_save(path / 'a'), _save(path / 'b', {'w': np.zeros(2, 'f')})]
  for run in runs:
    log = checkpoints.ScoreLog(path / 'log', checkpoints.Ingredients([run]))
    log[(0,)] = 1.0


def _another_evaluation(path):
  for name in ('accuracy', 'f1'):
    checkpoints.ScoreLog(path / 'log', evaluation=name)[(0,)] = 1.0


def _with_shape(path, shape, name='w'):
  abstract = {name: jax.ShapeDtypeStruct(shape, 'float32')}
  return checkpoints.Ingredients([_save(path / 'a')], abstract)[0]


def _learned(loss_fn, batches):
  return jaxsoup.learned([W, W], loss_fn, batches, tx=optax.sgd(0.1))


def _begun(path):
  (path / 'config.json').write_text('{"seed": 7}')
  (path / 'runs').mkdir()
  config = configs.load(str(ROOT.parent / 'configs/digits.py')).config
  configs.check_unchanged(config, path / 'config.json')


def _shard(text):
  digits = str(ROOT.parent / 'configs/digits.py')
  override = f'--config.sweep.shard={text}'
  workdirs.shard_of(configs.load(digits, [override]).config)


def _adapter(path):
  from jaxsoup.commands import _cook

  (path / 'adapter_config.json').write_text('{}')
  _cook._refuse_adapters([path])


def _no_family(path):
  from jaxsoup import models

  models.load(_save(f'{path}/a.safetensors'))


def _unknown_model(path):
  from jaxsoup import models

  _save(path / 'model.safetensors')
  (path / 'config.json').write_text(json.dumps({'model_type': 'mine'}))
  models.load(path)


def _raises(path):
  (path / 'own_task.py').write_text('def score(params): return params["v"]')
  sys.path.insert(0, str(path))
  try:
    user_code.load('own_task:score')(W)
  finally:
    sys.path.remove(str(path))
    del sys.modules['own_task']


def _batches_twice(path):
  batches = (b for b in evaluation.batched({'x': np.ones(3)}, 3))
  score = evaluation.mean_of(lambda params, batch: batch['x'], batches)
  return score(W), score(W)


def _mean_of(metric_fn, **batch):
  batches = [{'x': np.ones(3), **batch}]
  return evaluation.mean_of(
      lambda params, batch: metric_fn(batch['x']), batches
  )(W)


def _other_order(path):
  batch = {'x': np.arange(3.0)}
  run = evaluation.logits_of(lambda params, batch: batch['x'], [batch])
  run(W)
  batch['x'] = batch['x'][::-1]
  run(W)


# The beginning of a message of the guide: what raises it, given a folder.
RAISE = {
    '… does not match the first': lambda p: jaxsoup.uniform([W, {'v': W['w']}]),
    '… has NaN': lambda p: jaxsoup.uniform([W, {'w': W['w'] * np.nan}]),
    '… Only floats are': lambda p: jaxsoup.uniform(
        [{'n': np.int8([k])} for k in range(2)]
    ),
    'Leaf … is a': lambda p: jaxsoup.uniform([{'w': 'text'}]),
    'ingredients must': lambda p: jaxsoup.uniform(x for x in [W]),
    'alpha has shape': lambda p: jaxsoup.average([W, W], [1.0]),
    '… does not exist': lambda p: checkpoints.Ingredients([p / 'none']),
    '… holds no Orbax': lambda p: checkpoints.Ingredients([p]),
    '… seems to be': lambda p: (
        (p / 'x.gguf').write_bytes(b'GGUF'),
        checkpoints.Ingredients([p / 'x.gguf']),
    ),
    '… holds only an unfinished': lambda p: (
        (p / 'a.orbax-checkpoint-tmp-1').mkdir(),
        checkpoints.Ingredients([p]),
    ),
    '… holds several': lambda p: (
        _save(p / 'a'), _save(p / 'b'), checkpoints.Ingredients([p]),
    ),
    '… lacks leaf': lambda p: _with_shape(p, (2,), 'v'),
    '… Is it another model size': lambda p: _with_shape(p, (3,)),
    '… is damaged: its checksum': _damaged,
    '… The checkpoint is damaged': _cut,
    '… exists and is not': lambda p: _save(p),
    '… holds scores of other': _other_scores,
    '… holds scores of another': _another_evaluation,
    'Orbax would confuse': lambda p: _save(
        p / 'a', {'a.b': np.ones(2), 'a': {'b': np.ones(2)}}
    ),
    'Leaf … cannot be the name': lambda p: _save(p / 'a', np.ones(2)),
    '… is a checkpoint, but': lambda p: checkpoints.load(_save(p / 'a')),
    '… scores must be finite': lambda p: jaxsoup.greedy(
        [W], lambda params: float('nan')
    ),
    '… a score is one': lambda p: jaxsoup.greedy(
        [W], lambda params: np.ones(2)
    ),
    'metric_fn returned': lambda p: _mean_of(lambda x: x.mean()),
    '… An iterator can be read': _batches_twice,
    'The mask of … is': lambda p: _mean_of(abs, mask=np.ones(3, int)),
    'The mask of … has': lambda p: _mean_of(abs, mask=-np.ones(3)),
    'The batches are not': _other_order,
    '… logits have shape': lambda p: metrics.correct(
        np.eye(3), LABELS[:, None]
    ),
    'The loss is': lambda p: _learned(
        lambda params, batch, beta: params['w'].sum() * batch,
        [np.float32('nan')],
    ),
    '… expected integers': lambda p: metrics.accuracy(np.eye(3), LABELS * 0.5),
    '… share examples': lambda p: statistics.check_disjoint(
        select=np.arange(3), report=np.arange(2, 5)
    ),
    '… are the same data set': lambda p: statistics.check_disjoint(
        select=LABELS, report=LABELS
    ),
    '… matches no known': _no_family,
    '… Other models can': _unknown_model,
    '… is a LoRA adapter': _adapter,
    '… cannot import': lambda p: user_code.load('no_such_module:score'),
    '… raised …': _raises,
    '… was started with another': _begun,
    'The config has no': lambda p: configs.load(
        str(ROOT.parent / 'configs/digits.py'), ['--config.sed=1']
    ),
    'sweep.shard is': lambda p: _shard('4/4'),
    '… cannot be read': lambda p: sources.Examples([0], lambda x, rng: x / 0)[
        np.array([0])
    ],
}  # fmt: skip


@pytest.mark.parametrize('beginning', RAISE)
def test_messages_of_the_guide_are_raised(beginning, tmp_path):
  (message,) = [m for m in MESSAGES if m.startswith(beginning)]
  with pytest.raises(Exception) as e:
    RAISE[beginning](tmp_path)
  assert _pattern(message).search(str(e.value))
