"""Imports go down only: who may import whom, and which packages."""

import ast
import pathlib
import sys

import pytest

import jaxsoup

ROOT = pathlib.Path(jaxsoup.__file__).parent

# From the bottom up. A module may import those of its own layer and below.
LAYERS = (
    (
        '_files',
        '_soup',
        'typing',
        '_json',
        '_layers',
        '_masks',
        '_memory',
        '_processes',
        '_programs',
        '_tree',
        '_warnings',
        '_workers',
        '_checked',
        '_mixing',
        'runtime',
    ),
    (
        '_recipes',
        'black_box',
        'evaluation',
        'metrics',
        'ensembles',
        'landscape',
        'lora',
        'sharding',
        'statistics',
        'studies',
        'trajectory',
    ),
    ('checkpoints', 'diagnosis', 'report', 'scoring'),
    ('models', 'data', 'nnx'),
    ('train',),
    ('experiments',),
    ('plan', 'paper'),
    ('cli', 'commands', 'doctor'),
)
BASIC = {'jax', 'numpy', 'jaxsoup'}
FLAX = BASIC | {'flax', 'optax', 'ml_collections'}
ALLOWED = (
    BASIC | {'cloudpickle', 'etils', 'fsspec', 'ray', 'rich', 'tensorboardX'},
    BASIC | {'cma', 'optax', 'scipy'},
    BASIC
    | {'absl', 'etils', 'matplotlib', 'orbax', 'rich', 'scipy', 'tensorstore'}
    | {'h5py', 'huggingface_hub', 'msgpack', 'torch', 'xxhash'},
    BASIC
    | {'PIL', 'absl', 'etils', 'flax', 'grain', 'mlxtend', 'scipy'}
    | {'sentencepiece', 'sklearn', 'tensorflow_datasets', 'tokenizers'},
    FLAX | {'etils', 'orbax'},
    FLAX | {'absl', 'cloudpickle', 'rich'},
    FLAX | {'absl'},
    FLAX | {'rich', 'typer'},
)
MODULES = sorted(
    p
    for p in ROOT.rglob('*.py')
    # The face of all, and what sphinx reads.
    if p not in (ROOT / '__init__.py', ROOT / 'docs' / 'conf.py')
)


def _layer(module: str) -> int:
  layers = [i for i, names in enumerate(LAYERS) if module in names]
  assert layers, f'{module} has no layer: add it to LAYERS.'
  return layers[0]


def _imports(path: pathlib.Path) -> set[str]:
  """Full names of what a file imports, also inside its functions."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}: relative import'
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def _own(name: str) -> str:
  """The layer's name for an import of ours: `jaxsoup.x.y` is x."""
  second = (name.split('.') + [''])[1]
  is_module = (ROOT / second).is_dir() or (ROOT / f'{second}.py').exists()
  # `import jaxsoup` and `jaxsoup.uniform`: the face, whose names are recipes.
  return second if second and is_module else '_recipes'


@pytest.mark.parametrize(
    'path', MODULES, ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_go_down_only(path):
  module = path.relative_to(ROOT).parts[0].removesuffix('.py')
  layer = _layer(module)
  for name in _imports(path):
    package = name.split('.')[0]
    if package in sys.stdlib_module_names:
      continue
    assert package in ALLOWED[layer], f'{module} imports {name}'
    if package == 'jaxsoup':
      assert _layer(_own(name)) <= layer, f'{module} imports {name}'


def test_what_only_is_imported_from_above():
  """Nothing needs the paper's experiments; only they are run as a whole."""
  for path in MODULES:
    room = path.relative_to(ROOT).parts[0]
    for name in _imports(path):
      assert room == 'paper' or not name.startswith('jaxsoup.paper'), path
      is_script = name.startswith('jaxsoup.experiments.main')
      assert room == 'commands' or not is_script, path


@pytest.mark.parametrize(
    'room, unknown',
    [
        ('runtime', {'_soup', '_recipes', '_checked', '_mixing', 'evaluation'}),
        (
            'train',
            {'_soup', 'checkpoints', 'diagnosis', 'experiments', 'report'},
        ),
    ],
)
def test_rooms_do_not_know(room, unknown):
  for path in MODULES:
    if path.relative_to(ROOT).parts[0] == room:
      own = [n for n in _imports(path) if n.startswith('jaxsoup')]
      assert not unknown & set(map(_own, own)), path


def test_models_and_data_know_nothing_of_soups():
  for path in MODULES:
    if path.relative_to(ROOT).parts[0] in ('models', 'data'):
      own = {n for n in _imports(path) if n.startswith('jaxsoup')}
      # Trees and files of arrays; nothing that chooses or mixes.
      basic = (
          '_json',
          '_layers',
          '_masks',
          '_programs',
          '_tree',
          '_warnings',
          'checkpoints',
          'typing',
      )
      known = ('models', 'data', *basic)
      assert all(_own(n) in known for n in own), path


def test_the_face_is_complete():
  """What type checkers see is what there is at run time."""
  tree = ast.parse((ROOT / '__init__.py').read_text())
  block = next(node for node in tree.body if isinstance(node, ast.With))
  declared = {
      alias.asname: f'{node.module}.{alias.name}'
      for node in block.body
      for alias in node.names
  }
  assert sorted(declared) == jaxsoup.__all__
  for name, home in declared.items():
    value = getattr(jaxsoup, name)
    if hasattr(value, '__qualname__'):
      assert f'{value.__module__}.{value.__qualname__}' == home
