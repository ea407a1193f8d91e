"""Builds the notebooks from their sources, and runs them.

  pip install -e ".[dev]"
  python colabs/build.py                             # all
  python colabs/build.py 02_fine_tune_and_soup       # one

A source is a Python file in the percent format, which Jupyter (with jupytext)
and most editors open cell by cell. A notebook is only written when all of its
cells have run.
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
  """Builds some notebooks, or all of them."""
  # As on a CPU runtime of Colab; and nothing on stderr about other backends.
  os.environ['JAX_PLATFORMS'] = 'cpu'
  names = names or [path.stem for path in sorted(FOLDER.glob('[0-9]*.py'))]
  for name in names:
    notebook = executed(notebook_of(FOLDER / f'{name}.py'))
    path = FOLDER / f'{name}.ipynb'
    nbformat.write(notebook, path)
    print(f'{path}: {path.stat().st_size / 1000:.0f} kB')


def notebook_of(path: pathlib.Path) -> nbformat.NotebookNode:
  """The cells of a source, without outputs."""
  notebook = jupytext.read(path, fmt='py:percent')
  notebook.metadata = nbformat.from_dict({'kernelspec': KERNEL})
  for i, cell in enumerate(notebook.cells):
    cell.id = f'cell-{i}'  # By itself it would be another each time.
  return notebook


def executed(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
  """Runs all cells in a new process, in an empty folder."""
  with tempfile.TemporaryDirectory() as folder:
    nbclient.NotebookClient(
        notebook,
        coalesce_streams=True,
        record_timing=False,
        resources={'metadata': {'path': folder}},
        skip_cells_with_tag='skip-execution',
        timeout=300,
    ).execute()
  del notebook.metadata['language_info']  # The version of Python, no more.
  return notebook


if __name__ == '__main__':
  main(sys.argv[1:])
