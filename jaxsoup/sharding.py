"""Shardings for parameters: the mesh rides on the abstract tree.

```
mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(AxisType.Auto,))
abstract_params = sharding.fsdp(jax.eval_shape(init_params), mesh)
ingredients = checkpoints.Ingredients(run_dirs, abstract_params)
```

`jax.jit` with shardings is what used to be called pjit: nothing here needs
another function.
"""

from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from jaxsoup._soup import Params


def fsdp(abstract_params: Params, mesh: Any, *, axis: str = 'fsdp') -> Params:
  """Shards every leaf along its largest axis that the mesh divides.

  Args:
    abstract_params: a tree of `jax.ShapeDtypeStruct` (from `jax.eval_shape`),
      or of arrays, of which shape and dtype are used.
    mesh: a `jax.sharding.Mesh` with this axis.
    axis: name of the mesh axis.

  Returns:
    A tree of `jax.ShapeDtypeStruct` with a `NamedSharding` each. Leaves that no
    axis divides are replicated.

  Raises:
    ValueError: the mesh has no such axis.

  Example:
    >>> mesh = jax.make_mesh((1,), ('fsdp',))
    >>> w = fsdp({'w': jax.ShapeDtypeStruct((3, 4), 'float32')}, mesh)['w']
    >>> tuple(w.sharding.spec)
    (None, 'fsdp')

  Source: Rajbhandari et al. 2020, "ZeRO", stage 3.
  """
  if axis not in mesh.axis_names:
    raise ValueError(
        f'The mesh has axes {mesh.axis_names}, and none named {axis!r}. Pass '
        'axis=NAME.'
    )
  num_shards = mesh.shape[axis]

  def sharded(leaf):
    fitting = [i for i, n in enumerate(leaf.shape) if n and n % num_shards == 0]
    spec: list[str | None] = [None] * len(leaf.shape)
    if fitting:
      spec[max(fitting, key=lambda i: (leaf.shape[i], i))] = axis
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(sharded, abstract_params)
