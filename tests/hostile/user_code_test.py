"""Functions of the user that return, raise or do what they should not.

Each row: the name of a function below, and what the last line must say.
"""

import numpy as np
import pytest
import safetensors.numpy
from typer import testing

from jaxsoup import cli

TASK = """
import sys
import jax.numpy as jnp
import numpy as np

def none(params): return None
def text(params): return 'good'
def array(params): return np.ones(3)
def huge(params): return 10**400
def ends(params): sys.exit(0)
def base(params): raise BaseException('odd')
def nothing(): return 0.5
def well(params): return 0.5

def loss(params, batch, beta): return jnp.sum(params['w'])
def learn_well(): return loss, [np.ones(3), np.ones(3)]
def learn_none(): return None
def learn_one(): return (loss,)
def learn_number(): return 3, [1.0]
def learn_batches(): return loss, 3
def learn_ends(): return (lambda p, b, beta: sys.exit(0)), [1.0]
def learn_raises(): return (lambda p, b, beta: p['nope']), [1.0]
def learn_late():
  def batches():
    yield 1.0
    raise KeyError('late')
  return loss, batches()

def vector(params): return np.ones(3)
def no_examples(params): return np.ones((0, 3))
def not_numbers(params): return np.full((4, 3), np.nan)
def varying(params): return np.ones((2 + int(params['w'][0]), 3))
def fewer(params): return {}
"""
SCORES = {
    'none': 'eval_fn returned None for ingredient 0',
    'text': "eval_fn returned 'good' for ingredient 0",
    'array': 'eval_fn returned float64[3] for ingredient 0',
    'huge': 'a score is one number, higher is better. Return a float.',
    'ends': 'hostile_code:ends raised SystemExit: 0',
    'base': 'hostile_code:base raised BaseException: odd',
    'nothing': 'takes 0 positional arguments but 1 was given. Write it',
    'missing': 'hostile_code.py has: none, text, array',
}
LOSSES = {
    'learn_none': 'returned None: expected loss_fn, batches',
    'learn_one': 'expected loss_fn, batches and perhaps val_batches',
    'learn_number': 'returned (3, [1.0]): expected loss_fn',
    'learn_batches': 'returned batches that are 3: expected a list',
    'learn_ends': 'loss_fn of hostile_code:learn_ends raised SystemExit: 0',
    'learn_raises': "learn_raises raised KeyError: 'nope'",
    'learn_late': "the batches of hostile_code:learn_late raised KeyError: 'l",
}
LOGITS = {
    'vector': 'logits_fn returned float64[3]: expected logits [N, C]',
    'none': 'logits_fn returned object[]: expected logits [N, C]',
    'no_examples': 'logits_fn returned float64[0, 3]: expected',
    'not_numbers': 'held-out examples, without NaN',
    'varying': 'logits of 2 examples for one model and of 3 for another',
}
RECALIBRATED = {
    'none': 'recalibrate_fn returned None: expected all parameters',
    'fewer': 'recalibrate_fn returned {}: expected all parameters',
    'array': 'expected all parameters that it was given, in their shapes',
}
NAMES = {
    ':f': 'write package.module:function',
    '..:f': 'write package.module:function',
    './a.py:f': 'write package.module:function',
    'builtins:sum': 'builtins:sum raised TypeError',
}


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  for k in range(2):
    arrays = {'w': np.full(3, k, np.float32)}
    safetensors.numpy.save_file(arrays, f'm{k}.safetensors')
  (tmp_path / 'hostile_code.py').write_text(TASK)


def _said(*command):
  result = testing.CliRunner().invoke(cli.app, list(command))
  assert result.exit_code in (1, 2) and 'Traceback' not in result.output
  return ' '.join(result.stderr.replace('│', ' ').split())


def test_batches_of_arrays(tmp_path):
  command = ['soup', 'learned', *RUNS, '--out', 'soup']
  command += ['--loss', 'hostile_code:learn_well']
  result = testing.CliRunner().invoke(cli.app, command)
  assert result.exit_code == 0 and (tmp_path / 'soup').exists()


RUNS = ('m0.safetensors', 'm1.safetensors')


@pytest.mark.parametrize('name', SCORES)
def test_scores(tmp_path, name):
  option = ('--eval', f'hostile_code:{name}', '--out', 'soup')
  assert SCORES[name] in _said('soup', 'greedy', *RUNS, *option)
  assert not (tmp_path / 'soup').exists()


@pytest.mark.parametrize('name', LOSSES)
def test_losses(tmp_path, name):
  option = ('--loss', f'hostile_code:{name}', '--out', 'soup')
  assert LOSSES[name] in _said('soup', 'learned', *RUNS, *option)
  assert not (tmp_path / 'soup').exists()


@pytest.mark.parametrize('name', LOGITS)
def test_logits(name):
  options = ('--eval', 'hostile_code:well', '--thorough')
  options += ('--logits', f'hostile_code:{name}')
  assert LOGITS[name] in _said('diagnose', *RUNS, *options)


@pytest.mark.parametrize('name', RECALIBRATED)
def test_recalibrated(name):
  options = ('--recalibrate', f'hostile_code:{name}')
  said = _said('diagnose', *RUNS, '--eval', 'hostile_code:well', *options)
  assert RECALIBRATED[name] in said


@pytest.mark.parametrize('name', NAMES)
def test_names(name):
  said = _said('soup', 'greedy', *RUNS, '--eval', name, '--out', 'soup')
  assert NAMES[name] in said


@pytest.mark.parametrize(
    'options, words',
    [
        (['diagnose', *RUNS, '--num-examples', '9'], 'needs --eval as well'),
        (
            ['soup', 'learned', *RUNS, '--loss', 'hostile_code:learn_one']
            + ['--out', 'soup', '--learning-rate', '-1'],
            "Invalid value for '--learning-rate'",
        ),
        (
            ['soup', 'greedy', *RUNS, '--eval', 'hostile_code:well']
            + ['--out', 'soup', '--seed', '9' * 20],
            "Invalid value for '--seed'",
        ),
    ],
)
def test_numbers(options, words):
  assert words in _said(*options)
