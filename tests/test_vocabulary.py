"""Fewer tokens: what stays is split and predicted as before, and everything that reads the model knows."""

import copy
import json
import math
import pydoc_data.topics
import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import hf_prune
import post_training
import slimllm
from slimllm.__main__ import main as slimllm_main
from slimllm.data import token_counts
from slimllm.data.calibration import Calibration
from slimllm.errors import UserError
from slimllm.models import loading, vocabulary
from slimllm.models.source import ModelSource
from slimllm.models.vocabulary import Vocabulary
from slimllm.pruning import pipeline
from slimllm.reporting.record import PruningRecord
from slimllm.training import trainer
from tests.conftest import FAMILY_CASES, logits, make_ids, make_model

MANUAL = "\n".join(pydoc_data.topics.topics.values())
SCRIPTS = "Größe naïve Привет мир 日本語 ไทย हिन्दी العربية עברית 한국어 Ελληνικά 🙂👩‍👩‍👧 if x >= 1e-3:\n\treturn  x\x07\n" * 3
SPECIAL = ["<s>", "</s>", "<|user|>"]


def byte_level(**model):
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([MANUAL[:300_000], SCRIPTS * 20], trainer)
    return tokenizer


def byte_fallback(kind):
    model = {"bpe": models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True), "unigram": models.Unigram()}[kind]
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    as_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = {"bpe": trainers.BpeTrainer, "unigram": trainers.UnigramTrainer}[kind]
    unknown = {"unk_token": "<unk>"} if kind == "unigram" else {}
    trained = trainer(vocab_size=1500, special_tokens=["<unk>", *SPECIAL, *as_bytes], show_progress=False, **unknown)
    tokenizer.train_from_iterator(MANUAL[:200_000].splitlines(), trained)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [entry for entry in data["added_tokens"] if not entry["content"].startswith("<0x")]
    data["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    begin = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    return tokenizer


@pytest.fixture(scope="module", params=["byte level", "ignore merges", "bpe with byte fallback", "unigram"])
def tokenizer(request):
    made = {
        "byte level": byte_level,
        "ignore merges": lambda: byte_level(ignore_merges=True),
        "bpe with byte fallback": lambda: byte_fallback("bpe"),
        "unigram": lambda: byte_fallback("unigram"),
    }[request.param]()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def first(tokenizer, size, text=MANUAL[:20_000], scripts=None):
    from collections import Counter

    found = Vocabulary(tokenizer, len(tokenizer))
    counts = Counter(tokenizer(text, add_special_tokens=False).input_ids)
    expected = [1 / (index + 1) / 1e6 for index in range(len(tokenizer))]
    order = token_counts.in_order(found, counts, expected, lambda index: tokenizer.decode([index]), scripts)
    return found, token_counts.first_of(found, order, size)


@pytest.mark.parametrize("size", [450, 800, 1300])
def test_text_whose_tokens_all_stay_is_split_as_before_and_any_text_can_be_spelled(tokenizer, size):
    found, kept = first(tokenizer, size)
    assert kept == sorted(set(kept)) and (len(kept) == size or len(kept) == len(found.always) > size)
    smaller, new = found.tokenizer(kept), {old: index for index, old in enumerate(kept)}
    assert len(smaller) == len(kept) and smaller.get_vocab() == {text: new[i] for text, i in tokenizer.get_vocab().items() if i in new}
    same = 0
    for line in [*MANUAL[:400_000].splitlines(), *SCRIPTS.splitlines(), SCRIPTS]:
        before, now = (each(line, add_special_tokens=False).input_ids for each in (tokenizer, smaller))
        if set(before) <= set(kept):
            assert now == [new[index] for index in before], line
            same += 1
        assert smaller.decode(now) == tokenizer.decode(before) == line
    assert same > 50
    for text in SPECIAL:
        assert smaller.convert_ids_to_tokens(new[tokenizer.convert_tokens_to_ids(text)]) == text
    with_special = [each("if").input_ids for each in (tokenizer, smaller)]
    assert smaller.decode(with_special[1]) == tokenizer.decode(with_special[0])


def test_a_saved_one_loads_as_the_same(tokenizer, tmp_path):
    found, kept = first(tokenizer, 700)
    smaller = found.tokenizer(kept)
    smaller.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(MANUAL[:5000]).input_ids == smaller(MANUAL[:5000]).input_ids and again.eos_token_id == smaller.eos_token_id


def test_pieces_of_a_token_stay_with_it():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>")
    found = Vocabulary(tokenizer, len(tokenizer))
    for index in range(300, len(tokenizer), 37):
        kept = sorted(found.always | found.needs(index))
        word = tokenizer.decode([index])
        if tokenizer(word, add_special_tokens=False).input_ids == [index]:
            smaller = found.tokenizer(kept)
            assert smaller(word, add_special_tokens=False).input_ids == [kept.index(index)]


def test_what_is_used_stays_before_what_was_learned_early_and_other_scripts_go_first():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>")
    used = "returns " * 50 + "Привет " * 2
    found, kept = first(tokenizer, 700, used)
    assert set(tokenizer(used, add_special_tokens=False).input_ids) <= set(kept)
    written = [token_counts._scripts_of(tokenizer.decode([index])) for index in kept]
    assert any("cyrillic" in scripts for scripts in written)
    _, kept = first(tokenizer, 700, used, scripts=("latin",))
    written = [token_counts._scripts_of(tokenizer.decode([index])) for index in kept]
    assert not any(scripts - {"latin"} for scripts in written)


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_the_model_predicts_as_before_among_the_tokens_that_stay(case, tmp_path):
    model = make_model(case)
    model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id = 5, [5, 90], 4
    generation = model.generation_config
    generation.eos_token_id, generation.suppress_tokens, generation.begin_suppress_tokens = [5, 90], [7, 91], [91]
    generation.bad_words_ids, generation.sequence_bias = [[5], [6, 91], [6, 7]], [[[8], -5.0], [[91], 1.0]]
    model.save_pretrained(tmp_path)
    kept = [*range(4, 60), 90]
    source = loading.open_source(str(tmp_path), torch.float32)
    before = copy.deepcopy(source.config.to_dict())
    smaller = vocabulary.trimmed_source(source, kept)
    assert source.config.to_dict() == before
    ids = torch.arange(8)[None] + torch.arange(3)[:, None] * 5
    expected = logits(ModelSource.of(source).whole(), torch.tensor(kept)[ids])[..., kept]
    torch.testing.assert_close(logits(smaller.whole(), ids), expected, rtol=0, atol=1e-5)
    config, generation = smaller.config, smaller.whole().generation_config
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (57, [1, 56], 0)
    assert (generation.eos_token_id, generation.suppress_tokens, generation.begin_suppress_tokens) == ([1, 56], [3], None)
    assert (generation.bad_words_ids, generation.sequence_bias) == ([[1], [2, 3]], [[[4], -5.0]])


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"vocab": "half"}, "--vocab half: must be keep, auto, a number of tokens such as 32000, or a share of them such as 0.5"),
        ({"vocab": "0"}, "--vocab 0: must be keep, auto, a number of tokens"),
        ({"vocab": "nan"}, "--vocab nan: must be keep, auto, a number of tokens"),
        ({"vocab": "1.5"}, "--vocab 1.5: must be keep, auto"),
        ({"vocab": "auto"}, "--vocab auto: it spends an amount of the whole model; give --smaller, --target_params, --fit"),
        ({"vocab": "0.5"}, "--vocab 0.5: only of a model's files; use hf_prune.py"),
    ],
)
def test_what_cannot_be_is_said(settings, said, tiny_tokenizer):
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        config = slimllm.PruneConfig(**{"base_model": "m", "target_sparsity": 0.2, **settings})
        slimllm.prune(make_model(), tiny_tokenizer, config=config, calibration=make_ids())


def test_a_tokenizer_of_another_kind_is_refused(tiny_folder, text_file, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--base_model", str(tiny_folder), "--calibration", str(text_file), "--eval_data", "none", "--seq_len", "16", "--vocab", "0.5"]
    assert hf_prune.main(flags) == 2
    assert "no tokens can be removed from a WordLevel tokenizer; BPE and Unigram can" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--vocab", "2000"], "--vocab 2000: the model has 1,536 tokens; name fewer"),
        (["--vocab", "0.5", "--vocab_text", "none.txt"], "--vocab_text none.txt: no such file"),
        (["--vocab", "0.5", "--vocab_text", "model"], "--vocab_text model: the folder holds no .txt or .jsonl file"),
        (["--vocab", "0.5", "--vocab_scripts", "latim"], "--vocab_scripts latim: no token has letters of it; did you mean 'latin'?"),
    ],
)
def test_mistakes_are_one_line(flags, said, folder, capsys):
    assert hf_prune.main([*FLAGS, *flags]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.strip().splitlines()) == 1 and not list((folder).glob("prune_log/*"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A random model with a byte-level tokenizer, and a text."""
    monkeypatch.chdir(tmp_path)
    made = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>", chat_template="{{ messages }}")
    model = make_model(vocab_size=1536, num_hidden_layers=4, bos_token_id=0, eos_token_id=1)
    model.save_pretrained("model")
    made.save_pretrained("model")
    (tmp_path / "text.txt").write_text(MANUAL[:100_000])
    return tmp_path


FLAGS = ["--base_model", "model", "--calibration", "text.txt", "--eval_data", "t=text.txt", "--eval_limit", "8", "--num_examples", "12"]
FLAGS += ["--seq_len", "16", "--max_seq_len", "16", "--vocab_multiple", "1"]


def test_a_run_with_fewer_tokens_from_end_to_end(folder, capsys):
    assert hf_prune.main([*FLAGS, "--vocab", "0.5", "--target_sparsity", "0.2", "--save_ckpt_log_name", "v"]) == 0
    out = capsys.readouterr().out
    assert "vocabulary: 768 of 1,536 tokens stay" in out and "nats per byte" in out and "--vocab_text names more" in out
    model, made = AutoModelForCausalLM.from_pretrained("prune_log/v", trust_remote_code=True), AutoTokenizer.from_pretrained("prune_log/v")
    assert model.config.vocab_size == 768 == model.get_input_embeddings().num_embeddings == len(made)
    assert model.config.eos_token_id == made.eos_token_id == model.generation_config.eos_token_id
    ids = json.loads((folder / "prune_log/v/vocab_map.json").read_text())
    before = AutoTokenizer.from_pretrained("model")
    assert before.convert_ids_to_tokens(ids) == made.convert_ids_to_tokens(list(range(768)))
    record = PruningRecord.read("prune_log/v")
    assert record.parameters.pruned == model.num_parameters() and record.parameters.decoder_removed == pytest.approx(0.2, abs=0.005)
    assert record.parameters.dense == AutoModelForCausalLM.from_pretrained("model").num_parameters()
    assert record.vocabulary["kept"] == 768 and record.vocabulary["of"] == 1536 and "ids" not in record.vocabulary
    assert set(record.evaluation[0]["nats_per_byte"]) == {"dense", "pruned"}
    samples = Calibration.read(folder / "prune_log/v", record.calibration)  # in the tokens of the model that was given, which can take them
    assert int(samples.ids.max()) >= 768
    card = (folder / "prune_log/v/README.md").read_text()
    assert "768 of 1,536 tokens stay, those that text.txt uses most" in card and "nats per byte" in card
    assert slimllm_main(["verify", "prune_log/v"]) == 0
    assert hf_prune.main(["--base_model", "prune_log/v", *FLAGS[2:], "--vocab", "600", "--save_ckpt_log_name", "again"]) == 0
    assert AutoModelForCausalLM.from_pretrained("prune_log/again", trust_remote_code=True).config.vocab_size == 600


def test_amounts_of_the_whole_model_count_the_tokens_that_go(folder, capsys):
    flags = [*FLAGS, "--eval_data", "none", "--recipe", "best", "--self_share", "0"]
    for amount, name in ((["--smaller", "0.4", "--vocab", "0.6"], "a"), (["--smaller", "0.4", "--vocab", "auto"], "b")):
        assert hf_prune.main([*flags, *amount, "--save_ckpt_log_name", name]) == 0
        record = PruningRecord.read(f"prune_log/{name}")
        assert record.parameters.removed == pytest.approx(0.4, abs=0.01)
    assert "predicted loss" in capsys.readouterr().out
    assert hf_prune.main([*flags, "--smaller", "0.1", "--vocab", "0.4", "--save_ckpt_log_name", "c"]) == 0
    record = PruningRecord.read("prune_log/c")  # the tokens alone are more than what is asked for
    assert record.parameters.decoder_removed == 0 and record.parameters.removed > 0.1
    capsys.readouterr()
    assert hf_prune.main([*flags, "--smaller", "0.4", "--vocab", "0.6", "--dry_run"]) == 0
    rows = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    assert ["", "tokens of the vocabulary", "1536", "922", ""] in rows
    [lost] = [row[3] for row in rows if row[1:2] == ["parameters"]]
    assert float(lost.split("(")[1].split("%")[0]) == pytest.approx(40, abs=0.5)
    assert hf_prune.main([*FLAGS, "--smaller", "0.4", "--vocab", "auto"]) == 2
    assert "--vocab auto: it goes by a price list; add --recipe best or --layer_ratio auto" in capsys.readouterr().err


def test_auto_tries_the_most_tokens_that_are_enough_without_the_layers(folder, capsys):
    flags = [*FLAGS, "--eval_data", "none", "--recipe", "best", "--self_share", "0", "--num_examples", "4"]
    assert hf_prune.main([*flags, "--smaller", "0.26", "--vocab", "auto"]) == 0
    tried = re.findall(r"vocabulary: ([\d,]+) tokens: predicted loss ([\d.]+) .*, ([\d.-]+) of them", capsys.readouterr().out)
    alone = [int(tokens.replace(",", "")) for tokens, loss, of_tokens in tried if loss == of_tokens]
    record, model = PruningRecord.read("prune_log/llama_prune"), make_model(vocab_size=1536, num_hidden_layers=4)
    row = model.config.hidden_size * (1 if model.config.tie_word_embeddings else 2)
    most = 1536 - math.ceil(0.26 * record.parameters.dense / row)
    assert alone[-1] == max(alone) and most - 2 <= alone[-1] <= most, (alone, most)


def test_a_stopped_run_goes_on_with_the_same_tokens(folder, monkeypatch):
    flags = [*FLAGS, "--vocab", "700", "--target_sparsity", "0.3", "--distill", "scales", "--distill_examples", "16"]
    assert hf_prune.main([*flags, "--save_ckpt_log_name", "whole"]) == 0
    plain = pipeline.prune

    def stops(run, allocation):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "prune", stops)
    assert hf_prune.main([*flags, "--save_ckpt_log_name", "stopped"]) == 130
    monkeypatch.setattr(pipeline, "prune", plain)
    assert hf_prune.main([*flags, "--save_ckpt_log_name", "stopped", "--resume"]) == 0
    names = ("model.safetensors", "tokenizer.json", "vocab_map.json", "config.json")
    one, other = (folder / "prune_log" / name for name in ("whole", "stopped"))
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_tokens_that_the_model_has_no_row_for_go_first(folder):
    """As where one was added to the tokenizer, and the embeddings were not made longer; from a .gguf file too."""
    made = AutoTokenizer.from_pretrained("model")
    made.add_tokens(["<new>"])
    made.save_pretrained("model")
    make_model(vocab_size=len(made) - 1, num_hidden_layers=2, bos_token_id=0, eos_token_id=1).save_pretrained("model")
    assert hf_prune.main([*FLAGS, "--vocab", "700", "--target_sparsity", "0.2", "--save_ckpt_log_name", "v"]) == 0
    assert AutoModelForCausalLM.from_pretrained("prune_log/v", trust_remote_code=True).config.vocab_size == 700
    assert "<new>" not in AutoTokenizer.from_pretrained("prune_log/v").get_vocab()


@pytest.mark.parametrize("broken", ["[]", "{}", '{"ids": [3, 1]}', None])
def test_a_list_of_tokens_that_is_broken_is_said_at_resume(broken, folder, monkeypatch, capsys):
    flags = [*FLAGS, "--vocab", "700", "--target_sparsity", "0.3"]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "prune", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert hf_prune.main(flags) == 130
    [file] = folder.glob("prune_log/.*.partial/.journal/vocabulary.json")
    content = json.loads(file.read_text())
    file.write_text(broken or json.dumps(content | {"ids": content["ids"][::-1]}))
    capsys.readouterr()
    assert hf_prune.main([*flags, "--resume"]) == 2
    assert "vocabulary.json, which the stopped run had written, is broken" in capsys.readouterr().err


def test_a_file_for_llama_cpp_has_the_same_tokens(folder):
    from tests.test_export_gguf import gguf

    assert hf_prune.main([*FLAGS, "--vocab", "700", "--target_sparsity", "0.2", "--save_ckpt_log_name", "v"]) == 0
    assert slimllm_main(["export-gguf", "prune_log/v", "--output", "v.gguf"]) == 0
    assert slimllm_main(["verify", "prune_log/v", "v.gguf"]) == 0
    tokens = gguf.GGUFReader("v.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert tokens == AutoTokenizer.from_pretrained("prune_log/v").convert_ids_to_tokens(list(range(700)))


def test_explore_shows_what_fewer_tokens_would_save(folder, capsys):
    flags = ["--calibration", "text.txt", "--num_examples", "8", "--eval_data", "none", "--output", "out", "--vocab", "auto"]
    assert slimllm_main(["explore", "model", "--target_sparsity", "0.2", "0.5", *flags]) == 0
    rows = [
        [cell.strip() for cell in line.split("|")] for line in (folder / "out/table.md").read_text().splitlines() if line.startswith("| ")
    ]
    assert rows[0][-3:-1] == ["with fewer tokens, nats", "tokens"]
    for row in rows[2:]:
        assert float(row[-3]) <= float(row[5]) + 1e-3 and int(row[-2].replace(",", "")) <= 1536


def test_the_dense_model_teaches_the_tokens_that_stay(folder, monkeypatch):
    assert hf_prune.main([*FLAGS, "--eval_data", "none", "--vocab", "700", "--target_sparsity", "0.2", "--save_ckpt_log_name", "v"]) == 0
    rows = [{"text": line} for line in MANUAL[:20_000].split("\n\n")[:8] if len(line) > 40]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--prune_model", "prune_log/v", "--data_path", "rows.jsonl", "--no_instruction", "--teacher", "model", "--output_dir", "out"]
    flags += ["--val_set_size", "0", "--extra_val_dataset", "none", "--batch_size", "4", "--micro_batch_size", "4", "--num_epochs", "1"]
    plain, made = trainer.trimmed_source, []
    monkeypatch.setattr(trainer, "trimmed_source", lambda *args: made.append(plain(*args)) or made[0])
    assert post_training.main(flags) == 0
    ids = json.loads((folder / "prune_log/v/vocab_map.json").read_text())
    dense = AutoModelForCausalLM.from_pretrained("model").get_input_embeddings().weight
    torch.testing.assert_close(made[0].whole().get_input_embeddings().weight, dense[ids], rtol=0, atol=0)


def test_nats_per_byte_do_not_depend_on_the_tokens():
    from slimllm.evaluation.perplexity import nats_per_byte

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    ids = torch.tensor([tokenizer("return the values", add_special_tokens=False).input_ids])
    value, text = torch.tensor(2.0).exp().item(), "return the values"
    rest = tokenizer.decode(ids[0, 1:])  # the first token is not predicted
    assert nats_per_byte(value, ids, tokenizer) == pytest.approx(2.0 * (ids.shape[1] - 1) / len(rest), rel=1e-5)
    begun = torch.cat([torch.tensor([[tokenizer.convert_tokens_to_ids("<s>")]]), ids], 1)  # now all are
    assert nats_per_byte(value, begun, tokenizer) == pytest.approx(2.0 * ids.shape[1] / len(text), rel=1e-5)


def test_compare_shows_models_of_other_tokens_per_byte_of_the_same_text(folder):
    for name, tokens in (("a", "700"), ("b", "900")):
        flags = [*FLAGS, "--eval_data", "none", "--vocab", tokens, "--target_sparsity", "0.2", "--save_ckpt_log_name", name]
        assert hf_prune.main(flags) == 0
    flags = ["--base_model", "model", "--calibration", "text.txt", "--eval_data", "t=text.txt", "--eval_limit", "3", "--output", "out"]
    flags += ["--methods", "none", "--recipes", "none", "--tasks", "none"]
    assert slimllm_main(["compare", *flags, "--also", "fewer=prune_log/a", "fewer=prune_log/b"]) == 0
    rows = json.loads((folder / "out/results.json").read_text())["rows"]
    dense, small = next(row for row in rows if row["name"] == "dense"), next(row for row in rows if row.get("folder") == "prune_log/a")
    assert small["other_tokens"] and not dense["other_tokens"]
    table = (folder / "out/table.md").read_text()
    assert "nats per byte, since not all models have the same tokens" in table and "More than dense" in table
    [found] = small["perplexity"]
    text = AutoTokenizer.from_pretrained("model").decode(AutoTokenizer.from_pretrained("model")(MANUAL[:5_000]).input_ids[: 3 * 128])
    made, model = (kind.from_pretrained("prune_log/a", trust_remote_code=True) for kind in (AutoTokenizer, AutoModelForCausalLM))
    ids = torch.tensor(made(text, add_special_tokens=False).input_ids)
    blocks = ids[: len(ids) // 128 * 128].view(-1, 128)
    assert len(blocks) == 4 and found["blocks"] == 3  # the text of the dense model's three blocks, in smaller tokens
    loss = model(blocks, labels=blocks).loss * blocks[:, 1:].numel() / len("".join(made.batch_decode(blocks[:, 1:])))
    assert found["nats_per_byte"] == pytest.approx(loss.item(), rel=1e-3)
    more = found["nats_per_byte"] / dense["perplexity"][0]["nats_per_byte"] - 1
    assert any(f"{100 * more:.1f} %" in line for line in table.splitlines() if "| a " in line)
    flags = [*flags, "--also", "fewer=prune_log/a", "fewer=prune_log/b"]
    assert slimllm_main(["compare", *flags]) == 0  # nothing to do
    (folder / "prune_log/a/config.json").write_text((folder / "prune_log/a/config.json").read_text() + "\n")
    assert slimllm_main(["compare", *flags]) == 2
