"""The share of counts that a vocabulary knows is stated, warned of and refused, per data set."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_prep.encoding.known_share import KnownCounter, KnownCounts
from data_prep.genes.vocabulary import Vocabulary
from data_prep.prepare.check import check_sources
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import prepare
from data_prep.running.workers import SERIAL
from data_prep.sources.source_spec import SourceOptions, source_at
from tests.synthetic import make_cells
from tests.test_data_prep_check import check

SPECIAL = {"<pad>": 0, "<mask>": 1}


def some_known(cells, share: float) -> Vocabulary:
    """Return a vocabulary of the first genes, up to that share of the counts."""
    sums = np.asarray(cells.X.sum(0)).ravel()
    number = int((np.cumsum(sums) / sums.sum() < share).sum())
    return Vocabulary(tuple(cells.var_names[:number]), np.ones(number), SPECIAL, 256)


def two_data_sets():
    """Return cells, of which those of data set 'b' have four times the counts in the last genes."""
    cells = make_cells(80)
    cells.obs["study"] = ["a", "b"] * 40
    values = cells.X.toarray()
    values[1::2, 150:] *= 4
    cells.X = values
    return cells


def test_shares_and_costliest_genes(tmp_path):
    cells = two_data_sets()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    vocabulary = some_known(make_cells(80), 0.75)
    known = np.isin(cells.var_names, vocabulary.genes)
    spec = source_at(tmp_path / "cells.h5ad", SourceOptions(dataset_column="study"))
    options = PrepareOptions(heldout_share=0.2, min_overlap=0.3)
    manifest = prepare([spec], tmp_path / "out", vocabulary, options)
    values = cells.X
    for place, name in enumerate("ab"):
        rows = values[place::2]
        (entry,) = [d for d in manifest["datasets"] if d["name"] == name]
        assert entry["counts_in_vocabulary"] == rows[:, known].sum() / rows.sum()
    sums = np.where(known, 0, values.sum(0))
    first = np.argsort(-sums, kind="stable")[:10]
    found = manifest["sources"][0]["costliest_unknown"]
    assert {f["gene"] for f in found} == set(cells.var_names[first])
    assert [f["share"] for f in found] == pytest.approx((sums[first] / values.sum()).tolist())
    assert len(manifest["warnings"]) == 2 and "data set 'b'" in manifest["warnings"][1]
    assert found[0]["gene"] in manifest["warnings"][0]


@pytest.mark.parametrize("processes", [1])
def test_below_the_smallest_share_is_refused_with_the_genes(processes, tmp_path):
    cells = two_data_sets()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    vocabulary = some_known(make_cells(80), 0.75)
    spec = source_at(tmp_path / "cells.h5ad", SourceOptions(dataset_column="study"))
    with pytest.raises(ValueError, match=r"data set 'b'.*--min-overlap 0.5.*ENSG\d+ \d.*Lower it"):
        prepare([spec], tmp_path / "out", vocabulary, PrepareOptions(heldout_share=0.2))
    found = check_sources(
        [spec], tmp_path, vocabulary, PrepareOptions(), SERIAL, lambda *_: None
    )  # fmt: skip
    assert len(found.problems) == 1 and "of data set 'b'" in found.problems[0]


def test_check_does_not_say_that_all_is_well(tmp_path):
    cells = make_cells(60)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    for share, expected in ((0.7, "warning: cells: "), (1.1, "no problem found")):
        some_known(cells, share).save(tmp_path / "vocabulary.json")
        done = check(tmp_path / "cells.h5ad", "--vocab", tmp_path / "vocabulary.json")
        assert done.exit_code == 0, done.output
        assert expected in done.output
        assert ("no problem found" in done.output) == (share > 1)


def test_sums_do_not_depend_on_how_a_source_is_cut():
    cells = make_cells(90)
    tokens = np.where(np.arange(200) % 3 == 0, -1, 5).astype(np.int32)
    names = list(cells.var_names)
    whole, parts = KnownCounter(tokens), KnownCounts()
    for start in range(0, 90, 30):
        block = cells.X[start : start + 30]
        one = KnownCounter(tokens)
        for counter in (whole, one):
            counter.add(block.data, block.indices, block.indptr.astype(np.int64), ["x"] * 30)
        parts = parts.merge(one.result(names))
    assert parts == whole.result(names)
    dense = cells.X.toarray()
    assert parts.share == dense[:, tokens >= 0].sum() / dense.sum()
    assert json.loads(json.dumps(parts.unknown)) == parts.unknown


def test_embedding_looks_at_the_share_too(tmp_path, caplog):
    from eval.cells.read_cells import encode_file

    cells = make_cells(60)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match="--min-overlap 0.5; the costliest"):
        encode_file(tmp_path / "cells.h5ad", some_known(cells, 0.3))
    assert not caplog.records
    encode_file(tmp_path / "cells.h5ad", some_known(cells, 0.7))
    assert "of the counts of data set 'cells'" in caplog.text
