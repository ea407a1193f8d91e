"""The code in the README and in the guides runs."""

from collections.abc import Iterator
import glob
import json
import os
import pathlib
import re
import shlex
import sys
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from typer import testing

from jaxsoup import checkpoints
from jaxsoup import cli
from jaxsoup.experiments import configs

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / 'jaxsoup' / 'docs'
README = ROOT / 'README.md'
GUIDES = sorted((DOCS / 'guides').glob('*.md'))
PAGES = [README, *sorted(DOCS.glob('*.md')), *GUIDES]
BLOCK = re.compile(r'^```(python|bash)\n(.*?)^```', re.DOTALL | re.MULTILINE)

# Programs that are not started, and why.
NOT_RUN = {
    'owners': 'makes the environments of other libraries',
    'cd': 'the next command is looked at, wherever it runs',
    'dask': 'runs on until it is stopped',
    'do': 'what is repeated is looked at',
    'done': 'the end of that',
    'for': 'the list of what is repeated',
    'kubectl': 'needs a cluster of Kubernetes',
    'ray': 'needs a cluster of Ray',
    'ssh': 'needs other hosts',
    'curl': 'fetches from the net',
    'export': 'of what gcloud takes',
    'mkdir': 'on another machine',
    'gcloud': 'needs a project of Google Cloud; checked with its reference',
    'pip': 'CI installs by other steps; extras are compared',
    'sh': 'what curl fetched',
    'tail': 'of a log on another machine',
    'uv': 'installs on another machine',
}
# Pages whose commands of ours are parsed, with all options, but not run.
ONLY_PARSED = {
    'README.md': 'the demo, and a plan of a large model, take minutes',
    'tpu.md': 'its runs are on other machines',
    'workers.md': 'processes that are spawned take seconds to start',
}
PREFIXES = ('nohup', 'srun')


def blocks_of(page: pathlib.Path) -> list[tuple[str, str]]:
  """Language and code of each block."""
  return BLOCK.findall(page.read_text())


@pytest.fixture
def names(tmp_path, monkeypatch):
  """What the reader has: a Flax model, its fine-tuned runs, data."""
  from flax import nnx

  monkeypatch.chdir(tmp_path)
  # `python` in a command of a page is this one.
  folder = os.path.dirname(sys.executable)
  monkeypatch.setenv('PATH', folder, prepend=os.pathsep)
  build = lambda seed: nnx.Linear(4, 3, rngs=nnx.Rngs(seed))
  graphdef = nnx.graphdef(build(0))
  init_params = lambda: nnx.state(build(0), nnx.Param)
  rng = np.random.default_rng(0)
  draw = lambda num: {
      'image': rng.normal(size=(num, 4)).astype(np.float32),
      'label': rng.integers(3, size=num),
  }
  held_out = draw(20)
  np.savez('held_out.npz', **held_out)
  theta_0 = init_params()
  checkpoints.save('theta_0', theta_0)
  for k in range(4):
    tune = lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32)
    checkpoints.save(f'runs/{k:02d}', jax.tree.map(tune, theta_0))
  run_dirs = sorted((tmp_path / 'runs').iterdir())
  return {
      'eval_fn': lambda params: float(jnp.sum(jax.tree.leaves(params)[0])),
      'finetuned': [build(seed) for seed in range(4)],
      'graphdef': graphdef,
      'held_out': held_out,
      'ingredients': checkpoints.Ingredients(
          run_dirs, jax.eval_shape(init_params)
      ),
      'init_params': init_params,
      'jax': jax,
      'jnp': jnp,
      'nnx': nnx,
      'np': np,
      'pool': draw(1000),
      'run_dirs': run_dirs,
      'shifts': {'fog': draw(30), 'noise': draw(30)},
      'soup_dir': tmp_path / 'a_soup',
      'theta_0': theta_0,
      'train': draw(50),
      'workdir': tmp_path,
  }


@pytest.fixture
def others(names):
  """Models and adapters as other libraries write them."""
  from safetensors import numpy as safetensors

  from jaxsoup.models import vit
  from tests import _weights

  arguments = dict(
      image_shape=(8, 8, 3), num_classes=3, patch_size=4, width=8, depth=1,
      num_heads=2, has_cls_token=True,
  )  # fmt: skip
  config = {
      'model_type': 'vit', 'image_size': 8, 'num_attention_heads': 2,
      'hidden_act': 'gelu', 'layer_norm_eps': 1e-12,
  }  # fmt: skip
  for seed, name in enumerate(('vit-a', 'vit-b', 'vit-c')):
    _, params = _weights.random(vit.ViT, seed=seed, **arguments)
    arrays = _weights.write(params, vit.TABLES['hf'](**arguments))
    pathlib.Path(name).mkdir()
    safetensors.save_file(arrays, f'{name}/model.safetensors')
    pathlib.Path(name, 'config.json').write_text(json.dumps(config))
  factors = lambda seed: {
      'q': {
          'lora_a': np.full((4, 2), seed, 'f'),
          'lora_b': np.ones((2, 4), 'f'),
      }
  }
  names['adapter_dirs'] = ['adapters/1', 'adapters/2']
  for seed, path in enumerate(names['adapter_dirs'], 1):
    checkpoints.save_adapter(path, factors(seed))
  # Two models, of which every leaf moved a little.
  moved = lambda params, step: jax.tree.map(lambda x: x + step, params)
  names['fine_tune'] = lambda params: [moved(params, s) for s in (0.01, -0.02)]
  return names


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_blocks_run_in_their_order(page, names, request):
  if page.name == 'interchange.md':
    request.getfixturevalue('others')
  for language, block in blocks_of(page):
    if language == 'bash':
      _run_shell(block, page)
    elif file := re.match(r'# (\w+\.py)\n', block):
      pathlib.Path(file[1]).write_text(block)
    else:
      exec(compile(block, page.name, 'exec'), names)
  if page == README:
    assert (names['workdir'] / 'soup').is_dir()


def test_commands_for_other_programs_are_ours():
  """Those of the guide that hand candidates to a harness are parsed."""
  page = DOCS / 'guides' / 'search.md'
  blocks = re.findall(
      r'^```text\n(.*?)^```', page.read_text(), re.DOTALL | re.M
  )
  assert len(blocks) == 2
  for block in blocks:
    words = shlex.split(block)
    _run_ours(words[words.index('jaxsoup') + 1 :], is_parsed=True)


def test_there_are_blocks():
  languages = {page.name: [x for x, _ in blocks_of(page)] for page in PAGES}
  assert languages['README.md'].count('python') == 2
  for name in ('choosing.md', 'interchange.md', 'tpu.md'):
    assert {'bash', 'python'} <= set(languages[name]), name
  assert 'python' in languages['evaluation.md']


@pytest.mark.parametrize('page', PAGES[1:], ids=lambda p: p.stem)
def test_code_fits_the_width_of_a_page(page):
  lines = [x for _, block in blocks_of(page) for x in block.splitlines()]
  assert not [line for line in lines if len(line) > 85]


def test_files_named_in_the_readme_exist():
  for page in PAGES:
    for target in re.findall(r'\]\((?!http)([^)#]+)\)', page.read_text()):
      assert os.path.exists(page.parent / target), f'{page.name}: {target}'


@pytest.mark.parametrize(
    'line',
    [
        'jaxsoup soup uniform --no-such-option runs/0 --out soup',
        'jaxsoup no_such_command',
        'jaxsoup soup no_such_recipe runs/0 --out soup',
        'gcloud compute tpus tpu-vm ssh x --command="jaxsoup soup unifrm"',
        'python -m jaxsoup.experiments.main --config=configs/digits.py '
        '--workdir=w --config.no_such=1',
        'pip install -e ".[no_such_extra]"',
        'rm -rf x',
    ],
)
def test_wrong_commands_are_found(line):
  with pytest.raises((AssertionError, KeyError, configs.UsageError)):
    _run_shell(line, DOCS / 'tpu.md')


def _run_shell(block: str, page: pathlib.Path) -> None:
  line = ''
  for part in block.replace('\\\n', ' ').splitlines():
    line += part + '\n'
    try:
      commands = list(_commands(line))
    except ValueError:  # No closing quotation: the command goes on.
      continue
    line = ''
    for program, *args in commands:
      _check(pathlib.PurePath(program).name, args, page)
  assert not line, f'no closing quotation: {line}'


def _commands(line: str) -> Iterator[list[str]]:
  """The programs of a line with their arguments, without redirections."""
  lexer = shlex.shlex(line, posix=True, punctuation_chars='&|;<>')
  lexer.whitespace_split = True
  commands: list[list[str]] = [[]]
  is_file = False
  for token in lexer:
    if is_file or set(token) & set('<>') and set(token) <= set('&<>'):
      is_file = not is_file
    elif set(token) <= set('&|;'):
      commands.append([])
    elif commands[-1] or not token.startswith((*PREFIXES, '--')):
      commands[-1].append(token)
  return (command for command in commands if command)


def _check(program: str, args: list[str], page: pathlib.Path) -> None:
  """Runs a command of ours or parses it; looks into those of others."""
  if program == 'jaxsoup':
    _run_ours(args, is_parsed=page.name in ONLY_PARSED)
  elif program == 'python' and args[0].endswith('.py'):
    compile(pathlib.Path(args[0]).read_text(), args[0], 'exec')
  elif program == 'python':
    assert args[:2] == ['-m', 'jaxsoup.experiments.main'], args
    parsed = configs.parse(args[2:])
    configs.load(str(ROOT / parsed.config), parsed.overrides)
  elif program == 'pip':
    extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    for name in re.findall(r'\[([\w,-]+)\]', ' '.join(args)):
      known = extras['project']['optional-dependencies']
      assert set(name.split(',')) <= set(known), name
  else:
    assert program in NOT_RUN, f'{program} {args}'
  for arg in args:
    if arg.startswith('--command='):
      _run_shell(arg.removeprefix('--command='), page)


def _run_ours(args: list[str], is_parsed: bool) -> None:
  if is_parsed:
    command = typer.main.get_command(cli.app)
    try:
      while hasattr(command, 'commands'):
        name, *args = args
        command = command.commands[name]
      command.make_context(name, args)
    except Exception as e:  # Of click, or of the copy that typer has.
      raise AssertionError(f'{args}: {e}') from e
    return
  expanded = [x for a in args for x in (sorted(glob.glob(a)) or [a])]
  result = testing.CliRunner().invoke(cli.app, expanded)
  assert result.exit_code == 0, f'{args}: {result.output}'
