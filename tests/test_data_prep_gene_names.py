"""A gene is found by id, previous id, id without version, symbol or previous symbol, each alone."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from data_prep.genes.vocabulary import Vocabulary, load_vocabulary, open_vocabulary
from data_prep.inspection.tables import print_manifest
from data_prep.prepare.medians import gene_medians
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import prepare
from data_prep.running.workers import SERIAL
from data_prep.sources.count_source import CountSource
from data_prep.sources.open_source import open_path
from data_prep.sources.source_spec import SourceOptions, source_at
from tests.data_files import WRITERS
from tests.synthetic import make_cells

GENES = tuple(f"ENSG{i:011d}" for i in range(6))
ALIASES = {"ENSG00000099999": GENES[1], "OLDNAME": GENES[2], "C1ORF5": GENES[3]}
NAMES = {"C1orf5": GENES[3], "TP53": GENES[4], "Abc": GENES[0], "ABC": GENES[5]}
VOCABULARY = Vocabulary(GENES, np.ones(6), {"<pad>": 0, "<mask>": 1}, 64, ALIASES, NAMES)
CUT = "id without version or genome"


@pytest.mark.parametrize(
    ("name", "gene", "how", "upper"),
    [
        (GENES[0], 0, "id", False),
        (GENES[0].lower(), 0, "id", True),
        ("ENSG00000099999", 1, "previous id", False),
        (f"{GENES[2]}.17", 2, CUT, False),
        ("ENSG00000099999.4", 1, CUT, False),
        (f"{GENES[2]}.17_PAR_Y", 2, CUT, False),
        (f"GRCh38_{GENES[2]}", 2, CUT, False),
        (f"GRCh38_{GENES[2]}.3", 2, CUT, False),
        ("GRCh38_TP53", 4, "symbol", False),
        ("C1orf5", 3, "symbol", False),
        ("c1ORF5", 3, "symbol", True),
        ("Tp53", 4, "symbol", True),
        ("OLDNAME", 2, "previous symbol", False),
        ("Oldname", 2, "previous symbol", True),
        ("Abc", 0, "symbol", False),
        ("abc", None, "not found", False),  # two genes
        ("ENSMUSG00000000001", None, "not found", False),
        ("", None, "not found", False),
        ("TP53.2", None, "not found", False),
    ],
)
def test_order_of_names(name, gene, how, upper):
    token = -1 if gene is None else gene + 2
    assert VOCABULARY.lookup.find(name) == (token, how, upper)
    assert VOCABULARY.tokens_of([name]).tolist() == [token]


def test_case_collisions_are_named():
    found = VOCABULARY.lookup.find_all(["tp53", "TP53", "abc", "OLDNAME"])
    assert found.case_collisions == ["TP53", "abc", "tp53"]
    assert found.found_as == {"symbol": 2, "previous symbol": 1, "not found": 1}
    assert found.upper_cased == 1


def test_symbols_beside_foreign_ids_are_used_and_beside_unknown_ensembl_ids_are_not():
    ids = ["my-gene", "ENSG00000012345", "", GENES[0]]
    found = VOCABULARY.lookup.find_all(ids, [["TP53", "TP53", "TP53", "TP53"]])
    assert found.tokens.tolist() == [6, -1, -1, 2]


def test_ids_that_were_made_up_are_no_reason_to_look_at_symbols():
    ids = ["ENSGunknown_TP53", "ENSG00000141510_TP53", "ENSA"]
    found = VOCABULARY.lookup.find_all(ids, [["TP53", "TP53", "TP53"]])
    assert (found.tokens >= 0).tolist() == [False, True, True]


def test_symbols_are_not_in_the_hash_and_travel_with_the_file(tmp_path):
    assert replace(VOCABULARY, names={}).sha256 == VOCABULARY.sha256
    VOCABULARY.save(tmp_path / "vocabulary.json")
    again = load_vocabulary(tmp_path / "vocabulary.json")
    assert (again.names, again.sha256) == (NAMES, VOCABULARY.sha256)
    # Versions before read the same file and find the same hash: it is of the rest.
    content = json.loads((tmp_path / "vocabulary.json").read_text())
    del content["names"]
    assert json.dumps(content, sort_keys=True, separators=(",", ":")) == VOCABULARY.to_json()


def test_a_mapping_adds_to_those_of_the_folder_and_the_last_one_counts(tmp_path, caplog):
    folder = tmp_path / "folder"
    folder.mkdir()
    tokens = {"<pad>": 0, "<mask>": 1} | {g: i + 2 for i, g in enumerate(GENES)}
    for name, content in (
        ("token_dictionary_x", tokens),
        ("gene_median_dictionary_x", dict.fromkeys(GENES, 1.0)),
        ("ensembl_mapping_dict_x", ALIASES),
        ("gene_name_id_dict_x", NAMES | {"UNKNOWN": "ENSG00000077777"}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))
    assert open_vocabulary(folder).names == NAMES
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(json.dumps({"MINE": GENES[0], "OLDNAME": GENES[0]}))
    second.write_text(json.dumps({"MINE": GENES[5]}))
    found = open_vocabulary(folder, gene_mapping=[first, second])
    names = ["MINE", "OLDNAME", "ENSG00000099999", "TP53"]
    assert found.tokens_of(names).tolist() == [7, 2, 3, 6]
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 2 and "1 names were mapped to other genes before" in said[0]
    # A complete vocabulary keeps its identity.
    found.save(tmp_path / "vocabulary.json")
    third = open_vocabulary(tmp_path / "vocabulary.json", gene_mapping=second)
    assert third.sha256 == found.sha256 and third.tokens_of(["MINE"]).tolist() == [7]


def mixed(num_cells: int = 40):
    """Return cells whose genes are named in every way, and a vocabulary that knows these names."""
    cells = make_cells(num_cells)
    ids = list(cells.var_names)
    aliases = {f"OLD{i}": ids[i] for i in range(150, 180)}
    names = {f"SYM{i}": ids[i] for i in range(100, 150)}
    special = {"<pad>": 0, "<mask>": 1}
    vocabulary = Vocabulary(tuple(ids), np.ones(200), special, 256, aliases, names)
    found = cells.copy()
    found.var = found.var[[]]
    found.var_names = [
        *ids[:50],
        *(f"{i}.3" for i in ids[50:100]),
        *(f"Sym{i}" for i in range(100, 150)),
        *(f"OLD{i}" for i in range(150, 180)),
        *(["nan"] * 5),
        *(f"strange{i}" for i in range(185, 200)),
    ]
    return found, vocabulary


@pytest.mark.parametrize("write", WRITERS)
def test_files_that_mix_names_work_in_every_format(write, tmp_path):
    cells, vocabulary = mixed()
    source = open_path(write(cells, tmp_path), SourceOptions())
    assert isinstance(source, CountSource)
    report = source.gene_report(vocabulary)
    expected = {"id": 50, CUT: 50, "symbol": 50, "previous symbol": 30, "not found": 20}
    assert report.found_as == expected
    assert (report.known, report.nameless, report.upper_cased) == (180, 5, 50)
    assert source.column_tokens(vocabulary, 0.5).tolist() == [*range(2, 182), *[-1] * 20]


def test_the_table_found_as_is_printed(tmp_path, capsys):
    cells, vocabulary = mixed(60)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    spec = source_at(tmp_path / "cells.h5ad", SourceOptions())
    manifest = prepare([spec], tmp_path / "out", vocabulary, PrepareOptions(heldout_share=0.2))
    print_manifest(manifest, "out")
    assert (
        "genes found as: 50 as id, 50 as id without version or genome, 50 as symbol, 30 as "
        "previous symbol, 20 as not found; 50 in upper case only"
    ) in capsys.readouterr().out


def test_medians_of_versioned_and_prefixed_ids_are_those_of_plain_ids(tmp_path):
    found = {}
    for name, change in (
        ("plain", str),
        ("versions", lambda i: f"{i}.7"),
        ("genome", lambda i: f"hg19_{i}"),
    ):
        cells = make_cells(40)
        cells.var_names = [change(i) for i in cells.var_names]
        cells.write_h5ad(tmp_path / f"{name}.h5ad")
        spec = source_at(tmp_path / f"{name}.h5ad", SourceOptions())
        medians = gene_medians([spec], tmp_path, SERIAL, lambda *_: None)
        found[name] = (medians.sketch.genes, medians.medians.tolist())
    assert found["plain"] == found["versions"] == found["genome"]


# --- real files -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def v2(real_data) -> Vocabulary:
    return open_vocabulary(real_data / "geneformer_v2_dicts")


def counts_at(path, **options) -> CountSource:
    source = open_path(path, SourceOptions(**options))
    assert isinstance(source, CountSource)
    return source


def test_capitalised_symbols_give_the_genes_of_ensembl_ids(case, v2):
    symbols = counts_at(case("symbol_case") / "capitalised.h5ad")
    plain = counts_at(case("antibodies") / "genes_only.h5ad")
    tokens, columns = symbols.column_tokens(v2, 0.5), plain.column_tokens(v2, 0.5)
    # The file has each capitalised symbol once: the first of its ids.
    names = [str(s).capitalize() for s in plain.store.var("symbol")]
    first = {name: i for i, name in reversed(list(enumerate(names)))}
    columns = columns[[first[name] for name in symbols.gene_ids]]
    both = (tokens >= 0) & (columns >= 0)
    assert both.sum() > 0.98 * (columns >= 0).sum()
    assert (tokens[both] == columns[both]).mean() > 0.999
    (block,) = symbols.blocks()
    shared = np.where(both & (tokens == columns), tokens, -1)
    counts = [block.data[found[block.indices] >= 0].sum() for found in (shared, columns)]
    share = counts[0] / counts[1]
    assert share > 0.99


@pytest.mark.long  # real cells; the cases beside it are synthetic
def test_real_odd_names(case, v2):
    folder = case("odd_names")
    ids = counts_at(folder / "nan_gene.h5ad", gene_column="index")
    assert ids.gene_report(v2).nameless == 5 and (ids.column_tokens(v2, 0.5)[:5] == -1).all()
    for column in (None, "index"):
        found = counts_at(folder / "genome_prefix.h5ad", gene_column=column).gene_report(v2)
        assert found.known > 15_000


@pytest.mark.long  # real cells; the cases beside it are synthetic
def test_real_half_known(case, v2, tmp_path):
    spec = source_at(case("half_known") / "mixed_ids.h5ad", SourceOptions())
    manifest = prepare([spec], tmp_path / "out", v2, PrepareOptions(heldout_share=0.2))
    source = manifest["sources"][0]
    assert 0.5 < source["counts_in_vocabulary"] < 0.9
    assert len(source["costliest_unknown"]) == 10
    assert sum(f["gene"].startswith("clone_") for f in source["costliest_unknown"]) > 5
    assert "below 90%" in manifest["warnings"][0]
