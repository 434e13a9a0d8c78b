"""The documents hold: commands exist, links lead somewhere, quoted messages stand in the code."""

from __future__ import annotations

import ast
import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from docs.generate import command, configuration_page
from docs.picture import PICTURE, draw
from launch.cli import VERBS
from pretrain.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", flags=re.M | re.S)
MARKED = re.compile(r"<!-- run -->\n+```(bash|python)\n(.*?)^```", flags=re.M | re.S)


@pytest.mark.long
def test_site_builds_without_a_warning(tmp_path):
    """Links, anchors, pages that no menu names: mkdocs is strict about them."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    commands = (tmp_path / "site" / "commands.html").read_text()
    assert all(f"geneloom {verb}" in commands for verb in VERBS)
    settings = (tmp_path / "site" / "configuration.html").read_text()
    assert "optim.warmup_steps" in settings and "10000" in settings


@pytest.mark.long
def test_guide_runs_and_others_can_read_what_it_makes(tmp_path):
    """Blocks that are marked, in their order: the guide makes the files that formats.md reads."""
    if not (BIN / "geneloom").exists():
        pytest.skip(f"the console command is not installed beside {sys.executable}")
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PATH": f"{BIN}{os.pathsep}{environment['PATH']}", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)  # readers in the documents need no part of this project
    for name in ("guide", "model_size", "formats"):
        blocks = MARKED.findall((ROOT / "docs" / f"{name}.md").read_text())
        assert blocks, name
        for language, block in blocks:
            start = ["bash", "-e", "-c"] if language == "bash" else [sys.executable, "-c"]
            done = subprocess.run(
                [*start, block], cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{name}: {block}\n{done.stdout}\n{done.stderr}"
    for made in ("shards.html", "report.html", "screen.html"):
        assert (tmp_path / made).exists(), made


def command_lines(text: str) -> list[str]:
    """Return every command line of this project in a page, in code blocks and in sentences."""
    lines = []
    for _, language, block in FENCE.findall(text):
        if language in ("", "bash", "sh"):
            lines += block.replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(geneloom [^`]+)`", FENCE.sub("", text).replace("\n", " "))
    pattern = re.compile(r"(?:^|[\s(|&])(geneloom [a-z].*)")
    return [found[1] for line in lines if (found := pattern.search(line))]


@functools.cache
def verb_command(verb: str) -> Any:
    return command(verb)


def parse(words: list[str], said: str) -> None:
    """Assert that a verb, its subcommand, its options and its settings exist."""
    assert words[0] in VERBS, f"{said}: no command {words[0]}"
    found, rest = verb_command(words[0]), words[1:]
    if isinstance(found, TyperGroup):
        if not rest or not rest[0].isidentifier():
            return
        assert rest[0] in found.commands, f"{said}: {words[0]} has no {rest[0]}"
        found, rest = found.commands[rest[0]], rest[1:]
    if words[0] == "launch":
        inner = next((i for i, word in enumerate(rest) if word in VERBS), None)
        if inner is not None:
            parse(rest[inner:], said)
            rest = rest[: inner + 1]
    context = typer.Context(found, info_name=words[0], **found.context_settings)
    try:
        # One word more: a sentence may name an option without its value.
        found.make_parser(context).parse_args(args=[*rest, "X"])
    except Exception as error:  # noqa: BLE001  typer's own; only its text is of use
        pytest.fail(f"{said}: {error}")
    if words[0] in ("pretrain", "plan"):
        for word in rest:
            section, dot, field = word.partition("=")[0].partition(".")
            if "=" in word and dot and not word.startswith("-"):
                model = RunConfig.model_fields[section].annotation
                assert field in model.model_fields, f"{said}: no setting {section}.{field}"  # type: ignore[union-attr]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_exist(page):
    for line in command_lines(page.read_text()):
        # What follows in the shell is not the command's: comments, pipes, a file.
        words = shlex.split(re.sub(r"\$\([^)]*\)|\.\.\.", "X", line), comments=True)
        end = next((i for i, w in enumerate(words) if w in ("|", "&", "&&", ">", ";")), len(words))
        words = [w.rstrip(";,.") for w in words[1:end] if w not in ("X", "&")]
        if words and words[0].isalpha() and words[0].isupper():
            continue  # `geneloom VERB --help`
        parse(words, f"{page.name}: {line}")


def test_wrong_command_lines_are_found():
    with pytest.raises(pytest.fail.Exception, match="--vocabulary"):
        parse(["prepare", "x", "--vocabulary", "v"], "")
    with pytest.raises(AssertionError, match="no command train"):
        parse(["train"], "")
    with pytest.raises(AssertionError, match="optim.lr"):
        parse(["launch", "local", "--ranks", "2", "pretrain", "optim.lr=1"], "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", FENCE.sub("", page.read_text())):
        generated = target in ("commands.md", "configuration.md")
        if "://" not in target and not generated:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_index_leads_to_every_page():
    """Somebody who begins at docs/index.md finds each page and each notebook."""
    index = ROOT / "docs" / "index.md"
    linked = {t.partition("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", index.read_text())}
    pages = {p.name for p in (ROOT / "docs").glob("*.md")} - {index.name}
    notebooks = {f"notebooks/{p.name}" for p in (ROOT / "docs" / "notebooks").glob("*.ipynb")}
    assert len(pages) > 20 and notebooks
    assert pages | notebooks <= linked, (pages | notebooks) - linked


def strings_of_the_code() -> list[str]:
    """Return every text in the code; what an f-string fills in is a NUL."""
    found = []
    for folder in ("data_prep", "pretrain", "launch", "eval"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                    found.append("".join(map(str, parts)))
    return found


def test_quoted_messages_stand_in_the_code():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `(.+?)` \|", text, flags=re.M)
    assert len(quoted) > 40
    strings = strings_of_the_code()
    for message in quoted:
        pattern = re.compile(".*?".join(map(re.escape, message.split("…"))), flags=re.S)
        assert any(pattern.search(s) for s in strings), f"no longer said: {message}"


def test_picture_shows_the_imports():
    assert PICTURE.read_text() == draw(), "imports changed: python -m docs.picture"


def test_every_setting_says_what_it_is():
    """On the page of settings no meaning is empty: descriptions, or comments above the fields."""
    rows = re.findall(r"^\| `([\w.]+)` \|.*\|([^|]*)\|$", configuration_page(), flags=re.M)
    assert len(rows) > 150
    for name, said in rows:
        assert said.strip(), f"{name} has no description"


def test_contracts_name_tests_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`(test_\w+)\.py`, `(test_\w+)`", text)
    assert len(named) > 20
    assert all(f"**{number}. " in text for number in range(1, 12))
    for module, function in named:
        code = (ROOT / "tests" / f"{module}.py").read_text()
        assert f"def {function}(" in code, f"{module}.{function}"


def test_nothing_unsafe_is_called():
    """Contract 11: no shell, no remote code, no unpickler but the one with the allow-list."""
    banned = {("pickle", "load"), ("pickle", "loads"), ("os", "system"), ("numpy", "load")}
    for folder in ("data_prep", "pretrain", "launch", "eval"):
        for path in (ROOT / folder).rglob("*.py"):
            has_allow_list = path == ROOT / "data_prep" / "genes" / "vocabulary.py"
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    assert node.module != "pickle", path
                if isinstance(node, ast.Attribute) and ast.unparse(node) == "pickle.Unpickler":
                    assert has_allow_list, path
                if not isinstance(node, ast.Call):
                    continue
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert given.get("shell") != "True", where
                assert given.get("trust_remote_code") != "True", where
                name = ast.unparse(node.func)
                assert tuple(name.rpartition(".")[::2]) not in banned, where
                assert name not in ("eval", "exec"), where
                if name in ("np.load", "numpy.load"):
                    assert given.get("allow_pickle") != "True", where
                if name == "torch.load":
                    assert given.get("weights_only") == "True", where


def test_changelog_names_every_format_and_command():
    text = (ROOT / "CHANGELOG.md").read_text()
    formats = {s for s in strings_of_the_code() if re.fullmatch(r"geneloom-\w+/\d+", s)}
    assert len(formats) > 5
    for name in formats - {"geneloom-shards/1", "geneloom-checkpoint/1"}:
        assert f"`{name}`" in text, name
    for verb in VERBS:
        assert f"`{verb}`" in text, verb
