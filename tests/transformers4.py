"""Checkpoints of ``--runtime transformers`` in transformers 4.57: ``script/transformers4.sh`` writes them in 5 and reads them in 4.

``write FOLDER`` prunes a random model of each family, with a rotary base that is not the default, and keeps its logits.
``read FOLDER`` runs where transformers 4 is found first: each model has to give these logits, and its tokenizer the same tokens.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

IDS = torch.arange(2, 26).view(2, 12)
TEXT = "It was the best of times."


def write(root: Path) -> None:
    from slimllm.deploy import checkpoint, runtimes
    from slimllm.pruning import pipeline
    from tests.conftest import FAMILY_CASES, family_config, logits, make_config, make_ids, make_model, make_shape, tiny_tokenizer_of

    def save(model, case: str, runtime: str, name: str) -> None:
        pipeline.prune(model, make_ids(), make_config(shape=make_shape(case), runtime=runtime, target_sparsity=0.3))
        runtimes.convert_for_runtime(model, runtime)
        tokenizer = tiny_tokenizer_of()
        checkpoint.save(model, tokenizer, root / name, make_ids(2), "dense")
        expected = {"logits": logits(model, IDS).tolist(), "tokens": tokenizer(TEXT).input_ids}
        (root / name / "expected.json").write_text(json.dumps(expected))

    for case in FAMILY_CASES:
        rope = copy.deepcopy(family_config(case).rope_parameters)
        for settings in [own for own in rope.values() if isinstance(own, dict)] or [rope]:
            settings["rope_theta"] *= 7
        save(make_model(case, rope_parameters=rope), case, "transformers", case)
    save(make_model(), "llama_gqa", "any", "any")


@torch.no_grad()
def read(root: Path) -> int:
    assert __version__.startswith("4."), __version__
    failed = 0
    for folder in sorted(root.iterdir()):
        expected = json.loads((folder / "expected.json").read_text())
        same = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(TEXT).input_ids == expected["tokens"] or "other tokens"
        try:
            trusted = folder.name == "any"  # eager: 4's sdpa leaves out Gemma 2's soft cap of the scores
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted, attn_implementation="eager").eval()
            wanted = torch.tensor(expected["logits"])
            difference = float((model(IDS, use_cache=False).logits - wanted).abs().max() / wanted.abs().max())
            ok, said = difference < 1e-5 and same is True, f"logits differ by {difference:.1e} of the largest"
        except (ImportError, ValueError) as error:
            said = str(error)
            ok = "needs transformers 5" in said if folder.name == "any" else "does not recognize this architecture" in said
        failed += not ok
        print(f"{'ok    ' if ok else 'FAILED'} {folder.name:16} {said.splitlines()[0][:110]}", "" if same is True else same)
    return failed


if __name__ == "__main__":
    action, folder = sys.argv[1], Path(sys.argv[2])
    sys.exit(write(folder) if action == "write" else read(folder))
