"""Images a second that training on a folder of JPEGs can read.

python tests/benchmarks/data.py [--images 768] [--repeats 5]

Files of 500 x 375 pixels at quality 90 are decoded, cropped at random to
224 x 224 and flipped, and come in batches of 32. The limit is PIL itself: the
same function in a loop, without batches. Rates are those after the first
batches, which are read ahead; the best of the repeats, in turns. `start` is the
time to the first batch, with the start of the workers. A core's second is one
of processor time of all processes, the median.

Measured on two cores that little else used; --images 768 --repeats 9:

                        start (s)  images/s  x PIL in a loop  images/s of a core
PIL in a loop                0.00       434             1.00                 409
threads of one process       0.09       823             1.90                 408
1 worker process             0.83       399             0.92                 369
2 worker processes           0.91       756             1.74                 362

PIL can decode at half the size (`Image.draft`), but not files of this size:
224 pixels need more than half. Of 1000 x 750 it changed pixels by up to 7 of
255, so that it is not used.
"""

import argparse
import multiprocessing
import os
import pathlib
import statistics
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


def processor_seconds() -> float:
  """Of this process and its workers."""
  total = time.process_time()
  for worker in multiprocessing.active_children():
    fields = pathlib.Path(f'/proc/{worker.pid}/stat').read_text().split()
    ticks = int(fields[13]) + int(fields[14])
    total += ticks / os.sysconf('SC_CLK_TCK')
  return total


def of_loop(folder: pathlib.Path) -> tuple[float, float, float]:
  """Seconds to the first image; images a second, and a core's second."""
  records = sources.Folder(folder, example_fn).records
  start = time.perf_counter(), time.process_time()
  for row in range(len(records)):
    example_fn(records[row], np.random.default_rng(row))
  seconds = time.perf_counter() - start[0]
  core_seconds = time.process_time() - start[1]
  num = len(records)
  return seconds / num, num / seconds, num / core_seconds


def of_batches(
    folder: pathlib.Path, num_workers: int
) -> tuple[float, float, float]:
  """Seconds to the first batch; rates from the seventh on."""
  source = sources.Folder(folder, example_fn, num_workers=num_workers)
  times, of_cores = [time.perf_counter()], []
  for _ in sources.batches(source, BATCH_SIZE, seed=0):
    times.append(time.perf_counter())
    of_cores.append(processor_seconds())
  num = (len(times) - 7) * BATCH_SIZE
  # Workers end before the last batches are taken.
  half = len(of_cores) // 2
  core_rate = (half - 6) * BATCH_SIZE / (of_cores[half] - of_cores[6])
  return times[1] - times[0], num / (times[-1] - times[6]), core_rate


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--images', type=int, default=768)
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
  limit = max(rate for _, rate, _ in measured['PIL in a loop'])
  print(f'{"":24}start (s)  images/s  x PIL in a loop  images/s of a core')
  for way, figures in measured.items():
    starts, rates, of_cores = zip(*figures)
    core = statistics.median(of_cores)
    print(
        f'{way:24}{min(starts):9.2f}{max(rates):10.0f}'
        f'{max(rates) / limit:17.2f}{core:20.0f}'
    )


if __name__ == '__main__':
  main()
