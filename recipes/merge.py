"""The study's merge (arXiv 2603.17074, section 8): 15 % of the base model and 85 % of the mid-trained one.

It stands between mid-training at 8k tokens and the long-context stage, and gives back what long texts lost.
"""

from prism_nemo.analysis.merge import MergeSettings
from recipes.provenance import Values, fill, given, study

BASE_SHARE = 0.15


def values(base: str, midtrained: str, out: str) -> Values:
    """The recipe with where each value came from; see `merge`."""
    return {
        "models": given((base, midtrained)),
        "out": given(out),
        "method": study("linear", "section 8"),
        "weights": study((BASE_SHARE,), "section 8: 15 % base, 85 % mid-trained"),
    }


def merge(base: str, midtrained: str, out: str) -> MergeSettings:
    """What `prism_nemo.analysis.merge.merge_models` takes; the same as ``prism-nemo merge BASE MID --weight 0.15``.

    Args:
        base: Hugging Face folder or native checkpoint.
        midtrained: The model that came of it.
        out: Hugging Face folder to create.
    """
    return fill(MergeSettings, values(base, midtrained, out))
