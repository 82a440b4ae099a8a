"""Controls as a configuration asks for them: the revival that goes with each, and what is refused."""

from functools import partial

import pytest

from sae.dictionaries import BatchTopK, JumpReLU, MatchingPursuit, ReLU, TopK
from sae.errors import InputError
from sae.training import SparseAutoencoderModule
from sae.training.controls import Controls
from sae.training.recipe import Recipe

TOPK = partial(TopK, n_latents=96, k=2)
CONTROLS = ("decoder", "soft_decoder", "encoder")


# --- revival


@pytest.mark.parametrize(
    ("make", "control", "ways"),
    [
        (TOPK, None, ("auxk",)),
        (TOPK, "decoder", ("auxk",)),
        (partial(BatchTopK, n_latents=96, k=2), None, ("minfire", "resample")),
        (partial(BatchTopK, n_latents=96, k=2), "soft_decoder", ("minfire",)),
        (partial(BatchTopK, n_latents=96, k=2), "encoder", ()),
        (partial(ReLU, n_latents=96, target_l0=2), "decoder", ()),
    ],
)
def test_nothing_is_resampled_where_nothing_is_said(make, control, ways):
    module = SparseAutoencoderModule(make, controls=control)
    (dictionary,) = module.build(16).values()
    assert module.controls.recipe_of("dictionary", dictionary, module.recipe).ways_for(dictionary) == ways


def test_ways_that_are_asked_for_are_taken():
    recipe = Controls("encoder").recipe_of("dictionary", TOPK(16), Recipe(("minfire",)))
    assert recipe.ways_for(TOPK(16)) == ("minfire",)


# --- bad input


@pytest.mark.parametrize(("asked", "names"), [("hard", ["dictionary"]), ({"a": "hard"}, ["a", "b"])])
def test_an_unknown_control_is_an_error(asked, names):
    with pytest.raises(InputError, match="must be decoder, soft_decoder or encoder, got 'hard'"):
        controls = Controls()
        object.__setattr__(controls, "asked", asked)
        controls.checked(names, Recipe())


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (
            {"dictionaries": {"a": TOPK, "b": TOPK}, "controls": {"c": "decoder"}},
            "must name some of `model.dictionaries`, a, b, got 'c'",
        ),
        (
            {"dictionaries": {"a": TOPK}, "controls": "decoder"},
            "mapping from names to controls, such as {a: decoder}, got 'decoder'",
        ),
        (
            {"dictionary": TOPK, "controls": {"dictionary": "decoder"}},
            "must be the control of the one `model.dictionary`, such as decoder, got {",
        ),
        *(
            (
                {"dictionary": TOPK, "controls": control, "revival": ["auxk", "resample"]},
                "`model.revival` must be without resample under `model.controls`",
            )
            for control in CONTROLS
        ),
    ],
)
def test_bad_controls_are_errors(given, match):
    with pytest.raises(InputError, match=match):
        SparseAutoencoderModule(**given)


@pytest.mark.parametrize(
    ("make", "more", "match"),
    [
        (partial(MatchingPursuit, n_latents=96, k=2), {}, "a kind with an encoder, got MatchingPursuit"),
        (
            partial(ReLU, n_latents=96, sparsity_coefficient=0.5),
            {},
            "needs a ReLU with a `target_l0`, got sparsity_coefficient=0.5",
        ),
        (
            partial(JumpReLU, n_latents=96, target_l0=2),
            {"l0_start": 2.0},
            "`l0_start` must be 1 or null for a JumpReLU whose encoder is frozen .* got 2.0",
        ),
    ],
)
def test_kinds_that_cannot_have_a_frozen_encoder_are_errors_before_any_data(make, more, match):
    module = SparseAutoencoderModule(dictionaries={"a": TOPK, "b": make}, controls={"b": "encoder"}, **more)
    with pytest.raises(InputError, match=match):
        module.check_dictionary()
