"""What everything rests on: errors, files, URLs."""
