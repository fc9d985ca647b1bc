"""Raw tables in, histories and shards out."""
