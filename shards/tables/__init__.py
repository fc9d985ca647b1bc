"""Raw tables, as users have them: items, histories and their ids."""
