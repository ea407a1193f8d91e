"""The recipes once more, in NumPy and float64, as the papers write them.

A model is a list of arrays here, and what is returned is not rounded: a test
allows one rounding to the dtype of the ingredients.
"""

import itertools

import numpy as np


def mix(models, alpha):
  """`sum_k alpha_k theta_k`, one model after another."""
  total = [np.zeros(np.shape(x)) for x in models[0]]
  for a, model in zip(alpha, models):
    total = [t + float(a) * np.float64(x) for t, x in zip(total, model)]
  return total


def mean(models):
  return [x / len(models) for x in mix(models, np.ones(len(models)))]


def interpolate(theta_0, theta_1, t):
  return [
      np.float64(x) + t * (np.float64(y) - np.float64(x))
      for x, y in zip(theta_0, theta_1)
  ]


def greedy(models, val_acc, *, order=None, strict=False):
  """Wortsman et al. 2022, recipe 1: GreedySoup."""
  if order is None:
    # The models are sorted in decreasing order of ValAcc.
    order = sorted(range(len(models)), key=lambda i: -val_acc(models[i]))
  average = lambda members: mean([models[i] for i in members])
  ingredients = []
  for i in order:
    if ingredients:
      with_i = val_acc(average([*ingredients, i]))
      without = val_acc(average(ingredients))
      if with_i < without or (strict and with_i == without):
        continue
    ingredients = [*ingredients, i]
  return ingredients


def greedy_passes(models, val_acc, order, passes, *, again, most):
  """Several passes; `again` tries ingredients that are already in."""
  soup, best = [], -np.inf
  for _, i in itertools.product(range(passes), order):
    if len(soup) == most or (i in soup and not again):
      continue
    score = val_acc(mean([models[j] for j in [*soup, i]]))
    if score >= best:
      soup, best = [*soup, i], score
  return soup


def pruned(models, val_acc, *, strict=False):
  """Takes out whatever is not missed; falls back to the best single model."""
  score_of = lambda members: val_acc(mean([models[i] for i in members]))
  singles = [score_of([i]) for i in range(len(models))]
  soup, before = list(range(len(models))), None
  while soup != before:
    before = soup
    for i in sorted(before, key=lambda i: singles[i]):
      rest = [j for j in soup if j != i]
      if not rest:
        continue
      gain = score_of(rest) - score_of(soup)
      if gain > 0 or (gain == 0 and not strict):
        soup = rest
  best = int(np.argmax(singles))
  return [best] if singles[best] > score_of(soup) else soup


def model_stock(models, theta_0):
  """Jang et al. 2024, equations 3 and 5: soup, cosines and ratios."""
  tensors = []
  for start, *values in zip(theta_0, *models):
    start = np.float64(start)
    tasks = [(np.float64(x) - start).ravel() for x in values]
    cosine = np.mean(
        [
            a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            for a, b in itertools.combinations(tasks, 2)
        ]
    )
    clipped, num = max(cosine, 0.0), len(models)
    ratio = num * clipped / (1 + (num - 1) * clipped)
    soup = ratio * np.mean(np.float64(values), 0) + (1 - ratio) * start
    tensors.append((soup, cosine, ratio))
  return [list(x) for x in zip(*tensors)]


def least_squares(thetas, target):
  """The alpha with sum one of least `|sum_k alpha_k theta_k - target|^2`."""
  thetas = np.float64(thetas)
  num = len(thetas)
  # The Lagrangian's stationary point.
  system = np.zeros((num + 1, num + 1))
  system[:num, :num] = 2 * thetas @ thetas.T
  system[:num, num] = system[num, :num] = 1
  right = np.append(2 * thetas @ np.float64(target), 1)
  return np.linalg.lstsq(system, right, rcond=None)[0][:num]


def simplex_least_squares(thetas, target):
  """The same with alpha >= 0: the best of all faces of the simplex."""
  thetas, best = np.float64(thetas), (np.inf, None)
  for face in itertools.product([False, True], repeat=len(thetas)):
    if not any(face):
      continue
    alpha = np.zeros(len(thetas))
    alpha[list(face)] = least_squares(thetas[list(face)], target)
    loss = np.sum((alpha @ thetas - target) ** 2)
    if alpha.min() >= 0 and loss < best[0]:
      best = loss, alpha
  return best[1]
