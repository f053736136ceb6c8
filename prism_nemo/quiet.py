"""What our dependencies say that nobody needs to read, silenced by name, before they are imported."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """Silence notes on packages that this project does without on purpose, and on names that upstream will change."""
    # Megatron-Core 0.16.1 tells at import which optional packages it did not find; `runtime` decides what is used.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")
    # It also speaks of options that it is about to rename, in its own files.
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"megatron\.core\.")
    # torch 2.13 renames collectives and sharded tensors that Megatron-Core 0.16.1 still uses by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed\..* is deprecated.*")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*deprecating ShardedTensor.*")
    # optimizer.py:66 looks at .grad of the sharded main parameters, which are views, to find out that it is None.
    warnings.filterwarnings("ignore", category=UserWarning, message=".*grad attribute of a Tensor that is not a leaf.*")
    # transformer_layer.py does not know our MLP subclass and says so once per layer; its default arguments are right.
    logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(_is_not_about_mlp)


def _is_not_about_mlp(record: logging.LogRecord) -> bool:
    return "Unknown MLP type" not in record.getMessage()
