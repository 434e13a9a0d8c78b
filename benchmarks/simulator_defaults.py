"""What the simulator's defaults were measured on: ``python -m benchmarks.simulator_defaults DATA``.

DATA holds pbmc3k/, covid_pbmc_6donors/ and sc_mixology/ as h5ad with raw counts. Prints, for
docs/simulator.md, standard deviations of natural logarithms. Between-group ones are of genes with
at least 100 counts in every group, less what Poisson sampling alone gives.
"""

from __future__ import annotations

import sys
from pathlib import Path

import anndata
import numpy as np
import scipy.sparse

_GENES = 1000
_BINS = (0.2, 0.4, 0.8, 1.6, 4.0, np.inf)


def read(path: Path) -> anndata.AnnData:
    cells = anndata.read_h5ad(path)
    cells.X = scipy.sparse.csr_matrix(cells.X, dtype=float)
    return cells


def between(cells: anndata.AnnData, column: str) -> float:
    """Return the root mean square, over genes, of the standard deviation between groups."""
    groups = cells.obs[column].astype(str).to_numpy()
    sums = np.array([np.asarray(cells.X[groups == g].sum(axis=0))[0] for g in np.unique(groups)])
    share = sums / sums.sum(axis=1, keepdims=True)
    enough = (sums >= 100).all(axis=0)
    spread = np.log(share[:, enough]).var(axis=0, ddof=1) - (1 / sums[:, enough]).mean(axis=0)
    return float(np.sqrt(spread.mean()))


def dispersions(cells: anndata.AnnData) -> list[float]:
    """Return the median dispersion of genes by their mean, counts scaled to the median depth."""
    total = np.asarray(cells.X.sum(axis=1)).ravel()
    scale = np.median(total) / np.maximum(total, 1)
    scaled = scipy.sparse.diags(scale) @ cells.X
    mean = np.asarray(scaled.mean(axis=0)).ravel()
    variance = np.asarray(scaled.multiply(scaled).mean(axis=0)).ravel() - mean**2
    sampling = np.asarray((scipy.sparse.diags(scale) @ scaled).mean(axis=0)).ravel()
    found = np.divide(variance - sampling, mean**2, out=np.zeros_like(mean), where=mean > 0)
    bins = zip(_BINS, _BINS[1:], strict=False)
    return [round(float(np.median(found[(mean >= a) & (mean < b)])), 2) for a, b in bins]


def main() -> None:
    data = Path(sys.argv[1])
    pbmc = read(data / "pbmc3k" / "pbmc3k.h5ad")
    total = np.asarray(pbmc.X.sum(axis=1)).ravel()
    mean = np.asarray(pbmc.X.mean(axis=0)).ravel()
    ordered = np.sort(mean[mean > 0])[::-1]
    print(
        "pbmc3k: median counts", np.median(total), "sd of ln counts", np.log(total).std().round(3)
    )
    print("  genes with a count", len(ordered), "sd of ln mean", np.log(ordered).std().round(3))
    print("  share of the 1,000 most expressed", (ordered[:_GENES].sum() / ordered.sum()).round(3))
    top = pbmc[:, np.sort(np.argsort(-mean)[:_GENES])].copy()
    print("  dispersion by mean, bins from", _BINS[:-1], "all cells", dispersions(top))
    for kind in ("CD4 T cells", "CD14+ Monocytes", "B cells"):
        print("   ", kind, dispersions(top[(top.obs["cell_type"] == kind).to_numpy()].copy()))
    covid = read(data / "covid_pbmc_6donors" / "covid_pbmc_6donors.h5ad")
    for kind in ("T cell", "Monocyte", "B cell", "NK cell"):
        chosen = (covid.obs["condition"] == "Healthy") & (covid.obs["silver_cell_type"] == kind)
        print("two healthy donors,", kind, round(between(covid[chosen.to_numpy()], "donor"), 3))
    lines = read(data / "sc_mixology" / "sc_mixology.h5ad")
    for kind in ("H1975", "H2228", "HCC827"):
        good = ((lines.obs["filter_pass"] == 1) & (lines.obs["cell_line"] == kind)).to_numpy()
        plates = lines.obs["batch"].astype(str).str.startswith("celseq2_5cl").to_numpy()
        cells = lines[good & plates]
        depths = np.log(cells.obs.groupby("batch", observed=True)["n_counts"].median())
        print(
            "three plates,", kind, round(between(cells, "batch"), 3), "depth", depths.std().round(3)
        )
        kits = lines[good & lines.obs["batch"].isin(["celseq2_3cl", "dropseq_3cl"]).to_numpy()]
        print("two technologies,", kind, round(between(kits, "batch"), 3))


if __name__ == "__main__":
    main()
