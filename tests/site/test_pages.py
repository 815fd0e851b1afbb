"""The pages in process: what they show, what their forms do, and what they refuse."""

import ast
import contextlib
import html
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

import papertrial.papers
from papers_on_trial import PAPERS, write_papers
from papertrial.feed.ingest import ingest_scope
from papertrial.feed.records import Record
from papertrial.feed.runs import recorded_run
from papertrial.feed.store import Store
from papertrial.lab.claim import Claim, read_card
from papertrial.lab.statistics import Interval
from papertrial.lab.verdict import Judgement
from papertrial.site import upkeep
from papertrial.site.app import create_app
from papertrial.site.board import Board
from papertrial.site.pages import effect_plot, method_example
from papertrial.site.pages.serving import local
from papertrial.site.people import accounts
from papertrial.site.settings import Settings
from site_service import TODAY, Browser, Site, TestClient, records

PUBLIC = [
    "/",
    "/trending",
    f"/day/{TODAY}",
    f"/month/{TODAY:%Y-%m}",
    "/search",
    "/search?q=attention",
    "/search?verdict=upheld",
    "/verdicts",
    "/papers/sheep_upheld",
    "/papers/sheep_exact",
    "/papers/2601.00000",
    "/topics",
    "/topics/cs.CL",
    "/families/decoding",
    "/organisations",
    "/organisations/Example%20Lab",
    "/collections",
    "/about",
    "/sign-in",
    "/sign-in/sent",
]
OWN = ["/profile", "/tags", "/hidden", "/votes", "/recommendations", "/submit", "/collections"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One application for the module, over the small catalogue and four papers on trial."""
    root = write_papers(tmp_path_factory.mktemp("papers"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPERTRIAL_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("PAPERTRIAL_PAPERS", str(root))
        patch.setattr(papertrial.papers, "__path__", [str(root)])
        with Store.open() as store:
            store.upsert(records())
            ingest_scope(store)
        values = {"encoder": False, "fetch": False, "base_url": "http://testserver", "page_quota": 0}
        app = create_app(Settings.model_validate(values | {"page_quota_signed_in": 0}))
        with TestClient(app, raise_server_exceptions=False) as client:
            upkeep.wait_until_indexed(app.state.context, 30)
            yield Site(client, app.state.context)


@pytest.fixture(scope="module")
def reader(site: Site) -> Browser:
    return site.sign_in("reader@example.org")


@pytest.fixture(scope="module")
def admin(site: Site) -> Browser:
    browser = site.sign_in("boss@example.org")
    accounts.set_role(site.context.store, browser.reader.id, "admin")
    return browser


def post(browser: Browser, address: str, **fields: object) -> "object":
    """Send a form as a browser does: the CSRF token is a field, and the redirect is not followed."""
    data = {"csrf": browser.csrf, **fields}
    headers = {"X-CSRF-Token": ""}
    return browser.client.post(address, data=data, headers=headers, follow_redirects=False)


# -- every page -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", PUBLIC)
def test_a_page_has_landmarks_and_keeps_to_the_content_security_policy(site: Site, address: str) -> None:
    answer = site.client.get(address)
    assert answer.status_code == 200, answer.text[:500]
    check_page(answer.text)


@pytest.mark.parametrize("address", OWN)
def test_own_pages_ask_to_sign_in_and_then_show(site: Site, reader: Browser, address: str) -> None:
    if address != "/collections":
        refused = site.client.get(address)
        assert refused.status_code == 401
        assert f"/sign-in?next={address}" in refused.text
    answer = reader.client.get(address)
    assert answer.status_code == 200
    check_page(answer.text)


def check_page(text: str) -> None:
    for landmark in ("<header", "<nav", '<main id="main"', "<footer", '<html lang="en">', "<h1"):
        assert landmark in text
    assert text.count("<h1") == 1
    assert not re.search(r"<[^>]*\sstyle=|<style|<[^>]*\son[a-z]+=", text), "inline style or handler"
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", text))
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "an id is there twice"
    for target in re.findall(r'<label[^>]* for="([^"]+)"', text):
        assert target in ids, f"a label for {target}, which is not there"


def test_public_pages_are_revalidated_by_their_etag(site: Site, reader: Browser) -> None:
    first = site.client.get("/verdicts")
    again = site.client.get("/verdicts", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304
    assert not again.content
    assert "public" in first.headers["cache-control"]
    assert "Cookie" in first.headers["vary"]
    mine = reader.client.get("/verdicts")
    assert "public" not in mine.headers["cache-control"]
    assert "etag" not in mine.headers


@pytest.mark.parametrize(
    "address", ["/day/2025-13-01", "/week/2025-10-03", "/month/tomorrow", "/families/no", "/papers/x"]
)
def test_what_is_not_there_is_a_page_that_says_so(site: Site, address: str) -> None:
    answer = site.client.get(address)
    assert answer.status_code == 404
    check_page(answer.text)


@pytest.mark.parametrize(
    ("address", "field"),
    [
        ("/search?family=cheese", "family"),
        ("/search?verdict=guilty", "verdict"),
        ("/search?since=yesterday", "since"),
        ("/search?q=a&since=2026-02-01&until=2026-01-31", "until"),
        ("/verdicts?sort=weight", "sort"),
        ("/verdicts?state=liquid", "state"),
        ("/?p=-1", "p"),
    ],
)
def test_a_bad_parameter_is_named(site: Site, address: str, field: str) -> None:
    answer = site.client.get(address)
    assert answer.status_code == 400
    assert f"{field}:" in answer.headers["x-error-message"]


def test_what_is_typed_is_never_markup(site: Site) -> None:
    attack = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    for address in ("/search", "/verdicts"):
        text = site.client.get(address, params={"q": attack}).text
        assert "<script>alert" not in text
        assert "<img src=x" not in text
        assert html.escape("<script>alert(1)") in text
    assert "<script>alert" not in site.client.get("/sign-in", params={"next": f"/{attack}"}).text


def test_lists_cost_the_same_number_of_queries_however_long_they_are(site: Site, reader: Browser) -> None:
    store = site.context.store
    extra = [Record(source="page", title=f"Filler number {i} on a day of its own", entered=TODAY) for i in range(24)]

    def queries() -> int:
        count = 0

        def one(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            nonlocal count
            at_a_job = threading.current_thread().name.startswith("papertrial-jobs")
            count += statement.startswith("SELECT") and not at_a_job

        site.context.cache.clear()  # what an earlier visit left there would save a query
        sa.event.listen(store.engine, "before_cursor_execute", one)
        try:
            assert reader.client.get(f"/day/{TODAY}").status_code == 200
        finally:
            sa.event.remove(store.engine, "before_cursor_execute", one)
        return count

    before = queries()
    store.upsert(extra)
    assert reader.client.get(f"/day/{TODAY}").text.count('<article class="row"') >= 24
    assert queries() == before
    assert before <= 15


# -- feed and search --------------------------------------------------------------------------------------------------


def titles(text: str) -> list[str]:
    found = re.findall(r'<article class="row".*?<h[23]><a href="[^"]+">(.*?)</a>', text, re.DOTALL)
    return [html.unescape(title) for title in found]


def test_a_day_lists_its_papers_by_votes_and_leads_to_its_neighbours(site: Site) -> None:
    answer = site.client.get(f"/day/{records()[0].entered}")
    ours = [title for title in titles(answer.text) if title.startswith("Paper number")]
    assert ours == ["Paper number 1 about speculative decoding", "Paper number 0 about sparse attention"]
    earlier = re.search(r'rel="prev" href="(/day/[^"]+)"', answer.text)
    assert earlier is not None
    back = site.client.get(earlier[1])
    assert "Paper number 3 about quantization" in titles(back.text)
    assert f'rel="next" href="/day/{TODAY}"' in back.text


def test_the_addresses_of_the_hugging_face_site_lead_to_ours(site: Site) -> None:
    for theirs, ours in (("date/2025-10-03", "/day/2025-10-03"), ("week/2025-W40", "/week/2025-W40")):
        answer = site.client.get(f"/papers/{theirs}", follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, ours)


def test_search_finds_by_words_and_narrows_by_verdict_family_and_date(site: Site) -> None:
    assert titles(site.client.get("/search?q=quantization").text)[0] == "Paper number 3 about quantization"
    sheep = set(titles(site.client.get("/search?q=counting+sheep").text))
    assert len(sheep) >= 4
    upheld = titles(site.client.get("/search?q=counting+sheep&verdict=upheld").text)
    assert set(upheld) == {"Counting sheep before sleep is upheld", "Counting sheep before sleep is exact"}
    assert titles(site.client.get("/search?q=counting+sheep&verdict=upheld&family=decoding").text) == [
        "Counting sheep before sleep is upheld"
    ]
    assert titles(site.client.get("/search?verdict=contradicted").text) == [
        "Counting sheep before sleep is contradicted"
    ]
    assert titles(site.client.get("/search?q=counting+sheep&since=2025-01-01&family=decoding").text) == []


# -- verdicts ---------------------------------------------------------------------------------------------------------


def board(site: Site, query: str = "") -> list[str]:
    found = re.findall(
        r'<a class="title" href="[^"]+">Counting sheep before sleep is (\w+)</a>',
        site.client.get(f"/verdicts{query}").text,
    )
    return list(found)


def test_the_board_sorts_and_filters_by_its_address(site: Site) -> None:
    assert board(site) == ["exact", "upheld", "contradicted", "undecided"]
    assert board(site, "?sort=title&descending=true") == ["upheld", "undecided", "exact", "contradicted"]
    by_effect = board(site, "?sort=effect&descending=true")
    assert by_effect.index("upheld") < by_effect.index("undecided") < by_effect.index("contradicted")
    assert board(site, "?verdict=contradicted") == ["contradicted"]
    assert set(board(site, "?family=attention")) == {"undecided", "exact"}
    assert board(site, "?state=fresh&q=UPHELD") == ["upheld"]
    assert board(site, "?q=cheese") == []


def test_a_verdict_is_never_shown_without_its_scale(site: Site) -> None:
    for address in ("/verdicts", "/papers/sheep_upheld", "/", "/search?q=sheep"):
        badges = re.findall(r'<span class="badge (?!none)[^"]*">.*?</span>', site.client.get(address).text, re.DOTALL)
        assert badges
        assert all(" at small" in re.sub(r"<[^>]+>", "", badge) for badge in badges)


def test_the_paper_page_puts_the_claim_beside_the_evidence(site: Site) -> None:
    text = site.client.get("/papers/sheep_upheld").text
    entry = site.context.board.snapshot.entries["sheep_upheld"]
    judged = entry.headline
    assert judged is not None
    assert judged.effect is not None
    assert "A model that counts &lt;b&gt;sheep&lt;/b&gt; stays awake longer" in text
    assert f"{judged.effect.mean:+.4g} [{judged.effect.low:+.4g}, {judged.effect.high:+.4g}] min" in text
    plot = re.search(r'<svg class="plot full upheld".*?</svg>', text, re.DOTALL)
    assert plot is not None
    assert plot[0].count('class="seed"') == 5 * 2, "five seeds against the baseline, five against the control"
    assert "papertrial run sheep_upheld --scale small --seeds 5" in text
    assert "from papertrial.papers.decoding.sheep_upheld.method import count_sheep" in text
    assert "sheep = count_sheep(model, most=3)\n" in text
    assert "doctest" not in text
    assert "Real sheep are out of reach" in text
    assert "The flock behaves as the evidence says." in text
    for value in entry.standing.evidence["small"].values("sheep", "minutes_awake"):
        assert f"{value:.4g}" in text
    assert "1, &lt;i&gt;2&lt;/i&gt;" in text


def test_figures_are_drawn_once_and_kept_for_ever(site: Site) -> None:
    text = site.client.get("/papers/sheep_upheld").text
    figures = re.findall(r'<img src="(/figures/[^"]+)" width="\d+" height="\d+" alt="[^"]+" loading="lazy">', text)
    assert [Path(address).stem for address in figures] == ["arms-0", "figures-0", "curves-0"]
    narrow = re.findall(r'<source media="[^"]+" srcset="(/figures/[^"]+)"', text)
    assert narrow == [address.replace(".svg", "-narrow.svg") for address in figures]
    for address in figures + narrow:
        answer = site.client.get(address)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("image/svg+xml")
        assert "immutable" in answer.headers["cache-control"]
        assert "script" not in answer.headers["content-security-policy"]
        assert "prefers-color-scheme:dark" in answer.text
    kept = list((site.context.settings.folder / "figures").glob("sheep_upheld-small-*/*.svg"))
    assert len(kept) == 6
    stamp = kept[0].stat().st_mtime_ns
    site.client.get(figures[0])
    assert kept[0].stat().st_mtime_ns == stamp
    digest = figures[0].split("/")[4]
    for wrong in (
        figures[0].replace(digest, "0" * 20),
        figures[0].replace("arms-0", "arms-9"),
        figures[0].replace("small", "gpu"),
    ):
        assert site.client.get(wrong).status_code == 404


def test_the_declared_size_of_a_figure_is_the_one_it_was_drawn_at(site: Site) -> None:
    text = site.client.get("/papers/sheep_upheld").text
    declared = re.findall(
        r'<(?:img src|source media="[^"]+" srcset)="(/figures/[^"]+)" width="(\d+)" height="(\d+)"', text
    )
    assert len(declared) == 6
    for address, width, height in declared:
        drawn = re.search(r'<svg[^>]* width="([\d.]+)pt"', site.client.get(address).text)
        tall = re.search(r'<svg[^>]* height="([\d.]+)pt"', site.client.get(address).text)
        assert drawn is not None
        assert tall is not None
        assert float(drawn[1]) / float(tall[1]) == pytest.approx(int(width) / int(height), rel=0.01)  # whole pixels


def claim(**changes: object) -> Claim:
    values: dict[str, object] = {
        "statement": "The method is better than its baseline.",
        "baseline": "before",
        "method": "after",
        "metric": "score",
        "unit": "%",
        "margin": 2.0,
        "margin_reason": "it is a round number",
        "paper_figure": "unknown",
    }
    return Claim.model_validate(values | changes)


def position(plot: str, kind: str, attribute: str) -> list[float]:
    found = re.findall(rf'class="{kind}"[^>]* {attribute}="([\d.]+)%', plot)
    return [float(value) for value in found]


def test_the_plot_places_seeds_interval_and_margin_on_one_scale() -> None:
    judged = Judgement(claim(), "small", "upheld", "", (4.0, 6.0, 8.0), Interval(6.0, 1.0, 11.0, 3))
    plot = str(effect_plot.mini(judged))
    zero, margin = position(plot, "zero", "x1")[0], position(plot, "margin", "x1")[0]
    per_unit = (margin - zero) / 2.0  # the margin is 2 and zero is 0
    assert position(plot, "seed", "cx") == pytest.approx([zero + per_unit * v for v in (4, 6, 8)], abs=0.02)
    assert position(plot, "interval", "x1") == pytest.approx([zero + per_unit], abs=0.02)
    assert position(plot, "interval", "x2") == pytest.approx([zero + 11 * per_unit], abs=0.02)
    zone = re.search(r'class="zone" x="([\d.]+)%" y="0" width="([\d.]+)%"', plot)
    assert zone is not None
    assert float(zone[1]) == margin
    assert float(zone[1]) + float(zone[2]) == pytest.approx(100, abs=0.02)


def test_a_claim_of_no_loss_may_lie_below_zero_and_one_of_exactness_between_two_bounds() -> None:
    no_worse = Judgement(claim(kind="no_worse"), "small", "upheld", "", (-1.0, 0.5, 1.0), Interval(0.2, -1.5, 1.9, 3))
    plot = str(effect_plot.mini(no_worse))
    assert position(plot, "margin", "x1")[0] < position(plot, "zero", "x1")[0]
    exact = claim(kind="exact", margin=0.0, tolerance=0.5)
    plot = str(effect_plot.mini(Judgement(exact, "small", "upheld", "", (0.0, 0.1, -0.1), Interval(0, -0.2, 0.2, 3))))
    assert len(position(plot, "margin", "x1")) == 2
    assert position(plot, "interval", "x1") == [], "exactness is judged by its worst seed, not by an interval"


def test_a_single_seed_and_equal_seeds_can_be_drawn() -> None:
    one = Judgement(claim(), "small", "undecided", "", (3.0,), Interval(3.0, float("-inf"), float("inf"), 1))
    assert 'x1="0%" x2="100%"' in str(effect_plot.mini(one))
    same = Judgement(claim(margin=0.0), "small", "undecided", "", (0.0, 0.0, 0.0), Interval(0.0, 0.0, 0.0, 3))
    assert position(str(effect_plot.mini(same)), "seed", "cx") == [50.0] * 3
    assert effect_plot.mini(None) == ""


@pytest.mark.parametrize("span", [(0.0, 1.0), (-3.2, 17.0), (1e-9, 3e-9), (-4e7, 9e8)])
def test_ticks_are_few_and_lie_on_the_scale(span: tuple[float, float]) -> None:
    scale = effect_plot.Scale(*span)
    ticks = scale.ticks()
    assert 3 <= len(ticks) <= 10
    assert all(scale.low <= tick <= scale.high for tick in ticks)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            '"""One.\n\n>>> f(1)  # doctest: +SKIP\n... # more\n2\n"""\ndef f(x): ...',
            "from {m} import f\n\nf(1)\n# more",
        ),
        (
            '"""Prose that is no code.\n\nworld = g(3)\nworld.turn()\n"""\nfrom {p} import g\n',
            "from {m} import g\n\nworld = g(3)\nworld.turn()",
        ),
        ('"""Nothing."""\ndef f(x: int) -> str: ...\ndef _g(): ...', "from {m} import f\n\n# f(x: int) -> str"),
        ('"""Nothing."""\nclass A:\n    """It.\n\n    >>> A().run()\n    """', "from {m} import A\n\nA().run()"),
        ("x = 1", None),
        ("def broken(:", None),
    ],
)  # fmt: skip
def test_the_example_of_a_method_is_read_and_not_run(tmp_path: Path, source: str, expected: str | None) -> None:
    root = write_papers(tmp_path)
    folder = root / "decoding" / "sheep_upheld"
    module = "papertrial.papers.decoding.sheep_upheld.method"
    trap = "\nraise SystemExit('the method was imported')\n"
    (folder / "method.py").write_text(source.replace("{p}", f"{module}.parts") + trap)
    found = method_example.example(read_card(folder))
    assert found == (None if expected is None else expected.replace("{m}", module))
    if found:
        ast.parse(found)


def test_an_example_names_what_its_reader_brings_along_and_imports_the_rest(tmp_path: Path) -> None:
    code = "out = {name: f(model, x) for name, x in inputs}\nwith f(g) as h:\n    print(h, out, torch.ones(1))"
    assert method_example.given_names(f"import os\n{code}") == ["f", "model", "inputs", "g", "torch"]
    assert method_example.given_names("no python (") == []
    folder = write_papers(tmp_path) / "decoding" / "sheep_upheld"
    names = [f"a_rather_long_name_{i}" for i in range(4)]
    calls = "".join(f">>> {name}(torch)\n" for name in names)
    (folder / "method.py").write_text(f'"""One.\n\n{calls}"""\n' + "".join(f"def {n}(x): ...\n" for n in names))
    found = method_example.example(read_card(folder))
    assert found is not None
    assert found.startswith("import torch\nfrom papertrial.papers.decoding.sheep_upheld.method import (\n    a_rather")
    assert method_example.given_names(found) == []


def test_a_paper_that_is_not_on_trial_offers_nothing_to_run(site: Site) -> None:
    folder = site.context.board.snapshot.entries["sheep_undecided"].card.folder
    away = {path: path.read_text() for path in (folder / "experiment.py", folder / "method.py")}
    for path in away:
        path.unlink()
    try:
        site.context.board.refresh()
        site.context.pages.clear()
        text = site.client.get("/papers/sheep_undecided").text
        about = site.client.get("/about").text
    finally:
        for path, source in away.items():
            path.write_text(source)
        site.context.board.refresh()
        site.context.pages.clear()
    assert "papertrial run" not in text
    assert 'href="#use"' not in text
    check_page(text)
    assert "4 papers in scope, 3 of them on trial" in text
    assert "The methods of 3 are implemented so far" in about


def test_every_kind_of_verdict_is_among_the_papers_that_tests_show(site: Site) -> None:
    words = {slug: site.context.board.snapshot.entries[slug].headline.word for slug in PAPERS}  # type: ignore[union-attr]
    assert words == {
        f"sheep_{word}": ("upheld" if word == "exact" else word)
        for word in ("upheld", "contradicted", "undecided", "exact")
    }
    assert {entry.standing.state for entry in site.context.board.snapshot} == {"fresh"}


# -- signing in -------------------------------------------------------------------------------------------------------


def letter_link(site: Site, address: str) -> str:
    newest = max((site.context.settings.folder / "outbox").glob("*.eml"))
    text = newest.read_text()
    assert f"To: {address}" in text
    found = re.search(r"http://testserver(/sign-in/[\w-]+)", text)
    assert found is not None
    return found[1]


def test_a_link_from_the_letter_signs_in_once_and_leads_back(site: Site) -> None:
    client = TestClient(site.client.app, raise_server_exceptions=False)
    asked = client.post("/sign-in", data={"email": " New@Example.org ", "next": "/verdicts"}, follow_redirects=False)
    assert (asked.status_code, asked.headers["location"]) == (303, "/sign-in/sent")
    link = letter_link(site, "new@example.org")
    for _ in range(2):  # looking at it, as mail scanners do, does not use it up
        shown = client.get(link)
        assert shown.status_code == 200
        assert shown.headers["referrer-policy"] == "no-referrer"
    assert client.get("/profile").status_code == 401
    signed = client.post(link, follow_redirects=False)
    assert (signed.status_code, signed.headers["location"]) == (303, "/verdicts")
    assert "httponly" in signed.headers["set-cookie"].lower()
    assert "new@example.org" in client.get("/profile").text
    other = TestClient(site.client.app, raise_server_exceptions=False)
    assert other.post(link).status_code == 403
    assert other.get(link).status_code == 403
    csrf = re.search(r'name="csrf" value="([^"]+)"', client.get("/profile").text)
    assert csrf is not None
    assert client.post("/sign-out", data={"csrf": csrf[1]}, follow_redirects=False).status_code == 303
    assert client.get("/profile").status_code == 401


def test_what_cannot_be_an_address_comes_back_with_the_reason(site: Site) -> None:
    answer = site.client.post("/sign-in", data={"email": "nobody at all"})
    assert answer.status_code == 422
    assert 'value="nobody at all"' in answer.text
    assert 'aria-describedby="email-problem"' in answer.text
    check_page(answer.text)


def test_another_site_cannot_ask_for_links(site: Site) -> None:
    answer = site.client.post("/sign-in", data={"email": "a@example.org"}, headers={"Origin": "https://evil.example"})
    assert answer.status_code == 403


@pytest.mark.parametrize(
    "address", ["https://evil.example", "//evil.example", "/\\evil.example", "javascript:alert(1)", "", None, "/a\nb"]
)
def test_forms_never_lead_to_another_site(address: str | None) -> None:
    assert local(address, "/home") == "/home"
    assert local("/papers/x?q=1#c") == "/papers/x?q=1#c"


# -- what readers do --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "/papers/2601.00003/vote", "/papers/2601.00003/comments", "/papers/2601.00003/tags", "/papers/2601.00003/untag",
        "/hidden", "/hidden/show", "/collections", "/collections/add", "/comments/1/edit", "/comments/1/remove",
        "/profile", "/profile/tokens", "/profile/tokens/1/revoke", "/profile/delete", "/sign-out", "/submit",
        "/people/reader/x/change", "/people/reader/x/delete", "/people/reader/x/note", "/people/reader/x/up",
        "/people/reader/x/remove", "/admin/accounts/1",
    ],
)  # fmt: skip
def test_no_form_is_taken_without_its_token(site: Site, admin: Browser, address: str) -> None:
    fields = {
        "value": "1",
        "body": "x",
        "name": "x",
        "paper": "2601.00003",
        "collection": "x",
        "title": "x",
        "role": "reader",
    }
    assert site.client.post(address, data=fields).status_code == 401
    for forged in ("", "x" * 80):
        answer = post(admin, address, **(fields | {"csrf": forged}))
        assert answer.status_code == 403, answer.text[:200]


def test_a_vote_counts_once_and_can_be_taken_back(site: Site, reader: Browser) -> None:
    def shown() -> tuple[str, str]:
        text = reader.client.get("/papers/2601.00003").text
        found = re.search(r'<button aria-pressed="(\w+)"[^>]*>.*?<span>(\d+)</span>', text, re.DOTALL)
        assert found is not None
        return found[1], found[2]

    assert shown() == ("false", "3")
    for _ in range(2):
        answer = post(reader, "/papers/2601.00003/vote", value=1, back="/papers/2601.00003")
        assert (answer.status_code, answer.headers["location"]) == (303, "/papers/2601.00003")
        assert shown() == ("true", "4")
    assert (
        post(reader, "/papers/2601.00003/vote", value=0, back="//evil.example").headers["location"]
        == "/papers/2601.00003"
    )
    assert shown() == ("false", "3")
    assert post(reader, "/papers/2601.00003/vote", value=7).status_code == 422


def test_comments_are_shown_without_their_scripts_and_bad_ones_come_back(site: Site, reader: Browser) -> None:
    said = "**Strong** <script>alert(1)</script> [x](javascript:alert(1))"
    answer = post(reader, "/papers/2601.00004/comments", body=said)
    assert answer.status_code == 303
    number = re.search(r"#comment-(\d+)$", answer.headers["location"])
    assert number is not None
    text = reader.client.get("/papers/2601.00004").text
    assert "<strong>Strong</strong>" in text
    assert "<script>alert" not in text
    assert 'href="javascript:' not in text
    refused = post(reader, "/papers/2601.00004/comments", body="much " * 1200)
    assert refused.status_code == 422
    assert "much much" in refused.text
    assert 'aria-describedby="comment-problem"' in refused.text
    check_page(refused.text)
    reply = post(reader, "/papers/2601.00004/comments", body="And a reply", parent=number[1])
    assert reply.status_code == 303
    assert post(reader, f"/comments/{number[1]}/edit", body="Changed", back="/papers/2601.00004").status_code == 303
    text = reader.client.get("/papers/2601.00004").text
    assert "Changed" in text
    assert 'class="comment reply"' in text
    stranger = site.sign_in("stranger@example.org")
    assert post(stranger, f"/comments/{number[1]}/remove").status_code == 403
    assert post(reader, f"/comments/{number[1]}/remove", back="/papers/2601.00004").status_code == 303
    text = reader.client.get("/papers/2601.00004").text
    assert "Changed" not in text
    assert "This comment was removed." in text
    assert "And a reply" in text


def test_tags_lead_to_recommendations_that_say_which_words_speak_for_them(site: Site) -> None:
    browser = site.sign_in("tagger@example.org")
    for name in ("2601.00000", "2601.00001"):
        assert post(browser, f"/papers/{name}/tags", name="  to   read ", back=f"/papers/{name}").status_code == 303
    text = browser.client.get("/tags/to%20read").text
    assert set(titles(text)) == {"Paper number 0 about sparse attention", "Paper number 1 about speculative decoding"}
    text = browser.client.get("/recommendations").text
    assert "Learned from 2 papers" in text
    found = titles(text)
    assert found
    assert not set(found) & {"Paper number 0 about sparse attention", "Paper number 1 about speculative decoding"}
    assert re.search(r'class="because">Because of <b>[\w -]+</b>', text)
    assert post(browser, "/papers/2601.00000/untag", name="to read").status_code == 303
    assert titles(browser.client.get("/tags/to%20read").text) == ["Paper number 1 about speculative decoding"]
    assert post(browser, "/papers/2601.00000/tags", name=" ").status_code == 422
    assert post(browser, "/papers/2601.00000/tags", name="x" * 41).status_code == 422


def test_hidden_papers_leave_the_lists_and_come_back(site: Site) -> None:
    browser = site.sign_in("hider@example.org")
    day = f"/day/{records()[0].entered}"
    before = titles(browser.client.get(day).text)
    assert "Paper number 0 about sparse attention" in before
    assert post(browser, "/hidden", paper=["2601.00000", "2601.00001"], back=day).headers["location"] == day
    assert set(before) - set(titles(browser.client.get(day).text)) >= {
        "Paper number 0 about sparse attention",
        "Paper number 1 about speculative decoding",
    }
    assert len(titles(browser.client.get("/hidden").text)) == 2
    assert post(browser, "/hidden/show", paper="2601.00000").status_code == 303
    assert titles(browser.client.get("/hidden").text) == ["Paper number 1 about speculative decoding"]
    assert post(browser, "/hidden/show").status_code == 303
    assert titles(browser.client.get(day).text) == before


def test_a_collection_is_filled_ordered_published_and_deleted(site: Site) -> None:
    browser = site.sign_in("curator@example.org")
    made = post(browser, "/collections", title="Good <i>ones</i>", note="A note", paper="2601.00000")
    address = made.headers["location"]
    slug = address.rsplit("/", 1)[1]
    for name in ("2601.00001", "2601.00002"):
        assert post(browser, "/collections/add", paper=name, collection=slug, note=f"why {name}").status_code == 303
    order = titles(browser.client.get(address).text)
    assert [title.split()[2] for title in order] == ["0", "1", "2"]
    assert post(browser, f"{address}/up", paper="2601.00002").status_code == 303
    assert [title.split()[2] for title in titles(browser.client.get(address).text)] == ["0", "2", "1"]
    assert post(browser, f"{address}/remove", paper="2601.00000").status_code == 303
    assert post(browser, f"{address}/note", paper="2601.00001", note="<b>new</b> reason").status_code == 303
    text = browser.client.get(address).text
    check_page(text)
    assert "&lt;b&gt;new&lt;/b&gt; reason" in text
    assert "Good &lt;i&gt;ones&lt;/i&gt;" in text
    assert site.client.get(address).status_code == 404, "private"
    assert browser.client.get(f"{address}/change").status_code == 200
    assert post(browser, f"{address}/change", title="Good ones", note="", public="true").status_code == 303
    assert "Good ones" in site.client.get(address).text
    assert "Good ones" in site.client.get(f"/people/{browser.reader.name}").text
    stranger = site.sign_in("stranger@example.org")
    for action in ("change", "delete", "up", "remove", "note"):
        assert post(stranger, f"{address}/{action}", title="Mine", paper="2601.00001").status_code == 403
    assert post(browser, f"{address}/delete").status_code == 303
    assert browser.client.get(address).status_code == 404


def test_a_token_is_shown_once_works_and_is_revoked(site: Site) -> None:
    browser = site.sign_in("programmer@example.org")
    made = post(browser, "/profile/tokens", name="My laptop", scope="read")
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    secret = re.search(r"pt_[\w-]+", made.text)
    assert secret is not None
    text = browser.client.get("/profile").text
    assert "My laptop" in text
    assert secret[0] not in text
    headers = {"Authorization": f"Bearer {secret[0]}"}
    assert site.client.get("/api/whoami-v2", headers=headers).json()["name"] == browser.reader.name
    assert site.client.post("/papers/2601.00003/vote", data={"value": 1}, headers=headers).status_code == 403, (
        "read only"
    )
    number = re.search(r"/profile/tokens/(\d+)/revoke", text)
    assert number is not None
    assert post(browser, f"/profile/tokens/{number[1]}/revoke").status_code == 303
    assert site.client.get("/api/whoami-v2", headers=headers).status_code == 401
    wrong = post(browser, "/profile/tokens", name=" ")
    assert wrong.status_code == 422
    check_page(wrong.text)


def test_the_profile_changes_and_says_which_name_cannot_be(site: Site) -> None:
    site.sign_in("taken@example.org")
    browser = site.sign_in("namer@example.org")
    assert post(browser, "/profile", name="new-name", full_name="Ada <L>").headers["location"] == "/profile?saved=1"
    text = browser.client.get("/profile").text
    assert 'value="new-name"' in text
    assert "Ada &lt;L&gt;" in text
    for name, status in (("Ärger", 422), ("taken", 409)):
        refused = post(browser, "/profile", name=name, full_name="")
        assert refused.status_code == status
        assert 'id="name-problem"' in refused.text


def test_an_account_is_deleted_only_with_its_name_typed(site: Site) -> None:
    browser = site.sign_in("leaver@example.org")
    assert post(browser, "/profile/delete", sure="yes").status_code == 422
    assert browser.client.get("/profile").status_code == 200
    assert post(browser, "/profile/delete", sure=browser.reader.name).status_code == 303
    assert browser.client.get("/profile").status_code == 401


def test_a_paper_is_submitted_by_id_or_refused_with_the_reason(site: Site, reader: Browser) -> None:
    known = post(reader, "/submit", url="https://arxiv.org/abs/2601.00005v2")
    assert (known.status_code, known.headers["location"]) == (303, "/papers/2601.00005")
    unknown = post(reader, "/submit", url="2601.12345")  # this service asks nobody: it says so, and takes nothing
    assert unknown.status_code == 503
    assert "does not ask arXiv" in unknown.text
    check_page(unknown.text)
    assert "2601.12345" not in reader.client.get("/submit").text
    for url in ("http://127.0.0.1/2601.12345", "<script>", ""):
        refused = post(reader, "/submit", url=url)
        assert refused.status_code == 422
        assert 'id="url-problem"' in refused.text
        check_page(refused.text)


def test_the_administrator_sees_runs_with_their_errors_and_sets_roles(
    site: Site, reader: Browser, admin: Browser
) -> None:
    with contextlib.suppress(RuntimeError), recorded_run(site.context.store, "arxiv: cs.CL") as report:
        report.added = 7
        report.problems += ["page 3: <b>unreadable</b>"]
        raise RuntimeError("arXiv has gone away")
    assert site.client.get("/admin").status_code == 401
    assert reader.client.get("/admin").status_code == 403
    text = admin.client.get("/admin").text
    check_page(text)
    assert "RuntimeError: arXiv has gone away" in text
    assert "page 3: &lt;b&gt;unreadable&lt;/b&gt;" in text
    victim = site.sign_in("spammer@example.org")
    assert post(reader, f"/admin/accounts/{victim.reader.id}", role="admin").status_code == 403
    assert "spammer" in admin.client.get("/admin?q=SPAMMER").text
    assert "reader@example.org" not in admin.client.get("/admin?q=SPAMMER").text
    assert post(admin, f"/admin/accounts/{victim.reader.id}", role="blocked").status_code == 303
    assert victim.client.get("/profile").status_code == 401
    assert post(admin, f"/admin/accounts/{admin.reader.id}", role="king").status_code == 422


def test_pages_are_light(site: Site) -> None:
    static = sum(len(site.client.get(f"/static/{name}").content) for name in ("style.css", "pages.js", "icon.svg"))
    for address in PUBLIC:
        assert len(site.client.get(address).content) + static < 100_000


def test_evidence_at_another_scale_has_an_address(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest scale is shown; smaller ones are a click away, each with its own verdict."""
    root = write_papers(tmp_path)
    folder = root / "decoding" / "sheep_upheld"
    small = (folder / "evidence" / "small.json").read_text()
    lost = (root / "decoding" / "sheep_contradicted" / "evidence" / "small.json").read_text()
    gpu = lost.replace('"sheep_contradicted"', '"sheep_upheld"').replace('"scale": "small"', '"scale": "gpu"')
    assert gpu.count('"gpu"') == 1, "the scale is written once"
    (folder / "evidence" / "gpu.json").write_text(gpu)
    monkeypatch.setattr(papertrial.papers, "__path__", [str(root)])
    board = site.context.board
    monkeypatch.setattr(site.context, "board", Board())
    site.context.pages.clear()
    try:
        largest = site.client.get("/papers/sheep_upheld").text
        assert re.search(r'<p class="word"><span class="badge contradicted">.*?</b> at gpu', largest, re.DOTALL)
        other = re.search(r'<a href="([^"]+\?scale=small)#trial"', largest)
        assert other is not None
        text = site.client.get(other[1]).text
        assert re.search(r'<p class="word"><span class="badge upheld">.*?</b> at small', text, re.DOTALL)
        assert "papertrial run sheep_upheld --scale small" in text
        assert "/figures/sheep_upheld/small/" in text
        assert small != gpu
        missing = site.client.get("/papers/sheep_upheld?scale=paper")
        assert missing.status_code == 404
        assert "scale" in missing.text
    finally:
        monkeypatch.setattr(site.context, "board", board)
        site.context.pages.clear()
