"""Retrieval that looks at fewer items closely, with a recall of the exact lists that was measured."""
