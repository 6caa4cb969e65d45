"""The figures of the README and the site are those of the committed results: docs/records and metrics/."""

import re

import pandas as pd
import pytest

from benchmarks.pictures import STARTS
from replaceme.base.files import read_json
from replaceme.evaluation.tables import format_score_comparison
from replaceme.export.card import describe_check
from tests.golden.test_golden import has_other_run
from tests.pipeline.closure import ROOT

RECORDS = ROOT / "docs" / "records"
KEYS = ["model", "layers", "start", "heal_tokens"]
QUALITY = pd.read_csv(RECORDS / "quality.csv").set_index(KEYS)
NAMES = "smollm2-135m-instruct", "qwen2.5-coder-1.5b-instruct", "gemma-3-270m-q4"
DEMO, LARGER, GEMMA = (QUALITY.loc[name] for name in NAMES)
SERVING = pd.read_csv(RECORDS / "serving.csv", dtype={"version": str})
MAP = "an orthogonal map, 64k tokens"
NOTHING, (REPAIR, OWN) = "nothing in their place", STARTS.values()
# The demo without 4 layers: plain removal, the default, healed; the last one is the preset's.
FOUR = [DEMO.loc["4 of 30", NOTHING, 0]] + [DEMO.loc["4 of 30", REPAIR, count] for count in (0, 131_000, 250_000)]
FOUR += [DEMO.loc["4 of 30", OWN, 250_000]]
# Without 8 layers, healed at two rates, from a repair on text of its own too, and on more fresh text.
EIGHT = [DEMO.loc["8 of 30", start, 250_000] for start in (REPAIR, f"{REPAIR}; rate 3e-4", OWN)]
EIGHT += [DEMO.loc["8 of 30", start, 1_000_000] for start in (OWN, f"{OWN}; more fresh text")]
MUON_FOUR, MUON_EIGHT = f"{OWN}; by Muon at 3e-4", f"{OWN}; more fresh text; by Muon at 4e-4"


def read_words(page: str) -> str:
    """Return a page's text, with one blank between words."""
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


def test_the_readmes_headline_is_the_records() -> None:
    assert QUALITY.index.is_unique
    plain, default, *_, healed = FOUR
    eight_plain, eight = DEMO.loc["8 of 30", NOTHING, 0], DEMO.loc["8 of 30", OWN, 0]
    larger_plain, larger = LARGER.loc["7 of 28", NOTHING, 0], LARGER.loc["7 of 28", REPAIR, 0]
    sentences = [
        f"| × {plain.unseen_ratio:.2f} | **× {default.unseen_ratio:.2f}** | **× {healed.unseen_ratio:.2f}** |",
        f"| {plain.retrieval_exact:.0%} | {default.retrieval_exact:.0%} | {healed.retrieval_exact:.0%} |".replace("%", " %"),
        f"without them, × {eight_plain.unseen_ratio:.2f} with nothing in their place, × {eight.unseen_ratio:.2f} by the "
        f"default with text of the model's own, and × {EIGHT[-1].unseen_ratio:.2f} healed",
        f"without 7 of 28 layers has × {larger_plain.unseen_ratio:.2f} with nothing in their place, and "
        f"× {larger.unseen_ratio:.2f} by the default",
        f"It is {read_json(ROOT / 'metrics' / 'evaluation.json')['parameters']['removed_percent']:.1f} % smaller",
    ]
    words = read_words("README.md")
    assert [sentence for sentence in sentences if sentence not in words] == []
    counts = {5: "Five", 6: "Six", 7: "Seven", 8: "Eight"}
    assert f"[{counts[SERVING.runtime.nunique()]} runtimes]" in words


def test_the_readmes_table_is_what_the_committed_run_prints() -> None:
    if has_other_run():
        pytest.skip("metrics/ has a run of this machine, whose last digits may be others")
    evaluation, checked = (read_json(ROOT / "metrics" / f"{name}.json") for name in ("evaluation", "check"))
    printed = [*format_score_comparison(evaluation).splitlines(), describe_check(checked)]
    words = read_words("README.md")
    assert [line for line in printed if " ".join(line.split()) not in words] == []


@pytest.mark.parametrize("runs", [FOUR[1:], EIGHT], ids=["4 of 30", "8 of 30"])
def test_the_guide_on_healing_shows_the_records(runs: list[pd.Series]) -> None:
    kinds = ["bbc_news", "convention_speeches", "gutenberg_fiction", "medical_abstracts"]
    rows = [
        [f"× {run.unseen_ratio:.3f} ± {run.unseen_stderr:.3f}" for run in runs],
        [", ".join(f"{run[kind]:.2f}" for kind in kinds) for run in runs],
        [f"{run.unseen_kl:.3f}, {run.same_token_percent:.1f} %" for run in runs],
        [f"{run.retrieval_exact:.0%}".replace("%", " %") for run in runs],
    ]
    words = read_words("docs/guides/healing.md").replace("**", "")
    four, eight = DEMO.loc["4 of 30", MUON_FOUR, 250_000], DEMO.loc["8 of 30", MUON_EIGHT, 1_000_000]
    assert f"without 4 layers × {four.unseen_ratio:.3f} with 250k" in words
    assert f"without 8 × {eight.unseen_ratio:.3f} with 1M" in words
    gemma = [GEMMA.loc["4 of 18", start, count] for start, count in ((MAP, 64_000), (f"{MAP}; rate 3e-4", 250_000))]
    for run, said in zip(gemma, (" after 64k tokens at 1e-4", ": worse than without training"), strict=True):
        assert f"× {run.unseen_ratio:.3f} ± {run.unseen_stderr:.3f}{said}" in words
    assert [row for row in rows if f"| {' | '.join(row)} |" not in words] == []


def test_the_page_on_serving_shows_the_records() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = [
        f"| {run.runtime} {run.version} | {run.weights} | {run.dense_mb} → {run.pruned_mb} | {run.dense_perplexity:.2f} → "
        f"{run.pruned_perplexity:.2f} | {run.dense_tokens_s} → {run.pruned_tokens_s} | {run.ratio:.2f} "
        f"({', '.join(run.ratios.split())}) |"
        for run in SERVING.itertuples()
    ]
    assert rows == re.findall(r"(?m)^\| .* → .* → .* → .*\|$", page)
