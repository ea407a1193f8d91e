"""Where the disk is full: one line says which file, and nothing half stays."""

import os
import pathlib

from faults_test import room_for
import numpy as np
import pretrained_test
import pytest
from safetensors import numpy as safetensors
from typer import testing

from jaxsoup import cli
from jaxsoup.models import _pretrained

CONFIG = pathlib.Path(__file__).parent.parent / '_digits_mlp.py'
SCORES = '{"held_out": 0.5, "test": 0.5}\n{"held_out": 0.6, "test": 0.4}\n'
PLAN = ['plan', '--config', str(CONFIG), '--devices', '1', '--json']
COMMANDS = {
    'Orbax': (['soup', 'uniform', 'm0', 'm1', '--out', 'out'], 'out'),
    'file': (
        ['soup', 'uniform', 'm0', 'm1', '--out', 'out.safetensors'],
        'out.safetensors',
    ),
    'directory': (['soup', 'uniform', 'd0', 'd1', '--out', 'out'], 'out'),
    'convert to Orbax': (['convert', 'vit.safetensors', 'out'], 'out'),
    'convert to a file': (
        ['convert', 'vit.safetensors', 'out.safetensors', '--names', 'hf'],
        'out.safetensors',
    ),
    'report': (['report', 's.jsonl', '--out', 'out.html'], 'out.html'),
    'diagnosis': (['diagnose', 'd0', 'd1', '--report', 'out.html'], 'out.html'),
    'plan': ([*PLAN, 'out.json'], 'out.json'),
}


@pytest.fixture(scope='module')
def vit(tmp_path_factory):
  kind = _pretrained.Kind('vit', 'timm', pretrained_test.TINY['vit'])
  path = tmp_path_factory.mktemp('vit') / 'vit.safetensors'
  return pretrained_test.write(path, kind, pretrained_test.random_params(kind))


def _inputs(vit):
  for k in range(2):
    os.makedirs(f'd{k}')
    arrays = {'w': np.full((300, 300), k, np.float32)}
    safetensors.save_file(arrays, f'd{k}/model.safetensors')
    pathlib.Path(f'd{k}/config.json').write_text('{}')
    os.symlink(f'd{k}/model.safetensors', f'm{k}.safetensors')
  os.symlink(vit, 'vit.safetensors')
  pathlib.Path('s.jsonl').write_text(SCORES)


@pytest.mark.parametrize('name', COMMANDS)
def test_one_line_and_nothing_half(tmp_path, monkeypatch, capfd, vit, name):
  monkeypatch.chdir(tmp_path)
  _inputs(vit)
  command, path = COMMANDS[name]
  command = [f'{x}.safetensors' if x in ('m0', 'm1') else x for x in command]
  before = sorted(os.listdir())
  with room_for(200):
    result = testing.CliRunner().invoke(cli.app, command)
  assert result.exit_code == 1
  line = result.stderr.splitlines()[-1]
  assert f'{path} could not be written because the disk is full' in line
  assert 'free some space' in line
  # What Orbax writes in threads of its own as well.
  assert 'Traceback' not in result.output + ''.join(capfd.readouterr())
  left = set(os.listdir()) - set(before)
  # A page is whole without its pictures: the next call writes both again.
  assert left <= {'out', path} if path.endswith('.html') else not left
  assert testing.CliRunner().invoke(cli.app, command).exit_code == 0
