"""The experiment on BatchNorm: its config, and soups with three statistics."""

import gzip
import json
import pathlib
import struct

from flax import nnx
import jax
import ml_collections
import numpy as np
import pytest

from jaxsoup import checkpoints
from jaxsoup import evaluation
from jaxsoup.data import cifar
from jaxsoup.data import fashion
from jaxsoup.data import preparation
from jaxsoup.data import sources
from jaxsoup.experiments import architectures
from jaxsoup.experiments import configs
from jaxsoup.experiments import cook
from jaxsoup.experiments import main
from jaxsoup.train import modeling

FILE = f'{pathlib.Path(__file__).parent.parent}/configs/cifar100_cnn.py'
NUMS = {'train': 60, 't10k': 30}
WAYS = ('averaged', 'first', 're-estimated')


# --- Statistics, of one layer -------------------------------------------------


class Tiny(nnx.Module):
  """BatchNorm and a head."""

  def __init__(self, rngs):
    self.norm = nnx.BatchNorm(3, use_running_average=True, rngs=rngs)
    self.head = nnx.Linear(3, 2, rngs=rngs)

  def __call__(self, image):
    return self.head(self.norm(image).mean((1, 2)))


@pytest.fixture(scope='module')
def tiny():
  return modeling.of_module(
      lambda key: Tiny(nnx.Rngs(key)),
      inputs={'image': (4, 4, 3)},
      num_classes=2,
      image=preparation.ImageSpec(4, preparation.HALF, preparation.HALF),
  )


def images(num, seed=0):
  rng = np.random.default_rng(seed)
  image = rng.random((num, 4, 4, 3)) * [1.0, 0.5, 0.2]
  label = rng.integers(0, 2, num)
  return sources.Arrays(
      {'image': image.astype(np.float32), 'label': label.astype(np.int32)}
  )


def params_of(tiny, mean):
  params = tiny.init_fn(jax.random.key(0))
  params['norm']['mean'] = np.full(3, mean, np.float32)
  return params


def fns_of(tiny, **settings):
  config = ml_collections.ConfigDict(
      {'seed': 0, 'finetune': dict(num_epochs=1, batch_size=8), **settings}
  )
  for name in ('warmup', 'final'):
    config.finetune[name] = 0.0
  best = params_of(tiny, 5.0)
  return cook.statistics_fns(config, tiny, [{}], images(20), lambda: best)


def test_three_kinds_of_statistics(tiny):
  params = params_of(tiny, 3.0)
  fns = fns_of(tiny)
  assert list(fns) == list(WAYS)
  by_way = {way: fn(params) for way, fn in fns.items()}
  for x in by_way.values():
    for name in ('scale', 'bias'):
      np.testing.assert_array_equal(x['norm'][name], params['norm'][name])
    np.testing.assert_array_equal(x['head']['kernel'], params['head']['kernel'])
  assert set(by_way['averaged']['norm']['mean'].tolist()) == {3.0}
  assert set(by_way['first']['norm']['mean'].tolist()) == {5.0}
  # Two batches of eight, in the order of that seed, prepared.
  walk = sources.batches(images(20), 8, seed=0)
  seen = 2 * np.concatenate([batch['image'] for batch in walk]) - 1
  assert len(seen) == 16
  norm = by_way['re-estimated']['norm']
  np.testing.assert_allclose(norm['mean'], seen.mean((0, 1, 2)), atol=1e-6)
  np.testing.assert_allclose(norm['var'], seen.var((0, 1, 2)), atol=1e-6)
  few = fns_of(tiny, num_batch_norm_batches=1)['re-estimated'](params)
  np.testing.assert_allclose(
      few['norm']['mean'], seen[:8].mean((0, 1, 2)), atol=1e-6
  )


def test_the_searches_take_one_of_them(tiny):
  assert list(fns_of(tiny, batch_norm='first'))[0] == 'first'
  with pytest.raises(configs.UsageError, match="'last'.*averaged, first"):
    fns_of(tiny, batch_norm='last')
  config = ml_collections.ConfigDict()
  linear = modeling.linear(3, 2)
  assert not cook.statistics_fns(config, linear, [], images(8), dict)


def test_the_search_scores_what_was_prepared(tiny):
  data = images(20)
  eval_fn = evaluation.mean_of(
      lambda params, batch: tiny.logits_fn(params, batch).argmax(-1)
      == batch['label'],
      evaluation.batched(data.arrays, 4),
  )
  fn = fns_of(tiny)['first']
  prepared = cook._prepared(eval_fn, fn)
  params = params_of(tiny, -4.0)
  expected = eval_fn(fn(params))
  assert prepared(params) == expected
  assert prepared.at_least(params, expected) == expected
  assert prepared.at_least(params, 1.1).bound < 1.1
  assert not hasattr(cook._prepared(lambda params: 0.0, fn), 'at_least')


# --- The config ---------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The files of Fashion-MNIST, with few examples: noise."""
  rng = np.random.default_rng(0)
  for prefix, num in NUMS.items():
    for kind, header, shape in (
        ('images-idx3', (0x803, num, 28, 28), (num, 28, 28)),
        ('labels-idx1', (0x801, num), (num,)),
    ):
      top = 256 if kind.startswith('images') else 10
      array = rng.integers(0, top, shape, np.uint8)
      content = struct.pack(f'>{len(header)}I', *header) + array.tobytes()
      path = tmp_path / f'{prefix}-{kind}-ubyte.gz'
      path.write_bytes(gzip.compress(content))
  parts = {'train': ('train', 60), 'test': ('t10k', 30)}
  monkeypatch.setattr(fashion, '_PARTS', parts)
  return tmp_path


def small(folder, arg, **changes):
  """The experiment with a network that compiles in a second."""
  experiment = configs.load(
      f'{FILE}:runlocal,{arg}',
      [
          f'--config.data.path={folder}',
          '--config.data.sizes.train=24',
          '--config.data.sizes.held_out=20',
          '--config.data.sizes.test=15',
          '--config.data.shift_size=10',
          '--config.finetune.batch_size=8',
          '--config.sweep.num_runs=3',
          '--config.num_splits=2',
      ],
  )
  config = experiment.config
  with config.unlocked():
    config.model = dict(
        family='resnet', num_classes=10, depths=(1,), width=4,
        is_bottleneck=False,
    )  # fmt: skip
    config.image.size = 16
    config.shifts = dict(noise=0.2, contrast=0.5)
    config.update(changes)
  return experiment


@pytest.mark.slow
@pytest.mark.parametrize('start', ['scratch_shared', 'scratch_apart'])
def test_every_soup_in_three_ways(folder, tmp_path, start):
  experiment = small(folder, f'resnet,{start}', batch_norm='re-estimated')
  rows = main.run(experiment, tmp_path / 'work')
  names = [row.name for row in rows if row.kind == 'soup']
  ways = ('re-estimated', 'averaged', 'first')
  assert names == [
      *(f'{r}, {w}' for r in ('uniform', 'greedy', 'pruned') for w in ways),
      'best single, re-estimated',
  ]
  results = json.loads((tmp_path / 'work/results.json').read_text())
  assert len(results['splits']) == 2
  assert '| uniform, first |' in (tmp_path / 'work/table.md').read_text()

  runs = [
      checkpoints.Ingredients([path])[0]
      for path in sorted((tmp_path / 'work/runs').iterdir())
  ]
  split = tmp_path / 'work/splits/0'
  soups = {
      w: checkpoints.load(split / f'soups/uniform_{w}').params for w in WAYS
  }
  mean = jax.tree.map(lambda *x: np.mean(x, 0), *runs)
  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, soups['averaged'], mean)
  scores = json.loads((tmp_path / 'work/results.json').read_text())['splits'][0]
  best = int(np.argmax([row['held_out'] for row in scores[:3]]))
  for way in WAYS:
    for name in ('scale', 'bias'):
      close(soups[way]['norm_stem'][name], mean['norm_stem'][name])
  for name in ('mean', 'var'):
    first = runs[best]['norm_stem'][name]
    close(soups['first']['norm_stem'][name], first)
    new = soups['re-estimated']['norm_stem'][name]
    assert np.abs(new - mean['norm_stem'][name]).max() > 1e-4
  # Runs of one start are near each other; those of several are not.
  distance = np.abs(
      runs[0]['conv_stem']['kernel'] - runs[1]['conv_stem']['kernel']
  )
  assert (distance.mean() > 0.05) == (start == 'scratch_apart')
  # The searches scored what they kept, with the statistics they chose by.
  greedy = checkpoints.load(split / 'soups/greedy_re-estimated')
  row = next(r for r in scores if r['name'] == 'greedy, re-estimated')
  assert row['held_out'] == pytest.approx(greedy.info.score)


@pytest.mark.slow
@pytest.mark.parametrize(
    'arg, family, start',
    [
        ('', 'efficientnet', 'pretrained'),
        ('resnet,scratch_apart', 'resnet', 'scratch_apart'),
        ('fashion,vit,scratch_shared', 'vit', 'scratch_shared'),
        ('runlocal', 'efficientnet', 'pretrained'),
    ],
)
def test_arguments(arg, family, start):
  experiment = configs.load(f'{FILE}:{arg}')
  config = experiment.config
  assert (config.model.family, config.start) == (family, start)
  assert bool(config.init) == ('probe' in config) == (start == 'pretrained')
  has_own = ['init_seed' in run for run in experiment.runs]
  assert has_own == [start == 'scratch_apart'] * config.sweep.num_runs
  is_fashion = arg in ('runlocal',) or 'fashion' in arg
  assert config.data.name == ('fashion' if is_fashion else 'cifar100')
  # The model is one that there is.
  model = architectures.of(experiment)
  params = jax.eval_shape(model.init_fn, jax.random.key(0))
  batch = {'image': jax.ShapeDtypeStruct((2, *config.inputs.image), 'float32')}
  assert model.inputs['image'].dtype == batch['image'].dtype
  logits = jax.eval_shape(model.logits_fn, params, batch)
  assert logits.shape == (2, 10 if is_fashion else 100)
  assert bool(model.statistics) == (family != 'vit')


@pytest.mark.parametrize(
    'arg, text',
    [
        ('resnet,vit', 'resnet and vit exclude'),
        ('scratch', "'scratch': choose from .*scratch_shared, scratch_apart"),
    ],
)
def test_arguments_that_do_not_fit(arg, text):
  with pytest.raises(configs.UsageError, match=text):
    configs.load(f'{FILE}:{arg}')


def test_cifar100(tmp_path):
  rng = np.random.default_rng(0)
  for name, num in (('train', 200), ('test', 20)):
    records = rng.integers(0, 256, (num, 2 + 3072), np.uint8)
    records[:, :2] = np.arange(num)[:, None] % 4
    (tmp_path / f'{name}.bin').write_bytes(records.tobytes())
  experiment = configs.load(
      FILE, [f'--config.data.path={tmp_path}', '--config.data.shift_size=8']
  )
  splits = experiment.data_fn(experiment.config)
  assert (len(splits.train), len(splits.held_out)) == (180, 20)
  kinds = {'noise', 'blur', 'contrast', 'rotation', 'occlusion'}
  assert set(splits.shifts) == kinds
  assert len(splits.test) == 12
  # No image that may choose is in a shift, not even corrupted.
  test = cifar.read(100, 'test', tmp_path).arrays
  np.testing.assert_array_equal(splits.test.arrays['image'], test['image'][:12])
  for shift in splits.shifts.values():
    np.testing.assert_array_equal(shift.arrays['label'], test['label'][12:])
    distance = np.abs(shift.arrays['image'] - test['image'][12:])
    assert distance.max() > 0.1
  experiment.config.severities = (0.5, 1.0)
  both = experiment.data_fn(experiment.config).shifts
  assert set(both) == kinds | {f'{name}_0.5' for name in kinds}
  moved, half = (
      both[name].arrays['image'] - test['image'][12:]
      for name in ('contrast', 'contrast_0.5')
  )
  np.testing.assert_allclose(half, moved / 2, atol=1e-6)
  experiment.config.severities = (1.0, -0.5)
  with pytest.raises(ValueError, match=r'\(1.0, -0.5\): expected factors abov'):
    experiment.data_fn(experiment.config)
  experiment.config.severities = (1.0,)
  experiment.config.data.name = 'mnist'
  with pytest.raises(ValueError, match="'mnist'.*'cifar100' or 'fashion'"):
    experiment.data_fn(experiment.config)
