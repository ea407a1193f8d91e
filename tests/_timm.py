"""Models of timm and open_clip as references, from a process of their own.

They import torchvision, which other tests must not see: the interpreter is that
of JAXSOUP_TIMM_PYTHON, or this one.
"""

import functools
import json
import os
import pathlib
import sys
from typing import NamedTuple

import _forked
import numpy as np
import pytest
from safetensors import numpy as safetensors

MODULES = ('_timm_worker', 'timm', 'open_clip')
CODE = 'import sys, _timm_worker; _timm_worker.main(*sys.argv[1:])'


class Reference(NamedTuple):
  file: pathlib.Path
  data: dict[str, np.ndarray]


def run(name, folder, *, seed=0, given=None, **arguments) -> Reference:
  """A random model, its file, an input and its outputs; skips without timm.

  Args:
    name: of a model of timm, 'open_clip', or 'local-dir:' and the directory of
      a model, whose weights are then not random.
    folder: where its files lie; made if it is missing.
    seed: of the weights and the input.
    given: arrays by name to load (strictly) in place of random ones.
    **arguments: of the constructor, JSON values.
  """
  python = os.environ.get('JAXSOUP_TIMM_PYTHON', sys.executable)
  if not _has_timm(python):
    pytest.skip(f'{python} cannot import timm: set JAXSOUP_TIMM_PYTHON')
  folder.mkdir(parents=True, exist_ok=True)
  if given is not None:
    safetensors.save_file(given, folder / 'given.safetensors')
  command = ['-c', CODE, name, seed, folder, json.dumps(arguments)]
  done = _forked.run([python, *command], modules=MODULES)
  assert not done.returncode, done.stderr
  with np.load(folder / 'data.npz') as data:
    return Reference(folder / 'model.safetensors', dict(data))


@functools.cache
def _has_timm(python: str) -> bool:
  command = [python, '-c', 'import _timm_worker, timm']
  return not _forked.run(command, modules=MODULES).returncode
