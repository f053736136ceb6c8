"""Forward both models and compare: ``python conversion/verify.py HF_DIR CKPT --tp 2``."""

import sys

from prism_nemo.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["verify"]
    main()
