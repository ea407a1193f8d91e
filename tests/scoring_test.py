"""Scores of a command: what it sees, what is read of it, how it fails."""

import json
import os
import pathlib
import shlex
import shutil
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import numpy as safetensors

import jaxsoup
from jaxsoup import checkpoints
from jaxsoup import scoring
from jaxsoup.runtime import user_code

PARAMS = {'w': np.float32([3, 4])}


@pytest.fixture
def script(tmp_path):
  """A command that runs some Python, with the path as its argument."""

  def write(text, name='my_eval.py'):
    file = tmp_path / name
    file.write_text(text)
    return f'{shlex.quote(sys.executable)} -S {shlex.quote(str(file))} {{path}}'

  return write


def printing(*lines):
  text = '\n'.join(lines)
  return f'print({text!r})'


@pytest.mark.parametrize(
    'lines, expected',
    [
        (['0.5'], 0.5),
        (['-3'], -3.0),
        (['0.1', '0.25'], 0.25),
        (['0.25', 'done', ''], 0.25),
        (['[1]', '{"a": 0.5, "b": -1}'], {'a': 0.5, 'b': -1.0}),
        (
            ['{"t": {"acc": 1, "note": "x", "ok": true}, "n": null}'],
            {'t/acc': 1.0},
        ),
        (['{\n  "acc": 0.5\n}'], {'acc': 0.5}),
    ],
)
def test_what_is_the_score(script, lines, expected):
  eval_fn = scoring.from_command(script(printing(*lines)))
  assert eval_fn(PARAMS) == expected


@pytest.mark.parametrize(
    'lines, said',
    [
        ([], 'printed no score'),
        (['accuracy: 0.5'], r'printed no score.*It printed:\naccuracy: 0.5$'),
        (['0.5', '[0.5]'], r'printed \[0.5\]: expected a number'),
        (['0.5', '"high"'], 'printed .high.: expected a number'),
        (['true'], 'printed True: expected'),
        (['{}'], 'printed {}: expected'),
    ],
)
def test_no_score(script, lines, said):
  eval_fn = scoring.from_command(script(printing(*lines)))
  with pytest.raises(user_code.UserCodeError, match=f'(?s){said}'):
    eval_fn(PARAMS)


def test_what_a_command_leaves_running_is_ended(tmp_path):
  file = tmp_path / 'number'
  command = f'sleep 600 & echo $! > {shlex.quote(str(file))}; echo 1 # {{path}}'
  assert scoring.from_command(command)(PARAMS) == 1.0
  assert not _is_running(int(file.read_text()))


@pytest.mark.parametrize('text', ['NaN', 'nan', '-Infinity', '{"a": NaN}'])
def test_a_score_that_is_not_finite(script, text):
  """It is not taken for noise after an earlier number."""
  eval_fn = scoring.from_command(script(printing('0.5', text)))
  log = {}
  with pytest.raises(ValueError, match='ingredient 0; scores must be finite'):
    jaxsoup.greedy([PARAMS], eval_fn, scores=log)
  assert not log


def test_a_command_that_fails(script, tmp_path):
  command = script('import sys; print(0.5); sys.exit("no such tensor")')
  outputs = tmp_path / 'outputs'
  eval_fn = scoring.from_command(command, outputs=outputs, scratch=tmp_path)
  said = r'my_eval.py /.*/candidate exited with 1. It printed:\nno such tensor'
  with pytest.raises(user_code.UserCodeError, match=said) as error:
    eval_fn(PARAMS)
  assert str(error.value).endswith(f'{outputs}/0001.out and 0001.err.')
  assert (outputs / '0001.out').read_text() == '0.5\n'
  assert (outputs / '0001.err').read_text() == 'no such tensor\n'
  assert {p.name for p in tmp_path.iterdir()} == {'my_eval.py', 'outputs'}


def test_retries(script, tmp_path):
  """The second run has a score; every run keeps its output."""
  command = script(f"""
import pathlib, sys
file = pathlib.Path({str(tmp_path / "count")!r})
count = int(file.read_text()) if file.exists() else 0
file.write_text(str(count + 1))
left = pathlib.Path(sys.argv[1] + '-left')
assert not left.exists()
left.mkdir()
print(count)
sys.exit(count == 0)
""")
  outputs = tmp_path / 'outputs'
  eval_fn = scoring.from_command(command, retries=2, outputs=outputs)
  assert [eval_fn(PARAMS), eval_fn(PARAMS)] == [1.0, 2.0]
  assert [p.read_text() for p in sorted(outputs.glob('*.out'))] == [
      '0\n',
      '1\n',
      '2\n',
  ]
  fails = scoring.from_command(script('1 / 0', 'fails.py'), retries=2)
  with pytest.raises(user_code.UserCodeError, match='It was run 3 times.'):
    fails(PARAMS)


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path):
  child = tmp_path / 'child'
  command = f'sleep 600 & echo $! > {child}; sleep 600; echo {{path}}'
  eval_fn = scoring.from_command(command, timeout=2, scratch=tmp_path / 's')
  with pytest.raises(user_code.UserCodeError, match='not end within 2 s'):
    eval_fn(PARAMS)
  number = int(child.read_text())
  for _ in range(100):  # It may take a moment to be gone.
    if not _is_running(number):
      break
    time.sleep(0.1)
  assert not _is_running(number)
  assert not list((tmp_path / 's').iterdir())


def _is_running(number):
  status = pathlib.Path(f'/proc/{number}/status')
  try:
    return 'State:\tZ' not in status.read_text()
  except FileNotFoundError:
    return False


def test_shells(tmp_path):
  """A path with spaces; a pipe; quotes; nothing but the path is replaced."""
  scratch = tmp_path / 'a $b; "c'
  for command, expected in {
      "python3 -c 'print(0.5)' {path}": 0.5,
      'echo \'{"a": 1}\' > {path}.json; test -d {path} && cat {path}.json': {
          'a': 1.0
      },
      "X=3 sh -c 'echo $X' {path}": 3.0,
      'printf %s\\\\n 0.25 {path} | head -n1': 0.25,
  }.items():
    eval_fn = scoring.from_command(command, scratch=scratch)
    assert eval_fn(PARAMS) == expected, command


def test_a_file_of_scores(script):
  command = script("""
import json, os, sys
os.mkdir(sys.argv[1] + '-out')
rows = {'results': {'mmlu': {'acc,none': 0.5, 'alias': 'mmlu'}}, 'n': 3}
with open(sys.argv[1] + '-out/results_7.json', 'w') as file:
  json.dump(rows, file, indent=2)
print(0.75)
""")
  made = lambda **options: scoring.from_command(command, **options)(PARAMS)
  pattern = '{path}-out/*.json'
  assert made() == 0.75
  assert made(score_file=pattern) == {'results/mmlu/acc,none': 0.5, 'n': 3.0}
  assert made(score_file=pattern, score_key='results/mmlu/acc,none') == 0.5
  assert made(score_file=pattern, score_key='results') == {'mmlu/acc,none': 0.5}
  with pytest.raises(user_code.UserCodeError, match='wrote 0 files'):
    made(score_file='{path}-out/*.csv')
  with pytest.raises(user_code.UserCodeError, match="no score 'gsm8k', but"):
    made(score_file=pattern, score_key='gsm8k')
  with pytest.raises(ValueError, match='has to begin with {path}'):
    made(score_file='results.json')


def test_commands_that_cannot_be_run():
  with pytest.raises(ValueError, match="'python x.py' has no {path}"):
    scoring.from_command('python x.py')
  with pytest.raises(ValueError, match='cannot be read: No closing quotation'):
    scoring.from_command("python '{path}")
  eval_fn = scoring.from_command('no_such_program {path}')
  with pytest.raises(user_code.UserCodeError, match='cannot be started'):
    eval_fn(PARAMS)


def test_the_identity_changes_with_the_script(script):
  command = script('print(1)')
  before = scoring.identity(command)
  assert before.startswith(command) and before == scoring.identity(command)
  script('print(2)')
  assert scoring.identity(command) != before
  assert scoring.identity(command, 'acc') != scoring.identity(command)


# What the command sees.


def norm_of(file):
  return float(np.linalg.norm(safetensors.load_file(file)['w']))


def test_a_search_by_a_command_is_that_by_the_same_function(script, tmp_path):
  """Restored by the call of the owner: the safetensors library."""
  runs = []
  for k in range(3):
    runs.append(tmp_path / f'run{k}.safetensors')
    params = {'w': np.float32([k - 1, 2 * k]), 'b': np.float32(k)}
    checkpoints.save(runs[-1], params)
  command = script("""
import struct, sys, json
data = open(sys.argv[1], 'rb').read()
assert sys.argv[1].endswith('.safetensors')
size, = struct.unpack('<Q', data[:8])
start, end = json.loads(data[8:8 + size])['w']['data_offsets']
w = struct.unpack('<2f', data[8 + size + start:8 + size + end])
print(-(abs(w[0] - 0.3) + abs(w[1] - 2.5)))
""")
  ingredients = checkpoints.Ingredients(runs)
  by_command = scoring.from_command(command, ingredients)
  by_function = lambda params: -float(
      np.abs(np.float64(params['w']) - [0.3, 2.5]).sum()
  )
  for recipe, options in (
      (jaxsoup.greedy, {}),
      (jaxsoup.search, {'num_evaluations': 8}),
  ):
    actual = recipe(ingredients, by_command, **options)
    expected = recipe(ingredients, by_function, **options)
    np.testing.assert_array_equal(actual.alpha, expected.alpha)
    scores = lambda soup: [trial.score for trial in soup.info.trials]
    assert scores(actual) == scores(expected)


def test_candidates_of_hugging_face_directories(tmp_path):
  for k in range(2):
    run = tmp_path / f'run{k}'
    params = {'w': np.full(2, k, np.float32)}
    checkpoints.save(run / 'model.safetensors', params)
    (run / 'config.json').write_text('{"model_type": "bert"}')
    (run / 'tokenizer.json').write_text('{}')
  ingredients = checkpoints.Ingredients([tmp_path / 'run0', tmp_path / 'run1'])
  command = "cp -r {path} KEPT; echo '0.5'".replace(
      'KEPT', shlex.quote(str(tmp_path / 'kept'))
  )
  scoring.from_command(command, ingredients)({'w': np.float32([3, 4])})
  kept = tmp_path / 'kept'
  assert {'config.json', 'tokenizer.json'} < {p.name for p in kept.iterdir()}
  assert json.loads((kept / 'config.json').read_text())['model_type'] == 'bert'
  assert norm_of(kept / 'model.safetensors') == 5.0


def test_candidates_of_orbax_checkpoints(tmp_path):
  """Restored by Orbax's own manager, at its step and item."""
  for k in range(2):
    params = {'w': np.full(2, k, np.float32)}
    with ocp.CheckpointManager(
        tmp_path / f'run{k}', item_names=('params', 'state')
    ) as manager:
      manager.save(
          7,
          args=ocp.args.Composite(
              params=ocp.args.StandardSave(params),
              state=ocp.args.StandardSave({'step': np.int32(7)}),
          ),
      )
  ingredients = checkpoints.Ingredients(
      [tmp_path / 'run0', tmp_path / 'run1'], item='params'
  )
  command = f'cp -r {{path}} {shlex.quote(str(tmp_path / "kept"))}; echo 0.5'
  scoring.from_command(command, ingredients)({'w': np.float32([3, 4])})
  with ocp.CheckpointManager(
      tmp_path / 'kept', item_names=('params', 'state')
  ) as manager:
    assert manager.latest_step() == 7
    restored = manager.restore(
        7, args=ocp.args.Composite(params=ocp.args.StandardRestore())
    )
  np.testing.assert_array_equal(restored['params']['w'], [3, 4])


def test_candidates_go_where_there_is_room(tmp_path, monkeypatch):
  monkeypatch.setattr(scoring, '_MEMORY', tmp_path)
  monkeypatch.setattr(scoring.tempfile, 'tempdir', str(tmp_path / 'disk'))
  os.mkdir(tmp_path / 'disk')
  free = 10**6
  usage = lambda path: type('Usage', (), {'free': free})
  monkeypatch.setattr(scoring.shutil, 'disk_usage', usage)
  for num, expected in ((free // 9, tmp_path), (free // 7, tmp_path / 'disk')):
    assert scoring._with_room({'w': np.zeros(num, np.float32)}) == expected


def test_stops_while_a_command_runs(script, tmp_path):
  """As a SIGTERM does: the command is ended, and its candidate deleted."""
  run = checkpoints.save(tmp_path / 'run', PARAMS)

  class Stopping(checkpoints.Ingredients):

    def look_for_stop(self):
      if (tmp_path / 'number').exists():
        raise RuntimeError('stop here')

  command = script(f"""
import os, pathlib, time
file = pathlib.Path({str(tmp_path / "number")!r})
file.with_suffix('.new').write_text(str(os.getpid()))
file.with_suffix('.new').rename(file)
time.sleep(600)
""")
  scratch = tmp_path / 'scratch'
  eval_fn = scoring.from_command(command, Stopping([run]), scratch=scratch)
  with pytest.raises(RuntimeError, match='stop here'):
    eval_fn(PARAMS)
  assert not _is_running(int((tmp_path / 'number').read_text()))
  assert not list(scratch.iterdir())


# The harness of EleutherAI.

TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files: {test: FILE}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
COLOURS = ['red', 'green', 'blue']
THINGS = ['rose', 'grass', 'sky', 'sea', 'leaf', 'fire', 'cherry', 'moss']


@pytest.mark.slow
@pytest.mark.reference
@pytest.mark.skipif(not shutil.which('lm_eval'), reason='lm_eval is missing')
def test_lm_evaluation_harness(tmp_path, monkeypatch):
  """A small GPT-2 and a local task, against the answers of the model."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  import tokenizers

  words = ['<unk>', '<eos>', 'the', 'is', *COLOURS, *THINGS]
  model_of_words = tokenizers.models.WordLevel(
      {word: i for i, word in enumerate(words)}, unk_token='<unk>'
  )
  tokenizer = tokenizers.Tokenizer(model_of_words)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  fast = transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizer, unk_token='<unk>', eos_token='<eos>'
  )
  config = transformers.GPT2Config(
      vocab_size=len(words), n_positions=16, n_embd=16, n_layer=1, n_head=2
  )
  models = []
  for k in range(2):
    torch.manual_seed(k)
    models.append(transformers.GPT2LMHeadModel(config).eval())
    with torch.no_grad():
      for parameter in models[-1].parameters():
        parameter.add_(0.5 * torch.randn_like(parameter))
    models[-1].save_pretrained(tmp_path / f'run{k}')
    fast.save_pretrained(tmp_path / f'run{k}')
  rows = [
      {'question': f'the {thing} is', 'choices': COLOURS, 'answer': i % 3}
      for i, thing in enumerate(THINGS)
  ]
  data = tmp_path / 'data.jsonl'
  data.write_text('\n'.join(map(json.dumps, rows)))
  (tmp_path / 'tasks').mkdir()
  (tmp_path / 'tasks/colours.yaml').write_text(TASK.replace('FILE', str(data)))
  for name, value in {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path)}.items():
    monkeypatch.setenv(name, value)
  ingredients = checkpoints.Ingredients([tmp_path / f'run{k}' for k in (0, 1)])
  eval_fn = scoring.from_command(
      'lm_eval --model hf --model_args pretrained={path},dtype=float32 --tasks '
      f'colours --include_path {tmp_path}/tasks --device cpu --output_path '
      '{path}-results',
      ingredients,
      score_file='{path}-results/*/results_*.json',
      score_key='results',
  )
  scores = eval_fn(ingredients[1])

  def is_right(row):
    ids = fast(row['question'], return_tensors='pt').input_ids
    with torch.no_grad():
      last = models[1](ids).logits[0, -1]
    choices = fast.convert_tokens_to_ids(row['choices'])
    return int(last[choices].argmax()) == row['answer']

  assert scores['colours/acc,none'] == np.mean(list(map(is_right, rows)))
