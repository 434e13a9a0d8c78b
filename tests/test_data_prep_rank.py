"""The encoding against a hand-made example and a plain float64 reference."""

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.genes.rank_genes import encode_cells
from data_prep.genes.vocabulary import Vocabulary, from_dictionaries, open_vocabulary

pytestmark = pytest.mark.quick


def reference(counts: np.ndarray, tokens: np.ndarray, vocabulary) -> list[np.ndarray]:
    """Dense, per cell, stable sort: what the encoding is defined by."""
    out = []
    for cell in counts:
        dense = np.zeros(vocabulary.num_tokens)
        np.add.at(dense, tokens[tokens >= 0], cell[tokens >= 0])
        genes = np.flatnonzero(dense)
        value = dense[genes] * (1 / cell.sum()) * 10_000 * (1 / vocabulary.median_of_token[genes])
        slots = vocabulary.max_length - (2 if vocabulary.has_cls else 0)
        ranked = genes[np.argsort(-value, kind="stable")][:slots]
        out.append(np.r_[2, ranked, 3] if vocabulary.has_cls else ranked)
    return out


def encode(matrix, tokens, vocabulary) -> list[np.ndarray]:
    csr = scipy.sparse.csr_matrix(matrix)
    totals = np.asarray(csr.sum(axis=1), dtype=np.float64).ravel()
    encoded = encode_cells(csr.data, csr.indices, csr.indptr, totals, tokens, vocabulary)
    return np.split(encoded.tokens, encoded.offsets[1:-1])


def make_vocabulary(num_genes: int, has_cls: bool = False, max_length: int = 64):
    special = {"<pad>": 0, "<mask>": 1} | ({"<cls>": 2, "<eos>": 3} if has_cls else {})
    genes = {f"g{i:03d}": i + len(special) for i in range(num_genes)}
    rng = np.random.default_rng(5)
    # A few medians only, so that exact ties happen.
    medians = {g: float(rng.choice([0.5, 1.0, 2.0, 3.0])) for g in genes}
    return from_dictionaries(special | genes, medians, max_length=max_length)


def test_five_genes_by_hand():
    tokens = {"<pad>": 0, "<mask>": 1, "a": 2, "b": 3, "c": 4, "d": 5, "e": 6}
    medians = {"a": 1.0, "b": 2.0, "c": 1.0, "d": 4.0, "e": 1.0}
    vocabulary = from_dictionaries(tokens, medians)
    # total 20; value = count / 20 * 10,000 / median: a 1,000, b 1,000, c 3,000, d 500, e absent.
    # Columns come in another order, one gene is unknown, and a and b tie: the smaller token first.
    names = ["d", "b", "a", "c", "e", "unknown"]
    counts = [[4, 4, 2, 6, 0, 4]]
    (cell,) = encode(np.array(counts), vocabulary.tokens_of(names), vocabulary)
    assert cell.tolist() == [4, 2, 3, 5]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 12),
    st.integers(1, 80),
    st.integers(0, 10_000),
    st.booleans(),
    st.sampled_from(["int32", "int64", "float32", "float64", "uint16"]),
)
def test_equals_the_reference_on_random_matrices(cells, genes, seed, has_cls, dtype):
    rng = np.random.default_rng(seed)
    vocabulary = make_vocabulary(60, has_cls, max_length=24)
    counts = (rng.poisson(1.5, (cells, genes)) * rng.integers(1, 400, (cells, genes))).astype(dtype)
    counts[0] = 0
    tokens = rng.integers(-1, 60, genes) + vocabulary.first_gene_token
    tokens = np.where(tokens < vocabulary.first_gene_token, -1, tokens).astype(np.int32)
    got = encode(counts, tokens, vocabulary)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = reference(counts.astype(np.float64), tokens, vocabulary)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_huge_dynamic_range_is_sorted_exactly():
    vocabulary = make_vocabulary(300, max_length=400)
    rng = np.random.default_rng(0)
    counts = np.rint(10 ** rng.uniform(0, 12, (3, 300)))
    tokens = np.arange(2, 302, dtype=np.int32)
    for a, b in zip(
        encode(counts, tokens, vocabulary), reference(counts, tokens, vocabulary), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_gene_that_stands_twice_in_a_row_is_summed():
    """Rows of a CSR matrix need not be sorted, nor without repetition."""
    vocabulary = make_vocabulary(20)
    data, indices = np.array([1.0, 5.0, 2.0, 4.0, 3.0]), np.array([7, 3, 7, 1, 3])
    dense = np.zeros((1, 20))
    np.add.at(dense[0], indices, data)
    tokens = np.arange(2, 22, dtype=np.int32)
    indptr, totals = np.array([0, 5]), np.array([15.0])
    encoded = encode_cells(data, indices, indptr, totals, tokens, vocabulary)
    np.testing.assert_array_equal(encoded.tokens, reference(dense, tokens, vocabulary)[0])
    assert encoded.detected.tolist() == [3]


@pytest.mark.parametrize("medians", ["equal", "nearly equal", "different"])
@pytest.mark.parametrize("num_genes", [3000, 70_000])
def test_many_ties_and_many_tokens(medians, num_genes):
    """Values that share a bin of the sort, or all their bits but the last, and wide token ids."""
    rng = np.random.default_rng(0)
    values = {
        "equal": np.full(num_genes, 2.0),
        "nearly equal": 2.0 * (1 + np.arange(num_genes)[::-1] * 2.0**-50),
        "different": rng.uniform(0.5, 5, num_genes),
    }[medians]
    names = tuple(f"g{i:05d}" for i in range(num_genes))
    vocabulary = Vocabulary(names, values, {"<pad>": 0, "<mask>": 1}, 2048)
    counts = rng.poisson(0.5, (4, num_genes)).astype(np.float32)
    columns = rng.permutation(num_genes).astype(np.int32) + 2
    got = encode(counts, columns, vocabulary)
    for a, b in zip(got, reference(counts.astype(float), columns, vocabulary), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("file", "dictionaries"),
    [
        ("pbmc3k/pbmc3k.h5ad", "geneformer_v1_dicts"),
        ("sc_mixology/sc_mixology.h5ad", "geneformer_v1_dicts"),
        ("ipsc_cm_day2_day5/ipsc_cm_day2_day5.h5ad", "geneformer_v2_dicts"),
    ],
)
def test_equals_the_reference_on_real_cells(file, dictionaries, real_data):
    import anndata

    vocabulary = open_vocabulary(real_data / dictionaries)
    data = anndata.read_h5ad(real_data / file)[:150]
    tokens = vocabulary.tokens_of([str(i) for i in data.var["ensembl_id"]])
    dense = np.asarray(data.X.todense(), dtype=np.float64)
    expected = reference(dense, tokens, vocabulary)
    for a, b in zip(encode(data.X, tokens, vocabulary), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_real_corpus_tokens_are_the_published_ones(real_data):
    """Genecorpus-30M's own tokens have the properties that the encoding gives."""
    import pyarrow.parquet as pq

    table = pq.read_table(real_data / "genecorpus30m_500" / "genecorpus_500_samples.parquet")
    vocabulary = open_vocabulary(real_data / "geneformer_v1_dicts")
    for cell in table.column("input_ids").to_pylist()[:50]:
        assert len(set(cell)) == len(cell) <= vocabulary.max_length
        assert min(cell) >= vocabulary.first_gene_token
        assert max(cell) < vocabulary.num_tokens
