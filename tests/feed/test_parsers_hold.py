"""Hostile and damaged input: no parser raises, what comes out can be stored, and twice is as good as once."""

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import feed_documents as documents
from papertrial.feed.sources import parse
from papertrial.feed.store import Store

SAMPLES = {
    "search page": documents.SEARCH_PAGE.encode(),
    "plain page": documents.PLAIN_PAGE.encode(),
    "daily page": documents.DAILY_PAGE.encode(),
    "json": documents.daily_json(3),
    "html": documents.html_page(),
    "html cards": documents.html_page(props=False),
    "api": documents.api_feed(documents.api_entry(1), documents.api_entry(2)),
    "api error": documents.api_feed(documents.ERROR_ENTRY),
    "rss": documents.RSS,
    "rss atom": documents.RSS_ATOM,
    "oai": documents.oai_reply(documents.oai_record(1), documents.oai_record(2), token="t"),
}
PIECES = [
    b"",
    b"\x00",
    b"\xff\xfe",
    b"<",
    b">",
    b"&",
    b"&x;",
    b'"',
    b"{",
    b"}",
    b"[[",
    b"\n\n",
    b"\xc2\xb7",
    b"4 authors",
]
PIECES += [
    b"Oct 9, 2018 3",
    b"<entry>",
    b"</entry>",
    b"]]>",
    b"<![CDATA[",
    b"9" * 5000,
    b"\\ud800",
    b"Submitted by\n",
    b"null",
]


@st.composite
def damaged(draw):
    data = bytearray(draw(st.sampled_from(sorted(SAMPLES.values()))))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from([0, 1, 2, 10, 200]))
        kind = draw(st.sampled_from(["insert", "cut", "copy", "end"]))
        if kind == "insert":
            data[at : at + length] = draw(st.sampled_from(PIECES))
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "copy":
            source = draw(st.integers(0, len(data)))
            data[at:at] = data[source : source + length]
        else:
            del data[max(at, 20) :]
    return bytes(data)


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(damaged())
def test_damaged_input_never_raises_and_what_is_read_is_storable(data):
    parsed = parse(data)
    for record in parsed.records:
        f"{record}".encode()
    assert all("\n" not in problem for problem in parsed.problems)


@settings(max_examples=150)
@given(st.one_of(st.binary(max_size=300), st.text(max_size=300).map(lambda text: text.encode("utf-8", "replace"))))
def test_arbitrary_input_never_raises(data):
    for start in (b"", b"{", b"[", b"<html>", b"<feed>", b"<rss>", b"Daily Papers\n\n"):
        parse(start + data)


@settings(max_examples=15)
@given(inputs=st.lists(damaged(), min_size=1, max_size=4))
def test_ingesting_damaged_input_twice_changes_nothing_the_second_time(tmp_path_factory, inputs):
    url = f"sqlite:///{tmp_path_factory.mktemp('home') / 'x.db'}"
    records = [record for data in inputs for record in parse(data).records]
    with Store.open(url) as store:
        store.upsert(records)
        # A live source may contradict itself within the inputs: then its last word stands after either pass.
        store.upsert(records)
        revision, shown = store.revision(), {p.id: p.title for p in store.listing(limit=1000).papers}
        store.upsert(records[-1:])
        assert store.revision() == revision
        assert {p.id: p.title for p in store.listing(limit=1000).papers} == shown


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 200_000,
        b'{"paper":' * 100_000,
        b'[{"paper": {"id": "2510.00001", "title": "x' * 20_000,
        b"<feed>" + b"<entry>" * 200_000,
        b"<feed>" + b"<entry>" * 200_000 + b"</entry>",
        b"<html>" + b"<div>" * 200_000,
        b"<html>" + b"<article><h3>a</h3>" * 5_000,
        b"Daily Papers\n" + b" \xc2\xb7" * 300_000,
        b"Daily Papers\n" + b" " * 2_000_000 + b"x",
        b"Daily Papers\n" + b"a\n\n" * 200_000,
        b"Daily Papers\n" + b"<a " * 500_000,
        b"<rss>" + b"<item><title>" + b"<b>" * 100_000 + b"</title></item></rss>",
    ],
    ids=lambda data: repr(data[:24]),
)
def test_input_made_to_be_slow_is_read_in_linear_time(data):
    started = time.process_time()
    parse(data)
    # The largest takes half a second here; a quadratic reading would take minutes.
    assert time.process_time() - started < 20
