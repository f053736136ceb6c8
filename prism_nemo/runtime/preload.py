"""What the server process imports once, so that forked workers start at once. No threads, no state of torch's.

The server ends with the command: it would live as long as one of its workers does, and a command that was killed would
leave ranks behind that work on, and then wait for it for ever. It does not end by a signal that reaches the whole group
of processes: its workers, which finish a step and save, would end with it. Nothing else may import this module: it
holds back signals of the process that does, and of all that it starts.
"""

import os

from prism_nemo.parent import end_with_parent
from prism_nemo.quiet import quiet
from prism_nemo.runtime.signals import outlive_signals

end_with_parent(os.getppid())
outlive_signals()
quiet()

import megatron.core.dist_checkpointing  # noqa: E402
import megatron.core.distributed  # noqa: E402
import megatron.core.models.gpt.gpt_layer_specs  # noqa: E402
import megatron.core.models.gpt.gpt_model  # noqa: E402
import megatron.core.optimizer  # noqa: E402
import megatron.core.pipeline_parallel  # noqa: E402, F401
