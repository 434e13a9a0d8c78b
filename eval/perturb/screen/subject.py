"""The model and the cells that a screen is about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_prep.genes.vocabulary import Vocabulary
from data_prep.sources.source_spec import SourceOptions
from eval.finetune.classifier import load_classifier, read_record
from eval.options import choose_device
from eval.perturb.screen.cells_and_genes import GeneNames, ScreenCells, gene_names, read_cells
from eval.perturb.screen.compare_copies import CopyEngine
from eval.perturb.screen.settings import ModelChoice, Screen
from pretrain.export.model_folder import load_exported, model_digest
from pretrain.model.architectures import encoder_of


@dataclass(frozen=True)
class Subject:
    """A model, and cells in its tokens."""

    engine: CopyEngine
    vocabulary: Vocabulary
    digest: str
    cells: ScreenCells
    names: GeneNames


def load_subject(
    path: Path, choice: ModelChoice, reading: SourceOptions, screen: Screen
) -> Subject:
    """Return model (a head's own encoder, where there is one) and cells.

    Raises
    ------
    ValueError
        A model or head that is none, or wrong cells (`read_cells`).
    """
    if choice.head is not None:
        classifier = load_classifier(choice.head, choose_device(screen.engine.device))
        vocabulary, encoder = classifier.vocabulary, classifier.encoder
        digest = str(read_record(choice.head)["weights_sha256"])
    else:
        assert choice.model is not None
        network, vocabulary = load_exported(choice.model, choice.vocabulary)
        classifier, encoder = None, encoder_of(network)
        digest = model_digest(choice.model, vocabulary)
    cells = read_cells(path, vocabulary, reading, screen.cells)
    engine = CopyEngine(encoder, vocabulary, screen.engine, classifier)
    return Subject(engine, vocabulary, digest, cells, gene_names(path, vocabulary, reading))
