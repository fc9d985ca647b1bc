"""Clients of the service, in a process of their own."""
