"""One of several processes: runs the recipes, and prints what it results.

python tests/_distributed_worker.py FOLDER PORT NUM_PROCESSES PROCESS
"""

import functools
import json
import os
import pathlib
import shlex
import sys

import _xla

folder = pathlib.Path(sys.argv[1])
port, num_processes, process = map(int, sys.argv[2:])
num_local = 4 // num_processes
os.environ['XLA_FLAGS'] = _xla.flags(num_local)
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax

if num_processes > 1:
  jax.distributed.initialize(f'127.0.0.1:{port}', num_processes, process)

from flax import nnx
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax

import jaxsoup
from jaxsoup import _memory
from jaxsoup import checkpoints
from jaxsoup import ensembles
from jaxsoup import evaluation
from jaxsoup import landscape
from jaxsoup import metrics
from jaxsoup import scoring
from jaxsoup import sharding
from jaxsoup.models import batch_norm

assert jax.device_count() == 4 and jax.process_count() == num_processes
mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(AxisType.Auto,))
shapes = {
    'w': jax.ShapeDtypeStruct((16, 8), np.float32),
    'columns': jax.ShapeDtypeStruct((3, 8), np.float32),
    'b': jax.ShapeDtypeStruct((3,), np.float32),
    'bias': jax.ShapeDtypeStruct((8,), np.float32),
}
abstract = sharding.fsdp(shapes, mesh, min_size=0)
runs = sorted((folder / 'runs').iterdir())
ingredients = checkpoints.Ingredients(runs, abstract)

rng = np.random.default_rng(0)
data = {
    'x': rng.normal(size=(50, 16)).astype(np.float32),
    'label': rng.integers(0, 8, 50),
}
batches = evaluation.batched(
    data, 18, sharding=NamedSharding(mesh, PartitionSpec('fsdp'))
)


def logits_fn(params, batch):
  return batch['x'] @ params['w'] + params['columns'].sum(0) + params['bias']


def correct(params, batch):
  return logits_fn(params, batch).argmax(-1) == batch['label']


def loss_fn(params, batch, beta):
  return optax.softmax_cross_entropy_with_integer_labels(
      beta * logits_fn(params, batch), batch['label']
  ).mean()


learn = functools.partial(
    jaxsoup.learned,
    ingredients,
    loss_fn,
    batches[:2],
    tx=optax.adam(0.1),
    num_epochs=3,
)
log = checkpoints.ScoreLog(folder / 'scores.jsonl', ingredients)
eval_fn = evaluation.mean_of(correct, batches)
soups = {
    'uniform': jaxsoup.uniform(ingredients),
    'greedy': jaxsoup.greedy(ingredients, eval_fn, scores=log),
    'learned': learn(),
    'streamed': learn(memory='streamed'),
    'cached': learn(memory='cached'),
    'searched': jaxsoup.search(ingredients, eval_fn, num_evaluations=12),
}
# Weights, of which some are 0, and rows that are brought to all processes.
weighted = evaluation.batched(
    {**data, 'mask': rng.random(50, np.float32) * (np.arange(50) % 3)},
    18,
    sharding=NamedSharding(mesh, PartitionSpec('fsdp')),
)
params = soups['uniform'].params
run = evaluation.logits_of(logits_fn, weighted)
norm_graph, norm = nnx.split(nnx.BatchNorm(16, rngs=nnx.Rngs(0)))
statistics = batch_norm.recalibrated(
    norm_graph,
    nnx.to_pure_dict(norm),
    weighted,
    call=lambda norm, batch: norm(batch['x']),
)
weighted_results = [
    evaluation.mean_of(correct, weighted)(params),
    evaluation.score_of(metrics.matthews, logits_fn, weighted)(params),
    *(float(np.abs(run(params)).sum()) for _ in range(2)),
    *np.asarray(statistics['var'], float).tolist(),
]
# Equal sums, as of a copy: compared without bringing them to one host.
copies = [ingredients[k] for k in (0, 1, 0)]
results = {'scores': {str(k): repr(v) for k, v in log.items()}}
results['weighted'] = weighted_results
logits = ensembles.collect(ingredients, logits_fn, batches)
ensemble = ensembles.greedy(
    logits, lambda x: metrics.accuracy(x, data['label'])
)
results['ensemble'] = [*ensemble.alpha.tolist(), float(ensemble.logits.sum())]
results['duplicates'] = jaxsoup.greedy(copies, eval_fn).info.duplicates

# The main process runs the command, on what all have written.
count = shlex.quote(str(folder / 'count'))
by_command = scoring.from_command(
    f'test -d {{path}} && echo x >> {count} && wc -l < {count}',
    ingredients,
    scratch=folder / 'scratch',
)
results['command'] = [
    by_command(soups[name].params) for name in list(soups)[:2]
]

# The first process could hold all models, the other only one or two.
_memory.free_bytes = lambda device: 10**9 if process == 0 else 2000
soups['undecided'] = learn()
results['memory'] = soups['undecided'].info.plan.memory
results['distances'] = landscape.distances(ingredients).tolist()
for name, soup in soups.items():
  for suffix in ('', '.safetensors'):
    path = folder / f'{name}{suffix}'
    checkpoints.save(path, soup, ingredients=ingredients)
  again = checkpoints.load(folder / name, abstract).params
  same = jax.jit(
      lambda a, b: jnp.stack(
          [(x == y).all() for x, y in zip(*map(jax.tree.leaves, (a, b)))]
      ).all(),
  )(soup.params, again)
  results[name] = {
      'alpha': np.asarray(soup.alpha).tolist(),
      'is_restored': bool(same),
      'hash': checkpoints.provenance(folder / name)['content_hash'],
  }
print(json.dumps(results))
