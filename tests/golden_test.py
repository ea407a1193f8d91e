"""Soups of runs that other libraries saved, in the layout of those runs.

`layouts/golden` holds two runs of each; `layouts/owners.py` made them in the
owners' environments, and restores soups there by the owners' own calls.
"""

import os
import pathlib
import tarfile

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoup
from jaxsoup import checkpoints
from jaxsoup.checkpoints import _formats

GOLDEN = pathlib.Path(__file__).parent / 'layouts' / 'golden'
# What a soup leaves out, by its first key.
TRAINING = {'opt_state', 'optimizer', 'optimizer_variables', 'step'}
# Which of several models; the authors of timm store a moving average, too.
ITEMS = {'timm/training': 'state_dict'}
# Optional packages, by the layouts that are read with them.
NEEDED = dict.fromkeys(['keras/model', 'keras/weights'], 'h5py') | (
    dict.fromkeys(
        ['lightning/checkpoint', 'timm/training', 'transformers/sharded_bin'],
        'torch',
    )
)


def layouts():
  """Those that are read without a template, which Equinox wants."""
  paths = sorted(GOLDEN.glob('*/*.tar.xz'))
  names = [str(p.relative_to(GOLDEN)).removesuffix('.tar.xz') for p in paths]
  return [name for name in names if not name.startswith('equinox')]


def arrays_of(run, item=None):
  """All arrays of a checkpoint, by their names in it."""
  source = _formats.open_source(_formats.resolve(run, item), item)
  everything = lambda shape: tuple(slice(0, n) for n in shape)
  return {
      path: np.array(source.reader_fn(path)(everything(leaf.shape)))
      for path, leaf in source.metadata.leaves.items()
  }, source


@pytest.mark.filterwarnings('ignore:The soup has the root module')
@pytest.mark.parametrize('layout', layouts())
def test_mean_of_two_runs_and_a_candidate(tmp_path, layout):
  """Both are stored as the first run is."""
  if layout in NEEDED:
    pytest.importorskip(NEEDED[layout])
  with tarfile.open(GOLDEN / f'{layout}.tar.xz') as archive:
    archive.extractall(tmp_path, filter='data')
  runs = sorted(tmp_path.glob('run[01]*'))
  item = ITEMS.get(layout)
  (first, source), (other, _) = (arrays_of(run, item) for run in runs)
  is_orbax = source.layout is not None
  place = lambda run, source: pathlib.Path(source.metadata.path).relative_to(
      run
  )
  # Files of other formats are written as such, too.
  soup = tmp_path / runs[0].name.replace('run0', 'soup')
  ingredients = checkpoints.Ingredients(runs, item=item)
  checkpoints.save_average(soup, ingredients)
  averaged, written = arrays_of(soup, item)
  if is_orbax:
    assert place(soup, written) == place(runs[0], source)
    rows = {p: r['key_metadata'] for p, r in source.layout.rows.items()}
    for path, row in written.layout.rows.items():
      assert row['key_metadata'] == rows[path]
    assert {p[0] for p in first.keys() - averaged.keys()} <= TRAINING
  if layout.startswith('transformers_flax'):
    names = {f.name for f in runs[0].iterdir()}
    assert {f.name for f in soup.iterdir()} == {*names, 'soup.json'}
  assert averaged
  for path, x in averaged.items():
    path = path if path in first else (item, *path)
    expected = first[path]
    if path[0] in TRAINING:  # As the file of the first run has it.
      assert not is_orbax
    elif jnp.issubdtype(expected.dtype, jnp.inexact):
      mean = (first[path].astype(np.float32) + other[path]) / 2
      expected = mean.astype(expected.dtype)
    np.testing.assert_array_equal(x, expected)

  save = lambda: checkpoints.save_like(
      tmp_path / 'candidate', ingredients[1], ingredients
  )
  if layout == 'transformers/sentence':
    with pytest.raises(ValueError, match='is a module of its own'):
      save()
    return
  candidate = pathlib.Path(save())
  assert candidate.suffixes == runs[0].suffixes
  made, written = arrays_of(candidate, item)
  if is_orbax:
    assert place(candidate, written) == place(runs[0], source)
  for path, x in made.items():
    path = path if path in first else (item, *path)
    is_float = jnp.issubdtype(first[path].dtype, jnp.inexact)
    if is_float and path[0] not in TRAINING:
      np.testing.assert_array_equal(x, other[path])


def test_several_files_of_flax(tmp_path, monkeypatch):
  with tarfile.open(GOLDEN / 'transformers_flax/msgpack_sharded.tar.xz') as tar:
    tar.extractall(tmp_path, filter='data')
  runs = [tmp_path / f'run{k}' for k in range(2)]
  before = {f: f.read_bytes() for run in runs for f in run.iterdir()}
  ingredients = checkpoints.Ingredients(runs)
  soup = jaxsoup.average(ingredients, [0.25, 0.75])
  checkpoints.save(tmp_path / 'soup', soup, ingredients=ingredients)
  checkpoints.save_average(tmp_path / 'other', ingredients, [0.25, 0.75])
  (first, _), (last, _), (averaged, source) = map(
      arrays_of, (*runs, tmp_path / 'soup')
  )
  assert source.metadata.path.endswith('soup/flax_model.msgpack.index.json')
  for path, x in averaged.items():
    expected = 0.25 * first[path] + 0.75 * last[path]
    np.testing.assert_array_equal(x, expected)
  for file in tmp_path.glob('soup/flax_model*'):
    assert file.read_bytes() == (tmp_path / 'other' / file.name).read_bytes()
    assert len(file.read_bytes()) == len(before[runs[0] / file.name])
  # Nothing is left where a soup could not be written.
  with monkeypatch.context() as patched:
    patched.setattr(os, 'pwrite', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      checkpoints.save(tmp_path / 'failed', soup, ingredients=ingredients)
  names = {'run0', 'run1', 'soup', 'other'}
  assert {f.name for f in tmp_path.iterdir()} == names
  # An index alone is not a directory: the soup is an Orbax checkpoint.
  files = [run / 'flax_model.msgpack.index.json' for run in runs]
  ingredients = checkpoints.Ingredients(files)
  checkpoints.save_average(tmp_path / 'orbax', ingredients)
  assert arrays_of(tmp_path / 'orbax')[1].layout is not None
  assert {f: f.read_bytes() for f in before} == before
