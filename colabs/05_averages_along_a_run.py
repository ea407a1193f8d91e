# %% [markdown]
# # Averages along a run
#
# A training at a constant learning rate never comes to rest: each checkpoint is a
# good model plus noise. The usual cure is to lower the rate at the end. Averaging
# the last checkpoints is another one: it needs no decision on when the run ends.
#
# This notebook trains a small network, averages its checkpoints in several ways,
# and then does the same inside of the training. It takes a minute on a CPU.

# %% tags=["skip-execution"]
# Installs the clone of jaxsoup that contains this notebook. On Colab, upload
# the clone first, and replace `..` by its path.
# %pip install -q "..[demo]"

# %% [markdown]
# ## A run at a constant rate
#
# The digits are noisy, with new noise in every step, so the gradients remain noisy
# until the end. An ordinary loop, which keeps every 50th step in an Orbax
# `CheckpointManager`.

# %%
import functools
import os

from flax import linen as nn
from flax.training import train_state
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from jaxsoup.data import digits
from jaxsoup.data import shifts

NOISE, NUM_STEPS, RATE = 0.4, 2000, 4e-3
data = digits.load(0, dict(train=400, held_out=400, test=997))
for part in ('held_out', 'test'):
  data[part] = shifts.apply(data[part], 'noise', severity=NOISE, seed=0)


class Net(nn.Module):

  @nn.compact
  def __call__(self, image):
    x = image.reshape(len(image), -1)
    x = nn.relu(nn.Dense(96)(x))
    x = nn.relu(nn.Dense(96)(x))
    return nn.Dense(10)(x)


net = Net()


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, images, labels):
  keys = jax.random.split(jax.random.fold_in(jax.random.key(0), state.step))
  rows = jax.random.randint(keys[0], (16,), 0, len(labels))
  noise = NOISE * jax.random.normal(keys[1], images[rows].shape)

  def loss_fn(params):
    logits = net.apply({'params': params}, images[rows] + noise)
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, labels[rows]
    ).mean()

  return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))


def train(tx):
  """Yields every 50th step, and its state."""
  images, labels = map(jax.numpy.asarray, data['train'].values())
  params = net.init(jax.random.key(0), images[:1])['params']
  state = train_state.TrainState.create(
      apply_fn=net.apply, params=params, tx=tx
  )
  for step in range(1, NUM_STEPS + 1):
    state = train_step(state, images, labels)
    if step % 50 == 0:
      yield step, state


with ocp.CheckpointManager(os.path.abspath('run')) as manager:
  for step, state in train(optax.adam(RATE)):
    manager.save(step, args=ocp.args.StandardSave(state))

# %% [markdown]
# ## The same run with a decay
#
# For comparison, the same steps and noise, but from step 1,500 on the rate falls
# linearly to zero. When to begin had to be known in advance.

# %%
BRANCH = 1500


def train_with_decay(rate, *more):
  schedule = optax.linear_schedule(rate, 0.0, NUM_STEPS - BRANCH, BRANCH)
  *_, (_, state) = train(optax.chain(optax.adam(schedule), *more))
  return state


decayed = train_with_decay(RATE)

# %% [markdown]
# ## Averages of its checkpoints
#
# `checkpoints.steps` has the checkpoints by their step numbers. A function of
# `jaxsoup.trajectory` makes mixing coefficients from these numbers, and a window is
# any condition on them. `Ingredients` reads a file when it is needed.

# %%
import jaxsoup
from jaxsoup import checkpoints
from jaxsoup import evaluation
from jaxsoup import metrics
from jaxsoup import trajectory

by_step = checkpoints.steps('run')
steps = np.array(list(by_step))
ingredients = checkpoints.Ingredients(by_step.values())


def correct(params, batch):
  return metrics.correct(
      net.apply({'params': params}, batch['image']), batch['label']
  )


held_out, test = (
    evaluation.mean_of(correct, evaluation.batched(data[part], 1000))
    for part in ('held_out', 'test')
)


def average(alpha):
  return jaxsoup.average(ingredients, alpha).params


late = trajectory.window(steps, start=BRANCH)
models = {
    'last step': ingredients[-1],
    'with a decay': decayed.params,
    'mean of the same quarter': average(trajectory.swa(steps, where=late)),
}
for curve in ('1-sqrt', 'linear'):
  alpha = trajectory.decay(steps, curve, where=late)
  models[f'WSM, {curve}'] = average(alpha)
for half_life in (25, 100, 400):
  alpha = trajectory.ema(steps, decay=0.5 ** (1 / half_life))
  models[f'EMA, half-life {half_life}'] = average(alpha)


def show(models):
  print(f'{"accuracy (%)":<26} held-out  test')
  for name, params in models.items():
    scores = 100 * held_out(params), 100 * test(params)
    print(f'{name:<26} {scores[0]:8.1f} {scores[1]:5.1f}')


show(models)

# %% [markdown]
# WSM chooses the coefficients such that each update counts as much as under a
# decay with that curve. For a linear one that is nearly the plain mean:

# %%
for curve in ('linear', '1-sqrt'):
  print(
      f'{curve:<7}', trajectory.decay(steps, curve, where=late)[late].round(2)
  )

# %% [markdown]
# Is it luck? The gain of each model over the last step on the test data, and its
# 95 % interval. It allows for the choice of test images, not for other seeds.

# %%
from jaxsoup import statistics


def logits(params):
  fn = lambda params, batch: net.apply({'params': params}, batch['image'])
  return evaluation.logits_of(fn, test.batches)(params)


def gain_over(name, other):
  pair = logits(models[name]), logits(models[other])
  gain = statistics.compare(*pair, data['test']['label'])
  points = [100 * x for x in (gain.gain, gain.low, gain.high)]
  print(f'{name:<26}', '{:+5.1f} [{:+.1f}, {:+.1f}]'.format(*points))


for name in list(models)[1:]:
  gain_over(name, 'last step')

# %% [markdown]
# And over the run with a decay. An interval that contains 0 shows no difference:
# here the averages are as good as the decay, not better, and the curve of WSM gains
# nothing over the plain mean.

# %%
for name in list(models)[2:5]:
  gain_over(name, 'with a decay')

# %% [markdown]
# ## Score by step
#
# `sliding` makes the average of each window along the run, by adding the checkpoint
# that enters and subtracting the one that leaves. The average is what a decay that
# ended at that step would have given, roughly, for all steps at once.

# %%
import matplotlib.pyplot as plt

from jaxsoup import report

SIZE = 10
sliding = [100 * test(s.params) for s in trajectory.sliding(ingredients, SIZE)]
fig, ax = plt.subplots(figsize=(6, 3.4))
report.by_step(
    ax,
    {
        'each checkpoint': (steps, [100 * test(x) for x in ingredients]),
        f'mean of the last {SIZE}': (steps[SIZE - 1 :], sliding),
        'with a decay': ([NUM_STEPS], [100 * test(decayed.params)]),
    },
    label='test accuracy (%)',
)
ax.set_ylim(65, 88)  # The first checkpoint is below.
fig.tight_layout()

# %% [markdown]
# ## How long a window?
#
# A few checkpoints bring most of the gain. After that the curves differ by noise, and
# fall a little where the window reaches back to models that were worse. Choose the
# length on held-out data, and report on others.

# %%
lengths = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40)
windows = [trajectory.window(steps, last=length) for length in lengths]
means = [average(trajectory.swa(steps, where=where)) for where in windows]
by_length = {
    name: [100 * score(params) for params in means]
    for name, score in (('held-out', held_out), ('test', test))
}
fig, ax = plt.subplots(figsize=(6, 3))
for name, scores in by_length.items():
  ax.plot(lengths, scores, marker='o', label=name)
ax.set_xlabel('checkpoints in the mean')
ax.set_ylabel('accuracy (%)')
ax.spines[['top', 'right']].set_visible(False)
ax.legend(frameon=False)
fig.tight_layout()

# %% [markdown]
# ## Inside the training
#
# No checkpoint is needed if the average is made while the model trains.
# `trajectory.keep`, at the end of the chain of an optimizer, carries averages in the
# optimizer state. Here it is the mean of the same eleven steps as above, and two
# power-function EMAs, of which an EMA of any other length can be made afterwards.

# %%
widths = {'short': 0.05, 'long': 0.10}
kept = {'mean': jaxsoup.running_average(start=BRANCH - 1, every=50)}
for name, width in widths.items():
  kept[name] = jaxsoup.running_average(trajectory.power_decay(width))

stored = {}
for step, state in train(optax.chain(optax.adam(RATE), trajectory.keep(kept))):
  if step >= BRANCH:
    inside = trajectory.kept(state.opt_state)
    stored |= {(step, name): inside[name] for name in widths}

file, here = models['mean of the same quarter'], inside['mean']
differences = jax.tree.map(lambda x, y: abs(x - y).max(), file, here)
print('largest difference:', max(jax.tree.leaves(differences)))

# %% [markdown]
# The length of an EMA is the standard deviation of its weights, as a share of the
# run.

# %%
post_hoc = {}
for length in (0.03, 0.05, 0.08, 0.1, 0.15, 0.2):
  alpha = trajectory.post_hoc_ema(
      [step for step, _ in stored],
      [widths[name] for _, name in stored],
      step=NUM_STEPS,
      length=length,
  )
  soup = jaxsoup.average(list(stored.values()), alpha)
  post_hoc[f'EMA, length {length}'] = soup.params

show(post_hoc)

# %% [markdown]
# ## From the command line
#
# The same mean of files. With `--eval MODULE:FUNCTION` and several `--last` or
# `--decay` the command chooses among them, and `--whole` averages the optimizer state
# too, to go on with the training.

# %%
import subprocess
import sys

command = 'soup trajectory run --steps 1500:2000 --out late.safetensors'
jaxsoup_command = 'from jaxsoup import cli; cli.main()'  # `jaxsoup` in a shell.
result = subprocess.run(
    [sys.executable, '-c', jaxsoup_command, *command.split()],
    check=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
)
print(result.stdout.replace(os.getcwd() + '/', ''))

# %% [markdown]
# ## When it does not help
#
# At a far too low rate the model still learns from step to step: early models are
# worse, a long average lags behind, and a short one gains nothing. A run at a far
# too high rate is repaired by neither: compare with the table at the top.

# %%
averages = {
    'mean of the last quarter': jaxsoup.running_average(
        start=BRANCH - 1, every=50
    ),
    'mean of all': jaxsoup.running_average(start=49, every=50),
}
other_rates = {}
for rate in (1e-4, 5e-2):
  tx = optax.chain(optax.adam(rate), trajectory.keep(averages))
  *_, (_, state) = train(tx)
  other_rates[rate] = {
      'last step': state.params,
      'with a decay': train_with_decay(rate).params,
      **trajectory.kept(state.opt_state),
  }
  print('rate', rate)
  show(other_rates[rate])

# %% [markdown]
# After a decay to zero the last checkpoints hardly differ, and there is little to
# gain. The mean of the last five, inside of the run with a decay:

# %%
last_5 = {'mean of its last 5': jaxsoup.running_average(start=1799, every=50)}
state = train_with_decay(RATE, trajectory.keep(last_5))
show({'with a decay': state.params, **trajectory.kept(state.opt_state)})

# %% [markdown]
# With BatchNorm, re-estimate the running statistics of every average with
# `jaxsoup.models.batch_norm.recalibrated`.
