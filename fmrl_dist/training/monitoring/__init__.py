"""What a run records while it trains: losses, rates, the time and memory of each rank."""
