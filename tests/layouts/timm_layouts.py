"""Checkpoints of timm's training script: `.pth.tar` files."""

import argparse
import pathlib
import shutil
import tempfile

import _common
import numpy as np
import torch

# What torchvision defines when it is built for the installed torch.
_LIBRARY = torch.library.Library('torchvision', 'DEF')
_LIBRARY.define(
    'nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'
)
_LIBRARY.define(
    'qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'
)

import timm  # noqa: E402
from timm import utils  # noqa: E402


def _model() -> torch.nn.Module:
  return timm.create_model(
      'vit_tiny_patch16_224',
      img_size=4,
      patch_size=2,
      embed_dim=4,
      depth=1,
      num_heads=2,
      num_classes=3,
  )


def _fill(model: torch.nn.Module, seed: int) -> torch.nn.Module:
  rng = np.random.default_rng(seed)
  with torch.no_grad():
    for x in model.state_dict().values():
      x.copy_(torch.from_numpy(_common.numbers(rng, tuple(x.shape))))
  return model


def _save(run: pathlib.Path, seed: int) -> None:
  model = _fill(_model(), seed)
  optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
  average = utils.ModelEmaV3(model)
  _fill(average.module, seed + 10)
  with tempfile.TemporaryDirectory() as folder:
    saver = utils.CheckpointSaver(
        model,
        optimizer,
        argparse.Namespace(model='vit_tiny_patch16_224', lr=0.1),
        average,
        checkpoint_dir=folder,
        recovery_dir=folder,
    )
    saver.save_checkpoint(0, metric=0.5)
    shutil.copy(pathlib.Path(folder) / 'last.pth.tar', run)


def _restore(run: pathlib.Path):
  """As `--checkpoint`: the average, where there is one."""
  model = _model()
  timm.models.load_checkpoint(model, str(run), use_ema=True, weights_only=False)
  return dict(model.state_dict())


def _resume(run: pathlib.Path):
  model = _model()
  optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
  epoch = timm.models.resume_checkpoint(model, str(run), optimizer)
  return dict(model.state_dict()) | {'epoch': torch.tensor(epoch)}


LAYOUTS = {'training': _common.Layout(_save, _restore, _resume)}

if __name__ == '__main__':
  _common.main(LAYOUTS)
