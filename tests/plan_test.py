"""`jaxsoup plan`: its figures against what is run, measured and multiplied."""

import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import _forked
import _xla
import jax
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest
from typer import testing

import jaxsoup
from jaxsoup import cli
from jaxsoup import ensembles
from jaxsoup import plan
from jaxsoup.data import sources
from jaxsoup.experiments import architectures
from jaxsoup.experiments import configs
from jaxsoup.experiments import cook
from jaxsoup.plan import hlo
from jaxsoup.plan import machines
from jaxsoup.plan import programs
from jaxsoup.plan import recipes

HERE = pathlib.Path(__file__).parent
DIGITS = str(HERE.parent / 'configs/digits.py')
MLP = str(HERE / '_digits_mlp.py')
VIT_G = str(HERE.parent / 'configs/imagenet_vit_g14.py')
GIB = 2**30

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason=(
        'the compiler of TPUs is not installed: pip install '
        '"jaxsoup[tpu-plan]"'
    ),
)


@functools.cache
def load(file, *overrides):
  return configs.load(file, overrides)


@functools.cache
def tpu_mesh(topology):
  return machines.topology_mesh(topology)


@functools.cache
def cpu_plan(num_ingredients=24):
  mesh, device_bytes = machines.cpu_mesh(4)
  experiment = load(DIGITS, '--config.model.depth=1')
  made = plan.make(
      experiment,
      mesh,
      device_bytes,
      num_ingredients=num_ingredients,
      machine='CPU',
  )
  return experiment, mesh, made


def recipe_of(recipes, name):
  return next(r for r in recipes if r.name == name)


# Work and communication.


def forward_flops(model):
  """Of one image, term by term."""
  height, width, channels = model.image_shape
  num = height * width // model.patch_size**2
  d = model.width
  qkv_and_out = 4 * d**2
  scores_and_values = 2 * num * d
  mlp = 2 * d * model.mlp_width
  block = num * (qkv_and_out + scores_and_values + mlp)
  embed = num * model.patch_size**2 * channels * d
  return 2 * (embed + model.depth * block + d * model.num_classes)


@pytest.mark.parametrize('file', [DIGITS, VIT_G])
def test_work_is_the_closed_form_of_a_transformer(file):
  experiment = load(file)
  config = experiment.config
  mesh, _ = machines.cpu_mesh(4)
  lowerings = programs.of(experiment, mesh, 3)
  with jax.set_mesh(mesh):
    flops = {
        name: hlo.flops_of(lowerings[name]().jaxpr.jaxpr)
        for name in ('evaluation step', 'mix', 'gradient in alpha')
    }
  assert flops['evaluation step'] == config.batch_size * forward_flops(
      config.model
  )
  leaves = jax.tree.leaves(
      programs.abstract_params(architectures.of(experiment), mesh)
  )
  num_parameters = sum(x.size for x in leaves)
  assert flops['mix'] == 2 * 3 * num_parameters
  # Traced with the mix that it is the gradient of.
  assert flops['gradient in alpha'] == 2 * 2 * 3 * num_parameters


@pytest.mark.parametrize(
    'stride, padding, groups, dilation',
    [(1, 'SAME', 1, 1), (2, 'SAME', 1, 1), (2, ((3, 1), (0, 2)), 1, 1),
     (1, 'VALID', 6, 1), (2, 'SAME', 6, 1), (1, 'SAME', 2, 2)],
)  # fmt: skip
def test_work_of_convolutions_is_what_xla_says(
    stride, padding, groups, dilation
):
  image = jax.ShapeDtypeStruct((5, 11, 8, 6), 'float32')
  kernel = jax.ShapeDtypeStruct((3, 2, 6 // groups, 12), 'float32')

  def conv(image, kernel):
    return jax.lax.conv_general_dilated(
        image,
        kernel,
        (stride, stride),
        padding,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
    )

  work = lambda fn, *x: hlo.flops_of(jax.make_jaxpr(fn)(*x).jaxpr)
  forward = work(conv, image, kernel)
  said = jax.jit(conv).lower(image, kernel).cost_analysis()
  assert forward == said['flops'] > 0
  # Either gradient multiplies the same pairs.
  out = jax.eval_shape(conv, image, kernel)
  pull = lambda x, y, dy: jax.vjp(conv, x, y)[1](dy)
  assert work(pull, image, kernel, out) == 3 * forward


@pytest.mark.slow
def test_work_of_a_sweep_is_three_forward_passes_an_example():
  """And two of the first layer, whose images need no gradient."""
  experiment, _, made = cpu_plan()
  config = experiment.config
  steps = config.data.sizes.train // config.finetune.batch_size
  seen = config.finetune.num_epochs * steps * config.finetune.batch_size
  expected = len(experiment.runs) * seen * 3 * forward_flops(config.model)
  assert made.num_runs == len(experiment.runs)
  assert made.sweep_flops == pytest.approx(expected, rel=0.02)


def test_runs_of_other_lengths_and_batches_count_as_such():
  # 250 examples are 7 batches of 32 and 3 of 64: 224 and 192 examples.
  experiment = load(DIGITS, '--config.finetune.num_epochs=1')
  mesh, _ = machines.cpu_mesh(4)
  step = programs.Program('fine-tuning step', 0, flops=32.0)
  runs = [{}, {'num_epochs': 5}, {'batch_size': 64, 'num_epochs': 2}]
  config = experiment.config.copy_and_resolve_references()
  config.sweep.group_size = 1
  config.finetune.batch_size = 32
  config.data.sizes.train = 250
  made = experiment._replace(config=config, runs=runs)
  # An example takes 4 (devices) * 32 / 32.
  expected = 4 * (224 + 5 * 224 + 2 * 192)
  assert programs.sweep_flops(made, mesh, [step]) == expected


def test_a_collective_in_a_loop_counts_as_often_as_it_runs():
  mesh, _ = machines.cpu_mesh(4)

  def body(x, _):
    return jax.lax.psum(x, 'fsdp') / 4, None

  fn = jax.shard_map(
      lambda x: jax.lax.scan(body, x, length=7)[0],
      mesh=mesh,
      in_specs=PartitionSpec(),
      out_specs=PartitionSpec(),
  )
  x = jax.ShapeDtypeStruct((3, 5), 'float32')
  text = jax.jit(fn).lower(x).compile().as_text()
  traffic = hlo.collectives_of(text)
  assert traffic == {'all-reduce': hlo.Traffic(7, 7 * 3 * 5 * 4)}


# Memory, reads, evaluations and steps.


@pytest.mark.slow
@pytest.mark.skipif(
    not pathlib.Path('/proc/self/clear_refs').exists(),
    reason='only Linux lets a process forget its high-water mark',
)
def test_peaks_are_those_of_the_process():
  """Within 15 %: pages, threads and what the allocator keeps come on top."""
  overrides = [
      'model.width=384',
      'model.depth=1',
      'model.mlp_width=1536',
      'model.num_heads=6',
      'sweep.group_size=2',
      'batch_size=1664',
      'learned.batch_size=384',
      'finetune.batch_size=128',
      'data.sizes.train=128',
  ]
  # The others need less than what a process grows by from time to time.
  large = [
      'mix',
      'gradient in alpha',
      'evaluation step',
      'learned step, resident',
      'learned step, streamed',
      'fine-tuning step',
  ]
  result = subprocess.run(
      [
          sys.executable,
          HERE / '_plan_memory.py',
          DIGITS,
          '24',
          json.dumps(large),
      ]
      + [f'--config.{x}' for x in overrides],
      env={
          **os.environ,
          'PYTHONPATH': str(HERE.parent),
          # Freed memory goes back at once, and is not there for the next.
          'MALLOC_MMAP_THRESHOLD_': '65536',
          'MALLOC_TRIM_THRESHOLD_': '0',
      },
      check=True,
      capture_output=True,
      text=True,
  )
  peaks = json.loads(result.stdout)
  for name in large:
    planned, measured = peaks[name]
    assert planned > 100e6
    assert measured == pytest.approx(planned, rel=0.15), name


class Counted(list):
  """Ingredients that count how often they are read."""

  reads = 0

  def __getitem__(self, k):
    self.reads += 1
    return super().__getitem__(k)


@pytest.mark.slow
def test_recipes_read_evaluate_and_step_as_planned():
  num = 5
  experiment = load(
      DIGITS,
      '--config.model.depth=1',
      '--config.learned.num_epochs=2',
      '--config.learned.patience=9',
  )
  config, model = experiment.config, architectures.of(experiment)
  _, mesh, made = cpu_plan()
  rows = recipes.of(experiment, mesh, 2**30, num, made.programs)
  rng = np.random.default_rng(0)
  shapes = programs.abstract_params(model, mesh)
  theta_0 = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  models = [
      jax.tree.map(
          lambda x: rng.normal(size=x.shape).astype(np.float32), theta_0
      )
      for _ in range(num)
  ]
  size = config.data.sizes.held_out
  held_out = sources.Arrays(
      {
          'image': rng.normal(size=(size, 8, 8, 1)).astype(np.float32),
          'label': rng.integers(10, size=size),
      }
  )
  eval_fn = cook.score_fn(config, model.logits_fn, held_out)
  batches, val_batches = cook.learning_batches(config, held_out)

  def learned(ingredients, **options):
    info = jaxsoup.learned(
        ingredients,
        cook.loss_fn_of(model.logits_fn),
        batches,
        tx=optax.adamw(0.05),
        num_epochs=2,
        val_batches=val_batches,
        **options,
    ).info
    return len(info.val_losses), len(info.losses)

  def searched(recipe_fn, ingredients, **options):
    scores = {}
    recipe_fn(ingredients, eval_fn, scores=scores, **options)
    return len(scores), 0

  def collected(ingredients):
    logits = ensembles.collect(ingredients, model.logits_fn, [held_out.arrays])
    return len(logits), 0

  def averaged(recipe_fn, *arguments):
    recipe_fn(*arguments)
    return 0, 0

  runs = {
      'uniform': lambda x: averaged(jaxsoup.uniform, x),
      'greedy': lambda x: searched(jaxsoup.greedy, x),
      'pruned, one pass': lambda x: searched(jaxsoup.pruned, x, num_passes=1),
      'learned, resident': lambda x: learned(x, memory='resident'),
      'learned, streamed': lambda x: learned(x, memory='streamed'),
      'learned, cached': lambda x: learned(x, memory='cached'),
      'Model Stock': lambda x: averaged(jaxsoup.model_stock, x, theta_0),
      'ensembles': collected,
  }
  assert list(runs) == [r.name for r in rows]
  for row in rows:
    ingredients = Counted(models)
    counts = runs[row.name](ingredients)
    planned = row.reads // made.model_bytes
    if row.name == 'Model Stock':
      planned -= 1  # That is theta_0.
    if row.name == 'pruned, one pass':  # At most.
      assert 2 * num <= ingredients.reads <= planned
      assert num < counts[0] <= row.evaluations
    else:
      assert (ingredients.reads, *counts) == (
          planned,
          row.evaluations,
          row.steps,
      )


# What fits, and what would.


def test_without_learned_soups_there_is_no_word_of_them():
  experiment = load(DIGITS, '--config.model.depth=1')
  config = experiment.config.copy_and_resolve_references()
  with config.unlocked():
    del config.learned
  experiment = experiment._replace(config=config)
  mesh, _ = machines.cpu_mesh(4)
  names = programs.of(experiment, mesh, 3)
  assert {'mix', 'evaluation step', 'fine-tuning step'} <= set(names)
  rows = recipes.of(
      experiment,
      mesh,
      GIB,
      3,
      tuple(programs.Program(x, 8) for x in names),
  )
  assert {'uniform', 'greedy', 'Model Stock'} <= {r.name for r in rows}
  assert not any('learned' in x for x in [*names, *(r.name for r in rows)])


@pytest.mark.slow
def test_a_stack_that_does_not_fit_streams():
  experiment, mesh, made = cpu_plan()
  before = {r.name: r for r in made.recipes}
  resident = before['learned, resident'].device
  streamed = before['learned, streamed'].device
  assert streamed < resident
  rows_at = lambda num_bytes, num=24: {
      r.name: r
      for r in recipes.of(experiment, mesh, num_bytes, num, made.programs)
  }
  between = rows_at((streamed + resident) // 2)
  assert not between['learned, resident'].fits
  assert between['learned, streamed'].fits
  # 27 models are more than two thirds, and 5 are not: the rule by which
  # `jaxsoup.learned` chooses, blind to activations.
  shapes = programs.abstract_params(architectures.of(experiment), mesh)
  share = sum(
      x.dtype.itemsize * np.prod(x.sharding.shard_shape(x.shape))
      for x in jax.tree.leaves(shapes)
  )
  assert 5 * share < 2 / 3 * (streamed + resident) / 2 < 27 * share
  assert between['learned, resident'].note.endswith(
      "streamed fits: memory='auto' does that"
  )
  between = rows_at((streamed + resident) // 2, 2)
  assert between['learned, resident'].note.endswith(
      "streamed fits: pass memory='streamed'"
  )
  tight = rows_at(int(27 * share * 1.5 * 0.98))['learned, resident']
  assert tight.fits
  said = "fits with memory='resident'; memory='auto' streams"
  assert tight.note.startswith(said)
  ample = rows_at(int(27 * share * 1.5 * 1.02))['learned, resident']
  assert (ample.fits, ample.note) == (True, '')
  none = rows_at(streamed - 1)
  assert not none['learned, streamed'].fits
  assert 'smaller batches' in none['learned, streamed'].note


@pytest.mark.slow
@needs_libtpu
def test_the_learned_soup_of_the_paper_fits_on_a_small_pod():
  """ViT-G/14, sharded over 64 devices of the least memory there is."""
  experiment, num = load(VIT_G), 58
  config = experiment.config
  mesh, device_bytes = tpu_mesh('v5e:8x8')
  assert device_bytes == 16 * GIB
  name = 'learned step, resident'
  program = programs.compile_program(
      name, programs.of(experiment, mesh, num)[name], mesh
  )
  assert not program.problem
  num_parameters = 1.84e9  # Zhai et al. 2022, table 2, with 1000 classes.
  stack = num * num_parameters * 4 / 64
  assert stack < program.arguments < 1.1 * stack + 20e6  # Tiles; a batch.
  assert program.peak < 0.9 * device_bytes
  # Forward, again, backward: nothing of the size of K is multiplied.
  forward = config.learned.batch_size * forward_flops(config.model)
  assert 3 * forward < 64 * program.flops < 4 * forward
  # Gathers of parameters in bfloat16, forward and backward; reductions of their
  # gradient. Above that activations would travel.
  traffic = sum(t.num_bytes for t in program.collectives.values())
  assert 2 * 2 * num_parameters < traffic < 8 * 2 * num_parameters


@pytest.mark.slow_variants
@needs_libtpu
@pytest.mark.parametrize(
    'topology, hbm',
    [('v5e:8x8', 16), ('v5p:2x2x4', 95), ('v4:2x2x2', 32), ('v6e:4x8', 32)],
)
def test_ingredients_that_are_sharded_alike_mix_alone(topology, hbm):
  """In the program of the TPU: what it sends, read by another expression."""
  mesh, device_bytes = tpu_mesh(topology)
  assert device_bytes == hbm * GIB
  lowerings = programs.of(load(VIT_G), mesh, 14 if mesh.size > 8 else 4)

  def sent(name):
    with jax.set_mesh(mesh):
      text = lowerings[name]().lower().compile().as_text()
    names = re.findall(
        r' ((?:all|reduce-scatter|collective|send|recv)[\w-]*)\(', text
    )
    return [x.removesuffix('-start') for x in names if not x.endswith('-done')]

  assert sent('mix') == []
  assert sent('add to a sum') == []
  assert sent('gradient in alpha') == ['all-reduce']
  assert sent('inner products, streamed') == ['all-reduce']
  program = programs.compile_program('mix', lowerings['mix'], mesh)
  assert program.collectives == {}


@pytest.mark.slow
@needs_libtpu
def test_a_machine_that_is_too_small_says_so_and_names_others(tmp_path):
  file = tmp_path / 'plan.json'
  result = run_command(
      f'--config={VIT_G}', '--topology=v5e:2x2', f'--json={file}'
  )
  assert result.returncode == 0, result.stderr
  made = json.loads(file.read_text())
  assert made['num_ingredients'] == 58  # Those of its sweep.
  assert made['num_devices'] == 4
  assert made['num_parameters'] == pytest.approx(1.84e9, rel=0.01)
  by_name = {r['name']: r for r in made['recipes']}
  assert by_name['uniform']['fits']
  for name in ('learned, resident', 'learned, streamed'):
    assert not by_name[name]['fits']
    assert by_name[name]['device'] > 16 * GIB
  # The stack alone needs 58 times the share of a device.
  stack = 58 * 4 * 1.84e9 / 4
  assert stack < by_name['learned, resident']['device'] < 2 * stack
  streamed = next(
      x for x in result.stdout.splitlines() if x.startswith('learned, streamed')
  )
  assert 'does not fit' in streamed
  assert '4 of v5p, more devices, or smaller batches' in streamed


# The command.


def run_command(*arguments):
  code = 'from jaxsoup.cli import main; main()'
  env = os.environ | {
      'XLA_FLAGS': _xla.flags(1),
      'PYTHONPATH': str(HERE.parent),
  }
  return _forked.run([sys.executable, '-c', code, 'plan', *arguments], env=env)


@pytest.mark.slow_variants
@pytest.mark.parametrize('config', [MLP, f'{DIGITS}:runlocal'])
def test_on_virtual_devices(config, tmp_path):
  file = tmp_path / 'plan.json'
  result = run_command(
      f'--config={config}',
      '--devices=2',
      '--ingredients=3',
      f'--json={file}',
  )
  assert result.returncode == 0, result.stderr
  made = json.loads(file.read_text())
  assert (made['num_devices'], made['num_ingredients']) == (2, 3)
  assert all(r['fits'] for r in made['recipes'])
  lines = result.stdout.splitlines()
  assert lines[0].startswith('CPU: 2 devices of')
  assert any(
      re.fullmatch(r'Fine-tuning \d+ runs is .* [GM]FLOP\.', x) for x in lines
  )
  for row in [*made['programs'], *made['recipes']]:
    assert sum(x.startswith(f'{row["name"]}  ') for x in lines) == 1
  for program in made['programs']:
    parts = [program[x] for x in ('arguments', 'temporaries', 'output')]
    assert program['peak'] == sum(parts) > 0
    assert f'{program["name"]}: compiled' in result.stderr


INCOMPLETE = """
import ml_collections


def get_config(arg=None):
  return ml_collections.ConfigDict({'model': {'num_classes': 2}})


def sweep(config):
  return [{}]
"""


@pytest.mark.parametrize(
    'arguments, message, code',
    [
        (['--devices=2', '--ingredients=0'], '--ingredients', 2),
        (['--devices=0'], '--devices', 2),
        ([], 'either --topology or --devices', 2),
        (['--devices=2', '--topology=v5e:2x2'], 'either --topology', 2),
        (['--devices=2', '--json=absent/x.json'], 'directory absent', 2),
        (['--devices=2', '--json=.'], 'did not write it', 1),
        (['--devices=2', '--config=absent.py'], 'no config absent.py', 2),
        (['--devices=2', '--config=own.py'], 'lacks batch_size, data', 2),
    ],
)  # fmt: skip
def test_errors(arguments, message, code, tmp_path, monkeypatch):
  (tmp_path / 'own.py').write_text(INCOMPLETE)
  monkeypatch.chdir(tmp_path)
  check_error([f'--config={DIGITS}', *arguments], message, code, monkeypatch)


@needs_libtpu
@pytest.mark.parametrize(
    'topology, message',
    [
        ('v7:2x2', 'write one of v4, v5e, v5p, v6e'),
        ('v5e', 'and its shape: v5e:8x8'),
        ('v5e:8by8', 'and its shape: v5e:8x8'),
        ('v5e:2x2x2', 'the largest of v5e is 16x16'),
        ('v4:2x2', 'the largest of v4 is 16x16x16'),
        ('v5e:64x64', 'the largest of v5e is 16x16'),
        ('v5e:3x5', 'multiples of 2'),
        ('v6e:0x2', 'at least 1'),
        ('v4:2x2x0', 'at least 1'),
    ],
)
def test_topologies_that_there_are_not(topology, message, monkeypatch):
  arguments = [f'--config={DIGITS}', f'--topology={topology}']
  check_error(arguments, message, 2, monkeypatch)


def test_without_the_compiler_of_tpus(monkeypatch):
  monkeypatch.setitem(sys.modules, 'libtpu', None)
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  arguments = [f'--config={DIGITS}', '--topology=v5e:2x2']
  monkeypatch.setattr(configs, 'load', lambda path: (None, [{}]))
  check_error(arguments, 'jaxsoup[tpu-plan]', 1, monkeypatch)


def check_error(arguments, message, code, monkeypatch):
  # The command sets it for its own process, which is this one here.
  monkeypatch.setenv('XLA_FLAGS', os.environ.get('XLA_FLAGS', ''))
  # Wide enough for a box without line breaks.
  monkeypatch.setenv('COLUMNS', '300')
  result = testing.CliRunner().invoke(cli.app, ['plan', *arguments])
  assert result.exit_code == code, result.output
  assert message in result.stderr
  assert 'Traceback' not in result.stderr
  errors = [x for x in result.stderr.splitlines() if message in x]
  assert len(errors) == 1
