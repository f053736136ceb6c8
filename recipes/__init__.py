"""What to run: one function per stage; models, mixtures and hardware as data. See docs/recipes.md."""
