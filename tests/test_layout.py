"""The shape of the house: import arrows, torch-free parts, sizes."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pages import section

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("data_prep", "pretrain", "launch", "eval")
# Rooms from top to bottom: a file may import its own room and those in the lines below it. A name
# is a folder, or a file beside them; docs/architecture.md says what each is for.
ROOMS = {
    "data_prep": """
        __main__ | cli api | inspection | prepare | encoding | sources | matrices shards
        genes running | drawing errors files hashing options version
    """,
    "pretrain": """
        __main__ | cli | api | train | engine | start | export | optim summary device | measure
        batches run_folder cell_states | model optimizer | counting | checkpoints | ranks
        plan objective ds_config | config options | settings stop
    """,
    "launch": """
        doctor stop cli | ways | attempts | hosts verbs runs environment
    """,
    "eval": """
        perturb.__main__ finetune.__main__ | cli api | saturate | benchmark.cli perturb.cli probe
        benchmark.run benchmark.finetune_genes | benchmark.own_world | benchmark.kinds report
        benchmark.matched benchmark.report saturate.report
        benchmark.contest benchmark.own_task perturb.report | perturb.effects benchmark.material
        perturb.screen | finetune | cells simulate | drawing owning benchmark.neighbours
        benchmark.scoring benchmark.outcome benchmark.task_file | scores options train_run
    """,
}
# What a package may import of another one: rooms, or all of it.
ACROSS = {
    ("eval", "pretrain"): "*",
    ("eval", "data_prep"): "*",
    ("pretrain", "data_prep"): "genes shards running errors files hashing options version",
    ("launch", "pretrain"): "config ds_config",
    ("launch", "data_prep"): "running errors files options version",
}
NEVER_TORCH = [
    "data_prep",
    "launch",
    "pretrain/config.py",
    "pretrain/options.py",
    "pretrain/settings/architecture.py",
    "pretrain/ds_config.py",
]


def modules(folder: str) -> list[Path]:
    path = ROOT / folder
    return [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))


@functools.cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def room_of(module: str) -> tuple[str, str]:
    """Return package and room of a module; a file beside rooms is one of its own."""
    package, _, inside = module.partition(".")
    rooms = ROOMS[package].replace("|", " ").split()
    fitting = [r for r in rooms if inside == r or inside.startswith(f"{r}.")]
    assert fitting, f"{module}: is in no room of the table"
    return package, max(fitting, key=len)


def arrows() -> list[tuple[str, str]]:
    """Return (module, module of ours that it imports), wherever in the file, for types too."""
    paths = [p for f in FOLDERS for p in modules(f) if p.name != "__init__.py"]
    known = {dotted(p) for p in paths}
    return [
        (dotted(path), next(n for n in (name, name.rpartition(".")[0]) if n in known))
        for path in paths
        for name in sorted(imports(path))
        if name in known or name.rpartition(".")[0] in known
    ]


def test_import_arrows():
    ours = (*FOLDERS, "tests", "benchmarks")
    for folder in FOLDERS:
        for path in modules(folder):
            for name in imports(path):
                other = name.split(".")[0]
                if other not in ours or other == folder:
                    continue
                assert (folder, other) in ACROSS, f"{dotted(path)} must not import {name}"
                allowed = ACROSS[folder, other]
                rooms = [f"{other}.{room}" for room in allowed.split()]
                assert allowed == "*" or any(name.startswith(r) for r in rooms), (
                    f"{dotted(path)} must not import {name}"
                )


def test_rooms_import_downwards():
    height = {
        (package, room): number
        for package, table in ROOMS.items()
        for number, line in enumerate(table.replace("\n", "|").split("|"))
        for room in line.split()
    }
    for module, other in arrows():
        here, there = room_of(module), room_of(other)
        if here[0] == there[0] and here != there:
            assert height[here] < height[there], f"{module} must not import {other}"


def test_no_circle_of_files():
    graph: dict[str, set[str]] = {}
    for module, other in arrows():
        graph.setdefault(module, set()).add(other)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them


def test_nothing_is_imported_by_a_text():
    """But the verbs, by `launch.cli`, and what belongs to others."""
    for path in [p for f in FOLDERS for p in modules(f)]:
        for node in ast.walk(syntax(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                text = ast.unparse(node.args[0])
                assert dotted(path) == "launch.cli" or text.split(".")[0].strip("'") in (
                    "deepspeed", "hdf5plugin",
                ), f"{dotted(path)} imports {text}"  # fmt: skip


# Elsewhere `data_prep.files.complete_file` writes aside. Here it means something else: a checkpoint
# that many ranks write, the right to a folder, copies that several processes make at once, a name
# that is known when the content is, finished work that moves.
RENAMES_ITSELF = {
    "data_prep.files", "data_prep.matrices.row_copy", "data_prep.prepare.lay_out_tars",
    "data_prep.prepare.verify_and_repair", "data_prep.prepare.workspace",
    "data_prep.running.owner", "data_prep.shards.remote",
    "pretrain.checkpoints.checkpoint", "pretrain.checkpoints.publish",
}  # fmt: skip


def test_files_are_written_aside_in_one_place():
    found = set()
    for path in [p for f in FOLDERS for p in modules(f)]:
        for node in ast.walk(syntax(path)):
            # Of a text, replace takes two arguments.
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                renames = node.func.attr in ("rename", "replace") and len(node.args) == 1
                if renames and ast.unparse(node.func) != "sums.replace":  # of `measure.heldout`
                    found.add(dotted(path))
    assert found == RENAMES_ITSELF


def test_every_room_is_on_the_map():
    page = section((ROOT / "docs" / "architecture.md").read_text(), "the-rooms")
    for package, table in ROOMS.items():
        for room in table.replace("|", " ").split():
            path = ROOT / package / room.replace(".", "/")
            if path.is_dir():
                assert f"`{room.replace('.', '/')}/`" in page, f"{package}: {room}"
                files = [p for p in path.glob("*.py") if p.name != "__init__.py"]
                assert len(files) <= 11, f"{path}: {len(files)} files"


def test_the_way_of_a_cell_exists():
    page = section((ROOT / "docs" / "architecture.md").read_text(), "the-way-of-a-cell")
    named = re.findall(r"`(\w+/[a-z_/]+\.py)`,\s+`(\w+)`", page)
    assert len(named) >= 15
    for file, name in named:
        found = {getattr(n, "name", "") for n in syntax(ROOT / file).body}
        assert name in found, f"{file}: {name}"


@pytest.mark.parametrize("folder", NEVER_TORCH)
def test_no_torch(folder):
    for path in modules(folder):
        heavy = {n for n in imports(path) if n.split(".")[0] in ("torch", "deepspeed")}
        assert not heavy, f"{path.relative_to(ROOT)} imports {heavy}"


def test_init_files_are_empty():
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("__init__.py"):
            assert path.read_text() == "", path


# The files that someone reads to understand a run, in this order; docs/architecture.md names them.
READING_PATH = (
    "pretrain/config.py", "pretrain/train.py", "pretrain/engine.py",
    "pretrain/batches/step_dataset.py", "pretrain/objective/masking.py",
    "pretrain/model/masked_gene_model.py", "pretrain/optim.py", "data_prep/shards/order.py",
    "data_prep/shards/reader.py", "data_prep/genes/rank_genes.py",
)  # fmt: skip


def test_the_reading_path_fits_in_an_afternoon():
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in READING_PATH}
    assert sum(lines.values()) < 3_000, lines
    assert lines["pretrain/train.py"] <= 300
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = section(page, "the-reading-path")
    places = [named.index(f"`{name}`") for name in READING_PATH]
    assert places == sorted(places), "docs/architecture.md names them in another order"


def test_no_file_is_long():
    for path in [p for f in FOLDERS for p in modules(f)]:
        assert len(path.read_text().splitlines()) <= 500, path


def test_functions_are_short():
    for path in [p for f in FOLDERS for p in modules(f)]:
        for node in ast.walk(syntax(path)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                # Without signature and docstring: the options of a command are a long list.
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = node.end_lineno - body[0].lineno + 1 if body else 0
                assert lines <= 60, f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"


MOST_PARAMETERS = 8
# Functions with more, and why; numba's kernels take arrays and numbers, for it knows no objects.
MANY_PARAMETERS = {
    "its options are typer's, one by one": (
        "launch.ways.slurm.launch_slurm", "launch.ways.kubernetes.launch_kubernetes",
        "launch.ways.hostfile.launch_hostfile", "launch.ways.mpi.launch_mpi",
        "eval.cli.finetune_genes_command",
    ),
    "fills arrays that the caller holds": ("pretrain.objective.masking.mask_rows",),
    "torch calls it, with tensors": (
        "pretrain.model.masked_gene_model.MaskedGeneModel.forward",
        "pretrain.model.packing._by_cell_backward", "pretrain.model.packing._",
    ),
    "made once a run, of parts or settings that others set otherwise": (
        "pretrain.train._Run.__init__", "pretrain.batches.step_dataset.StepDataset.__init__",
        "launch.attempts.supervise.Attempt.__init__",
    ),
    "what is computed, with what, and how: its callers are many and give three or four of them": (
        "eval.benchmark.run.run_benchmark", "eval.benchmark.material.twin_encoders.train",
        "eval.cells.attention.mean_attention", "eval.finetune.search.search",
        "eval.finetune.training.finetune", "pretrain.cell_states.frozen_states.embed_cells",
        "pretrain.cell_states.frozen_states.embed_layers",
    ),
}  # fmt: skip


def functions_of(body: list[ast.stmt], name: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield the functions below a module or class, with their dotted names."""
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield f"{name}.{node.name}", node
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield from functions_of(node.body, f"{name}.{node.name}")


def test_functions_have_few_parameters():
    """What is more than eight belongs into a dataclass; exceptions have a reason."""
    found = set()
    for path in [p for f in FOLDERS for p in modules(f)]:
        for name, node in functions_of(syntax(path).body, dotted(path)):
            arguments = node.args
            given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            is_kernel = any("njit" in ast.unparse(d) for d in node.decorator_list)
            if len([a for a in given if a.arg != "self"]) > MOST_PARAMETERS:
                found |= set() if is_kernel else {name}
    many = {name for names in MANY_PARAMETERS.values() for name in names}
    assert not found - many, f"more than {MOST_PARAMETERS} parameters: {found - many}"


def test_help_needs_no_heavy_import():
    code = (
        "import sys; sys.argv = ['geneloom', '--help']\n"
        "import launch.cli\n"
        "app = launch.cli.build_app(None)\n"
        "assert not {'torch', 'anndata', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
