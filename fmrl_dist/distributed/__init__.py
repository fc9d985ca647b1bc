"""The processes of a job: how they start, exchange rows, and handle signals."""
