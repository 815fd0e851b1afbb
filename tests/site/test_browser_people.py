"""What readers do, in Chromium: signing in by letter, voting, commenting, tagging, collecting, hiding, subscribing."""

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, expect

from papertrial.feed.store import Store
from papertrial.site import keys
from papertrial.site.delivery import subscriptions
from site_browser import DESKTOP, PHONE, SMALLEST, Reading, overflow

SHEEP = "/papers/sheep_contradicted"
OWN_PAGES = ("/profile", "/tags", "/hidden", "/votes", "/recommendations", "/submit", "/subscriptions", "/collections")


@pytest.fixture(scope="module")
def signed_in(reading: Reading) -> dict[str, object]:
    """The session of somebody who signed in, for windows of other tests."""
    window = reading.open()
    page = window.new_page()
    reading.sign_in(page, "ada@example.org")
    return dict(window.storage_state())


@pytest.fixture
def page(reading: Reading, signed_in: dict[str, object]) -> Iterator[Page]:
    window = reading.open(storage_state=signed_in)
    yield window.new_page()
    window.close()


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_letter_signs_in_and_leads_back_to_the_paper(reading: Reading, viewport: dict[str, int]) -> None:
    page = reading.open(viewport=viewport).new_page()
    page.goto(SHEEP)
    page.get_by_role("navigation", name="Account").get_by_role("link", name="Sign in").click()
    address = f"grace-{viewport['width']}@example.org"
    page.get_by_label("E-mail address").fill(address)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Look into your mail")
    link = reading.link(address, "/sign-in/")
    page.goto(link)  # by GET: nothing has happened yet
    page.goto(link)
    page.get_by_role("main").get_by_role("button", name="Sign in").click()
    expect(page).to_have_url(re.compile("/papers/sheep_contradicted|/papers/t-"))
    menu = page.locator("details.menu")
    menu.locator("summary").click()
    expect(menu.get_by_role("link", name="Profile and tokens")).to_be_in_viewport()
    page.keyboard.press("Escape")
    expect(menu.get_by_role("link", name="Profile and tokens")).to_be_hidden()
    menu.locator("summary").click()
    menu.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("navigation", name="Account").get_by_role("link", name="Sign in")).to_be_visible()
    page.goto(link)
    expect(page.get_by_role("heading", level=1)).to_have_text("This link is used up")


def test_a_vote_is_counted_in_place_by_keyboard_and_taken_back(page: Page) -> None:
    page.goto("/papers/sheep_upheld")
    button = page.locator(".paper-actions .vote button")
    before = int(button.inner_text())
    button.focus()
    page.keyboard.press("Enter")
    expect(button).to_have_attribute("aria-pressed", "true")
    expect(button).to_have_text(str(before + 1))
    expect(button).to_be_focused()
    page.reload()
    expect(button).to_have_attribute("aria-pressed", "true")
    page.goto("/votes")
    expect(page.locator("article.row")).to_have_count(1)
    page.locator("article.row .vote button").click()
    expect(page.locator("article.row")).to_have_count(0)
    page.goto("/papers/sheep_upheld")
    expect(button).to_have_text(str(before))


def test_comments_are_written_answered_edited_and_removed(page: Page) -> None:
    page.goto(SHEEP)
    page.get_by_label("Your comment").fill("**Sheep** do not <script>alert(1)</script> count.")
    page.get_by_role("button", name="Comment", exact=True).click()
    comment = page.locator("article.comment").first
    expect(comment.locator(".said strong")).to_have_text("Sheep")
    assert page.locator(".said script").count() == 0
    comment.get_by_text("Reply", exact=True).first.click()
    page.get_by_label("Reply to").fill("They do on Sundays.")
    page.get_by_role("button", name="Reply", exact=True).click()
    reply = page.locator("article.comment.reply")
    expect(reply).to_contain_text("They do on Sundays.")
    reply.get_by_text("Edit", exact=True).click()
    reply.get_by_label("Your comment").fill("They do on Mondays.")
    reply.get_by_role("button", name="Save").click()
    expect(reply).to_contain_text("They do on Mondays.")
    expect(reply).to_contain_text("edited")
    reply.get_by_role("button", name="Remove the comment").click()
    expect(page.get_by_text("They do on Mondays.")).to_have_count(0)
    page.reload()
    expect(page.locator("article.comment").first).to_contain_text("Sheep do not")


def test_a_tag_brings_recommendations_with_the_words_that_speak_for_them(page: Page) -> None:
    page.goto("/papers/icl_gradient_descent")
    mine = page.locator("#mine")
    mine.get_by_label("Tag", exact=True).fill("learners in context")
    page.keyboard.press("Enter")
    expect(mine.get_by_role("link", name="learners in context")).to_be_visible()
    page.goto("/recommendations")
    rows = page.locator("article.row")
    expect(rows.first.locator(".because")).to_contain_text("Because of")
    assert "Transformers learn in-context by gradient descent" not in rows.locator("h2").all_inner_texts()
    page.goto("/tags")
    page.get_by_role("link", name="learners in context").click()
    expect(rows).to_have_count(1)


def test_a_paper_goes_into_a_new_collection_and_out_of_the_lists(page: Page) -> None:
    page.goto("/papers/sheep_exact")
    page.get_by_text("New collection with it").click()
    page.get_by_label("Title").fill("To count at night")
    page.get_by_role("button", name="Make").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("To count at night")
    expect(page.locator("article.row")).to_have_count(1)
    page.goto("/papers/sheep_exact")
    page.get_by_role("button", name="Hide from my lists").click()
    expect(page.get_by_role("button", name="Show in my lists again")).to_be_focused()
    page.goto("/families/attention")
    page.goto("/hidden")
    expect(page.get_by_role("link", name="Counting sheep before sleep is exact", exact=True)).to_be_visible()


def test_a_form_that_is_refused_says_why_and_changes_nothing(page: Page) -> None:
    """A form whose token is void tells why, and the page stays as it was."""
    page.goto(SHEEP)
    page.locator(".paper-actions .vote input[name=csrf]").evaluate("field => { field.value = 'void' }")
    page.locator(".paper-actions .vote button").click()
    expect(page.get_by_role("status")).to_contain_text("too old or came from elsewhere")
    expect(page.locator(".paper-actions .vote button")).to_have_attribute("aria-pressed", "false")


def test_voting_and_commenting_need_no_script(reading: Reading, signed_in: dict[str, object]) -> None:
    page = reading.open(storage_state=signed_in, java_script_enabled=False).new_page()
    page.goto("/papers/sheep_undecided")
    page.locator(".paper-actions .vote button").click()
    expect(page.locator(".paper-actions .vote button")).to_have_attribute("aria-pressed", "true")
    page.get_by_label("Your comment").fill("Plain words.")
    page.get_by_role("button", name="Comment", exact=True).click()
    expect(page.locator("article.comment")).to_contain_text("Plain words.")


def test_own_pages_fit_every_window(page: Page) -> None:
    for address in OWN_PAGES:
        page.goto(address)
        for viewport in (SMALLEST, PHONE, DESKTOP):
            page.set_viewport_size(viewport)
            assert overflow(page) <= 0, (address, viewport)


def test_a_digest_is_asked_for_confirmed_and_ended_by_its_link(reading: Reading) -> None:
    page = reading.open(viewport=PHONE).new_page()
    page.goto("/search?q=sheep")
    page.get_by_role("link", name="by mail").click()
    assert page.get_by_label("Category, words or tag").input_value() == "sheep"
    page.get_by_label("E-mail address").fill("reader@example.org")
    page.get_by_label("How often").select_option("weekly")
    page.get_by_role("button", name="Send me a letter to confirm").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Look into your mail")

    link = reading.link("reader@example.org", "/subscriptions/confirm/")
    page.goto(link)
    expect(page.get_by_role("heading", level=1)).to_have_text("Confirm your digest")
    page.get_by_role("button", name="Yes, send it").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Your digest is confirmed")

    with Store.open(f"sqlite:///{reading.server.home / 'papertrial.db'}") as store:
        subscription = subscriptions.waiting_for(store, urlsplit(link).path.split("/")[-1])
        assert subscription is not None
        assert subscription.state == "active"
        token = subscriptions.unsubscribe_token(keys.read_key(reading.server.home, "service"), subscription)
        end = f"{reading.url}/unsubscribe/{token}"
        page.goto(end)  # a scanner of letters does the same: nothing ends
        expect(page.get_by_role("heading", level=1)).to_have_text("Unsubscribe")
        assert subscriptions.of_token(store, keys.read_key(reading.server.home, "service"), token) is not None
        page.get_by_role("button", name="Unsubscribe").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Unsubscribed")
        assert subscriptions.of_token(store, keys.read_key(reading.server.home, "service"), token) is None
