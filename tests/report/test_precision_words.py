from __future__ import annotations

import pytest
from precision_rows import Row, entry, epochs, precision_row, still

from windlass.report.precision_words import new_stalls, recovered, saturating, stalled, stalls

NEAREST = "fixed16,updates=<6,10>,rounding=nearest"
NARROW = {"format": "fixed(16,10)"}


def moving(layer: str) -> Row:
    return entry("updates", layer)


def test_a_weight_that_moves_has_not_stalled() -> None:
    rows = epochs([[moving("c1.weight")]] * 3)
    assert stalled(rows) == recovered(rows) == new_stalls(rows) == []
    assert stalled([]) == recovered([]) == saturating([]) == new_stalls([]) == []


def test_a_stall_names_weight_epochs_updates_and_what_is_lost() -> None:
    entries = [[moving("c3.weight")], [still("c3.weight", 700, **NARROW)], [still("c3.weight", 500, **NARROW)]]
    assert stalled(epochs(entries, recipe=NEAREST)) == [
        "All 1,200 updates of c3.weight rounded to zero from epoch 2 to 3: it no longer moves. Nearest rounding at "
        "steps of 2^-10 loses every update below 2^-11; stochastic rounding or more fraction bits help."
    ]


@pytest.mark.parametrize(
    ("recipe", "number", "words"),
    [
        ("fixed16,rounding=floor", "<2,14>", "at steps of 2^-14 loses every positive update below 2^-14"),
        ("fixed16", "<2,14>", "Stochastic rounding at steps of 2^-14 keeps updates in expectation"),
        ("float16,rounding=nearest", "float16", "to float16, from 2^-24 on, loses every update below 2^-25"),
        ("fixed16,rounding=nearest", "<20,-3>", "at steps of 2^3 loses every update below 2^2"),
        ("fixed16,rounding=nearest", "<16,0>", "at steps of 1 loses every update below 2^-1"),
        ("no recipe", "<2,14>", "in expectation"),
    ],
)
def test_what_is_lost_follows_from_rounding_and_format(recipe: str, number: str, words: str) -> None:
    (text,) = stalled([precision_row(0, still("c1.bias", format=number), recipe=recipe)])
    assert words in text
    assert "more fraction bits help" in text
    assert ("stochastic rounding or" in text) == ("rounding=" in recipe)


def test_stalls_of_the_same_epochs_are_one_sentence_and_the_cause_is_said_once() -> None:
    rows = epochs(
        [[still("a.weight"), still("b.weight"), moving("c.weight")]] + 2 * [[still(f"{i}.weight") for i in "abc"]]
    )
    first, second = stalled(rows)
    assert "All 6,000 updates of 2 parameters (a.weight, b.weight) rounded to zero from epoch 1 to 3: they no" in first
    assert second == "All 2,000 updates of c.weight rounded to zero from epoch 2 to 3: it no longer moves."


def test_of_many_parameters_the_first_are_named() -> None:
    (text,) = stalled([precision_row(0, *(still(f"l{i}.weight") for i in range(20)))])
    assert "20 parameters (l0.weight, l1.weight, l2.weight, l3.weight, l4.weight, l5.weight and 14 more)" in text


def test_many_stalls_make_few_sentences() -> None:
    names = [f"l{i}.weight" for i in range(30)]
    entries = [[still(name) if i <= now else moving(name) for i, name in enumerate(names)] for now in range(30)]
    texts = stalled(epochs(entries))
    assert len(texts) == 7
    assert texts[-1].startswith("So were those of 24 more parameters (l6.weight")


def test_a_weight_that_moves_again_is_told_apart() -> None:
    rows = epochs([[still("a.weight")], [moving("a.weight")], [still("a.weight")], [moving("a.weight")]])
    assert stalled(rows) == []
    (text,) = recovered(rows)
    assert text.startswith("All updates of a.weight rounded to zero for a time from epoch 1 to 3; then updates came")
    again = [*rows, precision_row(4, still("a.weight"))]
    assert "in epoch 5: it no longer moves" in stalled(again)[0]
    assert recovered(again) == [text]


def test_a_row_without_a_weight_neither_ends_nor_lengthens_its_stall() -> None:
    rows = epochs([[still("a.weight", 5)], [entry("activations", "a")], [still("a.weight", 6)]])
    (stall,) = stalls(rows)
    assert (stall.first, stall.last, stall.lost, stall.goes_on) == (1, 3, 11, True)


def test_updates_that_are_all_zero_already_are_no_stall() -> None:
    assert stalled([precision_row(0, entry("updates", "a.weight", zeroed=0, moved=0))]) == []


def test_updates_are_zero_where_all_gradients_round_to_zero() -> None:
    """Nearest rounding may lose the gradients before there is an update to lose."""
    gradients = entry("gradients", "a.weight", zeroed=40, **NARROW)
    (text,) = stalled(epochs([[gradients, entry("updates", "a.weight", zeroed=0, moved=0)]] * 2, recipe=NEAREST))
    assert text == (
        "All 80 gradients of a.weight rounded to zero from epoch 1 to 2: it no longer moves. Nearest rounding at "
        "steps of 2^-10 loses every gradient below 2^-11; stochastic rounding or more fraction bits help."
    )
    assert stalled([precision_row(0, gradients, moving("a.weight"))]) == []


def test_a_stall_is_new_once() -> None:
    entries = [
        [still("a.weight"), moving("b.weight")],
        [still("a.weight"), still("b.weight")],
        [still("a.weight"), still("b.weight")],
        [moving("a.weight"), still("b.weight")],
        [still("a.weight"), still("b.weight")],
    ]
    rows = epochs(entries)
    said = [new_stalls(rows[: i + 1]) for i in range(5)]
    assert [len(texts) for texts in said] == [1, 1, 0, 0, 1]
    assert said[0][0].startswith("All 1,000 updates of a.weight rounded to zero in epoch 1:")
    assert said[1][0].startswith("All 1,000 updates of b.weight rounded to zero in epoch 2:")
    assert said[4][0].startswith("All 1,000 updates of a.weight rounded to zero in epoch 5:")


def test_numbers_out_of_range_name_layer_role_range_and_remedy() -> None:
    (text,) = saturating([precision_row(4, entry("activations", "c3", saturated=25))])
    assert text == (
        "Out of range in epoch 5: 2.50% of the activations of c3. <6,10> holds -32 to 31.999. What helps: "
        "c3.activations=<7,9> doubles the range; batch normalization keeps activations small."
    )


@pytest.mark.parametrize(("saturated", "num_texts"), [(0, 0), (10, 0), (11, 1)])
def test_one_percent_is_not_yet_much(saturated: int, num_texts: int) -> None:
    assert len(saturating([precision_row(0, entry("errors", "c3", saturated=saturated))])) == num_texts


@pytest.mark.parametrize(
    ("role", "layer", "more", "recipe", "words"),
    [
        ("updates", "c3.weight", {}, "fixed16", "c3.updates=<3,13> doubles the range; a lower learning rate"),
        ("weights", "weight", {}, "fixed16", "helps: weights=<3,13> doubles the range; weight decay"),
        ("errors", "c3", {}, "fixed16", "<-4,20> holds -0.03125 to 0.031249. What helps: c3.errors=<3,13> doubles"),
        ("errors", "c3", {}, "fixed16,c3.errors=<4,12>", "c3.errors=<5,11> doubles the range."),
        (
            "gradients",
            "c3.bias",
            {"format": "float16"},
            "float16",
            "c3.gradients=bfloat16 has a wider range.",
        ),
        ("gradients", "c3.bias", {"format": "bfloat16"}, "bfloat16", "A wider range helps."),
        ("weights", "c3.weight", {}, "unreadable", "c3.weights=<3,13> doubles"),
    ],
)
def test_the_remedy_is_in_the_words_of_the_recipe(role: str, layer: str, more: Row, recipe: str, words: str) -> None:
    (text,) = saturating([precision_row(0, entry(role, layer, saturated=500, **more), recipe=recipe)])
    assert words in text


def test_tensors_of_a_role_and_format_are_one_sentence_the_worst_first() -> None:
    entries = [entry("activations", f"l{i}", saturated=20 + i) for i in range(9)]
    texts = saturating([precision_row(0, *entries, entry("weights", "l0.weight", saturated=50))])
    assert len(texts) == 2
    assert (
        "2.80% of the activations of l8, 2.70% of l7, 2.60% of l6, 2.50% of l5, 2.40% of l4, 2.30% of l3 and 3 more"
        in (texts[1])
    )
    assert "l8.activations=<7,9> or activations=<7,9> doubles" in texts[1]
    assert texts[0].startswith("Out of range in epoch 1: 5.00% of the weights of l0.weight.")


def test_what_was_out_of_range_once_says_that_it_fits_now() -> None:
    rows = epochs([[entry("activations", "c1", saturated=n)] for n in (20, 30, 5)])
    assert saturating(rows) == [
        "Of the activations were out of range: 3.00% of c1 in epoch 2. <6,10> holds -32 to 31.999; they fit now."
    ]
