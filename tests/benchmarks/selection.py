"""How many held-out examples it takes to select on accuracy.

python tests/benchmarks/selection.py [--draws 200] [--models 24]

Trains small networks on 250 of the digits of scikit-learn, with learning rates,
widths, weight decays and numbers of steps drawn at random, and takes their
logits on the other 1,547 images. In each draw n of those are held out: the best
single model and the greedy ensemble of cached logits are selected on them, by
accuracy (`metrics.correct`) and by likelihood (`metrics.log_likelihood`), and
the rest report. Beyond 600 the rest would be too few: there models are
simulated, whose logits are right with probabilities and temperatures like those
of the networks, on as many examples as needed.

The regret is how far the accuracy of the selected model on the rest lies below
that of the best single model on the rest, in points (less is better; the
ensemble may be better than every single: then it is negative).

Measured:

digits:
24 models, accuracy 89.5-95.0, sd 1.50
held out | single: accuracy, NLL | greedy: accuracy, NLL | sd of mean
      25 | 0.79 0.57 | +0.51 +0.42 | 0.07
      50 | 0.69 0.48 | +0.42 +0.32 | 0.05
     100 | 0.76 0.44 | +0.42 +0.21 | 0.06
     200 | 0.57 0.46 | +0.43 +0.20 | 0.03
     400 | 0.46 0.54 | +0.36 +0.16 | 0.03
     600 | 0.49 0.61 | +0.33 +0.22 | 0.03
simulated, temperatures off by a factor of e^0.0:
24 models, accuracy 81.8-85.8, sd 1.09
held out | single: accuracy, NLL | greedy: accuracy, NLL | sd of mean
     100 | 1.48 1.35 | -7.03 -7.03 | 0.15
     200 | 1.18 0.75 | -7.12 -7.30 | 0.16
     400 | 1.02 0.59 | -7.33 -7.53 | 0.13
    1000 | 0.37 0.38 | -7.36 -7.58 | 0.05
    2000 | 0.35 0.22 | -7.51 -7.67 | 0.06
    5000 | 0.22 0.16 | -7.59 -7.71 | 0.04
simulated, temperatures off by a factor of e^0.3:
24 models, accuracy 80.0-84.6, sd 1.25
held out | single: accuracy, NLL | greedy: accuracy, NLL | sd of mean
     100 | 1.05 0.98 | -7.56 -7.36 | 0.12
     200 | 0.98 0.69 | -7.51 -7.69 | 0.12
     400 | 0.59 0.39 | -7.63 -7.84 | 0.09
    1000 | 0.43 0.41 | -7.82 -7.92 | 0.07
    2000 | 0.27 0.21 | -7.94 -7.96 | 0.04
    5000 | 0.25 0.20 | -7.95 -7.93 | 0.03

Accuracy is as good as likelihood from 400 held-out examples on for a single
digits model; greedy gains from likelihood at every size. Simulated, they differ
by an eighth of a point at most from 5,000 on, also where temperatures are
wrong.
"""

import argparse

import numpy as np
from sklearn import datasets
from sklearn import neural_network

from jaxsoup import metrics

SIZES = (25, 50, 100, 200, 400, 600)
SIMULATED = (100, 200, 400, 1000, 2000, 5000)


def of_digits(num_models, rng):
  """Logits `[K, 1547, 10]` of networks, and labels."""
  x, label = datasets.load_digits(return_X_y=True)
  order = rng.permutation(len(label))
  x, label = x[order] / 16, label[order]
  logits = []
  for k in range(num_models):
    model = neural_network.MLPClassifier(
        [int(rng.choice([16, 32, 64]))],
        learning_rate_init=10 ** rng.uniform(-2.7, -2),
        alpha=10 ** rng.uniform(-5, 0),
        max_iter=int(rng.integers(60, 200)),
        random_state=k,
    )
    model.fit(x[:250], label[:250])
    logits.append(np.log(model.predict_proba(x[250:]) + 1e-30))
  return np.stack(logits).astype(np.float32), label[250:]


def simulated(num_models, num, spread, rng):
  """Logits `[K, N, 10]`; examples that are hard are hard for all models.

  The label's logit is higher by the skill, the others are Gaussian: skill times
  logits has the right temperature, which each model misses by a factor.
  """
  label = rng.integers(10, size=num)
  noise = rng.normal(size=(num, 10))
  skills = rng.normal(2.6, 0.06, num_models)
  betas = np.exp(rng.normal(0, spread, num_models))
  logits = []
  for skill, beta in zip(skills, betas):
    own = 0.8 * noise + 0.6 * rng.normal(size=(num, 10))
    own[np.arange(num), label] += skill
    logits.append(skill * beta * own)
  return np.stack(logits).astype(np.float32), label


def greedy(logits, score):
  """Recipe 1 over mean logits: members."""
  singles = [score(x) for x in logits]
  members, best, total = [], -np.inf, 0
  for k in np.argsort(-np.array(singles), kind='stable'):
    new = score((total + logits[k]) / (len(members) + 1))
    if new >= best:
      members, best, total = [*members, k], new, total + logits[k]
  return members


def log_likelihood(logits, label):
  """The same as that of `metrics`, without a compilation for each shape."""
  top = logits.max(-1, keepdims=True)
  norm = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
  return logits[np.arange(len(label)), label] - norm


def regrets(logits, label, size, rng):
  """By score: of the best single and of the greedy ensemble, in points."""
  order = rng.permutation(len(label))
  held_out, rest = order[:size], order[size:]
  accuracy = lambda x: 100 * metrics.correct(x, label[rest]).mean()
  singles = np.array([accuracy(x[rest]) for x in logits])
  differences = []
  for metric in (metrics.correct, log_likelihood):
    score = lambda x: metric(x, label[held_out]).mean()  # noqa: B023
    of_singles = [score(x[held_out]) for x in logits]
    members = greedy(logits[:, held_out], score)
    ensemble = accuracy(logits[members][:, rest].mean(0))
    differences.append(
        (
            singles.max() - singles[int(np.argmax(of_singles))],
            singles.max() - ensemble,
        )
    )
  return differences


def show(name, logits, label, sizes, draws, rng):
  """Prints a line a size."""
  accuracy = 100 * np.array([metrics.correct(x, label).mean() for x in logits])
  print(
      f'{name}: {len(logits)} models, accuracy {accuracy.min():.1f}-'
      f'{accuracy.max():.1f}, sd {accuracy.std():.2f}'
  )
  print('held out | single: accuracy, NLL | greedy: accuracy, NLL | sd of mean')
  for size in sizes:
    draws_of_regret = np.array(
        [regrets(logits, label, size, rng) for _ in range(draws)]
    )
    mean, error = draws_of_regret.mean(0), draws_of_regret.std(
        0
    ).max() / np.sqrt(draws)
    print(
        f'{size:8d} | {mean[0, 0]:.2f} {mean[1, 0]:.2f} | '
        f'{mean[0, 1]:+.2f} {mean[1, 1]:+.2f} | {error:.2f}',
        flush=True,
    )


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--draws', type=int, default=200)
  parser.add_argument('--models', type=int, default=24)
  args = parser.parse_args()
  rng = np.random.default_rng(0)
  show('digits', *of_digits(args.models, rng), SIZES, args.draws, rng)
  for spread in (0.0, 0.3):
    show(
        f'simulated, temperatures off by a factor of e^{spread}',
        *simulated(args.models, 20000, spread, rng),
        SIMULATED,
        max(args.draws // 4, 1),
        rng,
    )


if __name__ == '__main__':
  main()
