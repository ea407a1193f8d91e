"""ImageNet, CLIP ViT-B/32: the main table of the paper.

  tfds build imagenet2012 --file_format=array_record   # and its shifts
  python -m jaxsoup.experiments.main --workdir=DIR \
      --config=configs/imagenet_clip_b32.py \
      --config.init=clip-vit-base-patch32 \
      --config.data.objectnet=objectnet-1.0
  python -m jaxsoup.experiments.main --workdir=DIR \
      --config=configs/imagenet_clip_b32.py:runlocal
  jaxsoup plan --config configs/imagenet_clip_b32.py --topology v5e:4x4

`init` is the directory openai/clip-vit-base-patch32 of Hugging Face, or a file
of open_clip. Which data to download, and where to put them: see
`jaxsoup.data.imagenet`. An array job distributes the 72 runs with
`--config.sweep.shard=i/n`.

By default every run starts from one linear probe (LP-FT), as in the paper's
main table. With `:zero_shot` it starts from a zero-shot head, made of two text
files, `zero_shot.classes` (1000 lines, the names in the order of the labels)
and `zero_shot.templates` (a line each, such as 'a photo of a {}.'), with the
tokenizer of `init`.

Expected, per cent, from the paper: 72 runs of random search, mean of the shifts
ImageNet-V2, -R, -Sketch, -A and ObjectNet. Neither the data nor the weights
come with this package: these numbers were not reproduced here.

                   ImageNet  shifts
  best single      80.38     47.83
  uniform          79.97     51.45
  greedy (5 of 72) 81.03     50.75
  learned          80.89     51.07
  ... by layer     81.37     50.87
  ensemble         81.19     50.77
  greedy ensemble  81.90     49.44

Time: the sweep is 24.1 EFLOP, says `jaxsoup plan`: 5.3 hours on 16 chips of v5e
that reach 40 % of their peak. That is an estimate, without reading the data.

Ranges and initialization are the paper's; settings that its text does not give
(of the probe, RandAugment and warm-up) are ours.

'runlocal', or 'runlocal,zero_shot', runs every step on random images of eight
classes, with a small model of random weights: half a minute, to show that the
code runs.

Source: Wortsman et al., "Model soups", ICML 2022; Kumar et al., "Fine-tuning
can distort pretrained features and underperform out-of-distribution", ICLR
2022.
"""

import pathlib

from flax import nnx
import jax
import ml_collections

from jaxsoup import models
from jaxsoup.data import imagenet as imagenet_data
from jaxsoup.data import preparation
from jaxsoup.data import text
from jaxsoup.experiments import defaults
from jaxsoup.experiments import imagenet
from jaxsoup.models import clip
from jaxsoup.train import modeling


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The experiment.

  Args:
    arg: None; 'runlocal', for a small model on random images; 'zero_shot', to
      start from a head of class names; or both, 'runlocal,zero_shot'.

  Raises:
    ValueError: `arg` is something else.
  """
  words = defaults.words(arg, 'runlocal', 'zero_shot')
  is_short, is_zero_shot = 'runlocal' in words, 'zero_shot' in words
  image = preparation.ImageSpec(
      32 if is_short else 224,
      preparation.CLIP_MEAN,
      preparation.CLIP_STD,
      crop=1.0,  # CLIP was evaluated on the whole shorter side.
  )
  config = imagenet.config(image, is_short=is_short)
  config.init = '' if is_short else 'clip-vit-base-patch32'
  config.model = dict(
      num_classes=imagenet_data.NUM_CLASSES,
      embed_width=16 if is_short else 512,
      image=dict(
          image_shape=image.shape,
          patch_size=8 if is_short else 32,
          **(imagenet.TINY if is_short else defaults.BASE),
      ),
      has_bias=not is_zero_shot,
      dtype='bfloat16',
      batch_axis='fsdp',
  )
  if is_zero_shot:
    config.zero_shot = dict(
        classes='classes.txt', templates='templates.txt', length=77
    )
  else:
    # Features are of length one: the kernel has to become large.
    config.probe = imagenet.probe(is_short, learning_rate=3e-2)
  return config


# Random search as in the paper; ImageNet and its natural shifts.
sweep = imagenet.sweep
data = imagenet.splits


def model(config: ml_collections.ConfigDict) -> modeling.Model:
  """The image tower of a CLIP under a linear head."""
  arguments = config.model.to_dict()

  def make_fn(key):
    return clip.ImageClassifier(**arguments, rngs=nnx.Rngs(key))

  def load_fn(key):
    classifier = make_fn(key)
    if 'zero_shot' in config:
      loaded = models.load(config.init, family='clip')
      kernel = zero_shot_kernel(config, loaded.text)
      classifier.head.kernel[...] = kernel
    else:
      loaded = models.load(
          config.init,
          family='clip',
          text=None,
          without=['text', 'logit_scale'],
      )
    classifier.image = loaded.image
    return classifier

  return modeling.of_module(
      make_fn,
      inputs={'image': config.model.image.image_shape},
      num_classes=config.model.num_classes,
      load_fn=load_fn if config.init else None,
      image=preparation.ImageSpec(**config.image),
  )


def zero_shot_kernel(
    config: ml_collections.ConfigDict, tower: clip.TextTower
) -> jax.Array:
  """The head of `config.zero_shot`, [embed_width, num_classes].

  Raises:
    ValueError: there are not as many names as classes.
  """
  names, templates = (
      pathlib.Path(file).read_text().splitlines()
      for file in (config.zero_shot.classes, config.zero_shot.templates)
  )
  num_classes = config.model.num_classes
  if len(names) != num_classes:
    raise ValueError(
        f'{config.zero_shot.classes} has {len(names)} lines for {num_classes} '
        'classes: write one name per line, in the order of the labels.'
    )
  tokenize = text.tokenizer(config.init, config.zero_shot.length)
  graphdef, state = nnx.split(tower)
  features_fn = jax.jit(lambda ids: nnx.merge(graphdef, state)(ids))
  return clip.zero_shot_head(
      features_fn, names, templates, lambda texts: tokenize(texts)['input_ids']
  )
