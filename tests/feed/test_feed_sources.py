"""The other parsers: papers-API JSON, HTML pages, arXiv's XML, cards; and the finding of formats."""

import json
from datetime import date

import feedparser
import pytest

import feed_documents as documents
from papertrial.feed.sources import MAX_BYTES, parse
from papertrial.feed.sources.arxiv import parse_arxiv_xml
from papertrial.feed.sources.huggingface import parse_huggingface_json
from papertrial.feed.sources.scope import parse_scope


def test_daily_list_gives_every_field():
    parsed = parse_huggingface_json(documents.daily_json(1))
    assert parsed.problems == []
    (record,) = parsed.records
    assert record.arxiv_id == "2510.00001"
    assert record.title == "Invented Paper Number 1"
    assert record.abstract == "In this invented abstract, number 1, we break lines and say that 3 < 5."
    assert record.authors == ("Ada Example", "Bo Sample")
    assert (record.published, record.entered) == (date(2025, 10, 1), date(2025, 10, 3))
    assert (record.upvotes, record.comment_count) == (11, 2)
    assert record.organisation == "Institute of Meadows"
    assert record.ai_summary == "A machine says it is invented."
    assert record.keywords == ("invention", "numbers")
    assert record.code_url == "https://github.com/example/invented"
    assert record.project_url == "https://example.org/invented"
    assert record.source_url == "https://huggingface.co/papers/2510.00001"


def test_single_paper_search_list_and_wrapped_list_are_read_like_the_daily_list():
    (daily,) = parse_huggingface_json(documents.daily_json(1)).records
    entry = documents.daily_entry(1)
    flat = entry["paper"] | {"organization": entry["organization"], "comments": [{}, {}]}
    assert parse_huggingface_json(json.dumps(flat).encode()).records == [daily]
    assert parse_huggingface_json(json.dumps({"papers": [entry]}).encode()).records == [daily]


def test_truncated_json_keeps_whole_entries_and_names_the_line_of_the_cut_one():
    data = documents.daily_json(3)
    cut = data.rindex(b'"summary"')
    parsed = parse_huggingface_json(data[: data.rindex(b'"upvotes"')])
    assert [record.arxiv_id for record in parsed.records] == ["2510.00001", "2510.00002"]
    (problem,) = parsed.problems
    line = int(problem.removeprefix("line ").split(":")[0])
    assert documents.daily_json(3).split(b"\n")[line - 1].strip() == b"{"
    assert line < data.count(b"\n", 0, cut)


def test_json_broken_in_the_middle_loses_one_entry_only():
    data = documents.daily_json(3).replace(b'"upvotes": 12,', b'"upvotes": ,')
    parsed = parse_huggingface_json(data)
    assert [record.arxiv_id for record in parsed.records] == ["2510.00001", "2510.00003"]
    assert len(parsed.problems) == 1


@pytest.mark.parametrize(
    ("changes", "field", "problem"),
    [
        ({"githubRepo": "javascript:alert(1)"}, "code_url", "code_url"),
        ({"upvotes": -3}, "upvotes", "upvotes"),
        ({"upvotes": 1e99}, "upvotes", "upvotes"),
        ({"publishedAt": "2199-01-01T00:00:00Z"}, "published", "published"),
        ({"publishedAt": "soon"}, "published", "published"),
        ({"summary": "x" * 30_000}, "abstract", "abstract"),
        ({"ai_keywords": {"a": 1}}, "keywords", "keywords"),
        ({"authors": [{"name": 7}]}, "authors", "authors"),
    ],
)
def test_wrong_field_is_left_out_and_named_and_the_paper_kept(changes, field, problem):
    parsed = parse_huggingface_json(json.dumps([documents.daily_entry(1, **changes)]).encode())
    (record,) = parsed.records
    assert not getattr(record, field)
    assert any(problem in text for text in parsed.problems)


def test_lone_surrogates_and_null_characters_do_not_reach_the_record():
    entry = documents.daily_entry(
        1, title="A \ud800 title\u0000 with\u202e tricks", summary="<script>x()</script>plain"
    )
    (record,) = parse_huggingface_json(json.dumps([entry]).encode()).records
    record.title.encode("utf-8")
    assert record.title == "A \N{REPLACEMENT CHARACTER} title with tricks"
    assert record.abstract == "plain"


def test_page_data_of_a_saved_page_is_read_first():
    parsed = parse(documents.html_page())
    assert parsed.problems == []
    assert [record.arxiv_id for record in parsed.records] == ["2510.00001", "2510.00002"]
    assert {record.entered for record in parsed.records} == {date(2025, 10, 3)}
    assert {record.source for record in parsed.records} == {"page"}
    assert parsed.records[0].abstract.endswith("3 < 5.")


def test_article_cards_are_read_where_a_page_has_no_data():
    parsed = parse(documents.html_page(props=False))
    assert parsed.problems == []
    facts = [(r.arxiv_id, r.title, r.upvotes, r.author_count, r.comment_count, r.entered) for r in parsed.records]
    assert facts == [
        ("2510.00001", "Invented Paper Number 1", 11, 1, 2, date(2025, 10, 3)),
        ("2510.00002", "Invented Paper Number 2", 12, 2, 2, date(2025, 10, 3)),
    ]


def test_truncated_html_falls_back_to_what_is_whole():
    whole = documents.html_page(props=False)
    parsed = parse(whole[: whole.index(b"/papers/2510.00002")])
    assert parsed.records[0].arxiv_id == "2510.00001"
    cut_data = documents.html_page(cards=False)
    parsed = parse(cut_data[: cut_data.index(b"upvotes")])
    assert parsed.problems


def test_listing_saved_as_html_is_read_as_the_text_it_shows():
    paragraphs = documents.SEARCH_PAGE.replace("&", "&amp;").replace("<", "&lt;").split("\n\n")
    page = "<html><body>" + "".join(f"<p>{text.replace(chr(10), '<br>')}</p>" for text in paragraphs) + "</body></html>"
    assert parse(page.encode()).records == parse(documents.SEARCH_PAGE.encode()).records


def test_api_feed_gives_every_field():
    parsed = parse_arxiv_xml(documents.api_feed(documents.api_entry(1, version=2), total=77, start=5))
    assert parsed.problems == []
    (record,) = parsed.records
    assert (record.arxiv_id, record.arxiv_version) == ("2510.00001", 2)
    assert record.abstract == "We prove that 1 < 2 for $x < y$, number 1."
    assert record.authors == ("Ada Example", "J\u00f3 Sample")
    assert record.published == date(2025, 10, 1)
    assert record.categories == ("cs.CL", "cs.LG")
    assert record.pdf_url == "http://arxiv.org/pdf/2510.00001v2"
    assert (parsed.total, parsed.start, parsed.entry_count) == (77, 5, 1)


def test_api_feed_is_read_as_feedparser_reads_it():
    data = documents.api_feed(*(documents.api_entry(n) for n in range(1, 6)))
    peer = feedparser.parse(data)
    mine = parse_arxiv_xml(data).records
    assert [" ".join(entry.title.split()) for entry in peer.entries] == [record.title for record in mine]
    assert [tuple(a.name for a in entry.authors) for entry in peer.entries] == [record.authors for record in mine]
    assert [entry.published[:10] for entry in peer.entries] == [str(record.published) for record in mine]
    assert [" ".join(entry.summary.split()) for entry in peer.entries] == [record.abstract for record in mine]


def test_api_error_feed_is_a_refusal_and_no_paper():
    parsed = parse_arxiv_xml(documents.api_feed(documents.ERROR_ENTRY))
    assert parsed.records == []
    assert parsed.refusal == "max_results must be non-negative"


def test_truncated_or_broken_feed_keeps_whole_entries_and_names_the_lines():
    data = documents.api_feed(*(documents.api_entry(n) for n in (1, 2, 3)))
    parsed = parse_arxiv_xml(data[: data.rindex(b"<category")])
    assert [record.arxiv_id for record in parsed.records] == ["2510.00001", "2510.00002"]
    first_lines = [n for n, line in enumerate(data.split(b"\n"), start=1) if line.strip() == b"<entry>"]
    assert parsed.problems[0].startswith(f"line {first_lines[2]}: the document ends inside")
    broken = data.replace(b"<title>Invented Paper Number 2</title>", b"<title>Invented & Paper</titel>")
    parsed = parse_arxiv_xml(broken)
    assert [record.arxiv_id for record in parsed.records] == ["2510.00001", "2510.00003"]
    assert parsed.problems[0].startswith(f"line {first_lines[1]}: ")


def test_entities_are_never_expanded():
    bomb = b'<!DOCTYPE feed [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;"><!ENTITY x SYSTEM "file:///etc/passwd">]>'
    entry = documents.api_entry(1).replace("Invented Paper", "&b; &x; Paper")
    data = documents.api_feed(entry, documents.api_entry(2)).replace(b"<feed ", bomb + b"<feed ", 1)
    parsed = parse_arxiv_xml(data)
    assert [record.arxiv_id for record in parsed.records] == ["2510.00002"]
    assert "root" not in str(parsed.problems)


def test_rss_gives_text_without_markup_and_no_submission_date():
    parsed = parse(documents.RSS)
    assert parsed.problems == []
    new, replaced = parsed.records
    assert new.source == "arxiv_rss"
    assert new.abstract == "We show that slanted words count, and that a < b."
    assert new.authors == ("Ada Example", "Bo Sample", "Cy Third")
    assert (new.arxiv_id, new.arxiv_version, new.categories) == ("2510.00001", 1, ("cs.CL", "cs.LG"))
    assert (new.published, new.listed) == (None, date(2025, 10, 3))
    assert (replaced.arxiv_version, replaced.listed) == (3, None)


def test_atom_of_the_rss_service_is_told_from_the_api():
    (record,) = parse(documents.RSS_ATOM).records
    assert (record.source, record.arxiv_id, record.abstract) == ("arxiv_rss", "2510.00001", "We show things.")
    assert record.authors == ("Ada Example", "Bo Sample")


def test_oai_reply_gives_records_token_and_errors():
    deleted = '<record><header status="deleted"><identifier>oai:arXiv.org:1</identifier></header></record>'
    page = parse_arxiv_xml(documents.oai_reply(documents.oai_record(1), deleted, token="a|b&c"))
    (record,) = page.records
    assert (record.title, record.abstract) == ("Invented Paper Number 1", "Harvested abstract & more.")
    assert record.authors == ("Ada Example", "Bo Sample Jr")
    assert (record.published, record.categories) == (date(2025, 10, 1), ("cs.CL", "cs.LG"))
    assert (page.token, page.problems) == ("a|b&c", [])
    assert parse_arxiv_xml(documents.oai_error("noRecordsMatch")).problems == []
    assert parse_arxiv_xml(documents.oai_error("badArgument")).refusal == "badArgument: no"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"   \n",
        b"%PDF-1.7",
        b"\x1f\x8b\x08",
        b"Dear diary, nothing happened.",
        b"<svg></svg>",
        b"\x00\x01\x02\xff",
        b"{}",
        b"[]",
    ],
)
def test_what_is_no_known_format_gives_a_reason_and_no_records(data):
    parsed = parse(data)
    assert parsed.records == []
    assert data == b"[]" or parsed.problems


def test_too_large_input_is_refused_unread():
    parsed = parse(b"x" * (MAX_BYTES + 1))
    assert "at most" in parsed.problems[0]


def write_card(root, slug, text):
    folder = root / "family_x" / slug
    folder.mkdir(parents=True)
    (folder / "paper.toml").write_text(text, encoding="utf-8")


def test_cards_are_read_and_a_bad_one_costs_itself_only(tmp_path):
    write_card(
        tmp_path,
        "good",
        'title = "A Good Card"\narxiv = "2510.00001"\npublished = "2025-10"\nauthors = 3\norganisation = "Meadow"\n'
        'code = "https://github.com/example/good"\nsummary = "Our own words."\nkeywords = ["a", "b"]\nlimits = "x"\n',
    )
    write_card(tmp_path, "broken", 'title = "No end\n')
    parsed = parse_scope(tmp_path)
    (record,) = parsed.records
    assert (record.slug, record.family, record.title) == ("good", "family_x", "A Good Card")
    assert (record.published, record.published_precision) == (date(2025, 10, 1), "month")
    assert (record.author_count, record.organisation) == (3, "Meadow")
    assert (record.summary, record.abstract) == ("Our own words.", None)
    assert (record.code_url, record.keywords) == ("https://github.com/example/good", ("a", "b"))
    assert len(parsed.problems) == 1
    assert parsed.problems[0].startswith("family_x/broken/paper.toml: ")


def test_every_card_of_the_library_is_read():
    parsed = parse_scope()
    assert parsed.problems == []
    assert all(record.summary and record.published for record in parsed.records)
