import json
import os
import pickle

import numpy as np
import pytest

from data_prep.genes.vocabulary import (
    Vocabulary,
    from_dictionaries,
    load_vocabulary,
    open_vocabulary,
    read_dictionary,
)

pytestmark = pytest.mark.quick

TOKENS = {"<pad>": 0, "<mask>": 1, "ENSG1": 2, "ENSG2": 3}
MEDIANS = {"ENSG1": 2.0, "ENSG2": 0.5}


def test_round_trip_keeps_the_hash(tmp_path):
    vocabulary = from_dictionaries(TOKENS, MEDIANS, {"OLD1": "ENSG1"})
    vocabulary.save(tmp_path / "vocabulary.json")
    again = load_vocabulary(tmp_path / "vocabulary.json")
    assert again.sha256 == vocabulary.sha256
    assert again.tokens_of(["ENSG2", "OLD1", "none"]).tolist() == [3, 2, -1]
    assert again.max_length == 2048
    assert not again.has_cls


@pytest.mark.parametrize(
    "change",
    [
        {"medians": np.array([2.0, 0.6])},
        {"genes": ("ENSG1", "ENSG3")},
        {"max_length": 1024},
        {"aliases": {"OLD": "ENSG2"}},
        {"special_tokens": {"<pad>": 1, "<mask>": 0}},
    ],
)
def test_everything_that_matters_is_in_the_hash(change):
    vocabulary = from_dictionaries(TOKENS, MEDIANS)
    fields = {f: getattr(vocabulary, f) for f in Vocabulary.__dataclass_fields__}
    assert Vocabulary(**(fields | change)).sha256 != vocabulary.sha256


def test_pickle_and_json_give_the_same(tmp_path):
    numpy_tokens = {k: np.int64(v) for k, v in TOKENS.items()}
    (tmp_path / "token_dictionary.pkl").write_bytes(pickle.dumps(numpy_tokens))
    (tmp_path / "gene_median_dictionary.json").write_text(json.dumps(MEDIANS))
    opened = open_vocabulary(tmp_path)
    assert opened.sha256 == from_dictionaries(TOKENS, MEDIANS).sha256


class _Harmful:
    def __reduce__(self):
        return (os.system, ("touch /tmp/geneloom-was-here",))


def test_a_pickle_that_executes_is_refused(tmp_path):
    path = tmp_path / "token_dictionary.pkl"
    path.write_bytes(pickle.dumps({"a": _Harmful()}))
    with pytest.raises(ValueError, match="refused as a pickle.*system"):
        read_dictionary(path)


@pytest.mark.parametrize(
    ("tokens", "medians", "message"),
    [
        (TOKENS | {"ENSG9": 9}, MEDIANS | {"ENSG9": 1.0}, "contiguous"),
        (TOKENS, {"ENSG1": 2.0}, "absent"),
        (TOKENS, MEDIANS | {"ENSG2": 0.0}, "not positive"),
        ({"ENSG1": 0}, MEDIANS, "required"),
    ],
)
def test_unfit_dictionaries_are_named(tokens, medians, message):
    with pytest.raises(ValueError, match=message):
        from_dictionaries(tokens, medians)


def test_published_dictionaries(real_data):
    v1 = open_vocabulary(real_data / "geneformer_v1_dicts")
    assert (v1.num_tokens, v1.max_length, v1.has_cls) == (25_426, 2_048, False)
    v2 = open_vocabulary(real_data / "geneformer_v2_dicts")
    assert (v2.num_tokens, v2.max_length, v2.has_cls) == (20_275, 4_096, True)
    by_pickle = open_vocabulary(
        real_data / "geneformer_v1_dicts" / "token_dictionary.pkl",
        real_data / "geneformer_v1_dicts" / "gene_median_dictionary.pkl",
        real_data / "geneformer_v1_dicts" / "ensembl_mapping_dict_gc30M.pkl",
    )
    assert by_pickle.sha256 == v1.sha256
