"""Soups of runs that other libraries saved, in the layout of those runs.

`layouts/golden` holds two runs of each; `layouts/owners.py` made them in the
owners' environments, and restores soups there by the owners' own calls.
"""

import pathlib
import tarfile

import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.mark.parametrize('layout', layouts())
def test_mean_of_two_runs(tmp_path, layout):
  if layout in NEEDED:
    pytest.importorskip(NEEDED[layout])
  with tarfile.open(GOLDEN / f'{layout}.tar.xz') as archive:
    archive.extractall(tmp_path, filter='data')
  runs = sorted(tmp_path.glob('run[01]*'))
  item = ITEMS.get(layout)
  (first, source), (other, _) = (arrays_of(run, item) for run in runs)
  is_orbax = source.layout is not None
  # Files of other formats are written as such, too.
  soup = tmp_path / runs[0].name.replace('run0', 'soup')
  checkpoints.save_average(soup, checkpoints.Ingredients(runs, item=item))
  averaged, written = arrays_of(soup, item)
  if is_orbax:
    place = lambda run, path: pathlib.Path(path).relative_to(run)
    actual = place(soup, written.metadata.path)
    assert actual == place(runs[0], source.metadata.path)
    rows = {p: r['key_metadata'] for p, r in source.layout.rows.items()}
    for path, row in written.layout.rows.items():
      assert row['key_metadata'] == rows[path]
    assert {p[0] for p in first.keys() - averaged.keys()} <= TRAINING
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
