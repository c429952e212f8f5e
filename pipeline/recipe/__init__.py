"""Recipes: which scheme each layer gets, and the texts to calibrate on."""
