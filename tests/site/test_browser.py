"""The service as readers use it, in Chromium: reading, searching, the board, figures, at desktop and phone widths."""

import re

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from site_browser import DESKTOP, PHONE, SMALLEST, Reading, overflow
from site_service import TODAY

EVERY_PUBLIC_PAGE = (
    "/",
    "/trending",
    f"/day/{TODAY}",
    f"/week/{TODAY:%G-W%V}",
    f"/month/{TODAY:%Y-%m}",
    "/search?q=sheep",
    "/verdicts",
    "/papers/sheep_upheld",
    "/papers/2601.00000",
    "/topics",
    "/topics/cs.CL",
    "/families/decoding",
    "/organisations",
    "/collections",
    "/about",
    "/sign-in",
    "/subscriptions",
    "/papers/9999.99999",
)
BOTH = pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])


@pytest.fixture(scope="module")
def window(reading: Reading) -> BrowserContext:
    return reading.open()


@pytest.fixture
def page(window: BrowserContext) -> Page:
    opened = window.new_page()
    yield opened
    opened.close()


# -- layout -----------------------------------------------------------------------------------------------------------


def test_no_page_is_wider_than_its_window(page: Page) -> None:
    for address in EVERY_PUBLIC_PAGE:
        page.goto(address)
        for viewport in (SMALLEST, PHONE, {"width": 768, "height": 1024}, DESKTOP):
            page.set_viewport_size(viewport)
            assert overflow(page) <= 0, (address, viewport)


def test_every_page_is_under_100_kb_with_all_it_loads(reading: Reading) -> None:
    """What comes over the wire on a first visit, with styles, script and pictures, as the browser counts it."""
    heavy = {}
    for address in EVERY_PUBLIC_PAGE:
        window = reading.open()  # a new window has an empty cache
        page = window.new_page()
        session = window.new_cdp_session(page)
        session.send("Network.enable")
        sizes: list[float] = []
        session.on("Network.loadingFinished", lambda event, sizes=sizes: sizes.append(event["encodedDataLength"]))
        page.goto(address, wait_until="networkidle" if address.startswith("/papers/") else "load")
        assert len(sizes) >= 3, "the page, its styles and its script at least"
        if sum(sizes) >= 100_000:
            heavy[address] = sum(sizes)
        window.close()
    assert not heavy


# -- reading ----------------------------------------------------------------------------------------------------------


@BOTH
def test_from_the_front_page_to_the_evidence_of_a_paper(reading: Reading, viewport: dict[str, int]) -> None:
    page = reading.open(viewport=viewport).new_page()
    page.goto("/")
    expect(page.get_by_role("heading", level=1)).to_have_text("Does the claim hold?")
    page.get_by_role("region", name="Latest verdicts").get_by_role("link", name="All verdicts").click()
    page.get_by_label("Words of title or claim").fill("counting sheep before sleep is upheld")
    expect(page.locator("#board tbody tr:visible")).to_have_count(1)
    page.locator("#board").get_by_role("link", name="Counting sheep before sleep is upheld", exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Counting sheep before sleep is upheld")
    claim = page.locator("article.verdict").first
    expect(claim).to_contain_text("A model that counts <b>sheep</b> stays awake longer")
    expect(claim.locator(".badge")).to_have_text(re.compile("Upheld at small"))
    plot = claim.locator("svg.plot.full")
    expect(plot).to_be_visible()
    assert plot.locator("circle.seed").count() == 10, "five seeds against the baseline, five against the control"
    box, seed = plot.bounding_box(), plot.locator("circle.seed").first.bounding_box()
    assert box is not None
    assert seed is not None
    assert box["x"] <= seed["x"] <= box["x"] + box["width"]
    assert overflow(page) <= 0


@BOTH
def test_the_figures_of_a_paper_are_drawn(reading: Reading, viewport: dict[str, int]) -> None:
    page = reading.open(viewport=viewport, color_scheme="dark").new_page()
    page.goto("/papers/sheep_upheld")
    pictures = page.locator("#arms img, #figures img")
    assert pictures.count() == 3
    for place in range(3):
        picture = pictures.nth(place)
        picture.scroll_into_view_if_needed()
        page.wait_for_function("image => image.complete && image.naturalWidth > 300", arg=picture.element_handle())
        size, natural = picture.bounding_box(), picture.evaluate("i => i.naturalWidth / i.naturalHeight")
        assert size is not None
        assert size["width"] / size["height"] == pytest.approx(natural, rel=0.02), "the picture is not squeezed"
    table = page.get_by_role("region", name="minutes_awake of every arm")
    expect(table.get_by_role("row")).to_have_count(4)  # the heading and three arms


def test_the_command_is_copied(reading: Reading) -> None:
    window = reading.open(permissions=["clipboard-read", "clipboard-write"])
    page = window.new_page()
    page.goto("/papers/sheep_upheld")
    page.locator("[data-copy=command]").click()
    expect(page.get_by_role("status")).to_have_text("Copied.")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == "papertrial run sheep_upheld --scale small --seeds 5"


def test_days_weeks_and_months_lead_to_their_neighbours(page: Page) -> None:
    page.goto(f"/day/{TODAY}")
    page.get_by_role("link", name="Earlier").click()
    earlier = page.url
    page.get_by_role("link", name="Later").click()
    expect(page).to_have_url(re.compile(f"/day/{TODAY}$"))
    strip = page.get_by_role("list", name="Papers by day")
    expect(strip.locator("[aria-current=page]")).to_have_count(1)
    strip.locator(f"a[href$='{earlier[-10:]}']").click()
    expect(page).to_have_url(earlier)
    periods = page.get_by_role("navigation", name="Period")
    for name, address in (
        ("Week", r"/week/\d{4}-W\d\d$"),
        ("Month", r"/month/\d{4}-\d\d$"),
        ("Trending", "/trending$"),
    ):
        periods.get_by_role("link", name=name).click()
        expect(page).to_have_url(re.compile(f"{address}$"))
        expect(page.locator("article.row").first).to_be_visible()
    expect(page.locator(".formula")).to_contain_text("log2(1 + votes")


# -- searching --------------------------------------------------------------------------------------------------------


@BOTH
def test_search_follows_the_typing_and_the_filters(reading: Reading, viewport: dict[str, int]) -> None:
    page = reading.open(viewport=viewport).new_page()
    page.goto("/search")
    rows = page.locator("#results article.row")
    page.get_by_label("Words, a title").press_sequentially("counting sheep", delay=15)
    expect(rows.filter(has_text="Counting sheep before sleep is upheld")).to_have_count(1)
    expect(page).to_have_url(re.compile(r"q=counting\+sheep"))
    page.get_by_role("combobox", name="Verdict", exact=True).select_option("contradicted")
    expect(rows.filter(has_text="Counting sheep before sleep is contradicted")).to_have_count(1)
    expect(rows.filter(has_text="Counting sheep before sleep is upheld")).to_have_count(0)
    page.get_by_role("combobox", name="Family", exact=True).select_option("retrieval")
    expect(rows.filter(has_text="Counting sheep")).to_have_count(0)
    page.reload()  # the address says it all
    assert page.get_by_role("combobox", name="Verdict", exact=True).input_value() == "contradicted"


def test_the_search_box_offers_titles_to_the_keyboard(page: Page) -> None:
    page.goto("/about")
    page.keyboard.press("/")
    box = page.get_by_role("combobox", name="Search papers")
    expect(box).to_be_focused()
    page.keyboard.type("counting sheep upheld", delay=15)
    options = page.get_by_role("listbox", name="Papers found").get_by_role("option")
    expect(options.filter(has_text="Counting sheep before sleep is upheld")).to_be_visible()
    page.keyboard.press("Escape")
    expect(options).to_have_count(0)  # closed, so not among what assistive technology sees
    page.keyboard.type(" ")
    expect(options.first).to_be_visible()
    page.keyboard.press("ArrowDown")
    expect(options.first).to_have_attribute("aria-selected", "true")
    assert box.get_attribute("aria-activedescendant") == options.first.get_attribute("id")
    page.keyboard.press("ArrowUp")
    assert box.get_attribute("aria-activedescendant") is None
    page.keyboard.press("ArrowDown")
    title = options.first.locator("span").first.text_content() or ""
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text(title)


def test_enter_without_a_choice_searches(page: Page) -> None:
    page.goto("/about")
    page.get_by_role("combobox", name="Search papers").fill("sheep")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(r"/search\?q=sheep"))
    expect(page.locator("article.row").first).to_be_visible()


# -- the board --------------------------------------------------------------------------------------------------------


def shown(page: Page) -> list[str]:
    return [title.strip() for title in page.locator("#board tbody tr:visible .title").all_inner_texts()]


def test_the_board_sorts_and_filters_at_once_as_the_service_does(page: Page) -> None:
    page.goto("/verdicts")
    every = shown(page)
    assert len(every) == int((page.locator("#board-count").text_content() or "").split()[0]) > 100
    for key in ("Paper and headline claim", "Published", "Effect against margin", "Family", "Verdict"):
        for _ in range(2):
            page.get_by_role("columnheader", name=key).get_by_role("link").click()
            here, address = shown(page), page.url
            other = page.context.new_page()
            other.goto(address)
            assert shown(other) == here, address
            assert other.locator("th[aria-sort]").get_attribute("aria-sort") == page.locator(
                "th[aria-sort]"
            ).get_attribute("aria-sort")
            other.close()
    page.get_by_role("combobox", name="Family", exact=True).select_option("decoding")
    page.get_by_label("Words of title or claim").fill("sheep")
    assert sorted(shown(page)) == [
        "Counting sheep before sleep is contradicted",
        "Counting sheep before sleep is upheld",
    ]
    page.get_by_role("combobox", name="Verdict", exact=True).select_option("upheld")
    assert shown(page) == ["Counting sheep before sleep is upheld"]
    expect(page.locator("#board-count")).to_have_text(re.compile(r"^1 of \d+ papers$"))
    page.get_by_label("Words of title or claim").fill("no such paper")
    expect(page.get_by_text("No paper fits these filters.")).to_be_visible()


def test_the_board_is_a_list_of_cards_on_a_phone(reading: Reading) -> None:
    page = reading.open(viewport=PHONE).new_page()
    page.goto("/verdicts")
    for width in (320, 360, PHONE["width"]):
        page.set_viewport_size({"width": width, "height": PHONE["height"]})
        for row in page.locator("#board tbody tr").all():
            edge = row.bounding_box()
            assert edge is not None
            for part in row.locator("td, .badge, .plot").all():
                box = part.bounding_box()
                assert box is not None
                assert edge["x"] <= box["x"] <= box["x"] + box["width"] <= edge["x"] + edge["width"] + 0.5
    before = shown(page)
    page.get_by_role("combobox", name="Sorted by", exact=True).select_option("title")
    after = shown(page)
    assert after != before
    assert after == sorted(before, key=str.lower)


def test_the_picture_of_the_board_leads_to_papers(page: Page) -> None:
    page.goto("/verdicts")
    dots = page.locator(".swarm a")
    sheep = dots.and_(page.get_by_label("Counting sheep before sleep is upheld: upheld"))
    edge = page.locator(".swarm .side.upheld").bounding_box()
    dot = sheep.bounding_box()
    assert edge is not None
    assert dot is not None
    assert dot["x"] + dot["width"] / 2 >= edge["x"], "an upheld claim lies beyond the edge"
    sheep.click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Counting sheep before sleep is upheld")


# -- the keyboard, and no script --------------------------------------------------------------------------------------


def test_the_first_tab_leads_past_the_header(page: Page) -> None:
    page.goto("/")
    page.keyboard.press("Tab")
    skip = page.get_by_role("link", name="Skip to the content")
    expect(skip).to_be_focused()
    expect(skip).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()


def test_further_claims_unfold_by_keyboard(page: Page) -> None:
    page.goto("/papers/icl_gradient_descent")
    fold = page.locator("details.verdict-fold").first
    fold.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(fold.locator("svg.plot.full")).to_be_visible()
    expect(fold.get_by_text("fixed before the run")).to_be_visible()


def test_reading_searching_and_the_board_need_no_script(reading: Reading) -> None:
    page = reading.open(java_script_enabled=False).new_page()
    page.goto("/search")
    page.get_by_label("Words, a title").fill("counting sheep")
    page.get_by_role("combobox", name="Verdict", exact=True).select_option("upheld")
    page.get_by_role("main").get_by_role("button", name="Search").click()
    page.get_by_role("link", name="Counting sheep before sleep is upheld", exact=True).click()
    expect(page.locator("svg.plot.full").first).to_be_visible()
    page.goto("/verdicts")
    page.get_by_role("combobox", name="Verdict", exact=True).select_option("contradicted")
    page.get_by_role("combobox", name="Sorted by", exact=True).select_option("published")
    page.get_by_role("button", name="Show").click()
    assert "Counting sheep before sleep is contradicted" in shown(page)
    assert "Counting sheep before sleep is upheld" not in shown(page)
    page.get_by_role("columnheader", name="Published").get_by_role("link").click()
    expect(page.locator("th[aria-sort=ascending]")).to_have_text("Published")
