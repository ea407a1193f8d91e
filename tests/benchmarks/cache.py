"""What learning from rounded copies of the ingredients costs.

python tests/benchmarks/cache.py [--seeds 3] [--folder DIR]

Runs configs/digits.py for each seed (its workdirs go to DIR, and are used
again), then learns the coefficients from exact ingredients and from copies in
float16, one alpha a model and one a tensor. The soup itself is always mixed
from exact ingredients.

task vectors  norm of what rounding loses, over the norm of theta_k - theta_0
alpha         largest change of a coefficient, between the least and the
              largest of the exact ones
test          accuracy on the test data, and what it gains
NLL           on the test data, times beta, and what it gains (less is better)

Measured (seed, alpha, task vectors, alpha, test, NLL):

0 a model 0.22% 0.0002 0.0033-0.2422 96.43% +0.00% 0.1440 +0.0000
0 a tensor 0.22% 0.0027 0.0039-0.5279 97.10% +0.00% 0.1248 -0.0000
1 a model 0.28% 0.0001 0.0092-0.1887 97.44% +0.00% 0.0656 +0.0000
1 a tensor 0.28% 0.0061 0.0044-0.3984 98.10% +0.00% 0.0535 +0.0000
2 a model 0.27% 0.0003 0.0036-0.1441 95.99% +0.00% 0.1431 +0.0000
2 a tensor 0.27% 0.0035 0.0037-0.3320 96.21% +0.00% 0.1456 +0.0000
"""

import argparse
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsoup import checkpoints
from jaxsoup import metrics
from jaxsoup.experiments import architectures
from jaxsoup.experiments import configs
from jaxsoup.experiments import cook
from jaxsoup.experiments import main as experiment_main

CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'digits.py'


def lost(ingredients, theta_0) -> float:
  """The mean over k of `|theta_k - rounded(theta_k)| / |theta_k - theta_0|`."""
  norm = optax.tree.norm
  minus = lambda a, b: jax.tree.map(jnp.subtract, a, b)
  narrow = lambda x: x.astype(jnp.float16).astype(x.dtype)
  rounded = lambda t: jax.tree.map(narrow, t)
  ratios = [
      norm(minus(t, rounded(t))) / norm(minus(t, theta_0)) for t in ingredients
  ]
  return float(np.mean(jax.device_get(ratios)))


def learned(config, ingredients, model, splits, group_fn, memory):
  """The coefficients in a row, test accuracy and test NLL."""
  soup = cook.learned(
      config,
      model,
      ingredients,
      splits.held_out,
      group_fn=group_fn,
      memory=memory,
  )
  test = splits.test.arrays
  logits = model.logits_fn(soup.params, test)
  scaled = soup.info.beta * logits
  alpha = np.concatenate([np.ravel(x) for x in jax.tree.leaves(soup.alpha)])
  accuracy = metrics.accuracy(logits, test['label'])
  nll = metrics.negative_log_likelihood(scaled, test['label'])
  return alpha, float(accuracy), float(nll)


def of_seed(seed: int, folder: pathlib.Path) -> None:
  """Prints the rows of one seed."""
  experiment = configs.load(str(CONFIG), [f'--config.seed={seed}'])
  workdir = folder / str(seed)
  experiment_main.run(experiment, workdir)
  ingredients = list(
      checkpoints.Ingredients(sorted((workdir / 'runs').iterdir()))
  )
  theta_0 = checkpoints.Ingredients([workdir / 'theta_0'])[0]
  splits = experiment.data_fn(experiment.config)
  model = architectures.of(experiment)
  for name, group_fn in (
      ('model', lambda path: ()),
      ('tensor', lambda path: path),
  ):
    case = experiment.config, ingredients, model, splits, group_fn
    exact, accuracy, nll = learned(*case, 'streamed')
    alpha, narrow_accuracy, narrow_nll = learned(*case, 'cached')
    print(
        f'{seed:4}  a {name:6}'
        f'  {lost(ingredients, theta_0):11.2%}'
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
      'seed  alpha     task vectors    alpha                            test'
      '               NLL'
  )
  with tempfile.TemporaryDirectory() as name:
    for seed in range(arguments.seeds):
      of_seed(seed, pathlib.Path(arguments.folder or name))


if __name__ == '__main__':
  main()
