# %% [markdown]
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxsoup/jaxsoup/blob/main/colabs/04_why_did_my_soup_fail.ipynb)
#
# # Why did my soup fail?
#
# Every run is fine, and their average is not: that happens, and mostly for one
# of three reasons. Here each is planted in a pool of good runs, found, and drawn.
# A minute on a CPU.

# %% tags=["skip-execution"]
# %pip install -q "jaxsoup[demo]"

# %% [markdown]
# ## Five good runs
#
# A small network on handwritten digits: pre-trained on some, fine-tuned on
# others, five times from the same weights.

# %%
from flax import linen as nn
import jax
import numpy as np
import optax

import jaxsoup
from jaxsoup import evaluation
from jaxsoup import metrics
from jaxsoup.data import digits

data = digits.load(0, dict(pretrain=300, train=300, held_out=500, test=697))


class Net(nn.Module):

  @nn.compact
  def __call__(self, image):
    x = image.reshape(len(image), -1)
    x = nn.relu(nn.Dense(96, name='first')(x))
    x = nn.relu(nn.Dense(96, name='second')(x))
    return nn.Dense(10, name='head')(x)


net = Net()


def loss_fn(params, batch):
  logits = net.apply({'params': params}, batch['image'])
  labels = batch['label']
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def update(params, opt_state, batch, learning_rate):
  gradient = jax.grad(loss_fn)(params, batch)
  updates, opt_state = optax.scale_by_adam().update(gradient, opt_state)
  updates = jax.tree.map(lambda u: -learning_rate * u, updates)
  return optax.apply_updates(params, updates), opt_state


def train(params, part, *, learning_rate, seed, num_epochs=6):
  opt_state = optax.scale_by_adam().init(params)
  rng = np.random.default_rng(seed)
  for _ in range(num_epochs):
    for rows in rng.permutation(300).reshape(-1, 50):
      batch = {name: x[rows] for name, x in data[part].items()}
      params, opt_state = update(params, opt_state, batch, learning_rate)
  return params


def pretrained(seed):
  start = net.init(jax.random.key(seed), data['train']['image'][:1])['params']
  return train(start, 'pretrain', learning_rate=2e-3, seed=seed, num_epochs=40)


def fine_tuned(start, learning_rate, seed):
  return train(start, 'train', learning_rate=learning_rate, seed=seed)


theta_0 = pretrained(seed=0)
rates = (1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3)
good = {f'run {k}': fine_tuned(theta_0, r, k) for k, r in enumerate(rates)}


# %%
def correct(params, batch):
  return metrics.correct(
      net.apply({'params': params}, batch['image']), batch['label']
  )


def accuracy_on(part):
  return evaluation.mean_of(correct, evaluation.batched(data[part], 500))


held_out, test = accuracy_on('held_out'), accuracy_on('test')


def show(pool):
  """Held-out accuracy of each model, and of the average of all."""
  for name, params in pool.items():
    print(f'{name:<14} {held_out(params):.3f}')
  soup = jaxsoup.uniform(list(pool.values()))
  print(f'{"THEIR SOUP":<14} {held_out(soup.params):.3f}')


show(good)

# %% [markdown]
# A pool in which nothing is wrong. The diagnosis says so, too: it invents no
# faults.

# %%
from jaxsoup import diagnosis


def diagnosed(pool, **given):
  models, names = list(pool.values()), list(pool)
  return diagnosis.diagnose(models, names=names, theta_0=theta_0, **given)


print(diagnosed(good, eval_fn=held_out).as_text())

# %% [markdown]
# ## Fault 1: another initialization
#
# Three runs of a colleague are added. They are as good as ours, but began at
# other weights, pre-trained with another seed: their hidden units mean other
# things, and an average of different things is neither.

# %%
elsewhere = pretrained(seed=7)
theirs = {
    f'theirs {k}': fine_tuned(elsewhere, rates[k], 9 + k) for k in range(3)
}
pool_1 = good | theirs
show(pool_1)

# %% [markdown]
# The diagnosis of the weights alone, without any data:

# %%
found_1 = diagnosed(pool_1)
print(found_1.as_text())

# %% [markdown]
# ## Fault 2: a learning rate that is far too high
#
# By itself the run is usable. One in six, it spoils the soup. Given a score on
# held-out data (`eval_fn`) the diagnosis measures *barriers* too: how far the
# score falls half-way between two models, below the mean of the two.

# %%
hot = fine_tuned(theta_0, 0.05, 5)
pool_2 = good | {'hot': hot}
show(pool_2)

# %%
found_2 = diagnosed(pool_2, eval_fn=held_out)
print(found_2.as_text())

# %% [markdown]
# ## Fault 3: a head for each run
#
# Whoever loads a backbone with a new classifier gets a *random* one, and another
# one in every run. All runs must begin with the same: draw it once, better train
# it alone first (a linear probe), and save it with the backbone.


# %%
def with_new_head(params, seed):
  start = net.init(jax.random.key(seed), data['train']['image'][:1])
  return params | {'head': start['params']['head']}


pool_3 = {
    f'own head {k}': fine_tuned(with_new_head(theta_0, 20 + k), rate, k)
    for k, rate in enumerate(rates)
}
show(pool_3)

# %%
# There is no one theta_0: the heads had starts of their own.
found_3 = diagnosis.diagnose(
    list(pool_3.values()), names=list(pool_3), eval_fn=held_out
)
print(found_3.as_text())

# %% [markdown]
# ## Do what it says
#
# `verdict.members` are those to average. Held-out data chose them; the test data,
# which nothing has seen so far, report.

# %%
for pool, found in ((pool_1, found_1), (pool_2, found_2)):
  models = list(pool.values())
  subset = [models[k] for k in found.verdict.members]
  for chosen in (models, subset):
    score = test(jaxsoup.uniform(chosen).params)
    print(f'with {list(pool)[-1]}: soup of {len(chosen)}, test {score:.3f}')

# %% [markdown]
# ## See it: the way from one model to another
#
# The loss on the straight line between two models, less what it is at the ends.
# Good runs are in one valley: the line is flat. The others have a hill between:
# a barrier, and the average lies on top of it.

# %%
import matplotlib.pyplot as plt

from jaxsoup import landscape
from jaxsoup import report

batch = data['held_out']
loss = lambda params: loss_fn(params, batch)
heads = list(pool_3.values())
lines = {
    'two good runs': landscape.line(loss, good['run 0'], good['run 4']),
    'to one of theirs': landscape.line(loss, good['run 0'], theirs['theirs 0']),
    'to the hot run': landscape.line(loss, good['run 0'], hot),
    'own heads': landscape.line(loss, heads[0], heads[1]),
}
fig, ax = plt.subplots(figsize=(6, 3.4))
report.lines(ax, lines)
{name: round(landscape.barrier(line), 2) for name, line in lines.items()}

# %% [markdown]
# ## See it from above
#
# The plane through the pre-trained model and two of its runs. Every other model
# is projected onto it. A grey mark is far off the plane: the colour below it
# is not its loss.

# %%
others = {
    'soup of good runs': jaxsoup.uniform(list(good.values())).params,
    'theirs 0': theirs['theirs 0'],
}
plane = landscape.plane(
    loss,
    theta_0,
    good['run 3'],
    good['run 4'],
    others=list(others.values()),
    chunk_size=21,
)
fig, ax = plt.subplots(figsize=(5, 3.8), dpi=72)
report.plane(ax, plane, ['pre-trained', 'run 3', 'run 4', *others])

# %% [markdown]
# ## Angles
#
# The angle at the pre-trained model between two runs. Runs of one family share
# some of their way; what comes from somewhere else does not.

# %%
everyone = good | {'hot': hot} | theirs
angles = landscape.angles(list(everyone.values()), theta_0)
fig, ax = plt.subplots(figsize=(5.4, 4.2))
report.matrix(ax, angles, list(everyone), label='angle (degrees)')
ax.tick_params(axis='x', rotation=45)

# %% [markdown]
# ## What it cannot do
#
# "Nothing wrong was found" is no promise of a gain: a soup of good runs can
# still be worse than the best of them. Compare them, on held-out data. And a
# greedy soup protects you without any diagnosis: it leaves out what hurts. What
# it does not tell you is why.

# %%
greedy = jaxsoup.greedy(list(pool_1.values()), held_out)
print([list(pool_1)[k] for k in greedy.info.accepted])

# %% [markdown]
# Of checkpoints on disk the same is `jaxsoup diagnose RUN... --init START
# --eval module:function`.
