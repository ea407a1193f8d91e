"""Why a soup fails, and what to soup instead, in plain words.

```
report = diagnosis.diagnose(ingredients, theta_0=theta_0, eval_fn=eval_fn)
print(report.as_text())
report.verdict.members                   # what to soup
```
"""

from jaxsoup.diagnosis._diagnose import diagnose as diagnose
from jaxsoup.diagnosis._findings import MARKS as MARKS
from jaxsoup.diagnosis._findings import Diagnosis as Diagnosis
from jaxsoup.diagnosis._findings import Finding as Finding
from jaxsoup.diagnosis._findings import Verdict as Verdict
from jaxsoup.diagnosis._matches import aligned as aligned
from jaxsoup.diagnosis._trials import STAGES as STAGES
