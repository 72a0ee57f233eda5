"""The catalogue of entries: every query (`registry`), tables (`models`), schema history (`migrations`).

`query` says what a search can ask for, `figures` what it filters and sorts by.
"""

from zoo.registry.figures import Figures
from zoo.registry.query import Facets, Query, Sort
from zoo.registry.registry import Page, Registry, Run, Summary, open_registry

__all__ = ["Facets", "Figures", "Page", "Query", "Registry", "Run", "Sort", "Summary", "open_registry"]
