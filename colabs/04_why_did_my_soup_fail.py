# %% [markdown]
# # Why did my soup fail?
#
# Sometimes every run is good but their average is bad, usually for one of three
# reasons. This notebook adds each fault to a pool of good runs, diagnoses it, and
# draws it. It takes a minute on a CPU.

# %% tags=["skip-execution"]
# Installs the clone of jaxsoup that contains this notebook. On Colab, upload
# the clone first, and replace `..` by its path.
# %pip install -q "..[demo]"

# %% [markdown]
# ## Five good runs
#
# A small network is pre-trained on handwritten digits, then fine-tuned five times
# on other digits, from the same weights.

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
  """Prints the held-out accuracy of each model, and of their average."""
  for name, params in pool.items():
    print(f'{name:<14} {held_out(params):.3f}')
  soup = jaxsoup.uniform(list(pool.values()))
  print(f'{"uniform soup":<14} {held_out(soup.params):.3f}')


show(good)

# %% [markdown]
# Nothing is wrong with this pool, and the diagnosis finds nothing.

# %%
from jaxsoup import diagnosis


def diagnosed(pool, **options):
  models, names = list(pool.values()), list(pool)
  return diagnosis.diagnose(models, names=names, theta_0=theta_0, **options)


print(diagnosed(good, eval_fn=held_out).as_text())

# %% [markdown]
# ## Fault 1: a different initialization
#
# We add three runs of a colleague. They are as good as ours, but they started
# from other weights, pre-trained with another seed. Their hidden units represent
# different features, so averaging them with ours destroys both.

# %%
other_start = pretrained(seed=7)
added = {
    f'other {k}': fine_tuned(other_start, rates[k], 9 + k) for k in range(3)
}
pool_1 = good | added
show(pool_1)

# %% [markdown]
# The diagnosis needs only the weights, no data:

# %%
diagnosis_1 = diagnosed(pool_1)
print(diagnosis_1.as_text())

# %% [markdown]
# ## Fault 2: a learning rate that is far too high
#
# The run itself is usable, but as one of six it ruins the soup. With a score on
# held-out data (`eval_fn`), the diagnosis also measures *barriers*: how far the
# score at the midpoint of two models is below the mean of their scores.

# %%
hot = fine_tuned(theta_0, 0.05, 5)
pool_2 = good | {'hot': hot}
show(pool_2)

# %%
diagnosis_2 = diagnosed(pool_2, eval_fn=held_out)
print(diagnosis_2.as_text())

# %% [markdown]
# ## Fault 3: a different head in each run
#
# If each run loads a backbone and adds a new classifier, each run gets a
# different *random* head. All runs must start with the same head. Initialize it
# once, preferably train it alone first (a linear probe), and save it with the
# backbone.


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
# No theta_0 is passed: the heads have no common start.
diagnosis_3 = diagnosis.diagnose(
    list(pool_3.values()), names=list(pool_3), eval_fn=held_out
)
print(diagnosis_3.as_text())

# %% [markdown]
# ## Follow the advice
#
# `verdict.members` are the runs to average. They were selected on held-out data;
# we report on the test data, which was not used so far.

# %%
for pool, result in ((pool_1, diagnosis_1), (pool_2, diagnosis_2)):
  models = list(pool.values())
  subset = [models[k] for k in result.verdict.members]
  for chosen in (models, subset):
    score = test(jaxsoup.uniform(chosen).params)
    print(f'with {list(pool)[-1]}: soup of {len(chosen)}, test {score:.3f}')

# %% [markdown]
# ## The line between two models
#
# The plot shows the loss on the straight line between two models, minus the linear
# interpolation of the losses at its ends. Good runs share a basin, so the line is
# flat. The others are separated by a barrier, and their average is on top of it.

# %%
import matplotlib.pyplot as plt

from jaxsoup import landscape
from jaxsoup import report

batch = data['held_out']
loss = lambda params: loss_fn(params, batch)
heads = list(pool_3.values())
lines = {
    'two good runs': landscape.line(loss, good['run 0'], good['run 4']),
    'to another start': landscape.line(loss, good['run 0'], added['other 0']),
    'to the hot run': landscape.line(loss, good['run 0'], hot),
    'different heads': landscape.line(loss, heads[0], heads[1]),
}
fig, ax = plt.subplots(figsize=(6, 3.4))
report.lines(ax, lines)
{name: round(landscape.barrier(line), 2) for name, line in lines.items()}

# %% [markdown]
# ## The plane through three models
#
# The plane contains the pre-trained model and two of the runs. The other models
# are projected onto it. A gray marker means that the model is far from the plane,
# so the color below the marker is not its loss.

# %%
others = {
    'soup of good runs': jaxsoup.uniform(list(good.values())).params,
    'other 0': added['other 0'],
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
# The matrix shows the angle between two runs, seen from the pre-trained model. Runs
# from one start share a part of their direction. Runs from elsewhere do not.

# %%
everyone = good | {'hot': hot} | added
angles = landscape.angles(list(everyone.values()), theta_0)
fig, ax = plt.subplots(figsize=(5.4, 4.2))
report.matrix(ax, angles, list(everyone), label='angle (degrees)')
ax.tick_params(axis='x', rotation=45)

# %% [markdown]
# ## Limits
#
# If the diagnosis finds no fault, a gain is still not guaranteed: a soup of good
# runs can be worse than the best of them, so compare them on held-out data. A
# greedy soup protects you without any diagnosis, because it leaves out the runs
# that hurt. But it does not tell you why they do.

# %%
greedy = jaxsoup.greedy(list(pool_1.values()), held_out)
print([list(pool_1)[k] for k in greedy.info.accepted])

# %% [markdown]
# For checkpoints on disk, run `jaxsoup diagnose RUN... --init START --eval
# module:function`.
