"""The notebooks run, and were saved with their outputs."""

import json
import pathlib

import matplotlib
import pytest

NOTEBOOKS = sorted(
    (pathlib.Path(__file__).parent.parent / 'colabs').glob('*.ipynb')
)


def code_cells(path):
  cells = json.loads(path.read_text())['cells']
  return [c for c in cells if c['cell_type'] == 'code']


def test_there_are_notebooks():
  assert NOTEBOOKS


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_cells_run_in_their_order(path):
  matplotlib.use('agg')
  names = {}
  for cell in code_cells(path):
    source = ''.join(cell['source'])
    if not source.startswith('%pip'):  # The package is here already.
      exec(compile(source, str(path), 'exec'), names)
  assert names['soups'] and all(
      names['held_out'](soup.params) > 0.5 for soup in names['soups'].values()
  )


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_inline_and_free_of_errors(path):
  outputs = [o for cell in code_cells(path) for o in cell['outputs']]
  assert any('image/png' in o.get('data', {}) for o in outputs)
  assert not [o for o in outputs if o['output_type'] == 'error']
  assert path.stat().st_size < 200_000
