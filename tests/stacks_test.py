"""Recipes take scanned layers one by one, as those without a scan."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from typer import testing

import jaxsoup
from jaxsoup import checkpoints
from jaxsoup import cli


def unscanned(seed):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  layers = {str(i): {'w': draw(2, 3), 'b': draw(3)} for i in range(4)}
  return {'decoder': {'layers': layers, 'norm': draw(5)}}


def scanned(params, axis):
  layers = params['decoder']['layers'].values()
  stacked = jax.tree.map(lambda *x: np.stack(x, min(axis, x[0].ndim)), *layers)
  return {'decoder': {**params['decoder'], 'layers': stacked}}


MODELS = [unscanned(k) for k in range(3)]


def assert_close(actual, expected):
  jax.tree.map(
      lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6),
      actual,
      expected,
  )


@pytest.mark.parametrize('axis', [0, 1])
def test_model_stock(axis):
  theta_0 = unscanned(9)
  expected = jaxsoup.model_stock(MODELS, theta_0)
  soup = jaxsoup.model_stock(
      [scanned(m, axis) for m in MODELS],
      scanned(theta_0, axis),
      stacks={'decoder/layers': axis},
  )
  assert_close(soup.params, scanned(expected.params, axis))
  assert_close(soup.alpha, expected.alpha)
  assert_close(soup.info.ratio, expected.info.ratio)


@pytest.mark.slow_variants
@pytest.mark.parametrize('memory', ['resident', 'streamed'])
@pytest.mark.parametrize('depth', [3, 5])
def test_learned(memory, depth):
  """One alpha a layer, and one a tensor."""
  target = unscanned(8)

  def loss_fn(params, batch, beta):
    del beta
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(batch))
    return sum(jnp.sum((x - y) ** 2) for x, y in pairs)

  options = {
      'tx': optax.sgd(0.01),
      'num_epochs': 3,
      'group_fn': lambda path: path[:depth],
      'memory': memory,
  }
  expected = jaxsoup.learned(MODELS, loss_fn, [target], **options)
  soup = jaxsoup.learned(
      [scanned(m, 0) for m in MODELS],
      loss_fn,
      [scanned(target, 0)],
      stacks={'decoder/layers': 0},
      **options,
  )
  assert len(jax.tree.leaves(soup.alpha)) == (5 if depth == 3 else 9)
  assert_close(soup.alpha, expected.alpha)
  assert_close(soup.params, scanned(expected.params, 0))


@pytest.mark.parametrize(
    'stacks, said',
    [
        ({'encoder': 0}, "stacks names 'encoder', but no leaf is below it"),
        ({'decoder/norm': 1}, r"'decoder/norm' of shape \(5,\) has no axis 1"),
    ],
)
def test_mistakes(stacks, said):
  with pytest.raises(ValueError, match=said):
    jaxsoup.model_stock(MODELS, MODELS[0], stacks=stacks)


def test_the_command(tmp_path):
  theta_0 = unscanned(9)
  for name, model in zip('abcs', [*MODELS, theta_0]):
    checkpoints.save(tmp_path / name, scanned(model, 1))
  command = ['soup', 'model-stock', *(str(tmp_path / name) for name in 'abc')]
  command += ['--init', str(tmp_path / 's'), '--out', str(tmp_path / 'soup')]
  command += ['--stack', 'decoder/layers:1']
  result = testing.CliRunner().invoke(cli.app, [*command, '--stack', 'a:b'])
  assert result.exit_code == 2 and 'NAME:AXIS' in result.output
  result = testing.CliRunner().invoke(cli.app, command)
  assert result.exit_code == 0, result.output
  expected = jaxsoup.model_stock(MODELS, theta_0)
  soup = checkpoints.load(tmp_path / 'soup')
  assert_close(soup.params, scanned(expected.params, 1))
