"""What a task of the benchmark is: data recipe, label, split, headline score, published value.

A task is one short YAML file in ``tasks/`` (or one of the user's own): nothing else has to be
written to add one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

TASKS_FOLDER = Path(__file__).parent / "tasks"
Suite = Literal["quick", "standard", "paper"]
SUITES: tuple[Suite, ...] = ("quick", "standard", "paper")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Published(_Section):
    """A figure of the paper: context for a reader, never a score of this run."""

    what: str
    value: float
    spread: float | None = None
    source: str


class Cells(_Section):
    """Where a task's cells come from, and which of them are used."""

    # Paths or globs below the data folder; several files are joined by gene id.
    files: tuple[str, ...] = ()
    # Cells that come with an installed package (`eval.demo_cells`), when there are no files.
    package: Literal["pbmc68k_reduced"] | None = None
    # How to get the full data set: accession, file, columns, what to do.
    recipe: str
    counts: str = "X"
    gene_column: str | None = None
    # Column of obs -> values that stay; all of them have to fit.
    keep: dict[str, tuple[str, ...]] = {}
    # Cells that pass `keep`; another count is reported, for it is another data set.
    expected_cells: int | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Cells:
        if bool(self.files) == (self.package is not None):
            raise ValueError("cells: give files, or a package, and not both")
        return self


class Size(_Section):
    """How much of a task one suite does."""

    # Cells drawn from the data (gene tasks: contexts; others: before the split). None: all.
    max_cells: int | None = Field(None, ge=10)
    max_train_per_class: int | None = Field(None, ge=1)
    max_test_per_class: int | None = Field(None, ge=1)
    seeds: int = Field(5, ge=1)
    epochs: int = Field(1, ge=1)
    batch_cells: int = Field(12, ge=1)
    learning_rate: float = Field(5e-5, gt=0)
    freeze_layers: int = Field(0, ge=0)
    # Training cells a class of the few-shot curve (cell tasks).
    shots: tuple[int, ...] = ()
    # Trials of the nested search for settings; 0: the settings above are used as they are.
    search_trials: int = Field(0, ge=0)


class _Task(_Section):
    name: str
    title: str
    # Rows of the paper's list of applications.
    applications: tuple[str, ...] = ()
    published: tuple[Published, ...] = ()
    cells: Cells
    # What each suite does; a task is part of the suites that are named here.
    sizes: dict[Suite, Size]
    note: str = ""


class GeneTask(_Task):
    """Classes of genes, told apart by their states in cells; folds over genes."""

    kind: Literal["genes"]
    # Table with the columns ensembl_id (or gene), label, and perhaps ambiguous: below the data
    # folder, or beside the task's file.
    labels: str
    positive: str
    negative: str
    expected_genes: dict[str, int] = {}
    folds: int = Field(5, ge=2)


class CellTask(_Task):
    """Classes of cells; donors, batches or data sets stay whole."""

    kind: Literal["cells"]
    label: str
    # Column of obs whose groups stay whole; None: stratified by class, and the report says so.
    group: str | None = None
    # Why there is no group, shown beside the result.
    group_missing: str = ""

    @model_validator(mode="after")
    def _reason(self) -> CellTask:
        if self.group is None and not self.group_missing:
            raise ValueError("cells: without `group`, `group_missing` has to say why")
        return self


class IntegrationTask(_Task):
    """Embeddings scored by what they keep of the cells' types and lose of their batches."""

    kind: Literal["integration"]
    label: str
    batch: str
    # Known effect put on half of the cells of a package without batches (`eval.benchmark.planted`).
    planted_batch: bool = False


AnyTask = GeneTask | CellTask | IntegrationTask
_ADAPTER: TypeAdapter = TypeAdapter(Annotated[AnyTask, Field(discriminator="kind")])


def read_task(path: Path) -> AnyTask:
    """Return the task of one YAML file; its name is the file's.

    Raises
    ------
    ValueError
        Not readable, or not a task: every field that is wrong, with the file.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read as a task ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a task is a YAML mapping with title, kind, cells, sizes, ...")
    try:
        task: AnyTask = _ADAPTER.validate_python({"name": path.stem} | content)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ValueError(f"{path}: is no task: " + "; ".join(wrong)) from error
    if isinstance(task, GeneTask) and path.parent != TASKS_FOLDER:
        beside = path.parent.resolve() / task.labels
        if beside.exists():
            return task.model_copy(update={"labels": str(beside)})
    return task


def all_tasks() -> dict[str, AnyTask]:
    """Return name -> task of everything the package declares, by name."""
    tasks = [read_task(p) for p in sorted(TASKS_FOLDER.glob("*.yaml"))]
    return {t.name: t for t in tasks}


def missing_files(task: AnyTask, data: Path | None) -> list[str]:
    """Return the files that a task needs and that are not below the data folder."""
    wanted = list(task.cells.files)
    # An absolute path stays what it is: labels beside a task's own file.
    if isinstance(task, GeneTask) and not (TASKS_FOLDER / task.labels).exists():
        wanted.append(task.labels)
    return [f for f in wanted if data is None or not any(data.glob(f))]
