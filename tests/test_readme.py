"""The README tells the truth: its commands parse, its files exist, its tree is the tree."""

import dataclasses
import importlib
import re
import shlex

import pytest

from slimllm import lora
from slimllm.config import PruneConfig, build_parser, parse_args
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [
    re.sub(r"\s+#.*", "", line)
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


PARSERS = {"script/evaluate.sh": ("slimllm.evaluation", []), "script/ablation.sh": ("slimllm.ablation", ["--base_model"])}


def check_flags(module, words):
    """The program knows every flag of the command (values, which may name files of the reader's, are not looked at)."""
    settings = next(
        value for name, value in vars(importlib.import_module(module)).items() if name.endswith("Config") and name != "PruneConfig"
    )
    flags = {f"--{field.name}" for field in dataclasses.fields(settings)}
    assert {word for word in words if word.startswith("--")} <= flags


def test_there_are_commands():
    assert "bash script/llama_prune.sh" in COMMANDS and "bash script/test.sh" in COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_flags_and_files_that_exist(command):
    words = [w for w in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", w)]
    if "hf_prune.py" in words:
        flags = words[words.index("hf_prune.py") + 1 :]
        assert isinstance(parse_args(flags), PruneConfig)
    elif "post_training.py" in words:
        assert lora.parse_args(words[words.index("post_training.py") + 1 :])
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file()
        rest = words[2:]
        if words[1] in PARSERS:
            module, first = PARSERS[words[1]]
            check_flags(module, [*first, *rest])
        elif words[1] != "script/test.sh":
            model = [] if rest[:1] and not rest[0].startswith("-") else ["x"]
            parse_args(["--base_model", *model, *rest])
    elif words[:2] == ["python", "-m"] and words[2].startswith("slimllm"):
        assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file()
        if words[2] not in ("slimllm.benchmark", "slimllm.report"):
            check_flags(words[2], words[3:])
    else:
        assert words[0] in ("pip", "git", "cd", "python"), command


def test_the_tree_is_the_tree():
    listed = set(re.findall(r"^([\w./]+)  +\S", re.search(r"```text\n(.*?)```", README, re.S).group(1), re.M))
    there = {
        str(path.relative_to(ROOT))
        for pattern in ("*.py", "slimllm/*.py", "slimllm/importance/*.py", "script/*.sh", "requirement.txt")
        for path in ROOT.glob(pattern)
    }
    assert there - {"slimllm/__init__.py", "slimllm/importance/__init__.py"} <= listed
    assert all((ROOT / name).exists() for name in listed)


def test_the_table_of_flags_is_complete():
    flags = {option for action in build_parser()._actions for option in action.option_strings if option.startswith("--")} - {
        "--help",
        "--no_save_model",
    }
    missing = [flag for flag in flags if f"`{flag}" not in README]
    assert not missing


def test_pictures_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file()
