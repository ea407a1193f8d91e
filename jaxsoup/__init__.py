"""Model soups for JAX and Flax: average fine-tuned models, get a better one.

```
import jaxsoup

soup = jaxsoup.uniform(ingredients)           # a list of pytrees, of States...
soup = jaxsoup.greedy(ingredients, eval_fn)   # higher is better
soup.params, soup.alpha, soup.info
```

Names are imported when they are first used: `jaxsoup --help` does not wait for
jax, nor `import jaxsoup` for flax and orbax.
"""

import sys as _sys

from etils import epy as _epy

with _epy.lazy_api_imports(globals()):
  from jaxsoup import black_box as black_box
  from jaxsoup import checkpoints as checkpoints
  from jaxsoup import diagnosis as diagnosis
  from jaxsoup import ensembles as ensembles
  from jaxsoup import evaluation as evaluation
  from jaxsoup import landscape as landscape
  from jaxsoup import lora as lora
  from jaxsoup import metrics as metrics
  from jaxsoup import report as report
  from jaxsoup import scoring as scoring
  from jaxsoup import sharding as sharding
  from jaxsoup import statistics as statistics
  from jaxsoup import studies as studies
  from jaxsoup import trajectory as trajectory
  from jaxsoup import typing as typing
  from jaxsoup._checked import check_compatible as check_compatible
  from jaxsoup._mixing import mix as mix
  from jaxsoup._mixing import stack as stack
  from jaxsoup._recipes._average import average as average
  from jaxsoup._recipes._average import uniform as uniform
  from jaxsoup._recipes._black_box import search as search
  from jaxsoup._recipes._black_box import simplex as simplex
  from jaxsoup._recipes._greedy import greedy as greedy
  from jaxsoup._recipes._interpolate import interpolate as interpolate
  from jaxsoup._recipes._learned import hyperplane as hyperplane
  from jaxsoup._recipes._learned import learned as learned
  from jaxsoup._recipes._pruned import pruned as pruned
  from jaxsoup._recipes._running import running_average as running_average
  from jaxsoup._recipes._stock import model_stock as model_stock
  from jaxsoup._soup import AtMost as AtMost
  from jaxsoup._soup import Soup as Soup
  from jaxsoup._soup import Trial as Trial

__version__ = '0.1.0'
__all__ = sorted(name for name in dir(_sys.modules[__name__]) if name[0] != '_')
