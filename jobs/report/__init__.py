"""Pages for people: a run's report, self-contained HTML with pictures."""
