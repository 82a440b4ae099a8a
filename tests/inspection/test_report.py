"""The report: never half-written, never over what is foreign, text never run as code; and in a browser."""

import base64
import importlib.util
import json
import math
import os
import random
import re
import shutil
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest

from sae.errors import InputError
from sae.inspection.latent import (
    Ablation,
    Context,
    Histogram,
    InputToken,
    LatentReading,
    LatentSummary,
    NullScores,
    OutputToken,
)
from sae.inspection.report import ReportFacts, check_report_folder, report_source, write_report

pytestmark = pytest.mark.shapes_unchecked

EVIL = {
    0: '"<script>alert(1)</script>"',
    1: '"</script><img src=x onerror=alert(2)>"',
    2: '"\\""',
    3: '"\\n"',
    4: '"\u202eright to left"',
    5: '"\ud83d"',
    6: '"\ufffd"',
    7: '" needle"',
    8: '"Needles"',
    9: '"\u05e9\u05dc\u05d5\u05dd"',
}
SHIPPED = ["template.html", "method.html", "report.css", "store.js", "table.js", "latent.js", "report.js"]


def text(token_id):
    return EVIL.get(token_id, json.dumps(f" word{token_id}"))


def facts(**changes):
    given = ReportFacts(
        title="quickstart <b>bold</b>",
        notes=[],
        facts=[("model", "demo & more"), ("hookpoint", "resid.2")],
        comparison=[
            {
                "method": "SAE",
                "fvu": 0.18341,
                "l0": 16.0,
                "kl": None,
                "dead_fraction": 0.5,
                "n_latents": 2048,
            },
            {"method": "PCA", "fvu": 0.3, "l0": 16.0, "dead_fraction": None, "n_latents": 64},
        ],
        model_loss={"ce_clean": 2.9, "ce_mean_ablated": None},
        figures=[("A figure", '<?xml version="1.0"?><svg viewBox="0 0 9 9"><circle r="3"/></svg>')],
    )
    return given._replace(**changes)


def context(rng, largest, length):
    peak = rng.randrange(length)
    activations = [largest * rng.random() if rng.random() < 0.1 else 0.0 for _ in range(length)]
    activations[peak] = largest
    tokens = [min(499, 10 + int(rng.expovariate(0.01))) for _ in range(length)]
    return Context(rng.randrange(9000), rng.randrange(80), tokens, activations, peak, rng.random())


def reading(latent, contexts=2, length=12, tokens=3):
    """A made-up latent; every tenth is dead, every seventh ablated, latent 4 fires on all that is evil."""
    rng = random.Random(latent)
    first = (latent * 37) % 490 + 10
    some = list(range(10)) if latent == 4 else [first, *rng.sample(range(10, 500), tokens - 1)]
    outputs = [OutputToken(t, 1.5 / (i + 1), 0.3 / (i + 1)) for i, t in enumerate(some)]
    lowered = [OutputToken(t, -o.logit, -o.cosine) for t, o in zip(reversed(some), outputs, strict=True)]
    if latent % 10 == 3:
        summary = LatentSummary(0, 0.0, 0.0, 0.0, 0.0, 0.0)
        nothing = Histogram([], [])
        return LatentReading(latent, summary, [], [], outputs, lowered, [], [], nothing, None, None)
    inputs = [InputToken(t, 0.5 / (i + 1), 30.0 / (i + 1), 20.0, 40.0, 9) for i, t in enumerate(some)]
    largest = 1.0 + rng.random() * 9
    firings = 10 + (latent * 7919) % 5000
    shown = [context(rng, largest, length) for _ in range(2 * contexts)]
    if latent == 4 and contexts:
        shown[0] = Context(7, 100, [7, 0, 1, 2, 3, 4, 5, 6, 9], [1.0] + 7 * [0.0] + [largest], 8, 1.0)
    ablation = Ablation([(first, 0.5)], [(first, -0.25)], 0.03, 0.01, 0.125, 6) if latent % 7 == 4 else None
    return LatentReading(
        latent=latent,
        summary=LatentSummary(firings, firings / 1e6, largest / 3, largest, rng.random(), 20.0),
        input_tokens=inputs,
        previous_tokens=inputs[::-1],
        output_tokens=outputs,
        lowered_tokens=lowered,
        top_contexts=shown[:contexts],
        sampled_contexts=shown[contexts:],
        histogram=Histogram([largest * 2.0**-i for i in range(8, -1, -1)], [1, 2, 4, 8, 16, 9, 4, 2]),
        ablation=ablation,
        null=NullScores(0.3, 0.4, 0.2, 0.1, 0.7),
    )


def received(path):
    """What a data file hands to the page."""
    call = re.fullmatch(r"SAE\.receive\((.*)\);\n", path.read_text("ascii"), re.DOTALL)
    return json.loads(f"[{call[1]}]")


def unpacked(path):
    return json.loads(zlib.decompress(base64.b64decode(received(path)[2])))


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Without a browser.


def test_data_files_are_ascii_and_say_what_was_given(tmp_path):
    write_report(tmp_path / "report", facts(), map(reading, range(130)), 130, text)
    data = tmp_path / "report" / "data"
    names = sorted(p.name for p in data.iterdir())
    assert names == ["latents-00000.js", "latents-00001.js", "latents-00002.js", "table.js", "tokens.js"]
    tokens = received(data / "tokens.js")[2]
    kind, index, table = received(data / "table.js")
    assert (kind, index, table["n_latents"]) == ("table", None, 130)
    assert table["columns"]["latent"] == list(range(130))
    page, given = unpacked(data / "latents-00001.js")[4], reading(68)
    assert page["latent"] == 68
    sequence, begin, peak, quantile, shown, fired = page["top"][0]
    top = given.top_contexts[0]
    assert (sequence, begin, peak, quantile) == (*top[:2], top.peak, pytest.approx(top.quantile, rel=1e-3))
    assert [tokens[i] for i in shown] == [text(t) for t in top.tokens]
    values = dict(zip(fired[::2], fired[1::2], strict=True))
    assert values == pytest.approx({i: a for i, a in enumerate(top.activations) if a}, rel=1e-3)
    assert [tokens[t[0]] for t in page["fires_on"]] == [text(t.token) for t in given.input_tokens]
    assert page["null"] == given.null._asdict() and page["counts"] == given.histogram.counts


def test_each_token_is_written_once_and_controls_are_spelled_out(tmp_path):
    write_report(tmp_path / "report", facts(), map(reading, range(20)), 20, text)
    tokens = received(tmp_path / "report" / "data" / "tokens.js")[2]
    assert tokens.count('"\ufffd"') == 2  # of a lone surrogate, and of itself
    assert len(tokens) == len(set(tokens)) + 1
    assert {EVIL[0], EVIL[1], EVIL[9], '"\\u202eright to left"'} < set(tokens)
    assert not any(c == "\u202e" or 0xD800 <= ord(c) < 0xE000 for c in "".join(tokens))


def test_facts_are_escaped_and_missing_numbers_are_dashes(tmp_path):
    evil = facts(title="</title><script>alert(1)</script>\u202e", notes=["unfinished: <i>1 of 2</i>"])
    html = write_report(tmp_path / "report", evil, [], 0, text).read_text("utf-8")
    assert "<script>alert" not in html and "&lt;script&gt;alert(1)" in html and "\u202e" not in html
    assert "unfinished: &lt;i&gt;" in html and "demo &amp; more" in html
    assert "<td>0.1834</td>" in html and "<td>50.0 %</td>" in html and "<td>\u2013</td>" in html
    assert "KL, nats" not in html and "<?xml" not in html and '<circle r="3"/>' in html
    assert "2.9</b> nats as it is" in html and "replaced by their mean</span>" not in html
    assert html.count("</script>") == 1 and not re.search(r'(src|href)="(https?:)?//', html)


def test_comparison_has_the_standard_error_and_says_on_what_it_was_measured(tmp_path):
    row = {"method": "SAE", "kl": 0.2, "ce_increase_se": 0.00123, "ce_increase": 0.1, "ce_spliced": 3.0}
    given = facts(comparison=[row, {**row, "method": "PCA", "ce_increase_se": None}], tokens_scored=65_536)
    html = write_report(tmp_path / "report", given, [], 0, text).read_text("utf-8")
    head = re.findall(r'<th scope="col">([^<]*)</th>', html)
    assert head == ["method", "CE increase, nats", "\u00b1 s.e.", "CE spliced, nats", "KL, nats"]
    assert "<td>0.1000</td><td>0.0012</td>" in html and "<td>0.1000</td><td>\u2013</td>" in html
    assert "CE and KL are measured on 65,536 held-out tokens (FVU on all held-out rows)." in html
    unknown = write_report(tmp_path / "report", facts(), [], 0, text).read_text("utf-8")
    assert "CE and KL are measured" not in unknown


@pytest.mark.parametrize("source", ["", '/runs/"a" & <b>\u05e9', "/" + "r/" * 1900])
def test_source_is_read_back_from_the_head_of_the_page(tmp_path, source):
    assert report_source(tmp_path / "report") is None
    index = write_report(tmp_path / "report", facts(source=source), [reading(0)], 1, text)
    assert report_source(tmp_path / "report") == source
    assert (
        b'<meta name="sae-source" content="' in index.read_bytes()[:4096]
        and b"& <b>" not in index.read_bytes()
    )


def test_source_of_what_is_no_report_of_ours_is_none(tmp_path):
    assert report_source(tmp_path) is None
    (tmp_path / "index.html").write_text('<meta name="sae-source" content="x">')
    assert report_source(tmp_path) is None
    (tmp_path / "index.html").write_text('<meta name="generator" content="sae-report/1">')
    assert report_source(tmp_path) == ""
    (tmp_path / "file").write_text("notes")
    assert report_source(tmp_path / "file") is None


def test_method_says_how_low_the_bar_of_chance_is(tmp_path):
    html = write_report(tmp_path / "report", facts(), [reading(0)], 1, text).read_text("utf-8")
    for told in (
        "isotropic and residual streams are not", "from 50 firings up to 20 % of rows; the nearest density",
        "one uniform sample of all its firings", "Contexts of the same words are shown once",
        "pooled and count as spread evenly, so that clarity is rather under- than overestimated",
        "set to zero at its strongest firings",
    ):  # fmt: skip
        assert told in " ".join(html.split()), told


def test_numbers_that_are_not_finite_become_null(tmp_path):
    odd = reading(0)._replace(summary=LatentSummary(3, 0.1, math.nan, math.inf, 0.5, 1.0))
    write_report(tmp_path / "report", facts(), [odd], 1, text)
    columns = received(tmp_path / "report" / "data" / "table.js")[2]["columns"]
    assert columns["mean"] == [None] and columns["largest"] == [None]


def test_latent_beyond_the_dictionary_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match=r"`latents` must be numbered in \[0, n_latents=3\), got 3"):
        write_report(tmp_path / "report", facts(), map(reading, range(4)), 3, text)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["report", "report.tmp", "report.old"])
def test_folder_of_somebody_else_is_left_untouched(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "index.html").write_text("<h1>my home page</h1>")
    with pytest.raises(InputError, match=rf"{name}, which holds something else.*name another folder"):
        check_report_folder(tmp_path / "report")
    with pytest.raises(InputError, match=rf"{name}, which holds something else.*name another folder"):
        write_report(tmp_path / "report", facts(), map(reading, range(3)), 3, text)
    assert contents(tmp_path) == {Path(name, "index.html"): b"<h1>my home page</h1>"}


def test_folder_that_is_new_empty_or_a_report_passes_the_check_unchanged(tmp_path):
    check_report_folder(tmp_path / "report")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "report").mkdir()
    check_report_folder(tmp_path / "report")
    write_report(tmp_path / "report", facts(), [reading(0)], 1, text)
    before = contents(tmp_path)
    check_report_folder(tmp_path / "report")
    assert contents(tmp_path) == before


def test_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "report").write_text("notes")
    with pytest.raises(InputError, match="left untouched"):
        write_report(tmp_path / "report", facts(), [], 0, text)
    assert (tmp_path / "report").read_text() == "notes"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_error_half_way_leaves_the_old_report_whole_and_no_new_one(tmp_path, error):
    write_report(tmp_path / "report", facts(), map(reading, range(70)), 70, text)
    before = contents(tmp_path)

    def broken():
        yield from map(reading, range(100))
        raise error

    with pytest.raises(error):
        write_report(tmp_path / "report", facts(title="new"), broken(), 200, text)
    assert contents(tmp_path) == before
    with pytest.raises(error):
        write_report(tmp_path / "other", facts(), broken(), 200, text)
    assert contents(tmp_path) == before


def test_swap_that_fails_puts_the_old_report_back(tmp_path, monkeypatch):
    write_report(tmp_path / "report", facts(), map(reading, range(3)), 3, text)
    before, rename = contents(tmp_path), Path.rename

    def refuse(path, target):
        if path.name == "report.tmp":
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="no"):
        write_report(tmp_path / "report", facts(title="new"), [], 0, text)
    assert contents(tmp_path) == before


def test_new_report_replaces_an_old_one_and_what_killed_runs_left(tmp_path):
    folder = tmp_path / "report"
    write_report(folder, facts(), map(reading, range(130)), 130, text)
    shutil.copytree(folder, tmp_path / "report.tmp")
    (tmp_path / "report.old").mkdir()
    write_report(folder, facts(title="new"), map(reading, range(3)), 3, text)
    assert [p.name for p in tmp_path.iterdir()] == ["report"]
    assert len(list((folder / "data").iterdir())) == 3 and "new" in (folder / "index.html").read_text("utf-8")
    # Killed between the two renames: the old report lies aside, and a failing run brings it back.
    folder.rename(tmp_path / "report.old")
    with pytest.raises(InputError):
        write_report(folder, facts(), [reading(5)], 1, text)
    assert [p.name for p in tmp_path.iterdir()] == ["report"]


def test_latents_are_taken_as_they_come(tmp_path):
    """Four times the latents do not take four times the memory."""

    def peak(n):
        tracemalloc.start()
        write_report(tmp_path / "r", facts(), (reading(i, 4, 16) for i in range(n)), n, text)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held

    assert peak(256) < 2 * peak(64)


def test_version_changes_with_the_data(tmp_path):
    pages = [write_report(tmp_path / str(n), facts(), [reading(n)], 9, text) for n in (1, 2)]
    versions = [re.search(r'data-version="(\w+)"', p.read_text("utf-8"))[1] for p in pages]
    assert versions[0] != versions[1]


def test_page_needs_only_files_beside_its_code_and_never_inserts_html():
    import sae.inspection.report

    folder = Path(sae.inspection.report.__file__).parent
    for name in SHIPPED:
        assert (folder / name).is_file(), name
    scripts = "".join(p.read_text("utf-8") for p in folder.glob("*.js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|fetch\(", scripts)


# In a browser.


def chromium():
    found = [os.environ.get("CHROMIUM"), "/usr/bin/chromium"]
    found += map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))
    return next((path for path in found if path and os.access(path, os.X_OK)), None)


@pytest.fixture(scope="module")
def browser():
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("the report's pages are tested with playwright, which is not installed")
    from playwright.sync_api import sync_playwright

    switches = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    with sync_playwright() as playwright:
        executable = chromium() or playwright.chromium.executable_path
        if not os.path.exists(executable):
            pytest.skip("the report's pages are tested with Chromium, of which none was found; set CHROMIUM")
        running = playwright.chromium.launch(executable_path=executable, args=switches.split())
        yield running
        running.close()


@pytest.fixture(scope="module")
def small_report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "report"
    return write_report(folder, facts(notes=["This run is unfinished."]), map(reading, range(200)), 200, text)


@pytest.fixture
def opened(browser):
    """Opens pages; at the end none may have failed, shown a dialog or asked for anything but its files."""
    troubles, contexts = [], []

    def open_page(index, hash_=""):
        place = browser.new_context(viewport={"width": 1400, "height": 900})
        contexts.append(place)
        page = place.new_page()
        page.set_default_timeout(15_000)
        home = index.parent.as_uri() + "/"
        page.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: troubles.append(str(e)))
        page.on("dialog", lambda d: (troubles.append(d.message), d.dismiss()))
        page.on("requestfailed", lambda r: troubles.append(r.url))
        page.on("request", lambda r: None if r.url.startswith((home, "data:,")) else troubles.append(r.url))
        page.goto(index.as_uri() + hash_)
        return page

    yield open_page
    for place in contexts:
        place.close()
    assert troubles == []


def rows(page):
    """Latents in sight, in order."""
    return [int(x) for x in page.locator("tr[data-latent]").evaluate_all("r => r.map(x => x.dataset.latent)")]


def wait_count(page, count):
    page.wait_for_function(
        "n => document.getElementById('count').textContent.startsWith(n + ' of')", arg=count
    )


def test_overview_shows_facts_comparison_and_counts(opened, small_report):
    page = opened(small_report)
    page.get_by_text("clearer than chance").first.wait_for()
    assert page.locator(".banner:visible").inner_text() == "This run is unfinished."
    assert page.locator(".tile b").all_inner_texts()[:3] == ["200", "180", "20"]
    assert page.locator("#view-overview h1").inner_text() == "quickstart <b>bold</b>"
    assert page.locator(".comparison tbody tr").count() == 2 and page.locator("figure svg").count() == 1
    page.get_by_text("dead: never fired").click()
    wait_count(page, "20")
    assert rows(page)[:3] == [3, 13, 23]
    page.locator(".bar").get_by_text("Method").click()
    page.get_by_text("1 − H(q) / H(p)").wait_for()


def searched(latent):
    given = reading(latent)
    lists = (given.input_tokens, given.previous_tokens, given.output_tokens)
    return {text(t.token) for some in lists for t in some[:3]}


def test_search_matches_number_parts_and_exact_tokens(opened, small_report):
    page = opened(small_report, "#latents")
    wait_count(page, "200")

    def found(query):
        page.fill("#query", query)
        return rows(page)

    by_latent = {i: searched(i) for i in range(200)}
    parts = [i for i, texts in by_latent.items() if any("word47" in t for t in texts)]
    exact = [i for i, texts in by_latent.items() if '" word47"' in texts]
    assert found("WORD47") == parts and found(" word47") == found('" word47"') == exact
    assert 0 < len(exact) < len(parts)
    assert found('" word47') == [i for i in parts if any(t.startswith('" word47') for t in by_latent[i])]
    assert found("172") == [i for i, texts in by_latent.items() if i == 172 or any("172" in t for t in texts)]
    assert found("alert") == found("needle") == found('"Needles"') == [4] and found('"needle"') == []
    assert found("no such token") == [] and page.get_by_text("No latent matches.").is_visible()
    assert page.locator("#count").inner_text() == "0 of 200 latents"


def test_sorting_reverses_and_keeps_the_dead_last(opened, small_report):
    page = opened(small_report, "#latents")
    wait_count(page, "200")
    head = page.locator("th", has=page.locator("[data-sort=clarity]"))
    alive = [i for i in range(200) if i % 10 != 3]
    rising = sorted(alive, key=lambda i: reading(i).summary.clarity)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending" and rows(page)[:10] == rising[:-11:-1]
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending" and rows(page)[:10] == rising[:10]
    assert page.locator("th[aria-sort]").count() == 1
    page.locator("#table").evaluate("t => t.scrollTop = t.scrollHeight")
    page.wait_for_selector("tr[data-latent='193']")
    assert rows(page)[-20:] == [i for i in range(200) if i % 10 == 3]


def test_filters_by_life_density_and_chance(opened, small_report):
    page = opened(small_report, "#latents")
    wait_count(page, "200")
    summaries = {i: reading(i).summary for i in range(200)}
    page.get_by_text("alive", exact=True).click()
    wait_count(page, "180")
    page.fill("#density", "0.3")
    wait_count(page, str(sum(s.density >= 0.003 for s in summaries.values())))
    page.fill("#density", "")
    page.check("#above")
    clear = [i for i, s in summaries.items() if s.firings >= 50 and s.clarity > 0.3]
    wait_count(page, str(len(clear)))
    assert rows(page)[:10] == clear[:10]
    page.locator("#filters").get_by_text("dead", exact=True).click()
    wait_count(page, "0")


def test_back_and_reload_keep_sort_search_and_scroll(opened, small_report):
    page = opened(small_report, "#latents")
    wait_count(page, "200")
    page.fill("#query", "word")
    page.locator("[data-sort=density]").click()
    before = page.locator("#count").inner_text()
    page.locator("#table").evaluate("t => t.scrollTop = 2000")
    page.wait_for_function("document.querySelector('tr[data-at=\"60\"]')")
    row = page.locator("tr[data-at='60']")
    latent = row.get_attribute("data-latent")
    row.locator("td").nth(2).click()
    page.get_by_role("heading", name=f"Latent {latent}", exact=True).wait_for()
    page.go_back()
    page.wait_for_selector(f"tr[data-at='60'][data-latent='{latent}']")
    assert page.locator("#table").evaluate("t => t.scrollTop") == 2000
    assert (page.locator("#count").inner_text(), page.input_value("#query")) == (before, "word")
    page.reload()
    page.wait_for_selector("tr[data-at='0']")
    assert page.locator("#count").inner_text() == before and page.input_value("#query") == "word"
    assert page.locator("th.c-density").get_attribute("aria-sort") == "descending"


def test_keyboard_moves_through_rows_and_opens_one(opened, small_report):
    page = opened(small_report, "#latents")
    wait_count(page, "200")
    page.locator("tr[data-at='0']").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowUp", "End"):
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.dataset.latent") == "199"
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Latent 199", exact=True).wait_for()
    assert page.evaluate("document.activeElement.tagName") == "H1"
    page.go_back()
    page.wait_for_function("document.activeElement.dataset.latent === '199'")
    page.locator("tr[data-latent='198'] a").click()
    page.get_by_role("heading", name="Latent 198", exact=True).wait_for()
    page.go_back()
    page.wait_for_selector("tr[data-latent='198']")


def test_latent_page_shows_its_evidence_beside_chance(opened, small_report):
    page = opened(small_report, "#latent/11")
    page.get_by_role("heading", name="Contexts").wait_for()
    given = reading(11)
    assert f"({given.summary.firings:,} of those seen)" in page.locator(".summary").inner_text()
    titles = ["Fires on", "Right before", "Raises", "Lowers", "Promoted", "Suppressed"]
    assert page.locator(".card h2").all_inner_texts() == titles
    shown = page.locator(".card").first.locator("tbody th").all_inner_texts()
    assert shown == [text(t.token) for t in given.input_tokens]
    assert page.locator(".card tfoot").all_inner_texts()[0].split() == ["random", "directions", "40.0", "%"]
    assert page.locator(".histogram rect").count() == 8 and page.locator(".contexts li").count() == 4
    peak = page.locator(".contexts .peak").first
    first = given.top_contexts[0]
    assert peak.text_content() == json.loads(text(first.tokens[first.peak]))
    assert peak.evaluate("e => getComputedStyle(e).textDecorationLine") == "underline"
    page.get_by_text("12 →").click()
    page.get_by_role("heading", name="Latent 12", exact=True).wait_for()


def test_ablation_stands_beside_a_random_direction(opened, small_report):
    page = opened(small_report, "#latent/11")
    page.get_by_text("Set to zero at its 6 strongest firings, the model").wait_for()
    promoted, suppressed = page.locator(".card tfoot").all_inner_texts()[-2:]
    assert promoted.split() == ["random", "directions", "0.125"]
    assert suppressed.split() == ["random", "directions", "\u22120.125"]


def test_dead_and_rare_latents_are_called_so(opened, small_report):
    page = opened(small_report, "#latent/13")
    page.get_by_text("Dead: never fired on the rows seen; only its direction is known.").wait_for()
    assert page.locator(".card h2").all_inner_texts() == ["Raises", "Lowers"]
    assert page.locator(".histogram").count() == 0
    page.evaluate("location.hash = 'latent/0'")
    page.get_by_text("It fired on 10 rows only").wait_for()


def test_jump_out_of_range_says_the_range(opened, small_report):
    page = opened(small_report, "#latent/7")
    for wanted in ("200", "-1", "a"):
        page.fill("[name=latent]", wanted)
        page.keyboard.press("Enter")
        page.get_by_text(f"There is no latent {wanted}: the numbers run from 0 to 199.").wait_for()
    page.fill("[name=latent]", "199")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Latent 199", exact=True).wait_for()
    page.evaluate("location.hash = 'latent/4096'")
    page.get_by_text("There is no latent 4096: the numbers run from 0 to 199.").wait_for()


@pytest.mark.parametrize("address", ["#latent", "#latent/", "#latent?x", "#latent/abc", "#latent/-1"])
def test_address_without_the_number_of_a_latent_says_the_range(opened, small_report, address):
    page = opened(small_report, address)
    wanted = address.partition("/")[2] or "without a number"
    page.get_by_text(f"There is no latent {wanted}: the numbers run from 0 to 199.").wait_for()
    assert "undefined" not in page.locator("body").inner_text() + page.title()


@pytest.mark.parametrize("query", ["min=abc", "min=", "min=1e", "min=0x10", "show=abc", "sort=abc", "min=%"])
def test_nonsense_in_the_address_of_the_table_is_left_out(opened, small_report, query):
    page = opened(small_report, f"#latents?{query}")
    wait_count(page, "200")
    assert page.input_value("#density") == "" and page.locator("[value=all]").is_checked()


def test_density_in_the_address_is_kept(opened, small_report):
    page = opened(small_report, "#latents?min=3e-1")
    wait_count(page, str(sum(reading(i).summary.density >= 0.003 for i in range(200))))
    assert page.input_value("#density") == "3e-1"


def test_report_of_a_dictionary_without_latents_to_show_is_whole(opened, tmp_path):
    given = facts(notes=["No language model is at hand, so latents could not be read."])
    page = opened(write_report(tmp_path / "report", given, [], 0, text))
    assert page.locator(".banner:visible").all_inner_texts() == given.notes
    assert page.locator(".facts dt").count() == 2 and page.locator(".comparison tbody tr").count() == 2
    assert page.locator("figure svg").count() == 1
    assert page.locator("nav a").all_inner_texts() == ["Overview", "Method"]
    assert page.locator("h2", has_text="atents").count() == 0
    for address in ("latents", "latents?min=abc", "latent/3", "latent"):
        page.evaluate("address => location.hash = address", address)
        page.wait_for_function("a => location.hash === '#' + a", arg=address)
        assert page.locator("#view-overview").is_visible() and "undefined" not in page.title()
    page.get_by_role("link", name="Method", exact=True).click()
    page.get_by_role("heading", name="Comparison").wait_for()
    assert page.locator("#view-method h2").all_inner_texts() == ["Comparison"]


def test_tokens_are_text_and_never_code(opened, small_report):
    page = opened(small_report, "#latent/4")
    page.get_by_role("heading", name="Contexts").wait_for()
    shown = page.locator(".card").first.locator("tbody th").all_text_contents()
    assert shown[:4] == [EVIL[0], EVIL[1], EVIL[2], EVIL[3]] and shown[4] == '"\\u202eright to left"'
    words = page.locator(".contexts li").first.locator(".word")
    assert words.all_text_contents() == [
        " needle", "<script>alert(1)</script>", "</script><img src=x onerror=alert(2)>", '"', "\\n",
        "\\u202eright to left", "\ufffd", "\ufffd", "\u05e9\u05dc\u05d5\u05dd",
    ]  # fmt: skip
    assert words.first.evaluate("e => getComputedStyle(e).unicodeBidi") == "isolate"
    assert page.locator("img").count() == 0 and page.locator("p.text").first.locator("script").count() == 0


def test_report_without_latents_and_one_with_a_missing_file(opened, browser, tmp_path):
    index = write_report(tmp_path / "none", facts(comparison=[], figures=[], model_loss={}), [], 5, text)
    page = opened(index)
    page.get_by_text("None of the 5 latents was read").wait_for()
    page.evaluate("location.hash = 'latents'")
    page.get_by_text("No latent matches.").wait_for()
    page.evaluate("location.hash = 'latent/2'")
    page.get_by_text("Latent 2 was not read for this report.").wait_for()
    index = write_report(tmp_path / "torn", facts(), [reading(0)], 1, text)
    (index.parent / "data" / "latents-00000.js").unlink()
    page = browser.new_page()
    page.goto(index.as_uri() + "#latent/0")
    page.get_by_text("data/latents-00000.js could not be read").wait_for()
    page.close()


@pytest.mark.slow
def test_sixteen_thousand_latents_stay_smooth(opened, tmp_path):
    n = 16_384
    plain = [reading(i, 0) for i in range(64)]
    many = (plain[i % 64]._replace(latent=i) for i in range(n))
    page = opened(write_report(tmp_path / "report", facts(), many, n, text), "#latents")
    wait_count(page, "16,384")

    def to_the_end():
        page.locator("[data-sort=clarity]").click()
        page.locator("#table").evaluate("t => t.scrollTop = t.scrollHeight")
        page.wait_for_selector(f"tr[data-at='{n - 1}']")

    def back():
        page.locator("#table").evaluate("t => t.scrollTop = 0")
        page.wait_for_selector("tr[data-at='0']")

    def search(words, count):
        page.fill("#query", words)
        wait_count(page, f"{count:,}")

    assert _least_seconds(to_the_end, back) < 1
    to_the_end()
    assert 10 < page.locator("tr").count() < 200
    assert reading(rows(page)[-1] % 64).summary.firings == 0
    assert _least_seconds(lambda: search("word", n - 256), lambda: search("", n)) < 1


def _least_seconds(act, undo):
    """Of four turns, an even number: another process may have the machine meanwhile."""
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        act()
        taken.append(time.perf_counter() - start)
        undo()
    return min(taken)
