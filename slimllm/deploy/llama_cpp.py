"""llama.cpp's own server, in this process on a loopback port, through the xllamacpp package."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
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
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads or torch.get_num_threads()
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
