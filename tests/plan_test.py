"""`jaxsoup plan`: its figures against what is run, measured and multiplied."""

import collections
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
import pytest
from typer import testing

import jaxsoup
from jaxsoup import _mixing
from jaxsoup import checkpoints
from jaxsoup import cli
from jaxsoup import ensembles
from jaxsoup import evaluation
from jaxsoup import plan
from jaxsoup._recipes import _learned
from jaxsoup._recipes import _streamed
from jaxsoup.experiments import architectures
from jaxsoup.experiments import configs
from jaxsoup.experiments import cook
from jaxsoup.experiments import stages
from jaxsoup.experiments import workdirs
from jaxsoup.plan import hlo
from jaxsoup.plan import machines
from jaxsoup.plan import programs
from jaxsoup.plan import recipes
from jaxsoup.train import loop

HERE = pathlib.Path(__file__).parent
DIGITS = str(HERE.parent / 'configs/digits.py')
MLP = str(HERE / '_digits_mlp.py')
VIT_B = str(HERE.parent / 'configs/imagenet_vit_b32_i21k.py')
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
  sharded = '--config.is_sharded=True'
  experiment = load(
      DIGITS,
      sharded,
      '--config.model.depth=1',
      '--config.finetune.batch_size=52',
  )
  made = plan.make(
      experiment,
      mesh,
      device_bytes,
      num_ingredients=num_ingredients,
      machine='CPU',
      rates=machines.Rates(),
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
  mesh, _ = machines.cpu_mesh(2)
  lowerings = programs.of(experiment, mesh, 3)
  with jax.set_mesh(mesh):
    flops = {
        name: hlo.flops_of(lowerings[name]().jaxpr.jaxpr)
        for name in ('evaluation step', 'mix')
    }
  assert flops['evaluation step'] == config.batch_size * forward_flops(
      config.model
  )
  leaves = jax.tree.leaves(
      programs.abstract_params(architectures.of(experiment), mesh)
  )
  num_parameters = sum(x.size for x in leaves)
  assert flops['mix'] == 2 * 3 * num_parameters


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
  runs = [{}, {'num_epochs': 5}, {'batch_size': 64, 'num_epochs': 2}]
  config = experiment.config.copy_and_resolve_references()
  config.sweep.group_size = 1
  config.finetune.batch_size = 32
  config.data.sizes.train = 250
  made = experiment._replace(config=config, runs=runs)
  examples = 224 + 5 * 224 + 2 * 192
  # The largest step is of 64 examples.
  counted = (7 + 5 * 7 + 2 * 3, examples, examples / 64)
  swept = programs.sweep(made)
  assert (swept.steps, swept.examples, swept.times) == counted


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
      'is_sharded=True',
      'model.width=384',
      'model.depth=1',
      'model.mlp_width=1536',
      'model.num_heads=6',
      'sweep.group_size=2',
      'batch_size=1664',
      'learned.batch_size=384',
      'finetune.batch_size=128',
      'data.sizes.train=128',
      'data.sizes.held_out=1664',
  ]
  # The others need less than what a process grows by from time to time.
  large = [
      'mix',
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


def shapes_of(arguments):
  """Shape, dtype and share of a device, of each array."""
  leaves = [x for x in jax.tree.leaves(arguments) if hasattr(x, 'shape')]
  share = lambda x: getattr(x.sharding, 'shard_shape', tuple)(x.shape)
  return tuple(
      (x.shape, str(x.dtype), share(x) if hasattr(x, 'sharding') else x.shape)
      for x in leaves
  )


@pytest.fixture
def counted(monkeypatch):
  """Functions that start to count; what is called with what, and reads."""
  calls = collections.defaultdict(collections.Counter)

  def counting(name, fn):
    def counting_fn(*arguments):
      calls[name][shapes_of(arguments)] += 1
      return fn(*arguments)

    return counting_fn

  def start():
    for module, fn, name in [
        (_mixing, 'add', 'add to a sum'),
        (loop, 'advance', 'fine-tuning step'),
    ]:
      monkeypatch.setattr(module, fn, counting(name, getattr(module, fn)))
    for of_class, names in [
        (evaluation.MeanOf, {'step': 'evaluation step'}),
        (
            _learned.Resident,
            {
                'step': 'learned step, resident',
                'mix': 'mix',
                'loss': 'early stopping',
            },
        ),
        (
            _streamed.Streamed,
            {
                'step': 'learned step, streamed',
                'inner': 'inner products, streamed',
                'loss': 'early stopping',
            },
        ),
    ]:
      monkeypatch.setattr(of_class, '__init__', made(of_class.__init__, names))

    def read(self, k, read_fn=checkpoints.Ingredients._read):
      calls['read'][k] += 1
      return read_fn(self, k)

    def average(
        self, order, *options, average_fn=checkpoints.Ingredients.average
    ):
      calls['read'].update(order)
      return average_fn(self, order, *options)

    monkeypatch.setattr(checkpoints.Ingredients, '_read', read)
    monkeypatch.setattr(checkpoints.Ingredients, 'average', average)
    return calls

  def made(init_fn, names):
    def counting_init(self, *arguments, **options):
      init_fn(self, *arguments, **options)
      for attribute, name in names.items():
        setattr(self, attribute, counting(name, getattr(self, attribute)))

    return counting_init

  return start


# Of sizes that four devices do not divide: 16 held-out examples are two batches
# of 10, rounded up to 12; 12 of them are two batches of 6, on every device; and
# the other 4 are one.
SIZES = (
    '--config.batch_size=10',
    '--config.learned.batch_size=6',
    '--config.learned.patience=9',
)


@pytest.mark.slow
def test_what_runs_is_what_was_planned(tmp_path, counted):
  """Each program and its arguments, each read, evaluation and step."""
  experiment = configs.load(f'{VIT_B}:runlocal', SIZES)
  config = experiment.config
  with config.unlocked():
    config.select_by = 'nll'  # Or evaluations could end early.
  num = len(experiment.runs)
  mesh, _ = machines.cpu_mesh(4)
  planned = {
      name: shapes_of(lowering.args)
      for name, lowering in programs.of(experiment, mesh, num).items()
  }
  rows = planned_rows(experiment, mesh, num, planned)
  calls = counted()
  seen = set()
  with workdirs.locked(experiment, tmp_path):
    work = workdirs.work_of(experiment, tmp_path)
    theta_0 = stages.theta_0(work)
    assert stages.finetune_all(work, theta_0)
    names = [row.name for row in rows]
    assert ['fine-tuning', *recipe_fns_of(work, theta_0)] == names
    # The probe trains, too, on other shapes.
    step = 'fine-tuning step'
    assert calls[step][planned[step]] == rows[0].steps
    assert len(list((tmp_path / 'runs').glob('0*'))) == rows[0].evaluations
    check_shapes(calls, planned, seen)
    for row in rows[1:]:
      calls.clear()
      evaluations = recipe_fns_of(work, theta_0)[row.name]()
      check_counts(row, calls, evaluations, num)
      check_shapes(calls, planned, seen)
  assert seen == planned.keys()


def planned_rows(experiment, mesh, num, names):
  """Rows of a plan whose programs take a few bytes."""
  made = [programs.Program(name, 8, arguments=8) for name in names]
  return recipes.of(experiment, mesh, GIB, num, made, machines.Rates()).recipes


def recipe_fns_of(work, theta_0):
  """Functions that run a recipe, and return how often it evaluated."""
  config, model, held_out = work.config, work.model, work.splits.held_out
  on = workdirs.on(config)
  ingredients = stages.ingredients(work, theta_0)

  def searched(recipe_fn, **options):
    scores = {}
    batches = cook.batches_of(held_out, config.batch_size, on)
    eval_fn = cook.score_fn(config, model.logits_fn, batches)
    recipe_fn(ingredients, eval_fn, scores=scores, **options)
    return len(scores)

  def averaged(*arguments):
    arguments[0](*arguments[1:])
    return 0

  def learned(**options):
    soup = cook.learned(config, model, ingredients, held_out, on, **options)
    return len(soup.info.val_losses)

  def collected():
    batches = cook.batches_of(held_out, config.batch_size, on)
    return len(ensembles.collect(ingredients, model.logits_fn, batches))

  return {
      'uniform': lambda: averaged(jaxsoup.uniform, ingredients),
      'greedy': lambda: searched(jaxsoup.greedy),
      'pruned, one pass': lambda: searched(jaxsoup.pruned, num_passes=1),
      'learned, resident': lambda: learned(memory='resident'),
      'learned, streamed': lambda: learned(memory='streamed'),
      'learned, cached': lambda: learned(memory='cached'),
      'Model Stock': lambda: averaged(
          jaxsoup.model_stock, ingredients, theta_0
      ),
      'ensembles': collected,
  }


def check_counts(row, calls, evaluations, num):
  # On one host all bytes of a model are read; writes are those of one.
  model_bytes = row.writes or row.reads // num
  reads = row.reads // model_bytes - (row.name == 'Model Stock')  # theta_0.
  counts = {name: calls[name].total() for name in row.calls}
  if row.name == 'pruned, one pass':  # At most.
    assert 2 * num <= calls['read'].total() <= reads
    assert num < evaluations <= row.evaluations
    assert all(0 < n <= row.calls[name] for name, n in counts.items())
    return
  assert (calls['read'].total(), evaluations) == (reads, row.evaluations)
  if row.name == 'ensembles':  # Logits, which are not of that program.
    return
  if row.name == 'greedy':
    assert counts.pop('add to a sum') <= row.calls['add to a sum']
  assert counts == {name: row.calls[name] for name in counts}
  steps = [n for name, n in counts.items() if name.startswith('learned step')]
  assert sum(steps) == row.steps


def check_shapes(calls, planned, seen):
  """Of all that was called; sums begin as None, and take several weights."""
  for name, shapes in calls.items():
    if name == 'read' or not shapes:
      continue
    assert planned[name] in shapes or name == 'add to a sum', name
    if planned[name] in shapes:
      seen.add(name)
    if name not in ('add to a sum', 'fine-tuning step'):
      assert shapes.keys() == {planned[name]}, name


# Seconds.


@pytest.mark.parametrize(
    'file, chip, tflops',
    [(DIGITS, 'H100', 494.7), (DIGITS, 'v5e', 197), (VIT_G, 'H100', 989.4)],
)
def test_seconds_are_work_and_bytes_over_rates(file, chip, tflops):
  """Of float32 (the digits) and bfloat16 (ViT-G/14) in closed form."""
  experiment, num = load(file), 5
  config = experiment.config
  mesh, _ = machines.cpu_mesh(2)
  lowerings = programs.of(experiment, mesh, num)
  made = [programs.Program(name, 8, arguments=8) for name in lowerings]
  with jax.set_mesh(mesh):
    jaxpr = lowerings['evaluation step']().jaxpr.jaxpr
  made[1] = made[1]._replace(
      flops=hlo.flops_of(jaxpr) / 2,
      wide_flops=hlo.flops_of(jaxpr, np.float32) / 2,
  )
  rates = machines.Rates(chip, utilisation=0.25, read=2.0)
  rows = recipes.of(experiment, mesh, GIB, num, made, rates).recipes
  greedy = recipe_of(rows, 'greedy')
  num_batches = -(-config.data.sizes.held_out // config.batch_size)
  examples = (2 * num - 1) * num_batches * config.batch_size
  flops = examples * forward_flops(config.model)
  # Of bfloat16 models the head alone multiplies float32.
  assert greedy.compute_seconds == pytest.approx(
      flops / 2 / (tflops * 1e12 * 0.25), rel=1e-3
  )
  assert greedy.read_seconds == (greedy.reads + greedy.examples) / 2e9
  # The digits stay on the device; images of ViT-G/14 are read in each walk.
  height, width, channels = config.model.image_shape
  num_read = config.batch_size if file == DIGITS else examples
  pixel = 4 if file == DIGITS else 1  # Bytes.
  assert greedy.examples == num_read * (height * width * channels * pixel + 4)
  uniform = recipe_of(rows, 'uniform')
  assert (uniform.compute_seconds, uniform.examples) == (0, 0)
  assert 2 * uniform.reads == greedy.reads > 0
  unknown = machines.Rates()
  assert unknown.compute_seconds(1, 1) is unknown.read_seconds(1) is None


def test_what_would_not_start_is_not_planned():
  mesh, _ = machines.cpu_mesh(4)
  with pytest.raises(ValueError, match='batch_size is 50, .*among 4 devices'):
    programs.of(load(DIGITS), mesh, 3)
  assert programs.used(load(DIGITS).config, mesh).size == 1
  assert programs.used(load(VIT_G).config, mesh).size == 4


# What fits, and what would.


def test_without_learned_soups_there_is_no_word_of_them():
  experiment = load(DIGITS, '--config.model.depth=1')
  config = experiment.config.copy_and_resolve_references()
  with config.unlocked():
    del config.learned
  experiment = experiment._replace(config=config)
  mesh, _ = machines.cpu_mesh(2)
  names = programs.of(experiment, mesh, 3)
  assert {'add to a sum', 'evaluation step', 'fine-tuning step'} == set(names)
  rows = planned_rows(experiment, mesh, 3, names)
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
      for r in recipes.of(
          experiment, mesh, num_bytes, num, made.programs, machines.Rates()
      ).recipes
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
@pytest.mark.parametrize(
    'config, options',
    [(MLP, []), (f'{DIGITS}:runlocal', ['--chip=A100', '--read-rate=0.5'])],
)
def test_on_virtual_devices(config, options, tmp_path):
  file = tmp_path / 'plan.json'
  result = run_command(
      f'--config={config}',
      '--devices=2',
      '--ingredients=3',
      f'--json={file}',
      *options,
  )
  assert result.returncode == 0, result.stderr
  made = json.loads(file.read_text())
  assert (made['num_devices'], made['num_ingredients']) == (2, 3)
  assert made['num_used'] == 1
  assert 'Only 1 of 2 devices is used' in result.stdout
  for r in made['recipes']:
    assert (r['compute_seconds'] is None) == (not options)
    if options:
      read = r['reads'] + r['examples']
      assert r['read_seconds'] == pytest.approx(read / 0.5e9)
  assert all(r['fits'] for r in made['recipes'])
  lines = result.stdout.splitlines()
  machine = 'A100' if options else 'CPU'
  assert lines[0].startswith(f'{machine}: 2 devices of')
  assert ('Predicted, not measured' in result.stdout) == bool(options)
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
        (['--devices=2', '--chip=H1000'], 'no chip', 2),
        (['--topology=v5e:2x2', '--chip=H100'], 'names the chip', 2),
        (['--devices=2', '--read-rate=0'], 'above 0', 2),
        (['--devices=2', '--utilisation=-1'], 'above 0', 2),
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
