"""How sphinx makes pages of the guides and of the docstrings.

sphinx-build -W -q jaxsoup/docs build/docs
"""

import ast
from collections.abc import Mapping
import inspect
import re
import textwrap

import jaxsoup
from jaxsoup import typing

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

_CALLED = ('function', 'method', 'class', 'exception')
# All that it defines.
_TYPES = re.findall(
    r'^(?:class )?([A-Z]\w+)(?: = |\()', inspect.getsource(typing), re.M
)
_FENCE = re.compile(r'^( *)```\w*\n(.*?)\n *```$', re.DOTALL | re.MULTILINE)
_TABLE = re.compile(r'^((?: *\|.*\|\n)+)', re.MULTILINE)
_CODE = re.compile(r'(?<!`)`([^`]+)`(?!`)(\w?)')
# Here napoleon takes what is before a colon for a type.
_RETURNS = re.compile(r'^((?:Returns|Yields):\n +)', re.MULTILINE)
_TYPE = re.compile(rf'(?<![\w.])(?:{"|".join(_TYPES)})\b')
_OBJECT = re.compile(r'[A-Za-z_][\w.]*')


def _block(indent: str, text: str) -> str:
  lines = '\n'.join(f'  {line}'.rstrip() for line in text.splitlines())
  return f'{indent}::\n\n{lines}\n'


def _table(text: str) -> str:
  lines = [line.strip(' |').split(' | ') for line in text.splitlines()]
  rows = [','.join(f'"{cell}"' for cell in line) for line in lines]
  body = '\n'.join(f'  {row}' for row in rows[2:])  # Below the rule.
  return f'.. csv-table::\n  :header: {rows[0]}\n\n{body}\n'


def _inline(match: re.Match[str]) -> str:
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


def _written(function) -> ast.FunctionDef | None:
  """A function's own lines; None if it has none, as of a NamedTuple."""
  try:
    node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
  except (OSError, TypeError):
    return None
  if not isinstance(node, ast.FunctionDef):
    return None
  for x in (node, *ast.walk(node.args)):
    field = 'returns' if x is node else 'annotation'
    if isinstance(getattr(x, field, None), ast.Constant):  # 'Name'.
      name = ast.parse(str(getattr(x, field).value), mode='eval').body
      setattr(x, field, name)
  return node


def _linked(node: ast.AST, names: Mapping[str, object]) -> str:
  def link(match: re.Match[str]) -> str:
    is_ours = names.get(match[0]) is getattr(typing, match[0])
    return f'jaxsoup.typing.{match[0]}' if is_ours else match[0]

  return _TYPE.sub(link, ast.unparse(node))


def _signature(app, what, name, obj, options, signature, returns):
  """As in the source: with names of types, not what they stand for."""
  function = obj
  if what == 'class':
    is_protocol = getattr(obj, '_is_protocol', False)
    function = vars(obj).get('__call__') if is_protocol else obj.__init__
    signature = '' if is_protocol else signature
  node = _written(function) if what in _CALLED else None
  if node is None:
    return signature, returns
  positional = node.args.posonlyargs or node.args.args
  if positional and positional[0].arg in ('self', 'cls'):
    positional.pop(0)
  names = inspect.unwrap(function).__globals__
  returns = None
  if node.returns and node.name != '__init__':
    returns = _linked(node.returns, names)
  return f'({_linked(node.args, names)})', returns


def setup(app) -> None:
  # Before napoleon, which would take fences for text.
  app.connect('autodoc-process-docstring', _docstring, priority=400)
  app.connect('autodoc-process-signature', _signature)
  app.connect('autodoc-skip-member', _skip)
