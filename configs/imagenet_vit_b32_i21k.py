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

import ml_collections

from jaxsoup.data import imagenet as imagenet_data
from jaxsoup.data import preparation
from jaxsoup.experiments import defaults
from jaxsoup.experiments import imagenet


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The experiment; 'runlocal' makes it a small model on random images."""
  is_short = 'runlocal' in defaults.words(arg, 'runlocal')
  image = preparation.ImageSpec(
      32 if is_short else 224, preparation.HALF, preparation.HALF
  )
  config = imagenet.config(image, is_short=is_short)
  config.init = '' if is_short else 'B_32-i21k.npz'
  config.model = dict(
      image_shape=image.shape,
      num_classes=imagenet_data.NUM_CLASSES,
      patch_size=8 if is_short else 32,
      has_cls_token=True,
      activation='gelu_tanh',
      dtype='bfloat16',
      batch_axis='fsdp',
      **(imagenet.TINY if is_short else defaults.BASE),
  )
  config.probe = imagenet.probe(is_short, learning_rate=1e-3)
  return config


# Random search as in the paper; ImageNet and its natural shifts.
sweep = imagenet.sweep
data = imagenet.splits
