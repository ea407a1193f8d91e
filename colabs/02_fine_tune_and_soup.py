# %% [markdown]
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxsoup/jaxsoup/blob/main/colabs/02_fine_tune_and_soup.ipynb)
#
# # Fine-tune, then soup
#
# Whoever fine-tunes does it several times, with other learning rates and seeds,
# keeps the best run and deletes the others. A *model soup* keeps them all and
# averages their weights. At inference it is one model.
#
# You have a fine-tuning loop already. What comes to it is one line that saves
# each run, and a few that make the soup: first for linen, then for nnx. A minute
# on a CPU.

# %% tags=["skip-execution"]
# %pip install -q "jaxsoup[demo]"

# %% [markdown]
# ## Data, and who may see them
#
# Handwritten digits, in parts that share no example:
#
# | part | for |
# |---|---|
# | `pretrain` | the common start |
# | `train` | fine-tuning |
# | `held_out` | *choosing*: which run, which soup |
# | `test` | *reporting*, at the end |
# | `blurred` | the test images out of focus, which nothing is trained on |

# %%
import matplotlib.pyplot as plt

from jaxsoup.data import digits
from jaxsoup.data import shifts

data = digits.load(0, dict(pretrain=250, train=250, held_out=400, test=897))
data['blurred'] = shifts.apply(data['test'], 'blur', severity=0.9, seed=0)

fig, axes = plt.subplots(2, 10, figsize=(7, 1.6))
for row, name in zip(axes, ('test', 'blurred')):
  for ax, image in zip(row, data[name]['image']):
    ax.imshow(image, cmap='gray_r')
    ax.axis('off')

# %% [markdown]
# ## Your loop, in linen
#
# Nothing here knows of soups. The runs differ in learning rate, seed and how far
# they move the images at random.

# %%
from flax import linen as nn
import jax
import numpy as np
import optax


class Net(nn.Module):

  @nn.compact
  def __call__(self, image):
    x = nn.relu(nn.Conv(24, (3, 3))(image))
    x = nn.relu(nn.Conv(48, (3, 3), strides=2)(x))
    x = nn.relu(nn.Dense(96)(x.reshape(len(x), -1)))
    return nn.Dense(10)(x)


net = Net()


def loss_fn(params, batch, beta=1.0):
  logits = beta * net.apply(params, batch['image'])
  labels = batch['label']
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def batches_of(part, run):
  """Shuffled batches of 50, the images moved by up to `move` pixels."""
  rng = np.random.default_rng(run['seed'])
  for _ in range(run['num_epochs']):
    for rows in rng.permutation(len(part['label'])).reshape(-1, 50):
      step = rng.integers(-run['move'], run['move'] + 1, 2)
      image = np.roll(part['image'][rows], step, axis=(1, 2))
      yield {'image': image, 'label': part['label'][rows]}


def fine_tune(params, part, run):
  tx = optax.adamw(run['learning_rate'], weight_decay=0.01)
  opt_state = tx.init(params)

  @jax.jit
  def update(params, opt_state, batch):
    gradient = jax.grad(loss_fn)(params, batch)
    updates, opt_state = tx.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  for batch in batches_of(part, run):
    params, opt_state = update(params, opt_state, batch)
  return params


start = net.init(jax.random.key(0), data['train']['image'][:1])
pretraining = dict(learning_rate=2e-3, num_epochs=60, move=1, seed=0)
pretrained = fine_tune(start, data['pretrain'], pretraining)

# %% [markdown]
# ## Fine-tune eight times, and keep each run
#
# The one new line is `checkpoints.save`. (Checkpoints that Orbax has written are
# good as they are: `checkpoints.Ingredients` reads those, too.)
#
# **All runs begin at the same weights**, the head included. That is what makes
# an average of them a good model: of runs with starts of their own it is not.

# %%
from jaxsoup import checkpoints

rates = (1e-3, 2e-3, 3e-3, 5e-3)
runs = [
    dict(learning_rate=rate, num_epochs=10, move=move, seed=seed)
    for seed, (rate, move) in enumerate((r, m) for r in rates for m in (0, 1))
]
paths = []
for k, run in enumerate(runs):
  params = fine_tune(pretrained, data['train'], run)
  paths.append(checkpoints.save(f'runs/{k}', params, metadata={'config': run}))

# %% [markdown]
# ## Three soups
#
# * `uniform` takes all runs, equally much.
# * `greedy` begins with the best one and adds each that does not make the
#   *held-out* score worse.
# * `learned` finds by gradient descent, on held-out data, how much of each.

# %%
import jaxsoup
from jaxsoup import evaluation
from jaxsoup import metrics


def correct(params, batch):
  return metrics.correct(net.apply(params, batch['image']), batch['label'])


ingredients = checkpoints.Ingredients(paths)  # Read when they are needed.
accuracy = {
    name: evaluation.mean_of(correct, evaluation.batched(data[name], 300))
    for name in ('held_out', 'test', 'blurred')
}

soups = {
    'uniform': jaxsoup.uniform(ingredients),
    'greedy': jaxsoup.greedy(ingredients, accuracy['held_out']),
    'learned': jaxsoup.learned(
        ingredients,
        loss_fn,
        evaluation.batched(data['held_out'], 50),
        tx=optax.adamw(0.05, weight_decay=0.0),
    ),
}
for name, soup in soups.items():
  print(f'{name:<8} alpha', np.round(soup.alpha, 2))

# %% [markdown]
# ## Are they better?
#
# `held_out` is set apart: best run, greedy and learned were *chosen* on it, which
# flatters them. The gain is over the run that one would have kept, in points,
# with its 95 % interval: where that spans 0 the difference may be luck.

# %%
from jaxsoup import statistics

singles = list(ingredients)
best = max(singles, key=accuracy['held_out'])
models = {f'run {k}': params for k, params in enumerate(singles)}
models |= {'best run': best}
models |= {name: soup.params for name, soup in soups.items()}


def gain(params, name):
  """Over the best run: points, and from where to where it may be."""
  batches = accuracy[name].batches
  logits = evaluation.logits_of(lambda p, b: net.apply(p, b['image']), batches)
  found = statistics.compare(logits(params), logits(best), data[name]['label'])
  gain, low, high = (100 * x for x in found[:3])
  return f'{gain:+5.1f} [{low:+.1f}, {high:+.1f}]'


print(f'{"":<9} held-out | {"test":>5} {"gain":<18} {"blurred":>7} gain')
for name, params in models.items():
  held_out, test, blurred = (100 * f(params) for f in accuracy.values())
  gains = [gain(params, n) if name in soups else '' for n in ('test', 'blurred')]
  print(
      f'{name:<9} {held_out:8.1f} | {test:5.1f} {gains[0]:<18} '
      f'{blurred:7.1f} {gains[1]}'
  )

# %%
fig, ax = plt.subplots(figsize=(5, 3.4))
for name, params in models.items():
  x, y = 100 * accuracy['test'](params), 100 * accuracy['blurred'](params)
  is_run = name.startswith('run')
  marker = dict(color='0.6') if is_run else dict(marker='*', s=120, label=name)
  ax.scatter(x, y, **marker)
ax.set_xlabel('test accuracy (%)')
ax.set_ylabel('blurred test accuracy (%)')
ax.legend(frameon=False)

# %% [markdown]
# ## Keep the soup
#
# It is a checkpoint like any other, and knows what it was made of.

# %%
path = checkpoints.save('soup', soups['greedy'], ingredients=ingredients)
loaded = checkpoints.load(path)
print(accuracy['test'](loaded.params), loaded.info.accepted)
[i['content_hash'][:12] for i in checkpoints.provenance(path)['ingredients']]

# %% [markdown]
# ## The same in nnx
#
# The ingredients are the `nnx.Param`s of each model; `nnx.merge` makes a model
# of the soup.

# %%
from flax import nnx


class NnxNet(nnx.Module):

  def __init__(self, rngs):
    self.conv1 = nnx.Conv(1, 24, (3, 3), rngs=rngs)
    self.conv2 = nnx.Conv(24, 48, (3, 3), strides=2, rngs=rngs)
    self.dense = nnx.Linear(4 * 4 * 48, 96, rngs=rngs)
    self.head = nnx.Linear(96, 10, rngs=rngs)

  def __call__(self, image):
    x = nnx.relu(self.conv2(nnx.relu(self.conv1(image))))
    return self.head(nnx.relu(self.dense(x.reshape(len(x), -1))))


@nnx.jit
def nnx_update(model, optimizer, batch):
  def loss_fn(model):
    return optax.softmax_cross_entropy_with_integer_labels(
        model(batch['image']), batch['label']
    ).mean()

  optimizer.update(model, nnx.grad(loss_fn)(model))


def nnx_fine_tune(model, part, run):
  model = nnx.clone(model)
  tx = optax.adamw(run['learning_rate'], weight_decay=0.01)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  for batch in batches_of(part, run):
    nnx_update(model, optimizer, batch)
  return model


nnx_start = NnxNet(nnx.Rngs(0))
nnx_pretrained = nnx_fine_tune(nnx_start, data['pretrain'], pretraining)
finetuned = [nnx_fine_tune(nnx_pretrained, data['train'], run) for run in runs]

# %%
graphdef = nnx.graphdef(nnx_pretrained)


def nnx_correct(params, batch):
  logits = nnx.merge(graphdef, params)(batch['image'])
  return metrics.correct(logits, batch['label'])


nnx_accuracy = {
    name: evaluation.mean_of(nnx_correct, f.batches)
    for name, f in accuracy.items()
}
nnx_ingredients = [nnx.state(model, nnx.Param) for model in finetuned]
nnx_soups = {
    'uniform': jaxsoup.uniform(nnx_ingredients),
    'greedy': jaxsoup.greedy(nnx_ingredients, nnx_accuracy['held_out']),
}
nnx_models = {'best run': max(nnx_ingredients, key=nnx_accuracy['held_out'])}
nnx_models |= {name: soup.params for name, soup in nnx_soups.items()}
print(f'{"":<9} held-out |  test blurred')
for name, params in nnx_models.items():
  held_out, test, blurred = (100 * f(params) for f in nnx_accuracy.values())
  print(f'{name:<9} {held_out:8.1f} | {test:5.1f} {blurred:7.1f}')

model = nnx.merge(graphdef, nnx_soups['uniform'].params)  # A model again.
print(model(data['test']['image'][:10]).argmax(-1), data['test']['label'][:10])

# %% [markdown]
# ## What soups do not do
#
# * Where the best run is good already, as on `test`, there is little to gain;
#   look at the interval, not at the sign.
# * An ensemble of all runs may be better still, at eight times the cost.
# * Runs from different starts, or with heads of their own, cannot be averaged:
#   [why did my soup fail?](https://colab.research.google.com/github/jaxsoup/jaxsoup/blob/main/colabs/04_why_did_my_soup_fail.ipynb)
# * With BatchNorm the running statistics have to be estimated anew:
#   `jaxsoup.models.batch_norm.recalibrated`.
