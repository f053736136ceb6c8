"""The ``README.md`` of an exported model: what it is made of, what was measured, and what was not."""

from prism_nemo.checkpoint.model_card.writing import CARD, refuse_existing_card, write_model_card

__all__ = ["CARD", "refuse_existing_card", "write_model_card"]
