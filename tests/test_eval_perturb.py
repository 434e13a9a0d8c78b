"""Perturbation: every score equals a plain, slow reference; edits hold their properties."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.genes.vocabulary import from_dictionaries
from eval.perturb.screen.edits import ABSENT, KINDS, Edit, GeneSets, copies_of
from pretrain.settings.model_settings import ModelConfig
from tests.perturb_reference import Reference, cosine, edited

NUM_GENES, LONGEST = 40, 24
MODEL = ModelConfig(
    num_layers=3, hidden_size=32, num_heads=2, intermediate_size=64,
    hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


def vocabulary(with_cls: bool):
    names = ["<pad>", "<mask>", *(["<cls>", "<eos>"] if with_cls else [])]
    names += [f"G{i}" for i in range(NUM_GENES)]
    tokens = {n: i for i, n in enumerate(names)}
    return from_dictionaries(tokens, {n: 1.0 for n in names if n[0] == "G"}, {}, LONGEST)


def network(vocab):
    import torch

    from pretrain.model.masked_gene_model import build_model

    torch.manual_seed(0)
    model = build_model(MODEL, vocab, 0).bert.eval()
    with torch.no_grad():  # random weights of a usual size hardly look at their neighbours
        for parameter in model.bert.encoder.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
        model.bert.embeddings.position_embeddings.weight.mul_(10)
    return model


def cells(vocab, count=4, seed=1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    every = np.arange(vocab.first_gene_token, vocab.num_tokens)
    most = vocab.max_length - (2 if vocab.has_cls else 0)
    lengths = [most, *rng.integers(6, most, count - 1)]
    return [rng.permutation(every)[:n].astype(np.int64) for n in lengths]


def sets_of(*members: list[int], required: bool = False) -> GeneSets:
    size = max(map(len, members))
    table = np.array([m + [ABSENT] * (size - len(m)) for m in members])
    return GeneSets(table, (table != ABSENT) & required)


EDITS = [
    Edit("delete"), Edit("overexpress"), Edit("inhibit"), Edit("inhibit", 3), Edit("activate", 2),
    Edit("inhibit", to_quantile=0.8), Edit("activate", to_quantile=0.1),
]  # fmt: skip


@pytest.mark.parametrize(
    "with_cls, pooling, layer, score, edit",
    [
        *((False, "mean", -1, "mean_state", e) for e in EDITS),
        *(
            pytest.param(True, *how, e, marks=[pytest.mark.long] if left_out == n % 2 else [])
            for how, left_out in ((("mean", 0, "mean_state"), 1), (("cls", -1, "mean_state"), 0))
            for n, e in enumerate(EDITS)
        ),
        *((False, "mean", 0, "geneformer", e) for e in EDITS[:3]),
        (True, "mean", -1, "geneformer", EDITS[1]),
        (True, "cls", 0, "geneformer", EDITS[0]),
    ],
    ids=str,
)
def test_scores_equal_the_reference(with_cls, pooling, layer, score, edit):
    from eval.cells.embed import embed_cells
    from eval.perturb.screen.compare_copies import CopyEngine, EngineSettings

    vocab = vocabulary(with_cls)
    model, every = network(vocab), cells(vocab)
    some = embed_cells(
        [np.r_[2, c, 3] if with_cls else c for c in every], model.bert, vocab, pooling, layer
    )
    centroids = {"here": some[0].astype(float), "there": some[1:].mean(axis=0).astype(float)}
    reference = Reference(model, vocab, layer, pooling, centroids, score=score)
    engine = CopyEngine(
        copy.deepcopy(model.bert), vocab,
        EngineSettings(pooling, layer, token_budget=60, score=score), centroids=centroids,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    first = vocab.first_gene_token
    chosen = [[t] for t in range(first, vocab.num_tokens)]
    chosen += [rng.choice(NUM_GENES, k, replace=False).tolist() for k in (2, 2, 2, 3, 5)]
    chosen = [[t] for t in range(first, vocab.num_tokens)] + [
        [int(t) + first for t in c] for c in chosen[NUM_GENES:]
    ]
    most = vocab.max_length - (2 if with_cls else 0)
    compared = 0
    for cell in every:
        found = engine.perturb(cell, sets_of(*chosen), edit, gene_shifts=True)
        by_gene = {
            (int(s), int(t)): v
            for sets, tokens, mask, values in found.genes
            for s, row, keep, shift in zip(sets, tokens, mask, values, strict=True)
            for t, k, v in zip(row, keep, shift, strict=True)
            if k
        }
        expected_sets = [
            i for i, c in enumerate(chosen) if edit.kind == "overexpress" or set(c) & set(cell)
        ]
        assert found.sets.tolist() == expected_sets
        seen = set()
        for row, number in enumerate(found.sets):
            original, changed = edited(
                cell.tolist(), chosen[number], edit.kind, most, edit.rank_shift, edit.to_quantile
            )
            values = {c: found.values[c][row] for c in engine.columns}
            assert found.changed[row] == (original != changed)
            expected = reference.shifts(original, changed, chosen[number])
            for column, value in values.items():
                assert value == pytest.approx(expected[column], abs=1e-5), (column, number)
                if original == changed:
                    assert value == 0.0, "exactly"
            for gene, shift in expected["genes"].items():
                assert by_gene[number, gene] == pytest.approx(shift, abs=1e-5)
                seen.add((number, gene))
            compared += 1
        assert seen == set(by_gene), "of no other gene"
        assert max(found.values["shift"]) > 3e-4, "something has to happen"
    assert compared > 50


def golden(folder):
    """Geneformer's tiny model and cells, and what its own perturber stored of them."""
    import json

    from pretrain.export.model_folder import load_exported

    if not (folder / "geneformer_golden").is_dir():
        pytest.skip(f"scores of Geneformer's own perturber not found below {folder}")
    dictionaries = folder / "geneformer_v1_dicts"
    network, vocab = load_exported(folder / "geneformer_golden" / "model", dictionaries)
    cells = json.loads((folder / "geneformer_golden" / "perturb_v1_tiny.json").read_text())
    return network, vocab, cells


@pytest.mark.parametrize("step", [24, pytest.param(1, marks=pytest.mark.long)])
def test_the_score_named_geneformer_is_what_its_own_perturber_stored(real_data, step):
    """Of every gene, or every 24th; in the layer that it calls -1."""
    from eval.perturb.screen.compare_copies import CopyEngine, EngineSettings
    from pretrain.model.architectures import encoder_of

    network, vocab, golden_cells = golden(real_data)
    engine = CopyEngine(
        copy.deepcopy(encoder_of(network)), vocab, EngineSettings(score="geneformer")
    )
    other = CopyEngine(copy.deepcopy(encoder_of(network)), vocab)
    for cell in golden_cells:
        genes = np.array(cell["input_ids"])
        sets = sets_of(*genes[::step, None].tolist())
        for kind in ("delete", "overexpress"):
            # It leaves out the gene that stands in front already: nothing changes.
            stored = np.array([1 - cell[kind].get(str(t), 1.0) for t in genes[::step]])
            found = engine.perturb(genes, sets, Edit(kind))
            np.testing.assert_allclose(found.values["shift"], stored, rtol=0, atol=1e-6)
            assert found.changed[1:].all() and found.changed[0] == (kind == "delete")
            assert (found.values["shift"][~found.changed] == 0.0).all(), "exactly"
    of_means = other.perturb(genes, sets, Edit(kind)).values["shift"]
    assert abs(of_means - stored).max() > 1e-3, "the cosine of mean states is another score"


def test_unperturbed_values_and_donor_centroids():
    from eval.cells.embed import embed_cells
    from eval.perturb.screen.compare_copies import CopyEngine, centroid

    vocab = vocabulary(False)
    model, every = network(vocab), cells(vocab, 5)
    embeddings = embed_cells(every, model.bert, vocab)
    donors = np.array(["a", "a", "a", "b", "b"])
    state = centroid(embeddings, donors)
    means = [embeddings[:3].mean(axis=0), embeddings[3:].mean(axis=0)]
    np.testing.assert_allclose(state, (means[0] + means[1]) / 2, rtol=1e-6)
    engine = CopyEngine(copy.deepcopy(model.bert), vocab, centroids={"s": state})
    np.testing.assert_allclose(engine.embed(every), embeddings, atol=1e-5)
    sets = sets_of([int(every[2][0])])
    before = engine.perturb(every[2], sets, Edit("delete")).before
    assert before["cosine_s"] == pytest.approx(cosine(embeddings[2].astype(float), state), abs=1e-5)


@pytest.mark.parametrize("edit", [Edit("delete"), Edit("overexpress")], ids=lambda e: e.kind)
def test_class_probabilities_are_the_classifiers(edit):
    from eval.finetune.classifier import Classifier, FinetuneSettings, Head
    from eval.perturb.screen.compare_copies import CopyEngine

    vocab = vocabulary(True)
    model, every = network(vocab), cells(vocab)
    classifier = Classifier(
        copy.deepcopy(model.bert), vocab, (Head("kind", "cells", ("a", "b", "c")),),
        FinetuneSettings(),
    ).eval()  # fmt: skip

    def probabilities(genes: list[int]) -> np.ndarray:
        return classifier.predict_cells([np.array([2, *genes, 3])], "kind")[0]

    expected = Reference(model, vocab, -1, "mean", {}, probabilities)
    engine = CopyEngine(classifier.encoder, vocab, classifier=classifier)
    assert engine.columns == ["shift", "class_a", "class_b", "class_c"]
    for cell in every:
        chosen = [[int(t)] for t in cell[:5]] + [[vocab.num_tokens - 1]]
        found = engine.perturb(cell, sets_of(*chosen), edit)
        assert found.before["probability_b"] == pytest.approx(
            probabilities(cell.tolist())[1], abs=1e-5
        )
        for row, number in enumerate(found.sets):
            original, changed = edited(cell.tolist(), chosen[number], edit.kind, LONGEST - 2)
            wanted = expected.shifts(original, changed, chosen[number])
            values = [found.values[f"class_{c}"][row] for c in "abc"]
            np.testing.assert_allclose(values, wanted["classes"], atol=1e-5)
            assert found.values["shift"][row] == pytest.approx(wanted["shift"], abs=1e-5)


def test_bfloat16_keeps_the_order():
    from eval.perturb.screen.compare_copies import CopyEngine, EngineSettings

    vocab = vocabulary(False)
    model, every = network(vocab), cells(vocab)
    every_gene = sets_of(*[[t] for t in range(vocab.first_gene_token, vocab.num_tokens)])
    exact = CopyEngine(copy.deepcopy(model.bert), vocab)
    short = CopyEngine(copy.deepcopy(model.bert), vocab, EngineSettings(bf16=True))
    for cell in every:
        a, b = (e.perturb(cell, every_gene, Edit("delete")).values["shift"] for e in (exact, short))
        assert np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1] > 0.95


def test_gene_sums_are_sums_over_cells():
    from eval.perturb.screen.compare_copies import CopyEngine
    from eval.perturb.screen.run import GeneSums

    vocab = vocabulary(False)
    model, every = network(vocab), cells(vocab)
    engine = CopyEngine(copy.deepcopy(model.bert), vocab)
    chosen = sets_of(*[[t] for t in range(vocab.first_gene_token, vocab.num_tokens)])
    donors = ["x", "y", "x", "y"]
    sums, expected = GeneSums(donors, len(chosen), vocab), {}
    for donor, cell in zip(donors, every, strict=True):
        shifts = engine.perturb(cell, chosen, Edit("inhibit"), gene_shifts=True)
        sums.add(donor, shifts)
        for sets, tokens, mask, values in shifts.genes:
            for s, t, v in zip(
                np.repeat(sets, mask.sum(axis=1)), tokens[mask], values[mask], strict=True
            ):
                key = (donor, int(s), f"G{t - 2}")
                old = expected.get(key, (0, 0.0, 0.0))
                expected[key] = (old[0] + 1, old[1] + float(v), old[2] + float(v) ** 2)
    rows = sums.table().to_pylist()
    assert len(rows) == len(expected)
    for row in rows:
        wanted = expected[row["donor"], row["perturbation"], row["gene"]]
        found = (row["cells"], row["sum"], row["sum_of_squares"])
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("with_cls", [False, True])
def test_estimates_are_derivatives_and_exact_moves(with_cls):
    """The derivative by a gate on a gene's attention, and what moving all behind it up does."""
    import torch

    from eval.cells.embed import embed_cells
    from eval.perturb.screen.compare_copies import CopyEngine
    from eval.perturb.screen.estimate import estimate

    vocab = vocabulary(with_cls)
    model, every = network(vocab), cells(vocab)
    tokens = [np.r_[2, c, 3] if with_cls else c for c in every]
    states = embed_cells(tokens, model.bert, vocab)
    centroids = {"a": states[0].astype(float), "b": states[2].astype(float)}
    engine = CopyEngine(copy.deepcopy(model.bert), vocab, centroids=centroids)
    bert, cell, step = copy.deepcopy(model.bert).double(), tokens[1], 1e-4
    found = estimate(engine, every[1], num_breaks=len(cell))[0]
    inner = slice(1, -1) if with_cls else slice(None)

    def toward(place: int, gate: float, moved: bool) -> float:
        bias = torch.zeros(len(cell), dtype=torch.float64)
        bias[place] = np.log(gate)
        ranks = torch.arange(len(cell))
        ranks[place + 1 :] -= int(moved)
        out = bert(
            input_ids=torch.from_numpy(cell)[None], position_ids=ranks[None],
            output_hidden_states=True,
            attention_mask=bias[None, None, None].expand(1, 1, len(cell), len(cell)),
        )  # fmt: skip
        pooled = out.hidden_states[-2][0, inner].mean(dim=0).detach().numpy()
        return cosine(pooled, centroids["b"])

    for gene in range(len(every[1])):
        place = gene + int(with_cls)
        up, down = toward(place, 1 + step, False), toward(place, 1 - step, False)
        expected = toward(place, 1, True) - toward(place, 1, False) - (up - down) / (2 * step)
        assert found[gene] == pytest.approx(expected, abs=1e-5, rel=1e-3)
    fewer = estimate(engine, every[1], num_breaks=4)[0]
    breaks = np.linspace(1, len(cell), 4).round().astype(int)
    at = [b - 1 - int(with_cls) for b in breaks if 0 <= b - 1 - int(with_cls) < len(found)]
    assert len(at) >= 2
    np.testing.assert_allclose(fewer[at], found[at], atol=1e-6, err_msg="exact at breaks")
    assert abs(fewer - found).max() > 1e-5, "and only there"


@st.composite
def cases(draw):
    genes = draw(st.permutations(range(5, 5 + draw(st.integers(2, 16)))))
    members = draw(st.lists(st.integers(5, 24), min_size=1, max_size=4, unique=True))
    kind = draw(st.sampled_from(KINDS))
    quantile = draw(st.none() | st.floats(0, 1)) if kind in ("inhibit", "activate") else None
    edit = Edit(kind, draw(st.integers(1, 3)), quantile)
    return np.array(genes), members, edit, draw(st.integers(len(genes), 18))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_edits(case):
    genes, members, edit, longest = case
    made = list(copies_of(genes, sets_of(members), edit, longest, 30, 10))
    original, expected = edited(
        genes.tolist(), members, edit.kind, longest, edit.rank_shift, edit.to_quantile
    )
    held = [m for m in members if m in genes]
    others = [g for g in original if g in expected and g not in members]
    if not others or (not held and edit.kind != "overexpress"):
        assert not made, "nothing to do, or to compare by"
        return
    (copies,) = made
    tokens, origin = copies.genes[0].tolist(), copies.origin[0]
    assert tokens == expected
    assert len(set(tokens)) == len(tokens) <= longest
    assert copies.num_kept == len(original)
    kept = origin != ABSENT
    assert genes[origin[kept]].tolist() == [t for t, k in zip(tokens, kept, strict=True) if k]
    assert [tokens[i] for i in np.flatnonzero(copies.compared[0])] == others, "in their order"
    assert bool(copies.changed[0]) == (tokens != original)
    if edit.kind == "inhibit" and len(held) == 1:
        assert tokens.index(held[0]) >= genes.tolist().index(held[0])
    if edit.kind == "activate" and len(held) == 1:
        assert tokens.index(held[0]) <= genes.tolist().index(held[0])


def test_batches_hold_no_more_than_the_budget():
    genes = np.arange(5, 25)
    every = sets_of(*[[int(g)] for g in genes])
    found = list(copies_of(genes, every, Edit("delete"), 30, 30, token_budget=100))
    assert [len(c.sets) for c in found] == [5, 5, 5, 5]
    assert sorted(np.concatenate([c.sets for c in found])) == list(range(20))


@pytest.mark.parametrize("arguments, message", [
    (("shrink",), "--kind shrink: must be one of delete"),
    (("inhibit", 4), "--rank-shift 4"),
    (("inhibit", 1, 1.5), "--to-quantile 1.5"),
    (("delete", 1, 0.5), "of inhibit and activate, not of delete"),
])  # fmt: skip
def test_wrong_edits(arguments, message):
    with pytest.raises(ValueError, match=message):
        Edit(*arguments)


def test_wrong_engines():
    from eval.finetune.classifier import Classifier, FinetuneSettings, Head
    from eval.perturb.screen.compare_copies import CopyEngine, EngineSettings

    vocab = vocabulary(False)
    model = network(vocab)
    with pytest.raises(ValueError, match="--score cosine: must be one of mean_state, geneformer"):
        EngineSettings(score="cosine")  # pyright: ignore[reportArgumentType]
    for settings_, message in (
        (EngineSettings("sum"), "--pooling sum"),
        (EngineSettings("cls"), "no <cls> token"),
        (EngineSettings(layer=-3), "layers 0 .last. to -2"),
    ):
        with pytest.raises(ValueError, match=message):
            CopyEngine(copy.deepcopy(model.bert), vocab, settings_)
    genes_only = Classifier(
        copy.deepcopy(model.bert), vocab, (Head("g", "genes", ("a", "b")),), FinetuneSettings()
    )
    with pytest.raises(ValueError, match="one head of cells"):
        CopyEngine(genes_only.encoder, vocab, classifier=genes_only)
