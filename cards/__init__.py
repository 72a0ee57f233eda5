"""The model card of an entry."""

from cards.render import render

__all__ = ["render"]
