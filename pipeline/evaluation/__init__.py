"""What a result is judged by beside its source: token windows and multiple-choice questions."""
