"""The page about a corpus: its numbers against the blocks, and what it does with odd corpora."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from data_prep.encoding.filters import REASONS
from data_prep.files import file_sha256
from data_prep.shards.format import SPLITS
from data_prep.shards.reader import ShardSet

GOLDEN = Path(__file__).parent / "golden" / "shards-1"


class Reader(HTMLParser):
    """Collects the tables as rows of texts, the facts, tags, ids, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables, self.facts, self.tags, self.ids = [], [], [], []
        self._cell: list[str] | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th", "dt", "dd"):
            self._cell = []

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append("".join(self._cell or []).strip())
        elif tag in ("dt", "dd"):
            self.facts.append("".join(self._cell or []).strip())
        if tag in ("td", "th", "dt", "dd"):
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell.append(data)

    def table(self, first_header: str) -> list[dict[str, str]]:
        """Return the rows of the table whose first column is called so."""
        table = next(t for t in self.tables if t[0][0] == first_header)
        return [dict(zip(table[0], row, strict=True)) for row in table[1:]]


def page_of(folder: Path, out: Path) -> tuple[str, Reader]:
    from data_prep.inspection.page import write_page

    write_page(ShardSet(folder), out)
    text = out.read_text()
    return text, Reader(text)


def with_manifest(folder: Path, out: Path, **changes) -> Path:
    """Return a copy of a shard folder whose manifest says something else."""
    shutil.copytree(folder, out)
    manifest = json.loads((out / "manifest.json").read_text()) | changes
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def test_numbers_are_those_of_the_blocks(shards, tmp_path):
    text, page = page_of(shards, tmp_path / "page.html")
    opened = ShardSet(shards)
    vocabulary = opened.vocabulary
    holding, num_tokens = np.zeros(vocabulary.num_tokens, dtype=int), 0
    for split in SPLITS:
        for block in opened.iter_blocks(split):
            num_tokens += len(block.tokens)
            for start, stop in zip(block.offsets[:-1], block.offsets[1:], strict=True):
                holding[np.unique(block.tokens[start:stop])] += 1
    facts = dict(zip(page.facts[::2], page.facts[1::2], strict=True))
    assert facts["cells kept"] == f"{opened.num_cells:,}"
    assert facts["tokens"] == f"{num_tokens:,}"
    assert facts["fingerprint"] == opened.fingerprint[:12]
    assert facts["vocabulary hash"] == vocabulary.sha256[:12]
    cells = holding[vocabulary.first_gene_token :]
    assert f"<b>{(cells > 0).sum():,}</b> of the {len(cells):,} genes" in text
    assert f"<b>{(cells == 0).sum():,}</b> are in none" in text
    best = np.argsort(-cells, kind="stable")[:20]
    top = page.table("gene")
    assert [row["gene"] for row in top] == [vocabulary.genes[i] for i in best]
    assert [row["cells"] for row in top] == [f"{cells[i]:,}" for i in best]
    assert [row["share of cells"] for row in top] == [
        f"{cells[i] / opened.num_cells:.1%}" for i in best
    ]
    buckets = page.table("split")
    assert [(b["split"], b["length"]) for b in buckets] == [
        (s, f"{n:,}") for s in SPLITS for n in opened.bucket_lengths(s)
    ]


def test_page_stands_alone_and_is_the_same_every_time(shards, tmp_path):
    import matplotlib

    from data_prep.inspection.page import write_page

    before = dict(matplotlib.rcParams)
    text, page = page_of(shards, tmp_path / "page.html")
    assert dict(matplotlib.rcParams) == before, "settings of matplotlib must be as they were"
    loading = {"script", "link", "img", "iframe", "object", "use", "image"}
    outside = [a for tag, a in page.tags if tag in loading and not is_inside(a)]
    assert not outside
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids)), "an id must be there once"
    figures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(figures) >= 4
    for figure in figures:
        assert ElementTree.fromstring(figure).get("role") == "img"
        assert "currentColor" in figure and "#1a1b1c" not in figure
    write_page(ShardSet(shards), tmp_path / "page.png")
    for name in ("page.html", "page.png"):
        first = (tmp_path / name).read_bytes()
        write_page(ShardSet(shards), tmp_path / name)
        assert (tmp_path / name).read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "page.png"]
    with Image.open(tmp_path / "page.png") as image:
        image.verify()


def is_inside(attributes: dict[str, str | None]) -> bool:
    target = attributes.get("xlink:href") or attributes.get("href")
    return target is not None and target.startswith("#")


def test_format_1_says_what_it_lacks(tmp_path):
    from data_prep.inspection.page import write_page

    text, page = page_of(GOLDEN, tmp_path / "page.html")
    assert text.count("<svg") == 1, "padding is all that can be drawn"
    for words in ("Lengths are not shown", "Genes are not shown", "Data sets are not shown"):
        assert words in text
    (source,) = page.table("source")
    assert (source["source"], source["genes"], source["known"]) == ("cells", "60", "60")
    assert (source["by alias"], source["counts known"]) == ("-", "100.0%")
    assert {"setting": "source.counts", "value": "X"} in page.table("setting")
    write_page(ShardSet(GOLDEN), tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        image.verify()


@pytest.mark.long
def test_many_data_sets_with_any_name(shards, tmp_path):
    from data_prep.inspection.page import write_page

    datasets = [
        {
            "name": f"<b>{number}</b> & $x_{number}$",
            "cells_read": 1000 + number,
            "cells_kept": 990 + number,
            "rejected": {REASONS[5]: 7, REASONS[3]: 3},
            "counts_interval": [-40.2, 12345.6],
            "mito_interval": [0.012, 1.4] if number else None,
        }
        for number in range(561)
    ]
    folder = with_manifest(shards, tmp_path / "many", datasets=datasets)
    text, page = page_of(folder, tmp_path / "page.html")
    assert "the largest 30 of 561 data sets; the table has all" in text
    rows = page.table("data set")
    assert [row["data set"] for row in rows] == [d["name"] for d in reversed(datasets)]
    assert list(rows[0].values())[1:] == [
        "1,560", "1,550", "3", "7", "0 to 12,346", "1.2% to 100.0%",
    ]  # fmt: skip
    assert rows[-1]["mitochondrial share allowed"] == "-"
    drawn = re.findall(r"&lt;b&gt;(\d+)&lt;/b&gt; &amp; \$x_\d+\$</text>", text)
    assert [int(n) for n in drawn] == 2 * list(range(560, 530, -1))
    write_page(ShardSet(folder), tmp_path / "page.png")


def test_genes_are_named_and_marked(shards, tmp_path):
    from data_prep.inspection.page import write_page

    opened = ShardSet(shards)
    genes = ("ENSG00000198804", "MT-7", *opened.vocabulary.genes[2:])
    opened.vocabulary = replace(opened.vocabulary, genes=genes, aliases={"COX1": genes[0]})
    statistics = json.loads((shards / "statistics.json").read_text())
    number = opened.vocabulary.first_gene_token
    statistics["cells_by_token"][number : number + 2] = [10_000, 9_999]
    folder = tmp_path / "copy"
    shutil.copytree(shards, folder)
    (folder / "statistics.json").write_text(json.dumps(statistics))
    opened.folder = folder
    opened.manifest = opened.manifest | {
        "statistics_sha256": file_sha256(folder / "statistics.json")
    }
    write_page(opened, tmp_path / "page.html")
    page = Reader((tmp_path / "page.html").read_text())
    first, second, third = page.table("gene")[:3]
    assert (first["gene"], first["other names"]) == (genes[0], "COX1")
    assert [r["genome"] for r in (first, second, third)] == ["mitochondrial"] * 2 + ["-"]
    links = [a.get("href") for tag, a in page.tags if tag == "a"]
    assert links[0] == f"https://www.ensembl.org/id/{genes[0]}"
    assert len(links) == 19, "MT-7 is no Ensembl id"


def test_wrong_requests_leave_everything_as_it_was(shards, tmp_path):
    from data_prep.inspection.page import write_page

    opened = ShardSet(shards)
    with pytest.raises(ValueError, match=r"page\.pdf.*\.html.*\.png"):
        write_page(opened, tmp_path / "page.pdf")
    with pytest.raises(ValueError, match="does not exist"):
        write_page(opened, tmp_path / "none" / "page.html")
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged)
    (damaged / "statistics.json").write_text("{}")
    out = tmp_path / "page.html"
    out.write_text("before")
    with pytest.raises(ValueError, match=r"statistics\.json: does not match the manifest"):
        write_page(ShardSet(damaged), out)
    assert out.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged", "page.html"]
    write_page(opened, out)
    assert out.read_text().startswith("<!doctype html>")
