"""The experiment of a ViT on Fashion-MNIST, on files of its kind."""

import json
import pathlib
import struct

import jax
import numpy as np
import pytest

from jaxsoup import checkpoints
from jaxsoup import models
from jaxsoup.data import fashion
from jaxsoup.data import preparation
from jaxsoup.experiments import architectures
from jaxsoup.experiments import configs
from jaxsoup.experiments import exporting
from jaxsoup.experiments import main
from jaxsoup.experiments import results
from jaxsoup.models import _names
from jaxsoup.models import _pretrained

CONFIG = pathlib.Path(__file__).parent.parent / 'configs/fashion_vit.py'
TINY = dict(width=16, depth=1, num_heads=2, mlp_width=32)


@pytest.fixture
def files(tmp_path, monkeypatch):
  """Images whose class is where they are bright, and weights of a DINOv2."""
  rng = np.random.default_rng(0)
  for prefix, num in {'train': 300, 't10k': 200}.items():
    label = rng.integers(0, 10, num, np.uint8)
    image = rng.integers(0, 90, (num, 28, 28), np.uint8)
    image[np.arange(num), 2 * label] += 120
    for kind, header, array in (
        ('images-idx3', (0x803, num, 28, 28), image),
        ('labels-idx1', (0x801, num), label),
    ):
      content = struct.pack(f'>{len(header)}I', *header) + array.tobytes()
      (tmp_path / f'{prefix}-{kind}-ubyte').write_bytes(content)
  parts = {'train': ('train', 300), 'test': ('t10k', 200)}
  monkeypatch.setattr(fashion, '_PARTS', parts)
  arguments = TINY | dict(
      image_shape=[70, 70, 3],
      num_classes=0,
      patch_size=14,
      has_cls_token=True,
      has_layer_scale=True,
  )
  kind = _pretrained.Kind('vit', 'hf', arguments)
  params = jax.tree.map(
      lambda x: rng.normal(size=x.shape).astype('f4') * 0.1,
      models.params_of(kind.abstract()),
  )
  arrays = dict(_names.write(params, kind.table()))
  weights = tmp_path / 'model.safetensors'
  checkpoints.save_arrays(weights, arrays, arrays.items())
  (tmp_path / 'config.json').write_text(
      json.dumps({'model_type': 'dinov2', 'num_attention_heads': 2})
  )
  return tmp_path, weights


def load(files, *overrides):
  folder, weights = files
  values = {f'model.{name}': value for name, value in TINY.items()}
  values |= {'data.path': folder, 'init': weights, 'data.sizes.held_out': 80}
  given = [f'--config.{name}={value}' for name, value in values.items()]
  more = [f'--config.{x}' for x in overrides]
  return configs.load(f'{CONFIG}:runlocal', [*given, *more])


@pytest.mark.slow
def test_end_to_end(tmp_path, files):
  experiment = load(
      files,
      'sweep.num_runs=3',
      'num_splits=2',
      'probe.run.learning_rate=0.1',
  )
  rows = {row.name: row for row in main.run(experiment, tmp_path / 'run')}
  assert {'uniform', 'greedy', 'learned', 'Model Stock'} <= rows.keys()
  assert set(rows['uniform'].shifts) == set(experiment.config.shifts)
  results = json.loads((tmp_path / 'run/results.json').read_text())
  assert len(results['splits']) == 2
  exporting.make(experiment, tmp_path / 'run')
  exporting.make(experiment, tmp_path / 'run')  # Finished work stays.
  soups = sorted(tmp_path.glob('run/splits/*/soups/*'))
  assert len(soups) == 2 * 6
  for soup in soups:
    exported = soup.parent.parent / 'exported' / soup.name
    config = json.loads((exported / 'config.json').read_text())
    assert config['architectures'] == ['Dinov2ForImageClassification']
    assert config['image_size'] == 42
    assert tuple(config['id2label'].values()) == fashion.CLASSES
    actual = models.params_of(models.load(exported))
    expected = checkpoints.load(soup).params
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
  # Three standard errors above chance, which is 0.1.
  assert rows['uniform'].test > 0.2


def test_what_is_shifted_never_chooses(files):
  experiment = load(files, 'shifts.noise=1e-9')
  splits = experiment.data_fn(experiment.config)
  rows = {
      name: {x.tobytes() for x in source.arrays['image'].round(3)}
      for name, source in [
          ('train', splits.train),
          ('held_out', splits.held_out),
          ('test', splits.test),
          ('noise', splits.shifts['noise']),
      ]
  }
  assert [len(x) for x in rows.values()] == [128, 80, 100, 50]
  for name, others in rows.items():
    for other in rows.keys() - {name}:
      assert others.isdisjoint(rows[other])
  # Corruptions of one image are one example.
  ids = results.ids(splits, seed=0)
  (shifted,) = {tuple(ids[name].tolist()) for name in splits.shifts}
  assert len(set(shifted)) == 50 and not set(shifted) & set(
      ids['test'].tolist()
  )
  labels = [source.arrays['label'] for source in splits.shifts.values()]
  assert all(np.array_equal(labels[0], label) for label in labels)


def test_what_cannot_be_exported(tmp_path, files):
  (tmp_path / 'config.json').unlink()
  experiment = load(files)
  with pytest.raises(configs.UsageError, match='Set config.init .*--like'):
    exporting.check(experiment, tmp_path / 'run')


@pytest.mark.slow
def test_the_model_enlarges_and_standardizes(files):
  experiment = load(files)
  model = architectures.of(experiment)
  params = model.start_fn(jax.random.key(0))
  image = np.random.default_rng(1).random((3, 28, 28, 1), np.float32)
  loaded = models.load(
      files[1], without=['head'], **experiment.config.model.to_dict()
  )
  large = preparation.ImageSpec(42).prepare(image)
  expected = loaded.features(large)
  assert expected.shape == (3, 2 * 16)  # Class token, and mean of patches.
  features = model.features_fn(params, {'image': image})
  np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-5)
  logits = model.logits_fn(params, {'image': image})
  head = params['head']
  np.testing.assert_allclose(
      logits, expected @ head['kernel'] + head['bias'], rtol=1e-4, atol=1e-5
  )
