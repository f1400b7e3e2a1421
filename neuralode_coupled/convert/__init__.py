"""Conversion of existing models to coupled ones."""
