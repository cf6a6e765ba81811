"""What leaves a run: models exported with their adapters folded in, in another dtype or as GGUF, and pushed to the hub."""
