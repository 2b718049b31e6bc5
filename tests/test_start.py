"""What each program, and ``import slimllm``, loads before it answers: counted in modules, which no other load of the machine changes."""

import os
import subprocess
import sys

import pytest

from slimllm.commands import COMMANDS
from slimllm.models.families import FAMILIES
from tests.conftest import ROOT, prune_to, tiny_tokenizer_of

HEAVY = "torch transformers numpy scipy datasets peft gguf accelerate tokenizers safetensors huggingface_hub lm_eval matplotlib jinja2"
HEAVY += " tqdm psutil yaml"
PROGRAM = f"""
import runpy, sys
start, status = sys.argv.pop(1), 0
try:
    if start == "-m":
        name = sys.argv.pop(1)
        sys.argv[0] = name
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv[0] = start
        runpy.run_path(start, run_name="__main__")
except SystemExit as stopped:
    status = stopped.code or 0
print("\\nloaded", status, *sorted(set("{HEAVY}".split()) & set(sys.modules)))
"""
WRONG = [
    ["--prunning_ratio", "0.2"],
    ["--seed", "x"],
    ["--prune_model", "x", "--seed", "-1"],
    ["--base_model", "x", "--pruning_ratio", "2"],
]


def answer(*args, **more):
    """Standard output of a Python that is run with these arguments, in an environment without the tests' own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, env=environment, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def started(*args):
    """(what a program says, exit status, heavy packages that it loaded)."""
    said, _, rest = answer("-c", PROGRAM, *args, cwd=ROOT).rpartition("\nloaded ")
    status, *loaded = rest.split()
    return said, int(status), loaded


@pytest.mark.parametrize("program", ["hf_prune.py", "post_training.py"])
@pytest.mark.parametrize("flags", [["--help"], ["--version"], *WRONG])
def test_help_and_errors_of_the_scripts_load_nothing_heavy(program, flags):
    said, status, loaded = started(program, *flags)
    assert loaded == [] and status == (0 if len(flags) == 1 else 2)
    assert flags != ["--version"] or said == "slimllm 0.1.0\n"


@pytest.mark.parametrize("flags", [[], ["--help"], ["--version"], ["evalaute"], *([name, "--help"] for name in COMMANDS)])
def test_help_and_errors_of_the_commands_load_nothing_heavy(flags):
    said, status, loaded = started("-m", "slimllm", *flags)
    assert loaded == [] and status == (2 if flags == ["evalaute"] else 0) and said.count("\n") >= (flags != ["evalaute"])


@pytest.mark.parametrize(
    "flags", [["evaluate", "x", "--tasks", "piqqa"], ["compare", "--base_model", "x", "--methods", "flop"], ["latency", "x", "--hurry"]]
)
def test_wrong_flags_of_the_commands_load_nothing_heavy(flags):
    assert started("-m", "slimllm", *flags) == ("", 2, [])


def test_a_dry_run_loads_no_more_than_a_config_takes(tiny_folder):
    """Not the models of transformers, nor what only its other parts need."""
    code = "import hf_prune, sys; hf_prune.main(sys.argv[1:]); "
    code += "print(*(name for name in ('scipy', 'datasets', 'peft', 'transformers.modeling_utils') if name in sys.modules))"
    out = answer("-c", code, "--base_model", tiny_folder, "--dry_run", cwd=ROOT)
    assert "dry run" in out and out.splitlines()[-1] == ""


@pytest.mark.parametrize("code", ["import slimllm", "from slimllm import PruneConfig; PruneConfig(base_model='m')", "import slimllm.cli"])
@pytest.mark.parametrize("optimized", [[], ["-O"]])
def test_the_package_loads_when_it_is_used(code, optimized):
    code += f"; import sys; print(set('{HEAVY}'.split()) & set(sys.modules), 'prune' in dir(sys.modules['slimllm']))"
    assert answer(*optimized, "-c", code) == "set() True\n"


def test_the_package_is_there_without_transformers():
    code = "import sys; sys.modules['transformers'] = None; import slimllm; print(slimllm.UserError.__name__)"
    assert answer("-c", code) == "UserError\n"


LOADS = """
import sys
folder = sys.argv[1]
{imports}
assert isinstance(AutoConfig.from_pretrained(folder), slimllm.modeling.SlimLlamaConfig)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(folder)
assert type(model) is slimllm.modeling.SlimLlamaForCausalLM, type(model)
AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
parts = [name.split(".") for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name]
print(*(family for _, _, family, *_ in parts if family != "auto"))
"""


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    return prune_to(tmp_path_factory.mktemp("pruned"), tiny_tokenizer_of())


@pytest.mark.parametrize(
    "imports",
    [
        "import slimllm; from transformers import AutoConfig",
        "from transformers import AutoConfig; import slimllm",
    ],
)
def test_pruned_models_load_whatever_is_imported_first_and_only_their_family_is(imports, pruned):
    assert answer("-c", LOADS.format(imports=imports), pruned).split() == ["llama"]


def test_every_family_is_known_to_autoconfig():
    code = "import slimllm, sys; from transformers import AutoConfig; "
    code += "print(*(type(AutoConfig.for_model(name)).__name__ for name in sys.argv[1:]))"  # two families are Llamas to transformers
    found = answer("-c", code, *(f"slim_{name}" for name in FAMILIES)).split()
    assert len(set(found)) == len(FAMILIES) - 2 and all(name.startswith("Slim") for name in found)


def test_a_loaded_model_is_copied_and_pickled(pruned, tmp_path):
    load = "import sys, copy, pickle, torch, slimllm; from transformers import AutoModelForCausalLM; "
    load += "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); assert type(copy.deepcopy(model)) is type(model); "
    load += "pickle.dump((model, model.config), open('model.pickle', 'wb')); print(model(torch.arange(9)[None]).logits.sum().item())"
    again = "import pickle, torch; model, config = pickle.load(open('model.pickle', 'rb')); from transformers import AutoModelForCausalLM; "
    again += "assert type(AutoModelForCausalLM.from_config(config)) is type(model); print(model(torch.arange(9)[None]).logits.sum().item())"
    assert answer("-c", load, pruned, cwd=tmp_path) == answer("-c", again, cwd=tmp_path)
