"""One self-contained HTML page about a run: what each size is worth, what it costs, and which one to take."""
