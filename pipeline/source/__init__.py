"""A source preset: its files, its weightless model, its blocks, its weights."""
