"""README and docs tell the truth: commands parse, files and pictures exist, the tree is the tree, the example runs."""

import re
import shlex

import pytest

import slimllm
from slimllm import cli
from slimllm.commands import COMMANDS
from slimllm.commands.families import families_page
from slimllm.commands.flags import flags_page
from slimllm.deploy import checkpoint
from slimllm.models.families import FAMILIES
from slimllm.settings import methods
from tests.conftest import ROOT, TEXT, logits, make_ids, make_model

PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
LINES = [
    (page, re.sub(r"\s+#.*", "", line))
    for page, text in PAGES.items()
    for block in re.findall(r"```bash\n(.*?)```", text, re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
SCRIPTS = {
    "script/evaluate.sh": ("evaluate", []),
    "script/ablation.sh": ("ablation", ["--base_model"]),
    "script/evidence.sh": ("evidence", ["--base_model"]),
    "script/compare.sh": ("compare", ["--base_model"]),
}


def check_flags(parser, words):
    """The program knows every flag of the command (values, which may name files of the reader's, are not looked at)."""
    flags = {option for action in parser._actions for option in action.option_strings}
    assert {word for word in words if word.startswith("--")} <= flags


def test_the_two_commands_are_there():
    commands = [line.strip() for page, line in LINES if page == "README.md"]
    assert "bash script/llama_prune.sh" in commands and "bash script/test.sh" in commands


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 14_000


@pytest.mark.parametrize("page, command", LINES)
def test_a_command_names_flags_and_files_that_exist(page, command):
    words = [w for w in shlex.split(command) if not re.fullmatch(r"(?s)[A-Z_]+=.*", w)]
    if words[:3] == ["torchrun", "--standalone", "--nproc_per_node"]:
        words = ["python", *words[4:]]
    if words[:2] == ["python", "hf_prune.py"]:
        assert COMMANDS["prune"].parsed("prune", words[2:], "hf_prune.py")
    elif words[:2] == ["python", "post_training.py"]:
        assert COMMANDS["train"].parsed("train", words[2:])
    elif words[0] == "slimllm" and words[1] in ("prune", "train") and "--plugin" not in words:
        assert COMMANDS[words[1]].parsed(words[1], words[2:])
    elif words[0] == "slimllm":
        check_flags(COMMANDS[words[1]].parser(words[1]), words[2:])
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file()
        if words[1] in SCRIPTS:
            name, first = SCRIPTS[words[1]]
            check_flags(COMMANDS[name].parser(name), [*first, *words[2:]])
        elif words[1] not in ("script/test.sh", "script/vllm.sh"):
            model = [] if words[2:3] and not words[2].startswith("-") else ["x"]
            COMMANDS["prune"].parsed("prune", [*model, *words[2:]], "hf_prune.py")
    else:
        assert words[0] in ("pip", "git", "cd", "llama-server", "llama-quantize", "vllm"), command


def test_flags_named_in_the_text_exist():
    """A flag in backquotes is one of some program."""
    known = {option for name, command in COMMANDS.items() for a in command.parser(name)._actions for option in a.option_strings}
    for page, text in PAGES.items():
        named = set(re.findall(r"`(--\w+)", text))
        assert named <= known | {"--standalone", "--nproc_per_node"}, (page, named - known)


def test_the_page_of_flags_is_the_programs_own():
    assert PAGES["flags.md"] == flags_page(), "make it anew: slimllm flags > docs/flags.md"


def test_the_page_of_families_is_the_table_s():
    assert PAGES["families.md"] == families_page(), "make it anew: slimllm families > docs/families.md"
    assert f"and more: {len(FAMILIES)} families." in PAGES["README.md"]


def test_the_tree_is_the_tree():
    listed = set(re.findall(r"^([\w./]+)  +\S", re.search(r"```text\n(.*?)```", PAGES["architecture.md"], re.S).group(1), re.M))
    patterns = ("*.py", "*.toml", "slimllm/*", "slimllm/pruning/*", "requirement.txt", "script", "tests", "docs", "figures")
    there = {path for pattern in patterns for path in ROOT.glob(pattern)}
    there = {f"{path.relative_to(ROOT)}{'/' if path.is_dir() else ''}" for path in there if path.name not in ("__init__.py", "__pycache__")}
    assert listed == there


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\((?!https?:)(.*?)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        assert not path or (folder / path).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", PAGES[path.rpartition("/")[2] or page], re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


def test_the_python_example_runs(tmp_path, monkeypatch, tiny_tokenizer, capsys):
    """As it stands, on a tiny model and texts put where it looks for them."""
    monkeypatch.chdir(tmp_path)
    make_model(max_position_embeddings=256).save_pretrained("path/to/model")
    tiny_tokenizer.save_pretrained("path/to/model")
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "novel.txt").write_text(2 * TEXT)
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", PAGES["README.md"], re.S) if "slimllm.prune" in code)
    made = {}
    exec(example, made)
    result = made["result"]
    assert isinstance(result, slimllm.PruneResult) and abs(result.parameters.decoder_removed - 0.2) < 0.01
    assert (logits(checkpoint.load("smaller"), make_ids()) == logits(result.model, make_ids())).all()
    assert capsys.readouterr().out == ""


@pytest.fixture
def run_page(tmp_path, monkeypatch, capsys):
    """Runs the Python blocks of a page one after the other, as a reader would; what they add to the tables is taken out again."""
    tables = (methods.HEAD_CHOICES, methods.CHANNEL_SCORES, methods.LAYER_RATIOS, methods.RECOVERIES, methods.METHODS, FAMILIES)
    before = [table.copy() for table in tables]
    monkeypatch.chdir(tmp_path)

    def run(page: str) -> dict:
        made = {}
        for code in re.findall(r"```python\n(.*?)```", PAGES[page], re.S):
            exec(code, made)
        return made

    yield run
    for table, entries in zip(tables, before):
        table.clear()
        table.update(entries)


def test_the_page_on_families_adds_the_last_of_the_table(run_page, capsys):
    name, row = list(FAMILIES.items())[-1]
    del FAMILIES[name]
    run_page("add-a-family.md")
    assert FAMILIES[name] == row
    printed, shown = capsys.readouterr().out, re.search(r"```text\n(.*?)```", PAGES["add-a-family.md"], re.S).group(1)
    assert all(line.strip() in printed for line in shown.splitlines() if "..." not in line)


def test_the_page_on_methods_adds_one(run_page):
    assert run_page("add-a-method.md")["mine"].parameters.decoder_removed > 0.25


def test_help_shows_what_the_page_of_flags_says():
    parser = COMMANDS["evaluate"].parser("evaluate")
    shown = " ".join(parser.format_help().split())
    for action in parser._actions:
        if action.help and action.dest != "help":
            assert " ".join(cli.help_text(action).split()) in shown


def test_the_lowest_versions_that_are_tested_are_those_that_are_allowed():
    allowed = dict(re.findall(r'^    "(\w+)>=([\d.]+)', (ROOT / "pyproject.toml").read_text(), re.M))
    assert allowed == dict(re.findall(r"^(\w+)==([\d.]+)$", (ROOT / "tests/lowest.txt").read_text(), re.M))
