"""Records of figures that are not finite: written, and read by what makes tables of them."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest

import slimllm
from slimllm.deploy import verify
from slimllm.errors import UserError
from slimllm.reporting import card, figures, record, tables, trial_tables
from slimllm.reporting.record import PruningRecord
from tests.conftest import make_ids, make_model

FIGURE = {"data": "t", "split": "t.txt", "sha256": "0", "seq_len": 16, "blocks": 2, "limited": False, "calibration_overlap": 0}


def test_results_go_on_where_nothing_that_decides_them_differs(tmp_path):
    """An older file lacks settings that came later; it was made with what they are by default."""
    file = tmp_path / "results.json"
    now = {"seed": 1, "runtime": None, "the file a.txt": "b5"}
    others = ({"seed": 2}, "seed"), ({"seed": 1, "gone": 3}, "gone"), (["seed"], "seed"), (now | {"the file a.txt": "c6"}, "file a.txt")
    for found, differs in (({"seed": 1}, None), (now, None), *others):
        record.write_text(file, record.dumps({"format": record.FORMAT, "fingerprint": found, "rows": [1]}))
        if differs is None:
            assert record.continued(file, now, False)["rows"] == [1]
            continue
        with pytest.raises(UserError, match=f"results of another {differs}: name another --output"):
            record.continued(file, now, False)


def test_what_is_not_finite_is_null():
    found = record.dumps({"a": [math.nan, (1.5, -math.inf)], "b": {"c": np.float64("inf"), "d": 2, "e": "NaN", "f": True}})
    assert json.loads(found) == {"a": [None, [1.5, None]], "b": {"c": None, "d": 2, "e": "NaN", "f": True}}


def test_a_perplexity_that_is_not_finite_is_a_number_for_who_reads_it(tmp_path, tiny_tokenizer):
    result = slimllm.prune(make_model(), tiny_tokenizer, calibration=make_ids(), pruning_ratio=0.5)
    result.layers[0].errors["mlp"] = (math.inf, math.nan)
    slimllm.save(result, tmp_path / "run")
    of_run = result.record([FIGURE | {"dense": 12.0, "pruned": math.inf, "tuned": math.nan}])
    of_run.write(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "pruning.json").read_text())["evaluation"][0]["pruned"] is None
    read = PruningRecord.read(tmp_path / "run")
    assert "12.00 / nan" in tables.table([("run", read)])
    card.write(tmp_path / "run", read)
    assert "nan -> nan" in (tmp_path / "run" / "README.md").read_text()
    rows = [
        dict(
            name=name,
            variant="",
            share=share,
            removed=share,
            perplexity=[FIGURE | read.evaluation[0]],
            tasks={},
            parameters=1,
            bytes=1,
            seconds=1,
        )
        for name, share in (("dense", 0.0), ("random", 0.2))
    ]
    assert "nan" in trial_tables.comparison_table(rows)[-1] and "nan" in trial_tables.ablation_table(rows, [0.2])[-1]


def older(record: dict) -> dict:
    """A record as runs wrote it when all layers of a model were taken to be alike."""
    layers = []
    for layer in record["layers"]:
        kept, errors = layer.pop("kept"), layer.pop("errors")
        flat = {sort: indices for own in kept.values() for sort, indices in own.items()}
        layers.append(layer | flat | {f"{kind}_error": errors.get(kind) for kind in kept})
    first, *_ = shape = record["model"]["shape"]["layers"]
    sizes = {"layers": len(shape), "heads": 4, "kv_heads": 2, "head_dim": 8, "channels": first["mlp"]["channels"], "norms_per_layer": 2}
    record["model"]["shape"] |= sizes
    del record["model"]["pruned_from"]
    return record | {"layers": layers}


def test_an_older_record_is_read_and_is_a_plan(tmp_path, tiny_tokenizer):
    dense = make_model()
    result = slimllm.prune(copy.deepcopy(dense), tiny_tokenizer, calibration=make_ids(), pruning_ratio=0.5, recovery="none")
    slimllm.save(result, tmp_path / "new")
    new = PruningRecord.read(tmp_path / "new")
    path = tmp_path / "old" / "pruning.json"
    path.parent.mkdir()
    path.write_text(json.dumps(older(json.loads((tmp_path / "new" / "pruning.json").read_text()))))
    assert "kept" not in path.read_text() and "heads" in json.loads(path.read_text())["layers"][0]
    old = PruningRecord.read(path.parent)
    assert dataclasses.asdict(old) == dataclasses.asdict(new)
    assert tables.table([("run", old)]) == tables.table([("run", new)]) and tables.odd_widths(old.layers) == tables.odd_widths(new.layers)
    assert figures.layer_figure(old, tmp_path / "figures").is_file()
    assert verify.planned_units(path.parent) == verify.planned_units(tmp_path / "new")
    again = slimllm.prune(copy.deepcopy(dense), calibration=make_ids(), plan=str(path), recovery="none")
    assert [layer.kept for layer in again.layers] == [layer.kept for layer in result.layers]
