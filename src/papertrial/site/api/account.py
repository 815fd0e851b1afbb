"""The reader's own account over the API: who am I, sign-in links, tokens, profile."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, StringConstraints
from starlette.responses import JSONResponse, Response

from papertrial.site import signing_in
from papertrial.site.context import Admin, Here, SignedIn, Writer, check_origin, csrf_token
from papertrial.site.errors import Problem
from papertrial.site.fields import Line, RowNumber
from papertrial.site.limits import credential_of, network_of
from papertrial.site.people import accounts, tokens
from papertrial.site.people.accounts import Reader
from papertrial.site.signing_in import iso

router = APIRouter(tags=["account"])


class Strict(BaseModel):
    """A body: fields that are not known are refused."""

    model_config = ConfigDict(extra="forbid")


class SignIn(Strict):
    email: Annotated[str, StringConstraints(max_length=254, min_length=3)]


class Profile(Strict):
    name: Annotated[Line, StringConstraints(max_length=40)] | None = None
    full_name: Annotated[Line, StringConstraints(max_length=100)] | None = None


class NewToken(Strict):
    name: Annotated[Line, StringConstraints(min_length=1, max_length=60)]
    scope: Literal["read", "write"] = "read"


class NewRole(Strict):
    role: Literal["reader", "admin", "blocked"]


def account(reader: Reader) -> dict[str, Any]:
    """An account as its owner sees it."""
    return {
        "name": reader.name,
        "full_name": reader.full_name,
        "email": reader.email,
        "role": reader.role,
        "since": iso(reader.created),
        "credential": reader.credential,
        "scope": reader.scope,
    }


@router.post("/api/sign-in", status_code=202)
def ask_for_link(request: Request, body: SignIn, here: Here) -> dict[str, Any]:
    """Send a sign-in link by e-mail."""
    check_origin(request)
    signing_in.send_link(here, body.email, network_of(request.scope))
    return {"sent": True}


@router.post("/api/sign-out", status_code=204)
def sign_out(request: Request, here: Here, reader: Writer) -> Response:
    """End this session."""
    if reader.credential != "session":
        raise Problem(400, "this request came with an API token; revoke that instead")
    accounts.sign_out(here.store, credential_of(request.headers, here.settings.cookie_name) or "")
    response = Response(status_code=204)
    signing_in.drop_session(response, here)
    return response


@router.get("/api/me")
def me(request: Request, reader: SignedIn) -> JSONResponse:
    """Who is signed in, with the CSRF token that a script of this session sends as ``X-CSRF-Token``."""
    return JSONResponse(account(reader) | {"csrf": csrf_token(request)}, headers={"Cache-Control": "no-store"})


@router.patch("/api/me")
def change_profile(body: Profile, here: Here, reader: Writer) -> dict[str, Any]:
    """Change the account's name or the name that is shown."""
    return account(accounts.update_profile(here.store, reader, name=body.name, full_name=body.full_name))


@router.delete("/api/me", status_code=204)
def delete_account(here: Here, reader: Writer) -> Response:
    """Delete the account with its votes, comments, tags and collections."""
    _session_only(reader)
    accounts.delete_account(here.store, reader.id)
    return Response(status_code=204)


@router.get("/api/tokens")
def list_tokens(here: Here, reader: SignedIn) -> list[dict[str, Any]]:
    """The account's API tokens, without their secrets."""
    return [_token(token) for token in tokens.tokens_of(here.store, reader.id)]


@router.post("/api/tokens", status_code=201)
def make_token(body: NewToken, here: Here, reader: Writer) -> JSONResponse:
    """A new API token; its secret is in this answer and never again."""
    _session_only(reader)
    secret, token = tokens.make_token(here.store, reader, body.name, body.scope)
    return JSONResponse(_token(token) | {"token": secret}, 201, {"Cache-Control": "no-store"})


@router.delete("/api/tokens/{token_id}", status_code=204)
def revoke_token(token_id: RowNumber, here: Here, reader: Writer) -> Response:
    """Revoke an API token."""
    tokens.revoke_token(here.store, reader.id, token_id)
    return Response(status_code=204)


@router.put("/api/people/{name}/role")
def set_role(
    name: Annotated[str, StringConstraints(max_length=40)], body: NewRole, here: Here, admin: Admin
) -> dict[str, Any]:
    """Administrators: make an account a reader, an administrator, or blocked."""
    accounts.set_role(here.store, accounts.id_of(here.store, name), body.role)
    return {"name": name, "role": body.role}


def _session_only(reader: Reader) -> None:
    if reader.credential != "session":
        raise Problem(403, "an API token cannot do this; sign in")


def _token(token: tokens.Token) -> dict[str, Any]:
    used = iso(token.last_used) if token.last_used else None
    return {"id": token.id, "name": token.name, "scope": token.scope, "created": iso(token.created), "last_used": used}
