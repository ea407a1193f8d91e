"""Four virtual devices, two processes, and placements for every recipe."""

import os
import pathlib

import _xla

# Before jax is imported, or it has no effect.
os.environ['XLA_FLAGS'] = _xla.flags(4, os.environ.get('XLA_FLAGS', ''))
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# With the least effort the compiler of TPUs takes a fourth of the time. Where
# jax does not know this variable, it takes longer.
os.environ.setdefault('JAX_EXEC_TIME_OPTIMIZATION_EFFORT', '-1.0')
# What was compiled once is not compiled again: by other workers, by the
# processes that tests start, or the next time.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _root = pathlib.Path(__file__).parent.parent
  _cache = _root / 'build' / f'jax-{_xla.JAX_VERSION}'
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(_cache)
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

import functools
import gc
import sys

import hypothesis
import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

jax.devices()  # Now, before a command that is tested asks for other ones.

# Scripts that are run, and would run when doctest imports them.
collect_ignore = [
    '_bucket.py',
    '_distributed_worker.py',
    '_timm_worker.py',
    'benchmarks',
]

# The same examples in every run, and no time limit on a busy machine.
hypothesis.settings.register_profile(
    'jaxsoup', derandomize=True, deadline=None, max_examples=40, database=None
)
hypothesis.settings.load_profile('jaxsoup')


@pytest.fixture(autouse=True)
def _modules_of_a_test(request):
  """A module that a test wrote is gone with its folder."""
  if 'tmp_path' not in request.fixturenames:
    yield
    return
  folder, known = str(request.getfixturevalue('tmp_path')), set(sys.modules)
  yield
  for name in sys.modules.keys() - known:
    if (getattr(sys.modules[name], '__file__', '') or '').startswith(folder):
      del sys.modules[name]


@pytest.fixture
def decoded_mocks(monkeypatch):
  """What TFDS makes up for images that stay encoded needs TensorFlow."""
  name = 'jaxsoup.data.tfds._encoded_images'
  monkeypatch.setattr(name, lambda builder: None)


# The kernel's default limit on memory maps is 65,530 for each process, and XLA
# aborts when it reaches it.
MAX_MAPS = 30_000
# Files whose tests take up to a minute. They come first, or at the end one
# worker waits for another.
LONG = (
    'colabs_test.py',
    'distributed_test.py',
    'faults_test.py',
    'imagenet_configs_test.py',
    'plan_test.py',
)
_USAGES = pytest.StashKey[list[dict[str, int]]]()


def pytest_addoption(parser):
  parser.addoption(
      '--first',
      action='store_true',
      help='run each test with its first parameters only',
  )
  parser.addoption(
      '--soak',
      type=int,
      default=20,
      help='how many processes hostile/soak_test.py kills; of bytes it flips a '
      'hundred times as many',
  )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
  """The whole suite runs in one process per core; a part of it in one."""
  if (
      config.args_source == pytest.Config.ArgsSource.TESTPATHS
      and config.pluginmanager.hasplugin('xdist')
      and config.option.numprocesses is None
      and not hasattr(config, 'workerinput')  # Or each would start others.
  ):
    config.option.numprocesses = min(len(os.sched_getaffinity(0)), 8)
    config.option.dist = 'worksteal'


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
  first, others = {}, []
  for item in items:
    name = item.nodeid.partition('[')[0]
    if first.setdefault(name, item) is item:
      continue
    others.append(item)
    if item.get_closest_marker('slow_variants'):
      item.add_marker('slow')
  if config.getoption('--first'):
    config.hook.pytest_deselected(items=others)
    items[:] = first.values()
  items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish():
  """What is imported stays: no search for garbage needs to look at it."""
  gc.freeze()


@pytest.fixture(autouse=True, scope='module')
def _forget_programs():
  """A compiled program holds memory maps until it is dropped."""
  yield
  jax.clear_caches()


def _usage() -> dict[str, int]:
  """Memory maps now, and the largest resident memory in bytes until now."""
  process = pathlib.Path('/proc/self')
  if not process.is_dir():
    return {}
  status = (process / 'status').read_text()
  return {
      'maps': len((process / 'maps').read_text().splitlines()),
      'bytes': 1024 * int(status.partition('VmHWM:')[2].split()[0]),
  }


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
  """xdist: what a worker measured, for the summary."""
  usage = getattr(node, 'workeroutput', {}).get('usage')
  if usage:
    node.config.stash.setdefault(_USAGES, []).append(usage)


def pytest_sessionfinish(session):
  usage = _usage()
  if hasattr(session.config, 'workeroutput'):
    session.config.workeroutput['usage'] = usage
    return
  usages = session.config.stash.setdefault(_USAGES, [usage])
  if max((u.get('maps', 0) for u in usages), default=0) > MAX_MAPS:
    session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
  for usage in terminalreporter.config.stash.get(_USAGES, []):
    if usage:
      terminalreporter.write_line(
          f'process: {usage["maps"]:,} memory maps at the end (at most '
          f'{MAX_MAPS:,}), {usage["bytes"] / 1e9:.1f} GB at its peak',
          red=usage['maps'] > MAX_MAPS,
      )


@pytest.fixture(scope='session')
def uninterrupted(tmp_path_factory):
  """The workdir of a small experiment, finished and not to be changed."""
  import experiment_test

  workdir = tmp_path_factory.mktemp('uninterrupted')
  done = experiment_test.finish(workdir)
  assert 'best single' in done.stdout
  assert not (workdir / 'unfinished').exists()
  assert not (workdir / '.lock').exists()
  return workdir


class Placement:
  """Where arrays are put: on one device, or the first axis over four."""

  def __init__(self, axis_type: AxisType | None):
    self.mesh = None
    if axis_type is not None:
      self.mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(axis_type,))

  def put(self, x, axis: int = 0) -> jax.Array:
    x = np.asarray(x)
    if self.mesh is None:
      return jax.device_put(x)
    spec = [None] * x.ndim
    if x.ndim > axis:
      spec[axis] = 'fsdp'
    return jax.device_put(x, NamedSharding(self.mesh, PartitionSpec(*spec)))


@functools.cache
def _placement(name: str) -> Placement:
  types = {'auto': AxisType.Auto, 'explicit': AxisType.Explicit}
  return Placement(types.get(name))


@pytest.fixture(params=['one', 'auto', 'explicit'])
def placement(request) -> Placement:
  return _placement(request.param)


@pytest.fixture(params=['auto', 'explicit'])
def on_mesh(request) -> Placement:
  return _placement(request.param)


@pytest.fixture
def rng() -> np.random.Generator:
  return np.random.default_rng(0)
