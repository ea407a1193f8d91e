"""A random model of timm or open_clip, in a process of its own.

```
python tests/_timm_worker.py resnet50 0 /tmp/out '{"num_classes": 5}'
```

MODEL is a name of timm; `open_clip` takes the arguments of its CLIP class.
`local-dir:FOLDER` is a model with its config and weights. In all others every
parameter and buffer is moved off its initial value.
Writes into OUT:
  model.safetensors: the state dict.
  data.npz: `image` [B, C, H, W], `logits` and `logits_float64`; of open_clip
    `text`, `image_features`, `text_features` and `logits` per image.
With OUT/given.safetensors, loads that (strictly) instead of random weights.
"""

import json
import pathlib
import sys

import numpy as np
import safetensors.torch
import torch

# timm and open_clip import torchvision, whose compiled half may not fit this
# PyTorch (there is none on PyPI without CUDA): then its names are declared.
try:
  import torchvision  # noqa: F401
except RuntimeError:
  for module in [m for m in sys.modules if m.startswith('torchvision')]:
    del sys.modules[module]
  library = torch.library.Library('torchvision', 'DEF')
  library.define('nms(Tensor dets, Tensor s, float iou_threshold) -> Tensor')
  library.define('qnms(Tensor dets, Tensor s, float iou_threshold) -> Tensor')


def make(name: str, arguments: dict) -> torch.nn.Module:
  if name == 'open_clip':
    import open_clip

    return open_clip.CLIP(**arguments)
  import timm

  is_stored = name.startswith('local-dir:')
  return timm.create_model(name, pretrained=is_stored, **arguments)


def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
  """Moves everything: scales and variances stay around one and positive."""
  draw = lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)
  for name, x in model.state_dict().items():
    if not x.is_floating_point() or name == 'attn_mask':
      continue
    if name == 'logit_scale':
      x.copy_(torch.tensor(2.0))
    elif name.endswith('running_var'):
      x.copy_(torch.exp(0.3 * draw(x)))
    elif x.ndim < 2:
      x.copy_(x + 0.1 * draw(x))
    else:
      # As wide as a layer keeps its input, so that no depth overflows.
      x.copy_(draw(x) / max(x[0].numel(), 16) ** 0.5)


def image_size(model, arguments: dict) -> tuple[int, int]:
  if 'vision_cfg' in arguments:
    size = arguments['vision_cfg']['image_size']
  elif hasattr(model, 'patch_embed'):
    size = arguments.get('img_size', model.pretrained_cfg['input_size'][1:])
  else:
    size = 64  # Convolutions take any size: a small one is as good a test.
  return (size, size) if isinstance(size, int) else tuple(size)


def inputs(model, arguments: dict, generator: torch.Generator) -> dict:
  shape = 2, arguments.get('in_chans', 3), *image_size(model, arguments)
  image = torch.randn(shape, generator=generator)
  if 'text_cfg' not in arguments:
    return {'image': image}
  text_cfg = arguments['text_cfg']
  length, end = text_cfg['context_length'], text_cfg['vocab_size'] - 1
  text = torch.randint(1, end, (2, length), generator=generator)
  # The end of a text has the largest id, and padding follows it.
  for row, place in enumerate((length // 2, length - 1)):
    text[row, place:] = 0
    text[row, place] = end
  return {'image': image, 'text': text}


@torch.no_grad()
def main(name: str, seed: str, out: str, arguments: str = '{}') -> None:
  folder, kwargs = pathlib.Path(out), json.loads(arguments)
  generator = torch.Generator().manual_seed(int(seed))
  model = make(name, kwargs).eval()
  given = folder / 'given.safetensors'
  if given.exists():
    model.load_state_dict(safetensors.torch.load_file(given))
  elif not name.startswith('local-dir:'):
    randomize(model, generator)
  state = {k: v.contiguous() for k, v in model.state_dict().items()}
  safetensors.torch.save_file(state, folder / 'model.safetensors')
  # The inputs do not depend on where the weights came from.
  data = inputs(model, kwargs, generator.manual_seed(int(seed) + 1))
  if 'text' in data:
    image_features, text_features, scale = model(**data)[:3]
    data |= {'image_features': image_features, 'text_features': text_features}
    data['logits'] = scale * image_features @ text_features.T
  else:
    data['logits'] = model(data['image'])
    data['logits_float64'] = model.double()(data['image'].double())
  np.savez(folder / 'data.npz', **{k: v.numpy() for k, v in data.items()})


if __name__ == '__main__':
  main(*sys.argv[1:])
