"""Records of figures that are not finite: written, and read by what makes tables of them."""

import json
import math

import numpy as np

import slimllm
from slimllm.reporting import card, record, tables, trial_tables
from slimllm.reporting.record import PruningRecord
from tests.conftest import make_ids, make_model

FIGURE = {"data": "t", "split": "t.txt", "sha256": "0", "seq_len": 16, "blocks": 2, "limited": False, "calibration_overlap": 0}


def test_what_is_not_finite_is_null():
    found = record.dumps({"a": [math.nan, (1.5, -math.inf)], "b": {"c": np.float64("inf"), "d": 2, "e": "NaN", "f": True}})
    assert json.loads(found) == {"a": [None, [1.5, None]], "b": {"c": None, "d": 2, "e": "NaN", "f": True}}


def test_a_perplexity_that_is_not_finite_is_a_number_for_who_reads_it(tmp_path, tiny_tokenizer):
    result = slimllm.prune(make_model(), tiny_tokenizer, calibration=make_ids(), pruning_ratio=0.5)
    result.layers[0].mlp_error = (math.inf, math.nan)
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
