"""Averages of adapters: against the dense average, and against PEFT."""

import json
import os
import pathlib

import numpy as np
import pytest
import safetensors.numpy

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
  return lora.Adapter(
      {
          n: {'A': normal(rank, SIZES[n][1]), 'B': normal(SIZES[n][0], rank)}
          for n in layers
      }
  )


def product(adapter, layer):
  if layer not in adapter.factors:
    return np.zeros(SIZES[layer])
  factor = adapter.factors[layer]
  return factor['B'].astype(np.float64) @ factor['A'].astype(np.float64)


def expected_of(adapters, alpha):
  return {
      f'{n}.weight': sum(a * product(x, n) for a, x in zip(alpha, adapters))
      for n in SIZES
  }


def assert_near(actual, expected, atol=1e-6):
  assert actual.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_allclose(actual[name], x, atol=atol, err_msg=name)


@pytest.mark.parametrize('alpha', [None, [0.6, 0.3, 0.1], [2.0, -1.0, 0.0]])
def test_the_average_of_the_products(alpha):
  # Of different ranks and layers: what is absent adds nothing.
  adapters = [
      adapter_of(0),
      adapter_of(1, rank=3, layers=('layers.0.q', 'head')),
      adapter_of(2, rank=1),
  ]
  made = lora.average(adapters, alpha)
  expected = expected_of(adapters, alpha or [1 / 3] * 3)
  assert_near(lora.dense(made.adapter), expected)
  assert set(made.residuals.values()) == {0.0}
  ranks = {n: len(f['A']) for n, f in made.adapter.factors.items()}
  assert ranks == {'layers.0.q': 6, 'layers.1.q': 3, 'head': 6}


def test_the_average_of_the_factors_is_something_else():
  adapters = [adapter_of(k) for k in range(2)]
  factors = lora.Adapter(
      {
          n: {
              x: np.mean([a.factors[n][x] for a in adapters], axis=0)
              for x in 'AB'
          }
          for n in SIZES
      }
  )
  right = lora.dense(lora.average(adapters).adapter)
  wrong = lora.dense(factors)
  for name, x in right.items():
    assert np.linalg.norm(wrong[name] - x) > 0.3 * np.linalg.norm(x)
  # The same adapter, its factors written otherwise: (B / 2) (2 A), (-B) (-A).
  # Its average with itself is itself, but that of the factors is zero.
  turned = lora.Adapter(
      {n: {'A': -f['A'], 'B': -f['B']} for n, f in adapters[0].factors.items()}
  )
  same = lora.average([adapters[0], turned]).adapter
  assert_near(lora.dense(same), lora.dense(adapters[0]))


@pytest.mark.parametrize('rank', [1, 2, 3, 4, 50])
def test_the_nearest_of_a_rank(rank):
  adapters = [adapter_of(0), adapter_of(1)]
  made = lora.average(adapters, rank=rank)
  for name, x in expected_of(adapters, [0.5, 0.5]).items():
    layer = name.removesuffix('.weight')
    u, s, v = np.linalg.svd(x, full_matrices=False)
    nearest = (u[:, :rank] * s[:rank]) @ v[:rank]
    matrix = lora.dense(made.adapter)[name]
    np.testing.assert_allclose(matrix, nearest, atol=1e-5)
    residual = np.linalg.norm(x - nearest) / np.linalg.norm(x)
    np.testing.assert_allclose(made.residuals[layer], residual, atol=1e-7)
    assert len(made.adapter.factors[layer]['A']) == min(rank, 4)


def test_an_average_of_nothing_has_no_residual():
  zero = lora.Adapter({'head': {'A': np.ones((2, 6)), 'B': np.zeros((3, 2))}})
  made = lora.average([zero, zero], rank=1)
  assert made.residuals == {'head': 0.0}
  np.testing.assert_array_equal(lora.dense(made.adapter)['head.weight'], 0)


def test_mistakes():
  first = adapter_of(0)
  with pytest.raises(ValueError, match=r'alpha has shape \(3,\), .* are 2'):
    lora.average([first, first], [1, 0, 0])
  with pytest.raises(ValueError, match='there are 0'):
    lora.average([])
  with pytest.raises(ValueError, match='rank is 0'):
    lora.average([first], rank=0)
  other = lora.Adapter({'head': {'A': np.ones((1, 2)), 'B': np.ones((3, 1))}})
  with pytest.raises(ValueError, match=r"adapter 1: .*'head' .*\(3, 2\)"):
    lora.average([first, other])
  other = lora.Adapter({'head': {'A': np.ones((1, 6)), 'B': np.ones((3, 2))}})
  with pytest.raises(ValueError, match=r'A \(1, 6\) and B \(3, 2\)'):
    lora.average([first, other])
  bad = {'A': np.full((1, 6), np.nan), 'B': np.ones((3, 1))}
  with pytest.raises(ValueError, match='NaN or infinite values in A'):
    lora.average([first, lora.Adapter({'head': bad})])
  based = [first._replace(config={'base_model_name_or_path': x}) for x in 'ab']
  with pytest.warns(UserWarning, match="is 'a' in one adapter and 'b' in"):
    lora.average(based)


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
  adapter = lora.load(directory(tmp_path / 'a', config, **ab()))
  a, b = ab().values()
  assert_near(lora.dense(adapter), {'x.q.weight': scaling * b @ a}, 1e-5)
  # Once, whatever is written and read again.
  again = lora.load(lora.save(tmp_path / 'again', adapter))
  assert_near(lora.dense(again), lora.dense(adapter))


def test_matrices_that_the_base_keeps_turned(tmp_path):
  adapter = lora.load(
      directory(tmp_path / 'a', {'fan_in_fan_out': True}, **ab())
  )
  assert lora.dense(adapter)['x.q.weight'].shape == (5, 4)


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
    lora.load(path)
  assert str(path) in str(e.value) and 'merge_and_unload' in str(e.value)


@pytest.mark.parametrize(
    'arrays, said',
    [
        ({'x.q.bias': np.ones(4, 'f4')}, 'x.q.bias'),
        ({'x.lora_embedding_A': np.ones((2, 4), 'f4')}, 'lora_embedding_A'),
        ({'x.k.lora_A.weight': np.ones((2, 4, 3, 3), 'f4')}, 'x.k.lora_A'),
        ({'x.k.lora_A.weight': np.ones((2, 4), 'f4')}, "has only .'A'"),
    ],
)
def test_arrays_that_are_no_factors(tmp_path, arrays, said):
  path = directory(tmp_path / 'a', {}, **ab(), **arrays)
  with pytest.raises(ValueError, match=said):
    lora.load(path)


def test_paths(tmp_path):
  with pytest.raises(FileNotFoundError, match='no adapter_config.json'):
    lora.load(tmp_path)
  lora.save(tmp_path / 'new' / 'a', adapter_of(0))
  assert os.listdir(tmp_path / 'new') == ['a']
  with pytest.raises(FileExistsError):
    lora.save(tmp_path / 'new' / 'a', adapter_of(0))


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
  adapters = [lora.load(path) for path in paths]
  start = {n: x.numpy() for n, x in base(torch).state_dict().items()}
  models = [merged(peft, torch, path) for path in paths]
  # What one adapter adds, by PEFT and by us.
  for adapter, model in zip(adapters, models):
    for name, x in lora.dense(adapter).items():
      np.testing.assert_allclose(start[name] + x, model[name], atol=2e-6)
  made = lora.average(adapters, alpha, rank=rank)
  lora.save(tmp_path / 'soup', made.adapter)
  soup = merged(peft, torch, tmp_path / 'soup')
  for name, x in start.items():
    expected = sum(a * m[name] for a, m in zip(alpha, models))
    layer = name.removesuffix('.weight')
    moved = np.linalg.norm(expected - x)
    residual = np.linalg.norm(expected - soup[name])
    if made.residuals.get(layer, 0) < 1e-6:
      np.testing.assert_allclose(soup[name], expected, atol=3e-6)
    else:
      np.testing.assert_allclose(
          residual / moved, made.residuals[layer], rtol=1e-3
      )
  config = json.loads(
      pathlib.Path(tmp_path, 'soup', 'adapter_config.json').read_text()
  )
  assert config['lora_alpha'] == config['r'] and not config['use_rslora']
