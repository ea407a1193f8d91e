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

import ml_collections

from jaxsoup.experiments import defaults
from jaxsoup.experiments import glue


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The experiment; `arg` is the task, and perhaps ',runlocal'."""
  task, is_short = glue.parsed(arg)
  length = 24 if is_short else 128
  config = glue.config(task, is_short, length)
  # The folder of the pre-trained model; empty trains from scratch.
  config.init = '' if is_short else 'bert-base-uncased'
  config.model = dict(
      family='bert',
      num_classes=2,
      vocab_size=512 if is_short else 30522,
      **(glue.TINY if is_short else defaults.BASE),
  )
  config.inputs = dict(
      input_ids=(length,), attention_mask=(length,), token_type_ids=(length,)
  )
  config.sweep.learning_rate = (2e-3, 8e-3) if is_short else (1e-5, 1e-4)
  return config


# Random search, and the task as tokens in memory.
sweep = glue.sweep
data = glue.splits
