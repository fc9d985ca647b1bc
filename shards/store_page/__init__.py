"""One page about a store: how long, how popular, when, what is missing, what stands twice."""
