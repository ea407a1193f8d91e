"""Tables and pictures of models and the soups made from them.

```
rows = report.read_rows('runs/digits/results.json')
print(report.markdown(report.summary(rows)))     # bold means significant
report.scatter(plt.gca(), rows)
report.write_report('runs/digits')               # one HTML file of all
```
"""

from jaxsoup.report._candidates import not_dominated as not_dominated
from jaxsoup.report._candidates import pareto as pareto
from jaxsoup.report._landscape_sections import (
    diagnosis_sections as diagnosis_sections,
)
from jaxsoup.report._landscape_sections import pair_rates as pair_rates
from jaxsoup.report._landscape_sections import plane_sections as plane_sections
from jaxsoup.report._landscapes import against_ensembles as against_ensembles
from jaxsoup.report._landscapes import angles_and_gains as angles_and_gains
from jaxsoup.report._landscapes import by_step as by_step
from jaxsoup.report._landscapes import compared as compared
from jaxsoup.report._landscapes import contributions as contributions
from jaxsoup.report._landscapes import growth as growth
from jaxsoup.report._landscapes import lines as lines
from jaxsoup.report._landscapes import matrix as matrix
from jaxsoup.report._landscapes import plane as plane
from jaxsoup.report._landscapes import theory as theory
from jaxsoup.report._landscapes import varied as varied
from jaxsoup.report._landscapes import wise_ft as wise_ft
from jaxsoup.report._page import Code as Code
from jaxsoup.report._page import Labelled as Labelled
from jaxsoup.report._page import Picture as Picture
from jaxsoup.report._page import Section as Section
from jaxsoup.report._page import Strong as Strong
from jaxsoup.report._page import Table as Table
from jaxsoup.report._page import check_out as check_out
from jaxsoup.report._page import page as page
from jaxsoup.report._page import write_page as write_page
from jaxsoup.report._plots import save as save
from jaxsoup.report._plots import scatter as scatter
from jaxsoup.report._plots import trials as trials
from jaxsoup.report._rows import Answers as Answers
from jaxsoup.report._rows import Row as Row
from jaxsoup.report._rows import best_single as best_single
from jaxsoup.report._rows import by_set as by_set
from jaxsoup.report._rows import mean_rows as mean_rows
from jaxsoup.report._rows import read_rows as read_rows
from jaxsoup.report._rows import refuse_twice as refuse_twice
from jaxsoup.report._rows import rows_of as rows_of
from jaxsoup.report._rows import summary as summary
from jaxsoup.report._rows import with_gains as with_gains
from jaxsoup.report._scores import read_scores as read_scores
from jaxsoup.report._tables import gains_by_shift as gains_by_shift
from jaxsoup.report._tables import markdown as markdown
from jaxsoup.report._tables import rich_table as rich_table
from jaxsoup.report._tables import with_interval as with_interval
from jaxsoup.report._workdir import write_report as write_report
