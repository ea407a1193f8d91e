# %% [markdown]
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxsoup/jaxsoup/blob/main/colabs/01_soup_in_five_minutes.ipynb)
#
# # A model soup in five minutes
#
# Fine-tune a model several times, average the weights: a *model soup* is often
# more accurate and usually more robust than the best of its ingredients, at the
# cost of one model. This notebook takes a minute on a CPU.

# %% tags=["skip-execution"]
# %pip install -q "jaxsoup[demo]"

# %% [markdown]
# ## A soup is a weighted sum of pytrees
#
# `sum_k alpha_k theta_k`: a recipe chooses alpha, and only alpha. The weights
# of a Flax model are a pytree; so is this dict.

# %%
import jax
import numpy as np

import jaxsoup

ingredients = [{'w': np.array([1.0, 2.0])}, {'w': np.array([3.0, 6.0])}]
jaxsoup.uniform(ingredients).params

# %%
jaxsoup.mix(jaxsoup.stack(ingredients), [0.75, 0.25])

# %% [markdown]
# ## Eight fine-tuned models
#
# A small ViT, pre-trained on some handwritten digits; then fine-tuned on
# others, eight times, with other hyper-parameters each time. (That is the short
# version of an experiment that comes with the package. Your own training loop
# is in the next notebook.)

# %%
import operator
import pathlib

from jaxsoup.experiments import configs
from jaxsoup.experiments import finetune
from jaxsoup.experiments import modeling

package = pathlib.Path(jaxsoup.__file__).parent
found = [*package.glob('configs'), *package.parent.glob('configs')]
experiment = configs.load(f'{found[0]}/digits.py:runlocal')
config, runs = experiment.config, experiment.runs
data = experiment.data_fn(config)
model = modeling.of(experiment)

start = model.start_fn(jax.random.key(0))
theta_0 = finetune.train_one(
    model, config.pretrain, start, config.pretrain.run, data.pretrain
)
stacked = jax.device_get(
    finetune.train(model, config.finetune, theta_0, runs, data.train)
)
models = [
    jax.tree.map(operator.itemgetter(k), stacked) for k in range(len(runs))
]
{name: round(value, 4) for name, value in runs[0].items()}

# %% [markdown]
# ## Three soups
#
# `held_out` data choose; `test` data, and shifted test data that nothing was
# trained or selected on, report.

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
# On the test data there is little to gain. On blurred images, which nothing was
# trained or chosen on, soups of many models gain most; greedy, which may keep
# few, stays closer to the best single one.

# %%
for name, soup in soups.items():
  print(f'{name:<8}', np.round(soup.alpha, 2))

# %% [markdown]
# ## What greedy did
#
# It begins with the best model and adds the others one by one; what makes the
# held-out score worse is not added. `soup.info` holds every trial and score.

# %%
import matplotlib.pyplot as plt

from jaxsoup import report

fig, ax = plt.subplots(figsize=(6, 3.2))
report.trials(ax, {'greedy': soups['greedy'].info})

# %% [markdown]
# The whole comparison, with all recipes and the ensembles, is `jaxsoup demo`.
# Of checkpoints that you have: `jaxsoup soup --recipe uniform RUN... --out DIR`.
#
# Next: [your own training loop](02_fine_tune_and_soup.ipynb),
# [many devices and big models](03_sharded_and_streamed.ipynb),
# [why a soup fails](04_why_did_my_soup_fail.ipynb).
