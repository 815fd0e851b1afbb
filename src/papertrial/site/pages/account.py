"""Signing in and out, the profile, and API tokens."""

from typing import Annotated, Literal

from fastapi import APIRouter, Form, Path, Query, Request
from starlette.responses import Response

from papertrial.site import signing_in
from papertrial.site.context import Context, Here, MaybeReader, SignedIn, Writer, check_origin
from papertrial.site.errors import Problem
from papertrial.site.fields import RowNumber
from papertrial.site.limits import credential_of, network_of
from papertrial.site.pages.serving import local, see_other
from papertrial.site.people import accounts, submissions, tokens
from papertrial.site.people.accounts import Reader
from papertrial.site.templating import render

router = APIRouter(include_in_schema=False)

#: Remembers, while a letter is on its way, where its reader wanted to go.
NEXT = "papertrial_next"

Token = Annotated[str, Path(max_length=100)]


@router.get("/sign-in")
def sign_in_form(request: Request, reader: MaybeReader, next: Annotated[str, Query(max_length=2000)] = "/") -> Response:
    """The form that asks for a sign-in link."""
    if reader is not None:
        return see_other(local(next))
    return render(request, "sign_in.html.j2", next=local(next), email="", problem=None)


@router.post("/sign-in")
def ask_for_link(
    request: Request,
    here: Here,
    email: Annotated[str, Form(max_length=1000)] = "",
    next: Annotated[str, Form(max_length=2000)] = "/",
) -> Response:
    """Send a link, and say so; what cannot be an address comes back with the reason."""
    check_origin(request)
    try:
        signing_in.send_link(here, email, network_of(request.scope))
    except Problem as problem:
        if problem.field != "email":
            raise
        shown = problem.message.removeprefix("email: ")
        return render(
            request, "sign_in.html.j2", status=problem.status, next=local(next), email=email[:254], problem=shown
        )
    response = see_other("/sign-in/sent")
    minutes = here.settings.link_minutes
    secure = here.settings.secure
    response.set_cookie(
        NEXT, local(next).encode().hex(), max_age=60 * minutes, path="/sign-in", secure=secure, httponly=True,
        samesite="lax",
    )  # fmt: skip
    return response


@router.get("/sign-in/sent")
def link_sent(request: Request, here: Here) -> Response:
    """What to do next."""
    to_files = here.settings.smtp_url is None
    return render(request, "sign_in_sent.html.j2", to_files=to_files)


@router.get("/sign-in/{token}")
def use_link_form(request: Request, token: Token, here: Here) -> Response:
    """A button: a link must not be used up by a program that looks into letters."""
    good = accounts.link_is_good(here.store, token)
    headers = {"Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
    return render(request, "sign_in_link.html.j2", status=200 if good else 403, headers=headers, token=token, good=good)


@router.post("/sign-in/{token}")
def use_link(request: Request, token: Token, here: Here) -> Response:
    """Sign in, and go on where the reader came from."""
    check_origin(request)
    signed = accounts.sign_in(here.store, token, days=here.settings.session_days, sign_up=here.settings.sign_up)
    response = see_other(_wanted(request) or ("/profile?welcome=1" if signed.new else "/"))
    signing_in.set_session(response, here, signed.session)
    response.delete_cookie(NEXT, path="/sign-in", secure=here.settings.secure, httponly=True, samesite="lax")
    return response


def _wanted(request: Request) -> str | None:
    try:
        wanted = bytes.fromhex(request.cookies.get(NEXT, "")).decode()
    except ValueError:
        return None
    return local(wanted, "/") if wanted not in ("", "/") else None


@router.post("/sign-out")
def sign_out(request: Request, here: Here, reader: Writer, everywhere: Annotated[bool, Form()] = False) -> Response:
    """End this session, or all of them."""
    session = credential_of(request.headers, here.settings.cookie_name) or ""
    accounts.sign_out(here.store, session, everywhere=everywhere)
    response = see_other("/")
    signing_in.drop_session(response, here)
    return response


@router.get("/profile")
def profile(
    request: Request,
    here: Here,
    reader: SignedIn,
    welcome: Annotated[bool, Query()] = False,
    saved: Annotated[bool, Query()] = False,
) -> Response:
    """The reader's account."""
    return _profile(request, here, reader, welcome=welcome, saved=saved)


def _profile(
    request: Request,
    here: Context,
    reader: Reader,
    *,
    status: int = 200,
    welcome: bool = False,
    saved: bool = False,
    secret: str | None = None,
    problem: Problem | None = None,
) -> Response:
    return render(
        request,
        "profile.html.j2",
        status=status,
        headers={"Cache-Control": "no-store"},
        account=reader,
        tokens=tokens.tokens_of(here.store, reader.id),
        submissions=submissions.submissions_of(here.store, reader.id, 10),
        welcome=welcome,
        saved=saved,
        secret=secret,
        problem=problem,
    )


@router.post("/profile")
def change_profile(
    request: Request,
    here: Here,
    reader: Writer,
    name: Annotated[str, Form(max_length=200)] = "",
    full_name: Annotated[str, Form(max_length=400)] = "",
) -> Response:
    """Change the account's names."""
    try:
        accounts.update_profile(here.store, reader, name=name.strip(), full_name=full_name)
    except Problem as problem:
        return _profile(request, here, reader, status=problem.status, problem=problem)
    return see_other("/profile?saved=1")


@router.post("/profile/tokens")
def make_token(
    request: Request,
    here: Here,
    reader: Writer,
    name: Annotated[str, Form(max_length=400)] = "",
    scope: Annotated[Literal["read", "write"], Form()] = "read",
) -> Response:
    """A new API token. Its secret is in this answer and nowhere else, so this one form does not lead elsewhere."""
    _session_only(reader)
    try:
        secret, _ = tokens.make_token(here.store, reader, name, scope)
    except Problem as problem:
        return _profile(request, here, reader, status=problem.status, problem=problem)
    return _profile(request, here, reader, status=201, secret=secret)


@router.post("/profile/tokens/{token_id}/revoke")
def revoke_token(token_id: RowNumber, here: Here, reader: Writer) -> Response:
    """Revoke an API token."""
    tokens.revoke_token(here.store, reader.id, token_id)
    return see_other("/profile#tokens")


@router.post("/profile/delete")
def delete_account(here: Here, reader: Writer, sure: Annotated[str, Form(max_length=100)] = "") -> Response:
    """Delete the account, once its name was typed."""
    _session_only(reader)
    if sure.strip() != reader.name:
        raise Problem(422, f"sure: type your account's name, {reader.name}, to delete it", field="sure")
    accounts.delete_account(here.store, reader.id)
    response = see_other("/")
    signing_in.drop_session(response, here)
    return response


def _session_only(reader: Reader) -> None:
    if reader.credential != "session":
        raise Problem(403, "an API token cannot do this; sign in")
