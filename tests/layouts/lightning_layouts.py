"""Checkpoints of Lightning: `.ckpt` files of a trainer."""

import pathlib

import _common
import lightning
import numpy as np
import torch


class _Module(lightning.LightningModule):

  def __init__(self, width: int = 4):
    super().__init__()
    self.save_hyperparameters()
    self.net = torch.nn.Sequential(
        torch.nn.Linear(2, width), torch.nn.BatchNorm1d(width)
    )

  def training_step(self, batch, _):
    return self.net(batch).sum()

  def configure_optimizers(self):
    return torch.optim.AdamW(self.parameters())


def _save(run: pathlib.Path, seed: int) -> None:
  module = _Module()
  trainer = lightning.Trainer(
      max_epochs=1,
      accelerator='cpu',
      logger=False,
      enable_checkpointing=False,
      enable_progress_bar=False,
      enable_model_summary=False,
  )
  loader = torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=4)
  trainer.fit(module, loader)
  rng = np.random.default_rng(seed)
  with torch.no_grad():
    for x in module.state_dict().values():
      if x.is_floating_point():
        x.copy_(torch.from_numpy(_common.numbers(rng, tuple(x.shape))))
  trainer.save_checkpoint(run)


def _restore(run: pathlib.Path):
  module = _Module.load_from_checkpoint(run, map_location='cpu')
  return dict(module.state_dict())


LAYOUTS = {'checkpoint': _common.Layout(_save, _restore)}

if __name__ == '__main__':
  _common.main(LAYOUTS)
