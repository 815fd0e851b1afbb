"""Invented papers in the layouts that the catalogue reads; nothing in here exists."""

import html
import json

SEARCH_PAGE = """\
new

Get trending papers in your email inbox!

Subscribe

Daily Papers

byAK and the research community

Feb 2

Teaching Lighthouses to Whisper: A Study of Very Slow Signals

Lighthouses have long been known to speak in flashes. We study what happens when they are asked to whisper instead, \
over distances of up to three harbours, and find that patience is the dominant term. Our code is small and our \
lighthouses are available on request, together with the fog that was used in the ablations.

  \u2022 4 authors
\u00b7
Oct 9, 2018

Do Umbrellas Dream?

Short abstracts exist too.

  \u2022 1 authors
\u00b7
Jan 31, 2026 12

Umbrella Scaling Laws & the 7 < 9 Conjecture

We fit a power law to umbrellas. The exponent is wet. This holds for all sizes x < y and z > 0 that we tried, in \
every weather that the institute's roof admits, and the residuals look like rain. A second paragraph follows below, \
as copies of pages sometimes have it.

It says that the authors regret nothing, in a paragraph that is itself long enough to be no title, because it goes \
on about the exponent, its confidence interval, the roof, the residuals, the rain, the umbrellas, and once more about \
the exponent, which remains wet after all corrections were made.

meadow Institute of Meadows
\u00b7
Sep 24, 2025 3
"""

PLAIN_PAGE = """\
new

Daily Papers

byAK and the research community

Oct 3

A First Invented Title

We invent a first abstract that is long enough to be recognised as one, and that ends with a full stop. It says \
little, but says it at length, so that the reader of pages may tell it from a title without being told, as a \
human would, by looking at it from far away.

A Second Invented Title: Now With a Colon

We invent a second abstract that is long enough to be recognised as one, and that ends with a full stop. It says less \
than the first, and says it at the same length, so that the reader of pages may tell it from a title without being \
told, as a human would.
"""

DAILY_PAGE = """\
Hugging Face
Models
Daily Papers
byAK and the research community
Fri, Oct 3, 2025
Submitted by
somebody
128
The Unbearable Lightness of Tokens
\u00b7
15 authors
9
Submitted by
somebody else
1.2k
On Sandwiches as Monoids
Institute of Lunch
\u00b7
2 authors
Submitted by third person

7

Counting Sheep With Transformers

\u00b7
1 authors

2
"""


def daily_entry(number: int = 1, **changes: object) -> dict[str, object]:
    """An entry as the papers API lists it; `changes` go into the inner paper."""
    paper: dict[str, object] = {
        "id": f"2510.{number:05d}",
        "authors": [
            {"_id": "a1", "name": "Ada Example", "hidden": False},
            {"_id": "a2", "name": "Bo Sample", "hidden": False},
            {"_id": "a3", "name": "Someone Hidden", "hidden": True},
        ],
        "publishedAt": "2025-10-01T17:59:00.000Z",
        "submittedOnDailyAt": "2025-10-03T01:30:00.000Z",
        "title": f"Invented Paper Number {number}",
        "summary": f"In this invented abstract, number {number}, we\nbreak lines and say that 3 < 5.",
        "upvotes": 10 + number,
        "discussionId": "0" * 24,
        "ai_summary": "A machine says it is invented.",
        "ai_keywords": ["invention", "numbers"],
        "githubRepo": "https://github.com/example/invented",
        "projectPage": "https://example.org/invented",
    }
    paper.update(changes)
    return {
        "paper": paper,
        "publishedAt": "2025-10-03T01:30:00.000Z",
        "title": paper["title"],
        "summary": paper["summary"],
        "thumbnail": "https://example.org/t.png",
        "numComments": 2,
        "submittedBy": {"_id": "u", "fullname": "Some Body", "name": "somebody", "type": "user"},
        "organization": {"_id": "o", "name": "meadow", "fullname": "Institute of Meadows"},
        "isAuthorParticipating": False,
    }


def daily_json(count: int = 3) -> bytes:
    """A daily list of the papers API."""
    return json.dumps([daily_entry(i) for i in range(1, count + 1)], indent=1).encode()


CARD = """
<article class="relative flex flex-col overflow-hidden rounded-xl border">
 <a href="/papers/{id}" class="block"><img alt="" src="t.png"></a>
 <div class="pointer-events-none">Submitted by <span>somebody</span></div>
 <div class="from-gray-50-to-white">
  <a href="/login?next=%2Fpapers%2F{id}"><label class="flex"><input type="checkbox"><svg><path/></svg>
   <div class="leading-none">{upvotes}</div></label></a>
  <h3 class="mb-1 text-lg"><a href="/papers/{id}" class="line-clamp-3">{title}</a></h3>
  <a class="flex" href="/papers/{id}"><ul><li title="Ada"></li><li>&middot; {authors} authors</li></ul></a>
  <a href="/papers/{id}#community" class="flex"><svg></svg>{comments}</a>
 </div>
</article>
"""


def html_page(*, props: bool = True, cards: bool = True, day: str = "2025-10-03") -> bytes:
    """A saved page with the page's data, or article cards, or both."""
    data = json.dumps({"dateString": day, "periodType": "day", "dailyPapers": [daily_entry(1), daily_entry(2)]})
    hydrater = f'<div class="SVELTE_HYDRATER contents" data-target="DailyPapers" data-props="{html.escape(data)}">'
    body = "".join(
        CARD.format(
            id=f"2510.{n:05d}", upvotes=10 + n, title=f"Invented Paper <em>Number</em> {n}", authors=n, comments=2
        )
        for n in (1, 2)
    )
    return (
        f"<!DOCTYPE html>\n<!-- saved from url=(0044)https://huggingface.co/papers/date/{day} -->\n"
        '<html><head><meta charset="utf-8"><title>Daily Papers</title><script>alert("no")</script></head><body><main>'
        f"{hydrater if props else '<div>'}<h1>Daily Papers</h1>{body if cards else ''}</div></main></body></html>"
    ).encode()


def api_entry(number: int, *, version: int = 1, day: str = "2025-10-01") -> str:
    """An entry of the arXiv API."""
    return f"""  <entry>
    <id>http://arxiv.org/abs/2510.{number:05d}v{version}</id>
    <updated>{day}T18:00:00Z</updated>
    <published>{day}T17:59:00Z</published>
    <title>Invented Paper Number {number}</title>
    <summary>  We prove that 1 &lt; 2 for $x &lt; y$,
  number {number}.
</summary>
    <author><name>Ada Example</name><arxiv:affiliation>Nowhere</arxiv:affiliation></author>
    <author><name>J\u00f3 Sample</name></author>
    <arxiv:comment>3 pages</arxiv:comment>
    <link href="http://arxiv.org/abs/2510.{number:05d}v{version}" rel="alternate" type="text/html"/>
    <link title="pdf" href="http://arxiv.org/pdf/2510.{number:05d}v{version}" rel="related" type="application/pdf"/>
    <arxiv:primary_category term="cs.CL" scheme="http://arxiv.org/schemas/atom"/>
    <category term="cs.LG" scheme="http://arxiv.org/schemas/atom"/>
    <category term="cs.CL" scheme="http://arxiv.org/schemas/atom"/>
  </entry>
"""


def api_feed(*entries: str, total: int | None = None, start: int = 0) -> bytes:
    """A reply of the arXiv API."""
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<feed xmlns="http://www.w3.org/2005/Atom" xmlns:opensearch="http://a9.com/-/spec/opensearch/1.1/" '
        'xmlns:arxiv="http://arxiv.org/schemas/atom">\n  <title type="html">ArXiv Query</title>\n'
        "  <id>http://arxiv.org/api/x</id>\n  <updated>2025-10-03T00:00:00-04:00</updated>\n"
        f"  <opensearch:totalResults>{len(entries) if total is None else total}</opensearch:totalResults>\n"
        f"  <opensearch:startIndex>{start}</opensearch:startIndex>\n"
        f"  <opensearch:itemsPerPage>{len(entries)}</opensearch:itemsPerPage>\n{''.join(entries)}</feed>\n"
    ).encode()


ERROR_ENTRY = """  <entry>
    <id>http://arxiv.org/api/errors#incorrect_id_format</id><title>Error</title>
    <summary>max_results must be non-negative</summary><author><name>arXiv api core</name></author>
  </entry>
"""

RSS = b"""\
<?xml version='1.0' encoding='UTF-8'?>
<rss xmlns:arxiv="http://arxiv.org/schemas/atom" xmlns:dc="http://purl.org/dc/elements/1.1/" version="2.0">
  <channel>
    <title>cs.CL updates on arXiv.org</title>
    <pubDate>Fri, 03 Oct 2025 00:00:00 -0400</pubDate>
    <item>
      <title>Invented Paper Number 1</title>
      <link>https://arxiv.org/abs/2510.00001</link>
      <description>arXiv:2510.00001v1 Announce Type: new
Abstract: We show that &lt;i&gt;slanted&lt;/i&gt; words count, and that a &lt; b.</description>
      <guid isPermaLink="false">oai:arXiv.org:2510.00001v1</guid>
      <category>cs.CL</category>
      <category>cs.LG</category>
      <pubDate>Fri, 03 Oct 2025 00:00:00 -0400</pubDate>
      <arxiv:announce_type>new</arxiv:announce_type>
      <dc:creator>Ada Example (Nowhere), Bo Sample and Cy Third</dc:creator>
    </item>
    <item>
      <title>An Older Paper, Replaced</title>
      <link>https://arxiv.org/abs/2401.00009</link>
      <description>arXiv:2401.00009v3 Announce Type: replace
Abstract: Old but new.</description>
      <guid isPermaLink="false">oai:arXiv.org:2401.00009v3</guid>
      <category>cs.CL</category>
      <pubDate>Fri, 03 Oct 2025 00:00:00 -0400</pubDate>
      <arxiv:announce_type>replace</arxiv:announce_type>
      <dc:creator>Di Fourth</dc:creator>
    </item>
  </channel>
</rss>
"""

RSS_ATOM = b"""\
<?xml version='1.0' encoding='UTF-8'?>
<feed xmlns:arxiv="http://arxiv.org/schemas/atom" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns="http://www.w3.org/2005/Atom">
  <id>http://rss.arxiv.org/atom/cs.CL</id>
  <title>cs.CL updates on arXiv.org</title>
  <entry>
    <id>oai:arXiv.org:2510.00001v1</id>
    <title>Invented Paper Number 1</title>
    <updated>2025-10-03T04:00:00+00:00</updated>
    <link href="https://arxiv.org/abs/2510.00001" rel="alternate" type="text/html"/>
    <summary>arXiv:2510.00001v1 Announce Type: new
Abstract: We show things.</summary>
    <category term="cs.CL"/>
    <published>2025-10-03T00:00:00-04:00</published>
    <arxiv:announce_type>new</arxiv:announce_type>
    <dc:creator>Ada Example, Bo Sample</dc:creator>
  </entry>
</feed>
"""


def oai_record(number: int) -> str:
    """A record of arXiv's OAI-PMH in the format arXiv."""
    return f"""<record><header><identifier>oai:arXiv.org:2510.{number:05d}</identifier><datestamp>2025-10-03</datestamp>
<setSpec>cs:cs:CL</setSpec></header><metadata>
<arXiv xmlns="http://arxiv.org/OAI/arXiv/"><id>2510.{number:05d}</id><created>2025-10-01</created><updated>2025-10-02</updated>
<authors><author><keyname>Example</keyname><forenames>Ada</forenames></author>
<author><keyname>Sample</keyname><forenames>Bo</forenames><suffix>Jr</suffix></author></authors>
<title>Invented Paper Number {number}</title><categories>cs.CL cs.LG</categories>
<abstract>  Harvested abstract &amp; more.
</abstract></arXiv></metadata></record>
"""


def oai_reply(*records: str, token: str | None = None) -> bytes:
    """A reply to ListRecords."""
    tail = f'<resumptionToken cursor="0" completeListSize="9">{html.escape(token)}</resumptionToken>' if token else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<OAI-PMH xmlns="http://www.openarchives.org/OAI/2.0/">'
        f"<responseDate>2025-10-03T00:00:00Z</responseDate><ListRecords>\n{''.join(records)}{tail}</ListRecords></OAI-PMH>\n"
    ).encode()


def oai_error(code: str) -> bytes:
    """An error reply of OAI-PMH."""
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<OAI-PMH xmlns="http://www.openarchives.org/OAI/2.0/">'
        f'<error code="{code}">no</error></OAI-PMH>'
    ).encode()
