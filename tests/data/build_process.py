"""A build in a process of its own, to be killed or to hold the lock: mixture, tokenizer, folder, workers."""

from __future__ import annotations

import sys

from prism_nemo.data import units
from prism_nemo.data.build import build_mixture
from prism_nemo.data.mixture_file import load_mixture
from prism_nemo.data.tokenizer import load_tokenizer

if __name__ == "__main__":
    units.UNIT_BYTES = 20_000
    build_mixture(
        load_mixture(sys.argv[1]),
        load_tokenizer(sys.argv[2]),
        sys.argv[3],
        workers=int(sys.argv[4]),
        watch=lambda state: print(state.bytes_done, flush=True),
    )
