"""Pages that need nobody: HTML, style and charts in one file, without scripts."""
