"""The steps of a run: batch → losses → backward → clip → step → record → validate → save (loop.py)."""
