"""Base, mid-training, RL from both, control, evaluation, analysis, export, report: in order, each resumable."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from prism_nemo.analysis.activations import compare_activations
from prism_nemo.analysis.weights import compare_weights
from prism_nemo.checkpoint.convert import export_hf, import_hf
from prism_nemo.checkpoint.model_card import write_model_card
from prism_nemo.checkpoint.native import read_architecture
from prism_nemo.checkpoint.verification import verify
from prism_nemo.config import ParallelConfig, to_yaml
from prism_nemo.data.build import describe, load_manifest
from prism_nemo.errors import InputError, PrismError
from prism_nemo.evaluation.tasks import EvaluationConfig, evaluate_checkpoint
from prism_nemo.models.family import parameter_count
from prism_nemo.quickstart.claims import expected_claims
from prism_nemo.quickstart.corpus import prepare
from prism_nemo.quickstart.memory import PeakMemory
from prism_nemo.quickstart.settings import TASKS, PocketSettings
from prism_nemo.report.page import write_report
from prism_nemo.rl.train import train as train_rl
from prism_nemo.run import read_metrics, versions, write_json
from prism_nemo.runtime.launch import launch
from prism_nemo.training.midtrain import midtrain

STAGES = ("base", "midtrained", "midtrained_longer", "base_rl", "prism_rl")
WEIGHT_PAIRS = (
    ("base", "midtrained"),
    ("midtrained", "prism_rl"),
    ("base", "base_rl"),
    ("midtrained", "midtrained_longer"),
)
CKA_PAIRS = (("base", "midtrained"), ("midtrained", "prism_rl"), ("base", "base_rl"))


class Quickstart:
    """The whole pipeline in one directory. Finished parts are kept: a second run does only what is missing.

    Args:
        out: The directory.
        settings: Sizes and budgets.
        say: Receives one line per part.
    """

    def __init__(self, out: Path, settings: PocketSettings, say: Callable[[str], None]) -> None:
        self.out, self.settings, self.say = out, settings, say
        out.mkdir(parents=True, exist_ok=True)
        settings_file = out / "settings.yaml"
        if settings_file.is_file() and settings_file.read_text() != to_yaml(settings):
            raise InputError(f"{out}: holds a run with other settings; choose another --out, or remove it")
        settings_file.write_text(to_yaml(settings))
        self.memory = PeakMemory()
        self.done_file = out / "parts.json"
        self.parts: dict[str, Any] = json.loads(self.done_file.read_text()) if self.done_file.is_file() else {}

    def part(self, name: str, work: Callable[[], Any], layout: ParallelConfig | None = None, note: str = "") -> Any:
        """Do one part unless it is done; keep its result and its time."""
        if name in self.parts:
            return self.parts[name]["result"]
        self.say(name + (f" ({note})" if note else ""))
        began = time.time()
        result = work()
        start = sum(part["seconds"] for part in self.parts.values())
        layout_text = layout.describe() if layout else "1 process"
        self.parts[name] = {
            "result": result, "start": start, "seconds": time.time() - began, "layout": layout_text, "note": note,
            "peak_rss_gb": self.memory.peak_gb,
        }  # fmt: skip
        write_json(self.done_file, self.parts)
        return result

    def checkpoint(self, stage: str) -> str:
        """The finished checkpoint of a stage."""
        return str(self.parts[stage]["result"]["checkpoint"])

    def run(self) -> dict[str, Any]:
        """Do everything and write ``summary.json`` and ``report.html``.

        Returns:
            The summary.
        """
        s, out, layout = self.settings, self.out, self.settings.parallel()
        n = layout.world_size
        with self.memory:
            data = self.part("data", lambda: prepare(out / "data", s), note="general text, worked problems, tokenizer")
            base = s.base(str(out / "base"), data["base"], data["vocab_size"])
            self.part("base", lambda: launch(midtrain, base, "base", processes=n), layout, "train a small base")
            self.part(
                "round trip", self._round_trip, ParallelConfig(2), "import, export and forward at TP 1, TP 2, PP 2"
            )
            mid = s.midtrain(str(out / "midtrained"), data["midtraining"], self.checkpoint("base"))
            self.part("midtrained", lambda: launch(midtrain, mid, "midtrained", processes=n), layout, "mid-training")
            for stage, parent in (("prism_rl", "midtrained"), ("base_rl", "base")):
                rl = s.rl(str(out / stage), self.checkpoint(parent), data["tokenizer"])
                self.part(stage, partial(launch, train_rl, rl, stage, processes=n), layout, "RL")
            longer = s.longer(
                str(out / "midtrained_longer"), data["midtraining"], self.checkpoint("midtrained"), self._longer_steps()
            )
            self.part(
                "midtrained_longer",
                lambda: launch(midtrain, longer, "midtrained_longer", processes=n),
                layout,
                "control: as long as RL took",
            )
            for stage in STAGES:
                self.part(f"evaluate {stage}", partial(self._evaluate, stage, data), layout)
            for stage in STAGES:
                self.part(f"export {stage}", partial(self._export, stage, data["tokenizer"]))
            weights = self.part("weights", self._weights)
            args = self._cka_args(data)
            cka = self.part("CKA", lambda: launch(compare_activations, *args), note="linear CKA per layer")
            export = self.part("verify export", self._verify_export, note="load in transformers, compare logits")
        summary = self._summary(data, weights, cka, export)
        write_json(out / "summary.json", summary)
        for stage in STAGES:
            write_model_card(out / "hf" / stage, Path(self.checkpoint(stage)))
        page = write_report(out)
        self.say(f"report: {page}")
        return summary

    def _longer_steps(self) -> int:
        """Steps of more mid-training that take as long as RL from the mid-trained model took."""
        rl, mid = self.parts["prism_rl"], self.parts["midtrained"]
        per_step = mid["result"]["seconds"] / mid["result"]["step"]
        return max(1, round(rl["result"]["seconds"] / per_step))

    def _round_trip(self) -> list[dict[str, Any]]:
        """Export the base, import it at TP 2, forward it at three layouts against transformers, export it again."""
        hf, back, again = self.out / "hf" / "base", self.out / "round_trip" / "native", self.out / "round_trip" / "hf"
        if not hf.exists():
            self._export("base", str(self.out / "data" / "tokenizer"))
        if not back.exists():
            import_hf(hf, back, ParallelConfig(tensor_model_parallel_size=2))
        checks = []
        for layout in (ParallelConfig(), ParallelConfig(2, 1), ParallelConfig(1, 2)):
            result = verify(hf, back, layout)
            checks.append(
                {
                    "check": f"transformers against Megatron at {layout.describe()}",
                    "max_abs_logit_diff": result.max_abs_logit_diff,
                    "tolerance": result.tolerance,
                    "passed": result.passed,
                }
            )
        if not again.exists():
            export_hf(back, again)
        same = (hf / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
        checks.append({"check": "exported again: weights equal bit for bit", "passed": same})
        failed = [str(c["check"]) for c in checks if not c["passed"]]
        if failed:
            raise PrismError(f"conversion round trip failed: {', '.join(failed)}")
        return checks

    def _evaluate(self, stage: str, data: dict[str, Any]) -> dict[str, Any]:
        s = self.settings
        config = EvaluationConfig(
            tokenizer=data["tokenizer"], tasks=list(TASKS), questions=s.questions, max_new_tokens=s.max_new_tokens,
            data=data["base"], retention="general-heldout", seq_length=s.seq_length, parallel=s.parallel(),
        )  # fmt: skip
        return dict(launch(evaluate_checkpoint, config, self.checkpoint(stage), processes=s.processes))

    def _export(self, stage: str, tokenizer: str) -> str:
        path = self.out / "hf" / stage
        if not path.exists():
            export_hf(Path(self.checkpoint(stage)), path, tokenizer=Path(tokenizer))
        return str(path)

    def _weights(self) -> dict[str, Any]:
        hf = self.out / "hf"
        return {f"{a}->{b}": compare_weights(hf / a, hf / b).to_dict() for a, b in WEIGHT_PAIRS}

    def _cka_args(self, data: dict[str, Any]) -> tuple[Any, ...]:
        pairs = [(self.checkpoint(a), self.checkpoint(b)) for a, b in CKA_PAIRS]
        return pairs, data["base"], "general-heldout", 400, self.settings.seq_length

    def _verify_export(self) -> dict[str, Any]:
        path = self.out / "hf" / "prism_rl"
        result = verify(path, Path(self.checkpoint("prism_rl")), ParallelConfig())
        if not result.passed:
            raise PrismError(f"{path}: differs from the checkpoint by {result.max_abs_logit_diff:.2e} in its logits")
        return {
            "path": str(path), "max_abs_logit_diff": result.max_abs_logit_diff, "tolerance": result.tolerance,
            "loads_in_transformers": True,
        }  # fmt: skip

    def _summary(self, data: dict[str, Any], weights: Any, cka: list[dict[str, Any]], export: Any) -> dict[str, Any]:
        s = self.settings
        architecture = read_architecture(Path(self.checkpoint("base")))
        stages = {}
        samples = {}
        for stage in STAGES:
            result = dict(self.parts[f"evaluate {stage}"]["result"])
            samples[stage] = result.pop("samples")
            stages[stage] = result
        timeline = []
        for name, part in self.parts.items():
            line = {"stage": name, **{k: part[k] for k in ("start", "seconds", "layout", "note")}}
            metrics = read_metrics(self.out / name / "metrics.jsonl")
            tokens = [m["tokens"] for m in metrics if "tokens" in m]
            timeline.append({**line, "tokens": tokens[-1] if tokens else None})
        shares = {}
        for name, steps in (("base", s.base_steps), ("midtraining", s.midtrain_steps)):
            rows = describe(load_manifest(data[name]), steps * s.global_batch_size * s.seq_length)
            shares[name] = [
                {"source": r.name, "domain": r.domain, "weight": r.share, "tokens": r.train_tokens, "epochs": r.epochs}
                for r in rows
                if r.share > 0
            ]
        return {
            "seconds": sum(part["seconds"] for part in self.parts.values()),
            "peak_rss_gb": max(part["peak_rss_gb"] for part in self.parts.values()),
            "versions": versions(),
            "command": " ".join(["prism-nemo", *sys.argv[1:]]),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "seed": s.seed,
            "model": {
                "family": architecture.family, "parameters": parameter_count(architecture),
                "layers": architecture.num_layers, "hidden_size": architecture.hidden_size,
                "vocab_size": architecture.vocab_size,
            },
            "timeline": timeline,
            "stages": stages,
            "weights": weights,
            "cka": {f"{a}/{b}": c for (a, b), c in zip(CKA_PAIRS, cka, strict=True)},
            "conversion": self.parts["round trip"]["result"],
            "hf_export": export,
            "expected": expected_claims(stages),
            "mixtures": shares,
            "samples": samples,
        }  # fmt: skip
