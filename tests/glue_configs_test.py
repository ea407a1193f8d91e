"""The experiments on GLUE: sizes, data, labels as texts, and end to end."""

import json
import pathlib

from flax import nnx
import jax
import numpy as np
import pytest
from sklearn import metrics as reference

from jaxsoup import checkpoints
from jaxsoup.data import glue
from jaxsoup.data import made_up
from jaxsoup.experiments import architectures
from jaxsoup.experiments import configs
from jaxsoup.experiments import main
from jaxsoup.models import t5

CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'
# Two runs on 120 examples.
TINY = (
    '--config.sweep.num_runs=2',
    '--config.data.sizes.train=120',
    '--config.data.sizes.held_out=40',
    '--config.learned.num_epochs=1',
    '--config.learned.batch_size=15',
)


@pytest.fixture(params=['glue_bert', 'glue_t5'])
def name(request):
  return request.param


def load(name, arg='', overrides=()):
  return configs.load(f'{CONFIGS / name}.py:{arg}', overrides)


@pytest.mark.parametrize('task', glue.TASKS)
def test_each_task_has_32_settings_and_its_metric(name, task):
  experiment = load(name, task)
  config = experiment.config
  assert config.data.task == task
  expected = {'mrpc': 'accuracy and f1', 'cola': 'matthews'}
  assert config.metric == expected.get(task, 'accuracy')
  runs = experiment.runs
  assert len(runs) == 32
  assert len({run['seed'] for run in runs}) == 32
  assert {run['batch_size'] for run in runs} == {16, 32}
  assert {run['num_epochs'] for run in runs} == {2, 3, 4}
  low, high = config.sweep.learning_rate
  assert all(low < run['learning_rate'] < high for run in runs)
  fewer = load(name, task, ['--config.sweep.num_runs=5'])
  assert fewer.runs == runs[:5]
  assert load(name, task, ['--config.seed=1']).runs[0] != runs[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, num', [('glue_bert', 109_483_778), ('glue_t5', 222_903_552)]
)
def test_models_have_the_sizes_of_the_originals(name, num):
  """BERT-base with a head of two classes, and T5-base."""
  model = architectures.of(load(name))
  params = jax.eval_shape(model.init_fn, jax.random.key(0))
  assert sum(x.size for x in jax.tree.leaves(params)) == num


def test_unknown_arguments(name):
  with pytest.raises(configs.UsageError, match="'qqp': choose from mrpc, rte"):
    load(name, 'qqp')
  with pytest.raises(configs.UsageError, match="'short'"):
    load(name, 'rte,short')


def test_without_its_files_data_say_what_is_missing(name, tmp_path):
  config = load(name, 'rte', [f'--config.init={tmp_path}']).config
  with pytest.raises(FileNotFoundError, match='tokenizer.json'):
    load(name, 'rte').data_fn(config)


def test_made_up_files_are_those_of_glue(tmp_path):
  for task, details in glue.TASKS.items():
    made_up.glue(tmp_path, task, dict(train=60, dev=20), seed=1)
    train = glue.read(task, 'train', folder=tmp_path)
    assert train.label.tolist() == [0, 1] * 30
    assert len(train.columns) == len(details.columns)
    words = {w for x in train.columns for text in x for w in text.split()}
    assert words <= set(made_up.WORDS)
    # The share of words that speak for label 1, of texts of either label.
    kinds = [
        np.mean([made_up.WORDS.index(w) % 2 for w in text.split()])
        for text in train.columns[-1]
    ]
    assert abs(np.mean(kinds[1::2]) - 0.7) < 0.06
    assert abs(np.mean(kinds[::2]) - 0.3) < 0.06


def test_tokens_of_made_up_pairs():
  tokenize = made_up.tokenizer(length=7, vocab_size=100)
  tokens = tokenize(['ba be', 'bo'], ['bi', 'ba ba ba ba ba'])
  assert tokens['token_type_ids'].tolist() == [
      [0, 0, 0, 1, 1, 0, 0],
      [0, 0, 1, 1, 1, 1, 1],
  ]
  assert tokens['attention_mask'].sum(1).tolist() == [5, 7]
  ids = tokens['input_ids']
  assert ids[0, 2] == ids[0, 4] == ids[1, 1] == 1 and ids[0, 5] == 0
  assert ids[0, 0] == ids[1, 2] and (ids[ids > 1] < 100).all()


def test_splits_do_not_meet(name):
  experiment = load(name, 'mrpc,runlocal', TINY)
  splits = experiment.data_fn(experiment.config)
  rows = [
      {x.tobytes() for x in part.arrays['input_ids']}
      for part in (splits.train, splits.held_out, splits.test)
  ]
  assert [len(x) for x in rows] == [120, 40, 200]
  assert len(set.union(*rows)) == 360


@pytest.mark.slow
def test_t5_reads_the_task_and_scores_the_labels():
  """Logits are sums of log probabilities, written out token by token."""
  experiment = load('glue_t5', 'rte,runlocal', TINY)
  config = experiment.config
  splits = experiment.data_fn(config)
  tokenize = made_up.tokenizer(config.data.length, config.model.vocab_size)
  prefix = tokenize(['rte sentence1:'])['input_ids'][0, :2]
  batch = {k: x[:3] for k, x in splits.test.arrays.items()}
  assert (batch['input_ids'][:, :2] == prefix).all()
  model = architectures.of(experiment)
  params = model.start_fn(jax.random.key(0))
  logits = model.logits_fn(params, batch)
  module = t5.T5(**config.model.to_dict(), rngs=nnx.Rngs(0))
  nnx.update(module, params)
  assert np.ptp(logits[:, 0]) > 1e-3
  next_fn = nnx.jit(lambda m, *xs: jax.nn.log_softmax(m(*xs)[:, -1]))
  for c, label in enumerate(glue.TASKS['rte'].labels):
    tokens = tokenize([label])['input_ids'][0]
    text = [0, *tokens[tokens > 0].tolist()]
    assert text[-1] == 1 and len(text) == 3
    score = np.zeros(3)
    for i in range(1, len(text)):
      said = np.tile(np.array(text[:i]), (3, 1))
      log_p = next_fn(module, batch['input_ids'], said, batch['attention_mask'])
      score += log_p[:, text[i]]
    np.testing.assert_allclose(logits[:, c], score, rtol=1e-4)


def _score(task, logits, label):
  """By scikit-learn, what `config.metric` names."""
  predicted = logits.argmax(-1)
  if task == 'cola':
    return reference.matthews_corrcoef(label, predicted)
  accuracy = reference.accuracy_score(label, predicted)
  return (accuracy + reference.f1_score(label, predicted)) / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, task', [('glue_bert', 'mrpc'), ('glue_t5', 'cola')]
)
def test_end_to_end(name, task, tmp_path):
  experiment = load(name, f'{task},runlocal', TINY)
  rows = {row.name: row for row in main.run(experiment, tmp_path)}
  assert {'00', '01', 'uniform', 'greedy', 'ensemble'} <= rows.keys()
  splits = experiment.data_fn(experiment.config)
  for run in ('00', '01'):
    with np.load(tmp_path / 'logits' / f'{run}.npz') as logits:
      for part in ('held_out', 'test'):
        label = getattr(splits, part).arrays['label']
        score = _score(task, logits[part], label)
        assert abs(getattr(rows[run], part) - score) < 1e-6
  assert rows['greedy'].held_out >= max(
      rows['00'].held_out, rows['01'].held_out
  )
  assert rows['greedy'].metric == experiment.config.metric
  results = json.loads((tmp_path / 'results.json').read_text())
  assert results['runs'] == experiment.runs
  start, end = (
      checkpoints.Ingredients([tmp_path / path])[0]
      for path in ('theta_0', 'runs/00')
  )
  moved = jax.tree.map(lambda x, y: bool((x != y).any()), start, end)
  assert any(jax.tree.leaves(moved))
