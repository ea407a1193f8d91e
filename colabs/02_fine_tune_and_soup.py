# %% [markdown]
# # Fine-tune, then soup
#
# Usually you fine-tune a model several times with different learning rates and
# seeds, keep the best run and delete the others. A *model soup* averages the
# weights of all runs instead. At inference it is one model.
#
# This notebook shows what to add to a fine-tuning loop: one line that saves each
# run, and a few lines that make the soup. First in linen, then in nnx. It takes a
# minute on a CPU.

# %% tags=["skip-execution"]
# Installs the clone of jaxsoup that contains this notebook. On Colab, upload
# the clone first, and replace `..` by its path.
# %pip install -q "..[demo]"

# %% [markdown]
# ## Data
#
# Handwritten digits, in disjoint parts:
#
# | part | used for |
# |---|---|
# | `pretrain` | training the common start |
# | `train` | fine-tuning |
# | `held_out` | *selecting* runs and soups |
# | `test` | *reporting*, at the end |
# | `blurred`, `noisy` | reporting: corrupted test images, unlike the training data |

# %%
import matplotlib.pyplot as plt

from jaxsoup.data import digits
from jaxsoup.data import shifts

data = digits.load(0, dict(pretrain=250, train=250, held_out=400, test=897))
data['blurred'] = shifts.apply(data['test'], 'blur', severity=0.9, seed=0)
data['noisy'] = shifts.apply(data['test'], 'noise', severity=0.3, seed=0)

fig, axes = plt.subplots(3, 10, figsize=(6, 2))
for row, name in zip(axes, ('test', 'blurred', 'noisy')):
  for ax, image in zip(row, data[name]['image']):
    ax.imshow(image, cmap='gray_r')
    ax.axis('off')

# %% [markdown]
# ## Your loop, in linen
#
# This is an ordinary training loop. Runs differ in learning rate and seed.

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
tx = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)


def loss_fn(params, batch, beta=1.0):
  logits = beta * net.apply({'params': params}, batch['image'])
  labels = batch['label']
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def update(params, opt_state, batch):
  gradient = jax.grad(loss_fn)(params, batch)
  updates, opt_state = tx.update(gradient, opt_state, params)
  return optax.apply_updates(params, updates), opt_state


def moved(image, rng):
  """Shifts each image by up to one pixel."""
  steps = rng.integers(-1, 2, (len(image), 2))
  return np.stack([np.roll(x, step, (0, 1)) for x, step in zip(image, steps)])


def batches_of(part, seed, num_epochs, is_moved=False):
  rng = np.random.default_rng(seed)
  for _ in range(num_epochs):
    for rows in rng.permutation(len(part['label'])).reshape(-1, 50):
      image = part['image'][rows]
      image = moved(image, rng) if is_moved else image
      yield {'image': image, 'label': part['label'][rows]}


def fine_tune(params, batches, learning_rate):
  opt_state = tx.init(params)
  opt_state.hyperparams['learning_rate'] = learning_rate
  for batch in batches:
    params, opt_state = update(params, opt_state, batch)
  return params


start = net.init(jax.random.key(0), data['train']['image'][:1])['params']
pretraining = batches_of(data['pretrain'], 0, num_epochs=60, is_moved=True)
pretrained = fine_tune(start, pretraining, learning_rate=2e-3)

# %% [markdown]
# ## Fine-tune eight times, and save each run
#
# The one new line is `checkpoints.save`. (If you already save Orbax checkpoints,
# you need no new line: `checkpoints.Ingredients` reads those, too.)
#
# **All runs start from the same weights**, including the head. Only then is their
# average a good model.

# %%
from jaxsoup import checkpoints

rates = (1e-3, 2e-3, 4e-3, 8e-3)
runs = [dict(learning_rate=rates[k // 2], seed=k) for k in range(8)]
paths = []
for k, run in enumerate(runs):
  batches = batches_of(data['train'], run['seed'], num_epochs=10)
  params = fine_tune(pretrained, batches, run['learning_rate'])
  paths.append(checkpoints.save(f'runs/{k}', params, metadata={'config': run}))

# %% [markdown]
# ## Three soups
#
# * `uniform` averages all runs with equal weight.
# * `greedy` starts with the best run and adds each run that does not lower the
#   *held-out* score.
# * `learned` learns the coefficients by gradient descent on held-out data.

# %%
import jaxsoup
from jaxsoup import evaluation
from jaxsoup import metrics


def correct(params, batch):
  return metrics.correct(
      net.apply({'params': params}, batch['image']), batch['label']
  )


ingredients = checkpoints.Ingredients(paths)  # Read when they are needed.
accuracy = {
    name: evaluation.mean_of(correct, evaluation.batched(data[name], 300))
    for name in ('held_out', 'test', 'blurred', 'noisy')
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
# First on the held-out data. The best run, greedy and learned look better here
# than they are, because they were selected on these examples. So do not conclude
# anything from this table.

# %%
singles = list(ingredients)
models = {f'run {k}': params for k, params in enumerate(singles)}
models |= {'best run': max(singles, key=accuracy['held_out'])}
models |= {name: soup.params for name, soup in soups.items()}


def show(models, names, accuracy):
  print(' ' * 9, *(f'{name:>9}' for name in names))
  for model, params in models.items():
    scores = (f'{100 * accuracy[name](params):9.1f}' for name in names)
    print(f'{model:<9}', *scores)


show(models, ['held_out'], accuracy)

# %% [markdown]
# Now on data that was not used for selection.

# %%
show(models, ['test', 'blurred', 'noisy'], accuracy)

# %% [markdown]
# The gain of each soup over the best run, in percentage points, with its 95 %
# interval. If the interval contains 0, the difference may be luck.

# %%
from jaxsoup import statistics


def logits(params, name):
  fn = lambda params, batch: net.apply({'params': params}, batch['image'])
  return evaluation.logits_of(fn, accuracy[name].batches)(params)


for name in ('test', 'blurred', 'noisy'):
  for model, soup in soups.items():
    pair = logits(soup.params, name), logits(models['best run'], name)
    gain = statistics.compare(*pair, data[name]['label'])
    points = [100 * x for x in (gain.gain, gain.low, gain.high)]
    print(
        f'{name:<8} {model:<8}', '{:+5.1f} [{:+.1f}, {:+.1f}]'.format(*points)
    )

# %%
fig, ax = plt.subplots(figsize=(5, 3.2))
for name, params in models.items():
  x, y = 100 * accuracy['test'](params), 100 * accuracy['blurred'](params)
  is_run = name.startswith('run')
  marker = dict(color='0.6') if is_run else dict(marker='*', s=120, label=name)
  ax.scatter(x, y, **marker)
ax.set_xlabel('test accuracy (%)')
ax.set_ylabel('blurred, accuracy (%)')
ax.legend(frameon=False)
fig.tight_layout()

# %% [markdown]
# ## Keep the soup
#
# A saved soup is an ordinary checkpoint that also records its ingredients.

# %%
path = checkpoints.save('soup', soups['greedy'], ingredients=ingredients)
loaded = checkpoints.load(path)
print(accuracy['test'](loaded.params), loaded.info.accepted)
[i['content_hash'][:12] for i in checkpoints.provenance(path)['ingredients']]

# %% [markdown]
# ## The same in nnx
#
# The ingredients are `nnx.state(model, nnx.Param)`. `nnx.merge` turns the soup back
# into a model.

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


def nnx_fine_tune(model, batches, learning_rate):
  model = nnx.clone(model)
  optimizer = nnx.Optimizer(model, optax.adamw(learning_rate), wrt=nnx.Param)

  @nnx.jit
  def update(model, optimizer, batch):
    def loss_fn(model):
      return optax.softmax_cross_entropy_with_integer_labels(
          model(batch['image']), batch['label']
      ).mean()

    optimizer.update(model, nnx.grad(loss_fn)(model))

  for batch in batches:
    update(model, optimizer, batch)
  return model


pretraining = batches_of(data['pretrain'], 0, num_epochs=60, is_moved=True)
nnx_pretrained = nnx_fine_tune(NnxNet(nnx.Rngs(0)), pretraining, 2e-3)
finetuned = []
for run in runs[::2]:  # One of each learning rate.
  batches = batches_of(data['train'], run['seed'], num_epochs=10)
  model = nnx_fine_tune(nnx_pretrained, batches, run['learning_rate'])
  finetuned.append(model)

# %%
nnx_ingredients = [nnx.state(model, nnx.Param) for model in finetuned]
graphdef = nnx.graphdef(nnx_pretrained)


def nnx_correct(params, batch):
  model = nnx.merge(graphdef, params)
  return metrics.correct(model(batch['image']), batch['label'])


nnx_accuracy = {
    name: evaluation.mean_of(nnx_correct, accuracy[name].batches)
    for name in accuracy
}
nnx_soups = {
    'uniform': jaxsoup.uniform(nnx_ingredients),
    'greedy': jaxsoup.greedy(nnx_ingredients, nnx_accuracy['held_out']),
}
nnx_models = {'best run': max(nnx_ingredients, key=nnx_accuracy['held_out'])}
nnx_models |= {name: soup.params for name, soup in nnx_soups.items()}
show(nnx_models, ['test', 'blurred', 'noisy'], nnx_accuracy)

# %% [markdown]
# These four runs have very different learning rates. If a uniform soup falls below
# the best run, greedy is the safe choice: on held-out data it is never worse than
# the best run.
#
# `nnx.merge` returns an ordinary model:

# %%
model = nnx.merge(graphdef, nnx_soups['uniform'].params)
print('predicted', model(data['test']['image'][:10]).argmax(-1))
print('label    ', data['test']['label'][:10])

# %% [markdown]
# ## Limits
#
# * If the best run is already good, as on `test`, there is little to gain. Look at
#   the interval, not at the sign.
# * An ensemble of all runs may be better still, at eight times the cost.
# * Runs with different starts, or with differently initialized heads, cannot be
#   averaged: see [Why did my soup fail?](04_why_did_my_soup_fail.ipynb)
# * With BatchNorm, re-estimate the running statistics with
#   `jaxsoup.models.batch_norm.recalibrated`.
