"""Whether the Hugging Face hub has a model or a data set, and why it could not be fetched."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Literal

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

Kind = Literal["model", "dataset"]
_PROBED = {"model": "config.json", "dataset": "README.md"}
_PAUSE = 1.0  # seconds between the two tries
_OFFLINE = "it is not in the Hugging Face cache, and HF_HUB_OFFLINE forbids to fetch it"
_LONGEST_REASON = 160  # characters


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id: `name` or `owner/name`."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None


def why_out_of_reach(name: str, kind: Kind) -> str | None:
    """Why a name can certainly not be fetched, from one small request; None where it is worth trying.

    The libraries try six times over 25 seconds even where the host has no address. Here two tries that
    are refused outright are enough; a slow answer, an error of the server, or a name that lies in the
    cache are left to them.
    """
    if isinstance(try_to_load_from_cache(name, _PROBED[kind], repo_type=kind), str):
        return None
    if constants.HF_HUB_OFFLINE:
        return _OFFLINE if kind == "model" else None  # data sets have a cache of their own
    why = _refusal(name, kind)
    if why is not None:
        time.sleep(_PAUSE)
        why = _refusal(name, kind)
    return why


def _refusal(name: str, kind: Kind) -> str | None:
    try:
        get_hf_file_metadata(hf_hub_url(name, _PROBED[kind], repo_type=kind))
    except EntryNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001 - the client's kinds differ between its versions
        return None if _timed_out(error) else _known_reason(error, name, kind)
    return None


def reason(error: Exception, name: str, kind: Kind) -> str:
    """One short phrase: gated, missing, out of reach, or what the library said."""
    return _known_reason(error, name, kind) or _one_line(error)


def _known_reason(error: Exception, name: str, kind: Kind) -> str | None:
    chain = list(_chain(error))
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    if any(isinstance(e, GatedRepoError) for e in chain):
        return f"it is gated; accept its licence at {page} and run `hf auth login`"
    if any(isinstance(e, RepositoryNotFoundError) for e in chain):
        what = "data set" if kind == "dataset" else kind
        return f"the Hugging Face hub has no {what} of this name, or it is private (`hf auth login`)"
    if constants.HF_HUB_OFFLINE and any(_is_connection(e) or _is_cache_miss(e) for e in chain):
        return _OFFLINE
    if any(_is_connection(e) for e in chain):
        return f"{constants.ENDPOINT} could not be reached (no network?)"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_connection(error: BaseException) -> bool:
    """By name: the client has gone from requests to httpx, whose kinds have no common base."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"ConnectError", "ConnectionError", "ConnectTimeout"})


def _is_cache_miss(error: BaseException) -> bool:
    return isinstance(error, LocalEntryNotFoundError)


def _timed_out(error: Exception) -> bool:
    return any("Timeout" in kind.__name__ for e in _chain(error) for kind in type(e).__mro__)


def _one_line(error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    said = said if len(said) <= _LONGEST_REASON else said[: _LONGEST_REASON - 1] + "…"
    return said.rstrip(".")
