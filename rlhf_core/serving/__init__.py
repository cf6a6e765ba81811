"""A policy behind an OpenAI-compatible address: one engine, whose running batch the requests of many clients join."""
