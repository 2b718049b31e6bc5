"""The programs behind ``slimllm NAME``: each is a dataclass of settings and a ``run(settings)``.

To add one: its settings, a module here or among the experiments, and an entry in COMMANDS.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass

from .. import cli, plugins


@dataclass(frozen=True)
class Command:
    """One program. ``settings``: "module:class" inside the package, of its flags; ``module``: where its ``run(settings)`` is, which gives
    an exit status or None. Help and errors need the settings alone.

    ``usage``: what follows its name. ``interrupted``: what is left where a user stops it. ``advice``: against a full GPU. ``examples``: of
    what follows its name. ``flags``: "module" whose ``add_flags(parser)`` adds some that are no settings, and whose ``parsed(parser, argv,
    script)`` makes settings of all of them.
    """

    settings: str
    module: str
    usage: str
    description: str
    interrupted: str = "nothing was written"
    advice: str = "use --device cpu"
    examples: tuple[str, ...] = ()
    flags: str | None = None

    def settings_class(self) -> type:
        module, _, name = self.settings.partition(":")
        return getattr(_module(module), name)

    def parsed(self, name: str, argv: list[str] | None, script: str | None = None):
        """The settings that these arguments mean. Raises UserError."""
        parser = self.parser(name, script)
        return _module(self.flags).parsed(parser, argv, script) if self.flags else cli.parse(parser, self.settings_class(), argv)

    def load(self) -> Callable:
        """``run``; imports all that it needs."""
        return _module(self.module).run

    def parser(self, name: str, script: str | None = None) -> argparse.ArgumentParser:
        """Its parser; ``script``: the name it goes by, where that is not ``slimllm NAME``."""
        prog = f"slimllm {name}" if script is None else f"python {script}"
        parser = cli.build_parser(self.settings_class(), prog, self.usage, self.description, self.examples)
        if self.flags:
            _module(self.flags).add_flags(parser)
        return parser

    def run(self, name: str, argv: list[str] | None, script: str | None = None) -> int:
        """Exit status: 0, what the program says, 2 for a user's mistake (one line on stderr), 130 when interrupted."""

        def run():
            plugins.load(argv)
            settings = self.parsed(name, argv, script)
            from ..utils.memory import memory_errors

            work = self.load()
            with cli.logging_to_console(), memory_errors(self.advice):
                return work(settings)

        return cli.guarded(script or f"slimllm {name}", run, self.interrupted)


def _module(name: str):
    return importlib.import_module(f"slimllm.{name}")


def run_script(script: str, name: str, argv: list[str] | None = None) -> int:
    """A program under the name of the paper's script; its exit status."""
    return COMMANDS[name].run(name, argv, script)


_CONTINUES = "what is finished is kept; the same command goes on with the rest"

COMMANDS = {
    "prune": Command(
        "settings.pruning:PruneConfig",
        "commands.prune",
        "MODEL [flags]",
        "Prunes whole attention heads and feed-forward channels of a Llama-family model (SlimLLM, arXiv 2505.22689).",
        advice="use --device cpu, --eval_device cpu or --dtype bfloat16",
        examples=("MODEL --smaller 0.2 --recipe best --output_dir smaller", "MODEL --fit 6GB --context 8192 --recipe best --dry_run"),
        flags="settings.pruning",
    ),
    "train": Command(
        "settings.training:TrainConfig",
        "commands.train",
        "DIR [flags]",
        "Recovers a pruned model with LoRA on instruction data; the defaults are the paper's run.",
        "checkpoints in the output folder stay: go on with --resume_from_checkpoint last",
        "lower --micro_batch_size or --cutoff_len",
        ("prune_log/NAME --merge", "prune_log/NAME --data_path YOUR.jsonl --teacher DENSE"),
    ),
    "chat": Command(
        "settings.chat:ChatConfig",
        "commands.chat",
        "MODEL [--beside DENSE] [flags]",
        "A conversation in the terminal or the browser, with one model or with two beside each other.",
        examples=("prune_log/NAME", "prune_log/NAME --beside path/to/dense"),
    ),
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
    "evidence": Command(
        "settings.evidence:EvidenceConfig",
        "commands.evidence",
        "MODEL [flags]",
        "Prunes by each recipe and share, measures by each protocol of the literature, and puts all of it on one page. Exit status 1 where "
        "a step failed.",
        _CONTINUES,
        "use --device cpu or --dtype bfloat16",
        ("MODEL --dry_run", "MODEL --shares 0.2 --recipes best --generation gsm8k ifeval"),
    ),
    "ablation": Command(
        "settings.ablation:AblationConfig",
        "experiments.ablation",
        "MODEL [flags]",
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
        "MODEL [flags]",
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
    "toy-mixture": Command(
        "settings.toy_mixture:ToyMixtureConfig",
        "experiments.toy_mixture",
        "OUT [flags]",
        "Trains a small mixture of experts in a few minutes, to measure on where no real one is at hand.",
    ),
    "families": Command("cli:NoSettings", "commands.families", "", "The supported model families, as Markdown: docs/families.md."),
    "flags": Command("cli:NoSettings", "commands.flags", "", "Every flag of every program, as Markdown."),
}
