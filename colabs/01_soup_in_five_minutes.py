# %% [markdown]
# # A model soup in five minutes
#
# Fine-tune a model several times and average the weights. Such a *model soup* is
# often more accurate than the best of its ingredients and usually more robust,
# at the inference cost of one model. This notebook takes a minute on a CPU.

# %% tags=["skip-execution"]
# Installs the clone of jaxsoup that contains this notebook. On Colab, upload
# the clone first, and replace `..` by its path.
# %pip install -q "..[demo]"

# %% [markdown]
# ## A soup is a weighted sum of pytrees
#
# A soup is `sum_k alpha_k theta_k`. Recipes differ only in how they choose alpha.
# The weights of a Flax model are a pytree, and so is this dict.

# %%
import jax
import numpy as np

import jaxsoup

ingredients = [{'w': np.float32([1, 2])}, {'w': np.float32([3, 6])}]
jaxsoup.uniform(ingredients).params

# %%
jaxsoup.mix(jaxsoup.stack(ingredients), [0.75, 0.25])

# %% [markdown]
# ## Eight fine-tuned models
#
# We pre-train a small ViT on handwritten digits, then fine-tune it eight times on
# other digits, with different hyper-parameters each time. (This is the short
# version of an experiment that comes with jaxsoup. The next notebook uses a
# training loop of your own.)

# %%
import operator
import pathlib

from jaxsoup.experiments import architectures
from jaxsoup.experiments import configs
from jaxsoup.train import loop

package = pathlib.Path(jaxsoup.__file__).parent
folders = [*package.glob('configs'), *package.parent.glob('configs')]
experiment = configs.load(f'{folders[0]}/digits.py:runlocal')
config, runs = experiment.config, experiment.runs
data = experiment.data_fn(config)
model = architectures.of(experiment)

start = model.start_fn(jax.random.key(0))
theta_0 = loop.train_one(
    model, config.pretrain, start, config.pretrain.run, data.pretrain
)
stacked = jax.device_get(
    loop.train(model, config.finetune, theta_0, runs, data.train)
)
models = [
    jax.tree.map(operator.itemgetter(k), stacked) for k in range(len(runs))
]
{name: round(value, 4) for name, value in runs[0].items()}

# %% [markdown]
# ## Three soups
#
# We select on the `held_out` data. We report on the `test` data and on shifted
# test data, on which nothing was trained or selected.

# %%
import optax

from jaxsoup import evaluation
from jaxsoup import metrics
from jaxsoup.experiments import cook


def correct(params, batch):
  return metrics.correct(model.logits_fn(params, batch), batch['label'])


def accuracy_on(source):
  batches = evaluation.batched(source.arrays, batch_size=500)
  return evaluation.mean_of(correct, batches)


held_out = accuracy_on(data.held_out)
test = accuracy_on(data.test)
blurred = accuracy_on(data.shifts['blur'])

soups = {
    'uniform': jaxsoup.uniform(models),
    'greedy': jaxsoup.greedy(models, held_out),
    'learned': jaxsoup.learned(
        models,
        cook.loss_fn_of(model.logits_fn),
        evaluation.batched(data.held_out.arrays, 50),
        tx=optax.adamw(0.05, weight_decay=0.0),
    ),
}

# %%
candidates = {'best single': max(models, key=held_out)}
candidates |= {name: soup.params for name, soup in soups.items()}
for name, params in candidates.items():
  print(f'{name:<12} test {test(params):.3f}   blurred {blurred(params):.3f}')

# %% [markdown]
# On the test data there is little to gain. On blurred images, soups of many
# models gain most. The greedy soup may keep only a few models, so it stays closer
# to the best single model.

# %%
for name, soup in soups.items():
  print(f'{name:<8}', np.round(soup.alpha, 2))

# %% [markdown]
# ## What greedy did
#
# It starts with the best model and tries to add the others one by one. A model
# that lowers the held-out score is rejected. `soup.info` has all trials and
# scores.

# %%
import matplotlib.pyplot as plt

from jaxsoup import report

fig, ax = plt.subplots(figsize=(6, 3.2))
report.trials(ax, {'greedy': soups['greedy'].info})

# %% [markdown]
# `jaxsoup demo` runs the whole comparison, with all recipes and ensembles. To
# average checkpoints that you have: `jaxsoup soup uniform RUN... --out DIR`.
#
# Next: [your own training loop](02_fine_tune_and_soup.ipynb),
# [many devices and big models](03_sharded_and_streamed.ipynb),
# [why a soup fails](04_why_did_my_soup_fail.ipynb).
