"""Nothing that a user has is overwritten, cut off or deleted.

Each row: what lies there, the command, and what its last line must say. Nothing
of what lies there may change, and nothing may be added to it.
"""

import json
import os
import pathlib

import numpy as np
import pytest
import safetensors.numpy
from typer import testing

from jaxsoup import checkpoints
from jaxsoup import cli
from jaxsoup.experiments import main
from jaxsoup.runtime import locking

CONFIG = pathlib.Path(__file__).parent.parent / '_digits_mlp.py'
SCORE = """
def score(params):
  return float(params['w'].sum())
"""
LINE = '{"members": [0], "score": 0.5}\n'
JSONL = '{"held_out": 0.5, "test": 0.5}\n{"held_out": 0.6, "test": 0.4}\n'


def _runs(folder):
  for k in range(2):
    arrays = {'w': np.full(3, k, np.float32)}
    safetensors.numpy.save_file(arrays, folder / f'm{k}.safetensors')
  (folder / 'hostile_task.py').write_text(SCORE)


GREEDY = ['soup', 'greedy', 'm0.safetensors', 'm1.safetensors']
GREEDY += ['--eval', 'hostile_task:score', '--out', 'soup', '--scores', 'log']
UNIFORM = ['soup', 'uniform', 'm0.safetensors', 'm1.safetensors', '--out']
DIAGNOSE = ['diagnose', 'm0.safetensors', 'm1.safetensors', '--report']
PLAN = ['plan', '--config', str(CONFIG), '--devices', '1', '--json']

# name: files, command, words of the message.
ROWS = {
    'scores, no newline': ({'log': 'thesis'}, GREEDY, 'is no log of scores'),
    'scores, text': ({'log': 'my\nthesis'}, GREEDY, 'line 1 is unreadable'),
    'scores, numbers': ({'log': '1\n2'}, GREEDY, 'line 1 is unreadable'),
    'scores, binary': ({'log': b'\x80\x00\n\xff'}, GREEDY, 'line 1 is unread'),
    'scores, a tail': (
        {'log': LINE + 'and the rest of my thesis'},
        GREEDY,
        'is no log of scores',
    ),
    'scores, begins like ours': (
        {'log': '{"members": [my thesis is here'},
        GREEDY,
        'is no log of scores',
    ),
    'scores, a directory': ({'log/a': 'a'}, GREEDY, 'log is not a file'),
    'scores, a device': (
        {'log': pathlib.Path('/dev/full')},
        GREEDY,
        'log is not a file',
    ),
    'scores, too large': (
        {'log': f'{{"members": [0], "score": {"9" * 400}}}\n'},
        GREEDY,
        'line 1 is unreadable',
    ),
    'scores, of a number': (
        {'log': '{"ingredients": 5}\n'},
        GREEDY,
        'scores of other ingredients (unknown then',
    ),
    'soup over a link to nothing': (
        {'soup': pathlib.Path('nowhere')},
        [*UNIFORM, 'soup'],
        'exists',
    ),
    'convert over a link to nothing': (
        {'soup': pathlib.Path('nowhere')},
        ['convert', 'm0.safetensors', 'soup'],
        'soup exists',
    ),
    'report over a model': (
        {},
        [*DIAGNOSE, 'm0.safetensors'],
        'm0.safetensors exists, and this command did not write it',
    ),
    'report beside a directory': (
        {'m/weights': 'w'},
        [*DIAGNOSE, 'm.html'],
        'm is not empty, and the pictures',
    ),
    'report over its source': (
        {'s.jsonl': JSONL},
        ['report', 's.jsonl', '--out', 's.jsonl'],
        's.jsonl exists, and this command did not write it',
    ),
    'report over a page': (
        {'s.jsonl': JSONL, 's.html': '<!DOCTYPE html>\n<html>mine'},
        ['report', 's.jsonl'],
        's.html exists, and this command did not write it',
    ),
    'plan over a config': (
        {'config.py': 'x = 1'},
        [*PLAN, 'config.py'],
        'config.py exists, and this command did not write it',
    ),
    'plan over JSON': (
        {'plan.json': '{"mine": 1}'},
        [*PLAN, 'plan.json'],
        'plan.json exists, and this command did not write it',
    ),
    'soup over a model': ({}, [*UNIFORM, 'm0.safetensors'], 'exists'),
    'soup over a directory': ({'soup/a': 'a'}, [*UNIFORM, 'soup'], 'exists'),
    'lock is something else': (
        {'.soup.lock': 'my notes'},
        [*UNIFORM, 'soup'],
        'holds something else, and is left as it is',
    ),
    'lock is a link': (
        {'notes': 'my notes', '.soup.lock': pathlib.Path('notes')},
        [*UNIFORM, 'soup'],
        'is a symbolic link, not a lock',
    ),
}


def _write(folder, files):
  for name, content in files.items():
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, pathlib.Path):
      path.symlink_to(content)
    elif isinstance(content, bytes):
      path.write_bytes(content)
    else:
      path.write_text(content)


def _content(folder):
  return {
      str(p.relative_to(folder)): p.read_bytes()
      for p in sorted(folder.rglob('*'))
      if p.is_file() and '__pycache__' not in p.parts
  }


@pytest.mark.parametrize('name', ROWS)
def test_nothing_is_destroyed(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  files, command, words = ROWS[name]
  _runs(tmp_path)
  _write(tmp_path, files)
  before = _content(tmp_path)
  result = testing.CliRunner().invoke(cli.app, command)
  said = ' '.join(result.stderr.replace('│', ' ').split())
  assert result.exit_code in (1, 2) and words in said
  assert _content(tmp_path) == before


def test_our_own_outputs_are_written_again(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  _runs(tmp_path)
  # A name that an earlier version used for its unfinished page.
  _write(tmp_path, {'s.jsonl': JSONL, 's.tmp': 'mine'})
  for command in (['report', 's.jsonl'], [*DIAGNOSE, 'd.html']):
    for _ in range(2):
      result = testing.CliRunner().invoke(cli.app, command)
      assert 'did not write it' not in result.output
      assert result.exit_code == 0, result.output
  assert (tmp_path / 's.tmp').read_text() == 'mine'


def test_a_workdir_that_is_not_empty(tmp_path, capsys):
  files = {'unfinished/thesis': 'mine', 'table.md': 'mine', 'a': 'mine'}
  _write(tmp_path, files)
  assert main.main([f'--config={CONFIG}', f'--workdir={tmp_path}']) == 2
  error = capsys.readouterr().err
  assert f'{tmp_path} holds a, table.md, unfinished' in error
  assert _content(tmp_path) == {k: b'mine' for k in files}


def test_a_table_that_is_no_table_of_ours(tmp_path, capsys):
  _write(tmp_path, {'table.md': 'mine'})
  argv = [f'--config={CONFIG}', f'--workdir={tmp_path}', '--seeds=2']
  assert main.main(argv) == 2
  assert f'{tmp_path} holds table.md' in capsys.readouterr().err
  assert _content(tmp_path) == {'table.md': b'mine'}


def test_leftovers_of_killed_processes_go(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  _runs(tmp_path)
  _write(
      tmp_path,
      {
          'soup.unfinished-1234/model': 'half',
          'soup.orbax-checkpoint-tmp-7/x': 'half',
          'soup.safetensors.unfinished-99': 'half',
          'soup.unfinished.txt': 'mine',
          '.soup.lock': json.dumps({'host': 'gone', 'pid': 1, 'since': '?'}),
      },
  )
  for out in ('soup', 'soup.safetensors'):
    result = testing.CliRunner().invoke(cli.app, [*UNIFORM, out])
    assert result.exit_code == 0, result.output
  assert sorted(os.listdir()) == [
      *('hostile_task.py', 'm0.safetensors', 'm1.safetensors'),
      *('soup', 'soup.safetensors', 'soup.unfinished.txt'),
  ]


def test_a_lock_that_was_cut_off_is_taken_over(tmp_path):
  for content in ('', '{"ho', '{"host": "a", "pid'):
    lock = tmp_path / '.lock'
    lock.write_text(content)
    with locking.locked(lock, 'DIR'):
      pass
    assert not lock.exists()


def test_a_second_reader_cuts_off_no_line_of_the_first(tmp_path):
  path = tmp_path / 'log'
  path.write_text(LINE + '{"mem')
  reading = pathlib.Path.read_bytes

  def read_bytes(self):
    content = reading(self)
    if self == path:
      with path.open('ab') as file:  # The writer goes on meanwhile.
        file.write(b'bers": [3], "score": 0.75}\n')
    return content

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pathlib.Path, 'read_bytes', read_bytes)
    assert dict(checkpoints.ScoreLog(path)) == {(0,): 0.5}
  assert dict(checkpoints.ScoreLog(path)) == {(0,): 0.5, (3,): 0.75}
