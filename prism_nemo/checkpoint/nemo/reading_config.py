"""NeMo's configuration to a Hugging Face one, which the families of this project then read as strictly as any other.

The class decides what NeMo does beyond the fields (a Gemma configuration scales embeddings in a method, for example),
so only classes that are known here are taken:

=================  =================================  ===========
model              configuration                      family
=================  =================================  ===========
LlamaModel         LlamaConfig, Llama2/3/31/32, Code  llama
MistralModel       MistralConfig7B and its kin        mistral
GPTModel           GPTConfig with Llama's values      llama, or mistral with a window
MambaModel         SSMConfig, NemotronH, Nano v2      nemotron_h
=================  =================================  ===========
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prism_nemo.checkpoint.nemo.context import MODEL_YAML, ModelContext
from prism_nemo.checkpoint.nemo.fields import problem, short
from prism_nemo.checkpoint.nemo.io_json import Call, Opaque, Symbol
from prism_nemo.errors import InputError
from prism_nemo.models.family import Architecture, architecture_from_hf

_MODELS = "nemo.collections.llm.gpt.model."
_CLASSES = {
    "LlamaModel": r"llama\.(LlamaConfig|Llama(2|3|31|32)Config\w*|CodeLlamaConfig\w+)",
    "MistralModel": r"mistral\.Mistral\w*Config\w*",
    "GPTModel": r"(base\.GPTConfig\w*|llama\.(LlamaConfig|Llama(2|3|31|32)Config\w*)|mistral\.Mistral\w*Config\w*)",
    "MambaModel": r"ssm\.(SSMConfig|NemotronH\w+|NemotronNano\w+|NVIDIAMambaHybridConfig\w+)",
}
# What has to be said, since the classes differ in it. A file that leaves it to the class says it in model.yaml.
_ESSENTIAL = (
    "normalization",
    "add_bias_linear",
    "activation_func",
    "gated_linear_unit",
    "position_embedding_type",
    "share_embeddings_and_output_weights",
    "layernorm_epsilon",
    "seq_length",
)
_LLAMA3 = ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")
# What else nemotron_h files can say is what Megatron's mixer does: its defaults (megatron/core/ssm/mamba_mixer.py).
_MIXER = {"conv_kernel": 4, "use_conv_bias": True, "chunk_size": 128}


class _Values:
    """The configuration while it is read."""

    def __init__(self, context: ModelContext) -> None:
        self.context = context

    def get(self, key: str, default: Any = None) -> Any:
        return self.context.values.get(key, default)

    def fail(self, message: str) -> InputError:
        return InputError(f"{self.context.source}: {message}")

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 1:
            raise self.fail(f"{key} is {value!r}; expected a whole number of at least 1")
        return int(value)

    def number(self, key: str) -> float:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(f"{key} is {value!r}; expected a number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.fail(f"{key} is {value!r}; expected true or false")
        return value


def architecture_of(context: ModelContext, vocab_size: int, special: Mapping[str, int]) -> Architecture:
    """The architecture, with a Hugging Face configuration for exports.

    Args:
        context: The model as NeMo describes it.
        vocab_size: Entries of the vocabulary without padding.
        special: ``bos_token_id`` and ``eos_token_id``, as far as they are known.

    Raises:
        InputError: Naming the class or the field that this project does not represent.
    """
    values = _Values(context)
    _check_classes(context)
    _check_complete(context)
    for key, value in context.values.items():
        found = problem(key, value)
        if found:
            raise values.fail(found)
    if context.transform is not None:
        raise values.fail("model_transform is set (adapters, or another change of the model); merge it with NeMo first")
    hybrid = context.model_class.endswith(".MambaModel")
    config = _hybrid(values) if hybrid else _transformer(values)
    config |= {
        "vocab_size": vocab_size,
        "hidden_size": values.size("hidden_size"),
        "intermediate_size": values.size("ffn_hidden_size"),
        "num_hidden_layers": values.size("num_layers"),
        "num_attention_heads": values.size("num_attention_heads"),
        "num_key_value_heads": values.size("num_query_groups", values.size("num_attention_heads")),
        "tie_word_embeddings": values.flag("share_embeddings_and_output_weights"),
        "max_position_embeddings": values.size("seq_length"),
        "torch_dtype": short(values.get("params_dtype")) or "float32",
        **special,
    }
    head_dim = values.size("kv_channels", max(1, config["hidden_size"] // config["num_attention_heads"]))
    return architecture_from_hf({**config, "head_dim": head_dim}, str(context.source))


def _check_classes(context: ModelContext) -> None:
    model = context.model_class.rsplit(".", 1)[-1]
    known = context.model_class.startswith(_MODELS) and model in _CLASSES
    if not known:
        raise InputError(
            f"{context.source}: the model is a {context.model_class}; supported: {', '.join(sorted(_CLASSES))} of NeMo"
        )
    if not re.fullmatch(re.escape(_MODELS) + _CLASSES[model], context.config_class):
        raise InputError(
            f"{context.source}: the configuration is a {context.config_class}, and what that class changes beside its "
            f"fields is not known; supported for {model}: {_CLASSES[model]}"
        )


def _check_complete(context: ModelContext) -> None:
    """Refuse a description that leaves to NeMo's classes what the function depends on."""
    needed = list(_ESSENTIAL)
    if context.model_class.endswith(".MambaModel"):
        needed += ["hybrid_override_pattern", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim"]
    else:
        needed.append("rotary_base")
    if ".Mistral" in context.config_class:
        needed.append("window_size")  # 4096 in the base class
    if re.search(r"\.Llama3[12]Config", context.config_class):
        needed += _LLAMA3
    missing = [key for key in needed if key not in context.values]
    if missing:
        raise InputError(
            f"{context.source}: does not say {', '.join(missing)}, which {context.config_class} has defaults for; "
            f"{MODEL_YAML} would say them. Load the checkpoint with NeMo 2.1 or later and save it again"
        )


def _transformer(values: _Values) -> dict[str, Any]:
    """What llama and mistral say and a hybrid does not."""
    if not values.flag("gated_linear_unit") or not _is_silu(values.get("activation_func")):
        raise values.fail(f"activation_func is {values.get('activation_func')}; supported: silu with gated_linear_unit")
    if values.get("position_embedding_type") != "rope":
        raise values.fail(f"position_embedding_type is {values.get('position_embedding_type')!r}; supported: 'rope'")
    config: dict[str, Any] = {
        "hidden_act": "silu",
        "rms_norm_eps": values.number("layernorm_epsilon"),
        "rope_theta": values.number("rotary_base"),
    }
    scaling = _rope_scaling(values)
    if scaling:
        config["rope_scaling"] = scaling
    window = values.get("window_size")
    if window is None and not values.context.model_class.endswith(".MistralModel"):
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **config}
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        **config,
        "sliding_window": _window(values, window),
    }


def _is_silu(value: Any) -> bool:
    return isinstance(value, (Symbol, Call)) and short(value) in ("silu", "swish")


def _rope_scaling(values: _Values) -> dict[str, Any] | None:
    given = [key for key in _LLAMA3 if values.get(key) is not None]
    linear = values.get("seq_len_interpolation_factor")
    if given and linear is not None:
        raise values.fail(f"both {given[0]} and seq_len_interpolation_factor are set; only one scaling is supported")
    if given:
        factor, low, high, length = (values.number(key) for key in _LLAMA3)
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": int(length),
        }
    return None if linear is None else {"rope_type": "linear", "factor": values.number("seq_len_interpolation_factor")}


def _window(values: _Values, window: Any) -> int | None:
    """Hugging Face's window, which counts the token itself; Megatron's (left, right) counts its neighbours."""
    if window is None:
        return None
    if not (isinstance(window, list) and len(window) == 2 and all(isinstance(n, int) for n in window)):
        raise values.fail(f"window_size is {window!r}; expected two whole numbers")
    left, right = window
    if left == -1 and right in (-1, 0):
        return None
    if left < 0 or right != 0:
        raise values.fail(f"window_size is {window!r}; expected [positions to the left, 0]")
    return int(left) + 1


def _hybrid(values: _Values) -> dict[str, Any]:
    """What nemotron_h says and a transformer does not."""
    activation = values.get("activation_func")
    # NeMo writes it as a lambda, torch.pow(relu(x), 2), of which only the name of its class is left.
    lambdas = (Symbol, Opaque, Call)
    squared = isinstance(activation, lambdas) and (
        short(activation) == "squared_relu" or "NemotronHConfigBase.<lambda>" in str(_name(activation))
    )
    if values.flag("gated_linear_unit") or not squared:
        raise values.fail(f"activation_func is {_name(activation)}; supported for MambaModel: squared ReLU, not gated")
    if values.get("position_embedding_type") != "none":
        raise values.fail(f"position_embedding_type is {values.get('position_embedding_type')!r}; supported: 'none'")
    if values.get("window_size") is not None:
        raise values.fail("window_size is set; attention of a hybrid has no window here")
    head_dim, hidden = values.size("mamba_head_dim"), values.size("hidden_size")
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hybrid_override_pattern": values.get("hybrid_override_pattern"),
        # Megatron's mixer expands the hidden size by 2 where no number of heads is given.
        "mamba_num_heads": values.size("mamba_num_heads", 2 * hidden // head_dim),
        "mamba_head_dim": head_dim,
        "n_groups": values.size("mamba_num_groups"),
        "ssm_state_size": values.size("mamba_state_dim"),
        "layer_norm_epsilon": _mixer_epsilon(values),
        **_MIXER,
    }


def _name(value: Any) -> Any:
    return getattr(value, "name", None) or getattr(value, "target", None) or getattr(value, "kind", value)


def _mixer_epsilon(values: _Values) -> float:
    """The norms' epsilon, which must be that of the mixer's own norm: 1e-5 in Megatron, whatever the field says."""
    epsilon = values.number("layernorm_epsilon")
    if epsilon != 1e-5:
        raise values.fail(
            f"layernorm_epsilon is {epsilon}, but Megatron's mixer has 1e-05; the family has one for both"
        )
    return epsilon
