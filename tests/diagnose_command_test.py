"""`jaxsoup diagnose`: output, JSON, exit codes, one-line errors."""

import html
import json
import pathlib
import shlex
import sys

import jax
import numpy as np
import pytest
from safetensors import numpy
from typer import testing

from jaxsoup import checkpoints
from jaxsoup import cli

# As in the tests of checkpoints: what Orbax leaves behind when a read failed.
pytestmark = pytest.mark.filterwarnings(
    'ignore::pytest.PytestUnraisableExceptionWarning'
)

HERE = """
import numpy as np


def score(params):
  return 0.9 - 0.1 * float(abs(params['w'][0, 0]))


def logits(params):
  return np.asarray(params['w'])[:, :3]


def reset(params):
  return params


def raises(params):
  raise KeyError('label')
"""


@pytest.fixture(autouse=True)
def cwd(tmp_path, monkeypatch, rng):
  """A directory with the user's module, a start, and runs in it."""
  (tmp_path / 'judge.py').write_text(HERE)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', list(sys.path))
  start, other = rng.normal(size=(2, 50, 50)).astype(np.float32)
  start[0, 0] = other[0, 0] = 0
  save = lambda name, x: checkpoints.save(tmp_path / name, {'w': x})
  save('start', start)
  for k in range(4):
    step = rng.normal(size=(50, 50)).astype(np.float32)
    save(f'run{k}', (other if k == 3 else start) + 0.1 * step)


def invoke(*args):
  return testing.CliRunner().invoke(cli.app, ['diagnose', *map(str, args)])


def test_nothing_is_wrong():
  result = invoke('run0', 'run1', 'run2', '--init', 'start')
  assert result.exit_code == 0, (result.output, result.exception)
  assert result.stdout.startswith('SOUP ALL')
  assert 'No problems found.' in result.stdout


def test_findings_in_words_and_json():
  runs = [f'run{k}' for k in range(4)]
  result = invoke(*runs)
  assert result.exit_code == 1
  assert result.stdout.startswith('SOUP A SUBSET')
  assert '1. [BREAKS THE SOUP] Not fine-tuned from the same' in (result.stdout)
  for word in ('Seen: ', 'Meaning: ', 'Do: '):
    assert f'  {word}' in result.stdout
  assert 'jaxsoup soup uniform ' in result.stdout
  report = json.loads(invoke(*runs, '--json').stdout)
  command = report['verdict']['command']
  assert command.split()[3:-2] == [
      f'{pathlib.Path.cwd()}/{x}' for x in runs[:3]
  ]
  assert report['verdict']['names'] == runs[:3]
  assert report['findings'][0]['code'] == 'initialization'
  assert report['findings'][0]['names'] == ['run3']


def test_with_data():
  result = invoke(
      'run0', 'run1', 'run2', '--eval', 'judge:score', '--logits',
      'judge:logits', '--recalibrate', 'judge:reset', '--json', '--thorough',
  )  # fmt: skip
  assert result.exit_code == 0, (result.output, result.exception)
  report = json.loads(result.stdout)
  measured = report['measured']
  assert len(measured['scores']) == 3
  assert measured['barriers'][0][1] is not None
  assert measured['disagreement'][0][0] == 0
  assert 'averages: ' in result.stderr
  result = invoke(
      'run0', 'run1', 'run2', '--eval', 'judge:score', '--thorough', '--json',
      '--workers', 2,
  )  # fmt: skip
  assert result.exit_code == 0, (result.output, result.exception)
  assert json.loads(result.stdout)['verdict'] == report['verdict']


@pytest.mark.parametrize('kind', ['folders', 'files', 'items'])
def test_the_command_makes_a_soup_like_the_runs(kind, tmp_path):
  for k in range(3):
    w = checkpoints.Ingredients([f'run{k}'])[0]['w']
    if kind == 'items':
      state = {'model': {'w': w}, 'step': np.int32(k)}
      checkpoints.save(tmp_path / f'x{k}', state)
      continue
    (tmp_path / f'x{k}').mkdir()
    numpy.save_file({'w': np.asarray(w)}, f'x{k}/model.safetensors')
    (tmp_path / f'x{k}' / 'config.json').write_text('{"model_type": "x"}')
  runs = [
      f'x{k}/model.safetensors' * (kind == 'files') or f'x{k}' for k in range(3)
  ]
  options = ['--item', 'model'] if kind == 'items' else []
  report = invoke(*runs, *options, '--json')
  command = shlex.split(json.loads(report.stdout)['verdict']['command'])
  result = testing.CliRunner().invoke(cli.app, command[1:])
  assert result.exit_code == 0, result.output
  assert pathlib.Path('soup/config.json').exists() == (kind == 'folders')
  out = 'soup.safetensors' if kind == 'files' else 'soup'
  (soup,) = jax.tree.leaves(checkpoints.Ingredients([out])[0])
  mean = np.mean(
      [checkpoints.Ingredients([f'run{k}'])[0]['w'] for k in range(3)], 0
  )
  np.testing.assert_allclose(soup, mean, atol=1e-6)


@pytest.mark.parametrize(
    'options, code, text',
    [
        (('run0',), 2, 'give two or more'),
        (('run0', 'run1', '--logits', 'judge:logits'), 2, 'needs --eval'),
        (('run0', 'run1', '--workers', '2'), 2, 'needs --eval'),
        (('run0', 'nowhere'), 1, 'nowhere'),
        (('run0', 'run1', '--eval', 'judge:nothing'), 1, 'no such function'),
        (
            ('run0', 'run1', '--eval', 'judge:score', '--logits', 'judge:x'),
            1,
            '--logits judge:x',
        ),
        (('run0', 'run1', '--eval', 'judge:raises'), 1, "KeyError: 'label'"),
    ],
)
def test_errors(options, code, text):
  result = invoke(*options)
  assert result.exit_code == code, (result.output, result.exception)
  assert isinstance(result.exception, SystemExit)
  assert 'Traceback' not in result.output
  # A usage error is drawn in a box, which breaks lines.
  assert text in ' '.join(result.stderr.replace('│', ' ').split())


def test_a_page_of_it(tmp_path):
  runs = [f'run{k}' for k in range(4)]
  options = ['--eval', 'judge:score', '--thorough', '--report', 'out/page.html']
  assert invoke(*runs, *options).exit_code == 1
  text = (tmp_path / 'out/page.html').read_text(encoding='utf-8')
  report = json.loads(
      invoke(*runs, '--eval', 'judge:score', '--thorough', '--json').stdout
  )
  assert report['verdict']['reason'] in text
  for finding in report['findings']:
    for key in ('title', 'meaning', 'remedy'):
      assert html.escape(finding[key]) in text
  assert (tmp_path / 'out/page/barrier_map.svg').is_file()
  result = invoke(*runs, '--report', 'page')
  assert result.exit_code == 1 and 'call it page.html' in result.stderr
