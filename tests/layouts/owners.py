"""Owners of checkpoint layouts: their packages, and runs that they saved.

`golden/OWNER/LAYOUT.tar.xz` holds `run0` and `run1`, two runs of one structure
that the owner's own library saved, by `OWNER_layouts.py`. Each owner has an
environment of its own, made by `.ci/owners`, in `$JAXSOUP_OWNERS`.

  python tests/layouts/owners.py generate FOLDER [OWNER...]
  python tests/layouts/owners.py check FOLDER [OWNER...]

`check` averages the two runs with `jaxsoup soup uniform` and restores the soup
as its owner does. It prints a table.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
from typing import NamedTuple

import numpy as np

HERE = pathlib.Path(__file__).absolute().parent
GOLDEN = HERE / 'golden'


class Owner(NamedTuple):
  """A library that saves checkpoints.

  Attributes:
    python: the version it is run with.
    requirements: what is installed, for pip.
    layouts: the suffix of a run, by layout; none: it is a directory.
    without_dependencies: packages whose own requirements are not wanted.
  """

  python: str
  requirements: tuple[str, ...]
  layouts: dict[str, str]
  without_dependencies: tuple[str, ...] = ()


_JAX = ('jax==0.12.0.1', 'orbax-checkpoint==0.12.8')
_FLAX = (*_JAX, 'flax==0.12.12')
# Its build for CPUs; where there is none, gigabytes.
_TORCH = ('torch==2.13.0', 'numpy==2.4.6')

OWNERS = {
    'orbax': Owner(
        '3.12',
        _JAX,
        dict.fromkeys(
            (
                'pytree',
                'standard',
                'manager_default',
                'manager_items',
                'v1_pytree',
                'v1_checkpointables',
                'v1_training',
            ),
            '',
        ),
    ),
    'flax': Owner(
        '3.12',
        _FLAX,
        dict.fromkeys(
            (
                'imagenet_msgpack',
                'imagenet_orbax',
                'imagenet_manager',
                'nnx_guide',
                'nnx_guide_keys',
                'nnx_guide_pure_dict',
                'nnx_example',
            ),
            '',
        ),
    ),
    'maxtext': Owner(
        '3.12',
        (
            'maxtext==0.2.5',
            *_FLAX,
            # Its extras list what accelerators need too.
            *('absl-py', 'aqtp', 'array-record', 'blobfile', 'chex'),
            *('cloud-accelerator-diagnostics', 'datasets', 'drjax>=0.2.1'),
            *('evaluate', 'gcsfs', 'google-api-python-client'),
            *('google-cloud-aiplatform', 'google-cloud-mldiagnostics'),
            *('google-cloud-monitoring', 'grain[parquet]', 'huggingface_hub'),
            *('jaxtyping', 'jinja2', 'jsonlines', 'math-verify'),
            *('ml-collections', 'ml-goodput-measurement', 'nltk', 'omegaconf'),
            *('optax', 'pathwaysutils>=0.1.11', 'pillow', 'protobuf'),
            *('pydantic', 'qwix>=0.1.6', 'sentencepiece', 'shortuuid'),
            *('tensorboard-plugin-profile', 'tensorboardx', 'tiktoken'),
            *('tokamax>=0.0.14,!=0.1.0', 'transformers>=5.8.0'),
        ),
        {'state': '', 'params': ''},
    ),
    'tunix': Owner(
        '3.12', ('google-tunix==0.1.7', *_FLAX), {'model': '', 'training': ''}
    ),
    'gemma': Owner(
        '3.12',
        # Its sentencepiece wants a newer protobuf than it asks for.
        ('gemma==4.0.1', 'protobuf>=7.36.1', *_FLAX),
        {'nested': '', 'flat': '', 'stacked': ''},
    ),
    'kauldron': Owner('3.12', ('kauldron==1.4.4', *_FLAX), {'training': ''}),
    'keras': Owner(
        '3.12',
        ('keras==3.15.1', 'h5py==3.16.0', *_JAX),
        {'weights': '.weights.h5', 'model': '.keras', 'orbax': ''},
    ),
    'equinox': Owner(
        '3.12', ('equinox==0.13.8', 'jax==0.12.0.1'), {'leaves': '.eqx'}
    ),
    'transformers_flax': Owner(
        '3.12',
        ('transformers==4.57.6', *_FLAX),
        {'msgpack': '', 'msgpack_sharded': ''},
    ),
    'transformers': Owner(
        '3.11',
        (*_TORCH, 'transformers==4.57.6', 'sentence-transformers==5.7.0'),
        {'sharded_bin': '', 'sharded_safetensors': '', 'sentence': ''},
    ),
    'lightning': Owner(
        '3.11', (*_TORCH, 'lightning==2.6.6'), {'checkpoint': '.ckpt'}
    ),
    'timm': Owner(
        '3.11',
        (*_TORCH, 'huggingface_hub', 'pillow', 'pyyaml', 'safetensors', 'tqdm'),
        {'training': '.pth.tar'},
        ('timm==1.0.31', 'torchvision==0.28.0'),
    ),
}


def environments() -> pathlib.Path:
  """Where the owners' environments are."""
  default = pathlib.Path.home() / '.cache' / 'jaxsoup-owners'
  return pathlib.Path(os.environ.get('JAXSOUP_OWNERS', default))


def run(
    owner: str, *jobs: tuple[str, str, pathlib.Path, object]
) -> list[str | None]:
  """Runs an owner's script in the owner's environment.

  Args:
    owner: a key of `OWNERS`.
    *jobs: `(action, layout, run, seed or file to write)`.

  Returns:
    What the owner says against each job; None: it was done.
  """
  python = environments() / owner / 'bin' / 'python'
  environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  environment |= {'JAX_PLATFORMS': 'cpu', 'KERAS_BACKEND': 'jax'}
  done = subprocess.run(
      [python, HERE / f'{owner}_layouts.py']
      + [':'.join(map(str, job)) for job in jobs],
      capture_output=True,
      text=True,
      env=environment,
      cwd=HERE,
  )
  if done.returncode:
    raise RuntimeError(f'{owner} ended with {done.returncode}: {done.stderr}')
  return json.loads(done.stdout.rstrip().split('\n')[-1])


def unpack(owner: str, layout: str, folder: pathlib.Path) -> list[pathlib.Path]:
  """The two runs of a layout, unpacked into a folder."""
  with tarfile.open(GOLDEN / owner / f'{layout}.tar.xz') as archive:
    archive.extractall(folder, filter='data')
  suffix = OWNERS[owner].layouts[layout]
  return [folder / f'run{i}{suffix}' for i in range(2)]


def read(file: pathlib.Path) -> dict[str, np.ndarray]:
  """What `restore` and `resume` wrote: leaves by path, and their types."""
  with np.load(file) as arrays:
    return dict(arrays)


def generate(folder: pathlib.Path, owner: str) -> None:
  """Writes the archives of an owner into a folder."""
  layouts = OWNERS[owner].layouts
  paths = {
      layout: [folder / owner / layout / f'run{i}{suffix}' for i in range(2)]
      for layout, suffix in layouts.items()
  }
  jobs = []
  for layout, runs in paths.items():
    runs[0].parent.mkdir(parents=True)
    jobs += [('save', layout, r, seed) for seed, r in enumerate(runs)]
  for job, said in zip(jobs, run(owner, *jobs), strict=True):
    if said:
      raise RuntimeError(f'{job}: {said}')
  for layout, runs in paths.items():
    archive = folder / owner / f'{layout}.tar.xz'
    with tarfile.open(archive, 'w:xz', preset=9) as tar:
      for path in runs:
        tar.add(path, path.name, filter=_anonymous)
    shutil.rmtree(runs[0].parent)
    print(f'{archive}: {archive.stat().st_size:,} bytes', flush=True)


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
  info.uid = info.gid = 0
  info.uname = info.gname = ''
  return info


def check(folder: pathlib.Path, owner: str) -> None:
  """Prints what becomes of a soup of each layout, as rows of a table."""
  jobs, rows = [], {}
  for layout, suffix in OWNERS[owner].layouts.items():
    work = folder / owner / layout
    work.mkdir(parents=True)
    runs = unpack(owner, layout, work)
    # Which timm prefers when it loads.
    item = ('--item', 'state_dict_ema') if owner == 'timm' else ()
    for action, options in (('restore', item), ('resume', ('--whole',))):
      soup = work / action / f'soup{suffix}'
      soup.parent.mkdir()
      status, text = _soup_uniform(*runs, '--out', soup, *options)
      rows.setdefault(layout, text if status else 'done')
      jobs += [
          (action, layout, path, f'{path}.{action}.npz')
          for path in (*runs, soup)
      ]
  said = dict(zip(jobs, run(owner, *jobs), strict=True))
  for layout, row in rows.items():
    cells = [owner, layout, row]
    for action in ('restore', 'resume'):
      done = [j for j in said if j[:2] == (action, layout)]
      errors = [said[job] for job in done]
      cells.append(next(filter(None, errors), '') or _compared(*done))
    print('| ' + ' | '.join(' '.join(c.split()) for c in cells), flush=True)


def _soup_uniform(*arguments: object) -> tuple[int, str]:
  """The exit status of the command, and what it printed last."""
  program = 'from jaxsoup import cli; cli.main()'
  done = subprocess.run(
      [sys.executable, '-c', program, 'soup', 'uniform', *arguments],
      capture_output=True,
      text=True,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )
  return done.returncode, (done.stdout + done.stderr)[-500:]


def _compared(*jobs) -> str:
  if not pathlib.Path(jobs[0][-1]).exists():
    return 'the same'
  first, second, soup = (read(job[-1]) for job in jobs)
  return differences(first, second, soup) or f'equal ({len(soup)} leaves)'


def differences(first, second, soup) -> str:
  """Where a soup is not the mean of two runs; empty if it is."""
  types = [json.loads(str(x.pop('types'))) for x in (first, soup)]
  said, others = [], []
  if missing := first.keys() - soup.keys():
    said.append(f'{len(missing)} leaves missing: {sorted(missing)[:3]}')
  if extra := soup.keys() - first.keys():
    said.append(f'{len(extra)} leaves more: {sorted(extra)[:3]}')
  for path in sorted(first.keys() & soup.keys()):
    a, b, x = first[path], second[path], soup[path]
    mean = (a + b) / 2 if a.dtype.kind == 'f' else a
    if a.shape != x.shape:
      said.append(f'{path}: shape {x.shape}, not {a.shape}')
    elif not np.array_equal(mean, x):
      is_first = ' (those of the first run)' * np.array_equal(x, a)
      said.append(f'{path}: other values{is_first}')
    elif types[0][path] != types[1][path]:
      others.append(f'{path}: {types[1][path]}, not {types[0][path]}')
  if others and not said:
    return f'equal, but of other types: {len(others)} leaves, {others[0]}'
  return '; '.join(said[:4]) + f' and {len(said) - 4} more' * (len(said) > 4)


def main() -> None:
  """Does what the command line says."""
  action, *arguments = sys.argv[1:]
  if action == 'list':  # What `.ci/owners` reads.
    for name in arguments or OWNERS:
      owner = OWNERS[name]
      packages = (owner.requirements, owner.without_dependencies)
      print(name, owner.python, *map(' '.join, packages), sep='\t')
    return
  folder, *names = arguments
  for name in names or OWNERS:
    {'generate': generate, 'check': check}[action](pathlib.Path(folder), name)


if __name__ == '__main__':
  main()
