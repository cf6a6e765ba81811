"""Generation: the engine that draws completions from a policy, and what samplers are built from."""
