"""llama.cpp's own server, in this process on a loopback port, through the xllamacpp package.

``python -m slimllm.llama_cpp DENSE.gguf PRUNED.gguf ...`` measures how fast it runs each file.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from . import cli, report
from .cli import UserError, check_range, flag

log = logging.getLogger("slimllm")

FORCED = 1e5  # a bias that makes a token certain; what the server reports is the probability without it


class LlamaCpp:
    """A GGUF file loaded by an unmodified llama.cpp and asked over HTTP.

    Args:
        path: the .gguf file. context: tokens that fit. threads: of the computation; None: llama.cpp's choice.
        exact: keep the KV cache in float32 and attention plain, as transformers does, for comparisons.
    Raises:
        UserError: the file is missing or llama.cpp does not load it; xllamacpp is not installed.
    """

    def __init__(self, path: str | Path, context: int = 512, threads: int | None = None, exact: bool = True):
        try:
            import xllamacpp
        except ImportError:
            raise UserError("llama.cpp is needed to read a .gguf file back: pip install xllamacpp") from None
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = context, 1, 0
        settings.warmup, settings.verbosity, settings.fit_params = False, -1, False
        if exact:
            settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if threads:
            settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        try:
            self._server = xllamacpp.Server(settings)
        except RuntimeError as error:
            raise UserError(f"{path}: llama.cpp cannot load it ({error})") from None
        self.address = self._server.listening_address

    def __enter__(self):
        return self

    def __exit__(self, *_):
        del self._server

    def ask(self, path: str, **body) -> dict:
        """POSTs JSON to the server. Raises RuntimeError with its message where it answers with an error."""
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"llama.cpp: {path}: {error.read().decode(errors='replace')[:300]}") from None

    def tokenize(self, text: str) -> list[int]:
        """Token ids of plain text, with the tokens that the model wants around it."""
        return self.ask("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]

    def log_probabilities(self, ids: list[int]) -> list[float]:
        """log p(ids[t] | ids[:t]) in nats for t = 1 .. len(ids) - 1."""
        values = []
        for t in range(1, len(ids)):
            answer = self.ask(
                "/completion", prompt=ids[:t], n_predict=1, n_probs=1, temperature=0, logit_bias=[[ids[t], FORCED]], cache_prompt=True
            )
            (found,) = answer["completion_probabilities"]
            if found["id"] != ids[t]:
                raise RuntimeError(f"llama.cpp gave token {found['id']} where {ids[t]} was forced")
            values.append(found["logprob"])
        return values

    def greedy(self, ids: list[int], tokens: int, banned: list[int]) -> list[int]:
        """The ids that follow, each the most probable that is not ``banned``."""
        never = [[i, False] for i in banned]
        return self.ask("/completion", prompt=ids, n_predict=tokens, temperature=0, logit_bias=never, return_tokens=True)["tokens"]

    def speed(self, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
        """Tokens per second that the server reports: (reading a prompt, generating)."""
        prompt = [3 + i % 50 for i in range(prompt_tokens)]
        timings = self.ask("/completion", prompt=prompt, n_predict=new_tokens, temperature=0, ignore_eos=True, cache_prompt=False)[
            "timings"
        ]
        return timings["prompt_per_second"], timings["predicted_per_second"]


@dataclass
class SpeedConfig:
    """Settings of a measurement. Raises UserError where a value makes no sense."""

    files: tuple = flag("files", ".gguf files; the first is what the others are compared with", positional=True, nargs="*")
    prompt_tokens: int = flag("measurement", "tokens of the prompt", 256, type=int)
    new_tokens: int = flag("measurement", "tokens generated", 64, type=int)
    repeats: int = flag("measurement", "runs of each file, in turns; the medians are shown", 5, type=int)
    threads: int = flag("measurement", "threads of the computation [llama.cpp's choice]", type=int)

    def __post_init__(self):
        if not self.files:
            raise UserError("name .gguf files: python -m slimllm.llama_cpp DENSE.gguf PRUNED.gguf")
        for name in ("prompt_tokens", "new_tokens", "repeats", "threads"):
            check_range(self, name, 1)


def speeds(settings: SpeedConfig) -> list[dict]:
    """For each file its name, size in bytes and the medians of prompt and generation speed in tokens per second."""

    def once(path):
        with LlamaCpp(path, settings.prompt_tokens + settings.new_tokens + 8, settings.threads, exact=False) as server:
            server.speed(settings.prompt_tokens, settings.new_tokens)  # warms up
            return server.speed(settings.prompt_tokens, settings.new_tokens)

    # in turns, so that all see the same machine, and one server at a time: idle ones would take part of it
    runs = [[once(path) for path in settings.files] for _ in range(settings.repeats)]
    medians = [[statistics.median(values) for values in zip(*of_file)] for of_file in zip(*runs)]
    return [
        {"file": Path(path).name, "bytes": Path(path).stat().st_size, "prompt": prompt, "generation": generation}
        for path, (prompt, generation) in zip(settings.files, medians)
    ]


def speed_table(found: list[dict]) -> list[str]:
    """The speeds as lines of Markdown, with the ratio to the first file."""
    rows = [["file", "size", "prompt, tokens/s", "generation, tokens/s"]]
    for f in found:
        cells = [f"{f[kind]:.1f} ({f[kind] / found[0][kind]:.2f} x)" for kind in ("prompt", "generation")]
        rows.append([f["file"], f"{f['bytes'] / 1e6:.1f} MB", *cells])
    return report.aligned(rows)


def main(argv=None) -> int:
    """Exit status: 0, 2 for a user's mistake (one line on stderr), 130 when interrupted."""

    def measure(settings):
        log.info("%s", "\n".join(speed_table(speeds(settings))))

    description = "Measures how fast llama.cpp reads a prompt and generates with each file."
    return cli.program(SpeedConfig, "slimllm.llama_cpp", "DENSE.gguf PRUNED.gguf ... [flags]", description, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
