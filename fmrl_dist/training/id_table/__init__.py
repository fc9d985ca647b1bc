"""The id table in training: who holds its rows, and who updates them."""
