"""What models are like, measured: how far their weights are apart."""
