"""Artifacts made of the blocks of several finished runs."""
