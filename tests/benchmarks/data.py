"""Images a second that training on a folder of JPEGs can read.

python tests/benchmarks/data.py [--images 384] [--repeats 5]

Files of 500 x 375 pixels at quality 90 are decoded, cropped at random to
224 x 224 and flipped, and come in batches of 32. The limit is PIL itself: the
same function in a loop, without batches. Rates are those after the first
batches, which are read ahead; the best of the repeats, in turns. `start` is the
time to the first batch, with the start of the workers.
"""

import argparse
import pathlib
import tempfile
import time

import numpy as np
from PIL import Image

from jaxsoup.data import sources

SIZE = 224
BATCH_SIZE = 32


def example_fn(record, rng):
  with Image.open(record['image']) as file:
    image = file.convert('RGB')
  share = np.sqrt(rng.uniform(0.08, 1))
  width, height = (int(side * share) for side in image.size)
  left = int(rng.integers(image.width - width + 1))
  top = int(rng.integers(image.height - height + 1))
  box = (left, top, left + width, top + height)
  image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
  if rng.random() < 0.5:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return {'image': np.asarray(image), 'label': np.int32(record['label'])}


def write(folder: pathlib.Path, num: int) -> None:
  """Smooth random images with a little noise: about 100 kB each."""
  rng = np.random.default_rng(0)
  (folder / 'class').mkdir()
  for i in range(num):
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC))
    pixels = np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255)
    image = Image.fromarray(pixels.astype(np.uint8))
    image.save(folder / 'class' / f'{i}.jpg', quality=90)


def of_loop(folder: pathlib.Path) -> tuple[float, float]:
  """Seconds to the first image, images a second."""
  records = sources.Folder(folder, example_fn).records
  start = time.perf_counter()
  for row in range(len(records)):
    example_fn(records[row], np.random.default_rng(row))
  seconds = time.perf_counter() - start
  return seconds / len(records), len(records) / seconds


def of_batches(folder: pathlib.Path, num_workers: int) -> tuple[float, float]:
  """Seconds to the first batch, images a second from the seventh on."""
  source = sources.Folder(folder, example_fn, num_workers=num_workers)
  times = [time.perf_counter()]
  for _ in sources.batches(source, BATCH_SIZE, seed=0):
    times.append(time.perf_counter())
  num = len(times) - 7
  return times[1] - times[0], num * BATCH_SIZE / (times[-1] - times[6])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--images', type=int, default=384)
  parser.add_argument('--repeats', type=int, default=5)
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write(folder, arguments.images)
    ways = {
        'PIL in a loop': lambda: of_loop(folder),
        'threads of one process': lambda: of_batches(folder, 0),
        '1 worker process': lambda: of_batches(folder, 1),
        '2 worker processes': lambda: of_batches(folder, 2),
    }
    measured = {way: [] for way in ways}
    for _ in range(arguments.repeats):
      for way, fn in ways.items():
        measured[way].append(fn())
  best = {way: max(rate for _, rate in x) for way, x in measured.items()}
  print(f'{"":24}start (s)  images/s  x PIL in a loop')
  for way, rate in best.items():
    start = min(seconds for seconds, _ in measured[way])
    ratio = rate / best['PIL in a loop']
    print(f'{way:24}{start:9.2f}{rate:10.0f}{ratio:17.2f}')


if __name__ == '__main__':
  main()
