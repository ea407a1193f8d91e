"""What a diagnosis says: findings, a verdict, and both as text or JSON."""

from collections.abc import Sequence
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


class Verdict(NamedTuple):
  """What to do.

  Attributes:
    action: 'soup all', 'soup a subset' or 'do not soup'.
    members: the ingredients to average, ascending; for 'do not soup' the single
      model to use instead, if one can be named.
    reason: why, in one sentence.
  """

  action: str
  members: tuple[int, ...]
  reason: str


class Diagnosis(NamedTuple):
  """Findings, the worst first, and a verdict.

  Attributes:
    names: of the ingredients.
    findings: ranked; empty if nothing is wrong.
    verdict: what to do.
    measured: the figures behind it by name: 'norms' of the task vectors [K],
      'distances' [K, K], 'cosines' [K, K] of the task vectors; with data
      'scores' [K], 'barriers' [K, K], 'barriers_to_mean' [K] and more. What was
      not measured is NaN.
  """

  names: tuple[str, ...]
  findings: tuple[Finding, ...]
  verdict: Verdict
  measured: Json

  def as_json(self) -> Json:
    """A dict for `json.dumps`; JSON has no NaN, so those are None."""
    return {
        'names': list(self.names),
        'verdict': {
            **self.verdict._asdict(),
            'names': [self.names[k] for k in self.verdict.members],
        },
        'findings': [
            {**f._asdict(), 'names': [self.names[k] for k in f.ingredients]}
            for f in self.findings
        ],
        'measured': _json.plain(self.measured),
    }

  def as_text(self, width: int = 80) -> str:
    """Lines for a terminal: the verdict, then the findings."""
    fill = lambda text: textwrap.fill(
        text, width, initial_indent='  ', subsequent_indent='  '
    )
    lines = [f'{self.verdict.action.upper()}: {self.verdict.reason}']
    lines = [textwrap.fill(lines[0], width, break_on_hyphens=False)]
    if self.verdict.action == 'soup a subset':
      lines.append(fill(listed(self.names, self.verdict.members, most=99)))
    for i, finding in enumerate(self.findings, 1):
      lines += ['', f'{i}. [{MARKS[finding.severity]}] {finding.title}']
      lines.append(fill(f'Seen: {finding.seen}'))
      lines.append(fill(f'Meaning: {finding.meaning}'))
      lines.append(fill(f'Do: {finding.remedy}'))
    if not self.findings:
      lines += ['', 'No problems found.']
    return '\n'.join(lines)


def ranked(findings: Sequence[Finding]) -> tuple[Finding, ...]:
  """The worst first; among equals, those that leave out the most."""
  key = lambda f: (SEVERITIES.index(f.severity), -len(f.leave_out))
  return tuple(sorted(findings, key=key))


def listed(
    names: Sequence[object], members: Sequence[int], most: int = 6
) -> str:
  """Names in a sentence.

  Example:
    >>> listed(['a', 'b', 'c', 'd'], [0, 2, 3])
    'a, c and d'
    >>> listed(['a', 'b', 'c', 'd'], [0, 1, 2, 3], most=2)
    'a, b and 2 more'
  """
  words = [str(names[k]) for k in members]
  if len(words) > most:
    words = [*words[:most], f'{len(words) - most} more']
  if len(words) < 2:
    return ''.join(words)
  return f'{", ".join(words[:-1])} and {words[-1]}'
