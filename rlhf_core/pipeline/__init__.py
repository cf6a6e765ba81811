"""Pipelines: a recipe of stages, checked as a whole, then run in order with a guard on every policy."""
