"""What Megatron-Core's dense layers use of Transformer Engine, in torch and on the CPU: the interface, not the speed.

Arguments have the names and defaults of Transformer Engine 2.12.0, so that one that it does not have is an error here
too; numbers are those of its documentation: which tokens a window and a mask leave out, what the softmax is scaled by,
where documents begin in the format "thd", what tensor and sequence parallelism exchange. Of FP8 there are the recipes,
and which layers are to run with them (pytorch/fp8.py), but no numbers.
"""

from . import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "2.12.0"
