"""What a cache is made from: sizes, values out of range, what counts as the same source."""

import dataclasses

import pytest
import yaml
from jsonargparse import ArgumentParser

from sae.activations.source import Source, parse_bytes
from sae.errors import InputError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("50GB", 50 * 10**9),
        ("512MB", 512 * 10**6),
        ("1.5TB", 15 * 10**11),
        ("20GiB", 20 * 2**30),
        ("1.5 kib", 1536),
        ("3_000_000", 3_000_000),
        ("7", 7),
        ("12b", 12),
        ("2G", 2 * 10**9),
        (" 2_gb ", 2 * 10**9),
        ("0.3GB", 3 * 10**8),  # in floats 0.3 * 1e9 is less
    ],
)
def test_sizes_are_read_exactly(text, size):
    assert parse_bytes(text, "disk") == size == Source(disk=text).disk_bytes()


@pytest.mark.parametrize(
    "text", ["", "GB", "0", "0.1", "-5GB", "5 XB", "5iB", "1e9", "5GBs", "_5", "nan", "5..0GB"]
)
def test_what_is_no_size_is_an_error_that_names_the_key_and_shows_a_size(text):
    with pytest.raises(InputError, match="`disk` must be a size in bytes such as 50GB") as caught:
        Source(disk=text).check()
    assert repr(text) in str(caught.value)


def test_no_size_is_no_limit():
    Source().check()
    assert Source().disk_bytes() is None


@pytest.mark.parametrize(("written", "size"), [("50GB", 50 * 10**9), (5_000_000, 5_000_000), (None, None)])
def test_sizes_may_stand_in_yaml_with_or_without_a_unit(tmp_path, written, size):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({"source": {"disk": written}}))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--source", type=Source)
    arguments = parser.parse_args(["--config", str(path)])
    assert Source(disk=arguments.source.disk).disk_bytes() == size


@pytest.mark.parametrize("flag", ["bos_in_every_context", "exclude_first_position"])
def test_contexts_of_one_token_that_would_hold_nothing_are_an_error(flag):
    with pytest.raises(InputError, match=f"`{flag}` needs a `context_length` of at least 2, got 1"):
        Source(context_length=1, **{flag: True}).check()
    Source(context_length=2, **{flag: True}).check()
    Source(context_length=1).check()


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_an_error(seed):
    with pytest.raises(InputError, match=f"`random_weights` must be a seed of at least 0, got {seed}"):
        Source(random_weights=seed).check()
    Source(random_weights=0).check()


def test_no_other_weights_go_by_the_name_of_the_model():
    assert Source(model="m").model_name == "m"
    assert Source(model="m", random_weights=3).model_name == "m with random weights of seed 3"


def test_identity_is_everything_that_shards_depend_on():
    source = Source(n_tokens=7)
    assert source.identity() == dataclasses.replace(source, non_finite="skip").identity()
    assert source.identity() == dataclasses.replace(source, disk="50GB").identity()
    assert "random_weights" not in source.identity()  # as in caches of earlier versions
    other = {
        "model": "m",
        "dataset": "d",
        "hookpoints": ["resid.1"],
        "n_tokens": 8,
        "context_length": 9,
        "held_out": 0.5,
        "dtype": "int8",
        "bos_in_every_context": True,
        "exclude_first_position": True,
        "exclude_special_tokens": True,
        "random_weights": 0,
    }
    assert set(other) | {"disk", "non_finite"} == {field.name for field in dataclasses.fields(Source)}
    for name, value in other.items():
        assert dataclasses.replace(source, **{name: value}).identity() != source.identity()
