# %% [markdown]
# # Sharded and streamed
#
# What if a model does not fit on one device, or the runs do not fit in memory
# together? In JAX, the *sharding* of an array says which device holds which part
# of it. `jaxsoup` follows the shardings of its inputs. No function takes a mesh,
# and the calls are the same as in the previous notebooks.
#
# On a CPU, this notebook uses four virtual devices. On a TPU or several GPUs, the
# same cells use the real devices. It takes a minute on a CPU.

# %% tags=["skip-execution"]
# Installs the clone of jaxsoup that contains this notebook. On Colab, upload
# the clone first, and replace `..` by its path.
# %pip install -q "..[demo]"

# %%
import os

# Must be set before jax is imported. Affects CPUs only.
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=4')

import jax

jax.config.update('jax_cpu_enable_async_dispatch', False)
jax.devices()

# %% [markdown]
# ## A mesh, and shardings on it
#
# `sharding.fsdp` splits each leaf along its largest axis, here also the small
# ones. It works on abstract shapes; no parameters exist yet.

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
    jax.eval_shape(init_fn, jax.random.key(0)), mesh, min_size=0
)
for path, leaf in jax.tree.leaves_with_path(abstract_params)[2:]:
  print(
      f'{jax.tree_util.keystr(path):<36} {leaf.shape!s:<14} {leaf.sharding.spec}'
  )

# %% [markdown]
# ## Fine-tune on the mesh
#
# The parameters are created sharded, and each batch is split across the devices.
# Otherwise it is an ordinary training loop.

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
      # One step at a time, as there may be fewer cores than virtual devices.
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
# ## Load ingredients onto the mesh
#
# `Ingredients` is a sequence that reads each checkpoint only when it is indexed.
# Each process reads only what its own devices hold, whatever mesh the checkpoint
# was saved from.

# %%
import math

ingredients = checkpoints.Ingredients(paths, abstract_params)


def megabytes(tree):
  """The size of the part of a tree that one device holds."""
  sizes = (
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(tree)
  )
  return sum(sizes) / 1e6


def alive():
  """The size of all sharded arrays that exist now, on one device."""
  arrays = jax.live_arrays()
  return megabytes([x for x in arrays if isinstance(x.sharding, NamedSharding)])


num_bytes = sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_params)
)
print(f'{len(ingredients)} ingredients of {num_bytes / 1e6:.1f} MB each')
print(f'one of them, on each device: {megabytes(ingredients[0]):.1f} MB')

# %% [markdown]
# ## Soups
#
# `uniform` reads all files in parallel, in pieces, and holds only one model: the
# soup. `greedy` holds four models, for any number of ingredients. Its held-out
# batches are split across the mesh, too. Its scores go to a file, so that an
# interrupted search continues where it stopped.

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
print('sharding of a batch:', held_out.batches[0]['image'].sharding.spec)

peak = 0


def record_peak(trial):
  """Called after each trial: records the memory in use on one device."""
  global peak
  peak = max(peak, alive() - before)


del params, pretrained, start
uniform = jaxsoup.uniform(ingredients)
before = alive()
scores = checkpoints.ScoreLog('scores.jsonl', ingredients)
greedy = jaxsoup.greedy(
    ingredients, held_out, scores=scores, on_trial=record_peak
)
print('sharding of a leaf:', jax.tree.leaves(greedy.params)[-1].sharding.spec)
for name, soup in (('uniform', uniform), ('greedy', greedy)):
  print(f'{name:<8} test {test(soup.params):.3f}', np.round(soup.alpha, 2))

# %% [markdown]
# ## Learned: resident or streamed
#
# A learned soup needs all ingredients in every step. If their stack fits in memory,
# it stays there (*resident*). If not, the ingredients are read in every step
# (*streamed*): that holds three models in memory instead of K + 3, and reads
# 2 K - 2 models a step. The gradient is the same. `jaxsoup` chooses by the free
# memory and gives the reason; override the choice with `memory=`.

# %%
batches = evaluation.batched(data['held_out'], 200, sharding=on_mesh)
learned = {}
for memory in ('auto', 'streamed'):
  learned[memory] = jaxsoup.learned(
      ingredients,
      loss_fn,
      batches,
      tx=optax.adamw(0.05, weight_decay=0.0),
      num_epochs=2,
      memory=memory,
  )
  plan = learned[memory].info.plan
  print(f'{plan.memory}: reads {plan.reads_per_step} ingredients a step')
print('reason:', learned['auto'].info.plan.reason)
print(learned['auto'].alpha.round(4))
print(learned['streamed'].alpha.round(4))
print(f'test {test(learned["streamed"].params):.3f}')

# %% [markdown]
# ## Mixing costs no communication
#
# All ingredients have the same sharding, so each device mixes its own part. The
# compiled program confirms it: `mix` has no collectives. Its gradient in alpha has
# one, of a few bytes. (The forward pass does communicate, which shows that the
# check works.)

# %%
from jaxsoup.plan import hlo


def collectives(fn, *args):
  text = jax.jit(fn).lower(*args).compile().as_text()
  parts = (
      f'{x.times} {name} ({x.num_bytes} bytes)'
      for name, x in hlo.collectives_of(text).items()
  )
  return ', '.join(parts) or 'none'


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
for name, text in communication.items():
  print(f'{name:<18} {text}')

# %% [markdown]
# ## Memory on each device

# %%
import matplotlib.pyplot as plt

memory = {
    'one model, not sharded': num_bytes / 1e6,
    'one model, sharded': megabytes(uniform.params),
    'all ingredients, not sharded': len(ingredients) * num_bytes / 1e6,
    'all ingredients, sharded': megabytes(stacked),
    'peak of greedy, sharded': peak,
}
fig, ax = plt.subplots(figsize=(6.5, 2.2))
bars = ax.barh(list(memory), list(memory.values()))
ax.bar_label(bars, fmt='%.1f', padding=3)
ax.spines[['top', 'right']].set_visible(False)
ax.set_xlabel('MB on each device')
ax.invert_yaxis()

# %% [markdown]
# ## From file to file
#
# A uniform soup of files needs no whole model in memory.

# %%
path = checkpoints.save_average('soup.safetensors', ingredients)
print(path.rpartition('/')[2], os.path.getsize(path) / 1e6, 'MB')

# %% [markdown]
# There are costs: streaming trades memory for reading, and greedy reads each
# ingredient twice. Virtual devices make nothing faster. Before you rent a machine,
# `jaxsoup plan --config FILE --topology v5e:8x8` compiles your experiment for it
# and says what fits.
