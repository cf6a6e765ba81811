"""What models and samplers are like, measured: how far weights are apart, how often answers are right."""
