"""Settings of ``slimllm evidence``."""

from __future__ import annotations

from dataclasses import dataclass

from ..cli import check_choice, check_choices, check_range, drop_repeats, flag
from ..errors import UserError
from ..models.shape import RUNTIMES
from .common import DTYPES, VLLM_PYTHON, short_name
from .evaluate import check_generation
from .methods import RECIPES
from .tasks import DATA_DIR_HELP, TASKS, TASKS_HELP, tasks_named, tasks_with_files

PROTOCOLS = {128: "LLM-Pruner, SlimLLM", 2048: "SliceGPT, Wanda", 4096: "Týr"}  # tokens per block -> who measures so
MEASURED_IN = ("llama_cpp", "vllm")
LORA, LORA_TITLE = "lora", "distilled, then LoRA"  # the recipe of two programs


@dataclass
class EvidenceConfig:
    """Settings of a collection of evidence. Raises UserError where a value makes no sense."""

    base_model: str | None = flag("model", "local folder, hub name or .gguf file (required)", leading=True)
    dtype: str = flag("model", "dtype of weights and compute; auto: what each program takes by itself", "auto", choices=DTYPES)
    device: str = flag("model", "where everything is computed; auto takes a GPU if there is one", "auto")
    tmp_dir: str | None = flag("model", "folder for activations that do not fit in memory [TMPDIR, or the system's]")

    shares: tuple[float, ...] = flag("sparsity", "shares of the decoder's parameters to remove, 0 to 1", (0.2, 0.3, 0.5))
    recipes: tuple[str, ...] | None = flag(
        "sparsity", "recipes of slimllm prune, and lora: distilled, then trained on --tune [paper best distilled; with --tune lora too]"
    )
    runtime: str | None = flag(
        "sparsity",
        "as for slimllm prune: what has to run the pruned models, which sets the widths that are allowed [any]",
        choices=RUNTIMES,
    )
    tune: str | None = flag("sparsity", "instructions for lora: the --data_path of slimllm train")

    calibration: str | None = flag(
        "calibration", "as for slimllm prune: a name, file or folder [bookcorpus; self where the hub is out of reach]"
    )
    num_examples: int | None = flag("calibration", "calibration samples [32; best: 192]")
    distill_examples: int = flag("calibration", "samples to distil on", 512)
    seed: int = flag("calibration", "seed of every random choice", 42)

    protocols: tuple[int, ...] = flag(
        "perplexity",
        "tokens per block, a table each: 128 as in LLM-Pruner and SlimLLM, 2048 as in SliceGPT and Wanda, 4096 as in Týr; those beyond the "
        "model's context are left out",
        tuple(PROTOCOLS),
    )
    eval_data: tuple[str, ...] | None = flag(
        "perplexity",
        "any of wikitext2, ptb, c4, python_manual, NAME=FILE, FILE, or none [the first three; python_manual where the hub is out of reach]",
    )
    eval_limit: int | None = flag("perplexity", "only the first N blocks; the figures are marked as limited [all]")

    tasks: tuple[str, ...] = flag("tasks", TASKS_HELP, tuple(TASKS), nargs="*")
    data_dir: str | None = flag("tasks", DATA_DIR_HELP)
    limit: int | None = flag("tasks", "only the first N questions of each task; the results are marked as limited [all]")
    generation: tuple[str, ...] = flag("tasks", "tasks of lm-eval in which the models write, such as gsm8k ifeval humaneval [none]", ())
    include_path: str | None = flag("tasks", "folder of more task definitions for lm-eval, for --generation")
    apply_chat_template: bool = flag("tasks", "put --generation to the models through their chat template", False)
    confirm_run_unsafe_code: bool = flag(
        "tasks", "let lm-eval run the code that the models write, on this machine, as humaneval and mbpp need", False
    )

    latency: bool = flag("latency", "times and memory in transformers, each model beside the dense one", True, negatable=True)
    batch_size: tuple[int, ...] = flag("latency", "sequences at once", (1, 8))
    length: tuple[int, ...] = flag("latency", "tokens of the prompt; lengths beyond the model's context are left out", (128, 512))
    repeats: int = flag("latency", "measurements of each kind", 7)
    runtimes: tuple[str, ...] = flag(
        "latency",
        "other programs whose speeds are measured: llama_cpp (files in 16 bits), vllm (in the environment of script/vllm.sh) [none]",
        (),
        nargs="+",
    )
    vllm: str = flag("latency", "interpreter of an environment with vLLM", VLLM_PYTHON, metavar="PYTHON")

    output: str | None = flag("output", "folder for models, results and the page [eval_log/evidence_NAME of the model]")
    overwrite: bool = flag("output", "start anew", False)
    dry_run: bool = flag("output", "print the steps, and what the prunings will take, and stop", False)

    def __post_init__(self):
        if not self.base_model:
            raise UserError("--base_model is required: a local folder, hub name or .gguf file")
        check_choices(self)
        drop_repeats(self, "shares", "protocols", "batch_size", "length", "runtimes")
        for share in self.shares:
            if not 0 < share < 1:
                raise UserError(f"--shares {share}: must be above 0 and below 1")
        if self.recipes is None:
            self.recipes = (*RECIPES, *([LORA] if self.tune else []))
        drop_repeats(self, "recipes")
        for name in self.recipes:
            check_choice("recipes", name, (*RECIPES, LORA))
        if LORA in self.recipes and not self.tune:
            raise UserError("--recipes lora: it trains on instructions; name some with --tune")
        if self.tune and LORA not in self.recipes:
            raise UserError("--tune: nothing is trained on it; add lora to --recipes")
        for length in self.protocols:
            if length not in PROTOCOLS:
                raise UserError(f"--protocols {length}: not one of {', '.join(map(str, PROTOCOLS))}")
        self.tasks = tasks_with_files(tasks_named(self.tasks), self.data_dir)
        self.runtimes = tuple(name for name in self.runtimes if name != "none")
        for name in self.runtimes:
            check_choice("runtimes", name, MEASURED_IN)
        check_generation(self)
        for name in ("eval_limit", "limit", "num_examples", "repeats"):
            check_range(self, name, 1)
        check_range(self, "distill_examples", 2)
        for name in ("batch_size", "length"):
            for size in getattr(self, name):
                if size < 1:
                    raise UserError(f"--{name} {size}: must be at least 1")
        self.eval_data = ("none",) if "none" in (self.eval_data or ()) else tuple(dict.fromkeys(self.eval_data or ())) or None
        if self.output is None:
            self.output = f"eval_log/evidence_{short_name(self.base_model)}"
