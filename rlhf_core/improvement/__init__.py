"""Self-improvement: tests of capabilities before and after training, less forgetting, flaws in outputs, refined answers."""
