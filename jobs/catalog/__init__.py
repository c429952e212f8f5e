"""Catalogs: which models a team wants, in which recipes, and what exactly that asks for."""
