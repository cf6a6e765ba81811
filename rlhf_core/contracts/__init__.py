"""The four contracts that plugins fulfil (Trainer, RewardFn, Sampler, Merger), and what passes between them and the core."""
