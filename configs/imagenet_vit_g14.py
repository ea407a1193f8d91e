"""ImageNet, ViT-G/14: the largest sweep of the paper, to be planned.

  jaxsoup plan --config configs/imagenet_vit_g14.py --topology v5e:8x8
  jaxsoup plan --config configs/imagenet_vit_g14.py --topology v6e:8x8 \
      --ingredients 14

1.84 G parameters, pre-trained on JFT-3B, fine-tuned 58 times, of which the
greedy soup of the paper takes 14. Neither that model nor ImageNet comes with
this package, so there is no number to expect here but those of the plan; the
sizes are the real ones. The sweep is drawn from ranges, where the paper lists
its 58 runs.

Source: Wortsman et al., "Model soups", ICML 2022, section 3.3.2 and appendix J;
Zhai et al., "Scaling Vision Transformers", CVPR 2022, table 2.
"""

import ml_collections
import numpy as np


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the experiment.

  Args:
    arg: None.

  Returns:
    The config; `sweep(config)` draws its runs.

  Raises:
    ValueError: `arg` is something else.
  """
  if arg not in (None, ''):
    raise ValueError(f'Unknown argument {arg!r}: this config takes none.')
  config = ml_collections.ConfigDict()
  config.seed = 0

  # Scanned and rematerialized: 48 blocks compile as one, and of the activations
  # only the inputs of the blocks are kept.
  config.model = dict(
      image_shape=(518, 518, 3),
      num_classes=1000,
      patch_size=14,
      width=1664,
      depth=48,
      num_heads=16,
      mlp_width=8192,
      has_cls_token=False,
      dtype='bfloat16',
      is_scanned=True,
      is_rematerialized=True,
      batch_axis='fsdp',
  )
  # ImageNet's training set, of which 2 % are held out to choose by.
  config.data = dict(sizes=dict(train=1_255_544, held_out=25_623, test=50_000))
  config.finetune = dict(num_epochs=8, batch_size=512, warmup=0.1, final=0.0)
  # One run at a time: each fills the mesh.
  config.sweep = dict(
      draw=0,
      num_runs=58,
      group_size=1,
      learning_rate=(1e-6, 1e-4),
      weight_decay=(1e-4, 1e-1),
      label_smoothing=(0.0, 0.25),
      mixup=(0.0, 0.9),
      affine=(0.0, 0.5),
  )
  config.learned = dict(
      learning_rate=0.05,
      num_epochs=5,
      batch_size=256,
      val_fraction=0.25,
      patience=3,
  )
  config.batch_size = 512
  return config


def sweep(config: ml_collections.ConfigDict) -> list[dict[str, float]]:
  """Draws the runs by random search, by `config.seed` and `sweep.draw`.

  Args:
    config: the experiment.

  Returns:
    `config.sweep.num_runs` dicts, of which fewer are always the first of more.
  """
  number = config.seed + 1000 * config.sweep.draw
  rng = np.random.default_rng([number, *b'sweep'])
  return [_draw_run(config.sweep, rng) for _ in range(config.sweep.num_runs)]


def _draw_run(ranges, rng):
  def log_uniform(name):
    return float(np.exp(rng.uniform(*np.log(ranges[name]))))

  run = {name: log_uniform(name) for name in ('learning_rate', 'weight_decay')}
  run['label_smoothing'] = float(rng.uniform(*ranges['label_smoothing']))
  for name in ('mixup', 'affine'):
    is_on = rng.random() < 0.5
    run[name] = float(rng.uniform(*ranges[name])) if is_on else 0.0
  return {'seed': int(rng.integers(2**31)), **run}
