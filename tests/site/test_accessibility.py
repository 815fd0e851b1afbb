"""axe-core finds nothing on any page, light and dark; on phones as well where the layout differs."""

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

from site_browser import DESKTOP, PHONE, Reading
from site_service import TODAY

PUBLIC = (
    "/",
    "/trending",
    f"/day/{TODAY}",
    f"/month/{TODAY:%Y-%m}",
    "/search?q=sheep",
    "/verdicts?family=decoding",
    "/papers/sheep_upheld",
    "/papers/sheep_contradicted",
    "/papers/2601.00000",
    "/topics",
    "/topics/cs.CL",
    "/families/attention",
    "/organisations",
    "/collections",
    "/about",
    "/sign-in",
    "/sign-in/sent",
    "/sign-in/void",
    "/subscriptions",
    "/papers/9999.99999",
)
OWN = (
    "/",
    "/papers/sheep_upheld",
    "/profile",
    "/tags",
    "/votes",
    "/hidden",
    "/recommendations",
    "/submit",
    "/subscriptions",
    "/collections",
    "/people/ada",
    "/people/ada/night",
    "/people/ada/night/change",
)
#: Pages whose layout on a phone is another one.
FOLDED = ("/", "/verdicts?family=decoding", "/papers/sheep_upheld", "/search?q=sheep", "/about")

#: Other results than violations are cut short, which is several times quicker.
BRIEFLY = {"resultTypes": ["violations"]}
#: WCAG 2.2 A and AA, and what axe counts as good practice.
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
EVERYTHING = {"runOnly": {"type": "tag", "values": TAGS}, **BRIEFLY}
#: What a colour scheme can change.
COLOURS = {"runOnly": {"type": "rule", "values": ["color-contrast", "link-in-text-block"]}, **BRIEFLY}


def found_by_axe(page: Page, address: str, options: dict[str, object]) -> list[str]:
    results = Axe().run(page, options=options).response
    assert results["passes"], "axe looked at something"
    return [
        f"{address} ({violation['impact']}) {violation['id']}: {node['html'][:200]}"
        for violation in results["violations"]
        for node in violation["nodes"]
    ]


def check(page: Page, addresses: tuple[str, ...]) -> list[str]:
    found = []
    for address in addresses:
        page.emulate_media(color_scheme="light", reduced_motion="reduce")
        page.goto(address)
        page.evaluate("document.querySelectorAll('main details').forEach(details => { details.open = true })")
        found += found_by_axe(page, address, EVERYTHING)
        page.emulate_media(color_scheme="dark", reduced_motion="reduce")
        found += found_by_axe(page, f"{address}, dark", COLOURS)
    return found


def test_axe_finds_what_is_wrong(reading: Reading) -> None:
    """The check itself: it sees grey on grey and a field without a name, in the scheme where they are wrong."""
    page = reading.open(color_scheme="dark").new_page()
    page.goto("/about")
    page.evaluate("document.querySelector('.lead').style.color = '#444'")
    page.evaluate("document.querySelector('main').append(document.createElement('input'))")
    assert any("color-contrast" in one for one in found_by_axe(page, "/about", COLOURS))
    assert any("label" in one for one in found_by_axe(page, "/about", EVERYTHING))


@pytest.mark.parametrize("part", range(2))
def test_public_pages(reading: Reading, part: int) -> None:
    assert check(reading.open(viewport=DESKTOP).new_page(), PUBLIC[part::2]) == []


def test_pages_on_a_phone(reading: Reading) -> None:
    assert check(reading.open(viewport=PHONE, has_touch=True).new_page(), FOLDED) == []


def test_the_titles_that_the_search_box_offers(reading: Reading) -> None:
    page = reading.open(viewport=PHONE).new_page()
    page.goto("/sign-in")
    page.get_by_role("combobox", name="Search papers").fill("counting sheep")
    page.get_by_role("option").first.wait_for()
    page.keyboard.press("ArrowDown")
    assert found_by_axe(page, "titles offered", EVERYTHING) == []


def test_a_readers_own_pages(reading: Reading) -> None:
    page = reading.open(viewport=DESKTOP).new_page()
    reading.sign_in(page, "ada@example.org")
    page.goto("/profile")
    page.get_by_label("Name in addresses").fill("ada")
    page.get_by_role("button", name="Save").click()
    page.goto("/papers/sheep_upheld")
    page.get_by_label("Your comment").fill("A **comment**.")
    page.get_by_role("button", name="Comment", exact=True).click()
    page.locator("article.comment").wait_for()
    page.get_by_label("Tag", exact=True).fill("sheep")
    page.keyboard.press("Enter")
    page.locator("#mine .tag").wait_for()
    page.get_by_text("New collection with it").click()
    page.get_by_label("Title").fill("Night")
    page.get_by_role("button", name="Make").click()
    page.wait_for_url("**/people/ada/night")
    assert check(page, OWN) == []
