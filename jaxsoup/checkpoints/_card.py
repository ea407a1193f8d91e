"""The model card of a soup, in the form of the Hugging Face hub."""

from collections.abc import Sequence
import json
import pathlib
import re
import shlex
import sys

import jax
import numpy as np

from jaxsoup._soup import Info
from jaxsoup._soup import Soup
from jaxsoup.typing import Config

_CARD = """\
---
base_model:
{base_models}
base_model_relation: merge
tags:
- model-soup
---

# {name}

A model soup: the average of the parameters of {num} models that were fine-tuned
from one initialization, each weighted by its alpha. Recipe: {recipe}.

{table}
{notes}
Made with jaxsoup {version}:

```
{command}
```

`soup.json` holds the hashes of the models, all scores and the versions.
Wortsman et al., [Model soups](https://arxiv.org/abs/2203.05482), 2022.
"""


def text(
    name: str, ingredients: Sequence[str], soup: Soup[Info], metadata: Config
) -> str:
  """The content of README.md: front matter in YAML, and a page in Markdown."""
  import jaxsoup

  return _CARD.format(
      # JSON strings are YAML strings.
      base_models='\n'.join(f'- {json.dumps(n)}' for n in ingredients),
      name=_escaped(name),
      num=len(ingredients),
      recipe=metadata.get('recipe') or 'given alpha',
      table=_table(ingredients, soup),
      notes=_notes(soup),
      version=jaxsoup.__version__,
      command=shlex.join(command()),
  )


def command() -> list[str]:
  """The command of this process, as it may be stored and published.

  Of other programs than ours only the name: their arguments may hold secrets.
  Of addresses a user and a password are left out.
  """
  path = pathlib.Path(sys.argv[0])
  module = path.with_suffix('').parts[-3:]
  words = [path.name]
  if module[:-1] in (('jaxsoup', 'experiments'), ('jaxsoup', 'paper')):
    words = ['python', '-m', '.'.join(module)]
  elif path.name != 'jaxsoup':
    return words
  return words + [re.sub(r'//[^/@\s]*@', '//', x) for x in sys.argv[1:]]


def _escaped(name: str) -> str:
  """Text that Markdown and HTML show as it is, on one line."""
  return re.sub(r'[^\w ./-]', lambda m: f'&#{ord(m[0])};', name)


def _table(ingredients: Sequence[str], soup: Soup[Info]) -> str:
  alpha = np.mean(jax.tree.leaves(jax.device_get(soup.alpha)), axis=0)
  scores = getattr(soup.info, 'scores', {})
  head = ['model', 'alpha'] + (['held-out score'] if scores else [])
  rows = [head, ['---'] * len(head)]
  for k, name in enumerate(ingredients):
    score = scores.get((k,))
    known = [f'{score:.4f}' if score is not None else ''] if scores else []
    shown = f'<code>{_escaped(name)}</code>'
    rows.append([shown, f'{alpha[k]:.4f}', *known])
  return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def _notes(soup: Soup[Info]) -> str:
  notes = []
  if isinstance(soup.alpha, dict):
    notes.append('Alpha differs between tensors; the table shows the mean.\n')
  score = getattr(soup.info, 'score', None)
  if score is not None:
    notes.append(f'Held-out score of the soup: {score:.4f}.\n')
  return ''.join(f'{note}\n' for note in notes)
