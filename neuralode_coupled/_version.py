"""The one place of the version; the distribution takes it from here."""

__version__ = "0.1.0"
