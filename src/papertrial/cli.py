"""``papertrial``: parses, calls a room, prints. Everything heavy is imported inside the command that needs it."""

import errno
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from papertrial import service_commands
from papertrial.errors import PapertrialError, UsageError

app = typer.Typer(
    name="papertrial",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Papers on trial: find a language-model paper, run its method against its baseline, see if the claim holds.",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Database = Annotated[str | None, typer.Option(help="Database URL; default, SQLite in the home folder.")]
Slug = Annotated[str, typer.Argument(help="The paper: its slug, or its arXiv id.", show_default=False)]
Scale = Annotated[str, typer.Option(help="smoke (seconds, plumbing only), small (minutes on 2 cores), gpu or paper.")]


def main() -> None:
    """Run the command line; an error that the user can mend is one line, never a traceback."""
    try:
        app()
    except PapertrialError as error:
        fail(str(error), error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(0) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            fail(f"{error.strerror}: {error.filename or 'while writing'}; what was recorded before is intact")
        raise


def fail(message: str, code: int = 1) -> NoReturn:
    print(f"papertrial: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    class Pipeable(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # for main, to whom a reader that has seen enough is no failure

    return Pipeable(stderr=stderr)


@app.command()
def run(
    slug: Annotated[
        str | None, typer.Argument(help="The paper: its slug, or its arXiv id.", show_default=False)
    ] = None,
    scale: Scale = "small",
    model: Annotated[
        str | None, typer.Option(help="Your checkpoint: a Hugging Face id, a local folder or house:NAME.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds, instead of the scale's own.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps ...")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads for each seed; default 1.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Seeds side by side; default 2 on a CPU, 1 on a GPU.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Where to write the HTML report.")] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Maintainers: keep the result as the paper's reference evidence.")
    ] = False,
    aged: Annotated[bool, typer.Option("--aged", help="Run every paper whose evidence is aged or stale.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not resume an interrupted run; start anew.")] = False,
    as_json: Json = False,
) -> None:
    """Put a paper on trial: its method against its baseline on the same work, with a computed verdict."""
    from papertrial.lab.claim import find_card

    if aged == (slug is not None):
        raise UsageError("name one paper, or give --aged")
    cards = _aged_cards(scale) if aged else [find_card(slug or "")]
    for card in cards:
        _run_one(card, scale, model, seeds, device, threads, workers, report, record, fresh, as_json)


def _command_again() -> str:
    """The command as it was given, but for an option that would throw away what it left."""
    import shlex

    return shlex.join(["papertrial", *(word for word in sys.argv[1:] if word != "--fresh")])


def _aged_cards(scale: str) -> list[Any]:
    from papertrial.lab.catalogue import standing
    from papertrial.lab.claim import read_cards

    standings = [standing(card) for card in read_cards() if card.on_trial]
    return [s.card for s in standings if s.state in ("aged", "stale") and scale in s.evidence]


def _run_one(
    card: Any,
    scale: str,
    model: str | None,
    seeds: int | None,
    device: str | None,
    threads: int | None,
    workers: int | None,
    report: Path | None,
    record: bool,
    fresh: bool,
    as_json: bool,
) -> None:
    from papertrial.lab import runner, summary
    from papertrial.lab.evidence import own_path, reference_path, write_evidence
    from papertrial.lab.report import write_report
    from papertrial.lab.verdict import FEWEST_SEEDS
    from papertrial.terminal import LiveProgress, print_json, print_run

    if record:
        _require_recordable(card, scale, model)
    try:
        plan = runner.plan_run(card, scale, model=model, seeds=seeds, device=device, threads=threads, workers=workers)
    except KeyboardInterrupt:
        fail("stopped before anything was begun", 130)
    if record and len(plan.seeds) < FEWEST_SEEDS:
        raise UsageError(f"reference evidence needs at least {FEWEST_SEEDS} seeds, got {len(plan.seeds)}")
    console, notes = _console(), _console(stderr=True)
    again = _command_again()
    kept = [] if fresh else runner.finished_seeds(plan)
    notes.print(
        f"[bold]{card.slug}[/] at {scale}: {len(plan.seeds)} seed(s), {plan.workers} at a time, {plan.device}"
        + (f"; {len(kept)} already finished" if kept else ""),
        highlight=False,
    )
    try:
        with LiveProgress(notes, len(plan.seeds)) as progress:
            evidence = runner.run(plan, progress=progress, on_trial=progress.seed_finished, fresh=fresh)
    except KeyboardInterrupt:
        done = len(runner.finished_seeds(plan))
        fail(f"stopped; {done} of {len(plan.seeds)} seeds are kept. Resume with: {again}", 130)
    write_evidence(own_path(card.slug, scale, model), evidence)
    path = write_report(card, evidence, report)
    runner.discard(plan)
    if record:
        write_evidence(reference_path(card, scale), evidence)
    if as_json:
        print_json(summary.as_json(card, evidence) | {"report": str(path)})
    else:
        print_run(console, card, evidence, summary.judgements(card, evidence))
        console.print(f"report: {path}", highlight=False, soft_wrap=True)


def _require_recordable(card: Any, scale: str, model: str | None) -> None:
    """Reference evidence is the experiment's own, and belongs beside its paper in a checkout, not in site-packages."""
    if scale == "smoke" or model:
        raise UsageError(
            "only the experiment's own model at small, gpu or paper scale can be recorded as reference evidence"
        )
    package = Path(__file__).resolve().parent
    if card.folder.resolve().is_relative_to(package) and not (package.parents[1] / "pyproject.toml").is_file():
        raise UsageError(f"{card.slug} is part of the installed package; record its evidence in a checkout of it")


@app.command()
def show(slug: Slug, as_json: Json = False) -> None:
    """A paper: what it claims, and the evidence there is."""
    from papertrial.home import home
    from papertrial.lab import summary
    from papertrial.lab.apply_options import applicable
    from papertrial.lab.catalogue import standing
    from papertrial.lab.claim import find_card
    from papertrial.lab.digests import takes_model
    from papertrial.lab.evidence import read_all_evidence
    from papertrial.terminal import print_card, print_json, print_run

    card = find_card(slug)
    state = standing(card)
    own, damaged = read_all_evidence(sorted((home() / "evidence" / card.slug).glob("*.json")))
    for problem in damaged:
        print(f"left out: {problem}", file=sys.stderr)
    if as_json:
        fields = card.model_dump(mode="json", exclude={"folder"})
        print_json(
            {
                **fields,
                "state": state.state,
                "problems": state.problems,
                "evidence": [summary.as_json(card, e) for e in state.evidence.values()],
                "own_runs": [summary.as_json(card, e) for e in own],
            }
        )
        return
    console = _console()
    print_card(console, card)
    for label, found in (("Reference evidence", list(state.evidence.values())), ("Your runs", own)):
        for evidence in found:
            where = f"{evidence.scale}{f', {evidence.model}' if evidence.model else ''}"
            console.rule(f"{label}: {where}, {evidence.recorded:%Y-%m-%d}", align="left")
            print_run(console, card, evidence, summary.judgements(card, evidence))
    console.print(f"\nLimits: {card.limits}", markup=False, highlight=False)
    if card.finding:
        console.print(f"Our reading: {card.finding}", markup=False, highlight=False)
    if state.state == "not yet on trial":
        console.print("[dim]not yet on trial: there is no method and experiment for it here[/]")
    else:
        own_model = " [--model ID|DIR]" if takes_model(card) else ""
        console.print(f"\nPut it on trial: papertrial run {card.slug}{own_model}", markup=False, highlight=False)
        if card.slug in applicable():
            console.print(
                f"Apply it to yours: papertrial apply {card.slug} --model ID|DIR --out DIR",
                markup=False,
                highlight=False,
            )


@app.command("list")
def list_papers(
    family: Annotated[str | None, typer.Option(help="Only this family, such as decoding.")] = None,
    verdict: Annotated[str | None, typer.Option(help="Only upheld, contradicted or undecided headline claims.")] = None,
    on_trial: Annotated[bool, typer.Option("--on-trial", help="Only papers that can be run.")] = False,
    as_json: Json = False,
) -> None:
    """The papers in scope, with their verdicts."""
    from papertrial.lab.catalogue import standing
    from papertrial.lab.claim import FAMILIES, readable_cards
    from papertrial.lab.summary import judgement_json
    from papertrial.terminal import print_json, print_standings

    if family is not None and family not in FAMILIES:
        raise UsageError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    if verdict is not None and verdict not in ("upheld", "contradicted", "undecided"):
        raise UsageError(f"unknown verdict {verdict!r}; known: upheld, contradicted, undecided")
    cards, wrong = readable_cards()
    found = [standing(card) for card in cards if family in (None, card.family)]
    for problem in wrong.values():
        print(f"left out: {problem}", file=sys.stderr)
    if on_trial:
        found = [s for s in found if s.card.on_trial]
    if verdict:
        found = [s for s in found if s.judgements and s.judgements[0].word == verdict]
    if as_json:
        print_json(
            [
                {
                    "slug": s.card.slug,
                    "title": s.card.title,
                    "family": s.card.family,
                    "arxiv": s.card.arxiv,
                    "state": s.state,
                    "claims": [judgement_json(j) for j in s.judgements],
                }
                for s in found
            ]
        )
        return
    console = _console()
    print_standings(console, found)
    console.print(f"[dim]{len(found)} papers, {sum(s.card.on_trial for s in found)} on trial[/]")


@app.command()
def check(as_json: Json = False) -> None:
    """Name every paper folder that is incomplete, stale or aged; exits with 1 if any is incomplete or stale."""
    from papertrial.lab.catalogue import standing
    from papertrial.lab.claim import readable_cards
    from papertrial.terminal import print_json, print_states

    cards, unreadable = readable_cards()
    standings = [standing(card) for card in cards]
    states = [(s.card.slug, s.state, s.problems) for s in standings]
    states = sorted(states + [(slug, "incomplete", (problem,)) for slug, problem in unreadable.items()])
    if as_json:
        print_json([{"slug": slug, "state": state, "problems": problems} for slug, state, problems in states])
    else:
        print_states(_console(), states)
    if any(state in ("incomplete", "stale") for _, state, _ in states):
        raise typer.Exit(1)


@app.command()
def search(
    query: Annotated[
        str, typer.Argument(help="Words, a title, a sentence, a slug or an arXiv id.", show_default=False)
    ],
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many papers to show.")] = 10,
    family: Annotated[str | None, typer.Option(help="Only this family, such as decoding.")] = None,
    since: Annotated[str | None, typer.Option(help="Only papers published on this day (YYYY-MM-DD) or later.")] = None,
    in_scope: Annotated[bool, typer.Option("--in-scope", help="Only papers that have a card here.")] = False,
    mode: Annotated[str, typer.Option(help="hybrid (words and meaning), lexical or dense.")] = "hybrid",
    ranker: Annotated[
        str, typer.Option(help="default, or xtr: token retrieval, a method on trial here (slower to start).")
    ] = "default",
    database: Database = None,
    as_json: Json = False,
) -> None:
    """Find papers in the catalogue."""
    if ranker not in ("default", "xtr"):
        raise UsageError(f"--ranker is {ranker!r}; default or xtr is needed")
    if ranker == "xtr" and mode != "hybrid":
        raise UsageError("--mode belongs to the default ranker; leave it out with --ranker xtr")
    from papertrial.feed.catalogue import Catalogue
    from papertrial.feed.lexical import Filters
    from papertrial.terminal import found_json, print_found, print_json

    notes = _console(stderr=True)
    catalogue = Catalogue(database)
    filters = Filters(families=[family] if family else None, since=_day(since, "--since"), in_scope=in_scope or None)
    notices = [_prepare(catalogue, notes)]
    if ranker == "xtr":
        from papertrial.rankers import XTRRanker

        found = XTRRanker(catalogue, lambda line: notes.print(f"[dim]{line}[/]", highlight=False)).search(
            query, limit, filters
        )
    else:
        found = catalogue.search(query, limit, mode, filters)  # type: ignore[arg-type]
    notices.append(found.notice)
    if as_json:
        print_json(found_json(found))
    else:
        print_found(_console(), found)
    for notice in filter(None, notices):
        notes.print(f"[yellow]note:[/] {notice.message}", highlight=False)


def _prepare(catalogue: Any, notes: Any) -> Any:
    """Bring the catalogue up to date, with a line of progress where there is something to encode."""
    if not notes.is_terminal:
        return catalogue.prepare()
    with notes.status("updating the search index") as status:
        return catalogue.prepare(lambda done: status.update(f"updating the search index: {done:,} papers"))


def _day(text: str | None, option: str) -> Any:
    from datetime import date

    try:
        return date.fromisoformat(text) if text is not None else None
    except ValueError:
        raise UsageError(f"{option} is {text!r}; a day is written YYYY-MM-DD") from None


@app.command()
def ingest(
    source: Annotated[list[str], typer.Argument(help="Saved pages, feeds or API replies; or arxiv, or huggingface.")],
    since: Annotated[
        str | None, typer.Option(help="arxiv, huggingface: from this day on; default, go on from last time.")
    ] = None,
    category: Annotated[
        list[str] | None, typer.Option(help="arxiv: categories such as cs.CL; may be repeated.")
    ] = None,
    bulk: Annotated[bool, typer.Option("--bulk", help="arxiv: harvest the whole subject over OAI-PMH.")] = False,
    database: Database = None,
    as_json: Json = False,
) -> None:
    """Take papers into the catalogue, from files or from arXiv and Hugging Face."""
    from papertrial.feed.catalogue import Catalogue
    from papertrial.feed.ingest import ingest_files
    from papertrial.terminal import print_json, print_problems

    first = _day(since, "--since")
    catalogue = Catalogue(database)
    if source == ["arxiv"]:
        from papertrial.feed.fetch_arxiv import fetch_arxiv, fetch_arxiv_bulk

        report = (
            fetch_arxiv_bulk(catalogue.store, first)
            if bulk
            else fetch_arxiv(catalogue.store, first, category or ["cs.CL"])
        )
    elif source == ["huggingface"]:
        from papertrial.feed.fetch_huggingface import fetch_huggingface

        report = fetch_huggingface(catalogue.store, first)
    else:
        if since or category or bulk:
            raise UsageError("--since, --category and --bulk belong to `ingest arxiv` and `ingest huggingface`")
        report = ingest_files(catalogue.store, source)
    notes = _console(stderr=True)
    _prepare(catalogue, notes)
    if as_json:
        print_json({name: getattr(report, name) for name in ("added", "updated", "unchanged", "problems")})
    else:
        print(f"{report.added} added, {report.updated} updated, {report.unchanged} unchanged")
        print_problems(notes, report.problems)
    if report.problems:
        raise typer.Exit(1)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[OPTIONS] [OPTIONS OF THE METHOD]",
)
def apply(
    context: typer.Context,
    slug: Slug,
    model: Annotated[
        str | None, typer.Option(help="The checkpoint: a Hugging Face id, a local folder or house:NAME.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write; must not exist.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text that the method may look at: .txt, .jsonl, .json, .csv or a Hub id.")
    ] = None,
    evaluation: Annotated[str | None, typer.Option(help="Text on which perplexity is measured, likewise.")] = None,
    evaluation_tokens: Annotated[int, typer.Option(min=2, help="How many tokens of it.")] = 20_000,
    seed: Annotated[int, typer.Option(min=0, help="Of what the method draws.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")] = "cpu",
    options: Annotated[bool, typer.Option("--options", help="List the method's own options and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Change your checkpoint by a paper's method; writes an ordinary Hugging Face folder with a card.

    Each method has options of its own, such as a ratio: `papertrial apply SLUG --options` lists them.
    """
    from papertrial.lab.applying import apply_to_checkpoint
    from papertrial.lab.claim import find_card
    from papertrial.terminal import print_applied, print_json, print_options

    card = find_card(slug)
    if options:
        print_options(_console(), card)
        return
    if model is None or out is None:
        raise UsageError(f"give --model and --out; `papertrial apply {card.slug} --options` lists the method's own")
    notes = _console(stderr=True)
    with notes.status("starting") as status:
        applied = apply_to_checkpoint(
            card,
            model,
            out,
            context.args,
            calibration=calibration,
            evaluation=evaluation,
            evaluation_tokens=evaluation_tokens,
            seed=seed,
            device=device,
            on_progress=lambda what, done, total: status.update(f"{what}{f' {done:,} of {total:,}' if total else ''}"),
        )
    if as_json:
        print_json(applied.record | {"folder": str(applied.folder)})
    else:
        print_applied(_console(), applied)


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="The checkpoint: a Hugging Face id, a local folder or house:NAME.")],
    data: Annotated[
        str | None,
        typer.Option(help="Texts or multiple-choice questions: .txt, .jsonl, .json, .csv or Hub id[:config][@split]."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Standard tasks of lm-evaluation-harness, with commas between (an extra: eval).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows of the data, or of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")] = "cpu",
    as_json: Json = False,
) -> None:
    """Measure a checkpoint on your own data: accuracy of multiple choice, perplexity and bits per byte of texts."""
    if data is None and tasks is None:
        raise UsageError("give --data, or --tasks, or both")
    from papertrial.lm.evaluation import evaluate as measure
    from papertrial.lm.evaluation import harness, read_data
    from papertrial.lm.models import load
    from papertrial.terminal import print_json, print_measures

    rows = None if data is None else read_data(data, limit=limit)
    with _console(stderr=True).status(f"loading {model}") as status:
        checkpoint = load(model, device=device)
        found: dict[str, Any] = {"model": checkpoint.name, "digest": checkpoint.digest}
        if rows is not None:
            status.update(f"measuring on {data}")
            result = measure(checkpoint, rows, batch_size=batch_size)
            found["data"] = {"source": data, **vars(result)}
        if tasks is not None:
            status.update(f"running {tasks}")
            names = [name.strip() for name in tasks.split(",") if name.strip()]
            found["tasks"] = harness.run_tasks(checkpoint, names, limit=limit, batch_size=batch_size)
    if as_json:
        print_json(found)
    else:
        print_measures(_console(), found)


service_commands.add_to(app)

if __name__ == "__main__":
    main()
