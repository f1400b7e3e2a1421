"""Plots, the gallery of operators, and progress bars."""
