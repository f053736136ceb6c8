"""Full-size models without their weights, in a process of their own."""

from __future__ import annotations

from prism_nemo.checkpoint.placement import build_empty
from prism_nemo.config import ParallelConfig
from prism_nemo.models.catalog import CATALOG
from prism_nemo.models.family import table_of
from prism_nemo.models.names import actual_name
from prism_nemo.models.weights import expand
from prism_nemo.runtime import start, stop


def full_size_differences() -> dict[str, list[str]]:
    """Per model of the catalog, parameters of the Megatron model whose shape is not the weight table's."""
    runtime = start(ParallelConfig(), seed=0)
    found: dict[str, list[str]] = {}
    for name, model in CATALOG.items():
        built = build_empty(model.architecture, runtime)
        parameters = {n: tuple(p.shape) for n, p in built.named_parameters()}
        wanted = {
            actual_name(mapping.at(layer)[0], parameters): mapping.local_shape(0, 1)
            for mapping, layer in expand(table_of(model.architecture))
        }
        every = sorted(set(parameters) | set(wanted))
        found[name] = [n for n in every if parameters.get(n) != wanted.get(n)]
        found[name] += [] if all(p.is_meta for p in built.parameters()) else ["it has memory"]
        found[name] += [] if sum(p.numel() for p in built.parameters()) == model.parameters else ["parameter count"]
    stop()
    return found
