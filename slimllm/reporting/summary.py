"""The end of a pruning run in words: what came out, how good it is, and what to do next."""

from __future__ import annotations

import math
import shlex
import textwrap

from ..deploy import whole_model
from ..evaluation.answers import LOOPS, STOPS, ChatQuality
from ..plan import is_gone
from .record import PruningRecord
from .tables import TEXT_HEADINGS, aligned, limits_line, odd_widths, uneven_experts

WIDTH = 100  # columns of a terminal

# Nats per token lost, in the mean of the texts -> what that means; measured on SmolLM2-135M and Gemma 3 270M (docs/results.md).
VERDICTS = (
    (0.005, "no loss on these texts", "nothing went that they need"),
    (0.05, "hardly any loss", "about what eight bits cost"),
    (0.3, "a moderate loss", "no more than four bits cost a small model"),
    (0.7, "a clear loss", "it still writes sensibly; distil or train it before it is used"),
    (1.3, "a heavy loss", "many answers are wrong; of use only after training"),
    (math.inf, "hardly the same model", "ask for less, or train it for long"),
)
NOTHING = VERDICTS[1][0]  # a loss that nothing need be done about
BETTER = {"paper": ("best", "loses about half of that"), "best": ("distilled", "some minutes of training, a fifth less lost")}


def summary(run: PruningRecord, folder: str, program: str, exports: bool) -> list[str]:
    """Lines of at most WIDTH columns, but for commands. ``folder``: where everything lies; ``program``: how commands begin here;
    ``exports``: whether export-gguf takes the checkpoint.
    """
    lines = ["", *aligned(sizes(run, exports)), *limits_line(run.evaluation)]
    lost = nats_lost(run)
    if lost is not None:
        band, meaning = verdict(lost)
        lines += ["", f"{round(lost, 2) + 0.0:.2f} nats per token lost, in the mean of the texts: {band}", f"({meaning})"]
    lines += answered(run)
    lines += ["", spent(run)]
    lines += [line for remark in (uneven_experts(run.layers), odd_widths(run.layers)) for line in _wrapped(remark or "")]
    if steps := next_steps(run, folder, program, exports):
        lines += ["", "next:", *(f"  {what:8} {command}" for what, command in steps)]
    return lines


def sizes(run: PruningRecord, exports: bool) -> list[list[str]]:
    """Rows of what there was before and is now: parameters, bytes, KV cache, and the perplexity of each text."""
    size, dense = run.parameters, run.model.shape["layers"]
    rows = [["", "dense", "pruned", ""]]
    left = f"{size.removed:.2%} less; of the decoder's layers {size.decoder_removed:.2%}"
    rows.append(["parameters", f"{size.dense / 1e6:.4g} M", f"{size.pruned / 1e6:.4g} M", left])
    if size.active:
        counts = [size.active[name] for name in ("dense", "pruned")]
        row = "parameters of a token", *(f"{count / 1e6:.4g} M" for count in counts), f"{1 - counts[1] / counts[0]:.2%} less"
        rows.append(list(row))
    if run.bytes:
        change = run.bytes["pruned"] / run.bytes["dense"] - 1
        fewer = "the dense file has fewer bits" + ("; so can this: export-gguf" if exports else "")
        how = f"{abs(change):.1%} less" if change <= 0 else fewer
        rows.append(["on disk", f"{run.bytes['dense'] / 1e6:.4g} MB", f"{run.bytes['pruned'] / 1e6:.4g} MB", how])
    before = sum(units.get("kv_heads", 0) for layer in dense for units in layer.values())
    after = sum(len(units.get("kv_heads", ())) for layer in run.layers for units in layer["kept"].values())
    if before:
        same = "as it was" if size.active else "as it was; --head_unit group lets KV heads go"
        why = f"{1 - after / before:.1%} less" if after < before else same
        rows.append(["KV heads (cache)", str(before), str(after), why])
    for f in run.evaluation:
        star = "*" if f["limited"] else ""
        nats = _nats(f)
        worse = "" if nats is None else f"{round(nats, 2) + 0.0:+.2f} nats per token"  # + 0.0: no minus before a zero
        rows.append(
            [TEXT_HEADINGS.get(f["data"], f["data"]), *(f"{value}{star}" for value in _values(f, run.vocabulary is not None)), worse]
        )
    return rows


def _values(figure: dict, per_byte: bool) -> list[str]:
    if per_byte:
        return [f"{figure['nats_per_byte'][stage]:.3f}/byte" for stage in ("dense", "pruned")]
    return [f"{figure[stage]:.2f}" for stage in ("dense", "pruned")]


def _nats(figure: dict) -> float | None:
    """What a text's prediction lost, in nats per token of the dense model."""
    nats = figure.get("nats_per_byte")
    if nats is None or not all(math.isfinite(value) and value > 0 for value in (*nats.values(), figure["dense"], figure["pruned"])):
        return None
    return math.log(figure["dense"]) * (nats["pruned"] / nats["dense"] - 1)


def nats_lost(run: PruningRecord) -> float | None:
    """The mean over the texts of what their prediction lost, nats per token; None where nothing was measured."""
    found = [nats for figure in run.evaluation if (nats := _nats(figure)) is not None]
    return sum(found) / len(found) if found else None


def verdict(lost: float) -> tuple[str, str]:
    """(how much that is, what it means)."""
    return next((band, meaning) for limit, band, meaning in VERDICTS if lost < limit)


def answered(run: PruningRecord) -> list[str]:
    """What the two models answer, one after the other, with a line where the pruned one plainly fails and the dense one does not."""
    lines = []
    for entry in run.answers:
        lines += ["", *_wrapped(f"> {entry['prompt']}")]
        lines += [line for stage in ("dense", "pruned") for line in _wrapped(f"{stage:6}  {_one_line(entry[stage])}", 10)]
    for fault in (STOPS, LOOPS):
        worse = sum(entry["pruned"]["fault"] == fault != entry["dense"]["fault"] for entry in run.answers)
        if worse:
            lines += ["", f"warning: the pruned model {fault} on {worse} of {len(run.answers)} prompts, and the dense one does not"]
    return lines + (["", *_wrapped(chatted(run))] if chatted(run) else [])


def chatted(run: PruningRecord) -> str:
    """How the two models did on the prompts that a chat is measured by, in a sentence; empty where they were not asked."""
    if not {"dense", "pruned"} <= run.chat.keys():
        return ""
    dense, pruned = (ChatQuality(**run.chat[stage]) for stage in ("dense", "pruned"))
    counts = f"it repeats itself on {pruned.loops} and stops at once on {pruned.stops} (dense {dense.loops} and {dense.stops})"
    nats = [f"{quality.nats:.2f}" if quality.nats is not None else "-" for quality in (pruned, dense)]
    return f"chat, {pruned.prompts} prompts: {counts}; the dense model gives its answers {nats[0]} nats per token, its own {nats[1]}"


def _one_line(answer: dict) -> str:
    text = " ".join(answer["text"].split())
    return text + (f" ({answer['fault']})" if answer["fault"] else "")


def _wrapped(text: str, indent: int = 2) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent=" " * indent, break_on_hyphens=False) if text else []


def spent(run: PruningRecord) -> str:
    """Seconds of the longest phases, and the peak of the memory."""
    seconds = sorted(run.seconds.items(), key=lambda item: -item[1])
    memory = " and ".join(f"{value / 1e9:.2f} GB of {kind[:3].upper()} memory" for kind, value in run.peak_memory.items())
    longest = ", ".join(f"{name} {value:.0f}" for name, value in seconds[:4])
    return f"{sum(run.seconds.values()):.0f} s ({longest}), {memory} at the peak"


def next_steps(run: PruningRecord, folder: str, program: str, exports: bool) -> list[tuple[str, str]]:
    """(what for, the command), ready to paste."""
    config, where, lost = run.config, shlex.quote(folder), nats_lost(run)
    kind = config["gguf_type"] if config.get("fit") else "q8_0"
    steps = []
    if config["save_model"]:
        steps += [("chat", f"{program} chat {where} --beside {shlex.quote(config['base_model'])}"), ("check", f"{program} verify {where}")]
        steps += [("export", f"{program} export-gguf {where} --outtype {kind}")] if exports else []
        fewer = any(is_gone(layer["kept"]) for layer in run.layers)
        mixture = any("experts" in layer["kept"] for layer in run.layers)
        if config["runtime"] == "transformers" and not fewer and not mixture and whole_model.is_whole(config["base_model"]):
            into = shlex.quote(config["base_model"])
            steps += [("whole", f"{program} export-transformers {where} {shlex.quote(f'{folder}_whole')} --into {into}")]
        steps += [("train", f"{program} train {where} --data_path YOUR.jsonl --merge")]
    better = BETTER.get(config["recipe"]) if config["method"] == "slimllm" else None
    if better and lost is not None and lost >= NOTHING:
        recipe, gain = better
        steps += [("better", f"{again(run.command, recipe, f'{folder}_{recipe}')}   # {gain}")]
    return steps


def again(command: str, recipe: str, folder: str) -> str:
    """The command of a run with another recipe, into another folder."""
    words, kept = shlex.split(command), []
    while words:
        word = words.pop(0)
        name, value = word.partition("=")[::2]
        if name in ("--recipe", "--output_dir", "--save_ckpt_log_name"):
            words = words if value else words[1:]
        elif name not in ("--overwrite", "--resume"):
            kept.append(word)
            continue
        if words and not words[0].startswith("-"):  # the model: a flag before that takes several values must not take it too
            kept.append("--base_model")
    return shlex.join([*kept, "--recipe", recipe, "--output_dir", folder])
