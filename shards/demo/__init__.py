"""The demo data: a small invented shop."""
