"""The notebooks match their sources and show what they claim."""

import json
import pathlib

import jax
import jupytext
import matplotlib
from matplotlib import pyplot as plt
import numpy as np
import pytest

from jaxsoup import checkpoints

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / 'colabs').glob('*.ipynb'))
each = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)


def cells_of(path):
  """Kind, source, outputs and whether it is run, of each cell."""
  for cell in json.loads(path.read_text())['cells']:
    yield (
        cell['cell_type'],
        ''.join(cell['source']),
        cell.get('outputs', []),
        'skip-execution' not in cell['metadata'].get('tags', []),
    )


def test_each_source_has_a_notebook_and_a_check():
  sources = sorted((ROOT / 'colabs').glob('[0-9]*.py'))
  stems = [path.stem for path in NOTEBOOKS]
  assert stems == [path.stem for path in sources] == list(CHECKS)


@each
def test_cells_are_those_of_the_source(path):
  source = jupytext.read(path.with_suffix('.py'), fmt='py:percent')
  expected = [(cell.cell_type, cell.source) for cell in source.cells]
  assert [cell[:2] for cell in cells_of(path)] == expected, (
      f'{path.name} is not what its source says: python colabs/build.py '
      f'{path.stem}'
  )


@each
def test_outputs_are_inline_and_free_of_errors(path):
  outputs = [output for cell in cells_of(path) for output in cell[2]]
  assert any('image/png' in output.get('data', {}) for output in outputs)
  assert not [o for o in outputs if o['output_type'] == 'error']
  assert not [o for o in outputs if o.get('name') == 'stderr']
  assert path.stat().st_size < 200_000


@each
def test_it_installs_from_a_clone(path):
  skipped = [source for _, source, _, is_run in cells_of(path) if not is_run]
  assert len(skipped) == 1
  assert skipped[0].endswith('\n%pip install -q "..[demo]"')
  text = path.read_text()
  assert 'colab.research' not in text and 'github.com' not in text


@pytest.mark.slow
@each
def test_cells_run_in_their_order(path, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  matplotlib.use('agg')
  names = {'__name__': '__main__'}
  for kind, source, _, is_run in cells_of(path):
    if kind == 'code' and is_run:
      exec(compile(source, str(path), 'exec'), names)
  plt.close('all')
  CHECKS[path.stem](names)


def check_soup_in_five_minutes(names):
  models, soups = names['models'], names['soups']
  assert_mean(soups['uniform'].params, models)
  held_out, blurred = names['held_out'], names['blurred']
  best = max(map(held_out, models))
  assert soups['greedy'].info.score == held_out(soups['greedy'].params) >= best
  singles = np.mean([blurred(params) for params in models])
  assert blurred(soups['uniform'].params) > singles


def check_fine_tune_and_soup(names):
  accuracy, soups = names['accuracy'], names['soups']
  assert_mean(soups['uniform'].params, names['singles'])
  assert_mean(names['nnx_soups']['uniform'].params, names['nnx_ingredients'])
  assert_equal(names['loaded'].params, soups['greedy'].params)
  for scores, some_soups, singles in (
      (accuracy, soups, names['singles']),
      (names['nnx_accuracy'], names['nnx_soups'], names['nnx_ingredients']),
  ):
    best = max(map(scores['held_out'], singles))
    assert scores['held_out'](some_soups['greedy'].params) >= best > 0.9
  singles = [accuracy['noisy'](params) for params in names['singles']]
  assert accuracy['noisy'](soups['uniform'].params) > np.mean(singles)


def check_sharded_and_streamed(names):
  num = jax.device_count()
  kernel = names['greedy'].params['Dense_1']['kernel']
  assert kernel.addressable_shards[0].data.size == 1024 * 1024 / num
  assert_mean(names['uniform'].params, list(names['ingredients']))
  soup_of_files = checkpoints.Ingredients([names['path']])[0]
  assert_mean(soup_of_files, list(names['ingredients']))
  learned = names['learned']
  auto, streamed = learned['auto'], learned['streamed']
  assert auto.info.plan.memory == 'resident'
  assert streamed.info.plan.memory == 'streamed'
  np.testing.assert_allclose(streamed.alpha, auto.alpha, 1e-3)
  assert np.ptp(streamed.alpha) > 0.01
  assert names['communication']['mix'] == 'none'
  assert 'all-reduce' in names['communication']['gradient in alpha']
  assert 'all-gather' in names['communication']['forward pass']
  assert 1 < names['peak'] * num * 1e6 / names['num_bytes'] < 6


def check_why_did_my_soup_fail(names):
  good = tuple(range(len(names['good'])))
  for name, code in (('diagnosis_1', 'initialization'), ('diagnosis_2', 'far')):
    assert [f.code for f in names[name].findings] == [code]
    assert names[name].verdict.members == good
  assert names['diagnosis_3'].verdict.action == 'do not soup'
  assert names['diagnosis_3'].findings[0].leaves == ('head/kernel',)
  line, *others = map(names['landscape'].barrier, names['lines'].values())
  assert all(10 * line < barrier for barrier in others)
  assert good[-1] + 1 not in names['greedy'].info.accepted


def check_averages_along_a_run(names):
  assert_mean(
      names['models']['mean of the same quarter'], names['ingredients'][-11:]
  )
  inside, test = names['inside'], names['test']
  assert_mean(inside['mean'], names['ingredients'][-11:])
  assert_mean(
      checkpoints.Ingredients(['late.safetensors'])[0], [inside['mean']]
  )
  each = [100 * test(params) for params in names['ingredients']]
  size = names['SIZE']
  assert len(names['sliding']) == len(each) - size + 1
  assert np.mean(names['sliding']) > np.mean(each[size - 1 :]) + 1
  low, high = names['other_rates'].values()
  assert test(low['mean of all']) < test(low['last step'])
  assert max(map(test, high.values())) < test(names['models']['last step'])


CHECKS = {
    '01_soup_in_five_minutes': check_soup_in_five_minutes,
    '02_fine_tune_and_soup': check_fine_tune_and_soup,
    '03_sharded_and_streamed': check_sharded_and_streamed,
    '04_why_did_my_soup_fail': check_why_did_my_soup_fail,
    '05_averages_along_a_run': check_averages_along_a_run,
}


def assert_mean(params, models):
  leaves = zip(*map(jax.tree.leaves, models))
  for x, xs in zip(jax.tree.leaves(params), leaves, strict=True):
    mean = np.mean([np.asarray(v) for v in xs], axis=0, dtype=np.float64)
    np.testing.assert_allclose(np.asarray(x), mean, atol=1e-6)


def assert_equal(params, expected):
  for x, y in zip(
      jax.tree.leaves(params), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
