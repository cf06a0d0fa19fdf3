"""Which version this is: by itself, so that what names it does not import all that the package offers."""

__version__ = "0.1.0"
