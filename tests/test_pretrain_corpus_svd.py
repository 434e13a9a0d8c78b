"""The corpus SVD is that of the whole matrix of rank weights, though the matrix is never held."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse
from scipy.sparse.linalg import svds

from data_prep.genes.vocabulary import CLS, EOS, MASK, PAD, Vocabulary
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import prepare
from data_prep.shards.reader import ShardSet
from data_prep.sources.source_spec import SourceOptions, source_at
from pretrain.counting import corpus_svd as module
from pretrain.counting.corpus_svd import FILE_NAME, CorpusSvd, corpus_svd, leading_vectors
from pretrain.counting.counted_tables import FOLDER_NAME


@pytest.fixture()
def opened(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardSet:
    """The shards of fake cells; what is counted of them is not kept."""
    monkeypatch.setattr(
        module, "counted_tables", lambda shards, name, settings, count, *others: count(None)
    )
    return ShardSet(shards)


def matrix_of(shards: ShardSet, split: str) -> np.ndarray:
    """Return the dense rank weights of a split's cells, float64, written plainly."""
    rows = []
    for block in shards.iter_blocks(split):
        for cell in np.split(block.tokens, block.offsets[1:-1]):
            row = np.zeros(shards.vocabulary.num_tokens)
            for place, token in enumerate(cell):
                row[token] = 1 - place / len(cell)
            rows.append(row)
    return np.stack(rows)


def require_svd_of(svd: CorpusSvd, matrix: np.ndarray, tolerance: float) -> None:
    number = svd.components.shape[1]
    _, values, vectors = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(svd.singular_values, values[:number], rtol=tolerance)
    angles = scipy.linalg.subspace_angles(svd.components.astype(float), vectors[:number].T)
    assert np.sin(angles.max()) < 10 * tolerance
    largest = svd.components[np.abs(svd.components).argmax(axis=0), np.arange(number)]
    assert (largest > 0).all()


def test_streamed_svd_is_that_of_the_whole_matrix(opened: ShardSet, monkeypatch):
    matrix = matrix_of(opened, "train")
    svd = corpus_svd(opened, 20)
    require_svd_of(svd, matrix, 1e-5)
    assert svd.origin["cells"] == len(matrix) and svd.origin["residual"] < 1e-4
    assert not svd.components[: opened.vocabulary.first_gene_token].any()
    monkeypatch.setattr(module, "_MOST_THREADS", 1)
    np.testing.assert_array_equal(corpus_svd(opened, 20).components, svd.components)
    monkeypatch.setattr(module, "_GROUP_CELLS", 16)
    np.testing.assert_allclose(corpus_svd(opened, 20).components, svd.components, atol=1e-4)


def test_embedding_is_the_cells_times_the_loadings(opened: ShardSet):
    svd = corpus_svd(opened, 20)
    matrix = matrix_of(opened, "heldout")
    blocks = list(opened.iter_blocks("heldout"))
    found = np.concatenate([svd.embed(b.tokens, b.offsets) for b in blocks])
    np.testing.assert_allclose(found, matrix @ svd.components, atol=1e-4)
    cells = [t for b in blocks for t in np.split(b.tokens, b.offsets[1:-1])]
    np.testing.assert_array_equal(svd.embed_cells(cells), found)


def test_special_tokens_have_no_place(opened: ShardSet):
    plain = CorpusSvd(np.random.default_rng(0).random((9, 3), np.float32), np.ones(3), "", 4)
    genes = np.array([7, 4, 8], dtype=np.uint16)
    wrapped = np.array([2, *genes, 3], dtype=np.uint16)
    bare, wrapped, empty = plain.embed_cells([genes, wrapped, np.array([2, 3], dtype=np.uint16)])
    np.testing.assert_array_equal(bare, wrapped)
    expected = plain.components[7] + plain.components[4] * 2 / 3 + plain.components[8] / 3
    np.testing.assert_allclose(bare, expected, rtol=1e-6)
    assert np.isnan(empty).all()


@pytest.mark.parametrize("rank", [200, 30])
def test_leading_vectors_of_a_large_matrix_are_scipys(rank: int):
    """Singular values fall slowly, as those of cells; of low rank, some of them are zero."""
    rng = np.random.default_rng(0)
    size, number = module._DENSE + 200, 40
    matrix = rng.standard_normal((400, rank)) * np.arange(1, rank + 1) ** -0.5
    matrix = matrix @ rng.standard_normal((rank, size))
    products = []

    def gram(vectors: np.ndarray) -> np.ndarray:
        products.append(vectors.shape)
        return matrix.T @ (matrix @ vectors)

    values, vectors, _ = leading_vectors(gram, size, number)
    assert len(products) <= 10
    top = min(rank, number)
    _, singular, right = svds(matrix, top, random_state=0)
    np.testing.assert_allclose(np.sqrt(values[:top]), np.sort(singular)[::-1], rtol=1e-3)
    assert values[top:].max(initial=0) < 1e-6 * values[0]
    angles = scipy.linalg.subspace_angles(vectors[:, :top], right.T)
    assert np.sin(angles.max()) < 0.1


def test_more_components_than_cells_or_genes_are_not_there(opened: ShardSet):
    assert corpus_svd(opened, 500).components.shape[1] == len(matrix_of(opened, "train"))
    few = corpus_svd(opened, 5, max_cells=20)
    assert 1 <= few.origin["cells"] <= 32
    with pytest.raises(ValueError, match="0 components"):
        corpus_svd(opened, 0)


def test_saved_svd_is_the_same_and_belongs_to_its_vocabulary(opened: ShardSet, tmp_path: Path):
    svd = corpus_svd(opened, 20)
    svd.save(tmp_path)
    again = CorpusSvd.load(tmp_path, opened.vocabulary)
    np.testing.assert_array_equal(again.components, svd.components)
    np.testing.assert_array_equal(again.singular_values, svd.singular_values)
    assert again.origin == svd.origin and again.first_gene_token == svd.first_gene_token
    other = Vocabulary(("A", "B"), np.ones(2), {PAD: 0, MASK: 1, CLS: 2, EOS: 3}, 64)
    with pytest.raises(ValueError, match=f"{svd.vocabulary_sha256[:12]}.*{other.sha256[:12]}"):
        CorpusSvd.load(tmp_path, other)
    (tmp_path / FILE_NAME).write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be read"):
        CorpusSvd.load(tmp_path, opened.vocabulary)
    (tmp_path / FILE_NAME).unlink()
    with pytest.raises(ValueError, match="has no corpus_svd"):
        CorpusSvd.load(tmp_path, opened.vocabulary)


def test_it_is_counted_once_for_shards(shards: Path, monkeypatch: pytest.MonkeyPatch):
    opened = ShardSet(shards)
    first = corpus_svd(opened, 7)
    monkeypatch.setattr(module, "_count", None)
    np.testing.assert_array_equal(corpus_svd(opened, 7).components, first.components)
    corpus_svd(opened, 7, max_cells=10**9)  # all cells in both cases
    assert list((shards / FOLDER_NAME).glob("corpus-svd-*"))


@pytest.mark.parametrize("dense", [module._DENSE, 0])
def test_against_scikit_learn_on_the_demos_cells(dense: int, tmp_path: Path, monkeypatch):
    """Both ways to solve it: as a whole, as for so few genes, and as for large vocabularies."""
    from sklearn.decomposition import TruncatedSVD

    from eval.cells.demo_cells import recover_counts

    monkeypatch.setattr(module, "_DENSE", dense)
    recover_counts().write_h5ad(tmp_path / "cells.h5ad")
    spec = source_at(tmp_path / "cells.h5ad", SourceOptions())
    prepare([spec], tmp_path / "shards", None, PrepareOptions(heldout_share=0.1))
    opened = ShardSet(tmp_path / "shards")
    svd = corpus_svd(opened)
    reference = TruncatedSVD(50, algorithm="arpack", random_state=0)
    reference.fit(scipy.sparse.csr_matrix(matrix_of(opened, "train")))
    np.testing.assert_allclose(svd.singular_values, reference.singular_values_, rtol=1e-4)
    angles = scipy.linalg.subspace_angles(svd.components.astype(float), reference.components_.T)
    assert np.sin(angles.max()) < 0.02
    new = matrix_of(opened, "heldout")
    cells = [t for b in opened.iter_blocks("heldout") for t in np.split(b.tokens, b.offsets[1:-1])]
    own, theirs = svd.embed_cells(cells), reference.transform(scipy.sparse.csr_matrix(new))
    for column in range(50):
        assert abs(np.corrcoef(own[:, column], theirs[:, column])[0, 1]) > 0.99, column
