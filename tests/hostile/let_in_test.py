"""Nothing comes in, or goes out, that was not meant to."""

import os
import pathlib
import sys

import numpy as np
import pytest
import safetensors.numpy
from typer import testing

import jaxsoup
from jaxsoup import checkpoints
from jaxsoup import cli

NAMES = ['a<script>x()</script>', 'b|c', 'd`e', '[f](http://g)', 'h\n# i']


def _models(folder, names):
  for k, name in enumerate(names):
    (folder / name).mkdir(parents=True)
    arrays = {'w': np.full(3, k, np.float32)}
    safetensors.numpy.save_file(arrays, folder / name / 'model.safetensors')
    (folder / name / 'config.json').write_text('{}')
  return [folder / name for name in names]


def run(*args):
  return testing.CliRunner().invoke(cli.app, list(map(str, args)))


def test_names_are_text_in_a_model_card(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  names = [name.replace('/', '') for name in NAMES]
  _models(tmp_path, names)
  assert run('soup', 'uniform', *names, '--out', 'so<b>up').exit_code == 0
  card = (tmp_path / 'so<b>up' / 'README.md').read_text()
  page = card.split('---\n', 2)[2].split('Made with')[0]
  assert '# so&#60;b&#62;up\n' in page
  rows = [line for line in page.splitlines() if line.startswith('|')]
  assert len(rows) == 2 + len(names)
  assert {row.count('|') for row in rows} == {3}
  for mark in ('<script', '<b>', '`', '](', '\n# i'):
    assert mark not in page


@pytest.mark.parametrize(
    'name', ['run[old]', 'run[bold]x', 'a\x1b[31mb', 'c\rd']
)
def test_names_are_text_in_a_terminal(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  _models(tmp_path, [name, 'other'])
  shown = name.encode('unicode_escape').decode()
  for command in (
      ('inspect', name, 'other'),
      ('soup', 'uniform', name, 'other', '--out', 'soup'),
      ('diagnose', name, 'missing'),
      ('inspect', f'{name}/missing'),
  ):
    result = run(*command)
    assert shown in result.output.replace('\n', '')
    assert '\x1b' not in result.output and '\r' not in result.output


def test_only_files_of_the_model_are_carried_over(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  a, _ = _models(tmp_path, ['a', 'b'])
  (tmp_path / 'secret').write_text('secret')
  (a / 'tokenizer.json').symlink_to('/etc/hostname')
  (a / 'vocab.txt').symlink_to(tmp_path / 'secret')
  (a / 'merges.txt').symlink_to('own.txt')
  for name in ('own.txt', 'id_rsa', '.env', 'credentials.json', 'notes.md'):
    (a / name).write_text('mine')
  assert run('soup', 'uniform', 'a', 'b', '--out', 'soup').exit_code == 0
  own = {'README.md', 'config.json', 'model.safetensors', 'soup.json'}
  assert set(os.listdir('soup')) == own | {'merges.txt'}


def test_links_of_the_cache_of_the_hub_are_followed(tmp_path):
  home = tmp_path / 'models--org--name'
  (path,) = _models(home / 'snapshots', ['abc'])
  (home / 'blobs').mkdir()
  (home / 'blobs' / '123').write_text('tokens')
  (path / 'tokenizer.json').symlink_to('../../blobs/123')
  ingredients = checkpoints.Ingredients([path])
  made = checkpoints.save_directory(tmp_path / 'soup', ingredients)
  assert pathlib.Path(made, 'tokenizer.json').read_text() == 'tokens'


@pytest.mark.parametrize('out', ['soup', 'soup.safetensors', 'directory'])
def test_arguments_of_other_programs_are_not_stored(tmp_path, monkeypatch, out):
  monkeypatch.setattr(sys, 'argv', ['/home/me/train.py', '--key', 'SECRET'])
  ingredients = checkpoints.Ingredients(_models(tmp_path, 'ab'))
  soup = jaxsoup.uniform(ingredients)
  if out == 'directory':
    path = checkpoints.save_directory(tmp_path / out, ingredients)
  else:
    path = checkpoints.save(tmp_path / out, soup, ingredients=ingredients)
  assert checkpoints.provenance(path)['command'] == ['train.py']
  files = pathlib.Path(path)
  files = [files] if files.is_file() else [*files.rglob('*')]
  content = b''.join(f.read_bytes() for f in files if f.is_file())
  assert b'SECRET' not in content and b'/home/me' not in content


def test_our_own_arguments_are_stored_without_passwords(tmp_path, monkeypatch):
  command = ['/bin/jaxsoup', 'soup', 'uniform', 's3://me:SECRET@bucket/run']
  monkeypatch.setattr(sys, 'argv', command)
  path = checkpoints.save(tmp_path / 'soup', {'w': np.ones(2)})
  stored = checkpoints.provenance(path)['command']
  assert stored == ['jaxsoup', 'soup', 'uniform', 's3://bucket/run']


@pytest.mark.reference
def test_a_refused_pickle_gives_no_advice_to_run_it(tmp_path):
  torch = pytest.importorskip('torch', reason='reads files of torch')

  class Evil:

    def __reduce__(self):
      return os.system, (f'touch {tmp_path}/ran',)

  torch.save({'w': torch.ones(2), 'x': Evil()}, tmp_path / 'evil.pth')
  result = run('inspect', tmp_path / 'evil.pth')
  assert result.exit_code == 1 and not (tmp_path / 'ran').exists()
  said = ' '.join(result.output.split())
  assert 'is refused because it would run code when it is loaded' in said
  assert 'weights_only' not in said and 'torch.load' not in said
