"""Where the models lie, and what the loss does between them.

```
path = landscape.line(loss_fn, theta_1, theta_2, num=21)
landscape.barrier(path), landscape.angle(theta_0, theta_1, theta_2)
```
"""

from jaxsoup.landscape._curvature import Sharpness as Sharpness
from jaxsoup.landscape._curvature import sharpness as sharpness
from jaxsoup.landscape._features import cka as cka
from jaxsoup.landscape._geometry import angle as angle
from jaxsoup.landscape._geometry import angles as angles
from jaxsoup.landscape._geometry import distances as distances
from jaxsoup.landscape._grids import Path as Path
from jaxsoup.landscape._grids import Plane as Plane
from jaxsoup.landscape._grids import barrier as barrier
from jaxsoup.landscape._grids import line as line
from jaxsoup.landscape._grids import lines as lines
from jaxsoup.landscape._grids import plane as plane
from jaxsoup.landscape._theory import Pair as Pair
from jaxsoup.landscape._theory import SoupMinusEnsemble as SoupMinusEnsemble
from jaxsoup.landscape._theory import pairs as pairs
from jaxsoup.landscape._theory import soup_minus_ensemble as soup_minus_ensemble
