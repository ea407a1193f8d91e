"""A config that cannot work is refused before anything runs, and says why."""

import pathlib

import pytest
from typer import testing

from jaxsoup import cli
from jaxsoup.experiments import configs
from jaxsoup.experiments import main

CONFIG = pathlib.Path(__file__).parent.parent / '_digits_mlp.py'

VALUES = {
    'sweep.group_size=-1': 'sweep.group_size is -1: expected 1 or more',
    'sweep.num_runs=0': 'sweep.num_runs is 0: expected 1 or more',
    'finetune.num_epochs=-1': 'num_epochs is -1: expected 1 or more',
    'finetune.batch_size=0': 'finetune.batch_size is 0: expected 1 or more',
    'batch_size=0': 'config.batch_size is 0: expected 1 or more',
    'finetune.ema=(2.0,)': 'ema is (2.0,): expected between 0 and 1',
    'finetune.keep_steps=(999,)': '(999,): expected steps from 1 to',
    'finetune.warmup=nan': 'finetune.warmup is nan: expected a finite number',
    'pretrain.run.learning_rate=-1.0': 'is -1.0: expected 0 or more',
    'sweep.learning_rate=(-1.0,1.0)': 'is (-1.0, 1.0): expected 0 or more',
    'sweep.learning_rate=(1e999,1e999)': '(inf, inf): expected a finite number',
    'sweep.learning_rate[9]=1.0': "has no 'sweep.learning_rate[9]'",
    "finetune.ema=('a',)": "ema is ('a',): expected numbers between 0 and 1",
    'sweep.learning_rate=(0.1,0.01)': 'expected a range, low before high',
    'sweep.learning_rate=(0.1,)': 'range of learning_rate is (0.1,): expected',
}


@pytest.mark.parametrize('override', VALUES)
def test_values_out_of_range(tmp_path, capsys, override):
  workdir = tmp_path / 'workdir'
  argv = [f'--config={CONFIG}', f'--workdir={workdir}', f'--config.{override}']
  assert main.main(argv) == 2
  error = capsys.readouterr().err
  assert VALUES[override] in error and 'Traceback' not in error
  assert not workdir.exists()


BODIES = {
    'def sweep(c): return []': 'sweep returned no runs',
    'def sweep(c): return ["a"]': "sweep returned 'a' as run 0",
    'def sweep(c): return None': 'sweep raised TypeError',
    'def sweep(c):\n  yield {}\n  raise KeyError(1)': 'raised KeyError: 1',
    'def sweep(c): return [{"learning_rate": -1}]': 'learning_rate -1 in run 0',
    'def sweep(c): return [{"learning_rate": "x"}]': "learning_rate 'x' in run",
    'sweep = 5': 'has no function sweep',
    'data = 5': 'has no function data',
    'def data(c): return None': 'data(config) returned None',
    'def data(c): raise SystemExit(0)': 'data raised SystemExit: 0',
    'def model(c): return None': 'model(config) returned None',
    'def model(c): raise SystemExit(0)': 'model raised SystemExit: 0',
}


@pytest.mark.parametrize('body', BODIES)
def test_functions_that_fail(tmp_path, capsys, body):
  path = tmp_path / 'mine.py'
  path.write_text(f'from _digits_mlp import *\n{body}\n')
  argv = [f'--config={path}', f'--workdir={tmp_path / "w"}']
  assert main.main(argv) in (1, 2)
  last = capsys.readouterr().err.strip().splitlines()[-1]
  assert last.startswith('Error: ') and BODIES[body] in last


REST = """
def sweep(config):
  return [{}]

def data(config):
  return None
"""
FILES = {
    'def get_config(:\n': 'SyntaxError',
    'raise KeyError(3)\n': 'KeyError: 3',
    'import sys\nsys.exit(0)\n': 'SystemExit: 0',
    'def get_config(arg):\n  raise KeyError("a")\n': "KeyError: 'a'",
    'def get_config(arg):\n  return None\n': 'get_config returned NoneType',
    'def get_config():\n  pass\n': 'TypeError',
    'import ml_collections\ndef get_config(arg):\n'
    '  return ml_collections.ConfigDict({"a": {"num_epochs": "3"}})\n': (
        "config.a.num_epochs is '3': expected a number"
    ),
}


@pytest.mark.parametrize('content', FILES)
def test_config_files_that_fail(tmp_path, capsys, content):
  path = tmp_path / 'mine.py'
  path.write_text(content + REST)
  assert main.main([f'--config={path}', f'--workdir={tmp_path / "w"}']) in (
      1,
      2,
  )
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and error.startswith('Error: ')
  assert FILES[content] in error and 'mine.py' in error
  assert not (tmp_path / 'w').exists()


def test_a_stored_config_that_is_nested_too_deeply(tmp_path, capsys):
  (tmp_path / 'config.json').write_text('[' * 50_000 + ']' * 50_000)
  assert main.main([f'--config={CONFIG}', f'--workdir={tmp_path}']) == 1
  error = capsys.readouterr().err
  assert 'config.json is unreadable: it is nested too deeply' in error


def test_too_many_devices():
  command = ['plan', '--config', str(CONFIG), '--devices', '1000000000']
  result = testing.CliRunner().invoke(cli.app, command)
  assert result.exit_code == 2 and '4096' in result.output


def test_a_config_that_is_no_file_of_python(tmp_path, capsys):
  path = tmp_path / 'mine.txt'
  path.write_text('x')
  assert main.main([f'--config={path}', f'--workdir={tmp_path / "w"}']) == 2
  assert 'is not a Python file' in capsys.readouterr().err


def test_a_config_with_a_dataclass(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(
      'from __future__ import annotations\nimport dataclasses\n'
      'import ml_collections\n\n@dataclasses.dataclass\nclass A:\n'
      '  x: int = 3\n\ndef get_config(arg):\n'
      '  return ml_collections.ConfigDict({"seed": A().x})\n' + REST
  )
  assert configs.load(str(path)).config.seed == 3


def test_a_seed_that_a_config_does_not_have(tmp_path):
  path = tmp_path / 'config.py'
  text = 'import ml_collections\ndef get_config(arg):\n'
  path.write_text(f'{text}  return ml_collections.ConfigDict().lock(){REST}')
  assert configs.load(str(path)).config.seed == 0
  assert configs.load(str(path), ['--config.seed=3']).config.seed == 3
