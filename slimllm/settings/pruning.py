"""Every setting of a pruning run: declared once, validated once, shown by ``--help``.

A field's metadata is its command-line flag: help text (with unit), group and allowed values.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import os
from dataclasses import FrozenInstanceError, asdict, dataclass, fields
from pathlib import Path

from .. import cli
from ..cli import check_choice, check_choices, check_range, check_types, flag, given, without_effect
from ..errors import UserError
from ..models.parts import EXPERT_CHANNELS, PRUNED_KINDS
from ..models.shape import RUNTIMES, ModelShape, limits_of, why_not_missing
from .common import DTYPES, OUTTYPES, QUANTIZED
from .methods import CHANNEL_SCORES, EXPERT_SCORES, HEAD_CHOICES, LAYER_RATIOS, METHODS, PRICES, RECIPES, RECOVERIES
from .samples import SampleSpec, is_sample_file

log = logging.getLogger("slimllm")

PUBLISHED_EXAMPLES = 32  # calibration samples of the paper
BEST_EXAMPLES = 192  # those of the best recipe; more bought nothing on a model of 4,864 channels
RIDGE_TOKENS = 4096  # calibration tokens up to which the ridge is the median input variance; with more of them it falls
# units of --fit
BYTES = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
COUNTS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}  # units of --target_params
BY_PRICES = ("fit", "target_speedup")  # of AMOUNTS, those that only layer_ratio auto can meet, or for fit a mixture of experts
HEAD_UNITS = ("group", "query")
REGULAR = ("uniform", "auto")  # ways to spread the sparsity that can give all layers the same widths
OF_MIXTURES = ("uniform", "importance", "auto")  # those that know experts
PARTS = ("both", "heads", "channels", "experts")
DISTILLATIONS = ("none", "scales", "all")
SIZES = ("pruning_ratio", "target_sparsity", "smaller", "target_params")  # each says how many parameters are to go
AMOUNTS = (*SIZES, *BY_PRICES)  # each says how much is to go
WHOLE = ("smaller", "target_params", "fit")  # of AMOUNTS, those that the vocabulary counts in
VOCABULARIES = ("keep", "auto")
# what --plan says in their place
_PLANNED = (*AMOUNTS, "pruned_layers", "drop_layers", "drop_parts", "alpha", "layer_ratio", "prune", "price_list")
GGUF_BLOCK = 32  # rows of quantized tensors come in blocks of this
LONGEST_NAME = 200  # bytes of a file name; what is written beside a folder while it is made needs a few more, and 255 are allowed


# The published code spares the lowest-scoring 1 % of the channels. least_squares, not published, does better without.
PUBLISHED_KEEP_LOWEST = 0.01

# The paper's two settings for 32 layers: (ratio up to which it is used, pruned layers, alpha).
PAPER_SETTINGS = ((0.4, 26, 10.0), (1.0, 30, 7.0))


@dataclass
class PruneConfig:
    """Settings of one run. Raises UserError where a value, or two together, make no sense.

    Fields that default to None are resolved in ``__post_init__`` or, where they depend on the model, in the copy that
    :meth:`resolved` gives.
    """

    base_model: str | None = flag("model", "local folder, hub name or .gguf file (required)", leading=True, often=True)
    dtype: str = flag("model", "dtype of compute: float32 on a CPU, the checkpoint's own on a GPU", "auto", choices=DTYPES)
    device: str = flag("model", "where the layers are computed; auto takes a GPU if there is one", "auto")
    eval_device: str = flag("model", "where perplexity is computed", "auto")
    tmp_dir: str | None = flag("model", "folder for activations that do not fit in memory [TMPDIR, or the system's]")

    pruning_ratio: float | None = flag(
        "sparsity",
        "mean share of heads and channels removed from the pruned layers, 0 to 1 (paper: 0.25 for 20 %%, 0.55 for 50 %%) [0.25]",
    )
    target_sparsity: float | None = flag(
        "sparsity",
        "share of the decoder layers' parameters to remove, 0 to 1, met to within one channel; instead of --pruning_ratio",
    )
    smaller: float | None = flag(
        "sparsity", "share of the whole model's parameters to remove, embeddings counted, 0 to 1; instead of --pruning_ratio", often=True
    )
    target_params: str | None = flag(
        "sparsity", "parameters that the whole model is to keep, such as 5.4B or 100M; instead of --pruning_ratio"
    )
    fit: str | None = flag(
        "sparsity",
        "layer_ratio auto, or a mixture of experts: bytes that a GGUF file of the model and its KV cache are to take, such as 6GB "
        "(decimal; GiB and TiB too); instead of --pruning_ratio, or besides another amount: all are met",
    )
    context: int = flag("sparsity", "with --fit: tokens in the KV cache", 4096)
    gguf_type: str = flag("sparsity", "with --fit: type of the weights in the file, as for export-gguf", "q8_0", choices=OUTTYPES)
    target_speedup: float | None = flag(
        "sparsity",
        "layer_ratio auto: how many times as fast a token is to be generated, by layer times measured on this machine, such as 1.5; "
        "instead of --pruning_ratio, or besides another amount: all are met",
    )
    drop_layers: int | None = flag(
        "sparsity",
        "how many whole layers go first, those that turn their input least (Eq. 11), one by one or, with --recovery least_squares where "
        "less is lost so, in a row; the amount asked for counts them, and what is left of it goes from the layers that stay [none]",
    )
    drop_parts: int | None = flag(
        "sparsity",
        "how many whole attention and feed-forward parts go first, those that turn the states least (Eq. 11, for each part); with --prune "
        "heads attention alone, with --prune channels feed-forward parts alone; the amount asked for counts them [none]",
    )
    pruned_layers: int | None = flag(
        "sparsity",
        "how many layers, the least important ones, lose something; with auto, which may take them all, it only scales --pruning_ratio "
        "[26 of 32, or 30 of 32 from ratio 0.4 on, scaled to the depth]",
    )
    alpha: float | None = flag(
        "sparsity", "with importance: how strongly importance spreads the ratios (Eq. 11) [10, or 7 from ratio 0.4 on]"
    )
    layer_ratio: str | None = flag(
        "sparsity",
        "importance: by Eq. 11; uniform: the same from the least important layers; middle: the same from all but the first and last; "
        "ranking: one ranking of all heads and channels; auto: the least predicted loss over all parts of all layers, by a price list "
        "[the method's: importance; best: auto]",
        choices=LAYER_RATIOS,
    )
    prices: str = flag(
        "sparsity",
        "auto: how the price list is measured. gradient: one backward pass; streams: without gradients, by running each pruned part "
        "through the layers after it, which takes a time that grows with the square of the depth",
        "gradient",
        choices=PRICES,
    )
    price_list: str | None = flag("sparsity", "auto: take the prices from this file, the price_list.json of a run or of slimllm explore")
    prune: str | None = flag(
        "sparsity",
        "what goes: attention heads, feed-forward channels, both, or whole experts; of a mixture of experts channels are those of its "
        "experts, the same number of each, and both these and whole experts [both; channels where no head can go; experts of a mixture]",
        choices=PARTS,
    )
    plan: str | None = flag(
        "sparsity", "prune exactly the heads and channels that this file names, the pruning.json of a run; nothing else is chosen"
    )
    head_unit: str = flag(
        "sparsity", "grouped-query attention: remove whole KV groups, or as many query heads out of each group", "query", choices=HEAD_UNITS
    )
    runtime: str = flag(
        "sparsity", "what has to run the pruned model without this project: it sets which widths are allowed", "any", choices=RUNTIMES
    )
    round_to: int | None = flag("sparsity", "keep channels, and heads x head size, in multiples of this [1; with --runtime gguf 32]")

    vocab: str = flag(
        "vocabulary",
        "tokens that stay: keep (all), a number or a share of them, such as 32000 or 0.5, or auto: as many as --smaller, "
        "--target_params or --fit is met best with, by the price list",
        "keep",
    )
    vocab_text: tuple[str, ...] | None = flag(
        "vocabulary",
        "text of the kind that the model is for, .txt or .jsonl files or folders of them: its tokens stay first [the calibration text]",
    )
    vocab_scripts: tuple[str, ...] | None = flag(
        "vocabulary", "scripts that stay, such as latin: tokens with letters of others go first [those of the text]"
    )
    vocab_multiple: int = flag("vocabulary", "the number of tokens is raised to a multiple of this", 64)

    method: str = flag("method", "SlimLLM, or what it is compared with, as its authors' code does it", "slimllm", choices=METHODS)
    recipe: str = flag(
        "method",
        "paper: the published method; best: what measured best; distilled: the same, then --distill all "
        "[slimllm prune: best; hf_prune.py, and other methods: paper]",
        "paper",
        choices=RECIPES,
        often=True,
    )
    recovery: str | None = flag(
        "method", "what the kept output weights become [the method's: linear; best: least_squares]", choices=RECOVERIES
    )
    new_bias: bool = flag(
        "method",
        "let the recovery add biases to output projections that have none (--no_new_bias: the fit goes through zero)",
        True,
        negatable=True,
    )
    ridge: float | None = flag(
        "method", "least_squares: ridge as a multiple of the median input variance [4096 / calibration tokens, at most 1]"
    )
    look_back: float | None = flag(
        "method",
        "least_squares: the share of what the layers before it have lost that each fit makes up for, 0 to 1 [0; best: 0.3]",
    )
    keep_lowest: float | None = flag(
        "method",
        "share of a layer's channels, those of the lowest scores, that stay nevertheless, as in the published code "
        "[0.01; with least_squares 0]",
    )
    channel_score: str | None = flag(
        "method",
        "how channels are ranked; all but feature_space are for comparison [the method's: feature_space]",
        choices=CHANNEL_SCORES,
    )
    head_choice: str | None = flag(
        "method",
        "how heads are scored and chosen; leave_one_out: without the swaps of the greedy search; all but these two are for comparison "
        "[the method's: greedy]",
        choices=HEAD_CHOICES,
    )
    expert_score: str | None = flag(
        "method",
        "how experts are ranked. routed: by the sum over tokens of the norm of what they give, with the router's weight; reap: by its mean "
        "over the tokens routed to them; frequency: by how many these are [the method's: routed]",
        choices=EXPERT_SCORES,
    )
    distill: str | None = flag(
        "distillation",
        "train the pruned model to predict what the dense one predicts: scales: norms, biases and one factor per input of the output "
        "projections; all: every weight of the decoder, which takes five times the memory [none; distilled: all]",
        choices=DISTILLATIONS,
    )
    distill_examples: int = flag("distillation", "samples to train on, half of them calibration text and half the model's own", 512)
    distill_epochs: int = flag("distillation", "passes over them", 1)
    distill_learning_rate: float | None = flag(
        "distillation", "peak learning rate [all: 0.0026 x RMS of the weights x root of the divergence before; scales: 0.003]"
    )

    calibration: str | None = flag(
        "calibration",
        "bookcorpus, c4, wikitext2, hub:OWNER/NAME[/CONFIG][:COLUMN[:SPLIT]] (text or messages of the hub), self (sampled from the model), "
        "a .txt file, a .jsonl file with rows of text, messages or ShareGPT conversations, a folder of such files, "
        "or a calibration.safetensors [bookcorpus; self where the hub is out of reach]",
        often=True,
    )
    num_examples: int | None = flag("calibration", "samples [32; best: 192]")
    self_share: float | None = flag(
        "calibration", "share of the samples that the model itself writes, 0 to 1, the rest being --calibration's [0; best: 0.5]"
    )
    chat_share: float = flag(
        "calibration", "of what the model writes, the share that it writes as conversations, by its chat template, 0 to 1", 0.0
    )
    seq_len: int = flag("calibration", "tokens per sample", 128)
    seed: int = flag("calibration", "seed of every random choice", 42)

    eval_data: tuple[str, ...] | None = flag(
        "evaluation",
        "any of wikitext2, ptb, c4, python_manual, NAME=FILE, FILE, or none [wikitext2 ptb; python_manual where the hub is out of reach]",
    )
    max_seq_len: int = flag("evaluation", "tokens per block of text for perplexity", 128)
    eval_limit: int | None = flag("evaluation", "only the first N blocks; the figures are marked as limited [all]")
    prompt: tuple[str, ...] | None = flag(
        "evaluation",
        "what the dense and the pruned model answer at the end, greedily, where they fit into memory; none: nothing "
        "[three short questions; none with --eval_data none]",
    )
    test_after_train: bool = flag("evaluation", "print continuations of a few prompts, before and after", False)
    temperature: float = flag("evaluation", "of these continuations; 0 is greedy", 1.0)
    top_p: float = flag("evaluation", "nucleus of these continuations, 0 to 1", 0.95)

    output_dir: str | None = flag("output", "folder for everything of the run, in place of prune_log/NAME/", often=True)
    save_ckpt_log_name: str = flag("output", "NAME: everything goes to prune_log/NAME/", "llama_prune")
    save_dtype: str = flag(
        "output", "dtype of the checkpoint; auto: the base model's, or bfloat16 for a .gguf file of fewer bits", "auto", choices=DTYPES
    )
    save_model: bool = flag("output", "write the pruned model (--no_save_model: only the record)", True, negatable=True)
    overwrite: bool = flag("output", "replace what an earlier run left in the folder", False)
    resume: bool | None = flag(
        "output",
        "go on with a run of this name that was stopped, with the same other flags (--no_resume: keep nothing that it would need)",
        negatable=True,
    )
    push_to_hub: str | None = flag("output", "upload the checkpoint to this model repository of the hub, NAME or USER/NAME, private if new")
    public: bool = flag("output", "with --push_to_hub: a new repository is public", False)
    dry_run: bool = flag("output", "print the plan from the model's config alone and stop", False)

    def __post_init__(self):
        check_types(self)
        if not self.base_model:
            raise UserError("--base_model is required: a local folder, hub name or .gguf file")
        check_choices(self)
        self._given = given(self)
        self._check_what_decides()
        for name in ("recovery", "head_choice", "channel_score", "expert_score"):
            if getattr(self, name) is None:
                setattr(self, name, self._default(name))
        recipe = RECIPES[self.recipe].settings
        if self.distill is None:
            self.distill = recipe.get("distill", "none")
        if self.self_share is None:
            self.self_share = recipe.get("self_share", 0.0)
        if self.look_back is None:
            self.look_back = recipe.get("look_back", 0.0) if self._can_look_back else 0.0
        if self.num_examples is None:
            self.num_examples = PUBLISHED_EXAMPLES if self.recipe == "paper" else BEST_EXAMPLES
        if self.keep_lowest is None:
            published = self.method == "slimllm" and "look_back" not in RECOVERIES[self.recovery].needs
            self.keep_lowest = PUBLISHED_KEEP_LOWEST if published else 0.0
        if self.round_to is None:
            blocks = self.runtime == "gguf" or (self.fit is not None and self.gguf_type in QUANTIZED)
            self.round_to = GGUF_BLOCK if blocks else 1
        self._check_vocabulary()
        if self.plan is None and all(getattr(self, name) is None for name in AMOUNTS):
            if self.drop_layers is None and self.drop_parts is None:
                self.pruning_ratio = 0.25
            else:
                self.target_sparsity = 0.0  # those layers and parts alone
        check_range(self, "pruning_ratio", 0, 1, right_open=True)
        check_range(self, "target_sparsity", 0, 1, right_open=True)
        check_range(self, "smaller", 0, 1, right_open=True)
        check_range(self, "target_speedup", 1)
        for name, units in (("fit", BYTES), ("target_params", COUNTS)):
            if getattr(self, name) is not None:
                cli.number_of(name, getattr(self, name), units)
        check_range(self, "context", 1)
        check_range(self, "self_share", 0, 1)
        check_range(self, "chat_share", 0, 1)
        check_range(self, "keep_lowest", 0, 1, right_open=True)
        check_range(self, "look_back", 0, 1)
        check_range(self, "top_p", 0, 1)
        check_range(self, "alpha", 0)
        check_range(self, "temperature", 0)
        for name in ("num_examples", "round_to", "eval_limit", "pruned_layers", "drop_layers", "drop_parts", "distill_epochs"):
            check_range(self, name, 1)
        check_range(self, "distill_examples", 2)
        check_range(self, "distill_learning_rate", 0, left_open=True)
        for name in ("seq_len", "max_seq_len"):
            check_range(self, name, 2)
        check_range(self, "ridge", 0, left_open=True)
        if self.output_dir is not None:
            if "save_ckpt_log_name" in self._given:
                raise UserError("--output_dir and --save_ckpt_log_name both say where everything goes: give one of them")
            self.save_ckpt_log_name = Path(os.path.abspath(self.output_dir)).name
            if not self.save_ckpt_log_name or self.save_ckpt_log_name.startswith("."):
                raise UserError(f"--output_dir {self.output_dir}: must be the name of a folder, and not of a hidden one")
        name = self.save_ckpt_log_name
        if not name or name.startswith(("/", ".")) or ".." in name.split("/"):
            raise UserError(f"--save_ckpt_log_name {name}: must be a name inside prune_log/, not hidden and not a path out of it")
        if max(len(part.encode()) for part in name.split("/")) > LONGEST_NAME:
            raise UserError(f"--save_ckpt_log_name {name[:40]}...: the name is too long; at most {LONGEST_NAME} bytes between slashes")
        if self.push_to_hub and not self.save_model:
            raise UserError("--push_to_hub and --no_save_model: there would be no checkpoint to upload")
        self.eval_data = tuple(self.eval_data) if self.eval_data else None
        for text in self.prompt or ():
            if not text.strip():
                raise UserError("--prompt: a prompt is empty; write one, or none")

    def _check_vocabulary(self) -> None:
        if self.vocab not in VOCABULARIES:
            forms = (
                f"--vocab {self.vocab}: must be {', '.join(VOCABULARIES)}, a number of tokens such as 32000, or a share of them such as 0.5"
            )
            try:
                kept = cli.number_of("vocab", self.vocab, COUNTS)
            except UserError:
                raise UserError(forms) from None
            if kept <= 0 or (kept != int(kept) and kept >= 1):
                raise UserError(forms)
        check_range(self, "vocab_multiple", 1)
        self.vocab_text = tuple(self.vocab_text) if self.vocab_text else None
        self.vocab_scripts = tuple(name.lower() for name in self.vocab_scripts) if self.vocab_scripts else None
        if self.vocab == "auto" and all(getattr(self, name) is None for name in WHOLE):
            raise UserError(f"--vocab auto: it spends an amount of the whole model; give {', '.join(f'--{name}' for name in WHOLE)}")

    def tokens_of(self, vocab: int) -> int | None:
        """How many tokens of a vocabulary stay, before they are raised to what has to; None where --vocab leaves that open."""
        if self.vocab == "keep":
            return vocab
        if self.vocab == "auto":
            return None
        kept = cli.number_of("vocab", self.vocab, COUNTS)
        if kept > vocab:
            raise UserError(f"--vocab {self.vocab}: the model has {vocab:,} tokens; name fewer")
        kept = max(1, round(kept * vocab)) if kept < 1 or (kept == 1 and "." in self.vocab) else int(kept)
        return min(vocab, -(-kept // self.vocab_multiple) * self.vocab_multiple)

    def _check_what_decides(self) -> None:
        """Raises UserError where two settings decide the same thing."""
        sizes, others = ([name for name in names if getattr(self, name) is not None] for names in (SIZES, BY_PRICES))
        if len(sizes) > 1 or (others and sizes == ["pruning_ratio"]):
            raise UserError(f"--{sizes[0]} and --{[*sizes, *others][1]} both say how much to remove: give one of them")
        if self.method != "slimllm" and self.recipe != "paper":
            raise UserError(
                f"--method {self.method} and --recipe {self.recipe}: the recipe is SlimLLM's; give one of them, or single flags of "
                "the recipe such as --recovery least_squares"
            )
        for name in ("drop_layers", "drop_parts") if METHODS[self.method].takes_whole else ():
            if getattr(self, name) is not None:
                raise UserError(f"--method {self.method} and --{name} {getattr(self, name)} both say what goes whole: give one of them")
        for name in _PLANNED:
            if self.plan is not None and getattr(self, name) is not None:
                raise UserError(f"--plan and --{name} both say what to remove: give one of them")
        if self.price_list is not None and self.layer_ratio is None and "layer_ratio" not in RECIPES[self.recipe].settings:
            self.layer_ratio = "auto"

    def _default(self, name: str) -> str:
        """What the recipe says, or else the method."""
        value = RECIPES[self.recipe].settings.get(name) or getattr(METHODS[self.method], name)
        check_choice(f"method {self.method}: {name}", value, {f.name: f for f in fields(self)}[name].metadata["choices"])
        return value

    @property
    def dense_states(self) -> bool:
        """Whether each layer is pruned from the states that the dense model gives it, as FLAP is published: only with its own recovery."""
        method = METHODS[self.method]
        return method.dense_states and self.recovery == method.recovery

    @property
    def amount(self) -> tuple[str, object]:
        """The flag that says how much is to go, and its value; where there are several, the one that says it in parameters."""
        name = next(name for name in (*reversed(SIZES), *BY_PRICES) if getattr(self, name) is not None)
        return name, getattr(self, name)

    @property
    def _can_look_back(self) -> bool:
        """Whether there is a fit that can make up for what was lost before it."""
        return "look_back" in RECOVERIES[self.recovery].needs and not self.dense_states

    def adds_bias(self, shape: ModelShape) -> bool:
        """Whether the output projections that are pruned get a bias where the dense model has none."""
        return RECOVERIES[self.recovery].adds_bias and self.new_bias and limits_of(self.runtime, shape).new_bias

    def ridge_for(self, tokens: int) -> float:
        """The ridge of a fit from so many tokens."""
        return min(1.0, RIDGE_TOKENS / tokens) if self.ridge is None else self.ridge

    @property
    def folder(self) -> Path:
        """Where everything of a run goes."""
        return Path("prune_log", self.save_ckpt_log_name) if self.output_dir is None else Path(self.output_dir)

    @property
    def asks(self) -> bool:
        """Whether the dense and the pruned model are asked something at the end."""
        return self.prompt != ("none",) and (bool(self.prompt) or self.measures_texts)

    @property
    def measures_texts(self) -> bool:
        """Whether perplexity is measured on any text."""
        return not self.eval_data or "none" not in self.eval_data

    @property
    def samples(self) -> SampleSpec:
        """How the calibration samples are drawn."""
        return SampleSpec(self.num_examples, self.seq_len, self.seed, chat_share=self.chat_share)

    @property
    def distill_samples(self) -> SampleSpec:
        """How the samples to distil on are drawn: others than those of the calibration and of the probes."""
        return SampleSpec(self.distill_examples, self.seq_len, self.seed + 2, or_fewer=True, chat_share=self.chat_share)

    @property
    def measures_prices(self) -> bool:
        """Whether a price list is measured; of :meth:`resolved` settings."""
        return self.plan is None and self.price_list is None and "prices" in LAYER_RATIOS[self.layer_ratio].needs

    @property
    def needs_gradients(self) -> bool:
        """Whether heads or channels are chosen by gradients of the loss."""
        return (
            self.plan is None
            and self.prune != "experts"
            and "gradients" in HEAD_CHOICES[self.head_choice].needs | CHANNEL_SCORES[self.channel_score].needs
        )

    def resolved(self, shape: ModelShape) -> PruneConfig:
        """A copy, frozen, with what depends on the model: pruned_layers and alpha where the user gave none (the paper's, scaled to its
        depth), layer_ratio: the recipe's, or uniform where the runtime wants all layers alike, and prune: channels, where no head can go.

        Raises UserError for what this model cannot be given.
        """
        found = self.having(**self._resolved_values(shape))
        for line in [] if "_frozen" in vars(self) else found.remarks():
            log.info("%s", line)
        return found

    def as_drawn(self, samples: int, own: int) -> PruneConfig:
        """A copy that says how many calibration samples there are in fact, and how many of them the model wrote; itself where it does."""
        if samples == self.num_examples and own == round(self.self_share * samples):
            return self
        return self.having(num_examples=samples, self_share=own / samples)

    def having(self, **values) -> PruneConfig:
        """A copy, frozen, with other values, which are not checked."""
        found = copy.copy(self)
        found.__dict__.update(values, _frozen=True)
        return found

    def __setattr__(self, name, value):
        if self.__dict__.get("_frozen"):
            raise FrozenInstanceError(f"{name}: settings that are resolved stay as they are; change those they were made from")
        super().__setattr__(name, value)

    def _resolved_values(self, shape: ModelShape) -> dict:
        found, limits = {}, limits_of(self.runtime, shape)
        if shape.foreign_bias and not limits.new_bias:
            raise UserError(
                f"--runtime {self.runtime}: an earlier pruning gave this model biases that its class has no place for there; prune with "
                f"--runtime any, or the dense model it came from with --runtime {self.runtime} from the start"
            )
        if self.plan is not None:
            return found
        if self.fit is not None and shape.uncounted:
            raise UserError(
                f"--fit {self.fit}: what a {shape.uncounted} keeps of a text for the tokens that follow is unknown; ask by --target_params"
            )
        found |= self._of_mixture(shape)
        prune = found.get("prune", self.prune)
        if limits.whole_heads and prune in ("both", "heads") and not (shape.is_mixture and prune == "both"):
            why = shape.heads_fixed or f"with --runtime {self.runtime}"
            other = "experts" if shape.is_mixture else "channels"
            raise UserError(f"--prune {self.prune}: no head of this model can go ({why}); --prune {other}")
        if prune is None:
            found["prune"] = "channels" if limits.whole_heads else "both"
        tokens = self.tokens_of(shape.vocab)
        if tokens is None and self.amount[0] in SIZES:
            self._parameters_gone(shape)
        share = None if tokens is None else self.sparsity_of(shape.with_tokens(tokens))
        amount = self.pruning_ratio if self.pruning_ratio is not None else share or 0.0
        layers, alpha = next((n, a) for limit, n, a in PAPER_SETTINGS if amount < limit)
        depth = len(shape.layers) - self.layers_to_drop(shape)
        if self.pruned_layers is None and "pruned_layers" not in found:
            found["pruned_layers"] = depth if METHODS[self.method].all_layers else max(1, round(layers * depth / 32))
        elif self.pruned_layers is not None and self.pruned_layers > depth:
            raise UserError(f"--pruned_layers {self.pruned_layers}: the model has {depth} layers")
        if METHODS[self.method].whole_layers:
            found["drop_layers"] = self.layers_to_drop(shape) or None
        if self.alpha is None:
            found["alpha"] = alpha
        if self.layer_ratio is None and "layer_ratio" not in found:
            usual = self._default("layer_ratio")
            found["layer_ratio"] = "uniform" if limits.same_channels and usual not in REGULAR else usual
        elif limits.same_channels and self.layer_ratio not in (None, *REGULAR):
            raise UserError(
                f"--layer_ratio {self.layer_ratio} and --runtime {self.runtime}: all layers of this model lose the same there; "
                "leave one of the two out"
            )
        for name in (*BY_PRICES, "vocab") if "prices" not in LAYER_RATIOS[found.get("layer_ratio", self.layer_ratio)].needs else ():
            value = getattr(self, name)
            alike = name == "fit" and shape.is_mixture and found["layer_ratio"] == "uniform"
            if value is not None and (name != "vocab" or value == "auto") and not alike:
                raise UserError(f"--{name} {value}: it goes by a price list; add --recipe best or --layer_ratio auto")
        return found

    def _of_mixture(self, shape: ModelShape) -> dict:
        """What differs for a mixture of experts, which loses experts or heads. Raises UserError for what it cannot lose, and for settings
        of a mixture with another model.
        """
        if not shape.is_mixture:
            if self.prune == "experts":
                raise UserError("--prune experts: this model has none; --prune both, heads or channels")
            return {}
        if self.target_speedup is not None:
            raise UserError(
                f"--target_speedup {self.target_speedup}: a token takes as long however many experts stay, and the time of narrower ones "
                "is not measured; ask by --fit or --target_sparsity"
            )
        if self.layer_ratio not in (None, *OF_MIXTURES):
            raise UserError(f"--layer_ratio {self.layer_ratio}: of a mixture of experts name {', '.join(OF_MIXTURES)}")
        found = {"layer_ratio": self.layer_ratio or self._usual_of_mixture(shape)}
        if self.pruned_layers is None:
            found["pruned_layers"] = len(shape.layers)
        experts = [part for layer in shape.layers for part in layer.parts if part.kind == "experts"]
        if self.prune in ("both", "channels") and any(part.channels_fixed for part in experts):
            raise UserError(
                f"--prune {self.prune}: no channels of this model's experts can go, since its config has one width for them and for other "
                "parts; --prune experts"
            )
        if self.prune != "heads":
            found |= {"prune": self.prune or "experts", "_of_experts": True}
            self._check_experts_recovery()
            if not all(part.fits for part in experts):
                if "recovery" in self._given and self.recovery != "none":
                    raise UserError(f"--recovery {self.recovery}: the experts of this model cannot be refitted; --recovery none")
                found |= {"recovery": "none", "look_back": 0.0}
        if self.prune in ("both", "channels"):
            found["round_to"] = self._expert_multiple()
        return found

    def _usual_of_mixture(self, shape: ModelShape) -> str:
        """How the sparsity of a mixture is spread where nothing says it: by prices where the recipe goes by them and they can change
        anything. A file for llama.cpp, which ``fit`` is about, has one number of experts for all layers.
        """
        if self.price_list is not None:
            return "auto"
        differs = self.vocab == "auto" or (self.fit is None and not limits_of(self.runtime, shape).same_heads)
        return "auto" if differs and self._default("layer_ratio") == "auto" else "uniform"

    def _check_experts_recovery(self) -> None:
        """Raises UserError for a fit that cannot be made of the inputs of one expert and what is missing of all."""
        needs = RECOVERIES[self.recovery].needs
        if "input_covariance" in needs and "look_back" not in needs:
            raise UserError(f"--recovery {self.recovery}: experts are fitted to what is missing, so it must need look_back; name another")

    def _expert_multiple(self) -> int:
        """What the number of channels of each expert is a multiple of. Raises UserError for one that transformers cannot compute, and for
        a score of channels that experts have no statistics for.
        """
        if "round_to" in self._given and self.round_to % EXPERT_CHANNELS:
            raise UserError(f"--round_to {self.round_to}: channels of experts come in multiples of {EXPERT_CHANNELS}; name one")
        needs = CHANNEL_SCORES[self.channel_score].needs | HEAD_CHOICES[self.head_choice].needs
        for name in sorted(needs & {"gradients", "input_covariance"}):
            raise UserError(
                f"--channel_score {self.channel_score}, --head_choice {self.head_choice}: {name} is not taken of experts; name others"
            )
        return math.lcm(self.round_to, EXPERT_CHANNELS)

    def layers_to_drop(self, shape: ModelShape) -> int:
        """How many layers of a model of this shape go whole. Raises UserError where none would be left, or --plan says it."""
        depth, count = len(shape.given_layers), self.drop_layers or 0
        if METHODS[self.method].takes_whole and self.drop_layers is None:
            share = self._share_of_layers(shape)
            count = round(share * depth) if METHODS[self.method].whole_layers else 0
        if count >= depth:
            raise UserError(f"--drop_layers {count}: the model has {depth} layers, and one at least must stay")
        return count

    def without_parts(self, shape: ModelShape, order: list[tuple[int, str]]) -> ModelShape:
        """``shape`` without the parts that go whole, where they go in this ``order`` (:meth:`ModelShape.without_parts`).

        Raises UserError where there are not as many, or the runtime computes no layer without such a part.
        """
        if not self.drops_parts:
            return shape
        limits, kinds = limits_of(self.runtime, shape), PRUNED_KINDS[self.prune if "prune" in self._given else "both"]
        if "prune" not in self._given:  # those that the runtime can do without
            kinds = limits.lacking or kinds
        for kind in kinds:
            if found := why_not_missing(shape, self.runtime, kind):
                what = f"--method {self.method}" if self.drop_parts is None else f"--drop_parts {self.drop_parts}"
                raise UserError(f"{what}: {found[0]}; {found[1]}")
        gone = 0.0 if self.drop_parts else self._share_of_layers(shape) * sum(layer.parameters for layer in shape.given_layers)
        left = shape.without_parts([entry for entry in order if entry[1] in kinds], self.drop_parts, gone, limits.first_attends)
        one_less = ((layer, {*layer.units} - {kind}) for layer in shape.given_layers for kind in kinds)
        largest = max(layer.parameters - layer.with_parts(others).parameters for layer, others in one_less)
        if self.drop_parts is None and gone - left.layer_parameters_gone > largest / 2:  # nearer than that the next part would come
            name, value = self.amount
            most = left.layer_parameters_gone / sum(layer.parameters for layer in shape.given_layers)
            way = self.way_to_less if most else "name another method"
            raise UserError(
                f"--{name} {value}: the parts that --method {self.method} can take come to {most:.3f} of the layers' parameters; {way}"
            )
        return left

    @property
    def drops_parts(self) -> bool:
        """Whether whole parts go, by what is measured of them."""
        return self.plan is None and (self.drop_parts is not None or METHODS[self.method].whole_parts)

    def _share_of_layers(self, shape: ModelShape) -> float:
        """The share of the layers that the amount asked for comes to, by a method that takes whole layers or parts alone."""
        name, value = self.amount
        if name in BY_PRICES:
            what = "layers" if METHODS[self.method].whole_layers else "parts"
            raise UserError(f"--{name} and --method {self.method}: it takes whole {what} by their number; give --target_sparsity")
        return value if name in ("pruning_ratio", "target_sparsity") else self._parameters_gone(shape) / shape.decoder_parameters

    def sparsity_of(self, shape: ModelShape) -> float | None:
        """The share of the decoder's parameters that is to go of a model of this shape; None where ``pruning_ratio`` says it.

        Raises UserError where the layers do not hold as much.
        """
        name, value = self.amount
        if METHODS[self.method].takes_whole:
            return 0.0
        if name == "target_sparsity" and shape.staying is not None:
            whole = shape.decoder_parameters + shape.layer_parameters_gone
            return max(0.0, value * whole - shape.layer_parameters_gone) / shape.decoder_parameters
        if name in ("pruning_ratio", "target_sparsity", *BY_PRICES):
            return self.target_sparsity
        gone = self._parameters_gone(shape) - shape.parameters_gone
        if gone >= shape.decoder_parameters:
            raise self._out_of_reach(shape)
        gone = max(gone, 0.0)  # the vocabulary alone is enough
        return gone / shape.decoder_parameters

    def _parameters_gone(self, shape: ModelShape) -> float:
        """How many parameters of the whole model are to go. Raises UserError where it does not have as many."""
        name, value = self.amount
        whole = shape.dense_parameters
        gone = self.smaller * whole if name == "smaller" else whole - cli.number_of(name, value, COUNTS)
        if not 0 <= gone < whole:
            raise self._out_of_reach(shape)
        return gone

    def _out_of_reach(self, shape: ModelShape) -> UserError:
        name, value = self.amount
        tokens = "; or let tokens go with --vocab" if self.vocab == "keep" else "; or keep fewer tokens"
        whole, left = shape.dense_parameters / 1e6, shape.other_parameters / 1e6
        return UserError(
            f"--{name} {value}: the model has {whole:.1f} M parameters, {left:.1f} M in its embeddings, which stay; ask for something "
            f"between the two{tokens}"
        )

    def as_asked(self, shape: ModelShape, gone: float) -> str:
        """So many parameters of the layers, in words, counted as the flag that says how much is to go counts them."""
        name = self.amount[0]
        if name in ("smaller", "target_params"):
            besides = f" besides {' and '.join(shape.gone_in_words)}" if shape.parameters_gone else ""
            whole = shape.dense_parameters
            part = f"{gone / whole:.3f} of the model's" if name == "smaller" else f"{gone / 1e6:.4g} of the model's {whole / 1e6:.4g} M"
            return f"{part} parameters{besides}"
        of_what = "the parameters of the layers that stay" if shape.staying is not None else "the decoder's parameters"
        return f"{gone / shape.decoder_parameters:.3f} of {of_what}"

    @property
    def way_to_less(self) -> str:
        """What is to be done with an amount that is out of reach."""
        return "raise it" if self.amount[0] == "target_params" else "lower it"

    def remarks(self) -> list[str]:
        """A line for each setting that was given and changes nothing, or that another one decided; of :meth:`resolved` settings."""
        planned, of_experts = self.plan is not None, vars(self).get("_of_experts", False)
        spread = frozenset() if planned else LAYER_RATIOS[self.layer_ratio].needs
        file = is_sample_file(self.calibration)
        because = [
            ("ridge" not in RECOVERIES[self.recovery].needs, ("ridge",), f"recovery {self.recovery} has no ridge"),
            ("alpha" not in spread, ("alpha",), f"layer_ratio {self.layer_ratio} has no alpha"),
            ("pruned_layers" not in spread, ("pruned_layers",), f"layer_ratio {self.layer_ratio} takes from every layer"),
            (planned or of_experts or self.prune == "channels", ("head_choice", "head_unit"), "no head is chosen"),
            (planned or self.prune in ("heads", "experts"), ("channel_score", "keep_lowest"), "no channel is chosen"),
            (planned or not of_experts or self.prune == "channels", ("expert_score",), "no expert is chosen"),
            (not planned and of_experts, ("new_bias",), "experts get no biases"),
            (planned, ("round_to",), "--plan says what stays"),
            (self.fit is None, ("context", "gguf_type"), "--fit is not given"),
            (self.vocab == "keep", ("vocab_text", "vocab_scripts", "vocab_multiple"), "all tokens stay; --vocab lets some go"),
            ("prices" not in spread, ("prices", "price_list"), f"layer_ratio {self.layer_ratio} goes by no prices"),
            (self.price_list is not None, ("prices",), f"{self.price_list} holds them"),
            (not self._can_look_back, ("look_back",), f"recovery {self.recovery} of method {self.method} fits no output anew"),
            (self.distill == "none", ("distill_examples", "distill_epochs", "distill_learning_rate"), "nothing is distilled"),
            (file, ("num_examples", "seq_len", "self_share"), f"{self.calibration} holds the samples"),
            (self.calibration == "self", ("self_share",), "the model writes all samples"),
            (file and self.distill == "none", ("chat_share",), f"{self.calibration} holds the samples"),
            (not self.self_share and self.calibration not in (None, "self"), ("chat_share",), "the model writes no sample; --self_share"),
            (not self.test_after_train, ("temperature", "top_p"), "no continuations are printed"),
            (not self.push_to_hub, ("public",), "nothing is uploaded"),
        ]
        found = without_effect(self._given, because)
        usual = self._default("layer_ratio")
        if self.layer_ratio not in (None, usual) and "layer_ratio" not in self._given:
            why = f"with --runtime {self.runtime} all layers lose the same"
            if of_experts:
                why = "all layers of this mixture of experts lose the same"
            found.append(f"layer ratio {self.layer_ratio}, not {usual}: {why}")
        return found

    def inputs(self) -> list[str | None]:
        """The files and folders that a run reads, where these are no names on the hub."""
        texts = [item.rpartition("=")[2] for item in self.eval_data or ()]
        return [self.base_model, self.calibration, self.plan, self.price_list, self.tmp_dir, *texts, *(self.vocab_text or ())]

    def to_dict(self) -> dict:
        return asdict(self)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Two flags of the paper's command lines that say what others say."""
    published = parser.add_argument_group("of the paper's command lines")
    published.add_argument("--slimllm", action="store_true", help="the method is SlimLLM, as it is without the flag")
    published.add_argument("--no_greedy", action="store_true", help="the same as --head_choice leave_one_out")
    parser.set_defaults(recipe=None)


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None = None, script: str | None = None) -> PruneConfig:
    """Flags to a validated PruneConfig. Raises UserError, also for an unknown flag (naming the nearest).

    Where no recipe is named, the paper's ``script`` takes the paper's, and ``slimllm prune`` the best one.
    """

    def settings(slimllm: bool, no_greedy: bool, head_choice: str | None, recipe: str | None, **others) -> PruneConfig:
        if recipe is None:
            recipe = "paper" if script or others["method"] != "slimllm" else "best"
        config = PruneConfig(head_choice=head_choice or ("leave_one_out" if no_greedy else None), recipe=recipe, **others)
        if no_greedy and head_choice not in (None, "leave_one_out"):
            raise UserError(f"--no_greedy and --head_choice {head_choice} contradict each other: give one of them")
        if slimllm and config.method != "slimllm":
            raise UserError(f"--slimllm and --method {config.method} contradict each other: give one of them")
        return config

    return cli.parse(parser, settings, argv)
