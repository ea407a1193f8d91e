"""The code in the README runs."""

import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoup import checkpoints

README = pathlib.Path(__file__).parent.parent / 'README.md'
BLOCKS = re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL)


@pytest.fixture
def names(tmp_path, monkeypatch):
  """What the reader has: a Flax model, its fine-tuned runs, held-out data."""
  from flax import nnx

  monkeypatch.chdir(tmp_path)
  build = lambda seed: nnx.Linear(4, 3, rngs=nnx.Rngs(seed))
  graphdef = nnx.graphdef(build(0))
  init_params = lambda: nnx.state(build(0), nnx.Param)
  rng = np.random.default_rng(0)
  held_out = {
      'image': rng.normal(size=(20, 4)).astype(np.float32),
      'label': rng.integers(3, size=20),
  }
  for seed in range(4):
    path = tmp_path / 'runs' / f'{seed:02d}'
    checkpoints.save(path, nnx.state(build(seed), nnx.Param))
  return {
      'finetuned': [build(seed) for seed in range(4)],
      'graphdef': graphdef,
      'held_out': held_out,
      'init_params': init_params,
      'jax': jax,
      'jnp': jnp,
      'nnx': nnx,
      'run_dirs': sorted((tmp_path / 'runs').iterdir()),
      'workdir': tmp_path,
  }


def test_there_are_blocks():
  assert len(BLOCKS) >= 4


def test_blocks_run_in_their_order(names):
  for block in BLOCKS:
    exec(compile(block, 'README.md', 'exec'), names)
  assert (names['workdir'] / 'soup').is_dir()


def test_files_named_in_the_readme_exist():
  for target in re.findall(r'\]\((?!http)([^)#]+)\)', README.read_text()):
    assert os.path.exists(README.parent / target), target
