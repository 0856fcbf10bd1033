"""Recipes: whole experiments, from episodes to tables, figures and a folder that can be resumed."""

from dhlens.recipes.detect import Observation, Scan, scan

__all__ = ["Observation", "Scan", "scan"]
