"""An experiment whose runs are fine-tuned by two processes.

```
python tests/_on_workers.py CONFIG WORKDIR OVERRIDE...
```
"""

from concurrent import futures
import multiprocessing
import sys

from jaxsoup.experiments import configs
from jaxsoup.experiments import main


def run(path, workdir, *overrides):
  experiment = configs.load(path, overrides)
  context = multiprocessing.get_context('spawn')
  with futures.ProcessPoolExecutor(2, context) as executor:
    main.run(experiment, workdir, executor=executor)


if __name__ == '__main__':
  run(*sys.argv[1:])
