import pytest

import slimllm
from slimllm import cli
from slimllm.commands import COMMANDS
from slimllm.errors import UserError
from slimllm.experiments.trials import state_of_model
from slimllm.settings.evaluate import EvalConfig
from slimllm.settings.evidence import EvidenceConfig
from slimllm.settings.pruning import BYTES, COUNTS
from tests.conftest import make_shape


def config(*flags):
    return COMMANDS["prune"].parsed("prune", ["--base_model", "m", *flags], "hf_prune.py")


def test_defaults_are_the_paper_s():
    c = config().resolved(make_shape(num_hidden_layers=32))
    assert (c.pruning_ratio, c.pruned_layers, c.alpha, c.num_examples, c.seq_len, c.max_seq_len) == (0.25, 26, 10.0, 32, 128, 128)
    assert (c.recovery, c.keep_lowest, c.layer_ratio, c.head_choice) == ("linear", 0.01, "importance", "greedy")


@pytest.mark.parametrize(
    "flags, recovery, keep_lowest",
    [
        (["--recipe", "best"], "least_squares", 0.0),
        (["--recovery", "least_squares"], "least_squares", 0.0),
        (["--recipe", "best", "--recovery", "bias"], "bias", 0.01),
        (["--recipe", "best", "--keep_lowest", "0.02"], "least_squares", 0.02),
    ],
)
def test_a_recipe_sets_only_what_the_user_left_open(flags, recovery, keep_lowest):
    c = config(*flags)
    assert (c.recovery, c.keep_lowest) == (recovery, keep_lowest)


@pytest.mark.parametrize(
    "flags, layer_ratio",
    [
        (["--recipe", "best"], "auto"),
        (["--recipe", "best", "--layer_ratio", "importance"], "importance"),
        (["--recipe", "best", "--runtime", "vllm"], "auto"),
        (["--recipe", "best", "--runtime", "transformers"], "auto"),
        (["--runtime", "transformers"], "uniform"),
    ],
)
def test_a_recipe_s_layer_ratio_waits_for_the_runtime(flags, layer_ratio):
    c = config(*flags).resolved(make_shape())
    assert c.layer_ratio == layer_ratio


def test_save_model_can_be_said_both_ways():
    assert config("--save_model").save_model and config().save_model and not config("--no_save_model").save_model


def test_the_flags_of_the_paper_s_command_lines_are_no_settings_of_their_own():
    plain, old = config(), config("--slimllm", "--no_greedy")
    assert old.head_choice == "leave_one_out" and config("--no_greedy", "--head_choice", "leave_one_out") == old
    assert old.to_dict() == {**plain.to_dict(), "head_choice": "leave_one_out"}
    for name in ("slimllm", "no_greedy"):
        with pytest.raises(UserError, match=f"{name}: not a setting of prune"):
            slimllm.prune(None, **{name: True})


def test_flags_are_not_abbreviated():
    with pytest.raises(UserError, match="unknown argument --pruned; did you mean '--pruned_layers'"):
        config("--pruned", "3")


@pytest.mark.parametrize("name", ["prune", "train", "chat", "evaluate", "latency", "export-gguf", "ablation", "explore", "compare"])
def test_the_model_may_come_before_or_after_the_flags(name, tmp_path):
    needed = {"train": ["--data_path", "x"], "latency": ["--baseline", "d"], "export-gguf": ["--outtype", "f16"]}
    flags = needed.get(name, ["--device", "cpu"])
    first, last = (COMMANDS[name].parsed(name, argv) for argv in (["m", *flags], [*flags, "m"]))
    assert first == last


@pytest.mark.parametrize(
    "name, flags, field",
    [
        ("evidence", ["m", "--shares", "0.2", "0.20", "0.5"], "shares"),
        ("evidence", ["m", "--recipes", "best", "paper", "best"], "recipes"),
        ("evaluate", ["m", "--generation", "gsm8k,ifeval", "gsm8k"], "generation"),
        ("latency", ["m", "--batch_size", "8", "1", "8"], "batch_size"),
        ("compare", ["m", "--target_sparsity", "0.5", "0.2", "0.5"], "target_sparsity"),
        ("compare", ["m", "--methods", "flap", "wanda_sp", "flap"], "methods"),
        ("explore", ["m", "--check", "0.5", "0.2", "0.5"], "check"),
    ],
)
def test_what_is_named_twice_is_done_once(name, flags, field):
    assert len(getattr(COMMANDS[name].parsed(name, flags), field)) == 2


def test_a_model_is_called_by_what_tells_it_from_others(tmp_path, monkeypatch):
    (tmp_path / "llama").mkdir()
    monkeypatch.chdir(tmp_path / "llama")
    for given in (".", "../llama", "org/llama"):
        assert EvidenceConfig(base_model=given).output == "eval_log/evidence_llama"
        assert EvalConfig(model=given).output == "eval_log/llama.json"
    assert state_of_model(".") == ["llama"] and state_of_model("org/llama") != state_of_model("other/llama")


def test_files_may_come_after_a_flag():
    assert COMMANDS["verify"].parsed("verify", ["m", "--blocks", "1", "a.gguf"]).files == ["a.gguf"]
    with pytest.raises(UserError, match="unknown argument b"):
        COMMANDS["prune"].parsed("prune", ["--smaller", "0.2", "a", "b"])


def test_the_ridge_falls_with_the_tokens_unless_it_is_given():
    assert [config().ridge_for(tokens) for tokens in (100, 4096, 16384)] == [1.0, 1.0, 0.25]
    assert config("--ridge", "0.5").ridge_for(16384) == 0.5


def test_methods_set_what_the_user_left_open():
    c = config("--method", "flap").resolved(make_shape())
    assert (c.head_choice, c.channel_score, c.layer_ratio, c.recovery) == ("fluctuation", "fluctuation", "ranking", "bias")
    assert (c.keep_lowest, c.pruned_layers, c.dense_states) == (0.0, 2, True)
    c = config("--method", "flap", "--recovery", "least_squares", "--layer_ratio", "uniform").resolved(make_shape())
    assert (c.recovery, c.layer_ratio, c.dense_states) == ("least_squares", "uniform", False)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--method", "flap", "--recipe", "best"], "--method flap and --recipe best: the recipe is SlimLLM's"),
        (["--no_greedy", "--head_choice", "wanda"], "--no_greedy and --head_choice wanda contradict"),
        (["--slimllm", "--method", "flap"], "--slimllm and --method flap contradict"),
        (["--distill_examples", "1"], "--distill_examples 1"),
        (["--self_share", "1.5"], "--self_share 1.5"),
    ],
)
def test_mistakes_of_method_and_samples(flags, said):
    with pytest.raises(UserError, match=said):
        config(*flags)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--ridge", "0.1"], "--ridge has no effect: recovery linear has no ridge"),
        (["--alpha", "5", "--layer_ratio", "uniform"], "--alpha has no effect: layer_ratio uniform has no alpha"),
        (["--method", "flap", "--pruned_layers", "1"], "--pruned_layers has no effect: layer_ratio ranking takes from every layer"),
        (["--prune", "channels", "--no_greedy"], "--head_choice has no effect: no head is chosen"),
        (["--prune", "heads", "--channel_score", "wanda"], "--channel_score has no effect: no channel is chosen"),
        (["--plan", "x", "--head_unit", "group"], "--head_unit has no effect: no head is chosen"),
        (["--distill_examples", "8"], "--distill_examples has no effect: nothing is distilled"),
        (["--calibration", "a.safetensors", "--num_examples", "8"], "--num_examples has no effect: a.safetensors holds the samples"),
        (["--calibration", "self", "--self_share", "0.5"], "--self_share has no effect: the model writes all samples"),
        (["--top_p", "0.5"], "--top_p has no effect: no continuations are printed"),
        (["--public"], "--public has no effect: nothing is uploaded"),
        (["--runtime", "transformers"], "layer ratio uniform, not importance: with --runtime transformers all layers lose the same"),
        (["--prices", "streams"], "--prices has no effect: layer_ratio importance goes by no prices"),
        (["--recipe", "best", "--price_list", "x", "--prices", "streams"], "--prices has no effect: x holds them"),
        (["--look_back", "0.5"], "--look_back has no effect: recovery linear of method slimllm fits no output anew"),
        (["--context", "100"], "--context has no effect: --fit is not given"),
    ],
)
def test_what_changes_nothing_is_said(flags, said, caplog):
    with caplog.at_level("INFO", logger="slimllm"):
        found = config(*flags).resolved(make_shape())
    assert [line for line in caplog.messages if line.startswith(said)] == caplog.messages != []
    caplog.clear()
    assert found.resolved(make_shape()) == found and not caplog.messages  # once


def test_what_changes_something_is_not_remarked_on(caplog):
    with caplog.at_level("INFO", logger="slimllm"):
        config("--recipe", "distilled", "--ridge", "0.1", "--look_back", "0.5", "--distill_examples", "8", "--self_share", "0.2").resolved(
            make_shape()
        )
    assert not caplog.messages


@pytest.mark.parametrize("layer_ratio", ["importance", "middle", "ranking"])
def test_layers_that_must_be_alike_are_not_spread_over(layer_ratio):
    with pytest.raises(UserError, match=f"--layer_ratio {layer_ratio} and --runtime transformers: all layers of this model lose the same"):
        config("--layer_ratio", layer_ratio, "--runtime", "transformers").resolved(make_shape())


@pytest.mark.parametrize("flag, value, number", [("fit", "1.5TB", 1.5e12), ("fit", "2TiB", 2**41), ("target_params", "1T", 1e12)])
def test_large_models_have_units(flag, value, number):
    assert cli.number_of(flag, value, BYTES if flag == "fit" else COUNTS) == number
    assert getattr(config("--recipe", "best", f"--{flag}", value), flag) == value


@pytest.mark.parametrize("amount", [["--fit", "1MB"], ["--target_speedup", "1.5"]])
def test_what_goes_by_a_price_list_says_so_where_there_is_none(amount):
    with pytest.raises(UserError, match=f"{amount[0]} {amount[1]}: it goes by a price list; add --recipe best or --layer_ratio auto"):
        config(*amount).resolved(make_shape())
    assert config(*amount, "--recipe", "best").resolved(make_shape()).layer_ratio == "auto"


def test_a_file_in_blocks_is_planned_in_blocks():
    assert [config("--recipe", "best", "--fit", "1MB", "--gguf_type", kind).round_to for kind in ("q8_0", "f16")] == [32, 1]
