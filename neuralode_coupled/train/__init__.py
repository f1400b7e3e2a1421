"""Experiments: training, comparing, and what a run leaves behind."""
