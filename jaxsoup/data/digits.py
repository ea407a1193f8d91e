"""Scikit-learn's handwritten digits: 1,797 real images that a package ships.

```
splits = digits.load(seed=0, sizes=dict(train=600, held_out=400, test=400))
splits['train']['image'].shape  # (600, 8, 8, 1)
```
"""

from collections.abc import Mapping

import numpy as np

from jaxsoup.data import sources

Dataset = dict[str, np.ndarray]

NUM_EXAMPLES = 1797


def load(seed: int, sizes: Mapping[str, int]) -> dict[str, Dataset]:
  """Splits the digits at random into disjoint sets.

  Args:
    seed: decides the split; the same seed and sizes give the same sets.
    sizes: the number of examples of each set, by its name, in order.

  Returns:
    For each name a dict of `image`, float32 [N, 8, 8, 1] in 0..1, and
    `label`, int32 [N] in 0..9.

  Raises:
    ImportError: scikit-learn is not installed.
    ValueError: sizes ask for more examples than there are.

  Example:
    >>> load(0, dict(train=100, test=50))['test']['image'].shape
    (50, 8, 8, 1)

  Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten
  Digits", UCI, 1998; the test part, as `sklearn.datasets.load_digits`.
  """
  full = _read()
  parts = sources.disjoint(len(full['label']), sizes, seed, 'digits')
  return {
      name: {field: values[rows] for field, values in full.items()}
      for name, rows in parts.items()
  }


def _read() -> Dataset:
  try:
    from sklearn import datasets
  except ImportError as error:
    raise ImportError(
        'The digits come with scikit-learn, which is not installed: '
        'pip install "jaxsoup[demo]"'
    ) from error
  bunch = datasets.load_digits()
  return {
      'image': (bunch.images / 16.0).astype(np.float32)[..., None],
      'label': bunch.target.astype(np.int32),
  }
