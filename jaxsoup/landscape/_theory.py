"""Soups against ensembles: pairs of models, and why the two are alike."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import functools
import itertools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsoup import _checked
from jaxsoup import _masks
from jaxsoup import _programs
from jaxsoup import _tree
from jaxsoup import ensembles
from jaxsoup import evaluation
from jaxsoup import metrics
from jaxsoup._recipes import _average
from jaxsoup.landscape import _geometry
from jaxsoup.typing import Batch
from jaxsoup.typing import Batches
from jaxsoup.typing import Leaf
from jaxsoup.typing import LogitsFn
from jaxsoup.typing import MetricFn
from jaxsoup.typing import Params
from jaxsoup.typing import ParamsFn

# Of logits and their batch, `[B]`.
OutputLossFn = Callable[[jax.Array, dict[str, Any]], jax.Array]


class Pair(NamedTuple):
  """Two models, their soup and their ensemble.

  Attributes:
    members: the two ingredients.
    angle: between them at the initialization, in degrees.
    singles: score of each alone.
    soup: score of the mean of their parameters.
    ensemble: score of the mean of their logits.
  """

  members: tuple[int, int]
  angle: float
  singles: tuple[float, float]
  soup: float
  ensemble: float

  @property
  def gain(self) -> float:
    """Score of the soup minus the mean score of the two."""
    return self.soup - float(np.mean(self.singles))


def pairs(
    ingredients: Sequence[Params],
    theta_0: Params,
    logits_fn: LogitsFn,
    batches: Batches,
    *,
    metric: MetricFn = metrics.accuracy,
    members: Iterable[tuple[int, int]] | None = None,
    label: str = 'label',
    prepare_fn: ParamsFn | None = None,
    on_pair: Callable[[Pair], None] | None = None,
) -> list[Pair]:
  """What each pair of models gains, against its angle and its ensemble.

  `gain = score((theta_i + theta_j) / 2) - (score(theta_i) + score(theta_j))/2`.
  Every model and every soup is run once over the data.

  Args:
    ingredients: K pytrees of one structure, or `checkpoints.Ingredients`.
    theta_0: parameters that they were fine-tuned from.
    logits_fn: `logits_fn(params, batch) -> [B, C]`.
    batches: as in `evaluation.logits_of`.
    metric: `metric(logits, labels) -> scalar`, higher is better.
    members: the pairs; by default all, of which there are K (K - 1) / 2.
    label: the key of the labels in a batch.
    prepare_fn: is called with a soup's parameters before it is run: new
      statistics of BatchNorm.
    on_pair: is called after each.

  Returns:
    One `Pair` for each.

  Raises:
    ValueError: no ingredients, they or theta_0 do not fit, a mask is invalid,
      or the order of the examples differs between walks.

  Source: Wortsman et al. 2022, figures 3 and 4.
  """
  num = len(ingredients)
  prepare_fn = prepare_fn or (lambda params: params)
  members = (
      itertools.combinations(range(num), 2) if members is None else members
  )
  both_fn = lambda params, batch: (logits_fn(params, batch), batch[label])
  run = evaluation.logits_of(both_fn, batches)
  score = lambda *both: float(jax.device_get(metric(*both)))
  angles = _geometry.angles(ingredients, theta_0)
  logits, labels = ensembles.collect(ingredients, both_fn, batches)
  singles = list(map(score, logits, labels))
  # One of the two stays in memory for all pairs that it is the first of.
  first = functools.lru_cache(1)(ingredients.__getitem__)
  measured = []
  for i, j in members:
    soup = _average.uniform([first(i), ingredients[j]])
    pair = Pair(
        members=(i, j),
        angle=float(angles[i, j]),
        singles=(singles[i], singles[j]),
        soup=score(*run(prepare_fn(soup.params))),
        ensemble=score((logits[i] + logits[j]) / 2, labels[i]),
    )
    measured.append(pair)
    if on_pair is not None:
      on_pair(pair)
  return measured


class SoupMinusEnsemble(NamedTuple):
  """What `soup_minus_ensemble` returns: means over the examples.

  Attributes:
    approximation: of `soup - ensemble`.
    soup: loss of the soup.
    ensemble: loss of the ensemble.
    curvature: second derivative in t of the loss of the soup.
    variance: that of the loss along the chord of the outputs; of cross-entropy
      `beta^2 E_x Var_Y[df_Y(x)]`.
  """

  approximation: float
  soup: float
  ensemble: float
  curvature: float
  variance: float


def cross_entropy(logits: jax.Array, batch: Batch) -> jax.Array:
  """`-log softmax(logits_j)[label_j]`, `[B]`."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])


def soup_minus_ensemble(
    logits_fn: LogitsFn,
    theta_1: Params,
    theta_2: Params,
    batches: Batches,
    *,
    t: float = 0.5,
    beta: float = 1.0,
    output_loss_fn: OutputLossFn = cross_entropy,
) -> SoupMinusEnsemble:
  """How much worse a soup of two is than their ensemble, from the soup alone.

  ```
  L_soup - L_ens ~ t (1 - t) / 2 (
      -d^2/dt^2 L_soup(t) + beta^2 E_x Var_{Y ~ softmax(beta f(x; theta_t))}
                                                             [df_Y(x)])
  ```

  with `theta_t = (1 - t) theta_1 + t theta_2`, `df = f(theta_2) - f(theta_1)`.

  Where it comes from. For one example let `f_t = beta f(x; theta_t)` be the
  outputs of the soup, seen as a curve in t, and l the loss of outputs. The
  ensemble's outputs lie on the chord of that curve. A chord lies above a
  parabola by t (1 - t) / 2 times its second derivative, so that

    (1) f_ens - f_t ~ t (1 - t) / 2 f_t''.

  To first order in this small vector the losses differ by

    (2) l(f_t) - l(f_ens) ~ -t (1 - t) / 2 <grad l, f_t''>.

  The chain rule gives the second derivative of the soup's loss,

    (3) d^2/dt^2 l(f_t) = <f_t', (hess l) f_t'> + <grad l, f_t''>,

  and with its last term in (2), and `df` for `f_t'`, which the chord equals to
  the same order,

    (4) l(f_t) - l(f_ens) ~ t (1 - t) / 2 (-d^2/dt^2 l(f_t)
                                            + <df, (hess l) df>).

  The last term is again a second derivative: that of the loss along the chord,
  `d^2/ds^2 l(f_t + s df)` at s = 0. So the soup is worse than the ensemble by
  how much more the loss bends in the space of outputs than in that of
  parameters. Of cross-entropy, hess l is the covariance of a one-hot Y drawn
  from softmax(f_t), and the term is beta^2 times a variance.

  Exact where f is quadratic in theta and l linear, and where f is linear in
  theta (then both terms cancel). Else its error at t = 1/2 is of fourth order
  in the distance between the models, while the difference is of second.

  Args:
    logits_fn: `logits_fn(params, batch) -> [B, C]`, twice differentiable in
      forward mode.
    theta_1: parameters at t = 0.
    theta_2: parameters at t = 1.
    batches: as in `evaluation.mean_of`.
    t: coefficient of theta_2, the paper's alpha.
    beta: multiplies the logits.
    output_loss_fn: l: `output_loss_fn(beta * logits, batch) -> [B]`.

  Returns:
    A `SoupMinusEnsemble`. Derivatives are nested forward ones: four times the
    activations of one forward pass, and no more models than three.

  Raises:
    ValueError: the models do not fit, no example, an invalid mask, or a loss
      that is not `[B]`.

  Example:
    >>> batch = {'x': np.eye(2, dtype='f'), 'label': np.array([0, 1])}
    >>> linear = lambda params, batch: batch['x'] @ params
    >>> models = np.diag([1.0, 2.0]), np.diag([3.0, 2.0])
    >>> terms = soup_minus_ensemble(linear, *models, [batch])
    >>> round(terms.curvature, 4), round(terms.variance, 4)
    (0.21, 0.21)

  Source: Wortsman et al. 2022, section 4 and appendix.
  """
  checked = _checked.Checked([theta_1, theta_2])
  models = [checked.replace(checked[k]) for k in range(2)]
  fns, numbers = (logits_fn, output_loss_fn), _tree.numbers([t, beta])
  sums = np.zeros(5)
  for batch in _masks.checked(batches):
    sums += jax.device_get(_sums(*fns, *models, numbers, batch))
  if not sums[-1]:
    raise ValueError('batches have no example: none, or all are masked.')
  soup, ensemble, curvature, variance = map(float, sums[:4] / sums[4])
  approximation = t * (1 - t) / 2 * (variance - curvature)
  return SoupMinusEnsemble(approximation, soup, ensemble, curvature, variance)


@_programs.jit_of(2)
def _sums(
    logits_fn: LogitsFn,
    output_loss_fn: OutputLossFn,
    theta_1: Params,
    theta_2: Params,
    numbers: tuple[jax.Array, jax.Array],
    batch: dict[str, Any],
) -> jax.Array:
  """Of one batch: the four terms, and the weight of its examples, `[5]`."""
  t, beta = numbers
  outputs = lambda s: beta * logits_fn(_between(theta_1, theta_2, s), batch)
  loss = lambda z: output_loss_fn(z, batch)
  first, second, soup = outputs(0 * t), outputs(0 * t + 1), outputs(t)
  terms = jnp.stack(
      [
          loss(soup),
          loss((1 - t) * first + t * second),
          _second_derivative(lambda s: loss(outputs(t + s))),
          _second_derivative(lambda s: loss(soup + s * (second - first))),
      ]
  )
  if terms.shape != (4, soup.shape[0]):
    raise ValueError(
        f'output_loss_fn returned shape {terms.shape[1:]}: expected '
        f'[{soup.shape[0]}], one number per example.'
    )
  weights = _masks.weights_of(batch, terms.shape[1])
  return jnp.append(_masks.weighted_sum(terms, weights), weights.sum())


def _between(theta_1: Params, theta_2: Params, t: jax.Array) -> Params:
  """`theta_1 + t (theta_2 - theta_1)`, in float32: narrow ones do not bend."""

  def move(x: Leaf, y: Leaf) -> Leaf:
    if not _tree.is_float(x):
      return x
    wide = _tree.wide_dtype(x.dtype)
    return x.astype(wide) + t.astype(wide) * (y.astype(wide) - x.astype(wide))

  return jax.tree.map(move, theta_1, theta_2)


def _second_derivative(fn: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """`d^2/ds^2 fn(s)` at s = 0, by jvp of jvp."""
  zero, one = jnp.zeros(()), jnp.ones(())
  slope = lambda s: jax.jvp(fn, (s,), (one,))[1]
  return jax.jvp(slope, (zero,), (one,))[1]
