"""The model card of a checkpoint (README.md): what it is, how it was made, how good it is, how to run it, file by file."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from . import families, record, report

FILE = "README.md"
FILES_HEADING = "## Files"


def write(folder: Path, run: dict) -> None:
    """Writes the card of the checkpoint in ``folder`` from the record of its run (``pruning.json``)."""
    config = families.load_config(str(folder), "DIR", pruned=True)
    name, removed = Path(run["config"]["save_ckpt_log_name"]).name, run["parameters"]
    base_id, licence = run["model"].get("hub_name"), run["model"].get("licence")
    data = ModelCardData(
        base_model=base_id,
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["slimllm", "structured-pruning", "pruned"],
    )
    parts = [
        f"# {name}",
        f"{run['model']['name']} with {removed['decoder_removed']:.2%} of its decoder layers' parameters removed ({removed['removed']:.2%} "
        f"of all: {removed['dense'] / 1e6:.1f} M -> {removed['pruned'] / 1e6:.1f} M), whole attention heads and feed-forward channels, by "
        "[SlimLLM](https://arxiv.org/abs/2505.22689).",
        _origin(run, base_id, licence),
        *_quality(run),
        *_use(name, config),
        FILES_HEADING,
        _files(folder),
    ]
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n").save(folder / FILE)


def update_files(folder: Path) -> None:
    """Brings the card's list of files up to date, where the folder has a card."""
    path = folder / FILE
    if path.is_file() and FILES_HEADING in (text := path.read_text(encoding="utf-8")):
        record.write(path, text.split(FILES_HEADING)[0] + f"{FILES_HEADING}\n\n{_files(folder)}\n")


def origin_of(base_model: str) -> dict:
    """``hub_name`` and ``licence`` of a base model, as far as its name, its card or its .gguf metadata tell; else None."""
    licence, hub_name, path = None, None, Path(base_model)
    if path.suffix == ".gguf":
        import gguf

        field = gguf.GGUFReader(path).fields.get("general.license")
        licence = field and field.contents()
    elif (path / FILE).is_file():
        found = re.match(r"---\n(.*?)\n---", (path / FILE).read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        entry = found and re.search(r"^license:\s*(\S+)\s*$", found[1], re.MULTILINE)
        licence = entry and entry[1]
    elif not path.exists():
        try:
            validate_repo_id(base_model)
            hub_name = base_model
            licence = ModelCard.load(base_model).data.license
        except (HFValidationError, OSError, ValueError):
            pass
    return {"hub_name": hub_name, "licence": licence}


def _origin(run: dict, base_id: str | None, licence: str | None) -> str:
    calibration, environment = run["calibration"], run["environment"]
    rows = [
        ["base model", f"[{base_id}](https://huggingface.co/{base_id})" if base_id else run["model"]["name"]],
        ["licence", licence or "not stated where the base model was read; its licence applies"],
        ["command", f"`{run['command']}`"],
        [
            "calibration",
            f"{calibration['samples']} samples of {calibration['length']} tokens, {Path(calibration['source']).name}, "
            f"sha256 `{calibration['sha256']}`",
        ],
        ["recovery, layer ratio", f"{run['config']['recovery']}, {run['config']['layer_ratio']}"],
        ["made with", f"slimllm {environment['slimllm']}, transformers {environment['transformers']}, torch {environment['torch']}"],
    ]
    if tuning := run.get("post_training"):
        rows.append(["post-training", f"LoRA, merged: `{tuning['command']}`"])
    return "\n".join(f"- {what}: {value}" for what, value in rows)


def _quality(run: dict) -> list[str]:
    figures = run["evaluation"]
    if not figures:
        return ["## Perplexity", "Not measured."]
    rows = [["text", "split", "tokens a block", "blocks", "dense", "this model"]]
    for f in figures:
        blocks = f"{f['blocks']}{' (limited)' if f['limited'] else ''}"
        value = f"{f['pruned']:.2f}" + (f" -> {f['tuned']:.2f}" if "tuned" in f else "")
        rows.append([f["data"], f["split"], str(f["seq_len"]), blocks, f"{f['dense']:.2f}", value])
    parts = ["## Perplexity", "\n".join(report.aligned(rows))]
    shared = [f"{f['data']} ({f['calibration_overlap']} samples)" for f in figures if f.get("calibration_overlap")]
    if shared:
        parts.append(
            f"**Warning:** calibration samples share runs of text with the evaluation text {', '.join(shared)}: "
            "these perplexities flatter the model."
        )
    return parts


def _use(name: str, config) -> list[str]:
    own_code = config.model_type.startswith("slim_")
    trust = ", trust_remote_code=True" if own_code else ""
    loading = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")'
    )
    if not own_code:
        vllm = f"\n\n```bash\nvllm serve {name}\n```"
    elif hasattr(config, "block_configs"):
        untried = "as `DeciLMForCausalLM`, written to vLLM's config format and not run there by its makers"
        vllm = f"{untried}\n\n```bash\nvllm serve {name} --trust-remote-code\n```"
    else:
        vllm = "its layers differ in ways that vLLM does not hold; prune with `--runtime vllm` for that."
    export = f"python -m slimllm.export_gguf {name} --outtype f16\nllama-server -m {name}/{name}-f16.gguf"
    return ["## Use", f"```python\n{loading}\n```", f"llama.cpp:\n\n```bash\n{export}\n```", f"vLLM: {vllm}".replace(": \n", ":\n")]


def _files(folder: Path) -> str:
    rows = [["file", "bytes", "sha256"]]
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in (FILE, "log.txt") and not path.name.startswith("."):
            rows.append([path.name, str(path.stat().st_size), record.file_hash(path)])
    return "\n".join(report.aligned(rows))
