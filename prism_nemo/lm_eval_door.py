"""How ``lm_eval --model prism_nemo`` finds our model class.

lm-eval 0.4.13 has no entry points: its models are a table in its own ``lm_eval/models/__init__.py``. Before it looks a
model up it imports torch (to seed it), and torch, once imported, calls every entry point of the group
``torch.backends``. Ours is `register`: in a process that runs lm-eval it adds one name to lm-eval's registry, as a path
that is imported only if the name is asked for; in every other process it does nothing.

So ``lm_eval``, ``python -m lm_eval`` and ``torchrun -m lm_eval`` all know the model, in whatever order the two packages
were installed. The alternatives were worse: a script of our own in the place of lm-eval's is lost when lm-eval is
installed again and does not serve ``python -m lm_eval``; a ``.pth`` file runs in every Python process.

Python code that imports torch before lm-eval imports `prism_nemo.evaluation.harness.model` instead, which registers the
name as well. ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` switches the door off.
"""

from __future__ import annotations

import sys

NAME = "prism_nemo"
_TARGET = "prism_nemo.evaluation.harness.model:PrismNemoLM"


def register() -> None:
    """Make the model known to lm-eval, if this process runs it; called by torch, so it raises nothing."""
    if "lm_eval" not in sys.modules:
        return
    try:
        # First its own table: lm-eval fills it only while the registry is empty.
        import lm_eval.models  # noqa: F401
        from lm_eval.api.registry import model_registry

        if NAME not in model_registry:
            model_registry.register(NAME, target=_TARGET)
    except Exception as error:  # another version of lm-eval; torch must be importable all the same
        print(f"prism-nemo: lm-eval does not know the model '{NAME}': {error!r}", file=sys.stderr)
