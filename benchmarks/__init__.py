"""What the package costs and gives, measured. Each room has a subject; README.md says how to run what."""
