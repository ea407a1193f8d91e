"""The soups of an experiment, for the library that its start came from.

```
exporting.check(experiment)
exporting.make(experiment, workdir)  # workdir/exported/greedy/config.json ...
```
"""

import pathlib

from jaxsoup import _files
from jaxsoup import _processes
from jaxsoup import checkpoints
from jaxsoup import models
from jaxsoup.experiments import configs


def check(experiment: configs.Experiment, workdir: pathlib.Path) -> None:
  """Raises a UsageError, before any training, if nothing can be exported."""
  init = experiment.config.get('init', '')
  if _files.is_remote(workdir) or not checkpoints.is_directory(init):
    raise configs.UsageError(
        '--export needs a workdir on a disk, and a start with a config.json: '
        f"they are {workdir} and '{init}'. Set config.init to the directory of "
        'a model of transformers or timm. Or leave out --export, and run '
        'jaxsoup convert WORKDIR/soups/NAME OUT --like DIRECTORY.'
    )


def make(experiment: configs.Experiment, workdir: pathlib.Path) -> None:
  """Writes each finished soup that is not there yet as a directory.

  Args:
    experiment: `labels` of its data name the classes.
    workdir: with soups; those of several splits are in `splits/N` of it.

  Raises:
    ValueError: the model is not what the classes of that library compute.
  """
  config, data_fn = experiment.config, experiment.data_fn
  model = config.model.to_dict()
  labels = None
  if 'num_classes' in model and data_fn is not None:
    labels = list(data_fn(config).labels) or None
  soups = [*workdir.glob('soups/*'), *workdir.glob('splits/*/soups/*')]
  for soup in sorted(soups):
    path = soup.parent.parent / 'exported' / soup.name
    if not _processes.agreed(path.exists()):
      models.convert(soup, path, like=config.init, labels=labels, **model)
