"""How benchmarks measure: interleaved rounds, memory."""
