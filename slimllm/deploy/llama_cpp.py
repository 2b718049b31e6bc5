"""llama.cpp's own server, in this process on a loopback port, through the xllamacpp package."""

from __future__ import annotations

import contextlib
import json
import statistics
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import UserError

FORCED = 1e5  # a bias that makes a token certain; what the server reports is the probability without it


class LlamaCpp:
    """A GGUF file loaded by an unmodified llama.cpp and asked over HTTP.

    Args:
        path: the .gguf file. context: tokens that fit. threads: of the computation; None: as many as PyTorch has.
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
            settings.n_ctx_checkpoints = 0  # where layers have windows, it would go on from what it kept of an earlier text
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads or torch.get_num_threads()
        try:
            self._server = xllamacpp.Server(settings)
        except RuntimeError as error:
            raise UserError(f"{path}: llama.cpp cannot load it ({error})") from None
        self.address, self._computed = self._server.listening_address, False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if not self._computed:  # a server that is stopped before it began to compute never ends
            with contextlib.suppress(RuntimeError, OSError):
                self.ask("/completion", prompt=[0], n_predict=1)
        del self._server

    def ask(self, path: str, **body) -> dict:
        """POSTs JSON to the server. Raises RuntimeError with its message where it answers with an error."""
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                found = json.load(answer)
                self._computed |= path == "/completion"
                return found
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"llama.cpp: {path}: {error.read().decode(errors='replace')[:300]}") from None

    def tokenize(self, text: str) -> list[int]:
        """Token ids of plain text, with the special tokens that the model has before or after it."""
        return self.ask("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]

    def log_probabilities(self, ids: list[int]) -> list[float]:
        """log p(ids[t] | ids[:t]) in nats for t = 1 .. len(ids) - 1."""
        values = []
        for t in range(1, len(ids)):
            answer = self.ask(
                "/completion", prompt=ids[:t], n_predict=1, n_probs=1, temperature=0, logit_bias=[[ids[t], FORCED]], cache_prompt=True
            )
            (token,) = answer["completion_probabilities"]
            if token["id"] != ids[t]:
                raise RuntimeError(f"llama.cpp gave token {token['id']} where {ids[t]} was forced")
            values.append(token["logprob"])
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


def speeds(files: Sequence[str | Path], prompt_tokens: int, new_tokens: int, repeats: int, threads: int | None = None) -> list[dict]:
    """For each .gguf file its name, size in bytes and the medians of prompt and generation speed in tokens per second.

    Raises UserError where a model takes no prompt of that length.
    """

    def once(path):
        with LlamaCpp(path, prompt_tokens + new_tokens + 8, threads, exact=False) as server:
            try:
                server.speed(prompt_tokens, new_tokens)  # warms up
                return server.speed(prompt_tokens, new_tokens)
            except RuntimeError as error:
                raise UserError(f"{path}: {error}") from None

    # in turns, so that all see the same machine, and one server at a time: idle ones would take part of it
    runs = [[once(path) for path in files] for _ in range(repeats)]
    medians = [[statistics.median(values) for values in zip(*of_file)] for of_file in zip(*runs)]
    return [
        {"name": Path(path).name, "bytes": Path(path).stat().st_size, "prompt": prompt, "generation": generation}
        for path, (prompt, generation) in zip(files, medians)
    ]
