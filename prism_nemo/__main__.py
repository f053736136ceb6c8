"""``python -m prism_nemo``."""

from prism_nemo.cli import main

if __name__ == "__main__":
    main()
