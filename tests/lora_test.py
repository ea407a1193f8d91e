"""Averages of adapters: against the dense average, and against PEFT."""

import json
import os
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxsoup import checkpoints
from jaxsoup import lora

pytestmark = [
    # transformers, PEFT and what they import.
    pytest.mark.filterwarnings('ignore::DeprecationWarning'),
    pytest.mark.filterwarnings('ignore::FutureWarning'),
    pytest.mark.filterwarnings('ignore::UserWarning:peft'),
]

SIZES = {'layers.0.q': (7, 5), 'layers.1.q': (4, 9), 'head': (3, 6)}


def adapter_of(k, rank=2, layers=tuple(SIZES)):
  rng = np.random.default_rng(k)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {
      n: {
          'lora_a': normal(SIZES[n][0], rank),
          'lora_b': normal(rank, SIZES[n][1]),
      }
      for n in layers
  }


def product(adapter, layer):
  if layer not in adapter:
    return np.zeros(SIZES[layer])
  a, b = (adapter[layer][key] for key in ('lora_a', 'lora_b'))
  return a.astype(np.float64) @ b.astype(np.float64)


def expected_of(adapters, alpha):
  return {
      n: sum(a * product(x, n) for a, x in zip(alpha, adapters)) for n in SIZES
  }


def assert_near(actual, expected, atol=1e-6):
  assert actual.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_allclose(actual[name], x, atol=atol, err_msg=name)


@pytest.mark.parametrize('alpha', [None, [0.6, 0.3, 0.1], [2.0, -1.0, 0.0]])
@pytest.mark.parametrize('order', [(0, 1, 2), (1, 0, 2)])
def test_the_average_of_the_products(alpha, order):
  # Of different ranks and layers: what is absent adds nothing.
  adapters = [
      adapter_of(0),
      adapter_of(1, rank=3, layers=('layers.0.q', 'head')),
      adapter_of(2, rank=1),
  ]
  adapters = [adapters[k] for k in order]
  soup = lora.average(adapters, alpha)
  alpha = alpha or [1 / 3] * 3
  assert_near(lora.dense(soup.params), expected_of(adapters, alpha))
  np.testing.assert_allclose(soup.alpha, alpha)
  assert soup.info.residuals == dict.fromkeys(SIZES, 0.0)
  ranks = {n: f['lora_a'].shape[1] for n, f in soup.params.items()}
  assert ranks == {'layers.0.q': 6, 'layers.1.q': 3, 'head': 6}


def test_the_average_of_the_factors_is_something_else():
  adapters = [adapter_of(k) for k in range(2)]
  factors = jax.tree.map(lambda *x: np.mean(x, axis=0), *adapters)
  right = lora.dense(lora.average(adapters).params)
  wrong = lora.dense(factors)
  for name, x in right.items():
    assert np.linalg.norm(wrong[name] - x) > 0.3 * np.linalg.norm(x)
  # The same adapter, its factors written otherwise: (-A) (-B).
  # Its average with itself is itself, but that of the factors is zero.
  turned = jax.tree.map(lambda x: -x, adapters[0])
  same = lora.average([adapters[0], turned])
  assert_near(lora.dense(same.params), lora.dense(adapters[0]))


@pytest.mark.parametrize('rank', [1, 2, 3, 4, 50])
def test_the_nearest_of_a_rank(rank):
  adapters = [adapter_of(0), adapter_of(1)]
  soup = lora.average(adapters, rank=rank)
  for name, x in expected_of(adapters, [0.5, 0.5]).items():
    u, s, v = np.linalg.svd(x, full_matrices=False)
    nearest = (u[:, :rank] * s[:rank]) @ v[:rank]
    matrix = lora.dense(soup.params)[name]
    np.testing.assert_allclose(matrix, nearest, atol=1e-5)
    residual = np.linalg.norm(x - nearest) / np.linalg.norm(x)
    np.testing.assert_allclose(soup.info.residuals[name], residual, atol=1e-7)
    assert soup.params[name]['lora_a'].shape[1] == min(rank, 4)


@pytest.mark.parametrize('rank', [None, 2])
def test_layers_of_a_scanned_stack(rank):
  """One leaf for all layers is what one leaf for each is."""
  layers = [[adapter_of(k + 9 * i) for i in range(3)] for k in range(2)]
  stacked = [jax.tree.map(lambda *x: np.stack(x), *x) for x in layers]
  soup = lora.average(stacked, rank=rank)
  for i in range(3):
    one = lora.average([x[i] for x in layers], rank=rank)
    for name, x in lora.dense(one.params).items():
      matrix = lora.dense(soup.params)[name][i]
      np.testing.assert_allclose(matrix, x, atol=1e-5)


class Net(nnx.Module):

  def __init__(self, seed):
    rngs = nnx.Rngs(seed)
    self.first = nnx.LoRALinear(5, 4, lora_rank=2, rngs=nnx.Rngs(0))
    self.second = nnx.LoRA(4, 2, 3, rngs=rngs)
    for layer in (self.first.lora, self.second):
      for x in (layer.lora_a, layer.lora_b):
        x.value = jax.random.normal(rngs.params(), x.value.shape)

  def __call__(self, x):
    return self.second(self.first(x))


@pytest.mark.parametrize('rank', [2, None])
def test_state_of_nnx(rank):
  nets = [Net(seed) for seed in (1, 2, 3)]
  states = [nnx.state(net, nnx.LoRAParam) for net in nets]
  soup = lora.average(states, rank=rank)
  assert isinstance(soup.params, nnx.State)
  assert jax.tree.structure(soup.params) == jax.tree.structure(states[0])
  if rank is not None:
    shapes = [jax.tree.map(jnp.shape, x) for x in (soup.params, states[0])]
    assert jax.tree.leaves(shapes[0]) == jax.tree.leaves(shapes[1])
    assert set(soup.info.residuals) == {'first/lora', 'second'}
    return
  net = nnx.merge(
      nnx.graphdef(nets[0]),
      soup.params,
      nnx.state(nets[0], nnx.Not(nnx.LoRAParam)),
  )
  x = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
  added = lambda net: net.first(x) - x @ net.first.kernel.value
  expected = np.mean([added(n) for n in nets], axis=0)
  np.testing.assert_allclose(added(net), expected, atol=1e-5)


def test_dtypes_stay_and_soups_are_saved(tmp_path):
  adapters = jax.tree.map(
      lambda x: x.astype(jnp.bfloat16), [adapter_of(k) for k in range(2)]
  )
  soup = lora.average(adapters, rank=1)
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(soup.params))
  again = checkpoints.load(checkpoints.save(tmp_path / 'soup', soup))
  assert again.info == soup.info


def test_an_average_of_nothing_has_no_residual():
  zero = {
      'head': {
          'lora_a': np.ones((6, 2), 'f4'),
          'lora_b': np.zeros((2, 3), 'f4'),
      }
  }
  soup = lora.average([zero, zero], rank=1)
  assert soup.info.residuals == {'head': 0.0}
  np.testing.assert_array_equal(lora.dense(soup.params)['head'], 0)


def test_mistakes():
  first = adapter_of(0)
  with pytest.raises(ValueError, match=r'shape \(3,\), .* are 2'):
    lora.average([first, first], [1, 0, 0])
  with pytest.raises(ValueError, match='nan.* one finite weight'):
    lora.average([first, first], [1, np.nan])
  with pytest.raises(ValueError, match='there are 0'):
    lora.average([])
  with pytest.raises(ValueError, match='rank is 0'):
    lora.average([first], rank=0)
  ones = lambda shape: np.ones(shape, np.float32)
  head = lambda a, b: {'head': {'lora_a': ones(a), 'lora_b': ones(b)}}
  with pytest.raises(
      ValueError, match=r"'head': .* {0: \(3, 6\), 1: \(2, 6\)}"
  ):
    lora.average([first, head((2, 1), (1, 6))])
  with pytest.raises(
      ValueError, match=r"'lora_a': \(6, 1\), 'lora_b': \(2, 3\)"
  ):
    lora.average([first, head((6, 1), (2, 3))])
  with pytest.raises(ValueError, match="'head' has .*'lora_a'.*expected"):
    lora.average([{'head': {'lora_a': ones((3, 1))}}])
  with pytest.raises(ValueError, match="'head/kernel' .* no factor"):
    lora.average([{'head': {**first['head'], 'kernel': ones((3, 6))}}])
  bad = {'lora_a': ones((3, 1)) * np.nan, 'lora_b': ones((1, 6))}
  with pytest.raises(ValueError, match='head/lora_a.* NaN or infinite values'):
    lora.average([first, {'head': bad}])


# --- Files --------------------------------------------------------------------


def directory(path, config, **arrays):
  path.mkdir()
  config = {'peft_type': 'LORA', 'r': 2, 'lora_alpha': 8, **config}
  (path / 'adapter_config.json').write_text(json.dumps(config))
  safetensors.numpy.save_file(
      {f'base_model.model.{n}': x for n, x in arrays.items()},
      path / 'adapter_model.safetensors',
  )
  return path


def ab(rank=2):
  rng = np.random.default_rng(0)
  return {
      'x.q.lora_A.weight': rng.normal(size=(rank, 5)).astype(np.float32),
      'x.q.lora_B.weight': rng.normal(size=(4, rank)).astype(np.float32),
  }


@pytest.mark.parametrize(
    'config, scaling',
    [
        ({}, 4),
        ({'use_rslora': True}, 8 / 2**0.5),
        ({'alpha_pattern': {'q': 6}}, 3),
        ({'alpha_pattern': {'^x.q': 6, 'q': 2}}, 3),
        ({'alpha_pattern': {'k': 6}}, 4),
    ],
)
def test_the_scaling_is_folded_in(tmp_path, config, scaling):
  path = directory(tmp_path / 'a', config, **ab())
  (adapter,), config = checkpoints.load_adapters([path])
  a, b = ab().values()
  assert_near(lora.dense(adapter), {'x.q': scaling * (b @ a).T}, 1e-5)
  # Once, whatever is written and read again.
  path = checkpoints.save_adapter(tmp_path / 'again', adapter, config)
  (again,), _ = checkpoints.load_adapters([path])
  assert_near(lora.dense(again), lora.dense(adapter))


def test_adapters_of_other_bases_are_named(tmp_path):
  paths = [
      directory(tmp_path / x, {'base_model_name_or_path': x}, **ab())
      for x in 'ab'
  ]
  with pytest.warns(UserWarning, match="is 'a' in one adapter and 'b' in"):
    _, config = checkpoints.load_adapters(paths)
  assert config['base_model_name_or_path'] == 'a'


@pytest.mark.parametrize(
    'config',
    [
        {'use_dora': True},
        {'bias': 'lora_only'},
        {'modules_to_save': ['classifier']},
        {'init_lora_weights': 'pissa_niter_4'},
        {'peft_type': 'IA3'},
    ],
)
def test_what_is_more_than_factors_is_refused(tmp_path, config):
  path = directory(tmp_path / 'a', config, **ab())
  with pytest.raises(ValueError, match=next(iter(config))) as e:
    checkpoints.load_adapters([path])
  assert str(path) in str(e.value) and 'merge_and_unload' in str(e.value)


@pytest.mark.parametrize(
    'arrays, said',
    [
        ({'x.q.bias': np.ones(4, 'f4')}, 'x.q.bias'),
        ({'x.lora_embedding_A': np.ones((2, 4), 'f4')}, 'lora_embedding_A'),
        ({'x.k.lora_A.weight': np.ones((2, 4, 3, 3), 'f4')}, 'x.k.lora_A'),
        ({'x.k.lora_A.weight': np.ones((2, 4), 'f4')}, "has only .'lora_a'"),
    ],
)
def test_arrays_that_are_no_factors(tmp_path, arrays, said):
  path = directory(tmp_path / 'a', {}, **ab(), **arrays)
  with pytest.raises(ValueError, match=said):
    checkpoints.load_adapters([path])


def test_paths(tmp_path):
  with pytest.raises(FileNotFoundError, match='no adapter_config.json'):
    checkpoints.load_adapters([tmp_path])
  checkpoints.save_adapter(tmp_path / 'new' / 'a', adapter_of(0))
  assert os.listdir(tmp_path / 'new') == ['a']
  with pytest.raises(FileExistsError):
    checkpoints.save_adapter(tmp_path / 'new' / 'a', adapter_of(0))


@pytest.mark.parametrize(
    'params, said',
    [
        (
            {'q': {'kernel': np.ones((2, 2))}},
            "'q/kernel' of shape .2, 2. is no",
        ),
        (
            {'q': {'lora_a': np.ones((3, 2, 1))}},
            r"'q/lora_a' of shape .3, 2, 1",
        ),
        ({'q': {'lora_a': np.ones((2, 1))}}, 'needs lora_a and lora_b'),
        (
            {'q': {'lora_a': np.ones((2, 1)), 'lora_b': np.ones((2, 2))}},
            'factors of rank 1 and 2',
        ),
    ],
)
def test_what_peft_would_not_read_is_not_written(params, said, tmp_path):
  with pytest.raises(ValueError, match=said):
    checkpoints.save_adapter(tmp_path / 'a', params)
  assert not os.listdir(tmp_path)


# --- PEFT ---------------------------------------------------------------------


def base(torch):
  torch.manual_seed(0)
  return torch.nn.ModuleDict({
      'q': torch.nn.Linear(5, 4), 'k': torch.nn.Linear(5, 6),
      'block': torch.nn.ModuleDict({'q': torch.nn.Linear(4, 3)}),
  })  # fmt: skip


@pytest.fixture
def peft():
  pytest.importorskip('torch', reason='PEFT needs torch')
  return pytest.importorskip('peft', reason='compares with PEFT')


def trained(peft, torch, path, k, **options):
  torch.manual_seed(k)
  config = peft.LoraConfig(**options)
  model = peft.get_peft_model(base(torch), config)
  with torch.no_grad():
    for name, x in model.named_parameters():
      if 'lora_' in name:
        x.normal_()
  model.save_pretrained(path)
  return path


def merged(peft, torch, path):
  model = peft.PeftModel.from_pretrained(base(torch), path)
  return {
      n: x.numpy() for n, x in model.merge_and_unload().state_dict().items()
  }


@pytest.mark.reference
@pytest.mark.parametrize('rank', [None, 4])
def test_peft_loads_the_average(tmp_path, peft, rank):
  import torch

  options = [
      dict(r=2, lora_alpha=6, target_modules=['q', 'k']),
      dict(r=3, lora_alpha=3, target_modules=['q'], use_rslora=True),
      dict(
          r=2,
          lora_alpha=1,
          target_modules=['q', 'k'],
          rank_pattern={'k': 1},
          alpha_pattern={'k': 5},
      ),
  ]
  paths = [
      trained(peft, torch, tmp_path / f'{k}', k, **o)
      for k, o in enumerate(options)
  ]
  alpha = [0.5, 0.3, 0.2]
  adapters, config = checkpoints.load_adapters(paths)
  start = {n: x.numpy() for n, x in base(torch).state_dict().items()}
  models = [merged(peft, torch, path) for path in paths]
  # What one adapter adds, by PEFT and by us.
  for adapter, model in zip(adapters, models):
    for name, x in lora.dense(adapter).items():
      expected = start[f'{name}.weight'] + x.T
      np.testing.assert_allclose(expected, model[f'{name}.weight'], atol=2e-6)
  made = lora.average(adapters, alpha, rank=rank)
  checkpoints.save_adapter(tmp_path / 'soup', made.params, config)
  soup = merged(peft, torch, tmp_path / 'soup')
  for name, x in start.items():
    expected = sum(a * m[name] for a, m in zip(alpha, models))
    layer = name.removesuffix('.weight')
    moved = np.linalg.norm(expected - x)
    residual = np.linalg.norm(expected - soup[name])
    if made.info.residuals.get(layer, 0) < 1e-6:
      np.testing.assert_allclose(soup[name], expected, atol=3e-6)
    else:
      np.testing.assert_allclose(
          residual / moved, made.info.residuals[layer], rtol=1e-3
      )
  config = json.loads(
      pathlib.Path(tmp_path, 'soup', 'adapter_config.json').read_text()
  )
  assert config['lora_alpha'] == config['r'] and not config['use_rslora']
