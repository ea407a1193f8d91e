"""BatchNorm after an average: its statistics, re-estimated.

```
params = jaxsoup.uniform(ingredients).params
params = batch_norm.recalibrated(nnx.graphdef(model), params, images)
```
"""

from collections.abc import Callable
from collections.abc import Iterable
import operator
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from jaxsoup import _masks
from jaxsoup import _programs
from jaxsoup import _tree
from jaxsoup.typing import Params
from jaxsoup.typing import Tree


def recalibrated(
    graphdef: nnx.GraphDef[Any],
    params: Params,
    images: Iterable[Tree],
    *,
    call: Callable[[Any, Tree], Tree] = operator.call,
) -> Params:
  """Replaces running means and variances with those of some images.

  `mean = E[x],  var = E[(x - mean)^2],  over all images and pixels`

  x is the input of the layer in training mode: the layers before it normalize
  with the statistics of the batch, so deep statistics depend on its size. Use
  the batch size and the augmentation of the training. Dropout is off, because
  it changes the variance that the layers after it see (Li et al. 2019).

  Args:
    graphdef: of a model `[B, ...] -> ...` with layers `nnx.BatchNorm`.
    params: its parameters and running statistics as a nested dict; the state
      of random streams may be left out.
    images: batches `[B, ...]`; only B may differ between them.
    call: (model, batch) -> anything, for models with another call signature;
      a batch may then be any pytree of arrays `[B, ...]`. Compiled once for
      each function. Examples that a `mask` in the batch drops, as in
      `evaluation.mean_of`, or gives weight 0, are left out; others count
      alike.

  Returns:
    A dict like `params`; only the `mean` and `var` of BatchNorm differ.

  Raises:
    ValueError: there is no image, no BatchNorm, params of another structure,
      or an invalid mask.

  Example:
    >>> model = nnx.BatchNorm(1, use_running_average=True, rngs=nnx.Rngs(0))
    >>> graphdef, state = nnx.split(model)
    >>> images = [jnp.array([[1.0], [2.0]]), jnp.array([[3.0], [6.0]])]
    >>> params = recalibrated(graphdef, nnx.to_pure_dict(state), images)
    >>> params['mean'], params['var']
    (Array([3.], dtype=float32), Array([3.5], dtype=float32))

  Source: Izmailov et al. 2018, "Averaging weights leads to wider optima and
  better generalization", section 3.2. Li et al. 2019, "Understanding the
  disharmony between dropout and batch normalization by variance shift".
  """
  num, stats = 0, None
  for i, batch in enumerate(images):
    batch = _masks.kept(batch, f'batch {i}')
    size = jax.tree.leaves(batch)[0].shape[0]
    if not size:
      continue
    of_batch = _of_batch(call, graphdef, params, batch)
    if stats is None:
      stats = of_batch
    else:
      stats = _pooled(
          stats, of_batch, _tree.numbers(size / (num + size), np.float32)
      )
    num += size
  if not stats:
    raise ValueError(
        f'Nothing to estimate: there are {num} images and {len(stats or ())} '
        'statistics. Pass at least one batch, and a model with nnx.BatchNorm.'
    )
  return replaced(params, stats)


@_programs.jit_of(1, static_argnums=0)
def _of_batch(call, graphdef, params, batch):
  """Means and variances of one batch, as a nested dict of BatchNorms alone."""
  model = _merged(graphdef, params)
  # Momentum 0 stores the statistics of this batch as they are.
  model.set_attributes(
      nnx.BatchNorm,
      use_running_average=False,
      momentum=0.0,
      use_fast_variance=False,
      raise_if_not_found=False,
  )
  call(model, batch)
  return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def _merged(graphdef, params):
  """The model with Dropout off; params may lack its random streams."""
  model = nnx.merge(graphdef, dict.fromkeys(range(graphdef.num_leaves)))
  num_streams = len(nnx.to_flat_state(nnx.state(model, nnx.RngState)))
  if len(jax.tree.leaves(params)) + num_streams == graphdef.num_leaves:
    nnx.update(model, params)
  else:
    model = nnx.merge(graphdef, params)
  model.set_attributes(deterministic=True, raise_if_not_found=False)
  return model


@jax.jit
def _pooled(stats, new, share):
  """Statistics of all examples, of which `new` has a share.

  Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise
  algorithm for computing sample variances".
  """
  if 'mean' not in stats:
    return {k: _pooled(stats[k], new[k], share) for k in stats}
  delta = new['mean'] - stats['mean']
  return {
      'mean': stats['mean'] + share * delta,
      'var': (1 - share) * stats['var']
      + share * new['var']
      + share * (1 - share) * jnp.square(delta),
  }


def replaced(params: Params, new: Any) -> Any:
  """`params` with those leaves that the nested dict `new` holds.

  Example:
    >>> replaced({'norm': {'mean': 0, 'scale': 1}}, {'norm': {'mean': 5}})
    {'norm': {'mean': 5, 'scale': 1}}
  """
  if not isinstance(new, dict):
    return new
  return {k: replaced(x, new[k]) if k in new else x for k, x in params.items()}
