"""What a diagnosis says: findings, a verdict, and both as text or JSON."""

from collections.abc import Sequence
import math
import textwrap
from typing import NamedTuple

from jaxsoup import _json
from jaxsoup.typing import Json

SEVERITIES = ('error', 'warning', 'note')
MARKS = {'error': 'BREAKS THE SOUP', 'warning': 'WARNING', 'note': 'NOTE'}


class Finding(NamedTuple):
  """One thing that is wrong, or worth knowing.

  Attributes:
    severity: 'error' breaks the soup, 'warning' may lower its score, 'note' is
      good to know.
    code: a short name, for programs.
    title: what it is, for readers.
    seen: what was seen, with the figures.
    meaning: what that means for a soup.
    remedy: what to do.
    ingredients: which ingredients it is about; empty is all.
    leaves: which leaves it is about; empty is all.
    leave_out: ingredients that should not go into a soup.
    cost: how far it lowers the score of an average of two, or of the soup; NaN
      where that was not measured.
  """

  severity: str
  code: str
  title: str
  seen: str
  meaning: str
  remedy: str
  ingredients: tuple[int, ...] = ()
  leaves: tuple[str, ...] = ()
  leave_out: tuple[int, ...] = ()
  cost: float = math.nan


class Verdict(NamedTuple):
  """What to do.

  Attributes:
    action: 'soup all', 'soup a subset', 'do not soup', or 'cannot tell': the
      soup is a little below the best model, and the examples are too few.
    members: the ingredients to average, ascending, also where it cannot be
      told; for 'do not soup' the single model to use instead, if there is one.
    reason: why, in one sentence or two.
    command: what to type, or the call in Python.
  """

  action: str
  members: tuple[int, ...]
  reason: str
  command: str = ''


class Diagnosis(NamedTuple):
  """Findings, the worst first, and a verdict.

  Attributes:
    names: of the ingredients.
    findings: ranked; empty if nothing is wrong.
    verdict: what to do.
    measured: the figures behind it by name: 'norms' of the task vectors [K],
      'distances' [K, K], 'cosines' [K, K] of the task vectors; with data
      'scores' [K], 'barriers' [K, K], 'gain' (of the soup over the best model,
      with its interval) and more. What was not measured is NaN.
    untested: checks that could not be made, and what they need.
  """

  names: tuple[str, ...]
  findings: tuple[Finding, ...]
  verdict: Verdict
  measured: Json
  untested: tuple[str, ...] = ()

  def as_json(self) -> Json:
    """A dict for `json.dumps`; JSON has no NaN, so those are None."""
    named = lambda part, members: {
        **part._asdict(),
        'names': [self.names[k] for k in members],
    }
    return _json.plain(
        {
            **self._asdict(),
            'verdict': named(self.verdict, self.verdict.members),
            'findings': [named(f, f.ingredients) for f in self.findings],
        }
    )

  def as_text(self, width: int = 80) -> str:
    """Lines for a terminal: the verdict, then the findings."""
    fill = lambda text: textwrap.fill(
        text, width, initial_indent='  ', subsequent_indent='  '
    )
    lines = [f'{self.verdict.action.upper()}: {self.verdict.reason}']
    lines = [textwrap.fill(lines[0], width, break_on_hyphens=False)]
    for i, finding in enumerate(self.findings, 1):
      lines += ['', f'{i}. [{MARKS[finding.severity]}] {finding.title}']
      lines.append(fill(f'Seen: {finding.seen}'))
      lines.append(fill(f'Meaning: {finding.meaning}'))
      lines.append(fill(f'Do: {finding.remedy}'))
    if not self.findings:
      lines += ['', 'No problems found.']
    for text in self.untested:
      lines += ['', fill(f'Not tested: {text}')[2:]]
    lines += ['', self.verdict.command]
    return '\n'.join(lines)


def ranked(findings: Sequence[Finding]) -> tuple[Finding, ...]:
  """The worst first: by severity; facts that were not scored, then costs."""
  cost = lambda f: -math.inf if math.isnan(f.cost) else -f.cost
  key = lambda f: (SEVERITIES.index(f.severity), cost(f))
  return tuple(sorted(findings, key=key))


def listed(words: Sequence[object], most: int = 6) -> str:
  """Words in a sentence.

  Example:
    >>> listed(['a', 'c', 'd'])
    'a, c and d'
    >>> listed(['a', 'b', 'c', 'd'], most=2)
    'a, b and 2 more'
  """
  shown = [str(word) for word in words]
  if len(shown) > most:
    shown = [*shown[:most], f'{len(shown) - most} more']
  return ' and '.join(filter(None, [', '.join(shown[:-1]), *shown[-1:]]))
