"""The seven models of the study, as data.

No ``config.json`` of the seven could be read itself: every value is from the model's card, from copies and derivatives
that name the model, from its instruct sibling, or from the vendor's own test fixtures. What is not proved to be the
model's own value is in `Model.unsure` with its sureness and source, and is taken from the checkpoint at import; the
catalog then only says whether it agrees (`compare_with_catalog`). Nothing is ever built from the catalog's weights or
values in place of a checkpoint's.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import Any

from prism_nemo.errors import InputError
from prism_nemo.models.family import Architecture, architecture_from_hf, parameter_count

SURENESS = {
    "A": "the model itself, copies that name it as their origin, or an exact parameter count",
    "B+": "read on the instruct sibling; fine-tuning cannot have changed it",
    "B": "read on the instruct sibling, or on one of the same family; nothing contradicts it",
    "C": "inferred, or from memory",
}


@dataclass(frozen=True)
class Unsure:
    """Why a value of a configuration is not proved to be the model's own.

    Attributes:
        sureness: "B+", "B" or "C", see `SURENESS`; every value that is not listed is "A".
        source: Where it was read, or what else it may be.
    """

    sureness: str
    source: str


@dataclass(frozen=True)
class Model:
    """One published model.

    Attributes:
        name: Short name, the key in `CATALOG`.
        hub_id: Repository on the Hugging Face Hub.
        config: ``config.json`` in its published spelling, as families and transformers read it.
        sources: Where the values that are sure were read.
        stated_parameters: An exact count that was stated somewhere.
        stated_by: By whom, and of which model.
        unsure: Keys of ``config.json`` whose value, or absence, is not sure.
        stated_with: Values that differ in the model whose count was stated.
    """

    name: str
    hub_id: str
    config: dict[str, Any]
    sources: tuple[str, ...]
    stated_parameters: int
    stated_by: str
    unsure: dict[str, Unsure] = field(default_factory=dict)
    stated_with: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def architecture(self) -> Architecture:
        """What the family makes of the configuration."""
        return architecture_from_hf(self.config, f"{self.hub_id}/config.json")

    @cached_property
    def parameters(self) -> int:
        """Parameters, from the family's weight table."""
        return parameter_count(self.architecture)

    @property
    def parameters_as_stated(self) -> int:
        """The same for the model whose count was stated."""
        return parameter_count(architecture_from_hf({**self.config, **self.stated_with}, self.name))

    @property
    def context_length(self) -> int:
        """Longest sequence that the model was made for."""
        return self.architecture.max_position_embeddings

    @property
    def layers(self) -> str:
        """What its layers are, such as "36 Mamba + 4 attention"; an MLP behind every layer is not counted."""
        a = self.architecture
        if not a.layer_pattern:
            return f"{a.num_layers} attention"
        counts = {what: len(a.layers_of(kind)) for kind, what in (("M", "Mamba"), ("*", "attention"), ("-", "MLP"))}
        if counts["MLP"] == counts["Mamba"] + counts["attention"]:
            del counts["MLP"]
        return " + ".join(f"{n} {what}" for what, n in counts.items() if n)

    @property
    def pipeline_parallel_sizes(self) -> list[int]:
        """Every pipeline-parallel size that `Architecture.check_layout` lets pass."""
        return [pp for pp in range(1, self.architecture.num_layers + 1) if self._fits(pp)]

    def _fits(self, pp: int) -> bool:
        try:
            self.architecture.check_layout(1, pp)
        except InputError:
            return False
        return True

    @property
    def unsure_fields(self) -> dict[str, tuple[str, str]]:
        """Unsure values that enter the architecture: its field (dotted) to (key of ``config.json``, sureness)."""
        present = dict(_flatten(self.architecture))
        return {
            _FIELDS[key]: (key, why.sureness) for key, why in self.unsure.items() if _FIELDS.get(key, "") in present
        }


# Keys of config.json that can be unsure, and the field of the architecture that each one alone decides. Other unsure
# keys do not enter it: token ids, initialisation, or values of which the family accepts only one and refuses others.
_FIELDS = {
    "vocab_size": "vocab_size",
    "rope_theta": "rope.theta",
    "rope_scaling": "rope.scaling",
    "rms_norm_eps": "norm_epsilon",
    "embedding_multiplier": "embedding_multiplier",
    "attention_multiplier": "attention_multiplier",
    "logits_scaling": "logits_scaling",
    "time_step_limit": "mamba.dt_limit",
    "chunk_size": "mamba.chunk_size",
}


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Fields of an architecture by dotted name, without where it was read from."""
    for f in fields(value):
        if f.name in ("hf_config", "hf_prefix"):
            continue
        inner = getattr(value, f.name)
        if is_dataclass(inner):
            yield from _flatten(inner, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, inner


@dataclass(frozen=True)
class Comparison:
    """An architecture that was read from a checkpoint beside the catalog's.

    Attributes:
        model: The entry compared with.
        contradictions: Differences in values of which the catalog is sure: another model, or the catalog is wrong.
        taken: Values of which the catalog is not sure, and what the checkpoint says.
    """

    model: Model
    contradictions: tuple[str, ...]
    taken: tuple[str, ...]


def compare_with_catalog(architecture: Architecture, model: Model | None = None) -> Comparison | None:
    """Compare an architecture read from a checkpoint with the catalog.

    Args:
        architecture: As `prism_nemo.models.family.read_hf_config` gives it.
        model: The entry to compare with; the one of the same family and sizes if None.

    Returns:
        None if no entry is given and none has the same family and sizes.
    """
    if model is None:
        same = (m for m in CATALOG.values() if _sizes(m.architecture) == _sizes(architecture))
        model = next(same, None)
    if model is None:
        return None
    ours, theirs = dict(_flatten(architecture)), dict(_flatten(model.architecture))
    contradictions, taken = [], []
    for name in dict.fromkeys([*theirs, *ours]):
        value, expected = ours.get(name), theirs.get(name)
        if name in model.unsure_fields:
            key, sureness = model.unsure_fields[name]
            verdict = "as in the catalog" if value == expected else f"the catalog has {expected}"
            taken.append(f"{key}: {value} taken from the checkpoint; {verdict} ({sureness})")
        elif value != expected:
            contradictions.append(f"{name}: {value}; the catalog is sure of {expected}")
    return Comparison(model, tuple(contradictions), tuple(taken))


def _sizes(a: Architecture) -> tuple[Any, ...]:
    return a.family, a.hidden_size, a.ffn_hidden_size, a.num_layers, a.num_attention_heads, a.num_query_groups


def find(name: str) -> Model:
    """The entry of that short name or Hub id, whatever the case.

    Raises:
        InputError: Naming the nearest entries.
    """
    known = {key.lower(): model for model in CATALOG.values() for key in (model.name, model.hub_id)}
    if name.lower() in known:
        return known[name.lower()]
    # A Hub id and a short name of one model are both near; it is named once.
    matches = difflib.get_close_matches(name.lower(), known, n=len(known), cutoff=0.0)
    nearest = next(iter(dict.fromkeys(known[match].name for match in matches)))
    raise InputError(f"unknown model '{name}'; did you mean {nearest}? Known: {', '.join(CATALOG)}")


def _all(keys: str, sureness: str, source: str) -> dict[str, Unsure]:
    return {key: Unsure(sureness, source) for key in keys.split()}


_GRANITE_4_TOKENS = {"bos_token_id": 100257, "eos_token_id": 100257, "pad_token_id": 100256}

_MODELS = (
    Model(
        name="granite-4.0-micro",
        hub_id="ibm-granite/granite-4.0-micro-base",
        config={
            "architectures": ["GraniteMoeHybridForCausalLM"],
            "model_type": "granitemoehybrid",
            "vocab_size": 100352,
            "hidden_size": 2560,
            "intermediate_size": 8192,
            "shared_intermediate_size": 8192,
            "num_hidden_layers": 40,
            "layer_types": ["attention"] * 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "position_embedding_type": "rope",
            "rope_theta": 10000000,
            "rope_scaling": None,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-05,
            "normalization_function": "rmsnorm",
            "tie_word_embeddings": True,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "embedding_multiplier": 12,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.015625,
            "logits_scaling": 10,
            "initializer_range": 0.1,
            # Present in the file, used by no layer.
            "mamba_n_heads": 128,
            "mamba_d_head": 40,
            "mamba_d_state": 256,
            "mamba_n_groups": 1,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_chunk_size": 256,
            "mamba_conv_bias": True,
            "mamba_proj_bias": False,
            **_GRANITE_4_TOKENS,
            "torch_dtype": "bfloat16",
        },
        sources=(
            "IBM's card of granite-4.0-h-micro-base, column Micro Dense",
            "configurations of a fine-tune and of a port of granite-4.0-micro (instruct)",
            "header of a GGUF of granite-4.0-micro (instruct)",
            "test constants of granite-switch",
            "family notes of nnterp, which name micro-base",
        ),
        stated_parameters=3_402_836_480,
        stated_by="safetensors total of ibm-granite/granite-4.0-micro, the instruct sibling; the card says 3B",
        unsure={
            **_all("num_local_experts num_experts_per_tok", "B+", "test constants and GGUF of the instruct sibling"),
            **_all("embedding_multiplier attention_multiplier logits_scaling", "B+", "copies of the instruct sibling"),
            **_all("rope_theta rms_norm_eps", "B", "GGUF of the instruct sibling"),
            "rope_scaling": Unsure("C", "inferred: the GGUF has no keys of a scaling"),
            "sliding_window": Unsure("B", "no such key in any copy"),
            "normalization_function": Unsure("B", "a port of the instruct sibling"),
            **_all("attention_dropout initializer_range torch_dtype", "B", "a fine-tune of the instruct sibling"),
            **_all(
                "mamba_n_heads mamba_d_head mamba_d_state mamba_n_groups mamba_d_conv mamba_expand mamba_chunk_size "
                "mamba_conv_bias mamba_proj_bias",
                "B",
                "copies of the instruct sibling; used by no layer",
            ),
            **_all("bos_token_id eos_token_id pad_token_id", "B", "copies of the instruct sibling"),
        },
    ),
    Model(
        name="granite-3.3-8b",
        hub_id="ibm-granite/granite-3.3-8b-base",
        config={
            "architectures": ["GraniteForCausalLM"],
            "model_type": "granite",
            "vocab_size": 49152,
            "hidden_size": 4096,
            "intermediate_size": 12800,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_theta": 10000000.0,
            "rope_scaling": None,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-05,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.0078125,
            "logits_scaling": 16.0,
            "initializer_range": 0.02,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "torch_dtype": "bfloat16",
        },
        sources=(
            "IBM's card of the base model",
            "configuration of granite-3.3-8b-instruct",
            "configurations of granite-3.1-8b-instruct and of a derivative of 3.2-8b-instruct",
            "family notes of nnterp",
        ),
        stated_parameters=8_170_864_640,
        stated_by="safetensors total of granite-3.3-8b-instruct, whose vocabulary is 49159; the base card says 8.1B",
        stated_with={"vocab_size": 49159},
        unsure={
            "vocab_size": Unsure(
                "C", "not read; 49152 in what looks like a fine-tune of 3.3-2b-base, but 49155 or 49159 are possible"
            ),
            **_all("rope_theta rope_scaling rms_norm_eps", "B", "the instruct sibling and 3.1 and 3.2 siblings"),
            "sliding_window": Unsure("B", "no such key in the instruct sibling"),
            **_all("attention_bias mlp_bias", "B", "the instruct sibling"),
            "attention_dropout": Unsure("B", "0.0 in the instruct sibling, 0.1 in 3.1-8b; of no effect here"),
            "initializer_range": Unsure("B", "the instruct sibling; the card says 0.1"),
            **_all("bos_token_id eos_token_id pad_token_id", "B", "the instruct sibling and 3.1 and 3.2 siblings"),
            "torch_dtype": Unsure("B", "the instruct sibling"),
        },
    ),
    Model(
        name="granite-4.0-h-micro",
        hub_id="ibm-granite/granite-4.0-h-micro-base",
        config={
            "architectures": ["GraniteMoeHybridForCausalLM"],
            "model_type": "granitemoehybrid",
            "vocab_size": 100352,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "shared_intermediate_size": 8192,
            "num_hidden_layers": 40,
            "layer_types": ["attention" if layer in (5, 15, 25, 35) else "mamba" for layer in range(40)],
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "position_embedding_type": "nope",
            "rope_theta": 10000,
            "rope_scaling": None,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-05,
            "normalization_function": "rmsnorm",
            "tie_word_embeddings": True,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "embedding_multiplier": 12,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.015625,
            "logits_scaling": 8,
            "initializer_range": 0.1,
            "mamba_n_heads": 64,
            "mamba_d_head": 64,
            "mamba_d_state": 128,
            "mamba_n_groups": 1,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_chunk_size": 256,
            "mamba_conv_bias": True,
            "mamba_proj_bias": False,
            **_GRANITE_4_TOKENS,
            "torch_dtype": "bfloat16",
        },
        sources=(
            "IBM's card of the base model, column H Micro Dense",
            "configuration of a derivative of granite-4.0-h-micro",
            "a test of another project that says it holds the configuration of granite-4.0-h-micro",
            "family notes of nnterp",
            "the configuration class of transformers",
        ),
        stated_parameters=3_191_396_096,
        stated_by="general.parameter_count of a GGUF of granite-4.0-h-micro, the instruct sibling; the card says 3B",
        unsure={
            **_all("embedding_multiplier attention_multiplier logits_scaling", "B+", "a derivative"),
            "rms_norm_eps": Unsure("B", "siblings h-tiny, h-1b and 350m; the class's default is 1e-6: confirm it"),
            "rope_theta": Unsure("C", "siblings; of no effect, the model has no positions"),
            "rope_scaling": Unsure("C", "of no effect, the model has no positions"),
            "sliding_window": Unsure("B", "no such key in the derivative"),
            "time_step_limit": Unsure("B", "no such key in any copy, and the class has no limit"),
            **_all("attention_dropout initializer_range", "B", "a derivative"),
            **_all("bos_token_id eos_token_id", "B", "a derivative"),
            **_all("pad_token_id torch_dtype", "B", "granite-4.0-micro"),
        },
    ),
    Model(
        name="llama-3.1-8b",
        hub_id="meta-llama/Llama-3.1-8B",
        config={
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-05,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "pretraining_tp": 1,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.43.0.dev0",
        },
        sources=("copies and derivatives that name meta-llama/Llama-3.1-8B as their origin",),
        stated_parameters=8_030_261_248,
        stated_by="safetensors total of the base model",
    ),
    Model(
        name="mistral-7b-v0.1",
        hub_id="mistralai/Mistral-7B-v0.1",
        config={
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-05,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.34.0.dev0",
        },
        sources=("derivatives that name mistralai/Mistral-7B-v0.1 as their origin",),
        stated_parameters=7_241_732_096,
        stated_by="two projects that give the safetensors total of the base model",
    ),
    Model(
        name="mistral-small-24b",
        hub_id="mistralai/Mistral-Small-24B-Base-2501",
        config={
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "vocab_size": 131072,
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_theta": 100000000.0,
            "sliding_window": None,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-05,
            "tie_word_embeddings": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        },
        sources=(
            "derivatives that name mistralai/Mistral-Small-24B-Base-2501 as their origin",
            "a copy of Mistral-Small-24B-Instruct-2501, which agrees",
            "the base model's card",
        ),
        stated_parameters=23_572_403_200,
        stated_by="derivatives of the same geometry (Magistral, Devstral and others); the base card says 24B",
        unsure={"pad_token_id": Unsure("C", "differs from one derivative to the next")},
    ),
    Model(
        name="nemotron-h-8b",
        hub_id="nvidia/Nemotron-H-8B-Base-8K",
        config={
            "architectures": ["NemotronHForCausalLM"],
            "model_type": "nemotron_h",
            "vocab_size": 131072,
            "hidden_size": 4096,
            "intermediate_size": 21504,
            "num_hidden_layers": 52,
            "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "attention_head_dim": 128,
            "max_position_embeddings": 8192,
            "sliding_window": None,
            "layer_norm_epsilon": 1e-05,
            "rms_norm_eps": 1e-05,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "use_bias": False,
            "mamba_proj_bias": False,
            "use_conv_bias": True,
            "mlp_hidden_act": "relu2",
            "mamba_hidden_act": "silu",
            "mamba_num_heads": 128,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 8,
            "conv_kernel": 4,
            "expand": 2,
            "chunk_size": 128,
            "residual_in_fp32": False,
            "rescale_prenorm_residual": True,
            "num_logits_to_keep": 1,
            "initializer_range": 0.02,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.48.0.dev0",
        },
        sources=(
            "Megatron-Bridge's test fixture of the 8B (NVIDIA's, not the file itself)",
            "TensorRT-LLM's configuration of the pre-release model",
            "two articles that quote the Hub's file",
            "vLLM's configuration class, whose defaults are the 8B's",
        ),
        stated_parameters=8_100_852_736,
        stated_by="a third party's description of the base model, perhaps computed; the card says 8.1B",
        unsure={
            "sliding_window": Unsure("B", "null in the pre-release file"),
            "chunk_size": Unsure("B", "128 in the fixture, 256 in the pre-release file; the function is the same"),
            "residual_in_fp32": Unsure("B", "false in the fixture, true in the pre-release file"),
            "time_step_limit": Unsure("B", "no such key in fixture or pre-release file; the class has no limit"),
            **_all("time_step_min time_step_max time_step_floor", "C", "0.001, 0.1, 1e-4 in the pre-release file only"),
            "time_step_rank": Unsure("C", "256 in the pre-release file only"),
            **_all("rescale_prenorm_residual num_logits_to_keep", "B", "the fixture"),
            **_all("bos_token_id eos_token_id pad_token_id", "B", "the fixture"),
            **_all("initializer_range attention_dropout hidden_dropout", "B", "the fixture"),
        },
    ),
)  # fmt: skip

CATALOG: dict[str, Model] = {model.name: model for model in _MODELS}
