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
from jaxsoup.experiments import defaults
from jaxsoup.experiments import imagenet
from jaxsoup.experiments import random_search

G = dict(width=1664, depth=48, num_heads=16, mlp_width=8192)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The experiment; 'runlocal' makes it a small model on random images."""
  is_short = 'runlocal' in defaults.words(arg, 'runlocal')
  image = preparation.ImageSpec(
      28 if is_short else 518, preparation.HALF, preparation.HALF
  )
  config = imagenet.config(image, is_short=is_short)
  # Scanned and rematerialized: 48 blocks compile as one, and of the activations
  # only the inputs of the blocks are kept.
  config.init = ''
  config.model = dict(
      image_shape=image.shape,
      num_classes=imagenet_data.NUM_CLASSES,
      patch_size=14,
      has_cls_token=False,
      dtype='bfloat16',
      is_scanned=True,
      is_rematerialized=True,
      batch_axis='fsdp',
      **(imagenet.TINY if is_short else G),
  )
  config.finetune.update(
      num_epochs=1 if is_short else 8,
      warmup=0.1,
      optimizer='adafactor',
      ema=(0.999, 0.9999),
  )
  # Copies to soup: '' is the last parameters of a run, 'ema_...' an average.
  config.ingredients = ('ema_0.999',)
  config.sweep.update(num_runs=3 if is_short else 58, weight_decay=(1e-4, 1e-1))
  del config.sweep.num_epochs  # The same for all runs.
  config.batch_size = 16 if is_short else 512
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


# ImageNet and its natural shifts.
data = imagenet.splits
