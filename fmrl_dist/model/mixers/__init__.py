"""What lets the events of a history see each other."""
