"""The `jaxsoup` command: output, exit codes, one-line errors."""

import json
import logging
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import typer
from typer import testing

import jaxsoup
from jaxsoup import checkpoints
from jaxsoup import cli
from jaxsoup import doctor

# As in the tests of checkpoints: what Orbax leaves behind when a read failed.
pytestmark = pytest.mark.filterwarnings(
    'ignore::pytest.PytestUnraisableExceptionWarning'
)

HERE = """
import pathlib

import jax.numpy as jnp
import numpy as np

from jaxsoup import evaluation


def score(params):
  return -float(abs(params['w'] - 1.2).sum())


def once(params):
  if pathlib.Path('scored').exists():
    raise ValueError('scored before')
  return score(params)


def right(params, batch):
  return abs(params['w'].sum() - 2.4) < batch['x']


early = evaluation.mean_of(
    right, evaluation.batched({'x': np.linspace(0, 3, 50)}, 5)
)


def loss():
  loss_fn = lambda params, batch, beta: jnp.square(params['w'] * batch).mean()
  return loss_fn, [np.ones(2, np.float32)]


def with_val():
  loss_fn, batches = loss()
  return loss_fn, batches, batches


def raises(params):
  raise KeyError('label')


def nan(params):
  return float('nan')


def several(params):
  x = float(params['w'][0])
  return {'near': -abs(x - 1.2), 'acc,none': -x, 'high': x}


number = 3
"""


@pytest.fixture(autouse=True)
def cwd(tmp_path, monkeypatch):
  """A directory with the user's module in it."""
  (tmp_path / 'mine.py').write_text(HERE)
  (tmp_path / 'broken.py').write_text('x = 1 / 0\n')
  (tmp_path / 'torn.py').write_text('def f(:\n')
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', list(sys.path))
  yield
  for name in ('mine', 'broken', 'torn'):
    sys.modules.pop(name, None)


@pytest.fixture
def runs(tmp_path):
  names = [f'run{k}' for k in range(3)]
  for k, name in enumerate(names):
    checkpoints.save(tmp_path / name, {'w': np.full(2, k, np.float32)})
  return names


def invoke(*args):
  return testing.CliRunner().invoke(cli.app, list(map(str, args)))


def run(*args):
  result = invoke(*args)
  assert result.exit_code == 0, (result.output, result.exception)
  return result


def assert_fails(result, code, text):
  assert result.exit_code == code, (result.output, result.exception)
  assert isinstance(result.exception, SystemExit)
  assert 'Traceback' not in result.output
  if code == 1:
    assert result.stdout == ''
    lines = result.stderr.strip().split('\n')
    assert len(lines) == 1 and lines[0].startswith('Error: ')
  # A usage error is drawn in a box, which breaks lines.
  flat = ' '.join(result.stderr.replace('│', ' ').split())
  assert text in flat


# --- soup ---------------------------------------------------------------------


@pytest.mark.parametrize(
    'recipe, options, expected',
    [
        ('uniform', (), 1.0),
        ('greedy', ('--eval', 'mine:score'), 1.0),
        ('greedy', ('--eval', 'mine:score', '--seed', 3, '--strict'), None),
        ('pruned', ('--eval', 'mine:score', '--scores', 'log.jsonl'), 1.0),
        ('search', ('--eval', 'mine:score', '--evaluations', 9), None),
        ('learned', ('--loss', 'mine:loss', '--epochs', 2), None),
        ('learned', ('--loss', 'mine:with_val', '--per-tensor'), None),
        ('average', ('--alpha', '0.25,0.25,0.5'), 1.25),
        ('model-stock', ('--init', 'start'), None),
    ],
)
def test_recipes(runs, recipe, options, expected):
  checkpoints.save('start', {'w': np.full(2, -1, np.float32)})
  result = run('soup', recipe, *runs, '--out', 'out', *options, '--json')
  printed = json.loads(result.stdout)
  # What is recorded is its name in Python.
  recipe = recipe.replace('-', '_')
  assert printed['recipe'] == recipe and printed['out'] == 'out'
  paths = [str(pathlib.Path(run).absolute()) for run in runs]
  assert list(printed['alpha']) == paths
  soup = checkpoints.load('out')
  alpha = list(printed['alpha'].values())
  if recipe != 'model_stock':
    mixed = np.dot(alpha, [0, 1, 2])
    np.testing.assert_allclose(soup.params['w'], [mixed] * 2, atol=1e-5)
  if expected is not None:
    np.testing.assert_allclose(soup.params['w'], [expected] * 2)
  stored = checkpoints.provenance('out')
  seed = 3 if '--seed' in options else None if recipe != 'search' else 0
  assert stored['metadata'] == {'recipe': recipe, 'seed': seed}
  assert [row['path'] for row in stored['ingredients']] == paths


@pytest.mark.parametrize(
    'alpha, said',
    [('1,1,1', '3'), ('0.5,0.5,-1', '0'), ('0.3333,0.3333,0.3333', None)],
)
def test_alpha_that_does_not_sum_to_one(runs, alpha, said):
  args = ('average', *runs, '--alpha', alpha, '--out', 'out')
  result = run('soup', *args)
  expected = f'Warning: alpha sums to {said}, not 1. It is not normalized: '
  assert result.stderr.startswith(expected) if said else not result.stderr
  values = [float(x) for x in alpha.split(',')]
  np.testing.assert_allclose(
      checkpoints.load('out').params['w'], np.dot(values, range(3)), rtol=1e-6
  )


def test_steps_that_no_average_uses_are_not_read(tmp_path):
  """An early step of another structure: it was saved before something began."""
  for step in (1, 2, 3):
    params = {'w': np.full(2, step, np.float32)}
    checkpoints.save(tmp_path / f'run/{step}', params)
  checkpoints.save(tmp_path / 'run/0', {'v': np.ones(3)})
  args = ('--last', 2, '--last', 1, '--eval', 'mine:score')
  result = run('soup', 'trajectory', 'run', *args, '--out', 'out', '--json')
  alpha = json.loads(result.stdout)['alpha']
  assert {pathlib.Path(p).name: x for p, x in alpha.items()} == dict.fromkeys(
      ('3', '2'), 0.5
  )


def test_best_single_is_said_if_all_were_scored(runs):
  args = ('soup', 'greedy', *runs, '--eval', 'mine:score', '--out')
  assert ', best single -0.4000' in invoke(*args, 'a').stdout
  shuffled = invoke(*args, 'b', '--seed', 3).stdout
  assert 'held-out score' in shuffled and 'best single' not in shuffled


def test_rejections_end_early(runs):
  args = ('greedy', *runs, '--eval', 'mine:early', '--scores', 'log.jsonl')
  result = run('soup', *args, '--out', 'out')
  trials = checkpoints.load('out').info.trials
  num_early = sum(isinstance(t.score, jaxsoup.AtMost) for t in trials)
  assert num_early > 0
  assert f'rejections, {num_early} of them early' in result.stdout
  assert pathlib.Path('log.jsonl').read_text().count('at_most') == num_early
  # Again, from the log.
  again = run('soup', *args, '--out', 'again', '--json')
  assert json.loads(again.stdout)['score'] == checkpoints.load('out').info.score


@pytest.mark.slow
@pytest.mark.parametrize('recipe', ['greedy', 'pruned', 'search'])
def test_workers_make_the_same(runs, recipe):
  args = ('soup', recipe, *runs, '--eval', 'mine:score', '--json')
  if recipe == 'search':
    args = (*args, '--evaluations', 9)
  here = json.loads(invoke(*args, '--out', 'here').stdout)
  there = json.loads(invoke(*args, '--out', 'there', '--workers', 2).stdout)
  assert here.pop('out') != there.pop('out')
  assert here == there


@pytest.mark.parametrize(
    'options, mode',
    [
        (('--memory', 'cached'), 'cached, 0 reads per step'),
        (('--memory', 'streamed'), 'streamed, 4 reads per step'),
        (('--memory', 'resident'), 'resident, 0 reads per step'),
        ((), 'resident, 0 reads per step'),
    ],
)
def test_learned_says_its_mode_before_it_starts(runs, options, mode):
  args = ('learned', *runs, '--out', 'out', '--loss', 'mine:loss')
  result = run('soup', *args, *options, '--json')
  plan = checkpoints.load('out').info.plan
  assert result.stderr == f'learned: {mode}; {plan.reason}.\n'
  assert mode.startswith(plan.memory)
  logger = logging.getLogger('jaxsoup')  # As it was.
  assert (logger.handlers, logger.level, logger.propagate) == ([], 0, True)


@pytest.mark.parametrize(
    'recipe, options',
    [
        ('greedy', ('--eval', 'mine:score')),
        ('learned', ('--loss', 'mine:loss')),
    ],
)
def test_soup_as_text(runs, recipe, options):
  result = run('soup', recipe, *runs, '--out', 'out', *options)
  assert result.stdout.count('run') == 3
  assert result.stdout.endswith('Soup: out\n')
  assert ('held-out score' in result.stdout) == (recipe == 'greedy')


@pytest.mark.parametrize(
    'options, start, score',
    [
        (('near',), [1 / 3] * 3, lambda x: -abs(x - 1.2)),
        (
            ('worst', '--start', 'greedy'),
            [0.5, 0.5, 0],
            lambda x: min(-abs(x - 1.2), -x),
        ),
        (
            ('near=2,acc,none=-0.5', '--start', 'categories'),
            [1 / 3] * 3,
            lambda x: 0.5 * x - 2 * abs(x - 1.2),
        ),
        (
            ('high', '--space', 'hyperplane', '--method', 'coordinates'),
            [1 / 3] * 3,
            lambda x: x,
        ),
        (
            ('near', '--val-objective', 'high', '--patience', 1, '--depth', 1),
            [1 / 3] * 3,
            lambda x: -abs(x - 1.2),
        ),
    ],
)
def test_searches(runs, options, start, score):
  """The score of the start and of the soup, by the objective."""
  args = ('--eval', 'mine:several', '--scores', 'log.jsonl')
  command = ('soup', 'search', *runs, *args, '--evaluations', 12, '--out')
  result = run(*command, 'out', '--objective', *options)
  info = checkpoints.load('out').info
  x = float(checkpoints.load('out').params['w'][0])
  assert info.score == pytest.approx(score(x), abs=1e-5)
  assert info.score >= info.trials[0].score
  first = info.trials[0].alpha
  np.testing.assert_allclose(*jax.tree.leaves(first), start, atol=1e-6)
  assert f'near {-abs(x - 1.2):.4f}, acc,none {-x:.4f}, high' in result.stdout
  # Again, from the log.
  pathlib.Path('mine.py').touch()
  before = pathlib.Path('log.jsonl').read_bytes()
  again = invoke(*command, 'again', '--objective', *options)
  assert again.stdout == result.stdout.replace('Soup: out', 'Soup: again')
  assert pathlib.Path('log.jsonl').read_bytes() == before


def test_a_score_command(runs):
  pathlib.Path('size.py').write_text(
      'import os, sys; print(len(os.listdir(sys.argv[1])))'
  )
  command = f'{sys.executable} -S size.py {{path}}'
  args = ('soup', 'pruned', *runs, '--scores', 'log.jsonl', '--out')
  result = run(*args, 'out', '--score-command', command)
  score = checkpoints.load('out').info.score
  assert score == len(os.listdir('run0')) == len(os.listdir('out'))
  lines = pathlib.Path('log.jsonl').read_text().splitlines()
  assert len(list(pathlib.Path('log.jsonl.outputs').glob('*.out'))) == (
      len(lines) - 1
  )
  # Another script is another evaluation.
  pathlib.Path('size.py').write_text('1 / 0')
  result = invoke(*args, 'b', '--score-command', command)
  assert_fails(result, 1, 'scores of another evaluation')
  result = invoke(
      'soup', 'greedy', *runs, '--out', 'b', '--score-command', command
  )
  assert result.exit_code == 1 and result.stdout == ''
  assert result.stderr.startswith(
      f'Error: The command {sys.executable} -S size'
  )
  assert 'exited with 1. It printed:\n' in result.stderr
  assert result.stderr.endswith('ZeroDivisionError: division by zero\n')


ONE_OF_TWO = 'for --eval or --score-command: give one of the two'


@pytest.mark.parametrize(
    'args, code, text',
    [
        (('best',), 2, "'best' is not a recipe. The recipe comes first: "),
        (('model_stock',), 2, 'jaxsoup soup model-stock RUN... --out OUT.'),
        (
            ('--seed', '3'),
            2,
            'Recipes: uniform, average, trajectory, model-stock,',
        ),
        (('greedy',), 2, ONE_OF_TWO),
        (('pruned',), 2, ONE_OF_TWO),
        (('greedy', '--workers', 2, '--shard'), 2, 'Choose one'),
        (
            ('greedy', '--eval', 'mine:score', '--score-command', 'x {path}'),
            2,
            ONE_OF_TWO,
        ),
        (('greedy', '--score-command', 'x'), 1, "'x' has no {path}"),
        (('greedy', '--eval', 'mine:several'), 1, '(--objective)'),
        (
            ('greedy', '--eval', 'mine:several', '--objective', 'a=b'),
            2,
            "'a=b': write the name of a score, or NAME=WEIGHT,NAME=WEIGHT.",
        ),
        (
            ('search', '--eval', 'mine:score'),
            2,
            'for --evaluations or --minutes: give one, or both',
        ),
        (('learned',), 2, "Missing option '--loss'"),
        (('model-stock',), 2, "Missing option '--init'"),
        (('uniform', '--nonsense'), 2, 'No such option'),
        (('uniform', '--seed', '3'), 2, 'No such option'),
        (('greedy', '--eval', 'mine'), 1, 'package.module:function'),
        (('greedy', '--eval', 'no_such:f'), 1, 'cannot import no_such'),
        (('greedy', '--eval', 'broken:f'), 1, 'ZeroDivisionError'),
        (('greedy', '--eval', 'torn:f'), 1, 'SyntaxError'),
        (('greedy', '--eval', 'mine:g'), 1, 'no such function'),
        (('greedy', '--eval', 'mine:number'), 1, 'no such function'),
        (('greedy', '--eval', 'mine:raises'), 1, 'mine.py, line 40'),
        (('pruned', '--eval', 'mine:raises'), 1, 'raised KeyError'),
        (('greedy', '--eval', 'mine:nan'), 1, 'run0'),
        (('learned', '--loss', 'mine:score'), 1, 'mine:score'),
        (('learned', '--loss', 'mine:list'), 1, '--loss mine:list: mine has'),
        (('learned', '--memory', 'all'), 2, "'all' is not one of 'auto', "),
        (('model-stock', '--init', 'gone'), 1, 'gone does not exist'),
    ],
)
def test_mistakes(runs, args, code, text):
  result = invoke('soup', *args[:1], *runs, *args[1:], '--out', 'out')
  assert_fails(result, code, text)
  assert not pathlib.Path('out').exists()


def test_wrong_paths(runs):
  uniform = lambda *runs: invoke('soup', 'uniform', *runs, '--out', 'out')
  assert_fails(uniform('gone'), 1, 'gone does not exist')
  pathlib.Path('empty').mkdir()
  assert_fails(uniform('empty'), 1, 'holds no Orbax checkpoint')
  assert_fails(uniform(), 2, 'Missing argument')


@pytest.mark.parametrize(
    'args',
    [
        ('run0', 'run1', '--recipe', 'greedy', '--out', 'out'),
        ('--recipe', 'greedy', 'run0', 'run1', '--out', 'out'),
    ],
)
def test_a_recipe_that_is_not_the_first_word(args):
  said = f'{args[0]!r} is not a recipe. The recipe comes first: '
  said += 'jaxsoup soup greedy RUN... --out OUT.'
  assert_fails(invoke('soup', *args), 2, said)


def test_runs_that_do_not_fit(runs):
  checkpoints.save('odd', {'w': np.zeros(3, np.float32)})
  result = invoke('soup', 'uniform', *runs, 'odd', '--out', 'out')
  assert_fails(result, 1, "leaf 'w' has shape (3,), expected (2,)")
  assert not pathlib.Path('out').exists()


def test_score_log_is_used_again(runs):
  args = ('--scores', 'log.jsonl', '--eval')
  run('soup', 'greedy', *runs, *args, 'mine:once', '--out', 'a')
  # All scores are known, so the function is not called.
  pathlib.Path('scored').touch()
  run('soup', 'greedy', *runs, *args, 'mine:once', '--out', 'b')
  np.testing.assert_array_equal(
      checkpoints.load('a').params['w'], checkpoints.load('b').params['w']
  )
  shorter = invoke(
      'soup', 'greedy', *runs[:2], *args, 'mine:once', '--out', 'c'
  )
  assert_fails(shorter, 1, 'scores of other ingredients')
  other = invoke('soup', 'greedy', *runs, *args, 'mine:score', '--out', 'c')
  assert_fails(other, 1, "'mine:once (")
  pathlib.Path('mine.py').write_text(HERE.replace('1.2', '1.8'))
  sys.modules.pop('mine')
  changed = invoke('soup', 'greedy', *runs, *args, 'mine:once', '--out', 'c')
  assert_fails(changed, 1, 'scores of another evaluation')


# --- inspect ------------------------------------------------------------------


def test_inspect(runs):
  result = run('inspect', *runs)
  assert 'The checkpoints match.' in result.stdout
  inspected = json.loads(invoke('inspect', *runs, '--json').stdout)
  assert inspected['leaves'] == [['w', [2], 'float32', 8]]
  assert inspected['num_params'] == [2, 2, 2]
  assert inspected['num_bytes'] == [8, 8, 8]
  assert inspected['norms'] == [] and inspected['problems'] == []


def test_inspect_mismatches(runs):
  checkpoints.save('odd', {'w': np.zeros(3, np.float32), 'b': np.zeros(1)})
  result = invoke('inspect', *runs, 'odd', '--json')
  assert result.exit_code == 1
  (problem,) = json.loads(result.stdout)['problems']
  assert 'odd does not match' in problem
  assert "leaf 'b' is unexpected" in problem
  assert '(3,), expected (2,)' in problem
  assert 'Problem: ' in invoke('inspect', *runs, 'odd').stdout


def test_inspect_deep(runs):
  inspected = json.loads(invoke('inspect', *runs, '--deep', '--json').stdout)
  np.testing.assert_allclose(inspected['norms'], [0, 2**0.5, 8**0.5], rtol=1e-6)
  assert inspected['problems'] == []


def test_inspect_deep_finds_what_only_values_show(runs):
  checkpoints.save('copy', {'w': np.full(2, 1, np.float32)})
  checkpoints.save('bad', {'w': np.array([1, np.nan], np.float32)})
  checkpoints.save('infinite', {'w': np.array([np.inf, 1], np.float32)})
  odd = ('copy', 'bad', 'infinite')
  assert invoke('inspect', *runs, *odd).exit_code == 0
  result = invoke('inspect', *runs, *odd, '--deep', '--json')
  assert result.exit_code == 1
  duplicate, bad, infinite = json.loads(result.stdout, parse_constant=_refuse)[
      'problems'
  ]
  assert 'copy and' in duplicate
  assert 'run1 have equal parameters' in duplicate
  assert 'bad has NaN or infinite values in w' in bad
  assert 'infinite has NaN or infinite values in w' in infinite


def _refuse(constant):
  raise AssertionError(f'{constant} is no JSON')


def test_inspect_mistakes(runs):
  assert_fails(invoke('inspect', 'gone'), 1, 'gone does not exist')
  assert_fails(invoke('inspect'), 2, 'Missing argument')
  next(pathlib.Path('run0').glob('*/0')).unlink()
  assert_fails(invoke('inspect', 'run0'), 1, 'damaged or incomplete')


# --- doctor and the rest ------------------------------------------------------


def test_doctor():
  result = invoke('doctor', '--json')
  summary = json.loads(result.stdout)
  assert summary['versions']['jax'] and summary['devices']
  assert result.exit_code == bool(summary['problems'])
  text = invoke('doctor').stdout
  assert f'jaxsoup              {jaxsoup.__version__}' in text


@pytest.mark.parametrize(
    'faked, text',
    [
        (
            {'jax': '0.11.2', 'jaxlib': '0.11.2', 'flax': '0.12.8'},
            'fails to import',
        ),
        ({'flax': None}, 'flax is not installed'),
    ],
)
def test_doctor_names_clashes(monkeypatch, faked, text):
  real = doctor._version
  monkeypatch.setattr(doctor, '_version', lambda n: faked.get(n, real(n)))
  result = invoke('doctor', '--json')
  assert result.exit_code == 1
  summary = json.loads(result.stdout)
  assert text in ' '.join(summary['problems'])
  assert summary['devices'], 'They are shown whatever else is wrong.'
  assert text in invoke('doctor').stdout


@pytest.mark.parametrize(
    'faked',
    [
        {'jax': '0.11.2', 'jaxlib': '0.11.2', 'flax': '0.12.9'},
        {'jax': '0.11.0', 'jaxlib': '0.11.0', 'flax': '0.12.8'},
        {'matplotlib': None, 'scikit-learn': None},
    ],
)
def test_doctor_accepts_what_works(monkeypatch, faked):
  real = doctor._version
  monkeypatch.setattr(doctor, '_version', lambda n: faked.get(n, real(n)))
  assert doctor.examine()['problems'] == []


@pytest.mark.parametrize('args', (('--nonsense',), ('cook',)))
def test_usage_exits_with_2(args):
  assert_fails(invoke(*args), 2, 'No such')


def test_demo_in_the_workdir_of_another_config(tmp_path):
  workdir = tmp_path / 'demo'
  (workdir / 'runs').mkdir(parents=True)
  (workdir / 'config.json').write_text('{"seed": 7}')
  args = 'demo', '--short', '--workdir', str(workdir)
  assert_fails(invoke(*args), 2, 'seed was 7, is now 0')
  assert {p.name for p in workdir.iterdir()} == {'config.json', 'runs'}


# --- Real processes -----------------------------------------------------------


def python(*args, **kwargs):
  return subprocess.run(
      [sys.executable, *args], capture_output=True, text=True, **kwargs
  )


@pytest.mark.parametrize(
    'args, shown',
    [
        ([], ('demo', 'soup', 'inspect', 'doctor')),
        (['soup'], ('uniform', 'model-stock', 'greedy', 'learned')),
        (['soup', 'greedy'], ('--eval', '--scores', '--out')),
    ],
)
def test_help_imports_nothing_heavy(args, shown):
  code = (
      'import sys; from jaxsoup import cli\n'
      f'sys.argv = ["jaxsoup", *{args}, "--help"]\n'
      'try: cli.main()\n'
      'except SystemExit as e: assert not e.code\n'
      'heavy = {"jax", "numpy", "flax", "orbax", "tensorflow", "matplotlib"}\n'
      'assert not heavy & set(sys.modules), heavy & set(sys.modules)\n'
  )
  result = python('-c', code)
  assert result.returncode == 0, result.stderr
  for word in shown:
    assert word in result.stdout


def test_help_is_shown_as_it_is_written():
  """Brackets would be markup, and their words lost."""
  commands = dict(typer.main.get_command(cli.app).commands)
  recipes = commands.pop('soup').commands
  commands |= {f'soup {name}': command for name, command in recipes.items()}
  for name, command in commands.items():
    shown = testing.CliRunner().invoke(
        cli.app, [*name.split(), '--help'], env={'COLUMNS': '200'}
    )
    text = ' '.join(shown.stdout.replace('│', ' ').split())
    for param in command.params:
      for word in (getattr(param, 'help', None) or '').split():
        assert word in text, f'{name} {param.name}: {word}'


def test_the_help_of_soup_says_what_each_recipe_is_for():
  shown = testing.CliRunner().invoke(
      cli.app, ['soup', '--help'], env={'COLUMNS': '200'}
  )
  for command in typer.main.get_command(cli.app).commands['soup'].commands:
    assert re.search(rf'│ {command} +[A-Z].*\w+.*\.', shown.stdout), command


def test_import_is_light():
  code = (
      'import sys, jaxsoup\n'
      'for name in jaxsoup.__all__:\n'
      '  if name not in ("checkpoints",): getattr(jaxsoup, name)\n'
      'heavy = {"flax", "orbax", "tensorflow", "tensorflow_datasets",\n'
      '  "matplotlib", "typer", "ml_collections"}\n'
      'assert not heavy & set(sys.modules), heavy & set(sys.modules)\n'
      'assert "jax" in sys.modules\n'
  )
  result = python('-c', code)
  assert result.returncode == 0, result.stderr


def test_a_whole_process(runs):
  main = ('-c', 'from jaxsoup import cli; cli.main()')
  args = ('--eval', 'mine:score', '--out', 'out', '--json')
  result = python(*main, 'soup', 'greedy', *runs, *args)
  assert result.returncode == 0, result.stderr
  assert json.loads(result.stdout)['score'] == pytest.approx(-0.4)
  result = python(*main, 'inspect', 'gone')
  assert result.returncode == 1 and result.stdout == ''
  assert result.stderr.startswith('Error: ') and result.stderr.count('\n') == 1
