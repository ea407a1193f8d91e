"""Executors of other libraries, on a local cluster of two workers each."""

import contextlib
import os
import subprocess
import sys

import _evals
import numpy as np
import pytest

import jaxsoup
from jaxsoup import checkpoints

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def of_dask(tmp_path):
  import distributed

  with (
      distributed.LocalCluster(
          n_workers=2,
          threads_per_worker=1,
          dashboard_address=None,
          local_directory=tmp_path,
      ) as cluster,
      distributed.Client(cluster) as client,
  ):
    yield client.get_executor()


@contextlib.contextmanager
def of_loky(tmp_path):
  import loky

  with loky.ProcessPoolExecutor(2) as executor:
    yield executor


@contextlib.contextmanager
def of_submitit(tmp_path):
  import submitit

  executor = submitit.AutoExecutor(tmp_path / 'jobs', cluster='local')
  executor.update_parameters(timeout_min=5)
  yield executor


@contextlib.contextmanager
def of_ray(tmp_path):
  import ray

  from jaxsoup.runtime import ray_executor

  ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
  try:
    with ray_executor.RayExecutor(2, num_cpus=1) as executor:
      yield executor
  finally:
    ray.shutdown()


ENGINES = {
    'dask': of_dask,
    'loky': of_loky,
    'ray': of_ray,
    'submitit': of_submitit,
}


def check(engine, folder):
  """The greedy soup of checkpoints; errors; a worker that dies once."""
  rng = np.random.default_rng(0)
  for k in range(3):
    w = (0.25 + 0.4 * rng.normal(size=4)).astype(np.float32)
    checkpoints.save(folder / f'run{k}', {'w': w})
  ingredients = checkpoints.Ingredients([folder / f'run{k}' for k in range(3)])
  expected = jaxsoup.greedy(ingredients, _evals.distance)
  with ENGINES[engine](folder) as executor:
    options = {'executor': executor, 'num_ahead': 2}
    soup = jaxsoup.greedy(ingredients, _evals.distance, **options)
    assert soup.info._replace(stale=0) == expected.info
    np.testing.assert_array_equal(soup.params['w'], expected.params['w'])
    with pytest.raises(KeyError, match='no such thing'):
      jaxsoup.greedy(ingredients, _evals.raises, order=[0], **options)
    if engine != 'loky':  # It is broken then.
      once = _evals.DiesOnce(str(folder / 'died'))
      soup = jaxsoup.greedy(ingredients, once, order=[0, 1, 2], **options)
      assert (folder / 'died').exists()
      serial = jaxsoup.greedy(ingredients, _evals.distance, order=[0, 1, 2])
      assert soup.info._replace(stale=0) == serial.info


@pytest.mark.parametrize('engine', ENGINES)
def test_engines(engine, tmp_path):
  """In a process of its own, which engines change for good."""
  module = {'dask': 'distributed'}.get(engine, engine)
  pytest.importorskip(module, reason=f'{module} is not installed')
  tests = os.path.dirname(__file__)
  path = os.pathsep.join([tests, *filter(None, sys.path)])
  code = (
      'import engines_test, pathlib, sys\n'
      'if __name__ == "__main__":\n'
      '  engines_test.check(sys.argv[1], pathlib.Path(sys.argv[2]))\n'
  )
  script = tmp_path / 'check.py'
  script.write_text(code)
  subprocess.run(
      [sys.executable, script, engine, tmp_path],
      env={**os.environ, 'PYTHONPATH': path},
      check=True,
      timeout=500,
  )
