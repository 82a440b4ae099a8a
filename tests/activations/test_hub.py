"""Why the hub did not give something: told apart, and fast where it certainly will not."""

import socket

import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from sae.activations import hub
from sae.activations.documents import read_documents
from sae.activations.language_model import check_model_in_reach, load_language_model
from sae.errors import InputError


class ConnectError(Exception):
    """Named like those of httpx, which has none in common with requests."""


class ConnectTimeout(ConnectError):
    """A slow network."""


def _repository(kind):
    error = kind.__new__(kind)  # their constructors want a whole response
    Exception.__init__(error, "401 Client Error")
    return error


@pytest.fixture
def online(monkeypatch):
    """The hub allowed, and answering with what the test puts in."""
    answers = []

    def metadata(url):
        answers.append(url)
        if metadata.error is not None:
            raise metadata.error

    metadata.error, metadata.asked = None, answers
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_PAUSE", 0.0)
    monkeypatch.setattr(hub, "get_hf_file_metadata", metadata)
    return metadata


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ConnectError("no address"), "https://huggingface.co could not be reached"),
        (_repository(RepositoryNotFoundError), "the Hugging Face hub has no model of this name, or it is"),
        (
            _repository(GatedRepoError),
            "it is gated; accept its licence at https://huggingface.co/owner/name and",
        ),
    ],
)
def test_refusals_are_told_apart_in_one_short_line(online, error, why):
    online.error = error
    with pytest.raises(InputError, match="`model` 'owner/name' could not be loaded: ") as caught:
        load_language_model("owner/name")
    message = str(caught.value)
    assert why in message and "--data.source.model FOLDER" in message
    assert len(message) <= 400 and "\n" not in message and len(online.asked) == 2


def test_data_set_that_is_gated_says_where_to_accept_its_licence(online):
    online.error = _repository(GatedRepoError)
    with pytest.raises(
        InputError, match="`dataset` 'owner/name:part' could not be read: it is gated"
    ) as caught:
        read_documents("owner/name:part")
    message = str(caught.value)
    assert "https://huggingface.co/datasets/owner/name and" in message
    assert "--data.source.dataset 'texts/*.jsonl'" in message
    assert online.asked[0] == "https://huggingface.co/datasets/owner/name/resolve/main/README.md"


@pytest.mark.parametrize("error", [None, ConnectTimeout("slow"), RuntimeError("503 Server Error")])
def test_slow_or_ailing_networks_are_left_to_the_libraries_own_patience(online, error):
    online.error = error
    check_model_in_reach("owner/name")
    assert len(online.asked) == 1


def test_one_refusal_may_be_an_accident(online, monkeypatch):
    def once(url):
        online.asked.append(url)
        if len(online.asked) == 1:
            raise ConnectError("no address")

    monkeypatch.setattr(hub, "get_hf_file_metadata", once)
    check_model_in_reach("owner/name")
    assert len(online.asked) == 2


def test_what_lies_in_the_cache_needs_no_network(online, monkeypatch):
    online.error = ConnectError("no address")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *a, **k: "/cache/config.json")
    check_model_in_reach("owner/name")
    assert online.asked == []


def test_reason_is_found_behind_what_the_libraries_wrap_it_in(online):
    def wrapped(inner):
        middle = LocalEntryNotFoundError("cannot find the requested files")
        middle.__context__ = inner  # raised while handling it
        outer = OSError("We couldn't connect.\nCheck your internet connection")
        outer.__cause__ = middle
        return outer

    refused = ConnectError("[Errno -2]")
    refused.__cause__ = socket.gaierror(-2, "Name or service not known")
    assert "could not be reached" in hub.reason(wrapped(refused), "owner/name", "model")
    assert "gated" in hub.reason(wrapped(_repository(GatedRepoError)), "owner/name", "model")


def test_other_errors_are_quoted_on_one_line_and_cut(online):
    said = hub.reason(
        ValueError("BuilderConfig 'x' not found.\nAvailable: " + "abc, " * 200), "a/b", "dataset"
    )
    assert said.startswith("BuilderConfig 'x' not found. Available: abc") and len(said) <= 160


@pytest.mark.parametrize(
    ("name", "is_id"),
    [("gpt2", True), ("google/gemma-2-2b", True), ("/a/b", False), ("a/b/c", False), ("a b", False)],
)
def test_hub_ids_are_told_from_paths(name, is_id):
    assert hub.is_hub_id(name) == is_id
