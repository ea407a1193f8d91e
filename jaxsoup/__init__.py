"""Model soups for JAX and Flax: average fine-tuned models, get a better one.

```
import jaxsoup

soup = jaxsoup.uniform(ingredients)             # a list of pytrees, of States...
soup = jaxsoup.greedy(ingredients, eval_fn)     # higher is better
soup.params, soup.alpha, soup.info
```
"""

from jaxsoup import ensembles as ensembles
from jaxsoup import evaluation as evaluation
from jaxsoup import metrics as metrics
from jaxsoup._recipes._average import average as average
from jaxsoup._recipes._average import ema as ema
from jaxsoup._recipes._average import lawa as lawa
from jaxsoup._recipes._average import swa as swa
from jaxsoup._recipes._average import uniform as uniform
from jaxsoup._recipes._greedy import greedy as greedy
from jaxsoup._recipes._interpolate import interpolate as interpolate
from jaxsoup._recipes._learned import hyperplane as hyperplane
from jaxsoup._recipes._learned import learned as learned
from jaxsoup._recipes._pruned import pruned as pruned
from jaxsoup._recipes._stock import model_stock as model_stock
from jaxsoup._soup import Soup as Soup
from jaxsoup._soup import Trial as Trial
from jaxsoup._tree import check_compatible as check_compatible
from jaxsoup._tree import mix as mix
from jaxsoup._tree import stack as stack

__version__ = '0.1.0'
