"""A small evaluation while a stage trains."""
