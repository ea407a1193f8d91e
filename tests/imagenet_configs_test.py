"""The experiments on ImageNet: end to end on mocked data, at tiny width."""

import functools
import json
import math
import os
import pathlib

from flax import nnx
import jax
import numpy as np
from PIL import Image
import pytest
from safetensors import numpy as safetensors

from jaxsoup import models
from jaxsoup.data import imagenet
from jaxsoup.data import made_up
from jaxsoup.data import preparation
from jaxsoup.data import sources
from jaxsoup.experiments import architectures
from jaxsoup.experiments import configs
from jaxsoup.experiments import main
from jaxsoup.models import _names
from jaxsoup.models import _pretrained

CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'
FILES = ('imagenet_clip_b32', 'imagenet_vit_b32_i21k', 'imagenet_vit_g14')
SHIFTS = ('ImageNet-V2', 'ImageNet-R', 'ImageNet-Sketch', 'ImageNet-A')


def load(name, *overrides):
  file, _, arg = name.partition(':')
  path = f'{CONFIGS / file}.py' + (f':{arg}' if arg else '')
  return configs.load(path, [f'--config.{x}' for x in overrides])


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """By name: the experiment, its workdir and what it returned; made once."""

  @functools.cache
  def of(name):
    experiment = load(f'{name}:runlocal', 'sweep.num_runs=2')
    workdir = tmp_path_factory.mktemp(name)
    return experiment, workdir, main.run(experiment, workdir)

  return of


@pytest.mark.slow
@pytest.mark.parametrize('name', FILES)
def test_end_to_end(finished, name):
  experiment, workdir, made = finished(name)
  rows = {row.name: row for row in made}
  assert {'uniform', 'greedy', 'learned', 'ensemble'} <= rows.keys()
  assert (workdir / 'table.md').exists()
  copies = experiment.config.get('ingredients', [''])
  stems = [f'0{i}_{c}' if c else f'0{i}' for i in range(2) for c in copies]
  assert sorted(p.name for p in (workdir / 'runs').glob('0*')) == stems
  # What the rows say of a run, from its logits.
  splits = experiment.data_fn(experiment.config)
  assert set(splits.shifts) == set(SHIFTS)
  with np.load(workdir / 'logits' / f'{stems[0]}.npz') as stored:
    for set_name, classes in [
        ('ImageNet-R', imagenet.R_CLASSES),
        ('ImageNet-A', imagenet.A_CLASSES),
        ('ImageNet-Sketch', range(1000)),
    ]:
      source = splits.shifts[set_name]
      label = source[np.arange(len(source))]['label']
      is_right = stored[set_name][:, list(classes)].argmax(-1) == label
      expected = rows[stems[0]].shifts[set_name]
      assert is_right.mean() == pytest.approx(expected)


@pytest.mark.slow
def test_a_second_call_makes_nothing_again(finished):
  experiment, workdir, rows = finished('imagenet_vit_g14')
  before = {p: p.stat().st_mtime_ns for p in (workdir / 'runs').rglob('*')}
  assert main.run(experiment, workdir) == rows
  assert before == {p: p.stat().st_mtime_ns for p in before}


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, num_parameters',
    [
        # Radford et al., ICML 2021: the image tower; a head with a bias.
        ('imagenet_clip_b32', 87_849_216 + 513_000),
        ('imagenet_clip_b32:zero_shot', 87_849_216 + 512_000),
        # Dosovitskiy et al., ICLR 2021, table 1: 88 M.
        ('imagenet_vit_b32_i21k', 88_224_232),
        # Zhai et al., CVPR 2022, table 2.
        ('imagenet_vit_g14', 1.84e9),
    ],
)
def test_full_size(name, num_parameters):
  experiment = load(name)
  model = architectures.of(experiment)
  mesh = jax.make_mesh((1,), ('fsdp',))
  with jax.set_mesh(mesh):
    params = jax.eval_shape(lambda: model.init_fn(jax.random.key(0)))
  num = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
  assert num == pytest.approx(num_parameters, rel=4e-3)
  image = model.inputs['image']
  assert (image.shape, image.dtype) == (model.image.shape, np.uint8)
  sizes = experiment.config.data.sizes
  assert sizes.train + sizes.held_out == imagenet.NUM_TRAIN


def test_sweep_of_the_paper():
  runs = load('imagenet_clip_b32').runs
  assert len(runs) == 72
  epochs = {run['num_epochs'] for run in runs}
  assert min(epochs) >= 4 and max(epochs) <= 16 and len(epochs) > 8
  rates = np.log10([run['learning_rate'] for run in runs])
  assert -6 <= rates.min() < -5.8 and -4.2 < rates.max() <= -4
  num_rand = sum(run['rand'] > 0 for run in runs)
  assert 36 < num_rand < 54  # 44 of 71, give or take two deviations.


@pytest.mark.parametrize('name', FILES)
def test_unknown_arguments(name):
  with pytest.raises(configs.UsageError, match="'runlocl'.*runlocal"):
    load(f'{name}:runlocl')


def test_the_number_of_workers_may_change(tmp_path):
  file, name = tmp_path / 'config.json', 'imagenet_clip_b32'
  for num_workers in (0, 8):
    config = load(name, f'data.num_workers={num_workers}').config
    configs.check_unchanged(config, file)
    (tmp_path / 'runs').mkdir(exist_ok=True)
  assert load(name).config.data.num_workers == os.cpu_count()
  with pytest.raises(configs.UsageError, match='-1: expected 0 or more'):
    load(name, 'data.num_workers=-1')


def test_folders_in_place_of_tfds(tmp_path):
  """Real data take the same way as mocked ones."""
  ids = [imagenet.wordnet_ids()[i] for i in (0, 7, 999)]
  both = sorted({*imagenet.R_CLASSES} & {*imagenet.A_CLASSES})[:2]
  shifted = [imagenet.wordnet_ids()[i] for i in both]
  sets = {'train': ids, 'validation': ids} | dict.fromkeys(SHIFTS, shifted)
  folders = made_up.folders(tmp_path, sets, num_images=10)
  experiment = load('imagenet_vit_b32_i21k:runlocal')
  config = experiment.config
  with config.unlocked():
    config.data.is_mock = False
  config.data.folders.update(folders)
  splits = experiment.data_fn(config)
  assert len(splits.train) == 24 and len(splits.held_out) == 6
  labels = splits.test[np.arange(30)]['label']
  assert sorted(set(labels.tolist())) == [0, 7, 999]
  image = splits.test[np.arange(1)]['image']
  assert image.shape == (1, 32, 32, 3) and image.dtype == np.uint8
  assert splits.rules['held_out']['rule'] == 'per class'


@pytest.mark.parametrize(
    'name, overrides, crop',
    [
        # Resize(224), CenterCrop(224), as in the code of CLIP.
        ('imagenet_clip_b32', [], 1.0),
        ('imagenet_clip_b32', ['image.crop=0.875'], 0.875),
        ('imagenet_vit_b32_i21k', [], 0.875),
        ('imagenet_vit_g14', [], 0.875),
    ],
)
def test_what_of_an_image_an_evaluation_sees(name, overrides, crop, tmp_path):
  full_size = load(name, *overrides).config
  assert full_size.image.crop == crop
  ids = [imagenet.wordnet_ids()[i] for i in (0, 7)]
  shifted = [imagenet.wordnet_ids()[imagenet.R_CLASSES[0]]]
  a_class = [imagenet.wordnet_ids()[imagenet.A_CLASSES[0]]]
  sets = dict.fromkeys(('train', 'validation'), ids)
  sets |= dict.fromkeys(SHIFTS, shifted) | {'ImageNet-A': a_class}
  folders = made_up.folders(tmp_path, sets, num_images=5)
  framed = np.zeros((64, 64, 3), np.uint8)
  framed[[0, 1, -2, -1]] = framed[:, [0, 1, -2, -1]] = 255
  for file in tmp_path.rglob('*.*'):
    Image.fromarray(framed).save(file)

  def data_of(*more):
    experiment = load(f'{name}:runlocal', *overrides, *more)
    with experiment.config.unlocked():
      experiment.config.data.is_mock = False
    experiment.config.data.folders.update(folders)
    return experiment.data_fn(experiment.config)

  splits = data_of()
  for source in (splits.held_out, splits.test, *splits.shifts.values()):
    image = source[np.arange(1)]['image'][0]
    middle = len(image) // 2
    contrast = int(np.ptp(image[middle, :, 0]))
    # The frame is seen, or cut away.
    assert contrast > 100 if crop == 1 else contrast < 10
  # Training images do not depend on it.
  others = data_of('image.crop=0.5')
  first, second = (
      next(iter(sources.batches(x.train, 8, seed=0))) for x in (splits, others)
  )
  np.testing.assert_array_equal(first['image'], second['image'])


def test_mocked_images_show_their_class(tmp_path):
  sets = {'train': ['a', 'b'], 'test': ['b', 'a']}
  folders = made_up.folders(tmp_path, sets, num_images=3)
  spec = preparation.ImageSpec(16)

  def mean_of(name, label):
    files = sorted(pathlib.Path(folders[name], label).iterdir())
    assert len(files) == 3
    return np.mean([imagenet.evaluated(file, spec) for file in files], axis=0)

  distance = lambda x, y: np.abs(x - y).mean()
  for label, other in ('ab', 'ba'):
    same = distance(mean_of('train', label), mean_of('test', label))
    assert (
        0
        < same
        < 0.5 * distance(mean_of('train', label), mean_of('test', other))
    )


# --- CLIP ---------------------------------------------------------------------

WORDS = ('[UNK]', 'a', 'photo', 'drawing', 'of', 'tench', 'shark', 'end')


@pytest.fixture
def clip_folder(tmp_path):
  """A tiny CLIP as Hugging Face stores it, and its tokenizer."""
  tokenizers = pytest.importorskip('tokenizers')
  experiment = load('imagenet_clip_b32:runlocal')
  tower = dict(width=16, depth=1, num_heads=2, mlp_width=32)
  arguments = dict(
      embed_width=16,
      image=experiment.config.model.image.to_dict() | {'image_shape': [32] * 3},
      text=dict(vocab_size=len(WORDS), max_length=6, **tower),
  )
  arguments['image']['image_shape'] = [32, 32, 3]
  kind = _pretrained.Kind('clip', 'hf', arguments)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda x: rng.normal(size=x.shape).astype('f4') * 0.3,
      models.params_of(kind.abstract()),
  )
  folder = tmp_path / 'clip'
  folder.mkdir()
  safetensors.save_file(
      dict(_names.write(params, kind.table())), folder / 'model.safetensors'
  )
  heads = {'num_attention_heads': 2}
  config = {'model_type': 'clip', 'vision_config': heads}
  config['text_config'] = heads | {'eos_token_id': WORDS.index('end')}
  (folder / 'config.json').write_text(json.dumps(config))
  vocab = {word: i for i, word in enumerate(WORDS)}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, '[UNK]'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.post_processor = tokenizers.processors.TemplateProcessing(
      single='$A end', special_tokens=[('end', len(WORDS) - 1)]
  )
  made.enable_padding(pad_id=0, pad_token='[UNK]')
  made.save(str(folder / 'tokenizer.json'))
  return folder, kind, params


def start_of(name, folder, *overrides):
  experiment = load(
      name, f'init={folder}', 'model.num_classes=2', 'model.dtype=float32',
      *overrides,
  )  # fmt: skip
  with jax.set_mesh(jax.make_mesh((1,), ('fsdp',))):
    return architectures.of(experiment).start_fn(jax.random.key(0))


@pytest.mark.slow
def test_the_tower_of_a_file(clip_folder):
  folder, _, params = clip_folder
  start = start_of('imagenet_clip_b32:runlocal', folder)
  jax.tree.map(np.testing.assert_array_equal, start['image'], params['image'])
  assert start['head']['kernel'].shape == (16, 2)


@pytest.mark.slow
def test_a_head_of_names(tmp_path, clip_folder):
  folder, kind, params = clip_folder
  (tmp_path / 'classes').write_text('tench\nshark\n')
  (tmp_path / 'templates').write_text('a photo of a {}\na drawing of a {}\n')
  files = [
      f'zero_shot.{name}={tmp_path / name}' for name in ('classes', 'templates')
  ]
  name = 'imagenet_clip_b32:runlocal,zero_shot'
  start = start_of(name, folder, *files, 'zero_shot.length=6')
  assert start['head'].keys() == {'kernel'}
  model = nnx.merge(nnx.graphdef(kind.abstract()), params)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  for i, noun in enumerate((5, 6)):
    # 'a photo of a NOUN', cut to six tokens, of which the last is the end.
    ids = np.array([[1, 2, 4, 1, noun, 7], [1, 3, 4, 1, noun, 7]])
    features = unit(np.asarray(model.text(ids)))
    np.testing.assert_allclose(
        start['head']['kernel'][:, i],
        100 * unit(features.mean(axis=0)),
        rtol=1e-4,
        atol=1e-3,
    )
  (tmp_path / 'classes').write_text('tench\n')
  with pytest.raises(ValueError, match='has 1 lines for 2 classes'):
    start_of(name, folder, *files)


@pytest.mark.slow
def test_weights_of_augreg_with_another_head(tmp_path):
  experiment = load('imagenet_vit_b32_i21k:runlocal')
  arguments = experiment.config.model.to_dict()
  arguments = {k: v for k, v in arguments.items() if k != 'batch_axis'}
  kind = _pretrained.Kind('vit', 'augreg', arguments | {'num_classes': 5})
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda x: rng.normal(size=x.shape).astype('f4'),
      models.params_of(kind.abstract()),
  )
  file = tmp_path / 'B_32.npz'
  arrays = dict(_names.write(params, kind.table()))
  # Those of the first ViTs hold a layer before the head as well.
  more = {'pre_logits/kernel': np.zeros((16, 16), 'f4')}
  for stored in (arrays, arrays | more):
    np.savez(file, **stored)
    loaded = load('imagenet_vit_b32_i21k:runlocal', f'init={file}')
    start = architectures.of(loaded).start_fn(jax.random.key(0))
    assert start.pop('head')['kernel'].shape == (16, 1000)
    expected = {k: x for k, x in params.items() if k != 'head'}
    jax.tree.map(np.testing.assert_array_equal, start, expected)
