"""Four sets of sentences that people rated, as training data and as shifts.

```
tokenize = text.tokenizer('minilm/tokenizer.json', length=32)
sizes = dict(train=6000, held_out=2000, test=2000)
splits = sentiment.splits('vaderSentiment-0.5.zip', tokenize, sizes, seed=0)
splits.train[np.arange(8)]['input_ids'].shape  # (8, 32)
splits.shifts['amazon']
```

The file comes with `pip download --no-deps --no-binary :all:
vaderSentiment==0.5`. The snippets of movie reviews are those from which SST-2
was made; Amazon reviews, New York Times editorials and tweets are natural
shifts from them.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import html
import io
import pathlib
import re
import tarfile
from typing import Any
import zipfile

import numpy as np

from jaxsoup.data import sources
from jaxsoup.typing import PathLike

Dataset = dict[str, Any]

PIP = 'pip download --no-deps --no-binary :all: vaderSentiment==0.5'

# How the files begin, by our names.
SETS = {
    'movies': 'movieReviewSnippets',
    'amazon': 'amazonReviewSnippets',
    'nyt': 'nytEditorialSnippets',
    'tweets': 'tweets',
}


def load(path: PathLike, *, band: float = 0.5) -> dict[str, Dataset]:
  """Reads the four sets, without the sentences that people rated neutral.

  The ratings are means over ten people or more, from -4 to 4, and a sentence
  whose rating is near 0 is as often neutral as undecided. Without the band of
  0.5 around 0 there are 10,043 sentences of movie reviews (half positive),
  2,943 of Amazon, 2,788 of the New York Times and 3,362 tweets: accuracies on
  them are higher than they would be on everything that people write.

  Args:
    path: what pip downloaded, the `hutto_ICWSM_2014.tar.gz` that is in it, or a
      folder with either, or with the `*_GroundTruth.txt` files.
    band: sentences of `|rating| <= band` are dropped.

  Returns:
    By name (`movies`, `amazon`, `nyt`, `tweets`, where there) a dict of `text`,
    a list of N; `rating`, float32 [N]; `label`, int32 [N], 1 for positive;
    and `review`, int32 [N]: sentences of one review have the same number.

  Raises:
    FileNotFoundError: there are no such files; the message says how to get
      them.
    ValueError: a line is not an id, a rating and a text.

  Source: Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for
  Sentiment Analysis of Social Media Text", ICWSM 2014.
  """
  files = dict(_files(pathlib.Path(path)))
  sets = {}
  for name, prefix in SETS.items():
    file = f'{prefix}_GroundTruth.txt'
    if file in files:
      sets[name] = _parse(files[file], file, band)
  if 'movies' not in sets:
    raise FileNotFoundError(
        f'{path} has no {SETS["movies"]}_GroundTruth.txt: download it with '
        f'`{PIP}`, and pass the path of the file that pip saved.'
    )
  return sets


def splits(
    path: PathLike,
    tokenize: Callable[[Sequence[str]], Mapping[str, np.ndarray]],
    sizes: Mapping[str, int],
    seed: int,
) -> sources.Splits:
  """Movie reviews to train, select and test on; the other sets as shifts.

  Duplicate texts count once, also where two kinds have the same: it is in the
  first of them. Sentences of one review are never in two sets.
  The ids of the movie snippets do not name their review: two of one film may be
  in different sets.

  Args:
    path: see `load`.
    tokenize: texts to arrays [N, ...], such as a `text.tokenizer`.
    sizes: numbers of examples of `train`, `held_out` and `test`.
    seed: decides the split; the shifts are whole, whatever it is.

  Returns:
    Sources of what `tokenize` gives, and `label`, int32 [N].

  Raises:
    FileNotFoundError: see `load`.
    ValueError: sizes ask for more examples than there are.
  """
  seen: set[str] = set()
  data = {name: unique(x, seen) for name, x in load(path).items()}
  movies = data.pop('movies')
  parts = split(movies['review'], sizes, seed)

  def source_fn(data, rows):
    texts = [data['text'][i] for i in rows]
    label = data['label'][rows]
    return sources.Arrays({**tokenize(texts), 'label': label})

  return sources.Splits(
      **{name: source_fn(movies, rows) for name, rows in parts.items()},
      shifts={
          name: source_fn(x, np.arange(len(x['text'])))
          for name, x in data.items()
      },
      labels=('negative', 'positive'),
  )


def unique(data: Dataset, seen: set[str] | None = None) -> Dataset:
  """Keeps the first of texts that are equal up to case and punctuation.

  Args:
    data: `text`, a list of N, and arrays [N, ...].
    seen: texts that are left out, as this function compares them; those that
      are kept are added.

  Returns:
    The same fields.

  Example:
    >>> unique({'text': ['Wow!', 'no', 'wow'], 'label': np.array([1, 0, 1])})
    {'text': ['Wow!', 'no'], 'label': array([1, 0])}
  """
  seen = set() if seen is None else seen
  rows = []
  for i, text in enumerate(data['text']):
    # A text without words, as ':)', stands for itself.
    key = re.sub(r'\W+', ' ', text.lower()).strip() or text
    if key not in seen:
      seen.add(key)
      rows.append(i)
  return {
      name: [x[i] for i in rows] if isinstance(x, list) else x[rows]
      for name, x in data.items()
  }


def split(
    group: np.ndarray, sizes: Mapping[str, int], seed: int
) -> dict[str, np.ndarray]:
  """Draws disjoint sets of rows; no group is in two sets.

  Args:
    group: int [N].
    sizes: number of rows of each set, by its name.
    seed: decides the split.

  Returns:
    For each name its rows. What a set leaves of its last group is not used.

  Raises:
    ValueError: more rows are requested than there are, or than are left.

  Example:
    >>> parts = split(np.array([0, 0, 0, 1, 1, 2]), dict(a=2, b=1), seed=0)
    >>> [len(rows) for rows in parts.values()]
    [2, 1]
  """
  _, group = np.unique(group, return_inverse=True)
  rng = np.random.default_rng(seed)
  rank = rng.permutation(len(group))[group]
  order = np.lexsort((rng.permutation(len(group)), rank))
  parts, start = {}, 0
  for name, size in sizes.items():
    rows = order[start : start + size]
    if len(rows) < size:
      raise ValueError(
          f'sizes {dict(sizes)} ask for {sum(sizes.values())} of {len(group)} '
          f'examples, but only {len(rows)} of {size} are left for {name}: make '
          'a set smaller.'
      )
    start += size
    while start < len(order) and size and rank[order[start]] == rank[rows[-1]]:
      start += 1
    parts[name] = rows
  return parts


def _parse(content: bytes, file: str, band: float) -> Dataset:
  """Reads lines of an id, a rating and a text, with tabs between them."""
  rows = []
  for i, line in enumerate(content.decode().splitlines(), start=1):
    try:
      name, mean, text = line.split('\t')
      rows.append((int(name.split('_')[0]), float(mean), html.unescape(text)))
    except ValueError as error:
      raise ValueError(
          f'{file}, line {i}: {line[:60]!r} is not an id, a rating and a text '
          f'separated by tabs: download the file again with `{PIP}`.'
      ) from error
  rows = [row for row in rows if abs(row[1]) > band]
  rating = np.array([row[1] for row in rows], np.float32)
  return {
      'text': [row[2] for row in rows],
      'rating': rating,
      'label': (rating > 0).astype(np.int32),
      'review': np.array([row[0] for row in rows], np.int32),
  }


def _files(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
  """Names and contents of the rated files, out of folders and archives."""
  if not path.exists():
    raise FileNotFoundError(
        f'{path} does not exist: download it with `{PIP}`, and pass the path '
        'of the file that pip saved.'
    )
  is_folder = path.is_dir()
  for file in sorted(path.rglob('*')) if is_folder else [path]:
    if not is_folder or (file.is_file() and _is_wanted(file.name)):
      yield from _unpacked(file.name, file.read_bytes())


def _is_wanted(name: str) -> bool:
  base = name.rpartition('/')[2]
  is_archive = base.endswith(('.zip', '.tar.gz', '.tgz', '.tar'))
  is_ours = base.startswith(('hutto_ICWSM', 'vaderSentiment', 'vadersentiment'))
  return base.endswith('_GroundTruth.txt') or (is_archive and is_ours)


def _unpacked(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
  """Goes down into archives in archives, in memory: they are small."""
  file = io.BytesIO(content)
  if name.endswith('_GroundTruth.txt'):
    yield name.rpartition('/')[2], content
  elif zipfile.is_zipfile(file):
    with zipfile.ZipFile(file) as archive:
      for inner in filter(_is_wanted, archive.namelist()):
        yield from _unpacked(inner, archive.read(inner))
  elif tarfile.is_tarfile(file):
    file.seek(0)
    with tarfile.open(fileobj=file) as tar:
      for member in tar:
        extracted = _is_wanted(member.name) and tar.extractfile(member)
        if extracted:
          yield from _unpacked(member.name, extracted.read())
