"""Groups of verbs of the one command; `prism_nemo.cli` puts them together."""
