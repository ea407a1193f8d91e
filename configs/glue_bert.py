"""GLUE: BERT fine-tuned 32 times on one task; four tasks, as in the paper.

  python -m jaxsoup.experiments.main --workdir=DIR \
      --config=configs/glue_bert.py:rte --config.data.folder=glue_data
  python -m jaxsoup.experiments.main --workdir=DIR \
      --config=configs/glue_bert.py:rte,runlocal
  jaxsoup plan --config configs/glue_bert.py:rte

The task is one of mrpc, rte, cola and sst2. It needs, downloaded by hand,

*   `config.init`, by default the folder `bert-base-uncased`, with
    `model.safetensors`, `config.json` and `tokenizer.json` (or `vocab.txt`) of
    BERT's uncased base model, and `pip install "jaxsoup[text]"`;
*   `config.data.folder`, with `MRPC/train.tsv` and `MRPC/dev.tsv`,
    `RTE/train.tsv` ... from gluebenchmark.com/tasks; without it TFDS's
    `glue/TASK` is read, which needs TensorFlow.

The labels of GLUE's test sets are secret: its validation set reports, and a
tenth of the training set, of each class, is held out to choose. Duplicates, and
examples of the validation set, are removed from the training set.

Expected, per cent, from the paper, with another held-out set and sweep:

                mrpc    rte   cola   sst2
  best single   88.3   61.0   59.1   92.5
  greedy soup   88.3   61.7   59.1   93.0

of MRPC the mean of accuracy and F1, of CoLA Matthews' correlation, of the
others accuracy. Not run at full size here. The paper's 32 settings differ in
learning rate, batch size, epochs and seed; their ranges here are those that
BERT's authors recommend, and somewhat wider in the rate.

Time: the four sweeps are 21, 14, 48 and 382 PFLOP, says `jaxsoup plan`; a
chip of v5e does 284 an hour at 40 % of its peak. That is an estimate, and small
batches do not reach that.

`runlocal` trains four tiny models from scratch, on synthetic sentences: under a
minute on two cores, to show that the code runs.

Source: Wortsman et al., "Model soups", ICML 2022, section 3.3.3; Devlin et al.,
"BERT", NAACL 2019, section 4 and appendix A.3.
"""

import tempfile

import ml_collections
import numpy as np

from jaxsoup.data import glue
from jaxsoup.data import made_up
from jaxsoup.data import sources
from jaxsoup.data import text

# Examples of the training sets.
NUM_TRAIN = dict(mrpc=3668, rte=2490, cola=8551, sst2=67349)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the experiment.

  Args:
    arg: the task, 'mrpc' by default, and perhaps ',runlocal'.

  Returns:
    The config; `sweep(config)` draws its runs.

  Raises:
    ValueError: `arg` is something else.
  """
  task, is_short = _parsed(arg)
  config = ml_collections.ConfigDict()
  config.seed = 0

  # The folder of the pre-trained model; empty trains from scratch.
  config.init = '' if is_short else 'bert-base-uncased'
  config.model = dict(
      family='bert',
      num_classes=2,
      vocab_size=512 if is_short else 30522,
      width=32 if is_short else 768,
      depth=1 if is_short else 12,
      num_heads=2 if is_short else 12,
      mlp_width=64 if is_short else 3072,
  )
  length = 24 if is_short else 128
  config.inputs = dict(
      input_ids=(length,), attention_mask=(length,), token_type_ids=(length,)
  )
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
  config.finetune = dict(
      num_epochs=3,
      batch_size=32,
      warmup=0.1,
      final=0.0,
      optimizer='adamw',
      clip=1.0,
  )
  config.sweep = dict(
      draw=0,
      num_runs=4 if is_short else 32,
      group_size=1,
      shard='0/1',
      learning_rate=(2e-3, 8e-3) if is_short else (1e-5, 1e-4),
      batch_size=(16, 32),
      num_epochs=(2, 3) if is_short else (2, 3, 4),
  )
  config.learned = dict(
      learning_rate=0.05,
      num_epochs=3,
      batch_size=32,
      val_fraction=0.25,
      patience=2,
  )
  config.batch_size = 100
  config.num_splits = 1
  # Resamples of the held-out set, to see how stable a choice is.
  config.stability = dict(greedy=0, greedy_ensemble=100)
  # What the analysis of the landscape covers; 0 leaves a part out. It can be
  # changed in a workdir that is finished.
  config.landscape = dict(
      num_points=0, num_pairs=0, num_examples=200, is_diagnosed=False
  )
  config.save_every_minutes = 10.0
  return config


def _parsed(arg: str | None) -> tuple[str, bool]:
  words = [word for word in (arg or '').split(',') if word]
  task = next((word for word in words if word in glue.TASKS), 'mrpc')
  if unknown := [word for word in words if word not in (task, 'runlocal')]:
    raise ValueError(
        f'Unknown argument {unknown[0]!r}: choose from '
        f"{', '.join(glue.TASKS)}; add ',runlocal' for a short version."
    )
  return task, 'runlocal' in words


def data(config: ml_collections.ConfigDict) -> sources.Splits:
  """The task as tokens in memory; synthetic if the config says so."""
  options = dict(share=config.data.share, seed=config.seed)
  task, length = config.data.task, config.data.length
  if config.data.is_made_up:
    tokenize = made_up.tokenizer(length, config.model.vocab_size)
    sizes = dict(train=sum(config.data.sizes.values()), dev=200)
    with tempfile.TemporaryDirectory() as folder:
      made_up.glue(folder, task, sizes, config.seed)
      return glue.splits(task, tokenize, folder=folder, **options)
  return glue.splits(
      task,
      text.tokenizer(config.init, length),
      folder=config.data.folder or None,
      data_dir=config.data.data_dir or None,
      **options,
  )


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
  return {
      'seed': int(rng.integers(2**31)),
      'learning_rate': float(
          np.exp(rng.uniform(*np.log(ranges.learning_rate)))
      ),
      'batch_size': int(rng.choice(ranges.batch_size)),
      'num_epochs': int(rng.choice(ranges.num_epochs)),
  }
