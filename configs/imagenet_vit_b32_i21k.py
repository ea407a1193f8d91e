"""ImageNet, ViT-B/32 pre-trained on ImageNet-21k: narrower pre-training.

  tfds build imagenet2012 --file_format=array_record   # and its shifts
  python -m jaxsoup.experiments.main --workdir=DIR \
      --config=configs/imagenet_vit_b32_i21k.py --config.init=FILE.npz \
      --config.data.objectnet=objectnet-1.0
  python -m jaxsoup.experiments.main --workdir=DIR \
      --config=configs/imagenet_vit_b32_i21k.py:runlocal
  jaxsoup plan --config configs/imagenet_vit_b32_i21k.py --topology v5e:4x4

The weights are those of the AugReg paper, of gs://vit_models/augreg, such as
B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0.npz. Which data to
download, and where to put them: see `jaxsoup.data.imagenet`.

Expected, from the paper: soups gain, but less than those of models that were
pre-trained on more data (`imagenet_clip_b32.py`). Neither ImageNet nor these
weights come with this package, so that this was not measured here. The sweep is
that of the paper's CLIP models; the linear probe before it is ours.

Time: the sweep is 24.1 EFLOP, says `jaxsoup plan`: 5.3 hours on 16 chips of v5e
that reach 40 % of their peak. That is an estimate, without reading the data.

'runlocal' runs every step on random images of eight classes, with a small model
of random weights: half a minute, to show that the code runs.

Source: Wortsman et al., "Model soups", ICML 2022; Steiner et al., "How to train
your ViT?", TMLR 2022.
"""

from typing import Any

import ml_collections

from jaxsoup.data import imagenet as imagenet_data
from jaxsoup.data import preparation
from jaxsoup.data import sources
from jaxsoup.experiments import imagenet
from jaxsoup.experiments import random_search


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the experiment.

  Args:
    arg: None, or 'runlocal' for a small model on random images.

  Returns:
    The config; `sweep(config)` draws its runs.

  Raises:
    ValueError: `arg` is something else.
  """
  if arg not in (None, '', 'runlocal'):
    raise ValueError(f"Unknown argument {arg!r}: use 'runlocal' or none.")
  is_short = arg == 'runlocal'
  config = ml_collections.ConfigDict()
  config.seed = 0

  size = 32 if is_short else 224
  config.init = '' if is_short else 'B_32-i21k.npz'
  config.model = dict(
      image_shape=(size, size, 3),
      num_classes=imagenet_data.NUM_CLASSES,
      patch_size=8 if is_short else 32,
      width=16 if is_short else 768,
      depth=2 if is_short else 12,
      num_heads=2 if is_short else 12,
      mlp_width=32 if is_short else 3072,
      has_cls_token=True,
      activation='gelu_tanh',
      dtype='bfloat16',
      batch_axis='fsdp',
  )
  pixels = dict(mean=preparation.HALF, std=preparation.HALF)
  config.data = imagenet.data_config(size, is_mock=is_short, **pixels)
  config.probe = dict(
      num_epochs=10,
      batch_size=16 if is_short else 1024,
      warmup=0.05,
      final=0.0,
      run=dict(learning_rate=1e-3),
  )
  config.finetune = dict(
      num_epochs=10,
      batch_size=16 if is_short else 512,
      warmup=0.05,
      final=0.0,
      clip=1.0,
      augmentation=dict(rand=pixels),
  )
  # One run at a time, on the whole mesh.
  config.sweep = dict(
      draw=0,
      num_runs=3 if is_short else 72,
      group_size=1,
      shard='0/1',
      learning_rate=(1e-6, 1e-4),
      weight_decay=(8e-5, 0.5),
      num_epochs=(1, 2) if is_short else (4, 16),
      label_smoothing=(0.0, 0.25),
      mixup=(0.0, 0.9),
      rand=(0.0, 1.0),
  )
  config.learned = dict(
      learning_rate=0.05,
      num_epochs=2 if is_short else 5,
      batch_size=4 if is_short else 256,
      val_fraction=0.25,
      patience=3,
  )
  config.batch_size = 16 if is_short else 1024
  config.is_sharded = True
  # What the analysis of the landscape covers; 0 leaves a part out. It can be
  # changed in a workdir that is finished.
  config.landscape = dict(
      num_points=0, num_pairs=0, num_examples=1000, is_diagnosed=False
  )
  config.save_every_minutes = 10.0
  return config


def sweep(config: ml_collections.ConfigDict) -> list[dict[str, Any]]:
  """Draws the runs by random search, by `config.seed` and `sweep.draw`.

  RandAugment is on in 44 of 71 runs, as in the paper.
  """
  return random_search.runs(
      config.sweep,
      config.seed,
      log_uniform=['learning_rate', 'weight_decay'],
      uniform=['label_smoothing', 'mixup'],
      sometimes={'rand': 44 / 71},
      integer=['num_epochs'],
  )


def data(config: ml_collections.ConfigDict) -> sources.Splits:
  """ImageNet and its natural shifts."""
  return imagenet.splits(config)
