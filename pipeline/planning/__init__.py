"""Plan a run on a preset: its layers, input groups, token windows and cost."""
