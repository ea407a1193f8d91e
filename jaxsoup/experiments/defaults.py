"""Settings that most configs have alike: each passes what is particular to it.

```
config = defaults.config()
config.finetune = defaults.training(num_epochs=2, batch_size=32, clip=1.0)
config.sweep = defaults.sweep(16, learning_rate=(2e-5, 1e-4))
```
"""

from collections.abc import Container
from collections.abc import Iterable
import importlib.util
import pathlib
from typing import Any

import ml_collections

from jaxsoup.typing import Json

# Sizes of transformers.
SMALL = dict(width=384, depth=12, num_heads=6, mlp_width=1536)
BASE = dict(width=768, depth=12, num_heads=12, mlp_width=3072)


def words(arg: str | None, *known: str) -> set[str]:
  """The words of a config's argument, separated by commas.

  Raises:
    ValueError: there is another one.

  Example:
    >>> sorted(words('rte,runlocal', 'mrpc', 'rte', 'runlocal'))
    ['rte', 'runlocal']
  """
  found = {*(arg or '').split(',')} - {''}
  if unknown := sorted(found - {*known}):
    end = ', separated by commas' if len(known) > 1 else ''
    raise ValueError(
        f'Unknown argument {unknown[0]!r}: choose from {", ".join(known)}{end}.'
    )
  return found


def one_of(known: Iterable[str], found: Container[str], default: str) -> str:
  """The one word that is known, or the default.

  Raises:
    ValueError: there are two.
  """
  matches = [word for word in known if word in found] or [default]
  if len(matches) > 1:
    raise ValueError(f'{" and ".join(matches)} exclude each other: pass one.')
  return matches[0]


def config() -> ml_collections.ConfigDict:
  """A config without model, data, training and sweep."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  # How many times the held-out set is drawn, and how often it is resampled to
  # see how stable the choice of a search is.
  config.num_splits = 1
  config.stability = dict(greedy=0, greedy_ensemble=100)
  # What the analysis of the landscape covers, see docs/guides/experiments.md; 0
  # leaves a part out. It can be changed in a workdir that is finished.
  config.landscape = dict(
      num_points=0, num_pairs=0, num_examples=200, is_diagnosed=False
  )
  # The state of a training is saved at this interval, and on SIGTERM.
  config.save_every_minutes = 10.0
  return config


def training(num_epochs: int, batch_size: int, **others: Any) -> Json:
  """A training, of `config.finetune`, `config.probe` or `config.pretrain`.

  The rate rises for a tenth of the steps, then falls to zero.

  Args:
    num_epochs: over the training set.
    batch_size: examples of a step.
    **others: more fields, or other values.
  """
  fixed = dict(warmup=0.1, decay='cosine', decay_from=0.0, final=0.0)
  return dict(num_epochs=num_epochs, batch_size=batch_size, **(fixed | others))


def sweep(num_runs: int, **others: Any) -> Json:
  """What `config.sweep` holds, with the ranges in `others`, low to high."""
  return dict(draw=0, num_runs=num_runs, group_size=1, shard='0/1') | others


def learned(**others: Any) -> Json:
  """What `config.learned` holds, of which `others` change some.

  A quarter of the held-out examples decides when to stop learning.
  """
  fixed = dict(learning_rate=0.05, num_epochs=3, batch_size=50)
  return fixed | dict(val_fraction=0.25, patience=2) | others


def package_folder(name: str) -> pathlib.Path | None:
  """The folder of an installed package that holds weights, or None."""
  spec = importlib.util.find_spec(name)
  folders = spec and spec.submodule_search_locations
  return pathlib.Path(folders[0]) if folders else None
