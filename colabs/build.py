"""Builds and runs the notebooks.

  pip install -e ".[dev]"
  python colabs/build.py                             # all
  python colabs/build.py 02_fine_tune_and_soup       # one

The sources are Python files in the percent format, which most editors, and
Jupyter with jupytext, open as notebooks. A notebook is written only if all of
its cells ran without errors.
"""

import os
import pathlib
import sys
import tempfile

import jupytext
import nbclient
import nbformat

FOLDER = pathlib.Path(__file__).parent
KERNEL = {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'}


def main(names: list[str]) -> None:
  """Builds the named notebooks, or all of them."""
  # As on a CPU machine, and without warnings about other backends.
  os.environ['JAX_PLATFORMS'] = 'cpu'
  names = names or [path.stem for path in sorted(FOLDER.glob('[0-9]*.py'))]
  for name in names:
    notebook = executed(notebook_of(FOLDER / f'{name}.py'))
    path = FOLDER / f'{name}.ipynb'
    nbformat.write(notebook, path)
    print(f'{path}: {path.stat().st_size / 1000:.0f} kB')


def notebook_of(path: pathlib.Path) -> nbformat.NotebookNode:
  """Reads the cells of a source, without outputs."""
  notebook = jupytext.read(path, fmt='py:percent')
  notebook.metadata = nbformat.from_dict({'kernelspec': KERNEL})
  for i, cell in enumerate(notebook.cells):
    cell.id = f'cell-{i}'  # By default it is random.
  return notebook


def executed(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
  """Runs all cells in a new process, in an empty directory."""
  with tempfile.TemporaryDirectory() as folder:
    nbclient.NotebookClient(
        notebook,
        coalesce_streams=True,
        record_timing=False,
        resources={'metadata': {'path': folder}},
        skip_cells_with_tag='skip-execution',
        timeout=300,
    ).execute()
  del notebook.metadata['language_info']  # It has the version of Python.
  return notebook


if __name__ == '__main__':
  main(sys.argv[1:])
