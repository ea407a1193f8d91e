"""What the experiments on GLUE share: arguments, settings, sweep and data.

```
task, is_short = glue.parsed('rte,runlocal')
config = glue.config(task, is_short, length=128)
```
"""

import tempfile
from typing import Any

import ml_collections

from jaxsoup.data import glue
from jaxsoup.data import made_up
from jaxsoup.data import sources
from jaxsoup.data import text
from jaxsoup.experiments import defaults
from jaxsoup.experiments import random_search
from jaxsoup.typing import Json

# Examples of the training sets.
NUM_TRAIN = dict(mrpc=3668, rte=2490, cola=8551, sst2=67349)
# A transformer for synthetic sentences.
TINY = dict(width=32, depth=1, num_heads=2, mlp_width=64)


def parsed(arg: str | None) -> tuple[str, bool]:
  """The task of an argument, 'mrpc' by default, and whether it is short.

  Args:
    arg: such as 'rte', 'runlocal' or 'rte,runlocal'.

  Raises:
    ValueError: `arg` has another word, or two tasks.
  """
  words = defaults.words(arg, *glue.TASKS, 'runlocal')
  return defaults.one_of(glue.TASKS, words, 'mrpc'), 'runlocal' in words


def config(task: str, is_short: bool, length: int) -> ml_collections.ConfigDict:
  """The settings of 32 runs on a task; a config adds model, inputs and rate.

  Args:
    task: a key of `jaxsoup.data.glue.TASKS`.
    is_short: four runs on synthetic sentences instead.
    length: tokens of an example.
  """
  config = defaults.config()
  num_train = 400 if is_short else NUM_TRAIN[task]
  share = 0.25 if is_short else 0.1
  num_held_out = round(share * num_train)
  # The sizes are for `jaxsoup plan`, and for synthetic texts.
  config.data = dict(
      task=task,
      folder='',
      data_dir='',
      is_made_up=is_short,
      length=length,
      share=share,
      sizes=dict(train=num_train - num_held_out, held_out=num_held_out),
  )
  config.metric = glue.TASKS[task].metric
  config.finetune = defaults.training(
      num_epochs=3, batch_size=32, optimizer='adamw', clip=1.0
  )
  config.sweep = defaults.sweep(
      4 if is_short else 32,
      batch_size=(16, 32),
      num_epochs=(2, 3) if is_short else (2, 3, 4),
  )
  config.learned = defaults.learned(batch_size=32)
  config.batch_size = 100
  return config


def tokenizer(config: ml_collections.ConfigDict) -> Any:
  """A function from texts to tokens: that of the model, or a synthetic one."""
  if config.data.is_made_up:
    return made_up.tokenizer(config.data.length, config.model.vocab_size)
  return text.tokenizer(config.init, config.data.length)


def splits(
    config: ml_collections.ConfigDict, is_prefixed: bool = False
) -> sources.Splits:
  """The task as tokens in memory; synthetic if the config says so.

  Args:
    config: the experiment, with `seed` and the `data` of `config`.
    is_prefixed: whether each text names the task, as for T5.
  """
  data = config.data
  with tempfile.TemporaryDirectory() as synthetic:
    if data.is_made_up:
      sizes = dict(train=sum(data.sizes.values()), dev=200)
      made_up.glue(synthetic, data.task, sizes, config.seed)
    return glue.splits(
        data.task,
        tokenizer(config),
        folder=synthetic if data.is_made_up else data.folder or None,
        data_dir=data.data_dir or None,
        share=data.share,
        seed=config.seed,
        is_prefixed=is_prefixed,
    )


def sweep(config: ml_collections.ConfigDict) -> list[Json]:
  """Draws the runs by random search, by `config.seed` and `sweep.draw`."""
  return random_search.runs(
      config.sweep,
      config.seed,
      log_uniform=['learning_rate'],
      choice=['batch_size', 'num_epochs'],
  )
