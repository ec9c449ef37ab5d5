"""The papers' experiments: recipes, what runs them, what tabulates them."""

from .recipes import RECIPES, Recipe
from .record import Settings
from .report import report
from .run import reproduce

__all__ = ['RECIPES', 'Recipe', 'Settings', 'reproduce', 'report']
