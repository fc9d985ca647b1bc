"""An exported model as a folder: its files, what they hold, writing and reading them."""
