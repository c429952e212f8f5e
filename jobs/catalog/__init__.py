"""Catalogs: the models and recipes that a team wants, and the requests that they amount to."""
