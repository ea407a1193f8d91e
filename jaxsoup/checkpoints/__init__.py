"""Ingredients from checkpoints, and soups with their provenance.

```
from jaxsoup import checkpoints

ingredients = checkpoints.Ingredients(run_dirs, abstract_params)
soup = jaxsoup.uniform(ingredients)
checkpoints.save('runs/soup', soup, ingredients=ingredients)
checkpoints.load('runs/soup').info
```
"""

from jaxsoup.checkpoints._arrays import Arrays as Arrays
from jaxsoup.checkpoints._arrays import save_arrays as save_arrays
from jaxsoup.checkpoints._directories import is_directory as is_directory
from jaxsoup.checkpoints._directories import save_directory as save_directory
from jaxsoup.checkpoints._directories import save_like as save_like
from jaxsoup.checkpoints._formats import metadata as metadata
from jaxsoup.checkpoints._ingredients import Ingredients as Ingredients
from jaxsoup.checkpoints._peft import Adapters as Adapters
from jaxsoup.checkpoints._peft import load_adapters as load_adapters
from jaxsoup.checkpoints._peft import save_adapter as save_adapter
from jaxsoup.checkpoints._runs import metric as metric
from jaxsoup.checkpoints._runs import steps as steps
from jaxsoup.checkpoints._score_log import ScoreLog as ScoreLog
from jaxsoup.checkpoints._soups import load as load
from jaxsoup.checkpoints._soups import provenance as provenance
from jaxsoup.checkpoints._soups import save as save
from jaxsoup.checkpoints._soups import save_average as save_average
from jaxsoup.checkpoints._source import Metadata as Metadata
