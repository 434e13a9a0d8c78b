"""What a task of the benchmark is: data recipe, label, split, headline score, published value.

A task is one short YAML file in ``tasks/`` (or one of the user's own): nothing else has to be
written to add one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

TASKS_FOLDER = Path(__file__).parent / "tasks"
Suite = Literal["quick", "standard", "paper"]
SUITES: tuple[Suite, ...] = ("quick", "standard", "paper")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Published(_Section):
    """A figure of the paper: context for a reader, never a score of this run."""

    # Score and setting.
    what: str
    # As printed.
    value: float
    # As printed, perhaps a standard deviation.
    spread: float | None = None
    # Figure or table.
    source: str


class Cells(_Section):
    """Where a task's cells come from, and which of them are used."""

    # Paths or globs below the data folder; several files are joined by gene id.
    files: tuple[str, ...] = ()
    # Cells that come with an installed package (`eval.cells.demo_cells`), when there are no files.
    package: Literal["pbmc68k_reduced"] | None = None
    # How to get the full data set: accession, file, columns, what to do.
    recipe: str
    # X, raw, or layers/NAME.
    counts: str = "X"
    # Column of var with gene ids.
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
    # Training cells a class. None: all.
    max_train_per_class: int | None = Field(None, ge=1)
    # Test cells a class. None: all.
    max_test_per_class: int | None = Field(None, ge=1)
    # Repetitions of folds, splits or draws.
    seeds: int = Field(5, ge=1)
    # Of a fine-tuning.
    epochs: int = Field(1, ge=1)
    # Cells of an optimizer step.
    batch_cells: int = Field(12, ge=1)
    # Peak of a fine-tuning, of the encoder.
    learning_rate: float = Field(3e-4, gt=0)
    # Peak of a head. None: as the encoder's.
    head_learning_rate: float | None = Field(1e-3, gt=0)
    # First weights of a head: those of a regression on the frozen states, or random ones.
    start: Literal["probe", "random"] = "probe"
    # Optimizer steps of a fine-tuning at least, in more epochs if need be.
    steps: int = Field(0, ge=0)
    # Lowest layers that are not trained.
    freeze_layers: int = Field(0, ge=0)
    # Training cells a class of the few-shot curve (cell tasks).
    shots: tuple[int, ...] = ()
    # Trials of the nested search for settings; 0: the settings above are used as they are.
    search_trials: int = Field(0, ge=0)
    # Genes that are perturbed in silico. None: all.
    max_perturbed: int | None = Field(None, ge=2)
    # Cells in which a gene is perturbed. None: all.
    max_cells_per_gene: int | None = Field(None, ge=1)


class Edges(_Section):
    """A table of pairs of genes: regulators and targets, or perturbed genes and what follows."""

    # Below the data folder: .tsv, .csv (perhaps .gz) or .parquet.
    file: str
    # Column that holds gene ids of regulators, or of perturbed genes.
    source: str
    # Column that holds gene ids of what follows.
    target: str
    # Column -> values of the rows that are pairs; the others only say which genes were looked at.
    keep: dict[str, tuple[str, ...]] = {}
    # How to get the table.
    recipe: str


class OwnWorld(_Section):
    """Simulated cells, and a model that is pretrained on them: the benchmark makes both.

    The task's files are those of the simulation, below ``simulated/``.
    """

    # Settings of `geneloom simulate`.
    simulate: dict[str, Any]
    # Share of the cells that no training sees.
    heldout: float = Field(0.05, gt=0, lt=1)
    # A supplied configuration of `geneloom pretrain`, and what is set beside it.
    config: str
    pretrain: dict[str, Any] = {}


class _Task(_Section):
    # Name of the file, without .yaml.
    name: str
    # What the page calls it.
    title: str
    # Rows of the paper's list of applications.
    applications: tuple[str, ...] = ()
    # Figures of the paper beside it.
    published: tuple[Published, ...] = ()
    # Where the cells come from.
    cells: Cells
    # What each suite does; a task is part of the suites that are named here.
    sizes: dict[Suite, Size]
    # A sentence for the page.
    note: str = ""
    # The task is a positive control: its model is that of this world, and no user's.
    own_world: OwnWorld | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Paths or globs below the data folder that the task needs."""
        return self.cells.files


# Instead of the name of a class of genes: every labelled gene that is not in the other one.
OTHERS = "all others"


class GeneTask(_Task):
    """Classes of genes, told apart by their states in cells; folds over genes."""

    kind: Literal["genes"]
    # Table with the columns ensembl_id (or gene), label, and perhaps ambiguous: below the data
    # folder, or beside the task's file.
    labels: str
    # Its column of labels.
    label_column: str = "label"
    # Label of the class that is looked for.
    positive: str
    # Label of the other class, or `OTHERS`.
    negative: str
    # Label -> genes of the full data set; other counts are reported.
    expected_genes: dict[str, int] = {}
    # Over genes.
    folds: int = Field(5, ge=2)


class _LabelledCells(_Task):
    """Classes of cells; donors, batches or data sets stay whole."""

    # Column of obs with the classes.
    label: str
    # Column of obs whose groups stay whole; None: stratified by class, and the report says so.
    group: str | None = None
    # Why there is no group, shown beside the result.
    group_missing: str = ""

    @model_validator(mode="after")
    def _reason(self) -> _LabelledCells:
        if self.group is None and not self.group_missing:
            raise ValueError(f"{self.label}: without `group`, `group_missing` has to say why")
        return self


class CellTask(_LabelledCells):
    """A classifier is trained on cells of each class."""

    kind: Literal["cells"]


class AnnotationTask(_LabelledCells):
    """Cells get the class of the nearest reference cells; nothing is trained."""

    kind: Literal["annotation"]


class IntegrationTask(_Task):
    """Embeddings scored by what they keep of the cells' types and lose of their batches."""

    kind: Literal["integration"]
    # Column of obs: types of cells.
    label: str
    # Column of obs: batches.
    batch: str
    # Known effect put on half of the cells of a package without batches
    # (`eval.benchmark.material.planted_batches`).
    planted_batch: bool = False
    # Disjoint parts of a seed's scored cells; what is compared needs three folds over all seeds.
    folds: int = Field(3, ge=1)


class GeneList(_Section):
    """Genes that belong together: a table with the column ensembl_id (or gene), perhaps symbol."""

    # What the page calls them.
    name: str
    # Below the data folder, or beside the task's file.
    file: str
    # Column -> values of the rows that are meant.
    keep: dict[str, tuple[str, ...]] = {}


class MatchedGenesTask(_Task):
    """Listed genes against others of equal rank, expression and detection, ordered by a score."""

    # Genes that should come first.
    positive: GeneList
    # None: every other gene of the cells.
    negative: GeneList | None = None
    # Column of obs: donors are looked at one by one.
    donor: str | None = None

    @property
    def lists(self) -> tuple[GeneList, ...]:
        return (self.positive, self.negative) if self.negative else (self.positive,)

    @property
    def files(self) -> tuple[str, ...]:
        own = (lst.file for lst in self.lists if not (TASKS_FOLDER / lst.file).exists())
        return (*self.cells.files, *own)


class ContextTask(MatchedGenesTask):
    """Which genes' states differ between types of cells?"""

    kind: Literal["context"]
    # Column of obs: types of cells.
    label: str


class AttentionTask(MatchedGenesTask):
    """Which genes are attended to?"""

    kind: Literal["attention"]


class CellStates(_Section):
    """Cells between which a perturbation is to move: values of a column of obs."""

    # Column of obs.
    key: str
    # These cells are perturbed.
    start: str
    # Toward these.
    goal: str


class PerturbationTask(MatchedGenesTask):
    """Which genes, edited one by one in silico, move cells toward a goal, or at all?

    The goal may be worse than the start: genes that drive a disease move healthy cells toward it.
    """

    kind: Literal["perturbation"]
    # What is done to a gene.
    edit: Literal["delete", "overexpress", "inhibit", "activate"]
    # None: by how far the cells move, wherever to.
    states: CellStates | None = None
    # Cells of the start (of any state, if a gene is inserted) that hold it.
    min_cells: int = Field(5, ge=1)


class PerturbSeqTask(_Task):
    """Measured shifts of expression after perturbations, predicted for genes not trained on.

    With `signatures` the shifts come from a table (1 for a gene that a knock-down moves, else 0),
    and `cells` are only looked at; without it they are measured in `cells`.
    """

    kind: Literal["perturb_seq"]
    # Column of obs that names a cell's perturbation ("A", or "A+B" for two genes).
    perturbation: str = ""
    # Its value for cells that were not perturbed.
    control: str = ""
    # Column of obs: shifts are measured in each replicate, then averaged. None: no replicates.
    replicate: str | None = None
    # Names in `perturbation` -> gene ids; a name that is not here is a gene id.
    gene_ids: dict[str, str] = {}
    # Cells that features of the perturbed genes come from; None: the controls among `cells`.
    context: Cells | None = None
    # Table of measured shifts, instead of `perturbation`.
    signatures: Edges | None = None
    # genes: test perturbations have a gene that training never saw. combinations: folds over
    # perturbations of several genes; all single ones are in the training.
    split: Literal["genes", "combinations"] = "genes"
    # Over perturbed genes, or over combinations.
    folds: int = Field(5, ge=2)
    # Perturbations of fewer cells in a replicate are not measured there.
    min_cells: int = Field(10, ge=1)
    # Genes in a smaller share of the cells are not measured.
    min_detection: float = Field(0.05, ge=0, lt=1)

    @model_validator(mode="after")
    def _one_truth(self) -> PerturbSeqTask:
        if (self.signatures is None) == (not self.perturbation):
            raise ValueError("perturb_seq: give perturbation, or signatures, and not both")
        if self.perturbation and not self.control:
            raise ValueError("perturb_seq: `control` has to name the cells without perturbation")
        return self

    @property
    def files(self) -> tuple[str, ...]:
        """Cells, those of the context, and the table of signatures."""
        context = self.context.files if self.context else ()
        table = (self.signatures.file,) if self.signatures else ()
        return (*self.cells.files, *context, *table)


class RegulatorsTask(_Task):
    """Known targets of regulators against genes expressed alike."""

    # Regulators and their targets.
    edges: Edges
    # Regulators with fewer targets, each with a partner, are left out; of more, so many are drawn.
    min_targets: int = Field(10, ge=2)
    # Of a regulator; the others are left out by a draw.
    max_targets: int = Field(40, ge=2)
    # Cells that hold both regulator and gene.
    min_cells: int = Field(5, ge=1)

    @property
    def files(self) -> tuple[str, ...]:
        """Cells and the table of targets."""
        return (*self.cells.files, self.edges.file)


class TargetsTask(RegulatorsTask):
    """Which genes move when a regulator is deleted?"""

    kind: Literal["targets"]
    # Partners of targets: any other gene, or those that the table lists for the same regulator in
    # rows that `keep` turns away, such as indirect targets.
    partners: Literal["any", "listed"] = "any"
    # What a deletion moves: the state of a gene that is shown, or its logit at hidden places.
    reading: Literal["state", "logit"] = "state"


class CooperativityTask(RegulatorsTask):
    """Which genes does the deletion of two regulators move by more than both deletions alone?"""

    kind: Literal["cooperativity"]
    # Pairs of regulators, as the table of edges names them. Empty: drawn from all that share
    # enough targets.
    pairs: tuple[tuple[str, str], ...] = ()


class SimulatedShiftsTask(_Task):
    """How far does each cell move, and toward which types, when a regulator is edited?

    `cells` are a simulation's cells of origin, `shifts` its table of how they truly move.
    """

    kind: Literal["simulated_shifts"]
    # Table of true moves, below the data folder.
    shifts: str
    # What is done to a regulator.
    edits: tuple[Literal["delete", "overexpress"], ...] = ("delete",)
    # Column of obs: types of cells.
    label: str = "cell_type"
    # Cells that correlations come from; None: `cells`.
    context: Cells | None = None
    # Cells that hold a regulator.
    min_cells: int = Field(5, ge=3)

    @property
    def files(self) -> tuple[str, ...]:
        """Cells, those of the context, and the table of shifts."""
        context = self.context.files if self.context else ()
        return (*self.cells.files, *context, self.shifts)


AnyTask = (
    GeneTask | CellTask | AnnotationTask | IntegrationTask | ContextTask | AttentionTask
    | PerturbationTask | PerturbSeqTask | TargetsTask | CooperativityTask | SimulatedShiftsTask
)  # fmt: skip
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
    matched = ContextTask | AttentionTask | PerturbationTask
    if isinstance(task, matched) and path.parent != TASKS_FOLDER:
        lists = {n: _beside(getattr(task, n), path.parent) for n in ("positive", "negative")}
        return task.model_copy(update=lists)
    if isinstance(task, GeneTask) and path.parent != TASKS_FOLDER:
        beside = path.parent.resolve() / task.labels
        if beside.exists():
            return task.model_copy(update={"labels": str(beside)})
    return task


def _beside(genes: GeneList | None, folder: Path) -> GeneList | None:
    """Return a list with its full path, if it lies in this folder."""
    if genes is None or not (folder / genes.file).exists():
        return genes
    return genes.model_copy(update={"file": str(folder.resolve() / genes.file)})


def all_tasks() -> dict[str, AnyTask]:
    """Return name -> task of everything the package declares, by name."""
    tasks = [read_task(p) for p in sorted(TASKS_FOLDER.glob("*.yaml"))]
    return {t.name: t for t in tasks}


def missing_files(task: AnyTask, data: Path | None) -> list[str]:
    """Return the files that a task needs and that are not below the data folder."""
    if task.own_world:
        return []
    wanted = list(task.files)
    # An absolute path stays what it is: labels beside a task's own file.
    if isinstance(task, GeneTask) and not (TASKS_FOLDER / task.labels).exists():
        wanted.append(task.labels)
    return [f for f in wanted if not _is_there(f, data)]


def _is_there(file: str, data: Path | None) -> bool:
    if Path(file).is_absolute():
        return Path(file).exists()
    return data is not None and any(data.glob(file))
