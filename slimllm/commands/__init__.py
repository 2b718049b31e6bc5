"""The programs behind ``python -m slimllm NAME``: each is a dataclass of settings and a ``run(settings)``.

To add one: a module, here or among the experiments, and an entry in COMMANDS.
"""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass

from .. import cli


@dataclass(frozen=True)
class Command:
    """One program. ``module`` (inside the package) holds its ``settings`` class and ``run``, which gives an exit status or None.

    ``usage``: what follows its name. ``interrupted``: what is left where a user stops it. ``advice``: against a full GPU.
    """

    module: str
    settings: str
    usage: str
    description: str
    interrupted: str = "nothing was written"
    advice: str = "use --device cpu"

    def load(self):
        """(settings class, ``run``); imports the module."""
        module = importlib.import_module(f"slimllm.{self.module}")
        return getattr(module, self.settings), module.run

    def parser(self, name: str) -> argparse.ArgumentParser:
        prog = f"python -m slimllm {name}"
        return cli.build_parser(self.load()[0], prog=prog, usage=f"{prog} {self.usage}", description=self.description)


_CONTINUES = "what is finished is kept; the same command goes on with the rest"

COMMANDS = {
    "evaluate": Command(
        "commands.evaluate",
        "EvalConfig",
        "MODEL [flags]",
        "Perplexity and the paper's zero-shot tasks of a checkpoint, in one JSON file.",
        _CONTINUES,
        "use --device cpu, --dtype bfloat16 or a smaller --max_seq_len",
    ),
    "latency": Command(
        "commands.latency",
        "LatencyConfig",
        "DIR --baseline DENSE [flags]",
        "Parameters, bytes, prefill and decode times of a model, beside the dense one it came from.",
        advice="use --device cpu, or a smaller --batch_size or --length",
    ),
    "export-gguf": Command(
        "commands.export_gguf", "ExportConfig", "DIR [flags]", "Writes a checkpoint, dense or pruned, as GGUF files for llama.cpp."
    ),
    "export-transformers": Command(
        "commands.export_transformers",
        "StockConfig",
        "DIR OUT [flags]",
        "Writes a pruned checkpoint whose layers all have one width as a plain model of its family.",
    ),
    "verify": Command(
        "commands.verify",
        "VerifyConfig",
        "DIR [FILE.gguf ...] [flags]",
        "Proves that a checkpoint, and what was made of it, is the model that was pruned. Exit status 1 where it is not.",
    ),
    "llama-cpp-speed": Command(
        "commands.llama_cpp_speed",
        "SpeedConfig",
        "DENSE.gguf PRUNED.gguf ... [flags]",
        "Tokens per second of llama.cpp with each file, and the ratio to the first.",
    ),
    "vllm-speed": Command(
        "commands.vllm_speed",
        "VllmSpeedConfig",
        "DENSE PRUNED ... [flags]",
        "Tokens per second of vLLM with each model folder, and the ratio to the first.",
    ),
    "report": Command("commands.report", "ReportConfig", "RECORD ... [flags]", "Tables from the records of runs."),
    "ablation": Command(
        "experiments.ablation",
        "AblationConfig",
        "--base_model MODEL [flags]",
        "Perplexity with each ingredient of the method off or changed in turn, at equal kept parameters.",
        _CONTINUES,
        "use --device cpu or --dtype bfloat16",
    ),
    "compare": Command(
        "experiments.compare",
        "CompareConfig",
        "--base_model MODEL [flags]",
        "SlimLLM beside other pruning methods and the quantized dense model, at equal parameters.",
        _CONTINUES,
        "use --device cpu or --dtype bfloat16",
    ),
    "benchmark": Command(
        "experiments.benchmark",
        "BenchmarkConfig",
        "[flags]",
        "How much faster the package prunes than a plain transcription of the paper's equations.",
    ),
    "gpu": Command(
        "experiments.gpu",
        "GpuConfig",
        "[flags]",
        "What pruning takes and gives on a GPU, on random models made on the spot; script/gpu.sh.",
        "the steps that are finished are in the file of results",
    ),
    "families": Command("commands.families", "NoSettings", "", "The supported model families, as Markdown: docs/families.md."),
    "flags": Command("commands.flags", "NoSettings", "", "Every flag of every program, as Markdown."),
}
