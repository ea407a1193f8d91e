"""A score log in a file."""

from collections.abc import Iterator
from collections.abc import MutableMapping
import json
import os
import pathlib
from typing import Any

from jaxsoup import _processes
from jaxsoup._soup import AtMost
from jaxsoup._soup import Members


class ScoreLog(MutableMapping):
  """Remembered scores, one JSON line each, which make a search resumable.

  Pass it as `scores=` to `jaxsoup.greedy` and `jaxsoup.pruned`. Each score is
  written to disk before the search goes on, so that a search that was stopped
  at any point resumes there when it is called again. An `AtMost`, of a
  candidate that was rejected early, is stored as such. With several processes
  the first one reads and writes it.

  Example:
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + '/scores.jsonl'
    >>> ScoreLog(path)[(0, 3)] = 0.91
    >>> dict(ScoreLog(path))
    {(0, 3): 0.91}
  """

  def __init__(self, path: Any, ingredients: Any = None):
    """Opens a log, or starts one.

    Args:
      path: a file, which is created with the first score.
      ingredients: `checkpoints.Ingredients`, whose identities are stored with
        the scores and compared when the log is opened again.

    Raises:
      ValueError: an unreadable line; or scores of other ingredients.
    """
    self._path = pathlib.Path(path)
    self._identities = (
        None
        if ingredients is None
        else [ingredients.identity(k) for k in range(len(ingredients))]
    )
    self._scores: dict[Members, float | AtMost] = {}
    content = self._path.read_bytes() if self._path.exists() else b''
    self._read(_processes.from_main(content))

  def __getitem__(self, members: Members) -> float | AtMost:
    return self._scores[members]

  def __setitem__(self, members: Members, score: float | AtMost) -> None:
    self._scores[members] = score
    if not _processes.is_main():
      return
    # Empty if the writer was stopped in the middle of the first line.
    if not self._path.exists() or not self._path.stat().st_size:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      if self._identities is not None:
        self._append({'ingredients': self._identities})
    if isinstance(score, AtMost):
      self._append({'members': list(members), 'at_most': score.bound})
    else:
      self._append({'members': list(members), 'score': score})

  def __delitem__(self, members: Members) -> None:
    raise TypeError(
        'Scores cannot be deleted from a score log. Delete its file.'
    )

  def __iter__(self) -> Iterator[Members]:
    return iter(self._scores)

  def __len__(self) -> int:
    return len(self._scores)

  def _append(self, row: dict[str, Any]) -> None:
    line = (json.dumps(row) + '\n').encode()
    with self._path.open('ab', buffering=0) as file:
      num_written = 0
      try:
        # One call, so that two processes cannot mix their lines. If there is
        # room for only a part, the second call raises the reason.
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
    if lines and not lines[-1].endswith(b'\n'):
      # The writer was stopped in the middle of a line: that score is lost.
      lines.pop()
      if _processes.is_main():
        os.truncate(self._path, sum(map(len, lines)))
    for number, line in enumerate(lines, 1):
      try:
        identities, scores = _parse(line)
      except (KeyError, TypeError, ValueError) as e:
        raise ValueError(
            f'{self._path}, line {number} is unreadable: {line[:80]!r}. Delete '
            'that line; its score will be computed again.'
        ) from e
      if identities is not None:
        self._check_identities(identities)
      self._scores |= scores

  def _check_identities(self, identities: list[str]) -> None:
    if self._identities is not None and identities != self._identities:
      raise ValueError(
          f'{self._path} holds scores of other ingredients '
          f'({len(identities)} then, {len(self._identities)} now, or files '
          'changed since). Delete it, or give another path.'
      )


def _parse(line: bytes) -> tuple[list[str] | None, dict[Members, Any]]:
  """The identities or the score that a line holds."""
  row = json.loads(line)
  if 'ingredients' in row:
    return list(row['ingredients']), {}
  members = tuple(int(k) for k in row['members'])
  if 'at_most' in row:
    return None, {members: AtMost(float(row['at_most']))}
  return None, {members: float(row['score'])}
