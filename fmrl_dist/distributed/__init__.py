"""The processes of a job: how they start, exchange rows, and hear signals."""
