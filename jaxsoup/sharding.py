"""Shardings for parameters: the abstract tree carries the mesh.

```
mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(AxisType.Auto,))
abstract_params = sharding.fsdp(jax.eval_shape(init_params), mesh)
ingredients = checkpoints.Ingredients(run_dirs, abstract_params)
```

`jax.jit` with shardings replaces pjit: no other function is needed.
"""

from collections.abc import Sequence
import math
import re

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from jaxsoup import _tree
from jaxsoup.typing import Params
from jaxsoup.typing import ShapeDtype


def fsdp(
    abstract_params: Params,
    mesh: jax.sharding.Mesh,
    *,
    axis: str = 'fsdp',
    min_size: int = 2**16,
) -> Params:
  """Shards every large leaf along its largest axis that the mesh divides.

  Args:
    abstract_params: a tree of `jax.ShapeDtypeStruct` (from `jax.eval_shape`),
      or of arrays, of which shape and dtype are used.
    mesh: a `jax.sharding.Mesh` with this axis.
    axis: name of the mesh axis.
    min_size: leaves with fewer numbers are replicated: for biases and norms a
      collective costs more time than sharding saves memory. The matrices of
      most models are larger than the default, 65,536. 0 shards all.

  Returns:
    A tree of `jax.ShapeDtypeStruct` with a `NamedSharding` each. Small leaves,
    and those that no axis divides, are replicated.

  Raises:
    ValueError: the mesh has no such axis.

  Example:
    >>> mesh = jax.make_mesh((1,), ('fsdp',))
    >>> shapes = {'bias': (512,), 'kernel': (256, 512)}
    >>> params = {k: jax.ShapeDtypeStruct(v, 'f4') for k, v in shapes.items()}
    >>> {k: tuple(x.sharding.spec) for k, x in fsdp(params, mesh).items()}
    {'bias': (None,), 'kernel': (None, 'fsdp')}

  Source: Rajbhandari et al. 2020, "ZeRO", stage 3.
  """
  if axis not in mesh.axis_names:
    raise ValueError(
        f'The mesh has no axis {axis!r}, only {mesh.axis_names}. Pass '
        'axis=NAME.'
    )

  def sharded(leaf: ShapeDtype) -> jax.ShapeDtypeStruct:
    fitting = [
        i for i, n in enumerate(leaf.shape) if n and n % mesh.shape[axis] == 0
    ]
    spec: list[str | None] = [None] * len(leaf.shape)
    if fitting and math.prod(leaf.shape) >= min_size:
      spec[max(fitting, key=lambda i: (leaf.shape[i], i))] = axis
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(sharded, abstract_params)


def by_rules(
    abstract_params: Params,
    mesh: jax.sharding.Mesh,
    rules: Sequence[tuple[str, PartitionSpec]],
) -> Params:
  """Shards leaves by their paths: the first rule that matches decides.

  Args:
    abstract_params: as in `fsdp`.
    mesh: a `jax.sharding.Mesh`.
    rules: pairs of a regular expression, looked for anywhere in the leaf's path
      such as 'blocks/mlp/dense_in/kernel', and a `PartitionSpec`. Leaves that
      none matches are replicated.

  Returns:
    A tree of `jax.ShapeDtypeStruct` with a `NamedSharding` each.

  Raises:
    ValueError: a rule does not fit its leaf: names both.

  Example:
    >>> mesh = jax.make_mesh((1,), ('tensor',))
    >>> shapes = {'mlp': {'kernel': jax.ShapeDtypeStruct((3, 4), 'float32')}}
    >>> rules = [('mlp/kernel', PartitionSpec(None, 'tensor'))]
    >>> tuple(by_rules(shapes, mesh, rules)['mlp']['kernel'].sharding.spec)
    (None, 'tensor')
  """

  def sharded(path: _tree.Path, leaf: ShapeDtype) -> jax.ShapeDtypeStruct:
    name = _tree.name_of(path)
    matching = (rule for rule in rules if re.search(rule[0], name))
    pattern, spec = next(matching, ('', PartitionSpec()))
    try:
      sharding = NamedSharding(mesh, spec)
      sharding.shard_shape(leaf.shape)
    except Exception as e:  # Of jax's own kind, where an axis is named twice.
      raise ValueError(
          f'The rule {pattern!r}, {spec}, does not fit leaf {name!r} of shape '
          f'{leaf.shape} on a mesh of {dict(mesh.shape)}: {e}'
      ) from e
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  flat = _tree.flatten_in_place(abstract_params)
  return flat.replace(map(sharded, flat.paths, flat.leaves))
