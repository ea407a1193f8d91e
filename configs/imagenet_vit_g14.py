"""ImageNet, ViT-G/14: the largest sweep of the paper.

  jaxsoup plan --config configs/imagenet_vit_g14.py --topology v5e:8x8
  jaxsoup plan --config configs/imagenet_vit_g14.py --topology v6e:8x8 \
      --ingredients 14
  python -m jaxsoup.experiments.main --workdir=DIR \
      --config=configs/imagenet_vit_g14.py --config.init=FILE.npz \
      --config.data.objectnet=objectnet-1.0 --distributed
  python -m jaxsoup.experiments.main --workdir=DIR \
      --config=configs/imagenet_vit_g14.py:runlocal

1.84 G parameters, fine-tuned 58 times, each time on all devices of a pod: run
the same command on every host, with DIR on a shared disk. Each run keeps two
moving averages of its parameters, with a low and a high decay, and those with
the low one are souped: `--config.ingredients="('ema_0.9999',)"` soups the
others, which are better as single models.

Expected, per cent, ImageNet / mean of the shifts, from the paper:

  best on held-out   90.72 / 84.38
  greedy (14 of 58)  90.94 / 85.02
  greedy ensemble    90.93 / 84.33

Its models were pre-trained on JFT-3B, and are not public: other weights, as an
npz file of big_vision (with the depth and the pool of `config.model`), give
other numbers. Which data to download, and where to put them: see
`jaxsoup.data.imagenet`. The sweep is drawn from ranges, where the paper lists
its 58 runs; the decays, and Adafactor, with which such models were pre-trained,
are ours.

Time: the sweep is 12.1 ZFLOP, says `jaxsoup plan`: 28 days on 64 chips of v5e
that reach 40 % of their peak, 11 hours a run. That is an estimate.

'runlocal' runs every step on random images of eight classes, with a small model
of random weights: half a minute, to show that the code runs.

Source: Wortsman et al., "Model soups", ICML 2022, section 3.3.2 and appendix J;
Zhai et al., "Scaling Vision Transformers", CVPR 2022, table 2.
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

  # Scanned and rematerialized: 48 blocks compile as one, and of the activations
  # only the inputs of the blocks are kept.
  size = 28 if is_short else 518
  config.init = ''
  config.model = dict(
      image_shape=(size, size, 3),
      num_classes=imagenet_data.NUM_CLASSES,
      patch_size=14,
      width=16 if is_short else 1664,
      depth=2 if is_short else 48,
      num_heads=2 if is_short else 16,
      mlp_width=32 if is_short else 8192,
      has_cls_token=False,
      dtype='bfloat16',
      is_scanned=True,
      is_rematerialized=True,
      batch_axis='fsdp',
  )
  pixels = dict(mean=preparation.HALF, std=preparation.HALF)
  config.data = imagenet.data_config(size, is_mock=is_short, **pixels)
  config.finetune = dict(
      num_epochs=1 if is_short else 8,
      batch_size=16 if is_short else 512,
      warmup=0.1,
      final=0.0,
      clip=1.0,
      optimizer='adafactor',
      ema=(0.999, 0.9999),
      augmentation=dict(rand=pixels),
  )
  # Copies to soup: '' is the last parameters of a run, 'ema_...' an average.
  config.ingredients = ('ema_0.999',)
  # One run at a time: each fills the mesh.
  config.sweep = dict(
      draw=0,
      num_runs=3 if is_short else 58,
      group_size=1,
      shard='0/1',
      learning_rate=(1e-6, 1e-4),
      weight_decay=(1e-4, 1e-1),
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
  config.batch_size = 16 if is_short else 512
  config.is_sharded = True
  # What the analysis of the landscape covers; 0 leaves a part out. It can be
  # changed in a workdir that is finished.
  config.landscape = dict(
      num_points=0, num_pairs=0, num_examples=1000, is_diagnosed=False
  )
  config.save_every_minutes = 10.0
  return config


def sweep(config: ml_collections.ConfigDict) -> list[dict[str, Any]]:
  """Draws the runs by random search, by `config.seed` and `sweep.draw`."""
  return random_search.runs(
      config.sweep,
      config.seed,
      log_uniform=['learning_rate', 'weight_decay'],
      uniform=['label_smoothing'],
      sometimes={'mixup': 0.5, 'rand': 0.5},
  )


def data(config: ml_collections.ConfigDict) -> sources.Splits:
  """ImageNet and its natural shifts."""
  return imagenet.splits(config)
