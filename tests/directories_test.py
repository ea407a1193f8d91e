"""Soups of Hugging Face directories, with and without transformers."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from typer import testing

import jaxsoup
from jaxsoup import checkpoints
from jaxsoup import cli

pytestmark = [
    # transformers and what it imports.
    pytest.mark.filterwarnings('ignore::DeprecationWarning'),
    pytest.mark.filterwarnings('ignore::FutureWarning'),
]

COMMAND = [sys.executable, '-c', 'from jaxsoup import cli; cli.main()', 'soup']


def arrays_of(k, num_steps=7):
  rng = np.random.default_rng(k)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  embedding = normal(6, 4)
  return {
      'shared.weight': embedding,
      'encoder.embed.weight': embedding.copy(),  # Tied.
      'encoder.0.attention.self.value.weight': normal(4, 4),
      'encoder.0.half': normal(3).astype(jnp.bfloat16),
      'bn.num_batches_tracked': np.asarray(num_steps, np.int64),
      'position_ids': np.arange(5, dtype=np.int64)[None],
  }


def made(folder, arrays, config=None, **files):
  """A directory, written as others do."""
  folder.mkdir(parents=True)
  safetensors.numpy.save_file(arrays, folder / 'model.safetensors')
  (folder / 'config.json').write_text(json.dumps(config or {'hidden': 4}))
  for name, content in files.items():
    (folder / name.replace('__', '.')).write_text(content)
  return folder


@pytest.fixture
def runs(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for k, name in enumerate('abc'):
    made(tmp_path / name, arrays_of(k), tokenizer__json=f'"{name}"')
  return list('abc')


def mean(trees, alpha=None):
  """The average of arrays by name, rounded once."""
  alpha = [1 / len(trees)] * len(trees) if alpha is None else alpha

  def leaf(name, first):
    if first.dtype.kind == 'i':
      return first
    parts = [a * t[name].astype(np.float64) for a, t in zip(alpha, trees)]
    return sum(parts).astype(first.dtype)

  return {name: leaf(name, x) for name, x in trees[0].items()}


def assert_near(actual, expected):
  assert actual.keys() == expected.keys()
  for name, x in expected.items():
    assert actual[name].dtype == x.dtype and actual[name].shape == x.shape
    np.testing.assert_allclose(
        np.asarray(actual[name], np.float64),
        np.asarray(x, np.float64),
        rtol=1e-2 if x.dtype.itemsize == 2 else 2e-6,
        atol=1e-6,
        err_msg=name,
    )


def read(folder):
  arrays = {}
  for file in pathlib.Path(folder).glob('*.safetensors'):
    arrays |= safetensors.numpy.load_file(file)
  return arrays


def invoke(*args):
  result = testing.CliRunner().invoke(cli.app, ['soup', *map(str, args)])
  if result.exception and not isinstance(result.exception, SystemExit):
    raise result.exception
  return result


def uniform(*args):
  return invoke('uniform', *args, '--out', 'soup')


# --- Without transformers -----------------------------------------------------


def test_a_directory_like_those_that_came_in(runs):
  result = uniform(*runs)
  assert result.exit_code == 0, result.output
  arrays = read('soup')
  assert_near(arrays, mean([arrays_of(k) for k in range(3)]))
  # Tied tensors stay equal.
  assert np.array_equal(arrays['shared.weight'], arrays['encoder.embed.weight'])
  assert sorted(os.listdir('soup')) == [
      'README.md', 'config.json', 'model.safetensors', 'soup.json',
      'tokenizer.json',
  ]  # fmt: skip
  assert sorted(os.listdir()) == ['a', 'b', 'c', 'soup']
  assert pathlib.Path('soup/tokenizer.json').read_text() == '"a"'


def test_given_weights(runs):
  weights = [0.5, 0.2, 0.3]
  args = ('average', *runs, '--alpha', '0.5,0.2,0.3', '--out', 'soup')
  assert invoke(*args).exit_code == 0
  assert_near(read('soup'), mean([arrays_of(k) for k in range(3)], weights))
  np.testing.assert_allclose(checkpoints.load('soup').alpha, weights)


@pytest.mark.filterwarnings('ignore:.*holds float64')
def test_recipes_that_hold_the_params(runs, monkeypatch):
  pathlib.Path('mine.py').write_text(
      'def score(params):\n'
      "  return -float(abs(params['shared']['weight']).sum())\n"
  )
  monkeypatch.setattr(sys, 'path', list(sys.path))
  args = ('greedy', *runs, '--eval', 'mine:score', '--out', 'soup')
  assert invoke(*args).exit_code == 0
  soup = checkpoints.load('soup')
  assert_near(read('soup'), mean([arrays_of(k) for k in range(3)], soup.alpha))
  card = pathlib.Path('soup/README.md').read_text()
  assert f'Held-out score of the soup: {soup.info.score:.4f}.' in card
  assert f'| {soup.info.scores[(1,)]:.4f} |' in card
  assert 'Recipe: greedy' in card


def test_shards(runs):
  result = uniform(*runs, '--max-shard-size', '200B')
  assert result.exit_code == 0, result.output
  index = json.loads(
      pathlib.Path('soup/model.safetensors.index.json').read_text()
  )
  files = sorted(set(index['weight_map'].values()))
  assert files == sorted(
      f.name for f in pathlib.Path('soup').glob('*.safete*s')
  )
  assert files[0] == f'model-00001-of-0000{len(files)}.safetensors'
  assert len(files) > 1
  expected = mean([arrays_of(k) for k in range(3)])
  assert index['weight_map'].keys() == expected.keys()
  sizes = [x.nbytes for x in expected.values()]
  assert index['metadata']['total_size'] == sum(sizes)
  assert_near(read('soup'), expected)
  # And as ingredients again, with their checksums.
  again = invoke('uniform', 'soup', 'a', '--out', 'again.safetensors')
  assert again.exit_code == 0, again.output
  first = mean([expected, arrays_of(0)])
  arrays = safetensors.numpy.load_file('again.safetensors')
  assert_near(arrays, first)


@pytest.mark.parametrize('shard', ['5GB', '200B'])
def test_what_is_stored_with_it(runs, shard):
  uniform(*runs, '--max-shard-size', shard)
  own = checkpoints.provenance('soup')
  assert own['metadata']['recipe'] == 'uniform'
  assert len(own['checksums']) == len(arrays_of(0))
  np.testing.assert_allclose(own['alpha'], [1 / 3] * 3)
  paths = [row['path'] for row in own['ingredients']]
  assert paths == [os.path.abspath(f'{r}/model.safetensors') for r in runs]
  hashes = {row['content_hash'] for row in own['ingredients']}
  assert len(hashes - {None}) == 3
  assert checkpoints.load('soup').params['shared']['weight'].shape == (6, 4)
  file = sorted(pathlib.Path('soup').glob('*.safetensors'))[0]
  content = bytearray(file.read_bytes())
  content[-3] ^= 1
  file.write_bytes(content)
  with pytest.raises(ValueError, match='is damaged: its checksum'):
    checkpoints.Ingredients(['soup'])[0]


def test_the_card(runs):
  uniform(*runs)
  yaml = pytest.importorskip('yaml', reason='reads the front matter')
  _, front, page = pathlib.Path('soup/README.md').read_text().split('---\n', 2)
  assert yaml.safe_load(front) == {
      'base_model': ['a', 'b', 'c'],
      'base_model_relation': 'merge',
      'tags': ['model-soup'],
  }
  assert page.startswith('\n# soup\n')
  assert '| <code>b</code> | 0.3333 |' in page and 'Recipe: uniform.' in page


def test_what_is_carried_over(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  kept = [
      'merges.txt', 'vocab.txt', 'tokenizer_config.json', 'spiece.model',
      'special_tokens_map.json', 'generation_config.json',
      'chat_template.jinja',
      'preprocessor_config.json', 'modeling_mine.py',
  ]  # fmt: skip
  left = [
      'pytorch_model.bin', 'optimizer.pt', 'scheduler.pt', 'rng_state_0.pth',
      'training_args.bin', 'trainer_state.json', 'README.md', '.gitattributes',
      'events.out.tfevents.1', 'train.log', 'tf_model.h5',
      'pytorch_model.bin.index.json', 'flax_model.msgpack', 'soup.json',
  ]  # fmt: skip
  for k, name in enumerate('ab'):
    made(tmp_path / name, arrays_of(k))
  for name in kept + left:
    (tmp_path / 'a' / name).write_text(f'of {name}')
  (tmp_path / 'a' / 'checkpoint-500').mkdir()
  assert uniform('a', 'b').exit_code == 0
  own = {'README.md', 'config.json', 'model.safetensors', 'soup.json'}
  assert set(os.listdir('soup')) == own | set(kept)
  for name in kept:
    assert (tmp_path / 'soup' / name).read_text() == f'of {name}'


def test_names_that_collide_stay(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  trees = [{'a': np.ones(2, 'f4') * k, 'a.b': np.ones(3, 'f4')} for k in (1, 2)]
  for name, arrays in zip('ab', trees):
    made(tmp_path / name, arrays)
  assert uniform('a', 'b', '--max-shard-size', '10B').exit_code == 0
  assert_near(read('soup'), mean(trees))


def test_names_of_the_hub(tmp_path):
  paths = [
      made(
          tmp_path / f'models--org--name-{k}' / 'snapshots' / 'abc',
          arrays_of(k),
      )
      for k in range(2)
  ]
  ingredients = checkpoints.Ingredients(paths)
  checkpoints.save_directory(tmp_path / 'soup', ingredients)
  card = (tmp_path / 'soup' / 'README.md').read_text()
  assert '- "org/name-0"\n- "org/name-1"\n' in card


def test_other_outputs(runs):
  file = ('--out', 'x.safetensors')
  assert invoke('uniform', *runs, *file).exit_code == 0
  assert pathlib.Path('x.safetensors').is_file()
  # One that is no directory: nothing to carry over.
  mixed = ('a', 'b/model.safetensors')
  assert invoke('uniform', *mixed, '--out', 'orbax').exit_code == 0
  assert pathlib.Path('orbax/_METADATA').exists()


@pytest.mark.parametrize(
    'args, code, said',
    [
        (('average',), 2, "Missing option '--alpha'"),
        (('uniform', '--alpha', '1,2,3'), 2, 'No such option: --alpha'),
        (('average', '--alpha', 'x'), 2, 'not a list of numbers'),
        (('average', '--alpha', '1,2'), 1, 'there are 3'),
        (('uniform', '--max-shard-size', '5 apples'), 2, '500MB'),
    ],
)
def test_wrong_usage(runs, args, code, said):
  result = invoke(args[0], *runs, *args[1:], '--out', 'soup')
  assert result.exit_code == code
  assert said in ' '.join(result.output.replace('│', ' ').split())
  assert sorted(os.listdir()) == runs


def test_counters_that_differ(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for k, name in enumerate('ab'):
    made(tmp_path / name, arrays_of(k, num_steps=k))
  assert uniform('b', 'a').exit_code == 0
  assert read('soup')['bn.num_batches_tracked'] == 1


@pytest.mark.parametrize('change', ['shape', 'missing', 'more'])
def test_heads_that_differ(runs, tmp_path, change):
  arrays = arrays_of(3)
  if change == 'shape':
    arrays['encoder.0.half'] = np.zeros(5, jnp.bfloat16)
  elif change == 'missing':
    del arrays['encoder.0.half']
  else:
    arrays['head'] = np.zeros(3, np.float32)
  made(tmp_path / 'odd', arrays)
  result = uniform(*runs, 'odd')
  assert result.exit_code == 1 and 'odd/model.safetensors' in result.stderr
  assert not pathlib.Path('soup').exists()


@pytest.mark.filterwarnings('always:.*differs from that of')
def test_configs_that_differ(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  made(tmp_path / 'a', arrays_of(0), {'id2label': {'0': 'cat', '1': 'dog'}})
  made(tmp_path / 'b', arrays_of(1), {'id2label': {'0': 'dog', '1': 'cat'}})
  result = uniform('a', 'b')
  assert result.exit_code == 0
  assert 'b/config.json differs from that of' in result.stderr
  assert 'in id2label' in result.stderr


def test_a_broken_config(runs):
  pathlib.Path('b/config.json').write_text('{')
  result = uniform(*runs)
  assert result.exit_code == 1 and 'b/config.json cannot be' in result.stderr


def test_it_never_overwrites(runs):
  pathlib.Path('soup').mkdir()
  assert uniform(*runs).exit_code == 2
  ingredients = checkpoints.Ingredients(runs)
  with pytest.raises(FileExistsError):
    checkpoints.save_directory('soup', ingredients)
  assert os.listdir('soup') == []


def test_ingredients_that_are_no_directories(runs):
  checkpoints.save('x/model.safetensors', {'w': np.ones(2)})
  ingredients = checkpoints.Ingredients(['x'])
  with pytest.raises(ValueError, match='is not in a Hugging Face directory'):
    checkpoints.save_directory('soup', ingredients)


def test_a_template_of_a_part(runs, tmp_path):
  """A directory has all tensors: config and code expect them."""
  ingredients = checkpoints.Ingredients(runs)
  kept = dict(list(ingredients.abstract_params.items())[1:])
  part = checkpoints.Ingredients(runs, kept)
  for soup in (None, jaxsoup.uniform(part)):
    with pytest.raises(
        ValueError, match='abstract_params and .* differ in lea'
    ):
      checkpoints.save_directory(tmp_path / 'out', part, soup)


@pytest.mark.parametrize('write', ['save_average', 'save_directory'])
def test_no_ingredients(write, tmp_path):
  with pytest.raises(ValueError, match='There are no ingredients'):
    getattr(checkpoints, write)(tmp_path / 'out', checkpoints.Ingredients([]))
  assert not os.listdir(tmp_path)


def test_adapters_are_not_averaged_by_their_factors(runs):
  pathlib.Path('b/adapter_config.json').write_text('{}')
  result = uniform(*runs)
  assert result.exit_code == 1 and 'b is a LoRA adapter' in result.stderr


@pytest.mark.slow
def test_a_kill_leaves_nothing_under_the_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for k, name in enumerate('ab'):
    rng = np.random.default_rng(k)
    arrays = {f'w{i}': rng.random((1024, 1024), 'f4') for i in range(16)}
    made(tmp_path / name, arrays)
  command = [*COMMAND, 'uniform', 'a', 'b', '--out', 'soup']
  command += ['--max-shard-size', '4MB']
  process = subprocess.Popen(command, stderr=subprocess.PIPE)
  try:
    # In the middle: the second of many files is there.
    while not list(tmp_path.glob('soup.resumable-*/model-00002-*')):
      assert process.poll() is None, process.stderr.read()
      time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
  finally:
    process.kill()
    process.communicate()
  assert not pathlib.Path('soup').exists()
  # And the next one is not in its way.
  assert uniform('a', 'b').exit_code == 0
  assert checkpoints.load('soup').params['w3'].shape == (1024, 1024)


@pytest.mark.slow
def test_memory_stays_bounded(tmp_path):
  for k, name in enumerate('abc'):
    rng = np.random.default_rng(k)
    arrays = {f'w{i}': rng.random((1 << 22,), 'f4') for i in range(10)}
    made(tmp_path / name, arrays)  # 168 MB.
  code = (
      'import pathlib, re, sys\n'
      'from jaxsoup import checkpoints\n'
      # Not ru_maxrss, which a process inherits.
      'status = pathlib.Path("/proc/self/status")\n'
      'pattern = re.compile(r"VmHWM:\\s*(\\d+)")\n'
      'peak = lambda: int(pattern.search(status.read_text())[1])\n'
      'ingredients = checkpoints.Ingredients(sys.argv[1:4])\n'
      'before = peak()\n'
      'checkpoints.save_directory(sys.argv[4], ingredients)\n'
      'print(peak() - before)'
  )
  paths = [str(tmp_path / name) for name in (*'abc', 'soup')]
  result = subprocess.run(
      [sys.executable, '-c', code, *paths],
      capture_output=True,
      text=True,
      check=True,
  )
  assert int(result.stdout) < 84_000  # Half of a model; it was 16 MB.


def test_directories_of_torch(tmp_path, monkeypatch):
  torch = pytest.importorskip('torch', reason='writes files of torch')
  monkeypatch.chdir(tmp_path)
  for k, name in enumerate('ab'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'config.json').write_text('{}')
    content = {'head.weight': torch.full((2, 3), k + 1.0)}
    torch.save(content, tmp_path / name / 'pytorch_model.bin')
  assert uniform('a', 'b').exit_code == 0
  assert_near(read('soup'), {'head.weight': np.full((2, 3), 1.5, 'f4')})
  assert 'model.safetensors' in os.listdir('soup')


# --- Modules of sentence-transformers -----------------------------------------


def made_of_modules(folder, k, names=('', '1_Pooling', '2_Dense')):
  """A transformer, a pooling and a dense layer."""
  made(folder, arrays_of(k))
  rows = [{'idx': i, 'path': name} for i, name in enumerate(names)]
  (folder / 'modules.json').write_text(json.dumps(rows))
  (folder / 'config_sentence_transformers.json').write_text('{"prompts": {}}')
  (folder / '1_Pooling').mkdir()
  (folder / '1_Pooling' / 'config.json').write_text('{"mode": "mean"}')
  weights = np.random.default_rng(k).random((4, 3), np.float32)
  made(folder / '2_Dense', {'linear.weight': weights}, {'out': 3})
  (folder / 'onnx').mkdir()
  (folder / 'onnx' / 'config.json').write_text('{}')
  return {'linear.weight': weights}


@pytest.mark.parametrize('options', [(), ('--dtype', 'float32')])
def test_modules_are_carried_over_and_averaged(tmp_path, monkeypatch, options):
  monkeypatch.chdir(tmp_path)
  dense = [made_of_modules(tmp_path / n, k) for k, n in enumerate('ab')]
  result = uniform('a', 'b', *options)
  assert result.exit_code == 0, result.output
  files = {
      f.relative_to('soup').as_posix()
      for f in pathlib.Path('soup').rglob('*')
      if f.is_file()
  }
  assert files == {
      'README.md', 'config.json', 'config_sentence_transformers.json',
      'model.safetensors', 'modules.json', 'soup.json', '1_Pooling/config.json',
      '2_Dense/config.json', '2_Dense/model.safetensors',
  }  # fmt: skip
  assert_near(read('soup/2_Dense'), mean(dense))
  args = ['inspect', 'soup', '--deep']
  inspected = testing.CliRunner().invoke(cli.app, args)
  assert 'No problems.' in inspected.stdout and inspected.exit_code == 0
  pathlib.Path('soup/1_Pooling/config.json').write_text('{"mode": "cls"}')
  inspected = testing.CliRunner().invoke(cli.app, args)
  assert '1_Pooling/config.json was changed' in inspected.stdout


def test_coefficients_of_modules(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  dense = [made_of_modules(tmp_path / n, k) for k, n in enumerate('ab')]
  args = ('average', 'a', 'b', '--alpha', '0.25,0.75', '--out', 'soup')
  assert invoke(*args).exit_code == 0
  assert_near(read('soup/2_Dense'), mean(dense, [0.25, 0.75]))
  # The start has no coefficient.
  made_of_modules(tmp_path / 'start', 2)
  args = ('model-stock', 'a', 'b', '--init', 'start', '--out', 'stock')
  result = invoke(*args)
  assert result.exit_code == 1
  assert '2_Dense/model.safetensors is a module of its own' in result.stderr
  assert not pathlib.Path('stock').exists()


@pytest.mark.filterwarnings('always:.*differs from that of')
def test_modules_that_differ(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for k, name in enumerate('abc'):
    made_of_modules(tmp_path / name, k)
  pathlib.Path('b/1_Pooling/config.json').write_text('{"mode": "cls"}')
  result = uniform('a', 'b')
  assert 'b/1_Pooling/config.json differs from that of' in result.stderr
  pathlib.Path('c/2_Dense/model.safetensors').unlink()
  result = invoke('uniform', 'a', 'c', '--out', 'other')
  assert result.exit_code == 1 and 'c/2_Dense' in result.stderr
  pathlib.Path('a/modules.json').write_text('[{"path": "../b"}]')
  result = invoke('uniform', 'a', 'b', '--out', 'other')
  assert result.exit_code == 1 and 'is not a subdirectory' in result.stderr


@pytest.mark.filterwarnings('always:.*modules')
@pytest.mark.parametrize('out', ['soup.safetensors', 'soup'])
@pytest.mark.parametrize('is_average', [True, False])
def test_modules_that_a_soup_lacks(tmp_path, monkeypatch, out, is_average):
  monkeypatch.chdir(tmp_path)
  for k, name in enumerate('ab'):
    made_of_modules(tmp_path / name, k)
  ingredients = checkpoints.Ingredients(['a', 'b'])
  with pytest.warns(UserWarning) as warned:
    if is_average:
      checkpoints.save_average(out, ingredients)
    else:
      soup = jaxsoup.uniform(ingredients)
      checkpoints.save(out, soup, ingredients=ingredients)
  (said,) = [str(w.message) for w in warned if 'module' in str(w.message)]
  assert '2_Dense' in said and '1_Pooling' not in said


# --- With transformers --------------------------------------------------------

TINY = dict(
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
)
IDS = [[2, 7, 5, 3, 1, 9], [4, 4, 8, 1, 3, 2]]


def bert(transformers):
  config = transformers.BertConfig(vocab_size=30, num_labels=5, **TINY)
  return transformers.BertForSequenceClassification(config)


def bert_with_tied_weights(transformers):
  return transformers.BertForMaskedLM(
      transformers.BertConfig(vocab_size=30, **TINY)
  )


def t5_with_tied_weights(transformers):
  config = transformers.T5Config(
      vocab_size=30, d_model=12, d_kv=4, d_ff=20, num_layers=2, num_heads=3,
      decoder_start_token_id=0,
  )  # fmt: skip
  return transformers.T5ForConditionalGeneration(config)


def vit(transformers):
  config = transformers.ViTConfig(
      image_size=8, patch_size=4, num_labels=5, **TINY
  )
  return transformers.ViTForImageClassification(config)


def clip(transformers):
  tower = dict(TINY, projection_dim=6)
  return transformers.CLIPModel(
      transformers.CLIPConfig(
          text_config=dict(
              tower, vocab_size=30, max_position_embeddings=8, eos_token_id=9
          ),
          vision_config=dict(tower, image_size=8, patch_size=4),
          projection_dim=6,
      )
  )


def resnet(transformers):
  config = transformers.ResNetConfig(
      embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=5
  )
  return transformers.ResNetForImageClassification(config)


def logits(torch, model):
  ids = torch.tensor(IDS)
  generator = torch.Generator().manual_seed(0)
  pixels = torch.randn((2, 3, 8, 8), generator=generator)
  arguments = {
      'input_ids': ids,
      'pixel_values': pixels,
      'decoder_input_ids': ids,
  }
  if 'Model' in type(model).__name__:  # CLIP takes both.
    wanted = {'input_ids', 'pixel_values'}
  elif model.main_input_name == 'pixel_values':
    wanted = {'pixel_values'}
  else:
    wanted = {'input_ids'} | (
        {'decoder_input_ids'} if model.config.is_encoder_decoder else set()
    )
  with torch.no_grad():
    out = model.eval()(**{k: arguments[k] for k in wanted})
  return out.logits_per_image if 'logits_per_image' in out else out.logits


def fine_tuned(torch, transformers, make, k):
  """A model in which no parameter and no buffer has its first value."""
  torch.manual_seed(k)
  model = make(transformers)
  with torch.no_grad():
    for x in model.state_dict().values():
      if x.is_floating_point():
        x.add_(0.1 * torch.randn_like(x).abs())
  return model


@pytest.mark.reference
@pytest.mark.parametrize(
    'make',
    [bert, bert_with_tied_weights, t5_with_tied_weights, vit, clip, resnet],
)
@pytest.mark.parametrize('is_sharded', [False, True])
def test_from_pretrained_loads_the_soup(
    tmp_path, monkeypatch, make, is_sharded
):
  torch = pytest.importorskip('torch', reason='the reference')
  transformers = pytest.importorskip('transformers', reason='the reference')
  monkeypatch.chdir(tmp_path)
  models = [fine_tuned(torch, transformers, make, k) for k in range(3)]
  size = '2KB' if is_sharded else '5GB'
  for name, model in zip('abc', models):
    # Sharded or not, they are one model: the first decides nothing.
    model.save_pretrained(name, max_shard_size=size if name == 'b' else '5GB')
  assert pathlib.Path('b/model.safetensors').exists() != is_sharded
  result = uniform('a', 'b', 'c', '--max-shard-size', size)
  assert result.exit_code == 0, result.output
  assert result.stderr == ''
  states = [model.state_dict() for model in models]
  expected = make(transformers)
  expected.load_state_dict(
      {
          name: sum(s[name] for s in states) / 3 if x.is_floating_point() else x
          for name, x in states[0].items()
      }
  )
  loaded, info = type(expected).from_pretrained(
      'soup', output_loading_info=True
  )
  assert not any(info.values()), info
  for name, x in loaded.state_dict().items():
    torch.testing.assert_close(x, expected.state_dict()[name])
  difference = logits(torch, loaded) - logits(torch, expected)
  assert float(difference.abs().max()) < 1e-5
  # No mean is one of the models.
  other = logits(torch, models[0]) - logits(torch, expected)
  assert float(other.abs().max()) > 1e-4


@pytest.mark.reference
def test_tied_weights_that_are_both_stored(tmp_path, monkeypatch):
  # As older versions and other writers store them.
  torch = pytest.importorskip('torch', reason='the reference')
  transformers = pytest.importorskip('transformers', reason='the reference')
  monkeypatch.chdir(tmp_path)
  for k, name in enumerate('ab'):
    model = fine_tuned(torch, transformers, t5_with_tied_weights, k)
    model.save_pretrained(name)
    arrays = safetensors.numpy.load_file(f'{name}/model.safetensors')
    arrays['lm_head.weight'] = arrays['shared.weight'].copy()
    safetensors.numpy.save_file(
        arrays, f'{name}/model.safetensors', {'format': 'pt'}
    )
  assert uniform('a', 'b').exit_code == 0
  stored = read('soup')
  assert np.array_equal(stored['lm_head.weight'], stored['shared.weight'])
  loaded = type(model).from_pretrained('soup')
  assert loaded.lm_head.weight.data_ptr() == loaded.shared.weight.data_ptr()


@pytest.mark.reference
def test_in_other_processes_with_a_tokenizer(tmp_path, monkeypatch):
  torch = pytest.importorskip('torch', reason='the reference')
  transformers = pytest.importorskip('transformers', reason='the reference')
  monkeypatch.chdir(tmp_path)
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'good', 'bad', 'film']
  pathlib.Path('vocab.txt').write_text('\n'.join(words))
  tokenizer = transformers.BertTokenizerFast('vocab.txt')
  for k, name in enumerate('ab'):
    model = fine_tuned(torch, transformers, bert, k)
    model.half().save_pretrained(name)
    tokenizer.save_pretrained(name)
  command = [*COMMAND, 'uniform', 'a', 'b', '--out', 'soup']
  subprocess.run(command, check=True)
  code = (
      'import transformers\n'
      'tokenizer = transformers.AutoTokenizer.from_pretrained("soup")\n'
      'auto = transformers.AutoModelForSequenceClassification\n'
      'model = auto.from_pretrained("soup")\n'
      'print(tokenizer("a good film")["input_ids"], model.dtype)'
  )
  result = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert result.stdout == '[2, 1, 5, 7, 3] torch.float16\n'


@pytest.mark.reference
def test_inspect_directories(tmp_path, monkeypatch):
  torch = pytest.importorskip('torch', reason='the reference')
  transformers = pytest.importorskip('transformers', reason='the reference')
  monkeypatch.chdir(tmp_path)
  for k, name in enumerate('ab'):
    model = fine_tuned(torch, transformers, bert, k)
    model.save_pretrained(name, max_shard_size='8KB' if k else '5GB')
  args = ['inspect', 'a', 'b', '--deep', '--json']
  result = testing.CliRunner().invoke(cli.app, args)
  assert result.exit_code == 0, result.output
  inspected = json.loads(result.stdout)
  assert inspected['num_params'] == [model.num_parameters()] * 2
  assert inspected['problems'] == [] and len(set(inspected['norms'])) == 2


@pytest.mark.reference
@pytest.mark.slow
def test_sentence_transformers_loads_the_soup(tmp_path, monkeypatch):
  torch = pytest.importorskip('torch', reason='the reference')
  transformers = pytest.importorskip('transformers', reason='the reference')
  sentence = pytest.importorskip(
      'sentence_transformers', reason='the reference'
  )
  modules = sentence.sentence_transformer.modules
  monkeypatch.chdir(tmp_path)
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'good', 'bad', 'film']
  pathlib.Path('vocab.txt').write_text('\n'.join(words))
  make = lambda t: t.BertModel(t.BertConfig(vocab_size=8, **TINY))
  models = []
  for k, name in enumerate('ab'):
    fine_tuned(torch, transformers, make, k).save_pretrained(f'base-{name}')
    transformers.BertTokenizerFast('vocab.txt').save_pretrained(f'base-{name}')
    torch.manual_seed(k)
    parts = [
        modules.Transformer(f'base-{name}'),
        modules.Pooling(12, 'mean'),
        modules.Dense(12, 6),
        modules.Normalize(),
    ]
    models.append(sentence.SentenceTransformer(modules=parts, device='cpu'))
    models[-1].save(name)
  assert uniform('a', 'b').exit_code == 0
  soup = sentence.SentenceTransformer('soup', device='cpu')
  states = [m.state_dict() for m in models]
  assert soup.state_dict().keys() == states[0].keys()
  for name, x in soup.state_dict().items():
    expected = (states[0][name] + states[1][name]) / 2
    torch.testing.assert_close(x, expected.to(x.dtype))
  norms = np.linalg.norm(soup.encode(['good film', 'bad']), axis=1)
  np.testing.assert_allclose(norms, 1, rtol=1e-5)
