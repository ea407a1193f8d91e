"""The learned soup streamed, against the resident one; and memory."""

import logging
import math
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsoup
from jaxsoup import _memory
from jaxsoup import checkpoints
from jaxsoup._checked import Checked
from jaxsoup._recipes import _streamed

NUM = 5
BATCHES = [np.float32(x) for x in (0.5, -1.0, 2.0)]


def models_of(dtype='float32', num=NUM):
  rng = np.random.default_rng(0)
  return [
      {
          'head': {'b': rng.normal(size=4).astype(jnp.dtype(dtype))},
          'body': {
              'w': rng.normal(size=(4, 8)).astype(jnp.dtype(dtype)),
              'b': rng.normal(size=8).astype(np.float32),
          },
          'step': np.int32(7),
      }
      for _ in range(num)
  ]


def loss_fn(params, batch, beta):
  floats = [x for x in jax.tree.leaves(params) if x.dtype != jnp.int32]
  wide = [x.astype(jnp.float32) for x in floats]
  return sum(jnp.mean((beta * jnp.sin(x) - batch) ** 2) for x in wide)


def learn(models, memory, **options):
  return jaxsoup.learned(
      models,
      loss_fn,
      BATCHES,
      **{'tx': optax.sgd(0.5), 'num_epochs': 2, 'memory': memory, **options},
  )


def assert_equal_soups(actual, expected, rtol=2e-5, params_rtol=None):
  close = lambda tolerance: lambda x, y: np.testing.assert_allclose(
      np.float32(x), np.float32(y), rtol=tolerance, atol=3e-5
  )
  jax.tree.map(close(rtol), actual.alpha, expected.alpha)
  jax.tree.map(close(params_rtol or rtol), *jax.device_get(
      (actual.params, expected.params)
  ))  # fmt: skip
  np.testing.assert_allclose(actual.info.losses, expected.info.losses, rtol)
  assert actual.info.beta == pytest.approx(expected.info.beta, rel=rtol)


@pytest.mark.slow_variants
@pytest.mark.parametrize('num_keys', [0, 1, 9])
@pytest.mark.parametrize(
    'options',
    [
        {},
        {'beta': 1.5},
        {'alpha_fn': jaxsoup.hyperplane},
        {'val_batches': BATCHES, 'patience': 1},
        {'memory': 'cached'},
    ],
    ids=lambda options: '-'.join(options) or 'plain',
)
def test_equals_the_resident_one(num_keys, options):
  options = {'memory': 'streamed', **options}
  options['group_fn'] = lambda path: path[:num_keys]
  # So that copies in float16 are exact.
  exact = lambda x: x.astype(jnp.float16).astype(x.dtype)
  models = jax.tree.map(exact, models_of())
  streamed = learn(models, **options)
  assert streamed.info.plan.memory == options['memory']
  expected = learn(models, **options | {'memory': 'resident'})
  assert expected.info.plan.memory == 'resident'
  uniform = jax.tree.map(lambda a: np.full(NUM, 1 / NUM), expected.alpha)
  moved = jax.tree.map(
      lambda x, y: np.abs(x - y).max(), uniform, streamed.alpha
  )
  assert max(jax.tree.leaves(moved)) > 1e-3  # There was something to learn.
  assert_equal_soups(streamed, expected)
  np.testing.assert_allclose(
      streamed.info.val_losses, expected.info.val_losses, rtol=2e-5
  )


@pytest.mark.slow_variants
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_equals_the_resident_one_in_narrow_dtypes(dtype):
  models = models_of(dtype)
  # The mixed model is rounded: sums in another order may round otherwise.
  step = float(jnp.finfo(dtype).eps)
  streamed, resident = (learn(models, x) for x in ('streamed', 'resident'))
  assert_equal_soups(streamed, resident, step, 2 * step)


@pytest.mark.slow_variants
@pytest.mark.parametrize('num_keys', [0, 1])
def test_on_a_mesh(on_mesh, num_keys):
  group_fn = lambda path: path[:num_keys]
  put = lambda x: on_mesh.put(x, axis=max(x.ndim - 1, 0))
  models = [jax.tree.map(put, m) for m in models_of()]
  with jax.set_mesh(on_mesh.mesh):
    streamed = learn(models, 'streamed', group_fn=group_fn)
  expected = learn(models_of(), 'resident', group_fn=group_fn)
  assert_equal_soups(streamed, expected)
  sharding = jax.tree.leaves(streamed.params)[1].sharding
  assert not sharding.is_fully_replicated


def test_is_deterministic_and_makes_no_implicit_transfer():
  models = models_of()
  with jax.transfer_guard('disallow'):
    options = {'memory': 'streamed', 'val_batches': BATCHES}
    one, two = (learn(models, **options) for _ in range(2))
  equal = lambda x, y: np.testing.assert_array_equal(x, y)
  jax.tree.map(equal, *jax.device_get((one.params, two.params)))
  equal(one.alpha, two.alpha)


class Counted(list):
  """Makes ingredients anew; counts reads, and those alive at once."""

  def __init__(self, models):
    super().__init__(models)
    self.alive = self.most_alive = 0
    self.reads = []

  def __getitem__(self, k):
    self.reads.append(k)
    params = jax.tree.map(jnp.array, super().__getitem__(k))
    self.alive += 1
    self.most_alive = max(self.most_alive, self.alive)
    weakref.finalize(params['body']['w'], self._died)
    return params

  def _died(self):
    self.alive -= 1


@pytest.mark.parametrize('num', [3, 8, 20])
def test_few_ingredients_are_alive_at_once(num):
  counted = Counted(models_of(num=num))
  soup = learn(counted, 'streamed', val_batches=BATCHES)
  assert counted.most_alive <= 2
  # A step mixes and takes inner products; walks turn round, so that the last
  # ingredient is there. Three validations and the soup itself mix once each.
  walks = 2 * 2 * len(BATCHES) + 3 + 1
  assert len(counted.reads) == num + (walks - 1) * (num - 1)
  assert soup.info.plan.reads_per_step == 2 * (num - 1)


def live_bytes_in_a_step(num):
  """The most that lives when an ingredient is read, beyond the start."""
  shape = (64, 256)
  most = [0]

  class Lazy(list):

    def __getitem__(self, k):
      array = jnp.full(shape, k / num, jnp.float32)
      live = sum(x.nbytes for x in jax.live_arrays())
      most[0] = max(most[0], live)
      return {'w': array}

  before = sum(x.nbytes for x in jax.live_arrays())
  jaxsoup.learned(
      Lazy(range(num)),
      lambda params, batch, beta: jnp.sum((params['w'] - batch) ** 2),
      BATCHES,
      tx=optax.sgd(1e-6),
      num_epochs=1,
      memory='streamed',
  )
  return (most[0] - before) / math.prod(shape) / 4


@pytest.mark.parametrize('num', [3, 16, 48])
def test_a_step_holds_three_models(num):
  assert live_bytes_in_a_step(num) <= 3.05


def test_a_cache_is_read_once_and_costs_accuracy_in_alpha_only():
  counted = Counted(models_of())
  soup = learn(counted, 'cached')
  assert sorted(counted.reads) == sorted([*range(NUM)] * 2)
  assert soup.info.plan.reads_per_step == 0
  exact = learn(models_of(), 'streamed')
  assert np.abs(soup.alpha - exact.alpha).max() > 0  # It was rounded.
  np.testing.assert_allclose(soup.alpha, exact.alpha, atol=5e-3)
  expected = jaxsoup.average(models_of(), soup.alpha).params
  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6)
  jax.tree.map(close, jax.device_get(soup.params), jax.device_get(expected))


def test_a_narrow_float_is_cached_as_it_is():
  models = [m['head'] for m in models_of('float16')]
  cached, streamed = (learn(models, x) for x in ('cached', 'streamed'))
  np.testing.assert_array_equal(cached.alpha, streamed.alpha)


@pytest.mark.parametrize('scale', [2.0**20, 2.0**-40, 0.0])
def test_a_cache_holds_what_is_beyond_float16(scale):
  models = [jax.tree.map(lambda x: scale * x, m) for m in models_of()]
  source = _streamed.Source(checked := Checked(models), checked[0], True)
  for x, y in zip(source[1], checked[1], strict=True):
    np.testing.assert_allclose(x, y, rtol=2**-8)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('memory', ['resident', 'streamed'])
def test_complex_models(memory):
  """The loss is lowest at 0.75 of the first: alpha is real."""
  models = [{'w': np.complex64([x, 1j * x])} for x in (1, 2)]
  loss_fn = lambda params, batch, beta: jnp.sum(
      jnp.abs(params['w'] - batch) ** 2
  )
  soup = jaxsoup.learned(
      models, loss_fn, [np.complex64([1.25, 1.25j])], tx=optax.adam(0.1),
      num_epochs=200, memory=memory,
  )  # fmt: skip
  np.testing.assert_allclose(soup.alpha, [0.75, 0.25], atol=1e-3)


@pytest.mark.parametrize('memory', ['auto', 'resident', 'streamed', 'cached'])
def test_one_ingredient(memory):
  (model,) = models_of(num=1)
  soup = learn([model], memory)
  np.testing.assert_allclose(soup.params['body']['w'], model['body']['w'])


# --- Which mode, and why -----------------------------------------------------


@pytest.mark.parametrize(
    'free, memory, num_reads', [(10**9, 'resident', 0), (1000, 'streamed', 8)]
)
def test_streams_what_does_not_fit(monkeypatch, free, memory, num_reads):
  monkeypatch.setattr(_memory, 'free_bytes', lambda device: free)
  counted, told = Counted(models_of()), []
  info = lambda text, *args: told.append((text % args, list(counted.reads)))
  monkeypatch.setattr(logging.getLogger('jaxsoup'), 'info', info)
  plan = learn(counted, 'auto').info.plan
  said = f'learned: {memory}, {num_reads} reads per step; {plan.reason}.'
  assert told == [(said, [0])]
  assert plan.memory == memory
  assert plan.resident_bytes == (NUM + 3) * (4 + 32 + 8) * 4
  assert plan.free_bytes == free
  assert ('does not fit' in plan.reason) == (memory == 'streamed')


def test_memory_that_is_none_of_the_four():
  counted = Counted(models_of())
  with pytest.raises(ValueError, match="memory is True: .*'auto' .*'cached' "):
    learn(counted, True)
  assert counted.reads == []


def test_a_sharded_stack_counts_once_on_a_cpu(on_mesh):
  put = lambda x: on_mesh.put(x, axis=max(x.ndim - 1, 0))
  models = [{'w': put(m['body']['w'])} for m in models_of()]
  soup = learn(models, 'streamed')
  assert soup.info.plan.resident_bytes == (NUM + 3) * 32 * 4


def test_resident_says_what_to_do_when_memory_runs_out():
  def exhausted(params, batch, beta):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 1 GB')

  options = {'tx': optax.sgd(0.1), 'memory': 'resident'}
  with pytest.raises(MemoryError, match="pass memory='streamed'.*1 GB"):
    jaxsoup.learned(models_of(), exhausted, BATCHES, **options)


def test_an_ingredient_that_vanishes_between_two_reads(tmp_path):
  runs = [tmp_path / str(k) for k in range(3)]
  for run, model in zip(runs, models_of()):
    checkpoints.save(run, model)
  ingredients = checkpoints.Ingredients(runs)
  steps = []

  class Batches:

    def __iter__(self):
      yield BATCHES[0]
      steps.append(0)
      runs[1].rename(tmp_path / 'gone')
      yield BATCHES[1]

  with pytest.raises((OSError, ValueError), match=str(runs[1])):
    options = {'tx': optax.sgd(0.1), 'memory': 'streamed'}
    jaxsoup.learned(ingredients, loss_fn, Batches(), **options)
  assert steps == [0]


def test_a_plan_is_stored_with_the_soup(tmp_path):
  soup = learn(models_of(), 'streamed')
  checkpoints.save(tmp_path / 'soup', soup)
  assert checkpoints.load(tmp_path / 'soup').info.plan == soup.info.plan


# --- Free memory -------------------------------------------------------------


def files(root, contents):
  for name, text in contents.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


MEMINFO = {'proc/meminfo': 'MemTotal: 9000 kB\nMemAvailable:   5000 kB\n'}
TWO = {'proc/self/cgroup': '0::/a/b\n'}
ONE = {'proc/self/cgroup': '9:name=x:/\n4:cpu,memory:/a\n'}


@pytest.mark.parametrize(
    'contents, expected',
    [
        (MEMINFO, 5000 * 1024),
        (MEMINFO | TWO, 5000 * 1024),
        (
            MEMINFO
            | TWO
            | {
                'sys/fs/cgroup/a/memory.max': '1000000\n',
                'sys/fs/cgroup/a/memory.current': '300000\n',
                'sys/fs/cgroup/a/memory.stat': 'anon 1\ninactive_file 50000\n',
                'sys/fs/cgroup/a/b/memory.max': 'max\n',
                'sys/fs/cgroup/a/b/memory.current': '100\n',
            },
            750000,
        ),
        (
            MEMINFO
            | ONE
            | {
                'sys/fs/cgroup/memory/a/memory.limit_in_bytes': '2000',
                'sys/fs/cgroup/memory/a/memory.usage_in_bytes': '500',
                'sys/fs/cgroup/memory/a/memory.stat': 'total_inactive_file 7',
            },
            1507,
        ),
        (  # In a container the path is the host's, and the mount is its own.
            MEMINFO
            | ONE
            | {
                'sys/fs/cgroup/memory/memory.limit_in_bytes': '2000',
                'sys/fs/cgroup/memory/memory.usage_in_bytes': '3000',
            },
            0,
        ),
    ],
    ids=['system', 'no limit', 'version 2', 'version 1', 'container'],
)
def test_free_bytes_of_the_host(tmp_path, contents, expected):
  files(tmp_path, contents)
  assert _memory.host_free_bytes(tmp_path) == expected


def test_free_bytes_without_proc(tmp_path):
  assert _memory.host_free_bytes(tmp_path) > 10**8


def test_free_bytes_of_a_device():
  class Device:
    platform = 'gpu'

    def memory_stats(self):
      return {'bytes_limit': 100, 'bytes_in_use': 30}

  assert _memory.free_bytes(Device()) == 70
  assert _memory.free_bytes(jax.devices('cpu')[0]) > 0
