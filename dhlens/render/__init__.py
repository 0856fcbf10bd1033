"""See it: figures (matplotlib), token views (circuitsvis) and the HTML report, from tables, Scores and Traces.

Renderers take finished records and return objects with `save`; none of them sees a model.
"""

from dhlens.render import figures, tokens
from dhlens.render.report import Report, report

__all__ = ["Report", "figures", "report", "tokens"]
