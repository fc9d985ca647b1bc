"""What serves an exported model: the recommender, sessions, retrieval, formats."""
