"""Test-time shifts of images: what a model meets after it was trained.

```
shifted = shifts.apply(test, 'blur', severity=0.8, seed=0)
```

Every shift is a function of images [N, H, W, C] in 0..1, a severity and a
NumPy generator; the labels stay. They run once, on the host.

Source: the idea, and some of the names, are those of Hendrycks and Dietterich,
"Benchmarking Neural Network Robustness to Common Corruptions", ICLR 2019.
"""

import numpy as np
from scipy import ndimage

from jaxsoup.data.digits import Dataset

Rng = np.random.Generator


def noise(image: np.ndarray, severity: float, rng: Rng) -> np.ndarray:
  """Adds Gaussian noise; severity is its standard deviation."""
  return np.clip(image + severity * rng.standard_normal(image.shape), 0, 1)


def impulse(image: np.ndarray, severity: float, rng: Rng) -> np.ndarray:
  """Makes pixels black or white; severity is the share of such pixels."""
  is_hit = rng.random(image.shape) < severity
  return np.where(is_hit, rng.random(image.shape) < 0.5, image)


def blur(image: np.ndarray, severity: float, rng: Rng) -> np.ndarray:
  """Blurs with a Gaussian; severity is its standard deviation in pixels."""
  del rng
  return ndimage.gaussian_filter(image, (0, severity, severity, 0))


def contrast(image: np.ndarray, severity: float, rng: Rng) -> np.ndarray:
  """Pulls every image to its mean; severity 1 leaves nothing else."""
  del rng
  mean = image.mean(axis=(1, 2), keepdims=True)
  return mean + (1 - severity) * (image - mean)


def fog(image: np.ndarray, severity: float, rng: Rng) -> np.ndarray:
  """Lays a smooth bright veil over the image; severity is its opacity."""
  veil = rng.random((len(image), 2, 2, 1))
  scale = (1, image.shape[1] / 2, image.shape[2] / 2, 1)
  veil = ndimage.zoom(veil, scale, order=1)
  return (1 - severity * veil) * image + severity * veil


def occlusion(image: np.ndarray, severity: float, rng: Rng) -> np.ndarray:
  """Blackens one square at random; severity is its side, a share of H."""
  height, width = image.shape[1:3]
  side = round(severity * height)
  top = rng.integers(0, height - side + 1, (len(image), 1, 1, 1))
  left = rng.integers(0, width - side + 1, (len(image), 1, 1, 1))
  row, column = np.indices((height, width))[:, None, :, :, None]
  is_inside = (row >= top) & (row < top + side)
  is_inside &= (column >= left) & (column < left + side)
  return np.where(is_inside, 0.0, image)


def rotation(image: np.ndarray, severity: float, rng: Rng) -> np.ndarray:
  """Rotates by +severity or -severity degrees, at random."""
  angle = np.radians(severity) * _signs(rng, len(image))
  cos, sin = np.cos(angle), np.sin(angle)
  return _affine(image, np.array([[cos, -sin], [sin, cos]]))


def translation(image: np.ndarray, severity: float, rng: Rng) -> np.ndarray:
  """Moves by severity pixels in a random direction."""
  angle = rng.uniform(0, 2 * np.pi, len(image))
  offset = severity * np.array([np.cos(angle), np.sin(angle)])
  identity = np.broadcast_to(np.eye(2)[:, :, None], (2, 2, len(image)))
  return _affine(image, identity, offset)


def shear(image: np.ndarray, severity: float, rng: Rng) -> np.ndarray:
  """Slants by severity pixels a row, to the left or to the right."""
  slant = severity * _signs(rng, len(image))
  zero, one = np.zeros_like(slant), np.ones_like(slant)
  return _affine(image, np.array([[one, zero], [slant, one]]))


def shrink(image: np.ndarray, severity: float, rng: Rng) -> np.ndarray:
  """Scales the image down by the factor 1 - severity, about its centre."""
  del rng
  factor = np.full(len(image), 1 / (1 - severity))
  zero = np.zeros_like(factor)
  return _affine(image, np.array([[factor, zero], [zero, factor]]))


SHIFTS = {
    shift_fn.__name__: shift_fn
    for shift_fn in (
        noise,
        impulse,
        blur,
        contrast,
        fog,
        occlusion,
        rotation,
        translation,
        shear,
        shrink,
    )
}


def apply(data: Dataset, name: str, severity: float, *, seed: int) -> Dataset:
  """Shifts the images of a data set.

  Args:
    data: `image` [N, H, W, C] in 0..1, `label` [N].
    name: a key of `SHIFTS`.
    severity: 0 leaves the images as they are; its unit is the shift's own.
    seed: decides what is drawn; each name draws from its own stream.

  Returns:
    A data set with new images, float32, and the same labels.

  Raises:
    ValueError: there is no such shift.

  Example:
    >>> data = dict(image=np.ones((2, 8, 8, 1)), label=np.arange(2))
    >>> apply(data, 'contrast', 0.5, seed=0)['image'].shape
    (2, 8, 8, 1)
  """
  if name not in SHIFTS:
    raise ValueError(f'No shift {name!r}: choose from {sorted(SHIFTS)}.')
  rng = np.random.default_rng([seed, *name.encode()])
  image = SHIFTS[name](data['image'], severity, rng)
  return {'image': image.astype(np.float32), 'label': data['label']}


def _signs(rng: Rng, num: int) -> np.ndarray:
  return rng.choice([-1.0, 1.0], num)


def _affine(
    image: np.ndarray,
    matrix: np.ndarray,
    offset: np.ndarray | float = 0.0,
) -> np.ndarray:
  """out(p) = image(matrix (p - centre) + centre - offset), one an image."""
  num, height, width, channels = image.shape
  centre = np.array([height - 1, width - 1])[:, None] / 2
  grid = np.indices((height, width)).reshape(2, -1) - centre
  source = np.einsum('ijn,jp->nip', matrix, grid) + centre
  source = source - np.reshape(np.broadcast_to(offset, (2, num)).T, (num, 2, 1))
  out = np.empty((num, height * width, channels))
  for i in range(num):
    for c in range(channels):
      out[i, :, c] = ndimage.map_coordinates(
          image[i, :, :, c], source[i], order=1
      )
  return out.reshape(image.shape)
