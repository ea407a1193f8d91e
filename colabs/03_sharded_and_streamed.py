# %% [markdown]
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxsoup/jaxsoup/blob/main/colabs/03_sharded_and_streamed.ipynb)
#
# # Sharded and streamed
#
# What if a model is too big for one device, or there are too many runs to hold
# them all? In JAX the *sharding* of an array says which device has which part of
# it. `jaxsoup` follows it: no function of it takes a mesh, and the calls are
# those of the notebooks before.
#
# On a CPU four virtual devices stand in for real ones. On a TPU or several GPUs
# the same cells run as they are, on those. A minute on a CPU.

# %% tags=["skip-execution"]
# %pip install -q "jaxsoup[demo]"

# %%
import os

# Before jax is imported, and of CPUs only.
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=4')

import jax

jax.config.update('jax_cpu_enable_async_dispatch', False)
jax.devices()

# %% [markdown]
# ## A mesh, and where the weights lie on it
#
# `sharding.fsdp` cuts each leaf along its largest axis. It works on shapes: no
# model is made yet.

# %%
from flax import linen as nn
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from jaxsoup import sharding
from jaxsoup.data import digits


class Net(nn.Module):

  @nn.compact
  def __call__(self, image):
    x = image.reshape(len(image), -1)
    for _ in range(3):
      x = nn.relu(nn.Dense(1024)(x))
    return nn.Dense(10)(x)


net = Net()
data = digits.load(0, dict(pretrain=240, train=240, held_out=400, test=897))
init_fn = lambda key: net.init(key, data['train']['image'][:1])['params']

mesh = jax.make_mesh(
    (jax.device_count(),), ('fsdp',), axis_types=(AxisType.Auto,)
)
abstract_params = sharding.fsdp(
    jax.eval_shape(init_fn, jax.random.key(0)), mesh
)
for path, leaf in jax.tree.leaves_with_path(abstract_params)[2:]:
  print(
      f'{jax.tree_util.keystr(path):<36} {leaf.shape!s:<14} {leaf.sharding.spec}'
  )

# %% [markdown]
# ## Fine-tune on the mesh
#
# The weights are born where they belong, and each batch is spread over the
# devices; the loop is any other loop.

# %%
import optax

from jaxsoup import checkpoints

on_mesh = NamedSharding(mesh, PartitionSpec('fsdp'))


def loss_fn(params, batch, beta=1.0):
  logits = beta * net.apply({'params': params}, batch['image'])
  labels = batch['label']
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


tx = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)


@jax.jit
def update(params, opt_state, batch):
  gradient = jax.grad(loss_fn)(params, batch)
  updates, opt_state = tx.update(gradient, opt_state, params)
  return optax.apply_updates(params, updates), opt_state


def fine_tune(params, part, *, learning_rate, num_epochs, seed):
  opt_state = jax.jit(tx.init)(params)
  opt_state.hyperparams['learning_rate'] = learning_rate
  rng = np.random.default_rng(seed)
  for _ in range(num_epochs):
    for rows in rng.permutation(240).reshape(-1, 48):
      batch = jax.device_put({k: x[rows] for k, x in part.items()}, on_mesh)
      # One step at a time: four virtual devices may have fewer cores.
      params, opt_state = jax.block_until_ready(
          update(params, opt_state, batch)
      )
  return params


shardings = jax.tree.map(lambda x: x.sharding, abstract_params)
start = jax.jit(init_fn, out_shardings=shardings)(jax.random.key(0))
pretrained = fine_tune(
    start, data['pretrain'], learning_rate=5e-4, num_epochs=20, seed=0
)
paths = []
for k in range(6):
  run = dict(learning_rate=2e-4 * (k + 1), num_epochs=6, seed=k)
  params = fine_tune(pretrained, data['train'], **run)
  paths.append(checkpoints.save(f'runs/{k}', params, metadata={'config': run}))

# %% [markdown]
# ## Ingredients from the disk onto the mesh
#
# `Ingredients` looks like a list and reads nothing until it is asked. Each
# process then reads what its devices hold, whatever mesh it was saved from.

# %%
import math

ingredients = checkpoints.Ingredients(paths, abstract_params)


def megabytes(tree):
  """What the first device holds of it."""
  sizes = (
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(tree)
  )
  return sum(sizes) / 1e6


def alive():
  """All arrays on the mesh that live now."""
  arrays = jax.live_arrays()
  return megabytes([x for x in arrays if isinstance(x.sharding, NamedSharding)])


whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_params))
print(f'{len(ingredients)} ingredients of {whole / 1e6:.1f} MB each')
print(f'one of them, on each device: {megabytes(ingredients[0]):.1f} MB')

# %% [markdown]
# ## Soups
#
# `uniform` reads all files side by side, piece by piece, and holds one model:
# the soup. `greedy` holds four, however many ingredients there are. Its held-out
# batches are spread over the mesh, too, and its scores go to a file: stopped at
# any point, the same call goes on from there.

# %%
import jaxsoup
from jaxsoup import evaluation
from jaxsoup import metrics


def correct(params, batch):
  return metrics.correct(
      net.apply({'params': params}, batch['image']), batch['label']
  )


def accuracy_on(part):
  batches = evaluation.batched(data[part], 200, sharding=on_mesh)
  return evaluation.mean_of(correct, batches)


held_out, test = accuracy_on('held_out'), accuracy_on('test')
print('a batch lies on the mesh as', held_out.batches[0]['image'].sharding.spec)

most = 0


def look(trial):
  """After each trial: what the first device holds."""
  global most
  most = max(most, alive() - before)


del params, pretrained, start
uniform = jaxsoup.uniform(ingredients)
before = alive()
scores = checkpoints.ScoreLog('scores.jsonl', ingredients)
greedy = jaxsoup.greedy(ingredients, held_out, scores=scores, on_trial=look)
print('a leaf lies there as', jax.tree.leaves(greedy.params)[-1].sharding.spec)
for name, soup in (('uniform', uniform), ('greedy', greedy)):
  print(f'{name:<8} test {test(soup.params):.3f}', np.round(soup.alpha, 2))

# %% [markdown]
# ## Learned: resident or streamed
#
# A learned soup needs all ingredients in every step. Where their stack fits into
# memory it stays there; where it does not, they are read in each step: three
# models in memory in place of K + 3, for reading 2 K - 2 of them a step. The
# gradient is the same. `jaxsoup` decides that by the free memory, and says why;
# `stream=True` decides it for it.

# %%
batches = evaluation.batched(data['held_out'], 200, sharding=on_mesh)
learned = {}
for stream in (None, True):
  learned[stream] = jaxsoup.learned(
      ingredients,
      loss_fn,
      batches,
      tx=optax.adamw(0.05, weight_decay=0.0),
      num_epochs=2,
      stream=stream,
      on_start=lambda plan: print(
          f'{"streamed" if plan.is_streamed else "resident"}: '
          f'reads {plan.reads_per_step} ingredients a step'
      ),
  )
print('Why?', learned[None].info.plan.reason)
print(learned[None].alpha.round(4))
print(learned[True].alpha.round(4))
print(f'test {test(learned[True].params):.3f}')

# %% [markdown]
# ## Mixing costs no communication
#
# All ingredients are cut alike, so each device mixes its own part. The compiler
# agrees: `mix` has no collective. Its gradient in alpha has one, of some bytes.
# (A forward pass does communicate: the check can see it.)

# %%
from jaxsoup.experiments import hlo


def collectives(fn, *args):
  text = jax.jit(fn).lower(*args).compile().as_text()
  found = hlo.collectives_of(text)
  shown = (
      f'{x.times} {name} ({x.num_bytes} bytes)' for name, x in found.items()
  )
  return ', '.join(shown) or 'none'


def gradient_in_alpha(stacked, alpha, gradient):
  return jax.vjp(lambda a: jaxsoup.mix(stacked, a), alpha)[1](gradient)


stacked = jaxsoup.stack(ingredients)
alpha = np.full(len(ingredients), 1 / len(ingredients), np.float32)
communication = {
    'mix': collectives(jaxsoup.mix, stacked, alpha),
    'gradient in alpha': collectives(
        gradient_in_alpha, stacked, alpha, uniform.params
    ),
    'forward pass': collectives(loss_fn, uniform.params, batches[0]),
}
for name, found in communication.items():
  print(f'{name:<18} {found}')

# %% [markdown]
# ## The bill

# %%
import matplotlib.pyplot as plt

bill = {
    'one model, not sharded': whole / 1e6,
    'one model, sharded': megabytes(uniform.params),
    'all ingredients, not sharded': len(ingredients) * whole / 1e6,
    'all ingredients, sharded': megabytes(stacked),
    'all that greedy held at once, sharded': most,
}
fig, ax = plt.subplots(figsize=(6.5, 2.2))
bars = ax.barh(list(bill), list(bill.values()))
ax.bar_label(bars, fmt='%.1f', padding=3)
ax.spines[['top', 'right']].set_visible(False)
ax.set_xlabel('MB on each device')
ax.invert_yaxis()

# %% [markdown]
# ## From file to file
#
# A uniform soup of files needs no model in memory at all.

# %%
path = checkpoints.save_average('soup.safetensors', ingredients)
print(path.rpartition('/')[2], os.path.getsize(path) / 1e6, 'MB')

# %% [markdown]
# Nothing is free: streaming trades memory for reading, greedy reads each
# ingredient twice, and on virtual devices nothing becomes faster. Before you
# rent a machine `jaxsoup plan --config FILE --topology v5e:8x8` compiles your
# experiment for it, and says what fits.
