"""Interpolation between two models (WiSE-FT), and beyond them.

```
curve = jaxsoup.interpolate(theta_0, theta_1, jnp.linspace(0, 1, 11))
accuracies = jax.vmap(accuracy)(curve.params)
```
"""

import jax.numpy as jnp
import numpy as np

from jaxsoup import _checked
from jaxsoup import _mixing
from jaxsoup import _tree
from jaxsoup._soup import AverageInfo
from jaxsoup._soup import Soup
from jaxsoup.typing import ArrayLike
from jaxsoup.typing import Params


def interpolate(
    theta_0: Params, theta_1: Params, t: ArrayLike
) -> Soup[AverageInfo]:
  """Interpolates linearly between two models.

  `theta(t) = (1 - t) theta_0 + t theta_1`. With theta_0 the zero-shot or
  pre-trained model and theta_1 the fine-tuned one (or a soup), this is WiSE-FT.

  Args:
    theta_0: parameters at t = 0.
    theta_1: parameters at t = 1, of the same structure.
    t: a number, or `[T]` for a whole curve at once. Values below 0 or above 1
      extrapolate.

  Returns:
    A `Soup` with alpha `[2]`, the coefficients of theta_0 and theta_1; or, for
    a curve, with alpha `[T, 2]` and a leading axis T on every leaf.

  Raises:
    ValueError: the two do not fit (see `check_compatible`), or t is not a
      finite number or vector.

  Example:
    >>> interpolate({'w': 0.0}, {'w': 2.0}, np.array([0, 0.25, 1.5])).params
    {'w': Array([0. , 0.5, 3. ], dtype=float32)}

  Source: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models".
  """
  t = _tree.on_host(t).astype(_tree.widest_float())
  is_traced = _tree.is_traced(t)
  if t.ndim > 1 or not (is_traced or np.isfinite(t).all()):
    raise ValueError(
        f't has shape {t.shape} and values {t}: expected a finite number '
        'or a vector of finite numbers.'
    )
  checked = _checked.Checked([theta_0, theta_1])
  stacked = _mixing.stack_leaves(checked)
  alpha = (jnp if is_traced else np).stack([1 - t, t], axis=-1)
  floats = _mixing.mix_many(_tree.on_device(alpha), stacked)
  if t.ndim:
    params = _mixing.with_rows(checked.template, floats, len(t))
  else:
    params = checked.replace(floats)
  return Soup(params, alpha, AverageInfo(checked.duplicates()))
