"""What a run says of itself at its end."""

import pytest

from sae.callbacks.run_folder import missed_target
from sae.dictionaries import JumpReLU, TopK


@pytest.mark.parametrize(
    ("trained", "held_out", "told"),
    [
        (4.0, 4.05, ""),
        (
            4.0,
            5.0,
            "L0 of `b` is 5 on the held-out rows, its target 4: on the last rows trained on it was 4,",
        ),
        (5.5, 5.0, "L0 of `b` is 5 on the held-out rows, its target 4: more steps come nearer."),
    ],
)
def test_a_target_l0_that_was_missed_is_told_with_why(trained, held_out, told):
    dictionary = JumpReLU(3, 16, target_l0=4)
    dictionary.recent_l0.fill_(trained)
    said = missed_target("b", dictionary, held_out)
    assert said.startswith(told) and (said == "") == (told == "")
    assert missed_target("b", TopK(3, 16, 4), held_out) == ""
    assert missed_target("b", JumpReLU(3, 16, sparsity_coefficient=0.1), held_out) == ""
