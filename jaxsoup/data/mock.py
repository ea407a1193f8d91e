"""Small folders of random images, to try an experiment without its data.

```
path = mock.folders(
    tempfile.mkdtemp(), {'train': ['cat', 'dog'], 'test': ['cat', 'dog']}
)
```
"""

from collections.abc import Mapping
from collections.abc import Sequence
import pathlib

import numpy as np

from jaxsoup.typing import PathLike


def folders(
    root: PathLike,
    sets: Mapping[str, Sequence[str]],
    *,
    num_images: int = 4,
    size: int = 40,
    seed: int = 0,
) -> dict[str, str]:
  """Writes sets of images, each with one folder a class.

  An image is the pattern of its class, the same in all sets, plus noise, so
  that there is something to learn.

  Args:
    root: a folder, made where it is not there.
    sets: names of the classes, by the name of a set.
    num_images: of each class in each set.
    size: height and width, a multiple of 4.
    seed: of patterns and noise.

  Returns:
    The folder of each set, by its name.

  Example:
    >>> import tempfile
    >>> path = folders(tempfile.mkdtemp(), {'test': ['cat']}, num_images=1)
    >>> [file.name for file in pathlib.Path(path['test']).glob('cat/*')]
    ['0.png']
  """
  from PIL import Image

  for set_name, classes in sets.items():
    for class_name in classes:
      folder = pathlib.Path(root, set_name, class_name)
      folder.mkdir(parents=True, exist_ok=True)
      pattern_rng = np.random.default_rng([seed, *class_name.encode()])
      pattern = pattern_rng.integers(40, 216, (4, 4, 3))
      pattern = pattern.repeat(size // 4, 0).repeat(size // 4, 1)
      rng = np.random.default_rng([seed, *f'{set_name}/{class_name}'.encode()])
      for i in range(num_images):
        noise = rng.integers(-40, 40, pattern.shape)
        image = Image.fromarray((pattern + noise).astype(np.uint8))
        image.save(folder / f'{i}.png')
  return {name: str(pathlib.Path(root, name)) for name in sets}
