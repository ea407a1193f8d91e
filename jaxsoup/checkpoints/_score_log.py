"""A score log in a file."""

from collections.abc import Iterator
from collections.abc import MutableMapping
import contextlib
import json
import os
import pathlib
import re
from typing import IO
from typing import Any

try:
  import fcntl
except ImportError:  # Windows.
  fcntl = None  # type: ignore[assignment]

from jaxsoup import _json
from jaxsoup import _processes
from jaxsoup._soup import AtMost
from jaxsoup._soup import Score
from jaxsoup.checkpoints import _ingredients
from jaxsoup.typing import Candidate
from jaxsoup.typing import Json
from jaxsoup.typing import PathLike

# What a line begins with.
_SCORES = (b'{"members": ', b'{"alpha": ')
_BEGINNINGS = (*_SCORES, b'{"ingredients": ', b'{"evaluation": ')
# A part of the first line, where the log has no head.
_FIRST_SCORE = re.compile(
    rb'\{"members": \[[\d, ]*(\](, ".{0,100})?)?|\{"alpha": \{(".*)?'
)


class ScoreLog(MutableMapping[Candidate, Score]):
  """Remembered scores, one JSON line each, which make a search resumable.

  Pass it as `scores=` to `jaxsoup.greedy`, `pruned` and `search`. Each score, a
  number or several by name, is written to disk before the search goes on, so
  that a search that was stopped at any point resumes there when it is called
  again. An `AtMost`, of a candidate that was rejected early, is stored as such.
  The first line says to which ingredients and which evaluation the scores
  belong. With several processes the first one reads and writes it.

  Example:
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + '/scores.jsonl'
    >>> ScoreLog(path)[(0, 3)] = 0.91
    >>> dict(ScoreLog(path))
    {(0, 3): 0.91}
  """

  def __init__(
      self,
      path: PathLike,
      ingredients: _ingredients.Ingredients | None = None,
      evaluation: Any = None,
  ):
    """Opens a log, or starts one.

    Args:
      path: a file, which is created with the first score.
      ingredients: `checkpoints.Ingredients`, whose identities are stored in the
        first line and compared when the log is opened again. None compares
        nothing.
      evaluation: what identifies the metric and its data, a string or another
        JSON value such as `{'metric': 'accuracy', 'split': 'validation'}`. It
        is stored and compared in the same way.

    Raises:
      ValueError: an unreadable line; or scores of other ingredients or of
        another evaluation, or of unknown ones.
      TypeError: `evaluation` is not JSON.
    """
    self._path = pathlib.Path(path)
    head: Json = {}
    if ingredients is not None:
      num = len(ingredients)
      head['ingredients'] = [ingredients.identity(k) for k in range(num)]
    if evaluation is not None:
      head['evaluation'] = evaluation
    # Compared as JSON, and alike on all processes.
    self._head = _processes.json_of_main(head)
    self._scores: dict[Candidate, Score] = {}
    if self._path.exists() and not self._path.is_file():
      raise ValueError(
          f'{self._path} is not a file but a directory, a pipe or a device. '
          'Give the path of a file for the scores.'
      )
    content = self._path.read_bytes() if self._path.exists() else b''
    self._read(_processes.from_main(content))

  def __getitem__(self, candidate: Candidate) -> Score:
    return self._scores[candidate]

  def __setitem__(self, candidate: Candidate, score: Score) -> None:
    self._scores[candidate] = score
    if not _processes.is_main():
      return
    # Empty if the writer was stopped in the middle of the first line.
    if not self._path.exists() or not self._path.stat().st_size:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      if self._head:
        self._append(self._head)
    row: Json = (
        {'alpha': dict(candidate)}  # type: ignore[arg-type]
        if _is_alpha(candidate)
        else {'members': list(candidate)}
    )
    if isinstance(score, AtMost):
      self._append({**row, 'at_most': score.bound})
    else:
      self._append({**row, 'score': score})

  def __delitem__(self, candidate: Candidate) -> None:
    raise TypeError(
        'Scores cannot be deleted from a score log. Delete its file.'
    )

  def __iter__(self) -> Iterator[Candidate]:
    return iter(self._scores)

  def __len__(self) -> int:
    return len(self._scores)

  def _append(self, row: Json) -> None:
    line = (json.dumps(_json.sealed(row)) + '\n').encode()
    with self._path.open('ab', buffering=0) as file, _held(file):
      num_written = 0
      try:
        # If there is room for only a part, the second call raises the reason.
        num_written = file.write(line)
        if num_written < len(line):
          num_written += file.write(line[num_written:])
        os.fsync(file.fileno())
      except OSError as e:
        file.truncate(os.fstat(file.fileno()).st_size - num_written)
        raise OSError(
            e.errno,
            f'A score could not be stored: {e.strerror}. Earlier scores are '
            'kept: free some space, and repeat the command to resume.',
            str(self._path),
        ) from e

  def _read(self, content: bytes) -> None:
    lines = content.splitlines(keepends=True)
    # The writer was stopped in the middle of a line: that score is lost.
    cut = lines.pop() if lines and not lines[-1].endswith(b'\n') else b''
    heads = []
    for number, line in enumerate(lines, 1):
      try:
        row = _json.unsealed(dict(_json.parsed(line)))
        if {'ingredients', 'evaluation'} & set(row):
          heads.append(row)
        else:
          self._scores[_candidate_of(row)] = _score_of(row)
      except (
          AttributeError,
          KeyError,
          OverflowError,
          TypeError,
          ValueError,
      ) as e:
        raise ValueError(
            f'{self._path}, line {number} is unreadable: {line[:80]!r}. Delete '
            'that line; its score will be computed again. If this is no log of '
            'scores, give another path: it is left as it is.'
        ) from e
    is_ours = any(begin.startswith(cut[: len(begin)]) for begin in _BEGINNINGS)
    if not lines and cut:  # Nothing else says that the file is a log.
      first = json.dumps(_json.sealed(self._head)).encode()
      is_ours = (
          first.startswith(cut)
          or any(begin.startswith(cut) for begin in _SCORES)
          or bool(_FIRST_SCORE.fullmatch(cut))
      )
    if not is_ours:
      raise ValueError(
          f'{self._path} is no log of scores: it ends with {cut[:80]!r}. It is '
          'left as it is: give another path.'
      )
    if lines:
      for head in heads or [{}]:
        self._check(head)
    if cut and _processes.is_main():
      with self._path.open('rb+') as file, _held(file):
        if file.read().endswith(cut):  # Else somebody has gone on writing.
          file.truncate(file.tell() - len(cut))

  def _check(self, head: Json) -> None:
    """Raises unless the scores in the file belong to this log."""
    then, now = head.get('ingredients'), self._head.get('ingredients')
    if now not in (None, then):
      num_then = len(then) if isinstance(then, list) else 'unknown'
      raise ValueError(
          f'{self._path} holds scores of other ingredients ({num_then} then, '
          f'{len(now)} now, or files changed since). Delete it, or give '
          'another path.'
      )
    then, now = head.get('evaluation'), self._head.get('evaluation')
    if now not in (None, then):
      raise ValueError(
          f'{self._path} holds scores of another evaluation: {then!r} then, '
          f'{now!r} now. Delete it, or give another path.'
      )


def _is_alpha(candidate: Candidate) -> bool:
  return bool(candidate) and isinstance(candidate[0], tuple)


def _candidate_of(row: Json) -> Candidate:
  if 'members' in row:
    return tuple(int(k) for k in row['members'])
  return tuple(
      (group, tuple(map(float, row))) for group, row in row['alpha'].items()
  )


def _score_of(row: Json) -> Score:
  if 'at_most' in row:
    return AtMost(float(row['at_most']))
  if isinstance(row['score'], dict):
    return {name: float(x) for name, x in row['score'].items()}
  return float(row['score'])


@contextlib.contextmanager
def _held(file: IO[bytes]) -> Iterator[None]:
  """Two processes with one log neither mix nor cut off their lines."""
  if fcntl is not None:
    with contextlib.suppress(OSError):  # Where the file system has no locks.
      fcntl.flock(file, fcntl.LOCK_EX)
  yield  # Closing the file ends it.
