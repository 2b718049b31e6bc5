"""The programs behind ``python -m slimllm NAME``: each is a dataclass of settings and a ``run(settings)``.

To add one: its settings, a module here or among the experiments, and an entry in COMMANDS.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass

from .. import cli


@dataclass(frozen=True)
class Command:
    """One program. ``settings``: "module:class" inside the package, of its flags; ``module``: where its ``run(settings)`` is, which gives
    an exit status or None. Help and errors need the settings alone.

    ``usage``: what follows its name. ``interrupted``: what is left where a user stops it. ``advice``: against a full GPU.
    """

    settings: str
    module: str
    usage: str
    description: str
    interrupted: str = "nothing was written"
    advice: str = "use --device cpu"

    def settings_class(self) -> type:
        module, _, name = self.settings.partition(":")
        return getattr(importlib.import_module(f"slimllm.{module}"), name)

    def load(self) -> Callable:
        """``run``; imports all that it needs."""
        return importlib.import_module(f"slimllm.{self.module}").run

    def parser(self, name: str) -> argparse.ArgumentParser:
        prog = f"python -m slimllm {name}"
        return cli.build_parser(self.settings_class(), prog=prog, usage=f"{prog} {self.usage}", description=self.description)


_CONTINUES = "what is finished is kept; the same command goes on with the rest"

COMMANDS = {
    "evaluate": Command(
        "settings.evaluate:EvalConfig",
        "commands.evaluate",
        "MODEL [flags]",
        "Perplexity and the paper's zero-shot tasks of a checkpoint, in one JSON file.",
        _CONTINUES,
        "use --device cpu, --dtype bfloat16 or a smaller --max_seq_len",
    ),
    "latency": Command(
        "settings.latency:LatencyConfig",
        "commands.latency",
        "DIR --baseline DENSE [flags]",
        "Parameters, bytes, prefill and decode times of a model, beside the dense one it came from.",
        advice="use --device cpu, or a smaller --batch_size or --length",
    ),
    "export-gguf": Command(
        "settings.export_gguf:ExportConfig",
        "commands.export_gguf",
        "DIR [flags]",
        "Writes a checkpoint, dense or pruned, as GGUF files for llama.cpp.",
    ),
    "export-transformers": Command(
        "settings.export_transformers:StockConfig",
        "commands.export_transformers",
        "DIR OUT [flags]",
        "Writes a pruned checkpoint whose layers all have one width as a plain model of its family.",
    ),
    "verify": Command(
        "settings.verify:VerifyConfig",
        "commands.verify",
        "DIR [FILE.gguf ...] [flags]",
        "Proves that a checkpoint, and what was made of it, is the model that was pruned. Exit status 1 where it is not.",
    ),
    "llama-cpp-speed": Command(
        "settings.llama_cpp_speed:SpeedConfig",
        "commands.llama_cpp_speed",
        "DENSE.gguf PRUNED.gguf ... [flags]",
        "Tokens per second of llama.cpp with each file, and the ratio to the first.",
    ),
    "vllm-speed": Command(
        "settings.vllm_speed:VllmSpeedConfig",
        "commands.vllm_speed",
        "DENSE PRUNED ... [flags]",
        "Tokens per second of vLLM with each model folder, and the ratio to the first.",
    ),
    "report": Command("settings.report:ReportConfig", "commands.report", "RECORD ... [flags]", "Tables from the records of runs."),
    "ablation": Command(
        "settings.ablation:AblationConfig",
        "experiments.ablation",
        "--base_model MODEL [flags]",
        "Perplexity with each ingredient of the method off or changed in turn, at equal kept parameters.",
        _CONTINUES,
        "use --device cpu or --dtype bfloat16",
    ),
    "explore": Command(
        "settings.explore:ExploreConfig",
        "experiments.explore",
        "MODEL [flags]",
        "What pruning a model by any share would cost, predicted from one price list, before anything is pruned.",
        "nothing was written but a price list that was finished",
        "use --device cpu or --dtype bfloat16",
    ),
    "compare": Command(
        "settings.compare:CompareConfig",
        "experiments.compare",
        "--base_model MODEL [flags]",
        "SlimLLM beside other pruning methods and the quantized dense model, at equal parameters.",
        _CONTINUES,
        "use --device cpu or --dtype bfloat16",
    ),
    "benchmark": Command(
        "settings.benchmark:BenchmarkConfig",
        "experiments.benchmark",
        "[flags]",
        "How much faster the package prunes than a plain transcription of the paper's equations.",
    ),
    "gpu": Command(
        "settings.gpu:GpuConfig",
        "experiments.gpu",
        "[flags]",
        "What pruning takes and gives on a GPU, on random models made on the spot; script/gpu.sh.",
        "the steps that are finished are in the file of results",
    ),
    "families": Command("cli:NoSettings", "commands.families", "", "The supported model families, as Markdown: docs/families.md."),
    "flags": Command("cli:NoSettings", "commands.flags", "", "Every flag of every program, as Markdown."),
}
