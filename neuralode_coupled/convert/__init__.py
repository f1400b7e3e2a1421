"""Other people's models as coupled ones."""
