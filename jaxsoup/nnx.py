"""Averages of an nnx model, as an object next to its optimizer.

```
import jaxsoup.nnx

averages = jaxsoup.nnx.Averages(model, {'ema': jaxsoup.running_average(0.999)})
optimizer.update(model, grads)
averages.update(model)
nnx.update(eval_model, averages['ema'])
```
"""

from collections.abc import Mapping

from flax import nnx
import jax

from jaxsoup import _tree
from jaxsoup import trajectory
from jaxsoup._recipes._running import RunningAverage
from jaxsoup.typing import Params


class Averages(nnx.Pytree):
  """Averages of a model that trains, in `nnx.Variable`s.

  For what an optimizer does not see, such as the statistics of BatchNorm; of
  parameters alone, `trajectory.keep` in an `nnx.Optimizer` does the same.
  Saved and restored as the optimizer is, by `nnx.state`.
  """

  def __init__(
      self,
      model: nnx.Module,
      averages: Mapping[str, RunningAverage],
      *,
      wrt: nnx.filterlib.Filter = (nnx.Param, nnx.BatchStat),
  ):
    """Starts with nothing added.

    Args:
      model: whose variables are averaged.
      averages: several lengths and windows at once, by name.
      wrt: which variables, as for an `nnx.Optimizer`.
    """
    self._averages = dict(averages)
    self._wrt = wrt
    params = _tree.pure(nnx.state(model, wrt))
    kept = {name: x.init(params) for name, x in averages.items()}
    self.kept = nnx.data(jax.tree.map(nnx.Variable, trajectory.Kept(kept)))

  def update(self, model: nnx.Module) -> None:
    """Adds the model to each average: to be called after the optimizer's.

    Args:
      model: of the structure that these averages began with.

    Raises:
      ValueError: it has another one.
    """
    params = _tree.pure(nnx.state(model, self._wrt))
    states = _tree.pure(self.kept).averages
    added = {n: x.update(states[n], params) for n, x in self._averages.items()}
    nnx.update(self.kept, nnx.state(trajectory.Kept(added)))

  def __getitem__(self, name: str) -> Params:
    """The state of the averaged model, for `nnx.update(model, ...)`."""
    return trajectory.kept(self.kept)[name]
