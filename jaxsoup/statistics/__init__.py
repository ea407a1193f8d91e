"""How sure a number is: paired comparisons, disjoint data, stable choices.

```
statistics.check_disjoint(select=held_out, report=[test, *shifts.values()])
statistics.compare(soup_logits, best_single_logits, label)     # on test data
statistics.stability(values_fn, num_models)                     # of a search
```

Scores on the data that choose are too high: `optimism` says by how much. With
fewer held-out examples it is better to select on `metrics.log_likelihood` than
on `metrics.correct`. 24 networks on digits, accuracies 89.5 to 95.0: how far
the selected one is below the best of them on the rest, in points, mean of 200
draws of held-out examples (+-0.06), selected by accuracy / likelihood:

| examples | single model | greedy ensemble |
|---|---|---|
| 50 | 0.69 / 0.48 | 0.42 / 0.32 |
| 100 | 0.76 / 0.44 | 0.42 / 0.21 |
| 200 | 0.57 / 0.46 | 0.43 / 0.20 |
| 400 | 0.46 / 0.54 | 0.36 / 0.16 |
| 600 | 0.49 / 0.61 | 0.33 / 0.22 |

So accuracy is as good from 400 examples on for a single model, but at no size
for a greedy search. Of simulated models (80 to 86 %) it is within a quarter of
a point of likelihood from 1,000 examples on, and within an eighth from 5,000,
also where temperatures are off by a factor of 1.3 or so
(`tests/benchmarks/selection.py`).
"""

from jaxsoup.statistics._comparisons import Comparison as Comparison
from jaxsoup.statistics._comparisons import compare as compare
from jaxsoup.statistics._comparisons import mcnemar as mcnemar
from jaxsoup.statistics._comparisons import optimism as optimism
from jaxsoup.statistics._comparisons import paired_bootstrap as paired_bootstrap
from jaxsoup.statistics._disjoint import Split as Split
from jaxsoup.statistics._disjoint import check_disjoint as check_disjoint
from jaxsoup.statistics._disjoint import (
    check_disjoint_files as check_disjoint_files,
)
from jaxsoup.statistics._disjoint import ids_of as ids_of
from jaxsoup.statistics._disjoint import shared_rows as shared_rows
from jaxsoup.statistics._disjoint import split as split
from jaxsoup.statistics._repeats import crossed as crossed
from jaxsoup.statistics._repeats import over_repeats as over_repeats
from jaxsoup.statistics._stability import Stability as Stability
from jaxsoup.statistics._stability import stability as stability
