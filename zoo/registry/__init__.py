"""The catalogue of entries: tables (`models`), every query (`registry`), schema history (`migrations`)."""

from zoo.registry.registry import Registry, Run, Summary, open_registry

__all__ = ["Registry", "Run", "Summary", "open_registry"]
