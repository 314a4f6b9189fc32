"""The processes that a benchmark starts: one module per contender, and the helpers that make what they read."""
