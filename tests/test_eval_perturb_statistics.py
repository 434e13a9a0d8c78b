"""Statistics of screens whose truth is known: what is found, and above all what is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

from eval.perturb.effects.columns import COMBINATION_COLUMNS, GENE_COLUMNS
from eval.perturb.screen.results import Results
from tests.perturb_results import names, noise, write_screen

if TYPE_CHECKING:
    from eval.perturb.effects.analysis import AnalysisSettings


def by_gene(table: pd.DataFrame) -> pd.DataFrame:
    return table.set_index(table["genes"].map("+".join)).sort_index()


def settings(**changes) -> AnalysisSettings:
    from eval.perturb.effects.analysis import AnalysisSettings

    return AnalysisSettings(**changes)


# --- arithmetic, against scipy and by hand


def test_over_donors_is_scipys_t_test_and_interval():
    from scipy import stats

    from eval.perturb.effects.statistics import hedges_correction, over_donors

    values = np.random.default_rng(0).normal(0.5, 1, (4, 6))
    values[1, :2] = np.nan
    table = over_donors(values)
    for row, out in zip(values, table.itertuples(), strict=True):
        known = row[np.isfinite(row)]
        test = stats.ttest_1samp(known, 0)
        interval = test.confidence_interval(0.95)
        assert out.p == pytest.approx(test.pvalue)
        assert (out.low, out.high) == pytest.approx((interval.low, interval.high))
        assert out.donors == len(known)
        biased = known.mean() / known.std(ddof=1)
        assert out.size == pytest.approx(biased * hedges_correction(np.array(len(known) - 1)))


def test_the_interval_of_a_size_covers_it():
    from eval.perturb.effects.statistics import hedges_correction, over_donors

    rng = np.random.default_rng(1)
    table = over_donors(rng.normal(0.8, 1, (4000, 6)))
    corrected = hedges_correction(np.array(5.0))
    inside = (table["size_low"] < 0.8 * corrected) & (0.8 * corrected < table["size_high"])
    assert inside.mean() == pytest.approx(0.95, abs=0.015)
    assert table["size"].mean() == pytest.approx(0.8, abs=0.03), "Hedges: without bias"


def test_wilcoxon_is_exact_where_donors_are_few():
    from scipy import stats

    from eval.perturb.effects.statistics import over_donors

    table = over_donors(np.array([[1.0, 2, 3, 4, 5], [1, 2, 3, np.nan, -4]]), "wilcoxon")
    assert table["p"][0] == 2 / 2**5
    assert table["p"][1] == stats.wilcoxon([1, 2, 3, -4]).pvalue


def test_rows_that_cannot_be_tested():
    from eval.perturb.effects.statistics import over_donors

    rows = np.array([[np.nan, np.nan, np.nan], [1, np.nan, np.nan], [0, 0, 0], [1, 2, np.nan]])
    table = over_donors(rows)
    assert table["donors"].tolist() == [0, 1, 3, 2]
    assert np.isnan(table["p"][:2]).all() and np.isnan(table["mean"][0])
    assert (table["mean"][2], table["size"][2], table["p"][2]) == (0, 0, 1), "nothing changed"
    assert np.isfinite(table["p"][3]) and np.isnan(table["size"][3]), "no size of two donors"


def test_false_discovery_rate_by_hand_and_untested_genes_do_not_count():
    from eval.perturb.effects.statistics import false_discovery_rate

    p = np.array([0.01, np.nan, 0.04, 0.03, np.nan])
    assert false_discovery_rate(p) == pytest.approx([0.03, np.nan, 0.04, 0.04, np.nan], nan_ok=True)
    assert np.isnan(false_discovery_rate(np.array([np.nan]))).all()


def test_the_detectable_size_has_the_power_that_it_claims():
    from eval.perturb.effects.statistics import detectable_size, over_donors

    size = detectable_size(6, 0.01)
    drawn = np.random.default_rng(2).normal(size, 1, (20_000, 6))
    assert (over_donors(drawn)["p"] < 0.01).mean() == pytest.approx(0.8, abs=0.01)
    assert detectable_size(1, 0.05) == float("inf")
    assert detectable_size(3, 0.05) > detectable_size(5, 0.05) > detectable_size(20, 0.05)


def test_matched_genes_are_the_nearest_others():
    from eval.perturb.effects.matched_genes import match_genes

    matched = match_genes(np.arange(100.0), np.ones(100), 10)
    assert sorted(matched[50]) == [45, 46, 47, 48, 49, 51, 52, 53, 54, 55]
    assert sorted(matched[0]) == list(range(1, 11))
    same = match_genes(np.zeros(40), np.ones(40), 12)
    assert all(len(set(row) - {gene}) == 12 for gene, row in enumerate(same))


def planted_screen(seed: int, planted: int, heavy: bool, one_sided: bool):
    """Return values [genes, donors], ranks, detection, and which of 300 genes have an effect.

    Genes of no interest differ by 1 standard deviation (or t with 3 degrees of freedom), in all
    donors alike; effects are 6.
    """
    rng = np.random.default_rng(seed)
    own = rng.standard_t(3, 300) if heavy else rng.normal(0, 1, 300)
    values = own[:, None] + rng.normal(0, 0.5, (300, 8))
    has_effect = np.zeros(300, dtype=bool)
    has_effect[rng.choice(300, planted, replace=False)] = True
    signs = 1.0 if one_sided else rng.choice([-1.0, 1.0], planted)
    values[has_effect] += 6 * np.broadcast_to(signs, planted)[:, None]
    ranks = rng.permutation(300).astype(float)
    return values, ranks, (1 - ranks / 300 + rng.normal(0, 0.1, 300)).clip(0.01, 1), has_effect


def found_in(seed: int, planted: int, heavy: bool = False, one_sided: bool = True):
    """Return bool [genes] twice: found, and truly with an effect."""
    from eval.perturb.effects.matched_genes import against_matched
    from eval.perturb.effects.statistics import false_discovery_rate

    values, ranks, detection, has_effect = planted_screen(seed, planted, heavy, one_sided)
    table, _ = against_matched(values, ranks, detection, 50)
    p = np.maximum(table["p"], table["null_p"]).to_numpy()
    return false_discovery_rate(p) < 0.05, has_effect


MANY_SCREENS = pytest.param(100, marks=pytest.mark.long)


@pytest.mark.parametrize("one_sided", [True, False])
@pytest.mark.parametrize("screens", [8, MANY_SCREENS])
def test_many_true_effects_do_not_hide_each_other(screens, one_sided):
    """60 of 300: a null that takes them for its own finds three in a hundred of them."""
    found = [found_in(s, 60, one_sided=one_sided) for s in range(screens)]
    assert np.mean([f[true].mean() for f, true in found]) >= 0.8
    assert np.mean([(f & ~true).sum() / max(f.sum(), 1) for f, true in found]) <= 0.05


@pytest.mark.parametrize("screens", [20, MANY_SCREENS])
@pytest.mark.parametrize("heavy", [False, True])
def test_heavy_tails_alone_are_seldom_called_effects(screens, heavy):
    """With t noise of 3 degrees of freedom a normal null errs in nearly every screen."""
    assert np.mean([found_in(s, 0, heavy)[0].any() for s in range(screens)]) <= 0.1


@pytest.mark.parametrize("freedom", [3.0, 43.0])
def test_the_null_is_that_of_the_genes_without_effect(freedom):
    from scipy import stats

    from eval.perturb.effects.null import fit_null

    rng = np.random.default_rng(15)
    z = np.r_[rng.standard_t(freedom, 4000), rng.normal(0, 1, 400) + 12, np.nan]
    null = fit_null(z)
    quartile = stats.t.ppf(0.75, freedom) / stats.norm.ppf(0.75)
    assert null.deviation == pytest.approx(quartile, rel=0.05)
    assert null.share_of_others == pytest.approx(1 / 11, abs=0.01)
    for size in (1, 2, 4):
        tail = 2 * stats.t.sf(size, freedom)
        assert null.p_values(np.array([size]))[0] == pytest.approx(tail, rel=0.3)
    assert np.isnan(null.p_values(z)[-1])
    far = np.array([8.0])
    few = fit_null(np.r_[z[:30], 8.0])
    assert few.p_values(far)[0] > 1e-4, "so few genes prove no light tail"
    assert freedom < 43 or null.p_values(far)[0] < 1e-7
    assert fit_null(np.zeros(20)).p_values(np.array([0.0]))[0] == 1


# --- screens


def test_noise_of_donors_is_not_called_an_effect(tmp_path):
    """A test over cells calls most of these genes significant; one over donors one in twenty."""
    from scipy import stats

    from eval.perturb.effects.analysis import FOUND, LIKE_OTHERS, analyse

    values, donors = noise(np.random.default_rng(3), 1500, 6, 20, donor_sd=1.0)
    results = write_screen(tmp_path / "s", values, donors, names(1500))
    analysis = analyse(results, settings())
    over_cells_p = stats.ttest_1samp(values, 0).pvalue
    assert (over_cells_p < 0.05).mean() > 0.5, "what pseudoreplication would have given"
    genes = analysis.genes
    for column in ("p", "donor_p", "null_p"):
        assert (genes[column] < 0.05).mean() == pytest.approx(0.05, abs=0.02), column
        assert (genes[column] < 0.005).mean() == pytest.approx(0.005, abs=0.006), column
    assert (genes["verdict"] == FOUND).sum() == 0
    assert (genes["fdr"] < 0.05).sum() <= 1
    assert set(genes["verdict"]) == {LIKE_OTHERS}
    assert not analysis.warnings
    assert list(genes.columns) == list(GENE_COLUMNS)


def test_planted_genes_are_found_in_both_directions(tmp_path):
    from eval.perturb.effects.analysis import FOUND, analyse

    values, donors = noise(np.random.default_rng(4), 600, 8, 10, donor_sd=0.3)
    planted = {
        f"G{i:04d}": sign * 4.0 for i, sign in zip(range(20, 500, 40), [1, -1] * 6, strict=True)
    }
    for gene, effect in planted.items():
        values[:, int(gene[1:])] += effect
    results = write_screen(tmp_path / "s", values, donors, names(600))
    genes = by_gene(analyse(results, settings()).genes)
    found = set(genes.index[genes["verdict"] == FOUND])
    assert found >= set(planted) and len(found - set(planted)) <= 1
    for gene, effect in planted.items():
        row = genes.loc[gene]
        assert row["matched_effect"] == pytest.approx(effect, abs=0.6)
        assert row["matched_low"] < row["matched_effect"] < row["matched_high"]
        assert row["matched_size"] > 3 if effect > 0 else row["matched_size"] < -3
        assert row["empirical_p"] == pytest.approx(1 / 51, abs=0.03)


@pytest.mark.parametrize("column", ["toward_goal", "shift"])
def test_an_effect_of_rank_alone_is_no_finding(tmp_path, column):
    """Highly ranked genes shift most: true of all of them, so it says nothing of any one."""
    from scipy import stats

    from eval.perturb.effects.analysis import FOUND, analyse
    from eval.perturb.effects.statistics import false_discovery_rate

    rng = np.random.default_rng(5)
    values, donors = noise(rng, 1000, 6, 8, donor_sd=0.5)
    ranks = rng.permutation(1000).astype(float)
    values = np.abs(values * 0.1 + 20 * np.exp(-ranks / 200))
    results = write_screen(
        tmp_path / "s", values, donors, names(1000), column=column, mean_rank=ranks
    )
    genes = analyse(results, settings()).genes
    against_zero = stats.ttest_1samp(values.reshape(6, 8, -1).mean(axis=1), 0).pvalue
    assert (false_discovery_rate(against_zero) < 0.05).mean() > 0.9, "without matched genes"
    assert (genes["verdict"] == FOUND).sum() <= 1
    assert genes["p"].isna().all() == (column == "shift"), "a distance is never tested against 0"


def test_the_whole_donor_moves_and_no_gene_is_found():
    from eval.perturb.effects.matched_genes import against_matched
    from eval.perturb.effects.statistics import false_discovery_rate

    rng = np.random.default_rng(6)
    values = rng.normal(0, 0.1, (500, 5)) + rng.normal(3, 1, 5)
    table, differences = against_matched(values, np.arange(500.0), np.ones(500), 50)
    assert np.abs(differences.mean(axis=0)).max() < 0.05
    assert (false_discovery_rate(table["p"].to_numpy()) < 0.05).sum() <= 1


def test_one_donor_or_none_claims_nothing(tmp_path):
    from eval.perturb.effects.analysis import NOT_TESTED, analyse

    values, donors = noise(np.random.default_rng(7), 100, 4, 10, donor_sd=0.0)
    values[:, 7] += 50
    for name, given in (("none", [""] * 40), ("one", ["d0"] * 40)):
        analysis = analyse(write_screen(tmp_path / name, values, given, names(100)), settings())
        genes = by_gene(analysis.genes)
        assert set(genes["verdict"]) == {NOT_TESTED}
        assert genes[["p", "fdr", "matched_p", "matched_fdr", "effect_size"]].isna().all(axis=None)
        row, truth = genes.loc["G0007"], values[:, 7]
        error = truth.std(ddof=1) / np.sqrt(40)
        assert row["effect"] == pytest.approx(truth.mean(), rel=1e-5)
        assert row["effect_high"] - row["effect_low"] == pytest.approx(2 * 1.96 * error, rel=1e-3)
        assert row["empirical_p"] == pytest.approx(1 / 51), "a description, not a test"
        assert "nothing is tested" in analysis.warnings[0] and not analysis.power


def test_few_donors_few_genes_and_cells_without_a_donor_are_named(tmp_path):
    from eval.perturb.effects.analysis import NOT_TESTED, analyse

    values, donors = noise(np.random.default_rng(8), 60, 3, 10, donor_sd=0.1)
    donors[:5] = [""] * 5
    warnings = analyse(write_screen(tmp_path / "s", values, donors, names(60)), settings()).warnings
    assert "Only 3 donors" in warnings[0]
    assert "5 of 30 cells have no donor" in warnings[1]
    assert "half of them or more" in warnings[2]
    exact = analyse(Results.open(tmp_path / "s"), settings(test="wilcoxon"))
    assert any("no p below 0.25" in w for w in exact.warnings)
    few = write_screen(tmp_path / "few", values[:, :5], donors, names(5))
    analysis = analyse(few, settings())
    assert any("too few to match" in w for w in analysis.warnings)
    assert set(analysis.genes["verdict"]) == {NOT_TESTED}


def test_genes_of_few_donors_and_values_that_are_no_numbers(tmp_path):
    from eval.perturb.effects.analysis import NOT_TESTED, analyse

    values, donors = noise(np.random.default_rng(9), 200, 5, 10, donor_sd=0.2)
    values[10:, 3] = np.nan  # one donor only
    values[:8, 4] = np.nan  # two cells of the first donor: fewer than three
    results = write_screen(tmp_path / "s", values, donors, names(200))
    genes = by_gene(analyse(results, settings()).genes)
    assert genes.loc["G0003", "donors"] == 1 and genes.loc["G0003", "verdict"] == NOT_TESTED
    assert genes.loc["G0004", "donors"] == 4 and np.isfinite(genes.loc["G0004", "matched_p"])
    loose = by_gene(analyse(results, settings(min_cells=2)).genes)
    assert loose.loc["G0004", "donors"] == 5
    part = tmp_path / "s" / "shifts" / "part-00000.parquet"
    table = pd.read_parquet(part)
    table.loc[table["perturbation"] == 6, "toward_goal"] = np.nan
    table.to_parquet(part)
    broken = by_gene(analyse(Results.open(tmp_path / "s"), settings()).genes)
    assert broken.loc["G0006", "donors"] < 5 and np.isfinite(broken.loc["G0006", "effect"])
    assert broken["matched_p"].drop(["G0003", "G0006"]).notna().all()


def screen_of_pairs(folder, synergy: float) -> Results:
    """Three genes and their pairs in 5 donors; every pair is the sum, and `synergy` for A+B."""
    rng = np.random.default_rng(10)
    singles = rng.normal([1.0, 2.0, -1.0], 0.5, (100, 3)) + rng.normal(0, 1, (100, 1))
    pairs = np.stack([singles[:, [a, b]].sum(axis=1) for a, b in ((0, 1), (0, 2), (1, 2))], axis=1)
    pairs += rng.normal(0, 0.1, pairs.shape)
    pairs[:, 0] += synergy
    singles[::7, 0] = np.nan  # a gene that is not in every cell
    donors = [f"d{i % 5}" for i in range(100)]
    genes = [["A"], ["B"], ["C"], ["A", "B"], ["A", "C"], ["C", "B"]]
    return write_screen(folder, np.hstack([singles, pairs]), donors, genes)


@pytest.mark.parametrize("synergy", [0.0, 1.5])
def test_synergy_is_what_exceeds_the_sum_of_single_effects(tmp_path, synergy):
    from eval.perturb.effects.analysis import analyse

    table = analyse(screen_of_pairs(tmp_path / "s", synergy), settings()).combinations
    assert list(table.columns) == list(COMBINATION_COLUMNS)
    rows = table.set_index("name")
    assert set(rows.index) == {"a+b", "a+c", "c+b"}
    assert rows.loc["a+b", "synergy_low"] < synergy < rows.loc["a+b", "synergy_high"]
    assert (rows.loc["a+b", "fdr"] < 0.05) == (synergy > 0)
    assert rows.loc["c+b", "synergy"] == pytest.approx(0, abs=0.1)
    assert rows.loc["a+b", "cells"] == 85, "only where both genes are"
    assert rows.loc["c+b", "sum_of_singles"] == pytest.approx(1.0, abs=0.6)
    difference = (rows["combined"] - rows["sum_of_singles"]).to_numpy()
    assert difference == pytest.approx(rows["synergy"].to_numpy())


def test_pairs_without_their_single_genes_are_named(tmp_path):
    from eval.perturb.effects.analysis import analyse

    results = screen_of_pairs(tmp_path / "s", 1.0)
    results.perturbations.at[0, "genes"] = ["Z"]
    results.perturbations.at[1, "kind"] = "overexpress"
    analysis = analyse(results, settings())
    rows = analysis.combinations.set_index("name")
    assert rows["cells"].eq(0).all() and rows["synergy"].isna().all()
    assert any("No synergy" in w for w in analysis.warnings)


def two_screens(folder, opposite: bool) -> tuple[Results, Results]:
    """Delete and overexpress: ten planted genes with opposite signs, or with the same."""
    rng = np.random.default_rng(11)
    values, donors = noise(rng, 300, 6, 6, donor_sd=0.2)
    other, _ = noise(rng, 300, 6, 6, donor_sd=0.2)
    artefact = np.linspace(3, 0, 300)
    planted = np.arange(15, 300, 30)
    values, other = values + artefact, other - artefact
    values[:, planted] += 6
    other[:, planted] += -6 if opposite else 6
    deleted = write_screen(folder / "delete", values, donors, names(300))
    raised = write_screen(folder / "over", other, donors, names(300), kind="overexpress")
    return deleted, raised


@pytest.mark.parametrize("opposite", [True, False])
def test_delete_and_overexpress_beside_what_any_genes_do(tmp_path, opposite):
    from eval.perturb.effects.analysis import analyse

    deleted, raised = two_screens(tmp_path, opposite)
    analysis = analyse(deleted, settings(), raised)
    signs = analysis.agreement["signs"]
    assert analysis.agreement["expected"] == -1
    assert signs["found"] >= 10 and signs["share"] == (1.0 if opposite else 0.0)
    assert signs["null_share"] == pytest.approx(0.5, abs=0.12)
    assert signs["p"] < 0.01
    rho = {(c["value"], c["genes"]): c["spearman"] for c in analysis.agreement["correlations"]}
    assert rho["effect", "null"] < -0.5, "any genes are anti-correlated by their rank"
    assert abs(rho["matched_effect", "null"]) < 0.2, "not once it is accounted for"
    row = by_gene(analysis.genes).loc["G0015"]
    assert row["agrees"] == opposite
    assert np.sign(row["other_matched_effect"]) == (-1 if opposite else 1)


def test_screens_without_a_common_gene_are_refused(tmp_path):
    from eval.perturb.effects.analysis import analyse

    values, donors = noise(np.random.default_rng(12), 20, 3, 5, 0.1)
    one = write_screen(tmp_path / "one", values, donors, names(20))
    two = write_screen(tmp_path / "two", values, donors, [[f"X{i}"] for i in range(20)])
    with pytest.raises(ValueError, match="no gene was perturbed, one by one, in both"):
        analyse(one, settings(), two)


def test_two_groups_only_where_two_fit_better():
    from eval.perturb.effects.impact import impact_groups

    rng = np.random.default_rng(13)
    fit, probability = impact_groups(rng.normal(0, 1, 800))
    assert fit["components"] == 1 and np.isnan(probability).all()
    mixed = np.concatenate([rng.normal(0, 1, 700), rng.normal(8, 1, 100), [np.nan]])
    fit, probability = impact_groups(mixed)
    assert fit["components"] == 2 and fit["bic_two"] < fit["bic_one"] - 10
    assert fit["weights"][1] == pytest.approx(1 / 8, abs=0.02)
    assert (probability[700:800] > 0.5).mean() > 0.98 and (probability[:700] > 0.5).mean() < 0.02
    assert np.isnan(probability[-1])
    assert impact_groups(np.arange(5.0))[0] == {"components": 0}


def test_wrong_wishes_and_damaged_screens_are_refused(tmp_path):
    from eval.perturb.effects.analysis import AnalysisSettings, analyse

    with pytest.raises(ValueError, match="must be t or wilcoxon.*at least 10.*between 0 and 1"):
        AnalysisSettings(test="z", num_matched=3, rate=2.0)  # pyright: ignore
    values, donors = noise(np.random.default_rng(14), 20, 3, 5, 0.1)
    results = write_screen(tmp_path / "s", values, donors, names(20))
    with pytest.raises(ValueError, match="no value 'shift'.*toward_goal"):
        analyse(results, settings(effect="shift"))
    cells = tmp_path / "s" / "cells.parquet"
    pd.read_parquet(cells).drop(columns="donor").to_parquet(cells)
    with pytest.raises(ValueError, match="cells.parquet: has no column donor"):
        analyse(Results.open(tmp_path / "s"), settings())
