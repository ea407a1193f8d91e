"""What learning from rounded copies of the ingredients costs.

python tests/benchmarks/cache.py [--seeds 3] [--folder DIR]

Runs configs/digits.py for each seed (its workdirs go to DIR, and are used
again), then learns the coefficients from exact ingredients and from copies in
bfloat16 and float16, one alpha a model and one a tensor. The soup itself is
always mixed from exact ingredients.

task vectors  norm of what rounding loses, over the norm of theta_k - theta_0
alpha         largest change of a coefficient, between the least and the
              largest of the exact ones
test          accuracy on the test data, and what it gains
NLL           on the test data, times beta, and what it gains
"""

import argparse
import math
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsoup import checkpoints
from jaxsoup import metrics
from jaxsoup.data import digits
from jaxsoup.experiments import configs
from jaxsoup.experiments import cook
from jaxsoup.experiments import finetune
from jaxsoup.experiments import main as experiment

CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'digits.py'


def lost(ingredients, theta_0, dtype) -> float:
  """The mean over k of `|theta_k - rounded(theta_k)| / |theta_k - theta_0|`."""
  norm = optax.tree.norm
  minus = lambda a, b: jax.tree.map(jnp.subtract, a, b)
  rounded = lambda t: jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), t)
  ratios = [
      norm(minus(t, rounded(t))) / norm(minus(t, theta_0)) for t in ingredients
  ]
  return float(np.mean(jax.device_get(ratios)))


def learned(config, ingredients, logits_fn, splits, depth, dtype):
  """The coefficients in a row, test accuracy and test NLL."""
  soup = cook.learned(
      config,
      ingredients,
      logits_fn,
      splits['held_out'],
      depth=depth,
      stream=True,
      cache_dtype=dtype,
  )
  test = splits['test']
  logits = logits_fn(soup.params, jnp.asarray(test['image']))
  scaled = soup.info.beta * logits
  alpha = np.concatenate([np.ravel(x) for x in jax.tree.leaves(soup.alpha)])
  accuracy = metrics.accuracy(logits, test['label'])
  nll = metrics.negative_log_likelihood(scaled, test['label'])
  return alpha, float(accuracy), float(nll)


def of_seed(seed: int, folder: pathlib.Path) -> None:
  """Prints the rows of one seed."""
  config, runs = configs.load(str(CONFIG), [f'--config.seed={seed}'])
  workdir = folder / str(seed)
  experiment.run(config, runs, workdir)
  ingredients = list(
      checkpoints.Ingredients(sorted((workdir / 'runs').iterdir()))
  )
  theta_0 = checkpoints.Ingredients([workdir / 'theta_0'])[0]
  splits = digits.load(config.seed, config.data.sizes)
  logits_fn = jax.jit(finetune.make_model(config).logits_fn)
  for name, depth in (('model', None), ('tensor', math.inf)):
    case = config, ingredients, logits_fn, splits, depth
    exact, accuracy, nll = learned(*case, None)
    for dtype in (jnp.bfloat16, jnp.float16):
      alpha, narrow_accuracy, narrow_nll = learned(*case, dtype)
      print(
          f'{seed:4}  a {name:6}  {jnp.dtype(dtype).name:9}'
          f'  {lost(ingredients, theta_0, dtype):11.2%}'
          f'  {abs(alpha - exact).max():7.4f}'
          f'  {exact.min():.4f} to {exact.max():.4f}'
          f'  {accuracy:6.2%} {narrow_accuracy - accuracy:+7.2%}'
          f'  {nll:7.4f} {narrow_nll - nll:+8.4f}',
          flush=True,
      )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--folder', help='of workdirs; a temporary one')
  arguments = parser.parse_args()
  print(
      'seed  alpha     copies     task vectors    alpha                  '
      '          test               NLL'
  )
  with tempfile.TemporaryDirectory() as name:
    for seed in range(arguments.seeds):
      of_seed(seed, pathlib.Path(arguments.folder or name))


if __name__ == '__main__':
  main()
