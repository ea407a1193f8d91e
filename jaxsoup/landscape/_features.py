"""Whether models see the same in their inputs."""

from collections.abc import Sequence

import jax
import numpy as np

from jaxsoup.typing import ArrayLike


def cka(features: Sequence[ArrayLike]) -> np.ndarray:
  """Linear centered kernel alignment between features of K models.

  `|X_i^T X_j|^2 / (|X_i^T X_i| |X_j^T X_j|)`, Frobenius norms of features with
  mean zero. It is 1 where one is a rotation and rescaling of the other, so that
  permuted hidden units do not matter, as they do to an average.

  Args:
    features: K arrays `[N, D_k]`, of the same N examples: those of a layer, by
      `evaluation.logits_of(features_fn, batches)`.

  Returns:
    `[K, K]`, each from 0 to 1; NaN for features that do not vary.

  Raises:
    ValueError: features that are no matrices, or of different examples.

  Example:
    >>> x = np.array([[1.0, 0], [0, 2], [3, 1], [0, 0]])
    >>> cka([x, 5 - 2 * x[:, ::-1], x[:, :1]]).round(2).tolist()
    [[1.0, 1.0, 0.91], [1.0, 1.0, 0.91], [0.91, 0.91, 1.0]]

  Source: Kornblith et al. 2019, "Similarity of neural network representations
  revisited", equation 4 with linear kernels.
  """
  arrays = [np.asarray(jax.device_get(x), float) for x in features]
  shapes = [x.shape for x in arrays]
  if any(x.ndim != 2 for x in arrays) or len({s[:1] for s in shapes}) != 1:
    raise ValueError(
        f'features have shapes {shapes}: expected [N, D_k] of each model, with '
        'one N, the same examples in the same order.'
    )
  centered = [x - x.mean(0) for x in arrays]
  products = np.array([[_alignment(x, y) for y in centered] for x in centered])
  norms = np.sqrt(np.diagonal(products))
  norms = np.where(norms > 0, norms, np.nan)
  return products / np.outer(norms, norms)


def _alignment(x: np.ndarray, y: np.ndarray) -> float:
  """`|X^T Y|^2 = <X X^T, Y Y^T>`, whichever is smaller."""
  if x.shape[1] * y.shape[1] <= len(x) ** 2:
    return float(np.sum((x.T @ y) ** 2))
  return float(np.sum((x @ x.T) * (y @ y.T)))
