"""Numbers that a device cannot hold are refused, not cut off."""

import _x64
import jax
import numpy as np
import pytest
import safetensors.numpy

import jaxsoup
from jaxsoup import checkpoints

LARGE = {'w': np.ones(2, np.float32), 'table': np.array([1, 2**40 + 5])}
OTHER = {**LARGE, 'w': np.zeros(2, np.float32)}


@pytest.mark.parametrize(
    'run',
    [
        jaxsoup.uniform,
        lambda m: jaxsoup.greedy(m, lambda params: 0.0),
        jaxsoup.stack,
        lambda m: m[0] if hasattr(m, 'paths') else jaxsoup.uniform(m),
    ],
)
@pytest.mark.parametrize('suffix', ['', '.safetensors', '.npz'])
def test_large_integers(tmp_path, run, suffix):
  models = [LARGE, OTHER]
  if suffix:
    paths = [tmp_path / f'{k}{suffix}' for k in range(2)]
    for path, model in zip(paths, models):
      if suffix == '.npz':
        np.savez(path, **model)
      else:
        safetensors.numpy.save_file(model, path)
    models = checkpoints.Ingredients(paths)
  with pytest.raises(ValueError, match=r'table.* holds 1099511627781, which'):
    run(models)
  if not suffix:  # Files are read in threads, which the context is not of.
    with _x64.x64():
      params = jaxsoup.uniform(models).params
      assert params['table'].tolist() == LARGE['table'].tolist()


def test_from_file_to_file_large_integers_are_kept(tmp_path):
  paths = [tmp_path / f'{k}.safetensors' for k in range(2)]
  for path, model in zip(paths, (LARGE, OTHER)):
    safetensors.numpy.save_file(model, path)
  out = tmp_path / 'soup.safetensors'
  checkpoints.save_average(out, checkpoints.Ingredients(paths))
  soup = safetensors.numpy.load_file(out)
  assert soup['table'].tolist() == LARGE['table'].tolist()
  # Equal in the lower half only.
  other = {**OTHER, 'table': LARGE['table'] + np.array([0, 2**32])}
  safetensors.numpy.save_file(other, paths[1])
  with pytest.raises(ValueError, match="leaf 'table' of dtype int64"):
    ingredients = checkpoints.Ingredients(paths)
    checkpoints.save_average(tmp_path / 'other.safetensors', ingredients)


def test_what_fits_is_taken():
  model = {'w': np.ones(2, np.float32), 'step': np.int64(2**31 - 1)}
  params = jaxsoup.average([model], [1.0]).params
  assert params['step'] == 2**31 - 1 and isinstance(params['step'], jax.Array)


WIDE = {'w': np.array([1 / 3, 2 / 3])}


@pytest.mark.parametrize('suffix', ['', '.safetensors'])
def test_float64_is_kept_by_files_and_rounded_with_a_word(tmp_path, suffix):
  path = checkpoints.save(tmp_path / f'x{suffix}', WIDE)
  stored = checkpoints.Arrays(path)['w']
  assert stored.dtype == np.float64 and stored.tolist() == WIDE['w'].tolist()
  words = r"holds float64 \('w'\), which becomes float32"
  with pytest.warns(UserWarning, match=f'x{suffix} {words}'):
    assert checkpoints.Ingredients([path])[0]['w'].dtype == np.float32
  with _x64.x64():
    params = jaxsoup.uniform([WIDE]).params
    assert params['w'].tolist() == WIDE['w'].tolist()
  out = tmp_path / 'soup.safetensors'
  checkpoints.save_average(out, checkpoints.Ingredients([path]))
  assert checkpoints.Arrays(out)['w'].tolist() == WIDE['w'].tolist()
