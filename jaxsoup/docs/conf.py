"""How sphinx makes pages of the guides and of the docstrings.

sphinx-build -W -q jaxsoup/docs build/docs
"""

import re

import jaxsoup

project = 'jaxsoup'
copyright = 'the jaxsoup authors, Apache-2.0'
release = version = jaxsoup.__version__

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
html_theme = 'furo'
html_title = f'jaxsoup {version}'
html_show_sphinx = False
html_copy_source = False
html_static_path = ['_static']
html_css_files = ['tables.css']
# Without headings of their own, as the titles of pages in the sidebar suffice.
toc_object_entries_show_parents = 'hide'
myst_heading_anchors = 3
myst_enable_extensions = ['deflist']

default_role = 'code'
autoclass_content = 'both'  # Arguments of classes are those of `__init__`.
autodoc_member_order = 'bysource'
autodoc_preserve_defaults = True
autodoc_default_options = {'members': True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 78
napoleon_use_ivar = True
napoleon_attr_annotations = False  # The signature has them.

_FENCE = re.compile(r'^( *)```\w*\n(.*?)\n *```$', re.DOTALL | re.MULTILINE)
_TABLE = re.compile(r'^((?: *\|.*\|\n)+)', re.MULTILINE)
_CODE = re.compile(r'(?<!`)`([^`]+)`(?!`)(\w?)')
# Here napoleon takes what is before a colon for a type.
_RETURNS = re.compile(r'^((?:Returns|Yields):\n +)', re.MULTILINE)
_OBJECT = re.compile(r'[A-Za-z_][\w.]*')


def _block(indent: str, text: str) -> str:
  lines = '\n'.join(f'  {line}'.rstrip() for line in text.splitlines())
  return f'{indent}::\n\n{lines}\n'


def _table(text: str) -> str:
  lines = [line.strip(' |').split(' | ') for line in text.splitlines()]
  rows = [','.join(f'"{cell}"' for cell in line) for line in lines]
  body = '\n'.join(f'  {row}' for row in rows[2:])  # Below the rule.
  return f'.. csv-table::\n  :header: {rows[0]}\n\n{body}\n'


def _inline(match: re.Match) -> str:
  """`code`, which links where it names something of ours."""
  text = ' '.join(match[1].split())
  code = f':py:obj:`{text}`' if _OBJECT.fullmatch(text) else f'``{text}``'
  return rf'{code}\ {match[2]}' if match[2] else code


def rst_of(text: str) -> str:
  """A docstring, which has code as Markdown has, for sphinx.

  Args:
    text: sections as of Google, fences and tables of Markdown, `code`.

  Returns:
    The same, code as reStructuredText has it.

  Example:
    >>> rst_of('Adds `a b`, see `mix`.')
    'Adds ``a b``, see :py:obj:`mix`.'
  """
  text = _FENCE.sub(lambda m: _block(m[1], m[2]), text)
  text = _TABLE.sub(lambda m: _table(m[1]), text)
  text = _RETURNS.sub(r'\1: ', text)
  paragraphs = re.split(r'(\n\s*\n)', text)
  is_code = lambda p: '>>> ' in p
  return ''.join(p if is_code(p) else _CODE.sub(_inline, p) for p in paragraphs)


def _docstring(app, what, name, obj, options, lines) -> None:
  if lines and lines[0].startswith('Create new instance of '):
    lines.clear()  # What NamedTuples say of `__new__`.
  text = rst_of('\n'.join(lines))
  lines[:] = (f': {text}' if what == 'property' else text).split('\n')


def _skip(app, what, name, obj, would_skip, options) -> bool | None:
  """Fields of NamedTuples are described among the attributes of their class."""
  is_field = type(obj).__name__ == '_tuplegetter'
  return True if is_field else None


class _Named:

  def __init__(self, function):
    self._name = function.__name__

  def __repr__(self) -> str:
    return self._name


def _is_function(x) -> bool:
  return callable(x) and not isinstance(x, type)


def _signature(app, what, name, obj, options, signature, returns):
  """Of nnx modules, whose metaclass takes anything: that of `__init__`."""
  if what == 'class' and (signature or '').startswith('(*args'):
    from sphinx.util import inspect  # Doctests run without sphinx.

    shown = inspect.signature(obj.__init__, bound_method=True)
    parameters = [
        # A function's own text is no Python.
        p.replace(default=_Named(p.default)) if _is_function(p.default) else p
        for p in shown.parameters.values()
    ]
    shown = shown.replace(parameters=parameters)
    signature = inspect.stringify_signature(shown, unqualified_typehints=True)
  return signature, returns


def setup(app) -> None:
  # Before napoleon, which would take fences for text.
  app.connect('autodoc-process-docstring', _docstring, priority=400)
  app.connect('autodoc-process-signature', _signature)
  app.connect('autodoc-skip-member', _skip)
