"""The learned soup: mixing coefficients and a temperature by gradient descent.

```
soup = jaxsoup.learned(ingredients, loss_fn, batches, tx=optax.adamw(0.05))
soup.alpha, soup.info.beta
```
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import logging
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax

from jaxsoup import _checked
from jaxsoup import _mixing
from jaxsoup import _tree
from jaxsoup._recipes import _streamed
from jaxsoup._soup import LearnedInfo
from jaxsoup._soup import LearnedPlan
from jaxsoup._soup import Soup
from jaxsoup.typing import AlphaFn
from jaxsoup.typing import GroupFn
from jaxsoup.typing import LossFn
from jaxsoup.typing import Params
from jaxsoup.typing import Path
from jaxsoup.typing import Stacks
from jaxsoup.typing import Tree

ByGroup = _streamed.ByGroup
Variables = _streamed.Variables
_State = tuple[Variables, optax.OptState]


def hyperplane(w: jax.Array) -> jax.Array:
  """Coefficients that sum to one and may be negative, for `learned`.

  `alpha = w + (1 - sum_k w_k) / K`: the projection of w onto the hyperplane.

  Args:
    w: unconstrained, `[K]`.

  Returns:
    alpha, `[K]`.

  Example:
    >>> hyperplane(np.array([2.0, 0.0])).tolist()
    [1.5, -0.5]

  Source: MEHL-Soup, 2024.
  """
  return w + (1 - w.sum()) / w.size


def learned(
    ingredients: Sequence[Params],
    loss_fn: LossFn,
    batches: Iterable[Tree],
    *,
    tx: optax.GradientTransformation,
    num_epochs: int = 5,
    group_fn: GroupFn = _tree.whole,
    stacks: Stacks | None = None,
    alpha_fn: AlphaFn = jax.nn.softmax,
    beta: float | None = None,
    val_batches: Iterable[Tree] | None = None,
    patience: int | None = None,
    memory: Literal['auto', 'resident', 'streamed', 'cached'] = 'auto',
) -> Soup[LearnedInfo]:
  """Learns the mixing coefficients by gradient descent.

  `min over w, beta of sum_j loss(beta f(x_j; sum_k alpha_k theta_k), y_j)` with
  `alpha = alpha_fn(w)`, from w = 0 (with softmax and `hyperplane`: the uniform
  soup) and beta = 1.

  The stack of all ingredients is *resident* in memory, sharded as they are. Or
  they are *streamed*: a step reads and mixes them, runs forward and backward on
  the mixed model, and reads them again for K inner products,
  `dL/dalpha_k = <dL/dtheta, theta_k>`. That is 2 K - 2 reads, the same gradient
  up to rounding, and at most three models at once, whatever K is, as well as
  the activations. Which of the two, and why, the logger `jaxsoup` says before
  the first step, at level INFO.

  Args:
    ingredients: K pytrees of one structure, or `checkpoints.Ingredients`.
    loss_fn: mean loss of a batch, `loss_fn(params, batch, beta) -> scalar`;
      multiplies the logits by beta.
    batches: held-out data: an iterable of pytrees of arrays that can be read
      once per epoch. Batches of equal shapes compile once.
    tx: any optimizer; the paper's authors use `optax.adamw(0.05,
      weight_decay=0.0)`.
    num_epochs: the maximal number of passes over the batches.
    group_fn: the first keys of the path of a leaf: those with the same ones
      share one alpha. `lambda path: path[:1]` learns one for each top-level
      module, `lambda path: path` one for each tensor. By default there is one
      for the whole model.
    stacks: modules whose leaves are stacks of layers, and the axis of the
      layers there: `{'decoder/layers': 0}`. `group_fn` is then asked for each
      layer: `('decoder', 'layers', '3', 'mlp', 'kernel')`.
    alpha_fn: alpha `[K]` from unconstrained w `[K]`: `jax.nn.softmax`,
      `hyperplane`, or your own.
    beta: None learns the temperature from 1; a number keeps it fixed.
    val_batches: a second split of held-out data. With it the coefficients of
      the epoch with the least mean loss there are returned; the start counts.
    patience: stop after this many epochs in a row without a lower loss on
      `val_batches`; 0 and 1 both stop at the first such epoch, as in Keras.
      None never stops early.
    memory: 'resident', 'streamed' or 'auto': resident if the stack and three
      models more fit into two thirds of the free memory, else streamed.
      'cached' streams 16-bit copies in the host's memory (of narrower floats
      exact ones), so that each ingredient is read from its source only twice:
      alpha is that of rounded ingredients, the soup is mixed from exact ones.

  Returns:
    A `Soup` with alpha `[K]` or, with groups, nested dicts of `[K]`; and a
    `LearnedInfo` with the losses, and with beta, which multiplies the logits:
    the prediction does not depend on it.

  Raises:
    ValueError: no or mismatched ingredients, no floats, no batches, a loss that
      is NaN or infinite, patience that is negative or without `val_batches`,
      or another `memory`.
    MemoryError: the stack did not fit after all: pass `memory='streamed'`.
    TypeError: it is called under `jax.jit` or another transformation.

  Example:
    >>> models = [{'w': np.float32(-1)}, {'w': np.float32(3)}]
    >>> loss_fn = lambda params, y, beta: (params['w'] - y) ** 2
    >>> soup = learned(models, loss_fn, [np.float32(0)], tx=optax.adam(0.1),
    ...                num_epochs=100)
    >>> soup.alpha.round(2)
    array([0.75, 0.25], dtype=float32)

  Source: Wortsman et al. 2022, section 3.3 and appendix I.
  """
  if patience is not None and val_batches is None:
    raise ValueError('patience needs val_batches: a second held-out split.')
  if patience is not None and patience < 0:
    raise ValueError(
        f'patience is {patience}: it must be at least 0. None never stops '
        'early.'
    )
  if memory not in ('auto', 'resident', 'streamed', 'cached'):
    raise ValueError(
        f"memory is {memory!r}: it must be 'auto' (resident if that fits, else "
        "streamed), 'resident' (all ingredients stay in memory), 'streamed' "
        "(they are read in each step) or 'cached' (streamed from 16-bit "
        "copies in the host's memory)."
    )
  checked = _checked.Checked(ingredients, stacks)
  first = checked[0]
  _checked.require_floats(checked.layers.paths)
  plan = _streamed.plan(first, len(checked), memory)
  said = plan.memory, plan.reads_per_step, plan.reason
  text = 'learned: %s, %d reads per step; %s.'
  logging.getLogger('jaxsoup').info(text, *said)
  groups = _tree.groups_of(checked.layers.paths, group_fn)
  w = {g: _tree.numbers(np.zeros(len(checked))) for g in groups}
  # A fixed beta is not a variable, or weight decay would move it.
  variables = (w, _tree.numbers(1.0) if beta is None else None)

  def alphas(w: ByGroup) -> ByGroup:
    return {g: alpha_fn(w[g]) for g in w}

  def loss_at(
      floats: list[jax.Array], scale: jax.Array | None, batch: Tree
  ) -> jax.Array:
    scale = jnp.float32(beta) if scale is None else scale
    return loss_fn(checked.replace(floats), batch, scale)

  source = _streamed.Source(checked, first, plan.memory == 'cached')
  shardings = [x.sharding for x in first]
  del first
  start = _on_mesh((variables, jax.jit(tx.init)(variables)), shardings)
  with _out_of_memory(plan):
    model: _streamed.Streamed | Resident
    if plan.memory == 'resident':
      stacked = _mixing.stack_leaves(source)
      model = Resident(stacked, groups, alphas, loss_at)
      del stacked
    else:
      model = _streamed.Streamed(
          source, groups, alphas, loss_at, checked.layers.dtypes, shardings
      )
    del source
    (w, scale), losses, val_losses, best_epoch = _fit(
        model, tx, start, batches, val_batches, num_epochs, patience
    )
  by_group = jax.device_get(jax.jit(alphas)(w))
  alpha = _tree.nest(jax.tree.map(np.asarray, by_group))
  if isinstance(model, _streamed.Streamed) and plan.memory == 'cached':
    model.source = checked  # Not rounded.
  floats = model.mixed(w)
  info = LearnedInfo(
      beta=float(jax.device_get(scale) if beta is None else beta),
      losses=np.array(losses, np.float32),
      val_losses=np.array(val_losses, np.float32),
      best_epoch=best_epoch,
      duplicates=checked.duplicates(),
      plan=plan,
  )
  return Soup(checked.replace(floats), alpha, info)


def _on_mesh(
    state: _State, shardings: Sequence[jax.sharding.Sharding]
) -> _State:
  """As each step places it, or the second one would be compiled again."""
  meshes = [x.mesh for x in shardings if isinstance(x, NamedSharding)]
  if not meshes:
    return state
  return jax.device_put(state, NamedSharding(meshes[0], PartitionSpec()))


@contextlib.contextmanager
def _out_of_memory(plan: LearnedPlan) -> Iterator[None]:
  try:
    yield
  except jax.errors.JaxRuntimeError as e:
    if plan.memory != 'resident' or 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    raise MemoryError(
        'The stack of all ingredients and a step do not fit into memory: pass '
        f"memory='streamed' (--memory streamed), or smaller batches. {e}"
    ) from e


class Resident:
  """From the stack of all ingredients: see `_streamed.Streamed`."""

  def __init__(
      self,
      stacked: list[jax.Array],
      groups: Sequence[Path],
      alphas: _streamed.AlphasFn,
      loss_at: _streamed.LossAt,
  ):
    self._stacked = stacked

    def mixed(w: ByGroup, stacked: list[jax.Array]) -> list[jax.Array]:
      alpha = alphas(w)
      return _mixing.mix_leaves([alpha[g] for g in groups], stacked)

    def loss_of(
        variables: Variables, stacked: list[jax.Array], batch: Tree
    ) -> jax.Array:
      return loss_at(mixed(variables[0], stacked), variables[1], batch)

    self.mix = jax.jit(mixed)
    self.step = jax.jit(jax.value_and_grad(loss_of))
    self.loss = jax.jit(loss_at)

  def mixed(self, w: ByGroup) -> list[jax.Array]:
    return self.mix(w, self._stacked)

  def value_and_grad(
      self, variables: Variables, batch: Tree
  ) -> tuple[jax.Array, Variables]:
    return self.step(variables, self._stacked, batch)


def _fit(
    model: _streamed.Streamed | Resident,
    tx: optax.GradientTransformation,
    state: _State,
    batches: Iterable[Tree],
    val_batches: Iterable[Tree] | None,
    num_epochs: int,
    patience: int | None,
) -> tuple[Variables, list[float], list[float], int]:
  """The best variables, the losses on both splits, and the best epoch."""
  variables, opt_state = state

  @jax.jit
  def updated(
      variables: Variables, opt_state: optax.OptState, gradient: Variables
  ) -> _State:
    updates, opt_state = tx.update(gradient, opt_state, variables)
    return optax.apply_updates(variables, updates), opt_state

  def step(batch: Tree) -> jax.Array:
    nonlocal variables, opt_state
    loss, gradient = model.value_and_grad(variables, batch)
    variables, opt_state = updated(variables, opt_state, gradient)
    return loss

  def validate() -> None:
    if val_batches is not None:
      floats = model.mixed(variables[0])  # Once, for all batches.
      fn = lambda batch: model.loss(floats, variables[1], batch)
      of_batches = _losses(fn, val_batches, 'val_batches')
      val_losses.append(float(np.mean(of_batches)))

  losses: list[float] = []
  val_losses: list[float] = []
  best_epoch, best = 0, variables
  validate()
  for epoch in range(1, num_epochs + 1):
    losses += _losses(step, batches, f'batches, epoch {epoch}')
    validate()
    if not val_losses or val_losses[-1] < val_losses[best_epoch]:
      best_epoch, best = epoch, variables
    elif patience is not None and epoch - best_epoch >= patience:
      break
  return best, losses, val_losses, best_epoch


def _losses(
    step: Callable[[Tree], jax.Array], batches: Iterable[Tree], where: str
) -> list[float]:
  """What each batch yields; raises if that is not finite."""
  losses: list[jax.Array] = []
  for batch in batches:
    losses.append(step(jax.tree.map(_tree.on_device, batch)))
    if len(losses) > 2:  # Batches in flight take memory.
      losses[-3].block_until_ready()
  values = [float(x) for x in jax.device_get(losses)]
  if not values:
    raise ValueError(
        f'There are no batches ({where}). An iterator can be read only once: '
        'pass a list, or an object whose __iter__ starts again.'
    )
  bad = [i for i, x in enumerate(values) if not np.isfinite(x)]
  if bad:
    raise ValueError(
        f'The loss is {values[bad[0]]} at batch {bad[0]} ({where}). Lower the '
        'learning rate of tx (--learning-rate), or check loss_fn on that batch.'
    )
  return values
